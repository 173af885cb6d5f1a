"""Is every op right on this device? Against float64 on the host, at shapes that are hard to get right.

Each result is computed twice, each time into memory that was full of NaN a moment before, so that an element nobody
writes shows, and the two must agree to the bit. All options at small shapes are in the tests; here the device counts.
"""

import dataclasses
import itertools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from funnel_benchmarks.kernels import layouts, oracle
from funnel_benchmarks.kernels.layouts import Window
from funnel_benchmarks.kernels.suite import runs_mosaic
from funnel_benchmarks.results import Measurement, Results, Row
from funnel_benchmarks.suite import Cell, Column, Section, Suite, Table, field
from funnel_engine.devices import local_target
from funnel_kernels import Record, attention, pool_norm, recover_norm
from funnel_kernels.errors import InputError
from funnel_kernels.pool_norm import POOLS
from funnel_kernels.recover_norm import MODES, SITES

EPS = 1e-6
POISONS = 4  # buffers of each result's size: the allocator hands one of them out next


class Kind(NamedTuple):
    """A dtype, JAX's precision of matrix products, and the largest relative error."""

    dtype: str
    precision: str
    limit: float


BFLOAT16 = Kind("bfloat16", "default", 1e-2)
FLOAT32 = Kind("float32", "highest", 1e-5)
KINDS = (BFLOAT16, Kind("float32", "default", 1e-3), FLOAT32)
ROW_KINDS = (BFLOAT16, FLOAT32)  # without matrix products there is no precision to choose


