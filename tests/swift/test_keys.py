"""Swift hears of what Python's files hold: each key, family and scheduler is in the Swift sources, or stands here
with the reason why not."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, get_args

import diffusers
from pydantic import BaseModel
from tokenizers import AddedToken

from diffusion_runtime import png_record
from diffusion_runtime.bundle.manifest import Manifest
from diffusion_runtime.families import FAMILIES, UNET
from diffusion_runtime.prompt import tokenizer
from diffusion_runtime.schedulers import SCHEDULERS
from swift.conftest import PACKAGE

SOURCES = PACKAGE / "Sources"
LIBRARY = SOURCES / "DiffusionBridge"
PROGRAM = SOURCES / "coreml-sd-swift"

INTERFACE = "the models' own interface says it"
MADE = "says how the files were made, for people and for verify, publish and bundle"
EDITS = "of InstructPix2Pix, whose UNets of 8 channels are refused"
FIRST_SIZE = "the first size is drawn; a folder of a further size has a manifest of its own"
MANIFEST_NOT_NEEDED = {
    "scales_image_latents": EDITS,
    "steered_scheduler": "of pictures that are steered, which are refused",
    "latents.drawn": "the log-variance that TAESD's encoder is given makes what is drawn too small to be seen",
    "clip_skip": "part of the text encoders; without their output for negative prompts, those skip layers too",
    "name": "messages name the source",
    "kind": "what a file is shows by its name",
    "height": INTERFACE,
    "width": INTERFACE,
    "batch_size": INTERFACE,
    "target": MADE,
    "tools": MADE,
    "source.license": MADE,
    "source.sha256": MADE,
    "source.loras": MADE,
    "source.embeddings": MADE,
    "tokenizer_sha256": MADE,
    "tokenizer_3": "of T5, whose states no UNet takes",
    "padding": "for the card: prompts are padded as the tokenizer's files say",
    "folded": "the rest of the manifest describes the models as they are",
    "refiner.source": "for the card",
    **dict.fromkeys(
        ("ip_adapters", "t2i_adapters"), "a UNet with inputs for them is refused, by the inputs' names"
    ),
    "controlnets": "the package draws without ControlNets",
    "components.inputs.dtype": INTERFACE,
    "components.inputs.shapes": "the default shape is used",
    "components.outputs": INTERFACE,
    "components.precision": MADE,
    "components.float32_ops": MADE,
    "components.sha256": MADE,
    "components.psnr_db": MADE,
    "components.palettization": MADE,
    "components.function": FIRST_SIZE,
    "components.sizes": FIRST_SIZE,
}
RECORD_NOT_READ = {
    "dtype": "Core ML computes in the types of the models; the torch backend alone has a choice",
    "image_guidance_scale": EDITS,
    **dict.fromkeys(("guess_mode", "depth_estimator"), "of ControlNets, and a record with some is refused"),
}
FILES_NOT_READ = {"tokenizer.json": "vocab.json and merges.txt are asked for by name where they are missing"}
TOKEN_NOT_NEEDED = dict.fromkeys(("lstrip", "rstrip"), "white space beside a token is dropped in any case")

SCHEDULERS_NOT_MADE = dict.fromkeys(
    ("ddpm", "dpm2", "dpm2-ancestral", "deis", "tcd"), "refused by name, with those that there are"
)

FLOW = "of flow matching, whose switch, use_flow_sigmas, is refused"
THRESHOLD = "of thresholding, which is refused"
SETTINGS_NOT_READ = {
    "dynamic_thresholding_ratio": THRESHOLD,
    "sample_max_value": THRESHOLD,
    "flow_shift": FLOW,
    "use_dynamic_shifting": FLOW,
    "time_shift_type": FLOW,
    "shift_terminal": "cuts the ends of flow matching, the only one that has it",
    "solver_p": "a scheduler as an object, which no file can hold",
}
"""Settings of diffusers' schedulers that the Swift package neither follows nor refuses."""

OBJECTS = {
    "reader": "",
    "source": "source.",
    "latents": "latents.",
    "refiner": "refiner.",
    "": "components.",
    "entry": "components.inputs.",
}
"""What Manifest.swift calls the objects of a manifest that it reads; "": a component, which reads itself."""
READ = re.compile(r'(?:(\w+)\.)?(?:json\[|(?:string|number|integer|object|members)\()"(\w+)"|(\w+)\["(\w+)"\]')


def paths(model: type[BaseModel], before: str = "", within: tuple[type[BaseModel], ...] = ()) -> Iterator[str]:
    """The keys of a model and of the models in it, as "latents.scale"; those of a model in itself once."""
    for name, field in model.model_fields.items():
        path = f"{before}{name}"
        yield path
        for inner in models(field.annotation):
            if inner not in within:
                yield from paths(inner, f"{path}.", (*within, inner))


