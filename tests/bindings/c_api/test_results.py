"""Results through the C API are the engine's, to the bit."""

import ctypes
import os
import shutil

import numpy as np
import pytest

from c_library import IDS, OFFSETS, TYPES, WIDTH, Info
from funnel_engine import Engine
from funnel_engine.inputs import Ragged


@pytest.mark.parametrize(("normalize", "truncate_dim"), [(1, 0), (0, 0), (1, 7), (0, WIDTH)])
def test_embed_is_the_engines(library, plain, engines, normalize, truncate_dim):
    expected = engines["plain"].embed((IDS, OFFSETS), normalize=bool(normalize), truncate_dim=truncate_dim or None)
    found = library.embed(plain, normalize=normalize, truncate_dim=truncate_dim)
    np.testing.assert_array_equal(found, expected)


def test_classify_and_tag_are_the_engines(library, classifier, tagger, engines):
    logits = library.label("classify", classifier, np.empty((3, 3), np.float32))
    np.testing.assert_array_equal(logits, engines["classifier"].classify((IDS, OFFSETS)))
    logits = library.label("tag", tagger, np.empty((12, 4), np.float32))
    np.testing.assert_array_equal(logits, np.concatenate(engines["tagger"].tag((IDS, OFFSETS))))


def test_token_types_are_the_engines(library, answers, classifier, tagger, engines):
    given = Ragged(IDS, OFFSETS, TYPES)
    vectors = library.typed("embed_typed", answers, np.empty((3, 24), np.float32))
    np.testing.assert_array_equal(vectors, engines["answers"].embed(given, normalize=False))
    logits = library.typed("answer", answers, np.empty((12, 2), np.float32))
    np.testing.assert_array_equal(logits, np.concatenate(engines["answers"].answer(given)))
    without = library.typed("answer", answers, np.empty((12, 2), np.float32), types=None)
    np.testing.assert_array_equal(without, np.concatenate(engines["answers"].answer((IDS, OFFSETS))))
    assert not np.allclose(without, logits)
    for function, handle, shape in (("classify", classifier, (3, 3)), ("tag", tagger, (12, 4))):
        out = library.typed(f"{function}_typed", handle, np.empty(shape, np.float32), types=None)
        np.testing.assert_array_equal(out, library.label(function, handle, np.empty(shape, np.float32)))


def test_a_larger_buffer_is_written_only_as_far_as_the_result_goes(library, plain, engines):
    out = np.full(3 * WIDTH + 5, 123, np.float32)
    library.embed(plain, out=out)
    np.testing.assert_array_equal(out[: 3 * WIDTH].reshape(3, WIDTH), engines["plain"].embed((IDS, OFFSETS)))
    np.testing.assert_array_equal(out[3 * WIDTH :], 123)


def test_info(library, plain, classifier, tagger, answers):
    for handle, labels, task in ((plain, 0, 0), (classifier, 3, 1), (tagger, 4, 2), (answers, 2, 3)):
        info = Info(ctypes.sizeof(Info))
        library.call("get_info", handle, ctypes.byref(info))
        found = info.embedding_size, info.labels, info.max_length, info.vocabulary_size, info.task
        assert found == (WIDTH, labels, 16, 101, task)
        assert info.struct_size == ctypes.sizeof(Info)


@pytest.mark.parametrize("prompt", [None, "query", "größe"])
@pytest.mark.parametrize(("normalize", "truncate_dim", "truncate"), [(1, 0, 0), (0, 7, 1)])
def test_embed_texts_is_the_engines(library, texts, checkpoints, prompt, normalize, truncate_dim, truncate):
    given = ["a small funnel", "pools", "of " * (40 if truncate else 4)]
    expected = Engine.load(checkpoints["texts"], max_batch_tokens=16).embed(
        given, normalize=bool(normalize), truncate_dim=truncate_dim or None, prompt_name=prompt, truncate=bool(truncate)
    )
    options = {"normalize": normalize, "truncate_dim": truncate_dim, "truncate": truncate}
    name, encoded = prompt and prompt.encode(), [text.encode() for text in given]
    np.testing.assert_array_equal(library.embed_texts(texts, encoded, prompt_name=name, **options), expected)
    lengths = [len(text) for text in encoded]
    longer = [text + b" not read" for text in encoded]
    found = library.embed_texts(texts, longer, lengths=lengths, prompt_name=name, **options)
    np.testing.assert_array_equal(found, expected)


def test_describe_is_the_engines(library, plain, engines):
    assert library.text("describe", plain) == engines["plain"].describe()


def test_warmup_compiles_all_and_stats_say_so(library, checkpoints):
    handle = library.open(checkpoints["plain"])
    library.call("warmup", handle)
    before = library.stats(handle)
    assert before["compilations"] >= 2
    library.embed(handle)
    after = library.stats(handle)
    assert after["compilations"] == before["compilations"]
    assert (after["calls"], after["sequences"], after["tokens"]) == (1, 3, 12)
    library.close(handle)


def test_a_checkpoint_whose_path_is_not_ascii(library, checkpoints, tmp_path):
    name = os.fsdecode("über-\N{SNOWMAN}".encode() + b"-\xff")  # its last byte is not UTF-8
    shutil.copytree(checkpoints["plain"], tmp_path / name)
    library.close(library.open(tmp_path / name))
