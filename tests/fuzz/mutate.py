"""Ways to damage a file, chosen at random from a seeded generator: by its bytes, and by what its format means."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from diffusion_runtime import zips

Mutation = Callable[[bytes, Random], bytes]

CANARY = "fuzz-canary"
"""Whatever a hostile file runs makes a file of this name in the current folder."""
NUMBERS = (0, -1, 1, 3, 255, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**64, 10**30, -(10**30), 0.5, -0.0, 1e308)
TEXTS = ("", " ", "\0", "\ud800", "x" * 100_000, "../../outside", "/etc/passwd", "NaN", "1", "ﬀ", "[bold]", "\n")
WHOLE = (
    b"",
    b"\0",
    b"<!doctype html><html>404</html>",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
    b"\xff\xfe{\0}\0",
    b"\xef\xbb\xbf{}",
    b"PK\x05\x06" + bytes(18),
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(fuzz-canary) (w) file closefile\nshowpage\n",
)
DEEP = 100_000


def damaged(name: str, data: bytes, random: Random) -> bytes:
    """``data`` of a file called ``name``, damaged in one or a few ways that its format suggests."""
    ways = _ways(name)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        data = random.choice(ways)(data, random)
    return data


def _ways(name: str) -> Sequence[Mutation]:
    if name.endswith("weights/weight.bin"):
        return (*BYTES, words, words, words)
    by_suffix: dict[str, Sequence[Mutation]] = {
        ".json": (*[json_values] * 6, json_text, json_text, lines, *BYTES),
        ".txt": (lines, lines, *BYTES),
        ".yaml": (lines, lines, lines, yaml_text, *BYTES),
        ".mil": (*[mil_text] * 6, lines, *BYTES),
        ".safetensors": (*[safetensors_header] * 8, *BYTES),
        ".gguf": (*[words] * 8, *BYTES),
        ".mlmodel": (*[proto_fields] * 8, *BYTES),
        ".bin": (words, *BYTES),
        ".ckpt": (*[pickled] * 8, words, *BYTES),
        ".zip": (*[zipped] * 8, *BYTES),
        ".png": (*[png_chunks] * 8, *BYTES),
        ".npz": (zipped, *BYTES),
    }
    return by_suffix.get(Path(name).suffix, BYTES)


def flip(data: bytes, random: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 8, 64)) if changed else 0):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def cut(data: bytes, random: Random) -> bytes:
    return data[: random.randrange(len(data) + 1)]


def remove(data: bytes, random: Random) -> bytes:
    start = random.randrange(len(data) + 1)
    return data[:start] + data[start + random.choice((1, 4, 100, 4096)) :]


def insert(data: bytes, random: Random) -> bytes:
    start = random.randrange(len(data) + 1)
    return data[:start] + random.randbytes(random.choice((1, 4, 8, 1000))) + data[start:]


def repeat(data: bytes, random: Random) -> bytes:
    start = random.randrange(len(data) + 1)
    end = start + random.choice((8, 64, 1024))
    return data[:end] + data[start:]


def replace(_: bytes, random: Random) -> bytes:
    return random.choice(WHOLE)


def words(data: bytes, random: Random) -> bytes:
    """A number of 4 or 8 bytes becomes one that counts and offsets are afraid of, often near the beginning."""
    size = random.choice((4, 8))
    if len(data) < size:
        return data
    end = random.choice((64, 1024, len(data)))
    start = random.randrange(max(1, min(end, len(data) - size + 1)))
    value = random.choice(
        (0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, len(data), len(data) * 2, random.getrandbits(64))
    )
    return data[:start] + (value % (1 << 8 * size)).to_bytes(size, "little") + data[start + size :]


BYTES: tuple[Mutation, ...] = (flip, flip, cut, remove, insert, repeat, replace)


def nasty(random: Random, like: Any = None) -> Any:
    """A JSON value that readers do not expect where ``like`` stood."""
    others: list[Any] = [
        None,
        True,
        False,
        random.choice(NUMBERS),
        random.choice(TEXTS),
        [],
        {},
        [like],
        {"x": like},
        float("nan"),
        float("inf"),
        str(like),
        random.getrandbits(random.choice((8, 40, 200))),
    ]
    if isinstance(like, int) and not isinstance(like, bool):
        others += [like + 1, like - 1, -like, like * 2, like * 1000, like * 10**9, f"{like}.0", like // 2]
    if isinstance(like, float):
        others += [like + 1, -like, like * 1000, like / 1000, like * 1e300]
    if isinstance(like, int) and abs(like) < 2**53:
        others.append(float(like))
    if isinstance(like, list) and like:
        others += [like[:-1], like * 2, like * 5_000, list(reversed(like)), [*like, random.choice(like)]]
    if isinstance(like, str) and like:
        others += [like + "x", like.upper(), like[:-1], "../" + like, "/" + like, like + "\0", like * 300]
    return random.choice(others)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) below a JSON value."""
    if isinstance(value, dict):
        for key in value:
            yield value, key
            yield from _places(value[key])
    elif isinstance(value, list):
        for index, inner in enumerate(value[:200]):
            yield value, index
            yield from _places(inner)


