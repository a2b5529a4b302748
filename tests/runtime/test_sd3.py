"""Stable Diffusion 3 and 3.5, with and without T5: what is converted, what Apple's Swift pipeline makes of it, and
pictures against diffusers' own pipelines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

import tiny_sd3
from diffusion_convert import ConvertOptions, convert
from diffusion_convert.checkpoint.folding import fold, latents
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.components.vae_decoder import own_latents
from diffusion_convert.components.vae_encoder import known_latents
from diffusion_convert.conversion.convert import Conversion
from diffusion_convert.export import placeholders
from diffusion_convert.option_values import Lora
from diffusion_runtime import load_pipeline
from diffusion_runtime.bundle.views import as_unet
from diffusion_runtime.diffusers import load_diffusers_pipeline
from diffusion_runtime.errors import CheckpointError, InputError
from diffusion_runtime.folding import Folding
from diffusion_runtime.mil.package import Package, open_package
from diffusion_runtime.mil.program import operations

BuildOnce = Callable[[str, Callable[[Path], object]], Path]
PROMPT, NEGATIVE = "a photo of an astronaut riding a horse", "red circle"
STEPS = 3
MIN_PSNR_DB = 40.0
HALF, FULL = "Float16", "Float32"
T5_LENGTH = 77


@pytest.fixture(scope="module")
def checkpoint(build_once: BuildOnce) -> Callable[[str], Path]:
    def folder(kind: str) -> Path:
        return build_once(f"checkpoint-{kind}", lambda to: tiny_sd3.build(kind, to / kind)) / kind

    return folder


def converted(source: Path, output: Path, **options: Any) -> Conversion:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placeholders, "MIN_SIZE", 64)
        return convert(source, output, ConvertOptions(**options))


@pytest.fixture(scope="module")
def with_t5(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    """Stable Diffusion 3, packages and compiled models."""
    return converted(checkpoint("sd3"), tmp_path_factory.mktemp("with-t5") / "models")


@pytest.fixture(scope="module")
def without_t5(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    """Stable Diffusion 3.5 (dual attention, norms of queries and keys, noise levels by the picture's size), wider
    than high, its transformer with 6 bits."""
    output = tmp_path_factory.mktemp("without-t5") / "models"
    options: dict[str, Any] = {"no_t5": True, "nbits": 6, "compiled": False}
    return converted(checkpoint("sd3.5"), output, height=64, width=96, context_length=90, **options)


@pytest.fixture(scope="module")
def theirs(checkpoint: Callable[[str], Path]) -> Callable[..., Any]:
    @cache
    def load(kind: str, **parts: None) -> Any:
        pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(
            checkpoint(kind), dtype=torch.float32, **parts
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load


def psnr_db(first: np.ndarray, second: np.ndarray) -> float:
    return float(10 * np.log10(1 / np.square(first - second).mean()))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- what is converted


def test_every_component_computes_what_the_checkpoints_own_does(
    with_t5: Conversion, without_t5: Conversion
) -> None:
    parts = with_t5.variants["original"].components
    assert list(with_t5.variants) == ["original"]
    assert list(parts) == [
        *("text_encoder", "text_encoder_2", "text_encoder_t5", "transformer", "vae_decoder", "vae_encoder")
    ]
    assert all(value >= 60 for part in parts.values() for value in part.psnr_db.values())
    assert all(part.psnr_db for part in parts.values())
    assert not any(part.float32_ops for part in parts.values())
    # A network below the bound is refused before it is palettized; its figure is against the 16-bit one.
    transformer = without_t5.variants["original"].components["transformer"]
    assert transformer.palettization is not None
    assert transformer.palettization.nbits == 6
    assert "text_encoder_t5" not in without_t5.variants["original"].components


def described(package: Package) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    inputs, outputs = (
        {item.name: (item.dtype, item.shape) for item in items}
        for items in (package.model.interface.inputs, package.model.interface.outputs)
    )
    return inputs, outputs


def test_interfaces_are_those_of_apples_swift_pipeline(with_t5: Conversion) -> None:
    """StableDiffusion3Pipeline.swift, MultiModalDiffusionTransformer.swift, TextEncoderXL.swift,
    TextEncoderT5.swift, Decoder.swift: names of models, of inputs and outputs, and the shapes that arrays are made
    in, two rows of 77 tokens of CLIP and 77 of T5, whose encoder's are cut to 77."""
    folder = with_t5.output / "original" / "compiled"
    found = {path.stem: described(open_package(path)) for path in folder.glob("*.mlmodelc")}
    assert found == {
        "TextEncoder": (
            {"input_ids": (FULL, (1, 77))},
            {"hidden_embeds": (FULL, (1, 77, 32)), "pooled_outputs": (FULL, (1, 32))},
        ),
        "TextEncoder2": (
            {"input_ids": (FULL, (1, 77))},
            {"hidden_embeds": (FULL, (1, 77, 40)), "pooled_outputs": (FULL, (1, 24))},
        ),
        "TextEncoderT5": (
            {"input_ids": (FULL, (1, T5_LENGTH))},
            {"encoder_hidden_states": (FULL, (1, 96, 1, T5_LENGTH))},
        ),
        "MultiModalDiffusionTransformer": (
            {
                "latent_image_embeddings": (HALF, (2, 16, 8, 8)),
                "token_level_text_embeddings": (HALF, (2, 96, 1, 154)),
                "pooled_text_embeddings": (HALF, (2, 56, 1, 1)),
                "timestep": (FULL, (2,)),
            },
            {"denoiser_output": (FULL, (2, 16, 8, 8))},
        ),
        "VAEDecoder": ({"z": (HALF, (1, 16, 8, 8))}, {"image": (FULL, (1, 3, 64, 64))}),
        "VAEEncoder": ({"x": (HALF, (1, 3, 64, 64))}, {"latent": (FULL, (1, 32, 8, 8))}),
    }


def test_apples_swift_pipeline_finds_its_tokenizers(with_t5: Conversion) -> None:
    """CLIP's vocabulary and T5's tokenizer.json with its settings lie beside the models: of T5's, the pieces with
    their scores and the number of the unknown one are read, and the kind of tokenizer."""
    folder = with_t5.output / "original" / "compiled"
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    assert {"<|startoftext|>", "<|endoftext|>", "!"} <= vocabulary.keys()
    assert (folder / "merges.txt").read_text(encoding="utf-8").startswith("#version")
    t5 = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert (t5["model"]["type"], t5["model"]["unk_id"]) == ("Unigram", 2)
    assert [piece for piece, _ in t5["model"]["vocab"][:3]] == ["<pad>", "</s>", "<unk>"]
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert (settings["tokenizer_class"], settings["eos_token"]) == ("T5Tokenizer", "</s>")


def test_without_t5_nothing_of_it_is_there(without_t5: Conversion) -> None:
    folder = without_t5.output / "original" / "packages"
    manifest = without_t5.variants["original"]
    assert (manifest.tokenizer, manifest.tokenizer_3) == (".", None)
    assert not (folder / "tokenizer.json").exists()
    assert not list(folder.glob("*t5*"))


def test_the_manifest_says_what_no_interface_tells(with_t5: Conversion) -> None:
    manifest = with_t5.variants["original"]
    assert (manifest.family, manifest.prediction_type) == ("sd3", "flow_prediction")
    assert (manifest.latents.channels, manifest.latents.scale, manifest.latents.shift) == (16, 1.5305, 0.0609)
    assert manifest.scheduler["shift"] == 3.0
    assert set(manifest.tokenizer_sha256) >= {"tokenizer.json", "vocab.json", "tokenizer/vocab.json"}


def test_t5s_sums_may_leave_the_range_of_float16(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """As those of T5 XXL do: they are float32, the layers between them are not, and none had to be made so."""
    source = shutil.copytree(checkpoint("sd3"), tmp_path / "large")
    path = source / "text_encoder_3" / "model.safetensors"
    weights = load_file(path)
    factors = {"DenseReluDense.wo.weight": 2.0**15, "DenseReluDense.wi_1.weight": 16.0}
    large = {
        name: value * next((factor for end, factor in factors.items() if name.endswith(end)), 1.0)
        for name, value in weights.items()
    }
    save_file(large, path, metadata={"format": "pt"})
    theirs = T5EncoderModel.from_pretrained(source / "text_encoder_3", dtype=torch.float32)
    with torch.no_grad():
        states = theirs(torch.arange(3, 40)[None], output_hidden_states=True).hidden_states
    assert states[1].abs().max() > 2 * float(np.finfo(np.float16).max)
    made = converted(source, tmp_path / "models", components="text_encoder_t5", compiled=False).variants["original"]
    encoder = made.components["text_encoder_t5"]
    assert encoder.psnr_db["encoder_hidden_states"] >= 60
    assert encoder.float32_ops == ()
    program = open_package(tmp_path / "models" / "original" / "packages" / encoder.files[0]).model.program
    kinds = {(op.type, op.outputs[0].type.dtype.value) for op in operations(program.functions["main"].block)}  # type: ignore[union-attr]
    assert ("conv", "fp16") in kinds
    assert ("conv", "fp32") not in kinds


def test_the_transformer_is_read_as_a_unet_of_every_size(with_t5: Conversion) -> None:
    made = with_t5.variants["original"]
    transformer = made.components["transformer"]
    several = transformer.model_copy(update={"sizes": {"96x64": transformer}})
    unet = as_unet(made.model_copy(update={"components": {"transformer": several}})).components["unet"]
    names = [tensor.name for tensor in unet.inputs]
    assert names == ["sample", "encoder_hidden_states", "text_embeds", "timestep"]
    assert [tensor.name for tensor in unet.sizes["96x64"].inputs] == names


# --- pictures


@pytest.mark.parametrize("kind", ["packages", "compiled"])
def test_pictures_equal_diffusers(kind: str, with_t5: Conversion, theirs: Callable[..., Any]) -> None:
    settings: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "np"}
    prompts, negatives = [PROMPT, "the cat on a white horse"], [NEGATIVE, ""]
    expected = theirs("sd3")(
        prompts,
        negative_prompt=negatives,
        generator=[seeded(5), seeded(6)],
        max_sequence_length=T5_LENGTH,
        **settings,
    ).images
    ours = load_pipeline(with_t5.output / "original" / kind)
    found = ours(prompts, negative_prompt=negatives, seed=[5, 6], **settings).images
    assert psnr_db(found, expected) >= MIN_PSNR_DB
    assert psnr_db(expected[0], expected[1]) < MIN_PSNR_DB  # the prompts count


def test_t5s_states_count(with_t5: Conversion) -> None:
    """A word that only T5 gets: CLIP's 75 tokens are full."""
    ours = load_pipeline(with_t5.output)
    full = "a " * 75
    with pytest.warns(UserWarning, match="was cut after 75 tokens; lost: '(horse|cat)'"):
        first, second = (
            ours(full + word, seed=1, num_inference_steps=2, output_type="np").images for word in ("horse", "cat")
        )
    assert psnr_db(first, second) < 80


def test_pictures_without_t5_equal_diffusers(without_t5: Conversion, theirs: Callable[..., Any]) -> None:
    """Zeros take the place of T5's states, as many as the transformer was converted for."""
    expected = theirs("sd3.5", text_encoder_3=None, tokenizer_3=None)(
        PROMPT,
        guidance_scale=5.0,
        num_inference_steps=STEPS,
        height=64,
        width=96,
        generator=seeded(7),
        max_sequence_length=90 - 77,
        output_type="np",
    ).images
    settings: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "output_type": "np"}
    found = load_pipeline(without_t5.output)(PROMPT, seed=7, **settings).images
    assert found.shape == (1, 64, 96, 3)
    assert psnr_db(found, expected) >= MIN_PSNR_DB


