"""`/sdapi/v1/…`: the shapes of the Stable Diffusion web UI's API, so that front ends for it work unchanged.

Width and height of a request are followed where the models make that size; where they do not, as how the web UI
prepares masks is not, the answer's notes say so.
What the web UI has and these models have not (high-resolution passes, tiling, scripts, …) is refused where it
would change the picture.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from diffusion_runtime import noise
from diffusion_runtime.picture_size import Size
from diffusion_runtime.serve.apis import controlnet
from diffusion_runtime.serve.orders import About, Cancelled, Picture, Refused, Wanted
from diffusion_runtime.serve.service import Service, decoded, disconnect, encoded

SAMPLERS: Mapping[str, str] = {
    "DPM++ 2M": "dpm++ 2m",
    "DPM++ SDE": "dpm++ sde",
    "DPM++ 2M SDE": "dpm++ 2m sde",
    "Euler a": "euler-ancestral",
    "Euler": "euler",
    "LMS": "lms",
    "Heun": "heun",
    "DPM2": "dpm2",
    "DPM2 a": "dpm2-ancestral",
    "LCM": "lcm",
    "DDIM": "ddim",
    "PLMS": "pndm",
    "UniPC": "unipc",
}
"""The web UI's names of our schedulers."""
KARRAS = ("lms", "euler", "heun", "dpm++ 2m", "dpm++ 2m sde", "dpm++ sde")
SCHEDULES = ("automatic", "karras")
ORIGINAL = 1
"""The web UI's number for painting over what is there, which is what these models do."""
CANNOT = ("enable_hr", "restore_faces", "tiling", "subseed_strength", "script_name", "styles")
"""Fields that change the picture, if they are set, in ways that these models have not."""
UNCHANGING = ("", "none", "None", "automatic", "Automatic", "Use same scheduler")


class Text2Image(BaseModel):
    """Fields of the web UI that are not listed change nothing in a picture of these models."""

    model_config = ConfigDict(extra="ignore")
    prompt: str = ""
    negative_prompt: str = ""
    seed: Annotated[int, Field(ge=-1, description="-1: random.")] = -1
    sampler_name: str | None = Field(
        default=None, description="A name of /sdapi/v1/samplers. Default: the checkpoint's."
    )
    sampler_index: str | None = None
    scheduler: str | None = None
    batch_size: Annotated[int, Field(ge=1)] = 1
    n_iter: Annotated[int, Field(ge=1)] = 1
    steps: Annotated[int, Field(ge=1)] = 50
    cfg_scale: Annotated[float, Field(ge=-1000, le=1000)] = 7.0
    eta: Annotated[float, Field(ge=0, le=1)] | None = None
    width: int | None = None
    height: int | None = None
    override_settings: dict[str, Any] | None = None
    enable_hr: bool = False
    restore_faces: bool | None = False
    tiling: bool | None = False
    subseed_strength: float = 0.0
    script_name: str | None = None
    alwayson_scripts: dict[str, Any] | None = None
    refiner_checkpoint: str | None = None
    styles: list[str] | None = None
    send_images: bool = True


class Image2Image(Text2Image):
    init_images: list[str] = Field(min_length=1, max_length=1, description="A picture in base64.")
    denoising_strength: Annotated[float, Field(gt=0, le=1)] = 0.75
    image_cfg_scale: Annotated[float, Field(ge=-1000, le=1000, description="InstructPix2Pix.")] | None = None
    mask: str | None = Field(default=None, description="In base64; white is painted anew.")
    inpainting_mask_invert: Annotated[int, Field(ge=0, le=1)] = 0
    inpaint_full_res: bool = False
    mask_blur: Annotated[int, Field(ge=0)] = 0
    inpainting_fill: Annotated[int, Field(ge=0, le=3)] = ORIGINAL


class Answer(BaseModel):
    images: list[str]
    parameters: dict[str, Any]
    info: str


class State(BaseModel):
    skipped: bool = False
    interrupted: bool = False
    job: str = ""
    job_count: int = 0
    job_timestamp: str = "0"
    job_no: int = 0
    sampling_step: int = 0
    sampling_steps: int = 0


class ProgressAnswer(BaseModel):
    progress: float
    eta_relative: float
    state: State
    current_image: str | None = None
    textinfo: str | None = None


class Sampler(BaseModel):
    name: str
    aliases: list[str]
    options: dict[str, str] = {}


class Schedule(BaseModel):
    name: str
    label: str
    aliases: list[str] = []
    default_rho: float = -1
    need_inner_model: bool = False


