"""LoRA files in every spelling that diffusers loads are fused as its pipeline fuses them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diffusion_convert.checkpoint.lora.settings import METADATA_KEY
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.option_values import Lora
from diffusion_convert.options import ConvertOptions
from diffusion_runtime.errors import DiffusionError

Tensors = dict[str, torch.Tensor]
ROUNDING = 2**-10
"""float16 has 11 significant bits: two roundings of nearly the same value differ by no more."""
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
LAYERS = "text_model.encoder.layers"
RANK = 4


class Pipelines:
    """diffusers' pipelines of the tiny checkpoints, and what they make of LoRA files."""

    def __init__(self, tiny_checkpoint: Callable[[str], Path]) -> None:
        from diffusers import DiffusionPipeline

        self._tiny = tiny_checkpoint
        self._load: Any = DiffusionPipeline.from_pretrained
        self._loaded: dict[str, Any] = {}

    def folder(self, family: str) -> Path:
        return self._tiny(family)

    def fresh(self, family: str) -> Any:
        if family not in self._loaded:
            self._loaded[family] = self._load(self.folder(family), safety_checker=None, dtype=torch.float32)
        return copy.deepcopy(self._loaded[family])

    def fused(self, family: str, path: Path, scale: float) -> dict[str, Mapping[str, torch.Tensor]]:
        pipeline = self.fresh(family)
        pipeline.load_lora_weights(path)
        pipeline.fuse_lora(lora_scale=scale)
        pipeline.unload_lora_weights()
        return {name: getattr(pipeline, name).state_dict() for name in ("unet", "text_encoder")}


@pytest.fixture(scope="module")
def pipelines(tiny_checkpoint: Callable[[str], Path]) -> Pipelines:
    return Pipelines(tiny_checkpoint)


def assert_as_diffusers(pipelines: Pipelines, path: Path, family: str = "sd1", scale: float = 0.7) -> Checkpoint:
    """That our weights and diffusers' are equal to a rounding, and that the LoRA changed what it names."""
    found = open_checkpoint(str(pipelines.folder(family)), ConvertOptions(loras=[Lora(path, scale)]))
    wanted = pipelines.fused(family, path, scale)
    before = open_checkpoint(str(pipelines.folder(family)))
    changed = 0
    for subfolder, weights in wanted.items():
        ours, old = (
            {name.removeprefix("text_model."): value for name, value in opened.models[subfolder].tensors().items()}
            for opened in (found, before)
        )
        for name, value in weights.items():
            bare = name.removeprefix("text_model.")
            if name.endswith("position_ids"):
                continue
            torch.testing.assert_close(
                ours[bare].half(),
                value.half(),
                rtol=ROUNDING,
                atol=2**-24,
                msg=partial("{}: {}".format, name),
            )
            changed += not torch.equal(ours[bare], old[bare])
    assert changed, "the LoRA changed nothing"
    return found


def shapes(pipelines: Pipelines, family: str = "sd1") -> dict[str, torch.Size]:
    opened = open_checkpoint(str(pipelines.folder(family)))
    found = {}
    for subfolder in ("unet", "text_encoder"):
        for name, value in opened.models[subfolder].tensors().items():
            bare = name.removeprefix("text_model.") if subfolder == "text_encoder" else name
            found[f"{subfolder}.{'text_model.' * (subfolder == 'text_encoder')}{bare}"] = value.shape
    return found


UNET_ATTENTION = tuple(
    f"unet.{BLOCK}.{name}" for name in ("attn1.to_q", "attn1.to_out.0", "attn2.to_k", "attn2.to_v")
)
UNET_OTHERS = (
    f"unet.{BLOCK}.ff.net.0.proj",
    f"unet.{BLOCK}.ff.net.2",
    "unet.up_blocks.1.attentions.0.proj_in",
    "unet.mid_block.attentions.0.proj_out",
    "unet.down_blocks.0.resnets.0.conv1",
    "unet.down_blocks.0.resnets.0.time_emb_proj",
    "unet.down_blocks.0.downsamplers.0.conv",
    "unet.up_blocks.0.resnets.0.conv_shortcut",
    "unet.conv_in",
    "unet.conv_out",
    "unet.time_embedding.linear_1",
)
TEXT_ATTENTION = tuple(
    f"text_encoder.{LAYERS}.{i}.self_attn.{n}_proj" for i in (0, 1) for n in ("q", "k", "v", "out")
)
TEXT_OTHERS = (f"text_encoder.{LAYERS}.0.mlp.fc1", f"text_encoder.{LAYERS}.1.mlp.fc2")
EVERYTHING = (*UNET_ATTENTION, *UNET_OTHERS, *TEXT_ATTENTION, *TEXT_OTHERS)