class AttentionCase(NamedTuple):
    """Ragged sequences (or, without any, intervals at random) and the options of attention."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    lengths: tuple[int, ...]
    stride: int = 1
    window: Window = (None, None)
    softcap: float | None = None
    padding: int = 0


class RowCase(NamedTuple):
    """`windows` windows of `stride` rows of `width`."""

    stride: int
    windows: int
    width: int


ATTENTION_CASES = (
    AttentionCase("ragged", 8, 1, 256, (1, 7, 130, 517, 64, 33), padding=9),
    AttentionCase("causal, softcap", 8, 4, 256, (200, 3, 321), window=(None, 0), softcap=50.0),
    AttentionCase("window", 4, 4, 256, (600, 31), window=(32, 32)),
    AttentionCase("causal window", 6, 2, 128, (511, 129), window=(63, 0)),
    AttentionCase("three heads share keys", 3, 1, 256, (257, 100), window=(17, 17)),
    AttentionCase("70 sequences of one token", 2, 2, 64, (1,) * 70),
    AttentionCase("queries on stride 2", 8, 1, 256, (333, 40, 5), stride=2),
    AttentionCase("queries on stride 4, window", 4, 2, 128, (250, 61), stride=4, window=(20, 20)),
    AttentionCase("intervals at random, some empty", 4, 2, 64, ()),
    AttentionCase("one query, one key", 12, 12, 64, (1,)),
)
ROW_CASES = (RowCase(2, 1001, 1152), RowCase(3, 333, 2048))


@dataclasses.dataclass(frozen=True)
class Check(Suite):
    """What is checked.

    Attributes:
        seed: of all random data.
        longest: tokens of the longest sequence.
        step: 1 for all checks, 2 for every second, and so on.
    """

    backend: str
    seed: int
    longest: int = 4097
    step: int = 1

    name = "check"

    def options(self) -> Row:
        return dataclasses.asdict(self)

    def cells(self, results: Results) -> Iterator[Measurement]:
        return itertools.islice(cells(self), 0, None, self.step)

    @classmethod
    def section(cls, content: Row) -> Section:
        """A line for each op, backend, dtype and precision; every wrong result."""
        groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
        for row in content["rows"]:
            groups[row["op"], row["backend"], row["dtype"], row["precision"]].append(row)
        wrong = [row for row in content["rows"] if not row["passed"]]
        return Section(
            title="Right or wrong",
            summary=f"{len(wrong)} of {len(content['rows'])} results are wrong.",
            plots=[],
            tables=[Table("", COLUMNS, list(groups.values())), Table("Wrong results", WRONG_COLUMNS, wrong)],
            reading=READING,
            facts={"Seed": str(content["options"]["seed"]), "Backend": content["options"]["backend"]},
        )


def make_check(backend: str, small: bool, seed: int | None) -> Check:
    """All checks, or few of them; `seed` None is another one every time."""
    seed = time.time_ns() % 2**31 if seed is None else seed
    return Check(backend, seed, longest=130, step=7) if small else Check(backend, seed)


def cells(suite: Check) -> Iterator[Measurement]:
    numbers = itertools.count()  # every cell has random numbers of its own

    def cell(name: str, kind: Kind, check: Callable[[Kind, np.random.Generator], Row]) -> Measurement:
        generator = np.random.default_rng([suite.seed, next(numbers)])
        return f"{name}, {kind.dtype}, precision {kind.precision}", partial(check, kind, generator)

    long = AttentionCase("one long sequence", 8, 1, 256, (suite.longest,))
    for case in (*ATTENTION_CASES, long):
        name = f"attention {case.heads}/{case.kv_heads} heads of {case.head_dim}: {case.name}"
        for kind in KINDS:
            yield cell(name, kind, partial(check_attention, suite, case))
        if suite.backend == "auto" and runs_mosaic():  # Triton's is checked too
            triton = dataclasses.replace(suite, backend="triton")
            yield cell(f"{name}, triton", BFLOAT16, partial(check_attention, triton, case))
    for rows in ROW_CASES:
        shape = f"{rows.windows} windows of {rows.stride}, width {rows.width}"
        for kind in ROW_KINDS:
            for pool in POOLS:
                yield cell(f"pool_norm {pool}: {shape}", kind, partial(check_pool_norm, suite, rows, pool))
            for mode in MODES:
                for site in SITES if mode != "tile" else SITES[:1]:  # tiling and norm commute
                    check = partial(check_recover_norm, suite, rows, mode, site)
                    yield cell(f"recover_norm {mode}, {site}: {shape}", kind, check)


def check_attention(suite: Check, case: AttentionCase, kind: Kind, generator: np.random.Generator) -> Row:
    if case.lengths:
        lengths = np.array(case.lengths, np.int32)
        layout = layouts.packed(lengths, stride=case.stride, window=case.window, padding=case.padding)
    else:
        layout = layouts.scattered(generator, queries=301, keys=777)
    heads, kv_heads, d = case.heads, case.kv_heads, case.head_dim
    shapes = (layout.queries, heads * d), (layout.keys, kv_heads * d), (layout.keys, kv_heads * d)
    options: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "scale": d**-0.5, "softcap": case.softcap}
    arrays = [normal(generator, shape, kind) for shape in shapes]
    return check(suite, attention, oracle.attention, [*arrays, layout.lo, layout.hi], kind, options)


def check_pool_norm(suite: Check, case: RowCase, pool: str, kind: Kind, generator: np.random.Generator) -> Row:
    x = normal(generator, (case.windows * case.stride, case.width), kind)
    real = generator.random(len(x)) < 0.6  # some windows hold no token
    weight = normal(generator, (case.width,), kind, 0.5)
    options: dict[str, Any] = {"stride": case.stride, "pool": pool, "eps": EPS}
    return check(suite, pool_norm, oracle.pool_norm, [x, real, weight], kind, options)


def check_recover_norm(
    suite: Check, case: RowCase, mode: str, site: str, kind: Kind, generator: np.random.Generator
) -> Row:
    short = normal(generator, (case.windows, case.width), kind)
    full = None if mode == "tile" else normal(generator, (case.windows * case.stride, case.width), kind)
    weight = normal(generator, (case.width,), kind, 0.5)
    options: dict[str, Any] = {"stride": case.stride, "mode": mode, "site": site, "eps": EPS}
    return check(suite, recover_norm, oracle.recover_norm, [short, full, weight], kind, options)


def check(suite: Check, op: Any, reference: Callable[..., Any], arrays: list[Any], kind: Kind, options: Row) -> Row:
    """Compares an op with the reference, and names the backend that served it."""
    record = Record()
    target = dataclasses.replace(local_target(suite.backend), record=record)
    row = compare(partial(op, target=target, **options), partial(reference, **options), arrays, kind)
    return {"op": op.__name__, "backend": ", ".join(record.backends()), **row}


def normal(generator: np.random.Generator, shape: tuple[int, ...], kind: Kind, scale: float = 1.0) -> np.ndarray:
    return (scale * generator.standard_normal(shape, np.float32)).astype(jnp.dtype(kind.dtype))


def compare(ours: Callable[..., Any], reference: Callable[..., Any], arrays: list[Any], kind: Kind) -> Row:
    """Runs an op twice into poisoned memory and compares each of its results with the reference."""
    with jax.default_matmul_precision(kind.precision):
        on_device = jax.device_put(arrays)
        run = jax.jit(ours).lower(*on_device).compile()
        first, second = (poisoned(run, on_device) for _ in range(2))
    expected = jax.tree.leaves(reference(*(widened(array) for array in arrays)))
    error = max(relative_error(*pair) for pair in zip(first, expected, strict=True))
    same = all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))
    finite = all(np.isfinite(result.astype(np.float32)).all() for result in (*first, *second))
    return {
        "dtype": kind.dtype,
        "precision": kind.precision,
        "error": error if math.isfinite(error) else None,  # which JSON has no number for
        "limit": kind.limit,
        "same_bits_twice": same,
        "finite": finite,
        "passed": bool(error <= kind.limit and same and finite),
    }


def poisoned(run: Any, arrays: list[Any]) -> list[np.ndarray]:
    """The results of a compiled program whose memory, most likely, was full of NaN before."""
    poison = [
        jnp.full(shape.shape, jnp.nan, shape.dtype) for shape in jax.tree.leaves(run.out_info) for _ in range(POISONS)
    ]
    jax.block_until_ready(poison)
    del poison
    return [np.asarray(result) for result in jax.tree.leaves(run(*arrays))]


def widened(array: np.ndarray | None) -> np.ndarray | None:
    """Floating-point numbers as float64; everything else as it is."""
    return array if array is None or array.dtype in (np.int32, np.bool_) else array.astype(np.float64)


def relative_error(result: np.ndarray, expected: np.ndarray) -> float:
    """||result - expected|| / ||expected||; NaN if anything is NaN, which no limit lets pass."""
    if result.shape != expected.shape:
        raise InputError(f"the result has shape {result.shape} but it must be {expected.shape}")
    return float(np.linalg.norm(result.astype(np.float64) - expected) / np.linalg.norm(expected))


def error_of(row: Row) -> float:
    """The error of a check; JSON has no number for one that is not finite."""
    return math.inf if row["error"] is None else float(row["error"])


READING = (
    "Relative error ||result - float64|| / ||float64|| over the whole result; each run twice, bit for bit, into "
    "memory that was full of NaN before.",
)
COLUMNS = (
    Column("op", lambda group: Cell(group[0]["op"], group[0]["backend"]), note="and backend"),
    Column("dtype, precision", lambda group: f"{group[0]['dtype']}, {group[0]['precision']}"),
    Column("checks", lambda group: str(len(group))),
    Column("worst error", lambda group: f"{max(map(error_of, group)):.2e}"),
    Column("limit", lambda group: f"{group[0]['limit']:g}"),
    Column("wrong", lambda group: str(sum(not row["passed"] for row in group))),
)
WRONG_COLUMNS = (
    Column("check", lambda row: row["cell"]),
    Column("error", lambda row: f"{error_of(row):.2e}"),
    Column("limit", field("limit", "g")),
    Column("same bits twice", lambda row: "yes" if row["same_bits_twice"] else "no"),
    Column("finite", lambda row: "yes" if row["finite"] else "no"),
)
