"""The command `funnel bench`: a suite of benchmarks behind each of its subcommands.

A subcommand has a file of its own, which imports at its top nothing that takes long: `--help` loads them all.
"""

import sys

import click

from funnel_benchmarks.compare import compare
from funnel_benchmarks.device.command import all_parts
from funnel_benchmarks.kernels.command import ceilings_command, check_command, kernels_command
from funnel_benchmarks.latency.command import latency
from funnel_benchmarks.peers.command import peers
from funnel_benchmarks.report.command import report
from funnel_benchmarks.scaling.command import scaling
from funnel_benchmarks.serve.command import serve


@click.group(
    commands=[
        latency,
        kernels_command,
        peers,
        serve,
        scaling,
        check_command,
        ceilings_command,
        all_parts,
        compare,
        report,
    ]
)
def bench() -> None:
    """Measure how fast the engine is, and compare two measurements."""


if __name__ == "__main__":  # from the source roots, where no distribution has made the command `funnel`
    from funnel_engine.cli import main

    main.add_command(bench)
    main(["bench", *sys.argv[1:]], prog_name="python -m funnel_benchmarks.bench")
