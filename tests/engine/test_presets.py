"""The presets against the published sizes."""

import pytest

from funnel_engine.config import FunnelConfig, Llama3Scaling, Rope, layer_steps
from funnel_engine.heads import DenseConfig, HeadConfig
from funnel_engine.presets import PRESETS, preset
from funnel_engine.weights import count_parameters, expected_shapes
from funnel_kernels import ConfigError

# layers, width, heads, kv heads, head dim, intermediate, window, query scalar, vocabulary, positions,
# billions of parameters without and with the embedding
SIZES = {
    "gemma-2b": (18, 2048, 8, 1, 256, 16384, None, 256, 256000, 8192, 1.982, 2.506),
    "gemma-7b": (28, 3072, 16, 16, 256, 24576, None, 256, 256000, 8192, 7.751, 8.538),
    "gemma2-2b": (26, 2304, 8, 4, 256, 9216, 4096, 256, 256000, 8192, 2.025, 2.614),
    "gemma2-9b": (42, 3584, 16, 8, 256, 14336, 4096, 256, 256000, 8192, 8.324, 9.242),
    "gemma2-27b": (46, 4608, 32, 16, 128, 36864, 4096, 144, 256000, 8192, 26.05, 27.23),
    "gemma3-270m": (18, 640, 4, 1, 256, 2048, 512, 256, 262144, 32768, 0.100, 0.268),
    "gemma3-1b": (26, 1152, 4, 1, 256, 6912, 512, 256, 262144, 32768, 0.698, 1.000),
    "gemma3-4b": (34, 2560, 8, 4, 256, 10240, 1024, 256, 262208, 131072, 3.209, 3.880),
    "gemma3-12b": (48, 3840, 16, 8, 256, 15360, 1024, 256, 262208, 131072, 10.76, 11.77),
    "gemma3-27b": (62, 5376, 32, 16, 128, 21504, 1024, 168, 262208, 131072, 25.60, 27.01),
    "embeddinggemma-300m": (24, 768, 3, 1, 256, 1152, 512, 256, 262144, 2048, 0.102, 0.303),
    "qwen3-embedding-0.6b": (28, 1024, 16, 8, 128, 3072, None, 128, 151669, 32768, 0.440, 0.596),
    "qwen3-embedding-4b": (36, 2560, 32, 8, 128, 9728, None, 128, 151665, 40960, 3.634, 4.022),
    "qwen3-embedding-8b": (36, 4096, 32, 8, 128, 12288, None, 128, 151665, 40960, 6.946, 7.567),
    "llama3.2-1b": (16, 2048, 32, 8, 64, 8192, None, 64, 128256, 131072, 0.973, 1.236),
    "llama3.1-8b": (32, 4096, 32, 8, 128, 14336, None, 128, 128256, 131072, 6.980, 7.505),
    "mistral-7b": (32, 4096, 32, 8, 128, 14336, 4096, 128, 32000, 32768, 6.980, 7.111),
    "eurobert-210m": (12, 768, 12, 12, 64, 3072, None, 64, 128256, 8192, 0.113, 0.212),
    "eurobert-610m": (26, 1152, 18, 6, 64, 4096, None, 64, 128256, 8192, 0.460, 0.608),
    "eurobert-2.1b": (32, 2304, 18, 6, 128, 6144, None, 128, 128256, 8192, 1.812, 2.107),
}
T5GEMMA = {  # layers, width, intermediate, heads, kv heads, head dim of the encoder
    "t5gemma-2b": (26, 2304, 9216, 8, 4, 256),
    "t5gemma-9b": (42, 3584, 14336, 16, 8, 256),
    "t5gemma-s": (8, 512, 1024, 8, 8, 64),
    "t5gemma-b": (12, 768, 2048, 12, 12, 64),
    "t5gemma-l": (24, 1024, 2816, 16, 16, 64),
    "t5gemma-ml": (26, 1152, 6912, 4, 4, 256),
    "t5gemma-xl": (24, 2048, 5120, 32, 32, 64),
}


GEMMA_4 = ("embeddinggemma-2", "gemma4-e2b", "gemma4-e4b")  # see test_gemma4.py
T5GEMMA_2 = {  # layers, width, intermediate, heads, kv heads of the encoder; window to the left and to the right
    "t5gemma2-270m": (18, 640, 2048, 4, 1, (255, 256)),
    "t5gemma2-1b": (26, 1152, 6912, 4, 1, (255, 256)),
    "t5gemma2-4b": (34, 2560, 10240, 8, 4, (511, 512)),
}


def test_every_published_size_has_a_preset():
    assert set(PRESETS) == {*SIZES, *T5GEMMA, *T5GEMMA_2, *GEMMA_4}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_the_published_ones(name):
    layers, width, heads, kv_heads, head_dim, hidden, window, scalar, vocabulary, positions, body, total = SIZES[name]
    config = preset(name)
    assert (config.num_layers, config.hidden_size, config.intermediate_size) == (layers, width, hidden)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (heads, kv_heads, head_dim)
    assert (config.vocab_size, config.max_positions) == (vocabulary, positions)
    assert config.query_scale == pytest.approx(scalar**-0.5)
    assert (config.causal_window or (None,))[0] == (window and window - 1)

    shapes = expected_shapes(config, HeadConfig())
    parameters, embedding = count_parameters(shapes), count_parameters({"embedding": shapes["embedding"]})
    assert embedding == vocabulary * width
    assert (parameters - embedding) / 1e9 == pytest.approx(body, abs=0.6 * 10 ** -len(str(body).split(".")[1]))
    assert parameters / 1e9 == pytest.approx(total, abs=0.6 * 10 ** -len(str(total).split(".")[1]))


