"""A LoRA adapter is merged with its base as peft merges them, or refused with the reason and the remedy.

The adapters are written by hand, with the names that peft gives. The merged model is computed in float64.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

import hugging_face_models as models
from funnel_engine import CheckpointError, ConfigError, Engine, convert
from funnel_engine.checkpoints import tensors as checkpoint_tensors
from funnel_engine.checkpoints.native import read_checkpoint
from funnel_engine.cli import main
from funnel_engine.inspection import inspect_checkpoint
from sentence_models import TEXTS, VOCAB_SIZE, save_embedding_gemma, save_sentence_model, train_tokenizer, write_json

CONFIG, WEIGHTS, BASE_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "model.safetensors"
RANK, ALPHA = 4, 10
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Arrays = dict[str, np.ndarray]


def save_base(folder: Path, model_class: Any = transformers.GemmaModel, config: Any = None) -> Path:
    models.build(model_class, config or models.gemma()).save_pretrained(folder)
    return folder


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def weight_of(module: str) -> str:
    return f"{module}.weight"


class Adapter:
    """An adapter for all linear modules of a base.

    Attributes:
        merged: the float64 tensors of the base after the merge, by their names in the base.
        tensors: the content of adapter_model.safetensors.
    """

    def __init__(self, base: Path, prefix: tuple[str, str] = ("", "")):
        """`prefix`: what the names in the base begin with, and what it is in the adapter."""
        stored = load_file(base / BASE_WEIGHTS)
        self.merged = {name: array.astype(np.float64) for name, array in stored.items()}
        self.generator = np.random.default_rng(7)
        self.tensors: Arrays = {}
        names = [name.removesuffix(".weight") for name in self.merged]
        self.modules = [name for name in names if name.endswith(LINEAR)]
        self.prefix = prefix

    def random(self, *shape: int) -> np.ndarray:
        return self.generator.normal(0.0, 0.1, shape).astype(np.float32)

    def name(self, module: str) -> str:
        theirs, ours = self.prefix
        return f"base_model.model.{ours + module.removeprefix(theirs) if module.startswith(theirs) else module}"

    def add(
        self, rank: Any = RANK, alpha: Any = ALPHA, scale: Any = lambda alpha, rank: alpha / rank, dora: bool = False
    ):
        """Updates every module; `rank` and `alpha` are numbers, or functions of the module's name."""
        for module in self.modules:
            weight = self.merged[weight_of(module)]
            r = rank(module) if callable(rank) else rank
            a, b = self.random(r, weight.shape[1]), self.random(weight.shape[0], r)
            factor = scale(alpha(module) if callable(alpha) else alpha, r)
            weight += factor * b.astype(np.float64) @ a.astype(np.float64)
            self.tensors |= {f"{self.name(module)}.lora_A.weight": a, f"{self.name(module)}.lora_B.weight": b}
            if dora:
                magnitude = np.abs(self.random(weight.shape[0])) + 0.5
                weight *= (magnitude / np.linalg.norm(weight, axis=1))[:, None]
                self.tensors[f"{self.name(module)}.lora_magnitude_vector.weight"] = magnitude
        return self

    def add_table(self, name: str = "embed_tokens"):
        """Updates the embedding table, of which peft also saves a copy."""
        table = self.merged[weight_of(name)]
        copy = self.replace(weight_of(name), f"{name}.base_layer.weight")
        a, b = self.random(RANK, table.shape[0]), self.random(table.shape[1], RANK)
        self.merged[weight_of(name)] = copy + ALPHA / RANK * (b.astype(np.float64) @ a.astype(np.float64)).T
        self.tensors |= {f"{self.name(name)}.lora_embedding_A": a, f"{self.name(name)}.lora_embedding_B": b}
        return self

    def replace(self, name: str, saved_as: str | None = None, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """A full copy of a tensor."""
        copy = self.random(*(shape or self.merged[name].shape))
        self.tensors[self.name(saved_as or name)] = copy
        self.merged[name] = copy.astype(np.float64)
        return self.merged[name]

    def save(self, folder: Path, **fields: Any) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.tensors, folder / WEIGHTS)
        config = {
            "peft_type": "LORA",
            "base_model_name_or_path": "google/base",
            "r": RANK,
            "lora_alpha": ALPHA,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "target_modules": ["q_proj"],
            "megatron_core": "megatron.core",
            "qalora_group_size": 16,
            "lora_dropout": 0.1,
            "loftq_config": {},
            "use_qalora": False,
        }
        (folder / CONFIG).write_text(json.dumps(config | fields))
        return folder

    def check(self, adapter: Path, source: Path, **options: Any) -> None:
        """The converted adapter is the converted base with the merged tensors."""
        folder = adapter.parent
        convert(adapter, folder / "ours", dtype="float32", **options)
        shutil.copytree(source, folder / "merged")
        save_file(
            {name: array.astype(np.float32) for name, array in self.merged.items()}, folder / "merged" / BASE_WEIGHTS
        )
        convert(folder / "merged", folder / "theirs", dtype="float32")
        ours, theirs = (read_checkpoint(folder / name) for name in ("ours", "theirs"))
        assert (ours.config, ours.head, ours.manifest.text) == (theirs.config, theirs.head, theirs.manifest.text)
        for name, array in theirs.weights.items():
            np.testing.assert_allclose(ours.weights[name], array, rtol=2e-6, atol=2e-6, err_msg=name)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """A matrix is merged in many pieces, of which the last is smaller."""
    monkeypatch.setattr(checkpoint_tensors, "PIECE_BYTES", 5000)


