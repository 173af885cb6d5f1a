"""EmbeddingGemma 2 and Gemma 4: config.json, tensors, heads, training, and what is refused.

That the numbers are right, with a funnel and without one, is the business of the parity and funnel tests.
"""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from transformers import EmbeddingGemma2TextModel, Gemma4TextModel

import hugging_face_models as hf
from funnel_engine import CheckpointError, ConfigError, Engine, FunnelConfig, convert
from funnel_engine.checkpoints.native import read_checkpoint
from funnel_engine.config import ModelConfig, Rope, layer_steps
from funnel_engine.devices import map_weights
from funnel_engine.flops import forward_flops
from funnel_engine.heads import DenseConfig, HeadConfig
from funnel_engine.hugging_face_config import read_model_config
from funnel_engine.inspection import inspect_checkpoint
from funnel_engine.model import forward, rotation
from funnel_engine.packing import make_plan, pack
from funnel_engine.presets import preset
from funnel_engine.sharding import device_config
from funnel_engine.weights import count_parameters, expected_shapes, nest, prepare_weight, random_weights
from option_grid import target
from sentence_models import PROMPTS, TEXTS, VOCAB_SIZE, save_sentence_model, write_json

PROJECTED = hf.PROJECTED["embedding_dim"]
SHARED = {"num_kv_shared_layers": 2, "use_double_wide_mlp": True}

# ---------------------------------------------------------------------------------------------------- config.json

CLASSES = {
    "embedding_gemma2_text": transformers.EmbeddingGemma2TextConfig,
    "embedding_gemma2": transformers.EmbeddingGemma2Config,
    "gemma4_text": transformers.Gemma4TextConfig,
    "gemma4": transformers.Gemma4Config,
}


def as_written(config):
    return json.loads(config.to_json_string())


