"""Attention: products around a softmax become one node; so do chunks of the query, and single heads.

Scores and weighted sum are read as einsums over named dimensions, so that it makes no difference which operand
comes first, what is transposed, or whether heads are a dimension, a batch, or split apart.
"""

from __future__ import annotations

import operator
import string
from dataclasses import dataclass
from typing import Any

from torch import fx

from diffusion_runtime.mil import fused
from diffusion_runtime.mil.match import drop_unused, only_user, operand, operation, others, put, scalar, shape_of
from diffusion_runtime.mil.ops import shaping


@dataclass(frozen=True, slots=True)
class Product:
    """A product of two tensors with a letter for each dimension; ``out`` are those of the result."""

    first: tuple[fx.Node, str]
    second: tuple[fx.Node, str]
    out: str


PEAK = "peak"
"""In the metadata of an ``attend`` node: by how much its scores, with whatever factors on the way, may exceed the
product of its operands."""


def fuse_attention(module: fx.GraphModule, masked: bool = True) -> None:
    """Every attention that follows the pattern becomes one ``attend`` node; where not ``masked``, only those whose
    scores nothing is added to."""
    for node in list(module.graph.nodes):
        if operation(node) == "softmax":
            _fuse_softmax(module, node, masked)
    drop_unused(module)
    for node in list(module.graph.nodes):  # a head's chunks come before the heads
        if operation(node) == "concat":
            _merge(module, node)
    drop_unused(module)
    for node in list(module.graph.nodes):
        if operation(node) == "attend":
            _join_heads(module, _fold_operands(module, node))
    drop_unused(module)


def fuse_plain_attention(module: fx.GraphModule) -> None:
    """`fuse_attention` of those without a mask, whose scores are known by the norms of queries and keys."""
    fuse_attention(module, masked=False)


def _fuse_softmax(module: fx.GraphModule, softmax: fx.Node, masked: bool) -> None:
    users = list(softmax.users)
    weighted = _product(users[0]) if len(users) == 1 else None
    scores, mask, scale = _scores(module, operand(softmax, "x"))
    similarity = _product(scores)
    shape = shape_of(softmax)
    if weighted is None or similarity is None or shape is None or (mask is not None and not masked):
        return
    k = similarity.out[int(operand(softmax, "axis", -1))]
    sides = [similarity.first, similarity.second]
    if k not in similarity.first[1] + similarity.second[1] or all(k in letters for _, letters in sides):
        return
    (key, key_letters), (query, query_letters) = sorted(sides, key=lambda side: k not in side[1])
    weights_first = weighted.first[0] is softmax
    weights_letters, (value, value_letters) = (
        (weighted.first[1], weighted.second) if weights_first else (weighted.second[1], weighted.first)
    )
    # The second product names dimensions anew: translate, by position in the scores.
    names = dict(zip(weights_letters, similarity.out, strict=True))
    spare = (letter for letter in string.ascii_uppercase if letter not in similarity.out + key_letters)
    for letter in value_letters:
        names.setdefault(letter, next(spare))
    value_letters, out = ("".join(names[letter] for letter in word) for word in (value_letters, weighted.out))
    roles = _roles(query_letters, key_letters, value_letters, similarity.out, out, k)
    if roles is None:
        return
    table = {ord(letter): role for letter, role in roles.items()}
    labels = f"{query_letters},{key_letters},{value_letters}->{out}".translate(table)
    mask_node = _mask(module, softmax, mask, similarity.out.translate(table))
    arguments = {"query": query, "key": key, "value": value, "labels": labels, "scale": scale, "mask": mask_node}
    put(module, users[0], fused.attend, arguments, "attend").meta[PEAK] = max(1.0, abs(scale))