@pytest.fixture
def base(tmp_path) -> Path:
    return save_base(tmp_path / "base")


def refusal(adapter: Path, **options: Any) -> str:
    """The message of `convert`; `inspect` comes to the same verdict."""
    with pytest.raises(CheckpointError) as error:
        convert(adapter, adapter.parent / "ours", **options)
    given = {name: Path(value) for name, value in options.items() if name == "base"}
    problems = inspect_checkpoint(adapter, **given)["problems"]
    assert [line.strip() for line in str(error.value).splitlines()] == problems
    return str(error.value)


# ----------------------------------------------------------------------------------------------- what is merged


def rank_of(module: str) -> int:
    return 7 if module == "layers.1.mlp.down_proj" else 3 if module.endswith("q_proj") else RANK


def alpha_of(module: str) -> float:
    return 40.5 if module == "layers.0.self_attn.k_proj" else 1 if module.endswith(".o_proj") else ALPHA


PATTERNS = {
    "rank_pattern": {"q_proj": 3, "^layers\\.1.mlp.down_proj": 7, "^v_proj": 9, "proj": 9},
    "alpha_pattern": {"layers.0.self_attn.k_proj": 40.5, "o_proj": 1, "k_proj": ALPHA, "layers.0.self_attn": 5},
}


@pytest.mark.parametrize(
    ("update", "fields"),
    [
        ({}, {}),
        ({}, {"fan_in_fan_out": True, "layers_to_transform": [0, 1, 2], "peft_version": "0.21.2"}),
        ({"scale": lambda alpha, rank: alpha / math.sqrt(rank)}, {"use_rslora": True}),
        ({"rank": rank_of, "alpha": alpha_of}, PATTERNS),
        (
            {"rank": rank_of, "alpha": alpha_of, "scale": lambda alpha, rank: alpha / math.sqrt(rank)},
            PATTERNS | {"use_rslora": True},
        ),
        ({"dora": True}, {"use_dora": True}),
        ({"rank": 1, "alpha": 0.5}, {"r": 1, "lora_alpha": 0.5}),
    ],
    ids=["plain", "no effect", "rsLoRA", "patterns", "patterns and rsLoRA", "DoRA", "rank 1"],
)
def test_options(tmp_path, base, update, fields):
    adapter = Adapter(base).add(**update)
    adapter.check(adapter.save(tmp_path / "adapter", **fields), base)


FAMILIES = {
    "gemma": (transformers.GemmaModel, models.gemma, ("", "")),
    "gemma2 with an output table": (transformers.Gemma2ForCausalLM, models.gemma2, ("model.", "model.")),
    "an adapter of the bare model": (transformers.Gemma2ForCausalLM, models.gemma2, ("model.", "")),
    "a base of the bare model": (transformers.Gemma3TextModel, models.gemma3, ("", "model.")),
    "t5gemma": (transformers.T5GemmaEncoderModel, models.t5gemma, ("encoder.", "encoder.")),
    "t5gemma with a decoder": (transformers.T5GemmaModel, models.t5gemma, ("", "")),
    "classifier": (transformers.Gemma3TextForSequenceClassification, models.gemma3, ("model.", "model.")),
}


