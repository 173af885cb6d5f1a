"""Funnel-Transformer against an independent float64 forward pass and against transformers, from saved checkpoints."""

import itertools
import json
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner

import funnel_transformer_models as models
from funnel_engine import CheckpointError, ConfigError, Engine, FunnelConfig, InputError, convert
from funnel_engine.checkpoints.native import read_checkpoint
from funnel_engine.cli import main
from funnel_engine.flops import ideal_ratio
from funnel_engine.heads import HeadConfig
from funnel_engine.inputs import Ragged
from funnel_engine.inspection import inspect_checkpoint
from funnel_engine.presets import FUNNEL_TRANSFORMERS, funnel_transformer
from funnel_engine.weights import count_parameters, expected_shapes

EVERY_LENGTH = (*range(1, 20), 31, 32, 33, 64, 65, 127, 128, 129, 130)
TOLERANCE = 3e-5  # float32, between numbers up to about 5
LAYOUTS = {  # that of B4-4-4 and its like, that of B6-3x2-3x2, and others, with fewer layers
    "1-1-1": {"block_sizes": [1, 1, 1]},
    "2-1x2-1x2": {"block_sizes": [2, 1, 1], "block_repeats": [1, 2, 2]},
    "2-2": {"block_sizes": [2, 2]},
    "1-1-1-1": {"block_sizes": [1, 1, 1, 1]},
}
SMALL = {"block_sizes": [1, 1, 1], "num_decoder_layers": 1}
SWITCHES = [
    {"separate_cls": separate, "truncate_seq": truncate, "pool_q_only": query_only, "pooling_type": pool}
    for separate, truncate in itertools.product((True, False), repeat=2)
    for query_only, pool in ((True, "mean"), (False, "max"))
]


# ------------------------------------------------------------------------------------------- the float64 oracle


