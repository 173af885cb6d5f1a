"""What funnels cost in quality on a task: every score beside that of the unfunneled model, with its uncertainty."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from funnel_engine import FunnelConfig
from funnel_engine.checkpoints.native import MANIFEST, Checkpoint
from funnel_engine.cli import show_progress
from funnel_engine.config import Funnel, check_funnel
from funnel_engine.flops import forward_flops
from funnel_engine.input_files import hash_file
from funnel_kernels.errors import ConfigError
from funnel_training.engines import EngineMaker, check_untrained, engine_maker, read_checkpoint_as
from funnel_training.package_versions import package_versions
from funnel_training.statistics import CONFIDENCE, RESAMPLES, Ratio, paired_ratio
from funnel_training.tasks.task import Task

SEED = 0
NO_FUNNEL = FunnelConfig()


@dataclasses.dataclass(frozen=True)
class Line:
    """The scores with one funnel.

    Attributes:
        funnel: its short form.
        funneled: "nothing" (the baseline), "all" texts, or one side: "documents".
        ideal_latency: FLOPs divided by the baseline's, on the lengths of the task's texts.
        scores: by name, the most important one first.
        ratios: of the scores to the baseline's; None for the baseline itself, and where its score is not clearly
            above 0.
    """

    funnel: str
    funneled: str
    ideal_latency: float
    scores: dict[str, float]
    ratios: dict[str, Ratio | None]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The scores of a checkpoint with several funnels, and all that they depend on. `dataclasses.asdict` is its JSON.

    Attributes:
        checkpoint, baseline: the folder's name and the SHA-256 of the manifest, which has the hashes of the weights.
        data: the task, its files with their SHA-256, the number of units, of texts on each side, of rows left out.
        options: how the model ran.
        statistics: how intervals were computed.
        versions: of the packages.
        lines: the baseline, then each funnel.
    """

    checkpoint: dict[str, str]
    baseline: dict[str, str]
    data: dict[str, Any]
    options: dict[str, Any]
    statistics: dict[str, Any]
    versions: dict[str, str]
    lines: list[Line]


def evaluate(
    checkpoint: str | os.PathLike[str],
    funnels: Sequence[Funnel],
    task: Task,
    *,
    baseline: str | os.PathLike[str] | None = None,
    attention: str | None = None,
    pooling: str | None = None,
    dtype: str | None = None,
    backend: str = "auto",
    truncate: bool = False,
) -> Evaluation:
    """Scores a checkpoint on a task without a funnel and with each of the funnels.

    Args:
        checkpoint: a folder that `convert` wrote.
        funnels: an empty list takes the checkpoint's own, if it has one.
        task: what `tasks.pairs.read_pairs` and the other readers return.
        baseline: the checkpoint that runs unfunneled. Default: the same one. For a checkpoint that was trained for a
            funnel it is the one before that training.
        truncate: cut off the ends of texts that are too long.

    The other arguments are those of `Engine.load`.

    Raises:
        CheckpointError, ConfigError, BackendUnavailable: as `Engine.load`.
        ConfigError: a funnel pools nothing or does not fit; the checkpoint and the baseline cannot be compared; the
            checkpoint was trained for a funnel, and a baseline is not given.
        InputError: a text cannot be run.
    """
    opened = read_checkpoint_as(checkpoint, attention=attention, pooling=pooling)
    if baseline is None:
        check_untrained(checkpoint, opened, "baseline (--baseline)")
    own = opened.manifest.funnel
    funnels = funnels or ([own] if own.total_stride > 1 else [])
    make_engine = engine_maker(opened, dtype=dtype, backend=backend)
    make_baseline = make_engine
    if baseline is not None:
        original = read_checkpoint_as(baseline, attention=attention, pooling=pooling)
        check_untrained(baseline, original, "baseline")
        check_comparable(opened, original)
        make_baseline = engine_maker(original, dtype=dtype, backend=backend)
    lines = compare_funnels(make_engine, funnels, task, make_baseline=make_baseline, truncate=truncate)
    return Evaluation(
        checkpoint=checkpoint_facts(checkpoint),
        baseline=checkpoint_facts(checkpoint if baseline is None else baseline),
        data={
            "task": task.kind,
            "files": task.files,
            "unit": task.unit,
            "units": task.units,
            "texts": {side.name: len(side.texts) for side in task.sides},
            "prompts": {side.name: side.prompt_name(opened.manifest.text) for side in task.sides},
            "duplicates": task.duplicates,
        },
        options={
            "attention": opened.config.attention,
            "pooling": opened.head.pooling,
            "dtype": dtype or opened.dtype,
            "backend": backend,
            "truncate": truncate,
        },
        statistics={"interval": "paired bootstrap", "confidence": CONFIDENCE, "resamples": RESAMPLES, "seed": SEED},
        versions=package_versions("scikit-learn", "scipy"),
        lines=lines,
    )


