"""A folder of ours in a state we never left it in: truncated, flipped, swapped, relinked, and files that lie."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    10**12,
    10**30,
    1.5,
    -0.0,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../../x",
    "/etc/passwd",
    "\x1b[31m",
    "a\nb",
    "\ud800",
    "x" * 3000,
    "os",
    "os.system",
    [],
    {},
    [None],
    [[]],
    {"a": 1},
    ["../x"],
    [1, 2, 3],
    {"trust_remote_code": True},
    {"../../x": {"inputs": {}, "files": {}}},
    "PROMPT_TUNING",
    "(a+)+$",
]
NAMES = ["", "x", "../../x", "a.lora_A.weight", "weight", "r", "stages", "$(touch owned)", "; touch owned #"]
GENERIC = ("truncate", "flip", "insert", "empty", "delete", "random", "swap", "link", "loop", "folder")


def links(source: Path, target: Path) -> None:
    """`source` as a tree of hard links. Whoever changes a file breaks its link first (`_write`)."""
    shutil.copytree(source, target, copy_function=os.link)


@st.composite
def mutations(draw: st.DrawFn, files: list[str]) -> list[tuple[str, str, int, int]]:
    """One or two changes: (file, kind, two numbers that choose what exactly)."""
    number = st.integers(0, 2**32 - 1)
    return [
        (file, draw(st.sampled_from(_kinds(file))), draw(number), draw(number))
        for file in draw(st.lists(st.sampled_from(files), min_size=1, max_size=2))
    ]


def _kinds(file: str) -> list[str]:
    own = {".json": ["json"] * 14, ".safetensors": ["header"] * 8 + ["tensors"] * 8, ".parquet": ["table"] * 12}
    return [*GENERIC, *own.get(Path(file).suffix, ["flip"])]


def apply(folder: Path, changes: list[tuple[str, str, int, int]], outside: Path) -> None:
    """Make the changes in `folder`; links point to `outside`."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for file, kind, a, b in changes:
        path = folder / file
        if not path.is_file() or path.is_symlink():
            continue
        rng = np.random.default_rng([a, b])
        data = path.read_bytes()
        if kind == "json":
            _write(path, _changed_json(data, rng))
        elif kind == "header":
            _write(path, _lying_header(data, rng))
        elif kind == "tensors":
            _write(path, _other_tensors(data, rng))
        elif kind == "table":
            _write_table(path, rng)
        else:
            _generic(path, kind, data, rng, files, outside)


def _generic(path: Path, kind: str, data: bytes, rng: np.random.Generator, files: list[Path], outside: Path) -> None:
    place = int(rng.integers(0, len(data) + 1))
    if kind == "truncate":
        _write(path, data[:place])
    elif kind == "flip":
        changed = bytearray(data)
        for _ in range(int(rng.integers(1, 9)) if data else 0):
            changed[int(rng.integers(0, len(data)))] ^= 1 << int(rng.integers(0, 8))
        _write(path, bytes(changed))
    elif kind == "insert":
        _write(path, data[:place] + rng.bytes(int(rng.choice([1, 4, 300]))) + data[place:])
    elif kind == "empty":
        _write(path, b"")
    elif kind == "random":
        _write(path, rng.bytes(int(rng.choice([1, 8, 1000]))))
    elif kind == "swap":
        other = files[int(rng.integers(0, len(files)))]
        _write(path, other.read_bytes() if other.is_file() else b"")
    else:
        path.unlink()
        if kind == "link":
            path.symlink_to(outside / str(rng.choice(["secret.txt", "absent", "."])))
        elif kind == "loop":
            path.symlink_to(path.name)
        elif kind == "folder":
            path.mkdir()


