"""No backend's attention visits more key blocks than its query blocks see, however much of a bucket is padding.

A visit whose result is thrown away changes no output, so it is counted where the kernel makes it.
"""

import jax
import numpy as np
import pytest
from triton.runtime.interpreter import InterpreterBuilder

from funnel_kernels import attention
from funnel_kernels.attention import pallas_tpu, triton_gpu, xla
from option_grid import AttentionCase, Packed, target

PADDING = {"no padding": 0, "7 % padding": 72, "45 % padding": 784}  # rows behind those of the sequences
padded = pytest.mark.parametrize(
    "tail",
    [
        pytest.param(tail, id=name, marks=pytest.mark.grid if name.startswith("7") else ())
        for name, tail in PADDING.items()
    ],
)


def case_of(tail):
    return AttentionCase(Packed((60,) * 16, tail=tail), heads=2, head_dim=64)


def attend(case, backend):
    return np.asarray(jax.block_until_ready(attention(*case.arrays(), **case.options(), target=target(backend))))


def needed(case, block_q, block_k):
    """Key blocks between the first and the last key that a block of query rows sees, summed over those blocks."""
    lo, hi, _ = case.layout.intervals()
    total = 0
    for start in range(0, len(lo), block_q):
        rows = zip(lo[start : start + block_q], hi[start : start + block_q], strict=True)
        if seen := [(first, last) for first, last in rows if first < last]:
            total += -(-max(last for _, last in seen) // block_k) - min(first for first, _ in seen) // block_k
    return total


@padded
def test_triton(monkeypatch, tail):
    case, products, create_dot = case_of(tail), [], InterpreterBuilder.create_dot
    monkeypatch.setattr(InterpreterBuilder, "create_dot", lambda *a: products.append(a) or create_dot(*a))
    attend(case, "triton")
    block_q, block_k, *_ = triton_gpu.rule(case.head_dim, np.float32, 90)
    assert len(products) == 2 * needed(case, block_q // case.heads, block_k)


@padded
def test_tpu(interpreted_pallas, monkeypatch, tail):
    case, plans, plan = case_of(tail), [], pallas_tpu.plan_visits
    monkeypatch.setattr(pallas_tpu, "plan_visits", lambda *a: plans.append(plan(*a)) or plans[-1])
    attend(case, "tpu")
    ((begin, visits),) = plans
    block_q, block_k, _ = pallas_tpu.rule()
    assert np.sum(~pallas_tpu.decode(visits[: begin[-1]]).empty) == needed(case, block_q, block_k)


@padded
def test_xla(monkeypatch, tail):
    case, products, product = case_of(tail), [], xla.product

    def counted(*operands, **options):
        jax.debug.callback(lambda: products.append(operands))
        return product(*operands, **options)

    monkeypatch.setattr(xla, "product", counted)
    attend(case, "xla")
    jax.effects_barrier()
    rows = 960 + tail
    block_q, block_k = xla.even_block(rows, xla.MOST_QUERIES_PER_BLOCK), xla.even_block(rows, xla.KEYS_PER_BLOCK)
    assert len(products) == 2 * needed(case, block_q, block_k)


@padded
def test_cpu(tail):
    """A visit adds 0 times each value that a row does not see, which is NaN here, and NaN is what the row gets then."""
    case = case_of(tail)
    q, k, v, lo, hi = case.arrays()
    attended = jax.jit(lambda k, v: attention(q, k, v, lo, hi, **case.options(), target=target("cpu")))
    clean = np.asarray(attended(k, v))
    for sequence in (0, 7, 15):
        rows = np.arange(960 + tail) // 60
        poisoned = [np.where((rows == sequence)[:, None], np.float32(np.nan), array) for array in (k, v)]
        out = np.asarray(attended(*poisoned))
        assert np.isnan(out[rows == sequence]).all()
        far = np.abs(rows - sequence) > 1  # neighbours may share a strip of rows
        np.testing.assert_array_equal(out[far], clean[far])
