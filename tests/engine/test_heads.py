"""What stands on top of the encoder: sentence vectors, sequence classification, token classification."""

import dataclasses
import math

import numpy as np
import pytest
import transformers
from transformers import Gemma2Model

import hugging_face_models as hf
from funnel_engine import ConfigError, Engine, FunnelConfig, HeadConfig
from funnel_engine.checkpoints.native import read_checkpoint
from funnel_engine.heads import DenseConfig, head_shapes, pool_rows

SEQUENCES = hf.random_ids(1, 2, 9, 24, 17)
TOLERANCE = 2e-5  # float32
WIDTH = hf.SIZES["hidden_size"]
FUNNELS = {
    "pooled": FunnelConfig((1, 3), keep_first=True),
    "recovered": FunnelConfig((1, 2), keep_first=True, recovery="mean_last"),
    "last token alone": FunnelConfig((2, 2), keep_last=True),
}

# ------------------------------------------------------------------------------------------- sentence vectors


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return hf.Specimen.make(tmp_path_factory.mktemp("model"), hf.build(Gemma2Model, hf.gemma2()), "bidirectional")


def engine_with(encoder, head, weights=None, **options):
    """The encoder under another head than its checkpoint has."""
    checkpoint = read_checkpoint(encoder.checkpoint)
    config = dataclasses.replace(checkpoint.config, attention=encoder.attention)
    head_weights = {name: weight.astype(np.float32) for name, weight in (weights or {}).items()}
    return Engine(config, head, checkpoint.weights | head_weights, **options)


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape)


def attention_pooler(rows, query):
    """One learned query, 4 heads of D/4 dimensions, no projections: softmax(query . row / sqrt(D/4)) over the rows."""
    heads = []
    for columns in np.split(np.arange(rows.shape[1]), 4):
        scores = rows[:, columns] @ query[columns] / np.sqrt(len(columns))
        weights = np.exp(scores - scores.max())
        heads.append(weights @ rows[:, columns] / weights.sum())
    return np.concatenate(heads)


