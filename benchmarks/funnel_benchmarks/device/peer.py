"""Hugging Face's Gemma on the same machine: same architecture and batch, random weights, compiled by PyTorch.

It runs in a process of its own (`hugging_face.py`); ours is measured right before it and right after.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax

from funnel_benchmarks.device import hugging_face
from funnel_benchmarks.device.bench import DTYPE, Bench
from funnel_benchmarks.device.part import CELL, Part, against_goal
from funnel_benchmarks.measure import alone, spread
from funnel_benchmarks.results import LeftOut, Measurement, Row
from funnel_benchmarks.statistics import quartiles, ratio
from funnel_benchmarks.suite import Column, field
from funnel_kernels.errors import FunnelError

GOAL = 1.2  # times the peer's throughput
DEVICES = {"gpu": "cuda", "cpu": "cpu"}  # JAX's name -> PyTorch's


def cells(bench: Bench) -> Iterator[Measurement]:
    for attention in hugging_face.ATTENTIONS:
        yield f"Hugging Face Gemma, torch.compile, {attention}", partial(measure, bench, attention)


def measure(bench: Bench, attention: str) -> Row:
    platform = jax.devices()[0].platform
    if platform not in DEVICES:
        raise LeftOut(f"JAX runs on {platform}, where this peer does not")
    ours = bench.sampler(bench.embedding(bench.equal_lengths))
    before = alone(ours, bench.sizes.repeats)
    theirs = run_peer(bench, attention, DEVICES[platform])
    own_samples, peer_samples = before + alone(ours, bench.sizes.repeats), theirs["samples"]
    tokens = bench.sizes.tokens
    return {
        "attention": attention,
        "versions": theirs["versions"],
        "seconds": spread(own_samples),
        "peer_seconds": spread(peer_samples),
        "tokens_per_second": tokens / quartiles(own_samples).median,
        "peer_tokens_per_second": tokens / quartiles(peer_samples).median,
        "speedup": ratio(quartiles(peer_samples), quartiles(own_samples))._asdict(),
        "goal": GOAL,
    }


def run_peer(bench: Bench, attention: str, device: str) -> Row:
    config, (sequences, tokens) = bench.sizes.config, bench.sizes.batches[0]
    task = {
        "attention": attention,
        "device": device,
        "dtype": DTYPE,
        "sequences": sequences,
        "tokens": tokens,
        "samples": 2 * bench.sizes.repeats,
        "config": {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "max_position_embeddings": config.max_positions,
        },
    }
    # -P: the script's folder must not hide anyone's modules.
    command = [sys.executable, "-P", str(Path(hugging_face.__file__)), json.dumps(task)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=bench.clock.seconds_left())
    except subprocess.TimeoutExpired:
        raise LeftOut("not measured: out of time while it was compiling or running") from None
    if run.returncode:
        raise FunnelError(f"the peer failed: {run.stderr.strip()[-400:]}")
    answer: Row = json.loads(run.stdout.splitlines()[-1])
    if "left_out" in answer:
        raise LeftOut(answer["left_out"])
    return answer


class Peer(Part):
    name = "device peer"
    title = "Hugging Face Gemma"
    note = (
        "The same architecture and batch, random weights, each in its own process; ours right before and after. Ours "
        "starts from token ids on the host, the peer from ids on the device."
    )
    columns = (
        CELL,
        Column("ours", field("seconds", ",.3f", 1e3), "ms", "quartiles"),
        Column("theirs", field("peer_seconds", ",.3f", 1e3), "ms", "quartiles"),
        Column("ours", field("tokens_per_second", ",.0f"), "tokens/s"),
        Column("theirs", field("peer_tokens_per_second", ",.0f"), "tokens/s"),
        Column("times as fast", against_goal("speedup")),
        Column("versions", lambda row: ", ".join(f"{name} {version}" for name, version in row["versions"].items())),
    )
    measurements = staticmethod(cells)
