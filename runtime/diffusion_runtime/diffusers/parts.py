"""Converted models in the place of diffusers' and transformers' networks: the same calls, the same answers."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKLOutput
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.controlnets.controlnet import ControlNetModel, ControlNetOutput
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from transformers.modeling_outputs import BaseModelOutputWithPooling, DepthEstimatorOutput

from diffusion_runtime.backends import TensorSpec
from diffusion_runtime.bundle.manifest import Latents
from diffusion_runtime.control.steering import HINT, RESIDUAL, guessed
from diffusion_runtime.errors import InputError
from diffusion_runtime.models import Timed
from diffusion_runtime.safety import is_flagged


class Part(torch.nn.Module):
    """A converted model as a module without parameters. It computes on Core ML or the torch backend, whatever
    ``device`` says: tensors come from the CPU in float32 and go back there. It can't be moved, trained or saved.
    ``remedy``: what to do about a size that it does not take."""

    def __init__(
        self, model: Timed, config: Mapping[str, Any], remedy: str = "convert again for another size"
    ) -> None:
        torch.nn.Module.__init__(self)  # a class of diffusers, where one comes after this, would make a network
        self.model, self.remedy = model, remedy
        self._internal_dict = FrozenDict(config)
        self.eval()

    @property
    def config(self) -> FrozenDict:
        return self._internal_dict

    @property
    def dtype(self) -> torch.dtype:
        """What diffusers hands over and gets back; the model has its own type inside."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def to(self, *args: Any, **kwargs: Any) -> Part:
        """Nothing, for the CPU and float32. Raises InputError for any other device or type."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and torch.device(device).type != "cpu":
            self._refuse(
                f"cannot be moved to {device}: choose where it runs with load_diffusers_pipeline's compute_units "
                "(Core ML) or device (torch backend)"
            )
        if dtype not in (None, torch.float32):
            self._refuse(f"cannot become {dtype}: its precision was chosen at conversion; leave torch_dtype out")
        return self

    def train(self, mode: bool = True) -> Part:
        """Nothing, for ``mode`` False. Raises InputError: a converted model has no gradients."""
        if mode:
            self._refuse("cannot be trained: train the checkpoint and convert it again")
        super().train(False)
        return self

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        """Raises InputError: the models are in the folder that they were loaded from."""
        self._refuse("cannot be saved as a checkpoint: copy the folder of models")

    def _refuse(self, what: str) -> NoReturn:
        raise InputError(f"{self.model.name}: a converted model {what}")

    def _run(self, inputs: Mapping[str, torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
        """The model on inputs whose first dimension is ``rows``, in calls of as many rows as it takes (the last one
        filled up by repetition)."""
        specs = self.model.inputs
        self._check(inputs, specs)
        batch = next(iter(specs.values())).shape[0]
        found: dict[str, list[np.ndarray]] = {}
        for start in range(0, rows, batch):
            chosen = [min(start + row, rows - 1) for row in range(batch)]
            arrays = {name: inputs[name][chosen].numpy().astype(spec.dtype) for name, spec in specs.items()}
            count = min(batch, rows - start)
            for name, value in self.model(**arrays).items():
                found.setdefault(name, []).append(value[:count])
        return {name: torch.from_numpy(np.concatenate(values)).float() for name, values in found.items()}

    def _check(self, inputs: Mapping[str, torch.Tensor], specs: Mapping[str, TensorSpec]) -> None:
        missing = [name for name in specs if name not in inputs]
        unknown = [name for name in inputs if name not in specs]
        if missing or unknown:
            self._refuse(f"takes {', '.join(specs)}; got {', '.join(inputs)}")
        for name, tensor in inputs.items():
            if tensor.requires_grad:
                self._refuse(f"has no gradients, but {name} asks for one: call it under torch.no_grad()")
            if tuple(tensor.shape[1:]) != specs[name].shape[1:]:
                self._refuse(
                    f"has fixed sizes: {name} is {tuple(tensor.shape)}, expected (rows, "
                    f"{', '.join(map(str, specs[name].shape[1:]))}); {self.remedy}"
                )


def _told(name: str, value: object) -> None:
    """Raise InputError for an argument that a converted model cannot follow."""
    if value is not None:
        raise InputError(f"{name}: a converted model has no input for it; leave it out")


class CoreMLUNet(Part):
    """In the place of diffusers' UNet2DConditionModel.

    SDXL's pipelines compare the number of their time_ids with the width of ``add_embedding``: here each one counts
    as one number."""

    def __init__(self, model: Timed, config: Mapping[str, Any]) -> None:
        super().__init__(model, config)
        widths = [model.inputs[name].shape[1] for name in ("time_ids", "text_embeds") if name in model.inputs]
        self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=sum(widths)))

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        added_cond_kwargs: Mapping[str, torch.Tensor] | None = None,
        down_block_additional_residuals: Any = None,
        mid_block_additional_residual: Any = None,
        down_intrablock_additional_residuals: Any = None,
        encoder_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[torch.Tensor]:
        """diffusers' arguments: sample (rows, channels, height, width), timestep one or (rows,), states (rows,
        tokens, width). Raises InputError for what the converted model has no input for."""
        _told("attention_mask", attention_mask)
        _told("cross_attention_kwargs", cross_attention_kwargs or None)
        _told("encoder_attention_mask", encoder_attention_mask)
        _told("down_intrablock_additional_residuals", down_intrablock_additional_residuals)
        rows = len(sample)
        inputs = _trio(sample, timestep, encoder_hidden_states)
        optional = {"class_labels": class_labels, "timestep_cond": timestep_cond, **(added_cond_kwargs or {})}
        inputs |= {name: value for name, value in optional.items() if value is not None}
        inputs |= self._residuals(down_block_additional_residuals, mid_block_additional_residual, rows)
        noise = next(iter(self._run({name: value.float() for name, value in inputs.items()}, rows).values()))
        return UNet2DConditionOutput(sample=noise) if return_dict else (noise,)

    def _residuals(self, down: Any, middle: torch.Tensor | None, rows: int) -> dict[str, torch.Tensor]:
        """What diffusers' ControlNets add; zeros where there are none, for a UNet that can be steered."""
        taken = [name for name in self.model.inputs if name.startswith(RESIDUAL)]
        if not taken:
            _told("down_block_additional_residuals", down)
            _told("mid_block_additional_residual", middle)
            return {}
        given = (*(down or ()), *(() if middle is None else (middle,)))
        if given and len(given) != len(taken):
            self._refuse(f"takes {len(taken)} residuals; got {len(given)}")
        shapes = [self.model.inputs[name].shape[1:] for name in taken]
        return dict(zip(taken, given or [torch.zeros((rows, *shape)) for shape in shapes], strict=True))


