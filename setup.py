"""Builds the C kernels into a wheel when a compiler is there; all else is in pyproject.toml.

Never fails an install: without them they are compiled at first use, or the reference runs.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))
from bitnest.kernels.csource import Unavailable, find_compiler  # needs no other package
from bitnest.kernels.prebuilt import build_prebuilt


class WithLibraries(Distribution):
    """Where a compiler is, the wheel is for one platform."""

    def has_ext_modules(self) -> bool:
        try:
            find_compiler()
        except Unavailable:
            return False
        return True


class BuildWithKernels(build_py):
    """Puts libraries beside the modules; an editable install has its sources, and compiles them."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        built = build_prebuilt(Path(self.build_lib) / "bitnest" / "kernels" / "prebuilt")
        for name, failure in built.items():
            if failure:
                logging.getLogger(__name__).warning("kernel not built: %s: %s", name, failure)


class AnyPython(bdist_wheel):
    """The libraries are loaded with ctypes: one wheel for all versions of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(distclass=WithLibraries, cmdclass={"build_py": BuildWithKernels, "bdist_wheel": AnyPython})
