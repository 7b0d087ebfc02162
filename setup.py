"""A wheel with the native libraries in it, so that whoever installs it needs no compiler.

The rest of the build is in pyproject.toml.  An editable install gets no libraries: they are built on first use.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HOME = Path(__file__).parent


def toolchain() -> ModuleType:
    """`pyrosome.ops.toolchain` by its path: the package itself needs torch, which a build has not got."""
    spec = importlib.util.spec_from_file_location("toolchain", HOME / "src" / "pyrosome" / "ops" / "toolchain.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildWithLibraries(build_py):
    """The package, with a library for each level of vector instructions, where there is a compiler."""

    libraries: tuple[Path, ...] = ()

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        folder = Path(self.build_lib) / "pyrosome" / "ops" / "built"
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier build in the same folder
        try:
            self.libraries = tuple(toolchain().ship(folder))
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            self.warn(f"this wheel has no native libraries, each machine will build its own on first use: {error}")

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *map(str, self.libraries)]


class PlatformWheel(bdist_wheel):
    """Named for the platform and for any Python 3: libraries depend on the one and not on the other."""

    def get_tag(self) -> tuple[str, str, str]:
        if not self.get_finalized_command("build_py").libraries:
            return super().get_tag()
        self.root_is_pure = False  # no earlier: until now files went where a pure package's go
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"build_py": BuildWithLibraries, "bdist_wheel": PlatformWheel})
