"""What each kind of layer does to a weight and to a bias. All arithmetic is in float32.

LoRA: Hu et al. 2021 (arXiv 2106.09685); LoHa: Hyeon-Woo et al. 2021 (2108.06098); LoKr: Yeh et al. 2023
(2309.14859); DoRA: Liu et al. 2024 (2402.09353); (IA)^3: Liu et al. 2022 (2205.05638).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

Parts = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Kind:
    """``needs``: of each entry, one of the sets of parts must be there. ``may``: what can be there as well.
    ``product`` is what is added to the weight, before any scale; None where nothing is. ``rank``: by which alpha is
    divided, None where the parts have none. Of ``together``, all or none are there."""

    name: str
    needs: Sequence[Sequence[frozenset[str]]]
    may: frozenset[str] = frozenset()
    product: Callable[[Parts], torch.Tensor] | None = None
    rank: Callable[[Parts], int | None] = lambda _: None
    together: frozenset[str] = frozenset()

    def own(self) -> frozenset[str]:
        """The parts that no other kind has."""
        return frozenset().union(*(choice for entry in self.needs for choice in entry))

    def missing(self, parts: Parts) -> list[str]:
        """Of every entry of which no set is there, what the set that is nearest lacks."""
        lacking = []
        for entry in self.needs:
            nearest = min(entry, key=lambda choice: (not choice & parts.keys(), len(choice - parts.keys())))
            lacking += sorted(nearest - parts.keys())
        return lacking + (sorted(self.together - parts.keys()) if self.together & parts.keys() else [])


@dataclass(frozen=True, slots=True)
class Layer:
    """What a file has for one layer. ``names`` are its tensors' names by part, ``scale`` is alpha / rank;
    ``on_input``: whether (IA)^3 scales what goes into the module."""

    path: Path
    subfolder: str
    module: str
    kind: Kind
    parts: Parts
    names: Mapping[str, str]
    scale: float = 1.0
    on_input: bool = False

    @property
    def title(self) -> str:
        """The name of its first tensor that counts, for messages."""
        return next(name for part, name in self.names.items() if part != "alpha")

    def targets(self) -> tuple[str, ...]:
        """ "weight", "bias" or both: what it changes of its module."""
        bias = bool(_BIASES & self.parts.keys()) or ("ia3_l" in self.parts and not self.on_input)
        weight = self.kind.product is None or not self.parts.keys() <= _BIASES
        return (*(("weight",) * weight), *(("bias",) * bias))

    def optional(self, target: str) -> bool:
        """Whether the module may lack the target: (IA)^3 scales a bias where there is one."""
        return target == "bias" and "ia3_l" in self.parts

    def change(self, target: str, value: torch.Tensor, strength: float) -> torch.Tensor:
        """``value`` (float32, the module's weight or bias) as this layer makes it. Raises ValueError where the
        parts do not fit each other or the value."""
        try:
            changed = self._bias(value, strength) if target == "bias" else self._weight(value, strength)
        except (RuntimeError, IndexError) as error:  # torch's words for shapes that do not fit
            raise ValueError("its tensors do not fit each other") from error
        return changed

    def _weight(self, value: torch.Tensor, strength: float) -> torch.Tensor:
        if self.kind.product is None:
            return value * self._factors(value, strength)
        if "new_weight" in self.parts:
            value = value + strength * (_fitting(self.parts["new_weight"].float(), value) - value)
            if self.parts.keys() <= {"new_weight", "new_bias"}:
                return value
        delta = _fitting(self.scale * self.kind.product(self.parts), value)
        if "magnitude" in self.parts:
            changed = value + strength * delta
            return changed * _over_norm(self.parts["magnitude"], changed, outputs=True)
        # LyCORIS' DoRA is of the weight with the whole update in it, and only its factor is faded by the strength.
        if "dora_scale" in self.parts:
            changed, magnitude = value + delta, self.parts["dora_scale"]
            outputs = magnitude.ndim == 1 or magnitude.shape[0] == value.shape[0]
            return changed * (1 + strength * (_over_norm(magnitude, changed, outputs) - 1))
        return value + strength * delta

    def _bias(self, value: torch.Tensor, strength: float) -> torch.Tensor:
        if "ia3_l" in self.parts:
            return value * (1 + strength * (_fitting(self.parts["ia3_l"].float().flatten(), value) - 1))
        if "new_bias" in self.parts:
            value = value + strength * (_fitting(self.parts["new_bias"].float(), value) - value)
        for name, scale in (("bias", self.scale), ("diff_b", 1.0)):
            if name in self.parts:
                return value + strength * scale * _fitting(self.parts[name].float(), value)
        return value

    def _factors(self, value: torch.Tensor, strength: float) -> torch.Tensor:
        """Of (IA)^3, for every input or output: LyCORIS' are about 0, peft's about 1."""
        vector = self.parts["ia3"].float() if "ia3" in self.parts else self.parts["ia3_l"].float() - 1
        channels = value.shape[1 if self.on_input else 0]
        if vector.numel() != channels:
            raise ValueError(f"it is for {vector.numel()} channels, not {channels}")
        ones = [1] * (value.ndim - 1)
        return 1 + strength * vector.reshape([1, -1, *ones[1:]] if self.on_input else [-1, *ones])


def _fitting(delta: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """``delta`` in the value's shape: a linear layer's may be a 1x1 convolution's, kernels may be flattened."""
    same = delta.shape[:1] == value.shape[:1] and delta.numel() == value.numel()
    if not same or (delta.ndim == value.ndim and delta.shape != value.shape):
        raise ValueError(f"it belongs to a weight of shape {_without_point(delta.shape)}")
    return delta.reshape(value.shape)


def _without_point(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape[:2]) if math.prod(shape[2:]) == 1 else tuple(shape)


def _over_norm(magnitude: torch.Tensor, weight: torch.Tensor, outputs: bool) -> torch.Tensor:
    """DoRA's magnitude over the norm of what belongs to one output (or, in LyCORIS' older files, one input)."""
    axis = 0 if outputs else 1
    others = [dimension for dimension in range(weight.ndim) if dimension != axis]
    norm: torch.Tensor = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
    if magnitude.numel() != weight.shape[axis]:
        raise ValueError(f"its magnitudes are {magnitude.numel()}, not {weight.shape[axis]}")
    # as LyCORIS and against division by zero: a row of zeros stays one
    return magnitude.float().reshape(norm.shape) / (norm + torch.finfo(torch.float32).eps)


def _lora(parts: Parts) -> torch.Tensor:
    """up @ down, over the kernel of down or of the Tucker core ``mid`` (rank, rank, …kernel), which up and down act
    on from both sides. LyCORIS' extraction keeps the largest of what is left as sparse values."""
    up, down = parts["up"].float(), parts["down"].float()
    if math.prod(up.shape[2:]) != 1:
        raise ValueError("its tensors do not fit each other")
    if "mid" in parts:
        product = _tucker(parts["mid"], up.flatten(1).T, down.flatten(1))
    else:
        product = (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])
    if "bias_values" not in parts:
        return product
    rows, columns = parts["bias_indices"].long()
    rest = torch.zeros_like(product).flatten(1)
    return product + rest.index_put((rows, columns), parts["bias_values"].float()).reshape(product.shape)


