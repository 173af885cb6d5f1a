"""The memory estimate, and that it is asked before anything is allocated."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest

from funnel_benchmarks import memory
from funnel_engine import FunnelConfig, HeadConfig
from funnel_engine.model import forward
from funnel_engine.packing import make_plan, pack
from funnel_engine.presets import preset
from funnel_engine.weights import ACTIVATIONS, expected_shapes, nest, tensor_types
from funnel_kernels import InputError, Target

CONFIG = dataclasses.replace(
    preset("gemma-2b"),
    vocab_size=50,
    hidden_size=96,
    intermediate_size=640,
    num_heads=6,
    head_dim=32,
    layer_types=("full",) * 2,
    attention="bidirectional",
)


def compiled_bytes(rows: int, dtype: str) -> int:
    """What the compiler reserves for temporaries of one forward pass."""
    plan, funnel = make_plan(CONFIG, FunnelConfig()), FunnelConfig()
    params = nest(tensor_types(expected_shapes(CONFIG, HeadConfig()), dtype), CONFIG, funnel)
    batch = pack(plan, np.zeros(rows, np.int32), np.array([0, rows // 2, rows], np.int32), rows)
    run = jax.jit(partial(forward, config=CONFIG, funnel=funnel, dtype=dtype, target=Target()))
    return run.lower(params, batch).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("dtype", ACTIVATIONS)
@pytest.mark.parametrize("rows", [1024, 4096])
def test_the_estimate_is_above_what_the_compiler_reserves_but_not_by_much(rows, dtype):
    compiled, estimate = compiled_bytes(rows, dtype), memory.activation_bytes(CONFIG, rows)
    assert compiled <= estimate <= 5 * compiled


def test_weight_bytes_of_a_preset():
    head = HeadConfig()
    norms = 37 * 2048  # float32
    assert memory.weight_bytes(preset("gemma-2b"), head, "bfloat16") == 2 * 2_506_172_416 + 2 * norms
    assert memory.weight_bytes(preset("gemma-2b"), head, "float32") == 4 * 2_506_172_416
    rows = 256_000 + 18 * (2560 + 2048 + 32_768 + 2048)  # of matrices, each with a float32 scale
    assert memory.weight_bytes(preset("gemma-2b"), head, "int8") == 2_506_172_416 + 4 * rows + 3 * norms


def test_what_does_not_fit_is_refused_with_both_figures(monkeypatch):
    needed = memory.weight_bytes(CONFIG, HeadConfig(), "float32") + memory.activation_bytes(CONFIG, 512)
    monkeypatch.setattr(memory, "available_bytes", lambda: needed)
    memory.check_memory(CONFIG, HeadConfig(), "float32", 512)
    monkeypatch.setattr(memory, "available_bytes", lambda: needed - 1)
    with pytest.raises(InputError, match=rf"{needed / 1e9:.1f} GB .* 0\.0 GB are available; take a smaller batch"):
        memory.check_memory(CONFIG, HeadConfig(), "float32", 512)


def test_free_memory_of_the_machine(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       64 kB\nMemFree:        3 kB\nMemAvailable:   42 kB\n")
    assert memory.available_host_bytes(meminfo) == 42 * 1024
    everything = memory.available_host_bytes(tmp_path / "missing")
    assert 0 < memory.available_bytes() <= everything
