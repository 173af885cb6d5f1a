"""Compiles attention and whole forward passes for an H100 or H200 that is not here, and lists what each one takes.

    python -m funnel_benchmarks.static_hopper --json static-hopper.json

XLA compiles ahead of time from a description of the GPU: fusions, calls of cuBLASLt, Mosaic's and Triton's kernels down
to machine code, memory, and CUDA graphs. It cannot measure, so it is told to leave products to cuBLASLt; on a GPU it
times alternatives. Needs JAX's CUDA plugin and `ptxas`, but no driver: `make mosaic` has them.

Exit status 1 if a program does not compile, if a kernel of attention spills registers, or if a forward pass is not one
CUDA graph.
"""

import functools
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.table import Table

from funnel_benchmarks.hbm_traffic import hbm_traffic
from funnel_benchmarks.sweep import attention_shapes, finish, json_option, only_option, table_text, with_bar
from funnel_engine import FunnelConfig, HeadConfig, ModelConfig, preset
from funnel_engine.model import forward
from funnel_engine.output_files import check_writable
from funnel_engine.packing import make_plan, pack
from funnel_engine.weights import count_parameters, expected_shapes, nest
from funnel_kernels import Target
from funnel_kernels.attention.mosaic_gpu import SIZES, attention
from funnel_kernels.errors import FunnelError, InputError

INSTALL = (
    "JAX cannot compile for CUDA here ({error}); install jax-cuda13-plugin and jax-cuda13-pjrt of the version of jax, "
    "nvidia-cuda-nvcc and nvidia-nvvm, or run: make mosaic"
)
# What XLA must know of a GPU (GpuTargetConfigProto). Sizes: NVIDIA's H100 white paper and the data sheet of H200.
DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: {bandwidth} device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  device_address_bits: 64 device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability 9.0a" name: "{name}"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""
GPUS = {
    "h100": DESCRIPTION.format(name="NVIDIA H100 80GB HBM3", bandwidth=3_352_320_000_000, memory=85 * 10**9),
    "h200": DESCRIPTION.format(name="NVIDIA H200", bandwidth=4_800_000_000_000, memory=141 * 10**9),
}
ROWS = 65_536
SEQUENCE = 128  # rows of one short sequence
MODELS = ("gemma-2b", "embeddinggemma-300m", "gemma3-1b")
FUNNELS = ("none", "2:2")
SAMPLE = ("embeddinggemma-300m",)
DTYPE = jnp.bfloat16


class Kernel(NamedTuple):
    """What a kernel of attention takes: registers of a thread as it starts, bytes of shared memory, bytes spilled."""

    registers: int
    shared: int
    spilled: int


class Forward(NamedTuple):
    """What a forward pass takes.

    Attributes:
        graphs: CUDA graphs.
        loose: launches outside of them.
        products: calls of cuBLASLt.
        kernels: calls of this package's kernels.
        fusions: kernels that XLA has made.
        moved: gigabytes that all of them read and write, see `hbm_traffic`.
        needed: gigabytes of the weights, once each (of the embedding the rows of the batch).
        temporary: gigabytes of temporary memory.
    """

    graphs: int
    loose: int
    products: int
    kernels: int
    fusions: int
    moved: float
    needed: float
    temporary: float


Compile = Callable[[NamedSharding], Kernel | Forward]


def programs(sample: bool) -> dict[str, Compile]:
    """Every program by its name."""
    found: dict[str, Compile] = {}
    shapes = {(heads, kv_heads, d, softcap): scale for heads, kv_heads, d, scale, softcap in attention_shapes()}
    for (heads, kv_heads, head_dim, softcap), scale in shapes.items():
        if head_dim in SIZES:
            name = f"attention {heads}/{kv_heads} heads of {head_dim}, softcap {softcap:g}"
            options = {"heads": heads, "kv_heads": kv_heads, "scale": scale, "softcap": softcap or None}
            found[name] = functools.partial(compile_attention, head_dim, options)
    for model in SAMPLE if sample else MODELS:
        for funnel in FUNNELS:
            for rows in (SEQUENCE,) if sample else (SEQUENCE, ROWS):
                found[f"forward {model}, funnel {funnel}, {rows} rows"] = functools.partial(
                    compile_forward, preset(model), FunnelConfig.parse(funnel), rows
                )
    return found


