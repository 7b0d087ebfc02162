"""`pyrosome verify` as a user runs it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from pyrosome import cli
from pyrosome.cli.terminal import BAD_INPUT, INTERRUPTED
from pyrosome.errors import PyrosomeError
from pyrosome.verify.finding import Finding
from pyrosome.verify.run import CHECKS
from tests.checkpoint.files import SHARD, copied
from tests.cli.sessions import REAL, at_terminal, ended, seen

NANO = "builtin:nano"


def verify(*args):
    """(exit status, standard output, standard error), run in this process."""
    result = CliRunner().invoke(cli.app, ["verify", *map(str, args)])
    if isinstance(result.exception, PyrosomeError):
        return BAD_INPUT, result.stdout, str(result.exception)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_a_sound_model_is_told_line_by_line_and_ends_with_0(tmp_path):
    status, out, err = verify(NANO, "--only", "files,dialect", "--receipt", tmp_path)
    lines = out.splitlines()
    assert status == 0 and lines[0].startswith("ok    files: config.json: release preview")
    assert lines[-1].startswith("all is well: 13 held, 0 failed, 3 left out")
    assert any(line.startswith("-     dialect: official prompts: left out") for line in lines)
    receipt = json.loads((tmp_path / "receipt.json").read_text())
    assert receipt["ok"] and receipt["model"]["name"] == NANO and len(receipt["model"]["fingerprint"]) == 64
    assert receipt["versions"]["torch"] and receipt["machine"]["processor"]["cores"] and receipt["environment"]
    assert str(tmp_path / "receipt.html") in err


def test_something_wrong_ends_with_1_and_the_receipt_is_written_all_the_same(tmp_path):
    path = copied(tmp_path)
    data = bytearray((path / SHARD).read_bytes())
    (path / "SHA256SUMS").write_text(f"{'0' * 64}  {SHARD}\n")
    (path / SHARD).write_bytes(data)
    status, out, _ = verify(path, "--only", "files", "--receipt", tmp_path / "r")
    assert status == 1 and f"FAIL  files: {SHARD}: SHA-256 is" in out
    assert out.splitlines()[-1].startswith("something is wrong: see FAIL above")
    assert json.loads((tmp_path / "r" / "receipt.json").read_text())["ok"] is False


def test_a_cut_shard_ends_with_1_and_not_with_a_traceback(tmp_path):
    path = copied(tmp_path)
    (path / SHARD).write_bytes((path / SHARD).read_bytes()[:5000])
    status, out, _ = verify(path, "--skip", "dialect", "--quick")
    assert status == 1 and "FAIL  files: headers:" in out
    assert sum(line.startswith("-     ") for line in out.splitlines()) >= len(CHECKS) - 2


def test_one_json_object_and_nothing_else(tmp_path):
    status, out, _ = verify(NANO, "--only", "files", "--json", "--quick", "--seed", "7")
    told = json.loads(out)
    assert status == 0 and told["ok"] and [c["check"] for c in told["checks"]] == ["files"]
    assert told["asked"]["seed"] == 7 and told["asked"]["quick"] is True


def test_ctrl_c_ends_it_with_130_and_the_receipt_holds_what_was_found(tmp_path, monkeypatch):
    def interrupted(wanted):
        yield Finding("dialect", "tokenizer", True, "there")
        raise KeyboardInterrupt

    monkeypatch.setattr("pyrosome.verify.dialect.check", interrupted)
    status, out, _ = verify(NANO, "--only", "files,dialect,scales", "--receipt", tmp_path)
    assert status == INTERRUPTED and out.splitlines()[-1].startswith("interrupted: 10 held")
    receipt = json.loads((tmp_path / "receipt.json").read_text())
    assert receipt["interrupted"] and not receipt["ok"]
    assert [len(c["findings"]) for c in receipt["checks"]] == [9, 1, 0]
    assert "Interrupted: not everything" in (tmp_path / "receipt.html").read_text()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["/nowhere/at/all"], "does not exist"),
        (["builtin:none"], "built in are"),
        ([NANO, "--only", "file"], "no such check"),
        ([NANO, "--only", ","], "--only is ','"),
        ([NANO, "--only", "files", "--logprobs", "/nowhere"], "--logprobs is for the check logprobs"),
        ([NANO, "--skip", "files", "--checksums", "/nowhere"], "--checksums is for the check files"),
        ([NANO, "--skip", ",".join(CHECKS)], "no check is left"),
        ([NANO, "--seed", "-1"], "--seed is -1"),
        ([NANO, "--numerics", "bf16"], "--numerics is 'bf16'"),
        ([NANO, "--device", "tpu"], "--device is 'tpu'"),
        ([NANO, "--device", "cuda:64"], "--device is 'cuda:64' and torch finds"),
        ([NANO, "--logprobs", "/nowhere"], "--logprobs names /nowhere"),
        ([NANO, "--checksums", "/nowhere"], "--checksums names /nowhere"),
        ([NANO, "--tokenizer", "/nowhere"], "--tokenizer names /nowhere"),
        ([NANO, "--receipt", "/proc/version/x"], "the receipt was to be written"),
    ],
)
def test_input_that_makes_no_sense_is_refused_with_what_to_do(args, said):
    status, out, err = verify(*args)
    assert status == BAD_INPUT and said in err and out == ""


def test_log_probabilities_that_are_none_are_refused_before_anything_is_looked_at(tmp_path):
    (tmp_path / "vectors.jsonl").write_text('{"ids": [0], "tokens": [1], "logprobs": [-1.0]}\n{"ids": [0]}\n')
    status, out, err = verify(NANO, "--logprobs", tmp_path / "vectors.jsonl", "--receipt", tmp_path / "r")
    assert status == BAD_INPUT and out == "" and "vectors.jsonl, line 2: tokens is missing" in err
    assert not (tmp_path / "r").exists()


def test_a_list_of_checksums_that_is_none_and_a_folder_of_something_else_are_refused(tmp_path):
    (tmp_path / "sums").write_text("not a sum\n")
    assert "line 1" in verify(NANO, "--checksums", tmp_path / "sums")[2]
    assert "neither config.json nor" in verify(tmp_path)[2]


def test_what_a_checkpoint_calls_itself_obeys_nothing(tmp_path):
    path = copied(tmp_path)
    config = json.loads((path / "config.json").read_text()) | {"\x1b[31mred\nFAIL": 1}
    (path / "config.json").write_text(json.dumps(config))
    status, out, _ = verify(path, "--only", "files", "--quick")
    assert status == 0 and "\x1b" not in out and "look  files: config.json:" in out
    assert not [line for line in out.splitlines() if line.startswith("FAIL")]


def test_at_a_terminal_it_is_coloured_and_says_how_far_it_is(tmp_path):
    child = at_terminal(tmp_path, "verify", NANO, "--only", "files", "--offline", program=REAL)
    assert ended(child) == 0
    assert "\x1b[32mok  " in seen(child).text and "100%" in seen(child).text
    assert "all is well" in seen(child).plain