def _trio(sample: torch.Tensor, timestep: torch.Tensor | float, states: torch.Tensor) -> dict[str, torch.Tensor]:
    """What every denoising network takes, in Core ML's shapes."""
    return {
        "sample": sample,
        "timestep": torch.as_tensor(timestep, dtype=torch.float32).reshape(-1).expand(len(sample)),
        "encoder_hidden_states": states.transpose(1, 2)[:, :, None],
    }


class CoreMLControlNet(Part, ControlNetModel):  # type: ignore[misc]
    """In the place of diffusers' ControlNetModel, which its pipelines insist on."""

    def __init__(self, model: Timed, config: Mapping[str, Any]) -> None:
        super().__init__(model, config)
        self.unused = torch.nn.Parameter(
            torch.zeros(0), requires_grad=False
        )  # MultiControlNetModel asks for its type

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor,
        controlnet_cond: torch.Tensor,
        conditioning_scale: float = 1.0,
        added_cond_kwargs: Mapping[str, torch.Tensor] | None = None,
        guess_mode: bool = False,
        return_dict: bool = True,
        **others: Any,
    ) -> ControlNetOutput | tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """As `CoreMLUNet.forward`; ``controlnet_cond`` (rows, 3, height, width) in 0..1."""
        for name, value in others.items():
            _told(name, value or None)
        given = {HINT: controlnet_cond, **(added_cond_kwargs or {})}
        inputs = _trio(sample, timestep, encoder_hidden_states)
        inputs |= {name: value for name, value in given.items() if name in self.model.inputs}
        found = self._run({name: value.float() for name, value in inputs.items()}, len(sample))
        names = sorted(found, key=lambda name: int(name.removeprefix(RESIDUAL)))
        factors = guessed(len(names), guess_mode and not self.config["global_pool_conditions"])
        *down, middle = (
            found[name] * factor * conditioning_scale for name, factor in zip(names, factors, strict=True)
        )
        output = ControlNetOutput(down_block_res_samples=tuple(down), mid_block_res_sample=middle)
        return output if return_dict else (tuple(down), middle)


