"""Prompts by name, and the two kinds of tokenizer file."""

import json
import os
import sys

import pytest
import sentencepiece
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from funnel_engine.text import TextConfig, raising, read_tokenizer
from funnel_kernels import CheckpointError, InputError
from sentence_models import TEXTS, train_sentencepiece, train_tokenizer

PROMPTS = {"query": "task: search result | query: ", "none": ""}


@pytest.mark.parametrize(
    ("default", "name", "prompt"),
    [
        (None, None, ""),
        (None, "query", PROMPTS["query"]),
        ("query", None, PROMPTS["query"]),
        ("query", "none", ""),
        ("none", "query", PROMPTS["query"]),
    ],
)
def test_prompt(default, name, prompt):
    assert TextConfig(prompts=PROMPTS, default_prompt_name=default).prompt(name) == prompt


@pytest.mark.parametrize("name", ["Query", "", 3, ["query"]])
def test_unknown_prompt(name):
    with pytest.raises(InputError, match="is unknown; this checkpoint's prompts: query, none"):
        TextConfig(prompts=PROMPTS).prompt(name)
    with pytest.raises(InputError, match="is unknown; this checkpoint's prompts: none"):
        TextConfig().prompt(name)


def test_tokenizer_json_adds_nothing_pads_nothing_cuts_nothing(tmp_path):
    tokenizer = train_tokenizer("<bos> $A <eos>")
    expected = [tokenizer.encode(text).ids[1:-1] for text in TEXTS]
    tokenizer.enable_padding()
    tokenizer.enable_truncation(4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert read_tokenizer(tmp_path / "tokenizer.json")(TEXTS) == expected


@pytest.fixture
def model(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece())
    return tmp_path / "tokenizer.model"


def test_sentencepiece(model):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    plain = [text for text in TEXTS if not any(token in text for token in ("<bos>", "<eos>", "<pad>", "<unk>"))]
    assert len(plain) > 8
    assert read_tokenizer(model)(plain) == [processor.encode(text) for text in plain]


def test_special_tokens_inside_a_text_of_sentencepiece(model):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    small, pools = processor.encode("a small "), processor.encode(" pools")
    tokenize = read_tokenizer(model)
    assert tokenize(["a small <eos> pools", "<bos><unk>", "a small ", "<pad> pools<eos>"]) == [
        [*small, 1, *pools],
        [2, 3],
        small,
        [0, *pools, 1],
    ]
    assert tokenize([]) == []
    assert tokenize([""]) == [[]]


def test_sentencepiece_is_not_installed(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(CheckpointError, match=r"pip install 'funnel-engine\[sentencepiece\]'"):
        read_tokenizer(model)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_damaged_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x00nonsense")
    with pytest.raises(CheckpointError, match="convert without it to get a checkpoint that takes token ids only"):
        read_tokenizer(tmp_path / name)


def test_text_that_the_tokenizer_cannot_read(tmp_path):
    Tokenizer(WordLevel({"x": 7}, unk_token="<unk>")).save(str(tmp_path / "tokenizer.json"))
    tokenize = read_tokenizer(tmp_path / "tokenizer.json")
    assert tokenize(["x"]) == [[7]]
    with pytest.raises(InputError, match=r"tokenizer\.json cannot read these texts: .*lacks the unknown token"):
        tokenize(["x", "y"])


def test_tokenizer_json_on_which_the_library_panics(tmp_path):
    content = json.loads(train_tokenizer().to_str())
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="is not a tokenizer that the tokenizers library reads: Precompiled"):
        read_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("signal", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_is_no_fault_of_a_tokenizer_passes(signal):
    with pytest.raises(signal), raising(InputError, "what", "remedy"):
        raise signal


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_file_that_is_too_large(tmp_path, name):
    with (tmp_path / name).open("wb") as file:
        file.truncate(500_000_001)  # without a byte on the disk
    with pytest.raises(CheckpointError, match=r"has 500,000,001 bytes; a tokenizer has at most 500,000,000\. Fetch"):
        read_tokenizer(tmp_path / name)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_pipe(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match="is not a regular file; put the tokenizer itself there"):
        read_tokenizer(tmp_path / name)
