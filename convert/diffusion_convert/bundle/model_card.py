"""README.md of a published folder: the Hub's header, where the models come from, what to pick, how to run them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from diffusion_convert.bundle.how_to_run import REPOSITORY, place_of, running, steering, title_of
from diffusion_convert.bundle.needs import tokens_of_encoder, tokens_of_unet
from diffusion_convert.bundle.zip_names import zip_names
from diffusion_runtime.atomic import unfinished_file
from diffusion_runtime.bundle.find import KINDS
from diffusion_runtime.bundle.manifest import Manifest, Source
from diffusion_runtime.errors import InputError
from diffusion_runtime.families import (
    COMPONENTS,
    PROCESSORS,
    AttentionKind,
    Layout,
    compiled_names,
    family_named,
)
from diffusion_runtime.images import load
from diffusion_runtime.picture_size import listed

CARD_NAME = "README.md"
_TITLE_END = " for Core ML"
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_SAMPLE = "sample"
_HUB_LICENSES = frozenset(
    {
        "afl-3.0",
        "agpl-3.0",
        "apache-2.0",
        "bigscience-openrail-m",
        "bsd-3-clause",
        "cc-by-4.0",
        "cc-by-nc-4.0",
        "cc-by-nc-sa-4.0",
        "cc-by-sa-4.0",
        "cc0-1.0",
        "creativeml-openrail-m",
        "gpl-3.0",
        "mit",
        "openrail",
        "openrail++",
        "other",
        "unknown",
    }
)
_OPENRAIL = (
    "The license of the source restricts use, and these restrictions go with the converted models: nothing illegal "
    "or harmful, no deceiving or harassing of people, no medical or legal advice, no exploitation of the "
    "vulnerable. You must pass the same restrictions on. Read the license's attachment A before you use or share "
    "the models."
)


def put_picture(picture: Path, folder: Path) -> Path:
    """Copy a sample picture to ``folder``, where the model card shows it. Raises InputError if the file is not a
    picture."""
    suffix = picture.suffix.lower()
    if suffix not in PICTURES:
        raise InputError(f"{picture}: expected a picture ({', '.join(PICTURES)})")
    load(picture, "sample picture")
    target = folder / f"{_SAMPLE}{suffix}"
    if not (target.exists() and target.samefile(picture)):
        with unfinished_file(target) as unfinished:
            shutil.copyfile(picture, unfinished)
    return target


def is_anothers(card: Path) -> bool:
    """Whether that README.md is none that was written here: a checkpoint's own, or the user's."""
    if not card.is_file():
        return card.exists()
    return f"{_TITLE_END}\n" not in card.read_text(encoding="utf-8", errors="replace")


def write_model_card(folder: Path, variants: Mapping[str, Mapping[str, Manifest]]) -> Path:
    """Write README.md for the variants in ``folder``, whose manifests are given by attention and kind, with the
    zips and the sample picture that lie in it."""
    path = folder / CARD_NAME
    with unfinished_file(path) as unfinished:
        unfinished.write_text(card_of(folder, variants), encoding="utf-8")
    return path


def card_of(folder: Path, variants: Mapping[str, Mapping[str, Manifest]]) -> str:
    """What ``write_model_card`` would write."""
    found = {attention: kinds.get("compiled") or kinds["packages"] for attention, kinds in variants.items()}
    zips = {path.name: path.stat().st_size for path in sorted(folder.glob("*.zip"))}
    picture = next((name for suffix in PICTURES if (folder / (name := f"{_SAMPLE}{suffix}")).is_file()), None)
    there = {kind for kinds in variants.values() for kind in kinds}
    return model_card(found, zips, picture, there)


def model_card(
    variants: Mapping[str, Manifest],
    zips: Mapping[str, int],
    picture: str | None = None,
    kinds: Collection[str] = KINDS,
) -> str:
    """The card's text for manifests by attention and zips' sizes in bytes by name. ``kinds``: which of packages and
    compiled models there are."""
    first = next(iter(variants.values()))
    sections = [
        "\n".join(_header(first)),
        f"# {title_of(first)}{_TITLE_END}",
        _origin(first),
        *_folded(first),
        *([f"![A picture made with these models]({picture})"] if picture else []),
        "## Which variant",
        "\n".join(_variant_table(variants, zips)),
        "## How to run",
        _running(variants, first, kinds),
        *_controlnets(variants, first, kinds),
        "## How close to the source",
        _quality_note(variants),
        "\n".join(_quality_table(variants)),
        *_palettization(variants),
        "## License and restrictions",
        _license(first),
    ]
    return "\n\n".join(sections) + "\n"


def _header(made: Manifest) -> Iterator[str]:
    license = _hub_license(made)
    from diffusion_runtime.tasks import starts_from

    task = "image-to-image" if starts_from(family_named(made.family).in_channels) else "text-to-image"
    yield "---"
    yield f"license: {license}"
    if license == "other":
        yield f"license_name: {re.sub(r'[^a-z0-9.]+', '-', (made.source.license or '').lower()).strip('-')}"
    if _is_hub_id(made.source.name):
        yield f"base_model: {json.dumps(made.source.name)}"
    yield f"pipeline_tag: {task}"
    yield "tags:"
    yield from (f"- {tag}" for tag in ("core-ml", "coreml", "stable-diffusion", task))
    yield "---"


def _is_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith(".")


def _hub_license(made: Manifest) -> str:
    license = (made.source.license or "unknown").lower()
    return license if license in _HUB_LICENSES else "other"


def _origin(made: Manifest) -> str:
    refiner = f", with {_named(made.refiner.source)} for the last steps" if made.refiner is not None else ""
    skipped = f" and clip skip {made.clip_skip}" if made.clip_skip else ""
    added = _loras(made.source) + _embeddings(made.source) + skipped
    text = (
        f"Stable Diffusion models ({made.family}) for pictures of {listed(made.sizes)} pixels, "
        f"converted from {_named(made.source)}{added}{refiner}{_adapters(made)} for {made.target} and later"
    )
    if "coremltools" not in made.tools:
        return f"{text} by another tool."
    tools = {
        tool: version for tool, version in sorted(made.tools.items()) if tool not in ("conversion", "whole_weights")
    }
    return f"{text} with {', '.join(f'{tool} {version}' for tool, version in tools.items())}."


def _named(source: Source) -> str:
    name = (
        f"[{source.name}](https://huggingface.co/{source.name})" if _is_hub_id(source.name) else f"`{source.name}`"
    )
    revision = f" at revision `{source.revision}`" if source.revision else ""
    digest = f" (SHA-256 `{source.sha256}`)" if source.sha256 else ""
    return f"{name}{revision}{digest}"


def _folded(made: Manifest) -> Iterator[str]:
    """What was put into the models because apps have it fixed, with the checkpoint's own values."""
    if lines := made.folded.lines():
        head = "What apps have fixed was put into these models, so that apps draw what the checkpoint does:"
        yield "\n".join([head, "", *(f"- {line}" for line in lines)])


