"""Builds maml_fast._core with CMake and Ninja; everything else about the package is in pyproject.toml.

MAML_FAST_NO_CORE=1  install without the compiled core
CMAKE_ARGS           more arguments for CMake's configuration, split like a shell would
CXX                  the compiler
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
WITHOUT = "Set MAML_FAST_NO_CORE=1 to install maml_fast without its compiled core (much slower)."


def tool(name: str) -> str:
    """Path of a build tool, also where the virtual environment that holds it is not activated."""
    path = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])
    found = shutil.which(name, path=path)
    if found is None:
        raise SystemExit(f"maml_fast: {name} not found; `pip install {name}` brings it. {WITHOUT}")
    return found


def check_compiler() -> None:
    wanted = os.environ.get("CXX")
    names = [shlex.split(wanted)[0]] if wanted else ["c++", "g++", "clang++"]
    if not any(map(shutil.which, names)):
        raise SystemExit(
            f"maml_fast: no C++ compiler (looked for {', '.join(names)}). Install g++ >= 11 or clang "
            f"(Debian, Ubuntu: apt-get install g++), or name one in CXX. {WITHOUT}"
        )


class CMakeBuild(build_ext):
    def run(self) -> None:
        # A developer's `build_ext --inplace` is incremental, and apart from pip's builds, whose tools vanish with
        # their isolated environment.
        self.incremental = self.inplace and not self.editable_mode
        super().run()

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        check_compiler()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        own = ROOT / "build" / f"core-{sysconfig.get_config_var('SOABI')}"
        build = own if self.incremental else Path(self.build_temp)
        cmake, ninja = tool("cmake"), tool("ninja")
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"),
            *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
            *("-DPYBIND11_FINDPYTHON=ON", "-DCMAKE_BUILD_TYPE=Release", "--log-level=NOTICE"),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        try:
            subprocess.run(configure, check=True)
            subprocess.run([cmake, "--build", str(build), "--target", "_core"], check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"maml_fast: building the C++ core failed, see above. {WITHOUT}") from error
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(build / target.name, target)


without_core = os.environ.get("MAML_FAST_NO_CORE", "0") not in ("", "0")
setup(
    ext_modules=[] if without_core else [Extension("maml_fast._core", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
