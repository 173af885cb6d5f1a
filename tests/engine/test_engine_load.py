"""What `Engine.load` makes of a checkpoint: dtype, attention, pooling, tokenizer, and weights used in place."""

import re
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from funnel_engine import CheckpointError, ConfigError, Engine, FunnelConfig, InputError, convert
from funnel_kernels import Target, native_calls
from funnel_kernels.linear.packed import packs
from hugging_face_models import build, gemma3
from tiny_models import make_tokenizer

IDS = [[5, 9, 33, 2, 71, 8, 40, 3, 17, 64, 21, 90], [4, 4, 77]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`source`, `float32` and `bfloat16`: one bidirectional Gemma 3, with a tokenizer that would pad and truncate."""
    folder = tmp_path_factory.mktemp("load")
    build(transformers.Gemma3TextModel, gemma3(use_bidirectional_attention=True)).save_pretrained(folder / "source")
    tokenizer = make_tokenizer()
    tokenizer.enable_padding(length=9)
    tokenizer.enable_truncation(2)
    tokenizer.save(str(folder / "source" / "tokenizer.json"))
    for dtype in ("float32", "bfloat16"):
        convert(folder / "source", folder / dtype, dtype=dtype)
    return folder


@pytest.mark.parametrize("asked", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_dtypes_are_the_checkpoints_or_those_asked_for(folder, stored, asked):
    """Packed weights of bfloat16 are not widened; activations are float32 where a CPU does not multiply bfloat16."""
    engine = Engine.load(folder / stored, dtype=asked, max_batch_tokens=64)
    packed, multiplies = packs(Target()), native_calls.multiplies_bfloat16()
    activations = asked or ("float32" if stored == "float32" or (packed and not multiplies) else "bfloat16")
    matrices = asked or stored
    if stored == "bfloat16" and asked == "float32" and packed:
        matrices = "bfloat16"
    assert engine.params["embedding"].dtype == engine.params["layers"][0]["qkv"].dtype == jnp.dtype(matrices)
    assert engine.activations == activations
    assert engine.params["final_norm"].dtype == jnp.float32
    assert engine.embed(IDS).dtype == np.float32


def test_verify_is_true_or_false(folder):
    with pytest.raises(ConfigError, match="verify='no' must be True or False"):
        Engine.load(folder / "float32", verify="no")


def test_float16_is_refused(folder):
    with pytest.raises(ConfigError, match="dtype 'float16' is refused: Gemma's residual stream overflows it"):
        Engine.load(folder / "float32", dtype="float16")
    with pytest.raises(ConfigError, match="dtype='int4' is not supported here; choose one of float32, bfloat16, int8"):
        Engine.load(folder / "float32", dtype="int4")


def test_attention_is_the_checkpoints_or_the_one_asked_for(folder):
    own, causal = (Engine.load(folder / "float32", attention=a, max_batch_tokens=64) for a in (None, "causal"))
    assert own.config.attention == "bidirectional"
    changed = [[*IDS[0][:-1], 50], IDS[1]]
    assert np.abs(own.hidden_states(IDS)[0] - own.hidden_states(changed)[0])[0].max() > 0
    assert np.abs(causal.hidden_states(IDS)[0] - causal.hidden_states(changed)[0])[:-1].max() == 0
    with pytest.raises(ConfigError, match="attention='masked' is unknown; choose one of bidirectional, causal"):
        Engine.load(folder / "float32", attention="masked")


def test_pooling_is_the_checkpoints_or_the_one_asked_for(folder):
    mean, last = (Engine.load(folder / "float32", pooling=p, max_batch_tokens=64) for p in (None, "last"))
    rows = mean.hidden_states(IDS)
    np.testing.assert_allclose(
        mean.embed(IDS, normalize=False), np.stack([row.mean(axis=0) for row in rows]), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(last.embed(IDS, normalize=False), np.stack([row[-1] for row in rows]))
    with pytest.raises(ConfigError, match="pooling='median' is unknown"):
        Engine.load(folder / "float32", pooling="median")


def test_the_tokenizer_neither_pads_nor_truncates(folder):
    engine = Engine.load(folder / "float32", max_batch_tokens=64)
    assert len(engine.hidden_states("a small funnel pools pairs")[0]) == 6  # with BOS


def test_a_damaged_tokenizer_is_named(folder, tmp_path):
    (tmp_path / "model").mkdir()
    for file in (folder / "float32").iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    damaged = tmp_path / "model" / "tokenizer.json"
    damaged.write_bytes(b"?" * damaged.stat().st_size)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer that the tokenizers library reads"):
        Engine.load(tmp_path / "model")


def test_without_a_tokenizer_ids_still_work(folder, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        (source / name).write_bytes((folder / "source" / name).read_bytes())
    convert(source, tmp_path / "model", dtype="float32")
    engine = Engine.load(tmp_path / "model", max_batch_tokens=64)
    with pytest.raises(InputError, match="this checkpoint has no tokenizer, so it takes token ids only"):
        engine.embed("a small funnel")
    np.testing.assert_array_equal(engine.embed(IDS), Engine.load(folder / "float32", max_batch_tokens=64).embed(IDS))


FUNNEL = FunnelConfig.after(1, pool="mean", recovery="mean_last")


@pytest.fixture(scope="module")
def funneled(folder):
    convert(folder / "float32", folder / "funneled", dtype="float32", funnel=FUNNEL)
    return folder / "funneled"


def test_the_checkpoints_funnel_is_used(folder, funneled):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = Engine.load(funneled, max_batch_tokens=64)
        asked = Engine.load(folder / "float32", funnel=FUNNEL, max_batch_tokens=64)
        same = Engine.load(funneled, funnel=FUNNEL, max_batch_tokens=64)
    assert own.funnel == FUNNEL
    np.testing.assert_array_equal(own.embed(IDS), asked.embed(IDS))
    assert own.describe() == asked.describe() == same.describe()
    assert "meant for" not in own.describe()


@pytest.mark.parametrize("funnel", [FunnelConfig(), FunnelConfig.after(2)], ids=str)
def test_another_funnel_is_warned_of_and_described(folder, funneled, funnel):
    with pytest.warns(UserWarning, match=f"is meant for the funnel {FUNNEL}, but it is loaded with {funnel}") as caught:
        other = Engine.load(funneled, funnel=funnel, max_batch_tokens=64)
    assert caught[0].filename == __file__
    plain = Engine.load(folder / "float32", funnel=funnel, max_batch_tokens=64)
    np.testing.assert_array_equal(other.embed(IDS), plain.embed(IDS))
    assert re.findall("^meant for +(.*)$", other.describe(), re.MULTILINE) == [f"the funnel {FUNNEL}"]


def test_a_funnel_is_a_funnel_config(folder):
    with pytest.raises(ConfigError, match=r"funnel='1:2' must be a FunnelConfig; .* FunnelConfig.parse reads"):
        Engine.load(folder / "float32", funnel="1:2")
    with pytest.raises(ConfigError, match="funnel='1:2' must be a FunnelConfig"):
        convert(folder / "float32", folder / "new", funnel="1:2")


def test_a_funnel_that_does_not_fit_is_not_stored(folder):
    with pytest.raises(ConfigError, match="the funnel has 10 strides but the model has only"):
        convert(folder / "source", folder / "new", funnel=FunnelConfig.after(9))
    assert not (folder / "new").exists()
