"""How sources become a library: what the processor has, names of builds, compilers that fail, and wheels."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pyrosome.ops import toolchain

ROOT = Path(__file__).parents[2]
HAS_COMPILER = any(map(shutil.which, ("g++", "clang++", "c++"))) or "CXX" in os.environ
needs_a_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="there is no C++ compiler")
posix = pytest.mark.skipif(sys.platform == "win32", reason="its compiler is a shell script")
ALL = " ".join(sorted(frozenset().union(*toolchain.NEEDS.values())))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder of few sources, quick to build, in place of the ops; its cache is its own too."""
    home = tmp_path / "ops"
    home.mkdir()
    for path in (toolchain.HOME / "native.cpp", *toolchain.HOME.glob("*.h")):
        shutil.copy(path, home)
    monkeypatch.setattr(toolchain, "HOME", home)
    monkeypatch.setattr(toolchain, "SHIPPED", home / "built")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return home


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """$CXX is a compiler that writes an empty file, and a line to `log` for each call."""
    stub, log = tmp_path / "stub", tmp_path / "log"
    stub.write_text(
        f'#!/bin/sh\necho "$*" >> {log}\n[ "$1" = --version ] && exit\n'
        'while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done\n'
    )
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(stub))
    return log


# ---------------------------------------------------------------- what the processor has


