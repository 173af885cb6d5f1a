"""`config.json` in all its spellings, against the configuration classes of transformers."""

import contextlib
import json
import math

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from funnel_engine.config import Llama3Scaling, ModelConfig, Rope
from funnel_engine.hugging_face_config import DEFAULTS, NESTED, read_model_config
from funnel_kernels import ConfigError

# Every size is another number, and none is a class default.
SIZES = {
    "vocab_size": 307,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "max_position_embeddings": 600,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 3,
}
SCORES = {"query_pre_attn_scalar": 13, "sliding_window": 20}

CLASSES = {
    "gemma": transformers.GemmaConfig,
    "gemma2": transformers.Gemma2Config,
    "gemma3_text": transformers.Gemma3TextConfig,
    "t5gemma": transformers.T5GemmaConfig,
    "gemma3": transformers.Gemma3Config,
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen3": transformers.Qwen3Config,
    "eurobert": transformers.EuroBertConfig,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def as_written(config):
    """The content of the config.json that transformers writes."""
    return json.loads(config.to_json_string())


def sliding_layers(config):
    return tuple(name.removesuffix("_attention") for name in config.layer_types)


def expected(config):
    """The `ModelConfig` that the attributes of a transformers config mean."""
    family = {"t5_gemma_module": "t5gemma"}.get(config.model_type, config.model_type)
    common = {
        "family": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_positions": config.max_position_embeddings,
        "norm_eps": config.rms_norm_eps,
        "pad_token_id": config.pad_token_id,
    }
    ropes = config.rope_parameters
    if family in ("llama", "mistral", "qwen3", "eurobert"):
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        llama3 = ropes["rope_type"] == "llama3"
        rope = Rope(
            ropes["rope_theta"],
            ropes["factor"] if ropes["rope_type"] == "linear" else 1.0,
            llama3=Llama3Scaling(*(ropes[name] for name in names)) if llama3 else None,
        )
        layers, window = config.num_hidden_layers, getattr(config, "sliding_window", None)
        layer_types = sliding_layers(config) if family == "qwen3" else ("sliding" if window else "full",) * layers
        has_window = "sliding" in layer_types
        causal = family != "eurobert" and getattr(config, "is_causal", True)
        return ModelConfig(
            **common,
            layer_types=layer_types,
            query_scale=config.head_dim**-0.5,
            attention="causal" if causal else "bidirectional",
            causal_window=(window - 1, 0) if has_window else None,
            bidirectional_window=(window, window) if has_window else None,
            full_rope=rope,
            sliding_rope=rope,
            activation="silu",
            scale_embedding=False,
            qk_norm=family == "qwen3",
        )
    if family == "gemma":
        rope = Rope(ropes["rope_theta"], ropes.get("factor", 1.0))
        return ModelConfig(
            **common,
            layer_types=("full",) * config.num_hidden_layers,
            query_scale=1 / math.sqrt(config.head_dim),
            attention="bidirectional" if config.use_bidirectional_attention else "causal",
            full_rope=rope,
            sliding_rope=rope,
        )
    common |= {
        "layer_types": sliding_layers(config),
        "query_scale": 1 / math.sqrt(config.query_pre_attn_scalar),
        "post_norms": True,
    }
    if family == "gemma3_text":
        bidirectional = config.use_bidirectional_attention
        # The class turns a bidirectional window into an exclusive radius: W // 2 + 1.
        window = 2 * (config.sliding_window - 1) if bidirectional else config.sliding_window
        return ModelConfig(
            **common,
            qk_norm=True,
            attention="bidirectional" if bidirectional else "causal",
            causal_window=(window - 1, 0),
            bidirectional_window=(window // 2, window // 2),
            full_rope=Rope(ropes["full_attention"]["rope_theta"], ropes["full_attention"].get("factor", 1.0)),
            sliding_rope=Rope(ropes["sliding_attention"]["rope_theta"], ropes["sliding_attention"].get("factor", 1.0)),
        )
    rope = Rope(ropes["rope_theta"], ropes.get("factor", 1.0))
    bidirectional = family == "t5gemma" or config.use_bidirectional_attention
    return ModelConfig(
        **common,
        softcap=config.attn_logit_softcapping,
        attention="bidirectional" if bidirectional else "causal",
        causal_window=(config.sliding_window - 1, 0),
        bidirectional_window=(config.sliding_window - 1, config.sliding_window - 1),
        full_rope=rope,
        sliding_rope=rope,
    )


def text_config(config):
    return {"t5gemma": lambda: config.encoder, "gemma3": lambda: config.text_config}.get(
        config.model_type, lambda: config
    )()


@pytest.mark.parametrize("model_type", CLASSES)
def test_omitted_fields_have_the_defaults_of_the_class(model_type):
    config = CLASSES[model_type]()
    assert read_model_config({"model_type": model_type}) == expected(text_config(config))
    assert read_model_config(as_written(config)) == expected(text_config(config))


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("gemma", {"use_bidirectional_attention": True}),
        ("gemma", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 7e4}}),
        ("gemma", {"hidden_act": "gelu"}),
        ("gemma2", SCORES | {"use_bidirectional_attention": True, "attn_logit_softcapping": 7.0}),
        ("gemma2", SCORES | {"attn_logit_softcapping": None}),
        ("gemma2", SCORES | {"layer_types": ["full_attention"] * 7 + ["sliding_attention"]}),
        ("gemma3_text", SCORES),
        ("gemma3_text", SCORES | {"use_bidirectional_attention": True}),
        ("gemma3_text", SCORES | {"layer_types": ["full_attention", "sliding_attention"] * 4}),
        ("gemma3_text", SCORES | {"attn_logit_softcapping": 30.0}),  # transformers does not pass it to the attention
        (
            "gemma3_text",
            SCORES
            | {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
                }
            },
        ),
    ],
)
def test_what_transformers_writes_is_read_back(model_type, fields):
    config = CLASSES[model_type](**SIZES, **fields)
    assert read_model_config(as_written(config)) == expected(config)


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 5e5, "original_max_position_embeddings": 256}}),
        ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}),  # stretched from max_position_embeddings
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
        ("llama", {"is_causal": False}),
        ("mistral", {"sliding_window": 20}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"is_causal": False}),
        ("qwen3", {"sliding_window": 20}),  # not used
        ("qwen3", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 3}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 0}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 99}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 20,
                "layer_types": ["full_attention", "sliding_attention"] * 4,
                "is_causal": False,
            },
        ),
        ("eurobert", {"rope_parameters": {"rope_type": "default", "rope_theta": 2.5e5}}),
        ("eurobert", {"is_causal": True}),  # its class does not read it
    ],
)
def test_what_transformers_writes_of_the_llamas_is_read_back(model_type, fields):
    for sizes in (SIZES, SIZES | {"num_key_value_heads": 6, "pad_token_id": None}):
        config = CLASSES[model_type](**sizes, **fields)
        assert read_model_config(as_written(config)) == expected(config)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen3", "eurobert"])
