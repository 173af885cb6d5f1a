"""Engines over meshes of simulated devices give what one device gives. Run by `test_sharding.py`, or by hand:

    XLA_FLAGS="--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0" \\
    pytest tests/engine/eight_devices.py

The second flag makes XLA compile these programs three times as fast.
"""

import dataclasses
import functools
import importlib
import re
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
import transformers
from jax.sharding import Mesh

import funnel_transformer_models
from funnel_engine import BackendUnavailable, ConfigError, Engine, FunnelConfig, HeadConfig, convert
from funnel_engine.config import Rope
from funnel_engine.heads import DenseConfig
from funnel_engine.inputs import Ragged
from funnel_engine.packing import make_plan, pack, spans
from funnel_engine.sharding import DeviceMesh, abstract_forward
from funnel_engine.weights import expected_shapes
from funnel_kernels import Target
from hugging_face_models import build, gemma3
from option_grid import target
from tiny_models import CONFIG, make_engine, random_ids

# heads, key/value heads, norms and softcap as the models of the family have them
GROUPED = dataclasses.replace(CONFIG, hidden_size=32)  # Gemma 2: 4 heads, 2 key/value heads, post-norms, softcap
MULTI_QUERY = dataclasses.replace(GROUPED, num_kv_heads=1, softcap=None, post_norms=False)
BIASED = dataclasses.replace(GROUPED, attention_bias=True, mlp_bias=True)
MULTI_HEAD = dataclasses.replace(GROUPED, num_kv_heads=4, softcap=None, qk_norm=True, full_rope=Rope(1e6, 8.0))
# For the kernels on TPUs: rows that fill their registers, and sequences of more than one of their blocks.
WIDE = dataclasses.replace(GROUPED, hidden_size=128, max_positions=150, layer_types=("sliding", "full"), softcap=None)
MODELS = {
    "grouped, funnel": (GROUPED, FunnelConfig((1, 3), recovery="sum_max")),
    "multi-query, pooled queries": (MULTI_QUERY, FunnelConfig((1, 2), pool_query_only=True)),
    "grouped, two funnels of pooled queries": (
        dataclasses.replace(GROUPED, qk_norm=True),
        FunnelConfig((2, 1, 2), pool_query_only=True, recovery="mean_last", recovery_site="after_norm"),
    ),
    "grouped, last token alone": (GROUPED, FunnelConfig((1, 2, 2), pool="mean", keep_last=True)),
    "multi-head, no funnel": (MULTI_HEAD, FunnelConfig()),
    "biases": (BIASED, FunnelConfig((1, 2))),
    "multi-query, biases, pooled queries": (
        dataclasses.replace(MULTI_QUERY, attention_bias=True, mlp_bias=True),
        FunnelConfig((1, 2), pool_query_only=True),
    ),
    "last token kept": (GROUPED, FunnelConfig((1, 2), keep_last=True)),
}
MESHES = {
    "model 2": {"model": 2},
    "model 4": {"model": 4},
    "data 2, model 2": {"data": 2, "model": 2},
    "data 8": {"data": 8},
}
POOLED = HeadConfig(
    pooling="attention",
    pooler=True,
    dense=(DenseConfig(20, 32, True, "tanh"),),
    task="classify",
    labels=("a", "b", "c"),
)
TAGGER = HeadConfig(task="tag", labels=("O", "B", "I"), classifier_bias=True)
RAGGED = [11, 23, 1, 13]  # one batch of 64 rows, on one device


def mesh_of(**sizes: int) -> Mesh:
    shape = tuple(sizes.values())
    return Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), tuple(sizes))


def assert_close(got, expected, atol=1e-5):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=atol)


@functools.cache
def on_one_device(name):
    config, funnel = MODELS[name]
    return make_engine(HeadConfig(), config, funnel=funnel).hidden_states(random_ids(RAGGED))


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("grouped, funnel", "model 2"),  # each device has one key/value head and its two query heads
        ("grouped, funnel", "model 4"),  # two devices share a key/value head
        ("grouped, funnel", "data 8"),
        ("multi-query, pooled queries", "model 4"),
        ("multi-query, pooled queries", "data 2, model 2"),
        ("grouped, two funnels of pooled queries", "model 2"),
        ("grouped, two funnels of pooled queries", "data 8"),
        ("grouped, last token alone", "model 2"),
        ("grouped, last token alone", "data 8"),
        ("multi-head, no funnel", "model 4"),
        ("multi-head, no funnel", "data 2, model 2"),
        ("last token kept", "data 2, model 2"),
        ("last token kept", "data 8"),
    ],
)
def test_a_mesh_gives_what_one_device_gives(name, mesh):
    config, funnel = MODELS[name]
    engine = make_engine(HeadConfig(), config, funnel=funnel, mesh=mesh_of(**MESHES[mesh]))
    assert_close(engine.hidden_states(random_ids(RAGGED)), on_one_device(name))


