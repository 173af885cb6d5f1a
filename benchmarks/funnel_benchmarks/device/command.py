"""The command `funnel bench all`."""

import io
import os
import signal
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from funnel_benchmarks import suite_command
from funnel_benchmarks.device.parts import FULL, PARTS, SMALL, Run
from funnel_benchmarks.report.markdown import write_markdown
from funnel_benchmarks.results import read_results
from funnel_engine.output_files import write_bytes
from funnel_kernels.errors import ConfigError
from funnel_kernels.target import check_backend

ARCHIVE, REPORT = "results.tar.gz", "report.md"
PACKED = (".json", ".md", ".png")


@click.command("all")
@click.option("--out", type=suite_command.FILE, required=True, help="Folder of the results; made if it is missing.")
@click.option("--only", metavar="PART,PART", help=f"Only these parts of {', '.join(PARTS)}. Default: all.")
@suite_command.backend_option
@suite_command.small_option
@suite_command.minutes_option
@suite_command.seed_option
def all_parts(out: Path, only: str | None, backend: str, small: bool, minutes: float, seed: int | None) -> None:
    """Check and measure kernels and engine on the accelerator of this machine, within some minutes.

    Writes PART.json into the folder after every measurement, report.md with plots after every part, and
    results.tar.gz, which contains them all, at the end. A run that is terminated keeps and packs what it has measured.
    Exit status 1: a result was wrong, or a measurement failed.

    Where the project is not installed, set PYTHONPATH=bindings:kernels:engine:serving:benchmarks and run
    python -m funnel_benchmarks.bench all ...

    Example: funnel bench all --out results --minutes 4 --only check,ceilings,attention
    """
    parts = chosen_parts(only)
    check_backend(backend)
    run = Run(extent=SMALL if small else FULL, backend=backend, seed=seed, until=suite_command.deadline(minutes))
    # JAX reads it when it makes its first array. A peer runs in a process of its own, and needs memory too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be made a folder: {error.strerror}; choose another") from error
    for file in part_files(out):  # what lies there must be readable when the report is made
        read_results(file)
    failed = False
    with exit_on_termination():
        try:
            for part in parts:
                try:
                    PARTS[part](run, out / f"{part}.json")
                except SystemExit as status:
                    if status.code != 1:
                        raise
                    failed = True
                write_markdown(part_files(out), out / REPORT)
        finally:
            write_archive(out)
    click.echo(f"archive {out / ARCHIVE}")
    if failed:
        raise SystemExit(1)


def chosen_parts(only: str | None) -> list[str]:
    """The parts to run, in the order of `PARTS`.

    Raises:
        ConfigError: a part does not exist.
    """
    if only is None:
        return list(PARTS)
    names = [name.strip() for name in only.split(",")]
    for name in names:
        if name not in PARTS:
            raise ConfigError(f"--only {only!r}: {name!r} is not a part; choose from {','.join(PARTS)}")
    return [part for part in PARTS if part in names]


def part_files(out: Path) -> list[Path]:
    """The results of parts that a folder has, in the order of `PARTS`."""
    return [file for file in (out / f"{part}.json" for part in PARTS) if file.exists()]


def write_archive(out: Path) -> None:
    """Packs tables, report and plots of a folder: one file to take away."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for path in sorted(out.iterdir()):
            if path.suffix in PACKED:
                archive.add(path, path.name)
    write_bytes(out / ARCHIVE, content.getvalue())


@contextmanager
def exit_on_termination() -> Iterator[None]:
    """Makes SIGTERM an exception, so that what is measured is packed."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
