"""What an installed libfunnel exports and needs, and that its version is the package's."""

import re
import sys

from c_library import HEADER, ROOT, run
from funnel_engine import c_host


def test_versions_agree(library):
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert library.functions.funnel_version().decode() == version
    declared = int(re.search(r"#define FUNNEL_API_VERSION (\d+)", HEADER.read_text())[1])
    assert library.functions.funnel_api_version() == declared == c_host.API_VERSION


def test_only_the_functions_of_the_header_are_exported(built):
    lines = run("nm", "-D", "--defined-only", built.prefix / "lib" / "libfunnel.so").splitlines()
    declared = re.findall(r"^FUNNEL_API .*?(funnel_\w+)\(", HEADER.read_text(), re.MULTILINE)
    assert len(declared) == 18
    assert sorted(line.split()[-1] for line in lines) == sorted(declared)


def test_a_program_can_be_linked_and_started_without_libpython(built):
    for name in ("libfunnel.so", "libfunnel_python.so"):
        needed = run("readelf", "-d", built.prefix / "lib" / name)
        assert "libc.so" in needed
        assert "libpython" not in needed
        assert "RUNPATH" not in needed


def test_before_the_first_funnel_open_there_is_no_engine(built):
    """The functions are not loaded yet, and say what they say later."""
    code = """
import sys
from c_library import Library, Refused
library = Library(sys.argv[1])
for function in ("warmup", "close"):
    for handle in (None, 1):
        try:
            library.call(function, handle)
        except Refused as refused:
            print(refused)
"""
    paths = "PYTHONPATH=" + ":".join(filter(None, sys.path))
    said = run("env", paths, sys.executable, "-c", code, built.prefix / "lib" / "libfunnel.so").splitlines()
    expected = [
        f"INVALID_ARGUMENT: engine is {what}; give one that funnel_open has returned" for what in ("NULL", "no handle")
    ]
    assert said == expected * 2