def _scores(module: fx.GraphModule, node: Any) -> tuple[Any, Any, float]:
    """The product behind optional additions of a mask and scaling: (product, mask, scale)."""
    mask, scale = None, 1.0
    if operation(node) == "add":
        for side in (operand(node, "x"), operand(node, "y")):
            other = others(node, side)[0]
            if _is_product(_unscaled(module, side)[0]) and not _is_product(_unscaled(module, other)[0]):
                mask, node = other, side
                break
    node, scale = _unscaled(module, node)
    return node, mask, scale


def _unscaled(module: fx.GraphModule, node: Any) -> tuple[Any, float]:
    """A node and the constant by which it is multiplied."""
    if operation(node) == "mul":
        for side in (operand(node, "x"), operand(node, "y")):
            factor = scalar(module, side)
            if factor is not None:
                return others(node, side)[0], factor
    if operation(node) == "real_div":
        divisor = scalar(module, operand(node, "y"))
        if divisor:
            return operand(node, "x"), 1 / divisor
    return node, 1.0


def _is_product(node: Any) -> bool:
    return operation(node) in ("matmul", "einsum")


def _product(node: Any) -> Product | None:
    if operation(node) == "einsum":
        values, equation = operand(node, "values"), str(operand(node, "equation")).replace(" ", "")
        inputs, _, out = equation.partition("->")
        words = inputs.split(",")
        if len(values) != 2 or len(words) != 2 or not out or "." in equation:
            return None
        if any(len(set(word)) != len(word) for word in (*words, out)):
            return None
        if not _sizes_agree(values, words):
            return None
        return Product((values[0], words[0]), (values[1], words[1]), out)
    if operation(node) != "matmul":
        return None
    x, y = operand(node, "x"), operand(node, "y")
    x_shape, y_shape = shape_of(x), shape_of(y)
    if x_shape is None or y_shape is None or len(x_shape) != len(y_shape) or not 3 <= len(x_shape) <= 6:
        return None
    batch = string.ascii_lowercase[: len(x_shape) - 2]
    x_word = batch + ("zy" if operand(node, "transpose_x") else "yz")
    y_word = batch + ("xz" if operand(node, "transpose_y") else "zx")
    if not _sizes_agree((x, y), (x_word, y_word)):
        return None
    return Product((x, x_word), (y, y_word), batch + "yx")


def _sizes_agree(values: Any, words: Any) -> bool:
    """No dimension is broadcast: each letter stands for one size."""
    sizes: dict[str, int] = {}
    for value, word in zip(values, words, strict=True):
        shape = shape_of(value)
        if shape is None or len(shape) != len(word):
            return False
        if any(sizes.setdefault(letter, size) != size for letter, size in zip(word, shape, strict=True)):
            return False
    return True


def _roles(query: str, key: str, value: str, scores: str, out: str, k: str) -> dict[str, str] | None:
    """Names for the letters: q, k, c, d, and batch letters that are none of these; None if it is no attention."""
    contracted = [letter for letter in key if letter in query and letter not in scores]
    queries = [letter for letter in query if letter not in key]
    channels = [letter for letter in value if letter not in scores]
    batch = [letter for letter in scores if letter not in (k, *queries)]
    if len(contracted) != 1 or len(queries) != 1 or len(channels) != 1 or k not in value or k in out:
        return None
    expected = (
        {*batch, *queries, *contracted},
        {*batch, k, *contracted},
        {*batch, k, *channels},
        {*batch, *queries, *channels},
    )
    if any(set(word) != letters for word, letters in zip((query, key, value, out), expected, strict=True)):
        return None
    named = {contracted[0]: "c", queries[0]: "q", channels[0]: "d", k: "k"}
    free = iter("abefghij")
    return {**named, **{letter: next(free) for letter in batch}}


