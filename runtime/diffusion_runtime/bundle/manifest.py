"""manifest.json: the contract between convert, runtime and the Swift bridge.

It lies next to the models that it describes (``original/packages/manifest.json``) and names every file relative
to its own folder. Paths never leave that folder. Readers refuse a format version that they do not know.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from diffusion_runtime import strict_json
from diffusion_runtime.atomic import unfinished_file
from diffusion_runtime.errors import PackageError
from diffusion_runtime.families import UNETS, Layout
from diffusion_runtime.folding import Folding
from diffusion_runtime.picture_size import PATTERN, Size, parse_size

FORMAT_VERSION = 1
FILE_NAME = "manifest.json"


def _inside(path: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or "\0" in path or not path:
        raise ValueError(f"{path!r} does not stay inside the folder")
    return path


class _SchedulerLimits(BaseModel):
    """Bounds for the keys of a scheduler's configuration that say how large its tables are and what is in them."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    class_name: str | None = Field(default=None, alias="_class_name")
    num_train_timesteps: int = Field(default=1000, ge=1, le=100_000)
    beta_start: float = Field(default=0.0001, ge=0, lt=1)
    beta_end: float = Field(default=0.02, gt=0, lt=1)
    trained_betas: list[Annotated[float, Field(ge=0, le=1)]] | None = Field(
        default=None, min_length=1, max_length=100_000
    )
    steps_offset: int | None = Field(default=None, ge=-1000, le=1000)
    prediction_type: Prediction | None = None


def _usable(config: dict[str, Any]) -> dict[str, Any]:
    try:
        _SchedulerLimits.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{first['loc'][0]} {first['input']!r:.60}: {first['msg']}") from error
    return config


Prediction = Annotated[str, Field(pattern="^(epsilon|v_prediction|sample|flow_prediction)$")]
RelativePath = Annotated[str, AfterValidator(_inside)]
SchedulerConfig = Annotated[dict[str, Any], AfterValidator(_usable)]
Extent = Annotated[int, Field(ge=1, le=1 << 31)]
Pixels = Annotated[int, Field(ge=1, le=1 << 15)]
Finite = Annotated[float, Field(allow_inf_nan=False, ge=-1000, le=1000)]


class _Frozen(BaseModel):
    # Unknown keys are of later versions. Without protected_namespaces=() pydantic warns of names like model_….
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=(), allow_inf_nan=True)


class Tensor(_Frozen):
    """One input or output: numpy's dtype name and the default shape, empty where the model does not declare it.
    ``shapes``: all that an input may have, where there are several."""

    name: str
    dtype: Annotated[str, Field(pattern="^(float16|float32|float64|int32|int8)$")]
    shape: tuple[Extent, ...] = Field(max_length=5)
    shapes: tuple[Annotated[tuple[Extent, ...], Field(max_length=5)], ...] = Field(default=(), max_length=128)


