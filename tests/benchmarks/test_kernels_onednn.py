"""`kernels.onednn_product`: the product of oneDNN that ours is measured against."""

import numpy as np
import pytest

import funnel_native
from funnel_benchmarks.kernels import onednn_product


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 4e-3)])
def test_product(dtype, tolerance, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    task = {"rows": 7, "in": 33, "out": 19, "dtype": dtype}
    if dtype == "bfloat16" and funnel_native.handlers().instruction_set() == "avx2":
        with pytest.raises(RuntimeError, match="oneDNN returned status 3"):  # it has none at all
            onednn_product.make(task)
        return
    call, facts = onednn_product.make(task)
    x, weight = (np.float64(operand) for operand in onednn_product.operands(task))
    result = call(0)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, x @ weight.T, rtol=tolerance, atol=tolerance * 33)
    assert facts["implementation"]


def test_operands_have_the_sizes_and_dtype_that_are_asked_for():
    x, weight = onednn_product.operands({"rows": 3, "in": 5, "out": 7, "dtype": "bfloat16"})
    assert (x.shape, weight.shape) == ((3, 5), (7, 5))
    assert (str(x.dtype), str(weight.dtype)) == ("bfloat16", "bfloat16")
    assert np.float32(x).std() > 0.5


def test_what_onednn_refuses_is_an_error():
    with pytest.raises(RuntimeError, match="oneDNN returned status 2"):
        onednn_product.OneDNN().layout((-1, 4), np.dtype(np.float32))