@functools.cache
def wide(backend, mesh=None):
    """The engine, and what it makes of two batches that do not need the same blocks of keys."""
    funnel = FunnelConfig((1, 2), pool_query_only=True, recovery="sum_max")
    engine = make_engine(HeadConfig(), WIDE, funnel=funnel, max_batch_tokens=150, backend=backend, mesh=mesh)
    return engine, engine.hidden_states(random_ids([150, 60, 75]))


@pytest.mark.parametrize("backend", ["reference", "triton", "tpu"])
def test_every_backend_runs_over_a_mesh(backend, monkeypatch):
    """On four of the eight devices, because an interpreted kernel holds one of XLA's eight threads on each of its
    devices, and waits for another to read its arguments."""
    _, expected = wide("xla")
    monkeypatch.setattr(Target, "of", lambda device, backend, threads: target(backend))
    engine, states = wide(backend, mesh_of(data=2, model=2))
    assert_close(states, expected)
    for op in ("attention", "pool_norm", "recover_norm"):
        assert re.search(rf"^{op} +{backend}$", engine.describe(), re.MULTILINE)
    assert engine.stats()["batches"] == 2


def test_rows_in_blocks(monkeypatch):
    """On a CPU the MLP of many rows is a loop over blocks of rows, with a sum in each."""
    config = dataclasses.replace(MULTI_QUERY, max_positions=1300)
    module = importlib.import_module("funnel_kernels.mlp")
    monkeypatch.setattr(module, "HIDDEN_PER_BLOCK", 500 * config.intermediate_size // 4)
    one, many = (
        make_engine(HeadConfig(), config, max_batch_tokens=1300, mesh=mesh) for mesh in (None, mesh_of(model=4))
    )
    assert_close(many.hidden_states(random_ids([1300])), one.hidden_states(random_ids([1300])))


@functools.cache
def with_heads(**sizes: int) -> Engine:
    config, funnel = MODELS["multi-query, pooled queries"]
    return make_engine(POOLED, config, funnel=funnel, mesh=mesh_of(**sizes) if sizes else None)


@pytest.mark.parametrize("mesh", ["data 2, model 2", "data 8"])
@pytest.mark.parametrize("lengths", [[7], [9, 3, 64], [5, 64, 1, 33, 17, 2, 50, 8, 21, 40, 64, 64, 13, 30] * 3])
def test_embed_and_classify(lengths, mesh):
    """Fewer batches than devices along "data", about as many, and more."""
    ids = random_ids(lengths)
    one, many = with_heads(), with_heads(**MESHES[mesh])
    assert_close(many.embed(ids), one.embed(ids))
    assert_close(many.embed(ids, normalize=False, truncate_dim=7), one.embed(ids, normalize=False, truncate_dim=7))
    padded = [np.append(sequence, [0, 0])[:64] for sequence in ids]
    assert_close(many.classify(padded), one.classify(padded))


def test_tag():
    config, funnel = MODELS["grouped, funnel"]
    ids = random_ids(RAGGED * 2)
    one, many = (make_engine(TAGGER, config, funnel=funnel, mesh=mesh) for mesh in (None, mesh_of(data=2, model=2)))
    assert_close(many.tag(ids), one.tag(ids))


def test_a_funnel_transformer_has_all_devices_along_data(tmp_path):
    torch_model = funnel_transformer_models.random_model("FunnelForQuestionAnswering")
    funnel_transformer_models.save(torch_model, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "model", dtype="float32")
    ids, offsets, types = funnel_transformer_models.random_inputs(RAGGED * 2)
    one, many = (Engine.load(tmp_path / "model", max_batch_tokens=64, mesh=mesh) for mesh in (None, mesh_of(data=8)))
    for call in ("embed", "answer", "hidden_states"):
        assert_close(*(getattr(engine, call)(Ragged(ids, offsets, types)) for engine in (many, one)), atol=1e-4)
    with pytest.raises(ConfigError, match="2 devices along 'model', but a Funnel-Transformer is not divided"):
        Engine.load(tmp_path / "model", mesh=mesh_of(model=2))


def test_a_funnel_by_length():
    """Also where a layer has its projections in one matrix for one class and in two for another."""
    funnel = [(0, None), (10, FunnelConfig.after(1, pool_query_only=True)), (33, "0:3/mean")]
    ids = random_ids(RAGGED * 2)
    one, many = (make_engine(POOLED, GROUPED, funnel=funnel, mesh=mesh) for mesh in (None, mesh_of(data=2, model=2)))
    for call in ("embed", "classify", "hidden_states"):
        assert_close(getattr(many, call)(ids), getattr(one, call)(ids))


def test_few_sequences_are_spread_over_all_devices():
    """32 sequences that one batch would hold: a batch of four on each of eight devices, in the smallest bucket."""
    many = make_engine(HeadConfig(), GROUPED, mesh=mesh_of(data=8), max_batch_tokens=1024)
    many.embed(random_ids([16] * 32))
    stats = many.stats()
    assert (stats["batches"], stats["padding_rows"], stats["compilations"]) == (8, 0, 2)


def test_batches_are_as_large_as_one_round_needs_and_no_sequence_is_lost():
    devices = DeviceMesh(mesh_of(data=4, model=2), GROUPED)
    plan = make_plan(GROUPED, FunnelConfig.after(1))
    buckets = (16, 32, 48, 64)
    generator = np.random.default_rng(5)
    for count in (1, 3, 4, 5, 40):
        for _ in range(20):
            lengths = generator.integers(1, 64, count).astype(np.int32)
            groups = devices.group_batches(plan, lengths, buckets)
            batches = [batch for group in groups for batch in group]
            assert sorted(np.concatenate(batches)) == list(range(count))
            rows = [int(plan.rows_needed(lengths[batch]).sum()) for batch in batches]
            assert max(rows) <= 64
            assert all(len(group) == 4 for group in groups[:-1])
            assert 1 <= len(groups[-1]) <= 4
            # The largest bucket would need as many rounds, and has at most two batches that would fit into one.
            assert len(groups) <= -(-(2 * sum(rows) // 64 + 1) // 4)
            if max(rows) <= 32:
                assert len(groups) == 1 or sum(rows) > 4 * 16


def test_counters_count_what_was_asked_for_and_rows_of_idle_devices():
    many = make_engine(HeadConfig(), GROUPED, mesh=mesh_of(data=4))
    many.embed(random_ids([64, 60, 30]))  # three batches side by side, the fourth device has none
    stats = many.stats()
    assert (stats["calls"], stats["sequences"], stats["tokens"], stats["batches"]) == (1, 3, 154, 3)
    assert stats["padding_rows"] == 4 * 64 - 154


def test_nothing_compiles_after_warmup():
    config, funnel = MODELS["grouped, funnel"]
    many = make_engine(POOLED, config, funnel=funnel, mesh=mesh_of(data=2, model=2), max_batch_tokens=24)
    many.warmup(progress=False)
    compiled = many.stats()["compilations"]
    assert compiled >= 3 * len(many.programs[0].buckets)
    for lengths in ([1], [24], [1] * 30, [5, 24, 3, 3, 9], [2] * 7):
        ids = random_ids(lengths)
        many.embed(ids), many.classify(ids), many.hidden_states(ids)
    stats = many.stats()
    assert stats["compilations"] == compiled
    assert stats["compilations_after_warmup"] == 0


@pytest.mark.parametrize(
    ("config", "model", "copies"), [(GROUPED, 2, 1), (GROUPED, 4, 2), (MULTI_QUERY, 2, 2), (MULTI_HEAD, 4, 1)]
)
def test_a_device_holds_its_share_of_the_weights_and_no_more(config, model, copies):
    """`copies`: how many devices along "model" hold the same key/value head."""
    many = make_engine(POOLED, config, mesh=mesh_of(data=2, model=model))
    split = ("attention_output", "gate_up", "down", "embedding")
    expected = 0
    for name, shape in expected_shapes(config, POOLED).items():
        leaf = name.split(".")[-1]
        if leaf == "qkv":
            heads = config.num_heads / model + 2 * config.num_kv_heads * copies / model
            expected += 4 * heads * config.head_dim * config.hidden_size
        else:
            expected += 4 * np.prod(shape) / (model if leaf in split else 1)
    held = dict.fromkeys(jax.devices()[: 2 * model], 0)
    for weight in jax.tree.leaves(many.params):
        for shard in weight.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert set(held.values()) == {expected}


def test_describe_names_the_mesh():
    text = make_engine(HeadConfig(), GROUPED, mesh=mesh_of(model=2, data=4)).describe()
    order = ", ".join(str(jax.devices()[index]) for index in (0, 4, 1, 5, 2, 6, 3, 7))
    assert re.search(rf"^devices +data 4 x model 2: {order}$", text, re.MULTILINE)


def test_over_a_mesh_products_are_not_the_kernels_of_backend_cpu():
    reason = "weights are not packed when an engine runs on a mesh"
    text = make_engine(HeadConfig(), GROUPED, mesh=mesh_of(model=2)).describe()
    assert re.search(rf"^gated_linear +xla; .*not cpu: {reason}$", text, re.MULTILINE)
    with pytest.raises(BackendUnavailable, match=f"not served by backend 'cpu': cpu: {reason}"):
        make_engine(HeadConfig(), GROUPED, mesh=mesh_of(model=2), backend="cpu")


@pytest.mark.parametrize(
    ("mesh", "dtype", "atol"),
    [
        (jax.make_mesh((4, 2), ("data", "model")), None, 0.03),
        (jax.make_mesh((6,), ("model",)), "float32", 1e-5),
    ],
)
def test_a_checkpoint_is_loaded_over_a_mesh(tmp_path, mesh, dtype, atol):
    """From the mapped file, cast on the way if need be; meshes as JAX makes them."""
    build(transformers.Gemma3TextModel, gemma3(use_bidirectional_attention=True)).save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "model", dtype="bfloat16")
    one, many = (Engine.load(tmp_path / "model", dtype=dtype, max_batch_tokens=64, mesh=m) for m in (None, mesh))
    for path, weight in jax.tree.leaves_with_path(many.params):
        assert str(weight.dtype) == ("float32" if path[-1].key.endswith("_norm") else dtype or "bfloat16")
    ids = random_ids([12, 3, 30])
    assert_close(many.embed(ids), one.embed(ids), atol)


def test_threads_that_share_devices_do_not_wait_for_each_other_forever():
    """Two engines, whose devices are in different order, called from many threads."""
    one = make_engine(HeadConfig(), GROUPED)
    meshes = mesh_of(data=2, model=2), Mesh(np.array(jax.devices()[3::-1]), ("model",))
    engines = [make_engine(HeadConfig(), GROUPED, mesh=mesh) for mesh in meshes]
    calls = [random_ids([9, 4], seed) for seed in range(200)]
    with ThreadPoolExecutor(32) as pool:
        results = [pool.map(engine.embed, calls) for engine in engines]
    for ids, *vectors in zip(calls, *results, strict=True):
        for vector in vectors:
            assert_close(vector, one.embed(ids))


def test_one_program_is_queued_at_a_time_whatever_the_mesh():
    inside, most = 0, 0

    def program(pause):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(pause)
        inside -= 1

    programs = [DeviceMesh(mesh, GROUPED).thread_safe(program) for mesh in (mesh_of(model=4), mesh_of(data=8))]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda index: programs[index % 2](0.002), range(24)))
    assert most == 1


