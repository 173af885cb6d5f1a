"""Which implementation serves an op: taken, refused with a reason, never replaced in silence; and what is recorded."""

import dataclasses
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from funnel_kernels import (
    BACKENDS,
    BackendUnavailable,
    FunnelError,
    Record,
    Target,
    add_norm,
    attention,
    errors,
    pool_norm,
    recover_norm,
)
from funnel_kernels import op as op_module
from funnel_kernels.add_norm import ADD_NORM
from funnel_kernels.attention import ATTENTION
from funnel_kernels.linear import GATED_LINEAR, LINEAR, LINEAR_ADD_NORM, PROJECT_HEADS
from funnel_kernels.op import Op
from funnel_kernels.pool_norm import POOL_NORM
from funnel_kernels.recover_norm import RECOVER_NORM
from funnel_kernels.target import AUTO, Served, Unsupported

OPS = [ADD_NORM, ATTENTION, GATED_LINEAR, LINEAR, LINEAR_ADD_NORM, POOL_NORM, PROJECT_HEADS, RECOVER_NORM]


def refuse(*arrays, **options):
    raise Unsupported("odd widths are not supported")


def serve(*arrays, **options):
    return arrays, options


@pytest.fixture
def make_op(monkeypatch):
    """An op whose implementations are given; a backend "gpu" needs a GPU."""

    def make(*kernels, **functions):
        for module, function in functions.items():
            monkeypatch.setitem(sys.modules, f"made.{module}", types.SimpleNamespace(made=function))
        return Op("made", "made", *kernels)

    def needs_a_gpu(target):
        if target.platform != "gpu":
            raise Unsupported("there is no GPU")

    monkeypatch.setattr(op_module, "CHECKS", {"triton": needs_a_gpu})
    monkeypatch.setitem(sys.modules, "made", types.SimpleNamespace(__path__=[]))
    return make


def test_a_named_backend_gets_the_arrays_the_options_and_the_target(make_op):
    op, target = make_op("xla", xla=serve, reference=refuse), Target("xla")
    assert op(1, 2, mode="max", target=target) == ((1, 2), {"mode": "max", "target": target})


def test_the_reference_gets_no_target(make_op):
    assert make_op(reference=serve)(1, mode="max", target=Target("reference")) == ((1,), {"mode": "max"})


def test_auto_never_means_the_reference():
    assert "reference" not in AUTO
    assert Target("reference").candidates == ("reference",)
    assert set(AUTO) < set(BACKENDS)


def test_a_named_backend_that_refuses_is_not_replaced(make_op):
    op = make_op("xla", xla=serve, reference=refuse)
    with pytest.raises(BackendUnavailable, match="made is not served by backend 'reference': reference: odd widths"):
        op(target=Target("reference"))


def test_auto_takes_the_next_backend_after_a_refusal(make_op):
    op, target = make_op("triton", "xla", triton_gpu=refuse, xla=serve), Target(platform="gpu", record=Record())
    assert op(3, target=target) == ((3,), {"target": target})
    assert target.record.served["made"] == (Served("xla", (("triton", "odd widths are not supported"),)),)
    with pytest.raises(BackendUnavailable, match=r"triton: odd widths .*; xla: odd widths"):
        make_op("triton", "xla", triton_gpu=refuse, xla=refuse)(target=target)


def test_a_backend_that_cannot_run_at_all_is_said_once_and_not_for_each_op(make_op):
    target = Target(record=Record())
    make_op("triton", "xla", xla=serve)(target=target)
    make_op("triton", "tpu", "xla", pallas_tpu=refuse, xla=serve)(target=target)
    assert target.record.served["made"] == (Served("xla"), Served("xla", (("tpu", "odd widths are not supported"),)))
    assert target.record.unavailable == {"triton": "there is no GPU"}
    assert target.record.facts() == {
        "made": "xla; also xla; not tpu: odd widths are not supported",
        "not triton": "there is no GPU",
    }


def test_an_op_that_a_backend_has_no_kernel_for_is_xlas_and_said_to_be(make_op):
    """Whether it is named or not; but only where the backend could run."""
    op = make_op("xla", xla=serve)
    for backend in ("triton", "auto"):
        target = Target(backend, "gpu", record=Record())
        op(target=target)
        assert target.record.facts() == {"made": "xla"}
    with pytest.raises(BackendUnavailable, match="made is not served by backend 'triton': triton: there is no GPU"):
        op(target=Target("triton"))


