"""What is distributed: the source distribution, the wheel that is built from it, and what a user of the wheel does."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import numpy as np
import pytest

from c_library import ROOT, run
from funnel_benchmarks import c_api
from funnel_benchmarks.random_checkpoint import write_random_model
from funnel_engine import Engine, FunnelConfig, convert

PACKAGES = (
    "funnel_benchmarks",
    "funnel_engine",
    "funnel_kernels",
    "funnel_native",
    "funnel_serving",
    "funnel_training",
)
LINKS = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
NO_COMPILER = {"CXX": "/bin/false", "CC": "/bin/false"}


def environment(**more: str) -> dict[str, str]:
    """Without this process's Python paths; with the environment's cmake and ninja."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | more


def copy_sources(target: Path) -> Path:
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "demo", "*.egg-info", "__pycache__", "*.so")
    shutil.copytree(ROOT, target, ignore=unwanted)
    shutil.copytree(ROOT / ".ci", target / ".ci")
    return target


def build_with_setup(source: Path, target: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """`setup.py` as pip runs it."""
    command = [sys.executable, "setup.py", "build", "--build-lib", target]
    return subprocess.run(command, cwd=source, env=environment(**variables), capture_output=True, text=True)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """The source distribution."""
    directory = tmp_path_factory.mktemp("sdist")
    sources = copy_sources(directory / "sources")
    command = "-m", "build", "--sdist", "--no-isolation", "--skip-dependency-check", "--outdir", directory
    run(sys.executable, *command, sources, env=environment())
    (archive,) = directory.glob("funnel_engine-*.tar.gz")
    shutil.unpack_archive(archive, directory, filter="data")
    return directory / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(unpacked) -> Path:
    command = "-m", "build", "--wheel", "--no-isolation", "--skip-dependency-check", "--outdir", unpacked / "dist"
    run(sys.executable, *command, unpacked, env=environment(FUNNEL_REQUIRE_NATIVE="1"))
    (wheel,) = (unpacked / "dist").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The Python of a new environment that has the wheel; its dependencies are those of this environment."""
    directory = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", directory)
    python = directory / "bin" / "python"
    packages = sysconfig.get_path("purelib", vars={"base": str(directory), "platbase": str(directory)})
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    (Path(packages) / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return python


def test_the_source_distribution_has_what_the_readme_uses(unpacked):
    for link in LINKS.findall((ROOT / "README.md").read_text(encoding="utf-8")):
        assert (unpacked / link).exists(), link
    for name in (".ci/run", "examples/cpp_server/server.cc", "tests/conftest.py", "benchmarks/test_kernels.py"):
        assert (unpacked / name).is_file(), name
    assert not (unpacked / "benchmarks" / "results").exists()
    for command in ("demo", "test", "wheel"):
        assert "pip install" in run("make", "-n", command, cwd=unpacked)


@pytest.mark.slow
def test_the_wheel_ships_our_packages_and_nothing_else(wheel, unpacked):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        libraries = {name: archive.read(name) for name in names if name.endswith(".so")}
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    folders = [unpacked / folder for folder in ("bindings", "kernels", "engine", "training", "serving", "benchmarks")]
    modules = {str(file.relative_to(folder)) for folder in folders for file in folder.glob("funnel_*/**/*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    found = {name for name in names if name.startswith("funnel_native/") and not name.endswith((".py", "py.typed"))}
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    cmake = [
        f"lib/cmake/FunnelEngine/FunnelEngine{part}.cmake"
        for part in ("Config", "ConfigVersion", "Targets", "Targets-release")
    ]
    expected = (
        f"_handlers{suffix}",
        "include/funnel.h",
        "include/funnel.hpp",
        "lib/libfunnel.so",
        "lib/libfunnel_python.so",
        "lib/pkgconfig/funnel.pc",
        *cmake,
    )
    assert found == {f"funnel_native/{name}" for name in expected}
    for name, library in libraries.items():
        for path in (unpacked, Path(sys.prefix), Path(sys.base_prefix) / "lib"):
            assert os.fsencode(path) not in library, f"{name} has the path {path}"


@pytest.mark.slow
def test_a_c_program_runs_with_nothing_but_the_wheel(installed, tmp_path):
    """With the flags of the helper, of pkg-config, and with CMake; it finds its environment's Python by itself."""

    def ask(*questions: str) -> list[str]:
        return run(installed, "-m", "funnel_native", *questions, env=environment(), cwd=tmp_path).split()

    checkpoint = tmp_path / "model"
    write_random_model(tmp_path / "source", c_api.CONFIG | {"num_hidden_layers": 2})
    convert(tmp_path / "source", checkpoint, dtype="float32")
    expected = Engine.load(checkpoint, funnel=FunnelConfig((1, 2)), max_batch_tokens=16).embed(
        [[2, 17, 93, 5], [2, 40]]
    )
    example = re.search(r"```c\n(.*?)```", (ROOT / "docs" / "c-api.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "program.c").write_text(example[1])
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.20)\nproject(program LANGUAGES C)\nfind_package(FunnelEngine 0.1 REQUIRED)\n"
        "add_executable(by_cmake program.c)\ntarget_link_libraries(by_cmake PRIVATE FunnelEngine::funnel)\n"
    )
    flags = {"by_helper": ask("--cflags", "--libs")}
    if shutil.which("pkg-config"):
        given = environment(PKG_CONFIG_PATH=ask("--pkg-config-dir")[0])
        flags["by_pkg_config"] = run("pkg-config", "--cflags", "--libs", "funnel >= 0.1", env=given).split()
    for name, given in flags.items():
        run("cc", "program.c", "-o", name, *given, cwd=tmp_path)
    run("cmake", "-S", ".", "-B", ".", f"-DFunnelEngine_DIR={ask('--cmake-dir')[0]}", cwd=tmp_path)
    run("cmake", "--build", ".", cwd=tmp_path)
    for name in (*flags, "by_cmake"):
        printed = run(tmp_path / name, checkpoint, env={}, cwd="/").split()
        np.testing.assert_allclose(np.array(printed, np.float32), expected.ravel(), rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_the_kernels_of_the_wheel_run(installed):
    code = "import funnel_native; print(funnel_native.__file__, funnel_native.problem())"
    file, problem = run(installed, "-c", code, env=environment(), cwd="/").split()
    assert Path(file).is_relative_to(installed.parents[1])
    assert problem == "None"


def test_where_the_library_was_not_built_the_helper_says_why(tmp_path):
    package = tmp_path / "funnel_native"
    (package / "lib").mkdir(parents=True)
    for name in ("__init__.py", "__main__.py"):
        shutil.copy(ROOT / "bindings" / "funnel_native" / name, package)
    command = [sys.executable, "-m", "funnel_native", "--libs"]

    def complaint() -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (1, "")
        return done.stderr

    assert "an editable installation has none" in complaint()
    (package / "lib" / "not_built.txt").write_text("No CMAKE_CXX_COMPILER could be found.\n")
    assert "not in this installation: No CMAKE_CXX_COMPILER could be found.\ndocs/c-api.md" in complaint()


def test_nothing_of_an_earlier_build_is_installed_when_the_compiler_fails(tmp_path):
    source, target = copy_sources(tmp_path / "source"), tmp_path / "lib"
    stale = [
        f"funnel_native/_handlers{sysconfig.get_config_var('EXT_SUFFIX')}",
        "funnel_native/lib/libfunnel.so",
        "native/old.py",
    ]
    for name in stale:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text("stale")
    done = build_with_setup(source, target, **NO_COMPILER)
    assert done.returncode == 0, done.stderr
    assert not [name for name in stale if (target / name).exists()]
    for part, folder in (("The kernels for CPUs", ""), ("The C library libfunnel", "lib")):
        assert f"{part}: left out, because the build failed:" in done.stderr
        assert "/bin/false" in (target / "funnel_native" / folder / "not_built.txt").read_text()
    done = build_with_setup(source, target, FUNNEL_REQUIRE_NATIVE="1", **NO_COMPILER)
    assert done.returncode != 0
    assert "The kernels for CPUs cannot be built, and FUNNEL_REQUIRE_NATIVE is set" in done.stderr


@pytest.mark.slow
def test_the_compilers_words_are_kept(tmp_path):
    """Its first error, with the line that it is about, and neither the commands before it nor what came later."""
    source = copy_sources(tmp_path / "source")
    for folder in ("kernels/funnel_kernels/cpu", "bindings/c_api"):
        for file in (source / folder).glob("*.h"):
            file.write_text('#error "this file is broken"\n' + file.read_text())
    done = build_with_setup(source, tmp_path / "lib")
    assert done.returncode == 0, done.stderr
    for folder in ("", "lib"):
        reason = (tmp_path / "lib" / "funnel_native" / folder / "not_built.txt").read_text().splitlines()
        assert re.search(r"\.h:1:2: error: .*this file is broken", reason[0]), reason
        assert len(reason) <= 5
