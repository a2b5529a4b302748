"""What `generate` does: plan the pictures, make them one after the other, write each with how it was made."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_runtime import images, noise, png_record, schedulers
from diffusion_runtime.atomic import passing_file, sweep
from diffusion_runtime.backends import resolve
from diffusion_runtime.errors import InputError
from diffusion_runtime.png_record import Past, Settings

if TYPE_CHECKING:
    from diffusion_runtime.denoising import Step
    from diffusion_runtime.pipeline import Pipeline
    from diffusion_runtime.stages import Run
    from diffusion_runtime.tasks import Request

EMPTY: Mapping[str, Any] = {}
PREVIEW_EVERY = 5  # steps; each preview costs a call of the decoder
_MOST_PROMPT_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Planned:
    """One picture to be made."""

    settings: Settings
    path: Path


@dataclass(frozen=True, slots=True)
class Made:
    """One picture that was made and written."""

    path: Path
    settings: Settings
    flagged: bool
    notes: tuple[str, ...]


OnStep = Callable[[int, "Step", "Run"], None]
"""(index of the first picture of the group, step, run)"""


SHARED = (
    *("steps", "guidance_scale", "image_guidance_scale", "eta", "height", "width", "strength", "noise_level"),
    *("long_prompt", "refiner_start", "guess_mode"),
)
"""What `Settings` and `tasks.Request` call alike, and both hold as it is."""
Inputs = Mapping[str, Any]
"""The pictures that settings name, opened, by the fields of `tasks.Request`."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a command line asks for: pictures of the models in a folder, how to load them (`load_pipeline`'s
    arguments by name), the pictures to start from, where previews go, and what else the pictures' records say."""

    models: str
    planned: tuple[Planned, ...]
    loading: Mapping[str, Any]
    inputs: Inputs
    preview: Path | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


def order(
    models: Path | None,
    options: Mapping[str, Any],
    *,
    loading: Mapping[str, Any] = EMPTY,
    from_picture: Path | None = None,
    prompts_file: Path | None = None,
    count: int = 1,
    output: Path | None = None,
    preview: bool = False,
    extra: Mapping[str, Any] = EMPTY,
) -> Order:
    """``options`` are the fields of `Settings` and ``loading`` the arguments of `load_pipeline` that were given; a
    picture's record, else defaults, say the rest. How a picture's models were loaded counts for models of their
    name alone.

    Raises InputError for what is missing, contradictory or cannot be written, and for what no models could do: it
    is said before any are loaded."""
    folders = ((name, loading.get(name)) for name in png_record.FOLDERS)
    for what, name in (("models", models), *folders, ("prompts file", prompts_file)):
        images.check_name(Path(name or ""), what)
    past = None if from_picture is None else png_record.read(from_picture, overridden=options.keys())
    settings = Settings(**{"prompt": "", "seed": noise.fresh_seed(), **options})
    settings = settings if past is None else replace(past.settings, **options)
    folder, kept = _models(models, past, loading)
    if prompts_file is not None and "prompt" in options:
        raise InputError("--prompt and --prompts-file are both given: give one")
    if prompts_file is None and "prompt" not in options and from_picture is None:
        raise InputError('no prompt: give --prompt "…" (an empty one is allowed) or --prompts-file FILE')
    prompts = (settings.prompt,) if prompts_file is None else read_prompts(prompts_file)
    if output is None:
        if from_picture is None:
            raise InputError("no output named: give -o FILE.png")
        output = from_picture.with_name(f"{from_picture.stem}-again.png")
    planned = plan(settings, prompts, count, output)
    for item in planned:
        images.check_writable(item.path)
    shown = _preview(output) if preview else None
    inputs = _inputs(settings)
    _check(planned, inputs)
    return Order(folder, planned, {**kept, **loading, "scheduler": settings.scheduler}, inputs, shown, extra)