def test_parameters_of_embeddinggemma_to_the_last_one():
    head = HeadConfig(dense=(DenseConfig(3072, 768), DenseConfig(768, 3072)))
    assert count_parameters(expected_shapes(preset("embeddinggemma-300m"), head)) == 307_581_696


@pytest.mark.parametrize("name", T5GEMMA)
def test_sizes_of_t5gemma_encoders(name):
    layers, width, hidden, heads, kv_heads, head_dim = T5GEMMA[name]
    config = preset(name)
    assert (config.num_layers, config.hidden_size, config.intermediate_size) == (layers, width, hidden)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (heads, kv_heads, head_dim)
    assert config.query_scale == pytest.approx(head_dim**-0.5)
    assert (config.vocab_size, config.attention, config.softcap) == (256000, "bidirectional", 50.0)
    assert config.bidirectional_window == (4095, 4095)


@pytest.mark.parametrize("name", T5GEMMA_2)
def test_sizes_of_t5gemma_2_encoders(name):
    layers, width, hidden, heads, kv_heads, window = T5GEMMA_2[name]
    config = preset(name)
    assert (config.num_layers, config.hidden_size, config.intermediate_size) == (layers, width, hidden)
    assert config.heads("full") == config.heads("sliding") == (heads, kv_heads, 256)
    assert (config.vocab_size, config.attention, config.softcap) == (262144, "bidirectional", None)
    assert config.bidirectional_window == window
    assert config.max_positions == (131072 if name == "t5gemma2-4b" else 32768)


LLAMAS = {  # norm eps, RoPE
    "qwen3-embedding-0.6b": (1e-6, Rope(1e6)),
    "qwen3-embedding-4b": (1e-6, Rope(1e6)),
    "qwen3-embedding-8b": (1e-6, Rope(1e6)),
    "llama3.2-1b": (1e-5, Rope(5e5, llama3=Llama3Scaling(32.0, 1.0, 4.0, 8192))),
    "llama3.1-8b": (1e-5, Rope(5e5, llama3=Llama3Scaling(8.0, 1.0, 4.0, 8192))),
    "mistral-7b": (1e-5, Rope(1e4)),
    "eurobert-210m": (1e-5, Rope(2.5e5)),
    "eurobert-610m": (1e-5, Rope(2.5e5)),
    "eurobert-2.1b": (1e-5, Rope(2.5e5)),
}


@pytest.mark.parametrize("name", LLAMAS)
def test_blocks_of_llama(name):
    config = preset(name)
    assert (config.norm_eps, config.full_rope) == LLAMAS[name]
    assert config.sliding_rope == config.full_rope
    assert (config.activation, config.scale_embedding, config.post_norms, config.softcap) == (
        "silu",
        False,
        False,
        None,
    )
    assert config.qk_norm == name.startswith("qwen3")
    assert config.attention == ("bidirectional" if name.startswith("eurobert") else "causal")
    assert set(config.layer_types) == {"sliding" if name == "mistral-7b" else "full"}
    assert config.bidirectional_window == ((4096, 4096) if name == "mistral-7b" else None)
    assert config.pad_token_id == (128001 if name.startswith("eurobert") else None)


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in (*LLAMAS, *GEMMA_4)])
def test_what_gemmas_differ_in(name):
    config = preset(name)
    assert (config.activation, config.scale_embedding) == ("gelu_tanh", True)
    kind = {"embeddinggemma": "gemma3"}.get(name.split("-")[0], name.split("-")[0])
    assert config.post_norms == (kind != "gemma")
    assert config.qk_norm == (kind in ("gemma3", "t5gemma2"))
    assert config.softcap == (50.0 if kind in ("gemma2", "t5gemma") else None)
    full = [index for index, layer_type in enumerate(config.layer_types) if layer_type == "full"]
    period = {"gemma": 1, "gemma2": 2, "t5gemma": 2, "gemma3": 6, "t5gemma2": 6}[kind]
    assert full == list(range(period - 1, config.num_layers, period))
    if kind in ("gemma3", "t5gemma2"):
        scaled = kind == "t5gemma2" or name in ("gemma3-4b", "gemma3-12b", "gemma3-27b")
        assert config.full_rope == Rope(1e6, 8.0 if scaled else 1.0)
        assert config.sliding_rope == Rope(1e4)
        assert kind == "t5gemma2" or config.bidirectional_window == (SIZES[name][6] // 2,) * 2
    else:
        assert config.full_rope == config.sliding_rope == Rope(1e4)
    assert config.attention == ("bidirectional" if name.startswith(("t5", "embedding")) else "causal")
    assert (config.pad_token_id, config.norm_eps) == (0, 1e-6)
    assert len(layer_steps(config, FunnelConfig.after(2))) == config.num_layers


@pytest.mark.parametrize("name", ["gemma-3b", "", "Gemma-2B"])
def test_an_unknown_preset_is_refused_with_the_list(name):
    with pytest.raises(ConfigError, match=f"preset '{name}' is unknown; choose one of gemma-2b, .*, eurobert-2.1b"):
        preset(name)
