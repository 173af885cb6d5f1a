"""The demo's checkpoint: it converts, runs, and takes texts."""

import json

import numpy as np
import pytest

from funnel_benchmarks import demo_model
from funnel_benchmarks.demo_model import make_demo_model, make_tokenizer
from funnel_engine import Engine, FunnelConfig, HeadConfig, convert
from funnel_engine.checkpoints.native import read_checkpoint
from funnel_engine.hugging_face_config import read_model_config
from funnel_engine.weights import count_parameters, expected_shapes

SMALL = {
    "num_hidden_layers": 3,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@pytest.fixture
def small(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setitem(demo_model.CONFIG, name, value)


def test_the_demo_is_a_bidirectional_gemma_of_18_layers():
    config = read_model_config(demo_model.CONFIG)
    assert (config.family, config.num_layers, config.attention) == ("gemma", 18, "bidirectional")
    assert 60e6 < count_parameters(expected_shapes(config, HeadConfig())) < 80e6


@pytest.mark.usefixtures("small")
def test_it_converts_runs_and_takes_texts(tmp_path):
    source, converted = tmp_path / "hugging-face", tmp_path / "converted"
    source.mkdir()
    make_demo_model(source)
    assert json.loads((source / "config.json").read_text())["num_hidden_layers"] == 3
    convert(source, converted)
    checkpoint = read_checkpoint(converted)
    assert (checkpoint.config.hidden_size, checkpoint.dtype) == (24, "bfloat16")
    for name, weight in checkpoint.weights.items():
        assert np.asarray(weight, np.float32).std() == pytest.approx(0.02, rel=0.3), name
    vectors = Engine.load(converted, funnel=FunnelConfig.after(1)).embed(["A funnel pools tokens.", "Fewer rows."])
    assert vectors.shape == (2, 24)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3


@pytest.mark.usefixtures("small")
def test_the_files_are_the_same_every_time(tmp_path):
    first, second = tmp_path / "1", tmp_path / "2"
    for directory in (first, second):
        directory.mkdir()
        make_demo_model(directory)
    make_demo_model(first)  # over an earlier one
    names = sorted(file.name for file in first.iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_the_tokenizer_takes_any_text_and_puts_bos_first():
    tokenizer = make_tokenizer()
    assert tokenizer.get_vocab_size() <= demo_model.CONFIG["vocab_size"]
    for text in ("A funnel pools neighbouring tokens.", "  völlig anders:\tΔ 漢字 🙂\n"):
        ids = tokenizer.encode(text).ids
        assert ids[0] == 2
        assert max(ids) < tokenizer.get_vocab_size()
        assert tokenizer.decode(ids) == text
    known = tokenizer.encode("neighbouring tokens").ids
    assert len(known) < 8  # learnt, not spelt byte by byte
    assert [tokenizer.token_to_id(token) for token in ("<pad>", "<eos>", "<bos>", "<unk>")] == [0, 1, 2, 3]
