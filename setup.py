"""Builds what is written in C++ with CMake as part of the installation; everything else is in pyproject.toml.

What cannot be built, e.g. because there is no compiler, is left out: without the kernels the package runs on XLA. The
compiler's words are kept in a `not_built.txt`, which `funnel doctor` and `python -m funnel_native` show. With
FUNNEL_REQUIRE_NATIVE=1 in the environment the installation fails instead.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# libfunnel lies in the package and is found from there. A wheel has no symbolic links, so its file has no version.
LIBFUNNEL = (
    "-DFUNNEL_KERNELS=OFF",
    "-DFUNNEL_C_API=ON",
    "-DFUNNEL_DEFAULT_PYTHON=",
    "-DCMAKE_INSTALL_LIBDIR=lib",
    "-DCMAKE_PLATFORM_NO_VERSIONED_SONAME=ON",
)


class CleanBuild(build):
    """Begins with an empty folder: setuptools would install what earlier builds have left there."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildNative(build_ext):
    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        package = (ROOT / "bindings" if in_place else Path(self.build_lib).resolve()) / "funnel_native"
        for stale in package.glob("_handlers*.so"):
            stale.unlink()
        build_part("The kernels for CPUs", package, package, f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package}")
        if not in_place:
            build_part("The C library libfunnel", package, package / "lib", *LIBFUNNEL)


def build_part(name: str, prefix: Path, folder: Path, *options: str) -> None:
    """Builds in a new folder and installs below `prefix`; the reason of a failure goes into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    reason = folder / "not_built.txt"
    reason.unlink(missing_ok=True)
    try:
        with TemporaryDirectory() as built:
            run("cmake", "-S", str(ROOT), "-B", built, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}", *options)
            run("cmake", "--build", built)
            run("cmake", "--install", built, "--prefix", str(prefix))
    except (OSError, subprocess.CalledProcessError) as error:
        said = first_errors(error)
        if os.environ.get("FUNNEL_REQUIRE_NATIVE", "0") != "0":
            sys.exit(f"{name} cannot be built, and FUNNEL_REQUIRE_NATIVE is set:\n{said}")
        reason.write_text(f"{said}\n", encoding="utf-8")
        rule = "*" * 80
        print(f"{rule}\n{name}: left out, because the build failed:\n{said}\n{rule}", file=sys.stderr, flush=True)


def run(*command: str) -> None:
    """Runs a command; all that it prints goes to the log."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace"
    )
    print(done.stdout, end="", file=sys.stderr, flush=True)
    done.check_returncode()


def first_errors(error: OSError | subprocess.CalledProcessError) -> str:
    """The lines in which a compiler first says what is wrong, or else CMake below its heading; or the last ones."""
    said = getattr(error, "output", None) or str(error)
    lines = [line.rstrip() for line in said.splitlines() if line.strip()]
    for mark, offset in (
        (r"\berror: |cannot find|undefined reference", 0),
        (r"^CMake Error.*:$", 1),
        (r"\bError\b", 0),
    ):
        for index, line in enumerate(lines):
            if re.search(mark, line):
                return "\n".join(lines[index + offset :][:5])
    return "\n".join(lines[-5:])


setup(
    ext_modules=[Extension("funnel_native._handlers", sources=[])],
    cmdclass={"build": CleanBuild, "build_ext": BuildNative},
)
