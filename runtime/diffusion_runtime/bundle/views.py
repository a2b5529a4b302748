"""Parts of a bundle as if they were alone, and another network as if it was a UNet: manifests of a manifest."""

from __future__ import annotations

from collections.abc import Mapping

from diffusion_runtime.bundle.manifest import Component, Manifest, Refiner
from diffusion_runtime.families import UNET, UNETS, Layout, family_named, several
from diffusion_runtime.picture_size import Size


def of_size(made: Manifest, size: Size) -> Manifest:
    """The manifest of the models for pictures of one size of several, as if there was no other."""
    components = {name: component.at(size) for name, component in made.components.items()}
    return made.model_copy(update={"width": size.width, "height": size.height, "components": components})


def of_refiner(made: Manifest) -> Manifest | None:
    """The manifest of the refiner in a bundle, as if it was alone there; None where there is none."""
    if made.refiner is None or "refiner" not in made.components:
        return None
    steering = (several(kind, made.components).values() for kind in ("controlnet", "t2i_adapter"))
    left_out = {*UNETS, "text_encoder", *(name for names in steering for name in names)}
    own = {name: component for name, component in made.components.items() if name not in left_out}
    own["unet"] = own.pop("refiner")
    told = {name: getattr(made.refiner, name) for name in Refiner.model_fields}
    told |= {"family": "sdxl-refiner", "components": own, "refiner": None}
    return made.model_copy(update={**told, "controlnets": {}, "ip_adapters": (), "t2i_adapters": {}})


def as_unet(made: Manifest) -> Manifest:
    """The manifest of a bundle with another network in place of a UNet, as if it was one: its component and its
    inputs by the UNet's names. The manifest itself where there is a UNet."""
    denoiser = family_named(made.family).denoiser
    if denoiser.component not in made.components or denoiser is UNET:
        return made
    known = {own: name for name, own in denoiser.names.items()}
    others = {name: one for name, one in made.components.items() if name != denoiser.component}
    components = {**others, "unet": _with_inputs(made.components[denoiser.component], known)}
    return made.model_copy(update={"components": components})


def _with_inputs(component: Component, known: Mapping[str, str]) -> Component:
    """The component, for each of its sizes, with inputs by the names that they are ``known`` by."""
    inputs = tuple(one.model_copy(update={"name": known.get(one.name, one.name)}) for one in component.inputs)
    sizes = {size: _with_inputs(one, known) for size, one in component.sizes.items()}
    return component.model_copy(update={"inputs": inputs, "sizes": sizes})


def text_tokens(made: Manifest) -> int | None:
    """How many text tokens the UNet takes; None where there is none."""
    unet = as_unet(made).unet
    inputs = unet.inputs if unet else ()
    states = next((one.shape for one in inputs if one.name == "encoder_hidden_states"), None)
    if not states:
        return None
    # ComfyUI's are (batch, tokens, width), Apple's (batch, width, 1, tokens).
    return states[1] if made.layout is Layout.COMFYUI else states[-1]
