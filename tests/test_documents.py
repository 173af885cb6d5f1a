"""The README's Python code runs, and links between the documents lead somewhere."""

import re

import huggingface_hub
import numpy as np
import pytest

import funnel_engine
import funnel_kernels
from c_library import ROOT
from sentence_models import DENSE_SIZES, save_embedding_gemma

DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]
LINK = re.compile(r"\]\(([^)#:\s]*)(#[^)]*)?\)")  # neither https: nor mailto:


def anchors(markdown: str) -> set[str]:
    """Of the headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.*)$", markdown, re.MULTILINE)
    return {"#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(document):
    for name, anchor in LINK.findall(document.read_text(encoding="utf-8")):
        target = document.parent / name if name else document
        assert target.exists(), name
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), name + anchor


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("funnel_engine", set(funnel_engine.__all__)),
        ("funnel_kernels", set(funnel_kernels.__all__) - set(funnel_engine.__all__)),
    ],
)
def test_the_reference_names_all_that_is_public(page, names):
    text = (ROOT / "docs" / "api" / f"{page}.md").read_text(encoding="utf-8")
    listed = re.findall(r"^::: [\w.]+\.(\w+)$", text, re.MULTILINE)
    listed += [name.strip() for members in re.findall(r"members: \[(.*)\]", text) for name in members.split(",")]
    assert names <= set(listed)


def test_the_readmes_code_runs(tmp_path, monkeypatch, capsys):
    """On a small model like EmbeddingGemma, with as many layers as the README's funnel needs."""
    save_embedding_gemma(tmp_path, layers=14)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, np.ndarray] = {}
    exec(code, names)
    exact, faster = (
        np.array(line.split(), np.float32) for line in re.findall(r"\[\[(.*?)\]\]", capsys.readouterr().out)
    )
    assert names["documents"].shape == (3, DENSE_SIZES[-1])
    assert exact.shape == faster.shape == (3,)
    assert np.abs([exact, faster]).max() < 1
    assert np.abs(exact - faster).max() > 1e-3
