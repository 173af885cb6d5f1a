"""`static_tpu`: what the compiler dumped is read right, and real compilation for TPUs that are not here."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

from funnel_benchmarks import static_tpu
from funnel_benchmarks.static_tpu import Compiled, Variant
from funnel_engine import FunnelConfig, preset
from funnel_engine.presets import PRESETS
from funnel_kernels import InputError, Target
from option_grid import normal

# ---------------------------------------------------------------------------------------------- reading a dump

MEMORY = """
  #allocation0 [shape = 'u32[]', space=smem, size = 0x4, offset = 0x4, fixed_abs, tag = 'smem constant']
  #allocation2 [shape = 'u32[72,128]{1,0:T(1,128)}', space=vmem, size = 0x9000, scoped, tag = 'internal scratch']
  %s0 = inlined_call_operand.hbm [shape: bf16[65536,768]] /* The window shape is bf16[512,768] */
  %s1 = inlined_call_operand.hbm [shape: f32[128,1,512]] /* The window shape is f32[1,1,512] */
  %s2 = inlined_call_operand.hbm [shape: bf16[32768,768]] /* The window shape is bf16[256,768] */
    #allocation3 [shape = 'u8[786432]{0}', space=vmem, size = 0xc0000, scoped, tag = 'input window']
"""
UTILIZATION = """== CAPACITY:
MATMUL, MATPUSH, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    4     4     3     4     2     1     3     3     1     1     2
== UTILIZATION:
0 0 0 0 0 0 1 0 0 0 0
0 2 0 4 0 0 1 0 1 1 0
0 1 0 4 0 0 1 0 2 2 0
9 0 0 4 0 0 1 0 1 0 9
"""
FINAL = "\n".join(
    [
        "LB: loop body",
        "     0   :  { %s1 = smov.u32 0 }",
        "   0x1 LB: > { %s2 = sld [smem:[#allocation30_spill]] }",
        *(f"  {index:#x}   : >> {{ %v1 = vadd.f32 }}" for index in range(2, 12)),
        "   0xc PF: > { %s3 = sld }",
        "   0xd LB: >> { %s9 = sadd.s32 }",  # a loop that copies
        "   0xe   : > { %s4 = sld }",
        *(f"  {index:#x}   : >> {{ %v2 = vmul.f32 }}" for index in range(15, 35)),
    ]
)
SCHEDULE = "Schedule analysis:\n\ttotal scheduled bundles:    278\n\tempty scheduled bundles:    8\n"


def write_dump(folder: Path, name: str, schedule: str = SCHEDULE) -> None:
    for number, ending, text in (
        (51, "pre-finalize-registers-and-allocations", MEMORY),
        (68, "pre-delay_hlo-static-per-bundle-utilization", "of an earlier pass"),
        (70, "final_hlo-static-per-bundle-utilization", UTILIZATION),
        (64, "schedule-analysis_packed-bundles-post-ra", "of an earlier pass"),
        (71, "schedule-analysis_final_bundles", schedule),
        (72, "final_bundles", FINAL),
    ):
        (folder / f"1795282022179409653-{name}-{number}-{ending}.txt").write_text(text)


def test_the_figures_of_a_dump(tmp_path):
    write_dump(tmp_path, "pool_norm.1")
    write_dump(tmp_path, "pool_norm.10", SCHEDULE.replace("278", "1"))  # another kernel
    write_dump(tmp_path, "fusion-pool_norm.1", SCHEDULE.replace("278", "2"))
    write_dump(tmp_path, "pool_norm_1", SCHEDULE.replace("278", "3"))
    assert static_tpu.read_dump(tmp_path, "pool_norm.1", tile_rows=256) == {
        "vmem": 0x9000 + 0xC0000,
        "bundles": 278,
        "tiles": 2.0,
        "matrix_share": 0.5,
        "spills": 3,
        "loops": (10, 20),
    }


class Unreadable:
    """A compiled program with operations that this jaxlib cannot print."""

    def as_text(self):
        raise jax.errors.JaxRuntimeError("INTERNAL: async-update instruction should have 1 operands but sees 3")


def test_a_program_that_cannot_be_printed_has_a_kernel_but_no_traffic():
    variant = Variant("pool_norm max, stride 2", lambda device: None, 256)
    assert static_tpu.kernel_name(Unreadable(), variant) == "pool_norm.1"
    assert static_tpu.moved(Unreadable()) == 0


def test_the_least_traffic_of_a_small_model():
    config = dataclasses.replace(
        preset("gemma-2b"),
        layer_types=("full", "full"),
        hidden_size=10,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        intermediate_size=7,
    )
    weights = 2 * (10 + 16 * 10 + 10 * 8 + 10 + 14 * 10 + 10 * 7)
    activations = 2 * 10 + 2 * 16 + 8 + 14  # residual stream, q, k and v before and after RoPE, attention, gate and up
    for funnel, rows in ((FunnelConfig(), 100 + 100), (FunnelConfig.after(1), 100 + 50)):
        assert static_tpu.least_traffic(config, funnel, 100) == 2 * weights + 2 * 2 * rows * activations


# ----------------------------------------------------------------------------------------------------- variants


def test_every_preset_is_covered_and_nothing_twice():
    names = [variant.name for part in static_tpu.PARTS.values() for op in part for variant in op()]
    assert len(set(names)) == len(names)
    for name in PRESETS:
        assert f"pool_norm max, stride 2, width {preset(name).hidden_size}" in names
        assert f"recover_norm mean, after_norm, stride 4, width {preset(name).hidden_size}" in names
    for kernel, anchors in static_tpu.COMPARED.items():
        assert {kernel, *anchors} <= set(names)


def test_the_anchors_do_the_work_that_they_stand_for():
    plain = Target("tpu", "tpu", "TPU v5 lite", interpret=True)
    x, y, weight = (
        jnp.asarray(normal(seed, *shape), jnp.bfloat16) for seed, shape in enumerate(((512, 128), (512, 128), (128,)))
    )
    exact, other, factor = (np.asarray(array, np.float64) for array in (x, y, weight))
    rounding = {"rtol": 2**-8, "atol": 1e-6}
    np.testing.assert_allclose(
        static_tpu.pool_alone(x, target=plain).astype(float), (exact[::2] + exact[1::2]) / 2, **rounding
    )
    np.testing.assert_array_equal(static_tpu.tile_alone(x, target=plain).astype(float), exact.repeat(2, axis=0))
    for operands, total in (((x,), exact), ((x, y), exact + other)):
        expected = total / np.sqrt((total**2).mean(1, keepdims=True) + static_tpu.EPS) * (1 + factor)
        normed = static_tpu.norm_alone(weight, *operands, rows=128, target=plain)
        np.testing.assert_allclose(normed.astype(float), expected, **rounding)


# -------------------------------------------------------------------------------------------- real compilation


PATHS = os.pathsep.join(filter(None, (str(Path(sys.prefix) / "lowering"), os.environ.get("PYTHONPATH"))))


def run_python(*arguments):
    """Runs Python where libtpu can be found: `make test` puts it into a folder beside the packages."""
    environment = os.environ | static_tpu.ENVIRONMENT | {"PYTHONPATH": PATHS}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_kernel_of_each_op_compiles(tmp_path):
    file = tmp_path / "static.json"
    expected = {  # at least as many bundles, and whether they use the matrix unit
        "attention anchor": (3000, True),
        "pool_norm max, stride 2, width 768": (300, False),
        "recover_norm max, after_norm, stride 2, width 768": (300, False),
    }
    only = [each for name in expected for each in ("--only", name)]
    done = run_python("-m", "funnel_benchmarks.static_tpu", *only, "--generation", "v5e", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(file.read_text())
    assert written["problems"] == []
    for (variant, figures), (name, (least_bundles, uses_matrix_unit)) in zip(
        written["rows"], expected.items(), strict=True
    ):
        assert variant.startswith(name)
        result = Compiled(variant, "v5e", **dict(zip(written["columns"], figures["v5e"], strict=True)))
        assert least_bundles < result.bundles < 10_000
        assert 2**20 < result.vmem < 16 * 2**20
        assert (result.matrix_share > 0) == uses_matrix_unit


# --------------------------------------------------------------------------------------------------- error paths


def test_what_does_not_compile_is_a_problem(tmp_path):
    def refuse(device):
        raise ValueError("no such shape\nand more")

    result = static_tpu.compile_one(Variant("pool_norm x", refuse, 256), "v4", None, tmp_path)
    assert result == Compiled("pool_norm x", "v4", problem="does not compile: no such shape")


@pytest.fixture
def fake_compiler(tmp_path, monkeypatch):
    """Replaces the process that compiles by a script, which finds out where to start in its arguments."""

    def install(script):
        file = tmp_path / "python"
        file.write_text(
            f"#!{sys.executable}\nimport json, re, sys\nstart = int(re.search(r', (\\d+), ', sys.argv[2])[1])\n{script}"
        )
        file.chmod(0o755)
        monkeypatch.setattr(static_tpu.sys, "executable", str(file))

    return install


def test_a_variant_that_ends_the_compiler_does_not_end_the_others(fake_compiler):
    fake_compiler("""
