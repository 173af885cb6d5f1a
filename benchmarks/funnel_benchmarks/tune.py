"""Finds the fastest block sizes of the Triton kernels on this GPU, and writes them into its tuning table.

    python -m funnel_benchmarks.tune

A candidate must fit the GPU's shared memory. Candidates are first compiled in processes side by side, and
those that spill registers are dropped. The others run on the same random data, are held against the `xla` backend, and
are timed in turns; the median decides. The table, `funnel_kernels/tuned/DEVICE.json`, is written after each op, width
and dtype, and keeps the entries that are not measured again. An engine that is loaded afterwards uses it.
"""

import dataclasses
import importlib.metadata
import itertools
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import jax
import jax.numpy as jnp
import numpy as np

from funnel_benchmarks.measure import sampler
from funnel_benchmarks.statistics import Spread, quartiles
from funnel_benchmarks.sweep import configs, widths, with_bar
from funnel_engine.devices import local_target
from funnel_engine.output_files import check_writable, write_text
from funnel_kernels import Target, attention, pool_norm, recover_norm, triton_calls, tuning
from funnel_kernels.errors import BackendUnavailable, FunnelError
from funnel_kernels.target import Unsupported

PACKAGES = ("jax", "jaxlib", "triton")
HEADS = 8  # that share one key/value head
TOKENS = 32_768  # of an attention, in sequences of LENGTH
LENGTH = 2048
ROWS = 65_536  # before pooling, or after recovery
STRIDE = 2
SAMPLE_SECONDS = 0.02  # at least, of enqueued calls
ROUNDS = 7  # in each, every candidate is sampled once
ATTENTION_SIZES = {  # queries, keys, warps, stages
    "bfloat16": ((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)),
    "float32": ((16, 32, 64), (16, 32, 64), (4, 8), (1, 2)),
}
TOLERANCE = {"bfloat16": 1e-2, "float32": 1e-3}  # relative error that a candidate may have


class Problem(NamedTuple):
    """One entry of the table to be found.

    Attributes:
        key: what the entry is for.
        shape: what it is measured on, in words.
        arrays: the inputs.
        op, kernel: the op, and what takes block sizes and does the same.
        options: of both.
        candidates: block sizes to try.
        variant: block sizes -> what `static_gpu` compiles.
        target: the GPU.
    """

    key: tuning.Key
    shape: str
    arrays: tuple[jax.Array, ...]
    op: Callable[..., Any]
    kernel: Callable[..., Any]
    options: dict[str, Any]
    candidates: Sequence[Any]
    variant: Callable[[Any], Any]
    target: Target


class Timing(NamedTuple):
    """What became of a candidate: seconds a call, or why it is none."""

    sizes: Any
    seconds: Spread | None
    problem: str


def problems(target: Target) -> Iterator[tuple[tuning.Key, Callable[[], Problem]]]:
    """Attention for every head dim of the presets and both row-wise ops for every width, in both dtypes."""
    for dtype in TOLERANCE:
        for head_dim in sorted({config.head_dim for config in configs()}):
            yield tuning.Key("attention", head_dim, dtype), partial(attention_problem, head_dim, dtype, target)
        for width in sorted({1 << (width - 1).bit_length() for width in widths()}):
            yield tuning.Key("pool_norm", width, dtype), partial(pool_problem, width, dtype, target)
            yield tuning.Key("recover_norm", width, dtype), partial(recover_problem, width, dtype, target)


def attention_problem(head_dim: int, dtype: str, target: Target) -> Problem:
    from funnel_benchmarks import static_gpu
    from funnel_kernels.attention import triton_gpu

    gpu, block_d = f"sm_{triton_calls.capability(target)}", triton_gpu.padded(head_dim)
    limit = static_gpu.SHARED.get(gpu, max(static_gpu.SHARED.values()))
    sizes = [triton_gpu.Sizes(*sizes) for sizes in itertools.product(*ATTENTION_SIZES[dtype])]
    if dtype == "bfloat16":
        sizes = [each for each in sizes if triton_gpu.shared_bytes(block_d, jnp.dtype(dtype), each) <= limit]
    q, k, v = random_arrays(dtype, *((TOKENS, heads * head_dim) for heads in (HEADS, 1, 1)))
    lo = jnp.arange(TOKENS, dtype=jnp.int32) // LENGTH * LENGTH
    variant = partial(static_gpu.attention_variant, gpu, dtype, (HEADS, 1, head_dim, head_dim**-0.5, 0.0))
    options: dict[str, Any] = {"heads": HEADS, "kv_heads": 1, "scale": head_dim**-0.5, "softcap": None}
    shape = f"{TOKENS // LENGTH} x {LENGTH} tokens, {HEADS} heads of {head_dim} on 1"
    key, arrays = tuning.Key("attention", block_d, dtype), (q, k, v, lo, lo + LENGTH)
    return Problem(key, shape, arrays, attention, triton_gpu.attention, options, sizes, variant, target)