def expected(config):
    """The `ModelConfig` that the attributes of a transformers config mean."""
    own = {"bidirectional_window": (config.sliding_window,) * 2, "causal_window": (config.sliding_window, 0)}
    attention = "bidirectional"
    if config.model_type == "gemma4_text":
        attention = "bidirectional" if config.use_bidirectional_attention == "all" else "causal"
        window = 2 * (config.sliding_window - 1) if attention == "bidirectional" else config.sliding_window
        own = {
            "bidirectional_window": (window // 2,) * 2,
            "causal_window": (window - 1, 0),
            "keys_as_values": config.attention_k_eq_v,
            "kv_shared_layers": config.num_kv_shared_layers,
            "double_wide_mlp": config.use_double_wide_mlp,
            "per_layer_vocab": config.vocab_size_per_layer_input if config.hidden_size_per_layer_input else 0,
        }
    full, sliding = (config.per_layer_config[f"{name}_attention"] for name in ("full", "sliding"))
    ropes = {
        name: Rope(fields["rope_theta"], fields.get("factor", 1.0), fields.get("partial_rotary_factor", 1.0))
        for name, fields in config.rope_parameters.items()
    }
    return ModelConfig(
        family=config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=sliding.num_key_value_heads,
        head_dim=sliding.head_dim,
        full_kv_heads=full.num_key_value_heads,
        full_head_dim=full.head_dim,
        layer_types=tuple(name.removesuffix("_attention") for name in config.layer_types),
        query_scale=1.0,
        attention=attention,
        max_positions=config.max_position_embeddings,
        full_rope=ropes["full_attention"],
        sliding_rope=ropes["sliding_attention"],
        post_norms=True,
        qk_norm=True,
        value_norm=True,
        layer_scalar=True,
        per_layer_width=config.hidden_size_per_layer_input,
        norm_eps=config.rms_norm_eps,
        pad_token_id=config.pad_token_id,
        **own,
    )


@pytest.mark.parametrize("model_type", CLASSES)
def test_omitted_fields_have_the_defaults_of_the_class(model_type):
    config = CLASSES[model_type]()
    text = config.get_text_config()
    assert read_model_config({"model_type": model_type}) == expected(text)
    assert read_model_config(as_written(config)) == expected(text)


@pytest.mark.parametrize(
    "config",
    [
        hf.embedding_gemma2(pad_token_id=3, rms_norm_eps=1e-5),
        hf.embedding_gemma2(layer_types=["full_attention", "sliding_attention"]),  # the last layer becomes full
        hf.gemma4(**SHARED),
        hf.gemma4(use_bidirectional_attention="all", sliding_window=15),
        hf.gemma4(use_bidirectional_attention="vision"),
        hf.gemma4(attention_k_eq_v=True, num_global_key_value_heads=3),
        hf.gemma4(num_global_key_value_heads=3),  # is for models whose keys are their values
        hf.gemma4(hidden_size_per_layer_input=0, global_head_dim=14),
    ],
    ids=lambda config: config.model_type,
)
def test_fields_mean_what_they_mean_in_transformers(config):
    assert read_model_config(as_written(config)) == expected(config)


def test_an_old_config_gives_the_heads_of_full_layers_in_fields_of_their_own():
    fields = as_written(hf.gemma4(attention_k_eq_v=True, num_global_key_value_heads=3))
    del fields["per_layer_config"]
    config = read_model_config(fields | {"global_head_dim": 20, "num_global_key_value_heads": 3})
    assert config.heads("full") == (6, 3, 20)
    assert config.heads("sliding") == (6, 2, 14)


GEMMA_4, EMBEDDING = as_written(hf.gemma4()), as_written(hf.embedding_gemma2())
ROPES = GEMMA_4["rope_parameters"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (GEMMA_4 | {"enable_moe_block": True}, "enable_moe_block=true: this engine does not run experts"),
        (GEMMA_4 | {"attention_bias": 1}, "attention_bias=1 must be True or False"),
        (GEMMA_4 | {"hidden_activation": "silu"}, "activation 'silu' is not supported; it must be Gemma's"),
        (GEMMA_4 | {"use_bidirectional_attention": "some"}, "use_bidirectional_attention='some' is unknown"),
        (GEMMA_4 | {"attention_k_eq_v": 1}, "attention_k_eq_v=1 must be True or False"),
        (GEMMA_4 | {"num_kv_shared_layers": 4}, "kv_shared_layers=4 leaves no sliding layer with keys and values"),
        (GEMMA_4 | {"num_kv_shared_layers": 3}, "kv_shared_layers=3 leaves no full layer with keys and values"),
        (GEMMA_4 | {"num_kv_shared_layers": -1}, "num_kv_shared_layers=-1 must be an integer from 0"),
        (GEMMA_4 | {"vocab_size_per_layer_input": 100}, "per_layer_vocab=100 needs a row for each of the 101 tokens"),
        (GEMMA_4 | {"per_layer_config": []}, "per_layer_config must be a JSON object of objects"),
        (GEMMA_4 | {"per_layer_config": {"one": {"head_dim": 20}}}, "whose keys are numbers of layers"),
        (GEMMA_4 | {"per_layer_config": {"1": 5}}, "per_layer_config must be a JSON object of objects"),
        (GEMMA_4 | {"per_layer_config": {"1": {"head_dim": 20}}}, "to each full layer, which are 1, 3"),
        (GEMMA_4 | {"per_layer_config": {key: {"head_dim": 20} for key in "0123"}}, "to each full layer"),
        (GEMMA_4 | {"per_layer_config": {key: {"intermediate_size": 7} for key in "13"}}, "and nothing else"),
        (GEMMA_4 | {"per_layer_config": {key: {"head_dim": "x"} for key in "13"}}, "head_dim='x' must be an integer"),
        (GEMMA_4 | {"rope_parameters": {}}, "rope_parameters must contain full_attention and sliding_attention"),
        (GEMMA_4 | {"rope_parameters": ROPES | {"full_attention": None}}, "rope_parameters must contain"),
        (
            GEMMA_4 | {"rope_parameters": ROPES | {"full_attention": {"rope_type": "yarn", "rope_theta": 1e4}}},
            "RoPE type 'yarn' is not supported",
        ),
        (EMBEDDING | {"hidden_size_per_layer_input": 0}, "hidden_size_per_layer_input=0 must be an integer from 1"),
        ({"model_type": "gemma4", "text_config": 5}, "text_config in the config is a int"),
    ],
)
def test_what_a_config_may_not_say(fields, message):
    with pytest.raises(ConfigError, match=message):
        read_model_config(fields)


