"""Calls keep neither memory nor references, and a closed engine is gone."""

import ctypes
import gc
import sys
from typing import Any

import numpy as np
import pytest

from c_library import IDS, STATUSES, WIDTH, Info, Refused
from funnel_engine import Engine, c_host


class MallInfo(ctypes.Structure):
    """What glibc's mallinfo2 returns."""

    NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = tuple((name, ctypes.c_size_t) for name in NAMES.split())


def in_use(shared: list[Any]) -> np.ndarray:
    """Blocks of Python's allocator, references to shared objects, bytes of malloc."""
    gc.collect()
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = MallInfo
    info = mallinfo()
    return np.array([sys.getallocatedblocks(), sum(map(sys.getrefcount, shared)), info.uordblks + info.hblkhd])


def engines_alive() -> list[Engine]:
    gc.collect()
    return [item for item in gc.get_objects() if type(item) is Engine]


@pytest.mark.slow
def test_hundreds_of_calls_keep_nothing(library, classifier, tagger, texts):
    """Calls of every kind, those that fail too."""
    bad = IDS.copy()
    bad[3] = -1
    vectors, logits = np.empty((3, WIDTH), np.float32), np.empty(48, np.float32)
    info = Info(ctypes.sizeof(Info))
    shared = [c_host, None, True, False, *c_host.STATUSES, *STATUSES.values(), *engines_alive()]

    def refused(call: Any) -> None:
        with pytest.raises(Refused):
            call()

    calls = {
        "embed": lambda: library.embed(classifier, out=vectors),
        "classify": lambda: library.label("classify", classifier, logits),
        "tag": lambda: library.label("tag", tagger, logits),
        "embed_texts": lambda: library.embed_texts(texts, [b"a small", b"funnel"], prompt_name=b"query"),
        "warmup": lambda: library.warmup(texts, [3], lambda *_: 0),
        "stats": lambda: library.stats(tagger),
        "describe": lambda: library.text("describe", texts),
        "info": lambda: library.call("get_info", tagger, ctypes.byref(info)),
        "an error of the engine": lambda: refused(lambda: library.embed(classifier, bad, out=vectors)),
        "an error of a text": lambda: refused(lambda: library.embed_texts(texts, [b"\xff"])),
        "a warm-up that is stopped": lambda: refused(lambda: library.warmup(texts, [3], lambda *_: 1)),
        "an error of a task": lambda: refused(lambda: library.label("classify", tagger, logits)),
        "an error of an argument": lambda: refused(lambda: library.embed(classifier, count=0, out=vectors)),
        "an error of opening": lambda: refused(lambda: library.open("/nowhere")),
    }
    limits = np.array([40, 40, 2560])  # less than one block, one reference or one allocation (32 bytes) a call
    for name, call in calls.items():
        for _ in range(20):  # Python and JAX fill caches of their own during the first thousand calls; a leak goes on
            before = in_use(shared)
            for _ in range(160):
                call()
            kept = in_use(shared) - before
            if (kept <= limits).all():
                break
        assert (kept <= limits).all(), f"{name}: {kept} blocks, references, bytes"


def test_opening_and_closing_keeps_no_engine(library, checkpoints):
    before, references = len(engines_alive()), sys.getrefcount(c_host)
    for _ in range(20):
        library.close(library.open(checkpoints["plain"]))
        with pytest.raises(Refused):
            library.open(checkpoints["plain"], '{"dtype": "float16"}')
    assert len(engines_alive()) == before
    assert sys.getrefcount(c_host) == references
