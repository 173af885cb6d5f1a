"""Imports go downwards: from a package to those below it, and among modules without a circle."""

import ast
import importlib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

# From the top to the bottom.
PACKAGES = (
    "funnel_benchmarks",
    "funnel_serving",
    "funnel_training",
    "funnel_engine",
    "funnel_kernels",
    "funnel_native",
)


def modules() -> dict[str, ast.Module]:
    """Every module of the packages, parsed."""
    found = {}
    for package in PACKAGES:
        folder = Path(importlib.import_module(package).__path__[0])
        for file in folder.rglob("*.py"):
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = ast.parse(file.read_text(encoding="utf-8"))
    return found


MODULES = modules()


def imported(name: str, nodes: list[ast.stmt] | list[ast.AST]) -> set[str]:
    """The modules of ours that statements import."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return {module for module in found if module in MODULES} - {name}


def test_every_module_is_looked_at():
    assert {"funnel_kernels.attention.pallas_tpu", "funnel_engine.checkpoints.orbax"} < set(MODULES)
    assert {"funnel_benchmarks.measure", "funnel_engine.engine", "funnel_kernels.op"} < set(MODULES)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_package_imports_one_above_it(package):
    """Inside functions neither."""
    above = PACKAGES[: PACKAGES.index(package)]
    for name, tree in MODULES.items():
        if name.partition(".")[0] == package:
            wrong = {other for other in imported(name, list(ast.walk(tree))) if other.partition(".")[0] in above}
            assert not wrong, f"{name} imports {wrong}"


def test_no_modules_import_each_other():
    """What a module imports as it is loaded; a package that is named for a module of it does not count."""
    graph = {name: imported(name, tree.body) for name, tree in MODULES.items()}
    for name, others in graph.items():
        graph[name] = {
            other
            for other in others
            if not name.startswith(f"{other}.") and not any(deeper.startswith(f"{other}.") for deeper in others)
        }
    list(TopologicalSorter(graph).static_order())  # raises CycleError