def change_json(value: Any, random: Random) -> Any:
    places = list(_places(value))
    if not places or random.random() < 0.03:
        return nasty(random, value)
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        container, key = random.choice(places)
        try:
            way = random.random()
            if way < 0.75:
                container[key] = nasty(random, container[key])
            elif way < 0.9:
                del container[key]
            elif isinstance(container, dict):
                container[random.choice(TEXTS)] = container.pop(key)
            else:
                container.append(nasty(random))
        except (KeyError, IndexError):
            continue  # removed by the change before
    return value


def json_values(data: bytes, random: Random) -> bytes:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return flip(data, random)
    return _json(change_json(value, random))


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=True).encode()


def json_text(data: bytes, random: Random) -> bytes:
    """Text that parsers have trouble with: depth, digits, keys twice, constants."""
    deep = random.choice((100, 5_000, DEEP))
    parts = (
        b"[" * deep + b"]" * deep,
        b'{"a":' * deep + b"1" + b"}" * deep,
        b"[" * deep,
        b"9" * random.choice((400, 5_000, 100_000)),
        b"1e" + b"9" * 20,
        b"-Infinity",
        b'"\\ud800"',
        b'"\\u0000"',
        b"",
    )
    values = [match.span() for match in re.finditer(rb"(?<=: )[^,{\[\n}]+", data)]
    if not values or random.random() < 0.2:
        return random.choice(parts)
    start, end = random.choice(values)
    return data[:start] + random.choice(parts) + data[end:]


def lines(data: bytes, random: Random) -> bytes:
    rows = data.split(b"\n")
    index = random.randrange(len(rows))
    way = random.randrange(6)
    if way == 0:
        del rows[index]
    elif way == 1:
        rows.insert(index, rows[random.randrange(len(rows))])
    elif way == 2:
        rows[index] = b" ".join(reversed(rows[index].split(b" ")))
    elif way == 3:
        rows[index] = rows[index] * random.choice((2, 3000))
    elif way == 4:
        rows[index] = random.choice(TEXTS).encode(errors="surrogatepass")
    else:
        rows[index] = re.sub(rb"\d+", lambda _: str(random.choice(NUMBERS)).encode(), rows[index], count=1)
    return b"\n".join(rows)


def yaml_text(data: bytes, random: Random) -> bytes:
    parts = (
        b"a: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: &c [*b, *b, *b, *b]\nd: &d [*c, *c, *c, *c]\ne: [*d, *d, *d]\n",
        f"x: !!python/object/apply:os.system ['touch {CANARY}']\n".encode(),
        b"x: &x [*x]\n",
        b"[" * 5_000,
        b"{" * 5_000,
        b"- " * 3_000,
        b"model: 5\n",
        b"model:\n  params: []\n",
        b"? [a]\n: b\n",
        b"x: 2001-99-99\n",
        b"x: 0o" + b"7" * 5_000 + b"\n",
    )
    return random.choice((data, b"")) + random.choice(parts)


