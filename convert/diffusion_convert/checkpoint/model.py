"""What every kind of source becomes: a `Checkpoint` of `Submodel`s."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffusion_runtime.bundle.manifest import ControlNet, Folded, IpAdapter, Source
from diffusion_runtime.families import FAMILIES, TEXT_ENCODERS


@dataclass(frozen=True, slots=True)
class Submodel:
    """One network: diffusers' or transformers' configuration and its weights by diffusers' names.

    ``tensors`` maps the weights lazily, in the file's own element type: calling it reads no data.
    ``class_name`` is the class named in model_index.json ("UNet2DConditionModel", "CLIPTextModel", …).
    ``files`` are all that they come from: other weights there, another conversion (`plan.fingerprint`).
    """

    class_name: str
    config: Mapping[str, Any]
    tensors: Callable[[], Mapping[str, torch.Tensor]]
    files: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A Stable Diffusion checkpoint, whatever it was stored as.

    ``models`` and ``schedulers`` are by diffusers' subfolder ("unet", "vae", "text_encoder", "safety_checker",
    "depth_estimator"; "scheduler", "low_res_scheduler"); ``tokenizers``, by their text encoder's subfolder, map
    vocab.json, merges.txt, tokenizer_config.json, … to where they are. ``family`` is a name in `families.FAMILIES`.
    ``refiner``: that of an SDXL base, whose UNet is ``models["refiner"]``, too. ``notes`` are sentences for the
    user: what the source does not say and was assumed.
    ``controlnets``: what is told of each, by its own name; its network is ``models["ControlNet_" + name]``.
    ``folded`` is what its networks are converted with (`folding.fold`); as opened, nothing. ``padding``: see
    `Manifest.padding`; as opened, None. ``added_tokens``: what textual inversions add to each tokenizer, in the
    order of their numbers. ``ip_adapters``: those in its networks, in order.
    ``t2i_adapters``: where each is from, by its own name; its network is ``models["T2IAdapter_" + name]``.
    ``clip_skip``: how many layers earlier than usual the text encoders' states are taken; as opened, none.
    """

    name: str
    family: str
    source: Source
    models: Mapping[str, Submodel]
    schedulers: Mapping[str, Mapping[str, Any]]
    tokenizers: Mapping[str, Mapping[str, Path]]
    pipeline_config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    folded: Folded = field(default_factory=Folded)
    padding: Mapping[str, int] | None = None
    refiner: Checkpoint | None = None
    added_tokens: tuple[str, ...] = ()
    clip_skip: int = 0
    controlnets: Mapping[str, ControlNet] = field(default_factory=dict)
    ip_adapters: tuple[IpAdapter, ...] = ()
    t2i_adapters: Mapping[str, Source] = field(default_factory=dict)

    @property
    def clip_tokenizers(self) -> tuple[Mapping[str, Path], ...]:
        """Those of CLIP's text encoders, in order."""
        return tuple(self.tokenizers[name] for name in TEXT_ENCODERS if name in self.tokenizers)

    @property
    def denoiser(self) -> Submodel:
        """The network that predicts what is taken away in a step: the UNet, in most families."""
        return self.models[FAMILIES[self.family].denoiser.component]

    @property
    def takes_guidance(self) -> bool:
        """Whether the guidance scale is an input of the UNet, as of latent consistency models."""
        return self.denoiser.config.get("time_cond_proj_dim") is not None
