"""`static_gpu`: real compilation for GPUs that are not here, in processes of their own without the interpreter."""

import collections
import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from funnel_benchmarks import static_gpu
from funnel_benchmarks.static_gpu import Compiled
from funnel_engine import preset
from funnel_engine.presets import PRESETS

ATTENTION = "attention 4/1 heads of 256, softcap 0, bfloat16"
POOLING = "pool_norm mean, stride 2, width 640, bfloat16"
# What real compilers say: a kernel for Hopper and for AMD, one that spills, and one that does not compile.
COMPILE = f"""
import json
crowded = next(it for it in static_gpu.variants("sm_80") if it.name == "pool_norm max, stride 2, width 5376, float32")
hopper = next(it for it in static_gpu.variants("sm_90") if it.name == {ATTENTION!r})
pooling = next(it for it in static_gpu.variants("sm_90") if it.name == {POOLING!r})
work = {{
    "hopper": ("sm_90", hopper),
    "amd": ("gfx942", pooling),
    "crowded": ("sm_80", crowded._replace(options=crowded.options | {{"num_warps": 1}})),
    "broken": ("sm_90", pooling._replace(options=pooling.options | {{"eps": "none"}})),
}}
print(json.dumps({{name: static_gpu.compile_for(*each) for name, each in work.items()}}))
"""


def python(code):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", f"from funnel_benchmarks import static_gpu\n{code}"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def compiled():
    done = python(COMPILE)
    assert done.returncode == 0, done.stderr
    return {name: Compiled(*fields) for name, fields in json.loads(done.stdout).items()}


@pytest.fixture
def invoke(monkeypatch):
    """Calls the command here, with what compiles taken from a table: name and target -> result."""
    monkeypatch.setattr(static_gpu.triton.knobs.runtime, "interpret", False)

    def call(*arguments, found=None):
        monkeypatch.setattr(static_gpu, "compile_all", lambda work, jobs: found)
        return CliRunner().invoke(static_gpu.main, arguments)

    return call


# What is compiled.


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("target", static_gpu.SHARED)
def test_nothing_is_compiled_twice(target, sample):
    variants = list(static_gpu.variants(target, sample))
    assert len({variant.name for variant in variants}) == len(variants)
    programs = {(it.op, tuple(it.pointers.items()), tuple(sorted(it.options.items()))) for it in variants}
    assert len(programs) == len(variants)


def test_every_preset_is_covered():
    names = {variant.name for variant in static_gpu.variants("sm_80")}
    for name in PRESETS:
        config = preset(name)
        heads = f"attention {config.num_heads}/{config.num_kv_heads} heads of {config.head_dim}"
        softcap, width = config.softcap or 0, config.hidden_size
        for dtype in ("bfloat16", "float32"):
            assert f"{heads}, softcap {softcap:g}, {dtype}" in names
            for mode in ("max", "mean", "first"):
                assert f"pool_norm {mode}, stride 2, width {width}, {dtype}" in names
            assert f"recover_norm tile, before_norm, stride 2, width {width}, {dtype}" in names
            for mode in ("sum", "mean", "max"):
                for site in ("before_norm", "after_norm"):
                    assert f"recover_norm {mode}, {site}, stride 2, width {width}, {dtype}" in names
        assert any(f"stride 4, width {width}, " in found for found in names)
    for option in ("pool_norm first", "recover_norm max, after_norm"):
        assert any(found.startswith(f"{option}, stride 4, ") for found in names)


def test_a_sample_has_every_width_option_and_shape_of_attention():
    everything, sample = (list(static_gpu.variants("sm_90", sample)) for sample in (False, True))
    assert len(sample) < len(everything) / 4
    for op in ("pool_norm", "recover_norm"):
        seen = [collections.Counter(), collections.Counter()]
        for counter, variants in zip(seen, (everything, sample), strict=True):
            for it in (variant for variant in variants if variant.op == op):
                before, _, after = it.details.partition("width ")
                counter.update([after.split(",")[0], (before, after.partition(",")[2])])
        assert set(seen[0]) == set(seen[1])
    shapes = [
        {
            tuple(it.options[name] for name in ("group", "head_dim", "softcap", "precision"))
            for it in variants
            if it.op == "attention"
        }
        for variants in (everything, sample)
    ]
    assert shapes[0] == shapes[1]


def test_a_running_mean_is_read_as_float32_whatever_the_model_is():
    (variant,) = (
        it
        for it in static_gpu.variants("sm_90")
        if it.name == "recover_norm sum, before_norm, stride 2, width 640, bfloat16 with float32"
    )
    assert variant.pointers == {"short_ptr": "*bf16", "full_ptr": "*fp32", "weight_ptr": "*bf16", "out_ptr": "*bf16"}


# What the compilers say.


def test_a_kernel_compiles_for_hopper_and_its_needs_are_known(compiled):
    hopper = compiled["hopper"]
    assert 16 <= hopper.registers <= 255
    assert 0 < hopper.shared <= static_gpu.SHARED["sm_90"]
    assert static_gpu.problem("sm_90", hopper) == ""


