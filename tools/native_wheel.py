"""Builds the native CPU kernels into the wheel, where there is a compiler; pyproject.toml names the classes.

Without one the wheel holds the sources only, and the server tries again where it runs.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

# Not imported: the package's dependencies are not there when it is built.
_LIBRARY = Path(__file__).parent.parent / "server" / "engine" / "backend" / "native_library.py"


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        library = runpy.run_path(str(_LIBRARY))
        target = Path(self.build_lib, "server", "engine", "csrc", library["library_name"]())
        try:
            library["build_library"](target)
        except (library["NativeUnavailableError"], OSError) as error:
            self.warn(f"no native CPU kernels in this wheel: {error}")


class BdistWheel(bdist_wheel):
    """Any Python, but one platform."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]
