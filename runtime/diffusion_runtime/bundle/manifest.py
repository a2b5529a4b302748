"""manifest.json: the contract between convert, runtime and the Swift bridge.

It lies beside the models that it describes (``original/packages/manifest.json``) and names every file relative
to its own folder. Paths never leave that folder. Readers refuse a format version that they do not know.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from diffusion_runtime import strict_json
from diffusion_runtime.errors import PackageError

FORMAT_VERSION = 1
FILE_NAME = "manifest.json"


def _inside(path: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or not path:
        raise ValueError(f"{path!r} does not stay inside the folder")
    return path


RelativePath = Annotated[str, AfterValidator(_inside)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=(), allow_inf_nan=True)


class Tensor(_Frozen):
    """One input or output: numpy's dtype name and the default shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Palettization(_Frozen):
    """How weights were palettized. ``bits_by_weight`` is the recipe: weight name -> bits (absent: kept)."""

    nbits: float
    granularity: str = "per_tensor"
    group_size: int | None = None
    worst_snr_db: float | None = None
    bits_by_weight: dict[str, int] = {}


class Component(_Frozen):
    """One converted submodule. ``files`` are this component's models in the order in which they run (two for a
    chunked UNet); ``sha256`` maps each regular file below them, relative to the manifest, to its hash."""

    files: tuple[RelativePath, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    compute_units: str = "all"
    precision: str = "float16"
    float32_ops: tuple[str, ...] = ()
    size_bytes: int = 0
    sha256: dict[RelativePath, str] = {}
    psnr_db: dict[str, float] = {}
    palettization: Palettization | None = None


class FusedLora(_Frozen):
    """A LoRA that was fused into the weights, at ``weight`` or, in some ``parts`` of the model ("te", "in04"), at
    others. ``left_out`` are its tensors that have no place in the model."""

    name: str
    weight: float
    parts: dict[str, float] = {}
    left_out: tuple[str, ...] = ()


class Source(_Frozen):
    """Where the weights came from. ``revision`` is a commit hash for a Hub repository, else None."""

    name: str
    revision: str | None = None
    licence: str | None = None
    sha256: str | None = None
    loras: tuple[FusedLora, ...] = ()


class Latents(_Frozen):
    """Images are ``factor`` times larger than latents, which are multiplied by ``scale`` (after subtracting
    ``shift``) on the way into the UNet, and divided on the way out."""

    channels: int
    factor: int
    scale: float
    shift: float = 0.0


class Manifest(_Frozen):
    """Everything that a runtime must know and cannot read from the models' interfaces."""

    format_version: Literal[1] = 1
    name: str
    family: str
    source: Source
    kind: Literal["packages", "compiled"]
    attention: str
    height: int
    width: int
    batch_size: int
    target: str
    latents: Latents
    prediction_type: str
    components: dict[str, Component]
    scheduler: dict[str, Any] = Field(description="diffusers' scheduler_config.json, `_class_name` included")
    noise_scheduler: dict[str, Any] | None = Field(
        default=None, description="the x4 upscaler's low_res_scheduler: how its input image is noised"
    )
    tokenizer: RelativePath | None = Field(default=".", description="folder of vocab.json and merges.txt")
    force_zeros_for_empty_prompt: bool = False
    requires_safety_checker: bool = False
    tools: dict[str, str] = {}


def read(folder: Path) -> Manifest:
    """The manifest of a folder of models. Raises PackageError where it is missing, damaged or of the future."""
    path = folder / FILE_NAME
    data = strict_json.read(path, PackageError)
    version = data.get("format_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise PackageError(
            f"{path}: manifest format {version} is newer than this version reads ({FORMAT_VERSION}); "
            "update it with `pip install --upgrade coreml-sd`"
        )
    return strict_json.as_model(Manifest, data, str(path), "a valid manifest", PackageError)


def write(manifest: Manifest, folder: Path) -> None:
    """Write ``folder/manifest.json``, readable and with a stable order."""
    text = json.dumps(manifest.model_dump(mode="json", exclude_none=True), indent=2, ensure_ascii=False)
    (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")
