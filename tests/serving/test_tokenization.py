"""Requests become token ids: limits, cutting, pairs, and what each token is."""

from types import SimpleNamespace

import numpy as np
import pytest

from funnel_engine.pairs import ADDED, Cut
from funnel_engine.text import JsonTokenizer, TextConfig
from funnel_serving.refusals import Refusal
from funnel_serving.tokenization import decode, describe_tokens, read_request
from tiny_models import make_engine, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made = make_tokenizer()
    made.post_processor = type(made.post_processor)(
        single="<bos> $A <eos>", pair="<bos> $A <eos> $B <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    made.save(str(file))
    return JsonTokenizer(file)


@pytest.fixture(scope="module")
def engine(tokenizer):
    return make_engine(tokenizer=tokenizer, text=TextConfig(begin=2, end=1, prompts={"query": "query: "}))


def sequences(tokenized):
    return [ids.tolist() for ids in np.split(tokenized.inputs.ids, tokenized.inputs.offsets[1:-1])]


def test_texts_and_ids_are_what_the_engine_runs(engine):
    texts = ["a small funnel", "tokens of pairs"]
    for options in ({}, {"prompt_name": "query"}):
        read = read_request(engine, texts, **options)
        expected = engine.token_ids(texts, **options)
        np.testing.assert_array_equal(read.inputs.ids, expected.ids)
        np.testing.assert_array_equal(read.inputs.offsets, expected.offsets)
        assert read.truncated == 0
    assert sequences(read_request(engine, [[5, 6], [7]])) == [[5, 6], [7]]


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        (Cut(6), [2, 4, 5, 6, 7, 1]),
        (Cut(4), [2, 4, 5, 1]),
        (Cut(4, from_left=True), [2, 6, 7, 1]),
        (Cut(2), [2, 1]),
        (Cut(1, from_left=True), [2]),
    ],
)
def test_what_the_checkpoint_adds_remains_when_a_text_is_cut(engine, cut, expected):
    read = read_request(engine, ["a small funnel pools", "a"], cut=cut)
    assert sequences(read)[0] == expected
    assert read.truncated == (cut.tokens < 6) + (cut.tokens < 3)


def test_cutting_at_the_engines_limit_agrees_with_the_engine(engine):
    texts = ["funnel " * 200, "a"]
    expected = engine.token_ids(texts, truncate=True)
    read = read_request(engine, texts, cut=Cut(engine.max_length))
    np.testing.assert_array_equal(read.inputs.ids, expected.ids)
    assert read.truncated == 1
    assert sequences(read_request(engine, [list(range(3, 90))], cut=Cut(4, from_left=True))) == [[86, 87, 88, 89]]


def test_pairs_follow_the_rules_of_the_tokenizer(engine):
    read = read_request(engine, [("a small", "funnel"), "a"])
    assert sequences(read) == [[2, 4, 5, 1, 6, 1], [2, 4, 1]]


def test_a_pair_has_token_types_where_the_model_reads_them(engine, tmp_path):
    """Also after a cut, which takes the same tokens out of the types."""
    pair = make_tokenizer()
    pair.post_processor = type(pair.post_processor)(
        single="<bos> $A <eos>", pair="<bos> $A <eos> $B:1 <eos>:1", special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    pair.save(str(tmp_path / "tokenizer.json"))
    reader = SimpleNamespace(
        tokenizer=JsonTokenizer(tmp_path / "tokenizer.json"),
        text=engine.text,
        max_length=64,
        config=SimpleNamespace(token_types=True),
    )
    pairs = [("a small", "funnel"), ("a small funnel pools", "pairs of tokens")]
    read = read_request(reader, pairs, cut=Cut(7))
    assert read.truncated == 1
    assert read.inputs.types.tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1]
    reader.config.token_types = False
    assert read_request(reader, pairs).inputs.types is None


@pytest.mark.parametrize("room", range(8))
@pytest.mark.parametrize("from_left", [False, True])
def test_the_longer_text_of_a_pair_is_cut_first(tokenizer, room, from_left):
    """As the tokenizers library does it."""
    texts = ("a small funnel pools pairs", "of tokens")
    encoding = tokenizer.tokenizer.encode(*texts)
    kept = Cut(room + 3, from_left).kept(np.array([ADDED if text is None else text for text in encoding.sequence_ids]))
    theirs = type(tokenizer.tokenizer).from_str(tokenizer.tokenizer.to_str())
    theirs.enable_truncation(room + 3, strategy="longest_first", direction="left" if from_left else "right")
    expected = theirs.encode(*texts)
    assert sorted(encoding.tokens[index] for index in kept) == sorted(expected.tokens)


def test_tokens_say_which_characters_they_are(engine):
    text = "a small funnel"
    for prompt in (None, "query"):
        (tokens,) = describe_tokens(engine, [text], prompt_name=prompt)
        assert [token.id for token in tokens] == engine.token_ids([text], prompt_name=prompt).ids.tolist()
        places = [text[token.start : token.stop] for token in tokens if token.start is not None]
        assert places == ["a", "small", "funnel"]
        assert [token.special for token in tokens] == [True, *[False] * (len(tokens) - 2), True]
    assert [token.text for token in describe_tokens(engine, ["a"])[0]] == ["<bos>", "a", "<eos>"]
    assert len(describe_tokens(engine, ["a"], add_special_tokens=False)[0]) == 1


def test_ids_are_decoded(engine):
    assert decode(engine, [[2, 4, 5, 1]], skip_special_tokens=False) == ["<bos> a small <eos>"]
    with pytest.raises(Refusal, match=r"ids 1 has 101; ids must be from 0 to 100"):
        decode(engine, [[4], [4, 101]], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("kind", "message", "inputs"),
    [
        ("empty", "there are no inputs", []),
        ("empty", "input 1 is empty", ["a", ""]),
        ("empty", "input 0 is empty", [[]]),
        ("empty", "input 0 is empty", [("a", "")]),
        ("validation", "input 1 has 72 tokens, more than the limit of 64; shorten it, or ask", ["a", "a " * 70]),
        ("validation", "input 0 holds token id 101", [[101]]),
        ("validation", "input 0 holds token id -1", [[-1]]),
        ("validation", "range of int32", [[2**40]]),
        ("validation", "input 1 is a list", ["a", [4]]),
        ("validation", "half of a surrogate pair", ["\ud800"]),
    ],
)
def test_a_request_that_cannot_be_run_is_refused(engine, kind, message, inputs):
    with pytest.raises(Refusal, match=message) as refusal:
        read_request(engine, inputs)
    assert refusal.value.kind == kind


def test_a_checkpoint_says_what_it_cannot_do(tokenizer):
    bare = make_engine()
    for call in (
        lambda: read_request(bare, ["a"]),
        lambda: read_request(bare, [("a", "b")]),
        lambda: describe_tokens(bare, ["a"]),
        lambda: decode(bare, [[4]], skip_special_tokens=True),
    ):
        with pytest.raises(Refusal, match="tokenizer") as refusal:
            call()
        assert refusal.value.kind == "unsupported"
    other = make_engine(tokenizer=tokenizer, text=TextConfig(begin=2))
    with pytest.raises(Refusal, match="no rule for pairs of texts"):
        read_request(other, [("a", "b")])
