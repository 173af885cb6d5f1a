"""The study: pre-trains models, fine-tunes them through funnels, and measures quality and latency."""

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from funnel_engine import Engine, FunnelConfig
from funnel_engine.checkpoints.native import read_checkpoint
from funnel_engine.config import RECOVERIES
from funnel_engine.flops import ideal_ratio
from funnel_engine.output_files import write_text
from funnel_engine.programs import use_compilation_cache
from funnel_training.engines import engine_maker
from funnel_training.finetune import finetune
from funnel_training.journal import Journal
from funnel_training.latency import measure_in_turns
from funnel_training.miniature.brown import Document, hold_out, text_of
from funnel_training.miniature.model import make_config, make_vocabulary
from funnel_training.miniature.pretraining import cut_into_chunks, pretrain
from funnel_training.miniature.tasks import TASKS
from funnel_training.trainer import Report, Settings

PRETRAININGS = ("plain", "aware")
HELD_OUT_CHUNKS = 256  # for masked tokens
MOST_TEXTS = 64  # in a pack


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large a study is.

    Attributes:
        seeds: number of repetitions; each has its own pre-trained and fine-tuned models.
        vocabulary: number of pieces.
        layers, width, mlp_width: of the model.
        pretraining_steps, pretraining_rows: of 64-token chunks.
        steps: numbers of fine-tuning steps to compare, ascending; the last one is used for everything else.
        rows: tokens of a fine-tuning step.
        training_units, test_units: texts or sentences of a task.
        timed_texts: texts of the test data that latency is measured on.
        recoveries: those to compare.
    """

    seeds: int = 3
    vocabulary: int = 4096
    layers: int = 6
    width: int = 128
    mlp_width: int = 336
    pretraining_steps: int = 1500
    pretraining_rows: int = 256
    steps: tuple[int, ...] = (16, 48)
    rows: int = 512
    training_units: int = 800
    test_units: int = 600
    timed_texts: int = 200
    recoveries: tuple[str, ...] = tuple(RECOVERIES)

    @property
    def funnel_layers(self) -> tuple[int, ...]:
        """A funnel after every even layer."""
        return tuple(range(2, self.layers, 2))


QUICK = Sizes(
    seeds=2,
    vocabulary=2048,
    layers=4,
    width=64,
    mlp_width=128,
    pretraining_steps=200,
    steps=(15, 30),
    rows=256,
    training_units=600,
    test_units=200,
    timed_texts=100,
    recoveries=("tile", "sum_first", "mean_last"),
)
AWARE_FUNNEL = "2:2/mean_last"  # of the funnel-aware pre-training
TAGGING_RECOVERY = "mean_last"
PRETRAINING_RATE, RATE = 3e-3, 2e-3  # learning rates


class Run(NamedTuple):
    """A kind of fine-tuning, of which there is one for each seed."""

    task: str  # "groups" or "tags"
    pretraining: str  # "plain" or "aware"
    funnel: str  # the short form
    steps: int


def funnels(task: str, sizes: Sizes) -> tuple[str, ...]:
    """No funnel, and those after every even layer; with a recovery where each token needs a row."""
    recovery = f"/{TAGGING_RECOVERY}" if task == "tags" else ""
    return ("none", *(f"{layer}:2{recovery}" for layer in sizes.funnel_layers))


def runs(sizes: Sizes) -> list[Run]:
    """All kinds of fine-tuning, each once."""
    last, first_layer = sizes.steps[-1], sizes.funnel_layers[0]
    wanted = [
        Run(task, pretraining, funnel, last)
        for task in TASKS
        for pretraining in PRETRAININGS
        for funnel in funnels(task, sizes)
    ]
    wanted += [Run("tags", "plain", f"{first_layer}:2/{TAGGING_RECOVERY}", steps) for steps in sizes.steps]
    wanted += [Run("tags", "plain", f"{first_layer}:2/{recovery}", last) for recovery in sizes.recoveries]
    return list(dict.fromkeys(wanted))


@dataclasses.dataclass(frozen=True)
class Results:
    """What a study has measured.

    Attributes:
        scores: for each kind of fine-tuning the score on the test data, one of each seed.
        masked: for each pre-training the accuracy on masked tokens, one of each seed.
        latency: for each funnel without recovery the latency relative to no funnel: "ideal" (FLOPs), "measured" (the
            median), "low" and "high" (quartiles).
    """

    sizes: Sizes
    scores: dict[Run, list[float]]
    masked: dict[str, list[float]]
    latency: dict[str, dict[str, float]]

    def to_json(self) -> dict[str, Any]:
        return {
            "sizes": dataclasses.asdict(self.sizes),
            "masked": rounded(self.masked),
            "latency": rounded(self.latency),
            "runs": [{**run._asdict(), "scores": rounded(scores)} for run, scores in self.scores.items()],
        }


def study(folder: Path, documents: Sequence[Document], sizes: Sizes, facts: dict[str, Any], report: Report) -> Results:
    """Runs a study, or continues it, in a folder that exists.

    All models and data stay in the folder, and so do the compiled programs, which runs of the same shapes share.

    Args:
        facts: what else the results depend on, as JSON values.

    Raises:
        ConfigError: the folder has a study of other sizes or facts.
        InputError: the documents are too few, or the disk is full.
    """
    journal = Journal(folder, {"sizes": dataclasses.asdict(sizes), **facts}, resume=True)
    use_compilation_cache(folder / "programs")
    training, held_out = hold_out(documents)
    vocabulary = folder / "tokenizer.json"
    if not vocabulary.exists():
        report("making the vocabulary")
        texts = (text_of(sentence) for document in training for sentence in document.sentences)
        write_text(vocabulary, make_vocabulary(texts, sizes.vocabulary).to_str())
    for task in TASKS.values():
        task.write(folder / f"training.{task.file}", training, sizes.training_units)
        task.write(folder / f"test.{task.file}", held_out, sizes.test_units)

    masked: dict[str, list[float]] = {name: [] for name in PRETRAININGS}
    scores: dict[Run, list[float]] = {run: [] for run in runs(sizes)}
    for seed in range(sizes.seeds):
        for name in PRETRAININGS:
            key = f"pretrained-{name}-{seed}"
            accuracy = journal.get(
                key,
                partial(pretrained, folder / key, name, training, held_out, vocabulary, sizes, seed, report),
            )
            masked[name].append(accuracy)
            report(f"{key}: {accuracy:.1%} of masked tokens")
        for run in scores:
            key = f"{run.task}-{run.pretraining}-{run.funnel.replace('/', '-').replace(':', '-')}-{run.steps}-{seed}"
            score = journal.get(key, partial(finetuned, folder, key, run, sizes, seed))
            scores[run].append(score)
            report(f"{key}: {score:.1%}")
    latency = {
        funnel: journal.get(f"latency {funnel}", partial(timed, folder, funnel, sizes))
        for funnel in funnels("groups", sizes)[1:]
    }
    return Results(sizes, scores, masked, latency)


def pretrained(
    folder: Path,
    name: str,
    training: Sequence[Document],
    held_out: Sequence[Document],
    vocabulary: Path,
    sizes: Sizes,
    seed: int,
    report: Report,
) -> float:
    """Pre-trains a model; the accuracy on masked tokens of held-out documents."""
    tokenizer = Tokenizer.from_file(str(vocabulary))

    def chunks(document: Document) -> np.ndarray:
        return cut_into_chunks(tokenizer.encode(" ".join(map(text_of, document.sentences))).ids)

    test = np.concatenate([chunks(document) for document in held_out])
    test = test[np.random.default_rng(0).permutation(len(test))[:HELD_OUT_CHUNKS]]
    settings = Settings(
        steps=sizes.pretraining_steps,
        train="all",
        learning_rate=PRETRAINING_RATE,
        rows=sizes.pretraining_rows,
        texts=MOST_TEXTS,
        every=max(1, sizes.pretraining_steps // 3),
        patience=sizes.pretraining_steps,
        seed=seed,
    )
    config = make_config(tokenizer.get_vocab_size(), layers=sizes.layers, width=sizes.width, mlp_width=sizes.mlp_width)
    funnel = FunnelConfig.parse(AWARE_FUNNEL if name == "aware" else "none")
    train = [(document.name, chunks(document)) for document in training]
    return pretrain(folder, config, funnel, train, test, vocabulary, settings, report)["accuracy"]


def finetuned(folder: Path, key: str, run: Run, sizes: Sizes, seed: int) -> float:
    """Fine-tunes a pre-trained model and serves the result: its score on the test data."""
    task, output = TASKS[run.task], folder / key
    if not output.exists():
        finetune(
            folder / f"pretrained-{run.pretraining}-{seed}",
            task.form,
            folder / f"training.{task.file}",
            output,
            Settings(
                steps=run.steps,
                train="all",
                learning_rate=RATE,
                rows=sizes.rows,
                texts=MOST_TEXTS,
                every=run.steps,
                seed=seed,
            ),
            funnel=FunnelConfig.parse(run.funnel),
            pooling=task.pooling,
            resume=output.with_name(f"{output.name}.training").exists(),
        )
    test = task.read(folder / f"test.{task.file}", read_checkpoint(output).head.labels)
    engine = Engine.load(output, max_batch_tokens=4096)
    outputs = test.outputs(engine, test.inputs(engine, False))
    return test.scores(outputs, outputs)[task.score].value


def timed(folder: Path, funnel: str, sizes: Sizes) -> dict[str, float]:
    """Latency of test texts with a funnel relative to none, measured in turns."""
    make = engine_maker(read_checkpoint(folder / "pretrained-plain-0"))
    lines = (folder / f"test.{TASKS['groups'].file}").read_text("utf-8").splitlines()[: sizes.timed_texts]
    baseline, funneled = make(FunnelConfig()), make(FunnelConfig.parse(funnel))
    texts = baseline.token_ids([json.loads(line)["text"] for line in lines])
    latency = measure_in_turns(lambda: baseline.embed(texts), lambda: funneled.embed(texts))
    ideal = ideal_ratio(baseline.config, funneled.funnel, texts.lengths)
    return {"ideal": ideal, "measured": latency.ratio, "low": latency.low, "high": latency.high}


def rounded(value: Any) -> Any:
    """The value with numbers of four digits after the point."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else round(value, 4)