@pytest.mark.parametrize(
    ("task", "strength"),
    [
        (
            "Img2Img",
            0.5,
        ),  # at which diffusers' pipelines for Stable Diffusion 3 skip one step fewer than their others
        ("Inpaint", None),
        ("Inpaint", 1.0),
    ],
)
def test_pictures_from_a_picture_equal_diffusers(
    task: str, strength: float | None, with_t5: Conversion, theirs: Callable[..., Any]
) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 0, 64, 40))
    pipeline = getattr(diffusers, f"StableDiffusion3{task}Pipeline")(**theirs("sd3").components)
    pipeline.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {"num_inference_steps": 5, "output_type": "np", "image": picture}
    settings |= {"strength": strength} if strength else {}
    settings |= {"mask_image": mask} if task == "Inpaint" else {}
    expected = pipeline(PROMPT, generator=seeded(8), max_sequence_length=T5_LENGTH, **settings).images
    found = load_pipeline(with_t5.output)(PROMPT, seed=8, **settings).images
    assert psnr_db(found, expected) >= MIN_PSNR_DB
    ours = load_diffusers_pipeline(with_t5.output, {"Img2Img": "image-to-image", "Inpaint": "inpainting"}[task])
    again = ours(PROMPT, generator=seeded(8), max_sequence_length=T5_LENGTH, **settings).images
    assert psnr_db(again, expected) >= MIN_PSNR_DB


