"""`funnel_benchmarks.device`: timing, profiles, layouts, the oracle, what checks catch, what figures count."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.profiler import ProfileData

from funnel_benchmarks.device import attention, check, engine, flags, latency, layouts, oracle, rows
from funnel_benchmarks.device.bench import Bench
from funnel_benchmarks.device.clock import Clock
from funnel_benchmarks.device.device_profile import (
    Kernel,
    busy_nanoseconds,
    kernels,
    most_expensive,
    profile,
)
from funnel_benchmarks.device.sizes import SMALL
from funnel_benchmarks.funnels import NO_FUNNEL
from funnel_benchmarks.results import LeftOut
from funnel_engine import FunnelError
from funnel_engine.devices import local_target
from funnel_engine.flops import forward_flops
from funnel_kernels import attention as attention_op
from funnel_kernels import pool_norm, recover_norm
from funnel_kernels.pool_norm import POOLS
from funnel_kernels.recover_norm import MODES, SITES


@pytest.fixture
def bench():
    return Bench(SMALL, "xla", 5, Clock(9.0, time.monotonic()))


# Time.


def test_the_clock_runs_out():
    assert Clock(1.0, time.monotonic()).seconds_left() == pytest.approx(60, abs=5)
    assert Clock(1.0, time.monotonic() - 61).seconds_left() == 0


def test_no_cell_begins_when_time_is_up():
    cells = [("one", lambda: {"figure": 1})]
    ((name, measure),) = Clock(1.0, time.monotonic()).within(cells)
    assert (name, measure()) == ("one", {"figure": 1})
    ((_, measure),) = Clock(1.0, time.monotonic() - 61).within(cells)
    with pytest.raises(LeftOut, match="not measured: out of time"):
        measure()


# Profiles.

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


def test_a_profile_without_a_device_is_left_out(bench):
    assert profile(lambda: jnp.ones(3) + 1) == []
    with pytest.raises(LeftOut, match="the profile has no plane of a device"):
        latency.busy_share(bench)


def test_a_device_that_waits_is_not_busy(bench, monkeypatch):
    monkeypatch.setattr(latency, "profile", lambda call: call() is None or read(SPACE))
    row = latency.busy_share(bench)
    assert row["busy_share"] == pytest.approx(8e-6 / row["seconds"]["median"])  # of calls that no profiler watches
    assert row["busy_milliseconds"] == pytest.approx(8e-3)
    assert row["kernels"] == 3
    goes = latency.where_time_goes(bench)
    assert goes["busy_share"] == pytest.approx(8e-6 / goes["seconds"]["median"])
    assert goes["most_expensive"][0] == {"name": "loop_fusion", "runs": 2, "milliseconds": 6e-3, "share": 6 / 9}


# Layouts.


def by_hand(lengths, stride, left, right):
    """For every query row its visible key rows, token by token."""
    seen, start = [], 0
    for length in lengths:
        for t in range(0, length, stride):
            keys = [
                start + j
                for j in range(length)
                if (left is None or j >= t - left) and (right is None or j <= t + right)
            ]
            seen.append(keys)
        start += -(-length // stride) * stride
    return seen


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("window", [(None, None), (None, 0), (5, 3)])
def test_packed_sequences_see_themselves_only(stride, window):
    lengths = [7, 1, 12]
    layout = layouts.packed(np.array(lengths, np.int32), stride=stride, window=window, padding=2)
    expected = [*by_hand(lengths, stride, *window), [], []]
    assert (layout.queries, layout.keys) == (len(expected), stride * len(expected))
    assert [list(range(lo, hi)) for lo, hi in zip(layout.lo, layout.hi, strict=True)] == expected
    assert layout.pairs == sum(map(len, expected))


def test_scattered_intervals_stay_inside_and_some_are_empty():
    layout = layouts.scattered(np.random.default_rng(0), 500, 300)
    assert (layout.lo >= 0).all()
    assert (layout.hi <= 300).all()
    assert 0.1 < (layout.hi <= layout.lo).mean() < 0.6
    assert layout.pairs == sum(max(0, hi - lo) for lo, hi in zip(layout.lo.tolist(), layout.hi.tolist(), strict=True))


def test_lengths_are_cut_to_the_tokens_wanted():
    lengths = np.array([5, 4, 3, 9], np.int32)
    assert layouts.up_to(10, lengths).tolist() == [5, 4, 1]
    assert layouts.up_to(9, lengths).tolist() == [5, 4]
    assert lengths.tolist() == [5, 4, 3, 9]
    assert layouts.equal(32, 8).tolist() == [8] * 4


def test_ragged_attention_has_as_many_tokens_and_the_longest_first(bench):
    for lengths in attention.ragged_lengths(bench).values():
        assert lengths.sum() == SMALL.tokens
        assert (np.diff(lengths) <= 0).all()


# The oracle, against the specification.


def numbers(seed, *shapes):
    generator = np.random.default_rng(seed)
    return [generator.standard_normal(shape).astype(np.float32) for shape in shapes]


def agree(ours, reference):
    for actual, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(actual, np.asarray(expected), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (4, 2), (3, 3)])
def test_the_oracle_of_attention_is_the_specification(heads, kv_heads, softcap):
    layout = layouts.scattered(np.random.default_rng(heads), 600, 90)  # more than one block of queries
    q, k, v = numbers(1, (600, heads * 8), (90, kv_heads * 8), (90, kv_heads * 8))
    options = {"heads": heads, "kv_heads": kv_heads, "scale": 0.7, "softcap": softcap}
    wide = [array.astype(np.float64) for array in (q, k, v)]
    agree(
        oracle.attention(*wide, layout.lo, layout.hi, **options),
        attention_op(q, k, v, layout.lo, layout.hi, **options, target=local_target("reference")),
    )


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_oracle_of_pool_norm_is_the_specification(pool, stride):
    x, weight = numbers(2, (60, 24), (24,))
    real = np.random.default_rng(3).random(60) < 0.5
    options = {"stride": stride, "pool": pool, "eps": 1e-3}
    agree(
        oracle.pool_norm(x.astype(np.float64), real, weight.astype(np.float64), **options),
        pool_norm(x, real, weight, **options, target=local_target("reference")),
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("site", SITES)
def test_the_oracle_of_recover_norm_is_the_specification(mode, site):
    short, full, weight = numbers(4, (20, 24), (60, 24), (24,))
    full = None if mode == "tile" else full
    options = {"stride": 3, "mode": mode, "site": site, "eps": 1e-3}
    wide = [array if array is None else array.astype(np.float64) for array in (short, full, weight)]
    agree(
        oracle.recover_norm(*wide, **options),
        recover_norm(short, full, weight, **options, target=local_target("reference")),
    )


# What a check catches.


def double(x):
    return 2 * x


def flipping():
    """An op whose result differs from call to call."""
    state = iter(range(100))

    def op(x):
        return jax.pure_callback(
            lambda x: x * np.float32(2 + 1e-6 * next(state)), jax.ShapeDtypeStruct((50,), "float32"), x
        )

    return op


@pytest.mark.parametrize(
    ("op", "facts"),
    [
        (double, {"passed": True, "finite": True, "same_bits_twice": True}),
        (lambda x: 2 * x + 1e-3, {"passed": False, "finite": True, "same_bits_twice": True}),
        (lambda x: (2 * x).at[7].set(jnp.nan), {"passed": False, "finite": False, "same_bits_twice": True}),
        (flipping(), {"passed": False, "finite": True, "same_bits_twice": False}),
    ],
    ids=["right", "wrong", "unwritten", "moving"],
)
def test_a_check_catches(op, facts):
    row = check.compare(op, double, numbers(6, (50,)), check.FLOAT32)
    assert row.items() >= facts.items()
    small = row["error"] is not None and row["error"] <= row["limit"]
    assert small is (facts["passed"] or not facts["same_bits_twice"])


def test_memory_is_full_of_nan_before_each_of_the_two_runs(monkeypatch):
    filled, full = [], jnp.full
    monkeypatch.setattr(check.jnp, "full", lambda *spec: filled.append(spec) or full(*spec))
    check.compare(lambda x: (2 * x, x[:7]), lambda x: (2 * x, x[:7]), numbers(7, (50,)), check.FLOAT32)
    assert [shape for shape, _, _ in filled] == 2 * [*4 * [(50,)], *4 * [(7,)]]
    assert all(np.isnan(value) and dtype == jnp.float32 for _, value, dtype in filled)


def test_a_result_of_another_shape_is_an_error():
    with pytest.raises(FunnelError, match=r"the result has shape \(3,\) but it must be \(4,\)"):
        check.relative_error(np.ones(3), np.ones(4))


def test_relative_error_is_that_of_the_whole_result():
    assert check.relative_error(np.array([3.0, 5.0]), np.array([3.0, 4.0])) == pytest.approx(0.2)
    assert not check.relative_error(np.array([np.nan, 4.0]), np.array([3.0, 4.0])) <= 1


def test_checks_cover_every_op_dtype_and_option(bench):
    names = [name for name, _ in check.all_cells(bench)]
    for dtype in ("bfloat16", "float32"):
        for option in (*(f"pool_norm {pool}" for pool in POOLS), *(f"recover_norm {mode}" for mode in MODES)):
            assert sum(name.startswith(option) and dtype in name for name in names) >= 2
        for heads in (
            "8/1 heads of 256",
            "8/4 heads of 256",
            "4/4 heads of 256",
            "6/2 heads of 128",
            "2/2 heads of 64",
        ):
            assert any(f"attention {heads}" in name and dtype in name for name in names)
    assert sum("one long sequence" in name for name in names) == 3
    shown = [name for name, _ in check.cells(bench)]
    assert shown == names[:: SMALL.check_step]


def test_checks_of_two_seeds_have_other_numbers(bench):
    row, again = (list(check.cells(bench))[-1][1]() for _ in range(2))
    other = list(check.cells(Bench(SMALL, "xla", 6, bench.clock)))[-1][1]()
    assert row == again
    assert row["error"] != other["error"]
    assert row["op"] == "recover_norm"


# Figures.


def test_attention_rates_are_of_the_pairs_that_are_seen(bench):
    row = dict(attention.cells(bench))["window of 16, 128 tokens"]()
    seen = sum(min(128, i + 9) - max(0, i - 8) for i in range(128)) * (SMALL.tokens // 128)
    assert row["flops"] == 4 * SMALL.head_dim * 4 * seen
    assert row["tflops_per_second"] == pytest.approx(row["flops"] / row["seconds"]["median"] / 1e12)
    dense = 4 * SMALL.head_dim * 4 * SMALL.tokens * 128
    assert row["peer_tflops_per_second"] == pytest.approx(dense / row["peer_seconds"]["median"] / 1e12)
    assert row["share"] == pytest.approx(row["tflops_per_second"] / row["peer_tflops_per_second"])


def test_a_peer_of_attention_gets_the_same_data_in_its_own_shape(bench, monkeypatch):
    """cuDNN is not here; XLA's own stands in for it, so that the reshapes and the comparison run."""
    attend = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *heads, scale, implementation: attend(*heads, scale=scale)
    )
    row = attention.against_cudnn(bench, 4, 2, 32)
    assert row["peer"] == "cuDNN"
    assert row["share"] > 0
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *heads, scale, implementation: attend(*heads))
    monkeypatch.setattr(attention, "LARGEST_DIFFERENCE", 1e-9)
    with pytest.raises(FunnelError, match="the peer computed something else: relative difference "):
        attention.against_cudnn(bench, 4, 2, 32)