POOLINGS = {
    "mean": lambda rows: rows.mean(0),
    "first": lambda rows: rows[0],
    "last": lambda rows: rows[-1],
    "max": lambda rows: rows.max(0),
}


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("funnel", FUNNELS.values(), ids=FUNNELS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling(encoder, pooling, funnel):
    vectors = encoder.engine(funnel=funnel, pooling=pooling).embed(SEQUENCES, normalize=False)
    truth = [POOLINGS[pooling](encoder.truth(ids, funnel)) for ids in SEQUENCES]
    assert hf.worst(vectors, truth) < TOLERANCE


@pytest.mark.parametrize("funnel", FUNNELS.values(), ids=FUNNELS)
def test_attention_pooler(encoder, funnel):
    query = normal(WIDTH).astype(np.float32)
    head = HeadConfig(pooling="attention", pooler=True)
    vectors = engine_with(encoder, head, {"pooler.query": query}, funnel=funnel).embed(SEQUENCES, normalize=False)
    truth = [attention_pooler(encoder.truth(ids, funnel), query) for ids in SEQUENCES]
    assert hf.worst(vectors, truth) < TOLERANCE


def test_dense_layers_then_cut_then_unit_length(encoder):
    """As EmbeddingGemma: mean, two linear layers, `truncate_dim` first dimensions, length 1."""
    up, down = normal(31, WIDTH) * 0.1, normal(20, 31) * 0.1
    head = HeadConfig(dense=(DenseConfig(31, WIDTH), DenseConfig(20, 31)))
    engine = engine_with(encoder, head, {"dense.0.weight": up, "dense.1.weight": down})
    truth = np.stack([encoder.truth(ids).mean(0) @ up.T @ down.T for ids in SEQUENCES])
    assert hf.worst(engine.embed(SEQUENCES, normalize=False), truth) < TOLERANCE
    assert hf.worst(engine.embed(SEQUENCES), unit(truth)) < TOLERANCE
    assert hf.worst(engine.embed(SEQUENCES, normalize=False, truncate_dim=7), truth[:, :7]) < TOLERANCE
    assert hf.worst(engine.embed(SEQUENCES, truncate_dim=7), unit(truth[:, :7])) < TOLERANCE


ACTIVATIONS = {
    "identity": lambda x: x,
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bias_then_activation_of_a_dense_layer(encoder, activation, bias):
    weight, offset = normal(31, WIDTH) * 0.3, normal(31) * bias
    weights = {"dense.0.weight": weight} | ({"dense.0.bias": offset} if bias else {})
    head = HeadConfig(dense=(DenseConfig(31, WIDTH, bias, activation),))
    vectors = engine_with(encoder, head, weights, max_batch_tokens=64).embed(SEQUENCES, normalize=False)
    truth = [ACTIVATIONS[activation](weight @ encoder.truth(ids).mean(0) + offset) for ids in SEQUENCES]
    assert hf.worst(vectors, truth) < TOLERANCE


def test_weights_of_dense_layers():
    dense = (DenseConfig(31, 8, bias=True), DenseConfig(20, 31))
    assert head_shapes(8, HeadConfig(dense=dense)) == {
        "dense.0.weight": (31, 8),
        "dense.0.bias": (31,),
        "dense.1.weight": (20, 31),
    }
    with pytest.raises(ConfigError, match=r"dense\.1 has in_features=20, but its input has 31 features"):
        head_shapes(8, HeadConfig(dense=(dense[0], DenseConfig(31, 20))))
    with pytest.raises(ConfigError, match=r"dense\.0 has in_features=8, but its input has 9 features"):
        head_shapes(9, HeadConfig(dense=dense))


def test_a_dense_layer_below_a_classifier_of_tokens(encoder):
    """Each row goes through it; sentence vectors do not."""
    dense = DenseConfig(31, WIDTH, bias=True, activation="gelu_tanh")
    head = HeadConfig(task="tag", labels=("replaced",), classifier_bias=True, classifier_dense=dense)
    weights = {
        "classifier.dense.weight": normal(31, WIDTH) * 0.3,
        "classifier.dense.bias": normal(31),
        "classifier.weight": normal(1, 31),
        "classifier.bias": normal(1),
    }
    assert head_shapes(WIDTH, head) == {name: weight.shape for name, weight in weights.items()}
    engine = engine_with(encoder, head, weights, max_batch_tokens=64)
    for logits, vector, ids in zip(engine.tag(SEQUENCES), engine.embed(SEQUENCES), SEQUENCES, strict=True):
        rows = encoder.truth(ids)
        hidden = rows @ weights["classifier.dense.weight"].T + weights["classifier.dense.bias"]
        truth = ACTIVATIONS["gelu_tanh"](hidden) @ weights["classifier.weight"].T + weights["classifier.bias"]
        assert logits.shape == (len(ids), 1)
        assert hf.worst(logits, truth) < TOLERANCE
        assert hf.worst(vector, unit(rows.mean(0)[None])[0]) < TOLERANCE
    assert "task tag, after a dense layer" in engine.facts()["head"]
    with pytest.raises(ConfigError, match="classifier_dense is for the task 'tag', but the task is classify"):
        HeadConfig(task="classify", labels=("no", "yes"), classifier_dense=dense)
    with pytest.raises(ConfigError, match=r"classifier\.dense has in_features=8, but its input has 9 features"):
        head_shapes(9, dataclasses.replace(head, classifier_dense=DenseConfig(31, 8)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((0, 8), "features of a dense layer"),
        ((8, -1), "features of a dense layer"),
        ((8, 8, True, "softmax"), "activation of a dense layer='softmax' is unknown; choose one of identity, tanh"),
    ],
)
def test_dense_layers_that_cannot_be(fields, message):
    with pytest.raises(ConfigError, match=message):
        DenseConfig(*fields)


# ------------------------------------------------------------------------------------------- classification

# Pad ids among the tokens are tokens; the classifier reads the rightmost id that is none, or else the first row.
PADDED = [
    [5, 17, 3, hf.PAD, hf.PAD],
    [5, hf.PAD, 3, 9, 11, hf.PAD, 2],
    [hf.PAD, hf.PAD, 7, hf.PAD],
    [hf.PAD] * 4,
    [8],
]
LAST_TOKENS = [2, 6, 2, 0, 0]
CLASSIFIERS = {
    "gemma": (transformers.GemmaForSequenceClassification, hf.gemma(), "causal"),
    "gemma2": (transformers.Gemma2ForSequenceClassification, hf.gemma2(), "bidirectional"),
    "gemma3": (transformers.Gemma3TextForSequenceClassification, hf.gemma3(), "causal"),
    "t5gemma": (transformers.T5GemmaForSequenceClassification, hf.t5gemma(), "bidirectional"),
}
TAGGERS = {
    "gemma": (transformers.GemmaForTokenClassification, hf.gemma(), "bidirectional"),
    "gemma2": (transformers.Gemma2ForTokenClassification, hf.gemma2(), "causal"),
    "t5gemma": (transformers.T5GemmaForTokenClassification, hf.t5gemma(), "bidirectional"),
}


def make(directory, model_class, config, attention):
    return hf.Specimen.make(directory, hf.build(model_class, config), attention)


@pytest.fixture(scope="module", params=CLASSIFIERS)
def classifier(request, tmp_path_factory):
    return make(tmp_path_factory.mktemp("model"), *CLASSIFIERS[request.param])


@pytest.fixture(scope="module", params=TAGGERS)
def tagger(request, tmp_path_factory):
    return make(tmp_path_factory.mktemp("model"), *TAGGERS[request.param])


def logits(specimen, rows):
    """`score` has a bias in token classifiers, and in T5Gemma, which calls it `score.out_proj`."""
    tensors = {name.replace("score.out_proj", "score"): tensor for name, tensor in specimen.tensors.items()}
    return rows @ tensors["score.weight"].T + tensors.get("score.bias", 0)


def test_classification_as_transformers(classifier):
    truth = [logits(classifier, classifier.truth(ids)[last]) for ids, last in zip(PADDED, LAST_TOKENS, strict=True)]
    ours, theirs = classifier.engine().classify(PADDED), classifier.transformers_logits(PADDED)
    assert ours.shape == (len(PADDED), hf.LABELS)
    hf.assert_as_right_as_transformers(ours, theirs, truth)


def row_from_the_end(token, length):
    """With `keep_last` and windows of 4: the last token's row, less the windows that are counted back to the token."""
    return math.ceil((length - 1) / 4) - math.ceil((length - 1 - token) / 4)


@pytest.mark.parametrize(
    ("funnel", "row_of"),
    [
        (FunnelConfig((1, 3), keep_first=True), lambda token, _: (token + 2) // 3),
        (FunnelConfig((1, 2), keep_first=True, recovery="sum_first"), lambda token, _: token),
        (FunnelConfig((2, 2), keep_last=True), row_from_the_end),
        (FunnelConfig((1, 3), keep_last=True, recovery="sum_first"), lambda token, _: token),
    ],
    ids=["pooled", "recovered", "last token alone", "last token alone, recovered"],
)
def test_classification_with_a_funnel(classifier, funnel, row_of):
    """The logits are those of the row that holds the token."""
    truth = [
        logits(classifier, classifier.truth(ids, funnel)[row_of(last, len(ids))])
        for ids, last in zip(PADDED, LAST_TOKENS, strict=True)
    ]
    assert hf.worst(classifier.engine(funnel=funnel).classify(PADDED), truth) < TOLERANCE


@pytest.mark.parametrize("funnel", FUNNELS.values(), ids=FUNNELS)
@pytest.mark.parametrize(("pooling", "dense"), [("max", ()), ("attention", (DenseConfig(31, WIDTH, True, "tanh"),))])
def test_a_classifier_of_the_pooled_vector(encoder, pooling, dense, funnel):
    """Its logits are those of the vector that `embed` returns, unscaled."""
    head = HeadConfig(pooling, True, dense, None, "classify", ("a", "b", "c"), True, "pooled")
    generator = np.random.default_rng(3)
    weights = {name: generator.standard_normal(shape) for name, shape in head_shapes(WIDTH, head).items()}
    assert weights["classifier.weight"].shape == (3, 31 if dense else WIDTH)
    engine = engine_with(encoder, head, weights, funnel=funnel)
    vectors = engine.embed(SEQUENCES, normalize=False)
    truth = vectors.astype(np.float64) @ weights["classifier.weight"].T + weights["classifier.bias"]
    assert hf.worst(engine.classify(SEQUENCES), truth) < TOLERANCE
    assert "task classify, of the pooled vector" in engine.describe()


def test_only_a_classifier_of_texts_can_read_the_pooled_vector():
    for task, labels in (("tag", ("a", "b")), (None, ())):
        with pytest.raises(ConfigError, match=f"is for the task 'classify', but the task is {task or 'none'}"):
            HeadConfig(task=task, labels=labels, classifier_input="pooled")
    with pytest.raises(ConfigError, match="classifier_input='mean' is unknown; choose one of last_token, pooled"):
        HeadConfig(task="classify", labels=("a", "b"), classifier_input="mean")


def test_the_largest_of_no_rows_is_zero():
    """As for a sequence that is padding: infinity would end up in the derivatives of all others."""
    rows = normal(5, 4).astype(np.float32) - 3
    found = np.asarray(pool_rows(rows, np.array([0, 2, 0]), np.array([2, 3, 0]), "max"))
    np.testing.assert_array_equal(found, [rows[:2].max(0), rows[2:].max(0), np.zeros(4)])


def test_tagging_as_transformers(tagger):
    sequences = SEQUENCES + PADDED
    truth = [logits(tagger, tagger.truth(ids)) for ids in sequences]
    theirs = tagger.transformers_logits(sequences)
    theirs = [row[: len(ids)] for row, ids in zip(theirs, sequences, strict=True)]
    hf.assert_as_right_as_transformers(tagger.engine().tag(sequences), theirs, truth)


def test_tagging_with_a_funnel_and_recovery(tagger):
    for keep_last in (False, True):
        funnel = FunnelConfig((1, 3), keep_last=keep_last, recovery="mean_last")
        truth = [logits(tagger, tagger.truth(ids, funnel)) for ids in SEQUENCES]
        assert hf.worst(tagger.engine(funnel=funnel).tag(SEQUENCES), truth) < TOLERANCE


def test_tagging_needs_a_row_for_each_token(tagger):
    engine = tagger.engine(funnel=FunnelConfig((1, 2)))
    with pytest.raises(ConfigError, match=r"load with a recovery.*recovery='mean_last'"):
        engine.tag(SEQUENCES)
