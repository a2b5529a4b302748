"""diffusers' and transformers' own networks on a checkpoint's own tensors: nothing is initialised or copied."""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from diffusion_convert.checkpoint.model import Checkpoint, Submodel
from diffusion_runtime.errors import CheckpointError

CLASSES: Mapping[str, str] = {
    "UNet2DConditionModel": "diffusers",
    "ControlNetModel": "diffusers",
    "ControlNetUnionModel": "diffusers",
    "SD3Transformer2DModel": "diffusers",
    "AutoencoderKL": "diffusers",
    "AutoencoderTiny": "diffusers",
    "CLIPTextModel": "transformers",
    "CLIPTextModelWithProjection": "transformers",
    "T5EncoderModel": "transformers",
    "DPTForDepthEstimation": "transformers",
    "CLIPVisionModelWithProjection": "transformers",
    "T2IAdapter": "diffusers",
    "Projections": "diffusion_convert.checkpoint.ip_projections",
    "StableDiffusionSafetyChecker": "diffusers.pipelines.stable_diffusion.safety_checker",
}
"""Class named in model_index.json -> where it is imported from. Nothing else is ever imported for a checkpoint."""

PICTURE_TOKENS, FEATURES_OF = "ip_adapter_tokens", "t2i_adapter"
"""Keys of a UNet's configuration that no published one has: how many tokens each of its IP-Adapters makes, and the
network of a T2I-Adapter whose features it takes."""

RENAMED = (
    (r"^text_model\.", ""),  # transformers 5 dropped the level of the model inside of the model
    (r"^vision_model\.vision_model\.", "vision_model."),
    (r"(attentions\.\d+\.)query\.", r"\1to_q."),  # VAEs saved before diffusers 0.12
    (r"(attentions\.\d+\.)key\.", r"\1to_k."),
    (r"(attentions\.\d+\.)value\.", r"\1to_v."),
    (r"(attentions\.\d+\.)proj_attn\.", r"\1to_out.0."),
)
"""Published names -> the installed libraries' names, where those have changed. Tried in order, until one fits."""

_IGNORED = re.compile(r"(^|\.)(position_ids|num_batches_tracked|logit_scale)$")
_LEFT_OUT = re.compile(r"^(?:text_model\.)?(ema|model_ema|loss|vision_model|visual_projection|text_projection)\.")
"""What some published files hold in addition to a network's own weights: averages and losses of training, the rest
of the CLIP that a text encoder is from. Where the network has a part of that name, it is no such thing."""
_NEVER_RUN = re.compile(r"^neck\.fusion_stage\.layers\.0\.residual_layer1\.")
"""What transformers' networks have and never call, so that published checkpoints may lack it: the first layer of a
DPT's fusion has nothing to add (github.com/huggingface/transformers/issues/28292)."""
_TIED = (("shared.weight", "encoder.embed_tokens.weight"),)
"""Two names of one tensor, of which a file may have either: T5's table of tokens."""
_TEXT_LAYER = re.compile(r"(?:text_model\.)?encoder\.layers\.(\d+)\.")
_SHOWN = 8


def build(checkpoint: Checkpoint, subfolder: str) -> torch.nn.Module:
    """The network of ``subfolder`` on the tensors of the checkpoint, in evaluation mode.

    Raises CheckpointError where the configuration does not fit the class, or tensors are missing, unknown or of
    another shape than the configuration says; all are listed.
    """
    submodel = checkpoint.models[subfolder]
    where = f"{checkpoint.name}: {subfolder}"
    network = empty(submodel, where)
    tensors = _fitting(submodel.tensors(), network, where)
    # Assigned, not copied: the parameters are the mapped tensors, of which no byte is read here. Not strict, as
    # `_fitting` has checked what is missing and unknown, with all names in one message.
    network.load_state_dict(tensors, strict=False, assign=True)
    _fill_buffers(network, where)
    return network.eval().requires_grad_(False)


def check(submodel: Submodel, tensors: Mapping[str, torch.Tensor], where: str) -> torch.nn.Module:
    """The network that the configuration describes, without storage. Raises CheckpointError unless ``tensors`` are
    its weights."""
    network = empty(submodel, where)
    # One by one, as each is computed when it is read where weights are fused or scaled.
    shapes = {name: torch.empty(value.shape, dtype=value.dtype, device="meta") for name, value in tensors.items()}
    _fitting(shapes, network, where)
    return network


@contextmanager
def silent() -> Iterator[None]:
    """In this context, the libraries' hints to their own developers are not printed."""

    import diffusers.utils.logging as of_diffusers
    import transformers.utils.logging as of_transformers

    with ExitStack() as restored, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logging in (of_diffusers, of_transformers):
            restored.callback(logging.set_verbosity, logging.get_verbosity())
            logging.set_verbosity_error()
        yield


def empty(submodel: Submodel, where: str) -> torch.nn.Module:
    """The network without storage for its weights."""
    if submodel.class_name not in CLASSES:
        raise CheckpointError(f"{where}: unknown class {submodel.class_name!r}; known are {', '.join(CLASSES)}")
    kind: Any = getattr(importlib.import_module(CLASSES[submodel.class_name]), submodel.class_name)
    config = dict(submodel.config)
    tokens = config.pop(PICTURE_TOKENS, ())
    config.pop(FEATURES_OF, None)
    try:
        with silent(), torch.device("meta"), _nothing_drawn():
            if hasattr(kind, "from_config"):
                network: torch.nn.Module = kind.from_config(config)
                _attend_to_pictures(network, tokens)
            else:
                network = kind(kind.config_class(**{k: v for k, v in config.items() if k != "architectures"}))
    except Exception as error:  # whatever a library's class says of a configuration that it does not understand
        reason = (str(error).splitlines() or [""])[0] or repr(error)
        raise CheckpointError(
            f"{where}: config.json does not describe a {submodel.class_name}: {reason}"
        ) from error
    return network


