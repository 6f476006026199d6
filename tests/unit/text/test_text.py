"""Sets are found, documents read and windows packed exactly as a plain reading of the words says."""

from __future__ import annotations

import json
import lzma
import random
import subprocess
import sys

import numpy as np
import pytest

from compress.errors import CalibrationError, MissingExtra
from compress.text import (
    TaskChoice,
    TextSet,
    calibration_windows,
    data_root,
    eval_windows,
    find_data,
    hub,
    is_bundled_task,
    load_definition,
    load_documents,
    load_suite,
    sets,
    task_documents,
)


class Characters:
    """A tokenizer whose tokens are characters."""

    eos_token_id = 0
    rows = unknown_id = chat_template = None

    def __init__(self, bos: int | None = None, adds_bos: bool = True):
        self.bos_token_id = bos
        self.adds_bos = adds_bos and bos is not None

    def encode(self, text, add_special_tokens=True):
        start = [self.bos_token_id] if add_special_tokens and self.adds_bos else []
        return start + [ord(c) for c in text]

    def encode_batch(self, texts, add_special_tokens=False):
        return [self.encode(text, add_special_tokens) for text in texts]

    def decode(self, ids):
        return "".join(map(chr, ids))


DOCUMENTS = ["alpha beta", "gamma", "delta epsilon zeta", "eta", "theta iota"] * 9
DOCUMENTS = [f"{number} {document}" for number, document in enumerate(DOCUMENTS)]


def packed(documents: list[str]) -> list[int]:
    """The oracle: one long list, each document closed by 0."""
    return [token for document in documents for token in [*map(ord, document), 0]]


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message and message.strip()
    return message


# ------------------------------------------------------------------------------------------- windows


def test_calibration_windows_are_the_shuffled_documents_end_to_end(jsonl):
    windows = calibration_windows(str(jsonl), Characters(), samples=20, length=17, seed=3)
    order = list(DOCUMENTS)
    random.Random(3).shuffle(order)
    assert windows.dtype == np.int32 and windows.shape == (20, 17)
    assert windows.ravel().tolist() == packed(order)[: 20 * 17]


def test_calibration_is_deterministic_and_follows_the_seed(jsonl):
    def draw(samples: int, seed: int) -> np.ndarray:
        return calibration_windows(str(jsonl), Characters(), samples=samples, length=16, seed=seed)

    assert np.array_equal(draw(20, 0), draw(20, 0))
    assert not np.array_equal(draw(20, 0), draw(20, 1))
    assert np.array_equal(draw(20, 0)[:7], draw(7, 0))


def test_calibration_uses_no_special_tokens_but_the_end(jsonl):
    windows = calibration_windows(str(jsonl), Characters(bos=7), samples=20, length=16, seed=0)
    assert 7 not in windows and 0 in windows


