"""From a folder of models to a pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from os import PathLike
from pathlib import Path

from diffusion_runtime.backends import ComputeUnits, load_backend, resolve
from diffusion_runtime.bundle import find, manifest
from diffusion_runtime.bundle.find import Bundle
from diffusion_runtime.bundle.views import as_unet
from diffusion_runtime.bundle.without_manifest import Assumed
from diffusion_runtime.errors import InputError, PackageError
from diffusion_runtime.families import T5, family_named
from diffusion_runtime.models import Models
from diffusion_runtime.pipeline import Pipeline
from diffusion_runtime.prompt import tokenizer as tokenizers
from diffusion_runtime.real_path import is_there
from diffusion_runtime.schedulers import canonical

DEPTH = "depth_estimator"


def load_pipeline(
    path: str | PathLike[str],
    backend: str = "auto",
    compute_units: ComputeUnits | str | None = None,
    *,
    scheduler: str | None = None,
    tokenizer: str | PathLike[str] | None = None,
    reduce_memory: bool = False,
    check_safety: bool = True,
    prediction_type: str | None = None,
    latent_scale: float | None = None,
    depth_estimator: str | PathLike[str] | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> Pipeline:
    """A pipeline of converted models. They are loaded when they are first needed.

    Args:
        path: the folder that `convert` wrote (the best variant in it is used), a variant in it, or a folder that
            Apple's tools made.
        backend: "coreml" (macOS), "torch" (any machine), or "auto": coreml on macOS, else torch.
        compute_units: a `ComputeUnits` or its name, for coreml; None: those that the manifest names.
        scheduler: a name of `schedulers.SCHEDULERS`, as "dpm++ 2m karras"; None: the checkpoint's own.
        tokenizer: its folder, where the models' folder has none.
        reduce_memory: load each model for its stage and free it after.
        check_safety: use the safety checker, where there is one.
        prediction_type: "epsilon", "v_prediction" or "sample", for folders without a manifest.
        latent_scale: the VAE's scaling factor, for folders without a manifest.
        depth_estimator: a folder of other models that have one, for control pictures that are depths.
        dtype: "float32", "bfloat16" or "float16", for torch; None: float32.
        device: "cpu", "cuda" or "mps", for torch; None: cpu.

    Returns:
        A `Pipeline`; its ``notes`` say what was chosen and assumed.

    Raises:
        InputError: for what cannot be used.
        PackageError: for models that are damaged.
        InstallationError: for a backend that this machine lacks.
    """

    name = resolve(backend)
    units = find.parse_units(compute_units) if isinstance(compute_units, str) else compute_units
    chosen = None if scheduler is None else canonical(scheduler)
    try:
        found = find.find(
            Path(path), backend=name, compute_units=units, assumed=Assumed(prediction_type, latent_scale)
        )
    except (OSError, ValueError) as error:  # a name that is too long or has a NUL, a folder that may not be read
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{str(path)!r}: the folder of models cannot be read: {reason}") from error
    find.check_layout(found)
    if is_there(found.folder / manifest.FILE_NAME, PackageError):
        _check_told(found, prediction_type, latent_scale)
    clip, clip_2 = _clips(found, tokenizer)
    notes = tuple(_notes(found, name, units, check_safety))
    opener = load_backend(name, dtype=dtype, device=device)
    models = find.open_models(found, opener, units, not reduce_memory)
    if depth_estimator is not None:
        lender = find.find(Path(depth_estimator), backend=name, compute_units=units)
        models = _with_estimator(models, lender, find.open_models(lender, opener, units))
    described = as_unet(found.manifest)
    return Pipeline(described, models, clip, chosen, check_safety, notes, clip_2, _t5(found))


def _notes(found: Bundle, backend: str, units: ComputeUnits | None, check_safety: bool) -> Iterator[str]:
    yield from found.notes
    if backend == "coreml":
        yield from find.unit_notes(found, units)
    elif units is not None:
        yield f"compute units {units.value} are Core ML's: the torch backend takes no notice of them"
    has_checker = "safety_checker" in found.manifest.components
    if found.manifest.requires_safety_checker and check_safety and not has_checker:
        yield "the checkpoint asks for a safety checker, but these models have none: pictures are not checked"


def _clips(
    found: Bundle, folder: str | PathLike[str] | None
) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer | None]:
    """The tokenizers of one or two CLIP text encoders. Raises InputError where there is none."""
    place = Path(folder) if folder is not None else found.tokenizer
    if place is None:
        raise InputError(
            f"{found.folder}: no vocab.json and merges.txt next to the models: name their folder with --tokenizer"
        )
    length, *second = found.text_lengths() or (tokenizers.LENGTH,)
    first = tokenizers.load(place, length, family_named(found.manifest.family).pad_token)
    if not second:
        return first, None
    # SDXL's second encoder, OpenCLIP's, pads with "!" whatever its files say.
    named = found.manifest.tokenizer_2
    return first, tokenizers.load(found.folder / named if named else place, second[0], "!")


def _with_estimator(models: Models, lender: Bundle, lent: Models) -> Models:
    """The models with another bundle's depth estimator. Raises InputError where that has none."""
    if DEPTH not in lent:
        raise InputError(
            f"{lender.folder}: these models have no {DEPTH}: convert a depth checkpoint's with --components {DEPTH}"
        )
    return replace(models, loads={**models.loads, DEPTH: lent.loads[DEPTH]})


def _t5(found: Bundle) -> tokenizers.Tokenizer | None:
    """The tokenizer of the text encoder that follows CLIP's, where there is one."""
    encoder, place = found.manifest.components.get(T5), found.manifest.tokenizer_3
    if encoder is None or place is None:
        return None
    return tokenizers.load_t5(found.folder / place, encoder.inputs[0].shape[-1])


def _check_told(found: Bundle, prediction_type: str | None, latent_scale: float | None) -> None:
    """Raise InputError where the caller contradicts a manifest, which knows better."""
    known = found.manifest.prediction_type, found.manifest.latents.scale
    for name, told, value in zip(
        ("prediction type", "latent scale"), (prediction_type, latent_scale), known, strict=True
    ):
        if told is not None and told != value:
            raise InputError(f"{name} {told}: the manifest of these models says {value}; leave it out")
