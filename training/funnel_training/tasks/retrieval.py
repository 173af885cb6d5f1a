"""Queries and the documents that answer them: nDCG@10 and recall@100 of the ranking by cosine."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from funnel_kernels.errors import InputError
from funnel_training.data_files import DataFile, Row, hashes, read_file, read_table
from funnel_training.metrics import RECALL_TOP, TOP, retrieval
from funnel_training.scores import Ints, Score, mean
from funnel_training.statistics import check_units
from funnel_training.tasks.task import Side, Task, distinct, sample, without_duplicates

LAYOUT = ("query", "document")
QRELS = ("query-id", "corpus-id", "score")


@dataclasses.dataclass(frozen=True)
class Retrieval(Task):
    """Queries, and the documents that are ranked for each."""

    relevant: tuple[dict[int, float], ...]  # for each query, the grades of documents by their index
    same: tuple[int | None, ...]  # for each query, the document with the query's own id, which is not ranked
    kind: ClassVar[str] = "retrieval"
    unit: ClassVar[str] = "queries"

    @property
    def units(self) -> int:
        return len(self.relevant)

    def take(self, units: Ints, share: float) -> "Retrieval":
        queries, documents = self.sides
        relevant = [self.relevant[unit] for unit in units]
        kept = sorted(set(sample(len(documents.texts), share).tolist()).union(*relevant))
        numbers = {number: new for new, number in enumerate(kept)}
        return dataclasses.replace(
            self,
            sides=(queries.take(units), documents.take(np.array(kept))),
            relevant=tuple({numbers[number]: grade for number, grade in grades.items()} for grades in relevant),
            same=tuple(None if self.same[unit] is None else numbers.get(self.same[unit]) for unit in units),
        )

    def scores(self, outputs: list[Any], baseline: list[Any]) -> dict[str, Score]:
        queries, documents = outputs
        ndcgs, recalls = retrieval(queries, documents, self.relevant, self.same)
        scores: dict[str, Score] = {f"nDCG@{TOP}": mean(ndcgs)}
        if len(self.sides[1].texts) > RECALL_TOP:  # else every document is among the first 100
            scores[f"recall@{RECALL_TOP}"] = mean(recalls)
        return scores


def make_retrieval(file: DataFile, rows: Sequence[Row]) -> Retrieval:
    """The task of a table of queries and documents: all documents are ranked for each query, its own are relevant.

    Raises:
        InputError: a text is empty, or there are too few.
    """
    rows, duplicates = without_duplicates(rows, *LAYOUT)
    places = [row.place for row in rows]
    queries, query_index = distinct([row.text("query") for row in rows], places, "queries", "query")
    documents, document_index = distinct([row.text("document") for row in rows], places, "documents", "document")
    relevant: list[dict[int, float]] = [{} for _ in queries.texts]
    for query, document in zip(query_index, document_index, strict=True):
        relevant[query][int(document)] = 1.0
    return checked(Retrieval(hashes(file), duplicates, (queries, documents), tuple(relevant), (None,) * len(relevant)))


def read_beir(folder: Path) -> Retrieval:
    """Reads a folder in BEIR's layout: corpus.jsonl, queries.jsonl, and qrels/test.tsv or the only file of qrels.

    Only queries with a relevant document (a score above 0) are asked. As in BEIR, a document is its title and its text,
    and a document with the id of the query is not ranked for it.

    Raises:
        InputError: a file is missing or damaged, an id is unknown or occurs twice, or there are too few queries.
    """
    corpus_file, queries_file, qrels_file = (
        read_file(path) for path in (folder / "corpus.jsonl", folder / "queries.jsonl", find_qrels(folder))
    )
    corpus, queries = by_id(corpus_file), by_id(queries_file)
    _, judgements = read_table(qrels_file, QRELS)
    grades: dict[str, dict[str, float]] = {}
    duplicates = 0
    for row in judgements:
        query, document, grade = row.text("query-id"), row.text("corpus-id"), row.number("score")
        for identifier, known, file in ((query, queries, queries_file), (document, corpus, corpus_file)):
            if identifier not in known:
                raise InputError(
                    f"{row.place}: the id {identifier!r:.60} is not in {file.path.name}; complete the file"
                )
        duplicates += document in grades.setdefault(query, {})
        grades[query].setdefault(document, grade)
    numbers = {identifier: number for number, identifier in enumerate(corpus)}
    relevant = {
        query: {numbers[document]: grade for document, grade in documents.items() if grade > 0 and document != query}
        for query, documents in grades.items()
    }
    relevant = {query: documents for query, documents in relevant.items() if documents}
    asked = [queries[query] for query in relevant]
    sides = (
        Side("queries", [row.text("text") for row in asked], [row.place for row in asked], "query"),
        Side("documents", list(map(document_text, corpus.values())), [r.place for r in corpus.values()], "document"),
    )
    files = hashes(corpus_file, queries_file, qrels_file)
    same = tuple(map(numbers.get, relevant))
    return checked(Retrieval(files, duplicates, sides, tuple(relevant.values()), same))


def find_qrels(folder: Path) -> Path:
    found = sorted((folder / "qrels").glob("*.tsv"))
    test = folder / "qrels" / "test.tsv"
    if test not in found and len(found) != 1:
        names = ", ".join(path.name for path in found) or "no .tsv file"
        raise InputError(f"{folder / 'qrels'} has {names}; it must have test.tsv, or one file only")
    return test if test in found else found[0]


def by_id(file: DataFile) -> dict[str, Row]:
    """The rows of corpus.jsonl or queries.jsonl by their `_id`."""
    rows: dict[str, Row] = {}
    for row in read_table(file, ("_id", "text"))[1]:
        if (identifier := row.text("_id")) in rows:
            raise InputError(f"{row.place}: the _id {identifier!r:.60} occurs a second time; ids must be unique")
        rows[identifier] = row
    return rows


def document_text(row: Row) -> str:
    """Title and text; one of them may be empty or missing."""
    parts = [str(row.fields.get(name) or "").strip() for name in ("title", "text")]
    if not any(parts):
        raise InputError(f"{row.place}: the document has neither a title nor a text; leave it out")
    return " ".join(filter(None, parts))


def checked(task: Retrieval) -> Retrieval:
    check_units(task.units, "queries with a relevant document")
    documents = len(task.sides[1].texts)
    if documents <= TOP:
        raise InputError(f"{documents} documents are too few for nDCG@{TOP}; give at least {TOP + 1}")
    return task
