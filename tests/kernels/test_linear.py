"""The matrix products and `prepare`: every implementation against float64, and what is refused."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from funnel_kernels import (
    BackendUnavailable,
    InputError,
    PackedWeight,
    Target,
    gated_linear,
    linear,
    linear_add_norm,
    prepare,
    project_heads,
)
from option_grid import (
    BACKENDS,
    DTYPES,
    EPS,
    GATED_CASES,
    HEADS_CASES,
    LINEAR_ADD_NORM_CASES,
    LINEAR_CASES,
    HeadsCase,
    LinearAddNormCase,
    LinearCase,
    packed_weight,
    target,
)

SERVED = [backend for backend in BACKENDS if backend not in ("triton", "tpu")]  # these two are XLA's products
WIDE_ROUNDING = {"float32": 2**-22, "bfloat16": 2**-8}


def exact(*arrays: np.ndarray | None) -> list[np.ndarray | None]:
    return [None if array is None else np.asarray(array, np.float64) for array in arrays]


def check(actual: jax.Array, expected: np.ndarray, size: np.ndarray, rounding: float) -> None:
    """`size` bounds the sum of the absolute values of everything that was added up."""
    error = np.abs(np.asarray(actual, np.float64) - expected)
    allowed = rounding * np.abs(expected) + 2**-20 * size
    assert (error <= allowed).all(), (error / allowed).max()


@pytest.mark.parametrize("case", LINEAR_CASES.values(), ids=LINEAR_CASES.keys())
@pytest.mark.parametrize("backend", SERVED)
def test_linear_agrees_with_float64(backend, case):
    x, weight, add = case.arrays()
    prepared = prepare(weight, target=target(backend))
    assert isinstance(prepared, PackedWeight) == (backend == "cpu")
    actual = jax.jit(lambda *arrays: linear(*arrays, target=target(backend)))(x, prepared, add)
    exact_x, exact_weight, exact_add = exact(x, weight, add)
    assert actual.shape == (case.rows, case.out_features)
    assert actual.dtype == (x.dtype if case.add else jnp.float32)
    expected = exact_x @ exact_weight.T + (0.0 if exact_add is None else exact_add)
    size = np.abs(exact_x) @ np.abs(exact_weight.T) + (0.0 if exact_add is None else np.abs(exact_add))
    check(actual, expected, size, WIDE_ROUNDING[case.dtype] if case.add else 0.0)


@pytest.mark.parametrize("case", GATED_CASES.values(), ids=GATED_CASES.keys())
@pytest.mark.parametrize("backend", SERVED)
def test_gated_linear_agrees_with_float64(backend, case):
    x, weight, _ = case.arrays()
    actual = jax.jit(lambda *arrays: gated_linear(*arrays, target=target(backend)))(
        x, prepare(weight, parts=2, target=target(backend))
    )
    exact_x, exact_weight = exact(x, weight)
    gate, up = exact_x @ exact_weight[: case.out_features].T, exact_x @ exact_weight[case.out_features :].T
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    expected = 0.5 * gate * (1 + np.tanh(inner)) * up
    assert actual.shape == expected.shape
    assert actual.dtype == x.dtype
    sizes = [np.abs(exact_x) @ np.abs(part.T) for part in np.split(exact_weight, 2)]
    check(actual, expected, (1 + sizes[0]) * (1 + sizes[1]), WIDE_ROUNDING[case.dtype])


@pytest.mark.parametrize("case", LINEAR_ADD_NORM_CASES.values(), ids=LINEAR_ADD_NORM_CASES.keys())
@pytest.mark.parametrize("backend", [*SERVED, "auto"])  # where the norms may be native after a product of XLA's
def test_linear_add_norm_agrees_with_float64(backend, case):
    x, weight, add, norm_weight, update_weight = case.arrays()
    run = jax.jit(
        lambda *arrays: linear_add_norm(*arrays[:4], update_weight=arrays[4], eps=EPS, target=target(backend))
    )
    total, normed = run(x, prepare(weight, target=target(backend)), add, norm_weight, update_weight)
    assert total.shape == normed.shape == add.shape
    assert total.dtype == normed.dtype == x.dtype

    exact_x, exact_weight, exact_add, factor, update_factor = exact(x, weight, add, norm_weight, update_weight)
    update, size = exact_x @ exact_weight.T, np.abs(exact_x) @ np.abs(exact_weight.T)
    if case.normed:
        scale = (1 + update_factor) / np.sqrt((update**2).mean(1, keepdims=True) + EPS)
        update, size = update * scale, size * np.abs(scale)
    check(total, exact_add + update, np.abs(exact_add) + size, WIDE_ROUNDING[case.dtype])
    rounded = np.asarray(total, np.float64)  # which is what the norm reads
    expected = rounded / np.sqrt((rounded**2).mean(1, keepdims=True) + EPS) * (1 + factor)
    check(normed, expected, np.ones_like(expected), WIDE_ROUNDING[case.dtype])


@pytest.mark.parametrize("normed", [False, True], ids=["plain update", "normed update"])
@pytest.mark.parametrize(("platform", "wide"), [("cpu", "f32"), ("gpu", "bf16"), ("tpu", "bf16")])
def test_an_accelerator_sums_the_residual_stream_in_its_own_dtype(platform, wide, normed):
    """XLA for GPUs leaves out the rounding of a float32 sum, and the stream becomes float32 altogether."""
    shapes = [(5, 16), (24, 16), (5, 24), (24,), (24,)]
    x, weight, add, factor, update_factor = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)

    def run(x, weight, add, factor, update_weight):
        return linear_add_norm(
            x, weight, add, factor, update_weight=update_weight, eps=EPS, target=Target("xla", platform)
        )

    exported = export.export(jax.jit(run), platforms=["cuda" if platform == "gpu" else platform])(
        x, weight, add, factor, update_factor if normed else None
    )
    text = exported.mlir_module()
    assert re.findall(r"stablehlo\.add .* : tensor<5x24x(\w+)>", text) == [wide]
    product = "f32" if normed else wide  # a norm reads it unrounded
    assert re.findall(r"stablehlo\.dot_general .* -> tensor<5x24x(\w+)>", text) == [product]


@pytest.mark.parametrize("case", [case for case in LINEAR_ADD_NORM_CASES.values() if case.dtype == "bfloat16"], ids=str)
def test_what_an_accelerator_sums_is_two_roundings_from_float64(case):
    x, weight, add, _, update_weight = case.arrays()
    norm_weight = np.ones(case.width, np.float32)
    options = {"update_weight": update_weight, "eps": EPS, "target": Target("xla", "gpu")}
    total, _ = linear_add_norm(x, weight, add, norm_weight, **options)
    exact_x, exact_weight, exact_add, update_factor = exact(x, weight, add, update_weight)
    update, size = exact_x @ exact_weight.T, np.abs(exact_x) @ np.abs(exact_weight.T)
    if case.normed:
        scale = (1 + update_factor) / np.sqrt((update**2).mean(1, keepdims=True) + EPS)
        update, size = update * scale, size * np.abs(scale)
    expected = exact_add + update
    error = np.abs(np.asarray(total, np.float64) - expected)
    assert (error <= 2**-8 * (np.abs(update) + np.abs(expected)) + 2**-20 * (np.abs(exact_add) + size)).all()


def exact_heads(case: HeadsCase) -> list[np.ndarray]:
    """Each group of heads, [N, count * d] float64: pairs of a head as complex numbers, turned by multiplication."""
    x, weight, cos, sin, norms = case.arrays()
    x, weight, cos, sin = exact(x, weight, cos, sin)
    product = (x @ weight.T).reshape(case.rows, -1, case.head_dim)
    first, groups = 0, []
    for index, count in enumerate(case.heads):
        group = product[:, first : first + count]
        first += count
        if norms is not None:
            rms = np.sqrt((group**2).sum(-1, keepdims=True) / case.head_dim + case.options()["eps"])
            group = group / rms * (1 + np.asarray(norms[index], np.float64))
        pairs = (group[..., : case.head_dim // 2] + 1j * group[..., case.head_dim // 2 :]) * (cos + 1j * sin)[:, None]
        groups.append(np.concatenate([pairs.real, pairs.imag], axis=-1))
    if case.plain_heads:
        groups.append(product[:, first:])
    return [group.reshape(case.rows, -1) for group in groups]


@pytest.mark.parametrize("case", HEADS_CASES.values(), ids=HEADS_CASES.keys())
@pytest.mark.parametrize("backend", SERVED)
def test_project_heads_agrees_with_float64(backend, case):
    x, weight, *rest = case.arrays()
    results = jax.jit(lambda *arrays: project_heads(*arrays, **case.options(), target=target(backend)))(
        x, prepare(weight, target=target(backend)), *rest
    )
    expected = exact_heads(case)
    assert len(results) == len(expected)
    for actual, group in zip(results, expected, strict=True):
        assert actual.shape == group.shape
        assert actual.dtype == x.dtype
        check(actual, group, np.full(group.shape, 8.0), WIDE_ROUNDING[case.dtype])


@pytest.mark.parametrize("backend", ["triton", "tpu"])
def test_on_accelerators_the_products_are_xlas(backend):
    x, weight, add = LinearCase(16, 24, 40, add=True).arrays()
    theirs = target(backend)
    targets = theirs, dataclasses.replace(theirs, backend="xla")
    assert prepare(weight, target=theirs) is weight
    assert len({np.asarray(linear(x, weight, add, target=each)).tobytes() for each in targets}) == 1
    assert len({np.asarray(gated_linear(x, weight, target=each)).tobytes() for each in targets}) == 1
    arrays = LinearAddNormCase(5, 24, 40).arrays()[:4]
    results = [linear_add_norm(*arrays, eps=EPS, target=each) for each in targets]
    assert all((ours == expected).all() for ours, expected in zip(*results, strict=True))
    case = HeadsCase(5, 24, 8, (3, 1), 1, normed=True)
    results = [project_heads(*case.arrays(), **case.options(), target=each) for each in targets]
    assert all((ours == expected).all() for ours, expected in zip(*results, strict=True))


def test_large_gates_neither_overflow_nor_vanish():
    """gelu(x) is x for large x and 0 for very negative ones, where its exponential over- and underflows."""
    gates = np.array([-1e30, -200.0, -50.0, -20.0, 20.0, 50.0, 200.0, 1e30], np.float32)
    weight = np.concatenate([gates, np.ones(8, np.float32)])[:, None]
    for backend in SERVED:
        out = gated_linear(
            np.ones((1, 1), np.float32), prepare(weight, parts=2, target=target(backend)), target=target(backend)
        )
        np.testing.assert_allclose(np.asarray(out)[0], np.maximum(gates, 0), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_units_of_a_packed_weight_can_be_taken(dtype):
    x, weight, _ = LinearCase(5, 48, 300, dtype).arrays()
    packed = packed_weight(weight)
    for rows in (slice(0, 128), slice(64, 192), slice(256, None), slice(64, 300)):
        part = packed[rows]
        assert part.shape == weight[rows].shape
        assert (linear(x, part, target=target("cpu")) == linear(x, packed, target=target("cpu"))[:, rows]).all()
    for rows in (slice(0, 100), slice(10, 64)):
        with pytest.raises(ValueError, match="cannot be sliced"):
            packed[rows]
    with pytest.raises(ValueError, match="cannot be sliced"):
        packed_weight(weight, 2)[:64]


def test_a_packed_weight_replaces_the_plain_one():
    """No more memory than the weight, up to the end of the last unit."""
    for size in ((128, 256), (2560, 2048)):
        weight = np.zeros(size, jnp.bfloat16)
        assert packed_weight(weight).packed.nbytes == weight.nbytes
    packed = packed_weight(np.ones((65, 32), np.float32))
    assert prepare(packed, target=target("cpu")) is packed
    assert packed.packed.nbytes == 128 * 32 * 4


def test_only_backend_cpu_reads_a_packed_weight_and_only_that():
    x, weight, _ = LinearCase(4, 32, 64).arrays()
    packed = packed_weight(weight)
    for backend in ("reference", "xla"):
        with pytest.raises(BackendUnavailable, match=f"{backend}: the weight is packed for backend 'cpu'"):
            linear(x, packed, target=target(backend))
        with pytest.raises(BackendUnavailable, match="packed for backend 'cpu'"):
            gated_linear(x, packed_weight(weight, 2), target=target(backend))
    with pytest.raises(BackendUnavailable, match=r"cpu: the weight is not packed \(funnel_kernels.prepare\)"):
        linear(x, weight, target=target("cpu"))
    np.testing.assert_allclose(linear(x, weight, target=target()), x @ weight.T, rtol=1e-4, atol=1e-5)  # auto goes on


def test_after_a_product_that_is_xlas_the_norms_are_native_all_the_same():
    x, weight, add, norm_weight, update_weight = LinearAddNormCase(37, 48, 64, normed=True).arrays()
    run = jax.jit(lambda *arrays: linear_add_norm(*arrays[:4], update_weight=arrays[4], eps=EPS, target=target()))
    program = run.lower(x, weight, add, norm_weight, update_weight).as_text()
    assert "dot_general" in program
    assert "funnel_add_norm" in program
    assert "funnel_linear" not in program


def test_what_does_not_fit_is_refused():
    x, weight, add = LinearCase(4, 32, 64, add=True).arrays()
    packed = packed_weight(weight)
    half = x.astype(jnp.bfloat16)
    for arrays, message in (
        ((x[None], weight), r"x has shape \(1, 4, 32\)"),
        ((x.astype(np.float16), weight), "x is float16"),
        ((x, weight.astype(np.float16)), "weight is float16"),
        ((x, weight[:, :31]), r"weight has shape \(64, 31\); it must have shape \(64, 32\)"),
        ((half, weight), "weight is float32 and x bfloat16; cast the weight to bfloat16, or x to float32"),
        ((half, packed), "weight is float32 and x bfloat16; cast the weight to bfloat16, or x to float32"),
        ((x[:, :16], packed), r"weight has shape \(64, 32\); it must have shape \(64, 16\)"),
        ((x, weight, add[:, :5]), r"add has shape \(4, 5\); it must have shape \(4, 64\)"),
        ((x, weight, add.astype(jnp.bfloat16)), "add is bfloat16; it must be float32"),
        ((x[:0], weight), "needs at least one row"),
        ((x, packed_weight(weight, 2)), "packed in 2 parts, but this product needs 1"),
    ):
        with pytest.raises(InputError, match=message):
            linear(*arrays, target=target())
    with pytest.raises(InputError, match="packed in 1 parts, but this product needs 2"):
        gated_linear(x, packed, target=target())
    with pytest.raises(InputError, match="63 rows; the number must be even"):
        gated_linear(x, weight[:63], target=target())
    norm = np.ones(64, np.float32)
    for arrays, update_weight, message in (
        ((x, weight, add[:3], norm), None, r"add has shape \(3, 64\); it must have shape \(4, 64\)"),
        ((x, weight, add.astype(jnp.bfloat16), norm), None, "add is bfloat16; it must be float32"),
        ((x, weight, add, norm[1:]), None, r"norm_weight has shape \(63,\); it must have shape \(64,\)"),
        ((x, weight, add, norm), norm[None], r"update_weight has shape \(1, 64\); it must have 1 ax"),
        ((x, weight, add, norm), norm.astype(np.float16), "update_weight is float16"),
        ((x, packed_weight(weight, 2), add, norm), None, "packed in 2 parts"),
    ):
        with pytest.raises(InputError, match=message):
            linear_add_norm(*arrays, update_weight=update_weight, eps=EPS, target=target())
    x, weight, cos, sin, norms = HeadsCase(4, 32, 64, (2, 1), 1, normed=True).arrays()
    right = {"heads": (2, 1), "plain_heads": 1, "eps": 1e-6}
    for arrays, changed, message in (
        ((x, weight[:-1], cos, sin), {}, "weight has 255 rows; 4 heads of width 64 need 256"),
        ((x, weight, cos, sin), {"plain_heads": 0}, "3 heads of width 64 need 192"),
        ((x, weight, cos[:3], sin), {}, r"cos has shape \(3, 32\); it must have shape \(4, 32\)"),
        ((x, weight, cos, sin[:, 1:]), {}, r"sin has shape \(4, 31\)"),
        ((x, weight, cos.astype(jnp.bfloat16), sin), {}, "cos is bfloat16; it must be float32"),
        (
            (x, weight, cos, sin),
            {"heads": (2, 0), "plain_heads": 2},
            r"heads=\(2, 0\), plain_heads=2: heads must contain",
        ),
        ((x, weight, cos, sin), {"heads": (5,), "plain_heads": -1}, "plain_heads must be at least 0"),
        ((x, weight, cos, sin), {"heads": ()}, "at least one number"),
        ((x, weight, cos, sin, norms[:1]), {}, "norms has 1 weights for 2 groups"),
        ((x, weight, cos, sin, (norms[0], norms[1][:5])), {}, r"norm has shape \(5,\); it must have shape \(64,\)"),
        ((x, packed_weight(weight, 2), cos, sin), {}, "packed in 2 parts"),
    ):
        with pytest.raises(InputError, match=message):
            project_heads(*arrays, **right | changed, target=target())
