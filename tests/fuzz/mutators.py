"""Damage to files, drawn from a seed: to arbitrary bytes, and to the structure of formats that have one.

`mutated` damages the content of a file. `put_in_place_of` replaces a file by something else. Checksums inside a format
(tar headers, PNG chunks, members of zip archives) are corrected afterwards, so that readers get as far as the damage.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

Mutator = Callable[[bytes, Random], bytes]
LARGEST = 32 * 2**20
"""Largest size in bytes to which damage may let a file grow."""


class _RunsCode:
    """An object with a pickle that would start a shell when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/sdkit-fuzz-was-run",)


def _zip(name: str, data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()


def _safetensors(header: dict[str, Any], body: bytes = b"") -> bytes:
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + body


OTHER_KINDS: tuple[bytes, ...] = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(sdkit) print showpage\n%%EOF\n",
    b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF",
    b"GIF89a\x01\x00\x01\x00\x80\x00\x00\xff\xff\xff\x00\x00\x00!\xf9\x04\x01\x00\x00\x00\x00,\x00\x00\x00\x00\x01\x00\x01"
    b"\x00\x00\x02\x02D\x01\x00;",
    b"<!DOCTYPE html><html><head><title>404</title></head></html>",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    b"#!/bin/sh\ntouch /tmp/sdkit-fuzz-was-run\n",
    b"import os; os.system('touch /tmp/sdkit-fuzz-was-run')\n",
    b'{"a": 1}',
    b"[" * 100_000,
    b"P5 1 1 255\n\x00",
    b"P5 60000 60000 255\n\x00",
    pickle.dumps(_RunsCode(), protocol=2),
    pickle.dumps([1, 2.5, "text"], protocol=2),
    _zip("archive/data.pkl", pickle.dumps(_RunsCode(), protocol=2)),
    _zip("a", bytes(10**6)),
    _safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    _safetensors({}),
    b"PAR1" + bytes(8) + b"PAR1",
    bytes(1024),
    "a caption in UTF-16".encode("utf-16"),
    b"\xef\xbb\xbfa caption behind a mark",
    b"\x1f\x8b\x08" + bytes(20),
)
"""Small files of many kinds, some of them hostile, to replace other files or to be inserted into them."""

TEXTS: tuple[str, ...] = (
    "", " ", "\0", "nan", "NaN", "-1", "0", "1", "2", "1e400", "-inf", "9" * 400, "1.5", "1_0", "٣", "true", "null",
    "a" * 1_000_000, "é" * 300, "\ud800", "\U0001f600", "../../../etc/passwd", "/dev/zero", "/proc/self/environ", "~",
    "~nobody-here/x", "http://127.0.0.1:9/x", "hf://datasets/a/b/c", "file:///etc/passwd", "org/name", "%s%n{0}{}",
    "(" * 5000, "(a:1e9)" * 50, "[[[[" * 50, "\\", "con", ".", "..", "a/b", "a\nb", "\x1b[31m", "(a+)+$", "-", "--help",
)  # fmt: skip
NUMBERS: tuple[str, ...] = (
    "0", "1", "-1", "2", "3", "7", "8", "255", "65536", "100000000", "2147483648", "9223372036854775808", "0.5", "-0.0",
    "1e-320", "1e308", "1e400", "-1e400", "NaN", "Infinity", "-Infinity", "9" * 400,
)  # fmt: skip
LITERALS: tuple[str, ...] = (
    *NUMBERS, "null", "true", "false", "[]", "{}", '""', "[null]", "[[]]", '{"": null}', "[1, 2]", "[0, 1e9]", '["a"]',
    "[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000, "[" + "1," * 200_000 + "1]",
    r'"\ud800"', r'"\u0000"',
)  # fmt: skip
HAZARDS: tuple[tuple[str, Any], ...] = (
    ("auto_map", {"AutoModel": "evil--org/name.Model"}), ("attn_implementation", "kernels-community/flash-attn"),
    ("_attn_implementation", "org/kernel"), ("trust_remote_code", True), ("_name_or_path", "http://127.0.0.1:9/model"),
    ("quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": True}), ("torch_dtype", "float0"),
    ("dtype", "int8"), ("custom_pipeline", "org/name"), ("__class__", "os.system"), ("", 1), ("use_safetensors", False),
    ("tokenizer_file", "/etc/passwd"), ("vocab_file", "/dev/zero"), ("chat_template", "{{ 1 / 0 }}"),
    ("additional_special_tokens", ["<a>"] * 1000), ("added_tokens_decoder", {"99999999": {"content": "x"}}),
)  # fmt: skip
"""Config keys that have a special meaning in the libraries that read configs."""


