"""`--layout comfyui`: names, shapes and types of ComfyUI-CoreMLSuite 2.x, and nothing but these is other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from diffusion_convert import convert
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.components import table
from diffusion_convert.components.component import Component, Shape
from diffusion_convert.conversion.convert import Conversion
from diffusion_convert.inspect import inspect
from diffusion_convert.inspect.show import as_text
from diffusion_convert.layouts import LAYOUTS
from diffusion_convert.options import ConvertOptions
from diffusion_convert.verification.folder import verify_models
from diffusion_runtime import families, load_pipeline
from diffusion_runtime.errors import InputError
from diffusion_runtime.families import AttentionKind, Layout
from diffusion_runtime.mil.package import open_package

HALF, FULL, WHOLE = "Float16", "Float32", "Int32"

Ports = dict[str, tuple[str, tuple[int, ...]]]


def expected(family: str, made: Conversion) -> dict[str, tuple[Ports, Ports]]:
    """What the package coreml-diffusion 0.1.6 declares for a checkpoint of these sizes, by component."""
    components = made.variants["original"].components
    latent = next(t.shape for t in components["unet"].inputs if t.name == "sample")[2:]
    width = next(t.shape for t in components["unet"].inputs if t.name == "encoder_hidden_states")[2]
    pictures = made.variants["original"]
    picture = (1, 3, pictures.height, pictures.width)
    batch = 1 if family == "sd1-lcm" else 2  # it takes guidance as an input
    unet: Ports = {
        "sample": (HALF, (batch, 4, *latent)),
        "timestep": (HALF, (batch,)),
        "encoder_hidden_states": (HALF, (batch, 77, width)),
    }
    extra = {tensor.name: tensor.shape for tensor in components["unet"].inputs if tensor.name not in unet}
    if family == "sd1-lcm":
        unet["timestep_cond"] = (HALF, (batch, extra["timestep_cond"][1]))
    if family.startswith("sdxl"):
        unet["time_ids"] = (HALF, (2, 5 if family == "sdxl-refiner" else 6))
        unet["text_embeds"] = (HALF, (2, extra["text_embeds"][1]))
    found: dict[str, tuple[Ports, Ports]] = {
        "unet": (unet, {"noise_pred": (FULL, (batch, 4, *latent))}),
        "vae_decoder": ({"latent": (HALF, (1, 4, *latent))}, {"image": (FULL, picture)}),
        "vae_encoder": ({"image": (HALF, picture)}, {"latent_moments": (FULL, (1, 8, *latent))}),
    }
    for name in ("text_encoder", "text_encoder_2"):
        if name in components:
            own = components[name].outputs[0].shape[2]
            outputs: Ports = {"hidden_states": (FULL, (1, 77, own))}
            if name == "text_encoder_2":
                outputs["pooled_embeds"] = (FULL, (1, components[name].outputs[1].shape[1]))
            found[name] = ({"input_ids": (WHOLE, (1, 77))}, outputs)
    return found


@pytest.fixture(scope="module", params=["sd1", "sd1-lcm", "sdxl", "sdxl-refiner"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def made(
    family: str, tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Conversion:
    options = ConvertOptions("original", layout="comfyui")
    return convert(tiny_checkpoint(family), tmp_path_factory.mktemp(family) / "models", options)


@pytest.mark.slow
def test_interfaces_names_and_parity(made: Conversion, family: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    variant, folder = made.variants["original"], made.output / "original" / "packages"
    wanted = expected(family, made)
    assert variant.components.keys() == wanted.keys()
    assert "safety_checker" not in variant.components
    for name, component in variant.components.items():
        declared = open_package(folder / component.files[0]).model.interface
        inputs, outputs = (
            {one.name: (one.dtype, one.shape) for one in ports} for ports in (declared.inputs, declared.outputs)
        )
        assert (inputs, outputs) == wanted[name], name
        assert min(component.psnr_db.values()) >= table()[name].min_psnr_db >= 60, (name, component.psnr_db)
    size = f"{variant.width}x{variant.height}"
    stems = {component.files[0].removesuffix(".mlpackage") for component in variant.components.values()}
    stem = tiny_checkpoint(family).name
    batch = 1 if family == "sd1-lcm" else 2
    assert stems >= {f"{stem}_{batch}x{size}_orig", f"{stem}_vae_decoder_1x{size}", f"{stem}_vae_encoder_1x{size}"}
    assert any(name in stems for name in (f"{stem}_text_encoder_1", f"{stem}_text_encoder_2_1"))


@pytest.mark.slow
def test_nothing_is_compiled_and_the_card_says_where_to_put_them(made: Conversion) -> None:
    assert not (made.output / "original" / "compiled").exists()
    assert not list(made.output.glob("*.zip"))
    card = (made.output / "README.md").read_text()
    assert "**ComfyUI-CoreMLSuite 2.x**: put the UNet's" in card
    assert "- Mochi Diffusion: " in card
    assert "coreml-sd generate" not in card


@pytest.mark.slow
def test_they_are_verified_as_any_others_and_not_run(
    made: Conversion, family: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    compared = list(verify_models(made.output, open_checkpoint(str(tiny_checkpoint(family))), lambda _: None))
    assert len(compared) == len(made.variants["original"].components)
    assert all(one.holds for one in compared)
    assert " prediction, comfyui layout, for " in as_text(inspect(made.output))
    with pytest.raises(InputError, match="was converted with --layout comfyui"):
        load_pipeline(made.output, "torch")


def names(folder: Path, options: ConvertOptions, component: str, kind: AttentionKind) -> str:
    checkpoint = open_checkpoint(str(folder))
    shape = Shape(768, 512, options.batch_size or 2)
    owner: Component = table()[component]
    return LAYOUTS[Layout.COMFYUI].file_name(checkpoint, owner, kind, shape, options)


@pytest.mark.parametrize(
    ("options", "component", "kind", "name"),
    [
        ({}, "unet", AttentionKind.ORIGINAL, "sd1_2x512x768_orig"),
        ({"nbits": 6}, "unet", AttentionKind.SPLIT_EINSUM_V2, "sd1_2x512x768_se2_q6"),
        ({"batch_size": 1}, "unet", AttentionKind.SPLIT_EINSUM, "sd1_1x512x768_se"),
        (
            {"loras": ["b c.v2.safetensors:0.5", "a.safetensors"]},
            "unet",
            AttentionKind.ORIGINAL,
            "sd1_a_b_c_2x512x768_orig",
        ),
        ({"target_bits": 4.5}, "unet", AttentionKind.ORIGINAL, "sd1_2x512x768_orig_qmixed"),
        ({"nbits": 6}, "text_encoder", AttentionKind.ORIGINAL, "sd1_text_encoder_1_q6"),
        ({"nbits": 6}, "vae_decoder", AttentionKind.ORIGINAL, "sd1_vae_decoder_1x512x768"),
        ({"nbits_for": {"vae_encoder": 8}}, "vae_encoder", AttentionKind.ORIGINAL, "sd1_vae_encoder_1x512x768_q8"),
    ],
)
def test_file_names(
    options: dict[str, object],
    component: str,
    kind: AttentionKind,
    name: str,
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    asked = ConvertOptions(layout="comfyui", **options)  # type: ignore[arg-type]
    assert names(tiny_checkpoint("sd1"), asked, component, kind) == name


@pytest.mark.parametrize(("mark", "said"), [("mine", "mine"), (None, "original")])
def test_the_table_of_attention_kinds_says_what_files_are_called(
    mark: str | None, said: str, tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = AttentionKind.ORIGINAL
    monkeypatch.setattr(families, "_ATTENTION", {kind: replace(kind.about, mark=mark)})
    assert names(tiny_checkpoint("sd1"), ConvertOptions(layout="comfyui"), "unet", kind) == f"sd1_2x512x768_{said}"


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("sd2-v", {}, "its apps cannot run sd2-v, but sd1, sdxl, sdxl-refiner; convert without it"),
        ("sd1", {"chunk_unet": True}, "do not run a UNet in two"),
        ("sd1", {"components": "safety_checker"}, "has no safety_checker; it has text_encoder"),
    ],
)
def test_what_its_apps_cannot_run_is_refused(
    family: str, options: dict[str, object], message: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        convert(tiny_checkpoint(family), tmp_path / "models", ConvertOptions(layout="comfyui", **options))  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(InputError, match="unknown layout 'draw-things': expected one of apple, comfyui"):
        ConvertOptions(layout="draw-things")
    assert set(LAYOUTS) == set(Layout)