def oracle(model: Any, ids: np.ndarray, types: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """What the encoder, and the decoder if there is one, computes for one sequence; float64 and no code of ours.

    The rules are those of the paper's own code: rows are pooled in pairs, a window of one row is that row.
    """
    config = model.config
    weights = {name: value.detach().double().numpy() for name, value in model.state_dict().items()}
    separate, truncate = config.separate_cls, config.separate_cls and config.truncate_seq
    x = norm(weights["embeddings.word_embeddings.weight"][ids], weights, "embeddings.layer_norm")
    places = np.arange(len(ids), dtype=np.float64)  # of the first token of each row
    full, whole = None, (x, places, types)
    for block, (size, repeats) in enumerate(zip(config.block_sizes, config.block_repeats, strict=True)):
        keys = x, places, types
        if block > 0 and len(x) > 1 + separate:
            groups = pairs(len(x), separate, truncate)
            reduce = np.mean if config.pooling_type == "mean" else np.max
            x = np.stack([reduce(x[group], axis=0) for group in groups])
            places, types = (array[[group[0] for group in groups]] for array in (places, types))
            if not config.pool_q_only:
                keys = x, places, types
        else:
            keys = None
        for index in range(size):
            for _ in range(repeats):
                rows = x, places, types
                x = layer(rows, keys or rows, weights, f"encoder.blocks.{block}.{index}", config)
                keys = None
        full = x if block == 0 else full
    if "decoder.layers.0.ffn.linear_1.weight" not in weights:
        return x, None
    short, stride = x, 2 ** (len(config.block_sizes) - 1)
    owner = (np.arange(len(ids)) - separate) // stride + separate
    owner[: int(separate)] = 0
    x = full + np.where((owner < len(short))[:, None], short[np.minimum(owner, len(short) - 1)], 0.0)
    for index in range(config.num_decoder_layers):
        rows = x, *whole[1:]
        x = layer(rows, rows, weights, f"decoder.layers.{index}", config)
    return short, x


def pairs(rows: int, separate: bool, truncate: bool) -> list[list[int]]:
    """The rows of each window."""
    left = list(range(separate, rows - truncate))
    return ([[0]] if separate else []) + [left[start : start + 2] for start in range(0, len(left), 2)]


def norm(x, weights, name):
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-9)
    return normed * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(x):
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def layer(queries, keys, weights, name, config):
    x, query_places, query_types = queries
    source, key_places, key_types = keys
    heads, width = config.n_head, config.d_model

    def weight(part):
        return weights[f"{name}.{part}"]

    def split(array):
        return array.reshape(len(array), heads, -1)

    scale = config.d_head**-0.5
    q = split(x @ weight("attention.q_head.weight").T) * scale
    k = split(source @ weight("attention.k_head.weight").T + weight("attention.k_head.bias"))
    v = split(source @ weight("attention.v_head.weight").T + weight("attention.v_head.bias"))
    distance = query_places[:, None] - key_places
    frequencies = 10000.0 ** (-np.arange(width // 2) / (width // 2))
    angles = distance[..., None] * frequencies
    table = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
    by_distance = np.einsum("ijw,whd->ijhd", table, weight("attention.r_kernel"))
    same = (query_types[:, None] == key_types) | (query_types[:, None] == 2) | (key_types == 2)
    by_type = weight("attention.seg_embed")[same.astype(int)]
    relative = np.einsum("ihd,ijhd->hij", q + scale * weight("attention.r_r_bias"), by_distance)
    relative += np.einsum("ihd,ijhd->hij", q + scale * weight("attention.r_s_bias"), by_type)
    if config.separate_cls:
        relative[:, 0], relative[:, :, 0] = 0, 0
    scores = np.einsum("ihd,jhd->hij", q + scale * weight("attention.r_w_bias"), k) + relative
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    attended = np.einsum("hij,jhd->ihd", shares, v).reshape(len(x), -1)
    out = attended @ weight("attention.post_proj.weight").T + weight("attention.post_proj.bias")
    x = norm(x + out, weights, f"{name}.attention.layer_norm")
    hidden = x @ weight("ffn.linear_1.weight").T + weight("ffn.linear_1.bias")
    out = gelu(hidden) @ weight("ffn.linear_2.weight").T + weight("ffn.linear_2.bias")
    return norm(x + out, weights, f"{name}.ffn.layer_norm")


# --------------------------------------------------------------------------------------------- loaded checkpoints


class Loaded(NamedTuple):
    model: Any
    engine: Engine


def load(directory, name="FunnelModel", *, seed=0, backend="xla", **fields) -> Loaded:
    model = models.random_model(name, seed=seed, **fields)
    models.save(model, directory / "source")
    convert(directory / "source", directory / "engine", dtype="float32")
    return Loaded(model, Engine.load(directory / "engine", backend=backend, max_batch_tokens=2048))


def inputs(lengths, seed=0) -> Ragged:
    return Ragged(*models.random_inputs(lengths, seed=seed))


def sequences(ragged):
    return zip(np.split(ragged.ids, ragged.offsets[1:-1]), np.split(ragged.types, ragged.offsets[1:-1]), strict=True)


def check(loaded, ragged):
    """Compares every sequence of a batch with the oracle and with transformers, each alone."""
    rows = loaded.engine.hidden_states(ragged)
    expected = models.run_each(loaded.model, *ragged)
    for ours, theirs, (ids, types) in zip(rows, expected, sequences(ragged), strict=True):
        short, whole = oracle(loaded.model, ids, types)
        exact = short if whole is None else whole
        assert ours.shape == exact.shape
        np.testing.assert_allclose(ours, exact, atol=TOLERANCE)
        np.testing.assert_allclose(ours, theirs.last_hidden_state[0], atol=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "layout"), [("FunnelModel", layout) for layout in LAYOUTS] + [("FunnelBaseModel", "2-1x2-1x2")]
)
def test_every_layout_agrees(layout, name, tmp_path):
    check(load(tmp_path, name, seed=len(layout), **LAYOUTS[layout]), inputs((7, 40, 1, 16, 66)))


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda fields: "-".join(map(str, fields.values())))
def test_every_length_agrees(switches, tmp_path):
    check(load(tmp_path, **SMALL, **switches), inputs(EVERY_LENGTH))


