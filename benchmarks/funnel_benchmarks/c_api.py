"""What a call through the C API costs beyond the same call in Python: `python -m funnel_benchmarks.c_api PROGRAM`.

PROGRAM is `funnel_call_time`, which is built with the C API (`cmake --build BUILD --target funnel_call_time`). It makes
calls in a process of its own, when told to, so that the two can be interleaved A B B A; this process makes the same
calls through `Engine.embed`. The model is one layer of random weights, small enough for the call to be most of it.
"""

import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from funnel_benchmarks.demo_model import CONFIG as DEMO
from funnel_benchmarks.machine import machine_facts
from funnel_benchmarks.random_checkpoint import write_random_model
from funnel_benchmarks.statistics import interleave, quartiles
from funnel_engine import Engine, convert

TOKENS = 32
WARMUP_CALLS = 500
WIDTH, VOCABULARY = 64, 256
CONFIG: dict[str, Any] = DEMO | {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "head_dim": WIDTH,
}


def make_model(directory: Path) -> Path:
    """Writes a one-layer Gemma with random weights in Hugging Face format, converts it, and returns the result."""
    write_random_model(directory / "source", CONFIG)
    convert(directory / "source", directory / "model", dtype="float32")
    return directory / "model"


def python_calls(engine: Engine, calls: int) -> float:
    """Median microseconds of a call in this process."""
    ids, offsets = np.arange(TOKENS, dtype=np.int32), np.array([0, TOKENS], np.int32)
    times = []
    for _ in range(calls):
        start = time.perf_counter_ns()
        engine.embed((ids, offsets))
        times.append(time.perf_counter_ns() - start)
    return quartiles(times).median / 1e3


class Program:
    """`funnel_call_time`, waiting for orders."""

    def __init__(self, executable: Path, checkpoint: Path):
        arguments = json.dumps({"max_batch_tokens": TOKENS}), str(TOKENS), str(VOCABULARY)
        self.process = subprocess.Popen(
            [executable, checkpoint, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def calls(self, thread: str, calls: int) -> float:
        """Median microseconds of a call there, from the thread that opened the engine ("main") or a new ("thread")."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{thread} {calls}\n")
        times = [int(nanoseconds) for nanoseconds in self.process.stdout.readline().split()]
        if len(times) != calls:
            raise click.ClickException(f"the program made {len(times)} of {calls} calls and ended")
        return quartiles(times).median / 1e3

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def measure(executable: Path, checkpoint: Path, calls: int, repeats: int) -> dict[str, Any]:
    """Medians over runs of `calls` calls each, and what a call through the C API takes longer, in microseconds."""
    engine = Engine.load(checkpoint, max_batch_tokens=TOKENS)
    program = Program(executable, checkpoint)
    result: dict[str, Any] = {}
    try:
        python_calls(engine, WARMUP_CALLS)
        for thread in ("main", "thread"):
            program.calls(thread, WARMUP_CALLS)
            c_api, python = interleave(
                lambda thread=thread: program.calls(thread, calls),  # type: ignore[misc]
                lambda: python_calls(engine, calls),
                repeats,
                lambda: None,
            )
            there, here = quartiles(c_api), quartiles(python)
            result[thread] = {
                "c_api_us": there.median,
                "python_us": here.median,
                "overhead_us": there.median - here.median,
                "quartiles_us": {"c_api": [there.low, there.high], "python": [here.low, here.high]},
            }
    finally:
        program.close()
    return result


@click.command()
@click.argument("program", type=click.Path(exists=True, dir_okay=False, resolve_path=True, path_type=Path))
@click.option("--calls", type=click.IntRange(min=1), default=20, show_default=True, help="Calls of a run.")
@click.option("--repeats", type=click.IntRange(min=1), default=100, show_default=True, help="Times A B B A is run.")
def main(program: Path, calls: int, repeats: int) -> None:
    """Measure what a call through the C API costs beyond the same call in Python."""
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = make_model(Path(directory))
        result = {"machine": machine_facts(), "tokens": TOKENS} | measure(program, checkpoint, calls, repeats)
    click.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