class CoreMLTransformer(Part):
    """In the place of diffusers' SD3Transformer2DModel."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        timestep: torch.Tensor,
        joint_attention_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """hidden_states (rows, channels, height, width), encoder_hidden_states (rows, tokens, width),
        pooled_projections (rows, width). Raises InputError for what the converted model has no input for."""
        for name, value in {"joint_attention_kwargs": joint_attention_kwargs, **others}.items():
            _told(name, value or None)
        inputs = _trio(hidden_states, timestep, encoder_hidden_states)
        inputs["text_embeds"] = pooled_projections[:, :, None, None]
        (output,) = self._run({name: value.float() for name, value in inputs.items()}, len(hidden_states)).values()
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)


class CoreMLVAE(torch.nn.Module):
    """In the place of diffusers' AutoencoderKL: a converted decoder, and an encoder where there is one."""

    def __init__(self, decoder: Timed, encoder: Timed | None, latents: Latents) -> None:
        super().__init__()
        config = {
            "block_out_channels": (1,) * latents.factor.bit_length(),  # diffusers reads the factor off their number
            "force_upcast": False,
            "in_channels": 3,
            "latent_channels": latents.channels,
            "out_channels": 3,
            "scaling_factor": latents.scale,
            "shift_factor": latents.shift or None,
        }
        self.decoder = Part(decoder, config)
        self.encoder = None if encoder is None else Part(encoder, config)
        self.config, self.drawn = self.decoder.config, latents.drawn
        # The upscaler's pipeline asks these parameters for their type; the layer itself is in the converted model.
        self.post_quant_conv = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(0), requires_grad=False)])
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.dtype

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    def to(self, *args: Any, **kwargs: Any) -> CoreMLVAE:
        """As `Part.to`."""
        self.decoder.to(*args, **kwargs)
        return self

    def train(self, mode: bool = True) -> CoreMLVAE:
        """As `Part.train`."""
        if hasattr(self, "decoder"):
            self.decoder.train(mode)
        return self

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        """As `Part.save_pretrained`."""
        self.decoder.save_pretrained()

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        """A picture (n, 3, height, width) in -1..1 to the distribution of its latents."""
        if self.encoder is None:
            raise InputError("these models have no vae_encoder, which pictures need: convert again with it")
        (name, _), *_ = self.encoder.model.inputs.items()
        moments = next(iter(self.encoder._run({name: x.float()}, len(x)).values()))
        if not self.drawn:
            latents = moments.chunk(2, dim=1)[0]
            return AutoencoderTinyOutput(latents=latents) if return_dict else (latents,)
        distribution = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)

    def decode(self, z: torch.Tensor, return_dict: bool = True, generator: Any = None) -> Any:  # noqa: ARG002
        """Latents (n, channels, height, width), divided by the scaling factor, to a picture in about -1..1."""
        (name, _), *_ = self.decoder.model.inputs.items()
        picture = next(iter(self.decoder._run({name: z.float()}, len(z)).values()))
        return DecoderOutput(sample=picture) if return_dict else (picture,)


class CoreMLTextEncoder(Part):
    """In the place of transformers' CLIPTextModel (SDXL's encoders: of its states before the last layer alone), and
    of its T5EncoderModel."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> Any:
        """input_ids (n, tokens). Raises InputError for a mask, and for layers that were left out at conversion."""
        _told("attention_mask", attention_mask)
        found = self._run({"input_ids": input_ids.float()}, len(input_ids))
        pooled = found.get("pooled_outputs")
        if "hidden_embeds" in found:
            hidden = (found["hidden_embeds"], None)  # [-2] is all that SDXL's pipelines look at
            return _Encoded(found["hidden_embeds"], pooled, hidden, self.config["projects"])
        states = found.get("last_hidden_state", next(iter(found.values())))
        if states.ndim == 4:  # T5's, which come as the transformer takes them
            states = states[:, :, 0].transpose(1, 2)
        if output_hidden_states:
            self._refuse("gives its last states alone: clip_skip needs a conversion of its own")
        output = BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=pooled)
        return output if return_dict else (states, pooled)


class _Encoded:
    """What SDXL's pipelines take of an encoder's answer: ``[0]``, the pooled text of an encoder that projects it,
    and ``hidden_states[-2]``."""

    def __init__(self, states: torch.Tensor, pooled: torch.Tensor | None, hidden: tuple[Any, ...], projects: bool):
        self.hidden_states = hidden
        self._first = pooled if projects else states

    def __getitem__(self, index: int) -> torch.Tensor | None:
        if index != 0:
            raise InputError(
                f"output {index} of a converted text encoder: only its pooled text and states are kept"
            )
        return self._first


class CoreMLSafetyChecker(Part):
    """In the place of diffusers' StableDiffusionSafetyChecker: flagged pictures become black."""

    def forward(self, clip_input: torch.Tensor, images: Any) -> tuple[Any, list[bool]]:  # noqa: ARG002
        """``images``: a list or an array of pictures (height, width, 3) in 0..1, or a tensor (n, 3, height, width).
        They are judged anew from their pixels, so ``clip_input`` is not looked at."""
        tensors = isinstance(images, torch.Tensor)
        arrays = images.permute(0, 2, 3, 1).float().numpy() if tensors else np.asarray(images, np.float32)
        flags = [is_flagged(self.model, array) for array in arrays]
        for number, flagged in enumerate(flags):
            if flagged:
                images[number] = torch.zeros_like(images[number]) if tensors else np.zeros_like(images[number])
        return images, flags


class CoreMLDepthEstimator(Part):
    """In the place of transformers' DPTForDepthEstimation."""

    def forward(self, pixel_values: torch.Tensor) -> DepthEstimatorOutput:
        """pixel_values (n, 3, height, width) -> predicted_depth (n, height, width)."""
        (name, _), *_ = self.model.inputs.items()
        depth = next(iter(self._run({name: pixel_values.float()}, len(pixel_values)).values()))
        return DepthEstimatorOutput(predicted_depth=depth.reshape(len(depth), *depth.shape[-2:]))