@pytest.mark.parametrize(("model_class", "config", "prefix"), FAMILIES.values(), ids=FAMILIES)
def test_families(tmp_path, model_class, config, prefix):
    fields = {"is_encoder_decoder": True} if model_class is transformers.T5GemmaModel else {}
    made = config()
    for name, value in fields.items():
        setattr(made, name, value)
    base = save_base(tmp_path / "base", model_class, made)
    adapter = Adapter(base, prefix=prefix).add()
    adapter.check(adapter.save(tmp_path / "adapter"), base)


@pytest.mark.parametrize("names", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_multimodal_base(tmp_path, names):
    """Its names before and after version 4.52 of transformers; the adapter has the newer ones, and those of a tower."""
    base = save_base(tmp_path / "base", transformers.Gemma3TextModel, models.gemma3())
    text = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    tensors = load_file(base / BASE_WEIGHTS)
    save_file({names + name: array for name, array in tensors.items()}, base / BASE_WEIGHTS)
    adapter = Adapter(base, prefix=(names, "model.language_model.")).add()
    tower = "base_model.model.model.vision_tower.layers.0.q_proj.lora_"
    adapter.tensors |= {f"{tower}A.weight": adapter.random(RANK, 8), f"{tower}B.weight": adapter.random(8, RANK)}
    adapter.check(adapter.save(tmp_path / "adapter"), base)
    assert read_checkpoint(tmp_path / "ours").manifest.source.dropped == {"model.vision_tower.": 1}


def test_the_embedding_table(tmp_path, base):
    adapter = Adapter(base).add().add_table()
    adapter.check(adapter.save(tmp_path / "adapter"), base)


def test_full_copies(tmp_path, base):
    """Of `modules_to_save`."""
    adapter = Adapter(base).add()
    adapter.replace("norm.weight")
    adapter.replace("embed_tokens.weight")
    adapter.check(adapter.save(tmp_path / "adapter", modules_to_save=["norm", "embed_tokens"]), base)


def test_only_full_copies(tmp_path, base):
    adapter = Adapter(base)
    adapter.replace("norm.weight")
    adapter.check(adapter.save(tmp_path / "adapter"), base)


def test_an_output_table_is_left_out(tmp_path, base):
    """An encoder does not need it, adapted or copied."""
    adapter = Adapter(base).add()
    name = "base_model.model.lm_head.lora_"
    adapter.tensors |= {f"{name}A.weight": adapter.random(RANK, 48), f"{name}B.weight": adapter.random(101, RANK)}
    adapter.check(adapter.save(tmp_path / "adapter"), base)
    assert read_checkpoint(tmp_path / "ours").manifest.source.dropped == {"lm_head.weight": 1}


def test_names_with_the_name_of_the_adapter(tmp_path, base):
    """As older programs write them, and as a module that torch.compile has wrapped."""
    adapter = Adapter(base).add(dora=True)
    adapter.tensors = {
        name.replace(".weight", ".default.weight").replace("base_model.model.", "base_model.model._orig_mod."): array
        for name, array in adapter.tensors.items()
    }
    adapter.tensors = {
        name.replace("vector.default.weight", "vector.default"): array for name, array in adapter.tensors.items()
    }
    adapter.check(adapter.save(tmp_path / "adapter", use_dora=True), base)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_dtypes_of_the_files(tmp_path, base, dtype):
    """The merge is float32 whatever the dtypes of the base and the adapter are."""
    stored = {name: array.astype(dtype) for name, array in load_file(base / BASE_WEIGHTS).items()}
    save_file(stored, base / BASE_WEIGHTS)
    adapter = Adapter(base)
    random = adapter.random
    adapter.random = lambda *shape: random(*shape).astype(dtype).astype(np.float32)
    adapter.add()
    adapter.tensors = {name: array.astype(dtype) for name, array in adapter.tensors.items()}
    adapter.check(adapter.save(tmp_path / "adapter"), base)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_rounding_comes_after_the_merge(tmp_path, base, dtype):
    adapter = Adapter(base).add().save(tmp_path / "adapter")
    convert(adapter, tmp_path / "direct", dtype=dtype)
    convert(adapter, tmp_path / "float32", dtype="float32")
    convert(tmp_path / "float32", tmp_path / "later", dtype=dtype)
    files = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("direct", "later")]
    assert files[0] == files[1]