def _mask(module: fx.GraphModule, before: fx.Node, mask: Any, scores: str) -> fx.Node | None:
    """The mask as (*batch, queries, keys)."""
    if mask is None:
        return None
    shape = shape_of(mask)
    batch = "".join(letter for letter in scores if letter not in "qk")
    order = [scores.index(letter) for letter in batch + "qk"]
    user: fx.Node
    for user in mask.users:  # made for another head, so it comes before
        if user.target is shaping.transpose and operand(user, "perm") == order and "mil" not in user.meta:
            return user
    with module.graph.inserting_before(before):
        if shape is not None and len(shape) < len(scores):
            axes = list(range(len(scores) - len(shape)))
            mask = module.graph.call_function(shaping.expand_dims, (), {"x": mask, "axes": axes})
        return module.graph.call_function(shaping.transpose, (), {"x": mask, "perm": order})


# --- chunks and heads


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of ``source`` along ``axis``."""

    source: fx.Node
    axis: int
    start: int
    stop: int


def _merge(module: fx.GraphModule, concat: fx.Node) -> None:
    """Attention of each part, joined, becomes attention of the whole: parts of the query, or single heads."""
    parts = operand(concat, "values")
    if len(parts) < 2 or any(operation(part) != "attend" for part in parts) or operand(concat, "interleave"):
        return
    first: dict[str, Any] = dict(parts[0].kwargs)
    if any(operand(part, name) != first[name] for part in parts for name in ("labels", "scale", "mask")):
        return
    words, out = str(first["labels"]).split("->")
    query, key, value = words.split(",")
    letter = out[int(operand(concat, "axis"))]
    merged: dict[str, Any] = dict(first)
    if letter == "q":
        if any(operand(part, name) != first.get(name) for part in parts for name in ("key", "value", "heads")):
            return
        merged["query"] = _whole([operand(part, "query") for part in parts], query.index("q"))
        if merged["query"] is None or first["mask"] is not None:
            return
    elif letter == "d" and all(operand(part, "heads", 1) == 1 for part in parts):
        if not _one_head(parts[0], out):
            return
        for name, word, role in (("query", query, "c"), ("key", key, "c"), ("value", value, "d")):
            merged[name] = _whole([operand(part, name) for part in parts], word.index(role), equal=True)
            if merged[name] is None:
                return
        merged["heads"] = len(parts)
    else:
        return
    put(module, concat, fused.attend, merged, "attend").meta[PEAK] = max(part.meta[PEAK] for part in parts)


def _one_head(attend: fx.Node, out: str) -> bool:
    shape = shape_of(attend)
    batch = [place for place, letter in enumerate(out) if letter not in "qd"]
    return shape is not None and all(shape[place] == 1 for place in batch[1:])


def _whole(parts: list[Any], axis: int, equal: bool = False) -> fx.Node | None:
    """The tensor of which ``parts`` are, in this order and without gaps, all parts along ``axis``."""
    pieces = [_piece(part) for part in parts]
    position = 0
    for piece in pieces:
        if piece is None or pieces[0] is None or piece.source is not pieces[0].source or piece.axis != axis:
            return None
        if piece.start != position or (equal and piece.stop - piece.start != pieces[0].stop):
            return None
        position = piece.stop
    shape = shape_of(pieces[0].source) if pieces[0] is not None else None
    return pieces[0].source if pieces[0] is not None and shape is not None and shape[axis] == position else None


def _piece(node: Any) -> Piece | None:
    if not isinstance(node, fx.Node):
        return None
    if node.target is operator.getitem:
        split, index = node.args
        if not isinstance(split, fx.Node) or operation(split) != "split" or not isinstance(index, int):
            return None
        source, shape = operand(split, "x"), shape_of(node)
        if shape is None:
            return None
        axis = operand(split, "axis") % len(shape)
        lengths = _split_sizes(split, source, axis)
        return Piece(source, axis, sum(lengths[:index]), sum(lengths[: index + 1])) if lengths else None
    return _sliced(node) if operation(node) == "slice_by_index" else None


def _split_sizes(split: fx.Node, source: Any, axis: int) -> list[int]:
    sizes = operand(split, "split_sizes")
    if isinstance(sizes, (list, tuple)):
        return [int(size) for size in sizes]
    shape, count = shape_of(source), operand(split, "num_splits")
    if shape is None or not isinstance(count, int):
        return []
    return [shape[axis] // count] * count


def _sliced(node: fx.Node) -> Piece | None:
    source = operand(node, "x")
    shape, result = shape_of(source), shape_of(node)
    begin, end = operand(node, "begin"), operand(node, "end")
    if shape is None or result is None or len(shape) != len(result):
        return None
    if not isinstance(begin, (list, tuple)) or not isinstance(end, (list, tuple)):
        return None
    changed = [axis for axis, (size, left) in enumerate(zip(shape, result, strict=True)) if size != left]
    if len(changed) != 1:
        return None
    axis = changed[0]
    none = [False] * len(shape)
    no_begin, stride = operand(node, "begin_mask") or none, operand(node, "stride") or [1] * len(shape)
    if any(step != 1 for step in stride):
        return None
    start = 0 if no_begin[axis] else int(begin[axis])
    start += shape[axis] if start < 0 else 0
    return Piece(source, axis, start, start + result[axis])


# --- operands


def _fold_operands(module: fx.GraphModule, node: fx.Node) -> fx.Node:
    """A constant factor of query or key goes into the scale; a transpose of an operand goes into the labels."""
    words, out = str(operand(node, "labels")).split("->")
    labels = dict(zip(("query", "key", "value"), words.split(","), strict=True))
    arguments: dict[str, Any] = dict(node.kwargs)
    for name in labels:
        changed = True
        while changed:
            changed = False
            x = arguments[name]
            inner, factor = _unscaled(module, x) if name != "value" else (x, 1.0)
            if inner is not x and shape_of(inner) == shape_of(x):
                arguments[name], arguments["scale"], changed = inner, arguments["scale"] * factor, True
                node.meta[PEAK] *= max(1.0, abs(factor))
            elif operation(x) == "transpose":
                perm = [int(axis) % len(labels[name]) for axis in operand(x, "perm")]
                word = [""] * len(perm)
                for letter, axis in zip(labels[name], perm, strict=True):
                    word[axis] = letter
                labels[name], arguments[name], changed = "".join(word), operand(x, "x"), True
    arguments["labels"] = f"{','.join(labels.values())}->{out}"
    return put(module, node, fused.attend, arguments, "attend")


def _join_heads(module: fx.GraphModule, node: fx.Node) -> None:
    """Heads that a reshape parts and another joins again stay together in the channels. The weighted values that
    are not seen any more are means of values that are."""
    words, out = str(operand(node, "labels")).split("->")
    if words != "abcq,abck,abdk" or operand(node, "heads", 1) != 1 or operand(node, "mask") is not None:
        return
    parted = [operand(node, name) for name in ("query", "key", "value")]
    end: Any = only_user(node)
    if out == "abqd" and operation(end) == "transpose" and list(operand(end, "perm")) == [0, 1, 3, 2]:
        end = only_user(end)
    elif out != "abdq":
        return
    if operation(end) != "reshape" or any(operation(one) != "reshape" for one in parted):
        return
    if any(len(_sizes(one)) != 4 for one in parted):
        return
    (batch, heads, _, queries), width = _sizes(parted[0]), _sizes(parted[2])[2]
    joined = all(_sizes(operand(one, "x")) == _together(_sizes(one)) for one in parted)
    if joined and _sizes(end) == (batch, heads * width, 1, queries):
        whole = {name: operand(one, "x") for name, one in zip(("query", "key", "value"), parted, strict=True)}
        arguments = {**node.kwargs, **whole, "labels": "acbq,acbk,adbk->adbq", "heads": heads}
        put(module, end, fused.attend, arguments, "attend").meta[PEAK] = node.meta[PEAK]


def _together(sizes: tuple[int, ...]) -> tuple[int, ...]:
    batch, heads, channels, length = sizes
    return (batch, heads * channels, 1, length)


def _sizes(node: Any) -> tuple[int, ...]:
    return shape_of(node) or ()
