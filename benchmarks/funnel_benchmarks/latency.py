"""The latency suite: for each place of the funnel, the funneled engine against the same engine without it.

Both run in one process on the same random token ids and the same weights on the device, in the order A B B A, after
their programs are compiled. What is timed is `Engine.embed`, from token ids on the host to vectors on the host, so
packing and transfers count and tokenising does not.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from funnel_benchmarks.machine import machine_facts, peak_memory_gb
from funnel_benchmarks.statistics import Spread, interleave, quartiles, ratio
from funnel_engine import Engine, FunnelConfig, HeadConfig, ModelConfig
from funnel_engine.backends import served_by
from funnel_engine.config import check_positive
from funnel_engine.flops import forward_flops, ideal_ratio
from funnel_engine.packing import Ints, make_plan
from funnel_engine.weights import count_parameters, expected_shapes
from funnel_kernels import dispatch
from funnel_kernels.errors import ConfigError, FunnelError, InputError

Result = dict[str, Any]  # plain JSON: "complete", "header" and "rows", see `run_suite`
SEED = 0  # of the token ids
COMPILATION = "/jax/core/compile/backend_compile_duration"  # JAX reports this event for every program it compiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
    """What is measured.

    Attributes:
        model: its name in reports.
        weights: where they are from: "random" or a checkpoint's name.
        layers: numbers of full-length layers before the funnel, one row of the result each.
        lengths: tokens of each sequence, [B]; the batch runs as one packed call.
        lengths_source: where the lengths are from, in words.
        repeats: how often A B B A is run for each row.

    Raises:
        ConfigError: options that cannot be, or a funnel that the model cannot have.
        InputError: a sequence that is longer than the model was made for.
    """

    model: str
    weights: str
    config: ModelConfig
    head: HeadConfig
    dtype: str
    layers: tuple[int, ...]
    stride: int
    pool: str
    recovery: str | None
    backend: str
    lengths: Ints
    lengths_source: str
    repeats: int

    def __post_init__(self) -> None:
        dispatch.check_backend(self.backend)
        check_positive("repeats", self.repeats)
        if self.stride < 2:
            raise ConfigError(f"stride={self.stride} pools nothing; a funnel needs a stride of at least 2")
        if self.lengths.max() > self.config.max_positions:
            raise InputError(
                f"the longest sequence has {self.lengths.max()} tokens, more than the {self.config.max_positions} that "
                f"{self.model} was made for; take shorter sequences"
            )
        for layer in self.layers:
            make_plan(self.config, self.funnel(layer))

    def funnel(self, layer: int) -> FunnelConfig:
        return FunnelConfig.after(layer, stride=self.stride, pool=self.pool, recovery=self.recovery)

    def rows(self, funnel: FunnelConfig) -> int:
        """Rows of the packed axis that the batch takes."""
        return int(make_plan(self.config, funnel).rows_needed(self.lengths).sum())


def run_suite(
    suite: Suite,
    weights: Mapping[str, Any],
    *,
    on_result: Callable[[Result], object],
    advance: Callable[[], object],
) -> Result:
    """Measures every row of the suite.

    Args:
        weights: by the names of `weights.expected_shapes`, on the device already; all engines share them.
        on_result: called with the result so far: once before the first row, then after each.
        advance: called `1 + suite.repeats` times per row: after the warm-up and after each A B B A.

    Returns:
        `header` describes model, inputs, method and machine. Each of `rows` has, times in seconds as
        {low: first quartile, median, high: third quartile}: layer, stride, latency, baseline_latency, ratio (low and
        high are the least and greatest that the quartiles allow), saving_percent, ideal_ratio, efficiency
        (ideal_ratio / ratio), tokens_per_second, flops_per_second, padding_waste (share of rows that hold no token),
        compile_seconds, and the samples in the order taken.

    Raises:
        FunnelError: something was compiled while timing, so that the last row is not a latency.
    """
    generator = np.random.default_rng(SEED)
    tokens = int(suite.lengths.sum())
    ids = generator.integers(0, suite.config.vocab_size, tokens, np.int32)
    offsets = np.concatenate([[0], np.cumsum(suite.lengths)]).astype(np.int32)

    def prepare(funnel: FunnelConfig) -> tuple[Engine, Callable[[], float]]:
        """An engine whose one bucket is compiled, and the call that times it once."""
        engine = Engine(
            suite.config, suite.head, weights,
            funnel=funnel, backend=suite.backend, max_batch_tokens=suite.rows(funnel),
        )  # fmt: skip

        def timed() -> float:
            start = time.perf_counter()
            engine.embed((ids, offsets))
            return time.perf_counter() - start

        timed()  # compiles
        timed()  # touches all memory once more before it counts
        return engine, timed

    baseline, time_baseline = prepare(FunnelConfig())
    header = describe(suite) | engine_facts(baseline, "baseline_") | {"peak_memory_gb": peak_memory_gb()}
    result: Result = {"complete": False, "header": header, "rows": []}
    on_result(result)
    for layer in suite.layers:
        funnel = suite.funnel(layer)
        engine, time_funnel = prepare(funnel)
        advance()
        with counting_compilations() as compilations:
            baseline_samples, samples = interleave(time_baseline, time_funnel, suite.repeats, advance)
        result["rows"].append(
            {"layer": layer, "stride": suite.stride}
            | figures(quartiles(samples), quartiles(baseline_samples), suite, funnel)
            | engine_facts(engine, "")
            | {"samples": samples, "baseline_samples": baseline_samples}
        )
        header["compilations_while_timing"] += len(compilations)
        header["peak_memory_gb"] = peak_memory_gb()
        result["complete"] = layer == suite.layers[-1] and not compilations
        on_result(result)
        if compilations:
            raise FunnelError(
                f"{len(compilations)} programs were compiled while timing layer {layer}, where 0 may be; "
                "its figures are not latencies. Please report this as a bug"
            )
    return result


def figures(latency: Spread, baseline: Spread, suite: Suite, funnel: FunnelConfig) -> dict[str, Any]:
    """What a row says about its two latencies."""
    measured, ideal = ratio(latency, baseline), ideal_ratio(suite.config, funnel, suite.lengths)
    return {
        "latency": latency._asdict(),
        "baseline_latency": baseline._asdict(),
        "ratio": measured._asdict(),
        "saving_percent": 100 * (1 - measured.median),
        "ideal_ratio": ideal,
        "efficiency": ideal / measured.median,
        "tokens_per_second": int(suite.lengths.sum()) / latency.median,
        "flops_per_second": forward_flops(suite.config, funnel, suite.lengths) / latency.median,
    }


def engine_facts(engine: Engine, prefix: str) -> dict[str, float]:
    """How much of an engine's rows is padding, and how long its programs took to compile."""
    stats = engine.stats()
    waste = stats["padding_rows"] / (stats["padding_rows"] + stats["tokens"])
    return {f"{prefix}padding_waste": waste, f"{prefix}compile_seconds": stats["compile_seconds"]}


