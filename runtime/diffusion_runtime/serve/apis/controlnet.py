"""What front ends of the Stable Diffusion web UI ask for by its ControlNet extension: units in
``alwayson_scripts``, and `/controlnet/…` for their menus."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from diffusion_runtime.control import ControlFile
from diffusion_runtime.serve.orders import Refused
from diffusion_runtime.serve.service import Service, decoded

SCRIPT = "controlnet"
MOST = 10  # units, of one request
MODULES: Mapping[str, str | None] = {
    "none": None,
    "canny": "canny",
    "depth": "depth",
    "tile_resample": "tile",
    "inpaint": "inpaint",
}
"""The web UI's names of our ways to make a ControlNet's picture."""
_HASH = re.compile(r"\s*\[[0-9a-fA-F]+\]$")
_BALANCED = (0, "Balanced")


class Unit(BaseModel):
    """Fields of the extension that are not listed change nothing in a picture of these models."""

    model_config = ConfigDict(extra="ignore")
    enabled: bool = True
    model: str = ""
    module: str = "none"
    image: str | None = None
    input_image: str | None = None
    weight: float = 1.0
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    control_mode: int | str = 0


class ModelList(BaseModel):
    model_list: list[str]


class ModuleList(BaseModel):
    module_list: list[str]


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/controlnet", tags=["Web UI"])

    @router.get("/model_list")
    async def models() -> ModelList:
        """The ControlNets and adapters of the first of the served models."""
        return ModelList(model_list=list((await service.about(None)).controlnets))

    @router.get("/module_list")
    async def modules() -> ModuleList:
        """How their pictures can be made here."""
        return ModuleList(module_list=list(MODULES))

    return router


def controls(scripts: Mapping[str, Any] | None, image: bytes | None) -> tuple[tuple[ControlFile, bytes], ...]:
    """What the extension's units ask for, with their pictures; without one, ``image`` that is started from. Raises
    Refused."""
    script = (scripts or {}).get(SCRIPT) or {}
    try:
        units = TypeAdapter(list[Unit]).validate_python(
            script.get("args", []) if isinstance(script, dict) else script
        )
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise Refused(f"alwayson_scripts.controlnet.args {place}: {first['msg']}") from None
    used = [unit for unit in units if unit.enabled]
    if len(used) > MOST:
        raise Refused(f"alwayson_scripts.controlnet: {len(used)} units: expected at most {MOST}")
    return tuple(_control(unit, image) for unit in used)


def _control(unit: Unit, image: bytes | None) -> tuple[ControlFile, bytes]:
    if unit.control_mode not in _BALANCED:
        raise Refused(f"control_mode {unit.control_mode!r}: these models know Balanced alone")
    # How the extension encodes a picture for an IP-Adapter: the models' own encoder does.
    module = "none" if unit.module.lower().startswith("ip-adapter") else unit.module.lower()
    if module not in MODULES:
        raise Refused(f"module {unit.module[:100]!r}: expected one of {', '.join(MODULES)}")
    text = unit.image or unit.input_image
    picture = decoded(text, "alwayson_scripts.controlnet: image") if text else image
    if picture is None:
        raise Refused("alwayson_scripts.controlnet: a unit has no image")
    span = unit.guidance_start, unit.guidance_end
    name = _HASH.sub("", unit.model)
    # The record says that there was a picture, though it is in no file that could be found again.
    return ControlFile(name, "(of a request)", unit.weight, *span, MODULES[module]), picture
