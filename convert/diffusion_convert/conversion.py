"""From a checkpoint to a folder of verified packages: what happens, in which order.

open -> plan -> for each unit: reference, export, measure, palettize, chunk -> put together -> rename into place
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from diffusion_convert import export, families, networks, verify
from diffusion_convert import plan as plans
from diffusion_convert.checkpoint import open_checkpoint
from diffusion_convert.options import AttentionKind, ConvertOptions, Precision
from diffusion_convert.placeholders import FLOAT16_MAX
from diffusion_convert.plan import Plan, Unit, make_plan, tool_versions
from diffusion_convert.vocabulary import write_vocabulary
from diffusion_convert.workspace import Workspace, check_space, link_tree, publish, workspace
from diffusion_runtime import manifest
from diffusion_runtime.errors import InputError, PackageError, VerificationError
from diffusion_runtime.folders import unfinished_folder
from diffusion_runtime.integrity import hashes, size_bytes
from diffusion_runtime.manifest import Manifest
from diffusion_runtime.mil.program import Metadata

RECORD = "record.json"
MAX_ATTEMPTS = 5
"""How often a component is converted anew with more operations in float32, until none overflows."""
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True, slots=True)
class Event:
    """``phase`` of a ``unit`` ("unet-original"; "" for the whole) is done to ``fraction``, from 0 to 1."""

    unit: str
    phase: str
    fraction: float


Progress = Callable[[Event], None]


class Record(BaseModel):
    """What is known of a finished unit: its entry in the manifest, seconds by phase, notes for the user."""

    model_config = ConfigDict(frozen=True)
    component: manifest.Component
    seconds: dict[str, float] = {}
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Conversion:
    """What `convert` did. ``unchanged``: all of it was there already."""

    output: Path
    family: str
    variants: Mapping[str, Manifest]
    seconds: Mapping[str, Mapping[str, float]]
    notes: tuple[str, ...] = ()
    unchanged: bool = False


def convert(source: str, output: Path, options: ConvertOptions, progress: Progress) -> Conversion:
    """See `diffusion_convert.convert`."""
    progress(Event("", "open", 0.0))
    checkpoint = open_checkpoint(
        source, revision=options.revision, family=options.family, vae=options.vae, loras=options.loras
    )
    with networks.silent():
        plan = make_plan(checkpoint, options, _places(source, options))
    progress(Event("", f"family {families.FAMILIES[checkpoint.family].title}", 0.0))
    there = _already_there(plan, output)
    if there:
        return Conversion(output, checkpoint.family, there, {}, checkpoint.notes, unchanged=True)
    check_space(output, plan.size_bytes)
    with workspace(output, plan.fingerprint) as place:
        if not place.ready.exists():
            for number, unit in enumerate(plan.units):
                progress(Event("", "components", number / len(plan.units)))
                _make_unit(unit, plan, place, progress)
            _put_together(plan, place, progress)
        records = {unit.name: _read_record(place.units / unit.name) for unit in plan.units}
        publish(place, _obsolete(plan, output))
    made = {kind.value: manifest.read(output / kind.value / "packages") for kind in options.attention}
    done = {name: record for name, record in records.items() if record is not None}
    return Conversion(
        output,
        checkpoint.family,
        made,
        {name: record.seconds for name, record in done.items()},
        (*checkpoint.notes, *dict.fromkeys(note for record in done.values() for note in record.notes)),
    )


def _places(source: str, options: ConvertOptions) -> tuple[Path, ...]:
    named = [Path(source), *([Path(options.vae)] if options.vae else []), *(lora.path for lora in options.loras)]
    return tuple(path for place in named if (path := place.expanduser()).exists())


def _already_there(plan: Plan, output: Path) -> dict[str, Manifest]:
    """The variants in ``output``, where they are those of the plan; else nothing."""
    found = {}
    for kind in plan.options.attention:
        folder = output / kind.value / "packages"
        try:
            made = manifest.read(folder)
        except PackageError:
            return {}
        files = [folder / name for component in made.components.values() for name in component.sha256]
        if made.tools.get("conversion") != plan.fingerprint or not all(path.is_file() for path in files):
            return {}
        found[kind.value] = made
    return found


def _make_unit(unit: Unit, plan: Plan, place: Workspace, progress: Progress) -> None:
    """Convert and verify one component, unless it is there. It appears in ``place.units`` whole or not at all."""
    if _read_record(place.units / unit.name) is not None:
        return
    report = partial(_report, progress, unit.name)
    with unfinished_folder(place.units / unit.name) as folder:
        package = folder / f"{_prefix(plan)}_{unit.component.suffix}.mlpackage"
        expected = _reference(unit, plan, place, report) if plan.options.verify else None
        record = _export(unit, plan, package, expected, report)
        (folder / RECORD).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _report(progress: Progress, unit: str, phase: str, fraction: float) -> None:
    progress(Event(unit, phase, fraction))


def _reference(unit: Unit, plan: Plan, place: Workspace, report: export.Progress) -> verify.Reference:
    """What the checkpoint's own network computes, from disk if another variant has asked."""
    path = place.references / f"{unit.component.name}.npz"
    if not path.is_file():
        report("reference", 0.0)
        computed = verify.reference(unit.component, plan.checkpoint, plan.shape, partial(report, "reference"))
        computed.save(path)
    return verify.Reference.load(path)