def test_rope_of_a_part_of_the_pairs_is_that_of_transformers():
    """Frequencies of the whole head, and then zeros. Torch's power of a few of them is off by one in the last place."""
    config = transformers.Gemma4TextConfig(num_hidden_layers=1)
    theirs = transformers.models.gemma4.modeling_gemma4.Gemma4TextRotaryEmbedding(config)
    positions = np.arange(4096, dtype=np.float32)
    cos, sin = rotation(read_model_config(as_written(config)).full_rope, 512, jnp.asarray(positions))
    angles = torch.from_numpy(positions)[:, None] * theirs.full_attention_inv_freq
    assert (theirs.full_attention_inv_freq == 0).sum() == 192
    for ours, exact in ((cos, torch.cos(angles)), (sin, torch.sin(angles))):
        error = np.abs(ours - exact.numpy())
        assert (error <= 2e-6 + 2**-24 * positions[:, None]).all()
        assert (error.max(axis=0) < 2e-6).sum() >= 250


# -------------------------------------------------------------------------------------------------------- tensors

VISION = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 6}
AUDIO = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 10}


def with_towers(config_class, text):
    vision, audio = transformers.Gemma4VisionConfig(**VISION), transformers.Gemma4AudioConfig(**AUDIO)
    return config_class(text_config=text, vision_config=vision, audio_config=audio)


def untied():
    return hf.gemma4(tie_word_embeddings=False)


TOWERS = {"vision_tower.", "embed_vision.", "audio_tower.", "embed_audio."}
MODELS = [
    ("EmbeddingGemma2TextModel", hf.embedding_gemma2, set()),
    ("EmbeddingGemma2Model", lambda: with_towers(transformers.EmbeddingGemma2Config, hf.embedding_gemma2()), TOWERS),
    ("Gemma4TextModel", hf.gemma4, set()),
    ("Gemma4ForCausalLM", hf.gemma4, set()),
    ("Gemma4ForCausalLM", untied, {"lm_head.weight"}),
    ("Gemma4Model", lambda: with_towers(transformers.Gemma4Config, hf.gemma4()), TOWERS),
    (
        "Gemma4ForConditionalGeneration",
        lambda: with_towers(transformers.Gemma4Config, hf.gemma4()),
        {f"model.{name}" for name in TOWERS},
    ),
]


@pytest.mark.parametrize(("name", "config", "dropped"), MODELS, ids=[name for name, _, _ in MODELS])
def test_every_tensor_of_a_class_has_its_place(tmp_path, name, config, dropped):
    """Whatever is around the text model; towers are dropped."""
    model = hf.build(getattr(transformers, name), config())
    text = model
    for inner in ("model", "language_model"):
        text = getattr(text, inner, text)
    model.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "checkpoint", dtype="float32")
    checkpoint = read_checkpoint(tmp_path / "checkpoint")
    assert set(checkpoint.manifest.source.dropped) == dropped

    state = {name.removeprefix("ple."): tensor for name, tensor in text.state_dict().items()}
    weights, layers = checkpoint.weights, len(text.layers)
    embedding = name.startswith("Embedding")
    names = {
        "embedding": "embed_tokens.weight",
        "per_layer_input": "per_layer_model_projection.weight",
        "per_layer_input_norm": "per_layer_projection_norm.weight",
        "final_norm": "norm.weight",
        **({"dense.0.weight": "embedding_projection.weight"} if embedding else {}),
        **({} if embedding else {"per_layer_embedding": "embed_tokens_per_layer.weight"}),
    }
    block = "ple_block." if embedding else ""
    for index in range(layers):
        for ours, theirs in (
            ("attention_input_norm", "input_layernorm.weight"),
            ("attention_output", "self_attn.o_proj.weight"),
            ("attention_output_norm", "post_attention_layernorm.weight"),
            ("query_norm", "self_attn.q_norm.weight"),
            ("key_norm", "self_attn.k_norm.weight"),
            ("mlp_input_norm", "pre_feedforward_layernorm.weight"),
            ("mlp_output_norm", "post_feedforward_layernorm.weight"),
            ("down", "mlp.down_proj.weight"),
            ("per_layer_gate", f"{block}per_layer_input_gate.weight"),
            ("per_layer_output", f"{block}per_layer_projection.weight"),
            ("per_layer_output_norm", f"{block}post_per_layer_input_norm.weight"),
            ("layer_scalar", "layer_scalar"),
        ):
            names[f"layers.{index}.{ours}"] = f"layers.{index}.{theirs}"
        for ours, theirs in (("qkv", ("q", "k", "v")), ("gate_up", ("gate", "up"))):
            folder = "self_attn" if ours == "qkv" else "mlp"
            rows = [state[f"layers.{index}.{folder}.{each}_proj.weight"] for each in theirs]
            np.testing.assert_array_equal(weights[f"layers.{index}.{ours}"], torch.cat(rows).numpy())
    assert weights.keys() == {*names, *(f"layers.{i}.{ours}" for i in range(layers) for ours in ("qkv", "gate_up"))}
    for ours, theirs in names.items():
        expected = state[theirs].numpy()
        expected = expected - np.float32(1) if ours.endswith("_norm") else expected.reshape(weights[ours].shape)
        np.testing.assert_array_equal(weights[ours], expected, err_msg=ours)


