"""Checkpoints with the names and shapes of the authors' PyTorch code, against the same weights from Hugging Face."""

import json
import re

import numpy as np
import pytest
import torch

import funnel_transformer_models as models
from funnel_engine import CheckpointError, ConfigError, Engine, convert
from funnel_engine.checkpoints.formats import detect_format
from funnel_engine.checkpoints.native import read_checkpoint
from funnel_engine.inputs import Ragged
from funnel_engine.inspection import inspect_checkpoint

# All sizes differ, so that a wrong transposition has a wrong shape or other values.
FIELDS = {"block_sizes": [2, 1, 2], "block_repeats": [1, 2, 1], "d_model": 24, "n_head": 4, "d_head": 10, "d_inner": 36}
NET_CONFIG = {
    "vocab_size": 60,
    "d_embed": 24,
    "d_model": 24,
    "n_head": 4,
    "d_head": 10,
    "d_inner": 36,
    "dropout": 0.1,
    "dropatt": 0.1,
    "dropact": 0,
    "block_size": "2_1x2_2",
    "pooling_type": "mean",
    "pooling_size": 2,
    "separate_cls": True,
    "pool_q_only": True,
}
PIECES = ["<pad>", "<unk>", "<cls>", "<sep>", "<mask>", "funnel", "##s"]


@pytest.fixture(scope="module")
def model():
    return models.random_model("FunnelBaseModel", **FIELDS)


def original_tensors(model):
    """The model's weights as `ckpt_to_pt.py` of the authors names and shapes them."""
    theirs, config = model.state_dict(), model.config
    heads = config.n_head, config.d_head
    tensors = {
        "input_layer.0.lookup_table": theirs["embeddings.word_embeddings.weight"],
        "input_layer.1.weight": theirs["embeddings.layer_norm.weight"],
        "input_layer.1.bias": theirs["embeddings.layer_norm.bias"],
    }
    blocks = [
        f"encoder.blocks.{block}.{layer}" for block, size in enumerate(config.block_sizes) for layer in range(size)
    ]
    for number, block in enumerate(blocks):

        def weight(name, block=block):
            return theirs[f"{block}.{name}"]

        attention, feed_forward = f"attn_layers.{number}", f"pffn_layers.{number}"
        for name in ("q_head", "k_head", "v_head"):
            tensors[f"{attention}.{name}.weight"] = weight(f"attention.{name}.weight").T.reshape(-1, *heads)
        for name in ("k_head", "v_head"):
            tensors[f"{attention}.{name}.bias"] = weight(f"attention.{name}.bias").reshape(heads)
        tensors[f"{attention}.post_proj.weight"] = weight("attention.post_proj.weight").T.reshape(*heads, -1)
        tensors[f"{attention}.post_proj.bias"] = weight("attention.post_proj.bias")
        for name in ("r_w_bias", "r_s_bias", "r_r_bias", "seg_embed", "r_kernel"):
            tensors[f"{attention}.{name}"] = weight(f"attention.{name}")
        for ours, name in (("pffn.0", "linear_1"), ("pffn.3", "linear_2")):
            tensors[f"{feed_forward}.{ours}.weight"] = weight(f"ffn.{name}.weight").T
            tensors[f"{feed_forward}.{ours}.bias"] = weight(f"ffn.{name}.bias")
        for part in ("weight", "bias"):
            tensors[f"{attention}.layer_norm.{part}"] = weight(f"attention.layer_norm.{part}")
            tensors[f"{feed_forward}.layer_norm.{part}"] = weight(f"ffn.layer_norm.{part}")
    return {name: tensor.clone().contiguous() for name, tensor in tensors.items()}


def write(folder, tensors, **changes):
    folder.mkdir()
    torch.save(tensors, folder / "model.pt")
    config = {name: value for name, value in (NET_CONFIG | changes).items() if value != "absent"}
    (folder / "net_config.pytorch.json").write_text(json.dumps(config))
    (folder / "vocab.uncased.txt").write_text("\n".join(PIECES) + "\n")
    return folder


