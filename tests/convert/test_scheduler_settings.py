"""The manifest holds the scheduler's configuration as diffusers' pipeline of the checkpoint uses it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffusion_convert import ConvertOptions, convert
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_runtime.bundle import manifest
from diffusion_runtime.errors import CheckpointError, InputError
from diffusion_runtime.folding import Folding

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers says what it imposes
OPTIONS = ConvertOptions(attention="original", components="vae_decoder", compiled=False, zip=False, verify=False)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("sd1", ("steps_offset", "clip_sample")),
        ("sd1-inpainting", ("steps_offset", "skip_prk_steps")),
        ("x4-upscaler", ()),
    ],
)
def test_the_manifest_says_what_the_pipeline_imposes(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, family: str, keys: tuple[str, ...]
) -> None:
    import diffusers

    folder = shutil.copytree(tiny_checkpoint(family), tmp_path / "checkpoint")
    written = {**BETAS, "_class_name": "EulerDiscreteScheduler", "steps_offset": 5, "clip_sample": True}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(written))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DDIMScheduler"]  # diffusers takes the index's class, not the file's
    (folder / "model_index.json").write_text(json.dumps(index))
    convert(folder, tmp_path / "models", OPTIONS)
    found = manifest.read(tmp_path / "models" / "original" / "packages").scheduler
    pipeline = diffusers.DiffusionPipeline.from_pretrained(str(folder), local_files_only=True)
    theirs: dict[str, Any] = dict(pipeline.scheduler.config)
    assert found["_class_name"] == type(pipeline.scheduler).__name__ == "DDIMScheduler"
    for key in ("steps_offset", "clip_sample", *BETAS):
        assert found[key] == theirs[key], key
    imposed = {"steps_offset": 1, "clip_sample": False, "skip_prk_steps": True}
    assert {key: found.get(key) for key in keys} == {key: imposed[key] for key in keys}


def test_with_controlnets_the_checkpoints_own_is_kept(
    tiny_checkpoint: Callable[[str], Path], controlnets: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_checkpoint("sd1"), tmp_path / "checkpoint")
    own = {**BETAS, "_class_name": "PNDMScheduler", "clip_sample": True}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(own))
    convert(folder, tmp_path / "models", replace(OPTIONS, controlnets=(str(controlnets("sd1") / "tile"),)))
    found = manifest.read(tmp_path / "models" / "original" / "packages")
    assert (found.scheduler["clip_sample"], found.scheduler["steps_offset"]) == (False, 1)
    assert found.steered_scheduler == own


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("scheduler/scheduler_config.json", "num_train_timesteps", -1),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 10**9),
        ("scheduler/scheduler_config.json", "prediction_type", "velocity"),
        ("scheduler/scheduler_config.json", "beta_start", "x"),
        ("vae/config.json", "scaling_factor", 1e12),
        ("vae/config.json", "shift_factor", 1e12),
    ],
)
def test_what_no_runtime_could_use_is_refused_before_any_work(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, file: str, key: str, value: object
) -> None:
    folder = shutil.copytree(tiny_checkpoint("sd1"), tmp_path / "checkpoint")
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), key: value}))
    with pytest.raises((CheckpointError, InputError)) as caught:
        convert(folder, tmp_path / "models", OPTIONS)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("class_name", "prediction"),
    [
        ("UniPCMultistepScheduler", "flow_prediction"),
        ("CMStochasticIterativeScheduler", None),
        ("EDMEulerScheduler", "v_prediction"),
    ],
)
def test_schedulers_without_a_schedule_of_alphas(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, class_name: str, prediction: str | None
) -> None:
    """The card has to say what apps make of them, and `--fold prediction` has nothing to fold with."""
    folder = shutil.copytree(tiny_checkpoint("sd1"), tmp_path / "checkpoint")
    told = {"_class_name": class_name} | ({"prediction_type": prediction} if prediction else {})
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(told))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", class_name]}))
    convert(folder, tmp_path / "models", replace(OPTIONS, compiled=True, fold=(Folding.PREDICTION,)))
    made = manifest.read(tmp_path / "models" / "original" / "compiled")
    assert (made.scheduler["_class_name"], made.prediction_type) == (class_name, prediction or "epsilon")
    card = (tmp_path / "models" / "README.md").read_text()
    assert ("these models predict neither" in card) == (prediction == "flow_prediction")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow_prediction"])
@pytest.mark.parametrize("family", ["sd1", "sd1-inpainting", "sd2-v", "sd2-inpainting", "sd2-depth", "x4-upscaler"])
def test_every_family_may_predict_anything(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, family: str, prediction: str
) -> None:
    """As in diffusers, whose pipelines leave that to the scheduler."""
    folder = shutil.copytree(tiny_checkpoint(family), tmp_path / "checkpoint")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": prediction}))
    found = open_checkpoint(str(folder))
    assert found.schedulers["scheduler"]["prediction_type"] == prediction
    assert found.family == {"sd2-v": {"v_prediction": "sd2-v"}.get(prediction, "sd2-base")}.get(family, family)
