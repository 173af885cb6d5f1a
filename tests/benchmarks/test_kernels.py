"""`funnel bench kernels`: the work of every case against a count of its arrays, ceilings, bounds and the command."""

import ctypes
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

from funnel_benchmarks.kernels import cases as cases_module
from funnel_benchmarks.kernels import ceilings as ceilings_module
from funnel_benchmarks.kernels import command
from funnel_benchmarks.kernels.allocator import keep_freed_memory
from funnel_benchmarks.kernels.cases import CUDNN, Case, Sizes, attention_case, cases, cudnn_case
from funnel_benchmarks.kernels.ceilings import Ceiling, ceilings
from funnel_benchmarks.kernels.layouts import packed
from funnel_benchmarks.kernels.suite import Suite, backends_here, bound
from funnel_benchmarks.models import random_model
from funnel_benchmarks.results import LeftOut, read_results
from funnel_benchmarks.suite import row_line
from funnel_engine import ConfigError, FunnelError
from funnel_engine.hugging_face_config import read_model_config
from funnel_kernels import native_calls

CONFIG = read_model_config(
    {
        "model_type": "gemma3_text",
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 64,
        "max_position_embeddings": 128,
        "use_bidirectional_attention": True,
    }
)
LENGTHS = np.array([24, 40], np.int32)
ROWS = 64
RATES = {"product": 1e9, "copy": 1e8}  # of the ceilings in these tests


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(command, "keep_freed_memory", lambda: None)  # the other tests' process too


def sizes(dtype="float32", row_bytes=2**14):
    return Sizes(random_model("tiny", CONFIG, dtype), LENGTHS, row_bytes)


def make_suite(cases, **options):
    given = {"model": "tiny", "dtype": "float32", "lengths": LENGTHS, "backends": ("xla",), "ceilings": CEILINGS}
    return Suite(**given | {"cases": cases, "repeats": 1} | options)


def fake(name, seconds=0.01):
    return Ceiling(name, int(RATES[name] * seconds), f"fake {name}", lambda: seconds)


CEILINGS = (fake("product"), fake("copy"))


def traced_bytes(call, inputs):
    """Bytes of the arrays that a call takes and gives: `inputs` of them at the front, norm weights left out."""
    given = [array for array in jax.tree.leaves(call.args) if array.ndim == 2][:inputs]
    return sum(
        array.size * array.dtype.itemsize for array in [*given, *jax.tree.leaves(jax.eval_shape(call.func, *call.args))]
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bytes_of_a_case_are_those_of_its_arrays(dtype):
    for case in cases(sizes(dtype)):
        if case.bytes:
            call = case.make("reference")
            inputs = 2 if case.name.startswith("project_heads") else 3  # x and weight, without the angles' tables
            assert case.bytes == traced_bytes(call, inputs), case.name


def counted_flops(call):
    """Of the matrix products in the program of a dense implementation, whose attention sees all pairs."""
    jaxpr = jax.make_jaxpr(call.func)(*call.args)
    total = 0
    todo = [jaxpr.jaxpr]
    while todo:
        for equation in todo.pop().eqns:
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
                total += 2 * depth * equation.outvars[0].aval.size
            todo += [inner.jaxpr for inner in equation.params.values() if hasattr(inner, "jaxpr")]
    return total


def test_the_flops_of_a_product_are_those_of_its_program():
    for case in cases(sizes()):
        if case.name.startswith(("project_heads", "linear", "gated_linear")):
            assert case.flops == counted_flops(case.make("reference")) > 0, case.name
        elif not case.name.startswith(("attention", "embed")):
            assert case.flops == 0


def test_attention_counts_the_pairs_that_are_seen():
    whole, strided = (case for case in cases(sizes()) if case.name.startswith("attention"))
    pairs = 24**2 + 40**2
    assert whole.flops == 4 * 32 * 4 * pairs
    assert strided.flops == 4 * 32 * 4 * pairs // 2
    lo, hi = (np.asarray(edges) for edges in strided.make("xla").args[3:])
    assert lo.tolist() == [0] * 12 + [24] * 20
    assert hi.tolist() == [24] * 12 + [64] * 20


def test_row_wise_ops_take_more_rows_than_a_cache_holds():
    assert sizes("bfloat16", 2**20).row_wise_rows == 2**20 // (2 * 64)
    assert sizes("float32", 2**20).row_wise_rows == 2**20 // (4 * 64)
    (case,) = (case for case in cases(sizes(row_bytes=2**20)) if case.name.startswith("pool_norm"))
    assert case.bytes == 2 * 2**20


def test_every_case_computes_the_same_on_every_backend():
    for case in cases(sizes()):
        results = (jax.tree.leaves(case.make(backend)()) for backend in ("cpu", "xla"))
        for one, other in zip(*results, strict=True):
            one, other = (np.asarray(each, np.float64) for each in (one, other))
            assert np.abs(other).max() > 0.1
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * np.abs(other).max(), err_msg=case.name)