@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 256}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 3.0}},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 128},
        {},
    ],
)
def test_older_spellings_of_the_llamas(model_type, fields):
    config = CLASSES[model_type](**SIZES, **fields)
    config.standardize_rope_params()  # as a model does; it is what reads original_max_position_embeddings
    assert read_model_config({"model_type": model_type, **SIZES, **fields}) == expected(config)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "eurobert"])
def test_a_null_is_the_rule_of_the_class(model_type):
    """And not the default, which Mistral has for the window."""
    written = {"model_type": model_type, **SIZES, "head_dim": None, "sliding_window": None, "pad_token_id": None}
    if model_type != "mistral":
        written["num_key_value_heads"] = None
    config = read_model_config(written)
    fields = {name: value for name, value in written.items() if name != "model_type"}
    assert config == expected(CLASSES[model_type](**fields))
    assert (config.head_dim, config.pad_token_id) == (8, None)
    assert config.num_kv_heads == (3 if model_type == "mistral" else 6)


def test_windows_of_mistral_and_qwen3():
    """With `is_causal` false, transformers sees the whole window on either side."""
    mistral = read_model_config({"model_type": "mistral", "sliding_window": 512})
    assert set(mistral.layer_types) == {"sliding"}
    assert (mistral.causal_window, mistral.bidirectional_window) == ((511, 0), (512, 512))
    fields = {"use_sliding_window": True, "max_window_layers": 30}
    qwen3 = read_model_config({"model_type": "qwen3", **fields})
    assert qwen3.layer_types == ("full",) * 30 + ("sliding",) * 2
    assert (qwen3.causal_window, qwen3.bidirectional_window) == ((4095, 0), (4096, 4096))
    assert read_model_config({"model_type": "mistral"}, 100).causal_window == (99, 0)
    for config in ({"model_type": "mistral", "sliding_window": None}, {"model_type": "qwen3"}):
        with pytest.raises(ConfigError, match="sliding_window=100 is given, but this model has no sliding layers"):
            read_model_config(config, 100)


