"""What XLA's options for GPUs change: the forward pass compiled with each, in turns with the one compiled without any.

Options that the process has from XLA_FLAGS hold for both.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax

from funnel_benchmarks.device.bench import Bench
from funnel_benchmarks.device.part import CELL, MILLISECONDS, RATIO, WITHOUT, Part
from funnel_benchmarks.funnels import NO_FUNNEL
from funnel_benchmarks.measure import Call, in_turns, spread
from funnel_benchmarks.results import LeftOut, Measurement, Row
from funnel_benchmarks.statistics import quartiles, ratio
from funnel_engine.model import forward
from funnel_engine.packing import pack
from funnel_engine.xla_options import compiler_options

Options = dict[str, Any]

CANDIDATES: tuple[Options, ...] = (
    {"xla_gpu_enable_latency_hiding_scheduler": True},
    {"xla_gpu_enable_command_buffer": ""},
    {"xla_gpu_enable_triton_gemm": False},
    {"xla_gpu_graph_min_graph_size": 1},
    # XLA's default and WHILE; compiler options do not know the form "+WHILE" of XLA_FLAGS.
    {"xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,WHILE"},
)


def cells(bench: Bench) -> Iterator[Measurement]:
    compiled = functools.cache(functools.partial(compiler, bench))  # traced once, when the first cell is measured
    own = compiler_options("gpu")
    for candidate in [own, *(other for other in CANDIDATES if other != own)]:
        text = ", ".join(f"{name}={value}" for name, value in candidate.items()) or "none"
        name = f"the engine's own: {text}" if candidate is own else text
        yield name, functools.partial(measure, bench, compiled, candidate)


def compiler(bench: Bench) -> tuple[Callable[[Options], Call], Call]:
    """What compiles the forward pass with given options, and the forward pass compiled without any."""
    engine = bench.engine()
    batch = jax.device_put(pack(engine.plan, *bench.inputs(bench.equal_lengths), bench.sizes.tokens))
    encoder = functools.partial(forward, config=engine.config, funnel=NO_FUNNEL, target=engine.devices.target)
    lowered = jax.jit(encoder).lower(engine.params, batch)

    def compile_with(options: Options) -> Call:
        return functools.partial(lowered.compile(compiler_options=options), engine.params, batch)

    return compile_with, compile_with({})


def measure(bench: Bench, compiled: Callable[[], Any], candidate: Options) -> Row:
    platform = jax.devices()[0].platform
    if platform != "gpu":
        raise LeftOut(f"not a GPU: JAX runs on {platform}")
    compile_with, without = compiled()
    samplers = bench.sampler(without), bench.sampler(compile_with(candidate))
    baseline, samples = in_turns(*samplers, repeats=bench.sizes.repeats)
    return {
        "seconds": spread(samples),
        "baseline_seconds": spread(baseline),
        "ratio": ratio(quartiles(samples), quartiles(baseline))._asdict(),
    }


class Flags(Part):
    name = "device flags"
    title = "Compiler options"
    note = "The forward pass alone, against no options at all; a ratio below 1 means that the options help."
    columns = (CELL, MILLISECONDS, WITHOUT, RATIO)
    measurements = staticmethod(cells)
