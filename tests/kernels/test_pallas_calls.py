"""Where Pallas's kernels run, and what is said where they do not."""

import types

import jax
import jax.numpy as jnp
import pytest

from funnel_kernels import BackendUnavailable, attention, dispatch, native_calls, pallas_calls, triton_calls
from funnel_kernels.attention import IMPLEMENTATIONS


@pytest.fixture(autouse=True)
def nothing_remembered():
    pallas_calls.generation.cache_clear()
    triton_calls.capability.cache_clear()
    native_calls.check_runs.cache_clear()
    yield
    pallas_calls.generation.cache_clear()
    triton_calls.capability.cache_clear()
    native_calls.check_runs.cache_clear()


def device(monkeypatch, platform, kind):
    fake = types.SimpleNamespace(platform=platform, device_kind=kind, compute_capability="7.5")
    monkeypatch.setattr(jax, "devices", lambda: [fake])


@pytest.mark.parametrize(
    ("kind", "name", "mebibytes"),
    [("TPU v4", "v4", 16), ("TPU v5 lite", "v5e", 128), ("TPU v5", "v5p", 64), ("TPU v6 lite", "v6e", 128),
     ("TPU7x", "v7x", 64)],
)  # fmt: skip
def test_generations_by_the_names_that_jax_gives_them(monkeypatch, kind, name, mebibytes):
    device(monkeypatch, "tpu", kind)
    assert pallas_calls.generation().name == name
    assert pallas_calls.generation().vmem == mebibytes * 2**20


@pytest.mark.parametrize(
    ("platform", "kind", "taken", "reason"),
    [
        ("cpu", "cpu", "cpu", r"JAX runs on cpu; on a machine with a TPU, install jax\[tpu\]"),
        ("gpu", "NVIDIA H200", "xla", "JAX runs on gpu"),
        (
            "tpu",
            "TPU v3",
            "xla",
            "TPU v3 is a TPU that the kernels were never compiled for; known: v4, v5e, v5p, v6e, v7x",
        ),
    ],
)
def test_a_device_without_kernels_is_named_and_auto_goes_on(monkeypatch, platform, kind, taken, reason):
    device(monkeypatch, platform, kind)
    with pytest.raises(NotImplementedError, match=reason):
        pallas_calls.generation()
    x, bounds = jnp.ones((4, 128)), jnp.zeros(4, jnp.int32)
    options = {"heads": 1, "kv_heads": 1, "scale": 1.0, "softcap": None}
    name, refusals = dispatch.explain(IMPLEMENTATIONS, "auto", x, x, x, bounds, bounds, **options)
    assert name == taken
    assert refusals["tpu"].startswith(f"JAX runs on {platform}" if platform != "tpu" else kind)
    with pytest.raises(BackendUnavailable, match=reason):
        attention(x, x, x, bounds, bounds, heads=1, kv_heads=1, scale=1.0, backend="tpu")