# ----------------------------------------------------------------------------------------------- classifiers


@pytest.mark.parametrize("by", ["task_type", "auto_mapping"])
@pytest.mark.parametrize("task", ["classify", "tag"])
def test_a_classifier_on_a_language_model(tmp_path, task, by):
    """The adapter contains the classifier, and the base's config does not know it. transformers makes the yardstick."""
    labels = 4
    base = save_base(tmp_path / "base", transformers.GemmaForCausalLM)
    adapter = Adapter(base, prefix=("model.", "model.")).add()
    adapter.replace("score.weight", shape=(labels, 48))
    kind, name = {"classify": ("SEQ_CLS", "Sequence"), "tag": ("TOKEN_CLS", "Token")}[task]
    name = f"GemmaFor{name}Classification"
    fields = {"task_type": kind} if by == "task_type" else {"auto_mapping": {"base_model_class": name}}
    if task == "tag":
        adapter.replace("score.bias", shape=(labels,))
    convert(adapter.save(tmp_path / "adapter", **fields), tmp_path / "ours", dtype="float32")
    engine = Engine.load(tmp_path / "ours", attention="causal", max_batch_tokens=64)
    assert engine.head.labels == tuple(f"LABEL_{number}" for number in range(labels))
    config = models.gemma()
    config.num_labels = labels
    model = getattr(transformers, name)(config).eval()
    state = {key: torch.from_numpy(array.astype(np.float32)) for key, array in adapter.merged.items()}
    model.load_state_dict({key: tensor for key, tensor in state.items() if not key.startswith("lm_head")}, strict=True)
    sequences = [[max(token, 1) for token in ids] for ids in models.random_ids(5, 9, 3)]
    with torch.no_grad():
        theirs = [model(torch.tensor([ids])).logits[0].numpy() for ids in sequences]
    ours = engine.classify(sequences) if task == "classify" else engine.tag(sequences)
    assert models.worst(ours, theirs) < 1e-5


def test_a_classifier_of_the_base_is_replaced(tmp_path):
    base = save_base(tmp_path / "base", transformers.GemmaForSequenceClassification)
    adapter = Adapter(base, prefix=("model.", "model.")).add()
    adapter.replace("score.weight")
    adapter.check(adapter.save(tmp_path / "adapter", task_type="SEQ_CLS", modules_to_save=["score"]), base)
    assert len(read_checkpoint(tmp_path / "ours").head.labels) == models.LABELS


@pytest.mark.parametrize("shape", [None, (5,), (2**40, 0)])
def test_a_classifier_without_its_weights(tmp_path, base, shape):
    adapter = Adapter(base).add()
    if shape is not None:
        adapter.tensors["base_model.model.score.weight"] = ones(*shape)
    message = refusal(adapter.save(tmp_path / "adapter", task_type="SEQ_CLS"))
    assert "neither it nor its base" in message
    assert "modules_to_save=['score']" in message


# ----------------------------------------------------------------------------------------------- where the base is


def test_a_base_in_the_same_folder(tmp_path, base):
    adapter = Adapter(base).add()
    shutil.copytree(base, tmp_path / "adapter")
    adapter.check(adapter.save(tmp_path / "adapter", base_model_name_or_path="google/elsewhere"), base)


@pytest.mark.parametrize("spelling", ["google/base", "base", "google/base/", "/no/such/folder/base"])
def test_a_base_beside_the_adapter(tmp_path, base, spelling):
    adapter = Adapter(base).add()
    adapter.check(adapter.save(tmp_path / "adapter", base_model_name_or_path=spelling), base)


def test_a_base_whose_path_is_given_by_the_adapter(tmp_path, base):
    adapter = Adapter(base).add()
    adapter.check(adapter.save(tmp_path / "more" / "adapter", base_model_name_or_path=str(base)), base)