def test_relative_shift_is_the_same_function(tmp_path):
    loaded = load(tmp_path, attention_type="relative_shift")
    check(loaded, inputs((64, 8, 33)))


def test_a_sequence_of_512_tokens_agrees(tmp_path):
    check(load(tmp_path, max_position_embeddings=512), inputs((512,)))


def test_a_result_does_not_depend_on_the_batch(tmp_path):
    _, engine = load(tmp_path)
    ragged = inputs((33, 5, 1, 130, 64))
    together = engine.hidden_states(ragged)
    for index, (ids, types) in enumerate(sequences(ragged)):
        (alone,) = engine.hidden_states(Ragged(ids, np.array([0, len(ids)], np.int32), types))
        np.testing.assert_allclose(together[index], alone, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_other_backends_agree(backend, tmp_path):
    loaded = load(tmp_path, backend=backend)
    check(loaded, inputs((17, 40, 3)))
    assert {loaded.engine.backends()[op] for op in ("relative_attention", "post_norm", "linear")} == {backend}


def test_bfloat16_is_near(tmp_path):
    _, engine = load(tmp_path)
    ragged = inputs((40, 17))
    narrow = Engine.load(tmp_path / "engine", backend="xla", dtype="bfloat16", max_batch_tokens=64)
    for ours, exact in zip(narrow.hidden_states(ragged), engine.hidden_states(ragged), strict=True):
        similar = (ours * exact).sum() / np.linalg.norm(ours) / np.linalg.norm(exact)
        assert 0.99 < similar < 1 - 1e-9


def test_the_decoder_is_left_out_with_the_recovery(tmp_path):
    model, _ = load(tmp_path)
    with pytest.warns(UserWarning, match="meant for the funnel"):
        engine = Engine.load(
            tmp_path / "engine", funnel=FunnelConfig((1, 1, 2, 2), pool="mean", pool_query_only=True, keep_first=True)
        )
    ragged = inputs((16, 33))
    for ours, (ids, types) in zip(engine.hidden_states(ragged), sequences(ragged), strict=True):
        np.testing.assert_allclose(ours, oracle(model, ids, types)[0], atol=TOLERANCE)


def test_another_recovery_is_refused(tmp_path):
    load(tmp_path)
    with pytest.raises(ConfigError, match="recovery='tile' is not that of a Funnel-Transformer"):
        Engine.load(tmp_path / "engine", funnel=FunnelConfig((1, 1, 2), recovery="tile"), backend="xla")


# ------------------------------------------------------------------------------------------------------- heads


def test_what_only_other_models_have_is_refused_and_inspect_shows_the_rest(tmp_path):
    load(tmp_path)
    with pytest.raises(ConfigError, match="attention='causal' is not for a Funnel-Transformer"):
        Engine.load(tmp_path / "engine", attention="causal", backend="xla")
    facts = inspect_checkpoint(tmp_path / "engine")
    assert (facts["problems"], facts["family"]) == ([], read_checkpoint(tmp_path / "engine").config.family)
    assert facts["per_layer_width"] == facts["per_layer_vocab"] == 0


@pytest.mark.parametrize("name", ["FunnelForSequenceClassification", "FunnelForMultipleChoice"])
def test_classifiers_read_the_first_row_of_the_base_model(name, tmp_path):
    labels = {"num_labels": 3} if "Sequence" in name else {}
    model, engine = load(tmp_path, name, **labels)
    ragged = inputs((9, 16, 40))
    if "Choice" in name:  # one input has several choices, each a sequence of its own
        expected = [
            model(
                *(torch.from_numpy(array[None, None].astype(np.int64)) for array in (ids,)),
                token_type_ids=torch.from_numpy(types[None, None].astype(np.int64)),
            ).logits
            for ids, types in sequences(ragged)
        ]
    else:
        expected = [output.logits for output in models.run_each(model, *ragged)]
    actual = engine.classify(ragged)
    assert actual.shape == (3, 3 if labels else 1)
    np.testing.assert_allclose(actual, torch.cat(expected).detach(), atol=TOLERANCE)


def test_tags_and_answers_have_a_row_for_every_token(tmp_path):
    ragged = inputs((9, 16, 40))
    model, engine = load(tmp_path / "tag", "FunnelForTokenClassification", num_labels=4)
    for ours, theirs in zip(engine.tag(ragged), models.run_each(model, *ragged), strict=True):
        np.testing.assert_allclose(ours, theirs.logits[0], atol=TOLERANCE)
    with pytest.raises(ConfigError, match="answer"):
        engine.answer(ragged)
    model, engine = load(tmp_path / "answer", "FunnelForQuestionAnswering")
    for ours, theirs in zip(engine.answer(ragged), models.run_each(model, *ragged), strict=True):
        expected = np.stack([theirs.start_logits[0], theirs.end_logits[0]], axis=1)
        np.testing.assert_allclose(ours, expected, atol=TOLERANCE)


def discriminate(rows, model):
    """The logits of the discriminator for the decoder's rows, in float64."""
    head = {name: value.detach().double().numpy() for name, value in model.discriminator_predictions.named_parameters()}
    hidden = gelu(rows @ head["dense.weight"].T + head["dense.bias"])
    return hidden @ head["dense_prediction.weight"].T + head["dense_prediction.bias"]


def test_the_discriminator_of_pre_training_tags_every_token(tmp_path):
    """With the logit that a token was replaced; the rows and vectors of the encoder stay those of the model."""
    model, engine = load(tmp_path, "FunnelForPreTraining")
    assert engine.head.labels == ("replaced",)
    assert inspect_checkpoint(tmp_path / "source")["task"] == inspect_checkpoint(tmp_path / "engine")["task"] == "tag"
    ragged = inputs((9, 16, 1, 40))
    expected, tags = models.run_each(model, *ragged), engine.tag(ragged)
    vectors = engine.embed(ragged, normalize=False)
    for ours, theirs, vector, (ids, types) in zip(tags, expected, vectors, sequences(ragged), strict=True):
        rows = oracle(model.funnel, ids, types)[1]
        assert ours.shape == (len(ids), 1)
        np.testing.assert_allclose(ours, discriminate(rows, model), atol=TOLERANCE)
        np.testing.assert_allclose(ours[:, 0], theirs.logits[0], atol=TOLERANCE)
        np.testing.assert_allclose(vector, rows[0], atol=TOLERANCE)


def test_the_discriminator_is_left_out_of_another_class_and_missed_in_its_own(tmp_path):
    models.save(models.random_model("FunnelForPreTraining"), tmp_path / "source")
    config = tmp_path / "source" / "config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps(fields | {"architectures": ["FunnelModel"]}))
    convert(tmp_path / "source", tmp_path / "engine")
    dropped = read_checkpoint(tmp_path / "engine").manifest.source.dropped
    assert dropped == {".attention.k_head.bias": 6, "discriminator_predictions.": 4}
    models.save(models.random_model("FunnelModel"), tmp_path / "source")
    config.write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"missing: discriminator_predictions.dense.weight \(32, 32\)"):
        convert(tmp_path / "source", tmp_path / "again")