@pytest.mark.parametrize(
    ("flags", "levels"),
    [
        ("fpu sse2", ("portable",)),
        ("avx2 fma", ("portable",)),
        ("f16c fpu avx2 fma", ("portable", "avx2")),
        ("avx2 fma f16c avx512f avx512bw avx512vl avx512dq", ("portable", "avx2")),
        (ALL, ("portable", "avx2", "avx512")),
        (ALL.replace("avx512_bf16", "avx512_bf16x"), ("portable", "avx2")),
    ],
)
def test_levels_are_read_from_the_first_processor(flags, levels, monkeypatch):
    text = f"processor : 0\nflags\t\t: {flags}\nbugs : none\n\nprocessor : 1\nflags\t\t: {ALL}\n"
    monkeypatch.setattr(toolchain.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(toolchain.Path, "read_text", lambda self: text if str(self) == "/proc/cpuinfo" else None)
    assert toolchain.supported() == levels


@pytest.mark.parametrize("text", ["", "processor : 0\n"])
def test_a_processor_that_says_nothing_has_the_least(text, monkeypatch):
    monkeypatch.setattr(toolchain.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(toolchain.Path, "read_text", lambda self: text)
    assert toolchain.supported() == ("portable",)


def test_a_system_without_that_file_has_the_least(monkeypatch):
    def missing(self):
        raise FileNotFoundError(self)

    monkeypatch.setattr(toolchain.platform, "machine", lambda: "AMD64")
    monkeypatch.setattr(toolchain.Path, "read_text", missing)
    assert toolchain.supported() == ("portable",)


def test_another_kind_of_processor_has_the_least(monkeypatch):
    monkeypatch.setattr(toolchain.platform, "machine", lambda: "aarch64")
    assert toolchain.supported() == ("portable",)


# ---------------------------------------------------------------- names of builds


def test_a_key_changes_with_sources_headers_and_flags(home, monkeypatch):
    def keys():
        return [toolchain.key(level) for level in toolchain.LEVELS]

    seen = [keys()]
    assert keys() == seen[0] and len(set(seen[0])) == len(toolchain.LEVELS)
    (home / "op").mkdir()
    for changed in (home / "native.cpp", home / "lanes.h", home / "op" / "cpu.cpp", home / "op" / "part.h"):
        with changed.open("a") as f:
            f.write("// changed\n")
        seen.append(keys())
    monkeypatch.setattr(toolchain, "FLAGS", (*toolchain.FLAGS, "-DX"))
    seen.append(keys())
    assert len({key for found in seen for key in found}) == len(seen) * len(toolchain.LEVELS)
    monkeypatch.setitem(toolchain.LEVEL_FLAGS, "avx2", (*toolchain.LEVEL_FLAGS["avx2"], "-DY"))
    assert [a == b for a, b in zip(keys(), seen[-1], strict=True)] == [True, False, True]


@posix
def test_a_key_changes_with_the_compiler_and_its_version(home, tmp_path):
    found = {toolchain.key("portable")}
    for name in ("one", "other"):
        for version in (1, 2):
            program = tmp_path / name
            program.write_text(f"#!/bin/sh\necho {version}\n")
            program.chmod(0o755)
            found.add(toolchain.key("portable", str(program)))
    assert len(found) == 5


# ---------------------------------------------------------------- where a library comes from


@posix
def test_a_shipped_library_of_these_sources_is_taken(home, stub):
    (home / "built").mkdir()
    shipped = home / "built" / f"libpyrosome-avx2-{toolchain.key('avx2')}.so"
    shipped.touch()
    assert toolchain.library("avx2") == shipped
    assert not stub.exists()  # no compiler was asked for anything


@posix
def test_a_shipped_library_of_other_sources_is_not(home, stub, tmp_path):
    (home / "built").mkdir()
    (home / "built" / f"libpyrosome-avx2-{toolchain.key('avx2')}.so").touch()
    (home / "native.cpp").write_text("int other;\n")
    built = toolchain.library("avx2")
    assert built.is_relative_to(tmp_path / "cache") and built.exists()
    calls = stub.read_text()
    assert toolchain.library("avx2") == built
    assert "-c" not in stub.read_text()[len(calls) :]  # it is built once, and then only asked for its version


@needs_a_compiler
def test_a_compiler_that_fails_says_why(home, tmp_path):
    (home / "native.cpp").write_text("int f() { return undeclared_thing; }\n")
    with pytest.raises(OSError, match=r"(?s)could not build the native kernels; name another .*undeclared_thing"):
        toolchain.library("portable")
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_a_compiler_that_is_not_there_is_named(home, monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(OSError, match=r"\$CXX names the C\+\+ compiler '/no/such/compiler', and there is none"):
        toolchain.library("portable")


def test_without_a_compiler_one_is_asked_for(home, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(OSError, match=r"no C\+\+ compiler was found .* install one"):
        toolchain.library("portable")


def test_windows_is_told_what_runs_there(monkeypatch):
    monkeypatch.setattr(toolchain.sys, "platform", "win32")
    with pytest.raises(OSError, match="the torch definitions run instead"):
        toolchain.compiler()


@posix
def test_a_build_appears_whole_or_not_at_all(home, stub, tmp_path, monkeypatch):
    target = tmp_path / "out" / "library.so"
    target.parent.mkdir()
    steps = []

    def run(command):
        steps.append(("-shared" in command, sorted(p.name for p in target.parent.iterdir() if p.is_file())))
        if fails and "-shared" in command:
            raise OSError("the linker failed")
        Path(command[command.index("-o") + 1]).write_text("whole")

    monkeypatch.setattr(toolchain, "_run", run)
    fails = True
    with pytest.raises(OSError, match="the linker failed"):
        toolchain.build("portable", "stub", target)
    assert list(target.parent.iterdir()) == []  # nor is a part left behind
    fails = False
    toolchain.build("portable", "stub", target)
    assert steps == 2 * [(False, []), (True, [])]
    assert [p.name for p in target.parent.iterdir()] == ["library.so"] and target.read_text() == "whole"


# ---------------------------------------------------------------- wheels


@needs_a_compiler
def test_every_level_is_shipped_and_loads(home):
    made = toolchain.ship(home / "built")
    levels = toolchain.LEVELS if toolchain.platform.machine() in ("x86_64", "AMD64") else toolchain.LEVELS[:1]
    assert [toolchain.library(level) for level in levels] == made
    assert sorted((home / "built").iterdir()) == sorted(made)
    for number, (level, path) in enumerate(zip(levels, made, strict=True)):
        if level in toolchain.supported():  # others have instructions that this processor has not
            assert ctypes.CDLL(str(path)).pyrosome_level() == number


def pip(tmp_path, command, *arguments):
    """pip's `command`, run in a copy of this package, with what is installed here; skips where that is not enough."""
    for module in ("setuptools", "pip"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    copy = tmp_path / "copy"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "built", "*.safetensors")
    shutil.copytree(ROOT / "src", copy / "src", ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    run = [sys.executable, "-m", "pip", command, "--no-deps", "--no-build-isolation", *arguments]
    done = subprocess.run(run, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def wheel(tmp_path, *options):
    """(files in a wheel built of a copy of this package, its path, what pip said)"""
    done = pip(tmp_path, "wheel", ".", "-w", str(tmp_path), *options)
    (path,) = tmp_path.glob("*.whl")
    unpacked = tmp_path / "unpacked"
    zipfile.ZipFile(path).extractall(unpacked)
    return {str(p.relative_to(unpacked)) for p in unpacked.rglob("*") if p.is_file()}, path, done.stdout + done.stderr


def loaded(path):
    """The toolchain of an unpacked wheel, as a build loads it: by its path, without the package."""
    spec = importlib.util.spec_from_file_location("unpacked_toolchain", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@posix
def test_a_wheel_has_a_library_for_each_level_and_all_sources(tmp_path, stub):
    files, path, _ = wheel(tmp_path)
    assert path.name.split("-")[2:4] == ["py3", "none"] and "any" not in path.name
    theirs = loaded(tmp_path / "unpacked" / "pyrosome" / "ops" / "toolchain.py")
    libraries = {f for f in files if f.endswith(".so")}
    x86 = toolchain.platform.machine() in ("x86_64", "AMD64")
    assert len(libraries) == (3 if x86 else 1)
    # Each is the one that the installed package looks for, which needs every source to be there.
    for level in toolchain.LEVELS if x86 else toolchain.LEVELS[:1]:
        assert str(theirs.library(level).relative_to(tmp_path / "unpacked")) in libraries
    here = {str(p.relative_to(ROOT / "src")) for p in toolchain.sources()}
    assert here == {f for f in files if f.endswith((".cpp", ".h"))}
    data = ("train/recipes/nano.toml", "builtin/ledger.txt", "builtin/nano/config.json", "builtin/nano/tokenizer.json")
    assert {f"pyrosome/{name}" for name in data} <= files
    (metadata,) = (tmp_path / "unpacked").glob("*.dist-info/WHEEL")
    assert "Root-Is-Purelib: false" in metadata.read_text()


@posix
def test_a_wheel_without_a_compiler_has_none_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    files, path, said = wheel(tmp_path, "-v")
    assert path.name.endswith("-py3-none-any.whl")
    assert not [f for f in files if f.endswith(".so")]
    assert "this wheel has no native libraries" in said and "/no/such/compiler" in said


@posix
def test_an_editable_install_builds_no_library(tmp_path, stub):
    pip(tmp_path, "install", "--target", str(tmp_path / "site"), "-e", ".")
    assert not stub.exists() and not list((tmp_path / "copy").rglob("*.so"))


# ---------------------------------------------------------------- other processors


@pytest.mark.skipif(not shutil.which("aarch64-linux-gnu-g++"), reason="there is no compiler for aarch64")
def test_the_portable_level_is_built_for_another_processor(tmp_path):
    target = tmp_path / "library.so"
    toolchain.build("portable", "aarch64-linux-gnu-g++", target)
    header = target.read_bytes()[:20]
    assert header[:4] == b"\x7fELF" and int.from_bytes(header[18:20], "little") == 183  # EM_AARCH64
