"""Arguments that a call refuses before it touches memory: sequences, ids, buffers, null pointers, missing heads."""

import ctypes

import numpy as np
import pytest

from c_library import IDS, OFFSETS, TYPES, WIDTH, Info, Options, floats, pointer, refusal


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": None}, "INVALID_ARGUMENT: offsets is NULL"),
        ({"ids": None}, "INVALID_ARGUMENT: ids is NULL"),
        ({"count": 0}, "INVALID_ARGUMENT: count is 0"),
        ({"count": -3}, "INVALID_ARGUMENT: count is -3"),
        ({"offsets": [1, 4, 9, 12]}, r"INVALID_ARGUMENT: offsets\[0\] is 1; it must be 0"),
        ({"offsets": [-1, 4, 9, 12]}, r"INVALID_ARGUMENT: offsets\[0\] is -1"),
        ({"offsets": [0, 4, 3, 12]}, r"INVALID_ARGUMENT: offsets\[2\] is 3, less than the 4 before it"),
        ({"offsets": [0, 4, 9, -12]}, r"INVALID_ARGUMENT: offsets\[3\] is -12"),
        ({"offsets": [0, -(2**31), 9, 12]}, r"INVALID_ARGUMENT: offsets\[1\] is -2147483648"),
        ({"offsets": [0, 4, 9, 2**31 - 1]}, "INPUT: sequence 2 has 2147483638 tokens, more than the limit of 16"),
        ({"offsets": [0, 4, 4, 12]}, "INPUT: sequence 1 is empty"),
        ({"truncate_dim": -1}, f"INVALID_ARGUMENT: truncate_dim is -1; give 1 ... {WIDTH}, or 0"),
        ({"truncate_dim": WIDTH + 1}, f"INVALID_ARGUMENT: truncate_dim is {WIDTH + 1}"),
    ],
)
def test_malformed_sequences_are_refused_before_an_id_is_read(library, plain, change, message):
    """The ids lie at an address that cannot be read."""
    out = np.full((3, WIDTH + 1), 123, np.float32)
    arguments = {"ids": ctypes.c_void_p(64), "out": out} | change
    if isinstance(arguments.get("offsets"), list):
        arguments["offsets"] = np.array(arguments["offsets"], np.int32)
    with refusal(message):
        library.embed(plain, **arguments)
    np.testing.assert_array_equal(out, 123)


@pytest.mark.parametrize("bad", [-1, 101, 2**31 - 1])
def test_ids_out_of_vocabulary(library, plain, bad):
    ids = IDS.copy()
    ids[5] = bad
    with refusal(f"INPUT: input 1 holds token id {bad}; ids must be from 0 to 100"):
        library.embed(plain, ids)


@pytest.mark.parametrize("bad", [-1, 3, 2**31 - 1])
@pytest.mark.parametrize("function", ["embed_typed", "answer"])
def test_token_types_out_of_range(library, answers, function, bad):
    types = TYPES.copy()
    types[5] = bad
    out = np.full((12, 24), 123, np.float32)
    with refusal(f"INPUT: types are from {min(bad, 0)} to {max(bad, 2)}; they must be from 0 to 2"):
        library.typed(function, answers, out, types)
    np.testing.assert_array_equal(out, 123)


def test_token_types_of_a_model_without_them(library, plain, classifier, tagger):
    for function, handle in (("embed_typed", plain), ("classify_typed", classifier), ("tag_typed", tagger)):
        with refusal("INPUT: inputs have token types, which a model of family gemma2 does not read"):
            library.typed(function, handle, np.empty((12, 24), np.float32))


def test_short_buffers_are_refused_and_not_written(library, plain, classifier, tagger):
    for function, handle, size, needed in (
        ("embed", plain, 3 * WIDTH - 1, f"3 x {WIDTH} = {3 * WIDTH};"),
        ("classify", classifier, 8, "3 x 3 = 9;"),
        ("tag", tagger, 47, "12 x 4 = 48;"),
    ):
        out = np.full(size, 123, np.float32)
        before = library.stats(handle)
        with refusal(rf"BUFFER_TOO_SMALL: out has room for {size} floats, .* {needed}"):
            library.embed(handle, out=out) if function == "embed" else library.label(function, handle, out)
        np.testing.assert_array_equal(out, 123)
        assert library.stats(handle) == before


def test_short_memory_for_stats(library, plain):
    size = ctypes.c_size_t
    needed = size()
    with refusal("BUFFER_TOO_SMALL: json has room for 0 bytes, but the text needs "):
        library.call("stats", plain, None, size(0), ctypes.byref(needed))
    text = ctypes.create_string_buffer(b"x" * 999)
    with refusal(f"BUFFER_TOO_SMALL: .*needs {needed.value};"):
        library.call("stats", plain, text, size(needed.value - 1), None)
    assert text.value == b"x" * 999
    with refusal("INVALID_ARGUMENT: json is NULL but json_size is 5"):
        library.call("stats", plain, None, size(5), None)
    library.call("stats", plain, text, needed, None)
    assert len(text.value) + 1 == needed.value


