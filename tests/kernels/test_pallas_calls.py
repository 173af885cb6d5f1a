"""Where Pallas's kernels run, and what is said where they do not."""

import dataclasses

import jax.numpy as jnp
import pytest

from funnel_kernels import BackendUnavailable, Record, Target, attention, pallas_calls
from funnel_kernels.target import Served, Unsupported


@pytest.mark.parametrize(
    ("kind", "name", "mebibytes"),
    [
        ("TPU v4", "v4", 16),
        ("TPU v5 lite", "v5e", 128),
        ("TPU v5", "v5p", 64),
        ("TPU v6 lite", "v6e", 128),
        ("TPU7x", "v7x", 64),
    ],
)
def test_generations_by_the_names_that_jax_gives_them(kind, name, mebibytes):
    generation = pallas_calls.generation(Target("tpu", "tpu", kind))
    assert generation.name == name
    assert generation.vmem == mebibytes * 2**20


@pytest.mark.parametrize(
    ("platform", "kind", "taken", "reason"),
    [
        ("cpu", "cpu", "cpu", r"JAX runs on cpu; on a machine with a TPU, install jax\[tpu\]"),
        ("gpu", "NVIDIA H200", "xla", "JAX runs on gpu"),
        (
            "tpu",
            "TPU v3",
            "xla",
            "TPU v3 is not supported by the kernels; they support TPUs v4, v5e, v5p, v6e, v7x",
        ),
    ],
)
def test_a_device_without_kernels_is_named_and_auto_goes_on(platform, kind, taken, reason):
    target = Target("tpu", platform, kind, "7.5", record=Record())
    with pytest.raises(Unsupported, match=reason):
        pallas_calls.generation(target)
    x, bounds = jnp.ones((4, 128)), jnp.zeros(4, jnp.int32)
    with pytest.raises(BackendUnavailable, match=reason):
        attention(x, x, x, bounds, bounds, heads=1, kv_heads=1, scale=1.0, target=target)
    auto = dataclasses.replace(target, backend="auto")
    attention(x, x, x, bounds, bounds, heads=1, kv_heads=1, scale=1.0, target=auto)
    assert target.record.served["attention"] == (Served(taken),)
    assert target.record.unavailable["tpu"].startswith(f"JAX runs on {platform}" if platform != "tpu" else kind)