def test_nested_configs_are_read_and_their_neighbours_are_not():
    encoder, decoder = SIZES | SCORES, SIZES | {"hidden_size": 96, "num_hidden_layers": 2}
    config = transformers.T5GemmaConfig(encoder=encoder, decoder=decoder, vocab_size=307)
    assert read_model_config(as_written(config)) == expected(config.encoder)
    config = transformers.Gemma3Config(text_config=SIZES | SCORES, vision_config={"hidden_size": 32})
    assert read_model_config(as_written(config)) == expected(config.text_config)
    assert read_model_config(as_written(config)).family == "gemma3_text"


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("gemma", {"rope_theta": 5e4}),
        ("gemma", {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}),
        ("gemma", {"hidden_activation": None}),
        ("gemma2", {"rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 4.0}}),
        ("gemma2", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ("gemma2", {"rope_scaling": None}),
        ("gemma3_text", {"rope_theta": 3e5, "rope_local_base_freq": 7e3}),
        ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        ("gemma3_text", {"rope_theta": 3e5, "rope_parameters": {"full_attention": {"rope_type": "default"}}}),
        ("gemma3_text", {"sliding_window_pattern": 3}),
    ],
)
def test_older_spellings_mean_what_transformers_makes_of_them(model_type, fields):
    scores = {} if model_type == "gemma" else SCORES
    written = {"model_type": model_type, **SIZES, **scores, **fields}
    assert read_model_config(written) == expected(CLASSES[model_type](**SIZES, **scores, **fields))


def test_the_underscored_pattern_of_an_old_file_is_read():
    written = {"model_type": "gemma3_text", **SIZES, **SCORES, "_sliding_window_pattern": 4}
    assert read_model_config(written).layer_types == (("sliding",) * 3 + ("full",)) * 2


def test_is_causal_false_makes_a_bidirectional_encoder():
    assert read_model_config({"model_type": "gemma2"}).attention == "causal"
    assert read_model_config({"model_type": "gemma2", "is_causal": False}).attention == "bidirectional"
    assert read_model_config({"model_type": "t5gemma"}).attention == "bidirectional"


def test_windows_are_inclusive_radii_in_tokens():
    causal = read_model_config({"model_type": "gemma3_text", "sliding_window": 512})
    assert (causal.causal_window, causal.bidirectional_window) == ((511, 0), (256, 256))
    odd = read_model_config({"model_type": "gemma3_text", "sliding_window": 257})
    assert (odd.causal_window, odd.bidirectional_window) == ((256, 0), (128, 128))
    keeps = read_model_config({"model_type": "t5gemma", "encoder": {"sliding_window": 4096}})
    assert (keeps.causal_window, keeps.bidirectional_window) == ((4095, 0), (4095, 4095))
    full = read_model_config(
        {"model_type": "gemma2", "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2, "sliding_window": "?"}
    )
    assert (full.causal_window, full.bidirectional_window) == (None, None)


@pytest.mark.parametrize("width", [257, 129, 1])
def test_a_window_that_an_old_save_halved_is_refused(width):
    written = {"model_type": "gemma3_text", "sliding_window": width, "use_bidirectional_attention": True}
    with pytest.raises(ConfigError, match=f"sliding_window={width} is odd .* Give the original value"):
        read_model_config(written)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "the config is a list; it must be a JSON object"),
        (None, "the config is a NoneType; it must be a JSON object"),
        ({"model_type": "t5gemma3"}, "model_type 't5gemma3' is not"),
        ({}, "model_type None is not supported; this engine runs embedding_gemma2, eurobert, gemma, .*, t5gemma"),
        ({"model_type": "qwen2"}, "model_type 'qwen2' is not supported"),
        ({"model_type": "llama_bidirec"}, "model_type 'llama_bidirec' is not supported"),
        ({"model_type": ["gemma"]}, "model_type .*'gemma'.* is not"),
        ({"model_type": "gemma3", "text_config": [1]}, "text_config in the config is a list; it must be a JSON object"),
        ({"model_type": "t5gemma", "encoder": "x"}, "encoder in the config is a str; it must be a JSON object"),
        (
            {"model_type": "gemma", "hidden_act": "relu"},
            "activation 'relu' is not supported; it must be Gemma's 'gelu_pytorch_tanh'",
        ),
        ({"model_type": "gemma2", "hidden_activation": "silu"}, "activation 'silu' is not"),
        ({"model_type": "gemma2", "hidden_activation": "gelu"}, "activation 'gelu' is not"),
        ({"model_type": "gemma", "attention_bias": "yes"}, "attention_bias='yes' must be True or False"),
        ({"model_type": "gemma", "use_bidirectional_attention": "yes"}, "use_bidirectional_attention='yes'"),
        ({"model_type": "gemma", "is_causal": 0}, "is_causal=0"),
        ({"model_type": "gemma", "hidden_size": "3072"}, "hidden_size='3072' must be an integer from 1 to "),
        ({"model_type": "gemma", "num_hidden_layers": 0}, "num_hidden_layers=0 must be an integer from 1 to "),
        ({"model_type": "gemma", "num_hidden_layers": True}, "num_hidden_layers=True"),
        (
            {"model_type": "gemma", "num_hidden_layers": 10**30},
            "num_hidden_layers=an integer of 100 bits",
        ),
        ({"model_type": "gemma", "head_dim": 2.0}, "head_dim=2.0"),
        ({"model_type": "gemma", "head_dim": 33}, "head_dim=33 must be even"),
        ({"model_type": "gemma", "num_key_value_heads": 5}, "num_heads=16 must be a multiple of num_kv_heads=5"),
        ({"model_type": "gemma", "pad_token_id": -1}, "pad_token_id=-1 must be an integer from 0 to "),
        ({"model_type": "gemma", "rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6' must be a finite number"),
        ({"model_type": "gemma", "rms_norm_eps": 0}, "rms_norm_eps=0 must be a finite number above 0"),
        ({"model_type": "gemma", "rms_norm_eps": math.nan}, "rms_norm_eps=nan must be a finite number"),
        (
            {"model_type": "gemma", "rms_norm_eps": 10**400},
            "rms_norm_eps=an integer of 1329 bits .* finite",
        ),
        (
            {"model_type": "gemma2", "query_pre_attn_scalar": 0},
            "query_pre_attn_scalar=0 must be a finite number above 0",
        ),
        (
            {"model_type": "gemma2", "query_pre_attn_scalar": -4},
            "query_pre_attn_scalar=-4 must be a finite number above 0",
        ),
        ({"model_type": "gemma2", "query_pre_attn_scalar": [4]}, r"query_pre_attn_scalar=\[4\]"),
        (
            {"model_type": "gemma2", "attn_logit_softcapping": 0},
            "attn_logit_softcapping=0 must be a finite number above 0",
        ),
        (
            {"model_type": "gemma2", "attn_logit_softcapping": 10**400},
            "attn_logit_softcapping=an integer of 1329 bits must be a finite number above 0",
        ),
        ({"model_type": "gemma2", "sliding_window": 0}, "sliding_window=0 must be an integer from 1 to "),
        ({"model_type": "gemma2", "sliding_window": 9.5}, "sliding_window=9.5"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "layer_types must list .* each of the 26 layers"),
        ({"model_type": "gemma2", "layer_types": "full"}, "layer_types must list one type for each"),
        (
            {"model_type": "gemma2", "num_hidden_layers": 2, "layer_types": ["full_attention", "chunked_attention"]},
            "layer type 'chunked_attention' is unknown; it must be full_attention or sliding_attention",
        ),
        ({"model_type": "gemma2", "num_hidden_layers": 1, "layer_types": [{}]}, "layer type {} is unknown"),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, "sliding_window_pattern=0"),
        ({"model_type": "gemma3_text", "_sliding_window_pattern": "6"}, "_sliding_window_pattern='6'"),
        ({"model_type": "gemma", "rope_theta": 0}, "rope_theta=0 must be a finite number above 0"),
        ({"model_type": "gemma", "rope_theta": "big"}, "rope_theta='big' must be a finite number"),
        ({"model_type": "gemma", "rope_theta": 10**400}, "rope_theta=an integer of 1329 bits must be a finite"),
        ({"model_type": "gemma", "rope_scaling": [1]}, "rope_scaling is a list; it must be a JSON object"),
        ({"model_type": "gemma", "rope_parameters": "x"}, "rope_parameters is a str; it must be a JSON object"),
        ({"model_type": "gemma", "rope_scaling": {"type": "yarn", "factor": 4}}, "RoPE type 'yarn' is not supported"),
        ({"model_type": "gemma", "rope_scaling": {"type": "linear"}}, "RoPE factor=None must be a finite number"),
        (
            {"model_type": "gemma", "rope_scaling": {"type": "linear", "factor": 0}},
            "RoPE factor=0 must be a finite number above 0",
        ),
        (
            {"model_type": "gemma", "auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}},
            "auto_map=.*'m.M'.* names a class in the checkpoint's own code.*delete auto_map from config.json",
        ),
        ({"model_type": "t5gemma", "auto_map": {"AutoModel": "m.M"}}, "names a class in the checkpoint's own code"),
        ({"model_type": "gemma", "auto_map": "AutoModel"}, "auto_map='AutoModel'"),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"full_attention": 4}},
            "rope_parameters of gemma3_text must contain two JSON objects",
        ),
        (
            {"model_type": "llama_bidirec", "auto_map": {"AutoModel": "m.LlamaBidirectionalModel"}},
            "own code.*delete auto_map from config.json, and set model_type, and is_causal=false if bidirectional",
        ),
        ({"model_type": "llama", "hidden_act": "gelu"}, "activation 'gelu' is not supported; it must be 'silu'"),
        ({"model_type": "qwen3", "attention_bias": 1}, "attention_bias=1 must be True or False"),
        ({"model_type": "eurobert", "mlp_bias": "yes"}, "mlp_bias='yes' must be True or False"),
        ({"model_type": "llama", "use_bidirectional_attention": True}, "no effect on this family .* is_causal=false"),
        ({"model_type": "qwen3", "is_causal": "no"}, "is_causal='no'"),
        ({"model_type": "qwen3", "use_sliding_window": "yes"}, "use_sliding_window='yes'"),
        (
            {"model_type": "qwen3", "layer_types": ["sliding_attention"] * 32},
            "layer_types lists sliding_attention, but the config has no window .* set use_sliding_window=true",
        ),
        ({"model_type": "qwen3", "layer_types": ["full_attention"]}, "layer_types must list .* each of the 32 layers"),
        ({"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": -1}, "max_window_layers=-1"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window=0 must be an integer from 1"),
        ({"model_type": "llama", "num_key_value_heads": 5}, "num_heads=32 must be a multiple of num_kv_heads=5"),
        ({"model_type": "llama", "hidden_size": 96}, "head_dim=3 must be even"),
        ({"model_type": "llama", "pad_token_id": -1}, "pad_token_id=-1 must be an integer from 0"),
        ({"model_type": "llama", "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        *(
            ({"model_type": "llama", "rope_scaling": {"rope_type": kind, "factor": 4}}, f"RoPE type '{kind}' is not")
            for kind in ("yarn", "dynamic", "longrope", "proportional")
        ),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "llama3"}}, "RoPE factor=None must be a finite number"),
        (
            {"model_type": "llama", "rope_scaling": LLAMA3 | {"original_max_position_embeddings": "8k"}},
            "original_max_position_embeddings='8k' must be an integer",
        ),
        (
            {"model_type": "llama", "rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
            "low_frequency_factor=1 must be below high_frequency_factor=1",
        ),
        (
            {"model_type": "qwen3", "rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            "rope_parameters must be for all layers of this family, but it has 'full_attention'",
        ),
        *(
            (
                {"model_type": model_type, "quantization_config": {"quant_method": method}},
                f"the weights are quantized, by '{method}'",
            )
            for model_type in ("llama", "mistral", "qwen3", "eurobert")
            for method in ("gptq", "awq", "bitsandbytes")
        ),
        ({"model_type": "qwen3", "quantization": {"bits": 4}}, "the weights are quantized, by 'mlx'"),
    ],
)
def test_a_config_that_cannot_be_is_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        read_model_config(config)