def test_layers_that_share_keys_need_none_and_published_ones_have_them(tmp_path):
    model = hf.build(Gemma4TextModel, hf.gemma4(**SHARED))
    model.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "checkpoint", dtype="float32")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    unused = {f"layers.2.self_attn.{name}.weight": torch.ones(3, 5) for name in ("k_proj", "v_proj", "k_norm")}
    save_file(tensors | unused, file)
    convert(tmp_path / "source", tmp_path / "published", dtype="float32")
    config, facts = read_checkpoint(tmp_path / "published").config, inspect_checkpoint(tmp_path / "published")
    assert (facts["per_layer_width"], facts["per_layer_vocab"]) == (config.per_layer_width, config.per_layer_vocab)
    assert min(facts["per_layer_width"], facts["per_layer_vocab"]) > 0
    lean, published = (read_checkpoint(tmp_path / name) for name in ("checkpoint", "published"))
    assert set(published.manifest.source.dropped) == set(unused)
    for name, weight in lean.weights.items():
        np.testing.assert_array_equal(weight, published.weights[name])
    names = {name.rpartition(".")[2] for name in lean.weights if name.startswith("layers.2.")}
    assert {"q", "query_norm"} <= names
    assert not {"qkv", "key_norm"} & names
    assert lean.weights["layers.2.down"].shape == (48, 144)
    save_file(tensors | {"layers.1.self_attn.k_other.weight": torch.ones(3, 5)}, file)
    with pytest.raises(CheckpointError, match=r"unknown: 'layers\.1\.self_attn\.k_other\.weight'"):
        convert(tmp_path / "source", tmp_path / "other")


def test_keys_are_the_values_of_full_layers(tmp_path):
    config = hf.gemma4(attention_k_eq_v=True, num_global_key_value_heads=3)
    hf.build(Gemma4TextModel, config).save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "checkpoint", dtype="float32")
    weights = read_checkpoint(tmp_path / "checkpoint").weights
    np.testing.assert_array_equal(weights["layers.1.qkv"][120:180], weights["layers.1.qkv"][180:])
    assert (weights["layers.0.qkv"][84:112] != weights["layers.0.qkv"][112:]).all()


# ------------------------------------------------------------------------------------------------ engine and heads


@pytest.fixture(scope="module")
def library_and_engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = hf.build(EmbeddingGemma2TextModel, hf.embedding_gemma2(vocab_size=VOCAB_SIZE))
    (folder / "encoder").mkdir()
    write_json(folder / "encoder" / "tokenizer_config.json", pad_token="<pad>")
    save_sentence_model(folder, model, [Pooling(PROJECTED), Normalize()], prompts=PROMPTS)
    convert(folder / "source", folder / "checkpoint", dtype="float32")
    return SentenceTransformer(str(folder / "source"), device="cpu"), Engine.load(folder / "checkpoint")


def test_sentence_vectors_are_those_of_sentence_transformers(library_and_engine):
    library, engine = library_and_engine
    assert engine.head.dense == (DenseConfig(PROJECTED, hf.SIZES["hidden_size"]),)
    np.testing.assert_allclose(engine.embed(TEXTS), library.encode(TEXTS), rtol=0, atol=1e-5)
    for name in PROMPTS:
        theirs = library.encode(TEXTS, prompt_name=name)
        np.testing.assert_allclose(engine.embed(TEXTS, prompt_name=name), theirs, rtol=0, atol=1e-5)
    theirs = library.encode(TEXTS, truncate_dim=7, normalize_embeddings=True)
    np.testing.assert_allclose(engine.embed(TEXTS, truncate_dim=7), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("width", "pooling", "message"),
    [
        (hf.SIZES["hidden_size"], "mean", "expects rows of width 48, but the encoder's rows are 58 wide"),
        (PROJECTED, "max", "pooling 'max' of projected rows is not supported"),
    ],
)
def test_poolings_that_do_not_fit_are_refused(tmp_path, width, pooling, message):
    model = hf.build(EmbeddingGemma2TextModel, hf.embedding_gemma2(vocab_size=VOCAB_SIZE))
    save_sentence_model(tmp_path, model, [Pooling(PROJECTED, pooling_mode=pooling)])
    file = tmp_path / "source" / "1_Pooling" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"embedding_dimension": width}))
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "source", tmp_path / "checkpoint")