def _loras(source: Source) -> str:
    """With which LoRAs in it, at which weights, and what of them is not."""
    told = []
    for lora in source.loras:
        left_out = f", without {len(lora.left_out)} tensors that have no place in it" if lora.left_out else ""
        told.append(f"`{lora}`{left_out}")
    return f" with the LoRA{'s' * (len(told) > 1)} {'; '.join(told)} fused in" if told else ""


def _embeddings(source: Source) -> str:
    """The tokens of textual inversions, for prompts."""
    told = [
        f"`{one.token}` ({one.vectors} vector{'s' * (one.vectors > 1)}, `{one.name}`)" for one in source.embeddings
    ]
    return f" with the textual inversion{'s' * (len(told) > 1)} {'; '.join(told)}" if told else ""


def _adapters(made: Manifest) -> str:
    told = []
    kinds = {"IP-Adapter": [one.name for one in made.ip_adapters], "T2I-Adapter": list(made.t2i_adapters)}
    for kind, names in kinds.items():
        if names:
            listed = " and ".join(f"`{name}`" for name in names)
            told.append(f", with the {kind}{'s' * (len(names) > 1)} {listed}, which apps do not use")
    return "".join(told)


def _variant_table(variants: Mapping[str, Manifest], zips: Mapping[str, int]) -> Iterator[str]:
    yield "| variant | runs on | for | models | zip for apps |"
    yield "|---|---|---|---|---|"
    for attention, made in variants.items():
        about = AttentionKind(attention).about
        size = sum(component.size_bytes for component in made.components.values())
        names = zip_names(made, attention, variants)
        packed = "; ".join(f"[{name}]({name}), {_size(zips[name])}" for name in names if name in zips) or "none"
        units = f"CPU and {PROCESSORS[about.compute_units]}"
        yield f"| `{attention}` | {units} | {about.devices} | {_size(size)} | {packed} |"


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"


