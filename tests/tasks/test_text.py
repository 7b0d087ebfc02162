"""Corpora: what is found, what is left out, passages of either part, and clear words where there is nothing."""

import random
import sysconfig

import pytest

from pyrosome.errors import RequestError
from pyrosome.tasks.text import Corpus, Text, corpora

STDLIB = sysconfig.get_paths()["stdlib"]


def tree(tmp_path, num_files=64):
    library = tmp_path / "lib"
    for n in range(num_files):
        (library / f"part{n % 3}").mkdir(parents=True, exist_ok=True)
        lines = (f"line {i} of file {n}\n" for i in range(50))
        (library / f"part{n % 3}" / f"file{n}.py").write_text("".join(lines))
    return library


def test_the_sources_are_found_with_their_licences(tmp_path):
    library, doc = tree(tmp_path), tmp_path / "doc"
    for name in ("site-packages", "test", "encodings"):
        (library / name).mkdir()
        (library / name / "not_this.py").write_text("x = 1\n")
    (library / "data.txt").write_text("not this\n")
    sources = doc / "python3.11" / "html" / "_sources"
    sources.mkdir(parents=True)
    (sources / "tutorial.rst.txt").write_text("Tutorial\n")
    (doc / "python3").symlink_to(doc / "python3.11")
    (doc / "sqlite3" / "syntax").mkdir(parents=True)
    (doc / "sqlite3" / "syntax" / "a.html").write_text("<p>A</p>")
    found = corpora(library, doc)
    assert [(c.name, c.licence, len(c.files)) for c in found] == [
        ("python-stdlib", "PSF-2.0", 64), ("python-doc", "PSF-2.0", 1), ("sqlite-doc", "public domain", 1),
    ]  # fmt: skip
    assert list(found[0].files) == sorted(found[0].files)
    assert found[0].num_bytes == sum(f.stat().st_size for f in found[0].files)
    assert corpora(library, tmp_path / "nothing") == [found[0]]


def test_this_machine_has_a_standard_library():
    code = corpora()[0]
    assert code.name == "python-stdlib" and code.num_bytes > 1_000_000
    assert all(str(f).startswith(STDLIB) for f in code.files)


def test_a_file_is_in_one_part_and_its_path_in_the_corpus_decides(tmp_path):
    text = Text(corpora(tree(tmp_path), tmp_path))
    (tmp_path / "moved").mkdir()
    moved = Text(corpora(tree(tmp_path / "moved"), tmp_path))
    assert text.documents == moved.documents
    assert len(text.documents[True]) + len(text.documents[False]) == 64
    assert 1 <= len(text.documents[True]) <= 10
    assert not set(text.documents[True]) & set(text.documents[False])


@pytest.mark.parametrize("heldout", [False, True])
def test_passages_are_of_their_part_and_begin_with_a_line(tmp_path, heldout):
    text, rng = Text(corpora(tree(tmp_path), tmp_path)), random.Random(1)
    passages = [text.passage(rng, 100, heldout) for _ in range(200)]
    assert all(len(p) == 100 and p.startswith("line ") for p in passages)
    assert all(any(p in d for d in text.documents[heldout]) for p in passages)
    assert not any(p in d for p in passages for d in text.documents[not heldout])
    assert len(set(passages)) > 20
    again = random.Random(1)
    assert passages == [text.passage(again, 100, heldout) for _ in range(200)]
    assert text.passage(rng, 10**6, heldout) in text.documents[heldout]


def test_a_passage_is_a_sample_of_kind_text(tmp_path):
    text = Text(corpora(tree(tmp_path), tmp_path))
    sample = text.sample(random.Random(2), 80, heldout=True)
    assert (sample.kind, sample.text, sample.answers) == ("text", text.passage(random.Random(2), 80, True), ())


def test_long_documents_are_chosen_more_often(tmp_path):
    library = tree(tmp_path)
    (library / "long.py").write_text("long line\n" * 50_000)
    text, rng = Text(corpora(library, tmp_path)), random.Random(1)
    assert sum(text.passage(rng, 50).startswith("long") for _ in range(100)) > 70


def test_what_is_not_plain_text_is_left_out(tmp_path):
    library = tree(tmp_path)
    (library / "latin.py").write_bytes(b"# caf\xe9\n" * 100)
    (library / "empty.py").write_text("")
    (library / "mixed.py").write_text("plain before\n# caf\u00e9\nplain after\n", encoding="utf-8")
    documents = [d for part in Text(corpora(library, tmp_path)).documents.values() for d in part]
    assert "plain before\nplain after\n" in documents
    assert len(documents) == 65 and all(d.isascii() for d in documents)


def test_pages_lose_their_tags(tmp_path):
    pages = tmp_path / "sqlite3"
    pages.mkdir()
    for n in range(64):
        (pages / f"page{n}.html").write_text(
            f"<html><head><style>p {{color: red}}</style><script>var a = '<p>';</script></head><body>"
            f"<h1>Page {n}</h1>\n\n\n<p>a &lt; b &amp; <b>c</b></p></body></html>"
        )
    documents = Text(corpora(tmp_path / "none", tmp_path)).documents
    assert "Page 3\n\na < b & c\n" in documents[False] + documents[True]


def test_no_corpus_is_said(tmp_path):
    assert corpora(tmp_path / "none", tmp_path) == []
    with pytest.raises(RequestError, match="no corpus was found on this machine; install python3-doc"):
        Text([])


@pytest.mark.parametrize(("names", "says"), [(("a.py",), "none to hold out"), ((), "none to train with")])
def test_an_empty_part_is_said(tmp_path, names, says):
    for name in names:
        (tmp_path / name).write_text("text\n")
    (tmp_path / "blank.py").write_text("\n")
    files = tuple(sorted(tmp_path.glob("*.py")))
    with pytest.raises(RequestError, match=says):
        Text([Corpus("small", "none", tmp_path, files, 1)])