def _whole(parts: Parts) -> torch.Tensor:
    return parts["new_weight"].float()


def _embedding(parts: Parts) -> torch.Tensor:
    return (parts["embedding_up"].float() @ parts["embedding_down"].float()).T


def _tucker(core: torch.Tensor, out: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    """A kernel of a core (rank, rank, …kernel), ``out`` (rank, outputs) and ``into`` (rank, inputs)."""
    return torch.einsum("pq...,po,qi->oi...", core.float(), out.float(), into.float())


def _loha(parts: Parts) -> torch.Tensor:
    """The elementwise product of two products of low rank."""

    def half(number: int) -> torch.Tensor:
        out, into = parts[f"hada_w{number}_a"], parts[f"hada_w{number}_b"]
        if f"hada_t{number}" in parts:
            return _tucker(parts[f"hada_t{number}"], out, into)
        return out.float() @ into.float().flatten(1)

    return half(1) * half(2)


def _lokr(parts: Parts) -> torch.Tensor:
    """The Kronecker product of two matrices, of which the second may have a kernel; each may be of low rank."""

    def factor(number: int) -> torch.Tensor:
        if f"lokr_w{number}" in parts:
            return parts[f"lokr_w{number}"].float()
        out, into = parts[f"lokr_w{number}_a"], parts[f"lokr_w{number}_b"]
        if f"lokr_t{number}" in parts:
            return _tucker(parts[f"lokr_t{number}"], out, into)
        return (out.float() @ into.float().flatten(1)).reshape(out.shape[0], *into.shape[1:])

    first, second = factor(1), factor(2)
    return torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - first.ndim)), second.contiguous())


def _lokr_rank(parts: Parts) -> int | None:
    return next((len(parts[name]) for name in ("lokr_w2_b", "lokr_w1_b") if name in parts), None)


def _one(*names: str) -> tuple[frozenset[str], ...]:
    return (frozenset(names),)


_BIASES = frozenset({"bias", "diff_b", "new_bias"})
_SCALED = frozenset({"alpha", "dora_scale", "magnitude", "new_weight"}) | _BIASES
KINDS: Sequence[Kind] = (
    Kind(
        "LoRA",
        [_one("down", "up")],
        _SCALED | {"mid", "bias_indices", "bias_values", "bias_size"},
        _lora,
        lambda parts: parts["down"].shape[0],
        frozenset({"bias_indices", "bias_values", "bias_size"}),
    ),
    Kind(
        "LoRA of an embedding",
        [_one("embedding_down", "embedding_up")],
        frozenset({"alpha", "new_weight"}),
        _embedding,
        lambda parts: parts["embedding_down"].shape[0],
    ),
    Kind(
        "LoHa",
        [_one("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")],
        _SCALED | {"hada_t1", "hada_t2"},
        _loha,
        lambda parts: parts["hada_w1_b"].shape[0],
        frozenset({"hada_t1", "hada_t2"}),
    ),
    Kind(
        "LoKr",
        [(*_one(f"lokr_w{number}"), *_one(f"lokr_w{number}_a", f"lokr_w{number}_b")) for number in (1, 2)],
        _SCALED | {"lokr_t2"},
        _lokr,
        _lokr_rank,
    ),
    Kind("(IA)^3", [_one("ia3", "on_input")], frozenset({"alpha"})),
    Kind("(IA)^3 of peft", [_one("ia3_l")]),
    Kind(
        "difference",
        [(*_one("diff"), *_one("diff_b"))],
        frozenset({"diff", "diff_b", "alpha"}),
        lambda parts: parts["diff"].float(),
    ),
    Kind("replacement", [(*_one("new_weight"), *_one("new_bias"))], frozenset({"new_weight", "new_bias"}), _whole),
)
"""The last ones' parts may stand in the others as well."""


def kind_of(parts: Parts) -> Kind | None:
    """The kind of a layer: the first that has one of its parts for its own."""
    return next((kind for kind in KINDS if kind.own() & parts.keys()), None)
