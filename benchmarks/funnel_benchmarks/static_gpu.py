"""Compiles every Triton kernel that the presets need, for GPUs that are not here, and lists what each one uses.

    python -m funnel_benchmarks.static_gpu --json static-gpu.json

Exit status 1 if a kernel for an NVIDIA target does not compile, spills registers, or needs more shared memory than its
target has. AMD's gfx942 is reported apart and decides nothing.
"""

import collections
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import jax.numpy as jnp
import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from funnel_engine import preset
from funnel_engine.output_files import check_writable, write_text
from funnel_engine.presets import PRESETS
from funnel_kernels.attention import triton_gpu as attention
from funnel_kernels.pool import POOLS
from funnel_kernels.pool import triton_gpu as pool
from funnel_kernels.recover import MODES, SITES
from funnel_kernels.recover import triton_gpu as recover

ROWS = 65_536
EPS = 1e-6
HOPPER = 90  # whose block sizes AMD gets
STRIDES = (2, 4)
POINTERS = {"bfloat16": "*bf16", "float32": "*fp32"}
# What a program may have of shared memory, in bytes (CUDA C++ programming guide, table of compute capabilities; AMD
# CDNA 3 instruction set, section 2.2).
SHARED = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
TARGETS = {name: GPUTarget("cuda", int(name[3:]), 32) for name in SHARED if name.startswith("sm_")}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)


class Variant(NamedTuple):
    """One kernel with everything that is fixed when it is compiled: types of its pointers, and options."""

    name: str
    kernel: Any
    pointers: dict[str, str]
    options: dict[str, Any]


class Compiled(NamedTuple):
    """What a variant uses on a target: bytes of shared memory, registers a thread, bytes of registers spilled."""

    variant: str
    target: str
    shared: int
    registers: int
    spilled: int
    problem: str


