"""DPT-Hybrid, the depth estimator of SD 2 depth, ready to be traced.

transformers' own modules, with the vision transformer over (batch, channels, 1, length) and two things settled that
are otherwise computed anew in every call: the BiT backbone's standardized weights, and the paddings.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffusion_convert.networks.attention import Attend
from diffusion_convert.networks.channel_norm import ChannelNorm
from diffusion_convert.networks.pointwise import pointwise
from diffusion_runtime.errors import UnsupportedError


class DepthEstimator(nn.Module):
    """transformers' DPTForDepthEstimation with a BiT backbone: pixel_values (1, 3, size, size) -> depth (1, size,
    size), near is large. ``size`` is the configuration's image_size. Takes over and changes ``model``."""

    def __init__(self, model: Any, attend: Attend) -> None:
        super().__init__()
        config = model.config
        if not config.is_hybrid or config.readout_type != "project":
            raise UnsupportedError(
                "depth estimator: only DPT-Hybrid (is_hybrid, readout_type 'project') is supported"
            )
        embeddings = model.dpt.embeddings
        self.backbone = Backbone(embeddings.backbone)
        self.projection = embeddings.projection
        self.cls_token = embeddings.cls_token
        self.position_embeddings = embeddings.position_embeddings
        self.layers = nn.ModuleList(Layer(layer, attend) for layer in model.dpt.encoder.layer)
        self.taken = tuple(config.backbone_out_indices[2:])
        self.readouts = nn.ModuleList(Readout(*pair) for pair in _readouts(model.neck.reassemble_stage))
        if len(set(self.taken) & set(range(len(self.layers)))) != len(self.readouts):
            raise UnsupportedError(
                f"depth estimator: backbone_out_indices {list(config.backbone_out_indices)}: expected two layers "
                f"below {len(self.layers)} at the end"
            )
        del model.neck.fusion_stage.layers[0].residual_layer1  # the first layer has nothing to add
        self.convs, self.fusion_stage, self.head = model.neck.convs, model.neck.fusion_stage, model.head

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        early, middle, late = self.backbone(pixel_values)
        height, width = int(late.shape[2]), int(late.shape[3])
        patches = self.projection(late).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token, patches], dim=1) + self.position_embeddings
        x = x.transpose(1, 2).unsqueeze(2)
        states = []
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index in self.taken:
                states.append(x)
        maps = [early, middle]
        maps += [readout(state, height, width) for readout, state in zip(self.readouts, states, strict=True)]
        features = [convolution(one) for convolution, one in zip(self.convs, maps, strict=True)]
        depth: torch.Tensor = self.head(self.fusion_stage(features))
        return depth


class Backbone(nn.Module):
    """transformers' BitBackbone: the feature maps of three stages."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        if type(backbone).__name__ != "BitBackbone":
            raise UnsupportedError(f"depth estimator: backbone {type(backbone).__name__}, expected BitBackbone")
        self.embedder = backbone.bit.embedder
        self.stages = backbone.bit.encoder.stages
        self.names = tuple(backbone.stage_names[1:])  # without the stem
        self.taken = frozenset(backbone.out_features)
        _settle(self)

    def forward(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        x = self.embedder(pixel_values)
        maps = []
        for name, stage in zip(self.names, self.stages, strict=True):
            x = stage(x)
            if name in self.taken:
                maps.append(x)
        return maps


class SamePad(nn.Module):
    """Zeros around (…, height, width) such that a convolution or pooling gives ceil(size / stride) positions, the
    extra zero at the end: TensorFlow's SAME."""

    def __init__(self, pad: Any) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.dilation = pad.kernel_size, pad.stride, pad.dilation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        amounts = []
        for axis in (1, 0):  # the last axis first
            size, stride = int(x.shape[axis + 2]), int(self.stride[axis])
            covered = (-(-size // stride) - 1) * stride + (self.kernel_size[axis] - 1) * self.dilation[axis] + 1
            missing = max(covered - size, 0)
            amounts += [missing // 2, missing - missing // 2]
        return nn.functional.pad(x, amounts) if any(amounts) else x


class Layer(nn.Module):
    """transformers' DPTViTLayer."""

    def __init__(self, layer: Any, attend: Attend) -> None:
        super().__init__()
        attention = layer.attention.attention
        self.heads, self.attend = int(attention.num_attention_heads), attend
        self.scale = float(attention.attention_head_size) ** -0.5
        self.layernorm_before = ChannelNorm(layer.layernorm_before)
        self.query = pointwise(attention.query)
        self.key = pointwise(attention.key)
        self.value = pointwise(attention.value)
        self.out = pointwise(layer.attention.output.dense)
        self.layernorm_after = ChannelNorm(layer.layernorm_after)
        self.widen = pointwise(layer.intermediate.dense)
        self.activation = layer.intermediate.intermediate_act_fn
        self.narrow = pointwise(layer.output.dense)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.layernorm_before(x)
        mixed = self.attend(self.query(normed), self.key(normed), self.value(normed), self.heads, self.scale)
        x = self.out(mixed) + x
        widened = self.activation(self.widen(self.layernorm_after(x)))
        out: torch.Tensor = self.narrow(widened) + x
        return out


class Readout(nn.Module):
    """Tokens back to a feature map: the class token is appended to each other token, and the pair is projected."""

    def __init__(self, project: Any, reassemble: nn.Module) -> None:
        super().__init__()
        self.project, self.activation, self.reassemble = pointwise(project[0]), project[1], reassemble

    def forward(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        count, channels = height * width, int(x.shape[1])
        token, tokens = torch.split(x, [1, count], dim=3)
        joined = torch.cat([tokens, token.expand(-1, channels, 1, count)], dim=1)
        projected = self.activation(self.project(joined)).reshape(-1, channels, height, width)
        out: torch.Tensor = self.reassemble(projected)
        return out


def _readouts(stage: Any) -> list[tuple[Any, nn.Module]]:
    return [
        (project, layer)
        for index, (project, layer) in enumerate(zip(stage.readout_projects, stage.layers, strict=True))
        if index not in stage.neck_ignore_stages
    ]


def _settle(module: nn.Module) -> None:
    """Replace BiT's standardized convolutions and dynamic paddings, however deep, by plain ones."""
    for name, child in module.named_children():
        if type(child).__name__ == "WeightStandardizedConv2d":
            setattr(module, name, _plain(child))
        elif type(child).__name__ == "DynamicPad2d":
            setattr(module, name, SamePad(child))
        else:
            _settle(child)


def _plain(standardized: Any) -> nn.Module:
    """A convolution with the weights that transformers' WeightStandardizedConv2d computes in every call
    (arXiv:1903.10520): mean 0 and variance 1 for each output channel."""
    with torch.no_grad():
        # In float32, whatever the checkpoint's type: variances of float16 weights lose their last digits.
        weight = standardized.weight.float()
        variance, mean = torch.var_mean(weight, dim=(1, 2, 3), correction=0, keepdim=True)
        weight = (weight - mean) / torch.sqrt(variance + standardized.eps)
    with torch.device("meta"):
        convolution = nn.Conv2d(
            standardized.in_channels,
            standardized.out_channels,
            standardized.kernel_size,
            standardized.stride,
            standardized.padding,
            standardized.dilation,
            standardized.groups,
            bias=standardized.bias is not None,
        )
    convolution.weight = nn.Parameter(weight, requires_grad=False)
    if standardized.bias is not None:
        convolution.bias = standardized.bias
    return convolution if standardized.pad is None else nn.Sequential(SamePad(standardized.pad), convolution)
