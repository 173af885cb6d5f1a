"""The command `funnel bench serve`."""

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import click

from funnel_benchmarks import suite_command
from funnel_benchmarks.memory import check_memory
from funnel_benchmarks.models import preset_model
from funnel_benchmarks.peers.suite import model_fields
from funnel_benchmarks.serve.http_suite import Suite as HttpSuite
from funnel_benchmarks.serve.suite import Suite
from funnel_engine import FunnelConfig

LENGTHS = ("conll", "agnews", "passage")


@click.command()
@suite_command.preset_option
@suite_command.depth_option
@suite_command.layer_option
@suite_command.lengths_option(*LENGTHS)
@click.option(
    "--requests",
    "count",
    type=click.IntRange(1, 2**20),
    default=1000,
    show_default=True,
    help="For each line of the result. A p99 that is precise needs 10000.",
)
@click.option(
    "--max-batch-tokens",
    type=click.IntRange(1, 2**24),
    default=4096,
    show_default=True,
    help="What a batch holds. A batch takes no more than what waits, so this bounds only how long a burst is on its "
    "way at once; the default is enough for matrix products to run at full rate.",
)
@click.option(
    "--http",
    is_flag=True,
    help="Measure `funnel serve` over sockets, beside the engine and beside sentence-transformers behind FastAPI.",
)
@click.option(
    "--max-waiting-requests",
    type=click.IntRange(1, 2**20),
    default=128,
    show_default=True,
    help="With --http: the queue of `funnel serve`.",
)
@suite_command.dtype_option
@suite_command.backend_option
@suite_command.file_options(plot="latency over rate")
def serve(
    preset: str,
    depth: int | None,
    layer: int | None,
    dtype: str,
    lengths: tuple[str, ...],
    http: bool,
    max_waiting_requests: int,
    files: Any,
    **options: Any,
) -> None:
    """Measure latencies of requests that arrive by chance, with a funnel and without.

    Requests of one sequence each arrive as a Poisson process, whatever the engine is doing (an open loop), at several
    shares of the rate at which it can serve them when all are there at once. Both engines see the same arrivals.
    With --http they go through servers, whose throughput and latency are first compared with the engine's own.
    Exit status 1: a row failed.

    Example: funnel bench serve --lengths conll --requests 10000 --json serve.json --plot serve.png
    """
    model = preset_model(preset, dtype, depth)
    funnel = FunnelConfig.after(suite_command.funnel_place(layer, model.config))
    options |= {"funnel": funnel, "sources": lengths}
    if not http:
        suite = Suite(model=model, **options)
        check_memory(model.config, model.head, model.dtype, suite.max_batch_tokens)
        suite_command.run(suite, **files)
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.closing(
            HttpSuite(
                preset=model.name,
                fields=model_fields(preset, depth),
                dtype=dtype,
                max_waiting_requests=max_waiting_requests,
                folder=Path(folder),
                **options,
            )
        ) as over_http,
    ):
        check_memory(over_http.model.config, model.head, dtype, over_http.max_batch_tokens)
        suite_command.run(over_http, **files)
