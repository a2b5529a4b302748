"""What the names of a LoRA file's tensors say: the network, the module in it, and the part of the layer.

Three layouts are known, and every generation of them: kohya's and LyCORIS' (``lora_unet_….lora_down.weight``),
diffusers' (``unet.….lora_A.weight`` and its forerunners), and peft's folders (``base_model.model.…``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TEXT_ENCODER = "text_encoder"

PREFIXES: Mapping[str, str] = {
    r"lora_unet[_.]": "unet",
    r"lora_te1?[_.]": TEXT_ENCODER,
    r"lora_te2[_.]": "text_encoder_2",
    r"lora_te3[_.]": "text_encoder_3",  # T5
    r"lora_transformer[_.]": "transformer",
    r"unet\.": "unet",
    r"transformer\.(?!text_model)": "transformer",  # Stable Diffusion 3's, by diffusers
    r"text_encoder\.": TEXT_ENCODER,
    r"text_encoder_2\.": "text_encoder_2",
    r"(?:model\.)?diffusion_model\.": "unet",
    r"(?:text_encoders\.)?clip_[lh]\.": TEXT_ENCODER,  # node editors' names: CLIP ViT-L, -H and -bigG
    r"(?:text_encoders\.)?clip_g\.": "text_encoder_2",
}
"""How a name begins -> the subfolder of the network that it is for."""

_TEXT_MODULE = re.compile("text_model_|encoder_layers_|embeddings_|final_layer_norm|text_projection")
"""How the modules of a text encoder begin, where no prefix says whose they are."""

_ADAPTER = r"(?:\.\w+)?"
"""peft's name for an adapter, which some files keep ("default")."""

_FORMS: Sequence[tuple[str, str]] = (
    (rf"(?:\.lora_|\.lora\.|\.lora_linear_layer\.|_lora\.)(?:down|A){_ADAPTER}\.weight", "down"),
    (rf"(?:\.lora_|\.lora\.|\.lora_linear_layer\.|_lora\.)(?:up|B){_ADAPTER}\.weight", "up"),
    (rf"(?:\.lora_|\.lora\.|\.lora_linear_layer\.|_lora\.)(?:up|B){_ADAPTER}\.bias", "bias"),
    (r"(?:\.lora_|\.lora\.)mid\.weight", "mid"),
    (rf"\.lora_embedding_A{_ADAPTER}", "embedding_down"),
    (rf"\.lora_embedding_B{_ADAPTER}", "embedding_up"),
    (rf"\.lora_magnitude_vector{_ADAPTER}", "magnitude"),
    (r"\.dora_scale", "dora_scale"),
    (r"(?:\.lora|_lora|\.lora_linear_layer)?\.alpha", "alpha"),
    (rf"\.(?P<part>hada_(?:w[12]_[ab]|t[12])){_ADAPTER}", ""),
    (rf"\.(?P<part>lokr_(?:w[12](?:_[ab])?|t2)){_ADAPTER}", ""),
    (rf"\.(?P<part>ia3_l){_ADAPTER}", ""),
    (r"\.(?P<part>bias_(?:indices|values|size))", ""),
    (r"\.(?:diff|w_norm)", "diff"),
    (r"\.(?:diff_b|b_norm)", "diff_b"),
    (r"\.on_input", "on_input"),
)
"""How a name ends -> the part of a layer that it is. Parts of LoHa, LoKr and peft's (IA)^3 keep their names."""
_IA3 = ((r"\.weight", "ia3"),)  # LyCORIS' (IA)^3, if there is an on_input as well
_REPLACED = tuple(
    (rf"(?:\.base_layer|\.modules_to_save{_ADAPTER})?\.{target}", f"new_{target}") for target in ("weight", "bias")
)
"""What peft trained as a whole (modules_to_save, bias): it takes the place of the model's own."""
_PEFT = "base_model.model."


def _compiled(forms: Sequence[tuple[str, str]]) -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((re.compile(rf"(?P<module>.+?){end}"), part) for end, part in forms)


_OF_PEFT, _OF_OTHERS = _compiled((*_FORMS, *_REPLACED)), _compiled((*_FORMS, *_IA3))

OTHER_KINDS: Mapping[str, str] = {
    r"\.oft_|\.boft_": "OFT",
    r"\.(?:a1|a2|b1|b2|bm1|bm2)\.weight$": "GLoRA",
    r"\.vera_": "VeRA",
    r"_custom_diffusion\.": "Custom Diffusion",
}
"""By a mark in their tensors' names: what computes something that is not covered."""


@dataclass(frozen=True, slots=True)
class Tag:
    """``module`` has dots or underscores, as the file has them; ``subfolder`` is None where the name does not tell
    whose it is."""

    subfolder: str | None
    module: str
    part: str


def parse(name: str) -> Tag | None:
    """What a tensor's name says, None for a name of no known form."""
    for pattern, part in _OF_PEFT if _PEFT in name else _OF_OTHERS:
        if (found := pattern.fullmatch(name)) is not None:
            prefix, module = _split(found["module"])
            return Tag(prefix, module, part or found["part"])
    return None


def plain(module: str) -> str:
    """A module's name with underscores for dots, as kohya writes it, and without the levels that only some trainers
    name. No two modules of these networks differ in that alone."""
    flat = module.replace(".", "_").replace("_processor_", "_")
    return re.sub(r"^(?:transformer_)?(?:text_model_)?", "", flat)


def guess(module: str) -> str:
    """The network of a module, by how its own name begins, where nothing else tells."""
    if module.startswith("transformer_blocks."):
        return "transformer"
    return TEXT_ENCODER if _TEXT_MODULE.match(module.replace(".", "_")) else "unet"


def other_kind(name: str) -> str | None:
    """The kind that is not covered and that this tensor belongs to."""
    return next((kind for mark, kind in OTHER_KINDS.items() if re.search(mark, name)), None)


def _split(place: str) -> tuple[str | None, str]:
    for prefix, subfolder in PREFIXES.items():
        if (found := re.match(prefix, place)) is not None:
            return subfolder, place[found.end() :].removeprefix(_PEFT)
    return None, place.removeprefix(_PEFT).removeprefix("lycoris_")