def one_gpu(name: str) -> NamedSharding:
    """Where arrays are: on one GPU of this kind, which does not have to be here.

    Raises:
        InputError: JAX has no compiler for CUDA here.
    """
    try:
        found = topologies.get_topology_desc(platform="cuda", target_config=GPUS[name], topology="1x1x1")
    except (RuntimeError, jax.errors.JaxRuntimeError) as error:
        raise InputError(INSTALL.format(error=str(error).splitlines()[0])) from error
    return NamedSharding(Mesh(np.array(found.devices), ("x",)), PartitionSpec())


def array(shape: tuple[int, ...], dtype: Any, gpu: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=gpu)


def target(gpu: NamedSharding) -> Target:
    (device,) = gpu.device_set
    return Target.of(device)


def compile_attention(head_dim: int, options: dict[str, Any], gpu: NamedSharding) -> Kernel:
    """Attention over `ROWS` rows, by Mosaic, which writes down what ptxas says."""
    q, k = (array((ROWS, options[name] * head_dim), DTYPE, gpu) for name in ("heads", "kv_heads"))
    bound = array((ROWS,), jnp.int32, gpu)
    with tempfile.TemporaryDirectory() as folder:
        dumped = {"MOSAIC_GPU_DUMP_TO": folder, "MOSAIC_GPU_DUMP_PTXAS": "1"}
        os.environ.update(dumped)
        try:
            run = functools.partial(attention, **options, target=target(gpu))
            jax.jit(run).lower(q, k, k, bound, bound).compile()
        finally:
            for name in dumped:
                del os.environ[name]
        said = "".join(file.read_text() for file in sorted(Path(folder).glob("*.ptxas")))
        resources = "".join(file.read_text() for file in sorted(Path(folder).glob("*.resources.txt")))
    registers, spilled = re.findall(r"Used (\d+) registers", said), re.findall(r"(\d+) bytes spill", said)
    shared = re.findall(r"smem_scratch_bytes=(\d+)", resources)
    return Kernel(int(registers[0]), int(shared[0]) if shared else 0, max(map(int, spilled)))


def compile_forward(config: ModelConfig, funnel: FunnelConfig, rows: int, gpu: NamedSharding) -> Forward:
    """The forward pass of a preset in bfloat16, on one bucket."""
    shapes = expected_shapes(config, HeadConfig())
    weights = {name: jax.ShapeDtypeStruct(shape, DTYPE) for name, shape in shapes.items()}
    params = jax.eval_shape(lambda flat: nest(flat, config, funnel), weights)
    batch = pack(make_plan(config, funnel), np.arange(50, dtype=np.int32), np.array([0, 20, 50], np.int32), rows)
    inputs = jax.tree.map(lambda leaf: array(leaf.shape, leaf.dtype, gpu), (params, batch))
    options = {"config": config, "funnel": funnel, "dtype": DTYPE, "target": target(gpu)}
    with tempfile.TemporaryDirectory() as folder:
        compiled = (
            jax.jit(lambda params, batch: forward(params, batch, **options))
            .lower(*inputs)
            .compile(
                compiler_options={
                    "xla_dump_to": folder,
                    "xla_dump_hlo_as_text": True,
                    "xla_gpu_enable_triton_gemm": False,
                }
            )
        )
        memory = compiled.memory_analysis()
        assert memory is not None  # the compiler for GPUs has it
        (file,) = Path(folder).glob("*.thunk_sequence_after_thunk_passes.txt")
        thunks = file.read_text()
    unread = max(0, config.vocab_size - rows) * config.hidden_size  # rows of the embedding
    return Forward(
        *count_thunks(thunks),
        moved=hbm_traffic(compiled.as_text() or "") / 1e9,
        needed=2 * (count_parameters(shapes) - unread) / 1e9,
        temporary=memory.temp_size_in_bytes / 1e9,
    )


