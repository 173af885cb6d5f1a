"""`attention` for Hopper: in JAX's simulator, which follows copies, barriers and warpgroups and notes races.

The simulator knows what the kernel uses since JAX 0.11, which needs Python 3.12: `make mosaic` runs these tests in an
environment of their own.
"""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from attention_oracle import oracle
from funnel_kernels import BackendUnavailable, Target, attention
from funnel_kernels.attention import mosaic_gpu
from option_grid import (
    ATTENTION_TOLERANCE,
    HEADS,
    HOPPER_CASES,
    AttentionCase,
    Packed,
    Scattered,
)

H100 = "NVIDIA H100 80GB HBM3"
simulated = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="needs JAX 0.11, see `make mosaic`")


@pytest.fixture
def races():
    """Whether the simulator has found a race."""
    interpreter = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks")
    yield lambda: interpreter.get_races().races_found
    interpreter.reset_gpu_interpret_mode_state()


def simulate(*arrays, **options):
    target = Target("mosaic", "gpu", H100, "9.0", interpret=plgpu.InterpretGPUParams(detect_races=True))
    return np.asarray(attention(*map(jnp.asarray, arrays), **options, target=target), np.float64)


@simulated
@pytest.mark.parametrize("name", HOPPER_CASES)
def test_agrees_with_float64_without_a_race(races, name):
    case = HOPPER_CASES[name]
    actual, (expected, size) = simulate(*case.arrays(), **case.options()), oracle(case)
    error = np.abs(actual - expected)
    assert (error <= ATTENTION_TOLERANCE["bfloat16"] * size).all(), (error / np.maximum(size, 1e-30)).max()
    assert not races()


@simulated
def test_a_row_that_sees_nothing_is_exactly_zero(races):
    """Also where other rows of its block see a block of keys whole, which is not masked then."""
    case = AttentionCase(Scattered(150, 300), head_dim=64, dtype="bfloat16")
    q, k, v, lo, hi = case.arrays()
    lo, hi = np.where(lo < hi, 0, 7).astype(np.int32), np.where(lo < hi, 300, 7).astype(np.int32)
    out = simulate(q, k, v, lo, hi, **case.options())
    assert (out[lo == hi] == 0).all()
    assert (out[lo < hi] != 0).any(axis=1).all()
    assert 20 < (lo == hi).sum() < 100


@simulated
def test_large_scores_do_not_overflow(races):
    case = AttentionCase(Packed((100, 30)), head_dim=64, dtype="bfloat16")
    q, k, v, lo, hi = case.arrays()
    out = simulate((1e4 * q.astype(np.float32)).astype(q.dtype), k, v, lo, hi, **case.options())
    assert np.isfinite(out).all()
    assert (np.abs(out) <= np.abs(v.astype(np.float64)).max()).all()


@simulated
def test_a_race_would_be_found(races, monkeypatch):
    """The simulator is not blind: the result is written to the queries' memory, and copied from there too early."""
    monkeypatch.setattr(plgpu, "commit_smem", lambda: None)
    case = AttentionCase(Packed((70,)), head_dim=64, dtype="bfloat16")
    simulate(*case.arrays(), **case.options())
    assert races()


@pytest.mark.parametrize("tail", [0, 72, 784])
def test_no_key_block_is_visited_that_no_row_sees(tail):
    """However much of a bucket is padding: `key_blocks` says which ones a program visits and which it does not mask."""
    lo, hi, keys = Packed((60,) * 16, left=40, right=9, tail=tail).intervals()
    rows, block_k = mosaic_gpu.COMPUTING * mosaic_gpu.BLOCK_Q, 64
    blocks = -(-len(lo) // rows)
    lo, hi = (np.pad(bound, (0, blocks * rows - len(bound))) for bound in (lo, hi))
    planned = np.asarray(mosaic_gpu.key_blocks(jnp.asarray(lo), jnp.asarray(hi), keys, blocks, block_k))
    for (begin, end, whole_begin, whole_end), lows, highs in zip(
        planned.T, lo.reshape(blocks, rows), hi.reshape(blocks, rows), strict=True
    ):
        seen = [range(low // block_k, -(-high // block_k)) for low, high in zip(lows, highs, strict=True) if low < high]
        assert set(range(begin, end)) == {block for each in seen for block in each}
        for block in range(begin, end):
            is_whole = all(
                low <= block * block_k and (block + 1) * block_k <= high
                for low, high in zip(lows, highs, strict=True)
                if low < high
            )
            assert is_whole == (whole_begin <= block < whole_end)


@pytest.mark.parametrize(
    ("change", "capability", "reason"),
    [
        ({"dtype": "float32"}, "9.0", "the arrays are float32; the kernel multiplies bfloat16 alone"),
        ({"head_dim": 80}, "9.0", "heads are 80 wide; the kernel supports 64, 128, 256"),
        ({"head_dim": 512}, "9.0", "heads are 512 wide; the kernel supports 64, 128, 256"),
        ({}, "8.0", "has compute capability 8.0; the kernels need 9.0"),
        ({}, "10.0", "has compute capability 10.0; the kernels need 9.0"),
    ],
)
def test_what_it_does_not_serve_is_refused_with_the_reason(change, capability, reason):
    case = AttentionCase(Packed((5,)), **HEADS["multi-query"] | {"head_dim": 64, "dtype": "bfloat16"} | change)
    with pytest.raises(BackendUnavailable, match=f"mosaic: .*{reason}"):
        attention(*case.arrays(), **case.options(), target=Target("mosaic", "gpu", "NVIDIA GPU", capability))


def test_a_negative_scale_is_refused():
    case = AttentionCase(Packed((5,)), head_dim=64, dtype="bfloat16")
    with pytest.raises(BackendUnavailable, match="scale=-1 is not positive"):
        attention(*case.arrays(), **case.options() | {"scale": -1}, target=Target("mosaic", "gpu", H100, "9.0"))
