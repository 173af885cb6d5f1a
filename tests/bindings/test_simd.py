"""Exponential and hyperbolic tangent of the kernels in C++ against float64, over all their range."""

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
AVX512 = "-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl"
# As kernels/CMakeLists.txt compiles the kernels.
FLAGS = {"avx2": "-mavx2 -mfma", "avx512": AVX512, "avx512_vnni": f"{AVX512} -mavx512vnni"}
FLAGS["avx512_bf16"] = f"{FLAGS['avx512_vnni']} -mavx512bf16"
FLAGS["amx"] = FLAGS["avx512_bf16"]
INFINITY = np.float32(np.inf)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Compiles the functions for an instruction set."""
    folder = tmp_path_factory.mktemp("simd")

    def compiled(name: str) -> ctypes.CDLL:
        library = folder / f"{name}.so"
        if not library.exists():
            flags = f"-std=c++17 -O3 -shared -fPIC -ffp-contract=fast {FLAGS[name]} -DFUNNEL_INSTRUCTION_SET={name}"
            flags += f" -I{ROOT / 'kernels' / 'funnel_kernels'}"
            paths = [Path(__file__).with_name("simd_functions.cc"), "-o", library]
            subprocess.run(["g++", *flags.split(), *paths], check=True)
        return ctypes.CDLL(str(library))

    return compiled


@pytest.fixture
def evaluate(build, instruction_set):
    """Calls a function on a float32 vector."""
    functions = build(instruction_set)

    def values(name: str, x: np.ndarray) -> np.ndarray:
        y = np.full(len(x), np.nan, np.float32)
        pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (x, y)]
        getattr(functions, name)(*pointers, ctypes.c_int64(len(x)))
        return y

    return values


def between(low: float, high: float) -> np.ndarray:
    """A million values: evenly spread, of all sizes down to the smallest, and the two ends."""
    generator = np.random.default_rng(0)
    small = high * 2.0 ** -generator.uniform(0, 149, 2**18) * generator.choice([-1, 1], 2**18)
    spread = generator.uniform(low, high, 2**20 + 5)  # not a whole number of vectors
    return np.concatenate([np.clip(small, low, high), spread, [low, high, 0.0, -0.0]]).astype(np.float32)


def test_the_exponential_is_right_to_a_unit_in_the_last_place(evaluate):
    x = between(-87, 88)
    exact = np.exp(x.astype(np.float64))
    units = np.abs(evaluate("exponential", x) - exact) / np.spacing(exact.astype(np.float32))
    assert units.max() <= 1


def test_the_exponential_ends_at_zero_and_at_that_of_88(evaluate):
    below = np.array([np.nextafter(np.float32(-87), -INFINITY), -88, -104, -3e38, -INFINITY], np.float32)
    assert (evaluate("exponential", below) == 0).all()
    above = np.array([88, np.nextafter(np.float32(88), INFINITY), 89, 3e38, INFINITY], np.float32)
    np.testing.assert_allclose(evaluate("exponential", above), np.exp(88.0), rtol=1e-7)


def test_the_hyperbolic_tangent_is_right_to_2e_7(evaluate):
    x = np.concatenate([between(-20, 20), np.array([-3e38, -21, 21, 3e38, -INFINITY, INFINITY], np.float32)])
    error = np.abs(evaluate("hyperbolic_tangent", x) - np.tanh(x.astype(np.float64)))
    assert error.max() <= 2e-7