# ------------------------------------------------------------------------------------------------- token types


def test_types_are_cut_with_their_tokens_and_checked(tmp_path):
    _, engine = load(tmp_path)
    ids, offsets, types = models.random_inputs((30, 600))
    cut = engine.token_ids(Ragged(ids, offsets, types), truncate=True)
    assert cut.lengths.tolist() == [30, 512]
    np.testing.assert_array_equal(cut.types, types[: 30 + 512])
    with pytest.raises(InputError, match=r"types has shape \(5,\)"):
        engine.embed(Ragged(ids, offsets, types[:5]))
    with pytest.raises(InputError, match="from 0 to 2"):
        engine.embed(Ragged(ids[:5], np.array([0, 5], np.int32), types[:5] + 3))


# ------------------------------------------------------------------------------------------------------- files


def test_a_pytorch_file_gives_the_same_weights(tmp_path):
    model, _ = load(tmp_path)
    folder = tmp_path / "pickle"
    folder.mkdir()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "config.json").write_bytes((tmp_path / "source" / "config.json").read_bytes())
    convert(folder, tmp_path / "again", dtype="float32")
    expected = read_checkpoint(tmp_path / "engine").weights
    for name, weight in read_checkpoint(tmp_path / "again").weights.items():
        np.testing.assert_array_equal(weight, expected[name])


