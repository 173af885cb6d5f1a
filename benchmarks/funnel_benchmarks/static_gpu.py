"""Compiles every Triton kernel that the presets need, for GPUs that are not here, and lists what each one uses.

    python -m funnel_benchmarks.static_gpu --json static-gpu.json

A kernel goes the way that jax-triton and XLA take it: Triton makes PTX, and the `ptxas` that Triton ships makes machine
code of it. No cache is read. Exit status 1 if a kernel for an NVIDIA target does not compile, spills registers, or
needs more shared memory than its target has. AMD's gfx942 is reported apart and decides nothing.
"""

import collections
import concurrent.futures
import itertools
import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import jax.numpy as jnp
import triton
from rich.table import Table
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource, make_backend

from funnel_benchmarks.sweep import attention_shapes, finish, json_option, only_option, table_text, widths, with_bar
from funnel_engine.config import RECOVERIES
from funnel_engine.output_files import check_writable
from funnel_kernels.attention import triton_gpu as attention
from funnel_kernels.errors import FunnelError, InputError
from funnel_kernels.pool_norm import POOLS
from funnel_kernels.pool_norm import triton_gpu as pool
from funnel_kernels.recover_norm import SITES
from funnel_kernels.recover_norm import triton_gpu as recover
from funnel_kernels.triton_calls import RowSizes, row_rule

ROWS = 65_536
EPS = 1e-6
HOPPER = 90  # whose block sizes AMD gets
STRIDES = (2, 4)
POINTERS = {"bfloat16": "*bf16", "float32": "*fp32"}
KERNELS = {
    "attention": attention.attention_kernel,
    "pool_norm": pool.pool_norm_kernel,
    "recover_norm": recover.recover_norm_kernel,
}
MACHINE_CODE = ("cubin", "hsaco")  # Triton's last stages
# What a program may have of shared memory, in bytes (CUDA C++ programming guide, table of compute capabilities; AMD
# CDNA 3 instruction set, section 2.2).
SHARED = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
TARGETS = {name: GPUTarget("cuda", int(name[3:]), 32) for name in SHARED if name.startswith("sm_")}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)


class Variant(NamedTuple):
    """One kernel with everything that is fixed when it is compiled: types of its pointers, and options."""

    op: str
    details: str
    pointers: dict[str, str]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.op} {self.details}"


class Compiled(NamedTuple):
    """What a variant uses on a target: registers a thread, bytes of shared memory, bytes of registers spilled.

    `error` is empty where it compiles.
    """

    registers: int
    shared: int
    spilled: int
    error: str = ""


def variants(target: str, sample: bool = False) -> Iterator[Variant]:
    """What every preset needs on a target, each once: both dtypes, all pools, recoveries and sites.

    The row-wise kernels come in every width with all options at stride 2; of other strides, and in a sample of stride 2
    too, there are as few as show each width and each combination of options. Attention comes in every shape; in a
    sample, of shapes that differ in constants alone there is one.
    """
    recoveries = dict.fromkeys(
        (recovery.mode, site, dtype, "float32" if recovery.source == "mean" else dtype)
        for recovery, site, dtype in itertools.product(RECOVERIES.values(), SITES, POINTERS)
        if recovery.mode != "tile" or site == SITES[0]  # where it is the same program
    )
    yield from attention_variants(target, sample)
    for width, ((mode, dtype), stride) in row_wise(widths(), list(itertools.product(POOLS, POINTERS)), sample):
        yield pool_variant(width, mode, dtype, stride)
    for width, ((mode, site, dtype, full), stride) in row_wise(widths(), list(recoveries), sample):
        yield recover_variant(width, mode, site, dtype, full, stride)


def row_wise(widths: list[int], options: list[Any], sample: bool) -> Iterator[tuple[int, tuple[Any, int]]]:
    """Widths with (option, stride)."""
    if sample:
        return few(widths, list(itertools.product(options, STRIDES)))
    usual, *others = STRIDES
    return itertools.chain(
        itertools.product(widths, itertools.product(options, [usual])),
        few(widths, list(itertools.product(options, others))),
    )


def few(first: list[Any], second: list[Any]) -> Iterator[tuple[Any, Any]]:
    """Pairs that have each element of two lists at least once."""
    pairs = zip(itertools.cycle(first), itertools.cycle(second), strict=True)
    return itertools.islice(pairs, max(len(first), len(second)))