def mutated(data: bytes, suffix: str, rng: Random) -> bytes:
    """Return `data` with one to three kinds of damage. `suffix` names the format of the file."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        structured = STRUCTURED.get(suffix)
        before = data
        if structured and rng.random() < 0.75:
            with contextlib.suppress(Exception):  # earlier damage may have destroyed the structure
                data = structured(data, rng)
        if data == before:
            data = rng.choice(PLAIN)(data, rng)
    return data[:LARGEST]


# Any bytes


def _span(data: bytes, rng: Random) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 2, 8, 64, 512, 4096)))


def flip_bits(data: bytes, rng: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 2, 8, 32)) if data else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite(data: bytes, rng: Random) -> bytes:
    """Overwrite with a boundary value of 1, 2, 4, or 8 bytes, in either byte order."""
    width = rng.choice((1, 2, 4, 8))
    value = rng.choice((0, 1, 2 ** (8 * width - 1) - 1, 2 ** (8 * width - 1), 2 ** (8 * width) - 1, rng.getrandbits(8)))
    start = rng.randrange(max(1, len(data) if rng.random() < 0.5 else min(len(data), 64)))
    return data[:start] + value.to_bytes(width, rng.choice(("little", "big"))) + data[start + width :]


def truncate(data: bytes, rng: Random) -> bytes:
    return data[: rng.choice((0, 1, 8, len(data) // 2, max(0, len(data) - 1), rng.randrange(len(data) + 1)))]


def remove(data: bytes, rng: Random) -> bytes:
    start, end = _span(data, rng)
    return data[:start] + data[end:]


def double(data: bytes, rng: Random) -> bytes:
    start, end = _span(data, rng)
    return data[:start] + data[start:end] * rng.choice((2, 2, 100)) + data[end:]


def splice(data: bytes, rng: Random) -> bytes:
    start, end = _span(data, rng)
    return data[:start] + rng.choice(OTHER_KINDS) + data[rng.choice((start, end)) :]


def append(data: bytes, rng: Random) -> bytes:
    return data + rng.choice((b"\0", bytes(10_000), rng.randbytes(100), data, rng.choice(OTHER_KINDS)))


def blank(data: bytes, rng: Random) -> bytes:
    start, end = _span(data, rng)
    return data[:start] + rng.choice((b"\0", b"\xff", b" ")) * (end - start) + data[end:]


def replace_all(data: bytes, rng: Random) -> bytes:
    return rng.choice((b"", *OTHER_KINDS))


PLAIN: tuple[Mutator, ...] = (flip_bits, overwrite, truncate, remove, double, splice, append, blank, replace_all)


# JSON


def _nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key) for every value inside, at any depth."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs):
        yield value, key
        yield from _nodes(inner)


def mutate_value(value: Any, rng: Random) -> str:
    """Return JSON text of `value`, a dict or a list, with one change inside."""
    nodes = list(_nodes(value))
    raw: dict[str, str] = {}

    def literal(text: str) -> str:  # json cannot write such text; it is inserted afterwards
        mark = f"@@{len(raw)}@@"
        raw[json.dumps(mark)] = text
        return mark

    # Choose an outer node half of the time: nearly all nodes of a tokenizer are vocabulary, and those of a header
    # offsets.
    outer = [node for node in nodes if node[0] is value]
    container, key = rng.choice(rng.choice((outer, nodes))) if nodes else ({}, "")
    found = container[key] if nodes else None
    action = rng.choice(
        ("literal", "literal", "number", "text", "delete", "rename", "double", "hazard", "type", "swap")
    )
    if not nodes or action == "hazard":
        name, hazard = rng.choice(HAZARDS)
        target = rng.choice([value, *[c[k] for c, k in nodes if isinstance(c[k], dict)]][:20])
        if not isinstance(target, dict):
            return rng.choice(LITERALS)
        target[name] = hazard
    elif action == "literal":
        container[key] = literal(rng.choice(LITERALS))
    elif action == "number":
        number = isinstance(found, (int, float))
        near = [found + 1, found - 1, found * 2, -found, found * 1000, float(found), str(found)] if number else [0]
        container[key] = rng.choice([*near, literal(rng.choice(NUMBERS))])
    elif action == "text":
        container[key] = rng.choice(TEXTS)
    elif action == "delete":
        del container[key]
    elif action == "rename" and isinstance(container, dict):
        container[rng.choice((f"{key}x", str(key).upper(), rng.choice(TEXTS), ""))] = container.pop(key)
    elif action == "double" and isinstance(container, dict):
        name = f"{json.dumps(key)}: "
        return json.dumps(value).replace(name, f"{name}{rng.choice(LITERALS)}, {name}", 1)
    elif action == "type":
        container[key] = rng.choice(([found], {"a": found}, str(found), None, bool(found), [found] * 3))
    else:
        other_container, other = rng.choice(nodes)
        container[key], other_container[other] = other_container[other], found
    text = json.dumps(value)
    for mark, replacement in raw.items():
        text = text.replace(mark, replacement)
    return text


def mutate_json(data: bytes, rng: Random) -> bytes:
    if rng.random() < 0.03:
        return rng.choice(LITERALS).encode()
    text = mutate_value(json.loads(data), rng)
    return text.encode(rng.choice(("utf-8",) * 8 + ("utf-8-sig", "utf-16")), errors="surrogatepass")


# Lines: captions, prompts, csv, jsonl


def mutate_lines(data: bytes, rng: Random) -> bytes:
    lines = data.split(b"\n")
    i = rng.randrange(len(lines))
    action = rng.choice(("json", "json", "text", "text", "double", "drop", "join", "code", "nul", "many"))
    if action == "json" and lines[i][:1] == b"{":
        lines[i] = mutate_json(lines[i], rng)
    elif action == "double":
        lines.insert(i, lines[i])
    elif action == "drop":
        del lines[i]
    elif action == "join":
        lines[i : i + 2] = [b"".join(lines[i : i + 2])]
    elif action == "code":
        text = data.decode(errors="replace")
        return text.encode(rng.choice(("utf-16", "utf-16-le", "utf-32", "latin-1", "utf-8-sig")), errors="replace")
    elif action == "nul":
        lines[i] = b"\0".join((lines[i], lines[i]))
    elif action == "many":
        lines += [lines[i]] * 20_000
    else:  # one field of the line, or all of them
        fields = lines[i].split(b",")
        fields[rng.randrange(len(fields))] = rng.choice(TEXTS).encode(errors="surrogatepass")
        lines[i] = rng.choice((b",".join(fields), fields[0] * 3))
    return b"\n".join(lines)


# safetensors


def _unpacked(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def in_order(data: bytes) -> bytes:
    """Sort the keys in the header of a safetensors file. The library writes them in another order in each process."""
    header, body = _unpacked(data)
    encoded = json.dumps(header, sort_keys=True).encode()
    return struct.pack("<Q", len(encoded)) + encoded + body


FILLINGS: dict[str, tuple[bytes, ...]] = {
    "F32": tuple(struct.pack("<f", x) for x in (float("nan"), float("inf"), -float("inf"), 1e38, -1e38, 1e-45, 0.0)),
    "F16": (b"\x00\x7e", b"\x00\x7c", b"\x00\xfc", b"\xff\x7b", b"\x00\x00"),
    "I64": tuple(struct.pack("<q", x) for x in (-1, 0, 2**31, 2**62, -(2**63))),
    "I32": tuple(struct.pack("<i", x) for x in (-1, 0, 2**15, 2**31 - 1, -(2**31))),
    "U8": (b"\x00", b"\xff", b"\xc3"),
}
SAME_WIDTH = {
    "F32": ("I32", "U32", "F32"), "F16": ("BF16", "I16", "F16"), "I64": ("F64", "U64", "C64"), "I32": ("F32", "U32"),
    "U8": ("I8", "BOOL", "F8_E4M3", "F8_E5M2"),
}  # fmt: skip


def mutate_safetensors(data: bytes, rng: Random) -> bytes:
    header, body = _unpacked(data)
    names = [name for name in header if name != "__metadata__"]
    action = rng.choice(
        ("json", "json", "length", "dtype", "dtype", "fill", "fill", "fill", "shape", "shape", "rename", "drop", "copy",
         "metadata", "scalar", "huge", "empty")
    )  # fmt: skip
    name = rng.choice(names)
    entry = header[name]
    start = entry["data_offsets"][0]
    if action == "json":
        encoded = mutate_value(header, rng).encode(errors="surrogatepass")
        return struct.pack("<Q", len(encoded)) + encoded + body
    if action == "length":
        length = rng.choice((0, 1, 2**63, 2**64 - 1, len(data), len(data) - 8, 100_000_001, rng.getrandbits(20)))
        return struct.pack("<Q", length) + data[8:]
    if action == "dtype":
        entry["dtype"] = rng.choice(SAME_WIDTH.get(entry["dtype"], ("F32",)))
    elif action == "fill":
        for one in rng.choice(([name], [name], names)):
            kind, (first, last) = header[one]["dtype"], header[one]["data_offsets"]
            value = rng.choice(FILLINGS.get(kind, (b"\xff",)))
            if rng.random() < 0.3:  # a single number
                last = first + len(value) if last > first else last
            body = body[:first] + value * ((last - first) // len(value)) + body[last:]
    elif action == "shape":
        shape = entry["shape"]
        count = 1
        for side in shape:
            count *= side
        entry["shape"] = rng.choice((shape[::-1], [count], [*shape, 1], [1, *shape], [1] * 70 + [count]))
    elif action == "rename":
        header[rng.choice((name + ".x", name[1:], name.replace(".", "_"), *rng.sample(TEXTS, 3)))] = header.pop(name)
    elif action == "drop":
        return _repacked({key: value for key, value in header.items() if key != name}, body)
    elif action == "copy":
        header[rng.choice((f"{name}2", f"x.{name}", "position_ids", f"model_ema.{name}", "v_pred"))] = dict(entry)
        return _repacked(header, body)
    elif action == "metadata":
        metadata = header.setdefault("__metadata__", {})
        key = rng.choice([*metadata, "format", "x", "lora_adapter_metadata"])
        value = metadata.get(key, "")
        numbers = value.replace(".", "", 1).isdigit()
        texts = (*TEXTS, *NUMBERS, str(int(float(value)) * 8), f"-{value}") if numbers else (*TEXTS, *NUMBERS)
        metadata[key] = mutate_json(value.encode(), rng).decode() if value[:1] == "{" else rng.choice(texts)
    elif action == "scalar":
        for one in rng.choice(([name], names)):
            entry = header[one]
            start = entry["data_offsets"][0]
            width = {"F16": 2, "BF16": 2, "I64": 8, "F64": 8, "U8": 1}.get(entry["dtype"], 4)
            header[one] = {**entry, "shape": rng.choice(([], [1])), "data_offsets": [start, start + width]}
        return _repacked(header, body)
    elif action == "huge":
        entry["shape"] = rng.choice(([2**40], [2**32, 2**32], [0, 2**62], [2**63], [-1], [1.5]))
    else:
        header[name] = {**entry, "shape": [0, *entry["shape"][1:]], "data_offsets": [start, start]}
        return _repacked(header, body)
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + body


def _repacked(header: dict[str, Any], body: bytes) -> bytes:
    """Return a file with its tensors packed without gaps, as the format demands."""
    made, packed = {}, b""
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            entry = {**entry, "data_offsets": [len(packed), len(packed) + end - start]}
            packed += body[start:end]
        made[name] = entry
    return _safetensors(made, packed)


# Pickles in a zip archive, as torch.save writes them


def mutate_pickle(data: bytes, rng: Random) -> bytes:
    if rng.random() < 0.5:
        return _odd_tensors(data, rng)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    name = rng.choice((next(one for one in members if one.endswith("data.pkl")), rng.choice(list(members))))
    action = rng.choice(("bytes", "bytes", "bytes", "drop", "rename", "global", "deflate", "many"))
    if action == "drop":
        del members[name]
    elif action == "rename":
        members[rng.choice(("../x", "archive/../../x", "/tmp/x", name.upper(), "a" * 60_000))] = members.pop(name)
    elif action == "global":
        theirs = rng.choice(
            (b"cos\nsystem\n", b"cbuiltins\neval\n", b"cnumpy\nload\n", b"ctorch\nload\n", b"c__main__\nx\n")
        )
        members[name] = members[name].replace(b"ctorch._utils\n_rebuild_tensor_v2\n", theirs)
    elif action == "many":
        members |= {f"archive/data/{i}x": b"" for i in range(1000)}
    elif action == "bytes":
        members[name] = rng.choice(PLAIN)(members[name], rng)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if action == "deflate" else zipfile.ZIP_STORED) as archive:
        for member, content in members.items():
            archive.writestr(zipfile.ZipInfo(member), content)
    return buffer.getvalue()


def _odd_tensors(data: bytes, rng: Random) -> bytes:
    """Put in a tensor or value that torch's weights-only loader accepts but no model contains."""
    import torch

    content = torch.load(io.BytesIO(data), weights_only=True)
    tensors = content.get("state_dict", content)
    name = rng.choice(list(tensors))
    x = tensors[name]
    odd: list[Callable[[], Any]] = [
        lambda: x.to(torch.int8), lambda: x != 0, lambda: x.to(torch.complex64), lambda: x.to_sparse(),
        lambda: torch.zeros(1).expand(10**9), lambda: torch.full_like(x, torch.nan), lambda: x.to("meta"),
        lambda: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8), lambda: torch.nn.Parameter(x),
        lambda: x.to(torch.float8_e4m3fn), lambda: x.double() * 1e300, lambda: x[None], lambda: x.flatten(),
        lambda: torch.zeros(0), lambda: torch.tensor(1.0), lambda: "text", lambda: None, lambda: {"a": x},
        lambda: 10**400, lambda: torch.nested.nested_tensor([x.flatten(), x.flatten()[:1]]),
        lambda: x.t() if x.ndim == 2 else x.neg(),
    ]  # fmt: skip
    action = rng.randrange(8)
    if action < 5:
        tensors[name] = rng.choice(odd)()
    elif action == 5:
        tensors[rng.choice((3, (1, 2), None, 2.5, b"x", *TEXTS))] = tensors.pop(name)
    elif action == 6:
        content = rng.choice(
            ([tensors], {"state_dict": [x]}, {"state_dict": {"state_dict": tensors}}, x, {}, {"a": {}})
        )
    else:
        inner: Any = tensors
        for _ in range(5000):
            inner = [inner]
        content = {"state_dict": tensors, "more": inner}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