def test_backends_here_are_those_of_the_device():
    assert backends_here() == ("cpu", "xla")


@pytest.mark.parametrize(
    ("flops", "moved", "expected"),
    [(10**7, 10, "product"), (10, 10**7, "copy"), (0, 1, "copy"), (1, 0, "product"), (10**7, 999_999, "product")],
)
def test_the_bound_is_the_ceiling_that_takes_longer(flops, moved, expected):
    ceiling, work = bound(Case("case", None, flops, moved), CEILINGS)
    assert ceiling.name == expected
    assert work == {"product": flops, "copy": moved}[expected]


def rows_of(suite):
    return {cell: measure() for cell, measure in suite.cells(None)}


def test_shares_are_of_the_bound_in_the_time(monkeypatch):
    case = Case("case", lambda backend: lambda: None, flops=10**6, bytes=0)
    monkeypatch.setattr("funnel_benchmarks.kernels.suite.sampler", lambda call, seconds: lambda: 0.004)
    rows = rows_of(make_suite([case], repeats=2))
    assert list(rows) == ["ceiling: product", "ceiling: copy", "case; xla"]  # the ceilings come first
    assert rows["ceiling: copy"]["rate"] == pytest.approx(RATES["copy"])
    row = rows["case; xla"]
    assert row["share"] == pytest.approx({"low": 0.25, "median": 0.25, "high": 0.25})  # 1 ms of work in 4 ms
    assert row["flops_per_second"] == pytest.approx(10**6 / 0.004)
    assert len(row["seconds"]["samples"]) == len(row["ceiling_seconds"]["samples"]) == 4


def test_a_backend_that_is_not_here_is_left_out():
    measure = dict(make_suite(cases(sizes()), backends=("triton",)).cells(None))
    with pytest.raises(LeftOut, match=r"attention is not served by backend 'triton'"):
        next(run for name, run in measure.items() if name.startswith("attention"))()