def test_diffusers_own_pipeline_takes_the_models(without_t5: Conversion, theirs: Callable[..., Any]) -> None:
    ours = load_diffusers_pipeline(without_t5.output)
    settings: dict[str, Any] = {"height": 64, "width": 96, "num_inference_steps": STEPS, "output_type": "np"}
    pipes = ours, theirs("sd3.5", text_encoder_3=None, tokenizer_3=None)
    found, expected = (
        pipe(PROMPT, generator=seeded(7), max_sequence_length=13, **settings).images for pipe in pipes
    )
    assert psnr_db(found, expected) >= MIN_PSNR_DB
    with pytest.raises(InputError, match="give max_sequence_length=13, as converted"):
        ours(PROMPT, **settings)


def test_loras_are_fused_as_diffusers_does(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(checkpoint("sd3"), dtype=torch.float32)
    layers = ("attn.to_q", "attn.add_k_proj", "attn.to_out.0", "ff_context.net.0.proj", "norm1.linear")
    modules = [f"transformer.transformer_blocks.1.{layer}" for layer in layers]
    modules += ["transformer.proj_out", "text_encoder_2.text_model.encoder.layers.0.self_attn.v_proj"]
    lora: dict[str, torch.Tensor] = {}
    for index, module in enumerate(modules):
        network, _, name = module.partition(".")
        rows, columns = getattr(pipeline, network).get_submodule(name).weight.shape
        lora[f"{module}.lora_A.weight"] = torch.randn(4, columns, generator=seeded(index))
        lora[f"{module}.lora_B.weight"] = torch.randn(rows, 4, generator=seeded(-index - 1))
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(lora, path)
    pipeline.load_lora_weights(tmp_path)
    pipeline.fuse_lora(["transformer", "text_encoder_2"], lora_scale=0.5)
    pipeline.unload_lora_weights()
    opened = open_checkpoint(str(checkpoint("sd3")), ConvertOptions(loras=[Lora(path, 0.5)]))
    plain = open_checkpoint(str(checkpoint("sd3")))
    changed = 0
    for network in ("transformer", "text_encoder_2"):
        found, before = (one.models[network].tensors() for one in (opened, plain))
        for name, value in getattr(pipeline, network).state_dict().items():
            own = name if name in found else f"text_model.{name}"
            assert torch.allclose(found[own].float(), value, rtol=2e-3, atol=2e-3), name
            changed += not torch.equal(found[own], before[own])
    assert changed == len(modules)


@pytest.mark.parametrize("form", ["lora_unet_{}.lora_{}.weight", "diffusion_model.{}.lora_{}.weight"])
def test_loras_by_stability_ais_names_are_fused(
    form: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """As kohya's trainer and node editors write them: queries, keys and values are one module there, and modules
    without gates have shift and scale the other way round. The sum is made on the file's own tensors."""
    places = (
        *("joint_blocks.0.x_block.attn2.qkv", "joint_blocks.0.context_block.attn.qkv", "x_embedder.proj"),
        *("joint_blocks.1.context_block.adaLN_modulation.1", "joint_blocks.1.x_block.mlp.fc1"),
        *("final_layer.adaLN_modulation.1", "final_layer.linear"),
    )
    prefix, kohya = "model.diffusion_model.", form.startswith("lora")
    path = tiny_sd3.write_file(checkpoint("sd3.5"), tmp_path / "model.safetensors")
    stored = load_file(path)
    lora: dict[str, torch.Tensor] = {}
    for number, place in enumerate(places):
        weight = stored[f"{prefix}{place}.weight"]
        down, up = (
            torch.randn(size, generator=seeded(number)) for size in ((4, *weight.shape[1:]), (len(weight), 4))
        )
        name = place.replace(".", "_") if kohya else place
        lora |= {form.format(name, "down" if kohya else "A"): down, form.format(name, "up" if kohya else "B"): up}
        stored[f"{prefix}{place}.weight"] = (weight.float() + 0.5 * (up @ down.flatten(1)).view_as(weight)).half()
    t5 = "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"
    down, up = torch.randn(4, 96, generator=seeded(8)), torch.randn(len(stored[f"{t5}.weight"]), 4)
    if kohya:
        module = t5.removeprefix("text_encoders.t5xxl.transformer.").replace(".", "_")
        lora |= {f"lora_te3_{module}.lora_down.weight": down, f"lora_te3_{module}.lora_up.weight": up}
        stored[f"{t5}.weight"] = (stored[f"{t5}.weight"].float() + 0.5 * up @ down).half()
    save_file(lora, tmp_path / "style.safetensors")
    opened = open_checkpoint(str(path), ConvertOptions(loras=[Lora(tmp_path / "style.safetensors", 0.5)]))
    save_file(stored, changed := path.with_name("changed.safetensors"))
    shutil.copyfile(path.with_name("model.config.json"), changed.with_name("changed.config.json"))
    for part in ("transformer", "text_encoder_3"):
        found, wanted = (one.models[part].tensors() for one in (opened, open_checkpoint(str(changed))))
        assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_previews_come_near_the_picture(with_t5: Conversion) -> None:
    ours = load_pipeline(with_t5.output)
    seen: list[Image.Image] = []
    made = ours(PROMPT, seed=1, num_inference_steps=4, on_step=lambda step: seen.append(ours.preview(step)))
    picture = np.asarray(made.images[0], np.float32) / 255
    gaps = [float(np.abs(np.asarray(one, np.float32) / 255 - picture).max()) for one in seen]
    assert gaps[0] > 0.01
    assert gaps[-1] == 0.0  # the last step leaves no noise


# --- what is refused


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"attention": "split_einsum"}, "--attention split_einsum: .* original attention only: picture and text"),
        ({"context_length": 77}, "--context-length 77: expected 78 to 589"),
        ({"height": 72, "width": 72}, "--height 72: expected a multiple of 16"),
        ({"height": 208, "width": 64}, "64x208 pixels: sd3 takes at most 192 on a side"),
        ({"family": "sdxl"}, "family 'sdxl' does not fit a SD3Transformer2DModel: expected sd3"),
        (
            {"embeddings": "style.safetensors"},
            "--embedding: it is for models with a UNet, and Stable Diffusion 3 has none",
        ),
        ({"chunk_unet": True}, "--chunk-unet: unet is not converted"),
    ],
)
def test_what_does_not_apply_is_refused_before_any_work(
    options: dict[str, Any], expected: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=expected) as raised:
        convert(checkpoint("sd3"), tmp_path / "models", ConvertOptions(**options))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "models" / "original").exists()


