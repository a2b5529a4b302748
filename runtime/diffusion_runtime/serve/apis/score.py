"""`POST /score`: the request and the answer of Azure ML's online endpoints for Stable Diffusion."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from diffusion_runtime.picture_size import Size
from diffusion_runtime.serve.orders import Refused, Wanted
from diffusion_runtime.serve.service import Service, decoded, disconnect, encoded

COLUMNS = ("prompt", "negative_prompt", "image", "mask_image")


class Parameters(BaseModel):
    """For every row."""

    model_config = ConfigDict(extra="forbid", strict=True)
    num_inference_steps: Annotated[int, Field(description="Denoising steps.", ge=1)] = 50
    guidance_scale: Annotated[float, Field(description="On when above 1.", ge=-1000, le=1000)] = 7.5
    seed: Annotated[int | None, Field(description="Of the first row; rows count up. Default: random.", ge=0)] = None
    scheduler: str | None = None
    eta: Annotated[float, Field(description="Fresh noise in each step of ddim; tcd's gamma.", ge=0, le=1)] = 0.0
    negative_prompt: str | None = None
    strength: Annotated[float | None, Field(description="How much of an image may change.", gt=0, le=1)] = None
    image_guidance_scale: Annotated[float | None, Field(description="InstructPix2Pix.", ge=-1000, le=1000)] = None
    width: Annotated[int | None, Field(description="In pixels. Default: the models' first size.", ge=1)] = None
    height: Annotated[int | None, Field(description="The same.", ge=1)] = None


class InputData(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    columns: list[str] = Field(description=f"Of each row: {', '.join(COLUMNS)}.")
    data: list[str | list[str | None]] = Field(
        description="A text for each row, or a list with one for each column."
    )
    index: list[int | str] | None = Field(default=None, description="Names of the rows, as many as there are.")
    parameters: Parameters = Field(default_factory=Parameters)


class Score(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    input_data: InputData
    model: str | None = Field(
        default=None, description="Which of the served models; the first where it is left out."
    )


class Generated(BaseModel):
    prompt: str
    generated_image: str = Field(description="A PNG in base64; wholly black where it was flagged.")
    nsfw_content_detected: bool


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["Azure ML"])

    @router.post("/score")
    async def score(request: Request, asked: Score) -> list[Generated]:
        """Make a picture for each row."""
        told = asked.input_data.parameters
        size = None
        if told.width is not None or told.height is not None:
            size = (await service.about(asked.model)).size(told.width, told.height)
        wanted = _wanted(service, asked.input_data, size)
        pictures = await service.make(partial(disconnect, request), service.order(wanted), asked.model)
        return [
            Generated(
                prompt=one.settings.prompt,
                generated_image=encoded(picture.png),
                nsfw_content_detected=picture.flagged,
            )
            for one, picture in zip(wanted, pictures, strict=True)
        ]

    return router


def _wanted(service: Service, asked: InputData, size: Size | None) -> list[Wanted]:
    unknown = [name for name in asked.columns if name not in COLUMNS]
    if unknown or "prompt" not in asked.columns or len(set(asked.columns)) != len(asked.columns):
        raise Refused(f"columns {asked.columns}: expected prompt and, once each, any of {', '.join(COLUMNS[1:])}")
    if asked.index is not None and len(asked.index) != len(asked.data):
        raise Refused(f"index has {len(asked.index)} entries for {len(asked.data)} rows of data")
    return [_row(service, asked, size, number, row) for number, row in enumerate(asked.data)]


def _row(service: Service, asked: InputData, size: Size | None, number: int, row: str | list[str | None]) -> Wanted:
    values = [row] if isinstance(row, str) else row
    if len(values) != len(asked.columns):
        raise Refused(f"data[{number}]: {len(values)} values for {len(asked.columns)} columns")
    given: dict[str, Any] = {
        name: value for name, value in zip(asked.columns, values, strict=True) if value is not None
    }
    if "prompt" not in given:
        raise Refused(f"data[{number}]: no prompt")
    pictures = {name: decoded(given[name], name) if name in given else None for name in ("image", "mask_image")}
    if pictures["mask_image"] is not None and pictures["image"] is None:
        raise Refused(f"data[{number}]: a mask_image without an image")
    parameters = asked.parameters
    return service.wanted(
        given["prompt"],
        negative_prompt=given.get("negative_prompt", parameters.negative_prompt),
        steps=parameters.num_inference_steps,
        guidance_scale=parameters.guidance_scale,
        seed=None if parameters.seed is None else parameters.seed + number,
        scheduler=parameters.scheduler,
        eta=parameters.eta,
        strength=parameters.strength,
        image_guidance_scale=parameters.image_guidance_scale,
        image=pictures["image"],
        mask=pictures["mask_image"],
        size=size,
    )
