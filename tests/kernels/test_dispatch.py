"""Which implementation serves an op: taken, refused with a reason, never replaced in silence."""

import jax.numpy as jnp
import pytest

from funnel_kernels import BackendUnavailable, FunnelError, attention, dispatch, errors, pool_norm, recover_norm
from funnel_kernels.attention import IMPLEMENTATIONS as ATTENTION
from funnel_kernels.pool import IMPLEMENTATIONS as POOL
from funnel_kernels.recover import IMPLEMENTATIONS as RECOVER


def refuse(*arrays, **options):
    raise NotImplementedError("odd widths are not supported")


def serve(*arrays, **options):
    return "xla", arrays, options


def test_a_named_backend_gets_the_arrays_and_options():
    table = {"xla": serve, "reference": refuse}
    assert dispatch.serve("op", table, "xla", 1, 2, mode="max") == ("xla", (1, 2), {"mode": "max"})


def test_auto_never_means_the_reference():
    assert "reference" not in dispatch.candidates("auto")
    assert dispatch.candidates("reference") == ("reference",)


def test_a_named_backend_that_refuses_is_not_replaced():
    with pytest.raises(BackendUnavailable, match="op is not served by backend 'reference': reference: odd widths"):
        dispatch.serve("op", {"xla": serve, "reference": refuse}, "reference")


def test_auto_takes_the_next_backend_after_a_refusal(monkeypatch):
    monkeypatch.setitem(dispatch.BACKENDS, "picky", "a backend that refuses")
    monkeypatch.setattr(dispatch, "AUTO", ("picky", "xla"))
    assert dispatch.serve("op", {"picky": refuse, "xla": serve}, "auto", 3) == ("xla", (3,), {})
    with pytest.raises(BackendUnavailable, match=r"picky: odd widths .*; xla: odd widths"):
        dispatch.serve("op", {"picky": refuse, "xla": refuse}, "auto")


def test_a_backend_without_an_implementation_of_an_op_is_a_refusal(monkeypatch):
    monkeypatch.setitem(dispatch.BACKENDS, "partial", "a backend that serves other ops")
    monkeypatch.setattr(dispatch, "AUTO", ("partial", "xla"))
    assert dispatch.serve("op", {"xla": serve}, "auto", 3) == ("xla", (3,), {})
    with pytest.raises(BackendUnavailable, match="op is not served by backend 'partial': partial: "):
        dispatch.serve("op", {"xla": serve}, "partial")


def test_an_error_inside_an_implementation_is_not_a_refusal():
    def fail():
        raise ValueError("a real mistake")

    with pytest.raises(ValueError, match="a real mistake"):
        dispatch.serve("op", {"xla": fail}, "auto")


@pytest.mark.parametrize("backend", ["XLA", "cuda", "", "numpy"])
def test_a_backend_that_does_not_exist_is_refused_by_every_op(backend):
    rows, weight, bounds = jnp.ones((2, 4)), jnp.ones(4), jnp.zeros(2, jnp.int32)
    message = f"backend '{backend}' does not exist in this build; choose one of auto, triton, tpu, cpu, xla, reference"
    calls = [
        lambda: attention(rows, rows, rows, bounds, bounds, heads=2, kv_heads=2, scale=1.0, backend=backend),
        lambda: pool_norm(rows, bounds == 0, weight, stride=2, pool="max", eps=1e-6, backend=backend),
        lambda: recover_norm(rows, None, weight, stride=2, mode="tile", eps=1e-6, backend=backend),
    ]
    for call in calls:
        with pytest.raises(BackendUnavailable, match=message):
            call()


@pytest.mark.parametrize("table", [ATTENTION, POOL, RECOVER], ids=["attention", "pool_norm", "recover_norm"])
def test_the_portable_backends_serve_every_op_and_no_backend_is_unknown(table):
    assert {"xla", "reference"} <= set(table) <= set(dispatch.BACKENDS)


def test_every_error_of_the_project_is_a_funnel_error():
    names = ("ConfigError", "CheckpointError", "InputError", "BackendUnavailable")
    assert all(issubclass(getattr(errors, name), FunnelError) for name in names)
    assert not issubclass(FunnelError, ValueError)
