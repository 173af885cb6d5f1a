"""Handles: calls after and during a close, from several threads at once."""

import ctypes
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from c_library import IDS, OFFSETS, Info, refusal
from funnel_engine import Engine, InputError


def test_calls_after_close(library, checkpoints, plain):
    handle = library.open(checkpoints["classifier"])
    library.close(handle)
    for call in (
        lambda: library.close(handle),
        lambda: library.call("warmup", handle),
        lambda: library.call("get_info", handle, ctypes.byref(Info(ctypes.sizeof(Info)))),
        lambda: library.embed(handle),
        lambda: library.label("classify", handle, np.empty(9, np.float32)),
        lambda: library.label("tag", handle, np.empty(36, np.float32)),
        lambda: library.embed_texts(handle, [b"a"]),
        lambda: library.warmup(handle, [3]),
        lambda: library.stats(handle),
        lambda: library.text("describe", handle),
    ):
        with refusal("CLOSED: the engine was closed"):
            call()
    assert library.open(checkpoints["plain"]).value != handle.value
    library.embed(plain)


@pytest.mark.parametrize("fails", [False, True])
def test_closing_under_a_running_call(library, checkpoints, engines, monkeypatch, fails):
    """The call finishes with its result or its error, later ones are told, and then the engine is freed."""
    handle = library.open(checkpoints["plain"])
    running, closed, alive = threading.Event(), threading.Event(), []
    embed = Engine.embed

    def held_up(engine, *arguments, **options):
        alive.append(weakref.ref(engine))
        running.set()
        assert closed.wait(60)
        if fails:
            raise InputError("too late")
        return embed(engine, *arguments, **options)

    monkeypatch.setattr(Engine, "embed", held_up)
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(library.embed, handle)
        assert running.wait(60)
        library.close(handle)
        with refusal("CLOSED"):
            library.stats(handle)
        assert alive[0]() is not None
        closed.set()
        if fails:
            with refusal("INPUT: too late"):
                result.result()
    monkeypatch.undo()
    if not fails:
        np.testing.assert_array_equal(result.result(), engines["plain"].embed((IDS, OFFSETS)))
    del result
    gc.collect()
    assert alive[0]() is None


def test_four_threads_at_once(library, plain, tagger, engines):
    vectors = engines["plain"].embed((IDS, OFFSETS))
    logits = np.concatenate(engines["tagger"].tag((IDS, OFFSETS)))

    def work(index: int) -> None:
        for _ in range(25):
            np.testing.assert_array_equal(library.embed(plain), vectors)
            np.testing.assert_array_equal(library.label("tag", tagger, np.empty((12, 4), np.float32)), logits)
            with refusal("INVALID_ARGUMENT: count is 0"):
                library.embed(plain, count=0)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