def plan(settings: Settings, prompts: tuple[str, ...], count: int, output: Path) -> tuple[Planned, ...]:
    """Pictures in order: ``count`` of each prompt, with seeds that count up from the settings' own for each prompt.
    One picture is written to ``output``, several to ``output`` with -1, -2, … before the suffix."""
    if count < 1:
        raise InputError(f"--count {count}: expected at least 1")
    if output.suffix.lower() != ".png":
        raise InputError(f"{output}: expected a name that ends in .png")
    if settings.seed + count - 1 > noise.MAX_SEED:
        raise InputError(f"seed {settings.seed} with --count {count}: seeds end at {noise.MAX_SEED}")
    wanted = [replace(settings, prompt=text, seed=settings.seed + i) for text in prompts for i in range(count)]
    if len(wanted) == 1:
        return (Planned(wanted[0], output),)
    return tuple(
        Planned(one, output.with_name(f"{output.stem}-{number}{output.suffix}"))
        for number, one in enumerate(wanted, 1)
    )


def _check(planned: tuple[Planned, ...], inputs: Inputs) -> None:
    """Raise InputError for settings that no models could use."""

    one = planned[0].settings
    request_of([item.settings for item in planned], inputs)
    noise.from_seeds([one.seed, planned[-1].settings.seed], one.rng)
    if one.scheduler is not None:
        schedulers.canonical(one.scheduler)


def _preview(output: Path) -> Path:
    """Where previews go; no file of the user's, as it is deleted in the end. What a killed run left goes now."""
    path = output.with_name(f"{output.stem}-preview.png")
    images.check_writable(path)
    sweep(path.parent)
    if path.exists() or path.is_symlink():
        raise InputError(
            f"{path}: is there already, and --preview would overwrite it: move it, or leave --preview out"
        )
    return path


