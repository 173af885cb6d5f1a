"""The rows of the table: each has a name, and a function that measures it when it is called.

A row says what was `measured` in which `unit`, and what the `goal` is. "times" is how many times as fast ours is as the
other, "efficiency" how much of what a funnel can save at best it does save; both should reach their goal. "GB" of
memory should stay below it.
"""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funnel_benchmarks.cpu import onednn_product, process_memory, pytorch_product
from funnel_benchmarks.cpu.bench import BACKEND, Bench, against, check_same, judged, speedup
from funnel_benchmarks.cpu.sizes import Batch
from funnel_benchmarks.engine_costs import random_ids, timed
from funnel_benchmarks.latency import suite as latency
from funnel_benchmarks.machine import usable_cores
from funnel_benchmarks.measure import compiling_nothing
from funnel_benchmarks.peers import hugging_face
from funnel_benchmarks.peers.batches import make_batches
from funnel_benchmarks.peers.peer import Peer
from funnel_benchmarks.results import Cell, Row
from funnel_benchmarks.statistics import Spread, interleave
from funnel_engine import Engine, FunnelConfig
from funnel_engine.checkpoints.native import read_checkpoint
from funnel_engine.flops import forward_flops
from funnel_kernels import linear, prepare
from funnel_kernels.errors import FunnelError

PRODUCT_GOAL = 0.98  # of oneDNN's rate, for the first of `Sizes.products` in bfloat16
PRODUCT_TOLERANCE = {"bfloat16": 0.01, "float32": 1e-5}  # PyTorch rounds results to bfloat16
PRODUCT_PEERS = {"oneDNN": onednn_product, "PyTorch's oneDNN": pytorch_product}
VECTOR_TOLERANCE = 0.05  # rounding in other places makes 0.01, causal instead of bidirectional attention 0.75
FUNNEL_GOAL = 0.97
MEMORY_GOAL_GB = 1.0  # beyond the weights
FOUR_LAYERS = "gemma-2b x 4"


def rows(bench: Bench) -> Iterator[Cell]:
    """Every row in the order of measuring. Those that hold much memory come last."""
    for size in bench.sizes.products:
        for dtype in ("bfloat16", "float32"):
            goal = PRODUCT_GOAL if (size, dtype) == (bench.sizes.products[0], "bfloat16") else None
            for name, module in PRODUCT_PEERS.items():
                title = f"linear {'x'.join(map(str, size))} {dtype}: {name}"
                yield title, partial(product, bench, size, dtype, module, goal)
    for batch in bench.sizes.batches:
        for order, goal in batch.goals.items():
            attentions = (hugging_face.WITHOUT_MASK, "sdpa") if order == "equal" else ("sdpa",)
            for mode in hugging_face.MODES:
                for attention in attentions if mode == "compiled" else attentions[:1]:
                    title = f"{batch.model} {batch.name}: Hugging Face {order} {mode} {attention}"
                    yield title, partial(embedding, bench, batch, order, mode, attention, goal)
    yield "threads: two against one", partial(threads, bench)
    yield "threads: two engines at once against one", partial(two_engines, bench)
    yield "memory beyond the weights", partial(memory, bench)
    for layer in bench.sizes.funnel_layers:
        yield f"funnel after {layer}: ideal", partial(funnel, bench, layer)


def product(bench: Bench, size: tuple[int, int, int], dtype: str, module: ModuleType, goal: float | None) -> Row:
    """`linear` with a packed weight, whose result is float32, against a peer's product."""
    task: dict[str, Any] = dict(zip(("rows", "in", "out"), size, strict=True)) | {"dtype": dtype}
    x, weight = onednn_product.operands(task)
    on_device, packed = jnp.asarray(x), prepare(weight, backend="cpu")
    run = jax.jit(partial(linear, backend="cpu"))
    with Peer(module, **task, cores=usable_cores()) as peer:
        apart = check_same(np.asarray(run(on_device, packed)), peer.result, PRODUCT_TOLERANCE[dtype])
        row = against(lambda: run(on_device, packed).block_until_ready(), peer, bench.repeats, goal)
    return row | {"difference": apart} | rates(row, 2 * int(np.prod(size)))