def _long_prompts(made: Manifest) -> str:
    """What to know of a UNet that takes more tokens than the text encoder gives; empty for any other."""
    tokens, length = tokens_of_unet(made), tokens_of_encoder(made)
    if tokens == length:
        return ""
    return f"""**Long prompts**: the UNet of these models takes {tokens} text tokens, {tokens // length} pieces of
{length} that are encoded one by one. `coreml-sd` does that.

"""


def _running(variants: Mapping[str, Manifest], made: Manifest, kinds: Collection[str]) -> str:
    attention = next(iter(variants))
    units = AttentionKind(attention).about.compute_units
    pictures = "".join(f" --ip-adapter-image {one.name}=picture.png:0.6" for one in made.ip_adapters)
    pictures += "".join(f" --adapter {name}=picture.png" for name in made.t2i_adapters)
    ours = f"""**Python** (any machine; on a Mac with Core ML): download and generate.

```
pip install coreml-sd
coreml-sd download {REPOSITORY} --variant {attention}{"" if "compiled" in kinds else " --kind packages"} -o models
coreml-sd generate models --prompt "a photograph of an astronaut riding a horse" \\
    --compute-units {units}{" --refiner-start 0.8" if made.refiner is not None else ""}{pictures} -o astronaut.png
```

"""
    if others := made.sizes[1:]:
        chosen = f"--height {others[0].height} --width {others[0].width}"
        ours += f"Pictures are of {made.sizes[0]} pixels, with `{chosen}` of {others[0]}, and so on.\n\n"
    shown = ours if made.layout is Layout.APPLE else ""
    return f"{_long_prompts(made)}{shown}{running(made, place_of(made, variants, units), kinds)}"


def _controlnets(variants: Collection[str], made: Manifest, kinds: Collection[str]) -> Iterator[str]:
    """Which ControlNets there are, what apps call them, and how to draw with them."""
    if not made.controlnets:
        return
    rows = ["| ControlNet | file in `compiled/` | made from | license |", "|---|---|---|---|"]
    for name, told in made.controlnets.items():
        (file,) = compiled_names(f"{COMPONENTS['controlnet'].several}{name}")
        rows.append(
            f"| `{name}` | `{file}.mlmodelc` | {_named(told.source)} | {told.source.license or 'not named'} |"
        )
    yield "## ControlNets"
    yield "\n".join(rows)
    units = AttentionKind(next(iter(variants))).about.compute_units
    yield f"""Pictures that steer are of {listed(made.sizes)} pixels.

{steering(made, place_of(made, variants, units), kinds)}"""


def _quality_note(variants: Mapping[str, Manifest]) -> str:
    components = [component for made in variants.values() for component in made.components.values()]
    measured = [component for component in components if component.psnr_db]
    if not measured:
        return "These models were not compared with their source."
    subject = "These models" if len(measured) == len(components) else "The models that have a figure here"
    text = (
        f"{subject} were run and compared with the source's own networks in float32 on the same inputs: PSNR of "
        "the worst output of a single call, not of pictures."
    )
    if any(component.palettization for component in measured):
        text += " Palettized ones are compared with their own 16-bit form, which was compared with the source."
    return text


def _quality_table(variants: Mapping[str, Manifest]) -> Iterator[str]:
    yield "| variant | component | weights | size | PSNR |"
    yield "|---|---|---|---|---|"
    for attention, made in variants.items():
        for name, component in made.components.items():
            of_all = (component, *component.sizes.values())
            worst = min((value for one in of_all for value in one.psnr_db.values()), default=None)
            shown = "not measured" if worst is None else f"{worst:.1f} dB"
            palettes = component.palettization
            weights = component.precision if palettes is None else f"{palettes.nbits:g} bits"
            yield f"| `{attention}` | {name} | {weights} | {_size(component.size_bytes)} | {shown} |"


def _palettization(variants: Mapping[str, Manifest]) -> Iterator[str]:
    rows = [
        f"| `{attention}` | {name} | {found.nbits:g} | {found.granularity} | {snr} |"
        for attention, made in variants.items()
        for name, component in made.components.items()
        if (found := component.palettization) is not None
        for snr in ("" if found.worst_snr_db is None else f"{found.worst_snr_db:.1f} dB",)
    ]
    if rows:
        yield "## Palettization"
        head = [
            "| variant | component | bits per weight | granularity | worst weight's SNR |",
            "|---|---|---|---|---|",
        ]
        yield "\n".join([*head, *rows])


def _license(made: Manifest) -> str:
    license = made.source.license
    if license is None:
        return "The source names no license. Ask its authors before you use or share these models."
    text = f"The source's license, `{license}`, holds for these models as well."
    return f"{text}\n\n{_OPENRAIL}" if "openrail" in license.lower() else text