def halves(
    pipelines: Pipelines, modules: tuple[str, ...], family: str = "sd1"
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Module, down and up: random, of one rank."""
    generator = torch.Generator().manual_seed(len(modules))
    sizes = shapes(pipelines, family)
    for module in modules:
        out, *into = sizes[f"{module}.weight"]
        ones = (1, 1) if len(into) == 3 else ()
        yield (
            module,
            torch.randn(RANK, *into, generator=generator),
            torch.randn(out, RANK, *ones, generator=generator) / RANK,
        )


def peft_names(module: str) -> tuple[str, str]:
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def diffusers_names(module: str) -> tuple[str, str]:
    """As diffusers 0.18 to 0.21 wrote them."""
    middle = ".lora_linear_layer" if module.startswith("text") else ".lora"
    return f"{module}{middle}.down.weight", f"{module}{middle}.up.weight"


def processor_names(module: str) -> tuple[str, str]:
    """As diffusers' attention processors were saved, 0.12 to 0.17."""
    place = module.replace(".to_out.0", ".to_out").replace("_proj", "").replace("attn1.", "attn1.processor.")
    place = place.replace("attn2.", "attn2.processor.")
    if module.startswith("text"):
        head, _, last = place.rpartition(".")
        place = f"{head}.to_{last}"
    return f"{place}_lora.down.weight", f"{place}_lora.up.weight"


def bare_processor_names(module: str) -> tuple[str, str]:
    down, up = processor_names(module)
    return down.replace(".processor.", "."), up.replace(".processor.", ".")


def kohya_names(module: str) -> tuple[str, str]:
    subfolder, _, place = module.partition(".")
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[subfolder] + place.replace(".", "_")
    return f"{prefix}.lora_down.weight", f"{prefix}.lora_up.weight"


def kohya_te1_names(module: str) -> tuple[str, str]:
    down, up = kohya_names(module)
    return down.replace("lora_te_", "lora_te1_"), up.replace("lora_te_", "lora_te1_")


SPELLINGS: dict[str, tuple[Callable[[str], tuple[str, str]], tuple[str, ...]]] = {
    "peft": (peft_names, EVERYTHING),
    "diffusers": (diffusers_names, EVERYTHING),
    "attention processors": (processor_names, (*UNET_ATTENTION, *TEXT_ATTENTION)),
    "attention processors without the word": (bare_processor_names, (*UNET_ATTENTION, *TEXT_ATTENTION)),
    "attention processors and text encoder of 0.21": (
        lambda module: (processor_names if module.startswith("unet") else diffusers_names)(module),
        (*UNET_ATTENTION, *TEXT_ATTENTION, *TEXT_OTHERS),
    ),
    "old text encoder with mlp": (
        lambda module: (processor_names if "attn" in module else diffusers_names)(module),
        (*TEXT_ATTENTION, *TEXT_OTHERS),
    ),
    "kohya": (kohya_names, EVERYTHING),
    "kohya te1": (kohya_te1_names, EVERYTHING),
}


@pytest.mark.parametrize("family", ["sd1", "sd2-v"])
@pytest.mark.parametrize("part", ["both", "unet", "text_encoder"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling(pipelines: Pipelines, tmp_path: Path, spelling: str, part: str, family: str) -> None:
    names, modules = SPELLINGS[spelling]
    chosen = tuple(module for module in modules if part in ("both", module.partition(".")[0]))
    if not chosen:
        pytest.skip("this spelling is of one network only")
    tensors: Tensors = {}
    for module, down, up in halves(pipelines, chosen, family):
        tensors |= dict(zip(names(module), (down, up), strict=True))
    save_file(tensors, tmp_path / "lora.safetensors")
    assert_as_diffusers(pipelines, tmp_path / "lora.safetensors", family)


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 6},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {r"attn\d\.to_[kv]": 2, r"^conv_in": 3},
        "alpha_pattern": {r"down_blocks.*attn1\.to_q": 3, r"to_(k|v)": 5, "conv.*": 1.5},
    },
    "rank stabilised": {"r": 4, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"to_q": 2}},
    "dora": {"r": 4, "lora_alpha": 6, "use_dora": True},
    "biases": {"r": 4, "lora_alpha": 6, "lora_bias": True, "target_modules": r".*(to_out\.0|conv1|proj_in|fc1)"},
}
TARGETS = r".*(attn[12]\.to_[qkv]|to_out\.0|ff\.net\.2|conv1|conv_in|proj_in|[qkv]_proj|fc1)"