def mil_text(data: bytes, random: Random) -> bytes:
    """A token of MIL's text is replaced by another that stood elsewhere, a huge number, or nothing."""
    tokens = list(re.finditer(rb'"[^"\n]*"|[\w.+-]+|[^\s\w]', data))
    if not tokens:
        return data
    for _ in range(random.choice((1, 1, 3))):
        chosen, other = random.choice(tokens), random.choice(tokens)
        new = random.choice((
            other[0], b"", chosen[0] * 2, str(random.choice(NUMBERS)).encode(), b"nan", b"?", b'"\\xff"',
            b"(" * 5_000, b"tensor<fp16, [100000, 100000, 100000]>", b"fp64", b"1" * 5_000,
        ))  # fmt: skip
        data = data[: chosen.start()] + new + data[chosen.end() :]
        tokens = list(re.finditer(rb'"[^"\n]*"|[\w.+-]+|[^\s\w]', data[:200_000])) or [chosen]
    return data


def safetensors_header(data: bytes, random: Random) -> bytes:
    if len(data) < 8:
        return data
    (length,) = struct.unpack_from("<Q", data)
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError):
        return words(data, random)
    way = random.random()
    names = [name for name in header if name != "__metadata__"] if isinstance(header, dict) else []
    if way < 0.1:
        text = json_text(data[8 : 8 + length], random)
    elif way < 0.5 or not names:
        text = _json(change_json(header, random))
    else:
        for name in random.sample(names, min(len(names), random.choice((1, 1, 2, 50)))):
            _change_entry(header, name, random)
        text = _json(header)
    size = len(text) if random.random() < 0.95 else random.choice((0, 2**63, 2**64 - 1, len(text) + 1, len(data)))
    return struct.pack("<Q", size) + text + data[8 + length :]


def _change_entry(header: dict[str, Any], name: str, random: Random) -> None:
    entry = header[name]
    way = random.randrange(6)
    if not isinstance(entry, dict):
        header[name] = nasty(random, entry)
    elif way == 0:
        entry["dtype"] = random.choice(
            ("F64", "F32", "BF16", "I64", "I8", "U8", "BOOL", "C64", "F8_E4M3", "F4", "?", 5)
        )
    elif way == 1:
        entry["shape"] = nasty(random, entry.get("shape"))
    elif way == 2:
        entry["data_offsets"] = nasty(random, entry.get("data_offsets"))
    elif way == 3:
        header[random.choice((name + ".x", name.upper(), name.replace(".", "_"), *TEXTS))] = header.pop(name)
    elif way == 4:
        del header[name]
    elif isinstance(entry.get("shape"), list):
        entry["shape"] = [*entry["shape"], 1] if random.random() < 0.5 else list(reversed(entry["shape"]))


class _Runs:
    """Pickles to a program that calls something when it is loaded."""

    def __init__(self, call: tuple[Any, ...]) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def hostile_programs() -> list[bytes]:
    """Pickle programs that run something, never end, or take more memory than there is."""
    touch = f"touch {CANARY}"
    calls: list[tuple[Any, ...]] = [
        (os.system, (touch,)),
        (eval, (f"open({CANARY!r}, 'w')",)),
        (exec, (f"open({CANARY!r}, 'w')",)),
        (open, (CANARY, "w")),
    ]
    itself: dict[str, Any] = {}
    itself["state_dict"] = itself
    nested = b")" + b"2\x86" * 60  # a pair of twice the same pair of …: to hash it takes for ever
    return [
        *(pickle.dumps({"state_dict": _Runs(call)}, protocol=2) for call in calls),
        pickle.dumps(itself, protocol=2),
        b"\x80\x02}" + nested + b"K\x01s.",
        b"\x80\x02}X\x0a\x00\x00\x00state_dict}" + nested + b"K\x01ss.",
        b"\x80\x02" + b"(" * 100_000,
        b"\x80\x02" + b"]" * 100_000 + b".",
        b"\x80\x02}" + b"2" * 500_000 + b".",
        b"\x80\x04\x8d" + struct.pack("<Q", 2**62),
        b"\x80\x02cos\nsystem\nX" + struct.pack("<I", len(touch)) + touch.encode() + b"\x85R.",
        b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x08\x85R.",
        b"\x80\x02ccollections\nOrderedDict\n)Rq\x00h\x00h\x00s.",
    ]