@pytest.mark.parametrize(
    ("cell", "numbers_moved"),
    [
        ("pool_norm max, stride 4, width 64", 256 * 64 + 2 * 64 * 64),
        ("recover_norm tile, stride 2, width 64", 128 * 64 + 256 * 64),
        ("recover_norm sum, stride 4, width 64", 64 * 64 + 2 * 256 * 64),
    ],
)
def test_bandwidth_counts_every_number_read_and_written_once(bench, cell, numbers_moved):
    row = dict(rows.cells(bench))[cell]()
    assert row["bytes_read_and_written"] == 2 * numbers_moved
    assert row["input_sets"] * 2 * numbers_moved >= SMALL.rotated_bytes
    assert row["gb_per_second"] == pytest.approx(2 * numbers_moved / row["seconds"]["median"] / 1e9)
    assert row["share"] == pytest.approx(row["copy_seconds"]["median"] / row["seconds"]["median"])


def test_a_sample_of_several_input_sets_is_divided_by_their_number(bench, monkeypatch):
    monkeypatch.setattr(rows, "in_turns", lambda first, second, repeats: ([6.0, 6.0], [3.0, 3.0]))
    row = rows.measure_pool_norm(bench, 64, 4)
    assert row["input_sets"] > 1
    assert (row["copy_seconds"]["median"], row["seconds"]["median"]) == (6 / row["input_sets"], 3 / row["input_sets"])
    assert row["share"] == 2


