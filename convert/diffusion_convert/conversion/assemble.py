"""The folder that a conversion leaves, put together of its parts: variants, compiled models, zips, a card."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from diffusion_convert.bundle.model_card import CARD_NAME, is_anothers, write_model_card
from diffusion_convert.bundle.sizes import write_size_folders
from diffusion_convert.bundle.variants import compile_variant, share_identical, zip_variants
from diffusion_convert.checkpoint import folding
from diffusion_convert.checkpoint.controlnet import controlnets
from diffusion_convert.checkpoint.family import latent_factor
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.checkpoint.vae import gives_latents
from diffusion_convert.checkpoint.vocabulary import write_t5, write_vocabulary
from diffusion_convert.conversion.events import Event, Phase, Progress
from diffusion_convert.conversion.identity import tool_versions
from diffusion_convert.conversion.job import Record
from diffusion_convert.conversion.plan import Plan
from diffusion_convert.conversion.previous import Previous
from diffusion_convert.conversion.sizes import put_together
from diffusion_convert.conversion.workspace import Workspace
from diffusion_runtime import strict_json
from diffusion_runtime.bundle import manifest
from diffusion_runtime.bundle.find import KINDS
from diffusion_runtime.bundle.integrity import Hashes, tokenizer_hashes
from diffusion_runtime.bundle.manifest import Manifest
from diffusion_runtime.errors import CheckpointError
from diffusion_runtime.families import COMPONENTS, FAMILIES, T5, AttentionKind, Layout
from diffusion_runtime.prompt.tokenizer import VOCABULARY_FILES
from diffusion_runtime.schedulers import imposed_on, settled

PACKAGES, COMPILED = KINDS
FIRST_TOKENIZER, SECOND_TOKENIZER = "tokenizer", "tokenizer_2"
"""The folders of the text encoders' tokenizers, in the folder of the models; the first one's mostly lies beside
them."""


def assemble(
    plan: Plan,
    place: Workspace,
    records: Mapping[str, Record],
    previous: Previous,
    folder: Path,
    known: Hashes,
    progress: Progress,
) -> dict[str, Manifest]:
    """Make the new ``folder`` of the parts in ``place``; return the packages' manifests by attention."""
    found: dict[str, dict[str, Manifest]] = {}
    for kind in plan.options.attention:
        made = _packages(plan, place, records, kind, folder / kind.value / PACKAGES, known)
        found[kind.value] = {PACKAGES: made}
    if plan.compiled:
        _compile(found, folder, known, progress)
    share_identical(folder, found)
    if plan.compiled and plan.options.zip:
        progress(Event("", Phase.ZIP, 0.0))
        zip_variants(folder, {name: kinds[COMPILED] for name, kinds in found.items()})
    if _has_card(plan) and not is_anothers(previous.output / CARD_NAME):
        write_model_card(folder, found)
    progress(Event("", Phase.FINISH, 1.0))
    return {name: kinds[PACKAGES] for name, kinds in found.items()}


def is_described(plan: Plan, previous: Previous) -> bool:
    """Whether what is there says of the plan's models what would be said now: nobody has changed a manifest, and
    there is a card where one is written."""
    if _has_card(plan) and not (previous.output / CARD_NAME).exists():
        return False
    return all(
        made is not None and _told(made) == _told(describe(plan, attention, made.components))
        for attention in plan.options.attention
        for made in previous.variants.get(attention.value, {}).values()
    )


def _told(made: Manifest) -> dict[str, object]:
    """All but what is measured of files or names them."""
    files = {"kind", "components", "tokenizer", "tokenizer_2", "tokenizer_3", "tokenizer_sha256"}
    return made.model_dump(mode="json", exclude_none=True, exclude=files)


def _has_card(plan: Plan) -> bool:
    return plan.options.compiled or plan.options.layout is not Layout.APPLE


def _compile(found: dict[str, dict[str, Manifest]], folder: Path, known: Hashes, progress: Progress) -> None:
    for number, (name, kinds) in enumerate(found.items()):
        progress(Event("", Phase.COMPILE, number / len(found), name))
        variant, source = folder / name, kinds[PACKAGES]
        kinds[COMPILED] = compile_variant(variant / PACKAGES, variant / COMPILED, source=source, known=known)


def _packages(
    plan: Plan, place: Workspace, records: Mapping[str, Record], kind: AttentionKind, folder: Path, known: Hashes
) -> Manifest:
    folder.mkdir(parents=True)
    entries: dict[str, manifest.Component] = {}
    for part in plan.variant(kind):
        if part.component.name not in entries:
            alike = [other for other in plan.variant(kind) if other.is_like(part)]
            component = put_together(alike, plan, place, records, folder, known)
            units = part.component.compute_units(kind)
            entries[part.component.name] = component.model_copy(update={"compute_units": units})
    made = describe(plan, kind, entries)
    _write_tokenizers(plan.checkpoint, made, folder)
    told = tokenizer_hashes(folder, (made.tokenizer, made.tokenizer_2, made.tokenizer_3), known)
    made = made.model_copy(update={"tokenizer_sha256": told})
    manifest.write(made, folder)
    write_size_folders(made, folder, known)
    return made


