"""An engine gives the same whatever JAX's settings are, in whatever thread and on whatever device."""

import functools
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np
import pytest

from funnel_engine import BackendUnavailable, ConfigError, Engine, FunnelConfig, HeadConfig, InputError
from funnel_engine.jax_settings import REFUSED, SETTINGS, default_device
from tiny_models import make_engine, random_ids

IDS = random_ids([5, 20, 1])
FUNNEL = FunnelConfig.after(1, recovery="sum_mean")
CHANGED = {
    "jax_enable_x64": True,
    "jax_disable_jit": True,
    "jax_numpy_rank_promotion": "raise",
    "jax_numpy_dtype_promotion": "strict",
    "jax_default_matmul_precision": "bfloat16",
    "jax_debug_nans": True,
    "jax_debug_infs": True,
    "jax_check_tracer_leaks": True,
    "jax_no_tracing": True,
    "jax_no_execution": True,
    "jax_transfer_guard_host_to_device": "disallow_explicit",
    "jax_transfer_guard_device_to_device": "disallow_explicit",
    "jax_transfer_guard_device_to_host": "disallow_explicit",
}


@pytest.fixture
def setting(request):
    """Sets `name=value` for the process, as `jax.config.update` does for a user."""
    changed = []

    def change(name, value):
        changed.append((name, jax.config.values[name]))
        jax.config.update(name, value)

    yield change
    for name, value in reversed(changed):
        jax.config.update(name, value)


def results(backend: str, pooling: str) -> list[np.ndarray]:
    """Of an engine that is made here and now, so that nothing of it is compiled yet."""
    head = HeadConfig(pooling=pooling, pooler=True)
    engine = make_engine(head, backend=backend, funnel=FUNNEL, max_batch_tokens=32)
    engine.describe()
    return [engine.embed(IDS), *engine.hidden_states(IDS)]


plain_results = functools.cache(results)  # under JAX's own settings: every test asks before it changes one


def test_every_setting_is_tried():
    assert CHANGED.keys() == SETTINGS.keys()


def test_the_defaults_are_those_of_jax():
    for name, (manager, default) in SETTINGS.items():
        assert jax.config.values[name] in (None, default), name
        with manager(default):
            assert getattr(jax.config, name) == default


@pytest.mark.parametrize(
    ("backend", "pooling"),
    [
        pytest.param(backend, pooling, marks=() if (row + column) % 3 == 0 else pytest.mark.grid)
        for row, backend in enumerate(("auto", "xla", "reference"))
        for column, pooling in enumerate(("mean", "max", "attention"))
    ],
)
def test_no_setting_changes_a_result(setting, backend, pooling):
    expected = plain_results(backend, pooling)
    for name, value in CHANGED.items():
        setting(name, value)
    for plain, changed in zip(expected, results(backend, pooling), strict=True):
        np.testing.assert_array_equal(plain, changed)


@pytest.mark.parametrize("name", CHANGED)
def test_each_setting_alone(setting, name):
    expected = plain_results("xla", "max")
    setting(name, CHANGED[name])
    for plain, changed in zip(expected, results("xla", "max"), strict=True):
        np.testing.assert_array_equal(plain, changed)
    assert jax.config.values[name] == CHANGED[name]  # of the user's own code


def test_threads_of_a_warmup_have_the_engines_settings(setting):
    setting("jax_enable_x64", True)
    setting("jax_numpy_rank_promotion", "raise")
    engine = make_engine(backend="xla", max_batch_tokens=16)
    engine.warmup(progress=False)
    engine.embed(IDS[:1])
    assert engine.stats()["compilations_after_warmup"] == 0


def test_settings_of_a_thread_alone():
    """A user's `with jax.enable_x64(True)` around a call to an engine that is there already."""
    engine = make_engine(backend="xla")
    expected = make_engine(backend="xla").embed(IDS)
    with ExitStack() as stack:
        for name, value in CHANGED.items():
            stack.enter_context(SETTINGS[name][0](value))
        np.testing.assert_array_equal(engine.embed(IDS), expected)


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_jax_cannot_undo_is_refused(setting, name):
    engine = make_engine()
    setting(name, "raise" if isinstance(REFUSED[name], str) else True)
    with pytest.raises(ConfigError, match=rf"JAX cannot run the engine with {name}=.*; set jax\.config\.update"):
        engine.embed(IDS)
    with pytest.raises(ConfigError, match=name):
        make_engine()


def test_a_default_device_of_another_platform_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ConfigError, match="JAX's default device is cpu:0, but JAX runs on gpu; set JAX_PLATFORMS=cpu"):
        make_engine()


def test_an_engine_is_made_and_called_outside_of_traced_functions():
    with pytest.raises(ConfigError, match=r"an engine cannot be made inside jax\.jit .*; make it outside"):
        jax.jit(lambda: make_engine().embed(IDS))()
    engine = make_engine()
    with pytest.raises(InputError, match=r"the array of inputs is traced by jax\.jit .*; call the engine outside of"):
        jax.jit(engine.embed)(np.array([IDS[0]]))


def test_a_platform_that_does_not_start(monkeypatch):
    def devices():
        raise RuntimeError("Unable to initialize backend 'tpu': no TPU\nmore about it")

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(
        BackendUnavailable, match=r"\(RuntimeError: Unable to .* no TPU\); install JAX for that"
    ) as caught:
        default_device()
    assert "more" not in str(caught.value)


SEVERAL_DEVICES = """
import jax, numpy as np
from jax.sharding import AxisType
from tiny_models import make_engine, random_ids

ids = random_ids([5, 20, 1])
first = make_engine(backend="xla")
expected = first.embed(ids)
lines = first.describe().splitlines()
assert [line.split() for line in lines if line.startswith("devices")] == [["devices", "cpu:0"]], lines

# An engine stays on the device that was the default where it was made, whatever the default is later.
with jax.default_device(jax.devices()[2]):
    engine = make_engine(backend="xla")
assert "cpu:2" in engine.describe()
np.testing.assert_array_equal(engine.embed(ids), expected)
with jax.default_device(jax.devices()[3]):
    np.testing.assert_array_equal(engine.embed(ids[:1]), first.embed(ids[:1]))
for program in engine.programs[0].compiled.values():
    shardings = jax.tree.leaves(program.result().input_shardings)
    devices = {device for sharding in shardings for device in sharding.device_set}
    assert devices == {jax.devices()[2]}, devices

# A mesh of the user's own code is not the engine's.
for kind in AxisType.Explicit, AxisType.Auto:
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "x"), axis_types=(kind,) * 2)):
        np.testing.assert_array_equal(make_engine(backend="xla").embed(ids), expected)
        own = jax.make_mesh((2, 2), ("data", "model"))
        np.testing.assert_allclose(make_engine(backend="xla", mesh=own).embed(ids), expected, atol=1e-6)
"""


def test_several_devices_and_meshes():
    paths = [str(Path(__file__).parents[1]), *sys.path]
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}\n{SEVERAL_DEVICES}"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not re.search("Traceback", result.stderr)


def test_every_public_method_is_guarded():
    methods = {name for name, value in vars(Engine).items() if callable(value) and not name.startswith("_")}
    unguarded = {name for name in methods if not hasattr(getattr(Engine, name), "__wrapped__")}
    assert unguarded == {"token_ids", "rows_needed", "check_method"}  # which need no JAX
    assert hasattr(Engine.__init__, "__wrapped__")