def compare_funnels(
    make_engine: EngineMaker,
    funnels: Sequence[Funnel],
    task: Task,
    *,
    make_baseline: EngineMaker | None = None,
    truncate: bool = False,
) -> list[Line]:
    """The lines of an `Evaluation`, for models in any form: a maker returns the engine with a funnel.

    One engine lives at a time. Texts are tokenized once, by the baseline.
    """
    exact = (make_baseline or make_engine)(NO_FUNNEL)
    for funnel in funnels:
        if funnel.total_stride == 1:
            raise ConfigError(f"funnel {str(funnel)!r} pools nothing, as the baseline; leave it out")
        check_funnel(exact.config, funnel)
        task.check_funnel(funnel)
    inputs = task.inputs(exact, truncate)
    config, lengths = exact.config, [side.lengths for side in inputs]
    flops = [forward_flops(config, NO_FUNNEL, side) for side in lengths]
    outputs = task.outputs(exact, inputs)
    del exact
    reference = task.scores(outputs, outputs)
    values = {name: score.value for name, score in reference.items()}
    lines = [Line(str(NO_FUNNEL), "nothing", 1.0, values, dict.fromkeys(values))]
    for funnel in show_progress(funnels, "Evaluating"):
        funneled = task.outputs(make_engine(funnel), inputs)
        funneled_flops = [forward_flops(config, funnel, side) for side in lengths]
        choices = {"all": (funneled, funneled_flops)}
        if len(task.sides) == 2:
            choices[task.sides[1].name] = [outputs[0], funneled[1]], [flops[0], funneled_flops[1]]
        for name, (chosen, cost) in choices.items():
            scores = task.scores(chosen, outputs)
            ratios = {key: paired_ratio(reference[key], score, seed=SEED) for key, score in scores.items()}
            values = {key: score.value for key, score in scores.items()}
            lines.append(Line(str(funnel), name, sum(cost) / sum(flops), values, ratios))
    return lines


def check_comparable(checkpoint: Checkpoint, baseline: Checkpoint) -> None:
    """Raises `ConfigError` unless two checkpoints differ in their weights only."""
    first, second = (
        {
            "architectures or attention": each.config,
            "heads or pooling": each.head,
            "prompts or limits": each.manifest.text,
            "tokenizers": each.manifest.tokenizer and each.manifest.files[each.manifest.tokenizer],
        }
        for each in (checkpoint, baseline)
    )
    for name in first:
        if first[name] != second[name]:
            raise ConfigError(
                f"the checkpoint and the baseline have different {name}; the baseline must be the checkpoint that the "
                "other one was trained from, run in the same way"
            )


def checkpoint_facts(checkpoint: str | os.PathLike[str]) -> dict[str, str]:
    folder = Path(checkpoint)
    return {"name": folder.resolve().name, "manifest_sha256": hash_file(folder / MANIFEST)}
