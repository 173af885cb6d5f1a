"""Fine-tuning: trains a checkpoint on labelled data, through a funnel or without one, as in arXiv:2504.02877."""

import abc
import dataclasses
import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from funnel_engine import Engine, FunnelConfig, HeadConfig
from funnel_engine.checkpoints.native import Checkpoint
from funnel_engine.checks import check_option
from funnel_engine.config import Funnel
from funnel_engine.heads import SentenceVectors, classifier
from funnel_engine.input_files import to_path
from funnel_engine.inputs import join
from funnel_engine.packing import make_plan, spans
from funnel_engine.weights import DTYPES, expected_shapes
from funnel_kernels.errors import ConfigError, InputError
from funnel_training.finetune_loss import cosent, cross_entropy, info_nce
from funnel_training.scores import Ints
from funnel_training.student import Packs, Student
from funnel_training.tasks.labels import HeadLabels, read_labels
from funnel_training.tasks.pairs import Pairs, read_pairs
from funnel_training.tasks.retrieval import Retrieval
from funnel_training.tasks.tags import Tags, WordTokens, read_tags
from funnel_training.tasks.tags import spans as tag_spans
from funnel_training.tasks.task import Task
from funnel_training.trainer import Objective, Report, Run, Settings, run_texts
from funnel_training.training_run import LEAST_UNITS, MOST_HELD_OUT, TrainingRun, hold_out

TASKS = {"labels": "classify", "tags": "tag", "pairs": None}  # the task of the head for each form of data
DEVIATION = 0.02  # of the weights of a new head, as Gemma's


def finetune(
    checkpoint: str | os.PathLike[str],
    form: str,
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    settings: Settings,
    *,
    funnel: Funnel | None = None,
    attention: str | None = None,
    pooling: str | None = None,
    truncate: bool = False,
    resume: bool = False,
    report: Report = lambda line: None,
) -> dict[str, float]:
    """Trains a copy of a checkpoint on labelled data, and writes it with its head, its funnel and a record.

    A tenth of the data is held out of training; the weights with the best first figure on it are written. See
    `TrainingRun` for what the run leaves.

    A classifier is continued if the checkpoint has one for this form of data, and then the labels must be its own. Else
    a new one begins with random weights; that of texts reads the pooled vector.

    Args:
        checkpoint: a folder that `convert` wrote.
        form: what the data are: "labels" (text, label), "tags" (CoNLL columns), or "pairs" (sentence1, sentence2,
            score; or query, document).
        data: a file as for `funnel evaluate`.
        output: the folder of the new checkpoint.
        settings: `train="all"` is the paper's; without a funnel it is the only choice.
        funnel: None takes the checkpoint's own; `FunnelConfig()` is no funnel.
        attention, pooling: as in `Engine.load`; the new checkpoint keeps them. `pooling="attention"` adds the learned
            query of the pooler if the checkpoint does not have it.
        truncate: cut off the ends of texts that are longer than `settings.rows` or than the model allows.
        resume: continue a run that was stopped.
        report: called with each line for people.

    Returns:
        The figures of the written checkpoint on the data held out of training, by name.

    Raises:
        CheckpointError: the checkpoint cannot be read, or the output cannot be written.
        ConfigError: an option is wrong, or the loss is not finite.
        InputError: the data cannot be used, or the disk is full.
    """
    check_option("form", form, tuple(TASKS))
    run = TrainingRun(checkpoint, output, settings, report, funnel=funnel, attention=attention)
    before = run.opened.head
    task = read_data(form, to_path(data), before)
    task.check_funnel(run.funnel)
    held_out, training = divide_units(task, settings.seed)
    head = new_head(before, task, TASKS[form], pooling)
    trained_for = run.opened.manifest.funnel
    if run.opened.manifest.training is not None and trained_for not in (run.funnel, FunnelConfig()):
        report(f"the checkpoint was trained for the funnel {trained_for}; now it is trained for {run.funnel}")
    if before.task not in (None, head.task):
        report(f"the checkpoint's classifier (task {before.task}, {len(before.labels)} labels) is left out")
    run.opened = with_head(run.opened, head, settings.seed)
    config = run.opened.config
    student = run.student(
        classifier(head, make_plan(config, run.funnel), config.pad_token_id) if head.task else SentenceVectors(head)
    )
    objective = OBJECTIVES[type(task)](student, training, held_out, run.engine(student, None), truncate, settings)
    (sha256,) = task.files.values()
    run.open({"form": form, "data": sha256, "truncate": truncate}, resume=resume)
    report(f"{training.units:,} {task.unit} to train on, {held_out.units:,} held out")
    trainer = run.trainer(student, objective)
    figures = trainer.run()
    run.write(trainer, figures, method="finetune", data=sha256, loss=objective.name)
    return figures


