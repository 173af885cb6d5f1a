"""Tables of measured block sizes: found by device, op, width and dtype, and used by the kernels."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from funnel_kernels import Target, attention, pool_norm, recover_norm, triton_calls, tuning

TABLE = {
    "entries": [
        {
            "op": "attention",
            "width": 32,
            "dtype": "float32",
            "sizes": {"block_q": 16, "block_k": 64, "warps": 2, "stages": 1},
        },
        {"op": "pool_norm", "width": 64, "dtype": "float32", "sizes": {"block_rows": 4, "warps": 1}},
        {"op": "recover_norm", "width": 64, "dtype": "float32", "sizes": {"block_rows": 2, "warps": 8}},
    ]
}


@pytest.fixture
def table(monkeypatch, tmp_path):
    """A table for a device that is not here, and its target."""
    monkeypatch.setattr(tuning, "TUNED", tmp_path)
    (tmp_path / "nvidia-h200-nvl.json").write_text(json.dumps(TABLE))
    tuning.read_table.cache_clear()
    yield Target("triton", "gpu", "NVIDIA H200 (NVL)", "9.0", interpret=True)
    tuning.read_table.cache_clear()


@pytest.fixture
def launches(monkeypatch):
    """The options of every Triton kernel that is launched, by the kernel's name."""
    seen = {}
    run = triton_calls.call

    def call(kernel, *arrays, **options):
        seen[kernel.fn.__name__] = options
        return run(kernel, *arrays, **options)

    monkeypatch.setattr(triton_calls, "call", call)
    return seen


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("NVIDIA A100-SXM4", "nvidia-a100-sxm4"),
        ("TPU v5 lite", "tpu-v5-lite"),
    ],
)
def test_a_table_is_named_after_its_device(device, name):
    assert tuning.table_file(device) == tuning.TUNED / f"{name}.json"


def test_an_entry_is_found_by_all_of_its_key(table):
    assert tuning.find(tuning.Key("pool_norm", 64, "float32"), table.kind) == {"block_rows": 4, "warps": 1}
    for other in (("recover", 64, "float32"), ("pool_norm", 128, "float32"), ("pool_norm", 64, "bfloat16")):
        assert tuning.find(tuning.Key(*other), table.kind) is None


def test_kernels_take_the_sizes_of_the_table(table, launches):
    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.standard_normal((12, 48)), jnp.float32)
    weight = jnp.asarray(generator.standard_normal(48), jnp.float32)
    lo, hi = jnp.zeros(12, jnp.int32), jnp.full(12, 12, jnp.int32)
    heads = {"heads": 2, "kv_heads": 2, "scale": 0.2}  # of 24, which is padded to 32
    for target in (table, Target("reference")):
        results = (
            attention(x, x, x, lo, hi, target=target, **heads),
            *pool_norm(x, lo == 0, weight, stride=2, pool="mean", eps=1e-6, target=target),
            recover_norm(x, None, weight, stride=3, mode="tile", eps=1e-6, target=target),
        )
        if target is table:
            ours = results
    for result, expected in zip(ours, results, strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
    expected = {"block_q": 16, "block_k": 64, "num_warps": 2, "num_stages": 1}
    assert expected.items() <= launches["attention_kernel"].items()
    assert {"block_windows": 4, "num_warps": 1}.items() <= launches["pool_norm_kernel"].items()
    assert {"block_rows": 2, "num_warps": 8}.items() <= launches["recover_norm_kernel"].items()


def test_without_an_entry_the_rule_decides(table, launches):
    x = jnp.asarray(np.random.default_rng(1).standard_normal((8, 100)), jnp.float32)
    pool_norm(x, jnp.ones(8, bool), x[0], stride=2, pool="max", eps=1e-6, target=table)
    rule = triton_calls.row_rule(128)
    assert {"block_windows": rule.block_rows, "num_warps": rule.warps}.items() <= launches["pool_norm_kernel"].items()