def test_other_transformers_and_no_t5_elsewhere_are_refused(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="--no-t5: Stable Diffusion 1 has no T5"):
        convert(tiny_checkpoint("sd1"), tmp_path / "models", ConvertOptions(no_t5=True))
    flux = tmp_path / "flux"
    flux.mkdir()
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (flux / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(Exception, match="around a FluxTransformer2DModel is not supported"):
        convert(flux, tmp_path / "models")


@pytest.mark.parametrize(
    ("part", "changes", "expected"),
    [
        ("transformer", {"patch_size": 4}, "transformer: a patch_size that no published model has"),
        (
            "transformer",
            {"pooled_projection_dim": 64},
            "pooled states of 56 channels, but the transformer takes 64",
        ),
        ("text_encoder_3", {"d_model": 64}, "T5 encoder gives states of 64 channels, but the transformer takes 96"),
        ("vae", {"latent_channels": 4}, "VAE has latents of 4 channels, but the transformer takes 16"),
    ],
)
def test_networks_that_do_not_fit_each_other_are_refused(
    part: str, changes: dict[str, int], expected: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = shutil.copytree(checkpoint("sd3"), tmp_path / "other")
    path = source / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=expected):
        open_checkpoint(str(source))


def test_latents_of_another_scale_and_shift_are_folded(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Apps divide by 1.5305 and add 0.0609, whatever the VAE's own are; what they then have is made the VAE's."""
    source = shutil.copytree(checkpoint("sd3"), tmp_path / "other")
    path = source / "vae" / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), "scaling_factor": 0.5, "shift_factor": -0.25}
    path.write_text(json.dumps(config), encoding="utf-8")
    folded = fold(open_checkpoint(str(source)), [Folding.LATENT_SCALE])
    assert latents(folded) == (1.5305, 0.0609)
    in_loop = torch.randn(1, 16, 4, 4)
    to_own, back = own_latents(folded), known_latents(folded)
    assert to_own is not None
    assert back is not None
    own = to_own(in_loop / 1.5305 + 0.0609)
    assert torch.allclose(own, in_loop / 0.5 - 0.25, atol=1e-5)
    moments = back(torch.cat([own, torch.zeros_like(own)], dim=1))
    assert torch.allclose((moments[:, :16] - 0.0609) * 1.5305, in_loop, atol=1e-5)


def test_schedulers_for_other_models_are_refused(with_t5: Conversion) -> None:
    with pytest.raises(InputError, match="EulerDiscreteScheduler does not fit models of FlowMatchEuler"):
        load_pipeline(with_t5.output, scheduler="euler")(PROMPT, num_inference_steps=2)
    ours = load_pipeline(with_t5.output)
    with pytest.raises(InputError, match="DDIMScheduler does not fit"):
        ours.scheduler = diffusers.DDIMScheduler()
