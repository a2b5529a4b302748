"""Whose interface converted models have: what their inputs, outputs and files are called.

Components are built with the names that Apple's clients know (`components`). A layout changes a component's graph
on its way out, the reference that it is verified against included; everything else works on whatever comes out.
To add one: a member of `diffusion_runtime.families.Layout`, and an entry here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.components.component import Component, Graph, Shape
from diffusion_convert.options import ConvertOptions
from diffusion_runtime.errors import InputError
from diffusion_runtime.families import UNETS, AttentionKind, Layout, package_name
from diffusion_runtime.folding import Folding


@dataclass(frozen=True, slots=True)
class PortLayout:
    """What is other about an input: its name, its element type (None: the component's own), and its axes: ``shape``
    gives its shape for the component's own, ``back`` its values as the component takes them, ``there`` the same
    values as this layout has them."""

    name: str
    dtype: str | None = None
    shape: Callable[[tuple[int, ...]], tuple[int, ...]] = lambda shape: shape
    back: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    there: Callable[[np.ndarray], np.ndarray] = lambda array: array


@dataclass(frozen=True, slots=True)
class Interface:
    """A component's inputs and outputs that are other than its own; None leaves an output out."""

    inputs: Mapping[str, PortLayout] = field(default_factory=dict)
    outputs: Mapping[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class About:
    """``components`` and ``families``: what the layout has, None: all. ``file_name``: of a component's package,
    without its suffix. ``compiled``: its apps read compiled models; ``chunks``: and a UNet in two.
    ``sizes``: and models of several sizes of pictures.
    ``foldings``: those that make sense to its apps."""

    file_name: Callable[[Checkpoint, Component, AttentionKind, Shape, ConvertOptions], str]
    components: Mapping[str, Interface] | None = None
    families: tuple[str, ...] | None = None
    compiled: bool = True
    chunks: bool = True
    sizes: bool = True
    foldings: frozenset[Folding] = frozenset(Folding)


def laid_out(component: Component, layout: Layout) -> Component:
    """``component`` with the interface of ``layout``."""
    interface = (LAYOUTS[layout].components or {}).get(component.name)
    if interface is None:
        return component

    def build(checkpoint: Checkpoint, attention: AttentionKind | None, shape: Shape) -> Graph:
        return _laid_out(component.build(checkpoint, attention, shape), interface)

    return replace(component, build=build)


def check(checkpoint: Checkpoint, options: ConvertOptions) -> None:
    """Raises InputError for what the layout that is asked for does not have."""
    about, name = LAYOUTS[options.layout], f"--layout {options.layout.value}"
    if about.families is not None and checkpoint.family not in about.families:
        raise InputError(
            f"{name}: its apps cannot run {checkpoint.family}, but {', '.join(about.families)}; convert without it"
        )
    if options.chunk_unet and not about.chunks:
        raise InputError(f"{name} and --chunk-unet: its apps do not run a UNet in two; leave one of them out")
    added = {"--ip-adapter": options.ip_adapters, "--t2i-adapter": options.t2i_adapters}
    if about.components is not None and (given := [option for option, values in added.items() if values]):
        raise InputError(f"{name} and {given[0]}: its apps do not give pictures to a UNet; leave one of them out")
    if len(options.sizes) > 1 and not about.sizes:
        raise InputError(
            f"{name} and several sizes: its apps find a model by the size in its name; give one --size"
        )
    if about.components is not None:
        idle = [part for part in options.components if part not in about.components]
        if idle:
            raise InputError(f"{name} has no {idle[0]}; it has {', '.join(about.components)}")


def has(layout: Layout, component: str) -> bool:
    """Whether the layout has this component."""
    known = LAYOUTS[layout].components
    return known is None or component in known


class LaidOut(nn.Module):
    """``module`` behind another interface."""

    def __init__(
        self, module: nn.Module, back: Sequence[Callable[[torch.Tensor], torch.Tensor]], kept: Sequence[int]
    ):
        super().__init__()
        self.module = module
        self._back, self._kept = tuple(back), tuple(kept)

    def forward(self, *given: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        found = self.module(*(back(tensor) for back, tensor in zip(self._back, given, strict=True)))
        if not isinstance(found, tuple):
            return found  # type: ignore[no-any-return]
        kept = tuple(found[index] for index in self._kept)
        return kept if len(kept) > 1 else kept[0]


def _laid_out(graph: Graph, interface: Interface) -> Graph:
    changes = [interface.inputs.get(port.name, PortLayout(port.name)) for port in graph.inputs]
    inputs = tuple(
        replace(port, name=change.name, shape=change.shape(port.shape), dtype=change.dtype or port.dtype)
        for port, change in zip(graph.inputs, changes, strict=True)
    )
    names = [interface.outputs.get(port.name, port.name) for port in graph.outputs]
    kept = [index for index, name in enumerate(names) if name is not None]
    outputs = tuple(replace(graph.outputs[index], name=str(names[index])) for index in kept)

    def sample(seed: int) -> Mapping[str, np.ndarray]:
        drawn = graph.sample(seed)
        return {
            port.name: np.ascontiguousarray(change.there(drawn[own.name])).astype(port.dtype)
            for own, port, change in zip(graph.inputs, inputs, changes, strict=True)
        }

    return replace(
        graph,
        module=LaidOut(graph.module, [change.back for change in changes], kept).eval(),
        inputs=inputs,
        outputs=outputs,
        sample=sample,
        exact=tuple(f"module.{name}" for name in graph.exact),
    )


# --- Apple's


def _apple_name(checkpoint: Checkpoint, component: Component, *_: object) -> str:
    """Folders tell attentions and sizes apart."""
    return package_name(checkpoint.name, component.name)


# --- ComfyUI-CoreMLSuite 2.x's, which is that of the package coreml-diffusion

_OF_PICTURES = ("vae_decoder", "vae_encoder")


def _comfyui_name(
    checkpoint: Checkpoint, component: Component, attention: AttentionKind, shape: Shape, options: ConvertOptions
) -> str:
    """Its nodes look for a converted model by this name before they convert it themselves."""
    stem, loras = _stem(checkpoint.name.replace("/", "_")), sorted(_stem(one.path.name) for one in options.loras)
    bits = component.bits(options)
    quantized = "_qmixed" if component.mixed(options) else f"_q{bits}" if bits is not None else ""
    size = f"{shape.width}x{shape.height}"
    if component.name in UNETS:
        steered = ["cn"] * (component.name != UNETS[0])
        parts = [stem, *loras, f"{shape.batch_size}x{size}", *steered, attention.about.mark or attention.value]
    elif component.name in _OF_PICTURES:
        parts = [stem, component.name, f"1x{size}"]
    else:
        parts = [stem, component.name, "1"]
    return ("_".join(parts) + quantized).replace(" ", "_")


def _stem(name: str) -> str:
    """Up to the first dot, whatever follows."""
    return Path(name).name.split(".")[0]


_STATES = PortLayout(
    "encoder_hidden_states",
    shape=lambda shape: (shape[0], shape[3], shape[1]),
    back=lambda states: states.transpose(1, 2).unsqueeze(2),
    there=lambda states: states[:, :, 0].transpose(0, 2, 1),
)
_TOKENS = {"input_ids": PortLayout("input_ids", "int32")}
_HIDDEN = {"last_hidden_state": "hidden_states", "hidden_embeds": "hidden_states"}

LAYOUTS: Mapping[Layout, About] = {
    Layout.APPLE: About(_apple_name),
    Layout.COMFYUI: About(
        _comfyui_name,
        {
            "text_encoder": Interface(_TOKENS, {**_HIDDEN, "pooled_outputs": None}),
            "text_encoder_2": Interface(_TOKENS, {**_HIDDEN, "pooled_outputs": "pooled_embeds"}),
            "unet": Interface({"encoder_hidden_states": _STATES}),
            "control_unet": Interface({"encoder_hidden_states": _STATES}),  # its apps run ControlNets themselves
            "vae_decoder": Interface({"z": PortLayout("latent", "float16")}),
            "vae_encoder": Interface({"x": PortLayout("image", "float16")}, {"latent": "latent_moments"}),
        },
        families=("sd1", "sdxl", "sdxl-refiner"),
        compiled=False,
        chunks=False,
        sizes=False,
        foldings=frozenset({Folding.PREDICTION}),  # they scale and pad as the checkpoint says
    ),
}