print(json.dumps(["a", "b", "c"]))
for name in ["a", "b", "c"][start:]:
    if name == "b":
        sys.exit("details\\ncheck failed")
    print(json.dumps({"variant": name, "generation": "v4", "bundles": 7}))
""")
    assert list(static_tpu.compile_for("v4", "kernels", "")) == [
        Compiled("a", "v4", bundles=7),
        Compiled("b", "v4", problem="ends the compiler, status 1: check failed"),
        Compiled("c", "v4", bundles=7),
    ]


def test_a_compiler_that_does_not_start_is_an_error(fake_compiler):
    fake_compiler("sys.exit('no such topology')")
    with pytest.raises(click.ClickException, match="cannot compile for v6e: no such topology"):
        list(static_tpu.compile_for("v6e", "kernels", ""))


def test_without_libtpu_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(static_tpu.importlib.util, "find_spec", lambda name: None)
    done = CliRunner().invoke(static_tpu.main, [])
    assert done.exit_code == 1
    assert done.output.splitlines() == [f"Error: {static_tpu.INSTALL}"]


def test_a_file_of_another_kind_is_refused():
    done = CliRunner().invoke(static_tpu.main, ["--json", "figures.txt"])
    assert isinstance(done.exception, InputError)


def results(problem):
    bundles = {"pool_norm max, stride 2, width 768": 900, "pool_norm anchor: pooling, width 768": 400}
    yield from (Compiled(name, "v5e", bundles=count, tiles=2.0) for name, count in bundles.items())
    yield Compiled("pool_norm anchor: norm, width 768", "v5e", bundles=350, tiles=1.0)
    if problem:
        yield Compiled("pool_norm mean, stride 2, width 768", "v5e", problem=problem)


@pytest.mark.parametrize(("problem", "status"), [("", 0), ("does not compile: why", 1)])
def test_the_summary_and_the_exit_status(monkeypatch, problem, status):
    monkeypatch.setattr(static_tpu.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(
        static_tpu, "compile_for", lambda generation, part, only: results(problem) if part == "kernels" else ()
    )
    monkeypatch.setenv("COLUMNS", "160")
    done = CliRunner().invoke(static_tpu.main, ["--generation", "v5e"])
    assert done.exit_code == status
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.output.splitlines() if "│" in line]
    assert ["pool_norm max, stride 2, width 768", "v5e", "450", "550", "0.82"] in cells
    assert (f"v5e: pool_norm mean, stride 2, width 768: {problem}" in done.output.splitlines()) == bool(problem)


# ----------------------------------------------------------------------------------------------- every generation

COMPILE = """
import sys, numpy as np
from jax.experimental import topologies
from funnel_benchmarks import static_tpu
from funnel_engine import preset
generation, *names = sys.argv[1:]
device = topologies.get_topology_desc(platform="tpu", topology_name=static_tpu.TOPOLOGIES[generation]).devices[0]
configs = [preset(name) for name in names]
heads = {
    f"attention {c.num_heads}/{c.num_kv_heads} heads of {c.head_dim}, "
    f"scale {c.query_scale:.4g}, softcap {c.softcap or 0:g}"
    for c in configs
}
widths = {f"width {c.hidden_size}" for c in configs}
for variant in (v for op in static_tpu.PARTS["kernels"] for v in op() if "anchor" not in v.name):
    if variant.name.startswith(tuple(heads)) or (", stride 2, " in variant.name and variant.name.endswith(tuple(widths))
        and variant.name.startswith(("pool_norm max", "recover_norm mean, before_norm"))):
        program = variant.lower(device).compile().as_text()
        entry = program[program.index("ENTRY"):]
        print(variant.name, "|", entry.count("tpu_custom_call"), "|", entry)
