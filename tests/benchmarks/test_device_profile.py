"""`funnel_benchmarks.device.profile`: what a profile says, and what XLA's options change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.profiler import ProfileData

from funnel_benchmarks.device import profile as module
from funnel_benchmarks.device.profile import (
    CANDIDATES,
    Kernel,
    Suite,
    busy_nanoseconds,
    kernels,
    most_expensive,
    profile,
    profiles,
    xla_options,
)
from funnel_benchmarks.funnels import NO_FUNNEL
from funnel_benchmarks.kernels.cases import forward_pass
from funnel_benchmarks.models import random_model
from funnel_benchmarks.results import LeftOut
from funnel_benchmarks.suite import markdown
from tiny_models import CONFIG

BATCH = np.full(4, 8, np.int32)


def make_suite(measured):
    return Suite(measured=measured, model=MODEL, batch=BATCH, one=5, backend="xla", repeats=1)


MODEL = random_model("tiny", CONFIG, "float32")


SPACE = """
planes {
  name: "/device:GPU:0"
  lines { name: "Stream #13(Compute)" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 0 duration_ps: 2000000 }
    events { metadata_id: 2 offset_ps: 5000000 duration_ps: 4000000 }
    events { metadata_id: 3 offset_ps: 90000000 duration_ps: 1000000 } }
  lines { name: "Stream #14(MemcpyD2D)" timestamp_ns: 1000
    events { metadata_id: 4 offset_ps: 1000000 duration_ps: 3000000 } }
  lines { name: "XLA Modules" timestamp_ns: 1000 events { metadata_id: 1 offset_ps: 0 duration_ps: 99000000 } }
  event_metadata { key: 1 value { id: 1 name: "loop_fusion_3" } }
  event_metadata { key: 2 value { id: 2 name: "loop_fusion" } }
  event_metadata { key: 3 value { id: 3 name: "MemcpyD2H" } }
  event_metadata { key: 4 value { id: 4 name: "MemcpyD2D" } }
}
planes {
  name: "/host:CPU"
  lines { name: "Stream #1" timestamp_ns: 1000 events { metadata_id: 1 offset_ps: 0 duration_ps: 5000000 } }
  event_metadata { key: 1 value { id: 1 name: "host" } }
}
"""


def read(text):
    return kernels(ProfileData.from_serialized_xspace(ProfileData.text_proto_to_serialized_xspace(text)))


def test_kernels_are_what_ran_on_the_streams_of_a_device():
    assert sorted(read(SPACE)) == [
        ("MemcpyD2D", 2000.0, 5000.0),
        ("loop_fusion", 6000.0, 10000.0),
        ("loop_fusion_3", 1000.0, 3000.0),
    ]


def test_a_tpu_has_its_operations_on_one_line():
    space = SPACE.replace("GPU", "TPU").replace("Stream #13(Compute)", "XLA Ops").replace("Stream #14", "Steps")
    assert sorted(kernel.name for kernel in read(space)) == ["loop_fusion", "loop_fusion_3"]


def test_busy_is_the_union_of_intervals():
    ran = read(SPACE)
    assert busy_nanoseconds(ran) == 4000 + 4000  # 1000 to 5000 on two streams, and 6000 to 10000
    inside = [Kernel("a", 0, 10), Kernel("b", 2, 5), Kernel("c", 4, 7), Kernel("d", 10, 11), Kernel("e", 20, 21)]
    assert busy_nanoseconds(reversed(inside)) == 12


def test_the_most_expensive_kernels_are_summed_by_name():
    fusion, copy = most_expensive(read(SPACE), 2)
    assert fusion == ("loop_fusion", 2, 6e-3, 6 / 9)
    assert copy == ("MemcpyD2D", 1, 3e-3, 3 / 9)
    assert most_expensive(read(SPACE), 1) == [fusion]


def test_a_profile_without_a_device_is_left_out():
    assert profile(lambda: jnp.ones(3) + 1) == []
    wall, busy, _ = (measure for _, measure in profiles(make_suite(profiles)))
    assert len(wall()["seconds"]["samples"]) == 20
    with pytest.raises(LeftOut, match="the profile has no plane of a device"):
        busy()


def test_a_device_that_waits_is_not_busy(monkeypatch):
    monkeypatch.setattr(module, "profile", lambda call: call() is None or read(SPACE))
    suite = make_suite(profiles)
    _, busy, where = ((name, measure()) for name, measure in profiles(suite))
    row = busy[1]
    assert row["busy_share"] == pytest.approx(8e-6 / row["seconds"]["median"])  # of calls that no profiler watches
    assert row["busy_milliseconds"] == pytest.approx(8e-3)
    assert row["kernels"] == 3
    name, goes = where
    assert name == "where the time goes, 4 x 8 tokens"
    assert goes["busy_share"] == pytest.approx(8e-6 / goes["seconds"]["median"])
    assert goes["most_expensive"][0] == {"name": "loop_fusion", "runs": 2, "milliseconds": 6e-3, "share": 6 / 9}
    text = markdown(Suite.section({"options": suite.options(), "rows": [{"cell": name} | goes]}))
    assert f"**{name}**\n\n| kernel | runs | time (ms) | share (%, of all kernels) |" in text
    assert "| loop_fusion | 2 | 0.006 | 66.7 |" in text
    assert "served by xla" in text


# XLA's options.


@pytest.mark.parametrize("candidate", CANDIDATES, ids=str)
def test_the_compiler_knows_every_candidate(candidate):
    jax.jit(lambda x: x + 1).lower(jnp.ones(3)).compile(compiler_options=candidate)


def test_options_are_compared_with_none_on_a_gpu(monkeypatch):
    suite = make_suite(xla_options)
    engine, seen = MODEL.engine(NO_FUNNEL, "xla", int(BATCH.sum())), []
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_some_flag"):  # the options reach the compiler
        forward_pass(engine, BATCH, 32, {"xla_gpu_some_flag": True})()
    expected = np.asarray(forward_pass(engine, BATCH, 32, {})())
    assert expected.shape == (32, CONFIG.hidden_size)
    assert np.isfinite(expected).all()
    names, measures = zip(*xla_options(suite), strict=True)
    assert names[0].startswith("the engine's own: xla_gpu_")
    assert len(names) == len(CANDIDATES)
    with pytest.raises(LeftOut, match="not a GPU: JAX runs on cpu"):
        measures[0]()

    class GPU:
        platform = "gpu"

    def without_flags(engine, lengths, rows, options):
        seen.append(options)
        return forward_pass(engine, lengths, rows, {})

    monkeypatch.setattr(module.jax, "devices", lambda: [GPU])
    monkeypatch.setattr(module, "forward_pass", without_flags)
    row = measures[1]()
    assert seen == [{}, CANDIDATES[1]]
    assert row["ratio"]["median"] == pytest.approx(row["seconds"]["median"] / row["baseline_seconds"]["median"])
    assert "| 1.000 (0.900 \u2013 1.100) |" in markdown(
        Suite.section(
            {
                "options": suite.options(),
                "rows": [{"cell": "x"} | row | {"ratio": {"low": 0.9, "median": 1.0, "high": 1.1}}],
            }
        )
    )
