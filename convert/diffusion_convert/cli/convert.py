"""``coreml-sd convert``: what the user typed becomes options; what was done becomes lines."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffusion_convert.bundle.zip_names import PATTERN as ZIP_PATTERN
from diffusion_convert.conversion.events import Event, Phase, Progress
from diffusion_convert.conversion.workspace import kept
from diffusion_convert.options import (
    ConvertOptions,
    Precision,
    parse_choice,
    parse_embedding,
    parse_list,
    parse_lora,
    parse_nbits,
)
from diffusion_runtime.cli import interruption
from diffusion_runtime.cli.console import INTERRUPTED
from diffusion_runtime.families import (
    DEFAULT_TARGET,
    FAMILIES,
    PALETTE_BITS,
    PROCESSORS,
    TARGETS,
    AttentionKind,
    Layout,
)
from diffusion_runtime.folding import Folding

if TYPE_CHECKING:
    from rich.console import Console

    from diffusion_convert.conversion.convert import Conversion

CONVERT_HELP = """
Convert a Stable Diffusion checkpoint to Core ML models, on any machine.

SOURCE is a folder in diffusers' layout, a single .safetensors, .ckpt or
.gguf file, or the id of a repository on the Hugging Face Hub. Every model is
verified against the checkpoint's own network before it appears.

A conversion that was stopped goes on where it stopped: run the same command
again. Components and variants are added to what the same source and options
have left in the folder; what others have left there is replaced.

Examples:

    coreml-sd convert stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        -o models

    coreml-sd convert model.safetensors -o models --target iOS17 \\
        --attention split_einsum_v2 --nbits 6

    coreml-sd convert my-checkpoint -o models --height 768 \\
        --width 512 --lora style.safetensors:0.8
