"""How a model and its weights are divided among devices; what several devices compute is in `eight_devices.py`."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from funnel_engine import ConfigError, FunnelConfig
from funnel_engine.sharding import abstract_forward, device_config, weight_splits
from tiny_models import CONFIG, make_engine


@pytest.mark.slow
def test_over_eight_devices():
    """JAX's CPU is told how many devices to simulate before it starts, so these tests run in a process of their own."""
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    cases = Path(__file__).with_name("eight_devices.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", str(cases)]
    run = subprocess.run(
        command, env=os.environ | {"XLA_FLAGS": flags}, cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


def sized(heads: int, kv_heads: int, intermediate: int = 24, hidden: int = 48):
    return dataclasses.replace(
        CONFIG, num_heads=heads, num_kv_heads=kv_heads, intermediate_size=intermediate, hidden_size=hidden
    )


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 4), (8, 2), (8, 1), (16, 2), (24, 8)])
def test_a_device_holds_its_query_heads_and_the_keys_that_they_read(heads, kv_heads, devices):
    config = sized(heads, kv_heads)
    d = config.head_dim
    rows = [
        (name, head, i)
        for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        for head in range(n)
        for i in range(d)
    ]
    labels = np.array([f"{name}{head}.{i}" for name, head, i in rows])
    table = weight_splits(config, devices)
    local = device_config(config, devices)
    for device in range(devices):
        held = [f"{name}{head}" for name, head in held_heads(heads, kv_heads, devices, device)]
        expected = np.array([f"{head}.{i}" for head in held for i in range(d)])
        np.testing.assert_array_equal(table["qkv"].part(labels[:, None], device)[:, 0], expected)
        queries = local.num_heads * d
        np.testing.assert_array_equal(table["q"].part(labels[: heads * d, None], device)[:, 0], expected[:queries])
        np.testing.assert_array_equal(table["kv"].part(labels[heads * d :, None], device)[:, 0], expected[queries:])
        columns = table["attention_output"].part(labels[None, : heads * d], device)[0]
        np.testing.assert_array_equal(columns, expected[:queries])
        assert len(expected) == (local.num_heads + 2 * local.num_kv_heads) * d


def held_heads(heads, kv_heads, devices, device):
    """Row by row: the query heads of a device, then the key heads that these read, then the value heads."""
    queries = [head for head in range(heads) if head * devices // heads == device]
    read = sorted({head // (heads // kv_heads) for head in queries})
    return [("q", head) for head in queries] + [("k", head) for head in read] + [("v", head) for head in read]


@pytest.mark.parametrize("devices", [2, 3, 4])
def test_a_device_holds_the_same_part_of_gate_up_and_down(devices):
    config = sized(12, 12)
    table, size, width = weight_splits(config, devices), 24 // devices, 48 // devices
    gate_up = np.arange(2 * 24)[:, None]
    for device in range(devices):
        gate = np.arange(device * size, (device + 1) * size)
        np.testing.assert_array_equal(table["gate_up"].part(gate_up, device)[:, 0], np.concatenate([gate, 24 + gate]))
        np.testing.assert_array_equal(table["down"].part(np.arange(24)[None], device)[0], gate)
        columns = table["embedding"].part(np.arange(48)[None], device)[0]
        np.testing.assert_array_equal(columns, np.arange(device * width, (device + 1) * width))
    assert device_config(config, devices).intermediate_size == size
    assert device_config(config, devices).hidden_size == 48  # the residual stream is whole everywhere


@pytest.mark.parametrize(
    ("config", "devices", "said"),
    [
        (sized(6, 1), 4, "4 devices along 'model', which does not divide num_heads=6; use a number that does"),
        (sized(8, 1, intermediate=30), 4, "which does not divide intermediate_size=30; use"),
        (sized(8, 1, hidden=42), 4, "which does not divide hidden_size=42; use"),
        (sized(12, 4), 6, "6 devices along 'model', which must divide num_kv_heads=4 or be a multiple of it; use"),
    ],
)
def test_a_number_of_devices_that_does_not_divide_the_model(config, devices, said):
    with pytest.raises(ConfigError) as caught:
        device_config(config, devices)
    assert said in str(caught.value)
    assert "put the other devices along 'data'" in str(caught.value)


def test_what_is_no_mesh_of_ours():
    one = np.array(jax.devices()[:1])
    with pytest.raises(ConfigError, match=r"mesh=8 must be a jax.sharding.Mesh, e.g. jax.make_mesh\(\(2, 4\)"):
        make_engine(mesh=8)
    with pytest.raises(ConfigError, match="mesh axis 'batch' is unknown; name the axes of a mesh 'data' or 'model'"):
        make_engine(mesh=Mesh(one.reshape(1, 1), ("batch", "model")))
    with pytest.raises(ConfigError, match="dtype 'float16' is refused"):
        abstract_forward(Mesh(one, ("data",)), CONFIG, FunnelConfig(), rows=16, dtype="float16")