def test_null_pointers(library, plain, checkpoints):
    for function, arguments in (
        ("warmup", ()),
        ("warmup_buckets", (None, 0, None, None)),
        ("embed_texts", (None, None, 1, None, 0, 1, 0, None, ctypes.c_size_t(0))),
        ("describe", (None, ctypes.c_size_t(0), None)),
        ("get_info", (ctypes.byref(Info(ctypes.sizeof(Info))),)),
        ("embed", (pointer(IDS), pointer(OFFSETS), 3, 1, 0, *floats(np.empty(100, np.float32)))),
        ("classify", (pointer(IDS), pointer(OFFSETS), 3, *floats(np.empty(100, np.float32)))),
        ("tag", (pointer(IDS), pointer(OFFSETS), 3, *floats(np.empty(100, np.float32)))),
        *(
            (name, (pointer(IDS), pointer(TYPES), pointer(OFFSETS), 3, *floats(np.empty(100, np.float32))))
            for name in ("classify_typed", "tag_typed", "answer")
        ),
        ("embed_typed", (pointer(IDS), pointer(TYPES), pointer(OFFSETS), 3, 1, 0, *floats(np.empty(100, np.float32)))),
        ("stats", (None, ctypes.c_size_t(0), None)),
        ("close", ()),
    ):
        with refusal("INVALID_ARGUMENT: engine is NULL"):
            library.call(function, None, *arguments)
        with refusal("INVALID_ARGUMENT: engine is no handle"):
            library.call(function, ctypes.c_void_p(2**40), *arguments)
    with refusal("INVALID_ARGUMENT: info is NULL"):
        library.call("get_info", plain, None)
    for function in ("embed", "classify", "tag"):
        middle = (3, 1, 0) if function == "embed" else (3,)
        handle = plain if function == "embed" else library.open(checkpoints["classifier"])
        with refusal("INVALID_ARGUMENT: out is NULL; give memory for "):
            library.call(function, handle, pointer(IDS), pointer(OFFSETS), *middle, None, ctypes.c_size_t(100))
    handle = ctypes.c_void_p(1)
    with refusal("INVALID_ARGUMENT: options is NULL"):
        library.call("open", None, ctypes.byref(handle))
    assert not handle
    with refusal("INVALID_ARGUMENT: engine is NULL"):
        library.call("open", ctypes.byref(Options(ctypes.sizeof(Options), b"x")), None)
    with refusal("INVALID_ARGUMENT: checkpoint is NULL"):
        library.open(None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": [b"a", None]}, r"INVALID_ARGUMENT: texts\[1\] is NULL"),
        ({"texts": []}, "INVALID_ARGUMENT: count is 0"),
        ({"lengths": [2**64 - 1]}, r"INVALID_ARGUMENT: lengths\[0\] is 18446744073709551615, more than memory"),
        ({"truncate_dim": 2**28, "out": np.empty(1, np.float32)}, "INVALID_ARGUMENT: truncate_dim is 268435456"),
        ({"out": np.empty(WIDTH - 1, np.float32)}, f"BUFFER_TOO_SMALL: .* 1 x {WIDTH} = {WIDTH};"),
        ({"prompt_name": b"other"}, "INPUT: prompt_name='other' is unknown; this checkpoint's prompts: query, größe"),
        ({"prompt_name": b"\xff"}, "INPUT: prompt_name is not UTF-8"),
        ({"texts": [b"a", b"small \xc3"]}, "INPUT: input 1 is not UTF-8: unexpected end of data at byte 6"),
        ({"texts": [b""]}, "INPUT: input 0 is an empty text"),
        ({"texts": [b"a " * 20]}, "INPUT: input 0 has 22 tokens, more than the limit of 16"),
    ],
)
def test_texts_that_are_refused(library, texts, change, message):
    with refusal(message):
        library.embed_texts(texts, **({"texts": [b"a"]} | change))


def test_texts_without_a_tokenizer(library, plain):
    with refusal("INPUT: this checkpoint has no tokenizer"):
        library.embed_texts(plain, [b"a"])


@pytest.mark.parametrize(
    ("rows", "count", "message"),
    [
        (None, 2, "INVALID_ARGUMENT: buckets is NULL but count is 2"),
        ([3], 0, "INVALID_ARGUMENT: buckets is given but count is 0"),
        ([3], -1, "INVALID_ARGUMENT: count is -1"),
        ([3, 0], 2, r"INPUT: buckets\[1\]=0 must be an integer from 1 to 16"),
        ([17], 1, r"INPUT: buckets\[0\]=17 must"),
    ],
)
def test_buckets_that_are_refused(library, plain, rows, count, message):
    given = None if rows is None else pointer(np.array(rows, np.int32))
    with refusal(message):
        library.call("warmup_buckets", plain, given, count, None, None)


def test_tasks_that_the_checkpoint_has_no_head_for(library, plain, classifier, answers):
    out = np.empty(48, np.float32)
    with refusal("CONFIG: classify needs a head"):
        library.label("classify", plain, out)
    with refusal("CONFIG: tag needs a head"):
        library.label("tag", classifier, out)
    with refusal("CONFIG: answer needs a head"):
        library.typed("answer", classifier, out, types=None)
    with refusal("CONFIG: tag needs a head"):
        library.typed("tag_typed", answers, out)
