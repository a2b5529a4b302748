"""Configurations of folders: wrong ones are refused in a line, incomplete ones are read as libraries read them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion_convert import ConvertOptions, convert
from diffusion_convert.checkpoint import torch_networks
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.conversion.plan import make_plan
from diffusion_convert.option_values import Lora
from diffusion_runtime.errors import CheckpointError, InputError
from folders import WEIGHTS, configure

NO_COUNTS: tuple[Any, ...] = ("32", [1], {}, None, 0, -4)
WRONG: list[tuple[str, str, Any]] = [
    *(("text_encoder", "hidden_size", value) for value in NO_COUNTS),
    *(("text_encoder", "vocab_size", value) for value in NO_COUNTS),
    ("text_encoder", "num_hidden_layers", 1_000_000),
    ("text_encoder", "num_hidden_layers", "2"),
    ("text_encoder", "num_attention_heads", 0),
    ("text_encoder", "num_attention_heads", 5),
    ("text_encoder", "max_position_embeddings", -1),
    ("text_encoder", "max_position_embeddings", 10**9),
    ("text_encoder", "hidden_act", 3),
    ("text_encoder", "hidden_act", "nonsense"),
    ("text_encoder", "layer_norm_eps", "x"),
    ("text_encoder", "eos_token_id", "x"),
    ("safety_checker", "vision_config", "x"),
    ("safety_checker", "vision_config", [1]),
    ("safety_checker", "vision_config", {"hidden_size": "32"}),
    ("safety_checker", "vision_config", {"image_size": None}),
    ("safety_checker", "vision_config", {"patch_size": 0}),
    ("safety_checker", "vision_config", {"num_hidden_layers": 10**6}),
    ("safety_checker", "text_config", 7),
    ("safety_checker", "projection_dim", "x"),
    ("unet", "norm_num_groups", 0),
    ("unet", "norm_num_groups", 7),
    ("unet", "downsample_padding", {}),
    ("unet", "downsample_padding", -1),
    ("unet", "layers_per_block", 1_000_000),
    ("unet", "layers_per_block", [1_000_000, 1]),
    ("unet", "layers_per_block", "x"),
    ("unet", "transformer_layers_per_block", 10**6),
    ("unet", "transformer_layers_per_block", [[10**6], 1]),
    ("unet", "in_channels", "4"),
    ("unet", "in_channels", 10**9),
    ("unet", "out_channels", None),
    ("unet", "block_out_channels", []),
    ("unet", "block_out_channels", [32, "x"]),
    ("unet", "block_out_channels", 32),
    ("unet", "attention_head_dim", 0),
    ("unet", "sample_size", "x"),
    ("unet", "sample_size", -3),
    ("unet", "act_fn", 1),
    ("unet", "class_embed_type", 1),
    ("unet", "down_block_types", [1, 2]),
    ("unet", "down_block_types", None),
    ("vae", "shift_factor", "x"),
    ("vae", "scaling_factor", 0),
    ("vae", "scaling_factor", "x"),
    ("vae", "scaling_factor", float("inf")),
    ("vae", "latent_channels", 0),
    ("vae", "norm_num_groups", 0),
    ("vae", "layers_per_block", 1_000_000),
    ("vae", "block_out_channels", [32] * 1000),
    ("vae", "in_channels", "3"),
]


@pytest.mark.parametrize(("part", "key", "value"), WRONG, ids=lambda value: str(value)[:40])
def test_configurations_of_wrong_types_and_sizes(part: str, key: str, value: Any, folder: Path) -> None:
    import time

    configure(folder, part, **{key: value})
    started = time.process_time()
    with pytest.raises((CheckpointError, InputError)) as caught:
        make_plan(open_checkpoint(str(folder)), ConvertOptions())
    assert time.process_time() - started < 10
    assert "\n" not in str(caught.value)
    assert part in str(caught.value)


@pytest.mark.parametrize("missing", ["hidden_size", "vocab_size", "in_channels", "out_channels", "latent_channels"])
def test_keys_that_are_left_out_are_the_libraries_defaults(missing: str, folder: Path) -> None:
    """Here the default is the value, or another: then the weights do not fit, which is said."""
    part = {"hidden_size": "text_encoder", "vocab_size": "text_encoder", "latent_channels": "vae"}.get(
        missing, "unet"
    )
    configure(folder, part, **{missing: ...})
    if part == "text_encoder":
        with pytest.raises(CheckpointError, match=r"512 channels|wrong shapes: .*49408"):
            make_plan(open_checkpoint(str(folder)), ConvertOptions())
    else:
        make_plan(open_checkpoint(str(folder)), ConvertOptions())


@pytest.mark.parametrize("text", ["a\0b", "\ud800", "models/\udbff.safetensors"])
@pytest.mark.parametrize("given", ["source", "vae", "base", "output", "lora"])
def test_texts_that_are_no_paths(given: str, text: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a NUL or half a surrogate pair") as caught:
        if given == "output":
            convert(str(folder), Path(text))
        elif given == "lora":
            convert(str(folder), tmp_path / "models", ConvertOptions(loras=(Lora(Path(text)),)))
        elif given == "source":
            open_checkpoint(text)
        else:
            ConvertOptions(**{given: text})  # type: ignore[arg-type]
    assert str(caught.value).isascii()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("every", [True, False])
def test_weights_without_values_are_refused_without_verification(
    value: float, every: bool, folder: Path, tmp_path: Path
) -> None:
    text = folder / "text_encoder" / WEIGHTS["text_encoder"]
    weights = load_file(text)
    changed = list(weights) if every else ["text_model.final_layer_norm.bias"]
    save_file({n: torch.full_like(v, value) if n in changed else v for n, v in weights.items()}, text)
    options = ConvertOptions(components=("text_encoder",), verify=False, compiled=False, zip=False)
    with pytest.raises(CheckpointError, match="infinite or undefined value"):
        convert(str(folder), tmp_path / "models", options)


def whole_clip(folder: Path, part: str) -> None:
    """config.json and weights of a whole CLIP in a text encoder's folder."""
    path = folder / part / "config.json"
    text = json.loads(path.read_text())
    vision = {"hidden_size": 8, "model_type": "clip_vision_model"}
    whole = {"architectures": ["CLIPModel"], "model_type": "clip", "text_config": text, "vision_config": vision}
    path.write_text(json.dumps({**whole, "projection_dim": text["projection_dim"], "hidden_size": 99}))
    more = {
        "vision_model.embeddings.class_embedding": torch.zeros(8),
        "visual_projection.weight": torch.zeros(8, 8),
    }
    file = folder / part / "model.safetensors"
    save_file({**load_file(file), **more, "logit_scale": torch.tensor(4.6)}, file, metadata={"format": "pt"})


