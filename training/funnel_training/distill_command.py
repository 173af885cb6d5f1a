"""The command `funnel distill`. It imports late what takes long to import: `funnel --help` loads this file."""

from pathlib import Path

import click

from funnel_engine.cli import funnel_option
from funnel_engine.config import FunnelConfig
from funnel_engine.weights import DTYPES
from funnel_training.command_options import PATH, require_packages, vector_options


@click.command()
@click.option("--checkpoint", type=PATH, required=True, help="Folder that `funnel convert` wrote.")
@funnel_option("that of the checkpoint")
@click.option("--texts", type=PATH, required=True, help="UTF-8 file with a text in each line; labels are not needed.")
@click.option("--output", "-o", type=PATH, required=True, help="Folder of the new checkpoint.")
@click.option("--steps", type=int, default=300, show_default=True, help="Number of optimizer steps.")
@click.option(
    "--train",
    default="after",
    show_default=True,
    help="Which weights move: all, after (the layers after the funnel), or lora:RANK (on these layers).",
)
@click.option("--learning-rate", type=float, default=1e-4, show_default=True, help="The highest learning rate.")
@click.option("--rows", type=int, default=1024, show_default=True, help="Tokens that are computed at once.")
@click.option("--packs", type=int, default=1, show_default=True, help="Packs of --rows tokens in a step.")
@click.option("--every", type=int, default=50, show_default=True, help="Steps from one evaluation to the next.")
@click.option("--patience", type=int, default=5, show_default=True, help="Evaluations without a gain before the end.")
@click.option("--size", "sizes", type=int, multiple=True, help="A size at which vectors will be cut off (Matryoshka).")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True, help="Of activations.")
@click.option("--recompute", is_flag=True, help="Compute each layer again for its derivative: less memory, more time.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of everything random.")
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
    funnel: FunnelConfig | None,
    texts: Path,
    output: Path,
    steps: int,
    train: str,
    learning_rate: float,
    rows: int,
    packs: int,
    every: int,
    patience: int,
    sizes: tuple[int, ...],
    dtype: str,
    recompute: bool,
    seed: int,
    attention: str | None,
    pooling: str | None,
    truncate: bool,
    per_token: bool,
    teacher: Path | None,
    resume: bool,
) -> None:
    """Train a checkpoint for a funnel, on texts without labels.

    The new checkpoint's vectors with the funnel come close to the old one's without (self-distillation). A tenth of the
    texts is held out to measure this. OUTPUT.training has the log, a plot, and what --resume continues from.

    Example: funnel distill --checkpoint my-gemma --funnel 6:2/mean --texts texts.txt -o my-funneled-gemma
    """
    require_packages()
    from funnel_training.distill import distill as run
    from funnel_training.trainer import Settings

    settings = Settings(
        steps=steps,
        train=train,
        learning_rate=learning_rate,
        rows=rows,
        packs=packs,
        every=every,
        patience=patience,
        dtype=dtype,
        recompute=recompute,
        seed=seed,
    )
    agreed = run(
        checkpoint,
        texts,
        output,
        settings,
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
