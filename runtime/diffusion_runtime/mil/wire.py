"""Protobuf's wire format, as far as it takes to keep what a parser loses: a field's own bytes and a map's order."""

from __future__ import annotations

from collections.abc import Iterator

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


def fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Each length-delimited field of a serialised message as (number, payload); other fields are passed over.

    Raises ValueError where ``data`` is not a whole message.
    """
    position = 0
    while position < len(data):
        # A field's number and, in the lowest three bits, how it is encoded.
        key, position = _varint(data, position)
        kind = key & 7
        if kind == _VARINT:
            _, position = _varint(data, position)
            continue
        if kind == _LENGTH:
            size, position = _varint(data, position)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind} at byte {position}")
        if position + size > len(data):
            raise ValueError(f"a field of {size} bytes at byte {position} of {len(data)}")
        if kind == _LENGTH:
            yield key >> 3, data[position : position + size]
        position += size


def payload(data: bytes, number: int) -> bytes:
    """The serialised submessage of field ``number``; pieces are joined, as protobuf merges them."""
    return b"".join(piece for found, piece in fields(data) if found == number)


def string_map(data: bytes, number: int) -> dict[str, str]:
    """A ``map<string, string>`` field in the order of the bytes; of a repeated key the last value counts."""
    pairs: dict[str, str] = {}
    for found, entry in fields(data):
        if found == number:
            # Protobuf sends a map as repeated messages of a key, field 1, and a value, field 2.
            pairs[payload(entry, 1).decode()] = payload(entry, 2).decode()
    return pairs


def varint_field(number: int, value: int) -> bytes:
    """Field ``number`` holding the non-negative integer ``value``."""
    return _encode(number << 3 | _VARINT) + _encode(value)


def message_field(number: int, message: bytes) -> bytes:
    """Field ``number`` holding a serialised message."""
    return _encode(number << 3 | _LENGTH) + _encode(len(message)) + message


def _encode(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    # 64 bits in groups of seven are ten bytes at most; more is damage, and would build a huge number.
    while position < len(data) and shift < 70:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError(f"a number that does not end before byte {position}")