# By default each op with all of its options, and one shape of attention for each head dim.
DEFAULT = ["pool_norm", "recover_norm"]
DEFAULT += [
    f"attention {heads}" for heads in ("32/32 heads of 64", "32/16 heads of 128, softcap 50", "4/4 heads of 256")
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "only"),
    [
        ("sm_90", DEFAULT),
        *(pytest.param(target, [], marks=pytest.mark.grid) for target in ("sm_80", "sm_90", "sm_100")),
    ],
)
def test_a_sample_of_all_kernels_compiles_without_spills(target, only, tmp_path):
    file = tmp_path / "static.json"
    arguments = ["--sample", f"--target={target}", "--json", str(file), "--jobs", "2"]
    done = python(f"static_gpu.main({[*arguments, *(each for name in only for each in ('--only', name))]!r})")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    rows = [line.replace("│", "").split() for line in done.stdout.splitlines() if "sm_" in line]
    assert [(row[0], row[-1]) for row in rows] == [("attention", "0"), ("pool_norm", "0"), ("recover_norm", "0")]
    written = json.loads(file.read_text())
    assert (written["problems"], written["triton"]) == ([], static_gpu.triton.__version__)
    assert written["columns"] == ["registers", "shared", "spilled"]
    expected = [it.name for it in static_gpu.variants(target, True) if it.name.startswith(tuple(only) or "")]
    assert [name for name, _ in written["rows"]] == expected
    assert all(set(targets) == {target} for _, targets in written["rows"])


def test_8192_numbers_in_the_registers_of_one_warp_spill(compiled):
    assert compiled["crowded"].spilled >= 100
    assert static_gpu.problem("sm_80", compiled["crowded"]).startswith("spills ")


def test_registers_and_spills_on_amd_stand_in_the_assembly():
    metadata = "    .vgpr_count:     128\n    .vgpr_spill_count: 3\n"
    assert static_gpu.used_on_amd(f"  .sgpr_spill_count: 9\n{metadata}", "gfx942") == (128, 12)


def test_a_kernel_compiles_for_amd(compiled):
    assert compiled["amd"].registers > 0
    assert static_gpu.problem("gfx942", compiled["amd"]) == ""


def test_what_does_not_compile_is_named(compiled):
    assert static_gpu.problem("sm_90", compiled["broken"]).startswith("does not compile: ")


def test_a_program_that_ptxas_refuses_is_an_error():
    with pytest.raises(ValueError, match="ptxas"):
        static_gpu.used_on_nvidia(".version 8.0\n.target sm_90a\n.address_size 64\nnonsense", "sm_90")


@pytest.mark.parametrize(
    ("compiled", "problem"),
    [
        (Compiled(255, 232_448, 0), ""),
        (Compiled(255, 232_449, 0), "needs 232,449 bytes of shared memory; sm_90 has 232,448"),
        (Compiled(255, 1024, 84), "spills 84 bytes"),
        (Compiled(0, 0, 0, "does not compile: no"), "does not compile: no"),
    ],
)
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_problem_is_named_and_fails_only_for_nvidia(invoke, tmp_path, target, compiled, problem):
    if target == "gfx942":
        compiled = compiled._replace(shared=compiled.shared - 232_448 + 65_536 if compiled.shared > 2**16 else 64)
        problem = problem.replace("232,449", "65,537").replace("232,448", "65,536").replace("sm_90", "gfx942")
    file = tmp_path / "static.json"
    done = invoke("--json", str(file), found={(ATTENTION, "sm_80"): Compiled(9, 9, 0), ("pool_norm", target): compiled})
    assert done.exit_code == (1 if problem and target == "sm_90" else 0)
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith(target)] == (
        [f"{target}: pool_norm: {problem}"] if problem else []
    )
    written = json.loads(file.read_text())
    assert written["problems"] == ([["pool_norm", target, problem]] if problem else [])
    assert written["rows"] == [[ATTENTION, {"sm_80": [9, 9, 0]}], ["pool_norm", {target: list(compiled[:3])}]]


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--only", "sort"],
            "--only 'sort': no kernel has a name that begins so; they begin with attention or pool_norm or",
        ),
        (["--json", "results.csv"], "'results.csv' must end in .json"),
        (["--json", "no/such/folder.json"], "is not a directory; make it first"),
        (["--jobs", "0"], "0 is not in the range x>=1"),
        (["--target", "sm_70"], "'sm_70' is not one of 'sm_80'"),
    ],
)
def test_mistakes_are_named_and_end_with_status_2(invoke, arguments, message):
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr


def test_the_interpreter_is_refused(invoke, monkeypatch):
    monkeypatch.setattr(static_gpu.triton.knobs.runtime, "interpret", True)
    done = invoke()
    assert done.exit_code == 2
    assert "TRITON_INTERPRET=1 replaces Triton's compiler, which is wanted here; unset it" in done.stderr
