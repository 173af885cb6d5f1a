"""Compiles every Pallas kernel that the presets need, for TPUs that are not here, and lists what each one takes.

    python -m funnel_benchmarks.static_tpu --json static-tpu.json

The compiler of TPUs is in the package libtpu, and it writes down the schedule that it makes: a sequence of bundles,
each of which issues up to a dozen operations at once. Their number is a static figure, not a time: a loop's bundles
are counted once, and transfers go on beside them. It is compared per tile of work with *anchors*: kernels that do the
same work in separate steps, and JAX's own splash attention.

Exit status 1 if something does not compile.
"""

import collections
import functools
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.table import Table

from funnel_benchmarks.hbm_traffic import hbm_traffic
from funnel_benchmarks.sweep import attention_shapes, finish, json_option, only_option, table_text, widths, with_bar
from funnel_engine import FunnelConfig, HeadConfig, ModelConfig, preset
from funnel_engine.config import layer_steps
from funnel_engine.output_files import check_writable
from funnel_engine.sharding import AXES, abstract_forward
from funnel_engine.weights import count_parameters, expected_shapes
from funnel_kernels import Target, pallas_calls
from funnel_kernels.attention.pallas_tpu import attention
from funnel_kernels.pool_norm import POOLS
from funnel_kernels.pool_norm.pallas_tpu import pool_norm
from funnel_kernels.recover_norm import MODES, SITES
from funnel_kernels.recover_norm.pallas_tpu import recover_norm

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}
ENVIRONMENT = {  # of a process that compiles for TPUs without one
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing runs, so several processes may load it
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # a program that is not compiled writes none of what is read here
}
INSTALL = "libtpu, which has the compiler of TPUs, is not installed; run: pip install libtpu"
DTYPE = jnp.bfloat16  # of every preset's checkpoints
ROWS = 65_536
FORWARD_ROWS = 8192
EPS = 1e-6
STRIDES = (2, 4)
TILE = 256  # full-length rows that are one tile of work, unless a variant says otherwise
ANCHOR_WIDTHS = (768, 2048)
SHORTEST_LOOP = 8  # bundles
HEADS, HEAD_DIM, QUERIES, KEYS = 8, 256, 512, 1024  # a tile of attention: 512 queries of 8 heads, 1024 keys


# A kernel, and the anchors that together do its work.
COMPARED = {}
for width in ANCHOR_WIDTHS:
    for pool in POOLS:
        COMPARED[f"pool_norm {pool}, stride 2, width {width}"] = tuple(
            f"pool_norm anchor: {step}, width {width}" for step in ("pooling", "norm")
        )
    for mode in MODES:
        COMPARED[f"recover_norm {mode}, before_norm, stride 2, width {width}"] = tuple(
            f"recover_norm anchor: {step}, width {width}"
            for step in ("tiling", "norm" if mode == "tile" else "sum and norm")
        )


class Variant(NamedTuple):
    """Something to compile.

    Attributes:
        name: begins with the op.
        lower: lowers it for a device: a kernel with the arrays that it is called with, or a whole forward pass.
        tile_rows: how many rows of a kernel's longest block are one tile of work; 0 for what is not a kernel.
        least_bytes: of HBM that a whole forward pass must move.
    """

    name: str
    lower: Callable[[Any], Any]
    tile_rows: int
    least_bytes: int = 0


class Compiled(NamedTuple):
    """What a variant takes on a generation.

    Attributes:
        vmem: bytes of vector memory: blocks, scratch and spilled registers.
        bundles: of the whole kernel, those around its loop over blocks included.
        tiles: of work that it does in them.
        matrix_share: share of the bundles that issue a push into the matrix unit.
        loops: bundles of the body of each loop inside a block, which `bundles` counts once. Attention has five: the
            online softmax of two units, or their whole softmax, each without a mask and with one, and the end.
        spills: registers that are stored because there are too few.
        hbm_bytes: that the program moves, see `hbm_traffic`; 0 where this jaxlib cannot read the program's text.
        least_hbm_bytes: that it must move, see `least_traffic`.
        argument_bytes, temporary_bytes: that the program needs of HBM.
        problem: why it does not compile.
    """

    variant: str
    generation: str
    vmem: int = 0
    bundles: int = 0
    tiles: float = 0.0
    matrix_share: float = 0.0
    loops: tuple[int, ...] = ()
    spills: int = 0
    hbm_bytes: int = 0
    least_hbm_bytes: int = 0
    argument_bytes: int = 0
    temporary_bytes: int = 0
    problem: str = ""

    @property
    def bundles_per_tile(self) -> float:
        return self.bundles / self.tiles