def models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that a type consists of: those of ``dict[str, Component] | None`` are Component."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from models(inner)


def unread(written: set[str], read: set[str]) -> set[str]:
    """The outermost keys that nothing reads: of "refiner" and "refiner.source" the first."""
    left = written - read
    return {path for path in left if not any(path.startswith(f"{other}.") for other in left)}


def quoted(pattern: str, *sources: str) -> set[str]:
    return {found for source in sources for found in re.findall(pattern, source)}


def test_every_key_of_the_manifest_is_read_or_not_needed() -> None:
    source = (LIBRARY / "Bundle" / "Manifest.swift").read_text(encoding="utf-8")
    read = {OBJECTS[match[1] or match[3] or ""] + (match[2] or match[4]) for match in READ.finditer(source)}
    written = set(paths(Manifest))
    assert read - written == set(), "Swift reads what Python does not write"
    assert unread(written, read) == set(MANIFEST_NOT_NEEDED)


def test_every_family_is_known() -> None:
    """One that is not would be drawn as Stable Diffusion 1, with its defaults and its scheduler's settings; where
    there is no UNet, nothing is drawn."""
    source = (LIBRARY / "Bundle" / "Family.swift").read_text(encoding="utf-8")
    assert quoted(r'(?:Family\(\s*name: |\bxl\()"([\w-]+)"', source) == {
        name for name, family in FAMILIES.items() if family.denoiser is UNET
    }


def test_every_scheduler_is_made_or_refused() -> None:
    source = (LIBRARY / "Schedulers" / "SchedulerKind.swift").read_text(encoding="utf-8")
    cases = re.findall(r'^ {4}case (\w+)(?: = "(.*)")?$', source, re.MULTILINE)
    made = {name or case for case, name in cases}
    assert made - set(SCHEDULERS) == set(), "Swift names what Python does not know"
    assert set(SCHEDULERS) - made == set(SCHEDULERS_NOT_MADE)


def test_every_setting_of_a_scheduler_is_read_or_not_needed() -> None:
    """One that is read is followed, or refused where it asks for what is not made."""
    sources = [path.read_text(encoding="utf-8") for path in (LIBRARY / "Schedulers").glob("*.swift")]
    classes = quoted(
        r'^ +case "(\w+Scheduler)": return try', *(line for text in sources for line in text.splitlines())
    )
    assert len(classes) == len(
        {kind.class_name for name, kind in SCHEDULERS.items() if name not in SCHEDULERS_NOT_MADE}
    )
    taken = {name for kind in classes for name in inspect.signature(getattr(diffusers, kind).__init__).parameters}
    read = quoted(r'"(\w+)"', *sources)
    assert taken - {"self", "kwargs"} - read == set(SETTINGS_NOT_READ)


def test_every_key_of_a_record_is_read_and_written_or_not_needed() -> None:
    record = (LIBRARY / "Record.swift").read_text(encoding="utf-8")
    past, order = ((PROGRAM / name).read_text(encoding="utf-8") for name in ("Past.swift", "Order.swift"))
    (listed,) = re.findall(r"static let files = \[(.*)\]", past)
    files = quoted(r'"(\w+)"', listed)
    assert '"\\(name)_sha256"' in past and 'adding("\\(name)_sha256"' in order
    of_files = files | {f"{name}_sha256" for name in files}
    read = of_files | quoted(r'(?:\b(?:value|text|number)\(|self\[)"(\w+)"', record, past, order)
    written = of_files | quoted(r'\badding\("(\w+)"', order) | quoted(r'^ {12}\("(\w+)", ', *record.splitlines())
    settings = {field.name for field in fields(png_record.Settings)}
    known = {*settings, *png_record.LOADING, "models", *(f"{name}_sha256" for name in png_record.FILES)}
    assert read - known == set(), "Swift reads what Python does not write"
    assert known - read == set(RECORD_NOT_READ)
    assert known - written == set(RECORD_NOT_READ)


def test_every_file_of_a_tokenizer_is_read_or_not_needed() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (LIBRARY / "Text").glob("*.swift")]
    named = {*tokenizer.VOCABULARY_FILES, tokenizer.FAST, *tokenizer.SETTINGS}
    assert named - quoted(r'"(\w+\.(?:json|txt))"', *texts) == set(FILES_NOT_READ)


def test_every_attribute_of_an_added_token_is_read_or_not_needed() -> None:
    source = (LIBRARY / "Text" / "WholeTokens.swift").read_text(encoding="utf-8")
    written = set(AddedToken("x", special=True).__getstate__())
    read = quoted(r'value\["(\w+)"\]', source)
    assert read - written == set()
    assert written - read == set(TOKEN_NOT_NEEDED)