def _export(
    unit: Unit, plan: Plan, package: Path, expected: verify.Reference | None, report: export.Progress
) -> Record:
    """Write the package of ``unit``. Where float16 has no room for an operation's values, it is converted anew with
    that operation in float32."""
    recipe = export.Recipe(unit.attention, plan.shape, plan.options.target, plan.options.precision)
    checkpoint, options = plan.checkpoint, plan.options
    for _ in range(MAX_ATTEMPTS):
        made = export.export(unit.component, checkpoint, recipe, package, _metadata(plan), report)
        _refuse_wide_weights(unit, made, options)
        if expected is None:
            return _record(unit, package, made, recipe, {}, made.seconds)
        started = time.perf_counter()
        verdict = verify.measure(package, expected, partial(report, "verify"))
        verify.check(unit.component, package, verdict, partial(_explain, unit, plan, package, made, expected))
        seconds = {**made.seconds, "verify": time.perf_counter() - started}
        limit = FLOAT16_MAX if options.precision is Precision.FLOAT16 else verify.NEAR_LIMIT
        hot = verify.overflowing(package, verdict.largest, limit)
        if not hot:
            return _record(unit, package, made, recipe, verdict.psnr_db, seconds)
        if options.precision is Precision.FLOAT16:
            raise VerificationError(
                f"{unit.component.name}: float16 overflows at {_listed(hot, made.modules)}; use --precision auto"
            )
        recipe = _widened(recipe, hot, made.modules)
    raise VerificationError(
        f"{unit.component.name}: float16 still overflows at {_listed(hot, made.modules)} with all of "
        f"{', '.join(sorted(recipe.float32_modules))} in float32; use --precision float32"
    )


def _widened(recipe: export.Recipe, hot: Mapping[str, float], modules: Mapping[str, str]) -> export.Recipe:
    """The recipe with those operations in float32; what was in float32 already and yet comes out as float16, with
    its whole torch module."""
    names = frozenset(export.mil_name(name) for name in hot)
    again = frozenset(
        modules[name] for name in hot if export.mil_name(name) in recipe.float32_ops and modules.get(name)
    )
    return replace(recipe, float32_ops=recipe.float32_ops | names, float32_modules=recipe.float32_modules | again)


def _refuse_wide_weights(unit: Unit, made: export.Exported, options: ConvertOptions) -> None:
    if made.float32_weights and options.precision is Precision.FLOAT16:
        raise VerificationError(
            f"{unit.component.name}: weights are beyond float16: {networks.listed(list(made.float32_weights))}; "
            "use --precision auto"
        )


def _listed(hot: Mapping[str, float], modules: Mapping[str, str]) -> str:
    return networks.listed(
        [f"{name} ({size:.3g}, torch module {modules.get(name) or 'the whole'})" for name, size in hot.items()]
    )


def _explain(unit: Unit, plan: Plan, package: Path, made: export.Exported, expected: verify.Reference) -> str:
    graph = unit.component.build(plan.checkpoint, unit.attention, plan.shape)
    return verify.first_divergence(package, graph.module, made.modules, expected.inputs[0])


def _record(
    unit: Unit,
    package: Path,
    made: export.Exported,
    recipe: export.Recipe,
    psnr_db: Mapping[str, float],
    seconds: Mapping[str, float],
) -> Record:
    folder, graph = package.parent, made.graph
    kept = sorted(name for name in made.modules if export.mil_name(name) in recipe.float32_ops)
    units = unit.component.compute_units
    return Record(
        component=manifest.Component(
            files=(package.name,),
            inputs=tuple(manifest.Tensor(name=p.name, dtype=p.dtype, shape=p.shape) for p in graph.inputs),
            outputs=tuple(manifest.Tensor(name=p.name, dtype=p.dtype, shape=p.shape) for p in graph.outputs),
            compute_units=units.get(unit.attention.value, units.get("default", "all")),
            precision="float32" if recipe.precision is Precision.FLOAT32 else "float16",
            float32_ops=tuple(kept),
            size_bytes=size_bytes(folder, [package.name]),
            sha256=hashes(folder, [package.name]),
            psnr_db=dict(psnr_db),
        ),
        seconds=dict(seconds),
        notes=_notes(unit, made, kept),
    )


def _notes(unit: Unit, made: export.Exported, kept: list[str]) -> tuple[str, ...]:
    notes = []
    if kept:
        modules = networks.listed(list(dict.fromkeys(made.modules[name] or "the whole" for name in kept)))
        notes.append(
            f"{unit.name}: {len(kept)} operations stay in float32, as their values come near float16's limit: "
            f"{networks.listed(kept)} (torch modules {modules})"
        )
    if made.float32_weights:
        notes.append(
            f"{unit.name}: beyond float16 and kept in float32: {networks.listed(list(made.float32_weights))}"
        )
    return tuple(notes)


