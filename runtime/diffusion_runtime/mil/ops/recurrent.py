"""Recurrent layers over (sequence, batch, features)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_runtime.errors import UnsupportedError
from diffusion_runtime.mil.ops.registry import mil_op

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": F.relu,
    "linear": torch.clone,
}
Activation = Literal["sigmoid", "tanh", "relu", "linear"]


@mil_op("lstm")
def lstm(
    x: Tensor,
    initial_h: Tensor,
    initial_c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    peephole: Tensor | None = None,
    weight_ih_back: Tensor | None = None,
    weight_hh_back: Tensor | None = None,
    bias_back: Tensor | None = None,
    peephole_back: Tensor | None = None,
    direction: Literal["forward", "reverse", "bidirectional"] = "forward",
    output_sequence: bool = False,
    recurrent_activation: Activation = "sigmoid",
    cell_activation: Activation = "tanh",
    activation: Activation = "tanh",
    clip: float | None = None,
) -> tuple[Tensor, ...]:
    """Outputs (sequence or 1, batch, hidden), last hidden and last cell state (batch, hidden); of two directions
    side by side. Weights hold the input, forget, output and cell gate, in this order."""
    if peephole is not None or peephole_back is not None or clip is not None:
        raise UnsupportedError("lstm: peephole and clip are not covered")
    activations = tuple(_ACTIVATIONS[name] for name in (recurrent_activation, cell_activation, activation))
    width = weight_hh.shape[1]
    first = _lstm_pass(
        x,
        (initial_h[:, :width], initial_c[:, :width]),
        (weight_ih, weight_hh, bias),
        activations,
        direction == "reverse",
    )
    passes = [first]
    if direction == "bidirectional":
        if weight_ih_back is None or weight_hh_back is None:
            raise UnsupportedError("lstm: bidirectional without weights for the way back is not covered")
        weights = (weight_ih_back, weight_hh_back, bias_back)
        passes.append(_lstm_pass(x, (initial_h[:, width:], initial_c[:, width:]), weights, activations, True))
    hidden = torch.cat([item[1] for item in passes], -1)
    sequence = torch.cat([item[0] for item in passes], -1) if output_sequence else hidden.unsqueeze(0)
    return sequence, hidden, torch.cat([item[2] for item in passes], -1)


def _lstm_pass(
    x: Tensor,
    state: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor, Tensor | None],
    activations: tuple[Callable[[Tensor], Tensor], ...],
    backwards: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    weight_ih, weight_hh, bias = weights
    gate, cell, output = activations
    hidden, memory = state
    steps = list(F.linear(x, weight_ih, bias).unbind(0))
    outputs = []
    for step in reversed(steps) if backwards else steps:
        i, f, o, z = (step + F.linear(hidden, weight_hh)).chunk(4, -1)
        memory = gate(f) * memory + gate(i) * cell(z)
        hidden = gate(o) * output(memory)
        outputs.append(hidden)
    return torch.stack(outputs[::-1] if backwards else outputs), hidden, memory
