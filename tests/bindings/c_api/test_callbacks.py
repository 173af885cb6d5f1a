"""Functions of the host that the library calls: for what is logged, and for the progress of a warm-up."""

import logging
import threading
import warnings

import pytest

from c_library import LOG, refusal
from funnel_engine.c_host import HostLog


@pytest.fixture
def logged(library, plain):
    """What the log function gets, until the test is over. An engine is open, without which Python is not asked."""
    messages = []
    function = LOG(lambda level, message, user: messages.append((level, message.decode(), user)))
    library.call("set_log", function, 7)
    yield messages
    library.call("set_log", None, None)


def test_what_is_logged_reaches_the_host(library, checkpoints, logged, monkeypatch):
    logging.getLogger("jax").warning("slow %s", "compilation")
    odd = logging.LogRecord("anything", logging.ERROR, "", 0, "nul \0 and half of a pair \ud800", None, None)
    for handler in logging.getLogger().handlers:  # only the library's: pytest cannot report such a text
        if isinstance(handler, HostLog):
            handler.handle(odd)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)  # catch_warnings has put its own function there
        warnings.warn("of a library", UserWarning, stacklevel=1)
    assert logged[:2] == [(30, "slow compilation", 7), (40, "nul \\0 and half of a pair ?", 7)]
    assert logged[2][0] == 30
    assert "UserWarning: of a library" in logged[2][1]
    library.close(library.open(checkpoints["plain"]))  # which connects the log again
    logging.getLogger("jax").warning("once")
    assert logged[3:] == [(30, "once", 7)]


def test_a_log_function_is_replaced_and_removed(library, logged):
    handlers = len(logging.getLogger().handlers)
    others = []
    other = LOG(lambda level, message, user: others.append(message))
    library.call("set_log", other, None)
    logging.getLogger("jax").warning("to the other")
    assert (logged, others) == ([], [b"to the other"])
    assert len(logging.getLogger().handlers) == handlers
    library.call("set_log", None, None)
    logging.getLogger("jax").warning("to nobody")
    assert others == [b"to the other"]
    assert len(logging.getLogger().handlers) == handlers - 1


def test_threads_log_one_at_a_time(library, plain):
    inside, most = [], []

    def log(*_):
        inside.append(1)
        most.append(len(inside))
        inside.pop()

    function = LOG(log)
    library.call("set_log", function, None)
    threads = [
        threading.Thread(target=lambda: [logging.getLogger("jax").warning("one") for _ in range(100)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    library.call("set_log", None, None)
    assert len(most) == 400
    assert set(most) == {1}


def test_progress_of_a_warmup(library, checkpoints):
    handle, told = library.open(checkpoints["plain"], '{"max_batch_tokens": 24}'), []

    def stop_at_second(done, total, user):
        told.append((done, total))
        return int(done == 2)

    with refusal(r"CANCELLED: the warm-up was stopped after 2 of \d+ programs; call it again to go on"):
        library.warmup(handle, None, stop_at_second)
    total = told[0][1]
    assert told == [(1, total), (2, total)]
    told.clear()
    library.warmup(handle, None, lambda done, total, user: told.append((done, total)) or 0)
    assert told == [(done, total) for done in range(1, total + 1)]
    assert library.stats(handle)["compilations"] == total
    library.close(handle)


def test_a_warmup_of_chosen_buckets(library, checkpoints):
    handle = library.open(checkpoints["plain"], '{"max_batch_tokens": 24}')
    library.warmup(handle, [12, 16])
    few = library.stats(handle)["compilations"]
    library.embed(handle)
    assert library.stats(handle)["compilations"] == few
    library.call("warmup", handle)
    assert library.stats(handle)["compilations"] > few
    library.close(handle)


def test_a_callback_that_calls_the_library_is_told(library, plain, logged):
    told = []

    def call(*_):
        for name, arguments in (("warmup", ()), ("close", ()), ("set_log", None)):
            with refusal("INVALID_ARGUMENT: a callback cannot call this library"):
                library.call(name, *((None, None) if arguments is None else (plain, *arguments)))
            told.append(name)
        logging.getLogger("jax").warning("inside")  # not handed to a callback inside a callback
        return 0

    library.warmup(plain, [3], call)
    assert told[:3] == ["warmup", "close", "set_log"]
    assert logged == []
    library.embed(plain)
