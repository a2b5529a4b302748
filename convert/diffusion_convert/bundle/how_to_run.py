"""The model card's words on apps: what to do with the models in each that can run them, and why others cannot."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from diffusion_convert.bundle.clients import CLIENTS, Client, Needs
from diffusion_convert.bundle.needs import controls_of, needs_of
from diffusion_runtime.bundle.find import KINDS
from diffusion_runtime.bundle.manifest import Manifest
from diffusion_runtime.families import COMPONENTS, PROCESSORS, TARGETS, Layout, compiled_names, compiles, preferred

REPOSITORY = "REPOSITORY"
"""Stands in the card for the repository's id until it is published."""


def running(made: Manifest, place: Mapping[str, str], kinds: Collection[str] = KINDS) -> str:
    """What to do with the models in each app that can run them, and one line for each that cannot, in Markdown.
    ``kinds``: what there is of them, packages and compiled models or one of these."""
    needs = needs_of(made)
    others = {client: _obstacles(client, needs, kinds, made) for client in CLIENTS if client.how}
    parts = [f"**{client.name}**: {client.how.format_map(place)}" for client, why in others.items() if not why]
    lines = [f"- {client.name}: {'; '.join(why)}." for client, why in others.items() if why]
    if lines:
        parts.append("\n".join(["Not with:", "", *lines]))
    return "\n\n".join(parts)


def steering(made: Manifest, place: Mapping[str, str], kinds: Collection[str] = KINDS) -> str:
    """`running` for the ControlNets of the models; empty where there are none."""
    asked = controls_of(made)
    if not asked or not made.controlnets:
        return ""
    needs = needs_of(made) | asked
    able = [one for one in CLIENTS if one.steer and not _obstacles(one, needs, kinds, made)]
    lines = [f"- {client.name}: {client.steer.format_map(place)}" for client in able]
    lines += [
        f"- Not with {client.name}, which {'; '.join(why)}."
        for client in CLIENTS
        if client.how and not _obstacles(client, needs_of(made), kinds, made)
        if (why := client.obstacles(needs))
    ]
    return "\n".join(lines)


def _obstacles(client: Client, needs: frozenset[Needs], kinds: Collection[str], made: Manifest) -> tuple[str, ...]:
    found = client.obstacles(needs)
    if client.layout is not made.layout:
        another = (
            f" with `--layout {client.layout.value}`"
            if client.layout is not Layout.APPLE
            else " without `--layout`"
        )
        return found or (f"has an interface of its own: convert{another}",)
    if not set(client.kinds) & set(kinds):
        return (*found, f"reads {_missing(client.kinds[0], made)}")
    return found


def _missing(kind: str, made: Manifest) -> str:
    if kind == "packages":
        return "packages, which are not here"
    needs_mac = len(made.sizes) > len(made.size_folders) + 1 or not compiles(TARGETS[made.target])
    how = "on a Mac, `coreml-sd bundle --compiler xcrun`" if needs_mac else "`coreml-sd bundle`"
    return f"compiled models, which are not here: {how} makes them"


def title_of(made: Manifest) -> str:
    return made.name.rstrip("/").rpartition("/")[2]


def place_of(made: Manifest, variants: Collection[str], units: str) -> dict[str, str]:
    """Where the models are and what they are called, for `Client.how`: the Hub's id, the variant, its compute units
    as Swift and as coremltools spell them, and so on."""
    needs = needs_of(made)
    kind = "3" if Needs.SD3 in needs else "XL" if needs & {Needs.SDXL, Needs.REFINER} else ""
    name = next(iter(made.controlnets), "")
    scale = f"encoderScaleFactor and decoderScaleFactor at {made.latents.scale:g}"
    if made.latents.shift:
        scale += f", and decoderShiftFactor at {made.latents.shift:g}"
    return {
        "repository": REPOSITORY,
        "title": title_of(made),
        "source": made.source.name,
        "attention": next(iter(variants)),
        "camel_units": _camel(units),
        "upper_units": units.upper().replace("-", "_"),
        "by_processor": _by_processor(variants),
        "pipeline": f"StableDiffusion{kind}Pipeline",
        "scale": f" with {scale}," if kind else "",
        "kind_option": {"3": " --sd3", "XL": " --xl"}.get(kind, ""),
        "is_kind": {"3": ", isSD3: true", "XL": ", isXL: true"}.get(kind, ""),
        "controlnet": name,
        "controlnet_title": compiled_names(f"{COMPONENTS['controlnet'].several}{name}")[0].rpartition("/")[2],
    }


def _by_processor(variants: Collection[str]) -> str:
    """The best of the variants for each processor, as a choice."""
    best = {
        name: next((kind.value for kind in preferred(units) if kind.value in variants), "")
        for units, name in PROCESSORS.items()
    }
    return ", ".join(f"`{kind}` for the {name}" for name, kind in best.items() if kind)


def _camel(units: str) -> str:
    first, *rest = units.split("-")
    return first + "".join({"ne": "NeuralEngine", "gpu": "GPU"}.get(part, part.capitalize()) for part in rest)