def describe(suite: Suite) -> dict[str, Any]:
    """The header of a result: everything that is known before measuring."""
    config, lengths = suite.config, suite.lengths
    served = served_by(config, FunnelConfig(pool=suite.pool), suite.dtype, suite.backend)
    return {
        "model": suite.model,
        "family": config.family,
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "attention": config.attention,
        "parameters": count_parameters(expected_shapes(config, suite.head)),
        "weights": suite.weights,
        "dtype": suite.dtype,
        "pool": suite.pool,
        "recovery": suite.recovery,
        "backend": suite.backend,
        "served_by": ", ".join(sorted({answer.backend for answer in served.values()})),
        "lengths": {
            "source": suite.lengths_source,
            "sequences": len(lengths),
            "tokens": int(lengths.sum()),
            "shortest": int(lengths.min()),
            "median": float(np.median(lengths)),
            "longest": int(lengths.max()),
        },
        "baseline_flops": forward_flops(config, FunnelConfig(), lengths),
        "repeats": suite.repeats,
        "samples_per_row": 2 * suite.repeats,
        "order": "A B B A",
        "seed": SEED,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "compilations_while_timing": 0,
        "machine": machine_facts(),
    }


@contextmanager
def counting_compilations() -> Iterator[list[float]]:
    """A list that grows by one for every program that JAX compiles in this process meanwhile."""
    compiled: list[float] = []

    def listen(event: str, duration_secs: float, **_: object) -> None:
        if event == COMPILATION:
            compiled.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
