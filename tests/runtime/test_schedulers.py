"""Schedulers by name. That they make diffusers' pictures is tested with the pipeline."""

from __future__ import annotations

from typing import Any

import pytest

from diffusion_runtime import schedulers
from diffusion_runtime.errors import InputError

CONFIG = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


@pytest.mark.parametrize("name", schedulers.SCHEDULERS)
def test_a_scheduler_knows_its_name(name: str) -> None:
    assert schedulers.name_of(schedulers.build(CONFIG, name)) == name


@pytest.mark.parametrize(
    ("spelling", "name"),
    [("DPM++ 2M Karras", "dpm++ 2m karras"), ("euler_ancestral", "euler-ancestral"), (" Heun ", "heun")],
)
def test_spelling_is_forgiven(spelling: str, name: str) -> None:
    assert schedulers.canonical(spelling) == name


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"unknown scheduler 'plms\+': expected one of pndm, ddim, .*lcm"):
        schedulers.build(CONFIG, "plms+")


@pytest.mark.parametrize("class_name", ["os.system", "StableDiffusionPipeline", "NoSuchScheduler"])
def test_a_manifest_can_name_schedulers_only(class_name: str) -> None:
    with pytest.raises(InputError, match="unknown scheduler class"):
        schedulers.build({**CONFIG, "_class_name": class_name})


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_prediction_type_comes_from_the_configuration(prediction: str) -> None:
    built = schedulers.build({**CONFIG, "prediction_type": prediction}, "ddim")
    assert built.config.prediction_type == prediction


def test_a_scheduler_chosen_by_name_takes_no_sigmas_from_the_checkpoint() -> None:
    built = schedulers.build({**CONFIG, "use_karras_sigmas": True}, "euler")
    assert not built.config.use_karras_sigmas


def test_unknown_keys_of_a_configuration_do_no_harm() -> None:
    built = schedulers.build({**CONFIG, "invented_key": 3, "_diffusers_version": "0.6.0"})
    assert built.config.beta_end == CONFIG["beta_end"]


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
@pytest.mark.parametrize("name", ["ddim", "heun"])
def test_the_last_part_is_as_long_as_the_strength_says(name: str, strength: float) -> None:
    scheduler: Any = schedulers.build(CONFIG, name)
    schedulers.set_steps(scheduler, 20)
    remaining = schedulers.last_part(scheduler, 20, strength)
    assert len(scheduler.timesteps) - len(remaining) == (20 - int(20 * strength)) * scheduler.order