@pytest.mark.parametrize(("family", "part"), [("sd1", "text_encoder"), ("sdxl", "text_encoder_2")])
def test_the_configuration_of_a_whole_clip(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, family: str, part: str
) -> None:
    import transformers

    source = shutil.copytree(tiny_checkpoint(family), tmp_path / "checkpoint")
    whole_clip(source, part)
    checkpoint = open_checkpoint(str(source))
    make_plan(checkpoint, ConvertOptions(attention="original"))
    with torch_networks.silent(), torch.inference_mode():
        kind = getattr(transformers, checkpoint.models[part].class_name)
        expected = kind.from_pretrained(source / part, dtype=torch.float32).eval()
        ids = torch.randint(0, 300, (1, 77), generator=torch.Generator().manual_seed(0))
        ours = torch_networks.build(checkpoint, part).float()(ids)
        assert all(
            torch.allclose(one, two, atol=1e-5) for one, two in zip(ours[:2], expected(ids)[:2], strict=True)
        )


NOT_COVERED: list[tuple[str, str, dict[str, Any], str]] = [
    ("sd1", "text_encoder", {"use_attention_mask": True}, "use_attention_mask"),
    ("sdxl", "unet", {"addition_time_embed_dim": ...}, "addition_time_embed_dim"),
    ("sd1", "text_encoder", {"eos_token_id": [49407, 2]}, "eos_token_id"),
]


@pytest.mark.parametrize(("family", "part", "values", "named"), NOT_COVERED)
def test_configurations_that_diffusers_follows_and_nothing_here_does(
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    family: str,
    part: str,
    values: dict[str, Any],
    named: str,
) -> None:
    source = shutil.copytree(tiny_checkpoint(family), tmp_path / "checkpoint")
    configure(source, part, **values)
    with pytest.raises(CheckpointError, match=named) as caught:
        open_checkpoint(str(source))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "part", "values"),
    [
        ("sd1", "vae", {"latents_mean": [0.1] * 4, "latents_std": [1.1] * 4}),  # not by SD 1's pipelines
        ("sdxl", "vae", {"latents_mean": None, "latents_std": None}),
        ("sdxl", "text_encoder", {"use_attention_mask": True}),  # not by SDXL's
        ("sd1", "text_encoder", {"use_attention_mask": False}),
    ],
)
def test_configurations_that_no_pipeline_follows(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, family: str, part: str, values: dict[str, Any]
) -> None:
    source = shutil.copytree(tiny_checkpoint(family), tmp_path / "checkpoint")
    configure(source, part, **values)
    assert open_checkpoint(str(source)).family == family
