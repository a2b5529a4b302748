"""The modules that are put into diffusers' and transformers' networks compute what theirs compute."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import tiny_checkpoints
from diffusion_convert import networks as nets
from diffusion_convert.networks.attention import ATTENTION
from diffusion_convert.networks.clip import TextEncoder, VisionEncoder
from diffusion_runtime.coremltools_import import import_coremltools
from diffusion_runtime.errors import UnsupportedError
from diffusion_runtime.families import AttentionKind

AGREEMENT_DB = 60.0
TEXT_LENGTH = 77

# Keys of diffusers' configurations that the families' checkpoints do not have.
UNUSUAL: dict[str, dict[str, Any]] = {
    "attention beside the transformers": {
        "down_block_types": ["AttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "AttnUpBlock2D"],
    },
    "class embeddings": {"num_class_embeds": 1000, "class_embeddings_concat": True},
    "heads and layers by level": {"attention_head_dim": [4, 8], "transformer_layers_per_block": [1, 2]},
    "no middle block": {"mid_block_type": None},
    "only cross-attention": {"only_cross_attention": True, "mid_block_only_cross_attention": True},
    "text by level": {"cross_attention_dim": [24, 24]},
}
REFUSED: dict[str, dict[str, Any]] = {
    "DualTransformer2DModel": {"dual_cross_attention": True},
    "addition_embed_type": {"addition_embed_type": "text", "addition_embed_type_num_heads": 4},
    "encoder_hid_dim_type": {"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 24},
    "fuser": {"attention_type": "gated"},
    "mid_block.attentions.0": {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
    "KAttentionBlock": {
        "down_block_types": ["KDownBlock2D", "KCrossAttnDownBlock2D"],
        "up_block_types": ["KCrossAttnUpBlock2D", "KUpBlock2D"],
        "mid_block_type": None,
    },
}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "biased projections": {"attention_bias": True},
    "linear projections": {"use_linear_projection": True},
    "self-attention alone": {"cross_attention_dim": None},
    "norms without parameters": {"norm_elementwise_affine": False},
    "upcast": {"upcast_attention": True},
    **{name: {"activation_fn": name} for name in ("gelu", "gelu-approximate", "geglu", "geglu-approximate")},
    **{name: {"activation_fn": name} for name in ("swiglu", "linear-silu")},
}


def psnr_db(wanted: torch.Tensor, got: torch.Tensor) -> float:
    assert wanted.shape == got.shape
    return float(20 * torch.log10(wanted.abs().max() / (wanted - got).double().pow(2).mean().sqrt()))


def unet_of(config: dict[str, Any]) -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet: nn.Module = UNet2DConditionModel.from_config(config).eval()
    for parameter in unet.parameters():  # norms off 1 and 0, so that mixing them up shows
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return unet.requires_grad_(False)


def unet_inputs(unet: Any, batch: int, height: int, width: int) -> dict[str, Any]:
    text_width = unet.config.cross_attention_dim
    text_width = text_width if isinstance(text_width, int) else text_width[0]
    inputs: dict[str, Any] = {
        "sample": torch.randn(batch, unet.config.in_channels, height, width),
        "timestep": torch.tensor([981.0, 21.0][:batch]),
        "encoder_hidden_states": torch.randn(batch, TEXT_LENGTH, text_width),
    }
    if unet.config.num_class_embeds is not None:
        inputs["class_labels"] = torch.tensor([20, 350][:batch])
    if unet.config.class_embed_type == "projection":
        inputs["class_labels"] = torch.randn(batch, 8)
    if unet.config.addition_embed_type == "text_time":
        step, whole = unet.config.addition_time_embed_dim, unet.config.projection_class_embeddings_input_dim
        count = 6 if whole % step or whole // step > 8 else 5
        embeds = torch.randn(batch, whole - count * step)
        inputs["added_cond_kwargs"] = {"time_ids": torch.full((batch, count), 96.0), "text_embeds": embeds}
    return inputs


def check_unet(config: dict[str, Any], batch: int = 2, height: int = 24, width: int = 40) -> None:
    """24x40 latents: 960 positions, which are not a multiple of 512."""
    unet = unet_of(config)
    inputs = unet_inputs(unet, batch, height, width)
    wanted = unet(**inputs, return_dict=False)[0]
    in_columns = inputs["encoder_hidden_states"].transpose(1, 2).unsqueeze(2)
    for kind in AttentionKind:
        changed = copy.deepcopy(unet)
        nets.put_attention(changed, kind)
        got = changed(**(inputs | {"encoder_hidden_states": in_columns}), return_dict=False)[0]
        assert psnr_db(wanted, got) >= AGREEMENT_DB, kind


@pytest.mark.parametrize(
    "family", [name for name, new in tiny_checkpoints.new_attentions().items() if "unet" in new]
)
def test_unets_of_all_families_agree_with_diffusers(family: str) -> None:
    check_unet(dict(tiny_checkpoints.RECIPES[family].unet))


@pytest.mark.parametrize("case", UNUSUAL)
def test_other_configurations_agree_with_diffusers(case: str) -> None:
    check_unet({**tiny_checkpoints.SD1_UNET, **UNUSUAL[case]}, batch=1)


@pytest.mark.parametrize("case", TRANSFORMERS)
def test_transformers_agree_with_diffusers(case: str) -> None:
    from diffusers import Transformer2DModel

    torch.manual_seed(1)
    options = {"cross_attention_dim": 24, "norm_num_groups": 8, "num_layers": 2, **TRANSFORMERS[case]}
    transformer = Transformer2DModel(4, 8, in_channels=32, **options).eval().requires_grad_(False)
    x, text = torch.randn(2, 32, 12, 10), torch.randn(2, TEXT_LENGTH, 24)
    context = None if options["cross_attention_dim"] is None else text
    wanted = transformer(x, encoder_hidden_states=context, return_dict=False)[0]
    holder = nn.ModuleList([transformer])
    nets.put_attention(holder, AttentionKind.SPLIT_EINSUM_V2)
    in_columns = None if context is None else text.transpose(1, 2).unsqueeze(2)
    assert psnr_db(wanted, holder[0](x, encoder_hidden_states=in_columns)[0]) >= AGREEMENT_DB


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_covered_is_refused_by_name(name: str) -> None:
    unet = unet_of({**tiny_checkpoints.SD1_UNET, **REFUSED[name]})
    with pytest.raises(UnsupportedError, match=name):
        nets.put_attention(unet, AttentionKind.ORIGINAL)


def test_a_layer_that_is_not_plainly_linear_is_refused() -> None:
    """A LoRA that was not fused must not be lost."""
    unet: Any = unet_of(dict(tiny_checkpoints.SD1_UNET))
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    block.attn2.to_k = nn.Sequential(block.attn2.to_k)
    with pytest.raises(UnsupportedError, match=r"mid_block\.attentions\.0: Sequential"):
        nets.put_attention(unet, AttentionKind.ORIGINAL)


def test_names_stay_and_weights_only_change_shape() -> None:
    unet = unet_of(dict(tiny_checkpoints.SD2_UNET))
    original = unet.state_dict()
    nets.put_attention(unet, AttentionKind.SPLIT_EINSUM)
    own = unet.state_dict()
    assert own.keys() == original.keys()
    for name, tensor in original.items():
        assert tensor.reshape(own[name].shape).data_ptr() == own[name].data_ptr(), f"{name} was copied"
    changed = [name for name in original if original[name].shape != own[name].shape]
    assert "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight" in changed
    assert all(original[name].shape == own[name].shape[:2] for name in changed)


@pytest.mark.parametrize("kind", AttentionKind)
def test_vae_agrees_with_diffusers(kind: AttentionKind) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(2)
    config = {**tiny_checkpoints.VAE, "block_out_channels": [12, 24, 24, 36], "norm_num_groups": 6}
    vae = AutoencoderKL.from_config(config).eval().requires_grad_(False)
    latents, picture = torch.randn(1, 4, 24, 40), torch.rand(1, 3, 192, 320)
    decoded, moments = vae.decode(latents).sample, vae.encode(picture).latent_dist.parameters
    nets.put_attention(vae, kind)
    assert psnr_db(decoded, vae.decode(latents).sample) >= AGREEMENT_DB
    assert psnr_db(moments, vae.encode(picture).latent_dist.parameters) >= AGREEMENT_DB


def text_model(**options: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(3)
    config = CLIPTextConfig(**{**tiny_checkpoints.SD1_TEXT, "vocab_size": 99, **options})
    return CLIPTextModel(config).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", AttentionKind)
@pytest.mark.parametrize("options", [{}, {"hidden_act": "gelu", "num_hidden_layers": 23}], ids=["sd1", "sd2"])
# Legacy checkpoints say 2 and mean the highest number; newer ones name the token, which need not be the highest.
@pytest.mark.parametrize("eos_token_id", [2, 97])
def test_text_encoder_agrees_with_transformers(
    kind: AttentionKind, options: dict[str, Any], eos_token_id: int
) -> None:
    model = text_model(eos_token_id=eos_token_id, **options)
    ids = torch.randint(3, 97, (1, TEXT_LENGTH))
    ids[0, 12:] = 97  # the end of the text, and padding that looks the same
    ids[0, 40] = 97 if eos_token_id == 2 else 98
    wanted = model(ids)
    states, pooled = TextEncoder(model, ATTENTION[kind])(ids.float())
    assert psnr_db(wanted.last_hidden_state, states) >= AGREEMENT_DB
    assert psnr_db(wanted.pooler_output, pooled) >= AGREEMENT_DB


def test_text_encoder_takes_fewer_tokens_than_it_has_positions() -> None:
    model = text_model()
    ids = torch.randint(3, 99, (1, 20))
    assert (
        psnr_db(model(ids).last_hidden_state, TextEncoder(model, ATTENTION[AttentionKind.ORIGINAL])(ids)[0])
        >= AGREEMENT_DB
    )


def test_text_encoder_has_the_names_of_published_checkpoints() -> None:
    names = TextEncoder(text_model(), ATTENTION[AttentionKind.ORIGINAL]).state_dict()
    assert "text_model.encoder.layers.1.self_attn.q_proj.weight" in names
    assert all(name.startswith("text_model.") for name in names)


def test_vision_encoder_agrees_with_transformers() -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(4)
    config = CLIPVisionConfig(**{**tiny_checkpoints.SAFETY["vision_config"], "image_size": 56})
    model = CLIPVisionModel(config).eval().requires_grad_(False)
    picture = torch.randn(1, 3, 56, 56)
    assert (
        psnr_db(model(picture).pooler_output, VisionEncoder(model, ATTENTION[AttentionKind.ORIGINAL])(picture))
        >= AGREEMENT_DB
    )


@pytest.mark.filterwarnings("ignore")
def test_program_of_a_unet_keeps_weights_and_layout() -> None:
    """Every weight is in the program as it was; norms are one operation over the channels; no picture of the
    transformers changes its layout; attention is of rank 4."""

    class Module(nn.Module):
        def __init__(self, unet: nn.Module) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.unet(sample, timestep, states, return_dict=False)[0]
            return out

    unet = unet_of(dict(tiny_checkpoints.SD1_UNET))
    nets.put_attention(unet, AttentionKind.ORIGINAL)
    nets.teach_coremltools()
    ct = import_coremltools()
    shapes = {"sample": (1, 4, 8, 8), "timestep": (1,), "states": (1, 32, 1, TEXT_LENGTH)}
    examples = tuple(torch.randn(shape) for shape in shapes.values())
    traced = torch.jit.trace(Module(unet), examples, check_trace=False)  # type: ignore[no-untyped-call]
    program = ct.convert(
        traced,
        inputs=[ct.TensorType(name, shape) for name, shape in shapes.items()],
        convert_to="milinternal",
        minimum_deployment_target=ct.target.macOS13,
        compute_precision=ct.precision.FLOAT32,
    )
    operations = program.functions["main"].operations
    norms = [operation for operation in operations if operation.op_type == "layer_norm"]
    assert [norm.axes.val.tolist() for norm in norms] == [[1]] * 3 * 4  # four blocks of three norms
    # Attention alone turns channels and tokens of a head; no picture changes its layout.
    turned = {tuple(one.perm.val.tolist()) for one in operations if one.op_type == "transpose"}
    assert turned <= {(0, 1, 3, 2)}
    assert all(operation.outputs[0].rank == 4 for operation in operations if operation.op_type == "matmul")
    constants = {
        operation.val.val.tobytes()
        for operation in operations
        if operation.op_type == "const" and getattr(operation.val.val, "dtype", None) == "float32"
    }
    lost = [name for name, tensor in unet.state_dict().items() if tensor.numpy().tobytes() not in constants]
    assert not lost
