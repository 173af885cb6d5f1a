"""`funnel demo`, and the group `funnel bench`."""

import subprocess
import sys

from click.testing import CliRunner

from funnel_benchmarks import demo, demo_model
from funnel_benchmarks.results import read_results
from funnel_engine.cli import main

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


def test_demo_refuses_a_folder_that_it_has_not_made(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    result = run("demo", "--output", tmp_path)
    assert result.exit_code == 2
    assert "contains files of yours, which the demo would replace" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_demo_makes_converts_measures_and_reports(tmp_path, monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setitem(demo_model.CONFIG, name, value)
    monkeypatch.setattr(demo, "TOKENS", 16)
    monkeypatch.setattr(demo, "REPEATS", 1)
    output = tmp_path / "deep" / "demo"
    for _ in range(2):  # a second run replaces the first
        result = run("demo", "--output", output)
        assert result.exit_code == 0, result.output
    names = sorted(path.name for path in output.iterdir())
    results = ["latency.html", "latency.json", "latency.png"]
    assert names == ["checkpoint", "hugging-face", *results, demo.MARKER]
    written = read_results(output / "latency.json")
    assert written["complete"]
    assert written["options"]["model"].items() >= {"weights": "random", "attention": "bidirectional"}.items()
    assert [row["cell"] for row in written["rows"]] == ["2:1 after 2; 2 x 16 tokens"]
    for name in ("latency.json", "latency.png", "latency.html"):
        assert str(output / name) in result.output


def test_a_demo_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "taken").write_text("a file")
    result = run("demo", "--output", tmp_path / "taken")
    assert result.exit_code == 2
    assert "choose another --output" in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_the_group_lists_its_suites_and_loads_nothing_slow():
    """What only some suite needs, and takes long to load, is not loaded for `--help`."""
    script = (
        "import sys\nfrom click.testing import CliRunner\nfrom funnel_engine.cli import main\n"
        "print(CliRunner().invoke(main, ['bench', '--help']).output)\n"
        "print(sorted({'matplotlib', 'torch', 'transformers'} & sys.modules.keys()))"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "  latency " in output
    assert "  compare " in output
    assert output.splitlines()[-1] == "[]"