def pickled(data: bytes, random: Random) -> bytes:
    """The program inside torch's zip is damaged, or replaced by a hostile one."""
    members = _members(data)
    if members is None:
        return random.choice(hostile_programs()) if random.random() < 0.3 else flip(data, random)
    program = next((name for name in members if name.endswith("data.pkl")), None)
    if program is None:
        return flip(data, random)
    way = random.random()
    if way < 0.3:
        members[program] = random.choice(hostile_programs())
    elif way < 0.4:
        sound = members[program].removesuffix(b".")
        hostile = random.choice(hostile_programs()).removesuffix(b".")
        members[program] = sound + b"U\x09callbacks" + hostile + b"s."
    elif way < 0.9:
        members[program] = random.choice((*BYTES, _pickle_numbers, _pickle_numbers))(members[program], random)
    else:
        del members[random.choice(list(members))]
    return _zip(members)


def _pickle_numbers(data: bytes, random: Random) -> bytes:
    """A number that the program pushes (a shape, a stride, an offset) becomes another."""
    places = [match.start() for match in re.finditer(rb"[KMJ]", data)]
    if not places:
        return data
    at = random.choice(places)
    size = {b"K": 1, b"M": 2, b"J": 4}[data[at : at + 1]]
    value = random.choice((0, -1, 2**31 - 1, -(2**31), random.getrandbits(31)))
    return data[:at] + b"J" + struct.pack("<i", value) + data[at + 1 + size :]


def _members(data: bytes) -> dict[str, bytes] | None:
    """The files in a zip by name; None where earlier damage has left none that can be read."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return {info.filename: archive.read(info) for info in archive.infolist()}
    except (*zips.DAMAGED, OSError):
        return None


def _zip(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, inner in members.items():
            archive.writestr(name, inner)
    return buffer.getvalue()


def zipped(data: bytes, random: Random) -> bytes:
    """Names that lead out, links, bombs, wrong sizes and sums; or one of the files inside is damaged."""
    members = _members(data)
    if members is None:
        return flip(data, random)
    if not members:
        return data
    if random.random() < 0.3:
        name = random.choice(list(members))
        members[name] = damaged(name, members[name], random)
        return _zip(members)
    buffer = io.BytesIO()
    victim = random.choice(list(members))
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, inner in members.items():
            info = zipfile.ZipInfo(_zip_name(name, random) if name == victim else name)
            if name == victim and random.random() < 0.3:
                info.external_attr = random.choice((0o120777 << 16, 0o010644 << 16, 0o060644 << 16, 0o4777 << 16))
            bomb = name == victim and random.random() < 0.1
            archive.writestr(info, bytes(50_000_000) if bomb else inner, zipfile.ZIP_DEFLATED)
    made = buffer.getvalue()
    return words(made, random) if random.random() < 0.2 else made


def _zip_name(name: str, random: Random) -> str:
    leading = ("../../outside", "/tmp/fuzz-outside", "..\\outside", "C:\\outside", "a/../../../outside")  # noqa: S108
    other = (
        name.upper(),
        name + "/",
        name + "/x",
        "x" * 300,
        "a/" * 100 + "b",
        "con",
        name.rpartition("/")[0],
        "\ud7ff",
    )
    return random.choice((*leading, *other, name))


def png_chunks(data: bytes, random: Random) -> bytes:
    """A chunk of a PNG is changed, with its sum put right; texts (the record) are changed as JSON."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        (size,) = struct.unpack_from(">I", data, at)
        chunks.append([data[at + 4 : at + 8], data[at + 8 : at + 8 + size]])
        at += 12 + size
    if not chunks:
        return flip(data, random)
    texts = [chunk for chunk in chunks if chunk[0] in (b"tEXt", b"iTXt", b"zTXt") and b"{" in chunk[1]]
    chunk = random.choice(texts) if texts and random.random() < 0.6 else random.choice(chunks)
    if b"{" in chunk[1] and chunk[0] in (b"tEXt", b"iTXt"):
        start = chunk[1].index(b"{")
        chunk[1] = chunk[1][:start] + random.choice((json_values, json_values, json_text, flip))(
            chunk[1][start:], random
        )
    else:
        way = random.choice((*BYTES, words, _large_size))
        chunk[1] = way(chunk[1], random)
    if random.random() < 0.1:
        random.shuffle(chunks)
    return data[:8] + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def _large_size(data: bytes, random: Random) -> bytes:
    return (
        struct.pack(">II", random.choice((0, 30_000, 2**31 - 1)), random.choice((0, 30_000, 2**31 - 1))) + data[8:]
    )


