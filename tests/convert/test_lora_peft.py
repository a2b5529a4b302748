"""Adapters of every kind in the folders that peft saves are fused as peft merges them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.option_values import Lora
from diffusion_convert.options import ConvertOptions
from diffusion_runtime.errors import DiffusionError

pytestmark = pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern:RuntimeWarning", "ignore:.*gradient_checkpointing:FutureWarning"
)
ROUNDING = 2**-10
"""float16 has 11 significant bits: two roundings of nearly the same value differ by no more."""
UNET = r".*(attn[12]\.to_[qkv]|to_out\.0|ff\.net\.2|conv1|conv_in|conv_shortcut|proj_in)"
TEXT = r".*([qkv]_proj|out_proj|fc1)"
PATTERNS = {
    "rank_pattern": {r"attn\d\.to_[kv]": 2, r"^conv_in": 3},
    "alpha_pattern": {r"down_blocks.*attn1\.to_q": 3, r"to_(k|v)": 5, "conv.*": 1.5},
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoraConfig", {"r": 4, "lora_alpha": 6}),
    "LoRA, patterns": ("LoraConfig", {"r": 4, "lora_alpha": 6, **PATTERNS}),
    "LoRA, rank stabilised": ("LoraConfig", {"r": 4, "lora_alpha": 6, "use_rslora": True, **PATTERNS}),
    "DoRA": ("LoraConfig", {"r": 4, "lora_alpha": 6, "use_dora": True}),
    "LoHa": ("LoHaConfig", {"r": 4, "alpha": 6, **PATTERNS}),
    "LoHa, Tucker": ("LoHaConfig", {"r": 4, "alpha": 6, "use_effective_conv2d": True}),
    "LoKr": ("LoKrConfig", {"r": 2, "alpha": 3, "decompose_both": True, **PATTERNS}),
    "LoKr, whole matrices": ("LoKrConfig", {"r": 64, "alpha": 16, "decompose_factor": 4}),
    "LoKr, Tucker": ("LoKrConfig", {"r": 1, "alpha": 2, "use_effective_conv2d": True}),
    "(IA)^3": ("IA3Config", {"feedforward_modules": r".*(ff\.net\.2|conv1)"}),
    "(IA)^3, names": ("IA3Config", {"feedforward_modules": ["net.2", "conv1", "fc1"]}),
}
UNSCALED = ("(IA)^3", "(IA)^3, names")
"""peft has no weights for these."""


def saved(
    network: torch.nn.Module, kind: str, targets: str | list[str], folder: Path, weight: float
) -> dict[str, torch.Tensor]:
    """Save an adapter with random parameters; the network's weights with the adapter merged at ``weight``."""
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer

    name, settings = KINDS[kind]
    if name == "IA3Config" and isinstance(settings["feedforward_modules"], list):
        targets = ["to_k", "net.2", "conv1", "conv_in", "q_proj", "fc1"]
    made: Any = peft.get_peft_model(network, getattr(peft, name)(target_modules=targets, **settings))
    torch.manual_seed(0)
    for parameter in (parameter for parameter in made.parameters() if parameter.requires_grad):
        parameter.data = torch.rand_like(parameter) * 0.5 + 0.25
    made.save_pretrained(folder)
    loaded: Any = made
    for layer in loaded.modules():
        if isinstance(layer, BaseTunerLayer) and weight != 1:
            layer.scale_layer(weight)
    merged: dict[str, torch.Tensor] = loaded.merge_and_unload().state_dict()
    return merged


