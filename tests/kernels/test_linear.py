"""The matrix products and `prepare`: every implementation against float64, and what is refused."""

import dataclasses
import itertools
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
    QuantizedWeight,
    Target,
    gated_linear,
    linear,
    linear_add_norm,
    prepare,
    project_heads,
    quantize,
)
from funnel_kernels.linear import ACTIVATIONS
from option_grid import (
    BACKENDS,
    DTYPES,
    EPS,
    LINEAR_ADD_NORM_CASES,
    LINEAR_CASES,
    OPERANDS,
    HeadsCase,
    LinearAddNormCase,
    LinearCase,
    biased_product,
    exact_product,
    few_of,
    normal,
    over_the_grid,
    packed_weight,
    target,
    without_ties,
)

FLOAT8 = ("reference", "xla")
SERVED = [backend for backend in BACKENDS if backend not in ("triton", "tpu")]  # these two are XLA's products
WIDE_ROUNDING = {"float32": 2**-22, "bfloat16": 2**-8}
ACTIVATED = {
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def exact(*arrays: np.ndarray | None) -> list[np.ndarray | None]:
    return [None if array is None else np.asarray(array, np.float64) for array in arrays]


def check(actual: jax.Array, expected: np.ndarray, size: np.ndarray, rounding: float) -> None:
    """`size` bounds the sum of the absolute values of everything that was added up."""
    error = np.abs(np.asarray(actual, np.float64) - expected)
    allowed = rounding * np.abs(expected) + 2**-20 * size
    assert (error <= allowed).all(), (error / allowed).max()


@over_the_grid("linear", SERVED)
def test_linear_agrees_with_float64(backend, case):
    x, weight, add = case.arrays()
    prepared = prepare(weight, target=target(backend))
    assert isinstance(prepared, PackedWeight) == (backend == "cpu")
    actual = jax.jit(lambda *arrays: linear(*arrays, target=target(backend)))(x, prepared, add)
    expected, size = exact_product(x, weight, backend)
    if add is not None:
        expected, size = expected + np.asarray(add, np.float64), size + np.abs(np.asarray(add, np.float64))
    assert actual.shape == (case.rows, case.out_features)
    assert actual.dtype == (x.dtype if case.add else jnp.float32)
    check(actual, expected, size, WIDE_ROUNDING[case.dtype] if case.add else 0.0)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize(
    ("backend", "case"),
    [
        (backend, LINEAR_CASES[f"130x48x600, {name}{add}"])
        for backend in SERVED
        for name in OPERANDS
        for add in ("", ", add")
        if (backend, OPERANDS[name][1]) != ("cpu", "float8_e4m3fn")
    ],
    ids=str,
)
def test_bias_and_activation_come_before_the_sum(backend, case, activation):
    x, weight, add = case.arrays()
    bias = normal(13, case.out_features).astype(x.dtype)
    options = {"bias": bias, "activation": activation, "target": target(backend)}
    actual = jax.jit(lambda *arrays: linear(*arrays, **options))(x, prepare(weight, target=target(backend)), add)
    product, size = exact_product(x, weight, backend)
    biased = product + np.asarray(bias, np.float64)
    expected = biased if activation is None else ACTIVATED[activation](biased)
    if add is not None:
        expected = expected + np.asarray(add, np.float64)
    assert actual.dtype == (x.dtype if case.add else jnp.float32)
    check(actual, expected, 4 * (1 + size), WIDE_ROUNDING[case.dtype] if case.add else 0.0)


@over_the_grid("gated_linear", SERVED)
def test_gated_linear_agrees_with_float64(backend, case):
    x, weight, up, *bias = case.arrays()

    def run(x, weight, up, bias=None):
        return gated_linear(x, weight, up, bias=bias, activation=case.gate, target=target(backend))

    actual = jax.jit(run)(x, prepare(weight, parts=case.parts, target=target(backend)), up, *bias)
    product, size = biased_product(x, weight, backend, bias)
    if up is None:
        (gate, up), sizes = (np.split(part, 2, axis=1) for part in (product, size))
    else:
        gate, up = product, np.asarray(up, np.float64)
        sizes = size, np.abs(up)
    expected = ACTIVATED[case.gate](gate) * up
    assert actual.shape == expected.shape
    assert actual.dtype == x.dtype
    check(actual, expected, (1 + sizes[0]) * (1 + sizes[1]), WIDE_ROUNDING[case.dtype])


@over_the_grid("linear_add_norm", [*SERVED, "auto"])  # where the norms may be native after a product of XLA's
def test_linear_add_norm_agrees_with_float64(backend, case):
    x, weight, add, norm_weight, update_weight, scale, *bias = case.arrays()

    def run(x, weight, add, norm_weight, update_weight, scale, bias=None):
        options = {"update_weight": update_weight, "scale": scale, "bias": bias}
        return linear_add_norm(x, weight, add, norm_weight, **options, eps=EPS, target=target(backend))

    prepared = prepare(weight, target=target(backend))
    total, normed = jax.jit(run)(x, prepared, add, norm_weight, update_weight, scale, *bias)
    assert total.shape == normed.shape == add.shape
    assert total.dtype == normed.dtype == x.dtype

    exact_add, factor, update_factor = exact(add, norm_weight, update_weight)
    update, size = biased_product(x, weight, backend, bias)
    if case.normed:
        normalise = (1 + update_factor) / np.sqrt((update**2).mean(1, keepdims=True) + EPS)
        update, size = update * normalise, size * np.abs(normalise)
    if case.scaled:
        exact_add, update, size = (array * float(scale[0]) for array in (exact_add, update, size))
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


SUMS = {name: case for name, case in LINEAR_ADD_NORM_CASES.items() if case.dtype == "bfloat16"}


@pytest.mark.parametrize("name", few_of(SUMS))
def test_what_an_accelerator_sums_is_two_roundings_from_float64(name):
    case = SUMS[name]
    x, weight, add, _, update_weight, scale, *bias = case.arrays()
    norm_weight = np.ones(case.width, np.float32)
    options = {"update_weight": update_weight, "scale": scale, "bias": bias[0] if bias else None}
    total, _ = linear_add_norm(x, weight, add, norm_weight, **options, eps=EPS, target=Target("xla", "gpu"))
    exact_add, update_factor = exact(add, update_weight)
    update, size = biased_product(x, weight, "xla", bias)
    if case.normed:
        normalise = (1 + update_factor) / np.sqrt((update**2).mean(1, keepdims=True) + EPS)
        update, size = update * normalise, size * np.abs(normalise)
    if case.scaled:
        exact_add, update, size = (array * float(scale[0]) for array in (exact_add, update, size))
    expected = exact_add + update
    sums = np.abs(expected) * (2 if case.scaled else 1)  # the scaled sum is rounded again
    error = np.abs(np.asarray(total, np.float64) - expected)
    assert (error <= 2**-8 * (np.abs(update) + sums) + 2**-20 * (np.abs(exact_add) + size)).all()


def exact_heads(case: HeadsCase, backend: str) -> list[np.ndarray]:
    """Each group of heads, [N, count * d] float64: pairs of a head as complex numbers, turned by multiplication."""
    x, weight, cos, sin, norms, *bias = case.arrays()
    cos, sin = exact(cos, sin)
    product = biased_product(x, weight, backend, bias)[0].reshape(case.rows, -1, case.head_dim)
    first, groups = 0, []
    for index, count in enumerate([*case.heads, *[case.plain_heads] * bool(case.plain_heads)]):
        group = product[:, first : first + count]
        first += count
        if index < case.normed:
            rms = np.sqrt((group**2).sum(-1, keepdims=True) / case.head_dim + case.options()["eps"])
            group = group / rms * (1 + np.asarray(norms[index], np.float64))
        if index < len(case.heads):
            pairs = group[..., : case.head_dim // 2] + 1j * group[..., case.head_dim // 2 :]
            pairs = pairs * (cos + 1j * sin)[:, None]
            group = np.concatenate([pairs.real, pairs.imag], axis=-1)
        groups.append(group)
    return [group.reshape(case.rows, -1) for group in groups]


@over_the_grid("project_heads", SERVED)
def test_project_heads_agrees_with_float64(backend, case):
    x, weight, *others = case.arrays()

    def run(x, weight, cos, sin, norms, bias=None):
        return project_heads(x, weight, cos, sin, norms, bias=bias, **case.options(), target=target(backend))

    results = jax.jit(run)(x, prepare(weight, target=target(backend)), *others)
    expected = exact_heads(case, backend)
    assert len(results) == len(expected)
    for actual, group in zip(results, expected, strict=True):
        assert actual.shape == group.shape
        assert actual.dtype == x.dtype
        check(actual, group, np.full(group.shape, 8.0), WIDE_ROUNDING[case.dtype])


@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("backend", ["triton", "tpu"])
def test_on_accelerators_the_products_are_xlas(backend, weights):
    x, weight, add = LinearCase(16, 24, 40, add=True, weights=weights).arrays()
    theirs = target(backend)
    targets = theirs, dataclasses.replace(theirs, backend="xla")
    assert prepare(weight, target=theirs) is weight
    assert len({np.asarray(linear(x, weight, add, target=each)).tobytes() for each in targets}) == 1
    assert len({np.asarray(gated_linear(x, weight, activation="silu", target=each)).tobytes() for each in targets}) == 1
    arrays = LinearAddNormCase(5, 24, 40, weights=weights).arrays()[:4]
    results = [linear_add_norm(*arrays, eps=EPS, target=each) for each in targets]
    assert all((ours == expected).all() for ours, expected in zip(*results, strict=True))
    case = HeadsCase(5, 24, 8, (3, 1), 1, normed=3, weights=weights)
    results = [project_heads(*case.arrays(), **case.options(), target=each) for each in targets]
    assert all((ours == expected).all() for ours, expected in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_quantized_weight_is_near_the_weight(dtype):
    """Each value is at most half a step away, and the largest of its row is 127 steps."""
    weight = LinearCase(1, 300, 7000, dtype).arrays()[1]  # more than one piece
    quantized = quantize(weight)
    exact_weight, scale = np.asarray(weight, np.float64), np.asarray(quantized.scale, np.float64)
    assert (quantized.values.dtype, quantized.scale.dtype) == (np.int8, np.float32)
    assert quantized.shape == weight.shape
    np.testing.assert_array_equal(np.abs(quantized.values).max(axis=1), 127)
    np.testing.assert_allclose(scale * 127, np.abs(exact_weight).max(axis=1), rtol=1e-6)
    assert (np.abs(quantized.values * scale[:, None] - exact_weight) <= scale[:, None] * 0.50001).all()
    np.testing.assert_array_equal(quantized.astype(np.float32), quantized.values * quantized.scale[:, None])
    again = quantize(quantized.astype(np.float32))
    np.testing.assert_array_equal(again.values, quantized.values)
    np.testing.assert_allclose(again.scale, quantized.scale, rtol=2e-7)


def test_rows_without_a_value_and_with_tiny_or_huge_ones():
    """No scale is NaN, and no value overflows an int8."""
    weight = np.array([[0, 0, 0], [1e-45, -2e-45, 0], [2e-43, -1e-43, 3e-44], [3e38, -3e38, 1e38], [5, 2.5, -5]], "f4")
    quantized = quantize(weight)
    np.testing.assert_array_equal(quantized.scale[:2], 0)
    np.testing.assert_array_equal(quantized.values, [[0] * 3, [0] * 3, *quantized.values[2:4], [127, 64, -127]])
    assert (np.abs(quantized.values.astype(int)) <= 127).all()
    np.testing.assert_allclose(quantized.astype(np.float32), weight, rtol=0.02, atol=1e-42)
    for bad in (np.nan, np.inf, -np.inf):
        weight[3, 1] = bad
        with pytest.raises(InputError, match="row 3 of the weight contains NaN or infinity"):
            quantize(weight)


@pytest.mark.parametrize("backend", SERVED)
def test_rows_of_zeros_and_integers_at_the_end_of_their_range(backend):
    """`quantize` makes no -128, but a file may contain it. A row or a group of zeros gives 0 and not NaN."""
    generator = np.random.default_rng(5)
    values = generator.integers(-128, 128, (96, 300)).astype(np.int8)
    values[:4], values[4:8], values[8] = -128, 127, 0
    weight = QuantizedWeight(values, generator.random(96, np.float32))
    x = without_ties(generator.standard_normal((9, 300)).astype(np.float32), "int8")
    x[1], x[2, :256], x[3], x[4], x[5] = 0, 0, -1, 1, 1e-40
    actual = linear(x, prepare(weight, target=target(backend)), target=target(backend))
    expected, size = exact_product(x, weight, backend)
    check(actual, expected, size + 1e-25, 0.0)
    assert not np.asarray(actual)[1].any()


@pytest.mark.parametrize(
    ("backend", "weights"), [*((backend, "int8") for backend in SERVED), *((b, "float8_e4m3fn") for b in FLOAT8)]
)
def test_a_row_that_is_not_finite_spoils_only_itself(backend, weights):
    x, weight, _ = LinearCase(5, 300, 70, weights=weights).arrays()
    run = lambda x: np.asarray(linear(x, prepare(weight, target=target(backend)), target=target(backend)))  # noqa: E731
    expected = run(x)
    for bad in (np.nan, np.inf):
        broken = x.copy()
        broken[2, 7] = bad
        actual = run(broken)
        assert not np.isfinite(actual[2]).any()
        np.testing.assert_array_equal(np.delete(actual, 2, 0), np.delete(expected, 2, 0))


def test_a_weight_of_float8_is_near_the_weight():
    """A value is at most half a step away: 3 bits of mantissa, exponents from -6. The largest of a row is 448."""
    weight = LinearCase(1, 300, 7000).arrays()[1]
    quantized = quantize(weight, "float8_e4m3fn")
    values, scale = (np.asarray(part, np.float64) for part in (quantized.values, quantized.scale[:, None]))
    assert (quantized.dtype, quantized.scale.dtype) == (jnp.float8_e4m3fn, np.float32)
    np.testing.assert_array_equal(np.abs(values).max(axis=1), 448)
    error = np.abs(values * scale - weight)
    assert (error <= np.maximum(np.abs(weight) * 2.0**-4, scale * 2.0**-10) * 1.00001).all()
    assert (error > np.abs(weight) * 2.0**-5).any()
    zeros = quantize(np.zeros((2, 3), np.float32), "float8_e4m3fn")
    assert not np.asarray(zeros.values, np.float32).any()
    assert not zeros.scale.any()
    with pytest.raises(InputError, match="NaN or infinity, which float8_e4m3fn cannot represent"):
        quantize(np.full((2, 3), np.inf, np.float32), "float8_e4m3fn")
    with pytest.raises(
        InputError, match="dtype='int4' is not one that weights are quantized to; choose int8 or float8"
    ):
        quantize(weight, "int4")


@pytest.mark.parametrize("backend", FLOAT8)
def test_rows_of_zeros_times_float8(backend):
    x, weight, _ = LinearCase(5, 48, 30, weights="float8_e4m3fn").arrays()
    x[1], x[2] = 0, 1e-40
    actual = np.asarray(linear(x, weight, target=target(backend)))
    assert not actual[1:3].any()
    assert np.isfinite(actual).all()


def test_the_kernels_for_cpus_refuse_float8():
    x, weight, add = LinearCase(5, 48, 48, add=True, weights="float8_e4m3fn").arrays()
    assert prepare(weight, target=target("cpu")) is weight
    refused = pytest.raises(BackendUnavailable, match="cpu: no processor multiplies float8; use int8 weights on a CPU")
    with refused:
        linear(x, weight, target=target("cpu"))
    with refused:
        linear_add_norm(x, weight, add, x[0], eps=EPS, target=target("cpu"))
    np.testing.assert_array_equal(linear(x, weight, target=target("auto")), linear(x, weight, target=target("xla")))


@pytest.mark.parametrize(
    ("platform", "architecture", "dtype"),
    [
        ("gpu", "9.0", "float8_e4m3fn"),
        ("gpu", "8.9", "float8_e4m3fn"),
        ("gpu", "8.0", "bfloat16"),
        ("tpu", "", "bfloat16"),
    ],
)
def test_where_the_device_has_float8_it_multiplies_it(platform, architecture, dtype):
    x, weight, _ = LinearCase(5, 48, 30, "bfloat16", weights="float8_e4m3fn").arrays()
    device = Target("xla", platform, "some device", architecture)
    equations = jax.make_jaxpr(lambda x: linear(x, weight, target=device))(x).eqns
    (product,) = [equation for equation in equations if equation.primitive.name == "dot_general"]
    assert [operand.aval.dtype for operand in product.invars] == [jnp.dtype(dtype)] * 2


def test_rows_of_a_quantized_weight_can_be_taken():
    x, weight, _ = LinearCase(5, 48, 300, weights="int8").arrays()
    part = weight[10:77]
    assert part.shape == (67, 48)
    for backend in ("reference", "xla"):
        whole = linear(x, weight, target=target(backend))
        np.testing.assert_allclose(linear(x, part, target=target(backend)), whole[:, 10:77], rtol=1e-5, atol=1e-6)


def test_a_product_of_integers_has_no_derivative():
    """Rounding has the derivative 0, which would silently train nothing."""
    x, weight, _ = LinearCase(5, 48, 30, weights="int8").arrays()
    with pytest.raises(InputError, match="8-bit weights has no derivative; train float weights, then quantize them"):
        jax.grad(lambda x: linear(x, weight, target=target("reference")).sum())(x)


def test_large_gates_neither_overflow_nor_vanish():
    """Both activations are x for large x and 0 for very negative ones, where their exponentials over- and underflow."""
    gates = np.array([-1e30, -200.0, -50.0, -20.0, 20.0, 50.0, 200.0, 1e30], np.float32)
    weight = np.concatenate([gates, np.ones(8, np.float32)])[:, None]
    for backend, activation in itertools.product(SERVED, ACTIVATIONS):
        prepared = prepare(weight, parts=2, target=target(backend))
        x = np.ones((1, 1), np.float32)
        out = gated_linear(x, prepared, activation=activation, target=target(backend))
        np.testing.assert_allclose(np.asarray(out)[0], np.maximum(gates, 0), rtol=1e-6, atol=1e-6)


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
            gated_linear(x, packed_weight(weight, 2), activation="silu", target=target(backend))
    with pytest.raises(BackendUnavailable, match=r"cpu: the weight is not packed \(funnel_kernels.prepare\)"):
        linear(x, weight, target=target("cpu"))
    np.testing.assert_allclose(linear(x, weight, target=target()), x @ weight.T, rtol=1e-4, atol=1e-5)  # auto goes on


def test_after_a_product_that_is_xlas_the_norms_are_native_all_the_same():
    x, weight, add, norm_weight, update_weight, _ = LinearAddNormCase(37, 48, 64, normed=True).arrays()
    run = jax.jit(lambda *arrays: linear_add_norm(*arrays[:4], update_weight=arrays[4], eps=EPS, target=target()))
    program = run.lower(x, weight, add, norm_weight, update_weight).as_text()
    assert "dot_general" in program
    assert "funnel_add_norm" in program
    assert "funnel_linear" not in program


def test_what_does_not_fit_is_refused():
    x, weight, add = LinearCase(4, 32, 64, add=True).arrays()
    packed = packed_weight(weight)
    half, integers = weight.astype(jnp.bfloat16), quantize(weight)
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
        ((x, integers.values), "weight is int8"),
        ((x[:, :16], integers), r"weight has shape \(64, 32\); it must have shape \(64, 16\)"),
        ((x, QuantizedWeight(weight, integers.scale)), "weight is float32 .* must be a matrix of int8 or float8"),
        ((x, QuantizedWeight(integers.values, integers.scale.astype(np.float64))), "scales of float64; it must be"),
        ((x, QuantizedWeight(integers.values, integers.scale[1:])), r"scale of weight has shape \(63,\)"),
        ((x, QuantizedWeight(integers.values[0], integers.scale)), r"int8 \(32,\) with scales"),
    ):
        with pytest.raises(InputError, match=message):
            linear(*arrays, target=target())
    with pytest.raises(InputError, match="packed in 1 parts, but this product needs 2"):
        gated_linear(x, packed, activation="silu", target=target())
    with pytest.raises(InputError, match="packed in 2 parts, but this product needs 1"):
        gated_linear(x, packed_weight(weight, 2), add, activation="silu", target=target())
    with pytest.raises(InputError, match=r"up has shape \(4, 63\); it must have shape \(4, 64\)"):
        gated_linear(x, packed, add[:, :63], activation="silu", target=target())
    with pytest.raises(InputError, match="up is bfloat16; it must be float32"):
        gated_linear(x, packed, add.astype(jnp.bfloat16), activation="silu", target=target())
    with pytest.raises(InputError, match=r"scale has shape \(2,\); it must have shape \(1,\)"):
        linear_add_norm(x, weight, add, weight[:, 0], scale=np.ones(2, np.float32), eps=EPS, target=target())
    table = np.ones((4, 32), np.float32)
    for bias, message in (
        (np.ones(63, np.float32), r"bias has shape \(63,\); it must have shape \(64,\)"),
        (np.ones((64, 1), np.float32), r"bias has shape \(64, 1\); it must have 1 ax"),
        (np.ones(64, np.int32), "bias is int32"),
    ):
        with pytest.raises(InputError, match=message):
            linear(x, weight, bias=bias, target=target())
        with pytest.raises(InputError, match=message):
            gated_linear(x, weight, bias=bias, activation="silu", target=target())
        with pytest.raises(InputError, match=message):
            linear_add_norm(x, weight, add, weight[:, 0], bias=bias, eps=EPS, target=target())
        with pytest.raises(InputError, match=message):
            project_heads(x, weight, table, table, (None,), heads=(1,), bias=bias, eps=EPS, target=target())
    with pytest.raises(InputError, match="63 rows; the number must be even"):
        gated_linear(x, weight[:63], activation="silu", target=target())
    with pytest.raises(InputError, match="activation='gelu' must be one of gelu_tanh, silu"):
        gated_linear(x, weight, activation="gelu", target=target())
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
    x, weight, cos, sin, norms = HeadsCase(4, 32, 64, (2, 1), 1, normed=3).arrays()
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
        ((x, weight, cos, sin, norms[:1]), {}, "norms has 1 entries for 3 groups"),
        (
            (x, weight, cos, sin, (norms[0], norms[1][:5], None)),
            {},
            r"norm has shape \(5,\); it must have shape \(64,\)",
        ),
        ((x, packed_weight(weight, 2), cos, sin), {}, "packed in 2 parts"),
    ):
        with pytest.raises(InputError, match=message):
            project_heads(*(arrays if len(arrays) == 5 else (*arrays, norms)), **right | changed, target=target())