@contextmanager
def _nothing_drawn() -> Iterator[None]:
    """In this context, layers do not draw first weights, half of the time where they have no storage."""
    layers = (
        torch.nn.Linear,
        torch.nn.modules.conv._ConvNd,
        torch.nn.GroupNorm,
        torch.nn.LayerNorm,
        torch.nn.Embedding,
    )
    with ExitStack() as restored:
        for layer in layers:
            restored.enter_context(mock.patch.object(layer, "reset_parameters", lambda _: None))
        yield


def _attend_to_pictures(network: Any, tokens: Sequence[int]) -> None:
    """Give a UNet the attention processors that diffusers' `load_ip_adapter` gives it."""
    if not tokens:
        return
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    # Its projections run once for a picture, as models of their own; what they give goes on as it is.
    network.encoder_hid_proj = torch.nn.Identity()
    network.config.encoder_hid_dim_type = "ip_image_proj"
    width = network.config.cross_attention_dim
    for name in network.attn_processors:
        if not name.endswith("attn1.processor"):
            attention = network.get_submodule(name.removesuffix(".processor"))
            attention.set_processor(IPAdapterAttnProcessor2_0(attention.to_k.out_features, width, tuple(tokens)))


def _fitting(tensors: Mapping[str, torch.Tensor], network: torch.nn.Module, where: str) -> dict[str, torch.Tensor]:
    """``tensors`` by the network's names and in its shapes."""
    expected = network.state_dict()
    found = _named(tensors, expected)
    parts = {name.partition(".")[0] for name in expected}
    shapes = {
        name: tensor.reshape(expected[name].shape) if _squeezes(tensor, expected[name]) else tensor
        for name, tensor in found.items()
        if name in expected
    }
    problems = {
        "missing": [
            name
            for name in expected
            if name not in found and not _IGNORED.search(name) and not _NEVER_RUN.match(name)
        ],
        "unknown": [
            name
            for name in found
            if name not in expected
            and not _IGNORED.search(name)
            and not ((left_out := _LEFT_OUT.match(name)) and left_out[1] not in parts)
        ],
        "wrong shapes": [
            f"{name} {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
            for name, tensor in shapes.items()
            if tensor.shape != expected[name].shape
        ],
    }
    _check_types(shapes, where)
    wrong = [f"{problem}: {listed(names)}" for problem, names in problems.items() if names]
    if wrong:
        raise CheckpointError(f"{where}: the weights are not those of config.json's network: {'; '.join(wrong)}")
    return shapes


def _named(tensors: Mapping[str, torch.Tensor], expected: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """``tensors`` by the network's names, without those of layers that it does not have (`unused_layers`)."""
    found = {_name(name, expected): tensor for name, tensor in tensors.items()}
    for one, other in _TIED:
        if (one in found) != (other in found) and {one, other} <= expected.keys():
            found[one] = found[other] = found[one if one in found else other]
    layers = {layer[1] for name in expected if (layer := _TEXT_LAYER.match(name))}
    return {
        name: tensor
        for name, tensor in found.items()
        if not (layers and (layer := _TEXT_LAYER.match(name)) and layer[1] not in layers)
    }


def unused_layers(submodel: Submodel, tensors: Mapping[str, torch.Tensor]) -> int:
    """How many layers a text encoder's weights have beyond those of its configuration. transformers leaves them
    out: so is clip skip made permanent."""
    if not submodel.class_name.startswith("CLIPText"):
        return 0
    numbers = {int(found[1]) for name in tensors if (found := _TEXT_LAYER.match(name))}
    return len([number for number in numbers if number >= int(submodel.config.get("num_hidden_layers", 12))])


def _check_types(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    known = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
    wrong = [
        f"{name} ({str(tensor.dtype).removeprefix('torch.')})"
        for name, tensor in tensors.items()
        if tensor.dtype not in known and not _IGNORED.search(name)
    ]
    if wrong:
        raise CheckpointError(
            f"{where}: weights that are no floating point numbers: {listed(wrong)}: quantized weights cannot be "
            "read without the method that made them; expected a checkpoint in 16 or 32 bits"
        )


def _name(name: str, expected: Mapping[str, Any]) -> str:
    if name in expected:
        return name
    for pattern, replacement in RENAMED:
        renamed = re.sub(pattern, replacement, name)
        if renamed in expected:
            return renamed
    return name


def _squeezes(tensor: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether shapes differ by trailing ones alone: a linear layer stored as a 1x1 convolution."""
    return tensor.ndim > expected.ndim and tensor.shape == (*expected.shape, *[1] * (tensor.ndim - expected.ndim))


def listed(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _fill_buffers(network: torch.nn.Module, where: str) -> None:
    """Give values to what no checkpoint carries: CLIP's position numbers."""
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta:
                continue
            if name == "position_ids":
                module.register_buffer(name, torch.arange(buffer.numel()).reshape(buffer.shape), persistent=False)
            elif name == "num_batches_tracked":
                module.register_buffer(name, torch.zeros((), dtype=torch.long))
            else:
                raise CheckpointError(f"{where}: the weights lack the buffer {name} of {type(module).__name__}")
