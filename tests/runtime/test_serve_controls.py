"""What requests to the web UI's API ask for: numbers, ControlNets and adapters as units of its extension."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from diffusion_runtime import tasks
from diffusion_runtime.errors import InputError
from diffusion_runtime.loading import load_pipeline
from diffusion_runtime.png_record import Settings
from diffusion_runtime.serve.apis import controlnet, web_ui
from diffusion_runtime.serve.orders import Refused, Wanted
from diffusion_runtime.serve.worker import _steering
from serving import in_base64, pixels, serving, start_image


def test_the_web_uis_numbers_reach_the_models_that_take_them() -> None:
    """Its clients send a strength to all of them."""
    asked = web_ui.Image2Image(init_images=["…"], denoising_strength=0.4, image_cfg_scale=1.2)
    told = {kind: web_ui._numbers(asked, tasks.uses(kind)) for kind in (4, 7, 8)}
    assert told == {4: {"strength": 0.4}, 7: {}, 8: {"image_guidance_scale": 1.2}}


def test_adapters_are_units_of_the_extension_too() -> None:
    described: Any = SimpleNamespace(components=["T2IAdapter_edges"], ip_adapters=[SimpleNamespace(name="plus")])
    data = in_base64(Image.new("RGB", (8, 8)))

    def steering(*units: dict[str, Any]) -> dict[str, Any]:
        args = [{"image": data, **unit} for unit in units]
        files, pictures = zip(*controlnet.controls({"controlnet": {"args": args}}, None), strict=True)
        return _steering(Wanted(Settings("a", controls=files), control_pictures=pictures), described)

    module = "ip-adapter_clip_sd15"
    found = steering({"model": "edges", "guidance_end": 0.5}, {"model": "plus", "weight": 0.6, "module": module})
    assert [(one.name, one.end) for one in found["adapters"]] == [("edges", 0.5)]
    assert [(one.name, one.scale) for one in found["picture_prompts"]] == [("plus", 0.6)]
    assert [one.name for one in steering({"model": "canny"})["controls"]] == ["canny"]
    for unit in ({"model": "plus", "guidance_end": 0.5}, {"model": "edges", "module": "canny"}):
        with pytest.raises(InputError, match="is an adapter, which counts from the first step on"):
            steering(unit)


def test_units_of_the_controlnet_extension() -> None:
    """As its front ends send them; what another mode or module would change is refused."""
    data = in_base64(Image.new("RGB", (8, 8)))
    unit = {"model": "control_canny [d14c016b]", "module": "None", "input_image": data, "weight": 0.7}
    late = {"enabled": True, "module": "canny", "guidance_start": 0.2, "guidance_end": 0.5, "pixel_perfect": True}
    asked = {"controlnet": {"args": [unit, late, {"enabled": False, "module": "unknown"}]}}
    (first, picture), (second, start) = controlnet.controls(asked, b"start")
    assert (first.name, first.scale, first.start, first.end, first.prepare) == (
        "control_canny",
        0.7,
        0.0,
        1.0,
        None,
    )
    assert (second.scale, second.start, second.end, second.prepare) == (1.0, 0.2, 0.5, "canny")
    assert (picture, start) == (base64.b64decode(data), b"start")
    assert controlnet.controls(None, None) == controlnet.controls({"controlnet": {}}, None) == ()
    for changes, why in (
        ({"control_mode": 2}, "know Balanced alone"),
        ({"module": "openpose"}, "expected one of none, canny, depth"),
        ({"input_image": None}, "a unit has no image"),
        ({"weight": "x"}, "args 0.weight: Input should be a valid number"),
        ({"input_image": "?"}, "is not base64"),
    ):
        with pytest.raises(Refused, match=why):
            controlnet.controls({"controlnet": {"args": [{**unit, **changes}]}}, None)
    with pytest.raises(Refused, match="11 units: expected at most 10"):
        controlnet.controls({"controlnet": {"args": [unit] * 11}}, None)


@pytest.mark.slow
def test_controlnets_steer_through_the_web_uis_api(
    steered: Callable[[str], Path], forked_python: Path, tmp_path: Path
) -> None:
    pipeline = load_pipeline(steered("sd1") / "original" / "packages", "torch", check_safety=False)
    picture = start_image()
    told: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 7.0, "seed": 1}
    expected = pipeline(
        "a cat", control_image=picture, controlnet="edges_v1-tiny", controlnet_conditioning_scale=0.7, **told
    ).images[0]
    folder = steered("sd1") / "original" / "packages"
    unit: dict[str, Any] = {"model": "edges_v1-tiny", "image": in_base64(picture), "weight": 0.7}
    asked = {"prompt": "a cat", "seed": 1, "steps": 2, "alwayson_scripts": {"controlnet": {"args": [unit]}}}
    with serving(tmp_path / "log.txt", f"sd1={folder}", "--no-safety", python=forked_python) as one:
        assert "edges_v1-tiny" in one.client.get("/controlnet/model_list").json()["model_list"]
        answer = one.client.post("/sdapi/v1/txt2img", json=asked)
        assert pixels(answer.json()["images"][0]) == expected.tobytes()
        unit["model"] = "pose"
        refused = one.client.post("/sdapi/v1/txt2img", json=asked)
        assert refused.status_code == 400 and "is none of these models' ControlNets" in refused.text
