"""The page of a study: each figure beside the claim of the paper."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from funnel_training.miniature.claims import TASK_NAMES, Verdict, recovery_scores, scores_of
from funnel_training.miniature.study import AWARE_FUNNEL, PRETRAININGS, Results, Run, funnels
from funnel_training.pictures import png
from funnel_training.web_page import heading, image, page, paragraphs, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours of Okabe and Ito, which colour-blind people can tell apart.
COLORS = {"plain": "#0072b2", "aware": "#d55e00", "other": "#009e73"}
NAMES = {"plain": "plain pre-training", "aware": "funnel-aware pre-training"}


def make_page(results: Results, verdicts: Sequence[Verdict], facts: dict[str, Any]) -> str:
    """One HTML file that needs no other."""
    figures = {
        2: ("Quality by the layer of the funnel (Figure 2, Table 1)", draw_layers),
        3: ("More fine-tuning steps (Figure 3)", draw_steps),
        4: ("Quality beside latency (Figure 4)", draw_latency),
        5: ("Recoveries (Figure 5)", draw_recoveries),
    }
    parts = [
        heading(title)
        + image(draw(results), title)
        + verdict_table([verdict for verdict in verdicts if verdict.figure == figure])
        for figure, (title, draw) in figures.items()
    ]
    scores, circumstances = heading("All scores") + score_table(results), heading("Circumstances") + facts_table(facts)
    return page("Funnels in miniature", introduction(results), *parts, scores, circumstances)


def introduction(results: Results) -> str:
    sizes = results.sizes
    tokens = sizes.pretraining_steps * sizes.pretraining_rows
    masked = ", ".join(f"{np.mean(results.masked[name]):.1%} {NAMES[name]}" for name in PRETRAININGS)
    return paragraphs(
        "The questions of arXiv:2504.02877 (funnels in Gemma 2B and 7B), asked of a Gemma of "
        f"{sizes.layers} layers, {sizes.width} wide. It is pre-trained on masked tokens of the Brown corpus "
        f"({sizes.pretraining_steps:,} steps of {sizes.pretraining_rows} tokens, {tokens:,} in all): plain, and "
        f"funnel-aware, which is with the funnel {AWARE_FUNNEL} (pairs of rows, their maximum, after layer 2; the mean "
        "with the rows before the funnel gives every token a row again). Tokens guessed on held-out documents: "
        f"{masked}.",
        f"Then all weights are fine-tuned ({sizes.steps[-1]} steps of {sizes.rows} tokens), with no funnel and with "
        "one of stride 2 after every even layer, for two tasks: the coarse genre of two sentences (press, general "
        "prose, learned, fiction: a guess is right once in four; attention pooling) and the part of speech of each "
        "word. "
        "Scores are accuracies on documents that no training has seen, computed by the engine from the written "
        f"checkpoints. There are {sizes.seeds} seeds; each has its own pre-trained models. A difference counts if it "
        "is larger than the spread of seeds, which is the larger one of the two ranges; whiskers are these ranges.",
        "The paper's models are a thousand times larger and saw far more text. What agrees here was found "
        "again under very different circumstances; what does not agree says little about models of the paper's size.",
    )


def draw_layers(results: Results) -> bytes:
    from matplotlib.figure import Figure  # takes half a second to import

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    places = ["none", *(f"after {layer}" for layer in results.sizes.funnel_layers)]
    for axes, task in zip(figure.subplots(1, len(TASK_NAMES)), TASK_NAMES, strict=True):
        for name in PRETRAININGS:
            samples = [scores_of(results, task, name, funnel) for funnel in funnels(task, results.sizes)]
            whiskers(axes, range(len(places)), samples, COLORS[name], NAMES[name], -0.04 if name == "plain" else 0.04)
        axes.set_xticks(range(len(places)), places)
        axes.set_xlabel("funnel")
        axes.set_ylabel(f"{TASK_NAMES[task]}, accuracy in %")
    return png_of(figure)


def draw_steps(results: Results) -> bytes:
    figure, axes = one_part("tags")
    funnel, steps = funnels("tags", results.sizes)[1], results.sizes.steps
    samples = [results.scores[Run("tags", "plain", funnel, count)] for count in steps]
    whiskers(axes, steps, samples, COLORS["plain"], f"{funnel}, {NAMES['plain']}")
    axes.set_xticks(steps)
    axes.set_xlabel("fine-tuning steps")
    return png_of(figure)


def draw_latency(results: Results) -> bytes:
    figure, axes = one_part("groups")
    timed = list(results.latency.values())
    for name in PRETRAININGS:
        samples = [scores_of(results, "groups", name, funnel) for funnel in funnels("groups", results.sizes)]
        means = [100 * np.mean(sample) for sample in samples]
        measured = [1.0, *(each["measured"] for each in timed)]
        ideal = [1.0, *(each["ideal"] for each in timed)]
        whiskers(axes, measured, samples, COLORS[name], f"{NAMES[name]}, measured", style="o")
        axes.plot(ideal, means, "o", mfc="none", color=COLORS[name], label=f"{NAMES[name]}, ideal latency")
        for place, mean, label in zip(measured, means, ["none", *results.latency], strict=True):
            if name == "plain":
                axes.annotate(label, (place, mean), xytext=(6, -12), textcoords="offset points", fontsize=9)
    axes.set_xlabel("latency relative to no funnel")
    axes.margins(x=0.1)
    return png_of(figure)


def draw_recoveries(results: Results) -> bytes:
    figure, axes = one_part("tags")
    scores = recovery_scores(results)
    whiskers(axes, range(len(scores)), list(scores.values()), COLORS["other"], "with a funnel", style="o")
    none = 100 * float(np.mean(scores_of(results, "tags", "plain", "none")))
    axes.axhline(none, color="gray", linestyle="--", linewidth=1, label="no funnel")
    axes.set_xticks(range(len(scores)), list(scores))
    return png_of(figure)


def one_part(task: str) -> tuple[Any, "Axes"]:
    """A figure, and its axes for the scores of a task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_ylabel(f"{TASK_NAMES[task]}, accuracy in %")
    return figure, axes


def whiskers(
    axes: "Axes",
    places: Sequence[float],
    samples: Sequence[Sequence[float]],
    color: str,
    label: str,
    shift: float = 0.0,
    style: str = "o-",
) -> None:
    """The means of samples, and their ranges."""
    values = 100 * np.array(samples)
    means = values.mean(axis=1)
    arms = [means - values.min(axis=1), values.max(axis=1) - means]
    axes.errorbar([place + shift for place in places], means, yerr=arms, fmt=style, color=color, capsize=3, label=label)


def png_of(figure: Any) -> bytes:
    for axes in figure.axes:
        axes.grid(alpha=0.2)
        axes.legend(frameon=False, fontsize=8)
    return png(figure, dpi=110)


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    rows = [
        (verdict.question, verdict.claim, f"{verdict.outcome[0].upper()}{verdict.outcome[1:]}. {verdict.reason}")
        for verdict in verdicts
    ]
    return table(("question", "the paper", "here"), rows)


def score_table(results: Results) -> str:
    rows = [
        (
            TASK_NAMES[run.task],
            run.pretraining,
            run.funnel,
            str(run.steps),
            f"{100 * np.mean(scores):.1f}",
            ", ".join(f"{100 * score:.1f}" for score in scores),
        )
        for run, scores in results.scores.items()
    ]
    return table(("task", "pre-training", "funnel", "steps", "accuracy in %", "of each seed"), rows)


def facts_table(facts: dict[str, Any]) -> str:
    return table(("what", "value"), [(name, str(value)) for name, value in facts.items()])