def test_cudnn_gets_the_same_data_in_its_own_shape(monkeypatch):
    """cuDNN is not here; XLA's own attention replaces it, so that the reshapes and the comparison run."""
    equal = Sizes(random_model("tiny", CONFIG, "float32"), np.full(3, 8, np.int32))
    ours = attention_case(equal, packed(equal.lengths), "sequences of 8 tokens")
    theirs = cudnn_case(equal, ours)
    measure = dict(make_suite([ours, theirs]).cells(None))
    assert list(measure)[2:] == [f"{ours.name}; xla", f"{ours.name}; {CUDNN}"]
    with pytest.raises(LeftOut, match="cuDNN is not detected"):
        measure[f"{ours.name}; {CUDNN}"]()
    attend = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *x, scale, implementation: attend(*x, scale=scale))
    rows = [{"cell": name} | run() for name, run in measure.items()]
    assert [row["flops"] for row in rows[2:]] == [4 * 32 * 4 * 3 * 64] * 2
    ratio = rows[2]["share"]["median"] / rows[3]["share"]["median"]
    options = {"model": "tiny", "dtype": "float32", "lengths": [8], "repeats": 1}
    assert f"Attention reaches {ratio:.2f} to {ratio:.2f} of cuDNN's rate." in (
        Suite.section({"options": options, "rows": rows}).summary
    )
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *x, scale, implementation: attend(*x, scale=2 * scale))
    with pytest.raises(FunnelError, match="cuDNN computed something else: relative difference "):
        dict(make_suite([theirs]).cells(None))[f"{ours.name}; {CUDNN}"]()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ceilings_of_a_cpu(dtype):
    computed = dtype if native_calls.multiplies_bfloat16() else "float32"
    with ceilings(dtype, 64, 0.0) as (product, copy):
        assert (product.name, product.work) == ("product", 2 * 16 * 32 * 256)
        assert product.about.startswith(f"16 x 32 x 256, {computed}, oneDNN (")
        assert (copy.name, copy.work) == ("copy", 2 * 2**16)
        assert all(ceiling.sample() > 0 for ceiling in (product, copy))


def test_without_products_of_bfloat16_the_ceiling_is_that_of_float32(monkeypatch):
    made = []

    @contextmanager
    def product(dtype, shrink):
        made.append(dtype)
        yield None

    monkeypatch.setattr(ceilings_module, "packs", lambda target: True)
    monkeypatch.setattr(ceilings_module, "onednn", product)
    for multiplies in (False, True):
        monkeypatch.setattr(ceilings_module, "multiplies_bfloat16", lambda multiplies=multiplies: multiplies)
        for dtype in ("float32", "bfloat16"):
            with ceilings(dtype, 64, 0.0):
                pass
    assert made == ["float32", "float32", "float32", "bfloat16"]


def test_a_copy_copies_everything(monkeypatch):
    copied = []
    monkeypatch.setattr(np, "copyto", lambda target, source: copied.append((target.size, source.size)))
    monkeypatch.setattr(ceilings_module, "usable_cores", lambda: 3)
    with ceilings_module.host_copy(1000, 0.02) as copy:
        copied.clear()
        copy.sample()
    once = len(copied) // 3
    assert sorted(copied) == [(333, 333)] * (2 * once) + [(334, 334)] * once


def test_ceilings_elsewhere_are_those_of_xla(monkeypatch):
    product = ceilings_module.xla_product("bfloat16", 64, 0.0)
    assert (product.work, product.about) == (2 * 64**3, "64 x 64 x 64, bfloat16, XLA")
    copy = ceilings_module.xla_copy(2**12, 0.0)
    assert copy.work == 2**13
    assert min(product.sample(), copy.sample()) > 0


def test_without_our_kernels_the_product_is_that_of_xla(monkeypatch):
    monkeypatch.setattr(ceilings_module, "packs", lambda target: False)
    with ceilings("float32", 64, 0.0) as (product, _):
        assert product.about == "32 x 32 x 32, float32, XLA"


def test_freed_memory_is_kept():
    """In a process of its own, which it changes to its end: a second large array costs no new page."""
    script = """
import resource, numpy as np
from funnel_benchmarks.kernels.allocator import keep_freed_memory
keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**25, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(), faults())
"""
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    first, second = map(int, answer.split())
    assert first > 10 * max(second, 1)


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    keep_freed_memory()


@contextmanager
def fake_ceilings(dtype, shrink, seconds):
    yield CEILINGS


@pytest.fixture
def quick(monkeypatch):
    make_quick(monkeypatch)


def make_quick(monkeypatch):
    """A tiny model, two cases, and ceilings that take no time."""
    monkeypatch.setattr(command, "keep_freed_memory", lambda: None)  # the other tests' process too
    monkeypatch.setattr(command, "ceilings", fake_ceilings)
    monkeypatch.setattr("funnel_benchmarks.models.preset", lambda name: CONFIG)
    pooling = [case for case in cases(sizes()) if case.name.startswith(("pool_norm", "embed"))]
    monkeypatch.setattr(command, "cases", lambda sizes: pooling)
    monkeypatch.setattr(command, "SAMPLE_SECONDS", 0.0)