def count_thunks(thunks: str) -> tuple[int, int, int, int, int]:
    """Of XLA's list of launches: CUDA graphs, launches outside of them, cuBLASLt, custom calls and fusions.

    A line is a number, the kind and more; what is inside a graph is indented.
    """
    lines = re.findall(r"^( *)\d+: k(\w+)", thunks, re.MULTILINE)
    kinds = [kind for _, kind in lines]
    loose = sum(not indent and kind != "CommandBuffer" for indent, kind in lines)
    return (
        kinds.count("CommandBuffer"),
        loose,
        kinds.count("CublasLtMatmul"),
        kinds.count("CustomCall"),
        sum(kind in ("CustomKernel", "Kernel") for kind in kinds),
    )


def problem(found: Kernel | Forward | str) -> str:
    """What is wrong with a program, or nothing."""
    if isinstance(found, str):
        return f"does not compile: {found}"
    if isinstance(found, Kernel):
        return f"spills {found.spilled} bytes" if found.spilled else ""
    whole = (found.graphs, found.loose) == (1, 0)
    return "" if whole else f"is {found.graphs} CUDA graphs and {found.loose} loose launches"


def compile_program(program: Compile, gpu: NamedSharding) -> Kernel | Forward | str:
    """What it takes, or the last line of why it does not compile."""
    try:
        return program(gpu)
    except Exception as error:  # the compilers raise anything
        return (str(error).strip().splitlines() or [type(error).__name__])[-1]


@click.command()
@json_option
@only_option
@click.option("--gpu", "gpus", multiple=True, type=click.Choice(list(GPUS)), help="Default: all.")
@click.option("--sample", is_flag=True, help="Of the forward passes few.")
def main(json_file: Path | None, only: tuple[str, ...], gpus: tuple[str, ...], sample: bool) -> None:
    """Compile attention and forward passes for Hopper, without a GPU."""
    try:
        if json_file:
            check_writable(json_file, (".json",))
        places = {name: one_gpu(name) for name in gpus or GPUS}
        chosen = {name: program for name, program in programs(sample).items() if name.startswith(only or "")}
        if not chosen:
            raise InputError(f"--only {' '.join(only)!r}: no program has a name that begins so")
    except FunnelError as error:
        raise click.UsageError(str(error)) from error
    work = [(name, gpu) for name in chosen for gpu in places]
    results = {
        (name, gpu): compile_program(chosen[name], places[gpu]) for name, gpu in with_bar("Compiling", work, len(work))
    }
    problems = {place: problem(found) for place, found in results.items()}
    figures: dict[tuple[str, str], tuple[Any, ...]] = {
        place: () if isinstance(found, str) else found for place, found in results.items()
    }
    columns = [f"{kind.__name__}: {', '.join(kind._fields)}" for kind in (Kernel, Forward)]
    head = {"jax": jax.__version__}
    tables = [table(results, kind) for kind in (Kernel, Forward)]
    finish(json_file, functools.partial(table_text, head, columns, figures, problems), tables, problems)


def table(results: dict[tuple[str, str], Kernel | Forward | str], kind: type[Kernel] | type[Forward]) -> Table:
    shown = Table("program", "GPU", *kind._fields)
    for (name, gpu), found in results.items():
        if isinstance(found, kind):
            shown.add_row(
                name, gpu, *(f"{value:,.3g}" if isinstance(value, float) else f"{value:,}" for value in found)
            )
    return shown


if __name__ == "__main__":
    main()
