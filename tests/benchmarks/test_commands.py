"""`funnel bench` and `funnel demo`, from the command line to the files."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from funnel_benchmarks import commands, demo_model, memory, models
from funnel_benchmarks.models import checkpoint_model, preset_model
from funnel_engine import HeadConfig, convert
from funnel_engine.cli import main
from funnel_engine.output_files import write_bytes
from funnel_engine.weights import random_weights
from funnel_kernels.errors import InputError

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
        "bench", "--checkpoint", checkpoint, "--batch", 5, "--lengths", lengths, "--layers", "1,2", "--stride", 3,
        "--recovery", "mean_last", "--pool", "mean", "--dtype", "float32", "--repeats", 1,
        "--json", outputs[0], "--plot", outputs[1], "--html", outputs[2],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    written = json.loads(outputs[0].read_text())
    header = written["header"]
    assert written["complete"]
    assert [(row["layer"], row["stride"]) for row in written["rows"]] == [(1, 3), (2, 3)]
    assert (header["model"], header["weights"], header["attention"]) == ("tiny", "tiny", "causal")
    assert (header["dtype"], header["pool"], header["recovery"]) == ("float32", "mean", "mean_last")
    assert header["lengths"]["source"] == "file lengths.txt"
    assert header["lengths"]["sequences"] == 5
    assert str(tmp_path) not in outputs[0].read_text()
    assert outputs[1].read_bytes().startswith(b"\x89PNG")
    assert outputs[2].read_text().startswith("<!DOCTYPE html>")
    lines = result.output.splitlines()
    assert sum(" 3:1 " in line for line in lines) == 2
    assert any("0 compilations while timing" in line for line in lines)
    assert all(str(output) in result.output for output in outputs)
    assert sorted(tmp_path.iterdir()) == sorted([lengths, *outputs])


def test_bench_defaults_to_even_layers_and_fixed_lengths_and_writes_nothing(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("bench", "--checkpoint", checkpoint, "--batch", 2, "--seq-len", 8, "--repeats", 1)
    assert result.exit_code == 0, result.output
    assert "2 x 8 tokens" in result.output
    assert sum(" 2:1 " in line for line in result.output.splitlines()) == 1  # after layer 2 of 3
    assert not list(tmp_path.iterdir())


def test_demo_refuses_a_folder_that_it_has_not_made(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    result = run("demo", "--output", tmp_path)
    assert result.exit_code == 2
    assert "holds files of yours, which the demo would replace" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_demo_makes_converts_measures_and_reports(tmp_path, monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setitem(demo_model.CONFIG, name, value)
    monkeypatch.setattr(commands, "DEMO_TOKENS", 16)
    monkeypatch.setattr(commands, "DEMO_REPEATS", 1)
    output = tmp_path / "deep" / "demo"
    for _ in range(2):  # a second run replaces the first
        result = run("demo", "--output", output)
        assert result.exit_code == 0, result.output
    names = sorted(path.name for path in output.iterdir())
    results = ["latency.html", "latency.json", "latency.png"]
    assert names == ["checkpoint", "hugging-face", *results, commands.DEMO_MARKER]
    written = json.loads((output / "latency.json").read_text())
    assert written["complete"]
    assert written["header"]["weights"] == "random"
    assert written["header"]["attention"] == "bidirectional"
    assert [row["layer"] for row in written["rows"]] == [2]
    for name in ("latency.json", "latency.png", "latency.html"):
        assert str(output / name) in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --preset NAME or --checkpoint FOLDER"),
        (["--preset", "gemma-2b", "--checkpoint", "x"], "give either --preset NAME or --checkpoint FOLDER"),
        (["--preset", "gemma-9"], "choose one of gemma-2b"),
        (["--checkpoint", "nowhere"], "nowhere is not a checkpoint"),
        (["--preset", "gemma-2b", "--layers", "2,18"], "the last place is after 17"),
        (["--preset", "gemma-2b", "--layers", ""], "2,4,...,16"),
        (["--preset", "gemma-2b", "--stride", "1"], "stride=1 pools nothing"),
        (["--preset", "gemma-2b", "--backend", "abacus"], "'abacus'"),
        (["--preset", "gemma-2b", "--lengths", "novels"], "conll, sst2"),
        (["--preset", "gemma-2b", "--lengths", ""], "conll, sst2"),
        (["--preset", "gemma-2b", "--seq-len", "9000"], "9000 tokens, more than the 8192"),
        (["--preset", "gemma-2b", "--json", "missing/out.json"], "is not a directory"),
        (["--preset", "gemma-2b", "--json", "out.txt"], "must end in .json"),
        (["--preset", "gemma-2b", "--plot", "out.jpeg"], "must end in .png or .svg or .pdf"),
        (["--preset", "gemma-2b", "--html", "folder.html"], "is a directory"),
    ],
)
def test_bad_input_is_one_line_with_status_2_before_anything_is_loaded(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.html").mkdir()
    monkeypatch.setattr(commands, "run_suite", None)
    monkeypatch.setattr(models, "random_array", None)
    result = run("bench", *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert "Traceback" not in result.output


def test_what_does_not_fit_is_refused_before_anything_is_allocated(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 8 * 10**9)
    monkeypatch.setattr(models, "random_array", None)  # would fail if it were called
    result = run("bench", "--preset", "gemma-7b", "--batch", 1)
    assert result.exit_code == 2
    assert "17.1 GB of weights" in result.output
    assert "8.0 GB are available" in result.output
    assert len(result.output.strip().splitlines()) == 1


@pytest.mark.parametrize("command", [["demo"], ["bench", "--preset", "t5gemma-s", "--html", "out.html"]])
def test_missing_matplotlib_is_said_before_anything_is_made(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run(*command)
    assert result.exit_code == 2
    assert "pip install 'funnel-engine[bench]'" in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_demo_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "taken").write_text("a file")
    result = run("demo", "--output", tmp_path / "taken")
    assert result.exit_code == 2
    assert "choose another --output" in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_presets_are_bidirectional_and_random():
    model = preset_model("gemma3-270m", None)
    assert (model.weights, model.dtype, model.config.attention) == ("random", "bfloat16", "bidirectional")


def test_checkpoints_keep_their_attention_and_can_be_cast(checkpoint):
    model = checkpoint_model(checkpoint, None)
    assert (model.name, model.dtype, model.config.attention) == ("tiny", "bfloat16", "causal")
    kept, cast = (checkpoint_model(checkpoint, dtype).load(commands.Console(), "xla") for dtype in (None, "float32"))
    assert {str(weight.dtype) for weight in kept.values()} == {"bfloat16"}
    assert {str(weight.dtype) for weight in cast.values()} == {"float32"}
    np.testing.assert_array_equal(np.asarray(kept["embedding"], np.float32), np.asarray(cast["embedding"]))


def test_random_weights_of_a_preset_have_the_engine_s_shapes(monkeypatch):
    from tiny_models import CONFIG

    monkeypatch.setattr(models, "preset", lambda name: CONFIG)
    loaded = preset_model("tiny", "float32").load(commands.Console(), "xla")
    expected = random_weights(CONFIG, HeadConfig(), "float32", seed=0)
    assert loaded.keys() == expected.keys()
    for name, weight in expected.items():
        np.testing.assert_array_equal(np.asarray(loaded[name]), weight)


def test_a_file_that_cannot_be_written_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="choose another place"):
        write_bytes(tmp_path / "missing" / "out.json", b"{}")
    write_bytes(tmp_path / "out.json", b"{}")
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
