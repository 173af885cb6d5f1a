"""`static_hopper`: what the compiler says is read right; and the compiler itself, where JAX can compile for CUDA."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner

from funnel_benchmarks import static_hopper
from funnel_benchmarks.static_hopper import Forward, Kernel, count_thunks, programs
from funnel_engine import preset
from funnel_engine.presets import PRESETS

compiles = pytest.mark.skipif(
    not importlib.util.find_spec("jax_cuda13_plugin"), reason="JAX's CUDA plugin is not installed, see `make mosaic`"
)
THUNKS = """
000: kCommandBuffer [source | sink]
    001: kCustomKernel   [source       | next=002 (1)] input_reduce_fusion grid: [32, 1, 1] threads: [256, 1, 1]
    002: kCublasLtMatmul [prev=001 (1) | next=003 (1)] kCublasLtMatmul
    003: kCustomCall     [prev=002 (1) | next=004 (1)] kCustomCall
    004: kKernel         [prev=003 (1) | sink] loop_convert_fusion grid: [32, 1, 1] threads: [256, 1, 1]
005: kCustomCall [source | sink] kCustomCall
"""


def invoke(*arguments):
    return CliRunner().invoke(static_hopper.main, arguments)


def test_launches_are_counted_in_and_outside_of_graphs():
    assert count_thunks(THUNKS) == (1, 1, 1, 2, 2)


def test_what_is_wrong_is_named():
    good = Forward(1, 0, 72, 18, 115, 345.0, 4.2, 6.5)
    assert static_hopper.problem(good) == ""
    assert static_hopper.problem(good._replace(loose=3)) == "is 1 CUDA graphs and 3 loose launches"
    assert static_hopper.problem(good._replace(graphs=4)) == "is 4 CUDA graphs and 0 loose launches"
    assert static_hopper.problem(Kernel(168, 198_656, 0)) == ""
    assert static_hopper.problem(Kernel(168, 198_656, 48)) == "spills 48 bytes"
    assert static_hopper.problem("no such layout") == "does not compile: no such layout"


def test_every_width_that_the_kernel_serves_is_compiled_for_every_preset():
    names = set(programs(sample=True))
    for name in PRESETS:
        config = preset(name)
        for kind in set(config.layer_types):
            heads, kv_heads, head_dim = config.heads(kind)
            if head_dim in (64, 128, 256):
                assert f"attention {heads}/{kv_heads} heads of {head_dim}, softcap {config.softcap or 0:g}" in names


def test_without_the_plugin_it_says_what_to_install(monkeypatch):
    def no_plugin(**options):
        raise RuntimeError("Unknown platform cuda")

    monkeypatch.setattr(static_hopper.topologies, "get_topology_desc", no_plugin)
    result = invoke("--gpu", "h100")
    assert result.exit_code == 2
    assert "Unknown platform cuda" in result.output
    assert "make mosaic" in re.sub(r"[\s│]+", " ", result.output)


def test_a_name_that_is_none_is_refused(monkeypatch):
    monkeypatch.setattr(static_hopper, "one_gpu", lambda name: None)
    result = invoke("--only", "product")
    assert result.exit_code == 2
    assert "no program has a name that begins so" in result.output


@compiles
def test_attention_and_a_forward_pass_compile(tmp_path):
    file = tmp_path / "static-hopper.json"
    attention, forward = "attention 8/1 heads of 256, softcap 0", "forward embeddinggemma-300m, funnel 2:2, 128 rows"
    # Where Triton's kernels are compiled, not interpreted as in other tests.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    options = ["--sample", "--only", attention, "--only", forward, "--gpu", "h100", "--json", str(file)]
    command = [sys.executable, "-m", "funnel_benchmarks.static_hopper", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())
    assert found["problems"] == []
    rows = dict(found["rows"])
    kernel, whole = Kernel(*rows[attention]["h100"]), Forward(*rows[forward]["h100"])
    assert kernel.spilled == 0 < kernel.registers <= 168
    assert 100_000 < kernel.shared < 232_448
    layers = preset("embeddinggemma-300m").num_layers
    assert (whole.graphs, whole.loose) == (1, 0)
    assert whole.products == 4 * layers
    assert whole.kernels == layers + 1  # attention, and pooling with its norm