class Networks:
    """Fresh networks of a tiny checkpoint in float32, as its users load them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def unet(self) -> torch.nn.Module:
        from diffusers import UNet2DConditionModel

        load: Any = UNet2DConditionModel.from_pretrained
        network: torch.nn.Module = load(self.folder / "unet", dtype=torch.float32)
        return network

    def text_encoder(self) -> torch.nn.Module:
        from transformers import CLIPTextModel

        load: Any = CLIPTextModel.from_pretrained
        network: torch.nn.Module = load(self.folder / "text_encoder", dtype=torch.float32)
        return network


@pytest.fixture(scope="module")
def networks(tiny_checkpoint: Callable[[str], Path]) -> Networks:
    return Networks(tiny_checkpoint("sd1"))


def assert_fused(networks: Networks, lora: Lora, wanted: dict[str, dict[str, torch.Tensor]]) -> None:
    found, before = (open_checkpoint(str(networks.folder), ConvertOptions(loras=loras)) for loras in ([lora], []))
    for subfolder in ("unet", "text_encoder"):
        old = before.models[subfolder].tensors()
        changed = 0
        for name, value in found.models[subfolder].tensors().items():
            bare = name.removeprefix("text_model.")
            reference = wanted.get(subfolder, {}).get(bare, old[name]).half()
            torch.testing.assert_close(
                value.half(), reference, rtol=ROUNDING, atol=2**-24, msg=partial("{}: {}".format, name)
            )
            changed += not torch.equal(value, old[name])
        assert bool(changed) == (subfolder in wanted)


@pytest.mark.parametrize(
    ("kind", "weight"),
    [
        *((kind, 0.6) for kind in KINDS if kind not in UNSCALED),
        *((kind, 1.0) for kind in ("LoRA", "DoRA", *UNSCALED)),
    ],
)
def test_adapters_of_two_networks(networks: Networks, tmp_path: Path, kind: str, weight: float) -> None:
    wanted = {
        name: saved(network, kind, targets, tmp_path / name, weight)
        for name, network, targets in (
            ("unet", networks.unet(), UNET),
            ("text_encoder", networks.text_encoder(), TEXT),
        )
    }
    assert_fused(networks, Lora(tmp_path, weight), wanted)
    (tmp_path / "unet").rename(tmp_path / "text_free")
    assert_fused(networks, Lora(tmp_path / "text_free", weight), {"unet": wanted["unet"]})
    assert_fused(networks, Lora(tmp_path / "text_encoder", weight), {"text_encoder": wanted["text_encoder"]})


WHOLE: dict[str, dict[str, Any]] = {
    "all biases": {"bias": "all"},
    "biases of the layers": {"bias": "lora_only"},
    "biases beside those of the LoRA": {"bias": "lora_only", "lora_bias": True},
    "convolutions": {"modules_to_save": ["conv_in", "conv_out"]},
    "a norm": {"modules_to_save": ["conv_norm_out"]},
    "with magnitudes": {"bias": "lora_only", "use_dora": True},
}


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # peft takes biases of LoRAs for matrices
@pytest.mark.parametrize("kind", WHOLE)
def test_what_was_trained_as_a_whole_takes_the_models_place(networks: Networks, tmp_path: Path, kind: str) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(target_modules=r".*(to_out\.0|conv1)", r=2, lora_alpha=3, **WHOLE[kind])
    made: Any = get_peft_model(networks.unet(), config)
    for name, parameter in made.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    made.save_pretrained(tmp_path / "unet")
    loaded: Any = PeftModel.from_pretrained(networks.unet(), tmp_path / "unet")
    merged: dict[str, torch.Tensor] = loaded.merge_and_unload().state_dict()
    assert_fused(networks, Lora(tmp_path), {"unet": merged})


def test_a_text_encoders_parts_trained_as_a_whole(networks: Networks, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["final_layer_norm", "token_embedding"])
    made: Any = get_peft_model(networks.text_encoder(), config)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    made.save_pretrained(tmp_path / "text_encoder")
    loaded: Any = PeftModel.from_pretrained(networks.text_encoder(), tmp_path / "text_encoder")
    assert_fused(networks, Lora(tmp_path), {"text_encoder": loaded.merge_and_unload().state_dict()})


def test_an_embedding(networks: Networks, tmp_path: Path) -> None:
    merged = saved(networks.text_encoder(), "LoRA", ".*token_embedding", tmp_path / "adapter", 1.0)
    assert_fused(networks, Lora(tmp_path / "adapter"), {"text_encoder": merged})


def lacking(part: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        name = next(name for name in tensors if part in name)
        save_file({other: value for other, value in tensors.items() if other != name}, file)

    return change


def misnaming(part: str, other: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file({name.replace(part, other): value for name, value in load_file(file).items()}, file)

    return change


def setting(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = folder / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))

    return change


def in_the_settings_place(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "adapter_config.json").unlink()
        make(folder / "adapter_config.json")

    return change


BROKEN: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "half of a LoRA": ("LoRA", lacking("lora_A"), "whole layer of a LoRA, and lora_down.weight is missing"),
    "another module": ("LoRA", misnaming("attn1.to_q", "attn3.to_q"), "match nothing in this sd1 checkpoint"),
    "a DoRA's magnitudes alone": ("DoRA", misnaming("lora_B", "lora_C"), "stands alone"),
    "a part of a LoHa": ("LoHa", lacking("hada_w2_a"), "whole layer of a LoHa, and hada_w2_a is missing"),
    "a core of a LoHa": ("LoHa, Tucker", lacking("hada_t2"), "whole layer of a LoHa, and hada_t2 is missing"),
    "a LoHa's part misnamed": ("LoHa", misnaming("hada_w1_a", "hada_w3_a"), "hada_w1_a is missing"),
    "a part of a LoKr": ("LoKr", lacking("lokr_w1_b"), "whole layer of a LoKr, and lokr_w1_b is missing"),
    "a factor of a LoKr": ("LoKr, whole matrices", lacking("lokr_w2"), "lokr_w2 is missing"),
    "a vector misnamed": ("(IA)^3", misnaming("ia3_l", "ia4_l"), "match nothing"),
    "a pattern": ("LoRA", setting(alpha_pattern={"to_(q": 1}), "adapter_config.json: adapter settings that cannot"),
    "an alpha": ("LoHa", setting(alpha="much"), "adapter settings that cannot be read"),
    "a kind": ("LoRA", setting(peft_type="BOFT"), "adapter of type BOFT, which is not covered"),
    "a start": ("LoRA", setting(init_lora_weights="pissa_niter_4"), "changes the checkpoint's weights as well"),
    "a folder for settings": ("LoRA", in_the_settings_place(Path.mkdir), "adapter_config.json: is no regular file"),
    "a pipe for settings": ("LoRA", in_the_settings_place(os.mkfifo), "adapter_config.json: is no regular file"),
    "a link for settings": (
        "LoRA",
        in_the_settings_place(lambda path: path.symlink_to("nowhere")),
        "adapter_config.json: is no regular file",
    ),
    "activations": ("LoRA", setting(alora_invocation_tokens=[1]), "made with alora_invocation_tokens"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_lacks_or_misnames_something(networks: Networks, tmp_path: Path, case: str) -> None:
    kind, change, said = BROKEN[case]
    saved(networks.unet(), kind, UNET if "IA" in kind else r".*(attn1\.to_q|conv1)", tmp_path / "unet", 1.0)
    change(tmp_path / "unet")
    with pytest.raises(DiffusionError, match=said) as caught:
        open_checkpoint(str(networks.folder), ConvertOptions(loras=[Lora(tmp_path)]))
    assert str(caught.value).startswith(f"--lora {tmp_path}")


def test_without_settings_alpha_is_the_rank(networks: Networks, tmp_path: Path) -> None:
    merged = saved(networks.unet(), "LoRA", UNET, tmp_path / "unet", 4 / 6)
    (tmp_path / "unet" / "adapter_config.json").unlink()
    assert_fused(networks, Lora(tmp_path), {"unet": merged})
    (note,) = open_checkpoint(str(networks.folder), ConvertOptions(loras=[Lora(tmp_path)])).notes
    assert (
        note
        == "adapter_model.safetensors: has no adapter_config.json next to it: its alpha is taken to be its rank"
    )
