"""Tells a compiler where the installed libfunnel is: `cc program.c $(python -m funnel_native --cflags --libs)`."""

import argparse
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
LIB = PACKAGE / "lib"
ANSWERS = {
    "cflags": ("flags to compile with", f"-I{PACKAGE / 'include'}"),
    "libs": ("flags to link with", f"-L{LIB} -Wl,-rpath,{LIB} -lfunnel"),
    "cmake-dir": ("directory for -DFunnelEngine_DIR of CMake", str(LIB / "cmake" / "FunnelEngine")),
    "pkg-config-dir": ("directory for PKG_CONFIG_PATH", str(LIB / "pkgconfig")),
}


def main() -> None:
    parser = argparse.ArgumentParser("python -m funnel_native", description=__doc__)
    for name, (meaning, answer) in ANSWERS.items():
        parser.add_argument(f"--{name}", dest="answers", action="append_const", const=answer, help=f"print {meaning}")
    answers = parser.parse_args().answers
    if not answers:
        parser.error(f"give at least one of --{', --'.join(ANSWERS)}")
    if not (LIB / "libfunnel.so").exists():
        reason = LIB / "not_built.txt"
        why = reason.read_text(encoding="utf-8") if reason.exists() else "an editable installation has none\n"
        sys.exit(f"libfunnel is not in this installation: {why}docs/c-api.md says how to build it.")
    print(*answers)


if __name__ == "__main__":
    main()
