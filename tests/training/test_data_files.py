"""Files of lines and tables, good and bad."""

import hashlib

import pytest

from funnel_engine import InputError
from funnel_training.data_files import read_file, read_table

PAIR, SCORED = ("query", "document"), ("sentence1", "sentence2", "score")


def write(folder, name: str, content: str | bytes):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def table(folder, name: str, content: str | bytes, *layouts: tuple[str, ...]):
    layout, rows = read_table(read_file(write(folder, name, content)), *(layouts or (SCORED,)))
    return layout, [(row.place, *(row.fields[name] for name in layout)) for row in rows]


def test_lines_are_counted_like_an_editor_does_and_blank_ones_are_left_out(tmp_path):
    content = b"\xef\xbb\xbffirst\r\n\n  \n fourth\x0bstill\xe2\x80\xa8fourth \nfifth"
    file = read_file(write(tmp_path, "texts.txt", content))
    assert list(file.lines()) == [
        ("texts.txt, line 1", "first"),
        ("texts.txt, line 4", " fourth\x0bstill\N{LINE SEPARATOR}fourth "),
        ("texts.txt, line 5", "fifth"),
    ]
    assert file.sha256 == hashlib.sha256(content).hexdigest()


def test_csv_with_and_without_header(tmp_path):
    rows = 'a,"b, ""c""\nd",0.5\n\ne,f,2\n'
    expected = [("p.csv, line 1", "a", 'b, "c"\nd', "0.5"), ("p.csv, line 4", "e", "f", "2")]
    assert table(tmp_path, "p.csv", rows) == (SCORED, expected)
    header = "id,score,sentence2,sentence1\n7,0.5,b,a\n"
    assert table(tmp_path, "p.csv", header) == (SCORED, [("p.csv, line 2", "a", "b", "0.5")])


def test_tsv_takes_quotes_as_they_are(tmp_path):
    assert table(tmp_path, "p.tsv", '"a\tb"\t1\r\n') == (SCORED, [("p.tsv, line 1", '"a', 'b"', "1")])


def test_jsonl(tmp_path):
    content = '{"sentence1": "a", "sentence2": "b", "score": 3, "more": null}\n\n'
    assert table(tmp_path, "p.jsonl", content) == (SCORED, [("p.jsonl, line 1", "a", "b", 3)])


@pytest.mark.parametrize("name", ["p.csv", "p.tsv", "p.jsonl"])
def test_the_layout_is_that_of_the_columns(tmp_path, name):
    content = {
        "p.csv": "query,document\na,b\n",
        "p.tsv": "a\tb\n",
        "p.jsonl": '{"query": "a", "document": "b"}\n',
    }[name]
    layout, rows = table(tmp_path, name, content, SCORED, PAIR)
    assert layout == PAIR
    assert [row[1:] for row in rows] == [("a", "b")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "", "p.csv is empty; give a file with data"),
        ("p.csv", " \n\n", "p.csv is empty"),
        (
            "p.csv",
            b"a,b,1\nc,\xff,2\n",
            "p.csv, line 2, is not UTF-8: invalid start byte at byte 9 of the file",
        ),
        ("p.csv", "a,b,1\nc,d\n", "p.csv, line 2 has 2 columns; it must have 3: sentence1, sentence2, score"),
        (
            "p.csv",
            "a,b,1,2\n",
            "p.csv, line 1 has 4 columns and is not a header with the names sentence1, sentence2",
        ),
        ("p.csv", "one,two\na,b\n", "p.csv, line 1 has 2 columns"),
        ("p.csv", "sentence1,sentence2,score\n", "p.csv has a header and no rows"),
        ("p.csv", 'a,"b"c,1\n', "p.csv, line 1, is not CSV: .* write a double quote inside them twice"),
        ("p.csv", 'a,b,1\nc,"d,2\n', "p.csv, line 2, is not CSV: unexpected end of data"),
        (
            "p.jsonl",
            '{"sentence1": "a"}\n',
            "p.jsonl, line 1 has the names 'sentence1'; it must have sentence1, sent",
        ),
        ("p.jsonl", '{"sentence1": "a"\n', "p.jsonl, line 1, is not JSON: .* each line must be a JSON object"),
        ("p.jsonl", "[" * 100_000, "p.jsonl, line 1, is not JSON"),
        ("p.jsonl", '["a", "b", 1]\n', "p.jsonl, line 1, is a JSON list; each line must be a JSON object"),
        (
            "p.jsonl",
            '{"sentence1": "a", "sentence2": "b", "score": 1}\n{"sentence1": "a", "score": 1}\n',
            "p.jsonl, line 2 lacks sentence2; each line must have",
        ),
        ("p.txt", "a,b,1\n", "'p.txt' must end in .csv, .tsv, .jsonl"),
    ],
)
def test_bad_tables_are_refused_by_line(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message):
        table(tmp_path, name, content)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*nothing.csv: No such file"):
        read_file(tmp_path / "nothing.csv")
    with pytest.raises(InputError, match="Is a directory"):
        read_file(tmp_path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('"nan"', "score is 'nan'; it must be a finite number"),
        ("NaN", "score is nan"),
        ("1e999", "score is inf"),
        ("1" + 400 * "0", "score is 1000"),
        ('"five"', "score is 'five'"),
        ("true", "score is True"),
        ("null", "score is None"),
        ("[1]", r"score is \[1\]"),
    ],
)
def test_numbers_must_be_finite(tmp_path, value, message):
    content = f'{{"sentence1": "a", "sentence2": "b", "score": {value}}}\n'
    _, (row,) = read_table(read_file(write(tmp_path, "p.jsonl", content)), SCORED)
    with pytest.raises(InputError, match=f"p.jsonl, line 1: {message}"):
        row.number("score")


@pytest.mark.parametrize(("value", "shown"), [('""', "''"), ('"  "', "'  '"), ("5", "5"), ("null", "None")])
def test_texts_must_be_texts(tmp_path, value, shown):
    _, (row,) = read_table(read_file(write(tmp_path, "p.jsonl", f'{{"query": {value}, "document": "b"}}')), PAIR)
    with pytest.raises(InputError, match=f"line 1: query is {shown}; it must be a text that is not empty"):
        row.text("query")
