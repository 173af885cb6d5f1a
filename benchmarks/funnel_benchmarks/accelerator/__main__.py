"""The command: `python -m funnel_benchmarks.accelerator --out DIR`."""

import argparse
import importlib.metadata
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from funnel_benchmarks.accelerator.bench import DTYPE, Bench
from funnel_benchmarks.accelerator.clock import Clock
from funnel_benchmarks.accelerator.parts import PARTS
from funnel_benchmarks.accelerator.report import (
    TITLES,
    file_name,
    read_tables,
    suite_name,
    write_archive,
    write_plots,
    write_report,
)
from funnel_benchmarks.accelerator.sizes import FULL, SMALL
from funnel_benchmarks.machine import machine_facts
from funnel_benchmarks.results import Results, Row
from funnel_engine import ConfigError, FunnelConfig, FunnelError
from funnel_engine.backends import served_by
from funnel_kernels.target import check_backend

DESCRIPTION = """Checks and measures kernels and engine on the accelerator of this machine. Writes DIR/PART.json after
every measurement, DIR/report.md with plots at the end, and DIR/results.tar.gz, which holds them all. A run that is
terminated keeps what it has measured. Exit status 1: a result was wrong, or something raised; 2:
the command itself cannot be run."""


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status."""
    clock_starts = time.monotonic()
    options = parser().parse_args(arguments)
    try:
        return run(options, arguments, clock_starts)
    except FunnelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m funnel_benchmarks.accelerator", description=DESCRIPTION)
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results; made if missing")
    made.add_argument("--only", metavar="PART,PART", help=f"only these of {', '.join(PARTS)}")
    made.add_argument("--backend", default="auto", help="what runs the kernels; default: auto, the best here")
    made.add_argument("--small", action="store_true", help="sizes for a rehearsal on a CPU")
    made.add_argument("--minutes", type=float, default=9.0, help="no measurement begins after so many; default: 9")
    made.add_argument("--seed", type=int, help="of all random data; default: another one every time")
    made.add_argument("--report", action="store_true", help="measure nothing; make report and plots of DIR's tables")
    return made


def run(options: argparse.Namespace, arguments: Sequence[str], clock_starts: float) -> int:
    if options.report:
        tables = read_tables(options.out, PARTS)
        if not tables:
            raise ConfigError(f"--report: {options.out} holds no tables; give --out the folder of an earlier run")
        write_plots(options.out, tables)
        print(write_report(options.out, tables))
        write_archive(options.out)
        return 0
    parts = chosen_parts(options.only)
    check_backend(options.backend)
    if not options.minutes >= 0:
        raise ConfigError(f"--minutes {options.minutes} must not be negative")
    make_folder(options.out)
    read_tables(options.out, PARTS)  # what lies there must be readable when the report is made
    seed = options.seed if options.seed is not None else time.time_ns() % 2**31
    sizes = SMALL if options.small else FULL
    bench = Bench(sizes, options.backend, seed, Clock(options.minutes, clock_starts))
    machine = facts_of_machine()
    print(f"{', '.join(machine['devices'])}; seed {seed}", flush=True)
    try:
        failed = measure(parts, bench, machine, options, arguments)
    finally:
        write_archive(options.out)
    return int(failed)


def measure(
    parts: Sequence[str], bench: Bench, machine: Row, options: argparse.Namespace, arguments: Sequence[str]
) -> bool:
    """Measures these parts and writes tables, report and plots; whether something failed."""
    failed = False
    for part in parts:
        print(f"{TITLES[part]}:", flush=True)
        results = Results(
            options.out / file_name(part),
            suite=suite_name(part),
            options={"small": options.small, "seed": bench.seed, "backend": options.backend},
            machine=machine,
            facts=facts_of_run(bench, options, arguments),
        )
        results.measure_all(bench.clock.within(PARTS[part](bench)))
        failed |= results.failed
        write_report(options.out, read_tables(options.out, PARTS))
    tables = read_tables(options.out, PARTS)
    write_plots(options.out, tables)
    print(write_report(options.out, tables))
    return failed


def chosen_parts(only: str | None) -> list[str]:
    """The parts to run, in the order of `PARTS`.

    Raises:
        ConfigError: there is no such part.
    """
    if only is None:
        return list(PARTS)
    names = [name.strip() for name in only.split(",")]
    for name in names:
        if name not in PARTS:
            raise ConfigError(f"--only {only!r}: there is no part {name!r}; choose from {','.join(PARTS)}")
    return [part for part in PARTS if part in names]


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be made a folder: {error.strerror}; choose another") from error


def facts_of_run(bench: Bench, options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """What every table says about how it was measured."""
    shown = [options.out.name if argument == str(options.out) else argument for argument in arguments]  # no path
    served = served_by(bench.sizes.config, FunnelConfig(), DTYPE, bench.target)
    return {
        "command": shlex.join(["python", "-m", "funnel_benchmarks.accelerator", *shown]),
        "served_by": served.facts(),
    }


def facts_of_machine() -> dict[str, Any]:
    versions = {name: version_of(name) for name in ("triton", "jax-triton")}
    driver = {"platform_version": jax.devices()[0].client.platform_version, "driver": nvidia_driver()}
    return machine_facts() | versions | driver


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def nvidia_driver() -> str | None:
    """The driver's version, where NVIDIA's own tool tells it."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True)
    return answer.stdout.strip().splitlines()[0] if answer.returncode == 0 and answer.stdout.strip() else None


if __name__ == "__main__":
    # As an exception, so that what is measured is packed.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main(sys.argv[1:]))
