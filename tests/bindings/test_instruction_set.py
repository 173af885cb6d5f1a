"""FUNNEL_CPU_ISA: older processors, simulated on this one."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import funnel_native
from funnel_engine.cli import main
from funnel_kernels import ConfigError, native_calls
from funnel_native import INSTRUCTION_SETS
from tiny_models import make_engine

PROCESSOR = funnel_native.handlers().processor()
# What oneDNN calls its best instruction set, by its bits: those of AVX2, and those that AVX-512 adds.
ONEDNN = {"avx2": 0x7, "avx512": 0x27, "avx512_vnni": 0x67, "avx512_bf16": 0xE7}
STATE = """
import ctypes, importlib.metadata, json
import funnel_native
module = funnel_native.handlers()
found = {
    "set": module.instruction_set(),
    "bfloat16": module.multiplies_bfloat16(),
    "onednn": ctypes.CDLL("libdnnl.so.3").dnnl_get_effective_cpu_isa(),
    "lifted": [module.limit_instruction_set(s) and module.instruction_set() for s in funnel_native.INSTRUCTION_SETS],
}
print(json.dumps(found))
"""


def best(*names: str) -> str:
    """The least of instruction sets."""
    return min(names, key=INSTRUCTION_SETS.index)


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_CPU_ISA")} | variables
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


@functools.cache
def state(**variables: str) -> dict:
    done = run(STATE, **variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("limit", INSTRUCTION_SETS)
def test_kernels_and_onednn_keep_to_the_limit(limit):
    found = state(FUNNEL_CPU_ISA=limit)
    assert found["set"] == best(limit, PROCESSOR)
    assert found["bfloat16"] == (best(limit, PROCESSOR) in ("avx512_bf16", "amx"))
    assert found["onednn"] & ~ONEDNN.get(limit, ~0) == 0


@pytest.mark.parametrize("limit", INSTRUCTION_SETS)
def test_within_a_process_nothing_lifts_it(limit):
    assert state(FUNNEL_CPU_ISA=limit)["lifted"] == [best(name, limit, PROCESSOR) for name in INSTRUCTION_SETS]


@pytest.mark.parametrize("variables", [{}, {"FUNNEL_CPU_ISA": ""}], ids=["unset", "empty"])
def test_without_a_limit_it_is_all_that_the_processor_has(variables):
    found = state(**variables)
    assert found["set"] == PROCESSOR
    assert found["bfloat16"] == (PROCESSOR in ("avx512_bf16", "amx"))


@pytest.mark.parametrize(
    ("limit", "onednn", "bits", "variable"),
    [
        pytest.param(limit, onednn, bits, variable, marks=() if row % 2 == column else pytest.mark.grid)
        for row, (limit, onednn, bits) in enumerate(
            [
                ("avx512_bf16", "AVX2", 0x7),
                ("avx512_vnni", "avx512_core", 0x27),
                ("avx512", "AVX512_CORE_VNNI", 0x27),
                ("avx2", "AVX512_CORE_AMX", 0x7),
                ("avx2", "ALL", 0x7),
            ]
        )
        for column, variable in enumerate(["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
    ],
)
def test_what_the_user_allows_onednn_is_not_raised(limit, onednn, bits, variable):
    assert state(FUNNEL_CPU_ISA=limit, **{variable: onednn})["onednn"] & ~bits == 0


def test_a_limit_that_comes_too_late_for_onednn_is_said():
    code = """
import ctypes, funnel_native
funnel_native.preload_onednn()
ctypes.CDLL("libdnnl.so.3").dnnl_get_effective_cpu_isa()
print(funnel_native.problem())
"""
    assert "FUNNEL_CPU_ISA comes too late: oneDNN is in use" in run(code, FUNNEL_CPU_ISA="avx2").stdout
    assert run(code).stdout == "None\n"


@pytest.fixture
def unknown(monkeypatch):
    caches = (funnel_native.problem, funnel_native.handlers, native_calls.problem)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setenv("FUNNEL_CPU_ISA", "sse2")
    yield "FUNNEL_CPU_ISA='sse2' must be one of avx2, avx512, avx512_vnni, avx512_bf16, amx; correct it or unset it"
    for cache in caches:
        cache.cache_clear()


def test_an_unknown_name_is_an_error(unknown):
    with pytest.raises(ConfigError, match=unknown):
        make_engine()
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 2
    assert unknown in result.output


def test_doctor_says_what_the_processor_has_and_the_limit():
    doctor = "from funnel_engine.cli import main; main(['doctor', '--json'])"
    assert json.loads(run(doctor).stdout)["instruction set"] == PROCESSOR
    facts = json.loads(run(doctor, FUNNEL_CPU_ISA="avx2").stdout)
    assert facts["instruction set"] == f"{PROCESSOR}, limited by FUNNEL_CPU_ISA=avx2"
    assert facts["gated_linear"] == facts["attention"] == "cpu"
    assert "without AVX-512-BF16, bfloat16 is multiplied in float32" in facts["cpu"]


@pytest.mark.parametrize("limit", INSTRUCTION_SETS)
def test_the_backend_serves_a_model_with_every_limit(limit):
    code = """
import numpy as np
from tiny_models import make_engine
for dtype, bound in (("float32", 1e-5), ("bfloat16", 0.02)):
    ours, xla = (make_engine(backend=backend, dtype=dtype).embed([[1, 2, 3]]) for backend in ("cpu", "xla"))
    assert ours.shape == (1, 24)
    np.testing.assert_allclose(ours, xla, rtol=0, atol=bound)
"""
    done = run(f"import sys; sys.path.append({str(Path(__file__).parents[1])!r})" + code, FUNNEL_CPU_ISA=limit)
    assert done.returncode == 0, done.stderr
