"""ControlNets, converted, against diffusers' own pipelines with them, and the pictures that they are given."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from diffusion_convert import ConvertOptions, convert
from diffusion_runtime import InputError, Pipeline, images, load_pipeline, schedulers, stages
from diffusion_runtime.batch import rows
from diffusion_runtime.batch.tasks import tasks_of
from diffusion_runtime.batch.worker import Setup, Worker
from diffusion_runtime.cli import app
from diffusion_runtime.control import Control, ControlFile
from diffusion_runtime.control.canny import canny
from diffusion_runtime.control.pictures import hint
from diffusion_runtime.diffusers import load_diffusers_pipeline
from diffusion_runtime.picture_prompts import PicturePrompt
from diffusion_runtime.pipeline import RuntimeNote
from diffusion_runtime.tasks import Request
from pictures import half_mask, picture

pytestmark = pytest.mark.slow

PARITY_DB = 40.0
CHANGED_DB = 35.0  # below it, a picture is another one
Kind = Callable[[str], Path]
Psnr = Callable[[Any, Any], float]
SIDES = {"sd1": 64, "sdxl": 128}
EDGES, SHUFFLE, TILE = "edges_v1-tiny", "shuffle", "tile"


def shown(kind: str, *seeds: int) -> list[Image.Image]:
    return [picture(SIDES[kind], seed) for seed in seeds]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.fixture(scope="module")
def drawn(tiny_checkpoint: Kind, controlnets: Kind, reference: Callable[[str], Any]) -> Callable[..., Image.Image]:
    """``drawn(kind, class_name, names, **given)``: the picture that diffusers' class makes with those ControlNets,
    loaded as its users load it, in float32."""
    import diffusers

    networks = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

    def draw(kind: str, class_name: str, names: list[str], scheduler: Any = None, **given: Any) -> Image.Image:
        nets = [diffusers.ControlNetModel.from_pretrained(controlnets(kind) / name) for name in names]
        known = reference(kind).diffusers.components
        parts: dict[str, Any] = {part: known[part] for part in networks if part in known}
        parts |= {"safety_checker": None} if kind == "sd1" else {}
        parts |= {} if scheduler is None else {"scheduler": scheduler}
        pipe = getattr(diffusers, class_name).from_pretrained(
            tiny_checkpoint(kind), controlnet=nets if len(nets) > 1 else nets[0], local_files_only=True, **parts
        )
        pipe.to(torch.float32).set_progress_bar_config(disable=True)
        if "image" not in given:  # what is a control image elsewhere
            given["image"] = given.pop("control_image")
        made: Image.Image = pipe(**given, generator=seeded()).images[0]
        return made

    return draw


def asked(kind: str, names: list[str], **given: Any) -> dict[str, Any]:
    images = shown(kind, *range(1, len(names) + 1))
    told = {"prompt": "a photo of a cat", "negative_prompt": "red", "num_inference_steps": 4}
    return {**told, "control_image": images if len(images) > 1 else images[0], **given}


def start(kind: str, masked: bool = False) -> dict[str, Any]:
    (image,) = shown(kind, 0)
    return {"image": image, **({"mask_image": half_mask(SIDES[kind])} if masked else {})}


def ours(folder: Path, names: list[str], given: dict[str, Any]) -> Image.Image:
    pipeline = load_pipeline(folder, "torch", check_safety=False)
    image: Image.Image = pipeline(**given, controlnet=names, generator=seeded()).images[0]
    return image


CASES: dict[str, tuple[str, str, list[str], dict[str, Any]]] = {
    "one": ("sd1", "StableDiffusionControlNetPipeline", [EDGES], {}),
    "of three, each its own scale and interval": (
        "sd1",
        "StableDiffusionControlNetPipeline",
        [EDGES, SHUFFLE, TILE],
        {
            "num_inference_steps": 8,
            "controlnet_conditioning_scale": [0.5, 1.2, 0.9],
            "control_guidance_start": [0.0, 0.25, 0.5],
            "control_guidance_end": [0.6, 1.0, 0.9],
        },
    ),
    "one that is pooled": ("sd1", "StableDiffusionControlNetPipeline", [SHUFFLE], {}),
    "guess mode": (
        "sd1",
        "StableDiffusionControlNetPipeline",
        [EDGES],
        {"guess_mode": True, "guidance_scale": 4.0},
    ),
    "without guidance": ("sd1", "StableDiffusionControlNetPipeline", [TILE], {"guidance_scale": 1.0}),
    "from a picture": ("sd1", "StableDiffusionControlNetImg2ImgPipeline", [TILE, EDGES], start("sd1")),
    "a part of a picture's steps": (
        "sd1",
        "StableDiffusionControlNetImg2ImgPipeline",
        [TILE],
        {**start("sd1"), "num_inference_steps": 8, "strength": 0.6, "control_guidance_start": 0.2},
    ),
    "in a mask": ("sd1", "StableDiffusionControlNetInpaintPipeline", [EDGES], start("sd1", masked=True)),
    "SDXL": ("sdxl", "StableDiffusionXLControlNetPipeline", ["edges"], {}),
    "SDXL, from a picture": ("sdxl", "StableDiffusionXLControlNetImg2ImgPipeline", ["edges"], start("sdxl")),
    "SDXL, in a mask": ("sdxl", "StableDiffusionXLControlNetInpaintPipeline", ["edges"], start("sdxl", True)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_picture_is_diffusers(case: str, drawn: Callable[..., Any], steered: Kind, psnr_db: Psnr) -> None:
    kind, class_name, names, given = CASES[case]
    told = asked(kind, names, **given)
    expected = drawn(kind, class_name, names, **told)
    assert psnr_db(np.asarray(ours(steered(kind), names, told)), np.asarray(expected)) >= PARITY_DB
    told["controlnet_conditioning_scale"] = 0.0
    assert psnr_db(np.asarray(ours(steered(kind), names, told)), np.asarray(expected)) < CHANGED_DB


@pytest.mark.parametrize(
    ("case", "task"),
    [
        ("of three, each its own scale and interval", None),
        ("one that is pooled", None),
        ("guess mode", "text-to-image"),
        ("in a mask", "inpainting"),
        ("SDXL, from a picture", "image-to-image"),
    ],
)
def test_diffusers_own_pipelines_take_converted_controlnets(
    case: str, task: str | None, drawn: Callable[..., Any], steered: Kind, psnr_db: Psnr
) -> None:
    kind, class_name, names, given = CASES[case]
    told = asked(kind, names, **given)
    expected = drawn(kind, class_name, names, **told)
    asks = names if len(names) > 1 else names[0]
    pipe = load_diffusers_pipeline(steered(kind), task, "torch", controlnet=asks, check_safety=False)
    assert type(pipe).__name__ == class_name
    told |= {} if "image" in told else {"image": told.pop("control_image")}
    found = pipe(**told, generator=seeded()).images[0]
    assert psnr_db(np.asarray(found), np.asarray(expected)) >= PARITY_DB
    with pytest.raises(InputError, match="'sketch' is none of these models' ControlNets"):
        load_diffusers_pipeline(steered(kind), task, "torch", controlnet="sketch")


def test_a_controlnet_for_in_painting_does_not_see_what_is_missing() -> None:
    """The picture for it is as diffusers' documentation makes it."""
    photo, mask = picture(64), Image.fromarray(np.random.default_rng(1).integers(0, 255, (64, 64), np.uint8))
    expected = np.asarray(photo.convert("RGB"), np.float32) / 255.0
    expected[np.asarray(mask.convert("L"), np.float32) / 255.0 > 0.5] = -1.0
    job: Any = SimpleNamespace(size=(64, 64), request=SimpleNamespace(mask=mask), note_size=lambda *_: None)
    control = Control(TILE, photo, prepare="inpaint")
    assert np.array_equal(hint(control, job)[0].permute(1, 2, 0).numpy(), expected)
    job.request.mask = None
    with pytest.raises(InputError, match="there is no mask that says what is missing"):
        hint(control, job)