def pool_problem(width: int, dtype: str, target: Target) -> Problem:
    from funnel_benchmarks import static_gpu
    from funnel_kernels.pool_norm import triton_gpu

    x, weight = random_arrays(dtype, (ROWS, width), (width,))
    real = jnp.asarray(np.random.default_rng(1).random(ROWS) < 0.9)
    variant = partial(static_gpu.pool_variant, width, "max", dtype, STRIDE)
    options: dict[str, Any] = {"stride": STRIDE, "pool": "max", "eps": 1e-6}
    key, shape = tuning.Key("pool_norm", width, dtype), f"{ROWS} x {width}, stride {STRIDE}, max"
    candidates = row_candidates(width)
    return Problem(key, shape, (x, real, weight), pool_norm, triton_gpu.pool_norm, options, candidates, variant, target)


def recover_problem(width: int, dtype: str, target: Target) -> Problem:
    from funnel_benchmarks import static_gpu
    from funnel_kernels.recover_norm import triton_gpu

    arrays = random_arrays(dtype, (ROWS // STRIDE, width), (ROWS, width), (width,))
    variant = partial(static_gpu.recover_variant, width, "sum", "before_norm", dtype, dtype, STRIDE)
    options: dict[str, Any] = {"stride": STRIDE, "mode": "sum", "site": "before_norm", "eps": 1e-6}
    key, shape = tuning.Key("recover_norm", width, dtype), f"{ROWS} x {width}, stride {STRIDE}, sum"
    candidates = row_candidates(width)
    return Problem(key, shape, arrays, recover_norm, triton_gpu.recover_norm, options, candidates, variant, target)


def row_candidates(width: int) -> list[triton_calls.RowSizes]:
    """Blocks of 1,024 to 32,768 elements, at 1 to 16 warps, 4 to 64 elements a thread."""
    return [
        triton_calls.RowSizes(rows, warps)
        for rows, warps in itertools.product((1, 2, 4, 8, 16, 32, 64), (1, 2, 4, 8, 16))
        if 1024 <= rows * width <= 32768 and 4 <= rows * width / (32 * warps) <= 64
    ]


def random_arrays(dtype: str, *shapes: tuple[int, ...]) -> tuple[jax.Array, ...]:
    generator = np.random.default_rng(0)
    return tuple(jnp.asarray(generator.standard_normal(shape, np.float32), dtype) for shape in shapes)


def measure(problem: Problem, advance: Callable[[], object]) -> list[Timing]:
    """Times every candidate that compiles and is right, in turns; fastest first, then those that are none.

    Args:
        advance: called once for each candidate, when it is compiled.
    """
    target, options = problem.target, problem.options
    plain = dataclasses.replace(target, backend="xla")
    expected = jax.jit(partial(problem.op, target=plain, **options))(*problem.arrays)
    calls: dict[Any, Callable[[], object]] = {}
    failures = []
    refused = static_problems(problem)
    for sizes in problem.candidates:
        if sizes in refused:
            failures.append(Timing(sizes, None, refused[sizes]))
            advance()
            continue
        try:
            run = partial(problem.kernel, target=target, sizes=sizes, **options)
            program = jax.jit(run).lower(*problem.arrays).compile()
            error = relative_error(program(*problem.arrays), expected)
        except Exception as failure:  # a compiler that has run out of registers or shared memory raises anything
            failures.append(Timing(sizes, None, f"does not run: {str(failure).strip().splitlines()[0]:.200}"))
        else:
            if error <= TOLERANCE[problem.key.dtype]:
                calls[sizes] = lambda program=program: program(*problem.arrays)  # type: ignore[misc]
            else:
                failures.append(Timing(sizes, None, f"is wrong: relative error {error:.1e}"))
        advance()
    samplers = {sizes: sampler(call, SAMPLE_SECONDS) for sizes, call in calls.items()}
    samples: dict[Any, list[float]] = {sizes: [] for sizes in calls}
    for _ in range(ROUNDS):
        for sizes, sample in samplers.items():
            samples[sizes].append(sample())
    timings = [Timing(sizes, quartiles(taken), "") for sizes, taken in samples.items()]
    return sorted(timings, key=microseconds) + failures


def static_problems(problem: Problem) -> dict[Any, str]:
    """The candidates that spill registers or do not compile for this GPU, with the reason; none on a GPU that
    `static_gpu` does not know."""
    from funnel_benchmarks import static_gpu

    gpu = f"sm_{triton_calls.capability(problem.target)}"
    if gpu not in static_gpu.TARGETS:
        return {}
    variants = {sizes: problem.variant(sizes)._replace(details=str(sizes)) for sizes in problem.candidates}
    compiled = static_gpu.compile_all([(gpu, it) for it in variants.values()], multiprocessing.cpu_count())
    found = {sizes: static_gpu.problem(gpu, compiled[it.name, gpu]) for sizes, it in variants.items()}
    return {sizes: text for sizes, text in found.items() if text}


@jax.jit
def relative_errors(results: Any, expected: Any) -> list[jax.Array]:
    """||result - expected|| / ||expected|| of each of an op's results, on the device: they are large."""
    pairs = zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True)
    wide = [(result.astype(jnp.float32), wanted.astype(jnp.float32)) for result, wanted in pairs]
    return [jnp.linalg.norm(result - wanted) / jnp.linalg.norm(wanted) for result, wanted in wide]


def relative_error(results: Any, expected: Any) -> float:
    """The largest one; NaN is infinite."""
    return max(float(np.nan_to_num(error, nan=np.inf)) for error in relative_errors(results, expected))


def entry(problem: Problem, timings: Sequence[Timing]) -> dict[str, Any]:
    """The fastest candidate as an entry of the table, with the times of the next best and the number of all."""
    best, *others = [timing for timing in timings if timing.seconds]
    return {
        **problem.key._asdict(),
        "sizes": best.sizes._asdict(),
        "microseconds": microseconds(best),
        "shape": problem.shape,
        "candidates": len(timings),
        "next": [[*timing.sizes, microseconds(timing)] for timing in others[:4]],
    }


def microseconds(timing: Timing) -> float:
    assert timing.seconds
    return round(1e6 * timing.seconds.median, 2)


def merge(file: Path, found: dict[str, Any], device_kind: str) -> None:
    """Writes an entry into a table in the place of the one with the same key, if there is one."""
    kept = json.loads(file.read_text(encoding="utf-8"))["entries"] if file.exists() else []
    entries = [other for other in kept if any(other[field] != found[field] for field in tuning.Key._fields)] + [found]
    entries.sort(key=lambda one: [one[field] for field in tuning.Key._fields])
    table = {
        "device": device_kind,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "entries": entries,
    }
    write_text(file, json.dumps(table, indent=1) + "\n")


@click.command()
@click.option(
    "--op", multiple=True, type=click.Choice(["attention", "pool_norm", "recover_norm"]), help="Default: all."
)
@click.option("--dtype", multiple=True, type=click.Choice(list(TOLERANCE)), help="Default: both.")
@click.option("--width", multiple=True, type=int, help="Head dim or model width, a power of two. Default: all.")
@click.option("--table", type=click.Path(path_type=Path, dir_okay=False), help="Default: the one that engines read.")
def main(op: tuple[str, ...], dtype: tuple[str, ...], width: tuple[int, ...], table: Path | None) -> None:
    """Find the fastest block sizes of the Triton kernels on this GPU."""
    try:
        target = local_target("triton")
        triton_calls.check(target)
    except (FunnelError, Unsupported) as refusal:
        raise click.ClickException(f"nothing to tune: {refusal}") from refusal
    file = table or tuning.table_file(target.kind)
    tuning.TUNED.mkdir(exist_ok=True)
    try:
        check_writable(file, (".json",))
        for key, make in problems(target):
            if (
                key.op in (op or (key.op,))
                and key.width in (width or (key.width,))
                and key.dtype in (dtype or (key.dtype,))
            ):
                tune(make(), file)
    except FunnelError as error:
        raise click.ClickException(str(error)) from error


def tune(problem: Problem, file: Path) -> None:
    """Measures one problem, prints what was found, and writes it.

    Raises:
        BackendUnavailable: no candidate runs and is right.
    """
    name = " ".join(map(str, problem.key))
    timings = measure(problem, iter(with_bar(name, problem.candidates)).__next__)
    if not timings[0].seconds:
        raise BackendUnavailable(f"{name}: no candidate runs and is right; the first {timings[0].problem}")
    found = entry(problem, timings)
    merge(file, found, problem.target.kind)
    sizes = ", ".join(f"{key} {value}" for key, value in found["sizes"].items())
    click.echo(f"{name}: {sizes}: {found['microseconds']:,} us; best of {len(timings)}")


if __name__ == "__main__":
    main()