TEXT_MODELS = {
    "embeddinggemma2": (EmbeddingGemma2TextModel, hf.embedding_gemma2()),
    "gemma4": (Gemma4TextModel, hf.gemma4(use_bidirectional_attention="all")),
    "gemma4 shared keys": (Gemma4TextModel, hf.gemma4(**SHARED)),
}


@pytest.fixture(scope="module", params=TEXT_MODELS)
def folder(request, tmp_path_factory):
    """A folder with one model as `source`."""
    folder = tmp_path_factory.mktemp("model")
    model_class, config = TEXT_MODELS[request.param]
    hf.build(model_class, config).save_pretrained(folder / "source")
    return folder


def test_inspect_shows_the_inputs_of_each_layer(folder):
    fields = json.loads((folder / "source" / "config.json").read_text())
    facts = inspect_checkpoint(folder / "source")
    assert facts["per_layer_width"] == fields["hidden_size_per_layer_input"] > 0


def test_int8_and_bfloat16_are_near_float32(folder):
    sequences, rows = hf.random_ids(40, 7, 23), {}
    for dtype in ("float32", "bfloat16", "int8"):
        convert(folder / "source", folder / dtype, dtype=dtype)
        engine = Engine.load(folder / dtype, funnel=FunnelConfig.after(3, pool="mean"))
        rows[dtype] = np.concatenate(engine.hidden_states(sequences))
    weights = read_checkpoint(folder / "int8").weights
    quantized = {"embedding", "per_layer_input", "per_layer_gate", "per_layer_output", "per_layer_embedding"}
    for name, weight in weights.items():
        leaf = name.rpartition(".")[2]
        if leaf in quantized:
            assert weight.dtype == np.int8
        if leaf.endswith("_norm") or leaf == "layer_scalar":
            assert weight.dtype == np.float32
    for dtype, allowed in (("bfloat16", 0.1), ("int8", 0.1)):
        error = np.linalg.norm(rows[dtype] - rows["float32"]) / np.linalg.norm(rows["float32"])
        assert 1e-4 < error < allowed


def test_a_sequence_has_the_same_rows_in_any_batch(folder):
    convert(folder / "source", folder / "batches", dtype="float32")
    engine = Engine.load(folder / "batches", funnel=FunnelConfig((1, 1, 1, 2), pool="mean", keep_first=True))
    sequences = hf.random_ids(40, 7, 23, 1, 64)
    together = engine.hidden_states(sequences)
    assert hf.worst(engine.hidden_states(sequences[::-1])[::-1], together) < 2e-6
    for sequence, rows in zip(sequences, together, strict=True):
        assert hf.worst(engine.hidden_states([sequence]), [rows]) < 2e-6


# ------------------------------------------------------------------------------------------------ the forward pass

CONFIG = ModelConfig(  # heads and widths of whole registers, so that every product is fused with what follows it
    family="gemma4_text",
    vocab_size=101,
    hidden_size=128,
    intermediate_size=192,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    full_kv_heads=1,
    full_head_dim=128,
    layer_types=("sliding", "full", "sliding", "full"),
    query_scale=0.1,
    attention="bidirectional",
    max_positions=200,
    full_rope=Rope(1e6, rotated=0.25),
    sliding_rope=Rope(1e4),
    causal_window=(20, 0),
    bidirectional_window=(5, 5),
    post_norms=True,
    qk_norm=True,
    value_norm=True,
    kv_shared_layers=2,
    double_wide_mlp=True,
    per_layer_width=64,
    per_layer_vocab=105,
    layer_scalar=True,
)
FUNNELS = {"no funnel": FunnelConfig(), "funnel": FunnelConfig((1, 2, 2), pool_query_only=True, recovery="max_last")}
run = jax.jit(forward, static_argnames=("config", "funnel", "dtype", "target", "recompute"))


def example(funnel, dtype="float32"):
    params = nest(random_weights(CONFIG, HeadConfig(), dtype, seed=3), CONFIG, funnel)
    ids = np.random.default_rng(3).integers(1, CONFIG.vocab_size, 36).astype(np.int32)
    return params, pack(make_plan(CONFIG, funnel), ids, np.array([0, 9, 10, 30, 36], np.int32), 64)