@pytest.mark.parametrize("masked", [False, True])
def test_nothing_is_imposed_on_the_checkpoints_scheduler(
    masked: bool, drawn: Callable[..., Any], steered: Kind, psnr_db: Psnr
) -> None:
    """As in diffusers' classes with ControlNets, and other than in those without."""
    import diffusers

    class_name = "StableDiffusionControlNetInpaintPipeline" if masked else "StableDiffusionControlNetPipeline"
    own: dict[str, Any] = {
        "_class_name": "PNDMScheduler" if masked else "DDIMScheduler",
        "beta_schedule": "scaled_linear",
    }
    own |= {"beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
    told = asked("sd1", [TILE], **(start("sd1", masked=True) if masked else {}))
    theirs = getattr(diffusers, own["_class_name"]).from_config(own)
    expected = drawn("sd1", class_name, [TILE], scheduler=theirs, **told)
    pipeline = load_pipeline(steered("sd1"), "torch", check_safety=False)
    settled = schedulers.settled(own, schedulers.imposed_on("sd1"))
    assert settled != own
    pipeline.manifest = pipeline.manifest.model_copy(update={"scheduler": settled, "steered_scheduler": own})
    pictures = [pipeline(**told, controlnet=TILE, generator=seeded()).images[0]]
    pipeline.scheduler = type(theirs).from_config(pipeline.scheduler.config)  # what a user sets counts as it is
    pictures.append(pipeline(**told, controlnet=TILE, generator=seeded()).images[0])
    found = [psnr_db(np.asarray(one), np.asarray(expected)) for one in pictures]
    assert found[0] >= max(PARITY_DB, found[1] + 5), found  # half as far away, or nearer


def test_without_controls_the_unet_that_is_steered_draws_what_the_plain_one_does(
    tiny_checkpoint: Kind, steered: Kind, psnr_db: Psnr
) -> None:
    import diffusers

    plain = diffusers.StableDiffusionXLPipeline.from_pretrained(tiny_checkpoint("sdxl"), local_files_only=True)
    plain.to(torch.float32).set_progress_bar_config(disable=True)
    told: dict[str, Any] = {"prompt": "a photo of a cat", "num_inference_steps": 4}
    expected = plain(**told, generator=seeded()).images[0]
    for pipe in (
        load_pipeline(steered("sdxl"), "torch"),
        load_diffusers_pipeline(steered("sdxl"), backend="torch"),
    ):
        made = pipe(**told, generator=seeded()).images[0]
        assert psnr_db(np.asarray(made), np.asarray(expected)) >= PARITY_DB


def test_of_6_bits_compiled_and_of_batch_1_the_picture_is_diffusers(
    drawn: Callable[..., Any], tiny_checkpoint: Kind, controlnets: Kind, tmp_path: Path, psnr_db: Psnr
) -> None:
    """Batch 1: two calls of each model for a step."""
    options = ConvertOptions(
        *("original",),
        controlnets=controlnets("sd1") / TILE,
        only_controlled=True,
        batch_size=1,
        nbits=6,
        verify=False,
    )
    convert(tiny_checkpoint("sd1"), tmp_path / "models", options)
    told = asked("sd1", [TILE], guidance_scale=2.0)
    expected = drawn("sd1", "StableDiffusionControlNetPipeline", [TILE], **told)
    compiled = tmp_path / "models" / "original" / "compiled"
    made = ours(compiled, [TILE], told)
    assert psnr_db(np.asarray(made), np.asarray(expected)) >= PARITY_DB
    (compiled / "manifest.json").unlink()  # as Apple's converter leaves them
    assert (np.asarray(ours(compiled, ["Tile"], told)) == np.asarray(made)).all()


def test_compiled_models_and_apples_folders_draw_the_same(steered: Kind, tmp_path: Path) -> None:
    """Without manifest, a ControlNet is called as its file is."""
    told = asked("sd1", [EDGES, TILE])
    made = ours(steered("sd1") / "original" / "packages", [EDGES, TILE], told)
    compiled = shutil.copytree(steered("sd1") / "original" / "compiled", tmp_path / "compiled")
    assert (np.asarray(ours(compiled, ["edges", "tile"], told)) == np.asarray(made)).all()
    packages = shutil.copytree(steered("sd1") / "original" / "packages", tmp_path / "packages")
    for folder in (compiled, packages):
        (folder / "manifest.json").unlink()
        assert (np.asarray(ours(folder, ["edges", "tile"], told)) == np.asarray(made)).all()


@pytest.fixture(scope="module")
def pipeline(steered: Kind) -> Pipeline:
    return load_pipeline(steered("sd1"), "torch", check_safety=False)


ONE: dict[str, Any] = {"control_image": Image.new("RGB", (64, 64)), "controlnet": EDGES}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"controlnet": "scribble"},
            "'scribble' is none of these models' ControlNets; there are edges_v1-tiny, shuff",
        ),
        ({"controlnet": "e"}, "'e' is part of the names of 3"),
        ({"controlnet": None}, "name the ControlNets of the control images: edges_v1-tiny, shuffle, tile"),
        ({"control_image": Image.new("RGB", (48, 64))}, "is 48x64, expected 64x64 (width x height)"),
        ({"control_image": "edges.png"}, "is a str: expected one PIL picture"),
        ({"control_image": [Image.new("RGB", (64, 64))] * 2}, "expected one for each of the 2 control images"),
        ({"controlnet_conditioning_scale": float("nan")}, "scale nan: expected a number"),
        ({"controlnet_conditioning_scale": [1.0, 0.5]}, "expected one for each of the 1 control images"),
        ({"control_guidance_start": -0.1}, "start -0.1: expected a part of the steps, 0 to 1"),
        ({"control_guidance_end": 1.5}, "end 1.5: expected a part of the steps, 0 to 1"),
        ({"control_guidance_start": 0.5, "control_guidance_end": 0.5}, "it steers no step"),
        ({"control_prepare": "sketch"}, "prepared by canny, depth, inpaint, tile; got 'sketch'"),
        ({"control_prepare": "depth"}, "these models have no depth_estimator"),
        ({"control_image": None}, "there is no control_image"),
        (
            {"control_image": None, "controlnet": None, "guess_mode": True},
            "guess_mode: there is no control picture",
        ),
        ({"guess_mode": 1}, "guess_mode 1: expected True or False"),
    ],
)
def test_what_cannot_be_is_said(pipeline: Pipeline, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        pipeline("x", num_inference_steps=1, **{**ONE, **given})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_steers_a_refiner() -> None:
    control = Control(EDGES, picture(64))
    asked = Request(
        ("x",),
        controls=(control,),
        guess_mode=True,
        adapters=(control,),
        picture_prompts=(PicturePrompt(picture(64)),),
        refiner_start=0.5,
    )
    base, refined = stages.apart(asked)
    assert base.controls and base.guess_mode and base.adapters and base.picture_prompts
    assert refined == Request(("x",), denoising_start=0.5)


def test_models_without_controlnets_say_so(toy_folder: Path) -> None:
    with pytest.raises(
        InputError, match="these models have no ControlNets: convert again with --controlnet SOURCE"
    ):
        load_pipeline(toy_folder, "torch")("x", num_inference_steps=1, **ONE)


def test_a_controlnet_of_other_models_is_refused(steered: Kind, tmp_path: Path) -> None:
    """In a folder of Apple's, as nothing else puts them together."""
    folder = shutil.copytree(steered("sd1") / "original" / "packages", tmp_path / "models")
    other = steered("sdxl") / "original" / "packages" / "ControlNet_edges.mlpackage"
    shutil.copytree(other, folder / "ControlNet_foreign.mlpackage")
    (folder / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"ControlNet_foreign does not fit this UNet: .*; convert them together"):
        load_pipeline(folder, "torch")("x", num_inference_steps=1, **{**ONE, "controlnet": "foreign"})


def test_prepared_pictures_are_made_of_any_size(pipeline: Pipeline) -> None:
    photo = picture(96, 4).resize((96, 80))
    told: dict[str, Any] = {"num_inference_steps": 2, "seed": 1, "controlnet": TILE}
    with pytest.warns(RuntimeNote, match="picture for tile was resized from 96x80 to 64x64"):
        made = pipeline("x", **told, control_image=photo, control_prepare="tile").images[0]
    small = photo.resize((64, 64), Image.Resampling.LANCZOS)
    assert made == pipeline("x", **told, control_image=small).images[0]
    edges = Image.fromarray(canny(np.asarray(small))).convert("RGB")
    drawn_edges = pipeline("x", **told, control_image=edges).images[0]
    assert drawn_edges != made
    assert pipeline("x", **told, control_image=small, control_prepare="canny").images[0] == drawn_edges


def test_depths_are_estimated_as_transformers_pipeline_does(
    steered: Kind, tiny_checkpoint: Kind, tmp_path: Path, psnr_db: Psnr
) -> None:
    """With the depth estimator of another checkpoint."""
    from transformers import DPTForDepthEstimation, DPTImageProcessor
    from transformers import pipeline as transformers_pipeline

    lender = tmp_path / "depths"
    options = ConvertOptions(components="depth_estimator", compiled=False, zip=False, verify=False)
    convert(tiny_checkpoint("sd2-depth"), lender, options)
    lent = load_pipeline(steered("sd1"), "torch", check_safety=False, depth_estimator=lender)
    side = lent.models["depth_estimator"].inputs["pixel_values"].shape[-1]
    network = DPTForDepthEstimation.from_pretrained(tiny_checkpoint("sd2-depth") / "depth_estimator").float()
    half = [0.5] * 3
    processor = DPTImageProcessor(size={"height": side, "width": side}, image_mean=half, image_std=half, resample=3)
    estimate = transformers_pipeline("depth-estimation", model=network, image_processor=processor)
    photo = picture(64, 6)
    grey = Image.fromarray(np.asarray(estimate(photo)["depth"]))
    control = Control(TILE, photo, prepare="depth")
    job: Any = SimpleNamespace(size=(64, 64), models=lent.models, note_size=lambda *_: None)
    made = (hint(control, job)[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    assert psnr_db(made, np.asarray(grey.convert("RGB"))) >= PARITY_DB
    told: dict[str, Any] = {"num_inference_steps": 1, "seed": 1, "controlnet": TILE, "control_image": photo}
    assert lent("x", **told, control_prepare="depth").images[0] != lent("x", **told).images[0]
    with pytest.raises(InputError, match="these models have no depth_estimator: convert a depth"):
        load_pipeline(steered("sd1"), "torch", depth_estimator=steered("sd1"))


OPENCV = (
    ["58fd9a81fcd7b98e", "e70697086b5d535c", "ed6e99b7a2002734"],
    ["ca8a5fdffbb2578a", "455315df475d3d3e", "e5b8cf9af004c611"],
    ["f3d49d9ee6ec8cc5", "1367f41d3702b54f", "0c3cc5ce986b28a2"],
)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_edges_are_opencvs(seed: int) -> None:
    """The hashes are of what OpenCV 5.0's `cv2.Canny(picture, 100, 200)` gives for noise, tiles, and shades."""
    rng = np.random.default_rng(seed)
    kinds = (
        rng.integers(0, 256, (61, 47, 3), dtype=np.uint8),
        np.kron(rng.integers(0, 4, (8, 6, 3)), np.ones((8, 8, 1))).astype(np.uint8) * 80,
        ((np.asarray(picture(96, seed), int) - 128) * 4 + 128).clip(0, 255).astype(np.uint8),
    )
    found = [canny(pixels) for pixels in kinds]
    assert [hashlib.sha256(edges.tobytes()).hexdigest()[:16] for edges in found] == OPENCV[seed]
    assert 0 < np.mean(found[1] == 255) < 0.5 and {int(value) for value in np.unique(found[0])} == {0, 255}


def pixels(path: str) -> bytes:
    return Image.open(path).tobytes()


def test_the_command_steers_records_and_repeats(
    steered: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    picture(64, 1).save("edges.png")
    picture(80, 2).save("photo.png")

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["generate", *arguments])

    models = str(steered("sd1"))
    steps = ("--prompt", "a cat", "--steps", "4", "--seed", "7", "--no-safety", "--backend", "torch")
    controls = ("--control", "edges=edges.png:0.8:0:0.5", "--control", "tile=photo.png", "--prepare", "tile=tile")
    made = run(models, *steps, *controls, "-o", "made.png")
    assert made.exit_code == 0, made.output
    again = ("--from", "made.png", "-o", "again.png", "--no-safety", "--backend", "torch")
    assert run(*again).exit_code == 0
    assert pixels("made.png") == pixels("again.png")
    record = images.read_metadata(Path("made.png"))["controls"]
    assert [(one["name"], one["image"], one["scale"], one["end"], one["prepare"]) for one in record] == [
        (EDGES, "edges.png", 0.8, 0.5, None),
        (TILE, "photo.png", 1.0, 1.0, "tile"),
    ]
    assert run(models, *steps, "-o", "plain.png").exit_code == 0
    assert pixels("made.png") != pixels("plain.png")
    picture(64, 3).save("edges.png")
    assert "edges.png has changed since" in str(run(*again).exception)
    for options, message in (
        (("--control", "edges"), "expected NAME=PICTURE[:SCALE[:START[:END]]]"),
        (("--control", "edges=none.png:0.5"), "--control edges= none.png: no such file"),
        (("--control", "edges=edges.png", "--prepare", "tile=canny"), "NAME as in --control (there: edges)"),
        (
            ("--control", "edges=edges.png", "--prepare", "sketch"),
            "prepared by canny, depth, inpaint, tile; got 'sketch'",
        ),
        (
            ("--control", "scribble=edges.png"),
            "none of these models' ControlNets; there are edges_v1-tiny, shuffle",
        ),
        (("--control", "edges=photo.png"), "is 80x80, expected 64x64"),
    ):
        assert message in str(run(models, *steps, *options, "-o", "bad.png").exception)


def test_a_table_names_controls(steered: Kind, tmp_path: Path) -> None:
    picture(64, 1).save(tmp_path / "edges.png")
    (tmp_path / "table.csv").write_text("prompt,control\na cat,edges=edges.png:0.8;tile=edges.png\n")
    (tmp_path / "table.jsonl").write_text(
        '{"prompt": "a cat", "controls": ["edges=edges.png:0.8", "tile=edges.png"]}'
    )
    expected = (
        ControlFile("edges", str(tmp_path / "edges.png"), 0.8),
        ControlFile("tile", str(tmp_path / "edges.png")),
    )
    for name in ("table.csv", "table.jsonl"):
        (row,) = rows.read(tmp_path / name)
        assert row.options["controls"] == expected
    (tmp_path / "others.csv").write_text(
        "prompt,adapter,ip_adapter_image\na,edges=edges.png:0.8:0.5,edges.png:0.6\n"
    )
    (other,) = rows.read(tmp_path / "others.csv")
    assert other.options["adapters"] == (ControlFile("edges", str(tmp_path / "edges.png"), 0.8, end=0.5),)
    assert other.options["ip_adapter_images"] == (ControlFile("", str(tmp_path / "edges.png"), 0.6),)
    (of_others,), failed = tasks_of([other], {"steps": 2}, 1, "models")
    (task,), failed = tasks_of([row], {"steps": 2}, 1, "models")
    assert not failed
    folder = tmp_path / "out"
    loading = {"backend": "torch", "check_safety": False}
    worker = Worker(Setup(str(steered("sd1")), loading, str(folder), 1))
    assert worker.make(task).error is None
    assert [one["name"] for one in images.read_metadata(folder / "000001.png")["controls"]] == [EDGES, TILE]
    picture(64, 2).save(tmp_path / "edges.png")  # another picture, another task
    assert tasks_of([row], {"steps": 2}, 1, "models")[0][0].key != task.key
    assert tasks_of([other], {"steps": 2}, 1, "models")[0][0].key != of_others.key