class ModelEntry(BaseModel):
    title: str
    model_name: str
    hash: str | None = None
    sha256: str | None = None
    filename: str
    config: str | None = None


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/sdapi/v1", tags=["Web UI"])

    @router.post("/txt2img")
    async def txt2img(request: Request, asked: Text2Image) -> Answer:
        """Pictures from a prompt."""
        model = _check(service, asked)
        size = _size(await service.about(model), asked)
        return await _answer(service, request, asked, _wanted(service, asked, size=size), model, size)

    @router.post("/img2img")
    async def img2img(request: Request, asked: Image2Image) -> Answer:
        """Pictures from a picture; with a mask, painted in."""
        model = _check(service, asked)
        if asked.mask and asked.inpainting_mask_invert:
            raise Refused("inpainting_mask_invert: is not there; send the mask as it is to be used")
        image = decoded(asked.init_images[0], "init_images")
        mask = decoded(asked.mask, "mask") if asked.mask else None  # "" is none in the web UI, too
        about = await service.about(model)
        size = _size(about, asked)
        wanted = _wanted(service, asked, image=image, mask=mask, size=size, **_numbers(asked, about.uses))
        return await _answer(service, request, asked, wanted, model, size, _not_followed(asked))

    @router.get("/progress")
    async def progress() -> ProgressAnswer:
        """How far the pictures are that were asked for here."""
        return _progress(service)

    @router.post("/interrupt")
    async def interrupt() -> dict[str, str]:
        """Cancel what runs of the pictures that were asked for here."""
        for waiting in list(service.running.values()):
            if waiting.progress is not None:
                service.engine.cancel(waiting)
        return {}

    _add_lists(router, service)
    return router


def _add_lists(router: APIRouter, service: Service) -> None:
    """What front ends ask for when they start, to fill their menus."""

    @router.get("/options")
    async def options() -> dict[str, Any]:
        """The web UI's settings that exist here."""
        return {"sd_model_checkpoint": service.engine.default.setup.name, "samples_format": "png"}

    @router.get("/sd-models")
    async def models() -> list[ModelEntry]:
        """The models that are served. ``filename`` is their name: where they lie is told to nobody."""
        return [ModelEntry(title=name, model_name=name, filename=name) for name in service.engine.sets]

    @router.get("/samplers")
    async def samplers() -> list[Sampler]:
        return [Sampler(name=name, aliases=[ours]) for name, ours in SAMPLERS.items()]

    @router.get("/schedulers")
    async def schedulers() -> list[Schedule]:
        return [Schedule(name=name, label=name.capitalize()) for name in SCHEDULES]


async def _answer(
    service: Service,
    request: Request,
    asked: Text2Image,
    wanted: list[Wanted],
    model: str | None,
    drawn: Size | None,
    notes: Sequence[str] = (),
) -> Answer:
    about = await service.about(model)
    interrupted = False
    if drawn is None:
        drawn, notes = about.sizes[0], [*notes, f"the models make {about.made}"]
    try:
        pictures = await service.make(partial(disconnect, request), service.order(wanted), model, follow=True)
    except Cancelled as error:  # by /interrupt: what is finished is the answer, as in the web UI
        pictures, interrupted = error.pictures, True
    told = asked.model_dump(exclude={"init_images", "mask"})
    size = {"width": drawn.width, "height": drawn.height}
    return Answer(
        images=[encoded(picture.png) for picture in pictures] if asked.send_images else [],
        parameters={**told, **size},
        info=json.dumps(_info(asked, wanted, pictures, {**size, "sd_model_name": about.name}, interrupted, notes)),
    )


def _progress(service: Service) -> ProgressAnswer:
    waiting = next((one for one in service.running.values() if one.progress is not None), None)
    if waiting is None or waiting.progress is None:
        return ProgressAnswer(progress=0.0, eta_relative=0.0, state=State(job_count=len(service.running)))
    now, count = waiting.progress, len(waiting.order.pictures)
    done = (now.picture + now.step / now.total) / count
    left = (time.monotonic() - waiting.since) * (1 - done) / done
    state = State(
        job=waiting.order.id,
        job_count=count,
        job_no=now.picture,
        sampling_step=now.step,
        sampling_steps=now.total,
    )
    return ProgressAnswer(progress=done, eta_relative=left, state=state)


def _check(service: Service, asked: Text2Image) -> str | None:
    """The name of the models. Raises Refused for what would change the picture and cannot be done."""
    found = [name for name in CANNOT if getattr(asked, name)]
    if any(value for name, value in (asked.alwayson_scripts or {}).items() if name != controlnet.SCRIPT):
        found.append("alwayson_scripts")
    if asked.refiner_checkpoint not in (None, *UNCHANGING):
        found.append("refiner_checkpoint")
    if found:
        raise Refused(f"{', '.join(found)}: these models cannot do that; leave it out")
    settings = dict(asked.override_settings or {})
    name = settings.pop("sd_model_checkpoint", None)
    if settings:
        raise Refused(
            f"override_settings: only sd_model_checkpoint is known, got {', '.join(sorted(settings))[:200]}"
        )
    if name is not None:
        service.engine.find(str(name))
    return None if name is None else str(name)


