"""The `funnel` command. Other packages add commands to it with the entry-point group `funnel_engine.commands`."""

import contextlib
import importlib.metadata
import io
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
import jax
import numpy as np
from rich.console import Console
from rich.progress import track

from funnel_engine.checkpoints.convert import convert as convert_checkpoint
from funnel_engine.checkpoints.formats import FORMATS
from funnel_engine.config import ATTENTIONS, Funnel, FunnelConfig, parse_funnel
from funnel_engine.devices import local_target
from funnel_engine.engine import Engine
from funnel_engine.inputs import TooLong
from funnel_engine.inspection import inspect_checkpoint
from funnel_engine.jax_settings import default_device, device_name
from funnel_engine.output_files import check_writable, write_bytes
from funnel_engine.presets import preset
from funnel_engine.served_by import served_by
from funnel_engine.weights import DTYPES
from funnel_kernels import BACKENDS, native_calls
from funnel_kernels.errors import FunnelError, InputError

COMMANDS = "funnel_engine.commands"  # the entry-point group of further commands
TEXTS_PER_CALL = 1024
INTERRUPTED = 130  # the shell's exit status for SIGINT
DOCTOR_MODEL = "gemma-2b"  # `doctor` reports the backends of the ops of this model with this funnel
DOCTOR_FUNNEL = FunnelConfig.after(2, recovery="sum_last")


class UserError(click.ClickException):
    """Shows a user's mistake as one line, with exit status 2."""

    exit_code = 2


