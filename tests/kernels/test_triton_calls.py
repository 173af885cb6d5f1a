"""Where Triton's kernels run, and what is said where they do not."""

import dataclasses
import importlib.metadata
import os
import types

import jax.numpy as jnp
import pytest

import funnel_kernels.op as op_module
from funnel_kernels import BackendUnavailable, Record, Target, pool_norm, triton_calls
from funnel_kernels.target import Unsupported


@pytest.fixture(autouse=True)
def nothing_remembered():
    triton_calls.check_packages.cache_clear()
    yield
    triton_calls.check_packages.cache_clear()


def packages(monkeypatch, importable=True, **versions):
    """Pretends that these versions are installed, and nothing else."""

    def version(name):
        found = versions.get(name.replace("-", "_"))
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    def import_module(name):
        if not importable:
            raise TypeError("object.__new__() takes exactly one argument")
        return types.SimpleNamespace(pool_norm=lambda *arrays, **options: name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(triton_calls.importlib, "import_module", import_module)


@pytest.mark.parametrize(
    ("kind", "reported", "expected"),
    [("NVIDIA A100-SXM4-80GB", "8.0", 80), ("NVIDIA H200", "9.0", 90), ("NVIDIA GB10", "12.1", 121)],
)
def test_capability_is_that_of_the_gpu(kind, reported, expected):
    assert triton_calls.capability(Target("triton", "gpu", kind, reported)) == expected


@pytest.mark.parametrize(
    ("platform", "kind", "reported", "reason"),
    [
        ("cpu", "cpu", "", r"JAX runs on cpu; .* install jax\[cuda13\]"),
        ("tpu", "TPU v5 lite", "", r"JAX runs on tpu"),
        ("gpu", "Tesla T4", "7.5", r"Tesla T4 has compute capability 7.5; the kernels need 8.0"),
        (
            "gpu",
            "AMD Instinct MI300X",
            "gfx942",
            r"MI300X is not an NVIDIA GPU \(its architecture is gfx942\)",
        ),
    ],
)
def test_a_device_without_kernels_is_named(platform, kind, reported, reason):
    with pytest.raises(Unsupported, match=reason):
        triton_calls.capability(Target("triton", platform, kind, reported))


@pytest.mark.parametrize(("triton", "jax_triton"), [("3.6.0", "0.3.1"), ("3.9.0+cu130", "0.3.1"), ("3.10.1", "0.3.1")])
def test_versions_that_fit(monkeypatch, triton, jax_triton):
    packages(monkeypatch, triton=triton, jax_triton=jax_triton)
    triton_calls.check_packages()


@pytest.mark.parametrize(
    ("versions", "reason"),
    [
        ({}, "triton is not installed"),
        ({"triton": "3.7.1"}, "jax-triton is not installed"),
        (
            {"triton": "3.5.1", "jax_triton": "0.3.1"},
            "triton 3.5.1 is installed; .* need 3.6 or newer, below 4",
        ),
        ({"triton": "4.0.0", "jax_triton": "0.3.1"}, "triton 4.0.0 is installed"),
        (
            {"triton": "3.7.1", "jax_triton": "0.4.1"},
            "jax-triton 0.4.1 is installed; .* need 0.3.1 or newer, below 0.3.2",
        ),
        ({"triton": "3.7.1", "jax_triton": "0.3.0"}, "jax-triton 0.3.0 is installed"),
    ],
)
def test_packages_that_do_not_fit_are_named_with_the_remedy(monkeypatch, versions, reason):
    packages(monkeypatch, **versions)
    with pytest.raises(Unsupported, match=rf"{reason}.*; run: pip install 'funnel-engine\[triton\]'"):
        triton_calls.check_packages()


def test_a_package_that_breaks_on_import_is_a_refusal(monkeypatch):
    packages(monkeypatch, importable=False, triton="3.6.0", jax_triton="0.3.1")
    with pytest.raises(Unsupported, match=r"jax-triton cannot be imported \(object.__new__\(\) takes"):
        triton_calls.check_packages()


def test_a_refusal_reaches_the_caller_and_auto_goes_on_to_xla():
    x, real, weight = jnp.ones((4, 8)), jnp.ones(4, bool), jnp.zeros(8)
    options = {"stride": 2, "pool": "max", "eps": 1e-6}
    tesla = Target("triton", "gpu", "Tesla T4", "7.5", record=Record())
    with pytest.raises(BackendUnavailable, match=r"'triton': triton: Tesla T4 has compute capability 7.5"):
        pool_norm(x, real, weight, target=tesla, **options)
    pool_norm(x, real, weight, target=dataclasses.replace(tesla, backend="auto"), **options)
    assert tesla.record.backends() == ["xla"]
    facts = tesla.record.facts()
    assert facts["pool_norm"] == "xla"
    assert facts["not triton"].startswith("Tesla T4 has compute capability 7.5")


def test_an_implementation_is_imported_once_all_is_there(monkeypatch):
    packages(monkeypatch, triton="3.7.1", jax_triton="0.3.1")
    found = []
    module = types.SimpleNamespace(made=lambda target: target.backend)
    monkeypatch.setattr(op_module.importlib, "import_module", lambda name: found.append(name) or module)
    target = Target("triton", "gpu", "NVIDIA H200", "9.0")
    assert op_module.Op("made", "some", "triton")(target=target) == "triton"
    assert found == ["jax_triton", "some.triton_gpu"]


@pytest.mark.parametrize("width", [16, 128, 640, 1024, 2048, 3072, 5376, 8192, 16384])
def test_rows_fill_a_program_and_warps_are_a_power_of_two(width):
    sizes = triton_calls.row_sizes("pool_norm", width, jnp.float32, Target("triton", "gpu", "none"))
    block_width = 1 << (width - 1).bit_length()
    assert 1 <= sizes.block_rows * block_width <= max(triton_calls.ELEMENTS, block_width)
    assert sizes.block_rows & (sizes.block_rows - 1) == sizes.warps & (sizes.warps - 1) == 0
    assert 1 <= sizes.warps <= 16


@pytest.fixture
def triton_folder(monkeypatch, tmp_path):
    """Pretends that Triton lies in a folder, and that PATH has no ptxas."""
    triton_calls.provide_ptxas.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path / "triton")])
    monkeypatch.setattr(triton_calls.importlib.util, "find_spec", lambda name: spec)
    yield tmp_path
    triton_calls.provide_ptxas.cache_clear()


def put_ptxas(folder):
    folder.mkdir(parents=True)
    (folder / "ptxas").touch(0o755)


def test_tritons_own_ptxas_is_used_where_path_has_none(triton_folder):
    tools = triton_folder / "triton" / "backends" / "nvidia" / "bin"
    put_ptxas(tools)
    triton_calls.provide_ptxas()
    assert os.environ["PATH"] == f"{triton_folder / 'bin'}:{tools}"


def test_a_ptxas_on_path_is_left_alone(triton_folder):
    put_ptxas(triton_folder / "bin")
    triton_calls.provide_ptxas()
    assert os.environ["PATH"] == str(triton_folder / "bin")


def test_without_any_ptxas_the_kernels_are_refused_with_the_remedy(triton_folder):
    with pytest.raises(Unsupported, match=r"the program ptxas is missing, .*; install NVIDIA's CUDA toolkit and"):
        triton_calls.provide_ptxas()
