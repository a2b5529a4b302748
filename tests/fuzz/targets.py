"""What is damaged and through which commands it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Command = tuple[str, ...]
CONVERT_ALL = ("--attention", "original", "--no-compiled")
UNVERIFIED = (*CONVERT_ALL, "--no-verify")
PICTURE = ("--steps", "2", "--seed", "1", "--backend", "torch")
INSPECT = ("inspect", "IN/models")
GENERATE = ("generate", "IN/models", "--prompt", "a (cat:1.2)", *PICTURE, "-o", "out/picture.png")


def convert(source: str, *parts: str, options: Command = UNVERIFIED) -> tuple[Command, ...]:
    return tuple(("convert", source, "-o", "out/models", "--components", part, *options) for part in parts)


@dataclass(frozen=True, slots=True)
class Target:
    """``seed`` is the folder of `seeds` that a case gets a copy of, ``files`` the patterns of what is damaged in
    it, ``commands`` what one is drawn from: "IN" stands for the copy, "FILE" for the damaged file, "SEEDS" for all
    seeds. ``writes_inside``: the command may change the copy. ``takes_pipes``: and waits for what writes to one."""

    seed: str
    files: tuple[str, ...]
    commands: tuple[Command, ...]
    writes_inside: bool = False
    takes_pipes: bool = False


LORA = ("convert", "SEEDS/checkpoint/sd1", "-o", "out/models", "--components", "unet", *UNVERIFIED)
PICTURES = tuple(f"*.{suffix}" for suffix in ("jpg", "webp", "tiff", "bmp", "gif", "png"))
TARGETS: Mapping[str, Target] = {
    "manifest": Target("toy", ("**/manifest.json",), (GENERATE, GENERATE, INSPECT)),
    "manifest-compiled": Target("compiled", ("**/manifest.json",), (GENERATE, INSPECT)),
    "manifest-bundle": Target("converted", ("**/manifest.json",), (("bundle", "IN/models", "--zip"),), True),
    "text-config": Target("checkpoint", ("sd1/text_encoder/config.json",), convert("IN/sd1", "text_encoder")),
    "unet-config": Target("checkpoint", ("sd1/unet/config.json",), convert("IN/sd1", "unet")),
    "vae-config": Target("checkpoint", ("sd1/vae/config.json",), convert("IN/sd1", "vae_decoder", "vae_encoder")),
    "safety-config": Target(
        "checkpoint",
        ("sd1/safety_checker/config.json", "sd1/feature_extractor/*"),
        convert("IN/sd1", "safety_checker"),
    ),
    "depth-config": Target(
        "depth",
        ("sd2-depth/depth_estimator/config.json", "sd2-depth/feature_extractor/*"),
        convert("IN/sd2-depth", "depth_estimator"),
    ),
    "scheduler": Target(
        "checkpoint",
        ("sd1/scheduler/*", "sd1/model_index.json"),
        convert("IN/sd1", "text_encoder", options=("--attention", "original", "--no-verify")),
    ),
    "vocabulary": Target("checkpoint", ("sd1/tokenizer/*",), convert("IN/sd1", "text_encoder")),
    "tokenizer": Target("toy", ("**/vocab.json", "**/merges.txt", "**/*token*.json"), (GENERATE,)),
    "safetensors": Target(
        "checkpoint",
        ("sd1/text_encoder/*.safetensors", "sd1/vae/*.safetensors"),
        (
            *convert("IN/sd1", "text_encoder", "vae_encoder"),
            *convert("IN/sd1", "text_encoder", options=CONVERT_ALL),
        ),
    ),
    "single-file": Target("single", ("*.safetensors",), convert("IN/model.safetensors", "text_encoder")),
    "beside-file": Target(
        "single", ("*.yaml", "*.json"), convert("IN/model.safetensors", "text_encoder", "vae_encoder")
    ),
    "ckpt": Target("ckpt", ("*.ckpt",), convert("IN/model.ckpt", "text_encoder")),
    "legacy-ckpt": Target("legacy", ("*.ckpt",), convert("IN/model.ckpt", "text_encoder")),
    "bin": Target("bins", ("sd1/text_encoder/*.bin",), convert("IN/sd1", "text_encoder")),
    "gguf": Target(
        "gguf",
        ("*.gguf",),
        convert("IN/model.gguf", "unet", options=("--base", "SEEDS/checkpoint/sd1", *UNVERIFIED)),
    ),
    "lora": Target("lora", ("kohya.safetensors",), ((*LORA, "--lora", "IN/kohya.safetensors:0.8"),)),
    "lora-ckpt": Target("lora", ("kohya.ckpt",), ((*LORA, "--lora", "IN/kohya.ckpt"),)),
    "lora-diffusers": Target(
        "lora", ("pytorch_lora*",), ((*LORA, "--lora", "IN/pytorch_lora_weights.safetensors"),)
    ),
    "lora-peft": Target("lora", ("adapter/*",), ((*LORA, "--lora", "IN/adapter"),)),
    "package": Target(
        "package",
        ("**/*.mlmodel", "**/*.mlmodel", "**/weight.bin", "**/Manifest.json"),
        (
            ("inspect", "IN/model.mlpackage"),
            ("compile", "IN/model.mlpackage", "-o", "out"),
            ("palettize", "IN/model.mlpackage", "-o", "out/small.mlpackage"),
            ("palettize", "IN/model.mlpackage", "-o", "out/small.mlpackage", "--no-check"),
        ),
    ),
    "toy-package": Target("toy", ("**/*.mlmodel", "**/*.mlpackage/Manifest.json"), (GENERATE,)),
    "compiled": Target(
        "mlmodelc",
        ("**/model.mil", "**/model.mil", "**/coremldata.bin", "**/weight.bin", "**/metadata.json"),
        (("inspect", "IN/model.mlmodelc"), ("inspect", "IN/model.mlmodelc", "--json")),
    ),
    "toy-compiled": Target("compiled", ("**/model.mil", "**/coremldata.bin"), (GENERATE,)),
    "damaged-bundle": Target(
        "converted",
        ("**/*.mlmodel", "**/weight.bin", "**/model.mil", "**/vocab.json", "**/merges.txt"),
        (("bundle", "IN/models", "--zip"), ("verify", "IN/models", "--against", "SEEDS/checkpoint/sd1")),
        True,
    ),
    "zip": Target("zip", ("*.zip",), (("inspect", "IN/models.zip"),)),
    "picture": Target(
        "picture",
        PICTURES,
        (("generate", "IN/models", "--prompt", "a cat", "--image", "FILE", *PICTURE, "-o", "out/picture.png"),),
    ),
    "mask": Target(
        "picture",
        PICTURES,
        (
            (
                "generate",
                "IN/models",
                "--prompt",
                "a cat",
                "--image",
                "SEEDS/picture/photo.png",
                "--mask",
                "FILE",
                *PICTURE,
                "-o",
                "out/picture.png",
            ),
        ),
    ),
    "record": Target(
        "picture",
        ("record.png",),
        (
            ("generate", "--from", "IN/record.png", "-o", "out/picture.png"),
            ("generate", "IN/models", "--from", "IN/record.png", "-o", "out/picture.png"),
        ),
    ),
    "prompts": Target(
        "picture",
        ("prompts.txt",),
        (("generate", "IN/models", "--prompts-file", "IN/prompts.txt", *PICTURE, "-o", "out/p.png"),),
        takes_pipes=True,
    ),
    "samples": Target(
        "recipe",
        ("samples.npz",),
        (("palettize", "IN/model.mlpackage", "-o", "out/small.mlpackage", "--samples", "IN/samples.npz"),),
    ),
    "recipe": Target(
        "recipe",
        ("recipe.json",),
        (
            (
                "palettize",
                "IN/model.mlpackage",
                "-o",
                "out/small.mlpackage",
                "--recipe",
                "IN/recipe.json",
                "--no-check",
            ),
        ),
    ),
    "card-picture": Target("converted", ("**/photo.png",), (("bundle", "IN/models", "--picture", "FILE"),), True),
}