class FunnelGroup(click.Group):
    """Finds the commands of other packages, and turns a `FunnelError` into one line and exit status 2."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *importlib.metadata.entry_points(group=COMMANDS).names})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        for entry in importlib.metadata.entry_points(group=COMMANDS, name=cmd_name):
            command: click.Command = entry.load()
            return command
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except FunnelError as error:
            raise UserError(" ".join(str(error).split())) from error
        except KeyboardInterrupt:
            # Incomplete files are already removed. But the device may still read weights that are mapped into memory,
            # and a normal exit of the interpreter would unmap them.
            click.echo("Interrupted", err=True)
            os._exit(INTERRUPTED)
        except BrokenPipeError:  # the reader has closed the pipe, e.g. `| head`; click ends the process silently
            raise
        except OSError as error:
            raise UserError(f"{error.filename or 'output'}: {error.strerror or error}") from error


@click.group(cls=FunnelGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="funnel-engine")
def main() -> None:
    """Run encoders whose token sequence is pooled partway through the stack.

    Start with `funnel demo`: it makes a small model, runs it with and without a funnel, and shows the difference.
    """


def funnel_option(default: str) -> Callable[..., Any]:
    """The option that describes a funnel, for all lengths or by length."""
    return click.option(
        "--funnel",
        type=parse_funnel,
        metavar="LAYER:STRIDE[/OPTION]",
        help="E.g. 6:2/mean: after layer 6, the mean of each two rows; none: no funnel; 0=none+64=6:2/mean: by the "
        f"number of tokens of a text. Default: {default}.",
    )


format_option = click.option(
    "--format",
    "form",
    type=click.Choice(list(FORMATS)),
    help="Format of the source. Default: detected from its content.",
)

sliding_window_option = click.option(
    "--sliding-window", type=int, help="Replaces the window in the source's config, in tokens, if that is wrong."
)

base_option = click.option(
    "--base",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="The base model of a LoRA adapter. Default: found in the same folder, beside it, or where its config says.",
)


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path))
@click.option(
    "--dtype", type=click.Choice(list(DTYPES)), default="bfloat16", show_default=True, help="Dtype of the weights."
)
@click.option("--overwrite", is_flag=True, help="Replace DESTINATION if it exists.")
@format_option
@sliding_window_option
@base_option
@funnel_option("that of the source, if it is a converted checkpoint")
@click.option("--allow-nonfinite", is_flag=True, help="Accept weights that are NaN or infinite.")
def convert(
    source: Path,
    destination: Path,
    dtype: str,
    overwrite: bool,
    form: str | None,
    sliding_window: int | None,
    base: Path | None,
    funnel: Funnel | None,
    allow_nonfinite: bool,
) -> None:
    """Convert a checkpoint for the engine.

    SOURCE is a file or folder in one of the formats: Hugging Face, sentence-transformers, a LoRA adapter, Orbax (Flax),
    gemma_pytorch, GGUF, KerasHub, or a checkpoint that is already converted. DESTINATION is the new folder; it appears
    when it is complete. `funnel inspect SOURCE` shows beforehand what will be converted.
    """
    convert_checkpoint(
        source,
        destination,
        dtype=dtype,
        overwrite=overwrite,
        funnel=funnel,
        format=form,
        sliding_window=sliding_window,
        allow_nonfinite=allow_nonfinite,
        base=base,
    )
    click.echo(f"Wrote {destination}")


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--seq-len", type=click.IntRange(1, 2**20), default=512, show_default=True, help="Number of tokens per sequence."
)
@click.option("--verify", is_flag=True, help="Compare the files of a converted checkpoint with its hashes.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@format_option
@sliding_window_option
@base_option
@funnel_option("that of the checkpoint")
def inspect(
    checkpoint: Path,
    seq_len: int,
    verify: bool,
    as_json: bool,
    form: str | None,
    sliding_window: int | None,
    base: Path | None,
    funnel: Funnel | None,
) -> None:
    """Show the contents and the problems of a CHECKPOINT, converted or not, and what a funnel would save.

    The weights are not loaded. If there are problems, the exit status is 2. If there are none, `funnel convert` accepts
    the checkpoint, or the engine if it is already converted. Example: funnel inspect gemma-2b --funnel 2:2
    """
    facts = inspect_checkpoint(
        checkpoint, form, sliding_window, funnel=funnel, seq_len=seq_len, verify=verify, base=base
    )
    print_facts(facts, as_json)
    if facts["problems"]:
        raise SystemExit(2)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def doctor(as_json: bool) -> None:
    """Show versions, devices, the backend that serves each op, and why the other backends do not.

    If there are problems, the exit status is 2.
    """
    packages = ("funnel-engine", "jax", "jaxlib", "numpy", "tokenizers")
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
        "cpus": os.cpu_count(),
    }
    try:
        facts |= {"platform": default_device().platform, "devices": list(map(device_name, jax.devices()))}
        facts["instruction set"] = native_calls.instruction_set()
        facts |= served_by(preset(DOCTOR_MODEL), DOCTOR_FUNNEL, "bfloat16", local_target()).facts()
    except FunnelError as error:
        facts["problems"] = [str(error)]
    print_facts(facts | BACKENDS, as_json)
    if "problems" in facts:
        raise SystemExit(2)


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("texts", type=click.Path(exists=True, dir_okay=False, allow_dash=True), default="-")
@click.option(
    "--output",
    "-o",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to write: .npy (an array [texts, size]) or .jsonl (one JSON list per line).",
)
@click.option("--truncate-dim", type=int, help="Keep only this many dimensions of each vector.")
@click.option("--prompt-name", help="Name of the checkpoint's prompt to put before each text.")
@click.option("--pairs", is_flag=True, help="A line is a pair of texts with a tab between them, one vector each.")
@click.option("--truncate", is_flag=True, help="Cut off the end of texts that are too long, instead of stopping.")
@click.option("--normalize/--no-normalize", default=True, show_default=True, help="Scale vectors to length 1.")
@click.option("--attention", type=click.Choice(ATTENTIONS), help="Kind of attention. Default: that of the checkpoint.")
@click.option("--backend", default="auto", show_default=True, help=f"One of auto, {', '.join(BACKENDS)}.")
@funnel_option("that of the checkpoint")
def embed(
    checkpoint: Path,
    texts: str,
    output: Path,
    truncate_dim: int | None,
    prompt_name: str | None,
    pairs: bool,
    truncate: bool,
    normalize: bool,
    attention: str | None,
    backend: str,
    funnel: Funnel | None,
) -> None:
    """Compute one vector for each line of TEXTS (a UTF-8 file, or - for standard input).

    All lines are checked before the first vector is computed.

    Example: funnel embed my-gemma sentences.txt --funnel 6:2/mean -o vectors.npy
    """
    check_writable(output, (".npy", ".jsonl"))
    lines = read_lines(texts)
    for number, line in enumerate(lines, start=1):
        if not line:
            raise InputError(f"line {number} of the texts is empty; each line must contain one text")
    if not lines:
        raise InputError("the file has no texts; give one text per line")
    inputs = split_pairs(lines) if pairs else lines
    engine = Engine.load(checkpoint, funnel=funnel, backend=backend, attention=attention)
    calls = []
    for start in show_progress(range(0, len(lines), TEXTS_PER_CALL), "Reading"):
        part = inputs[start : start + TEXTS_PER_CALL]
        try:
            calls.append(engine.token_ids(part, prompt_name=prompt_name, truncate=truncate))
        except TooLong as error:  # the engine counts inputs from 0 in each call
            raise InputError(
                f"line {start + error.index + 1} has {error.tokens} tokens, more than the limit of {error.limit}; "
                "shorten it, or cut off the ends of such lines with --truncate"
            ) from error
        except InputError as error:
            raise InputError(with_line_number(str(error), start)) from error
    embedding = show_progress(calls, "Embedding")
    parts = [engine.embed(ids, normalize=normalize, truncate_dim=truncate_dim) for ids in embedding]
    write_vectors(output, np.concatenate(parts))
    click.echo(f"Wrote {len(lines)} vectors of size {parts[0].shape[1]} to {output}")


def split_pairs(lines: list[str]) -> list[tuple[str, ...]]:
    """The two texts of each line, with a tab between them.

    Raises:
        InputError: a line has more or fewer, or an empty text.
    """
    pairs = [tuple(line.split("\t")) for line in lines]
    for number, pair in enumerate(pairs, start=1):
        if len(pair) != 2 or not all(pair):
            raise InputError(f"line {number} must contain two texts with one tab between them")
    return pairs


def read_lines(texts: str) -> list[str]:
    """The lines of a file, or of standard input for "-", without their ends.

    Lines are counted as by `wc -l` and by editors: only a line feed ends a line, with or without a carriage return
    before it. The last line may have no line feed.

    Raises:
        InputError: a line is not UTF-8, or standard input is closed.
    """
    if texts == "-" and sys.stdin is None:
        raise InputError("standard input is closed; name a file of texts, or pipe them in")
    lines, bytes_before = [], 0
    with contextlib.nullcontext(sys.stdin.buffer) if texts == "-" else open(texts, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                lines.append(line.decode().removesuffix("\r\n").removesuffix("\n"))
            except UnicodeDecodeError as error:
                raise InputError(
                    f"line {number} of the texts is not UTF-8: {error.reason} at byte {error.start + 1} of the line, "
                    f"byte {bytes_before + error.start + 1} in total; convert the texts to UTF-8 first"
                ) from error
            bytes_before += len(line)
    if lines:
        lines[0] = lines[0].removeprefix("\ufeff")  # a byte order mark
    return lines


Item = TypeVar("Item")


def show_progress(items: Sequence[Item], what: str) -> Iterable[Item]:
    """The items, with a progress bar on standard error if that is a terminal."""
    console = Console(stderr=True)
    return track(items, what, console=console, transient=True, disable=not console.is_terminal)


def with_line_number(message: str, start: int) -> str:
    """Replaces the index of an input in a message by its line number; `start` lines were in earlier calls."""
    return re.sub(r"^input (\d+)", lambda found: f"line {start + int(found[1]) + 1}", message)


def write_vectors(output: Path, vectors: np.ndarray) -> None:
    """Writes vectors [B, D] as .npy, or as .jsonl with one list per line, depending on the name of the file."""
    if output.suffix == ".npy":
        content = io.BytesIO()
        np.save(content, vectors)
        write_bytes(output, content.getvalue())
    else:
        lines = [json.dumps([float(f"{x:.9g}") for x in vector]) + "\n" for vector in vectors]
        write_bytes(output, "".join(lines).encode())


def print_facts(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        lines = value if name == "problems" else [value]
        for line in map(format_value, lines or ["none"]):
            click.echo(f"{name:<{width}}  {line}")


def format_value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(format_value, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{format_value(name)} {format_value(item)}" for name, item in value.items()) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, str):  # may come from an untrusted file
        return value if value.isprintable() else repr(value)
    return "none" if value is None else f"{value:,}"
