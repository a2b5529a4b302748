"""LoRAs for SDXL's networks, Stability AI's names of blocks among them, as diffusers' pipeline fuses them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diffusion_convert.checkpoint.diffusers_unet import ldm_modules
from diffusion_convert.checkpoint.lora import fuse
from diffusion_convert.checkpoint.lora.places import places
from diffusion_convert.checkpoint.model import Checkpoint, Submodel
from diffusion_convert.option_values import Lora
from diffusion_runtime.bundle.manifest import Source
from diffusion_runtime.errors import InputError

ROUNDING = 2**-10
"""float16 has 11 significant bits: two roundings of nearly the same value differ by no more."""
NETWORKS = ("unet", "text_encoder", "text_encoder_2")


def _unet() -> Any:
    from diffusers import UNet2DConditionModel

    make: Any = UNet2DConditionModel
    return make(
        sample_size=8,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=[1, 2, 2],
        attention_head_dim=[2, 4, 4],
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=64,
        use_linear_projection=True,
        norm_num_groups=8,
    )


def _text_encoder(kind: str) -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=32,
        max_position_embeddings=77,
    )
    return getattr(transformers, kind)(config)


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint: Callable[[str], Path]) -> Any:
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTokenizer

    folder = tiny_checkpoint("sd1")
    torch.manual_seed(0)
    tokenizer: Any = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    load: Any = AutoencoderKL.from_pretrained
    made: Any = StableDiffusionXLPipeline(
        vae=load(folder / "vae"),
        unet=_unet(),
        text_encoder=_text_encoder("CLIPTextModel"),
        text_encoder_2=_text_encoder("CLIPTextModelWithProjection"),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=EulerDiscreteScheduler(),
    )
    return made


def checkpoint_of(pipeline: Any) -> Checkpoint:
    models = {}
    for name in NETWORKS:
        weights = {key: value.detach().clone() for key, value in getattr(pipeline, name).state_dict().items()}
        models[name] = Submodel(type(getattr(pipeline, name)).__name__, {}, partial(dict, weights), ())
    return Checkpoint("tiny", "sdxl", Source(name="tiny"), models, {}, {})


def assert_as_diffusers(pipeline: Any, path: Path, scale: float = 0.8) -> Checkpoint:
    checkpoint = checkpoint_of(pipeline)
    found = fuse(checkpoint, [Lora(path, scale)])
    other = copy.deepcopy(pipeline)
    other.load_lora_weights(path)
    other.fuse_lora(lora_scale=scale)
    other.unload_lora_weights()
    changed = 0
    for name in NETWORKS:
        ours, before = found.models[name].tensors(), checkpoint.models[name].tensors()
        for key, value in getattr(other, name).state_dict().items():
            torch.testing.assert_close(
                ours[key].half(), value.half(), rtol=ROUNDING, atol=2**-22, msg=partial("{}: {}".format, key)
            )
            changed += not torch.equal(ours[key], before[key])
    assert changed
    return found


LAYERS = {
    "unet": (
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "down_blocks.2.attentions.1.transformer_blocks.1.attn2.to_out.0",
        "down_blocks.1.attentions.1.proj_in",
        "down_blocks.2.resnets.0.conv1",
        "down_blocks.1.resnets.0.conv_shortcut",
        "down_blocks.0.resnets.1.time_emb_proj",
        "down_blocks.0.downsamplers.0.conv",
        "mid_block.attentions.0.transformer_blocks.1.ff.net.0.proj",
        "mid_block.resnets.1.conv2",
        "up_blocks.0.attentions.2.transformer_blocks.0.attn2.to_k",
        "up_blocks.0.upsamplers.0.conv",
        "up_blocks.1.resnets.2.conv1",
        "up_blocks.2.resnets.0.conv2",
        "conv_in",
        "conv_out",
        "time_embedding.linear_1",
        "add_embedding.linear_2",
    ),
    "text_encoder": (
        "encoder.layers.0.self_attn.q_proj",
        "encoder.layers.1.self_attn.out_proj",  # by which diffusers knows kohya's text encoders
        "encoder.layers.2.mlp.fc2",
    ),
    "text_encoder_2": ("text_model.encoder.layers.1.self_attn.out_proj", "text_model.encoder.layers.0.mlp.fc1"),
}


def halves(pipeline: Any) -> Iterator[tuple[str, str, torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    for network, modules in LAYERS.items():
        weights = getattr(pipeline, network).state_dict()
        for module in modules:
            name = module if f"{module}.weight" in weights else module.removeprefix("text_model.")
            out, *into = weights[f"{name}.weight"].shape
            ones = (1, 1) if len(into) == 3 else ()
            down = torch.randn(3, *into, generator=generator)
            yield network, module, down, torch.randn(out, 3, *ones, generator=generator)


def kohya(network: str, module: str, sgm: dict[str, str]) -> str:
    if network == "unet":
        return f"lora_unet_{sgm.get(module, module).replace('.', '_')}"
    prefix = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}[network]
    return f"{prefix}text_model_{module.removeprefix('text_model.').replace('.', '_')}"


@pytest.mark.parametrize("names", ["sgm", "kohya", "peft", "diffusers"])
def test_as_diffusers_fuses_it(pipeline: Any, tmp_path: Path, names: str) -> None:
    tensors: dict[str, torch.Tensor] = {}
    sgm = ldm_modules(pipeline.unet.state_dict()) if names == "sgm" else {}
    for network, module, down, up in halves(pipeline):
        if names in ("sgm", "kohya"):
            if module == "add_embedding.linear_2" and names == "kohya":
                continue  # diffusers 0.42 knows it by Stability AI's name only
            name = kohya(network, module, sgm)
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            tensors[f"{name}.alpha"] = torch.tensor(2.0)
        else:
            text = network != "unet" and not module.startswith("text_model.")
            name = f"{network}.{'text_model.' * text}{module}"
            ends = ("lora_A", "lora_B") if names == "peft" else ("lora.down", "lora.up")
            if names == "diffusers" and network != "unet":
                ends = ("lora_linear_layer.down", "lora_linear_layer.up")
            tensors |= {f"{name}.{ends[0]}.weight": down, f"{name}.{ends[1]}.weight": up}
    save_file(tensors, tmp_path / "lora.safetensors")
    found = assert_as_diffusers(pipeline, tmp_path / "lora.safetensors")
    assert found.notes == ()


def test_layers_under_two_names_count_once(pipeline: Any, tmp_path: Path) -> None:
    """Some mergers write both: diffusers takes those under its own names."""
    tensors: dict[str, torch.Tensor] = {}
    for sgm in (ldm_modules(pipeline.unet.state_dict()), {}):
        for network, module, down, up in halves(pipeline):
            if module.startswith(("conv_", "time_", "add_")):
                continue
            name = kohya(network, module, sgm)
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up * (2 if sgm else 1)}
    save_file({name: value.clone() for name, value in tensors.items()}, tmp_path / "lora.safetensors")
    found = assert_as_diffusers(pipeline, tmp_path / "lora.safetensors")
    assert "under diffusers' and Stability AI's names: the latter are left out" in " ".join(found.notes)


def test_the_second_encoders_projection(pipeline: Any, tmp_path: Path) -> None:
    name = "lora_te2_text_projection"
    down, up = torch.randn(2, 32), torch.randn(32, 2)
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "lora.safetensors")
    checkpoint = checkpoint_of(pipeline)
    found = fuse(checkpoint, [Lora(tmp_path / "lora.safetensors", 0.5)]).models["text_encoder_2"].tensors()
    before = checkpoint.models["text_encoder_2"].tensors()["text_projection.weight"]
    torch.testing.assert_close(found["text_projection.weight"], before + 0.5 * up @ down)


def test_every_modules_sgm_name(pipeline: Any, tiny_checkpoint: Callable[[str], Path]) -> None:
    """The names that we take are those that diffusers makes its own names of."""
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    load: Any = UNet2DConditionModel.from_pretrained
    for unet in (pipeline.unet, load(tiny_checkpoint("sd1") / "unet"), load(tiny_checkpoint("sd2-v") / "unet")):
        weights = unet.state_dict()
        names = ldm_modules(weights)
        assert names.keys() == {name.rpartition(".")[0] for name in weights}
        renamed = {
            f"model.diffusion_model.{names[module]}.{end}": value
            for name, value in weights.items()
            for module, _, end in (name.rpartition("."),)
        }
        assert len(renamed) == len(weights)
        mapped = convert_ldm_unet_checkpoint(renamed, dict(unet.config))
        assert mapped.keys() == weights.keys()
        assert all(mapped[name] is value for name, value in weights.items())


def test_blocks_weights(pipeline: Any, tmp_path: Path) -> None:
    """Blocks are counted as trainers count them, and every spelling has them."""
    sgm = ldm_modules(pipeline.unet.state_dict())
    checkpoint = checkpoint_of(pipeline)
    blocks = {place.block for several in places(checkpoint, "unet").values() for place in several}
    assert blocks == {"", "mid", *(f"in{i:02}" for i in range(9)), *(f"out{i:02}" for i in range(9))}
    weights = {"in04": 0.5, "mid": 0.0, "out02": -1.0, "te2": 0.25, "te": 0.75}
    for names in ("sgm", "kohya"):
        tensors: dict[str, torch.Tensor] = {}
        for network, module, down, up in halves(pipeline):
            name = kohya(network, module, sgm if names == "sgm" else {})
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        path = tmp_path / f"{names}.safetensors"
        save_file(tensors, path)
        found = fuse(checkpoint, [Lora(path, 2.0, tuple(weights.items()))])
        for network, module, down, up in halves(pipeline):
            before, after = (made.models[network].tensors() for made in (checkpoint, found))
            name = module if f"{module}.weight" in before else module.removeprefix("text_model.")
            strength = {"text_encoder": 0.75, "text_encoder_2": 0.25}.get(network, 2.0)
            place = sgm.get(module, "")
            for start, weight in (("input_blocks.4.", 0.5), ("middle_block.", 0.0), ("output_blocks.2.", -1.0)):
                strength = weight if place.startswith(start) else strength
            product = (up.flatten(1) @ down.flatten(1)).reshape(before[f"{name}.weight"].shape)
            torch.testing.assert_close(after[f"{name}.weight"], before[f"{name}.weight"] + strength * product)


def test_a_block_that_is_not_there(pipeline: Any, tmp_path: Path) -> None:
    _, _, down, up = next(halves(pipeline))
    name = kohya("unet", LAYERS["unet"][0], {})
    path = tmp_path / "lora.safetensors"
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, path)
    with pytest.raises(InputError, match="weight for in11, which this UNet does not have: it has in00, in01"):
        fuse(checkpoint_of(pipeline), [Lora(path, 1.0, (("in11", 0.5),))])


def test_names_of_another_layout_are_listed(pipeline: Any, tmp_path: Path) -> None:
    """SDXL's blocks have no attention where Stable Diffusion 1's have."""
    name = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 32), f"{name}.lora_up.weight": torch.ones(32, 2)}
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match=f"2 of its 2 tensors match nothing in this sdxl checkpoint: {name}"):
        fuse(checkpoint_of(pipeline), [Lora(tmp_path / "lora.safetensors")])