def variants(target: str) -> Iterator[Variant]:
    """What every preset needs on a target, each once: both dtypes, all pools, recoveries and sites."""
    capability = TARGETS[target].arch if TARGETS[target].backend == "cuda" else HOPPER
    shapes = sorted({(c.num_heads, c.num_kv_heads, c.head_dim, c.query_scale, c.softcap or 0.0) for c in configs()})
    widths = sorted({config.hidden_size for config in configs()})
    for dtype, pointer in POINTERS.items():
        for heads, kv_heads, head_dim, scale, softcap in shapes:
            _, options = attention.launch(
                ROWS, ROWS, jnp.dtype(dtype), heads, kv_heads, head_dim, scale, softcap or None, capability
            )
            pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), pointer)
            pointers |= dict.fromkeys(("lo_ptr", "hi_ptr"), "*i32")
            name = f"attention {heads}/{kv_heads} heads of {head_dim}, softcap {softcap:g}, {dtype}"
            yield Variant(name, attention.attention_kernel, pointers, options)
        for width in widths:
            for stride in STRIDES:
                for mode in POOLS:
                    _, options = pool.launch(ROWS // stride, width, stride, mode, EPS)
                    pointers = dict.fromkeys(("x_ptr", "weight_ptr", "pooled_ptr", "normed_ptr"), pointer)
                    name = f"pool_norm {mode}, stride {stride}, width {width}, {dtype}"
                    yield Variant(name, pool.pool_norm_kernel, pointers | {"real_ptr": "*i1"}, options)
                for mode in MODES:
                    for site in SITES:
                        _, options = recover.launch(ROWS // stride, width, stride, mode, site, EPS)
                        pointers = dict.fromkeys(("short_ptr", "full_ptr", "weight_ptr", "out_ptr"), pointer)
                        name = f"recover_norm {mode}, {site}, stride {stride}, width {width}, {dtype}"
                        yield Variant(name, recover.recover_norm_kernel, pointers, options)


def configs() -> Iterator[Any]:
    return map(preset, PRESETS)


def compile_for(variant: Variant, target: str) -> Compiled:
    """Compiles one variant; what goes wrong is in `problem`."""
    options = dict(variant.options)
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    launch["enable_fp_fusion"] = True  # as jax-triton asks
    names = variant.kernel.arg_names
    signature = {name: variant.pointers.get(name, "constexpr") for name in names}
    # JAX's arrays start at multiples of 16 bytes and more, and jax-triton tells the compiler so.
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.pointers}
    source = ASTSource(variant.kernel, signature, constexprs=options, attrs=aligned)
    try:
        program = triton.compile(source, target=TARGETS[target], options=launch)
    except Exception as error:  # the compiler raises anything
        return Compiled(variant.name, target, 0, 0, 0, f"does not compile: {str(error).strip().splitlines()[-1]}")
    registers, spilled = USED[TARGETS[target].backend](program, target)
    problem = f"spills {spilled} bytes" if spilled else ""
    if program.metadata.shared > SHARED[target]:
        problem = f"needs {program.metadata.shared:,} bytes of shared memory; {target} has {SHARED[target]:,}"
    return Compiled(variant.name, target, program.metadata.shared, registers, spilled, problem)


def used_on_nvidia(program: Any, target: str) -> tuple[int, int]:
    """Registers and spilled bytes, which ptxas tells."""
    capability = TARGETS[target].arch
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(program.asm["ptx"])
        name = f"sm_{capability}" + ("a" if capability >= 90 else "")
        command = [
            get_ptxas(capability).path,
            "-v",
            f"--gpu-name={name}",
            str(file),
            "-o",
            str(file.with_suffix(".cubin")),
        ]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, stores, loads = (
        int(match[1]) if (match := re.search(pattern, report)) else 0
        for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes spill loads")
    )
    return registers, max(stores, loads)


def used_on_amd(program: Any, target: str) -> tuple[int, int]:
    """Vector registers and spilled bytes, which stand in the assembly's metadata."""
    text = program.asm["amdgcn"]
    registers, spilled = (
        int(match[1]) if (match := re.search(pattern, text)) else 0
        for pattern in (r"\.vgpr_count:\s+(\d+)", r"\.vgpr_spill_count:\s+(\d+)")
    )
    return registers, 4 * spilled


USED: dict[str, Callable[[Any, str], tuple[int, int]]] = {"cuda": used_on_nvidia, "hip": used_on_amd}


@click.command()
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="File to write.")
@click.option("--only", default="", help="Only variants whose name begins so, e.g. attention.")
@click.option("--target", "targets", multiple=True, type=click.Choice(list(SHARED)), help="Default: all.")
def main(json_file: Path | None, only: str, targets: tuple[str, ...]) -> None:
    """Compile every Triton kernel that the presets need, without a GPU."""
    if json_file:
        check_writable(json_file, (".json",))
    jobs = [
        (variant, target)
        for target in targets or SHARED
        for variant in variants(target)
        if variant.name.startswith(only)
    ]
    console = Console(stderr=True)
    bar = track(jobs, "Compiling", console=console, transient=True, disable=not console.is_terminal)
    results = [compile_for(*job) for job in bar]
    if json_file:
        rows = [result._asdict() for result in results]
        write_text(json_file, json.dumps({"triton": triton.__version__, "kernels": rows}, indent=1) + "\n")
    print_summary(results)
    if any(result.problem for result in results if TARGETS[result.target].backend == "cuda"):
        raise SystemExit(1)


def print_summary(results: list[Compiled]) -> None:
    """The largest figures of each op on each target, and every problem."""
    groups: dict[tuple[str, str], list[Compiled]] = collections.defaultdict(list)
    for result in results:
        groups[result.variant.split()[0], result.target].append(result)
    table = Table("op", "target", "kernels", "shared memory", "registers", "problems")
    for (op, target), group in groups.items():
        most = [max(getattr(result, name) for result in group) for name in ("shared", "registers")]
        problems = sum(bool(result.problem) for result in group)
        table.add_row(op, target, str(len(group)), f"{most[0]:,}", str(most[1]), str(problems))
    Console().print(table)
    for result in results:
        if result.problem:
            click.echo(f"{result.target}: {result.variant}: {result.problem}")


if __name__ == "__main__":
    main()