# ----------------------------------------------------------------------------------------------------- variants


def attention_variants() -> Iterator[Variant]:
    mask = masks.MultiHeadMask([masks.FullMask((4 * KEYS, 4 * KEYS))] * HEADS)
    sizes = splash.BlockSizes(block_q=QUERIES, block_kv=KEYS, block_kv_compute=KEYS // 2)
    anchor = splash.make_splash_mqa_single_device(mask, block_sizes=sizes)
    keys = array(4 * KEYS, HEAD_DIM)
    for heads, kv_heads, head_dim, scale, softcap in attention_shapes():
        function = functools.partial(attention, heads=heads, kv_heads=kv_heads, scale=scale, softcap=softcap or None)
        rows = [array(FORWARD_ROWS, count * head_dim) for count in (heads, kv_heads, kv_heads)]
        bounds = [array(FORWARD_ROWS, dtype=jnp.int32)] * 2
        name = f"attention {heads}/{kv_heads} heads of {head_dim}, scale {scale:.4g}, softcap {softcap:g}"
        yield kernel(name, function, *rows, *bounds)

    def attend(*arrays: jax.Array, target: Target) -> Any:
        return anchor(*arrays)

    name = f"attention anchor: splash, {HEADS}/1 heads of {HEAD_DIM}, {QUERIES} queries and {KEYS} keys"
    yield kernel(name, attend, array(HEADS, 4 * KEYS, HEAD_DIM), keys, keys, tile_rows=KEYS)


def pool_norm_variants() -> Iterator[Variant]:
    for width in widths():
        for stride in STRIDES:
            for pool in POOLS:
                name = f"pool_norm {pool}, stride {stride}, width {width}"
                function = functools.partial(pool_norm, stride=stride, pool=pool, eps=EPS)
                yield kernel(name, function, array(ROWS, width), array(ROWS, dtype=jnp.bool_), array(width))
    for width in ANCHOR_WIDTHS:
        x, short, weight = array(ROWS, width), array(ROWS // 2, width), array(width)
        yield kernel(f"pool_norm anchor: pooling, width {width}", pool_alone, x)
        norm = functools.partial(norm_alone, rows=TILE // 2)
        yield kernel(f"pool_norm anchor: norm, width {width}", norm, weight, short, tile_rows=TILE // 2)


def recover_norm_variants() -> Iterator[Variant]:
    for width in widths():
        for stride in STRIDES:
            for mode in MODES:
                for site in SITES[:1] if mode == "tile" else SITES:
                    name = f"recover_norm {mode}, {site}, stride {stride}, width {width}"
                    function = functools.partial(recover_norm, stride=stride, mode=mode, site=site, eps=EPS)
                    full = None if mode == "tile" else array(ROWS, width)
                    yield kernel(name, function, array(ROWS // stride, width), full, array(width))
    for width in ANCHOR_WIDTHS:
        x, short, weight = array(ROWS, width), array(ROWS // 2, width), array(width)
        yield kernel(f"recover_norm anchor: tiling, width {width}", tile_alone, short)
        norm = functools.partial(norm_alone, rows=TILE)
        yield kernel(f"recover_norm anchor: norm, width {width}", norm, weight, x)
        yield kernel(f"recover_norm anchor: sum and norm, width {width}", norm, weight, x, x)


def forward_variants() -> Iterator[Variant]:
    for name, funnel in (("no funnel", FunnelConfig()), ("after layer 2", FunnelConfig.after(2, stride=2))):

        def lower(device: Any, funnel: FunnelConfig = funnel) -> Any:
            mesh = Mesh(np.array([[device]]), AXES)
            program, params, batch = abstract_forward(mesh, preset("gemma-2b"), funnel, rows=FORWARD_ROWS)
            return program.lower(params, batch)

        least = least_traffic(preset("gemma-2b"), funnel, FORWARD_ROWS)
        yield Variant(f"forward gemma-2b, {name}, {FORWARD_ROWS} rows", lower, 0, least)


PARTS: dict[str, tuple[Callable[[], Iterator[Variant]], ...]] = {
    "kernels": (attention_variants, pool_norm_variants, recover_norm_variants),
    "programs": (forward_variants,),  # without a dump, which would take minutes
}


def kernel(name: str, function: Callable[..., Any], *arrays: Any, tile_rows: int = TILE) -> Variant:
    """A variant of one kernel, called with arrays of these shapes and the target."""

    def lower(device: Any) -> Any:
        sharding = NamedSharding(Mesh(np.array([device]), ("one",)), PartitionSpec())
        placed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) if a else None for a in arrays]
        return jax.jit(functools.partial(function, target=Target.of(device, backend="tpu"))).lower(*placed)

    return Variant(name, lower, tile_rows)


def array(*shape: int, dtype: Any = DTYPE) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


# ------------------------------------------------------------------------------------------------------ anchors


def pool_alone(x: jax.Array, *, target: Target) -> jax.Array:
    """The mean of every two bfloat16 rows, [N, D] -> [N / 2, D]: they are the halves of 32-bit words."""

    def kernel(x_ref: Any, out_ref: Any) -> None:
        words = pltpu.bitcast(x_ref[...], jnp.uint32)
        first, second = (as_float(half) for half in (words << 16, words & jnp.uint32(0xFFFF0000)))
        out_ref[...] = ((first + second) * 0.5).astype(out_ref.dtype)

    return call_anchor(kernel, (x,), (TILE,), TILE // 2, x.shape[0] // 2, target)


def tile_alone(short: jax.Array, *, target: Target) -> jax.Array:
    """Every bfloat16 row twice, [N, D] -> [2 N, D]: as both halves of 32-bit words."""

    def kernel(short_ref: Any, out_ref: Any) -> None:
        upper = jax.lax.bitcast_convert_type(short_ref[...].astype(jnp.float32), jnp.uint32)
        out_ref[...] = pltpu.bitcast(upper | (upper >> 16), out_ref.dtype)

    return call_anchor(kernel, (short,), (TILE // 2,), TILE, 2 * short.shape[0], target)


def norm_alone(weight: jax.Array, *operands: jax.Array, rows: int, target: Target) -> jax.Array:
    """RMSNorm of the sum of one or more arrays [N, D], in blocks of `rows`."""

    def kernel(weight_ref: Any, *refs: Any) -> None:
        x = sum(ref[...].astype(jnp.float32) for ref in refs[:-1])
        inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=1, keepdims=True) + EPS)
        refs[-1][...] = (x * inverse_rms * (1.0 + weight_ref[...].astype(jnp.float32))).astype(refs[-1].dtype)

    arrays = (weight.reshape(1, -1), *operands)
    return call_anchor(kernel, arrays, (1, *[rows] * len(operands)), rows, operands[0].shape[0], target)


def as_float(words: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(words, jnp.float32)


def call_anchor(
    kernel: Callable[..., None],
    arrays: tuple[jax.Array, ...],
    block_rows: tuple[int, ...],
    out_rows: int,
    rows: int,
    target: Target,
) -> jax.Array:
    """A kernel over blocks of rows of `arrays`; an array of one row is whole in every block."""
    width, dtype = arrays[-1].shape[1], arrays[-1].dtype
    return pallas_calls.call(
        kernel,
        target=target,
        semantics=("parallel",),
        grid=(rows // out_rows,),
        in_specs=[pl.BlockSpec((size, width), lambda i, size=size: (i if size > 1 else 0, 0)) for size in block_rows],
        out_specs=pl.BlockSpec((out_rows, width), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((rows, width), dtype),
        name="anchor",
    )(*arrays)


# ------------------------------------------------------------------------------------------- compiling, in a child


def compile_all(generation: str, part: str, only: tuple[str, ...], start: int, folder: Path) -> None:
    """Compiles those variants of a part whose names begin as one of `only`, from the `start`-th on.

    Prints lines of JSON: all their names, then each result. It must run in a process of its own, in which the compiler
    dumps into `folder`.
    """
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation])
    device: Any = topology.devices[0]
    chosen = [variant for op in PARTS[part] for variant in op() if variant.name.startswith(only)]
    print(json.dumps([variant.name for variant in chosen]), flush=True)
    for variant in chosen[start:]:
        for file in folder.iterdir():
            file.unlink()
        print(json.dumps(compile_one(variant, generation, device, folder)._asdict()), flush=True)


def compile_one(variant: Variant, generation: str, device: Any, folder: Path) -> Compiled:
    """Compiles one variant; what goes wrong is in `problem`."""
    try:
        program = variant.lower(device).compile()
    except Exception as error:  # the compiler raises anything
        return Compiled(variant.name, generation, problem=f"does not compile: {str(error).strip().splitlines()[0]}")
    if variant.tile_rows:
        figures = read_dump(folder, kernel_name(program, variant), variant.tile_rows)
    else:
        memory = program.memory_analysis()
        figures = {
            "hbm_bytes": moved(program),
            "least_hbm_bytes": variant.least_bytes,
            "argument_bytes": memory.argument_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes,
        }
    return Compiled(variant.name, generation, **figures)


def kernel_name(program: Any, variant: Variant) -> str:
    """What the compiled program calls its one kernel."""
    try:
        (name,) = re.findall(r"%(\S+) = .* custom_call_target=\"tpu_custom_call\"", program.as_text())
    except jax.errors.JaxRuntimeError:  # as in `moved`; our kernels are named after their op, and numbered
        return f"{variant.name.split()[0]}.1"
    return str(name)


def moved(program: Any) -> int:
    try:
        return hbm_traffic(program.as_text())
    except jax.errors.JaxRuntimeError:  # newer than jaxlib: its asynchronous operations have other operands
        return 0


def least_traffic(config: ModelConfig, funnel: FunnelConfig, rows: int) -> int:
    """Bytes of HBM that a bfloat16 forward pass of `rows` packed rows must move.

    Every weight of the layers is read once. Each layer writes and reads once what one product or kernel hands to the
    next: the residual stream twice, q, k and v before and after RoPE, what attention makes of them, and gate with up.
    """
    d, heads, kv_heads = config.head_dim, config.num_heads, config.num_kv_heads
    per_row = 2 * config.hidden_size + 2 * (heads + 2 * kv_heads) * d + heads * d + 2 * config.intermediate_size
    layers = [shape for name, shape in expected_shapes(config, HeadConfig()).items() if name.startswith("layers.")]
    layer_rows = sum(rows // step.query_stride for step in layer_steps(config, funnel))
    return 2 * (count_parameters({str(index): shape for index, shape in enumerate(layers)}) + 2 * layer_rows * per_row)


def read_dump(folder: Path, name: str, tile_rows: int) -> dict[str, Any]:
    """The figures of the kernel that the compiled program calls `name`, from what the compiler dumped."""

    def text(ending: str) -> str:
        (file,) = (
            found for found in folder.iterdir() if re.fullmatch(rf"\d+-{re.escape(name)}-\d+-{ending}", found.name)
        )
        return file.read_text()

    memory = text("pre-finalize-registers-and-allocations.txt")
    blocks = [int(rows) for rows in re.findall(r"The window shape is \w+\[(?:\d+,)*?(\d+),\d+\]", memory)]
    pushes, spills, bundles = utilization(text("final_hlo-static-per-bundle-utilization.txt"))
    return {
        "vmem": sum(int(size, 16) for size in re.findall(r"space=vmem, size = (0x[0-9a-f]+)", memory)),
        "bundles": int(re.findall(r"total scheduled bundles:\s*(\d+)", text("schedule-analysis_final_bundles.txt"))[0]),
        "tiles": max(blocks) / tile_rows,
        "matrix_share": pushes / bundles,
        "loops": loop_bodies(text("final_bundles.txt")),
        "spills": spills,
    }


def loop_bodies(text: str) -> tuple[int, ...]:
    """Bundles of each loop within the loop over blocks, where a schedule has `>>`; those of copies are a few each."""
    depths = [
        len(depth) for depth in re.findall(r"^ *(?:0x[0-9a-f]+|0) *(?:LH|LB|LE|PB|PF|CT)?: *(>*)", text, re.MULTILINE)
    ]
    bodies = (len(list(run)) for depth, run in itertools.groupby(depths) if depth > 1)
    return tuple(body for body in bodies if body > SHORTEST_LOOP)


def utilization(text: str) -> tuple[int, int, int]:
    """Of a table of bundles by kind of operation: bundles with a matrix push, spilling stores, bundles."""
    head, table = text.split("== UTILIZATION:")
    kinds = [kind.strip() for kind in head.splitlines()[1].split(",")]
    counts = np.array([line.split() for line in table.splitlines() if line.strip()], int)
    push, spill = (counts[:, kinds.index(kind)] for kind in ("MATPUSH", "VSTORE:SPILL"))
    return int((push > 0).sum()), int(spill.sum()), len(counts)


# -------------------------------------------------------------------------------------------------- the command


def compile_for(generation: str, part: str, only: tuple[str, ...]) -> Iterator[Compiled]:
    """Every variant of a part on one generation. One that ends the compiler's process is a problem of its own."""
    names, done = [""], 0  # until the first process has told them
    while done < len(names):
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
            arguments = f"{generation!r}, {part!r}, {only!r}, {done}, static_tpu.Path({folder!r})"
            code = f"from funnel_benchmarks import static_tpu; static_tpu.compile_all({arguments})"
            dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true" if part == "kernels" else ""
            environment = os.environ | ENVIRONMENT | {"LIBTPU_INIT_ARGS": dump}
            command = [sys.executable, "-c", code]
            with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as child:
                lines = map(json.loads, child.stdout or ())
                told = next(lines, None)
                for fields in lines:
                    yield Compiled(**fields)
                    done += 1
            errors.seek(0)
            last = (errors.read().strip().splitlines() or ["no message"])[-1]
        if told is None:
            raise click.ClickException(f"cannot compile for {generation}: {last}")
        names = told
        if done < len(names):
            yield Compiled(names[done], generation, problem=f"ends the compiler, status {child.returncode}: {last}")
            done += 1


@click.command()
@json_option
@only_option
@click.option("--generation", "generations", multiple=True, type=click.Choice(list(TOPOLOGIES)), help="Default: all.")
def main(json_file: Path | None, only: tuple[str, ...], generations: tuple[str, ...]) -> None:
    """Compile every Pallas kernel that the presets need, and a whole model, without a TPU."""
    if json_file:
        check_writable(json_file, (".json",))
    if not importlib.util.find_spec("libtpu"):
        raise click.ClickException(INSTALL)
    jobs = itertools.product(generations or TOPOLOGIES, PARTS)
    found = itertools.chain.from_iterable(compile_for(generation, part, only or ("",)) for generation, part in jobs)
    results = list(with_bar("Compiling", found))
    figures = {(result.variant, result.generation): result[2:-1] for result in results}
    problems = {(result.variant, result.generation): result.problem for result in results}
    text = functools.partial(table_text, {"jax": jax.__version__}, Compiled._fields[2:-1], figures, problems)
    finish(json_file, text, [summary(results), comparison(results)], problems)


def summary(results: list[Compiled]) -> Table:
    """The figures of each op on each generation."""
    groups: dict[tuple[str, str], list[Compiled]] = collections.defaultdict(list)
    for result in results:
        groups[result.variant.split()[0], result.generation].append(result)
    table = Table("op", "TPU", "compiled", "vector memory", "bundles a tile", "matrix pushes", "spills", "HBM traffic")
    for (op, generation), group in groups.items():
        good = [result for result in group if not result.problem]
        kernels = [result for result in good if result.tiles]
        moved = [(result.hbm_bytes, result.least_hbm_bytes) for result in good if not result.tiles]
        table.add_row(
            op,
            generation,
            f"{len(good)} of {len(group)}",
            span("{:.1f} MiB", [(result.vmem / 2**20,) for result in kernels]),
            span("{:,.0f}", [(result.bundles_per_tile,) for result in kernels]),
            span("{:.0%}", [(result.matrix_share,) for result in kernels]),
            span("{:,}", [(result.spills,) for result in kernels]),
            span("{:.2f} GB = {:.2f} of the least", [(b / 1e9, b / least) for b, least in moved if b]),
        )
    return table


def comparison(results: list[Compiled]) -> Table:
    """Kernels beside their anchors."""
    table = Table("kernel", "TPU", "bundles a tile", "anchors", "ratio")
    for (name, anchors), generation in itertools.product(COMPARED.items(), TOPOLOGIES):
        found = {r.variant: r for r in results if r.generation == generation and r.tiles}
        if {name, *anchors} <= found.keys():
            bundles, limit = found[name].bundles_per_tile, sum(found[anchor].bundles_per_tile for anchor in anchors)
            table.add_row(name, generation, f"{bundles:,.0f}", f"{limit:,.0f}", f"{bundles / limit:.2f}")
    return table


def span(form: str, numbers: list[tuple[float, ...]]) -> str:
    """The smallest and the largest, as `format` writes them; nothing for none."""
    return " - ".join(dict.fromkeys(form.format(*end) for end in (min(numbers), max(numbers)))) if numbers else ""


if __name__ == "__main__":
    main()
