"""The commands `funnel bench all`, `check` and `ceilings`."""

import io
import os
import signal
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from funnel_benchmarks import suite_command
from funnel_benchmarks.device.bench import Bench
from funnel_benchmarks.device.ceilings import Ceilings
from funnel_benchmarks.device.check import Check
from funnel_benchmarks.device.clock import Clock
from funnel_benchmarks.device.parts import PARTS
from funnel_benchmarks.device.sizes import FULL, SMALL
from funnel_benchmarks.report.markdown import write_markdown
from funnel_benchmarks.results import read_results
from funnel_engine.output_files import write_bytes
from funnel_kernels.errors import ConfigError, InputError
from funnel_kernels.target import check_backend

ARCHIVE, REPORT = "results.tar.gz", "report.md"
PACKED = (".json", ".md", ".png")


def device_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that `make_bench` takes."""
    for option in (
        click.option("--seed", type=click.IntRange(min=0), help="Of all random data. Default: another one every time."),
        click.option(
            "--minutes",
            type=float,
            default=9.0,
            show_default=True,
            help="No measurement begins after this time; one that has begun is finished.",
        ),
        click.option("--small", is_flag=True, help="Sizes for a rehearsal on a CPU."),
        suite_command.backend_option,
    ):
        command = option(command)
    return command


def make_bench(backend: str, small: bool, minutes: float, seed: int | None) -> Bench:
    check_backend(backend)
    if not minutes >= 0:
        raise ConfigError(f"--minutes {minutes} is not 0 or more; give the minutes that the run may take")
    # JAX reads it when it makes its first array. A peer runs in a process of its own, and needs memory too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    seed = time.time_ns() % 2**31 if seed is None else seed
    return Bench(SMALL if small else FULL, backend, seed, Clock(minutes, time.monotonic()))


@click.command()
@device_options
@suite_command.file_options()
def check(files: dict[str, Any], **options: Any) -> None:
    """Check every kernel on this device against float64 on the host, at shapes that are hard to get right.

    Exit status 1: a result was wrong, or a check failed.

    Example: funnel bench check --json check.json
    """
    suite_command.run(Check(make_bench(**options)), **files)


@click.command()
@device_options
@suite_command.file_options()
def ceilings(files: dict[str, Any], **options: Any) -> None:
    """Measure what this device can do at best: a large product of bfloat16 matrices, and a copy of memory.

    Example: funnel bench ceilings --json ceilings.json
    """
    suite_command.run(Ceilings(make_bench(**options)), **files)


@click.command("all")
@click.option("--out", type=suite_command.FILE, required=True, help="Folder of the results; made if it is missing.")
@click.option("--only", metavar="PART,PART", help=f"Only these parts of {', '.join(PARTS)}. Default: all.")
@device_options
def all_parts(out: Path, only: str | None, **options: Any) -> None:
    """Check and measure kernels and engine on the accelerator of this machine, within some minutes.

    Writes PART.json into the folder after every measurement, report.md with plots after every part, and
    results.tar.gz, which contains them all, at the end. A run that is terminated keeps and packs what it has measured.
    Exit status 1: a result was wrong, or a measurement failed.

    Where the project is not installed, set PYTHONPATH=bindings:kernels:engine:benchmarks and run
    python -m funnel_benchmarks.bench all ...

    Example: funnel bench all --out results --minutes 4 --only check,ceilings,attention
    """
    parts = chosen_parts(only)
    bench = make_bench(**options)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be made a folder: {error.strerror}; choose another") from error
    for part in PARTS:  # what lies there must be readable when the report is made
        check_earlier(out, part)
    failed = False
    with exit_on_termination():
        try:
            for part in parts:
                bench.matrix_rate = matrix_rate(out)
                try:
                    suite_command.run(PARTS[part](bench), json=out / f"{part}.json")
                except SystemExit as status:
                    if status.code != 1:
                        raise
                    failed = True
                write_report(out)
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


def check_earlier(out: Path, part: str) -> None:
    """Raises `InputError` for a file of a part's name that no run of the part has written."""
    file = out / f"{part}.json"
    if file.exists() and (suite := read_results(file)["suite"]) != PARTS[part].name:
        raise InputError(f"{file} is of suite {suite!r}, not {PARTS[part].name!r}; remove it")


def matrix_rate(out: Path) -> float | None:
    """TFLOP/s of the matrix product, if the ceilings were measured into a folder."""
    file = out / "ceilings.json"
    rows = read_results(file)["rows"] if file.exists() else []
    return next((row["tflops_per_second"] for row in rows if "tflops_per_second" in row), None)


def write_report(out: Path) -> None:
    files = [out / f"{part}.json" for part in PARTS]
    write_markdown([file for file in files if file.exists()], out / REPORT)


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