def test_both_names_give_the_same_rows(model, tmp_path):
    source = write(tmp_path / "source", original_tensors(model))
    models.save(model, tmp_path / "hugging_face")
    assert detect_format(source) == "funnel_transformer_pytorch"
    assert inspect_checkpoint(source)["problems"] == []
    for folder in ("source", "hugging_face"):
        convert(tmp_path / folder, tmp_path / f"{folder}-engine", dtype="float32")
    ours, theirs = (read_checkpoint(tmp_path / f"{folder}-engine") for folder in ("source", "hugging_face"))
    assert (ours.config, ours.head) == (theirs.config, theirs.head)
    assert ours.manifest.funnel == theirs.manifest.funnel
    assert ours.manifest.source.dropped == {".k_head.bias": 5}
    assert ours.weights.keys() == theirs.weights.keys()
    for name, weight in ours.weights.items():
        np.testing.assert_array_equal(weight, theirs.weights[name])
    engine = Engine.load(tmp_path / "source-engine", backend="xla", max_batch_tokens=64)
    ragged = Ragged(*models.random_inputs((9, 24)))
    rows = zip(engine.hidden_states(ragged), models.run_each(model, *ragged), strict=True)
    for row, expected in rows:
        np.testing.assert_allclose(row, expected.last_hidden_state[0], atol=3e-5)
    assert engine.token_ids("Funnels").ids.tolist() == [2, 5, 6, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": "2_1y2_2"}, "block_size='2_1y2_2' must be a number for each block"),
        ({"block_size": "0_1"}, "block_sizes[0]=0"),
        ({"d_embed": 12}, "d_embed=12 must be d_model=24"),
        ({"pooling_size": 4}, "pooling_size=4 is not supported; it must be 2"),
        ({"pooling_type": "min"}, "pooling_type='min' is unknown"),
        ({"n_head": "absent"}, "lacks 'n_head'"),
        ({"ff_activation": "relu"}, "has the unknown 'ff_activation'"),
        ({"vocab_size": 61}, "misshapen: input_layer.0.lookup_table is (60, 24), but the config says (61, 24)"),
        ({"block_size": "2_1x2_3"}, "missing: attn_layers.5.q_head.weight (24, 4, 10)"),
        ({"block_size": "2_1x2_1"}, "unknown: 'attn_layers.4.q_head.weight' (24, 4, 10)"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(changes, message, model, tmp_path):
    source = write(tmp_path / "source", original_tensors(model), **changes)
    with pytest.raises((CheckpointError, ConfigError), match=re.escape(message)):
        convert(source, tmp_path / "engine")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("attn_layers.1.r_kernel", "missing: attn_layers.1.r_kernel (24, 4, 10)"),
        ("pffn_layers.0.pffn.3.bias", "missing: pffn_layers.0.pffn.3.bias (24,)"),
    ],
)
def test_missing_tensors_are_named(name, message, model, tmp_path):
    tensors = original_tensors(model)
    del tensors[name]
    with pytest.raises(CheckpointError, match=re.escape(message)):
        convert(write(tmp_path / "source", tensors), tmp_path / "engine")


def test_the_head_of_the_authors_classifier_is_refused_by_name(model, tmp_path):
    tensors = original_tensors(model) | {"cls_head.0.weight": torch.ones(24, 24)}
    source = write(tmp_path / "source", tensors)
    with pytest.raises(CheckpointError, match=r"unknown: 'cls_head.0.weight' \(24, 24\)"):
        convert(source, tmp_path / "engine")
    (source / "model.pt").unlink()
    with pytest.raises(CheckpointError, match=r"model\.pt"):
        convert(source, tmp_path / "engine")
    with pytest.raises(CheckpointError, match="has no sliding window"):
        convert(source, tmp_path / "engine", sliding_window=8)