PIECES = ["<pad>", "<unk>", "<cls>", "<sep>", "a", "funnel", "##s", "pool", "##ing", ","]


def test_a_vocabulary_gives_the_ids_of_transformers(tmp_path):
    model = models.random_model()
    models.save(model, tmp_path / "source")
    (tmp_path / "source" / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    theirs = transformers.FunnelTokenizer(vocab={piece: number for number, piece in enumerate(PIECES)})
    texts = ["A funnel, funnels pooling", "Pooling \u00e4 A"]
    convert(tmp_path / "source", tmp_path / "made", dtype="float32")
    theirs.save_pretrained(tmp_path / "source")  # now it has a tokenizer.json
    convert(tmp_path / "source", tmp_path / "copied", dtype="float32")
    for folder in ("made", "copied"):
        engine = Engine.load(tmp_path / folder, backend="xla", max_batch_tokens=64)
        ragged = engine.token_ids(texts)
        assert [part.tolist() for part in np.split(ragged.ids, ragged.offsets[1:-1])] == theirs(texts)["input_ids"]


@pytest.fixture(scope="module")
def with_texts(tmp_path_factory):
    """A model whose first token is pooled like others, so that its type matters; with a vocabulary."""
    folder = tmp_path_factory.mktemp("texts")
    model = models.random_model("FunnelForQuestionAnswering", separate_cls=False)
    models.save(model, folder / "source")
    (folder / "source" / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    convert(folder / "source", folder / "engine", dtype="float32")
    tokenizer = transformers.FunnelTokenizer(vocab={piece: number for number, piece in enumerate(PIECES)})
    return model, Engine.load(folder / "engine", backend="xla", max_batch_tokens=64), tokenizer, folder / "engine"


def test_texts_and_pairs_have_the_ids_and_types_of_transformers(with_texts):
    model, engine, theirs, _ = with_texts
    texts, pairs = ["a funnel, pooling", "Funnels"], [("a funnel", "funnels pooling a pool"), ("pool", "a")]
    for inputs, lists in ((texts, [texts]), (pairs, map(list, zip(*pairs, strict=True)))):
        ragged, expected = engine.token_ids(inputs), theirs(*lists, return_token_type_ids=True)
        both = zip(expected["input_ids"], expected["token_type_ids"], strict=True)
        for (ids, types), (their_ids, their_types) in zip(sequences(ragged), both, strict=True):
            assert (ids.tolist(), types.tolist()) == (their_ids, their_types)
    ragged = engine.token_ids(pairs)
    assert ragged.types.tolist()[:5] == [2, 0, 0, 0, 1]
    for ours, output in zip(engine.answer(pairs), models.run_each(model, *ragged), strict=True):
        expected = np.stack([output.start_logits[0], output.end_logits[0]], axis=1)
        np.testing.assert_allclose(ours, expected, atol=TOLERANCE)


def test_a_pair_that_is_too_long_is_cut_as_in_transformers(with_texts):
    _, engine, theirs, _ = with_texts
    pair = ("a funnel pool " * 9, "a pool " * 40)
    expected = theirs(*pair, truncation="longest_first", max_length=64, return_token_type_ids=True)
    ragged = engine.token_ids([pair], truncate=True)
    assert (ragged.ids.tolist(), ragged.types.tolist()) == (expected["input_ids"], expected["token_type_ids"])
    with pytest.raises(InputError, match="input 0 has 110 tokens, more than the limit of 64"):
        engine.token_ids([pair])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([("a", "")], "input 0 is an empty text"),
        (["a", ("a", 3)], "input 1 is a int, but other inputs are texts"),
        ([("a", "pool"), [2, 3]], "input 1 is a list, but other inputs are texts"),
        ([("a", "\ud800")], "input 0 contains half of a surrogate pair"),
        ([("a", "b", "c")], "contains several texts where token ids are needed"),
    ],
)
def test_pairs_that_cannot_be_run_are_refused(inputs, message, with_texts):
    with pytest.raises(InputError, match=message):
        with_texts[1].token_ids(inputs)