def embedding(bench: Bench, batch: Batch, order: str, mode: str, attention: str, goal: float) -> Row:
    """`Engine.embed`, from ids on the host to vectors on the host, against Hugging Face's model."""
    engine = bench.engine(batch.model)
    ids, offsets = random_ids(engine, batch.lengths)
    call = partial(engine.embed, (ids, offsets), normalize=False)
    task = {
        "checkpoint": str(bench.source(batch.model)),
        "mode": mode,
        "attention": attention,
        "batches": make_batches(batch.lengths, order, bench.sizes.peer_batch),
        "sequences": [part.tolist() for part in np.split(ids, offsets[1:-1])],
        "cores": usable_cores(),
    }
    with Peer(hugging_face, **task) as peer:
        apart = check_same(call(), peer.result, VECTOR_TOLERANCE)
        row = against(call, peer, bench.repeats, goal)
    flops = forward_flops(engine.config, FunnelConfig(), batch.lengths)
    return row | {"difference": apart, "tokens": int(offsets[-1])} | rates(row, flops)


def rates(row: Row, flops: int) -> Row:
    """GFLOP/s of both calls; what a peer computes for padding is not counted."""
    return {
        "gflops": flops / row["seconds"]["median"] / 1e9,
        "other_gflops": flops / row["other_seconds"]["median"] / 1e9,
    }


def threads(bench: Bench) -> Row:
    """How many times as fast an engine with two threads is as one with one."""
    one, two = (whole_call(bench, engine) for engine in engines(bench, 1, 2))
    with compiling_nothing():
        slow, fast = interleave(one, two, bench.repeats, lambda: None)
    return speedup(slow, fast, None)


def two_engines(bench: Bench) -> Row:
    """Calls per second of two engines that two threads call at once, over those of one engine alone."""
    first, second = (whole_call(bench, engine) for engine in engines(bench, None, None))
    with ThreadPoolExecutor(2) as pool:

        def both() -> float:
            """Seconds per call."""
            start = time.perf_counter()
            for running in [pool.submit(first), pool.submit(second)]:
                running.result()
            return (time.perf_counter() - start) / 2

        with compiling_nothing():
            alone, together = interleave(first, both, bench.repeats, lambda: None)
    return speedup(alone, together, None)


def engines(bench: Bench, *threads: int | None) -> list[Engine]:
    return [Engine.load(bench.checkpoint(FOUR_LAYERS), backend=BACKEND, threads=count) for count in threads]


def whole_call(bench: Bench, engine: Engine) -> Callable[[], float]:
    inputs = random_ids(engine, bench.sizes.funnel_lengths)
    return timed(lambda: engine.embed(inputs))


def memory(bench: Bench) -> Row:
    """How much more memory a process has had at its peak than the weights, in GB."""
    checkpoint, lengths = bench.whole_checkpoint, bench.sizes.memory_lengths
    command = [sys.executable, "-m", process_memory.__name__, str(checkpoint), json.dumps(lengths.tolist())]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise FunnelError(f"the process whose memory is measured failed: {run.stderr.strip()[-400:]}")
    peaks = {name: size / 1e9 for name, size in json.loads(run.stdout.splitlines()[-1]).items()}
    weights = sum(weight.nbytes for weight in read_checkpoint(checkpoint).weights.values()) / 1e9
    beyond = peaks["embedded"] - weights
    row = judged("GB", Spread(beyond, beyond, beyond), MEMORY_GOAL_GB, at_most=True)
    return row | {"weights_gb": weights, "peak_gb": peaks, "tokens": int(lengths.sum())}


def funnel(bench: Bench, layer: int) -> Row:
    """Efficiency of a 2:1 funnel: the ratio of floating-point operations over that of latencies."""
    model, weights = bench.whole
    suite = latency.Suite(
        model=dataclasses.replace(model, weights="random"), funnels=(FunnelConfig.after(layer),),
        batches=(latency.Batch(bench.sizes.funnel_lengths),), backend=BACKEND, repeats=bench.repeats,
    )  # fmt: skip
    ((_, measure),) = latency.cells(suite, weights)
    row = measure()
    ideal, latencies = row["ideal_ratio"], Spread(**row["ratio"])
    efficiency = Spread(ideal / latencies.high, ideal / latencies.median, ideal / latencies.low)
    return row | judged("efficiency", efficiency, FUNNEL_GOAL)
