"""The family of a single file, by its shapes and names, its marks and what was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from diffusion_convert.checkpoint import ldm_configs, ldm_marks, ldm_shapes
from diffusion_convert.checkpoint.ldm_layout import NETWORKS
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_runtime.errors import CheckpointError, InputError
from diffusion_runtime.families import FAMILIES, TEXT_ENCODERS, TEXT_WIDTHS, UNET, Family

TELLING_BIAS, MIN_V_SPREAD = "output_blocks.11.1.transformer_blocks.0.norm1.bias", 0.09
BASE_GLOBAL_STEP = 875_000
"""``global_step`` of the official 512-base-ema.ckpt, by which diffusers, too, knows the epsilon model of SD 2."""
TEXT_KINDS = ("clip", "open_clip")
"""The kinds of text encoders: CLIP ViT-L of Stable Diffusion 1, OpenCLIP ViT-H of 2."""


def detect(
    path: Path,
    parts: Mapping[str, ldm_shapes.Tensors],
    asked: str | None,
    marks: ldm_marks.Marks,
    scalars: Mapping[str, int | float | str],
    beside: ldm_configs.Sections,
    base: Checkpoint | None,
) -> tuple[str, tuple[str, ...]]:
    """The family and, where it was not certain, a sentence that says so."""
    unet, first = parts["unet"], "input_blocks.0.0.weight"
    channels = unet[first].shape[1] if first in unet and unet[first].ndim == 4 else 0
    if _takes_added_conditions(parts, asked, base):
        return _xl_family(path, parts, asked, channels, base), ()
    one_encoder = [one for one in FAMILIES.values() if one.denoiser is UNET and not one.added_conditions]
    takes = [family for family in one_encoder if family.in_channels == channels]
    if not takes:
        known = ", ".join(sorted({str(family.in_channels) for family in one_encoder}))
        raise CheckpointError(f"{path}: a UNet with {channels} input channels; known are {known}")
    says, certain = _text_encoder(parts, marks)
    fits = [family for family in takes if {family.text_encoder} == set(says.values())]
    if asked is not None:
        accepted = [family.name for family in (fits if certain and fits else takes)]
        if asked not in accepted:
            raise InputError(
                f"{path}: family {asked!r} does not fit a file with {channels} input channels and "
                f"{' and '.join(says)}: expected {' or '.join(accepted)}"
            )
        return asked, ()
    if not fits:
        told = [" and ".join(what for what, kind in says.items() if kind == one) for one in TEXT_KINDS]
        raise CheckpointError(
            f"{path}: contradicts itself: {told[0] or 'nothing'} speaks for Stable Diffusion 1, "
            f"{told[1] or 'nothing'} for 2: --family decides ({', '.join(family.name for family in takes)})"
        )
    return _by_prediction(path, fits, marks, scalars, beside, base, unet)


def _by_prediction(
    path: Path,
    fits: Sequence[Family],
    marks: ldm_marks.Marks,
    scalars: Mapping[str, int | float | str],
    beside: ldm_configs.Sections,
    base: Checkpoint | None,
    unet: ldm_shapes.Tensors,
) -> tuple[str, tuple[str, ...]]:
    """`detect` among families of one kind of networks, which differ in what their UNets predict."""
    if len(fits) == 1:
        return fits[0].name, ()
    by_prediction = {kind: family.name for family in reversed(fits) for kind in family.prediction_types}
    prediction = beside.get("scheduler", {}).get("prediction_type", marks.prediction)
    if prediction is not None:
        return by_prediction.get(prediction, by_prediction["epsilon"]), ()
    if base is not None and base.family in by_prediction.values():
        return base.family, ()
    if scalars.get("global_step") == BASE_GLOBAL_STEP:
        return by_prediction["epsilon"], ()
    v, noise = by_prediction["v_prediction"], by_prediction["epsilon"]
    likely, other = (v, noise) if predicts_v(unet) else (noise, v)
    note = (
        f"{path.name} does not say whether it predicts v (768 pixels) or the noise (512 pixels): judged by its "
        f"weights to be {likely}; --family {other} chooses the other"
    )
    return likely, (note,)


def _takes_added_conditions(
    parts: Mapping[str, ldm_shapes.Tensors], asked: str | None, base: Checkpoint | None
) -> bool:
    """Whether the UNet is one of SDXL's: unCLIP's of Stable Diffusion 2 embed something under the same name."""
    known = {family.text_encoder for family in FAMILIES.values() if family.added_conditions}
    told = base.family if asked is None and base is not None and not _encoders(parts) else asked
    meant = "text_encoder_2" in _encoders(parts) or (told in FAMILIES and FAMILIES[str(told)].added_conditions)
    return ldm_shapes.ADDED in parts["unet"] and (meant or TEXT_WIDTHS.get(_context(parts)) in known)


def _xl_family(
    path: Path,
    parts: Mapping[str, ldm_shapes.Tensors],
    asked: str | None,
    channels: int,
    base: Checkpoint | None,
) -> str:
    """Told by the width of the states that the UNet attends to; if no published model has that width, by the text
    encoders."""
    family, width = list(FAMILIES.values()), _context(parts)
    takes = [one for one in family if one.added_conditions and one.in_channels == channels]
    encoders = _encoders(parts) or set(FAMILIES[base.family].encoders if base is not None else ())
    fits = [one.name for one in takes if one.text_encoder == TEXT_WIDTHS.get(width)]
    fits = fits or [one.name for one in takes if one.name == asked]
    fits = fits or [one.name for one in takes if set(one.encoders) == encoders]
    if not fits:
        known = ", ".join(one.name for one in family if one.added_conditions)
        raise CheckpointError(
            f"{path}: a UNet like Stable Diffusion XL's with {channels} input channels, which attends to states of "
            f"width {width}, is of no known family; known are {known}"
        )
    if asked is not None and asked not in fits:
        raise InputError(f"{path}: family {asked!r} does not fit this file: expected {' or '.join(fits)}")
    return fits[0]


def _encoders(parts: Mapping[str, ldm_shapes.Tensors]) -> set[str]:
    subfolders = {network.subfolder for network in NETWORKS if network.kind in parts}
    return {name for name in subfolders if name in TEXT_ENCODERS}


def _context(parts: Mapping[str, ldm_shapes.Tensors]) -> int:
    """The width of the states that the UNet attends to; 0 where it attends to none."""
    matrices = ((name, value) for name, value in parts["unet"].items() if value.ndim == 2)
    return next((value.shape[1] for name, value in matrices if name.endswith("attn2.to_k.weight")), 0)


def _text_encoder(parts: Mapping[str, ldm_shapes.Tensors], marks: ldm_marks.Marks) -> tuple[dict[str, str], bool]:
    """What says of which kind the text encoder is -> the kind; and whether that is certain. Names say little:
    OpenCLIP's is also written with those of CLIP's."""
    says: dict[str, str] = {}
    matrices = {name: value for name, value in parts["unet"].items() if value.ndim == 2}
    context = _context(parts)
    if context in TEXT_WIDTHS:
        says[f"a UNet that attends to states of width {context}"] = TEXT_WIDTHS[context]
    embedding = parts.get("clip", {}).get("text_model.embeddings.token_embedding.weight")
    width = embedding.shape[-1] if embedding is not None and embedding.ndim else 0
    if width in TEXT_WIDTHS:
        says[f"a text encoder of width {width}"] = TEXT_WIDTHS[width]
    if "open_clip" in parts:
        says["a text encoder with OpenCLIP's names"] = "open_clip"
    if marks.v2 is not None:
        says[f"metadata that say {'2' if marks.v2 else '1'}"] = "open_clip" if marks.v2 else "clip"
    if says:
        return says, True
    linear = any(name.endswith("1.proj_in.weight") for name in matrices)
    what = f"a UNet whose projections are {'linear' if linear else 'convolutions'}"
    return {what: "open_clip" if linear else "clip"}, False


def predicts_v(unet: ldm_shapes.Tensors) -> bool:
    """Whether SD 2 weights are of a model that predicts v: those have learnt a wide bias before the last attention,
    as ComfyUI judges them, too. Where the UNet is another than SD 2's, v is assumed."""
    bias = unet.get(TELLING_BIAS)
    return bias is None or float(bias.float().std(correction=0)) > MIN_V_SPREAD