def read_data(form: str, path: Path, head: HeadConfig) -> Task:
    """The data as a task, whose labels are those of the checkpoint's head if it has one for them.

    Raises:
        InputError: the data cannot be used.
    """
    labels = head.labels if head.task == TASKS[form] else ()
    task: Task
    if form == "labels":
        read = read_labels(path, labels)
        side = dataclasses.replace(read.sides[0], prompt=None)  # as `Engine.classify`
        task = HeadLabels(read.files, read.duplicates, (side,), read.labels, read.gold)
        if len(set(read.gold)) < 2:
            raise InputError(
                f"all texts in {path.name} have the label {read.labels[read.gold[0]]!r:.60}; give texts of at least "
                "two labels"
            )
    else:
        task = read_tags(path, labels) if form == "tags" else read_pairs(path)
    if task.units < LEAST_UNITS:
        raise InputError(f"{path.name} has {task.units} different {task.unit}; give at least {LEAST_UNITS}")
    return task


def divide_units(task: Task, seed: int) -> tuple[Any, Any]:
    """The task of the units that are held out of training, and that of the others.

    Raises:
        InputError: what is held out cannot tell how good a model is.
    """
    numbers, others = hold_out(task.order(seed))
    # At most MOST_HELD_OUT documents are ranked for the held-out queries; of the others, only those that are used.
    held_out = task.take(numbers, MOST_HELD_OUT / len(task.sides[-1].texts))
    (name,) = task.files
    if isinstance(task, HeadLabels) and isinstance(held_out, HeadLabels):
        missing = np.setdiff1d(task.gold, held_out.gold)
        if missing.size:
            raise InputError(
                f"{name} has too few texts of the label {task.labels[missing[0]]!r:.60}: none of them is among the "
                f"{len(numbers)} that are held out; give at least {math.ceil(task.units / len(numbers))} of each label"
            )
    if isinstance(held_out, Tags) and not any(map(tag_spans, held_out.tags)):
        raise InputError(f"none of the {len(numbers)} sentences of {name} that are held out has a span; give more")
    if isinstance(held_out, Pairs) and np.ptp(held_out.gold) == 0:
        raise InputError(f"the {len(numbers)} pairs of {name} that are held out all have one score; give more pairs")
    return held_out, task.take(others, 0.0)


def new_head(head: HeadConfig, task: Task, name: str | None, pooling: str | None) -> HeadConfig:
    """The head to train: the checkpoint's, with another pooling, or with a new classifier if it has none for the task.

    Raises:
        ConfigError: the pooling is unknown, or has no effect.
    """
    changes: dict[str, Any] = {}
    if head.task != name:
        pooled = "pooled" if name == "classify" else "last_token"
        labels = task.labels if isinstance(task, HeadLabels | Tags) else ()
        changes |= {"task": name, "labels": labels, "classifier_bias": name is not None, "classifier_input": pooled}
    if pooling is not None:
        changes |= {"pooling": pooling, "pooler": head.pooler or pooling == "attention"}
    head = dataclasses.replace(head, **changes)
    if pooling is not None and head.task is not None and head.classifier_input != "pooled":
        row = "the row of each token" if head.task == "tag" else "the row of the last token"
        raise ConfigError(f"pooling={pooling!r} has no effect: the classifier reads {row}; leave pooling out")
    return head