def _declared(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    for tensor in inputs:
        if not tensor.shape:
            raise ValueError(f"input {tensor.name} has no shape")
    return inputs


class Palettization(_Frozen):
    """How weights were palettized. ``bits_by_weight`` is the recipe: weight name -> bits (absent: kept)."""

    nbits: float
    granularity: str = "per_tensor"
    group_size: int | None = None
    worst_snr_db: float | None = None
    bits_by_weight: dict[str, int] = {}


class Component(_Frozen):
    """One converted submodule. ``files`` are this component's models in the order in which they run (two for a
    chunked UNet); ``sha256`` maps each regular file below them, relative to the manifest, to its hash.
    ``vocabulary_size``: how many tokens a text encoder knows, as far as that is known. ``sizes``: where it makes
    pictures of several sizes, it by each ("768x512", width x height): files of its own, or the ``function`` of the
    same files; all else that stands here is of the first of them, and hashes are of all files."""

    files: tuple[RelativePath, ...]
    inputs: Annotated[tuple[Tensor, ...], AfterValidator(_declared)]
    outputs: tuple[Tensor, ...]
    compute_units: str = "all"
    precision: str = "float16"
    float32_ops: tuple[str, ...] = ()
    size_bytes: int = 0
    sha256: dict[RelativePath, str] = {}
    psnr_db: dict[str, float] = {}
    palettization: Palettization | None = None
    vocabulary_size: int | None = Field(default=None, ge=1)
    function: Annotated[str, Field(max_length=128)] | None = Field(
        default=None, description="which function of its files, where they have several"
    )
    sizes: dict[Annotated[str, Field(pattern=f"^{PATTERN.pattern}$")], Component] = Field(default={}, max_length=64)

    def at(self, size: Size) -> Component:
        """The component for pictures of that size."""
        return self.sizes.get(str(size), self)


class FusedLora(_Frozen):
    """A LoRA that was fused into the weights, at ``weight`` or, in some ``parts`` of the model ("te", "in04"), at
    others. ``left_out`` are its tensors that have no place in the model."""

    name: str
    weight: float
    parts: dict[str, float] = {}
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        """As the command line takes it: ``style.safetensors:0.8,te=0``."""
        return ",".join([f"{self.name}:{self.weight:g}", *(f"{part}={w:g}" for part, w in self.parts.items())])


class AddedEmbedding(_Frozen):
    """A textual inversion that was put into the text encoders: prompts name it by ``token``, which stands for so
    many ``vectors``."""

    name: str
    token: str
    vectors: int = Field(ge=1)

    def __str__(self) -> str:
        """As the command line takes it: ``style.pt:<style>``."""
        return f"{self.name}:{self.token}"


class Source(_Frozen):
    """Where the weights came from. ``revision`` is a commit hash for a Hub repository, else None."""

    name: str
    revision: str | None = None
    license: str | None = Field(default=None, validation_alias=AliasChoices("license", "licence"))  # as it was once
    sha256: str | None = None
    loras: tuple[FusedLora, ...] = ()
    embeddings: tuple[AddedEmbedding, ...] = ()


class IpAdapter(_Frozen):
    """An IP-Adapter in the models: what users call it, and where it came from. The UNet takes its tokens as
    ``image_tokens_N``, N its place among them."""

    name: str
    source: str


class Latents(_Frozen):
    """Images are ``factor`` times larger than latents, which are multiplied by ``scale`` (after subtracting
    ``shift``) on the way into the UNet, and divided on the way out. ``drawn``: a picture's are drawn from the
    distribution that the encoder gives; TAESD's gives latents."""

    channels: int = Field(ge=1, le=1024)
    factor: int = Field(ge=1, le=64)
    scale: Finite
    shift: Finite = 0.0
    drawn: bool = True

    @field_validator("scale")
    @classmethod
    def _divides(cls, scale: float) -> float:
        if abs(scale) < 1e-6:
            raise ValueError("latents are divided by it: it must not be zero")
        return scale


class OwnLatents(_Frozen):
    """The latents of a checkpoint's own VAE: ``(z - shift) * scale``, or where there are ``mean`` and ``std`` (one
    number per channel) ``(z - mean) * scale / std``."""

    scale: Finite
    shift: Finite = 0.0
    mean: tuple[Finite, ...] | None = None
    std: tuple[Finite, ...] | None = None

    def __str__(self) -> str:
        several = {"mean": self.mean, "std": self.std}
        told = [f"{name} {', '.join(f'{x:g}' for x in values)}" for name, values in several.items() if values]
        return "; ".join([f"{self.scale:g}", *([f"shift {self.shift:g}"] if self.shift else []), *told])


class Folded(_Frozen):
    """What was put into the models because apps have it fixed (`diffusion_runtime.folding`), with the checkpoint's
    own values. The rest of the manifest describes the models as they are: runtimes need nothing of this.

    ``padding``: the number of the token that the checkpoint pads prompts with, by text encoder: the model puts it
    in the place of <|endoftext|> after the first one."""

    latents: OwnLatents | None = None
    padding: dict[str, Annotated[int, Field(ge=0)]] | None = None
    prediction_type: Prediction | None = None

    @property
    def names(self) -> tuple[Folding, ...]:
        values = (self.latents, self.padding, self.prediction_type)
        return tuple(folding for folding, value in zip(Folding, values, strict=True) if value)

    def lines(self) -> tuple[str, ...]:
        """What was folded, for people: one line each, with the checkpoint's own values."""
        own = "" if self.latents is None else str(self.latents)
        pads = ", ".join(f"{number} ({name})" for name, number in (self.padding or {}).items())
        told = {
            Folding.LATENT_SCALE: f"the latents' scale: the checkpoint's own is {own}",
            Folding.PADDING: f"the padding of prompts: the checkpoint's own is token {pads}",
            Folding.PREDICTION: f"the prediction: the checkpoint's own is {self.prediction_type}",
        }
        return tuple(f"{folding.value}: {told[folding]}" for folding in self.names)


class Refiner(_Frozen):
    """What the manifest of an SDXL base says of its component "refiner"; the fields are those of `Manifest`."""

    source: Source
    scheduler: SchedulerConfig
    prediction_type: Prediction
    force_zeros_for_empty_prompt: bool = False


class ControlNet(_Frozen):
    """What a manifest says of a ControlNet. ``global_pool_conditions``: what it gives is for the text's half of the
    guidance alone, as diffusers uses it; the unconditional half gets zeros. ``control_type``: of a union, the
    number of the kind of pictures that it was converted for."""

    source: Source
    global_pool_conditions: bool = False
    control_type: int | None = Field(default=None, ge=0)


class Manifest(_Frozen):
    """Everything that a runtime must know and cannot read from the models' interfaces."""

    format_version: Literal[1] = 1
    name: str
    family: str
    source: Source
    kind: Literal["packages", "compiled"]
    attention: str
    layout: Layout = Layout.APPLE
    height: Pixels
    width: Pixels
    batch_size: int = Field(ge=1, le=64)
    target: str
    latents: Latents
    prediction_type: Prediction
    components: dict[str, Component]
    scheduler: SchedulerConfig = Field(description="diffusers' scheduler_config.json, `_class_name` included")
    steered_scheduler: SchedulerConfig | None = Field(
        default=None,
        description="what stands in its place with ControlNets and T2I-Adapters, whose pipelines in diffusers take "
        "the checkpoint's own as it is; null where that is the same",
    )
    noise_scheduler: SchedulerConfig | None = Field(
        default=None, description="the x4 upscaler's low_res_scheduler: how the picture that it enlarges is noised"
    )
    tokenizer: RelativePath | None = Field(default=".", description="folder of vocab.json and merges.txt")
    tokenizer_2: RelativePath | None = Field(default=None, description="the same of a second text encoder")
    tokenizer_3: RelativePath | None = Field(default=None, description="folder of T5's tokenizer.json")
    tokenizer_sha256: dict[RelativePath, str] = Field(
        default={}, description="each file of the tokenizers, relative to the manifest; none in older manifests"
    )
    padding: dict[str, Annotated[int, Field(ge=0)]] | None = Field(
        default=None,
        description="the number of the token that the checkpoint pads prompts with, by text encoder, where it is "
        "not <|endoftext|>; null where that is not known",
    )
    force_zeros_for_empty_prompt: bool = False
    clip_skip: int = Field(
        default=0, ge=0, description="how many layers earlier than usual the text encoders' states are taken"
    )
    scales_image_latents: bool = Field(
        default=False, description="the latents of the picture that the UNet sees are scaled, as CosXL edit's"
    )
    refiner: Refiner | None = Field(default=None, description="of the component `refiner`, if there is one")
    controlnets: dict[str, ControlNet] = Field(
        default={}, description="by their own names; the component is called `ControlNet_` and that"
    )
    ip_adapters: tuple[IpAdapter, ...] = ()
    t2i_adapters: dict[str, Source] = Field(
        default={}, description="by their own names; the component is called `T2IAdapter_` and that"
    )
    requires_safety_checker: bool = False
    folded: Folded = Folded()
    tools: dict[str, str] = {}

    @property
    def unet(self) -> Component | None:
        """The checkpoint's own UNet: the plain one, or where that is all there is, the one for ControlNets."""
        return next((self.components[name] for name in UNETS if name in self.components), None)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """All sizes of pictures that the models make; the first is the one where none is asked for."""
        names = dict.fromkeys(name for component in self.components.values() for name in component.sizes)
        own = Size(self.width, self.height)
        return tuple(dict.fromkeys((own, *map(parse_size, names))))

    @property
    def size_folders(self) -> tuple[Size, ...]:
        """The sizes with a folder of their own name: all but the first, where sizes are no functions."""
        own = any(
            part.function is None for component in self.components.values() for part in component.sizes.values()
        )
        return self.sizes[1:] if own else ()

    @model_validator(mode="after")
    def _fits(self) -> Manifest:
        for name, size in (("height", self.height), ("width", self.width)):
            if size % self.latents.factor:
                raise ValueError(f"{name} {size} is no multiple of {self.latents.factor}, as latents are enlarged")
        return self


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
    """Write ``folder/manifest.json``."""
    with unfinished_file(folder / FILE_NAME) as unfinished:
        unfinished.write_bytes(as_bytes(manifest))


def as_bytes(manifest: Manifest) -> bytes:
    """The content of ``manifest.json``, readable and with a stable order."""
    text = json.dumps(manifest.model_dump(mode="json", exclude_none=True), indent=2, ensure_ascii=False)
    return f"{text}\n".encode()