# PNG


def _chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    at, found = 8, []
    while at + 12 <= len(data):
        size = struct.unpack(">I", data[at : at + 4])[0]
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    return found


@cache
def _bomb() -> bytes:
    return zlib.compress(bytes(64 * 2**20))


def mutate_png(data: bytes, rng: Random) -> bytes:
    chunks = _chunks(data)
    texts = [i for i, (kind, _) in enumerate(chunks) if kind in (b"tEXt", b"iTXt")]
    action = rng.choice(("text", "text", "text", "header", "content", "drop", "double", "insert", "order"))
    i = rng.choice(texts) if action == "text" and texts else rng.randrange(len(chunks))
    kind, content = chunks[i]
    if action == "text" and texts:
        key = content.split(b"\0")[0]
        value = rng.choice((*TEXTS, *NUMBERS)).encode("utf-8", errors="surrogatepass")
        chunks[i] = (kind, key + content[len(key) :][: 5 if kind == b"iTXt" else 1] + value)
    elif action == "header":
        fields = list(struct.unpack(">IIBBBBB", chunks[0][1]))
        fields[rng.randrange(7)] = rng.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
        if rng.random() < 0.4:
            fields[rng.randrange(2)] = rng.choice((1, 9999, 2**31 - 1, 2**32 - 1))
        chunks[0] = (b"IHDR", struct.pack(">IIBBBBB", *fields))
    elif action == "content":
        chunks[i] = (kind, rng.choice(PLAIN)(content, rng)[:100_000])
    elif action == "drop":
        del chunks[i]
    elif action == "double":
        chunks.insert(i, chunks[i])
    elif action == "order":
        rng.shuffle(chunks)
    else:
        bomb = _bomb()
        extra = (
            (b"zTXt", b"bomb\0\0" + bomb), (b"iCCP", b"p\0\0" + zlib.compress(rng.randbytes(200))),
            (b"iCCP", b"p\0\0" + bomb),
            (b"eXIf", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0" + bytes([rng.randrange(10)]) + bytes(6)),
            (b"eXIf", rng.randbytes(40)), (b"tRNS", rng.randbytes(rng.choice((1, 2, 6, 300)))), (b"gAMA", b"\0\0\0\0"),
            (b"PLTE", rng.randbytes(rng.choice((3, 768, 4)))), (b"acTL", struct.pack(">II", 2**31 - 1, 0)),
            (b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(b"x" * 1000)), (b"tEXt", b"prompt\0\xff\xfe"), (b"IDAT", b""),
            (b"cHRM", bytes(32)), (b"pHYs", bytes(9)), (b"sRGB", b"\xff"), (b"tEXt", b"\0" * 50), (b"tEXt", b""),
        )  # fmt: skip
        chunks.insert(rng.randrange(1, len(chunks) + 1), rng.choice(extra))
    return data[:8] + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


# tar


FIELDS = {
    "name": (0, 100), "mode": (100, 108), "size": (124, 136), "mtime": (136, 148), "type": (156, 157),
    "link": (157, 257), "magic": (257, 265), "prefix": (345, 500),
}  # fmt: skip


def mutate_tar(data: bytes, rng: Random) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = archive.getmembers()
    member = rng.choice(members)
    at = member.offset
    header = bytearray(data[at : at + 512])
    action = rng.choice(
        ("name", "name", "size", "size", "type", "type", "field", "content", "content", "pax", "sparse")
    )
    if action == "content":
        begin, end = member.offset_data, member.offset_data + member.size
        content = mutated(data[begin:end], Path(member.name).suffix, rng)
        info = tarfile.TarInfo(member.name)
        info.size = len(content)
        padded = content + bytes(-len(content) % 512)
        return data[:at] + info.tobuf() + padded + data[end + (-end % 512) :]
    if action in ("pax", "sparse"):
        records = {
            "pax": {rng.choice(("path", "size", "linkpath", "mtime", "hdrcharset", "x")): rng.choice(TEXTS)[:5000]},
            "sparse": {
                "GNU.sparse.major": "1",
                "GNU.sparse.minor": "0",
                "GNU.sparse.realsize": rng.choice(("10", "9" * 15, "-1", "x")),
                "GNU.sparse.name": member.name,
            },
        }[action]
        text = b"".join(_pax_record(key, value) for key, value in records.items())
        info = tarfile.TarInfo("././@PaxHeader")
        info.type, info.size = tarfile.XHDTYPE, len(text)
        return data[:at] + info.tobuf() + text + bytes(-len(text) % 512) + data[at:]
    names = [text.encode(errors="surrogatepass")[:100] for text in TEXTS]
    sizes = [b"77777777777\0", b"00000000000\0", b"-0000000001\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"x" * 12]
    values = {
        "name": [*names, b"\xff\xfe.png", b".png", b"a.b.png", b"a.txt/"],
        "size": [*sizes, b"00000000001\0"],
        "type": [bytes([code]) for code in b"01234567gxLKSDVMAN\0\xff"],
        "field": [b"", b"\xff" * 12, b"ustar  \0", b"/dev/zero", b"-1"],
    }[action]
    start, end = FIELDS[rng.choice(tuple(FIELDS)) if action == "field" else action]
    header[start:end] = rng.choice(values)[: end - start].ljust(end - start, b"\0")
    if action == "type" and header[156:157] == b"S":  # an old GNU sparse file that claims a terabyte
        header[386:495] = b"00000000000\0" * 2 + bytes(483 - 410) + b"\x80" + bytes(5) + b"\x01" + bytes(5)
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return data[:at] + bytes(header) + data[at + 512 :]


def _pax_record(key: str, value: str) -> bytes:
    body = f" {key}={value}\n".encode(errors="surrogatepass")
    size = len(body) + 1
    while len(str(size)) + len(body) != size:
        size = len(str(size)) + len(body)
    return str(size).encode() + body


# parquet


COLUMNS: tuple[list[Any], ...] = (
    [1.5, float("nan")], [None, None], [["a"], []], [{"a": 1}, None], [b"\xff", b""], [True, False],
)  # fmt: skip
"""Columns in place of the captions that are not captions."""


def mutate_parquet(data: bytes, rng: Random) -> bytes:
    """Rewrite a table of images with a damaged path, image, caption, column, or type."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pq.read_table(io.BytesIO(data)).to_pylist()
    action = rng.choice(("path", "path", "bytes", "caption", "rename", "drop", "flat", "types", "mixed"))
    for row in rows[: rng.choice((1, len(rows)))]:
        if action == "path":
            path = rng.choice((*TEXTS, "zip://x::http://127.0.0.1:9/a", "simplecache::http://127.0.0.1:9/a"))
            row["image"] = {"bytes": rng.choice((None, None, b"")), "path": path.encode(errors="replace").decode()}
        elif action == "bytes":
            row["image"]["bytes"] = mutated(row["image"]["bytes"], ".png", rng)
        elif action == "caption":
            row["text"] = rng.choice(TEXTS).encode(errors="replace").decode()
    columns: dict[str, Any] = {"image": [row["image"] for row in rows], "text": [row["text"] for row in rows]}
    if action == "rename":
        columns[rng.choice((*TEXTS[:12], "img", "caption"))] = columns.pop(rng.choice(("image", "text")))
    elif action == "drop":
        del columns[rng.choice(("image", "text"))]
    elif action == "flat":
        columns["image"] = [row["image"][rng.choice(("bytes", "path"))] for row in rows[:1]] * len(rows)
    elif action == "types":
        columns["text"] = rng.choice(COLUMNS)
        columns["image"] = columns["image"][:2]
    elif action == "mixed":
        columns["image2"] = columns["image"]
    buffer = io.BytesIO()
    told = rng.choice((None, *LITERALS[:-4], '{"info": {"features": {"image": {"_type": "Audio"}}}}'))
    metadata = {b"huggingface": told.encode()} if told else None
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), buffer)
    return buffer.getvalue()


STRUCTURED: dict[str, Mutator] = {
    ".json": mutate_json, ".safetensors": mutate_safetensors, ".png": mutate_png, ".tar": mutate_tar,
    ".parquet": mutate_parquet, **dict.fromkeys((".bin", ".ckpt", ".pt", ".pth"), mutate_pickle),
    **dict.fromkeys((".txt", ".csv", ".jsonl", ".caption"), mutate_lines),
}  # fmt: skip


# Replacing a file by something else


def put_in_place_of(path: Path, rng: Random) -> str:
    """Put another kind of thing where the file `path` was, and return the name of that kind."""
    kinds = [
        "folder",
        "pipe",
        "device",
        "dangling link",
        "loop",
        "nothing",
        "empty",
        "of another kind",
        "link to a folder",
    ]
    kind = rng.choice(kinds if os.geteuid() == 0 else [*kinds, "unreadable"])
    content = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "dangling link":
        path.symlink_to(path.parent / "nowhere")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "link to a folder":
        path.symlink_to(path.parent)
    elif kind == "of another kind":
        path.write_bytes(rng.choice(OTHER_KINDS))
    elif kind == "unreadable":
        path.write_bytes(content)
        path.chmod(0)
    elif kind == "empty":
        path.touch()
    return kind


def damage(folder: Path, files: list[Path], rng: Random) -> str:
    """Damage or replace one of `files`, sometimes two. Return a sentence that says what was done."""
    done = []
    for path in rng.sample(files, 2 if len(files) > 1 and rng.random() < 0.1 else 1):
        name = path.relative_to(folder).as_posix()
        if rng.random() < 0.08:
            done.append(f"{name} is replaced: {put_in_place_of(path, rng)}")
        else:
            path.write_bytes(mutated(path.read_bytes(), path.suffix.lower(), rng))
            done.append(f"{name} is damaged")
    return ", ".join(done)


def copy_of(folder: Path, to: Path) -> Path:
    """Make a fresh copy of a valid input."""
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(folder, to, symlinks=True))
