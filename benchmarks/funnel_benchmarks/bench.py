"""The command `funnel bench`: a suite of benchmarks behind each of its subcommands.

A subcommand has a file of its own, which imports at its top nothing that takes long: `--help` loads them all.
"""

import click

from funnel_benchmarks.compare import compare
from funnel_benchmarks.kernels.command import kernels
from funnel_benchmarks.latency.command import latency
from funnel_benchmarks.peers.command import peers
from funnel_benchmarks.report.command import report
from funnel_benchmarks.scaling.command import scaling
from funnel_benchmarks.serve.command import serve


@click.group(commands=[latency, kernels, peers, serve, scaling, compare, report])
def bench() -> None:
    """Measure how fast the engine is, and compare two measurements."""