def _write(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def _changed_json(data: bytes, rng: np.random.Generator) -> bytes:
    """One value of another type, one key more, less or renamed, or the whole document."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):  # a second change of a file that the first one broke
        return b"{}"
    if rng.integers(0, 12) == 0:
        return (b"[" * 5000, b"9" * 5000, b"NaN", b"null", b"{}", b"[]", b"\xff\xfe", b'"x"')[int(rng.integers(0, 8))]
    place = document
    for _ in range(int(rng.integers(0, 5))):
        inner = list(place.values()) if isinstance(place, dict) else place if isinstance(place, list) else []
        inner = [value for value in inner if isinstance(value, dict | list) and value]
        if not inner:
            break
        place = inner[int(rng.integers(0, len(inner)))]
    value = VALUES[int(rng.integers(0, len(VALUES)))]
    if isinstance(place, dict) and place:
        key = list(place)[int(rng.integers(0, len(place)))]
        action = int(rng.integers(0, 6))
        if action == 0:
            del place[key]
        elif action == 1:
            place[NAMES[int(rng.integers(0, len(NAMES)))]] = place.pop(key)
        elif action == 2:
            place[NAMES[int(rng.integers(0, len(NAMES)))]] = value
        else:
            place[key] = value
    elif isinstance(place, list) and place:
        place[int(rng.integers(0, len(place)))] = value
    return json.dumps(document).encode()


def _lying_header(data: bytes, rng: np.random.Generator) -> bytes:
    """safetensors: 8 bytes of length, a JSON header with dtype, shape and offsets, then the numbers."""
    length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    if rng.integers(0, 4) == 0:
        other = int(rng.choice([0, 1, length - 1, length + 1, 2**31, 2**62]))
        return struct.pack("<Q", max(0, other)) + data[8:]
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError):
        return data[:4]
    names = [name for name in header if name != "__metadata__"]
    if not names:
        return data
    name = names[int(rng.integers(0, len(names)))]
    entry, action = header[name], int(rng.integers(0, 7))
    if action == 0:
        entry["shape"] = [[0], [2**40], [-1], [2**62, 4], [], [1.5], "x"][int(rng.integers(0, 7))]
    elif action == 1:
        entry["dtype"] = str(rng.choice(["F64", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "X"]))
    elif action == 2:
        entry["data_offsets"] = [[0, 2**40], [4, 0], [-4, 4], [0], "x", [0, 4]][int(rng.integers(0, 6))]
    elif action == 3:
        header[NAMES[int(rng.integers(0, len(NAMES)))]] = header.pop(name)
    elif action == 4:
        del header[name]
    elif action == 5:
        header["__metadata__"] = [{"format": "pickle"}, "x", {"a": 1}, {}][int(rng.integers(0, 4))]
    else:
        header[name] = VALUES[int(rng.integers(0, len(VALUES)))]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def _other_tensors(data: bytes, rng: np.random.Generator) -> bytes:
    """A valid file whose tensors are not ours: values, shapes, types and names."""
    from safetensors.numpy import load, save

    try:
        tensors = load(data)
    except Exception:  # a second change of a file that the first one broke
        return data[:16]
    name = sorted(tensors)[int(rng.integers(0, len(tensors)))]
    tensor, action = tensors[name], int(rng.integers(0, 9))
    if action == 0 and tensor.dtype.kind == "f" and tensor.size:
        tensor = tensor.copy()
        tensor.flat[int(rng.integers(0, tensor.size))] = rng.choice([np.nan, np.inf, -np.inf, 1e38])
    elif action == 1:
        tensor = tensor.astype(str(rng.choice(["float64", "float16", "int64", "bool"])))
    elif action == 2:
        tensor = tensor.ravel()
    elif action == 3:
        tensor = tensor[:0]
    elif action == 4:
        tensor = np.concatenate([tensor, tensor])
    elif action == 5:
        tensor = np.zeros_like(tensor)
    elif action == 6:
        tensor = tensor[..., None]
    elif action == 7:
        tensors[NAMES[int(rng.integers(0, len(NAMES)))]] = tensor
        del tensors[name]
        return save(tensors)
    else:
        del tensors[name]
        return save(tensors)
    return save(tensors | {name: np.ascontiguousarray(tensor)})


def _write_table(path: Path, rng: np.random.Generator) -> None:
    """A valid Parquet file with a column less, renamed, of another type, with nulls, or with other rows."""
    try:
        table = pq.read_table(path)
    except Exception:
        return
    name = table.column_names[int(rng.integers(0, len(table.column_names)))]
    place, action = table.column_names.index(name), int(rng.integers(0, 8))
    if action == 0:
        table = table.drop_columns([name])
    elif action == 1:
        names = [NAMES[int(rng.integers(0, len(NAMES)))] if n == name else n for n in table.column_names]
        table = table.rename_columns(names)
    elif action == 2:
        table = table.set_column(place, name, pa.array([None] * len(table), table[name].type))
    elif action == 3:
        table = table.set_column(place, name, pa.array([str(VALUES[i % 10]) for i in range(len(table))]))
    elif action == 4:
        table = table.set_column(place, name, pa.array([float("nan")] * len(table)))
    elif action == 5:
        table = table.slice(0, int(rng.integers(0, len(table) + 1)))
    elif action == 6:
        table = table.set_column(place, name, pa.array([10**9 - i for i in range(len(table))]))
    else:
        table = pa.concat_tables([table, table])
    path.unlink()
    pq.write_table(table, path)
