"""`/v1/images/generations` and `/v1/images/edits`: the shapes of OpenAI's API, so that its clients work unchanged.

What OpenAI's API has and these models have not (a URL as answer, streaming, other sizes) is refused in its own
words; what they have in addition (seed, steps, guidance scale, negative prompt, scheduler) may be given as extra
parameters.
"""

from __future__ import annotations

import re
import time
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Form, Request, UploadFile
from pydantic import BaseModel, ConfigDict, Field

from diffusion_runtime.picture_size import listed
from diffusion_runtime.serve.orders import Picture, Refused
from diffusion_runtime.serve.service import Service, disconnect, encoded

SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
Steps = Annotated[int, Field(ge=1, description="Denoising steps (not of OpenAI).")]
Seed = Annotated[int | None, Field(ge=0, description="Of the first picture; others count up (not of OpenAI).")]
Scale = Annotated[
    float | None, Field(ge=-1000, le=1000, description="How closely to follow the prompt (not of OpenAI).")
]
Strength = Annotated[
    float | None, Field(gt=0, le=1, description="How much of the image may change (not of OpenAI).")
]
Count = Annotated[int, Field(ge=1, description="How many pictures.")]
Size = Annotated[str, Field(description="auto, or one that the models make.")]
FORM_FIELDS = frozenset(
    {
        *("image", "image[]", "mask", "prompt", "model", "n", "size", "response_format", "user", "quality"),
        *("output_format", "background", "input_fidelity", "moderation"),
        *("seed", "num_inference_steps", "guidance_scale", "negative_prompt", "scheduler", "strength"),
        "image_guidance_scale",
    }
)


class Generations(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    prompt: str
    model: str | None = None
    n: Count | None = 1
    size: Size | None = "auto"
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    quality: Literal["auto", "standard", "high", "medium", "low", "hd"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    stream: Literal[False] | None = None
    style: Literal["vivid", "natural"] | None = None
    user: str | None = None
    seed: Seed = None
    num_inference_steps: Steps = 50
    guidance_scale: Scale = None
    negative_prompt: str | None = None
    scheduler: str | None = None


class Datum(BaseModel):
    b64_json: str
    nsfw_content_detected: bool


class Images(BaseModel):
    created: int
    data: list[Datum]
    output_format: Literal["png"] = "png"
    size: str


class ModelEntry(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "coreml-sd"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelEntry]


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["OpenAI"])

    @router.get("/models")
    async def models() -> ModelList:
        """The models that are served."""
        return ModelList(data=[ModelEntry(id=name) for name in service.engine.sets])

    @router.post("/images/generations")
    async def generations(request: Request, asked: Generations) -> Images:
        """Make pictures from a prompt."""
        return await _answer(
            service,
            request,
            asked.model,
            asked.size,
            asked.n or 1,
            asked.seed,
            asked.prompt,
            negative_prompt=asked.negative_prompt,
            steps=asked.num_inference_steps,
            guidance_scale=asked.guidance_scale,
            scheduler=asked.scheduler,
        )

    _add_edits(router, service)
    return router


def _add_edits(router: APIRouter, service: Service) -> None:
    @router.post("/images/edits")
    async def edits(
        request: Request,
        prompt: Annotated[str, Form()],
        image: Annotated[
            list[UploadFile] | None, File(description="The picture, one; what is transparent is painted anew.")
        ] = None,
        in_list: Annotated[
            list[UploadFile] | None, File(alias="image[]", description="image, as clients with lists spell it.")
        ] = None,
        mask: Annotated[UploadFile | None, File(description="Transparent where the image is painted anew.")] = None,
        model: Annotated[str | None, Form()] = None,
        n: Annotated[Count, Form()] = 1,
        size: Annotated[Size, Form()] = "auto",
        response_format: Annotated[Literal["b64_json"], Form()] = "b64_json",  # noqa: ARG001 checked by its type
        output_format: Annotated[Literal["png"], Form()] = "png",  # noqa: ARG001
        seed: Annotated[Seed, Form()] = None,
        num_inference_steps: Annotated[Steps, Form()] = 50,
        guidance_scale: Annotated[Scale, Form()] = None,
        negative_prompt: Annotated[str | None, Form()] = None,
        scheduler: Annotated[str | None, Form()] = None,
        strength: Annotated[Strength, Form()] = None,
        image_guidance_scale: Annotated[Scale, Form()] = None,
    ) -> Images:
        """Paint in where the mask (or the image) is transparent; without either, make a picture like the image."""
        for name in await request.form():
            if name not in FORM_FIELDS:
                raise Refused(f"Unknown parameter: '{name}'.")
        pictures = [*(image or ()), *(in_list or ())]
        if len(pictures) != 1:
            raise Refused(f"image: got {len(pictures)} pictures, expected one")
        return await _answer(
            service,
            request,
            model,
            size,
            n,
            seed,
            prompt,
            negative_prompt=negative_prompt,
            steps=num_inference_steps,
            guidance_scale=guidance_scale,
            scheduler=scheduler,
            strength=strength,
            image_guidance_scale=image_guidance_scale,
            image=await pictures[0].read(),
            mask=None if mask is None else await mask.read(),
            mask_is_alpha=True,
        )


async def _answer(
    service: Service,
    request: Request,
    name: str | None,
    size: str | None,
    count: int,
    seed: int | None,
    prompt: str,
    **settings: Any,
) -> Images:
    """Make ``count`` pictures of one prompt, of seeds that count up, unless the client goes away before."""
    model = _model(service, name)
    about = await service.about(model)
    match = SIZE.fullmatch(size or "auto")
    if match is None and (size or "auto") != "auto":
        raise Refused(f"Invalid size {size!r}: expected auto or {listed(about.sizes)}")
    drawn = about.size(int(match[1]), int(match[2])) if match else about.sizes[0]
    if count > service.limits.pictures:
        raise Refused(f"n {count}: expected at most {service.limits.pictures}")
    settings["size"] = drawn if match else None
    wanted = [
        service.wanted(prompt, seed=None if seed is None else seed + index, **settings) for index in range(count)
    ]
    pictures = await service.make(partial(disconnect, request), service.order(wanted), model)
    return Images(created=int(time.time()), data=[_datum(picture) for picture in pictures], size=str(drawn))


def _model(service: Service, name: str | None) -> str | None:
    """OpenAI's clients insist on a model's name: with one set of models, any is taken for it."""
    return None if len(service.engine.sets) == 1 else name


def _datum(picture: Picture) -> Datum:
    return Datum(b64_json=encoded(picture.png), nsfw_content_detected=picture.flagged)