def attention_variants(target: str, sample: bool) -> Iterator[Variant]:
    capability = HOPPER if TARGETS[target].backend == "hip" else TARGETS[target].arch
    # What shapes the program: in a sample, of the heads only how many of them share a key. The scale never does.
    shapes = {
        (shape[0] // shape[1] if sample else shape[:2], shape[2], shape[4]): shape for shape in attention_shapes()
    }
    for dtype, shape in itertools.product(POINTERS, shapes.values()):
        sizes = attention.rule(attention.padded(shape[2]), jnp.dtype(dtype), capability)
        yield attention_variant(target, dtype, shape, sizes)


def attention_variant(
    target: str, dtype: str, shape: tuple[int, int, int, float, float], sizes: attention.Sizes
) -> Variant:
    """`shape`: heads, key/value heads, head dim, scale, softcap."""
    heads, kv_heads, head_dim, scale, softcap = shape
    _, options = attention.launch(ROWS, jnp.dtype(dtype), heads, kv_heads, head_dim, scale, softcap or None, sizes)
    if TARGETS[target].backend == "hip":  # which has no TF32
        options["precision"] = "ieee"
    pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), POINTERS[dtype])
    pointers |= dict.fromkeys(("lo_ptr", "hi_ptr"), "*i32")
    details = f"{heads}/{kv_heads} heads of {head_dim}, softcap {softcap:g}, {dtype}"
    return Variant("attention", details, pointers, options)


def pool_variant(width: int, mode: str, dtype: str, stride: int, sizes: RowSizes | None = None) -> Variant:
    sizes = sizes or row_rule(triton.next_power_of_2(width))
    _, options = pool.launch(ROWS // stride, width, stride, mode, EPS, sizes)
    pointers = dict.fromkeys(("x_ptr", "weight_ptr", "pooled_ptr", "normed_ptr"), POINTERS[dtype])
    details = f"{mode}, stride {stride}, width {width}, {dtype}"
    return Variant("pool_norm", details, pointers | {"real_ptr": "*i1"}, options)


def recover_variant(
    width: int, mode: str, site: str, dtype: str, full: str, stride: int, sizes: RowSizes | None = None
) -> Variant:
    """`full` is the dtype of the full-length activations: a running mean is float32 whatever the model."""
    sizes = sizes or row_rule(triton.next_power_of_2(width))
    _, options = recover.launch(ROWS // stride, width, stride, mode, site, EPS, sizes)
    pointers = dict.fromkeys(("short_ptr", "weight_ptr", "out_ptr"), POINTERS[dtype])
    details = f"{mode}, {site}, stride {stride}, width {width}, {dtype}"
    details += f" with {full}" if full != dtype else ""
    return Variant("recover_norm", details, pointers | {"full_ptr": POINTERS[full]}, options)


def compile_for(target: str, variant: Variant) -> Compiled:
    """Compiles one variant as jax-triton asks Triton to."""
    constants = dict(variant.options)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")} | {"enable_fp_fusion": True}
    kernel = KERNELS[variant.op]
    types = variant.pointers | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}  # what is left are numbers of rows
    # JAX's arrays start at multiples of 16 bytes and more.
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in variant.pointers}
    metadata: dict[str, Any] = {}
    try:
        source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
        assembly = assemble(source, TARGETS[target], options, metadata)
        registers, spilled = USED[TARGETS[target].backend](assembly, target)
    except Exception as error:  # the compilers raise anything
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return Compiled(0, 0, 0, f"does not compile: {lines[-1]}")
    return Compiled(registers, metadata["shared"], spilled)


def assemble(source: ASTSource, target: GPUTarget, options: dict[str, Any], metadata: dict[str, Any]) -> str:
    """Runs Triton's stages up to the assembly, which is text. They write what they find out into `metadata`."""
    backend = make_backend(target)
    settings = backend.parse_options(options)
    metadata.update(vars(settings))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    stages: dict[str, Callable[..., Any]] = {}
    backend.add_stages(stages, settings, source.language)
    functions = backend.get_codegen_implementation(settings)
    program = source.make_ir(target, settings, functions, backend.get_module_map(), context)
    for name, stage in stages.items():
        if name not in MACHINE_CODE:
            program = stage(program, metadata)
    return program