def _write_tokenizers(checkpoint: Checkpoint, made: Manifest, folder: Path) -> None:
    """Where ``made`` says. Apps look for CLIP's vocabulary and for T5's tokenizer beside the models, so CLIP's
    settings, which are called as T5's, lie elsewhere where there is T5."""
    places = [place for place in (made.tokenizer, made.tokenizer_2) if place is not None]
    for place, files in zip(places, checkpoint.clip_tokenizers, strict=True):
        (folder / place).mkdir(exist_ok=True)
        write_vocabulary(files, folder / place, checkpoint.added_tokens)
    if made.tokenizer_3 is not None and made.tokenizer is not None:
        for name in VOCABULARY_FILES:
            shutil.copyfile(folder / made.tokenizer / name, folder / name)
        write_t5(checkpoint.tokenizers[COMPONENTS[T5].subfolder], folder)


def describe(plan: Plan, kind: AttentionKind, entries: Mapping[str, manifest.Component]) -> Manifest:
    """The manifest of a variant's packages. Raises CheckpointError for values that no runtime could use."""
    checkpoint, vae = plan.checkpoint, plan.checkpoint.models["vae"].config
    (scale, shift), prediction = folding.latents(checkpoint), folding.prediction(checkpoint)
    own = checkpoint.schedulers["scheduler"]
    scheduler = settled(own, imposed_on(checkpoint.family, checkpoint.takes_guidance))
    values = {
        "name": checkpoint.name,
        "family": checkpoint.family,
        "source": checkpoint.source,
        "kind": "packages",
        "attention": kind.value,
        "layout": plan.options.layout.value,
        "height": plan.shape.height,
        "width": plan.shape.width,
        "batch_size": plan.shape.batch_size,
        "target": plan.options.target,
        "latents": {
            "channels": int(vae["latent_channels"]),
            "factor": latent_factor(vae),
            "scale": scale,
            "shift": shift,
            "drawn": not gives_latents(checkpoint.models["vae"].class_name),
        },
        "tokenizer": FIRST_TOKENIZER if T5 in entries else ".",
        "tokenizer_2": SECOND_TOKENIZER if len(checkpoint.clip_tokenizers) > 1 else None,
        "tokenizer_3": "." if T5 in entries else None,
        "padding": checkpoint.padding,
        "prediction_type": prediction,
        "components": dict(entries),
        "scheduler": {**scheduler, "prediction_type": prediction} if "prediction_type" in scheduler else scheduler,
        "steered_scheduler": own
        if own != scheduler and (checkpoint.controlnets or checkpoint.t2i_adapters)
        else None,
        "noise_scheduler": _optional(checkpoint.schedulers.get("low_res_scheduler")),
        "force_zeros_for_empty_prompt": _forces_zeros(checkpoint),
        "clip_skip": checkpoint.clip_skip,
        "scales_image_latents": bool(checkpoint.pipeline_config.get("is_cosxl_edit", False)),
        "refiner": None if checkpoint.refiner is None else _refiner(checkpoint.refiner),
        "controlnets": {
            name: told for name, told in checkpoint.controlnets.items() if name in controlnets(entries)
        },
        "ip_adapters": checkpoint.ip_adapters,
        "t2i_adapters": dict(checkpoint.t2i_adapters),
        "requires_safety_checker": bool(checkpoint.pipeline_config.get("requires_safety_checker", False)),
        "folded": checkpoint.folded.model_dump(),
        "tools": {**tool_versions(), **plan.identity.told},
    }
    return strict_json.as_model(Manifest, values, checkpoint.name, "a checkpoint that can be run", CheckpointError)


def _refiner(refiner: Checkpoint) -> dict[str, object]:
    scheduler = refiner.schedulers["scheduler"]
    return {
        "source": refiner.source,
        "scheduler": settled(scheduler, imposed_on(refiner.family)),
        "prediction_type": str(scheduler.get("prediction_type", "epsilon")),
        "force_zeros_for_empty_prompt": _forces_zeros(refiner),
    }


def _forces_zeros(checkpoint: Checkpoint) -> bool:
    """Where nothing says so, as diffusers' pipelines for Stable Diffusion XL do."""
    usual = FAMILIES[checkpoint.family].added_conditions
    return bool(checkpoint.pipeline_config.get("force_zeros_for_empty_prompt", usual))


def _optional(config: Mapping[str, object] | None) -> dict[str, object] | None:
    return None if config is None else dict(config)