UNET_ONLY = ("dora", "biases")
"""Into a text encoder, transformers 5.23 loads no magnitudes, and diffusers 0.42 nothing without attention."""


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern:RuntimeWarning", "ignore:Adapter 'default'")
@pytest.mark.parametrize("config", CONFIGS)
def test_what_diffusers_saves_of_an_adapter(pipelines: Pipelines, tmp_path: Path, config: str) -> None:
    """Made as training scripts make it: an adapter of peft's in both networks, saved with its settings."""
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = pipelines.fresh("sd1")
    names = ("unet",) if config in UNET_ONLY else ("unet", "text_encoder")
    networks = {name: getattr(pipeline, name) for name in names}
    torch.manual_seed(0)
    for network in networks.values():
        network.add_adapter(
            LoraConfig(**{"target_modules": TARGETS, "init_lora_weights": False, **CONFIGS[config]})
        )
        for name, parameter in network.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                torch.nn.init.normal_(parameter)
            elif "lora_magnitude_vector" in name:
                parameter.data *= 1 + torch.rand_like(parameter)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        **{f"{name}_lora_layers": get_peft_model_state_dict(network) for name, network in networks.items()},
        **_collate_lora_metadata(networks),
    )
    assert_as_diffusers(pipelines, tmp_path)


def test_ranks_differ(pipelines: Pipelines, tmp_path: Path) -> None:
    tensors: Tensors = {}
    for number, (module, down, up) in enumerate(halves(pipelines, EVERYTHING)):
        rank = 1 + number % 3
        tensors |= dict(zip(peft_names(module), (down[:rank], up[:, :rank]), strict=True))
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "lora.safetensors")
    assert_as_diffusers(pipelines, tmp_path / "lora.safetensors")


def test_one_alpha_for_all(pipelines: Pipelines, tmp_path: Path) -> None:
    """Of a kohya file with several alphas, diffusers 0.42 takes the most frequent for all attention layers; kohya's
    own reading is tested in test_lora."""
    tensors: Tensors = {}
    for module, down, up in halves(pipelines, EVERYTHING):
        names = kohya_names(module)
        tensors |= dict(zip(names, (down, up), strict=True))
        tensors[names[0].replace("lora_down.weight", "alpha")] = torch.tensor(1.5)
    save_file(tensors, tmp_path / "lora.safetensors")
    assert_as_diffusers(pipelines, tmp_path / "lora.safetensors")


@pytest.mark.filterwarnings("ignore:`init_lora_weights` is:UserWarning")
@pytest.mark.parametrize("start", ["mica", "lora_ga", "eva", "orthogonal", "gaussian", "pissa", "olora", "corda"])
def test_what_a_lora_began_as(pipelines: Pipelines, tmp_path: Path, start: str) -> None:
    """Said in the header by training scripts: diffusers fuses the matrices as they are, or refuses the file."""
    tensors: Tensors = {}
    for module, down, up in halves(pipelines, UNET_ATTENTION):
        tensors |= dict(zip(peft_names(module), (down, up), strict=True))
    targets = [module.removeprefix("unet.") for module in UNET_ATTENTION]
    told = {"r": RANK, "lora_alpha": 6, "target_modules": targets, "init_lora_weights": start}
    header = json.dumps({f"unet.{key}": value for key, value in told.items()})
    path = tmp_path / "lora.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata={METADATA_KEY: header})
    if start not in ("pissa", "olora", "corda"):
        assert_as_diffusers(pipelines, path)
        return
    with pytest.raises((RuntimeError, ValueError)):
        pipelines.fused("sd1", path, 1.0)
    with pytest.raises(DiffusionError, match="changes the checkpoint's weights as well"):
        open_checkpoint(str(pipelines.folder("sd1")), ConvertOptions(loras=[Lora(path)]))


def test_patterns_that_are_none(pipelines: Pipelines, tmp_path: Path) -> None:
    tensors: Tensors = {}
    for module, down, up in halves(pipelines, UNET_ATTENTION):
        tensors |= dict(zip(peft_names(module), (down, up), strict=True))
    path = tmp_path / "lora.safetensors"
    for settings, said in (
        ({"unet.lora_alpha": 1, "unet.alpha_pattern": {"to_(q": 2}}, "adapter settings that cannot be read"),
        ({"unet.lora_alpha": 1, "unet.init_lora_weights": "pissa"}, "changes the checkpoint's weights as well"),
        ({"unet.lora_alpha": 1, "unet.init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        ({"unet.lora_alpha": 1, "unet.init_lora_weights": "corda"}, "path_initial_model_for_weight_conversion"),
        ({"unet.lora_alpha": 1, "unet.peft_type": "VERA"}, "VERA, which is not covered"),
        ({"unet.r": 4}, "alpha is missing"),
        ([1], "its metadata"),
    ):
        save_file(tensors, path, metadata={METADATA_KEY: json.dumps(settings)})
        with pytest.raises(DiffusionError, match=said) as caught:
            open_checkpoint(str(pipelines.folder("sd1")), ConvertOptions(loras=[Lora(path)]))
        assert str(path) in str(caught.value)