def used_on_nvidia(ptx: str, target: str) -> tuple[int, int]:
    """Registers and spilled bytes, which ptxas tells.

    Raises:
        ValueError: ptxas refuses the program.
    """
    capability = TARGETS[target].arch
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={sm_arch_from_capability(capability)}", file.name]
        done = subprocess.run([*command, "-o", os.devnull], capture_output=True, text=True)
    if done.returncode != 0:
        raise ValueError(done.stderr)
    registers, stores, loads = (
        int(match[1]) if (match := re.search(pattern, done.stderr)) else 0
        for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes spill loads")
    )
    return registers, max(stores, loads)


def used_on_amd(assembly: str, target: str) -> tuple[int, int]:
    """Vector registers and spilled bytes, from the assembly's metadata."""
    registers, spilled = (
        int(match[1]) if (match := re.search(pattern, assembly)) else 0
        for pattern in (r"\.vgpr_count:\s+(\d+)", r"\.vgpr_spill_count:\s+(\d+)")
    )
    return registers, 4 * spilled


USED: dict[str, Callable[[str, str], tuple[int, int]]] = {"cuda": used_on_nvidia, "hip": used_on_amd}


def problem(target: str, compiled: Compiled) -> str:
    """What is wrong with a kernel on a target, or nothing."""
    if compiled.shared > SHARED[target]:
        return f"needs {compiled.shared:,} bytes of shared memory; {target} has {SHARED[target]:,}"
    return compiled.error or (f"spills {compiled.spilled} bytes" if compiled.spilled else "")


Results = dict[tuple[str, str], Compiled]  # by variant and target


@click.command()
@json_option
@only_option
@click.option("--target", "targets", multiple=True, type=click.Choice(list(SHARED)), help="Default: all.")
@click.option(
    "--sample", is_flag=True, help="Fewer variants, with each width, attention shape and option at least once."
)
@click.option("--jobs", type=click.IntRange(min=1), help="Processes that compile. Default: one for each core.")
def main(
    json_file: Path | None, only: tuple[str, ...], targets: tuple[str, ...], sample: bool, jobs: int | None
) -> None:
    """Compile every Triton kernel that the presets need, without a GPU."""
    try:
        if json_file:
            check_writable(json_file, (".json",))
        if triton.knobs.runtime.interpret:
            raise InputError("TRITON_INTERPRET=1 replaces Triton's compiler, which is wanted here; unset it")
        work = [
            (target, variant)
            for target in targets or SHARED
            for variant in variants(target, sample)
            if variant.name.startswith(only or "")
        ]
        if not work:
            raise InputError(
                f"--only {' '.join(only)!r}: no kernel has a name that begins so; they begin with "
                f"{' or '.join(KERNELS)}"
            )
    except FunnelError as error:
        raise click.UsageError(str(error)) from error
    results = compile_all(work, jobs or multiprocessing.cpu_count())
    head = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "triton": triton.__version__}
    figures = {place: compiled[:-1] for place, compiled in results.items()}
    problems = {(name, target): problem(target, compiled) for (name, target), compiled in results.items()}
    text = partial(table_text, head, Compiled._fields[:-1], figures, problems)
    finish(json_file, text, [summary(results)], problems, fatal=lambda target: TARGETS[target].backend == "cuda")


def compile_all(work: list[tuple[str, Variant]], jobs: int) -> Results:
    """Each variant for its target, in processes of their own: most of a compiler's time is under Python's lock."""
    # Starting afresh, because JAX's threads do not survive a fork.
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        compiled = pool.map(compile_for, *zip(*work, strict=True))
        bar = with_bar("Compiling", compiled, len(work))
        return {(variant.name, target): found for (target, variant), found in zip(work, bar, strict=True)}


def summary(results: Results) -> Table:
    """The largest figures of each op on each target."""
    groups: dict[tuple[str, str], list[Compiled]] = collections.defaultdict(list)
    for (name, target), compiled in results.items():
        groups[name.split()[0], target].append(compiled)
    table = Table("op", "target", "kernels", "shared memory", "registers", "problems")
    for (op, target), group in groups.items():
        shared, registers = max(it.shared for it in group), max(it.registers for it in group)
        problems = sum(bool(problem(target, it)) for it in group)
        table.add_row(op, target, str(len(group)), f"{shared:,}", str(registers), str(problems))
    return table


if __name__ == "__main__":
    main()