@pytest.mark.parametrize("name", ["grouped, funnel", "multi-query, pooled queries"])
def test_compiled_ahead_from_shapes_alone(name):
    """Two sums a layer and the embedding's rows are all that travels; the arguments are those of an engine."""
    config, funnel = MODELS[name]
    program, params, batch = abstract_forward(mesh_of(data=2, model=4), config, funnel, rows=72, dtype="float32")
    compiled = program.lower(params, batch).compile()
    collectives = re.findall(r" (all-[a-z]+|reduce-scatter|collective-[a-z]+)(?:-start)?\(", compiled.as_text())
    assert sorted(collectives) == ["all-gather"] + ["all-reduce"] * 2 * config.num_layers

    many = make_engine(HeadConfig(), config, funnel=funnel, mesh=mesh_of(data=2, model=4))
    facts = functools.partial(jax.tree.map, lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding))
    assert facts(params) == facts(many.params)
    ids, offsets = np.concatenate(random_ids(RAGGED)), np.cumsum([0, *RAGGED]).astype(np.int32)
    packed = pack(many.programs[0].plan, ids, offsets, 72)
    rows = np.asarray(
        compiled(many.params, jax.tree.map(lambda array: np.stack([np.zeros_like(array), array]), packed))
    )
    assert rows.shape == (2, 72 // funnel.output_stride, config.hidden_size)
    for first, count, expected in zip(
        *spans(many.programs[0].plan, np.array(RAGGED), funnel.output_stride), on_one_device(name), strict=True
    ):
        assert_close(rows[1, first : first + count], expected)


def test_a_mesh_that_does_not_fit():
    with pytest.raises(ConfigError, match="the mesh has 8 devices along 'model', which does not divide num_heads=4"):
        make_engine(HeadConfig(), GROUPED, mesh=mesh_of(model=8))
    with pytest.raises(ConfigError, match="the mesh has 3 devices along 'model', which does not divide num_heads=4"):
        make_engine(HeadConfig(), GROUPED, mesh=mesh_of(data=2, model=3))
    with pytest.raises(ConfigError, match="which does not divide hidden_size=30"):
        make_engine(HeadConfig(), dataclasses.replace(GROUPED, hidden_size=30), mesh=mesh_of(data=2, model=4))
    with pytest.raises(ConfigError, match="mesh axis 'tensor' is unknown; name the axes of a mesh 'data' or 'model'"):
        make_engine(HeadConfig(), GROUPED, mesh=mesh_of(data=2, tensor=2))


def test_devices_of_another_process_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(ConfigError, match=r"devices of other processes, e\.g\. .*0; .* mesh of jax.local_devices"):
        make_engine(HeadConfig(), GROUPED, mesh=mesh_of(data=2))