def test_auto_map_without_a_model_changes_nothing():
    plain = read_model_config({"model_type": "gemma"})
    for auto_map in (None, {}, {"AutoTokenizer": ["t.T", None]}):
        assert read_model_config({"model_type": "gemma", "auto_map": auto_map}) == plain


LONG = "x" * 100_000


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": LONG},
        {"auto_map": {"AutoModel": LONG}},
        {"hidden_activation": LONG},
        {"layer_types": LONG},
        {"layer_types": [LONG] * 26},
        {"rope_parameters": {"full_attention": LONG}},
        {"rope_parameters": {"full_attention": {"rope_type": LONG}}},
        {"hidden_size": LONG},
        {"rms_norm_eps": LONG},
        {"attn_logit_softcapping": LONG, "model_type": "gemma2"},
        {"is_causal": LONG},
    ],
)
def test_values_are_shortened_in_messages(fields):
    with pytest.raises(ConfigError) as error:
        read_model_config({"model_type": "gemma3_text"} | fields)
    assert "xxx" in str(error.value)
    assert len(str(error.value)) < 300


SCALARS = st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.text(max_size=4) | st.just(10**400)
JSON = SCALARS | st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
KINDS = st.sampled_from(["linear", "llama3"])
ROPE = st.dictionaries(st.sampled_from(["rope_type", "type", *LLAMA3, "rope_theta"]), JSON | KINDS)
ROPES = ROPE | st.fixed_dictionaries({"full_attention": ROPE | JSON, "sliding_attention": ROPE})
LAYERS = st.lists(st.sampled_from(["full_attention", "sliding_attention"]), min_size=8, max_size=8)
VALUES = {  # what may stand in a field: something that is likely, or anything
    **dict.fromkeys(
        [*SIZES, *SCORES, "sliding_window_pattern", "_sliding_window_pattern", "max_window_layers"], st.integers(0, 99)
    ),
    **dict.fromkeys(["rope_theta", "rope_local_base_freq", "attn_logit_softcapping"], st.floats(0, 1e6)),
    **dict.fromkeys(["hidden_act", "hidden_activation"], st.sampled_from(["gelu", "gelu_pytorch_tanh", "silu"])),
    **dict.fromkeys(
        ["use_bidirectional_attention", "is_causal", "attention_bias", "use_sliding_window"], st.booleans()
    ),
    **dict.fromkeys(["rope_scaling", "rope_parameters"], ROPES),
    "layer_types": LAYERS,
    "auto_map": st.dictionaries(st.sampled_from(["AutoConfig", "AutoModel"]), st.text(max_size=4)),
}


