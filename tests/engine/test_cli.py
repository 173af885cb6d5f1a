"""The `funnel` command as a user meets it: results, help, and one line with exit status 2 for every mistake."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import transformers
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from funnel_engine import Engine, FunnelConfig
from funnel_engine.cli import main, read_lines
from hugging_face_models import build, gemma2
from tiny_models import make_tokenizer

TEXTS = ["a small funnel", "pools pairs of tokens", "tokens", "of a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face checkpoint `source`, the same converted, and a file of texts."""
    folder = tmp_path_factory.mktemp("cli")
    build(transformers.Gemma2Model, gemma2()).save_pretrained(folder / "source")
    make_tokenizer().save(str(folder / "source" / "tokenizer.json"))
    result = run("convert", folder / "source", folder / "model", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    (folder / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    return folder


def run(*arguments, **options):
    return CliRunner().invoke(main, [str(argument) for argument in arguments], **options)


def assert_refused(result, *parts):
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.output
    for part in parts:
        assert part in result.stderr


def test_help_lists_every_command_with_a_line():
    result = run("--help")
    assert result.exit_code == 0
    for command in (
        "bench",
        "convert",
        "demo",
        "distill",
        "doctor",
        "embed",
        "evaluate",
        "finetune",
        "inspect",
        "plan",
    ):
        assert f"\n  {command} " in result.output
        assert run(command, "--help").exit_code == 0


def test_inspect_for_people_and_for_programs(folder):
    text = run("inspect", folder / "model", "--funnel", "1:2")
    assert text.exit_code == 0
    assert re.search(r"^funnel +1:2$", text.output, re.MULTILINE)
    assert re.search(r"^intended_funnel +none$", text.output, re.MULTILINE)
    facts = json.loads(run("inspect", folder / "model", "--funnel", "1:2", "--seq-len", 30, "--json").stdout)
    assert facts["family"] == "gemma2"
    assert (facts["layers"], facts["hidden_size"], facts["vocab_size"]) == (3, 48, 101)
    assert (facts["format"], facts["problems"], facts["dtype"]) == ("funnel", [], "float32")
    assert (facts["tokenizer"], facts["begin_id"], facts["end_id"]) == ("tokenizer.json", 2, None)
    assert facts["gigabytes"] == (folder / "model" / "weights.safetensors").stat().st_size / 1e9
    norms = (3 * 4 + 1) * 48
    assert facts["gigabytes_converted"]["bfloat16"] == (facts["parameters"] * 2 + norms * 2) / 1e9
    assert 1 / 3 < facts["ideal_ratio"] < 2 / 3  # one layer of three whole, two halved, with a window
    whole = json.loads(run("inspect", folder / "model", "--json").stdout)
    assert whole["ideal_ratio"] == 1


def test_inspect_of_a_source_says_what_convert_would_do(folder, tmp_path):
    facts = json.loads(run("inspect", folder / "source", "--json").stdout)
    assert (facts["format"], facts["problems"], facts["files"]) == ("hugging_face", [], ["model.safetensors"])
    again = json.loads(run("inspect", folder / "model", "--json").stdout)
    differing = {name for name in facts if facts[name] != again[name]}
    assert differing <= {"format", "files", "gigabytes"}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["tensors", "config", "nothing there", "funnel", "format"])
def test_inspect_says_what_is_wrong(folder, tmp_path, damage):
    """The problems are on standard output, one a line, as facts like the others; the exit status is 2."""
    source = tmp_path / "source"
    shutil.copytree(folder / "source", source)
    options, reason = [], damage
    if damage == "tensors":
        tensors = load_file(source / "model.safetensors")
        tensors["surprise"], tensors["surprise too"] = (
            tensors.pop("norm.weight"),
            tensors["layers.0.mlp.up_proj.weight"],
        )
        save_file(tensors, source / "model.safetensors")
        reason = "missing: norm.weight (48,)"
    elif damage == "config":
        (source / "config.json").write_text("{")
        reason = "not valid JSON"
    elif damage == "nothing there":
        shutil.rmtree(source)
        reason = "does not exist"
    elif damage == "funnel":
        options, reason = ["--funnel", "7:2"], "8 strides but the model has only 3 layers"
    else:
        options, reason = ["--format", "funnel"], "not a checkpoint of this engine"
    result = run("inspect", source, *options, "--json")
    facts = json.loads(result.stdout)
    assert result.exit_code == 2
    assert reason in "\n".join(facts["problems"])
    assert facts["format"] == {"nothing there": None, "format": "funnel"}.get(damage, "hugging_face")
    for line in facts["problems"]:
        assert line in run("inspect", source, *options).stdout


def test_inspect_verifies_hashes(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    assert run("inspect", tmp_path / "model", "--verify").exit_code == 0
    file = tmp_path / "model" / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)
    assert run("inspect", tmp_path / "model").exit_code == 0
    result = run("inspect", tmp_path / "model", "--verify")
    assert result.exit_code == 2
    assert f"the SHA-256 of {file} differs from the manifest" in result.stdout
    assert "no hashes to verify" in run("inspect", folder / "source", "--verify").stdout


def test_convert_options(folder, tmp_path):
    """What the Python function takes, the command takes."""
    options = ["--format", "hugging_face", "--sliding-window", 6, "--allow-nonfinite", "--dtype", "float32"]
    result = run("convert", folder / "source", tmp_path / "model", *options)
    assert result.exit_code == 0, result.output
    assert Engine.load(tmp_path / "model").config.causal_window == (5, 0)


def test_doctor_says_what_serves_each_op():
    facts = json.loads(run("doctor", "--json").stdout)
    products = ("project_heads", "gated_linear", "linear_add_norm")
    for op in (*products, "attention", "add_norm", "pool_norm", "recover_norm"):
        assert facts[op] == "cpu"
    assert facts["not mosaic"] == facts["not triton"]
    assert facts["not triton"] == "JAX runs on cpu; on a machine with an NVIDIA GPU, install jax[cuda13]"
    assert facts["not tpu"] == "JAX runs on cpu; on a machine with a TPU, install jax[tpu]"
    assert "only when asked for by name" in facts["reference"]
    assert facts["devices"]
    assert "jaxlib" in run("doctor").output


@pytest.mark.parametrize("suffix", [".npy", ".jsonl"])
def test_embed_writes_what_the_engine_computes(folder, tmp_path, suffix):
    output = tmp_path / f"vectors{suffix}"
    result = run("embed", folder / "model", folder / "texts.txt", "-o", output, "--funnel", "1:3")
    assert result.exit_code == 0, result.output
    assert "Wrote 4 vectors of size 48" in result.output
    if suffix == ".npy":
        vectors = np.load(output)
    else:
        vectors = np.array([json.loads(line) for line in output.read_text().splitlines()], np.float32)
    engine = Engine.load(folder / "model", funnel=FunnelConfig.after(1, stride=3))
    np.testing.assert_array_equal(vectors, engine.embed(TEXTS))


def test_embed_reads_standard_input(folder, tmp_path):
    output = tmp_path / "vectors.npy"
    result = run("embed", folder / "model", "-o", output, "--truncate-dim", 5, input="a small\nfunnel\n")
    assert result.exit_code == 0, result.output
    assert np.load(output).shape == (2, 5)


def test_embed_cuts_long_texts_only_when_asked(folder, tmp_path):
    output, text = tmp_path / "vectors.npy", "tokens " * 3000
    refused = run("embed", folder / "model", "-o", output, input=text)
    assert_refused(refused, "line 1 has 3001 tokens, more than the limit of 2048; shorten it, or cut", "--truncate")
    assert "truncate=" not in refused.stderr
    assert "max_batch_tokens" not in refused.stderr
    assert run("embed", folder / "model", "-o", output, "--truncate", input=text).exit_code == 0
    np.testing.assert_allclose(np.load(output), Engine.load(folder / "model").embed("tokens " * 2047), atol=1e-5)


def test_a_bad_line_is_named_by_its_number(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("funnel_engine.cli.TEXTS_PER_CALL", 2)
    lines = ["a", "small", "funnel", "tokens " * 3000, "of"]
    result = run("embed", folder / "model", "-o", tmp_path / "v.npy", input="\n".join(lines))
    assert_refused(result, "Error: line 4 has 3001 tokens")


def test_every_line_is_checked_before_the_first_is_computed(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("funnel_engine.cli.TEXTS_PER_CALL", 2)
    monkeypatch.setattr(Engine, "embed", lambda *_, **__: pytest.fail("it computes before it has checked all lines"))
    result = run("embed", folder / "model", "-o", tmp_path / "v.npy", input="a\nof\na\n" + "tokens " * 3000)
    assert_refused(result, "Error: line 4 has 3001 tokens")


LINES = {
    "line feeds": (b"a\nof\n", ["a", "of"]),
    "no end of the last line": (b"a\nof", ["a", "of"]),
    "of Windows": (b"a\r\nof\r\n", ["a", "of"]),
    "with a byte order mark": (b"\xef\xbb\xbfa\nof\n", ["a", "of"]),
    "what only Python takes for an end": (
        "a\u2028b\u2029c\x0cd\x85e\x0bf\x1cg\rh\nof\n".encode(),
        ["a\u2028b\u2029c\x0cd\x85e\x0bf\x1cg\rh", "of"],
    ),
    "a carriage return that ends no line": (b"a\r\r\nof\r", ["a\r", "of\r"]),
}


@pytest.mark.parametrize(("content", "lines"), LINES.values(), ids=LINES.keys())
def test_lines_are_those_of_editors(tmp_path, content, lines):
    (tmp_path / "texts").write_bytes(content)
    assert read_lines(str(tmp_path / "texts")) == lines


@pytest.mark.parametrize("through_a_pipe", [False, True])
def test_a_byte_that_is_not_utf8_is_named_by_its_line_and_place(folder, tmp_path, through_a_pipe):
    content = b"a small text\r\n" * 2000 + b"caf\xe9 au lait\n"
    (tmp_path / "texts").write_bytes(content)
    source = {"input": content} if through_a_pipe else {}
    texts = [] if through_a_pipe else [tmp_path / "texts"]
    result = run("embed", folder / "model", *texts, "-o", tmp_path / "v.npy", **source)
    place = "line 2001 of the texts is not UTF-8: invalid continuation byte at byte 4 of the line, byte 28004 in total"
    assert_refused(result, place, "convert the texts to UTF-8 first")


def shell(command, **variables):
    """Runs `funnel` in a shell of its own, as "$FUNNEL"."""
    funnel = f"{sys.executable} -c 'from funnel_engine.cli import main; main()'"
    environment = os.environ | {"FUNNEL": funnel} | variables
    return subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)


def test_standard_streams_that_are_closed(folder, tmp_path):
    result = shell(f"eval $FUNNEL embed {folder / 'model'} -o {tmp_path / 'v.npy'} <&-")
    assert (result.returncode, result.stderr) == (
        2,
        "Error: standard input is closed; name a file of texts, or pipe them in\n",
    )
    assert shell(f"eval $FUNNEL inspect {folder / 'model'} >&-").stderr == ""


def test_a_reader_that_leaves_early_is_no_error(folder):
    result = shell(f"eval $FUNNEL inspect {folder / 'model'} | true")
    assert (result.returncode, result.stderr) == (0, "")


def test_a_platform_that_is_not_here_is_said_in_a_line(folder, tmp_path):
    result = shell("eval $FUNNEL doctor", JAX_PLATFORMS="nowhere")
    assert (result.returncode, result.stderr) == (2, "")
    assert "problems       JAX does not start with JAX_PLATFORMS=nowhere (" in result.stdout
    assert "jaxlib" in result.stdout
    command = f"eval $FUNNEL embed {folder / 'model'} {folder / 'texts.txt'} -o {tmp_path / 'v.npy'}"
    result = shell(command, JAX_PLATFORMS="nowhere")
    assert result.returncode == 2
    assert result.stderr.startswith("Error: JAX does not start with JAX_PLATFORMS=nowhere (")
    assert result.stderr.endswith("install JAX for that platform, or set JAX_PLATFORMS=cpu\n")
    assert len(result.stderr.splitlines()) == 1


def test_mistakes_are_one_line_and_status_2(folder, tmp_path):
    model, texts, output = folder / "model", folder / "texts.txt", tmp_path / "v.npy"
    assert_refused(run("convert", folder / "source", model), "exists", "--overwrite")
    assert_refused(run("convert", tmp_path / "nothing", tmp_path / "new"), "does not exist")
    assert_refused(run("embed", folder / "source", texts, "-o", output), "not a checkpoint of this engine", "convert")
    assert_refused(run("embed", model, texts, "-o", tmp_path / "v.txt"), "must end in .npy or .jsonl")
    assert_refused(run("embed", model, texts, "-o", output, "--funnel", "1:0"), "strides[1]=0", "at least 1")
    assert_refused(run("embed", model, "-o", output, input="a\n\nb\n"), "line 2 of the texts is empty")
    assert_refused(run("embed", model, "-o", output, input=""), "the file has no texts; give one text per line")
    assert_refused(run("embed", model, texts, "-o", output, "--prompt-name", "query"), "'query' is unknown")
    assert_refused(run("embed", model, texts, "-o", output, "--backend", "cuda"), "does not exist in this build")
    assert_refused(run("embed", model, texts, "-o", tmp_path / "no" / "v.npy"), "is not a directory; make it first")
    assert_refused(run("embed", model, texts, "-o", output, "--funnel", "mean"), "must be LAYER:STRIDE, e.g. 6:2")
    assert_refused(run("embed", model, "-o", output, input=b"caf\xe9\n"), "line 1 of the texts is not UTF-8", "byte 4")
    assert not list(tmp_path.iterdir())


def test_unknown_options_are_status_2(folder):
    assert run("embed", folder / "model", "--pool", "mean").exit_code == 2
    assert run("nonsense").exit_code == 2


def test_an_interrupt_ends_the_process_at_once(folder, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("funnel_engine.cli.Engine.load", interrupted)
    monkeypatch.setattr("os._exit", sys.exit)
    result = run("embed", folder / "model", folder / "texts.txt", "-o", tmp_path / "v.npy")
    assert (result.exit_code, result.stderr) == (130, "Interrupted\n")
    assert not list(tmp_path.iterdir())


def test_a_funnel_is_stored_and_used(folder, tmp_path):
    model, texts = tmp_path / "model", folder / "texts.txt"
    assert run("convert", folder / "model", model, "--funnel", "1:2/mean", "--dtype", "float32").exit_code == 0
    facts = json.loads(run("inspect", model, "--json").stdout)
    assert facts["intended_funnel"] == facts["funnel"] == "1:2/mean"
    assert facts["ideal_ratio"] < 1
    assert json.loads(run("inspect", model, "--funnel", "none", "--json").stdout)["ideal_ratio"] == 1
    for options in ([], ["--funnel", "none"]):
        with pytest.warns(UserWarning, match="meant for the funnel 1:2/mean") if options else contextlib.nullcontext():
            assert run("embed", model, texts, "-o", tmp_path / "v.npy", *options).exit_code == 0
        funnel = FunnelConfig() if options else FunnelConfig.after(1, pool="mean")
        expected = Engine.load(folder / "model", funnel=funnel).embed(texts.read_text().splitlines())
        np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected, atol=1e-5)