@pytest.mark.parametrize("candidate", flags.CANDIDATES, ids=str)
def test_the_compiler_knows_every_candidate(candidate):
    jax.jit(lambda x: x + 1).lower(jnp.ones(3)).compile(compiler_options=candidate)


@pytest.mark.parametrize("percent", SMALL.padding_percent)
def test_padded_cells_have_padding_and_count_no_operation_of_it(bench, percent):
    layout = layouts.padded(SMALL.tokens, 32, percent)
    assert (layout.queries, layout.keys) == (SMALL.tokens, SMALL.tokens)
    assert np.mean(layout.lo == layout.hi) == pytest.approx(percent / 100, abs=0.13)
    assert layout.pairs == 32 * np.sum(layout.lo < layout.hi)
    row = dict(engine.cells(bench))[f"forward pass, {percent} % of 256 rows are padding"]()
    tokens = int(layouts.filled(SMALL.tokens, 32, percent).sum())
    assert row["flops"] == forward_flops(SMALL.config, NO_FUNNEL, np.full(tokens // 32, 32, np.int32))
    assert row["of_full"] == pytest.approx(row["seconds"]["median"] / row["full_seconds"]["median"])


def test_options_are_compared_with_none_on_a_gpu(bench, monkeypatch):
    class GPU:
        platform = "gpu"

    compile_with, without = flags.compiler(bench)
    seen = []
    monkeypatch.setattr(flags.jax, "devices", lambda: [GPU])

    def compiled():
        return lambda options: seen.append(options) or compile_with({}), without

    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_some_flag"):  # the options reach the compiler
        compile_with({"xla_gpu_some_flag": True})
    row = flags.measure(bench, compiled, {"xla_gpu_some_flag": True})
    assert seen == [{"xla_gpu_some_flag": True}]
    assert row["ratio"]["median"] == pytest.approx(row["seconds"]["median"] / row["baseline_seconds"]["median"])
    expected = np.asarray(without(), np.float32)
    assert expected.shape == (SMALL.tokens, SMALL.config.hidden_size)
    assert np.isfinite(expected).all()
