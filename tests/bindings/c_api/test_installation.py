"""What an installed libfunnel exports, and that its version is the package's."""

import re

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
    assert len(declared) == 14
    assert sorted(line.split()[-1] for line in lines) == sorted(declared)
