"""IP-Adapters (Ye et al. 2023): files that let a UNet attend to pictures beside its text.

A file holds the projection of a picture (``image_proj.…``) and, for each cross-attention of the UNet, keys and
values (``ip_adapter.N.to_k_ip.weight``). The projections of all adapters become one network, `PROJECTIONS`; keys
and values become weights of the UNet, under the names that diffusers' UNet has for them.
"""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffusion_convert.checkpoint import diffusers_folder, tensor_file, torch_networks
from diffusion_convert.checkpoint.ip_projections import TOKENS
from diffusion_convert.checkpoint.model import Checkpoint, Submodel
from diffusion_runtime.bundle.manifest import IpAdapter
from diffusion_runtime.errors import CheckpointError, DiffusionError, InputError

Tensors = Mapping[str, torch.Tensor]

ENCODER, PROJECTIONS = "image_encoder", "image_projection"
"""The networks that IP-Adapters add to a checkpoint."""
ENCODER_CLASS = "CLIPVisionModelWithProjection"
PARTS = ("image_proj.", "ip_adapter.")
"""Of a file: the projection's weights, and the UNet's."""
PLAIN_TOKENS = 4
"""How many tokens a plain adapter makes, which its file does not say, as diffusers has them."""
_HEAD = 64
"""Channels of a head in a resampler, as diffusers has them."""
_PLAIN = ((r"^proj\.(weight|bias)$", r"image_embeds.\1"),)
_FULL = (
    (r"^proj\.0\.", "ff.net.0.proj."),
    (r"^proj\.2\.", "ff.net.2."),
    (r"^proj\.3\.", "norm."),
)
_PLUS = (
    (r"^(layers\.\d+)\.0\.norm1\.", r"\1.ln0."),
    (r"^(layers\.\d+)\.0\.norm2\.", r"\1.ln1."),
    (r"^(layers\.\d+)\.0\.to_out\.", r"\1.attn.to_out.0."),
    (r"^(layers\.\d+)\.0\.to_", r"\1.attn.to_"),
    (r"^(layers\.\d+)\.1\.0\.", r"\1.ff.0."),
    (r"^(layers\.\d+)\.1\.1\.", r"\1.ff.1.net.0.proj."),
    (r"^(layers\.\d+)\.1\.3\.", r"\1.ff.1.net.2."),
)
"""Published names -> diffusers'."""


@dataclass(frozen=True, slots=True)
class _Adapter:
    """One file. ``config``: of its projection (`ip_projections.Projections`)."""

    name: str
    source: str
    path: Path
    config: Mapping[str, Any]


def with_ip_adapters(
    checkpoint: Checkpoint, files: Sequence[tuple[str, Path]], encoder_folder: Path | None, pictures: int = 1
) -> Checkpoint:
    """The checkpoint with IP-Adapters: ``files`` are (as the user named it, path); the image encoder is in
    ``encoder_folder``, None: in the folder ``image_encoder`` beside the first file. The UNet attends to the
    tokens of so many ``pictures`` of each.

    Raises InputError for an adapter that is not for this UNet or image encoder, CheckpointError for a file that is
    none or is damaged."""
    encoder: Submodel | None = None
    adapters: list[_Adapter] = []
    for source, path in files:
        name = _unused_name(path.stem, [adapter.name for adapter in adapters])
        config = _config(_parts(source, path)[0], source)
        encoder = encoder or _encoder(encoder_folder or path.parent / ENCODER)
        config = {**config, TOKENS: config[TOKENS] or patches(encoder)}
        adapters.append(_Adapter(name, source, path, config))
        _check_encoder(adapters[-1], encoder)
    if encoder is None:
        return checkpoint
    unet = _with_keys(checkpoint, adapters, pictures)
    projections = Submodel(
        "Projections",
        {"projections": [dict(adapter.config) for adapter in adapters]},
        partial(_projections, tuple(adapters)),
        tuple(adapter.path for adapter in adapters),
    )
    described = tuple(IpAdapter(name=adapter.name, source=adapter.source) for adapter in adapters)
    models = {**checkpoint.models, "unet": unet, ENCODER: encoder, PROJECTIONS: projections}
    return replace(checkpoint, models=models, ip_adapters=described)


def _unused_name(stem: str, taken: Sequence[str]) -> str:
    names = (stem, *(f"{stem}-{number}" for number in range(2, len(taken) + 2)))
    return next(name for name in names if name not in taken)