def _models(models: Path | None, past: Past | None, given: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The folder of models, and what a picture's record says of loading them."""
    if past is None or past.models is None:
        if models is None:
            raise InputError("no models named: `coreml-sd generate MODELS --prompt … -o FILE.png`")
        return str(models), EMPTY
    if models is None:
        remedy = f"name the models, `coreml-sd generate MODELS --from {past.picture}`"
        folder = png_record.find(past.picture, past.models, remedy)
    elif models.absolute().name != Path(past.models).name:
        return str(models), EMPTY
    else:
        folder = str(models)
    # A record's dtype is the torch backend's: it is of no use where another backend is used now.
    unusable = () if resolve(given.get("backend", "auto")) == "torch" else ("dtype",)
    kept = {name: value for name, value in past.loading.items() if name not in (*given, *unusable)}
    for name in png_record.FOLDERS:
        if name in kept:
            remedy = f"name it with --{name.replace('_', '-')}"
            kept[name] = png_record.find(past.picture, kept[name], remedy)
    return folder, kept


def read_prompts(path: Path) -> tuple[str, ...]:
    """The lines of a text file (or pipe) that are not blank. Raises InputError if all are blank, or too much."""
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_PROMPT_BYTES + 1)
        if len(data) > _MOST_PROMPT_BYTES:
            raise InputError(f"prompts file {path}: is larger than {_MOST_PROMPT_BYTES >> 20} MB: take several")
        lines = data.decode("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"prompts file {path}: cannot be read as text: {error}") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise InputError(f"prompts file {path}: holds no prompts (one per line)")
    return prompts


def make(pipeline: Pipeline, order: Order, on_step: OnStep) -> Iterator[Made]:
    """Make and write pictures, yielding each as soon as it lies there; nothing is written for a picture that
    fails."""
    planned, preview = order.planned, order.preview
    first = planned[0].settings
    record = {**_named(order), **record_of(pipeline), **png_record.hashes(first), **order.extra}
    group = 1 if pipeline.is_guided(request_of([first], order.inputs)) else pipeline.batch_size
    with nullcontext() if preview is None else passing_file(preview) as show:
        for start in range(0, len(planned), group):
            chosen = planned[start : start + group]
            run = prepare(pipeline, chosen, order.inputs)
            latents = run.start.latents
            for step in pipeline.denoise(run):
                latents = step.latents
                on_step(start, step, run)
                if show is not None and step.index + 1 < step.total and step.index % PREVIEW_EVERY == 0:
                    show(pipeline.preview(step).save)
            yield from _written(pipeline, run, latents, chosen, record)


def prepare(pipeline: Pipeline, planned: tuple[Planned, ...], inputs: Inputs) -> Run:
    """A run of several pictures that differ in prompt and seed alone."""
    settings = [item.settings for item in planned]
    drawn = noise.from_seeds([one.seed for one in settings], settings[0].rng)
    return pipeline.prepare(request_of(settings, inputs), drawn)


def request_of(settings: Sequence[Settings], inputs: Inputs) -> Request:
    """What settings ask for that differ in prompt and seed alone. Raises InputError as `Request` does."""
    from diffusion_runtime.tasks import Request

    one = settings[0]
    negatives = () if one.negative_prompt is None else tuple(each.negative_prompt or "" for each in settings)
    shared = {name: getattr(one, name) for name in SHARED}
    return Request(tuple(each.prompt for each in settings), negatives, **shared, **inputs)


def _written(
    pipeline: Pipeline, run: Run, latents: Any, planned: tuple[Planned, ...], record: Mapping[str, Any]
) -> Iterator[Made]:

    result = pipeline.finish(run, latents)
    flags = result.nsfw_content_detected or [False] * len(planned)
    used = schedulers.recorded(run.job.scheduler)
    for item, image, flagged in zip(planned, result.images, flags, strict=True):
        settings = replace(item.settings, scheduler=used, **filled_in(run), **_as_used(item.settings, run))
        inputs = png_record.named_inputs(settings, item.path)
        told = {**asdict(settings), **inputs, "task": run.task.name, **record, "flagged": bool(flagged)}
        images.write_png(image, item.path, told)
        yield Made(item.path, settings, flagged, result.notes)


def _as_used(settings: Settings, run: Run) -> dict[str, Any]:
    """The pictures that steered with the names and scales that were used."""
    request = run.job.request
    return {
        setting: tuple(
            replace(file, name=control.name, scale=control.scale)
            for file, control in zip(getattr(settings, setting), used, strict=True)
        )
        for setting, used in (("controls", request.controls), ("adapters", request.adapters))
    }


def filled_in(run: Run) -> dict[str, Any]:
    """The steps and guidance scale that were used; strength, noise level and that of the image, where the task has
    them."""
    request = run.job.request
    used = {
        "strength": request.change,
        "noise_level": request.noise,
        "image_guidance_scale": request.image_guidance_scale,
    }
    taken = {name: value if name in run.task.takes else None for name, value in used.items()}
    return {"steps": request.step_count, "guidance_scale": request.scale, **taken}


def _inputs(settings: Settings) -> Inputs:
    from diffusion_runtime import picture_prompts, t2i_adapters

    kinds = {"image": ("image", "RGB"), "mask": ("mask", "L"), "depth": ("depth_image", "F")}
    opened = {
        field: images.load(Path(getattr(settings, name)), f"--{name.replace('_', '-')}", mode)
        for field, (name, mode) in kinds.items()
        if getattr(settings, name) is not None
    }
    return {
        **opened,
        "controls": tuple(control.opened() for control in settings.controls),
        "adapters": tuple(t2i_adapters.opened(file) for file in settings.adapters),
        "picture_prompts": tuple(picture_prompts.opened(file) for file in settings.ip_adapter_images),
    }


def _named(order: Order) -> dict[str, Any]:
    """What the pictures, which lie in one folder, say of the models' own and of how they were loaded."""
    chosen = {name: order.loading[name] for name in png_record.LOADING if order.loading.get(name) is not None}
    paths = {"models": order.models, **{name: chosen[name] for name in png_record.FOLDERS if name in chosen}}
    return chosen | {name: png_record.named(path, order.planned[0].path) for name, path in paths.items()}


def record_of(pipeline: Pipeline) -> dict[str, Any]:
    """What the picture says of the models and the software."""
    described = pipeline.manifest
    return {
        "model": described.source.name,
        "revision": described.source.revision,
        "family": described.family,
        "attention": described.attention,
        "safety_checker": pipeline.check_safety and "safety_checker" in pipeline.models,
        "versions": _versions(),
    }


@cache
def _versions() -> dict[str, str]:
    """Kept: to read them takes as long as a short request to `serve`."""
    libraries = ("coreml-sd", "torch", "diffusers", "coremltools")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in libraries}}