"""
KINDS = ", ".join(f"{kind.value} ({PROCESSORS[kind.about.compute_units]})" for kind in AttentionKind)
DEFAULT_KINDS = " and ".join(kind.value for kind in FAMILIES["sd1"].attention)
FOLDED = " or ".join(folding.value for folding in Folding if folding.about.by_default)
FOLDED_IF_ASKED = "prediction (v to epsilon, for apps that know no v)"
BITS = ", ".join(map(str, PALETTE_BITS))


def _option(help_text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help_text, show_default=False, **more)


def convert(
    source: Annotated[
        str,
        typer.Argument(help="Folder, file or Hub id of the checkpoint.", metavar="SOURCE", show_default=False),
    ],
    output: Annotated[Path, _option("Folder for the result.", "--output", "-o")],
    attention: Annotated[
        list[str] | None,
        _option(f"{KINDS}; may be given several times. Default: {DEFAULT_KINDS}; for SDXL original."),
    ] = None,
    components: Annotated[
        list[str] | None, _option("Only these, as in text_encoder,unet; may be given several times. Default: all.")
    ] = None,
    nbits: Annotated[int | None, _option(f"Palettize weights to so many bits ({BITS}). Default: 16-bit.")] = None,
    nbits_for: Annotated[
        list[str] | None, _option("Bits of one component, as in unet=6; may be given several times.")
    ] = None,
    target_bits: Annotated[
        float | None, _option("Average bits, as in 4.5; each weight gets its own, for the least damage.")
    ] = None,
    recipe: Annotated[
        Path | None,
        _option("Bits by weight, from a file of palettize --save-recipe; what it does not name is kept."),
    ] = None,
    height: Annotated[int | None, _option("Height of the picture in pixels. Default: the checkpoint's.")] = None,
    width: Annotated[int | None, _option("Width of the picture in pixels. Default: the checkpoint's.")] = None,
    size: Annotated[
        list[str] | None,
        _option(
            "Size of the picture, width x height, as 768x512; may be given several times: one set of weights for "
            "all. Sizes are added to those that the same source and options have left in the folder."
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        _option(
            "Of the UNet: 2 (InstructPix2Pix: 3) for guidance in one call, or 1. Default: that; 1 for LCM UNets."
        ),
    ] = None,
    context_length: Annotated[
        int | None,
        _option(
            "Text tokens that the UNet takes: 154 or 231 for long prompts, which are encoded in pieces of 77. "
            "Other apps don't do this. Of SD 3, CLIP's 77 and T5's: 333 take 256 of T5, as diffusers. Default: "
            "the text encoder's 77; for SD 3 154, as Apple's apps."
        ),
    ] = None,
    target: Annotated[
        str, _option(f"Oldest system: {', '.join(TARGETS)}. Default: {DEFAULT_TARGET}.")
    ] = DEFAULT_TARGET,
    chunk_unet: Annotated[bool, _option("Cut the UNet into two packages, for iOS.", "--chunk-unet")] = False,
    vae: Annotated[
        str | None, _option("Another VAE, for encoder and decoder, TAESD too: folder, file or Hub id.")
    ] = None,
    preview_vae: Annotated[
        str | None, _option("A VAE (TAESD) whose decoder makes previews, as a component of its own.")
    ] = None,
    fold: Annotated[
        list[str] | None, _option(f"Also put into the models what apps have fixed: {FOLDED_IF_ASKED}.")
    ] = None,
    no_fold: Annotated[
        list[str] | None,
        _option(
            f"Keep the checkpoint's own {FOLDED}, which is put into the models so that apps draw right; may be "
            "given several times."
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        _option(
            "LoRA to fuse: PATH, PATH:WEIGHT or PATH:WEIGHT,PART=WEIGHT,… with parts unet, te (te1, te2) and "
            "blocks in00 …, mid, out00 …; may be given several times."
        ),
    ] = None,
    lora_partial: Annotated[
        bool, _option("Leave out what of a LoRA has no place in the checkpoint.", "--lora-partial")
    ] = False,
    embedding: Annotated[
        list[str] | None,
        _option(
            "Textual inversion to put in: FILE or FILE:TOKEN, as prompts call it (default: the name in the file, "
            "else the file's); may be given several times."
        ),
    ] = None,
    clip_skip: Annotated[
        int, _option("Text states from so many layers earlier, as diffusers' clip_skip. Default: 0.")
    ] = 0,
    revision: Annotated[str | None, _option("Branch, tag or commit of a Hub repository.")] = None,
    family: Annotated[str | None, _option("sd1, sd2-base, …; an unknown one lists all. Default: detected.")] = None,
    variant: Annotated[
        str | None, _option("Of a folder's weights, as in diffusers: fp16, bf16, ema, non_ema. Default: the best.")
    ] = None,
    base: Annotated[str | None, _option("Checkpoint that gives what a file or a UNet alone lacks.")] = None,
    refiner: Annotated[
        str | None,
        _option("SDXL refiner (folder, file or Hub id): a second UNet, for the last steps."),
    ] = None,
    controlnet: Annotated[
        list[str] | None,
        _option("ControlNets (folder, file or Hub id), and a UNet that they steer; A,B or given several times."),
    ] = None,
    only_controlled: Annotated[
        bool, _option("No UNet but the one that ControlNets steer.", "--only-controlled")
    ] = False,
    ip_adapter: Annotated[
        list[str] | None,
        _option(
            "IP-Adapter, to draw after a picture: a file, or OWNER/NAME/FILE on the Hub; several with commas, or "
            "the option several times."
        ),
    ] = None,
    image_encoder: Annotated[
        str | None,
        _option("The IP-Adapters' image encoder (folder, or on the Hub). Default: image_encoder beside the file."),
    ] = None,
    no_t5: Annotated[
        bool, _option("Leave out T5, the largest text encoder of SD 3: zeros stand for its states.", "--no-t5")
    ] = False,
    t2i_adapter: Annotated[
        list[str] | None,
        _option(
            "T2I-Adapters (folder or Hub id) that steer the UNet; several with commas, or given several times."
        ),
    ] = None,
    layout: Annotated[
        str, _option("Whose interface: apple, or comfyui (ComfyUI-CoreMLSuite 2.x). Default: apple.")
    ] = "apple",
    precision: Annotated[
        str, _option("auto (float32 where float16 would overflow), float16 or float32. Default: auto.")
    ] = "auto",
    compile_: Annotated[
        bool, _option("Compile the packages, for apps. Default: yes.", "--compiled/--no-compiled")
    ] = True,
    zip_: Annotated[
        bool, _option("Zip the compiled models, for publishing. Default: yes.", "--zip/--no-zip")
    ] = True,
    verify: Annotated[bool, _option("Verify every model. Default: yes.", "--verify/--no-verify")] = True,
) -> None:

    kinds = tuple(parse_choice(AttentionKind, "attention", name) for name in attention or ())
    options = ConvertOptions(
        attention=kinds,
        nbits=nbits,
        nbits_for=parse_nbits(nbits_for or ()),
        target_bits=target_bits,
        recipe=recipe,
        components=parse_list(components or ()),
        height=height,
        width=width,
        sizes=tuple(size or ()),
        batch_size=batch_size,
        context_length=context_length,
        target=target,
        chunk_unet=chunk_unet,
        vae=vae,
        preview_vae=preview_vae,
        fold=tuple(parse_choice(Folding, "fold", name) for name in fold or ()),
        no_fold=tuple(parse_choice(Folding, "no-fold", name) for name in no_fold or ()),
        loras=tuple(parse_lora(text) for text in lora or ()),
        lora_partial=lora_partial,
        clip_skip=clip_skip,
        embeddings=tuple(parse_embedding(text) for text in embedding or ()),
        revision=revision,
        family=family,
        variant=variant,
        base=base,
        refiner=refiner,
        controlnets=tuple(controlnet or ()),
        only_controlled=only_controlled,
        ip_adapters=parse_list(ip_adapter or ()),
        image_encoder=image_encoder,
        no_t5=no_t5,
        t2i_adapters=parse_list(t2i_adapter or ()),
        layout=parse_choice(Layout, "layout", layout),
        precision=parse_choice(Precision, "precision", precision),
        compiled=compile_,
        zip=zip_,
        verify=verify,
    )
    from rich.console import Console

    from diffusion_convert.conversion.convert import convert as run

    console = Console(stderr=True)
    try:
        with interruption.seen(), _progress(console) as progress:
            made = run(source, output, options, progress)
    except KeyboardInterrupt:
        _say_kept(output)
        sys.exit(INTERRUPTED)
    _show(made)


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    """A bar for what is done now, and a line for each component that is finished."""
    from rich import progress

    with progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bars:
        said = {Phase.FAMILY: "family", Phase.NOTE: "note:", Phase.COMPILE: "compiling", Phase.ZIP: "zipping"}
        bar = bars.add_task("opening the checkpoint", total=1.0)
        part, since = "", time.perf_counter()

        def report(event: Event) -> None:
            nonlocal part, since
            interruption.check()
            if event.part != part:
                if part:
                    console.print(f"{part}: done in {time.perf_counter() - since:.0f} s", highlight=False)
                part, since = event.part, time.perf_counter()
            if event.phase in said:
                line = f"{said[event.phase]} {event.text}".strip()
                console.print(line, highlight=False, markup=False, soft_wrap=True)
            bars.update(bar, description=f"{event.part} {event.phase}".strip(), completed=event.fraction)

        yield report


def _show(made: Conversion) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{made.output} ({made.family})")
    for column in ("variant", "component", "size", "weights", "PSNR against the checkpoint's network"):
        table.add_column(column)
    for variant, manifest in made.variants.items():
        for name, component in manifest.components.items():
            quality = f"{min(component.psnr_db.values()):.1f} dB" if component.psnr_db else "not verified"
            if component.psnr_db and component.palettization:
                quality += " against 16-bit weights"
            wide = f" ({len(component.float32_ops)} operations float32)" if component.float32_ops else ""
            size = f"{component.size_bytes / 1e6:.1f} MB"
            bits = f"{component.palettization.nbits:g} bits" if component.palettization else component.precision
            table.add_row(variant, name, size, bits + wide, quality)
    console.print(table)
    if made.unchanged:
        typer.echo(f"{made.output}: was complete already; nothing was done")
    for line in _what_next(made):
        typer.echo(line)


def _what_next(made: Conversion) -> Iterator[str]:
    """Where the result is, by kind, and the command that makes a picture of it, if it can."""
    from diffusion_runtime.tasks import starts_from

    folders = [made.output / name for name in made.variants]
    for kind in ("packages", "compiled"):
        if there := [str(folder / kind) for folder in folders if (folder / kind).is_dir()]:
            yield f"{kind}: {', '.join(there)}"
    if zips := sorted(str(path) for path in made.output.glob(ZIP_PATTERN)):
        yield f"zips: {', '.join(zips)}"
    parts = {name for variant in made.variants.values() for name in variant.components}
    layouts = {variant.layout for variant in made.variants.values()}
    if parts >= {"text_encoder", FAMILIES[made.family].denoiser.component, "vae_decoder"} and layouts == {
        Layout.APPLE
    }:
        needed = starts_from(FAMILIES[made.family].in_channels)
        pictures = "".join(f" --{name} {'photo' if name == 'image' else name}.png" for name in needed)
        models = shlex.quote(str(made.output))
        yield f'next: coreml-sd generate {models} --prompt "..."{pictures} -o picture.png'


def _say_kept(output: Path) -> None:

    names = kept(output)
    what = (
        f"{', '.join(names)} finished and kept; run the same command again to go on" if names else "nothing is kept"
    )
    typer.echo(f"interrupted: {what}", err=True)


def register(app: typer.Typer) -> None:
    """Add ``convert``."""
    app.command(help=CONVERT_HELP)(convert)