def run(*options):
    return CliRunner().invoke(command.kernels_command, options, catch_exceptions=False)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """A run with one backend, then resumed with all: the file's content."""
    file = tmp_path_factory.mktemp("kernels") / "kernels.json"
    options = ("--depth", "2", "--seq-len", "8", "--batch", "3", "--repeats", "1", "--json", str(file))
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        first = run(*options, "--backend", "xla")
        assert first.exit_code == 0
        assert "gemma-2b, 2 layers; 3 x 8 tokens, bfloat16" in first.output
        before = read_results(file)
        assert run(*options, "--resume").exit_code == 0  # and one backend more
    content = read_results(file)
    assert content["rows"][:4] == before["rows"]
    return content


def test_the_command(result):
    rows = result["rows"]
    assert result["complete"]
    assert not result["left_out"]
    assert result["options"]["lengths"] == [8, 8, 8]
    names = [row["cell"].rpartition("; ")[2] for row in rows]
    assert names[:4] == ["ceiling: product", "ceiling: copy", "xla", "xla"]
    assert [row["backend"] for row in rows[2:]] == ["xla", "xla", "cpu", "cpu"]
    for row in rows:
        assert row_line(Suite.section, result, row).startswith(f"{row['cell']}: ")


def test_bad_input(quick, tmp_path):
    with pytest.raises(ConfigError, match="--resume adds to the file of --json"):
        run("--resume")
    with pytest.raises(ConfigError, match="depth 3 is not possible: gemma-2b has 2 layers; take 1 to 2"):
        run("--depth", "3")
    assert run("--backend", "gpu").exit_code == 2


def test_the_section_of_a_result(result):
    content = result
    made = Suite.section(content)
    shares = {row["cell"]: row["share"]["median"] for row in content["rows"] if "share" in row}
    whole = [share for cell, share in shares.items() if cell.startswith("embed") and cell.endswith("cpu")]
    (share,) = whole
    assert f"{share:.2f} with cpu" in made.summary
    ceiling_table, table = made.tables
    assert [row[0].text for row in ceiling_table.cells] == ["product", "copy"]
    assert [row[1].value for row in table.cells] == list(shares.values())
    assert len(made.plots) == 2  # what products bound, and what copies do
    for plot in made.plots:
        (panel,) = plot.panels
        assert [series.label for series in panel.series] == ["xla", "cpu"]
        assert list(panel.references.values()) == [1.0]
        for series in panel.series:
            ((place,), (value,)) = series.at, series.values
            assert value["median"] == shares[f"{panel.rows[place]}; {series.label}"]


def test_the_cases_run_under_pytest_benchmark():
    """Collected, not run: at their sizes they take minutes."""
    folder = Path(cases_module.__file__).parents[2]
    command = [sys.executable, "-m", "pytest", str(folder), "--benchmark-only", "--collect-only"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # of this run
    answer = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent, env=environment)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    for case in ("gated_linear", "attention", "add_norm", "pool_norm", "recover_norm", "embed"):
        for backend in backends_here():
            assert any(case in line and line.endswith(f"-{backend}]") for line in answer.stdout.splitlines())


def test_the_model_of_the_cases_is_the_one_asked_for():
    names = [case.name for case in cases(sizes())]
    assert f"project_heads, {ROWS} x 64 x 256" in names
    assert f"gated_linear, {ROWS} x 64 x (2 x 192)" in names
    assert f"embed, 2 layers, 2 sequences, {ROWS} tokens" in names
    assert len(names) == len(set(names))
    assert jnp.result_type(cases(sizes())[0].make("xla").args[0]) == jnp.float32
