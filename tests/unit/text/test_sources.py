"""What people have as calibration text: every kind of file holds the same documents, and folders, standard input, mixes and
the hub are found or refused in one line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import random
import socket
import sys
from pathlib import Path

import pytest

from compress.errors import CalibrationError, NoSuchText
from compress.text import TextSource, hub, hub_sets, load_definition, load_documents, rows, sources, text_set
from compress.text.documents import Reading, read_documents
from compress.text.talks import Speaker

TEXTS = ["one, two", 'three "four"\nfive', "six\tseven", "ünf, 😀"]


def documents(source: TextSource | str, **options: object) -> list[str]:
    reading = Reading(Speaker(**options))
    return [document.text for document in read_documents(text_set(source), reading)]


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message and message.strip()
    return message


def as_csv(delimiter: str) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerow(["id", "text"])
    writer.writerows([[n, text] for n, text in enumerate(TEXTS)])
    return out.getvalue().encode()


LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
FILES = {
    "a.jsonl": LINES,
    "a.ndjson.gz": gzip.compress(LINES, mtime=0),
    "a.json": json.dumps([{"text": text} for text in TEXTS], indent=1).encode(),
    "texts.json.xz": lzma.compress(json.dumps(TEXTS).encode()),
    "lines.json": LINES,
    "a.csv": as_csv(","),
    "a.tsv.xz": lzma.compress(as_csv("\t")),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_holds_the_same(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    assert documents(str(tmp_path / name)) == TEXTS
    assert list(load_documents(load_definition(tmp_path / name))) == TEXTS


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet")
    talks = [[{"role": "user", "content": text}] for text in TEXTS]
    parquet.write_table(pyarrow.table({"messages": talks}), tmp_path / "b.parquet")
    assert documents(str(tmp_path / "a.parquet")) == TEXTS
    assert documents(str(tmp_path / "b.parquet")) == [f"user: {text}" for text in TEXTS]
    (tmp_path / "c.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:50])
    with pytest.raises(CalibrationError, match=r"c\.parquet: damaged or no Parquet file"):
        documents(str(tmp_path / "c.parquet"))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", b"text,more\na,b,c\n", "line 2: 3 cells under 2 columns"),
        ("a.csv", b'text\n"a\n', "not a table"),
        ("a.json", b"[1]", "row 1: expected an object"),
        ("a.json", b"[", "not JSON"),
        ("a.json", b'{"data": [{"text": "a"}]}', r"row 1: no text among its keys \(data\)"),
        ("a.txt.gz", gzip.compress(b"a" * 99, mtime=0)[:20], "damaged"),
    ],
)
def test_files_that_are_wrong(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=says) as error:
        documents(str(tmp_path / name))
    assert str(tmp_path / name) in one_line(error)


# ------------------------------------------------------------------------------------ folders and names


def test_a_folder_is_its_files_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "notes"
    for name, content in (("b.txt", "second"), ("a/z.md", "first"), ("c.jsonl", '{"text": "third"}'), ("d.pdf", "x"),
                          ("a/e.docx", "x"), (".git/f.txt", "x")):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    found = text_set(str(folder))
    assert documents(str(folder)) == ["first", "second", "third"]
    (note,) = found.notes
    assert "left out: a/e.docx, d.pdf" in note and found.name == "notes"
    monkeypatch.setattr(sources, "MOST_FILES", 4)
    with pytest.raises(CalibrationError, match="more than 4 files in this folder") as error:
        text_set(str(folder))
    one_line(error)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match="no file in this folder is text") as error:
        text_set(str(tmp_path / "empty"))
    one_line(error)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (TextSource("./nothing.jsonl"), "no file or folder './nothing.jsonl'"),
        (TextSource("data/nothing.csv"), "no file or folder 'data/nothing.csv'"),
        (TextSource("~nobody-of-that-name"), "no file or folder"),
        (TextSource("mixd"), "did you mean 'mixed'"),
        (TextSource(""), "no calibration set ''"),
        (TextSource("x" * 252), "no calibration set 'xxx"),
        (TextSource("a\0b"), "no calibration set"),
        (TextSource(mix={"mixed": 1, "chat": 1}), "'mixed' is itself a mix"),
        (TextSource(mix={"chat": 1, "chta": 1}), "did you mean 'chat'"),
        (TextSource("chat", split="train"), "split goes with sets of the hub"),
        (TextSource(mix={"chat": 1, "novels": 1}, split="train"), "split goes with sets of the hub"),
        (TextSource("mixed", column="text"), "'mixed' is a mix"),
    ],
)
def test_sources_that_are_none(source: TextSource, says: str) -> None:
    with pytest.raises(CalibrationError, match=says) as error:
        text_set(source)
    one_line(error)


def test_names_for_people_hold_no_path(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text("")
    assert TextSource(str(tmp_path / "mine.jsonl")).label == "mine.jsonl"
    assert TextSource("owner/set:config").label == "owner/set:config"
    assert TextSource("-").label == "standard input"
    assert TextSource(mix={"chat": 0.5, str(tmp_path): 1.5}).label == f"chat + {tmp_path.name} (0.5:1.5)"


def test_a_mix_of_files_keeps_its_proportions_and_its_column(tmp_path: Path) -> None:
    for letter, key in (("a", "body"), ("b", "body")):
        lines = "".join(json.dumps({key: letter * 50}) + "\n" for _ in range(300))
        (tmp_path / f"{letter}.jsonl").write_text(lines)
    mix = {str(tmp_path / "a.jsonl"): 1, str(tmp_path / "b.jsonl"): 3}
    found = documents(TextSource(mix=mix, column="body"))[:100]
    assert sum(text[0] == "a" for text in found) == 25
    with pytest.raises(CalibrationError, match="no text among its keys .body."):
        documents(TextSource(mix=mix))


@pytest.mark.parametrize(("ends", "letters"), [("first", "ab"), ("last", "abbbbb")])
def test_where_a_mix_ends(ends: str, letters: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n' * 5)
    for name in "ab":
        (tmp_path / f"{name}.yaml").write_text(f"name: {name}\nfiles: [{name}.jsonl]\n")
    (tmp_path / "m.yaml").write_text(f"name: m\nmix: {{a: 1, b: 1}}\nends: {ends}\n")
    assert "".join(documents(str(tmp_path / "m.yaml"))) == letters


# ---------------------------------------------------------------------------------------- standard input


class Pipe(io.BytesIO):
    """Stands for standard input."""

    def __init__(self, content: bytes, terminal: bool = False):
        super().__init__(content)
        self.buffer, self.terminal = self, terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def send(monkeypatch: pytest.MonkeyPatch):
    def to(content: bytes, terminal: bool = False) -> None:
        rows.standard_input.cache_clear()
        monkeypatch.setattr(sys, "stdin", Pipe(content, terminal))

    yield to
    rows.standard_input.cache_clear()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"plain text\nof two lines\n", ["plain text\nof two lines\n"]),
        (LINES, TEXTS),
        (json.dumps(TEXTS).encode(), TEXTS),
        (gzip.compress(LINES, mtime=0), TEXTS),
        (b"[sic] he wrote", ["[sic] he wrote"]),
        (b"{not json}", ["{not json}"]),
    ],
)
def test_standard_input_is_what_it_holds(send, content: bytes, expected: list[str]) -> None:
    send(content)
    assert documents("-") == expected
    assert documents("-") == expected  # a plan and its run see the same


def test_what_is_wrong_with_standard_input_is_said_of_it(send) -> None:
    send(b'{"text": "a"}\n{"body": "b"}\n')
    with pytest.raises(CalibrationError, match="^standard input, line 2: no text among its keys"):
        documents("-")


def test_a_terminal_is_no_text(send) -> None:
    send(b"", terminal=True)
    with pytest.raises(CalibrationError, match=r"nothing is sent to standard input; .* \| compress run") as error:
        documents("-")
    one_line(error)


# ------------------------------------------------------------------------------------------------ the hub


def test_which_sets_of_the_hub_a_text_is_from() -> None:
    """By id, however they are named; of other texts none."""
    mix = TextSource(mix={"a/b:config": 1, "chat": 1, "fineweb-edu": 2, "a/b": 1})
    assert hub_sets(text_set(mix)) == ("a/b", "HuggingFaceFW/fineweb-edu")
    assert hub_sets(text_set("owner/set:config")) == ("owner/set",)
    assert hub_sets(text_set("mixed")) == hub_sets(text_set("chat")) == ()


def test_names_of_the_hub() -> None:
    assert hub.hub_id("HuggingFaceFW/fineweb-edu") == {"path": "HuggingFaceFW/fineweb-edu"}
    assert hub.hub_id("a/b.c:sample-10BT") == {"path": "a/b.c", "name": "sample-10BT"}
    for name in ("chat", "a/b/c", "a/b.jsonl", "a/b.yaml", "./a/b", "/a/b", "a/b:", "a b/c"):
        assert hub.hub_id(name) is None
    found = text_set(TextSource("owner/set:config", column="body", split="test"))
    assert dict(found.hub) == {"path": "owner/set", "name": "config", "split": "test"} and found.column == "body"
    parts = text_set(TextSource(mix={"owner/set": 1, "chat": 1}, split="test"))
    assert parts.split == "test"


def test_a_hub_that_does_not_answer_is_one_line_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, but nobody listens
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        waited = monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waits {seconds} s to try again"))
        with pytest.raises(CalibrationError, match="cannot read hub set 'owner/set': no connection") as error:
            documents("owner/set")
        assert waited is None and "local set" in one_line(error)


def test_sets_are_streamed_by_the_real_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` takes a folder for a set of the hub, and needs no network for it."""
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "set").mkdir(parents=True)
    (tmp_path / "owner" / "set" / "train.jsonl").write_bytes(LINES)
    (tmp_path / "s.yaml").write_text("name: s\nhub: {path: owner/set}\n")
    assert documents("s.yaml") == TEXTS
    shuffled = [document.text for document in read_documents(text_set("s.yaml"), seed=1)]
    assert sorted(shuffled) == sorted(TEXTS)
    with pytest.raises(NoSuchText, match="Available splits: .'train'.") as error:
        documents(TextSource("s.yaml", split="tset"))
    one_line(error)


def test_rows_of_the_hub_are_drawn_from_a_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "SHUFFLE_BUFFER", 20)
    given, told = [{"n": n} for n in range(100)], []
    found = [row["n"] for row in hub._shuffled(iter(given), 3, "o/s", lambda done, what: told.append(what))]
    assert sorted(found) == list(range(100)) and found != list(range(100))
    assert all(n <= place + 20 for place, n in enumerate(found))
    assert told == ["o/s: 1 rows"]
    random.seed(0)  # nothing here draws from the global one
    assert found == [row["n"] for row in hub._shuffled(iter(given), 3, "o/s", None)]