def _size(about: About, asked: Text2Image) -> Size | None:
    """Of the pictures; None where the models do not make the one that is asked for: they draw their first."""
    try:
        return about.size(asked.width, asked.height)
    except Refused:
        return None


def _numbers(asked: Image2Image, uses: Sequence[str]) -> dict[str, float | None]:
    """What models that use these keys of `GIVEN` are told; clients send all of it to all models."""
    sent = {"strength": asked.denoising_strength, "image_guidance_scale": asked.image_cfg_scale}
    return {name: value for name, value in sent.items() if name in uses}


def _not_followed(asked: Image2Image) -> list[str]:
    """A note on what the web UI does to masks and we do not. Its clients send these fields in any case."""
    changing = {
        "inpaint_full_res": asked.inpaint_full_res,
        "mask_blur": asked.mask_blur,
        "inpainting_fill": asked.inpainting_fill != ORIGINAL,
    }
    found = [name for name, value in changing.items() if value and asked.mask]
    if not found:
        return []
    return [f"{', '.join(found)}: not followed; the mask is used as it is, over the whole picture"]


def _scheduler(asked: Text2Image) -> str | None:
    """Our name of a sampler and a schedule; "DPM++ 2M Karras", as older front ends say it, too. Raises Refused."""
    sampler = asked.sampler_name or asked.sampler_index or ""
    schedule = (asked.scheduler or "automatic").lower()
    if sampler.lower().endswith(" karras"):
        sampler, schedule = sampler[: -len(" karras")], "karras"
    if sampler in UNCHANGING:
        return None
    known = {name.lower(): ours for name, ours in SAMPLERS.items()} | {ours: ours for ours in SAMPLERS.values()}
    ours = known.get(sampler.lower())
    if ours is None:
        raise Refused(f"unknown sampler {sampler[:100]!r}: expected one of {', '.join(SAMPLERS)}")
    if schedule not in SCHEDULES or (schedule == "karras" and ours not in KARRAS):
        raise Refused(
            f"scheduler {schedule[:100]!r} with {sampler}: expected automatic, or karras for {', '.join(KARRAS)}"
        )
    return f"{ours} karras" if schedule == "karras" else ours


def _wanted(service: Service, asked: Text2Image, **pictures: Any) -> list[Wanted]:
    count = asked.batch_size * asked.n_iter
    if count > service.limits.pictures:
        raise Refused(f"batch_size times n_iter is {count}: expected at most {service.limits.pictures}")
    first = noise.fresh_seed() if asked.seed == -1 else asked.seed
    scheduler = _scheduler(asked)
    controls = controlnet.controls(asked.alwayson_scripts, pictures.get("image"))
    return [
        service.wanted(
            asked.prompt,
            negative_prompt=asked.negative_prompt,
            steps=asked.steps,
            guidance_scale=asked.cfg_scale,
            seed=first + index,
            scheduler=scheduler,
            eta=asked.eta or 0.0,
            controls=controls,
            **pictures,
        )
        for index in range(count)
    ]


def _info(
    asked: Text2Image,
    wanted: list[Wanted],
    pictures: tuple[Picture, ...],
    extra: Mapping[str, Any],
    interrupted: bool,
    unfollowed: Sequence[str],
) -> dict[str, Any]:
    """What the web UI tells of pictures, as its front ends read it."""
    seeds = [one.settings.seed for one in wanted]
    size = f"{extra['width']}x{extra['height']}"
    notes = [*unfollowed, *sorted({note for picture in pictures for note in picture.notes})]
    sampler = asked.sampler_name or asked.sampler_index or ""
    texts = [
        f"{one.settings.prompt}\n"
        + (f"Negative prompt: {asked.negative_prompt}\n" if asked.negative_prompt else "")
        + f"Steps: {asked.steps}, Sampler: {sampler or 'the default'}, CFG scale: {asked.cfg_scale}, "
        f"Seed: {one.settings.seed}, Size: {size}, Model: {extra['sd_model_name']}"
        for one in wanted
    ]
    return {
        "prompt": asked.prompt,
        "all_prompts": [asked.prompt] * len(wanted),
        "negative_prompt": asked.negative_prompt,
        "all_negative_prompts": [asked.negative_prompt] * len(wanted),
        "seed": seeds[0],
        "all_seeds": seeds,
        "subseed": seeds[0],
        "all_subseeds": seeds,
        "subseed_strength": 0,
        **extra,
        "sampler_name": sampler,
        "cfg_scale": asked.cfg_scale,
        "steps": asked.steps,
        "batch_size": asked.batch_size,
        "index_of_first_image": 0,
        "infotexts": texts,
        "interrupted": interrupted,
        "nsfw_content_detected": [picture.flagged for picture in pictures],
        "notes": notes,
    }