def with_head(checkpoint: Checkpoint, head: HeadConfig, seed: int) -> Checkpoint:
    """The checkpoint with another head; weights that the checkpoint does not have are random, biases are 0."""
    is_new = head.task != checkpoint.head.task
    generator = np.random.default_rng(seed)
    weights: dict[str, np.ndarray] = {}
    for name, shape in expected_shapes(checkpoint.config, head).items():
        if name in checkpoint.weights and not (is_new and name.startswith("classifier.")):
            weights[name] = checkpoint.weights[name]
        else:
            deviation = 0.0 if name.endswith(".bias") else DEVIATION
            weights[name] = (deviation * generator.standard_normal(shape)).astype(DTYPES[checkpoint.dtype])
    manifest = dataclasses.replace(checkpoint.manifest, head=head)
    return dataclasses.replace(checkpoint, manifest=manifest, weights=weights)


class FineTuning(Objective):
    """What the objectives for all forms of data share."""

    name: ClassVar[str]  # of the loss

    def __init__(
        self, student: Student, training: Any, held_out: Any, engine: Engine, truncate: bool, settings: Settings
    ):
        self.student, self.training, self.held_out = student, training, held_out
        self.packs, self.seed = settings.packs, settings.seed
        self.held_out_inputs = held_out.inputs(engine, truncate)
        self.inputs = training.inputs(engine, truncate)
        parts = [side.ids if isinstance(side, WordTokens) else side for side in self.inputs]
        self.tokens = join([ids for part in parts for ids in np.split(part.ids, part.offsets[1:-1])])
        self.places = [place for side in training.sides for place in side.places]

    def order(self, step: int, count: int) -> Ints:
        """The numbers of `count` texts or pairs in the order of a step."""
        return np.random.default_rng([self.seed, step]).permutation(count).astype(np.int32)

    def pack(self, order: Ints) -> Packs:
        """As many of the texts, in this order, as there is room for."""
        return self.student.pack(self.tokens, self.student.fill(self.tokens, order, self.packs), self.packs)

    def outputs(self, run: Run, inputs: Any) -> Any:
        """What the task scores, for the inputs of one side."""
        return run_texts(self.student, run, inputs, np.arange(len(inputs.lengths), dtype=np.int32), self.packs)

    def evaluate(self, run: Run) -> dict[str, float]:
        outputs = [self.outputs(run, side) for side in self.held_out_inputs]
        return {name: score.value for name, score in self.held_out.scores(outputs, outputs).items()}