@pytest.mark.parametrize("name", ["google/other", None, str])
def test_a_base_given_by_the_user(tmp_path, base, name):
    """It is taken before the others."""
    other = save_base(tmp_path / "other", config=models.gemma(num_hidden_layers=1))
    adapter = Adapter(base).add()
    stated = str(other) if name is str else name
    adapter.check(adapter.save(tmp_path / "adapter", base_model_name_or_path=stated), base, base=str(base))


def test_the_command(tmp_path, base):
    adapter = Adapter(base).add().save(tmp_path / "adapter", base_model_name_or_path="google/other")
    arguments = [str(adapter), str(tmp_path / "ours")]
    result = CliRunner().invoke(main, ["convert", *arguments])
    assert result.exit_code == 2
    assert "give its folder with --base" in result.output
    result = CliRunner().invoke(main, ["convert", *arguments, "--base", str(base)])
    assert result.exit_code == 0, result.output
    facts = CliRunner().invoke(main, ["inspect", arguments[0], "--base", str(base), "--json"])
    assert json.loads(facts.output)["files"] == [CONFIG, WEIGHTS, "../base/model.safetensors"]


def test_the_manifest_names_base_and_adapter(tmp_path, base):
    adapter = Adapter(base).add().save(tmp_path / "adapter")
    convert(adapter, tmp_path / "ours")
    source = read_checkpoint(tmp_path / "ours").manifest.source
    assert source.format == "hugging_face"
    assert sorted(source.files) == ["../base/model.safetensors", CONFIG, WEIGHTS]
    assert source.files["../base/model.safetensors"].bytes == (base / BASE_WEIGHTS).stat().st_size


def test_the_tokenizer(tmp_path, base):
    """That of the adapter; if it has none, that of the base."""
    adapter = Adapter(base).add().save(tmp_path / "adapter")
    train_tokenizer("<bos> $A <eos>").save(str(base / "tokenizer.json"))
    convert(adapter, tmp_path / "first")
    assert read_checkpoint(tmp_path / "first").manifest.text.end == 1
    train_tokenizer("<bos> $A").save(str(adapter / "tokenizer.json"))
    convert(adapter, tmp_path / "second")
    assert read_checkpoint(tmp_path / "second").manifest.text.end is None
    assert read_checkpoint(tmp_path / "second").manifest.text.begin == 2


# ------------------------------------------------------------------------------------------ sentence-transformers


def sentence_vectors(folder: Path) -> np.ndarray:
    convert(folder, folder.parent / "vectors", dtype="float32", overwrite=True)
    return Engine.load(folder.parent / "vectors", max_batch_tokens=1024).embed(TEXTS)