def _parts(source: str, path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    tensors = tensor_file.read(path).tensors
    projection, keys = (tensor_file.below(tensors, part) for part in PARTS)
    if not projection or not keys:
        raise CheckpointError(
            f"{source}: is no IP-Adapter: expected tensors {PARTS[0]}… and {PARTS[1]}…, found "
            f"{torch_networks.listed(sorted(tensors)[:3])}"
        )
    return projection, keys


def _config(tensors: Tensors, source: str) -> dict[str, Any]:
    """What kind of projection it is, told by its tensors as diffusers does, and its sizes."""
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    try:
        if "proj.weight" in shapes:
            out, width = shapes["proj.weight"]
            return {"kind": "plain", "embed": width, "width": out // PLAIN_TOKENS, TOKENS: PLAIN_TOKENS}
        if "proj.3.weight" in shapes:
            embed, (width,) = shapes["proj.0.weight"][0], shapes["proj.3.weight"]
            return {"kind": "full", "embed": embed, "width": width, TOKENS: None}  # one of each patch
        if "perceiver_resampler.proj_in.weight" in shapes or "norm.weight" in shapes:
            raise InputError(
                f"{source}: is a FaceID adapter, which takes what InsightFace says of a face, not a picture: "
                "expected ip-adapter, ip-adapter-plus or ip-adapter-full-face"
            )
        (_, tokens, hidden), embed = shapes["latents"], shapes["proj_in.weight"][1]
        query = next(shape for name, shape in shapes.items() if name.endswith("to_q.weight"))
        width = shapes["proj_out.weight"][0]
        heads = query[0] // _HEAD
        return {"kind": "plus", "embed": embed, "width": width, TOKENS: tokens, "hidden": hidden, "heads": heads}
    except (KeyError, ValueError, IndexError, StopIteration) as error:
        raise CheckpointError(
            f"{source}: is an IP-Adapter of an unknown kind: expected ip-adapter, ip-adapter-plus or "
            f"ip-adapter-full-face, found image_proj.{{{torch_networks.listed(sorted(shapes))}}}"
        ) from error


def _encoder(folder: Path) -> Submodel:
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder}: there is no image encoder, which an IP-Adapter needs: name the folder of a {ENCODER_CLASS} "
            "with --image-encoder"
        )
    try:
        encoder = diffusers_folder.read_submodel(folder, ENCODER_CLASS)
    except DiffusionError as error:
        raise type(error)(f"--image-encoder {error}") from error
    network: Any = torch_networks.check(encoder, encoder.tensors(), f"{folder}: {ENCODER}")
    sizes = ("image_size", "patch_size", "hidden_size", "projection_dim")  # published ones may leave out defaults
    return replace(encoder, config={**encoder.config, **{name: getattr(network.config, name) for name in sizes}})


def patches(encoder: Submodel) -> int:
    """How many states the encoder has of a picture: of each patch, and of the whole."""
    return 1 + (int(encoder.config["image_size"]) // int(encoder.config["patch_size"])) ** 2


def _check_encoder(adapter: _Adapter, encoder: Submodel) -> None:
    plain = adapter.config["kind"] == "plain"
    name = "projection_dim" if plain else "hidden_size"
    given, wanted = int(encoder.config.get(name, 0)), int(adapter.config["embed"])
    if given != wanted:
        raise InputError(
            f"{adapter.source}: is made for an image encoder with {name} {wanted}, but this one's is {given}: name "
            "the adapter's own with --image-encoder"
        )


def _with_keys(checkpoint: Checkpoint, adapters: Sequence[_Adapter], pictures: int) -> Submodel:
    """The UNet that attends to the adapters' tokens."""
    unet = checkpoint.models["unet"]
    if any(_listed(unet.config.get("only_cross_attention", False))):
        raise InputError(
            f"--ip-adapter: no IP-Adapter is for {checkpoint.family}, whose UNet attends to text alone"
        )
    width = int(unet.config["cross_attention_dim"])
    places = _places(unet, checkpoint.name)
    for adapter in adapters:
        keys = _parts(adapter.source, adapter.path)[1]
        count = len([name for name in keys if name.endswith(".to_k_ip.weight")])
        if (count, int(adapter.config["width"])) != (len(places), width):
            raise InputError(
                f"{adapter.source}: is made for a UNet with {count} cross-attentions to states of "
                f"{adapter.config['width']} channels, but that of {checkpoint.name} ({checkpoint.family}) has "
                f"{len(places)} to {width}"
            )
    tokens = [pictures * int(one.config[TOKENS]) for one in adapters]
    return replace(
        unet,
        config={**unet.config, torch_networks.PICTURE_TOKENS: tokens},
        tensors=partial(_unet_tensors, unet.tensors, tuple(adapters), tuple(places)),
        files=(*unet.files, *(adapter.path for adapter in adapters)),
    )


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]


def _places(unet: Submodel, where: str) -> list[str]:
    """Where the UNet has cross-attentions, in the order in which adapters number them: diffusers' own."""
    network: Any = torch_networks.empty(unet, where)
    found = [name for name in network.attn_processors if not name.endswith("attn1.processor")]
    return [name.removesuffix(".processor") for name in found]


def _unet_tensors(own: Callable[[], Tensors], adapters: Sequence[_Adapter], places: Sequence[str]) -> Tensors:
    """diffusers numbers every second one: attentions to the picture itself have the even numbers."""
    added = {}
    for index, adapter in enumerate(adapters):
        keys = _parts(adapter.source, adapter.path)[1]
        for number, place in enumerate(places):
            for name in ("to_k_ip", "to_v_ip"):
                key = f"{2 * number + 1}.{name}.weight"
                if key in keys:
                    added[f"{place}.processor.{name}.{index}.weight"] = keys[key]
    # The first mapping is asked first: `own` may compute what it gives, and is asked for its own names alone.
    return ChainMap(added, own())  # type: ignore[arg-type]  # nothing is written to it


def _projections(adapters: Sequence[_Adapter]) -> Tensors:
    return {
        f"layers.{index}.{name}": value
        for index, adapter in enumerate(adapters)
        for name, value in _renamed(_parts(adapter.source, adapter.path)[0], adapter.config["kind"]).items()
    }


def _renamed(tensors: Tensors, kind: str) -> dict[str, torch.Tensor]:
    table = {"plain": _PLAIN, "full": _FULL, "plus": _PLUS}[kind]
    found = {}
    for name, value in tensors.items():
        renamed = name
        for pattern, replacement in table:
            renamed = re.sub(pattern, replacement, renamed)
        if "to_kv" in renamed:  # keys first, then values
            half = len(value) // 2
            found[renamed.replace("to_kv", "to_k")], found[renamed.replace("to_kv", "to_v")] = (
                value[:half],
                value[half:],
            )
        else:
            found[renamed] = value
    return found
