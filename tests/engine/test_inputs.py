"""Every form of input, and every input that cannot be run."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from funnel_engine.inputs import Ragged, read_inputs
from funnel_engine.pairs import NoPairs
from funnel_engine.text import TextConfig
from funnel_kernels.errors import InputError
from tiny_models import TEXT, tokenize

BOTH_ENDS = TextConfig(begin=2, end=1)
PROMPTS = TextConfig(begin=2, prompts={"query": "query: "})


def read(inputs, tokenizer=tokenize, text=TEXT, **options):
    return read_inputs(inputs, tokenizer, text, **({"vocab_size": 20, "max_length": 6} | options))


def as_lists(ragged: Ragged) -> list[list[int]]:
    return [ids.tolist() for ids in np.split(ragged.ids, ragged.offsets[1:-1])]


@pytest.mark.parametrize(
    ("text", "before", "after"),
    [(TextConfig(), [], []), (TEXT, [2], []), (TextConfig(end=1), [], [1]), (BOTH_ENDS, [2], [1])],
)
def test_texts_get_the_ids_of_begin_and_end(text, before, after):
    assert as_lists(read("a small funnel", text=text)) == [[*before, 4, 5, 6, *after]]
    two = read(["pools pairs", "tokens"], text=text)
    assert as_lists(two) == [[*before, 7, 8, *after], [*before, 10, *after]]
    assert two.ids.dtype == two.offsets.dtype == np.int32


def test_ids_do_not_get_them():
    assert as_lists(read([[4, 5], [6]], text=BOTH_ENDS)) == [[4, 5], [6]]


def test_all_texts_are_tokenized_in_one_call():
    calls = []
    read(["a", "small", "funnel"], lambda texts: calls.append(texts) or tokenize(texts), PROMPTS, prompt_name="query")
    assert calls == [["query: a", "query: small", "query: funnel"]]


LONG = "a small funnel pools pairs of tokens"  # ids 4 ... 10


@pytest.mark.parametrize(
    ("text", "max_length", "ids"),
    [
        (BOTH_ENDS, 5, [2, 4, 5, 6, 1]),
        (BOTH_ENDS, 8, [2, 4, 5, 6, 7, 8, 9, 1]),
        (BOTH_ENDS, 9, [2, 4, 5, 6, 7, 8, 9, 10, 1]),
        (BOTH_ENDS, 2, [2, 1]),
        (BOTH_ENDS, 1, [2]),
        (TEXT, 3, [2, 4, 5]),
        (TextConfig(end=1), 3, [4, 5, 1]),
        (TextConfig(), 3, [4, 5, 6]),
    ],
)
def test_truncation_of_a_text_keeps_begin_and_end(text, max_length, ids):
    assert as_lists(read(["tokens", LONG], text=text, max_length=max_length, truncate=True))[1] == ids


def test_truncation_counts_the_prompt():
    text = dataclasses.replace(PROMPTS, end=1)
    cut = read(LONG, text=text, prompt_name="query", max_length=5, truncate=True)
    assert as_lists(cut) == [[2, *tokenize(["query: a"])[0], 1]]


@pytest.mark.parametrize("inputs", [[[3, 4, 5], [6]], (np.array([3, 4, 5, 6]), np.array([0, 3, 4]))])
def test_truncation_of_ids_cuts_the_end_off(inputs):
    assert as_lists(read(inputs, text=BOTH_ENDS, max_length=2, truncate=True)) == [[3, 4], [6]]
    assert as_lists(read(inputs, text=BOTH_ENDS, max_length=3, truncate=True)) == [[3, 4, 5], [6]]


def test_a_prompt_goes_before_every_text():
    assert as_lists(read(["a", "of tokens"], text=PROMPTS, prompt_name="query")) == [[2, 3, 3, 4], [2, 3, 3, 9, 10]]


@pytest.mark.parametrize(
    "inputs",
    [
        [[3, 4, 5], [6]],
        [np.array([3, 4, 5]), np.array([6], np.uint8)],
        (np.array([3, 4, 5, 6]), np.array([0, 3, 4])),
        (np.array([3, 4, 5, 6], np.uint16), np.array([0, 3, 4], np.int64)),
    ],
    ids=["lists", "arrays", "ragged", "ragged of other integers"],
)
def test_ids(inputs):
    ragged = read(inputs)
    assert as_lists(ragged) == [[3, 4, 5], [6]]
    assert ragged.ids.dtype == ragged.offsets.dtype == np.int32


ARRAYS = {"numpy": np.array, "torch": torch.tensor, "jax": jnp.array}


@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
def test_arrays_of_every_library(array):
    assert as_lists(read(array([[3, 4], [5, 6]]))) == [[3, 4], [5, 6]]
    assert as_lists(read([array([3, 4]), array([5])])) == [[3, 4], [5]]
    assert as_lists(read((array([3, 4, 5]), array([0, 2, 3])))) == [[3, 4], [5]]
    with pytest.raises(InputError, match=r"input 0 has dtype float\d\d; it must be an integer array"):
        read(array([[3.0, 4.0]]))


def test_an_array_that_numpy_cannot_read_is_named():
    with pytest.raises(InputError, match=r"the array of inputs, of type Tensor, cannot be read .*copy it to"):
        read(torch.zeros((2, 3), dtype=torch.int64, device="meta"))
    with pytest.raises(InputError, match="input 1, of type Tensor, cannot be read"):
        read([[3], torch.zeros(3, dtype=torch.int64, device="meta")])


class Column:
    """Texts in a container that is not a sequence, e.g. a column of pandas."""

    def __array__(self, dtype=None, copy=None):
        return np.array(["a", "of tokens"], object)


@pytest.mark.parametrize(
    "texts",
    [
        ("a", "of tokens"),
        np.array(["a", "of tokens"]),
        np.array(["a", "of tokens"], object),
        np.array(["a", "of tokens"], np.dtypes.StringDType()),
        Column(),
    ],
    ids=["tuple", "array", "array of objects", "array of variable width", "column"],
)
@pytest.mark.parametrize("prompt_name", [None, "query"])
def test_texts_in_any_container(texts, prompt_name):
    expected = read(["a", "of tokens"], text=PROMPTS, prompt_name=prompt_name)
    assert as_lists(read(texts, text=PROMPTS, prompt_name=prompt_name)) == as_lists(expected)


def test_one_text_as_an_array():
    assert as_lists(read(np.array("of tokens"), text=PROMPTS, prompt_name="query")) == [[2, 3, 3, 9, 10]]


@pytest.mark.parametrize(
    "nested",
    [
        [("a", "of tokens", "b"), ("b", "c", "a")],
        [["a", "of tokens"], ["b", "c"]],
        [["a"], ["b"]],
        np.array([["a", "b"]]),
        (np.array(["a"]), np.array(["b"])),
        [["a", 3]],
    ],
    ids=["triples", "lists of two", "lists", "array of two axes", "tuple of arrays", "texts and ids"],
)
def test_nested_texts_are_told_so(nested):
    with pytest.raises(InputError, match=r"(input 0|ids) contains several texts where token ids are needed; give"):
        read(nested)


def test_pairs_need_the_rule_of_a_tokenizer_json():
    for inputs in ([("a", "of tokens"), ("b", "c")], ["a", ("b", "c")]):
        with pytest.raises(NoPairs, match=r"pairs of texts need a checkpoint with tokenizer\.json"):
            read(inputs)
    with pytest.raises(InputError, match="prompt_name='query' is for single texts"):
        read([("a", "of tokens")], text=PROMPTS, prompt_name="query")


def test_a_prompt_needs_texts():
    with pytest.raises(InputError, match="prompt_name='query' needs texts; token ids must already begin with"):
        read([[3, 4]], text=PROMPTS, prompt_name="query")
    with pytest.raises(InputError, match="prompt_name='query' needs texts"):
        read((np.array([3, 4]), np.array([0, 2])), text=PROMPTS, prompt_name="query")


def test_take_reorders_sequences():
    ragged = read([[3, 4, 5], [6], [7, 8]])
    assert as_lists(ragged.take(np.array([2, 0], np.int32))) == [[7, 8], [3, 4, 5]]


ids, offsets = np.array([3, 4, 5, 6], np.int32), np.array([0, 3, 4], np.int32)
BAD = {
    "an empty list": ([], "list of inputs is empty"),
    "an empty text": (["a", ""], "input 1 is an empty text"),
    "an empty sequence": ([[3], []], "input 1 is an empty sequence"),
    "an empty sequence among ragged": ((ids, np.array([0, 3, 3, 4])), "input 1 is an empty sequence"),
    "an id beyond the vocabulary": ([[3], [4, 20]], r"input 1 holds token id 20; ids must be from 0 to 19"),
    "a negative id": ((np.array([3, -1, 5, 6]), offsets), "input 0 holds token id -1"),
    "a sequence too long": ([[3], [4] * 7], "input 1 has 7 tokens, more than the limit of 6"),
    "a text too long": ("a a a a a a", r"input 0 has 7 tokens, more than the limit of 6 .*truncate=True"),
    "offsets that start late": ((ids, np.array([1, 4])), "offsets starts at 1; it must start at 0"),
    "offsets that fall": ((ids, np.array([0, 3, 2, 4])), "offsets decreases from 3 to 2 at entry 2"),
    "offsets that end early": ((ids, np.array([0, 3])), "offsets ends at 3; it must end at the number of ids, 4"),
    "offsets that end late": ((ids, np.array([0, 5])), "offsets ends at 5; it must end at the number of ids, 4"),
    "offsets of one entry": ((ids, np.array([0])), "offsets has 1 entries"),
    "offsets of two axes": ((ids, offsets[None]), "1 and 2 axes"),
    "float ids": ((ids.astype(np.float32), offsets), "ids has dtype float32; it must be an integer array"),
    "float ids with NaN": ([np.array([3, np.nan])], r"input 0 has dtype float64 \(it contains NaN\)"),
    "bool ids": ([np.array([True])], "input 0 has dtype bool"),
    "float offsets": ((ids, offsets.astype(np.float64)), "offsets has dtype float64"),
    "ids beyond int32": ([np.array([2**40])], "must be in the range of int32"),
    "a nested sequence": ([[3], [[4], [5]]], "input 1 has 2 axes"),
    "a ragged nest": ([[3], [[4], [5, 6]]], "input 1 is not a flat sequence"),
    "an object": ([[3], [None]], "input 1 has dtype object"),
    "a tuple of two lists": (
        ([3, 4, 5], [6]),
        r"a tuple of two means \(ids, offsets\), and both must be integer arrays",
    ),
    "ragged of a list": ((ids, [0, 3, 4]), "both must be integer arrays; give two sequences as a list"),
    "ids without a list around them": (
        [3, 4],
        r"input 0 is 3, not a sequence of token ids; write a single sequence as \[\[",
    ),
    "an array of one number": (np.array(3), "not a sequence of token ids"),
    "half a surrogate pair": (["a", "b\ud800"], "input 1 contains half of a surrogate pair"),
    "a number": (3, "inputs of type int cannot be read"),
    "bytes": (b"a small funnel", "inputs of type bytes cannot be read"),
    "ids among texts": (["a", [3]], "input 1 is a list, but other inputs are texts"),
    "texts among ids": ([[3], "a"], "input 0 is a list, but other inputs are texts"),
}


@pytest.mark.parametrize(("inputs", "message"), BAD.values(), ids=BAD.keys())
def test_bad_inputs(inputs, message):
    with pytest.raises(InputError, match=message):
        read(inputs)


def test_texts_without_a_tokenizer():
    with pytest.raises(InputError, match="no tokenizer, so it takes token ids only"):
        read("a", tokenizer=None)


def test_ids_of_a_tokenizer_beyond_int32():
    with pytest.raises(
        InputError, match=r"input 1 has values from 2 to 4294967295; they must be in the range of int32"
    ):
        read(["a", "b"], tokenizer=lambda texts: [[3], [2**32 - 1]])


def test_tokenizer_that_makes_nothing_of_a_text():
    with pytest.raises(InputError, match="input 1 is an empty sequence"):
        read(["a", "b"], tokenizer=lambda texts: [[3], []], text=TextConfig())
