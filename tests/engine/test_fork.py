"""A fork of a process that has an engine: it raises, and never hangs."""

import subprocess
import sys
from pathlib import Path

CHILD = """
import os, signal, warnings
warnings.simplefilter("ignore")  # JAX's own warning at the fork
from funnel_engine import BackendUnavailable
from tiny_models import make_engine, random_ids

ids = random_ids([5])
engine = make_engine()
engine.embed(ids)
child = os.fork()
if child == 0:
    signal.alarm(60)  # ends a child that hangs
    calls = [
        lambda: engine.embed(ids),
        lambda: engine.hidden_states(ids),
        lambda: engine.classify(ids),
        lambda: engine.tag(ids),
        lambda: engine.start(engine.token_ids(ids), "embed"),
        lambda: engine.warmup(progress=False),
        engine.describe,
        engine.stats,
        make_engine,  # XLA's threads are gone for a new engine, too
    ]
    for call in calls:
        try:
            call()
        except BackendUnavailable as error:
            assert f"JAX runs in process {os.getppid()} and this is a fork of it, {os.getpid()}" in str(error)
            assert "'spawn'" in str(error)
        else:
            os._exit(1)
    os._exit(0)
_, status = os.waitpid(child, 0)
assert status == 0, status
engine.embed(ids)
"""


def test_an_engine_is_refused_in_a_fork():
    paths = [str(Path(__file__).parents[1]), *sys.path]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}\n{CHILD}"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


LATER = """
import os
from tiny_models import make_engine, random_ids

child = os.fork()  # before any engine is made
if child == 0:
    make_engine().embed(random_ids([5]))
    os._exit(0)
_, status = os.waitpid(child, 0)
assert status == 0, status
make_engine().embed(random_ids([5]))
"""


def test_an_engine_that_is_made_after_the_fork_works():
    paths = [str(Path(__file__).parents[1]), *sys.path]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}\n{LATER}"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