# Kernels that are interpreted take seconds, and run one case.
CASES = [
    *itertools.product(("cpu", "xla"), FUNNELS, ("float32", "bfloat16")),
    *((backend, "funnel", "bfloat16") for backend in ("triton", "tpu")),
]


@pytest.mark.parametrize(("backend", "name", "dtype"), CASES)
def test_every_backend_gives_what_the_reference_gives(backend, name, dtype):
    funnel = FUNNELS[name]
    params, batch = example(funnel, dtype)
    results = []
    for served_by in ("reference", backend):
        options = {"dtype": dtype, "target": target(served_by)}
        prepared = map_weights(functools.partial(prepare_weight, activations=dtype, **options), params)
        results.append(np.asarray(run(prepared, batch, config=CONFIG, funnel=funnel, **options), np.float32))
    reference, other = (rows[batch.levels[1].real] for rows in results)
    assert np.std(reference) > 0.5
    np.testing.assert_allclose(other, reference, rtol=0, atol={"float32": 2e-5, "bfloat16": 0.1}[dtype])


@pytest.mark.slow
def test_the_derivative_with_each_layer_computed_again_is_the_same():
    """Every weight has one, those of the per-layer inputs too, which layers on both sides of the funnel read."""
    params, batch = example(funnel := FUNNELS["funnel"])

    def loss(params, recompute):
        options = {"dtype": "float32", "target": target("xla"), "recompute": recompute}
        rows = forward(params, batch, config=CONFIG, funnel=funnel, **options)
        return (jnp.sin(jnp.arange(CONFIG.hidden_size)) * jnp.where(batch.levels[1].real[:, None], rows, 0)).sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    kept, again = gradient(params, False), gradient(params, True)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(kept))
    for one, other in zip(jax.tree.leaves(kept), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(one).max())


def test_keys_of_a_layer_before_the_funnel_are_read_after_it():
    steps = layer_steps(CONFIG, FunnelConfig((1, 1, 1, 4)))
    assert [(step.query_stride, step.key_stride, step.shares_keys) for step in steps] == [
        (1, 1, False),
        (1, 1, False),
        (1, 1, True),
        (4, 1, True),
    ]


def test_rows_that_are_renumbered_cannot_read_keys_that_are_not():
    with pytest.raises(ConfigError, match="positions='compact' cannot be used with a funnel before layer 2 of this"):
        layer_steps(CONFIG, FunnelConfig((1, 2), positions="compact"))  # the keys of layer 0
    assert layer_steps(CONFIG, FunnelConfig((2,), positions="compact"))


def test_layers_are_not_divided_among_devices():
    alike = dataclasses.replace(CONFIG, full_kv_heads=None, full_head_dim=None, per_layer_vocab=0)
    for config, reason in (
        (CONFIG, "have other heads than"),
        (alike, "has per-layer inputs or layers that share keys"),
        (dataclasses.replace(alike, per_layer_width=0), "has per-layer inputs or layers that share keys"),
    ):
        with pytest.raises(ConfigError, match=reason):
            device_config(config, 2)
        assert device_config(config, 1) == config


# -------------------------------------------------------------------------------------------------------- presets


def test_embeddinggemma_2_to_the_last_parameter():
    """Its 24 scalars are buffers, which are not counted as parameters."""
    head = HeadConfig(dense=(DenseConfig(768, 512),))
    assert count_parameters(expected_shapes(preset("embeddinggemma-2"), head)) - 24 == 271_002_624


def test_what_the_effective_sizes_of_gemma_4_count():
    """Billions of parameters without the table of per-layer inputs."""
    for name, effective in (("gemma4-e2b", 2.3), ("gemma4-e4b", 4.6)):
        shapes = expected_shapes(preset(name), HeadConfig())
        del shapes["per_layer_embedding"]
        assert count_parameters(shapes) / 1e9 == pytest.approx(effective, abs=0.05)


def test_per_layer_inputs_cost_as_much_after_a_funnel_as_before_it():
    lengths = np.array([512], np.int32)
    with_inputs, without = (
        preset("embeddinggemma-2"),
        dataclasses.replace(preset("embeddinggemma-2"), per_layer_width=0),
    )
    for funnel, rows in ((FunnelConfig(), 512), (FunnelConfig((4,)), 128)):
        difference = forward_flops(with_inputs, funnel, lengths) - forward_flops(without, funnel, lengths)
        assert difference == 24 * 2 * 512 * 512 * (512 + 2 * rows)
