"""Which status a failure in Python becomes, and how its message gets into the caller's buffer."""

import ctypes

import numpy as np
import pytest

from c_library import STATUSES, Options, refusal
from funnel_engine import Engine, FunnelError, c_host


def test_every_error_of_the_project_has_a_status_of_its_own():
    assert set(c_host.STATUSES) == {*FunnelError.__subclasses__(), c_host.Cancelled}
    assert {kind.__name__: status for kind, status in c_host.STATUSES.items()} == {
        "InputError": STATUSES["INPUT"],
        "ConfigError": STATUSES["CONFIG"],
        "CheckpointError": STATUSES["CHECKPOINT"],
        "BackendUnavailable": STATUSES["BACKEND_UNAVAILABLE"],
        "Cancelled": STATUSES["CANCELLED"],
    }
    assert STATUSES["INTERNAL"] == c_host.INTERNAL


def test_a_package_of_another_version(library, checkpoints, monkeypatch):
    monkeypatch.setattr(c_host, "API_VERSION", c_host.API_VERSION + 1)
    with refusal("PYTHON: the Python package funnel-engine is of another version"):
        library.open(checkpoints["plain"])


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError, SystemExit, KeyboardInterrupt])
def test_no_exception_gets_out(library, plain, monkeypatch, kind):
    expected = library.embed(plain)

    def embed(*_, **__):
        raise kind("boom")

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "embed", embed)
        with refusal(f"INTERNAL: {kind.__name__}: boom"):
            library.embed(plain)
        patch.setattr(c_host, "explain", embed)
        with refusal("INTERNAL: Python raised an error that cannot be described"):
            library.embed(plain)
    np.testing.assert_array_equal(library.embed(plain), expected)


def test_the_error_buffer_is_always_terminated(library, monkeypatch, checkpoints):
    """Cut to its size between two characters; bytes behind it stay."""
    monkeypatch.setattr(c_host, "explain", lambda _: (5, "aä€😀".encode()))
    given, handle = Options(ctypes.sizeof(Options), b"/nowhere"), ctypes.c_void_p()
    cuts = {1: "", 2: "a", 3: "a", 4: "aä", 6: "aä", 7: "aä€", 10: "aä€", 11: "aä€😀", 20: "aä€😀"}
    for size, message in cuts.items():
        error = ctypes.create_string_buffer(b"x" * 30)
        status = library.functions.funnel_open(ctypes.byref(given), ctypes.byref(handle), error, ctypes.c_size_t(size))
        assert (status, error.value.decode()) == (STATUSES["CONFIG"], message)
        assert error.raw[size:30] == b"x" * (30 - size)
    for error, size in ((None, 0), (None, 5), (ctypes.create_string_buffer(b"x"), 0)):
        arguments = ctypes.byref(given), ctypes.byref(handle), error, ctypes.c_size_t(size)
        assert library.functions.funnel_open(*arguments) == STATUSES["CONFIG"]
        assert error is None or error.value == b"x"
