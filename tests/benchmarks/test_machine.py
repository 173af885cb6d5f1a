"""Machine facts that go into results."""

import json
import subprocess

import jax
import numpy as np
import pytest

import funnel_native
from funnel_benchmarks import machine
from funnel_benchmarks.machine import git_revision, machine_facts, peak_memory_gb
from funnel_kernels.errors import ConfigError


def test_facts_are_json_and_name_versions_but_no_paths():
    facts = machine_facts()
    assert facts["jax"] == jax.__version__
    assert facts["numpy"] == np.__version__
    assert len(facts["devices"]) == len(jax.devices())
    assert facts["cores"] >= 1
    assert facts["kernel_instruction_set"].startswith(funnel_native.handlers().processor())
    assert facts["memory_gb"] > 0
    text = json.dumps(facts)
    assert "/root" not in text
    assert "/home" not in text


def test_instruction_sets_are_those_of_the_processor(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    assert machine.instruction_sets() == []  # another system than Linux
    assert not machine.multiplies_bfloat16()
    one = "processor\t: {}\nmodel name\t: Imaginary 9000\nflags\t\t: fpu avx2 avx512f {}\n\n"
    for more, fast in (("avx512_vnni", False), ("avx512_bf16 avx512_vnni", True), ("amx_bf16 amx_tile", True)):
        machine.CPUINFO.write_text(one.format(0, more) + one.format(1, more))
        assert machine.cpu_model() == "Imaginary 9000"
        assert set(machine.instruction_sets()) == {"avx2", "avx512f", *more.split()} - {"amx_tile"}
        assert machine.multiplies_bfloat16() == fast


ALL = "avx2 avx512f avx_vnni avx512_vnni avx512_bf16 amx_int8 amx_bf16"


@pytest.mark.parametrize(
    ("limit", "allowed", "int8", "bfloat16"),
    [
        ("", ALL, True, True),
        ("amx", ALL, True, True),
        ("avx512_bf16", "avx2 avx512f avx_vnni avx512_vnni avx512_bf16", True, True),
        ("avx512", "avx2 avx512f", False, False),
        ("avx2", "avx2", False, False),
    ],
)
def test_a_limit_of_the_kernels_is_one_of_all(monkeypatch, tmp_path, limit, allowed, int8, bfloat16):
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    machine.CPUINFO.write_text(f"flags\t\t: fpu {ALL}\n")
    monkeypatch.setenv("FUNNEL_CPU_ISA", limit)
    assert machine.allowed_sets() == allowed.split()
    assert (machine.multiplies_int8(), machine.multiplies_bfloat16()) == (int8, bfloat16)
    assert machine.instruction_sets() == ALL.split()


def test_every_limit_allows_something_more(monkeypatch):
    assert set(funnel_native.INSTRUCTION_SETS) <= set(machine.INSTRUCTION_SETS.values())
    monkeypatch.setenv("FUNNEL_CPU_ISA", "sse")
    with pytest.raises(ConfigError, match="FUNNEL_CPU_ISA='sse' must be one of avx2"):
        machine.allowed_sets()


def test_peak_memory_covers_what_was_allocated():
    ballast = np.ones(50_000_000)  # 0.4 GB
    assert peak_memory_gb()["process"] > 0.4
    assert ballast[-1] == 1.0


def test_revision_of_tracked_files_only(tmp_path):
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    tracked, other = tmp_path / "tracked.py", tmp_path / "other.py"
    tracked.write_text("1\n")
    other.write_text("1\n")
    assert git_revision(tracked) is None  # no repository
    git("init", "--quiet")
    git("add", "tracked.py")
    git("commit", "--quiet", "--message", "one")
    assert git_revision(tracked) == git("rev-parse", "HEAD")[:12]
    assert git_revision(other) is None
    tracked.write_text("2\n")
    assert git_revision(tracked) == git("rev-parse", "HEAD")[:12] + "-dirty"
