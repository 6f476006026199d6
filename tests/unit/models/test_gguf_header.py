"""Headers of GGUF files: read as gguf's own reader does, and refused in one line where they are damaged, before anything is
allocated for what they claim."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from compress.errors import CheckpointError
from compress.models.gguf.header import read_header, read_set

ROOT = Path(__file__).resolve().parents[3]


def small(path: Path, *, split: int = 0) -> Path:
    writer = gguf.GGUFWriter(path, "llama", split_max_size=split)
    writer.add_uint32("llama.block_count", 3)
    writer.add_float32("llama.eps", 1e-5)
    writer.add_bool("flag", True)
    writer.add_token_list(["a", "ü", "<s>"])
    writer.add_token_types([1, 1, 3])
    for name, shape in (("a.weight", (3, 32)), ("b.weight", (2, 5, 64)), ("c", (7,))):
        writer.add_tensor(name, np.arange(np.prod(shape), dtype=np.float32).reshape(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_header_is_what_gguf_reads(tmp_path: Path) -> None:
    path = small(tmp_path / "m.gguf")
    ours, theirs = read_header(path), gguf.GGUFReader(path)
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.fields == fields
    data = path.read_bytes()
    assert [t.name for t in theirs.tensors] == list(ours.tensors)
    for tensor in theirs.tensors:
        stored = ours.tensors[tensor.name]
        assert stored.shape == tuple(reversed(tensor.shape.tolist())) and stored.type == tensor.tensor_type.name
        assert data[slice(*stored.span)] == tensor.data.tobytes()


HEADER = b"GGUF" + struct.pack("<IQQ", 3, 1, 0)
INFO = struct.pack("<Q", 1) + b"w"


def one_tensor(*dims: int, kind: int = 0, offset: int = 0, name: bytes = INFO, data: int = 0) -> bytes:
    head = HEADER + name + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return head + bytes(-len(head) % 32) + bytes(data)


def with_field(key: bytes, kind: int, value: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(key)) + key + struct.pack("<I", kind) + value


BAD: dict[str, tuple[bytes | Callable[[bytes], bytes], str]] = {
    "empty": (b"", "does not begin with GGUF"),
    "another format": (b"PK\3\4" + bytes(100), "does not begin with GGUF"),
    "version": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "counts": (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), "tensors"),
    "keys": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**40), "keys of metadata"),
    "cut in the header": (lambda good: good[:100], "truncated"),
    "cut in the data": (lambda good: good[:-8], "truncated"),
    "more than it lists": (lambda good: good + bytes(64), "belong to none"),
    "one tensor fewer": (lambda good: good[:8] + struct.pack("<Q", 2) + good[16:], "belong to none"),
    "one tensor more": (lambda good: good[:8] + struct.pack("<Q", 4) + good[16:], "damaged"),
    "one key fewer": (lambda good: good[:16] + struct.pack("<Q", 5) + good[24:], "damaged"),
    "long key": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62), "a text of"),
    "long text": (with_field(b"k", 8, struct.pack("<Q", 2**62)), "a text of"),
    "long list": (with_field(b"k", 9, struct.pack("<IQ", 0, 2**62)), "at most"),
    "long list of texts": (with_field(b"k", 9, struct.pack("<IQ", 8, 2**22)), "does not end within"),
    "lists in a list": (with_field(b"k", 9, struct.pack("<IQ", 9, 1)), "no type of a list"),
    "type of a value": (with_field(b"k", 77, b""), "no type of a value"),
    "no text": (with_field(b"k", 8, struct.pack("<Q", 2) + b"\xff\xfe"), "UTF-8"),
    "alignment": (with_field(b"general.alignment", 4, struct.pack("<I", 3)), "alignment"),
    "alignment of nothing": (with_field(b"general.alignment", 4, bytes(4)), "alignment"),
    "dimensions": (one_tensor(*[1] * 9), "9 dimensions"),
    "no rows": (one_tensor(0), "shape"),
    "huge rows": (one_tensor(2**47, 2**47, 2**47), "truncated"),
    "unknown type": (one_tensor(32, kind=9999), "type 9999"),
    "type that is gone": (one_tensor(32, kind=4), "type 4"),
    "blocks": (one_tensor(33, kind=2, data=64), "does not divide"),
    "beyond the file": (one_tensor(32, offset=2**40), "not where"),
    "hole": (one_tensor(8, offset=32, data=64), "not where"),
    "two of one name": (
        b"GGUF" + struct.pack("<IQQ", 3, 2, 0) + 2 * (INFO + struct.pack("<IQIQ", 1, 1, 0, 0)) + bytes(64), "twice",
    ),
    "overlap": (
        b"GGUF" + struct.pack("<IQQ", 3, 2, 0) + INFO + struct.pack("<IQIQ", 1, 16, 0, 0)
        + struct.pack("<Q", 1) + b"v" + struct.pack("<IQIQ", 1, 16, 0, 32) + bytes(256), "not where",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_damage_is_one_line(case: str, tmp_path: Path) -> None:
    made, said = BAD[case]
    good = small(tmp_path / "good.gguf").read_bytes()
    path = tmp_path / "bad.gguf"
    path.write_bytes(made(good) if callable(made) else made)
    with pytest.raises(CheckpointError) as error:
        read_header(path)
    assert said in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_what_a_header_claims_takes_no_memory(tmp_path: Path) -> None:
    """All cases again, and a file of 8 GB that claims one list: the process grows by less than 64 MiB."""
    names = []
    for index, (made, _) in enumerate(BAD.values()):
        if not callable(made):
            names.append(tmp_path / f"{index}.gguf")
            names[-1].write_bytes(made)
    names.append(tmp_path / "sparse.gguf")
    with names[-1].open("wb") as file:
        file.write(with_field(b"k", 9, struct.pack("<IQ", 0, 2**33)))
        file.truncate(2**33)
    code = (
        "import re, sys, gguf; from pathlib import Path\n"
        "from compress.errors import CheckpointError; from compress.models.gguf.header import read_header\n"
        "def peak(): return int(re.search(r'VmHWM:\\s*(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "before = peak()\n"
        "for name in sys.argv[1:]:\n"
        "    try: read_header(Path(name)); raise SystemExit(f'{name} was read')\n"
        "    except CheckpointError: pass\n"
        "grown = peak() - before\n"
        "assert grown < 65536, grown\n"
    )
    subprocess.run([sys.executable, "-c", code, *map(str, names)], check=True, cwd=ROOT)


def test_a_set_belongs_together(tmp_path: Path) -> None:
    small(tmp_path / "m.gguf", split=600)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) > 1
    whole = read_set(parts[-1])
    assert set(whole.tensors) == {"a.weight", "b.weight", "c"} and whole.fields["llama.block_count"] == 3
    assert {t.file for t in whole.tensors.values()} == set(parts)
    data = [part.read_bytes() for part in parts]
    parts[0].write_bytes(data[1]), parts[1].write_bytes(data[0])
    with pytest.raises(CheckpointError, match="does not say that it is file 1 of"):
        read_set(parts[0])
    parts[0].write_bytes(data[0]), parts[1].unlink()
    with pytest.raises(CheckpointError, match=rf"{parts[1].name} is missing; all {len(parts)} files"):
        read_set(parts[0])
    with pytest.raises(CheckpointError, match="no GGUF file at"):
        read_set(tmp_path / "none.gguf")