@pytest.mark.parametrize("inside", ["", "0_Transformer"])
def test_a_sentence_transformers_folder(tmp_path, inside):
    """The folder that the library saves after `add_adapter`: no config.json, and no weights but the adapter's."""
    config = models.gemma3(num_hidden_layers=2, vocab_size=VOCAB_SIZE)
    model = models.build(transformers.Gemma3TextModel, config)
    save_sentence_model(tmp_path, model, [Pooling(48, pooling_mode="lasttoken"), Normalize()])
    source, base = tmp_path / "source", tmp_path / "base"
    base.mkdir()
    for name in ("config.json", BASE_WEIGHTS):
        shutil.copy(source / name, base / name)
    adapter = Adapter(base).add()
    library = tmp_path / "merged"
    shutil.copytree(source, library)
    save_file({name: array.astype(np.float32) for name, array in adapter.merged.items()}, library / BASE_WEIGHTS)
    (source / "config.json").unlink()
    (source / BASE_WEIGHTS).unlink()
    adapter.save(source)
    if inside:
        (source / inside).mkdir()
        for name in (CONFIG, WEIGHTS, "tokenizer.json", "tokenizer_config.json", "sentence_bert_config.json"):
            (source / name).rename(source / inside / name)
        modules = json.loads((source / "modules.json").read_text())
        modules[0]["path"] = inside
        (source / "modules.json").write_text(json.dumps(modules))
    theirs = SentenceTransformer(str(library), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(sentence_vectors(source), theirs, atol=1e-5)


def test_an_adapter_of_a_sentence_transformers_base(tmp_path):
    """The base's pooling, dense layers and prompts stay."""
    save_embedding_gemma(tmp_path, layers=2)
    base = tmp_path / "source"
    adapter = Adapter(base).add()
    adapter.check(adapter.save(tmp_path / "adapter", base_model_name_or_path="google/source"), base)
    assert len(read_checkpoint(tmp_path / "ours").head.dense) == 2
    assert "query" in read_checkpoint(tmp_path / "ours").manifest.text.prompts


def test_an_adapter_beside_the_list_of_modules_but_not_beside_the_encoder(tmp_path):
    save_sentence_model(
        tmp_path, models.build(transformers.Gemma3TextModel, models.gemma3(vocab_size=512)), [Pooling(48)]
    )
    source = tmp_path / "source"
    (source / "0_Transformer").mkdir()
    for name in ("config.json", BASE_WEIGHTS, "tokenizer.json", "tokenizer_config.json"):
        (source / name).rename(source / "0_Transformer" / name)
    write_json(source / CONFIG, peft_type="LORA")
    modules = json.loads((source / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (source / "modules.json").write_text(json.dumps(modules))
    assert "is not beside the encoder" in refusal(source)


# ----------------------------------------------------------------------------------------------- what is refused


REFUSED_FIELDS = {
    "another type": ({"peft_type": "IA3"}, ["peft_type is 'IA3'", "merge_and_unload"]),
    "no type": ({"peft_type": None}, ["peft_type is None"]),
    "layers that are repeated": ({"layer_replication": [[0, 2]]}, ["'layer_replication'", "merge_and_unload"]),
    "a bias in B": ({"lora_bias": True}, ["'lora_bias'"]),
    "tokens": ({"trainable_token_indices": [1]}, ["'trainable_token_indices'"]),
    "activated LoRA": ({"alora_invocation_tokens": [5]}, ["'alora_invocation_tokens'"]),
    "QALoRA": ({"use_qalora": True}, ["'use_qalora'"]),
    "an option of later": ({"use_novelty": {"a": 1}}, ["'use_novelty'"]),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, ["init_lora_weights is 'pissa_niter_4'", "original base"]),
    "OLoRA": ({"init_lora_weights": "olora"}, ["init_lora_weights is 'olora'"]),
    "LoftQ": ({"init_lora_weights": "loftq"}, ["init_lora_weights is 'loftq'"]),
    "a regular expression": ({"rank_pattern": {"(q|k)_proj": 3}}, ["'(q|k)_proj'", "regular expression"]),
    "another one": ({"alpha_pattern": {".*proj": 3}}, ["'.*proj'"]),
    "rank 0": ({"r": 0}, ["rank 0; it must be from 1 to"]),
    "a negative rank": ({"rank_pattern": {"q_proj": -1}}, ["rank -1"]),
    "a huge rank": ({"r": 10**400}, ["an integer of"]),
    "a rank of text": ({"r": "4"}, ["r is '4'"]),
    "no rank": ({"r": None}, ["r is None"]),
    "alpha of text": ({"lora_alpha": "ten"}, ["lora_alpha is 'ten'"]),
    "no alpha": ({"lora_alpha": None}, ["lora_alpha is None"]),
    "an infinite alpha": ({"lora_alpha": math.inf}, ["finite number"]),
    "rsLoRA of text": ({"use_rslora": "yes"}, ["use_rslora is 'yes'"]),
    "another rank": ({"r": 5}, ["misshapen", "for rank 5", "--base"]),
    "another rank by pattern": ({"rank_pattern": {"q_proj": 2}}, ["misshapen", "for rank 2"]),
    "DoRA without magnitudes": ({"use_dora": True}, ["it must have lora_A and lora_B and lora_magnitude_vector"]),
    "a number as the base": ({"base_model_name_or_path": 3}, ["base_model_name_or_path is 3"]),
    "a list as the task": ({"task_type": ["SEQ_CLS"]}, ["task_type is"]),
    "a base that is not there": ({"base_model_name_or_path": "google/other"}, ["base 'google/other'", "--base"]),
    "no base": ({"base_model_name_or_path": None}, ["base ''", "--base"]),
    "a base above": ({"base_model_name_or_path": "../base"}, ["base '../base'", "--base"]),
    "a base that is the folder above": ({"base_model_name_or_path": "google/.."}, ["base 'google/..'", "--base"]),
    "the adapter itself": ({"base_model_name_or_path": "google/adapter"}, ["is not found", "--base"]),
    "an impossible name": ({"base_model_name_or_path": "a\0b"}, ["cannot be used as a path"]),
    "a long name": ({"base_model_name_or_path": "x" * 5000}, ["cannot be used as a path"]),
}


@pytest.mark.parametrize(("fields", "words"), REFUSED_FIELDS.values(), ids=REFUSED_FIELDS)
def test_fields(tmp_path, base, fields, words):
    message = refusal(Adapter(base).add().save(tmp_path / "adapter", **fields))
    for word in words:
        assert word in message


def only(tensors: Arrays, end: str) -> Arrays:
    return {name: array for name, array in tensors.items() if not name.endswith(end)}


Q = "base_model.model.layers.0.self_attn.q_proj"


NORM, TABLE = "base_model.model.norm", "base_model.model.embed_tokens"
REFUSED_TENSORS = {
    "A without B": (
        lambda t: only(t, "0.self_attn.q_proj.lora_B.weight"),
        ["has lora_A; it must have lora_A and lora_B"],
    ),
    "B without A": (lambda t: only(t, "1.mlp.up_proj.lora_A.weight"), ["'layers.1.mlp.up_proj' has lora_B"]),
    "half of a table": (lambda t: t | {f"{TABLE}.lora_embedding_A": ones(4, 101)}, ["'embed_tokens' has lora_embed"]),
    "magnitudes without DoRA": (
        lambda t: t | {f"{Q}.lora_magnitude_vector.weight": ones(84)},
        ["lora_magnitude_vector; it must have lora_A and lora_B"],
    ),
    "a wrong width": (lambda t: t | {f"{Q}.lora_A.weight": ones(4, 47)}, ["misshapen", "(4, 47)", "(4, 48)"]),
    "a wrong height": (lambda t: t | {f"{Q}.lora_B.weight": ones(83, 4)}, ["(83, 4)", "(84, 4)"]),
    "one axis": (lambda t: t | {f"{Q}.lora_B.weight": ones(84 * 4)}, ["(336,)"]),
    "integers": (lambda t: t | {f"{Q}.lora_A.weight": np.ones((4, 48), np.int32)}, ["dtype", "I32"]),
    "a norm": (
        lambda t: t | {f"{NORM}.lora_A.weight": ones(4, 48), f"{NORM}.lora_B.weight": ones(48, 4)},
        ["only a matrix"],
    ),
    "a module that is not in the base": (
        lambda t: {name.replace("layers.2.", "layers.3."): array for name, array in t.items()},
        ["the base has no tensor 'layers.3.self_attn"],
    ),
    "a copy that the model does not have": (
        lambda t: t | {f"{Q}.bias": ones(84)},
        ["the base has no tensor 'layers.0.self_attn.q_proj.bias'"],
    ),
    "a copy of another shape": (
        lambda t: t | {f"{TABLE}.weight": ones(102, 48)},
        ["copy of 'embed_tokens.weight' is (102, 48)"],
    ),
    "a kind of later": (
        lambda t: t | {f"{Q}.lora_C.weight": ones(4, 4)},
        ["no tensor 'layers.0.self_attn.q_proj.lora_C"],
    ),
    "two spellings": (lambda t: t | {f"{Q}.lora_A.default.weight": ones(4, 48)}, ["twice"]),
    "two prefixes": (
        lambda t: t | {name.replace("layers.0", "model.layers.0"): array for name, array in t.items() if ".up" in name},
        ["are the same module of the base"],
    ),
    "nothing": (lambda t: {}, ["contains no tensors"]),
    "NaN in A": (lambda t: t | {f"{Q}.lora_A.weight": ones(4, 48) * np.nan}, ["NaN", WEIGHTS]),
    "infinity in B": (lambda t: t | {f"{Q}.lora_B.weight": ones(84, 4) * np.inf}, ["NaN", WEIGHTS]),
    "traversal": (lambda t: t | {"../../x.lora_A.weight": ones(4, 48)}, ["no tensor '../../x.weight'"]),
}


@pytest.mark.parametrize(("change", "words"), REFUSED_TENSORS.values(), ids=REFUSED_TENSORS)
def test_tensors(tmp_path, base, change, words):
    adapter = Adapter(base).add()
    adapter.tensors = change(adapter.tensors)
    adapter.save(tmp_path / "adapter")
    with pytest.raises(CheckpointError) as error:
        convert(tmp_path / "adapter", tmp_path / "ours")
    for word in words:
        assert word in str(error.value)
    assert not (tmp_path / "ours").exists()


def test_a_row_of_length_zero_with_dora(tmp_path, base):
    """It has no direction, so its scaled row is NaN."""
    adapter = Adapter(base).add(dora=True)
    adapter.tensors |= {name: array * 0 for name, array in adapter.tensors.items() if name.startswith(f"{Q}.lora_B")}
    stored = load_file(base / BASE_WEIGHTS)
    stored["layers.0.self_attn.q_proj.weight"][3] = 0
    save_file(stored, base / BASE_WEIGHTS)
    with pytest.raises(CheckpointError, match="contains NaN"):
        convert(adapter.save(tmp_path / "adapter", use_dora=True), tmp_path / "ours")


def test_an_embedding_with_dora(tmp_path, base):
    adapter = Adapter(base).add(dora=True).add_table()
    assert "embedding with DoRA" in refusal(adapter.save(tmp_path / "adapter", use_dora=True))


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\x08" + bytes(7) + b"{}      x"]
)
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_damaged_files(tmp_path, base, name, content):
    adapter = Adapter(base).add().save(tmp_path / "adapter")
    (adapter / name).write_bytes(content)
    assert str(adapter / name) in refusal(adapter)


def test_weights_as_a_pickle(tmp_path, base):
    adapter = Adapter(base).add().save(tmp_path / "adapter")
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    message = refusal(adapter)
    assert f"no {WEIGHTS}" in message
    assert "save it again" in message


def test_a_link_out_of_the_folder(tmp_path, base):
    adapter = Adapter(base).add().save(tmp_path / "adapter")
    (adapter / WEIGHTS).rename(tmp_path / WEIGHTS)
    (adapter / WEIGHTS).symlink_to(tmp_path / WEIGHTS)
    assert "outside" in refusal(adapter)


def test_a_quantized_base(tmp_path, base):
    write_json(base / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    assert "quantized, by 'bitsandbytes'" in refusal(Adapter(base).add().save(tmp_path / "adapter"))


def test_a_base_of_fp8(tmp_path, base):
    adapter = Adapter(base).add().save(tmp_path / "adapter")
    stored = {name: torch.from_numpy(array) for name, array in load_file(base / BASE_WEIGHTS).items()}
    safetensors.torch.save_file(
        {n: t.to(torch.float8_e4m3fn) if "proj" in n else t for n, t in stored.items()}, base / BASE_WEIGHTS
    )
    assert "fp8" in refusal(adapter)[:300]


def test_a_base_that_is_an_adapter(tmp_path, base):
    first = Adapter(base).add().save(tmp_path / "first")
    second = Adapter(base).add().save(tmp_path / "second")
    assert "is itself an adapter" in refusal(second, base=first)


@pytest.mark.parametrize("name", ["missing", "base/config.json"])
def test_a_given_base_that_is_no_folder(tmp_path, base, name):
    adapter = Adapter(base).add().save(tmp_path / "adapter")
    assert str(tmp_path / name) in refusal(adapter, base=tmp_path / name)


def test_a_given_base_without_a_config(tmp_path, base):
    (base / "config.json").unlink()
    assert "it has no config.json" in refusal(Adapter(base).add().save(tmp_path / "adapter"), base=base)


def test_a_base_for_a_model_that_is_no_adapter(tmp_path, base):
    assert "is not an adapter and needs no base" in refusal(base, base=base)
    convert(base, tmp_path / "ours")
    with pytest.raises(ConfigError, match="the format funnel, which has no adapters"):
        convert(tmp_path / "ours", tmp_path / "again", base=base)