"""


PRESETS_HERE = ("gemma-2b", "gemma2-2b", "gemma3-1b", "embeddinggemma-300m")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("generation", "presets"),
    [
        ("v5e", PRESETS_HERE),
        # By default each memory and number of cores: v6e has those of v5e, v5p shares each with another.
        *((generation, ("gemma2-2b", "embeddinggemma-300m")) for generation in ("v4", "v7x")),
        *(pytest.param(each, PRESETS_HERE, marks=pytest.mark.grid) for each in static_tpu.TOPOLOGIES if each != "v5e"),
    ],
)
def test_the_kernels_of_common_models_compile_and_nothing_is_moved_around_them(generation, presets):
    done = run_python("-c", COMPILE, generation, *presets)
    assert done.returncode == 0, done.stderr
    text = done.stdout
    assert len(set(re.findall(r"^attention .*?\|", text, re.MULTILINE))) == len(presets)
    widths = {preset(name).hidden_size for name in presets}
    assert len(re.findall(r"^(?:pool|recover)_norm .*?\| 1 \|", text, re.MULTILINE)) == 2 * len(widths)
    # No copy, transpose or reshape of an array of all rows; those of bounds and visits have one column.
    moved = re.findall(r"= \w+\[(?:8192|65536|32768),\d{2,}\]\S* (?:copy|transpose|reshape|fusion)\(", text)
    assert moved == []
    # Long arrays go into the kernels as they are: x and the results of pooling; short, full and the result of recovery.
    used = [
        re.findall(r" = \(?bf16\[(?:65536|32768),768\].*? ([a-z-]+)\(", re.split(r"^}", program, flags=re.MULTILINE)[0])
        for program in re.split(r"^ENTRY|\| ENTRY", text, flags=re.MULTILINE)
    ]
    assert [each for each in used if each] == [["parameter", "custom-call"], ["parameter", "parameter", "custom-call"]]
