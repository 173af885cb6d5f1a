"""Options for XLA: known to the compiler, set by platform, and left to the user where XLA_FLAGS names them."""

import jax
import jax.numpy as jnp
import pytest

from funnel_engine import Engine, HeadConfig
from funnel_engine.weights import random_weights
from funnel_engine.xla_options import OPTIONS, compiler_options
from tiny_models import CONFIG


def test_a_cpu_gets_none_and_a_gpu_all(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert compiler_options("cpu") == {}
    assert compiler_options("gpu") == OPTIONS["gpu"]


def test_what_the_user_has_set_is_left_alone(monkeypatch):
    monkeypatch.setitem(OPTIONS, "gpu", {"xla_gpu_autotune_level": "2", "xla_gpu_graph_min_graph_size": "1"})
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/tmp/x --xla_gpu_autotune_level=0")
    assert compiler_options("gpu") == {"xla_gpu_graph_min_graph_size": "1"}


@pytest.mark.parametrize("platform", OPTIONS)
def test_the_compiler_knows_every_option(platform):
    lowered = jax.jit(lambda x: x + 1).lower(jnp.ones(3))
    for name, value in OPTIONS[platform].items():
        lowered.compile(compiler_options={name: value})
    with pytest.raises(Exception, match="No such compile option"):
        lowered.compile(compiler_options={"xla_gpu_no_such_option": True})


def test_the_engine_compiles_with_them(monkeypatch):
    seen = []
    compile_ = jax.stages.Lowered.compile

    def recording(self, compiler_options=None, **more):
        seen.append(compiler_options)
        return compile_(self, compiler_options, **more)

    monkeypatch.setattr(jax.stages.Lowered, "compile", recording)
    monkeypatch.setitem(OPTIONS, "cpu", {"xla_cpu_enable_fast_math": False})
    engine = Engine(CONFIG, HeadConfig(), random_weights(CONFIG, HeadConfig(), "float32", seed=0), max_batch_tokens=16)
    engine.embed([[1, 2, 3]])
    assert seen == [{"xla_cpu_enable_fast_math": False}] * 2  # the encoder, and the head
