"""What `describe()` and `doctor` say is what the compiled program does: read from the program's own text."""

import re

import jax
import numpy as np
import pytest

from funnel_engine import FunnelConfig, HeadConfig
from funnel_engine.devices import local_target
from funnel_engine.programs import ProgramKey
from funnel_engine.served_by import served_by
from tiny_models import CONFIG, make_engine

FUNNEL = FunnelConfig((1, 2), pool_query_only=True, recovery="mean_last")
# The handlers that an op of backend "cpu" may call.
HANDLERS = {
    "attention": {"funnel_attention"},
    "add_norm": {"funnel_norm", "funnel_add_norm"},
    "pool_norm": {"funnel_pool_norm"},
    "recover_norm": {"funnel_recover_norm"},
    "linear": {"funnel_linear"},
    "gated_linear": {"funnel_gated_linear"},
    "linear_add_norm": {"funnel_linear_add_norm", "funnel_linear", "funnel_norm", "funnel_add_norm"},
    "project_heads": {"funnel_project_heads", "funnel_linear"},
}
OPS = {"add_norm", "project_heads", "attention", "linear_add_norm", "gated_linear", "pool_norm", "recover_norm"}


def answers(engine) -> dict[str, str]:
    """op -> the backend that `describe` names first."""
    lines = (line.split(None, 1) for line in engine.describe().splitlines())
    return {name: fact.partition(";")[0] for name, fact in lines if name in HANDLERS}


def forward_text(engine) -> str:
    """The encoder's program of the smallest bucket, as it is given to XLA."""
    return engine.programs[0]._trace(ProgramKey("forward", engine.programs[0].buckets[0])).lower().as_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["auto", "cpu", "xla"])
def test_every_op_of_the_program_is_named_with_the_backend_that_the_program_calls(backend, dtype):
    engine = make_engine(funnel=FUNNEL, backend=backend, dtype=dtype)
    named, text = answers(engine), forward_text(engine)
    assert set(named) == OPS
    called = set(re.findall(r"custom_call @(funnel_\w+)\(", text))
    of_the_cpu = {op for op, served in named.items() if served == "cpu"}
    assert set(named.values()) <= {"cpu", "xla"}
    assert called <= set().union(*(HANDLERS[op] for op in of_the_cpu))
    for op in of_the_cpu:
        assert called & HANDLERS[op], f"{op} is said to be served by cpu, and the program calls {called}"
    products = {"project_heads", "gated_linear", "linear_add_norm"}
    assert ("dot_general" in text) == bool(products - of_the_cpu or "attention" not in of_the_cpu)


def test_a_mesh_has_products_and_norms_of_their_own():
    engine = make_engine(funnel=FUNNEL, mesh=jax.make_mesh((1,), ("model",)))
    text, named = forward_text(engine), answers(engine)
    assert named["gated_linear"] == "xla"
    assert "dot_general" in text
    assert named["attention"] == "cpu"
    assert "@funnel_attention" in text


def test_a_head_that_runs_an_op_is_in_it_too():
    engine = make_engine(HeadConfig(pooling="attention", pooler=True), backend="reference")
    engine.programs[0].record._served.clear()
    engine.programs[0]._trace(ProgramKey("embed", engine.programs[0].buckets[0], 1))
    assert engine.programs[0].record.facts() == {"attention": "reference"}


def test_the_record_of_programs_that_are_served_differently_has_each_answer():
    engine = make_engine(backend="xla")
    engine.embed([np.arange(3, 9)])
    facts = engine.programs[0].record.facts()
    assert set(facts) == {"add_norm", "project_heads", "attention", "linear_add_norm", "gated_linear"}
    assert set(facts.values()) == {"xla"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_weights_the_answers_are_those_of_an_engine(dtype):
    """Which is how `doctor` and the benchmarks ask."""
    engine = make_engine(funnel=FUNNEL, dtype=dtype)
    engine.describe()
    assert served_by(CONFIG, FUNNEL, dtype, local_target()).facts() == engine.programs[0].record.facts()