class Classification(FineTuning):
    """The logits of each text."""

    name = "cross-entropy"

    def batch(self, step: int) -> tuple[Packs, Any]:
        packs = self.pack(self.order(step, self.training.units))
        return packs, np.where(packs.texts >= 0, self.training.gold[packs.texts], -1)

    def loss(self, outputs: jax.Array, packs: Packs, targets: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        return cross_entropy(outputs, targets), {}


class Tagging(FineTuning):
    """The logits of the first token of each word."""

    name = "cross-entropy of the first token of each word"

    @functools.cached_property
    def gold(self) -> list[Ints]:
        """The labels of the words of each sentence."""
        return [np.array([self.training.labels.index(tag) for tag in tags]) for tags in self.training.tags]

    def batch(self, step: int) -> tuple[Packs, Any]:
        packs = self.pack(self.order(step, self.training.units))
        targets = np.full((self.packs, self.student.rows), -1, np.int32)
        for target, numbers in zip(targets, packs.texts, strict=True):
            for number, rows in self.word_rows(self.inputs[0], numbers):
                target[rows] = self.gold[number]
        return packs, targets

    def loss(self, outputs: jax.Array, packs: Packs, targets: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        return cross_entropy(outputs, targets), {}

    def outputs(self, run: Run, inputs: WordTokens) -> list[Ints]:
        """For each sentence the label of each word, as `Tags.run`."""
        labels: dict[int, Ints] = {}
        for packs in self.student.batches(inputs.ids, np.arange(len(inputs.lengths), dtype=np.int32), self.packs):
            for logits, numbers in zip(run(packs), packs.texts, strict=True):
                labels |= {n: logits[rows].argmax(axis=1) for n, rows in self.word_rows(inputs, numbers)}
        return [labels[number] for number in range(len(labels))]

    def word_rows(self, inputs: WordTokens, numbers: Ints) -> Iterator[tuple[int, Ints]]:
        """The number of each sentence of a pack, and the rows of the first tokens of its words."""
        numbers = numbers[numbers >= 0]
        first = spans(self.student.plan, inputs.lengths[numbers], 1).first
        for number, row in zip(numbers.tolist(), first, strict=True):
            yield number, row + inputs.first_tokens[number]


class Matching(FineTuning):
    """The vectors of pairs of texts. Both texts of a pair are in the same step."""

    @functools.cached_property
    @abc.abstractmethod
    def pairs(self) -> np.ndarray:
        """The numbers of the texts of each pair, [2, pairs]."""

    def draw(self, step: int) -> tuple[Packs, np.ndarray, np.ndarray]:
        """The packs of a step; the pairs in them, [M], -1 where there is none; and where their texts are, [2, M]."""
        most = self.packs * self.student.most_texts
        order = self.order(step, self.pairs.shape[1])[:most]
        texts = self.pairs[:, order].T.reshape(-1)
        packs = self.pack(texts[np.sort(np.unique(texts, return_index=True)[1])])
        numbers = packs.texts.reshape(-1)
        place = np.full(len(self.places), -1, np.int32)  # among the outputs of the step
        place[numbers[numbers >= 0]] = np.flatnonzero(numbers >= 0)
        places = place[self.pairs[:, order]]
        whole = np.flatnonzero((places >= 0).all(axis=0))
        if len(whole) < 2:
            raise ConfigError(
                f"step {step} has room for {len(whole)} pairs in {self.packs} packs of {self.student.rows} rows, and a "
                "loss compares at least two; raise rows (--rows) or packs (--packs), or give shorter texts"
            )
        unused = most - len(whole)
        pairs = np.pad(order[whole], (0, unused), constant_values=-1)
        return packs, pairs, np.pad(places[:, whole], ((0, 0), (0, unused)))


class Similarity(Matching):
    """Pairs with a score."""

    name = "CoSENT"

    @functools.cached_property
    def pairs(self) -> np.ndarray:
        return np.asarray(self.training.index, np.int32)

    def batch(self, step: int) -> tuple[Packs, Any]:
        packs, pairs, places = self.draw(step)
        return packs, (places, self.training.gold[pairs].astype(np.float32), pairs >= 0)

    def loss(self, outputs: jax.Array, packs: Packs, targets: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        places, scores, counts = targets
        first, second = outputs.reshape(-1, outputs.shape[-1])[places]
        return cosent(first, second, scores, counts), {}


class Answering(Matching):
    """Queries and the documents that answer them."""

    name = "InfoNCE with in-batch negatives"

    @functools.cached_property
    def pairs(self) -> np.ndarray:
        queries = len(self.training.sides[0].texts)
        relevant = enumerate(self.training.relevant)
        return np.array([(query, queries + document) for query, grades in relevant for document in grades], np.int32).T

    def batch(self, step: int) -> tuple[Packs, Any]:
        packs, pairs, places = self.draw(step)
        queries, documents = self.pairs.astype(np.int64)
        texts = len(self.places)
        drawn = queries[pairs][:, None] * texts + documents[pairs]  # a number for each query with each document
        return packs, (places, ~np.isin(drawn, queries * texts + documents), pairs >= 0)

    def loss(self, outputs: jax.Array, packs: Packs, targets: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        places, negatives, counts = targets
        queries, documents = outputs.reshape(-1, outputs.shape[-1])[places]
        return info_nce(queries, documents, negatives, counts), {}


OBJECTIVES: dict[type[Task], type[FineTuning]] = {
    HeadLabels: Classification,
    Tags: Tagging,
    Pairs: Similarity,
    Retrieval: Answering,
}