@pytest.mark.parametrize(
    ("kind", "name", "least"),
    [
        ("calibration", "wikipedia", 600_000),
        ("calibration", "novels", 200_000),
        ("eval", "wikipedia", 200_000),
    ],
)
def test_shipped_sets_are_large_enough(demo_tokenizer, kind, name, least):
    if kind == "eval":
        assert eval_windows(name, demo_tokenizer, length=512).tokens.size > least
    else:
        calibration_windows(name, demo_tokenizer, samples=-(-least // 512), length=512, seed=0)


# --------------------------------------------------------------------------------------------- errors


def test_too_few_tokens_says_how_many_there_are_and_what_fits(jsonl):
    total = len(packed(DOCUMENTS))
    with pytest.raises(CalibrationError) as error:
        calibration_windows(str(jsonl), Characters(), samples=1000, length=16, seed=0)
    message = one_line(error)
    assert f"{total} tokens" in message and f"samples to at most {total // 16}" in message
    calibration_windows(str(jsonl), Characters(), samples=total // 16, length=16, seed=0)

    with pytest.raises(CalibrationError) as error:
        eval_windows(str(jsonl), Characters(bos=7), windows=1000, length=16)
    fits = total // 15
    assert f"windows to at most {fits}" in one_line(error)
    assert len(eval_windows(str(jsonl), Characters(bos=7), windows=fits, length=16).tokens) == fits

    with pytest.raises(CalibrationError, match=f"length to at most {total}"):
        calibration_windows(str(jsonl), Characters(), samples=1, length=total + 1, seed=0)


def test_windows_longer_than_the_model_allows(jsonl):
    for draw in (
        lambda length: calibration_windows(
            str(jsonl), Characters(), samples=1, length=length, seed=0, max_positions=64
        ),
        lambda length: eval_windows(str(jsonl), Characters(), length=length, max_positions=64).tokens,
    ):
        assert draw(64).shape[1] == 64
        with pytest.raises(CalibrationError, match="at most 64") as error:
            draw(65)
        one_line(error)


@pytest.mark.parametrize(("samples", "length"), [(0, 16), (-1, 16), (4, 1), (4, 0)])
def test_sizes_that_make_no_window(jsonl, samples, length):
    with pytest.raises(CalibrationError):
        calibration_windows(str(jsonl), Characters(), samples=samples, length=length, seed=0)


@pytest.mark.parametrize("content", ["", " \n\n "])
def test_empty_text(tmp_path, content):
    path = tmp_path / "empty.txt"
    path.write_text(content)
    for draw in (
        lambda: calibration_windows(str(path), Characters(), samples=1, length=8, seed=0),
        lambda: eval_windows(str(path), Characters(), length=8),
    ):
        with pytest.raises(CalibrationError, match="holds no text"):
            draw()


def test_unknown_set_names_the_nearest_and_all():
    with pytest.raises(CalibrationError) as error:
        find_data("calibration", "wikipeda")
    message = one_line(error)
    assert "mean 'wikipedia'" in message and "novels" in message and "mixed" in message
    with pytest.raises(CalibrationError, match="no evaluation suite 'quik'.*'quick'"):
        load_suite("quik")


BAD_DEFINITIONS = {
    "unknown key 'colum' .did you mean 'column'": "name: x\nfiles: [a.jsonl]\ncolum: body\n",
    "missing name": "files: [a.txt]\n",
    "exactly one of": "name: x\n",
    "exactly one of ": "name: x\nfiles: [a.txt]\nmix: {novels: 1}\n",
    "expected a mapping": "- name\n",
    "not readable as YAML": "name: [x\n",
    "'files': expected a list, got 'a.txt'": "name: x\nfiles: a.txt\n",
    "'format': .*'tsv' or 'parquet', got 'xls'": "name: x\nfiles: [a.xls]\nformat: xls\n",
    "'hub' takes": "name: x\nhub: {paht: a/b}\n",
    "'mix.novels': must be more than 0": "name: x\nmix: {novels: 0}\n",
    "'mix': expected a mapping": "name: x\nmix: [novels]\n",
    "'licence': expected text, got a list; 'column': expected text, got 5": "name: x\nfiles: [a.txt]\ncolumn: 5\nlicence: []\n",
    "line 2: files.0.: this alias contains itself": "name: x\nfiles: &a [*a]\n",
    "at most 262,144": f"name: x\ndescription: {'x' * 300_000}\n",
}


@pytest.mark.parametrize("expected", BAD_DEFINITIONS)
def test_definitions_are_strict(tmp_path, expected):
    path = tmp_path / "x.yaml"
    path.write_text(BAD_DEFINITIONS[expected])
    with pytest.raises(CalibrationError, match=expected.strip()) as error:
        load_definition(path)
    assert str(path) in one_line(error)


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "x.docx"
    path.write_bytes(b"PK")
    with pytest.raises(CalibrationError, match="expected a .yaml definition or a text file"):
        load_definition(find_data("eval", str(path)))


BAD_FILES = {
    "missing.jsonl": (None, "no such file"),
    "cut.jsonl.xz": (lzma.compress(b'{"text": "abc"}\n' * 99)[:40], "damaged"),
    "latin.txt": ("café".encode("latin-1"), "not UTF-8"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
    "list.jsonl": (b'["a"]\n', "line 1: expected an object"),
    "column.jsonl": (b'{"body": "a"}\n', r"line 1: no text among its keys \(body\); .*set 'column'"),
    "talk.jsonl": (
        b'{"messages": [{"role": "user", "content": "a"}]}\n',
        "line 1: talks are read for calibration only",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_files_that_cannot_be_read(tmp_path, name):
    content, expected = BAD_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=expected) as error:
        list(load_documents(TextSet(name="x", files=(tmp_path / name,))))
    assert str(tmp_path / name) in one_line(error)


# ------------------------------------------------------------------------------------------ documents


def test_every_kind_of_file(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffplain\n", encoding="utf-8")
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(b"packed"))
    (tmp_path / "c.jsonl").write_text('{"body": "line\u2028inside"}\n\n{"body": "  "}\n', encoding="utf-8")
    (tmp_path / "d.jsonl.xz").write_bytes(lzma.compress(b'{"body": "last", "text": "not this"}'))
    (tmp_path / "set.yaml").write_text("name: set\nfiles: [a.txt, b.txt.xz, c.jsonl, d.jsonl.xz]\ncolumn: body\n")
    documents = list(load_documents(load_definition(tmp_path / "set.yaml")))
    assert documents == ["plain\n", "packed", "line\u2028inside", "last"]


def test_wikitext_is_the_joined_rows_of_the_hub_set(tmp_path):
    (tmp_path / "w.txt").write_text(" \n = Title = \n \n Body text . \n")
    # The loading script of the hub's set: `yield row if row.strip() else ""`, row by row of the file.
    with (tmp_path / "w.txt").open() as file:
        rows = [row if row.strip() else "" for row in file]
    documents = list(load_documents(TextSet(name="w", files=(tmp_path / "w.txt",), format="wikitext")))
    assert documents == ["\n\n".join(rows)]


@pytest.mark.parametrize("seed", [None, 5])
def test_a_mix_keeps_its_proportions_in_every_prefix(tmp_path, seed):
    for name, letter, count in (("a", "a", 200), ("b", "b", 900)):
        lines = "".join(json.dumps({"text": letter * (50 + n % 37)}) + "\n" for n in range(count))
        (tmp_path / f"{name}.jsonl").write_text(lines)
        (tmp_path / f"{name}.yaml").write_text(f"name: {name}\nfiles: [{name}.jsonl]\n")
    (tmp_path / "mix.yaml").write_text("name: mix\nmix: {a: 1, b: 3}\n")
    taken = {"a": 0, "b": 0}
    documents = list(load_documents(load_definition(tmp_path / "mix.yaml"), seed=seed))
    for document in documents:
        taken[document[0]] += len(document)
        assert abs(taken["b"] - 3 * taken["a"]) <= 3 * 87  # one document, at its weight
    assert sum(document[0] == "a" for document in documents) == 200  # ends with the part that runs out


def test_a_mix_of_mixes_is_refused(tmp_path):
    (tmp_path / "inner.yaml").write_text("name: inner\nmix: {novels: 1}\n")
    (tmp_path / "outer.yaml").write_text("name: outer\nmix: {inner: 1}\n")
    with pytest.raises(CalibrationError, match="'inner' is itself a mix"):
        next(load_documents(load_definition(tmp_path / "outer.yaml")))


class FakeHub:
    """Stands for `datasets`: remembers how it was asked, and streams rows."""

    def __init__(self, rows, error=None):
        self.rows, self.error, self.calls = rows, error, []

    def load_dataset(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        if self.error:
            raise self.error
        return self

    def shuffle(self, seed, buffer_size):
        rows = list(self.rows)
        random.Random(seed).shuffle(rows)
        return FakeHub(rows)

    def __iter__(self):
        return iter(self.rows)


HUB = TextSet(name="web", hub={"path": "owner/web", "name": "small", "split": "test", "column": "body"})


@pytest.fixture
def _asked(monkeypatch):
    """The hub knows every set."""
    monkeypatch.setattr(hub, "ask", lambda path: None)


@pytest.mark.usefixtures("_asked")
def test_hub_sets_stream(monkeypatch):
    fake = FakeHub([{"body": d} for d in [*DOCUMENTS, "  "]])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert list(load_documents(HUB)) == DOCUMENTS
    assert fake.calls == [(("owner/web", "small"), {"split": "test", "streaming": True})]
    shuffled = list(load_documents(HUB, seed=1))
    assert shuffled != DOCUMENTS and sorted(shuffled) == sorted(DOCUMENTS)


@pytest.mark.usefixtures("_asked")
def test_hub_problems_are_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", FakeHub([], ConnectionError("no route\nlong story")))
    with pytest.raises(CalibrationError, match="cannot read hub set 'owner/web': no route; ") as error:
        list(load_documents(HUB))
    one_line(error)
    monkeypatch.setitem(sys.modules, "datasets", FakeHub([], RuntimeError("Dataset scripts are no longer supported")))
    with pytest.raises(CalibrationError, match="Dataset scripts are no longer supported; ") as error:
        list(load_documents(HUB))
    one_line(error)
    monkeypatch.setitem(sys.modules, "datasets", FakeHub([{"text": "a", "id": 1}]))
    with pytest.raises(CalibrationError, match="no column 'body'; it has: text, id"):
        list(load_documents(HUB))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match="datasets"):
        list(load_documents(HUB))


# ------------------------------------------------------------------------------------ what is shipped


def test_the_installed_data_comes_before_the_checkout(monkeypatch, tmp_path):
    package = tmp_path / "compress"
    package.mkdir()
    monkeypatch.setattr(sets, "__file__", str(package / "text" / "sets.py"))
    assert data_root("recipes") == tmp_path / "recipes"
    (package / "_data" / "recipes").mkdir(parents=True)
    assert data_root("recipes") == package / "_data" / "recipes"
    assert data_root("models") == tmp_path / "models"


def test_a_path_comes_before_a_name(jsonl, monkeypatch):
    assert find_data("eval", str(jsonl)) == jsonl
    assert find_data("eval", "wikipedia") == data_root("eval") / "wikipedia.yaml"
    monkeypatch.chdir(jsonl.parent)
    (jsonl.parent / "wikipedia").mkdir()  # a folder that happens to be there is not the set
    assert find_data("eval", "wikipedia") == data_root("eval") / "wikipedia.yaml"


def test_tasks():
    blimp = task_documents("blimp", 67 * 3)
    counts = {row["UID"]: 0 for row in task_documents("blimp")}
    for row in blimp:
        assert row["sentence_good"] != row["sentence_bad"]
        counts[row["UID"]] += 1
    assert len(counts) == 67 and set(counts.values()) == {3}
    lambada = task_documents("lambada")
    assert len(lambada) == 500 and task_documents("lambada", 10) == lambada[:10]
    assert all(row["context"] and row["continuation"] for row in lambada)
    with pytest.raises(CalibrationError, match="not a task"):
        task_documents("wikitext2")


@pytest.mark.parametrize("name", ["quick", "standard", "full", "safety"])
def test_suites_ask_for_what_is_there(name, demo_tokenizer):
    suite = load_suite(name)
    assert suite.name == name
    for text in suite.texts.values():
        windows = eval_windows(text.text, demo_tokenizer, windows=text.windows, protocol=text.protocol)
        assert windows.tokens.shape == (text.windows, text.protocol.length)
    for task, choice in suite.tasks.items():
        if is_bundled_task(task):
            assert len(task_documents(task, choice.documents)) == (choice.documents or 60)
    assert all(is_bundled_task(task) for task in suite.tasks) is (name != "safety")


SUITE = "name: x\ntext: wikipedia\nwindows: 1\nlength: 8\n"


def test_what_a_suite_says_of_tasks(tmp_path):
    path = tmp_path / "suite.yaml"
    path.write_text(
        f"{SUITE}chat_template: true\ntasks: {{blimp: 5, gsm8k: {{fewshot: 2, chat: false}}, piqa: {{documents: 3, hub: true}}}}\n"
    )
    assert load_suite(str(path)).tasks == {
        "blimp": TaskChoice(5, chat=True), "gsm8k": TaskChoice(None, 2), "piqa": TaskChoice(3, chat=True, hub=True),
    }  # fmt: skip
    for tasks, message in (
        ("{blimp: 0}", "'tasks.blimp.documents': must be at least 1, got 0"),
        ("{blimp: {document: 3}}", "'tasks.blimp.document': "),
        ("{blimp: {documents: many}}", "'tasks.blimp.documents': "),
        ("{blimp: true}", "'tasks.blimp': "),
        ("{blimp: {fewshot: -1}}", "'tasks.blimp.fewshot': "),
        ("[blimp]", "'tasks': "),
    ):
        path.write_text(f"{SUITE}tasks: {tasks}\n")
        with pytest.raises(CalibrationError) as error:
            load_suite(str(path))
        assert message in one_line(error)


def test_text_needs_neither_torch_nor_transformers():
    code = "import compress.text, sys; sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