def test_the_command_embeds_pairs(with_texts, tmp_path):
    _, engine, _, folder = with_texts
    (tmp_path / "pairs.tsv").write_text("a funnel\tfunnels pooling\npool\ta\n")
    command = ["embed", str(folder), str(tmp_path / "pairs.tsv"), "--pairs", "-o", str(tmp_path / "vectors.npy")]
    assert (result := CliRunner().invoke(main, command)).exit_code == 0, result.output
    expected = engine.embed([("a funnel", "funnels pooling"), ("pool", "a")])
    np.testing.assert_allclose(np.load(tmp_path / "vectors.npy"), expected, atol=1e-5)
    for content in ("pool\ta\npool a\n", "pool\ta\npool\ta\ta\n", "pool\ta\n\ta\n"):
        (tmp_path / "pairs.tsv").write_text(content)
        assert (result := CliRunner().invoke(main, command)).exit_code == 2
        assert "line 2 must contain two texts with one tab between them" in result.stderr


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"hidden_act": "relu"}, ConfigError, "activation 'relu' is not supported"),
        ({"pooling_type": "min"}, ConfigError, "pooling_type='min' is unknown"),
        ({"block_repeats": [1, 2]}, ConfigError, "one number for each block"),
        ({"block_sizes": []}, ConfigError, "block_sizes"),
        ({"block_sizes": [2, 1, 2]}, CheckpointError, r"missing: encoder.blocks.2.1"),
        ({"d_inner": 40}, CheckpointError, "misshapen: encoder.blocks.0.0.ffn.linear_1.weight"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(fields, error, message, tmp_path):
    models.save(models.random_model(), tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises((error, CheckpointError), match=message):
        convert(tmp_path, tmp_path.parent / f"{tmp_path.name}-engine")


# ------------------------------------------------------------------------------------------- presets and costs


@pytest.mark.parametrize(
    ("name", "full", "base"),
    [
        ("funnel-small", 131.0, 115.6),
        ("funnel-medium", 131.0, 115.6),
        ("funnel-intermediate", 177.1, 161.7),
        ("funnel-large", 386.1, 358.8),
        ("funnel-xlarge", 468.0, 440.7),
    ],
)
def test_presets_have_the_published_sizes(name, full, base):
    for each, millions in ((name, full), (f"{name}-base", base)):
        config, _ = funnel_transformer(each)
        count = count_parameters(expected_shapes(config, HeadConfig()))
        count += config.num_heads * config.head_dim * (sum(config.block_sizes) + config.decoder_layers)  # of keys
        assert round(count / 1e6, 1) == millions


def test_an_unknown_preset_is_refused():
    assert "funnel-small" in FUNNEL_TRANSFORMERS
    with pytest.raises(ConfigError, match="'funnel-tiny' is unknown; choose one of funnel-small"):
        funnel_transformer("funnel-tiny")


def test_the_costs_are_those_of_the_paper():
    """Table 1 of the paper: with 6 layers a block, 18 in all, the FLOPs are 0.88 of 12 layers of full length."""
    config, funnel = funnel_transformer("funnel-intermediate-base")
    lengths = np.array([512], np.int32)
    ratio = ideal_ratio(config, funnel, lengths) * 18 / 12
    assert 0.84 < ratio < 0.9
