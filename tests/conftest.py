"""Kernels for GPUs and TPUs are interpreted on the CPU: Triton's, and Pallas's in a simulated TPU."""

import functools
import os
import shutil
import tempfile

os.environ["TRITON_INTERPRET"] = "1"  # read by Triton when a kernel is defined
# Most programs of the tests take longer to compile than to run: LLVM does not optimise them, which saves much of the
# time. `XLA_FLAGS= pytest` compiles them as they are in use.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as tpu_interpreter
from jax.experimental.compilation_cache import compilation_cache
from jax.experimental.pallas import tpu as pltpu

from funnel_kernels.attention import pallas_tpu as pallas_attention

CACHE = "JAX_COMPILATION_CACHE_DIR"  # in the environment, where workers and subprocesses find it too


def pytest_configure(config):
    """Engines of many tests have the same programs. All processes of a run share them, in a folder of the run."""
    if CACHE not in os.environ:
        os.environ[CACHE] = tempfile.mkdtemp(prefix="funnel-tests-")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        config.add_cleanup(functools.partial(shutil.rmtree, os.environ[CACHE], ignore_errors=True))
    jax.config.update("jax_compilation_cache_dir", os.path.abspath(os.environ[CACHE]))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture
def other_programs():
    """For a test that sets where the whole process keeps its compiled programs."""
    before = jax.config.values["jax_compilation_cache_dir"]
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


@pytest.fixture
def interpreted_pallas(monkeypatch):
    """A race in a simulated TPU fails the test. Blocks are small, so that small cases have several of them."""
    monkeypatch.setattr(pallas_attention, "rule", lambda *_: pallas_attention.Sizes(128, 128, 128))
    yield
    races = tpu_interpreter.races
    pltpu.reset_tpu_interpret_mode_state()
    assert races is None or not races.races_found


@pytest.fixture(autouse=True)
def simulated_tpu_where_the_backend_is_the_parameter(request):
    """Every test over the grid of backends looks for races."""
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("backend") == "tpu":
        request.getfixturevalue("interpreted_pallas")
