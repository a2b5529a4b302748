"""What a single file says of itself, in the words of the tools that write such files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_convert.checkpoint.computed import TensorFile
from diffusion_runtime import strict_json
from diffusion_runtime.errors import CheckpointError

_V = frozenset(("v", "vpred", "vprediction", "velocity", "vparam", "vparameterization", "vobjective"))
_EPSILON = frozenset(("epsilon", "eps", "epspred", "epsilonprediction", "noise"))
_TRUE, _FALSE = frozenset(("true", "1", "yes", "on")), frozenset(("false", "0", "no", "off"))
_PREDICTION = frozenset(("predictiontype", "prediction", "parameterization", "parametrization", "predtype"))
"""Keys whose value names the prediction."""
_PREDICTS_V = frozenset(
    ("vparameterization", "vparametrization", "vprediction", "vpred", "isvpred", "forcevprediction")
)
"""Keys whose value says whether it is v."""
_ZERO_SNR = frozenset(
    (
        *("zeroterminalsnr", "zeroterminalsnrrescale", "ztsnr", "zsnr", "zerosnr", "enablezeroterminalsnr"),
        *("rescalebetaszerosnr", "rescalenoiseschedulertozeroterminalsnr"),
    )
)
_V2 = frozenset(("v2", "isv2"))
_TITLES = ("modelspec.title", "modelspec.architecture")
_NESTED = "ot_config"
"""OneTrainer's whole configuration, as JSON in one text."""


FEW_STEPS: Mapping[str, Mapping[str, Any]] = {
    "lcm": {
        "_class_name": "LCMScheduler",
        "original_inference_steps": 50,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "timestep_spacing": "leading",
    },
    "turbo": {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
    "lightning": {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"},
    "hyper": {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing"},
}
"""Words by which models that draw in 1 to 8 steps call themselves, and the scheduler that each kind is published
with."""


EDM = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
"""Tensors of files whose noise levels are EDM's (Playground v2.5, CosXL): no schedule of ours fits them."""


@dataclass(frozen=True, slots=True)
class Marks:
    """``prediction``: "v_prediction" or "epsilon"; ``zero_snr``: the noise schedule was rescaled so that its last
    step is noise alone; ``v2``: whether it is a Stable Diffusion 2; ``few_steps``: a key of `FEW_STEPS`. None,
    False: the file does not say."""

    prediction: str | None = None
    zero_snr: bool = False
    v2: bool | None = None
    few_steps: str | None = None

    def scheduler(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """What follows for a scheduler's configuration, on top of ``base``."""
        found: dict[str, Any] = {"prediction_type": self.prediction} if self.prediction else {}
        found |= FEW_STEPS.get(self.few_steps or "", {})
        if self.zero_snr:
            found |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
            if {**base, **found}.get("_class_name") == "PNDMScheduler":  # it cannot rescale
                found["_class_name"] = "DDIMScheduler"
        return found


def read(path: Path, file: TensorFile, settled: bool = False) -> Marks:
    """The marks of a file: tensors named ``v_pred`` and ``ztsnr``, ModelSpec's metadata, those of trainers.

    Raises CheckpointError where they contradict each other about the prediction, unless that is ``settled``."""
    v, epsilon, not_v = list[str](), list[str](), list[str]()
    zero_snr, v2 = "ztsnr" in file.tensors, None
    if "v_pred" in file.tensors:
        v.append("the tensor v_pred")
    for name, key, value in _said(file.scalars):
        if key in _PREDICTION or key in _PREDICTS_V:
            says_v = value in _V or (key in _PREDICTS_V and value in _TRUE)
            (v if says_v else epsilon if value in _EPSILON else not_v if value in _FALSE else []).append(name)
        elif key in _ZERO_SNR:
            zero_snr = zero_snr or value in _TRUE
        elif key in _V2 and value in _TRUE | _FALSE:
            v2 = value in _TRUE
        elif key == "architecture" and (version := re.match(r"stablediffusionv([12])", value)):
            v2 = version[1] == "2"
            v += [name] if value.endswith("768v") else []
    if v and epsilon and not settled:
        raise CheckpointError(
            f"{path}: contradicts itself: {v[0]} says that v is predicted, {epsilon[0]} that noise is; settle it "
            f'in {path.with_suffix(".config.json").name}: {{"scheduler": {{"prediction_type": "v_prediction"}}}} '
            '(or "epsilon")'
        )
    # Where the last step is noise alone, what its noise was cannot be asked: such models predict v.
    prediction = "v_prediction" if v or (zero_snr and not epsilon) else "epsilon" if epsilon or not_v else None
    return Marks(prediction, zero_snr, v2, _few_steps(path.stem, *(file.scalars.get(key, "") for key in _TITLES)))


def _few_steps(*names: object) -> str | None:
    """The word of `FEW_STEPS` in a file's name or title: juggernautXL_v9Lightning, SDXL-Turbo."""
    words = {word.lower() for name in names for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", str(name))}
    return next((word for word in FEW_STEPS if word in words), None)


def _said(scalars: Mapping[str, int | float | str]) -> Iterator[tuple[str, str, str]]:
    """Names, and them and their values without case, punctuation and the tool's prefix."""
    told: dict[str, object] = dict(scalars)
    try:
        nested = strict_json.parse_object(str(told.pop(_NESTED, "{}")), _NESTED, CheckpointError)
    except CheckpointError:
        nested = {}  # metadata that cannot be read says nothing
    for name, value in (told | nested).items():
        plain = str(value)[:100].lower() if isinstance(value, str | int | float) else ""
        key = re.sub(r"^.*\.|^ss_", "", name.lower())
        yield name, _letters(key), _letters(plain)


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text)
