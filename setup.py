"""Builds the kernels for CPUs with CMake as part of the installation; everything else is in pyproject.toml.

Where that fails, e.g. because there is no compiler, the package is installed without them: it runs on XLA, and
`funnel doctor` shows what stands in `not_built.txt`.
"""

import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, extension: Extension) -> None:
        package = Path(self.get_ext_fullpath(extension.name)).resolve().parent
        reason = package / "not_built.txt"
        reason.unlink(missing_ok=True)
        try:
            self.build_with_cmake(package)
        except (OSError, subprocess.CalledProcessError) as error:
            package.mkdir(parents=True, exist_ok=True)
            reason.write_text(f"{last_words(error)}\n")
            print(f"The kernels for CPUs are left out: {last_words(error)}", file=sys.stderr)

    def build_with_cmake(self, package: Path) -> None:
        build = Path(self.build_temp).resolve() / "cmake"
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package}",
        ]  # fmt: skip
        for command in (configure, ["cmake", "--build", str(build)]):
            subprocess.run(command, check=True, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)


def last_words(error: OSError | subprocess.CalledProcessError) -> str:
    """What a failed command said first about its failure, in one line: CMake puts that below a heading of its own."""
    said = getattr(error, "stderr", None) or str(error)
    found = re.search(r"^CMake Error.*:\n\s*(.+(?:\n  +\S.*)*)", said, re.MULTILINE) or re.search(
        r"^(.*\berror\b.*)", said, re.M
    )
    return " ".join((found[1] if found else said).split())


setup(
    ext_modules=[Extension("funnel_native._handlers", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