@st.composite
def configs(draw):
    """A valid config, some of whose fields hold something else."""
    fields = {**SIZES, **SCORES}
    for name in draw(st.lists(st.sampled_from(list(VALUES)), max_size=3)):
        fields[name] = draw(VALUES[name] | JSON)
    model_type = draw(st.sampled_from([*DEFAULTS, *NESTED]))
    if model_type not in NESTED:
        return {"model_type": model_type, **fields}
    return {"model_type": model_type, NESTED[model_type][0]: draw(st.sampled_from([fields] * 9 + [None])), "x": fields}


@settings(max_examples=500, deadline=None, derandomize=True)
@given(configs())
def test_any_json_is_a_model_or_a_config_error(config):
    with contextlib.suppress(ConfigError):
        assert isinstance(read_model_config(config), ModelConfig)


def test_fields_that_the_family_does_not_have_change_nothing():
    """Gemma 1 scales by the head dim, whatever else a config says."""
    plain = read_model_config({"model_type": "gemma"})
    assert read_model_config({"model_type": "gemma", "query_pre_attn_scalar": 99}) == plain
    assert read_model_config({"model_type": "gemma", "layer_types": ["sliding_attention"] * 28}) == plain


def test_gemma_3_that_is_not_causal_by_the_other_field():
    """transformers halves the window by `use_bidirectional_attention` alone."""
    for fields in ({}, {"use_bidirectional_attention": None}, {"use_bidirectional_attention": False}):
        with pytest.raises(ConfigError, match=r"is_causal=false .* set use_bidirectional_attention=true"):
            read_model_config({"model_type": "gemma3_text", "is_causal": False} | fields)
    both = {"model_type": "gemma3_text", "is_causal": False, "use_bidirectional_attention": True}
    assert read_model_config(both).attention == "bidirectional"


def test_rope_of_a_part_of_a_head():
    for factor in (1.0, None):
        rope = {"rope_type": "linear", "factor": 8.0, "partial_rotary_factor": factor}
        assert read_model_config({"model_type": "gemma", "rope_scaling": rope}).full_rope.factor == 8.0
    with pytest.raises(ConfigError, match=r"partial_rotary_factor=0.5"):
        read_model_config({"model_type": "gemma", "rope_scaling": rope | {"partial_rotary_factor": 0.5}})
