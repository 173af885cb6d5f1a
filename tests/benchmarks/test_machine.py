"""Machine facts that go into results."""

import json
import subprocess

import jax
import numpy as np

import funnel_native
from funnel_benchmarks import machine
from funnel_benchmarks.machine import git_revision, machine_facts, peak_memory_gb


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
