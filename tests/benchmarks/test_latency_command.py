"""`funnel bench latency`, from the command line to the files."""

import numpy as np
import pytest
from click.testing import CliRunner

from funnel_benchmarks import demo_model, memory, models
from funnel_benchmarks.latency import command, suite
from funnel_benchmarks.latency.command import sweep_funnels
from funnel_benchmarks.models import checkpoint_model, preset_model
from funnel_benchmarks.results import read_results
from funnel_engine import HeadConfig, convert
from funnel_engine.cli import main
from funnel_engine.output_files import write_bytes
from funnel_engine.weights import random_weights
from funnel_kernels.errors import FunnelError, InputError
from html_page import Page

SMALL = {
    "num_hidden_layers": 3,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}


def run(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny converted checkpoint, causal."""
    directory = tmp_path_factory.mktemp("models")
    source = directory / "source"
    source.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (SMALL | {"use_bidirectional_attention": False}).items():
            patch.setitem(demo_model.CONFIG, name, value)
        demo_model.make_demo_model(source)
    convert(source, directory / "tiny")
    return directory / "tiny"


def test_bench_prints_rows_and_writes_all_files(checkpoint, tmp_path):
    outputs = [tmp_path / f"out.{ending}" for ending in ("json", "png", "html")]
    lengths = tmp_path / "lengths.txt"
    lengths.write_text("9\n4\n")
    result = run(
        "bench",
        "latency",
        "--checkpoint",
        checkpoint,
        "--batch",
        5,
        "--lengths",
        lengths,
        "--layers",
        "1,2",
        "--stride",
        3,
        "--recovery",
        "mean_last",
        "--pool",
        "mean",
        "--dtype",
        "float32",
        "--repeats",
        1,
        "--json",
        outputs[0],
        "--plot",
        outputs[1],
        "--html",
        outputs[2],
    )
    assert result.exit_code == 0, result.output
    written = read_results(outputs[0])
    assert (written["suite"], written["complete"]) == ("latency", True)
    names = [f"3:1 after {layer}, pool mean, recovery mean_last" for layer in (1, 2)]
    assert [row["funnel"]["name"] for row in written["rows"]] == names
    options = written["options"]
    expected = {"name": "tiny", "weights": "tiny", "attention": "causal", "dtype": "float32"}
    assert options["model"].items() >= expected.items()
    assert options["batches"][0]["source"] == "file lengths.txt"
    assert options["batches"][0]["sequences"] == 5
    assert written["machine"]["cores"] >= 1
    assert str(tmp_path) not in outputs[0].read_text()
    assert outputs[1].read_bytes().startswith(b"\x89PNG")
    page = Page(outputs[2].read_text())
    assert len(page.all("article")) == 1
    assert [row[0].split("\n")[0].strip() for row in page.rows[1:]] == names
    lines = result.output.splitlines()
    assert sum(line.startswith("3:1 after ") and ": ratio " in line for line in lines) == 2
    assert "Compilations while timing: 0" in lines
    assert all(str(output) in result.output for output in outputs)
    assert sorted(tmp_path.iterdir()) == sorted([lengths, *outputs])


def test_bench_defaults_to_even_layers_and_fixed_lengths_and_writes_nothing(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("bench", "latency", "--checkpoint", checkpoint, "--batch", 2, "--lengths", "8,5", "--repeats", 1)
    assert result.exit_code == 0, result.output
    assert "2 x 8 tokens" in result.output
    lines = result.output.splitlines()
    for length in (8, 5):
        assert sum(line.startswith(f"2:1 after 2; 2 x {length} tokens: ") for line in lines) == 1  # of 3 layers
    assert not list(tmp_path.iterdir())


def test_resuming_keeps_rows_and_measures_the_missing_ones(checkpoint, tmp_path):
    file = tmp_path / "out.json"
    arguments = ["bench", "latency", "--checkpoint", checkpoint, "--batch", 2, "--lengths", 8, "--repeats", 1]
    arguments += ["--json", file]
    assert run(*arguments, "--layers", "1").exit_code == 0
    first = read_results(file)
    result = run(*arguments, "--layers", "1,2", "--resume")
    assert result.exit_code == 0, result.output
    content = read_results(file)
    assert content["rows"][0] == first["rows"][0]
    assert [row["cell"] for row in content["rows"]] == ["2:1 after 1; 2 x 8 tokens", "2:1 after 2; 2 x 8 tokens"]
    assert "\n2:1 after 1; " not in result.output
    assert [run["rows"] for run in content["resumed"]] == [1]
    refused = run(*arguments, "--layers", "1,2", "--resume", "--dtype", "float32")
    assert refused.exit_code == 2
    assert "options.model.dtype was 'bfloat16' and is 'float32' now" in refused.output
    assert read_results(file) == content


def test_rows_that_fail_are_exit_status_1_and_nothing_is_drawn_of_none(checkpoint, tmp_path, monkeypatch):
    def failing(calls, funnel, advance):
        raise FunnelError("too hot")

    monkeypatch.setattr(suite, "measure", failing)
    outputs = [tmp_path / f"out.{ending}" for ending in ("json", "png", "html")]
    result = run(
        "bench",
        "latency",
        "--checkpoint",
        checkpoint,
        "--batch",
        2,
        "--lengths",
        8,
        "--layers",
        "1,2",
        "--json",
        outputs[0],
        "--plot",
        outputs[1],
        "--html",
        outputs[2],
    )
    assert result.exit_code == 1
    assert "2:1 after 1; 2 x 8 tokens: FAILED: FunnelError: too hot" in result.output
    assert len(read_results(outputs[0])["errors"]) == 2
    assert list(tmp_path.iterdir()) == outputs[:1]


@pytest.mark.parametrize(
    ("options", "repeats", "batches"), [([], 10, 3), (["--quick"], 1, 1), (["--quick", "--repeats", "4"], 4, 1)]
)
def test_a_sweep_says_what_is_measured(monkeypatch, options, repeats, batches):
    made = []
    monkeypatch.setattr(command, "measure", lambda suite, *_, **__: made.append(suite))
    result = run("bench", "latency", "--sweep", "gemma-2b", "--dtype", "float32", *options)
    assert result.exit_code == 0, result.output
    (suite,) = made
    assert (suite.model.name, suite.model.dtype, suite.model.weights) == ("gemma-2b", "float32", "random")
    assert (suite.funnels, suite.repeats, len(suite.batches)) == (sweep_funnels(18), repeats, batches)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --preset NAME, --checkpoint FOLDER and --sweep NAME"),
        (["--preset", "gemma-2b", "--checkpoint", "x"], "give one of --preset NAME, --checkpoint FOLDER"),
        (["--sweep", "gemma-2b", "--preset", "gemma-2b"], "--sweep gemma-2b decides what is measured; leave out --pre"),
        (["--sweep", "gemma-2b", "--lengths", "512"], "leave out --lengths"),
        (["--sweep", "gemma-7b", "--recovery", "none"], "leave out --recovery"),
        (["--preset", "gemma-2b", "--quick"], "--quick shortens a sweep; give --sweep gemma-2b or --sweep gemma-7b"),
        (["--preset", "gemma-2b", "--resume"], "--resume adds to the file of --json; name that file"),
        (["--preset", "gemma-2b", "--batch", "1", "--resume", "--json", "old.json"], "old.json is cut short"),
        (["--preset", "gemma-9"], "choose one of gemma-2b"),
        (["--checkpoint", "nowhere"], "nowhere is not a checkpoint"),
        (["--preset", "gemma-2b", "--layers", "2,18"], "the last place is after 17"),
        (["--preset", "gemma-2b", "--layers", ""], "2,4,...,16"),
        (["--preset", "gemma-2b", "--stride", "1"], "strides=(1, 1, 1) pool nothing"),
        (["--preset", "gemma-2b", "--backend", "abacus"], "'abacus'"),
        (["--preset", "gemma-2b", "--lengths", "novels"], "conll, sst2"),
        (["--preset", "gemma-2b", "--lengths", ""], "conll, sst2"),
        (["--preset", "gemma-2b", "--lengths", "9000"], "9000 tokens, more than the 8192"),
        (["--preset", "gemma-2b", "--json", "missing/out.json"], "is not a directory"),
        (["--preset", "gemma-2b", "--json", "out.txt"], "must end in .json"),
        (["--preset", "gemma-2b", "--plot", "out.jpeg"], "must end in .png or .svg or .pdf"),
        (["--preset", "gemma-2b", "--html", "folder.html"], "is a directory"),
    ],
)
def test_bad_input_is_one_line_with_status_2_before_anything_is_loaded(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "old.json").write_text('{"schema": 3, "su')
    monkeypatch.setattr(suite.Suite, "cells", None)
    monkeypatch.setattr(models, "random_weight", None)
    result = run("bench", "latency", *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert "Traceback" not in result.output


def test_what_does_not_fit_is_refused_before_anything_is_allocated(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 8 * 10**9)
    monkeypatch.setattr(models, "random_weight", None)  # would fail if it were called
    result = run("bench", "latency", "--preset", "gemma-7b", "--batch", 1)
    assert result.exit_code == 2
    assert "17.1 GB of weights" in result.output
    assert "8.0 GB are available" in result.output
    assert len(result.output.strip().splitlines()) == 1


@pytest.mark.parametrize("words", [["demo"], ["bench", "latency", "--preset", "t5gemma-s", "--html", "out.html"]])
def test_missing_matplotlib_is_said_before_anything_is_made(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run(*words)
    assert result.exit_code == 2
    assert "pip install 'funnel-engine[bench]'" in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_presets_are_random_and_gemmas_bidirectional():
    assert preset_model("qwen3-embedding-0.6b", None).config.attention == "causal"  # its own
    assert preset_model("gemma-2b", None).config.attention == "bidirectional"
    model = preset_model("gemma3-270m", None)
    assert (model.weights, model.dtype, model.config.attention) == ("random", "bfloat16", "bidirectional")


def test_checkpoints_keep_their_attention_and_can_be_cast(checkpoint):
    model = checkpoint_model(checkpoint, None)
    assert (model.name, model.dtype, model.config.attention) == ("tiny", "bfloat16", "causal")
    kept, cast = (checkpoint_model(checkpoint, dtype).load("xla") for dtype in (None, "float32"))
    for name, weight in kept.items():
        assert str(weight.dtype) == ("float32" if name.endswith("_norm") else "bfloat16")
    assert {str(weight.dtype) for weight in cast.values()} == {"float32"}
    np.testing.assert_array_equal(np.asarray(kept["embedding"], np.float32), np.asarray(cast["embedding"]))


def test_random_weights_of_a_preset_have_the_engine_s_shapes(monkeypatch):
    from tiny_models import CONFIG

    monkeypatch.setattr(models, "preset", lambda name: CONFIG)
    loaded = preset_model("tiny", "float32").load("xla")
    expected = random_weights(CONFIG, HeadConfig(), "float32", seed=0)
    assert loaded.keys() == expected.keys()
    for name, weight in expected.items():
        np.testing.assert_array_equal(np.asarray(loaded[name]), weight)


def test_a_file_that_cannot_be_written_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="choose another place"):
        write_bytes(tmp_path / "missing" / "out.json", b"{}")
    write_bytes(tmp_path / "out.json", b"{}")
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