def _read_record(folder: Path) -> Record | None:
    try:
        return Record.model_validate_json((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None


def _put_together(plan: Plan, place: Workspace, progress: Progress) -> None:
    """Make the folder of every variant from the units, and declare the result ready."""
    shutil.rmtree(place.staged, ignore_errors=True)
    for kind in plan.options.attention:
        _variant(plan, place, kind, place.staged / kind.value / "packages")
    if plan.options.compiled:
        _compile(plan, place, progress)
    progress(Event("", "finish", 1.0))
    place.staged.rename(place.ready)


def _compile(plan: Plan, place: Workspace, progress: Progress) -> None:
    from diffusion_convert import bundle
    from diffusion_convert.model_card import write_model_card

    for number, kind in enumerate(plan.options.attention):
        progress(Event("", f"compile {kind.value}", number / len(plan.options.attention)))
        variant = place.staged / kind.value
        bundle.compile_variant(variant / "packages", variant / "compiled")
    bundle.share_identical(place.staged)
    if plan.options.zip:
        progress(Event("", "zip", 0.0))
        bundle.zip_variants(place.staged)
    write_model_card(place.staged)


def _variant(plan: Plan, place: Workspace, kind: AttentionKind, folder: Path) -> None:
    folder.mkdir(parents=True)
    entries = {}
    for unit in plan.variant(kind):
        record = _read_record(place.units / unit.name)
        if record is None:
            raise InputError(f"{place.units / unit.name}: was removed while this conversion ran; run it again")
        units = unit.component.compute_units
        entries[unit.component.name] = record.component.model_copy(
            update={"compute_units": units.get(kind.value, units.get("default", "all"))}
        )
        for name in record.component.files:
            link_tree(place.units / unit.name / name, folder / name)
    write_vocabulary(plan.checkpoint.tokenizer, folder)
    for name in TOKENIZER_FILES:
        if name in plan.checkpoint.tokenizer:
            shutil.copyfile(plan.checkpoint.tokenizer[name], folder / name)
    manifest.write(_manifest(plan, kind, entries), folder)


def _manifest(plan: Plan, kind: AttentionKind, entries: Mapping[str, manifest.Component]) -> Manifest:
    checkpoint, vae = plan.checkpoint, plan.checkpoint.models["vae"].config
    return Manifest(
        name=checkpoint.name,
        family=checkpoint.family,
        source=checkpoint.source,
        kind="packages",
        attention=kind.value,
        height=plan.shape.height,
        width=plan.shape.width,
        batch_size=plan.shape.batch_size,
        target=plan.options.target,
        latents=manifest.Latents(
            channels=int(vae["latent_channels"]),
            factor=families.latent_factor(vae),
            scale=families.latent_scale(vae),
            shift=float(vae.get("shift_factor") or 0.0),
        ),
        prediction_type=str(checkpoint.schedulers["scheduler"].get("prediction_type", "epsilon")),
        components=dict(entries),
        scheduler=dict(checkpoint.schedulers["scheduler"]),
        noise_scheduler=_optional(checkpoint.schedulers.get("low_res_scheduler")),
        force_zeros_for_empty_prompt=bool(checkpoint.pipeline_config.get("force_zeros_for_empty_prompt", False)),
        requires_safety_checker=bool(checkpoint.pipeline_config.get("requires_safety_checker", False)),
        tools={**tool_versions(), "conversion": plan.fingerprint},
    )


def _optional(config: Mapping[str, object] | None) -> dict[str, object] | None:
    return None if config is None else dict(config)


def _metadata(plan: Plan) -> Metadata:
    checkpoint, versions = plan.checkpoint, plans.tool_versions()
    return Metadata(
        version=checkpoint.source.revision or checkpoint.name,
        author=f"See the model card of {checkpoint.name}; converted with coreml-diffusion",
        license=checkpoint.source.licence or "see the checkpoint's own",
        user_defined={
            "com.github.apple.coremltools.version": versions["coremltools"],
            "com.github.apple.coremltools.source": f"torch=={versions['torch']}",
            "coreml_diffusion.version": versions["coreml-diffusion"],
            "coreml_diffusion.family": checkpoint.family,
            "coreml_diffusion.source": checkpoint.source.name,
        },
    )


def _prefix(plan: Plan) -> str:
    return f"Stable_Diffusion_version_{plan.checkpoint.name.replace('/', '_')}"


def _obsolete(plan: Plan, output: Path) -> tuple[Path, ...]:
    """Variants and zips of an earlier conversion to the same folder that this one did not make."""
    from diffusion_runtime.bundle import ATTENTIONS

    chosen = {kind.value for kind in plan.options.attention}
    found = []
    for name in ATTENTIONS:
        ours = any((output / name / kind / manifest.FILE_NAME).is_file() for kind in ("packages", "compiled"))
        if name not in chosen and ours:
            found.append(output / name)
    return tuple(found)
