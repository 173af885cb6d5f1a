"""The command `funnel distill`. It imports late what takes long to import: `funnel --help` loads this file."""

from pathlib import Path
from typing import Any

import click

from funnel_engine.cli import funnel_option
from funnel_engine.config import Funnel
from funnel_training.command_options import PATH, require_packages, training_options, vector_options


@click.command()
@click.option("--checkpoint", type=PATH, required=True, help="Folder that `funnel convert` wrote.")
@funnel_option("that of the checkpoint")
@click.option("--texts", type=PATH, required=True, help="UTF-8 file with a text in each line; labels are not needed.")
@click.option("--output", "-o", type=PATH, required=True, help="Folder of the new checkpoint.")
@click.option("--size", "sizes", type=int, multiple=True, help="A size at which vectors will be cut off (Matryoshka).")
@training_options(train="after", learning_rate=2e-5)
@vector_options
@click.option(
    "--per-token", is_flag=True, help="Train the rows of all tokens, for taggers, and not a vector for each text."
)
@click.option(
    "--teacher",
    type=PATH,
    help="Folder of the teacher's outputs, which is written if it is not there; runs for other funnels can share it.",
)
@click.option("--resume", is_flag=True, help="Continue a run that was stopped.")
def distill(
    checkpoint: Path,
    funnel: Funnel | None,
    texts: Path,
    output: Path,
    sizes: tuple[int, ...],
    attention: str | None,
    pooling: str | None,
    truncate: bool,
    per_token: bool,
    teacher: Path | None,
    resume: bool,
    **settings: Any,
) -> None:
    """Train a checkpoint for a funnel, on texts without labels.

    The new checkpoint's vectors with the funnel come close to the old one's without (self-distillation). A tenth of the
    texts is held out to measure this. OUTPUT.training has the log, a plot, and what --resume continues from.

    Example: funnel distill --checkpoint my-gemma --funnel 6:2/mean --texts texts.txt -o my-funneled-gemma
    """
    require_packages()
    from funnel_training.distill import distill as run
    from funnel_training.trainer import Settings

    agreed = run(
        checkpoint,
        texts,
        output,
        Settings(**settings),
        funnel=funnel,
        sizes=sizes,
        attention=attention,
        pooling=pooling,
        truncate=truncate,
        per_token=per_token,
        teacher_cache=teacher,
        resume=resume,
        report=click.echo,
    )
    if agreed is None:
        click.echo(f"Wrote {output}")
    else:
        click.echo(
            f"Wrote {output}: it agrees with {checkpoint} on {100 * agreed.mean:.1f} % of the ten nearest texts "
            f"(95 % interval {100 * agreed.low:.1f} to {100 * agreed.high:.1f})"
        )