def proto_fields(data: bytes, random: Random) -> bytes:
    """A field somewhere in a Core ML model is cleared, repeated, or gets another value."""
    import importlib

    from google.protobuf.message import DecodeError

    try:
        model = importlib.import_module("coremltools.proto.Model_pb2").Model.FromString(data)
    except DecodeError:
        return flip(data, random)
    for _ in range(random.choice((1, 1, 3))):
        _change_message(model, random)
    made: bytes = model.SerializePartialToString()
    return made


def _change_message(message: Any, random: Random) -> None:
    """Walk down to a random depth and change a field there."""
    while True:
        fields = message.ListFields()
        if not fields:
            return
        field, value = random.choice(fields)
        inner = _messages(field, value)
        if inner and random.random() < 0.9:
            message = random.choice(inner)
            continue
        break
    way = random.random()
    repeated = hasattr(value, "__len__") and not isinstance(value, (str, bytes))
    if way < 0.25 or (inner and not repeated):
        message.ClearField(field.name)
    elif repeated and not hasattr(value, "keys"):
        if way < 0.6 and len(value):
            del value[random.randrange(len(value))]
        elif inner and len(value):
            value.append(value[random.randrange(len(value))])
        elif len(value):
            value[random.randrange(len(value))] = _other(value[0], random)
    elif repeated:
        key = random.choice(list(value))
        if random.random() < 0.5 or inner:
            del value[key]
        else:
            value[key] = _other(value[key], random)
    else:
        setattr(message, field.name, _other(value, random))


def _messages(field: Any, value: Any) -> list[Any]:
    if hasattr(value, "ListFields"):
        return [value]
    if hasattr(value, "keys"):
        return [inner for inner in value.values() if hasattr(inner, "ListFields")]
    if hasattr(value, "__len__") and not isinstance(value, (str, bytes)):
        return [inner for inner in value[:200] if hasattr(inner, "ListFields")]
    return []


def _other(value: Any, random: Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return random.choice((0, 1, 2**31 - 1, value + 1, max(0, value - 1), value * 2 % 2**31))
    if isinstance(value, float):
        return random.choice((0.0, float("nan"), float("inf"), -1.0, 1e30))
    if isinstance(value, bytes):
        return random.choice(BYTES)(value, random)
    texts = (
        "",
        value + "x",
        value[:-1],
        "@model_path/../../../outside",
        "/etc/passwd",
        "\0",
        value.upper(),
        "x" * 5_000,
    )
    return random.choice(texts)