def test_auto_takes_mosaic_for_its_own_ops_alone(make_op):
    target = Target("auto", "gpu", record=Record())
    made = make_op("mosaic", "triton", "xla", mosaic_gpu=serve, triton_gpu=refuse)
    assert made(target=target) == ((), {"target": target})
    make_op("triton", "xla", triton_gpu=serve)(target=target)
    assert target.record.served["made"] == (Served("mosaic"), Served("triton"))
    named = Target("mosaic", "gpu", record=Record())
    make_op("triton", "xla", triton_gpu=refuse, xla=serve)(target=named)
    assert named.record.backends() == ["xla"]


def test_without_a_module_of_its_own_xla_compiles_the_reference(make_op):
    target = Target("xla", record=Record())
    assert make_op("cpu", reference=serve)(3, target=target) == ((3,), {})
    assert target.record.backends() == ["xla"]


@pytest.mark.parametrize("error", [ValueError, NotImplementedError])
def test_an_error_inside_an_implementation_is_not_a_refusal(make_op, error):
    """JAX raises NotImplementedError for what it cannot do: that is a fault of ours, and not to be passed over."""

    def fail(**options):
        raise error("a real mistake")

    with pytest.raises(error, match="a real mistake"):
        make_op("triton", "xla", triton_gpu=fail, xla=serve)(target=Target(platform="gpu"))


@pytest.mark.parametrize("backend", ["XLA", "cuda", "", "numpy"])
def test_a_backend_that_does_not_exist_is_refused(backend):
    known = "auto, mosaic, triton, tpu, cpu, xla, reference"
    with pytest.raises(
        BackendUnavailable, match=f"backend '{backend}' does not exist in this build; choose one of {known}"
    ):
        Target(backend)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_the_portable_backends_serve_every_op_and_no_backend_is_unknown(op):
    assert set(op.kernels) <= set(BACKENDS) - {"reference"}
    for backend in ("xla", "reference"):
        server, implementation = op.implementation(backend, Target(backend))
        assert server == backend
        assert callable(implementation)


def test_a_target_is_that_of_a_device():
    (device,) = jax.devices()[:1]
    assert Target.of(device, threads=3) == Target("auto", "cpu", device.device_kind, "", 3)
    h100 = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100", compute_capability="9.0")
    assert Target.of(h100, backend="triton") == Target("triton", "gpu", "NVIDIA H100", "9.0")


def test_a_record_is_no_part_of_what_a_target_is():
    target = Target("xla")
    recorded = dataclasses.replace(target, record=Record())
    assert recorded == target
    assert hash(recorded) == hash(target)


def test_a_record_has_every_op_that_a_program_runs_and_each_answer_once():
    target = Target("xla", record=Record())
    x, weight, bounds = jnp.ones((4, 8)), jnp.ones(8), jnp.zeros(4, jnp.int32)

    def program(x):
        for _ in range(3):
            x, normed = add_norm(x, x, weight, eps=1e-6, target=target)
            x = attention(normed, x, x, bounds, bounds, heads=2, kv_heads=2, scale=1.0, target=target)
        x, _ = pool_norm(x, bounds == 0, weight, stride=2, pool="max", eps=1e-6, target=target)
        return recover_norm(x, None, weight, stride=2, mode="tile", eps=1e-6, target=target)

    jax.eval_shape(program, x)
    assert target.record.facts() == dict.fromkeys(("add_norm", "attention", "pool_norm", "recover_norm"), "xla")


def test_a_record_can_be_read_while_a_program_is_traced():
    """`describe` may be called while other threads compile: here the reading itself meets a new answer."""
    record = Record()

    class Answer(str):
        def __str__(self):
            record.add(f"op after {len(record.served)}", Served("xla"))
            return super().__str__()

    record.add("attention", Answer("cpu"))
    assert record.facts() == {"attention": "cpu"}
    assert record.facts() == {"attention": "cpu", "op after 1": "xla"}


def test_records_are_merged():
    """As `describe` does with those of several funnels."""
    first, second = Record(), Record()
    first.add("attention", Served("cpu"), {"tpu": "no TPU"})
    second.add("attention", Served("cpu"))
    second.add("attention", Served("xla"), {"triton": "no GPU"})
    second.add("pool_norm", Served("cpu"))
    merged = Record.merged([first, second])
    assert merged.served == {"attention": (Served("cpu"), Served("xla")), "pool_norm": (Served("cpu"),)}
    assert merged.unavailable == {"tpu": "no TPU", "triton": "no GPU"}
    assert first.served == {"attention": (Served("cpu"),)}


def test_every_error_of_the_project_is_a_funnel_error():
    names = ("ConfigError", "CheckpointError", "InputError", "BackendUnavailable")
    assert all(issubclass(getattr(errors, name), FunnelError) for name in names)
    assert not issubclass(FunnelError, ValueError)
