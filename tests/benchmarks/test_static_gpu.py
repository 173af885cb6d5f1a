"""`static_gpu`: real compilation for GPUs that are not here, in a process of its own without the interpreter."""

import json
import os
import subprocess
import sys

import pytest

from funnel_benchmarks import static_gpu
from funnel_engine import preset
from funnel_engine.presets import PRESETS

ONE_OF_EACH = (
    "attention 4/1 heads of 256, softcap 0, bfloat16",
    "pool_norm mean, stride 2, width 640, bfloat16",
    "recover_norm max, after_norm, stride 2, width 640, bfloat16",
)


def run(*arguments, before=""):
    code = f"from funnel_benchmarks import static_gpu\n{before}\nstatic_gpu.main({list(arguments)!r})"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)


def test_every_preset_is_covered_and_nothing_twice():
    variants = list(static_gpu.variants("sm_80"))
    names = [variant.name for variant in variants]
    assert len(set(names)) == len(names)
    for name in PRESETS:
        config = preset(name)
        heads = f"attention {config.num_heads}/{config.num_kv_heads} heads of {config.head_dim}, softcap "
        assert sum(found.startswith(heads) for found in names) >= 2  # both dtypes
        assert f"pool_norm max, stride 2, width {config.hidden_size}, bfloat16" in names
        assert f"recover_norm sum, after_norm, stride 4, width {config.hidden_size}, float32" in names


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_kernel_of_each_op_compiles_for_hopper(tmp_path, name):
    done = run("--only", name, "--target", "sm_90", "--json", str(tmp_path / "static.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads((tmp_path / "static.json").read_text())["kernels"]
    assert (result["variant"], result["target"], result["problem"], result["spilled"]) == (name, "sm_90", "", 0)
    assert 16 <= result["registers"] <= 255
    assert result["shared"] <= static_gpu.SHARED["sm_90"]


@pytest.mark.parametrize(
    ("target", "damage", "problem", "status"),
    [
        ("sm_90", "static_gpu.SHARED['sm_90'] = 1", "bytes of shared memory; sm_90 has 1", 1),
        ("sm_90", "static_gpu.EPS = 'none'", "does not compile", 1),
        ("sm_90", "static_gpu.USED['cuda'] = lambda *_: (255, 84)", "spills 84 bytes", 1),
        ("gfx942", "static_gpu.USED['hip'] = lambda *_: (255, 84)", "spills 84 bytes", 0),
    ],
)
def test_a_problem_is_named_and_fails_only_for_nvidia(target, damage, problem, status):
    done = run("--only", ONE_OF_EACH[1], "--target", target, before=damage)
    assert (done.returncode, done.stderr) == (status, "")
    start = f"{target}: {ONE_OF_EACH[1]}: "
    assert [problem in line for line in done.stdout.splitlines() if line.startswith(start)] == [True]
