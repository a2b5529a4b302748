"""`coreml-sd generate` and `doctor`, on models that compute next to nothing."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import toy_models
from diffusion_runtime import diagnosis, images, load_pipeline
from diffusion_runtime.cli import app
from diffusion_runtime.cli import generate as generate_command
from diffusion_runtime.errors import DiffusionError, InputError

Run = Callable[..., Any]
FAST = ("--steps", "3", "--backend", "torch")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command in an empty folder; errors of ours come back as ``result.exception``."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path))


def picture_file(path: Path, size: int = 64, mode: str = "RGB") -> Path:
    values = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(values).convert(mode).save(path)
    return path


def test_a_picture_and_its_seed(run: Run, toy_folder: Path) -> None:
    result = run("generate", toy_folder, "--prompt", "a cat", "-o", "new/cat.png", *FAST)
    assert result.exit_code == 0, result.output
    shown = next(line for line in result.output.splitlines() if line.startswith("new/cat.png"))
    record = images.read_metadata(Path("new/cat.png"))
    assert shown == f"new/cat.png  seed {record['seed']}"
    assert pixels("new/cat.png").shape == (64, 64, 3)
    expected = {"prompt": "a cat", "steps": 3, "guidance_scale": 7.5, "scheduler": "pndm", "rng": "torch"}
    assert expected.items() <= record.items()
    assert record["task"] == "text to image" and record["model"] == "toy" and record["revision"] == "0" * 40
    assert {"torch", "diffusers", "coreml-sd", "python"} <= record["versions"].keys()


def test_times_of_loading_first_and_later_calls_are_reported(run: Run, toy_folder: Path) -> None:
    result = run("generate", toy_folder, "--prompt", "a cat", "-o", "cat.png", *FAST)
    assert "unet" in result.output and "loaded in" in result.output and "first call" in result.output


@pytest.mark.parametrize(("seconds", "lines"), [(0.0, 3), (1000.0, 0)])
def test_progress_without_a_terminal_is_a_line_now_and_then(
    run: Run, toy_folder: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, lines: int
) -> None:
    monkeypatch.setattr(generate_command, "SECONDS_BETWEEN_LINES", seconds)
    result = run("generate", toy_folder, *WANTED, "--scheduler", "ddim", *FAST)
    said = [line for line in result.stderr.splitlines() if line.startswith("denoising: step")]
    assert said == [f"denoising: step {number} of 3" for number in range(1, lines + 1)]


@pytest.mark.parametrize("rng", ["torch", "numpy", "nvidia"])
def test_a_picture_can_be_repeated_from_itself(run: Run, toy_folder: Path, rng: str) -> None:
    picture_file(Path("start.png"))
    asked = ["--prompt", "a (red:1.2) cat", "--negative-prompt", "dog", "--guidance-scale", "3", "--rng", rng]
    asked += ["--image", "start.png", "--strength", "0.7", "--scheduler", "euler-ancestral", "--steps", "5"]
    shutil.copytree(toy_folder, "models")
    run("generate", "models", *asked, "-o", "one.png")
    assert run("generate", "--from", "one.png").exit_code == 0
    assert np.array_equal(pixels("one.png"), pixels("one-again.png"))
    assert images.read_metadata(Path("one.png")) == images.read_metadata(Path("one-again.png"))


@pytest.mark.parametrize(("eta", "scheduler", "is_another"), [("0.7", "ddim", True), ("0.7", "euler", False)])
def test_eta_is_the_pipelines_and_on_record(
    run: Run, toy_folder: Path, eta: str, scheduler: str, is_another: bool
) -> None:
    """`test_pipeline.py` compares DDIM's with diffusers', `test_sdxl_pictures.py` TCD's."""
    asked = [toy_folder, "--prompt", "a cat", "--seed", "3", "--scheduler", scheduler, *FAST]
    assert run("generate", *asked, "-o", "plain.png").exit_code == 0
    assert run("generate", *asked, "--eta", eta, "-o", "one.png").exit_code == 0
    pipeline = load_pipeline(toy_folder, "torch", scheduler=scheduler)
    made = pipeline("a cat", num_inference_steps=3, seed=3, eta=float(eta)).images[0]
    assert np.array_equal(pixels("one.png"), np.asarray(made))
    assert np.array_equal(pixels("one.png"), pixels("plain.png")) != is_another
    assert images.read_metadata(Path("one.png"))["eta"] == float(eta)
    assert run("generate", toy_folder, "--from", "one.png").exit_code == 0
    assert np.array_equal(pixels("one.png"), pixels("one-again.png"))


def test_other_options_override_the_record(run: Run, toy_folder: Path) -> None:
    run("generate", toy_folder, "--prompt", "a cat", "-o", "one.png", "--seed", "4", *FAST)
    run("generate", toy_folder, "--from", "one.png", "--prompt", "a horse", "-o", "two.png")
    one, two = (images.read_metadata(Path(name)) for name in ("one.png", "two.png"))
    assert {**one, "prompt": "a horse"} == two
    assert not np.array_equal(pixels("one.png"), pixels("two.png"))


def test_several_pictures_have_numbers_and_seeds_that_count_up(run: Run, toy_folder: Path) -> None:
    result = run("generate", toy_folder, "--prompt", "a cat", "-o", "p.png", "--count", "3", "--seed", "7", *FAST)
    lines = [line for line in result.output.splitlines() if line.startswith("p-")]
    assert lines == ["p-1.png  seed 7", "p-2.png  seed 8", "p-3.png  seed 9"]
    run("generate", toy_folder, "--prompt", "a cat", "-o", "alone.png", "--seed", "8", *FAST)
    assert np.array_equal(pixels("p-2.png"), pixels("alone.png"))


def test_without_guidance_pictures_share_a_call_and_do_not_change(run: Run, toy_folder: Path) -> None:
    off = ["--guidance-scale", "1", "--prompt", "a cat", *FAST]
    together = run("generate", toy_folder, *off, "-o", "p.png", "--count", "2", "--seed", "7")
    alone = run("generate", toy_folder, *off, "-o", "alone.png", "--seed", "8")
    calls = [next(line for line in r.output.splitlines() if line.startswith("unet")) for r in (together, alone)]
    assert calls[0].rpartition("(")[2] == calls[1].rpartition("(")[2]
    assert np.array_equal(pixels("p-2.png"), pixels("alone.png"))


def test_prompts_from_a_file(run: Run, toy_folder: Path) -> None:
    Path("prompts.txt").write_text("\ufeffa cat\n\n  ein Pferd 🐎  \n", encoding="utf-8")
    result = run("generate", toy_folder, "--prompts-file", "prompts.txt", "-o", "p.png", "--seed", "1", *FAST)
    assert result.exit_code == 0, result.output
    assert [images.read_metadata(Path(f"p-{n}.png"))["prompt"] for n in (1, 2)] == ["a cat", "ein Pferd 🐎"]


def test_inputs_of_another_size_are_noted(run: Run, toy_folder: Path) -> None:
    picture_file(Path("large.png"), 100)
    picture_file(Path("mask.png"), 32, "L")
    given = ("--image", "large.png", "--mask", "mask.png", "--prompt", "")
    result = run("generate", toy_folder, *given, "-o", "p.png", *FAST)
    assert "note: the image was resized from 100x100 to 64x64" in result.output
    assert "note: the mask was resized from 32x32 to 64x64" in result.output


@pytest.mark.parametrize(("mode", "scale"), [("L", 255), ("I;16", 65535), ("RGB", 255)])
def test_depth_pictures_of_every_depth_are_read(tmp_path: Path, mode: str, scale: int) -> None:
    ramp = np.linspace(0, scale, 16).round()
    values = np.repeat(ramp[None], 8, axis=0).astype(np.uint16 if mode == "I;16" else np.uint8)
    (Image.fromarray(values) if mode != "RGB" else Image.fromarray(values).convert("RGB")).save(tmp_path / "d.png")
    depth = np.asarray(images.load(tmp_path / "d.png", "--depth-image", "F"))
    assert np.allclose(depth[0], ramp, atol=0.6) and depth.dtype == np.float32


def test_a_cut_prompt_is_noted_once(run: Run, toy_folder: Path) -> None:
    result = run("generate", toy_folder, "--prompt", "cat " * 2500, "-o", "p.png", "--count", "2", *FAST)
    assert result.exit_code == 0 and result.output.count("the prompt was cut after 75 tokens; lost: ") == 1


def write_bad_inputs() -> None:
    picture_file(Path("good.png"))
    Path("no-picture.png").write_text("text")
    Image.new("L", (64, 64)).save("black.png")
    Path("empty.txt").write_text("\n")
    Path("file").write_text("in the way")


WANTED = ("--prompt", "a cat", "-o", "out/p.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-o", "out/p.png"), "no prompt: give --prompt"),
        (("--prompt", "a cat"), "no output named: give -o FILE.png"),
        (("--prompt", "a cat", "-o", "p.jpg"), "p.jpg: expected a name that ends in .png"),
        (("--prompt", "a cat", "-o", "file/p.png"), "file is not a folder"),
        ((*WANTED, "--prompts-file", "empty.txt"), "--prompt and --prompts-file are both given"),
        (("-o", "out/p.png", "--prompts-file", "empty.txt"), "holds no prompts"),
        (("-o", "out/p.png", "--prompts-file", "none.txt"), "none.txt: cannot be read"),
        (("-o", "out/p.png", "--prompts-file", "/dev/zero"), "prompts file /dev/zero: is larger than 16 MB"),
        ((*WANTED, "--image", "no-picture.png"), "--image no-picture.png: not a picture that can be read"),
        ((*WANTED, "--image", "none.png"), "--image none.png: no such file"),
        ((*WANTED, "--image", "good.png", "--mask", "black.png"), "the mask is black all over"),
        ((*WANTED, "--mask", "good.png"), "given a mask, but these models do"),
        ((*WANTED, "--image", "good.png", "--strength", "0"), "strength 0.0"),
        ((*WANTED, "--image", "good.png", "--strength", "nan"), "strength nan"),
        ((*WANTED, "--strength", "0.5"), "given a strength, but these models do text to image"),
        ((*WANTED, "--noise-level", "5"), "given a noise level, but these models do text to image"),
        (("--prompt", "a cat", "-o", f"{'p' * 252}.png"), "expected a file name of at most 255 bytes"),
        (("--prompt", "", "-o", f"{'p' * 248}.png", "--preview"), "expected a file name of at most 255 bytes"),
        ((*WANTED, "--steps", "0"), "0 steps: expected a whole number, at least 1"),
        ((*WANTED, "--guidance-scale", "nan"), "guidance scale nan"),
        ((*WANTED, "--count", "0"), "--count 0: expected at least 1"),
        ((*WANTED, "--seed", "-1"), "for a random one, give no seed"),
        ((*WANTED, "--seed", f"{2**64 - 1}", "--count", "2"), f"seeds end at {2**64 - 1}"),
        ((*WANTED, "--seed", f"{2**32 - 1}", "--count", "2", "--rng", "numpy"), "seed 4294967296 with rng numpy"),
        ((*WANTED[:1], "a \udc80", *WANTED[2:]), "is not valid Unicode at character 3"),
        (("--prompt", "a cat", "-o", "\udc80.png"), "the name is not valid Unicode"),
        ((*WANTED, "--image", "\udc80.png"), "the name is not valid Unicode"),
        ((*WANTED, "--tokenizer", "\udc80"), "the name is not valid Unicode"),
        ((*WANTED, "--scheduler", "plms9"), "unknown scheduler 'plms9': expected one of pndm, ddim"),
        ((*WANTED, "--rng", "dice"), "unknown random number generator 'dice'"),
        ((*WANTED, "--compute-units", "tpu"), "unknown compute units 'tpu'"),
        ((*WANTED, "--backend", "tpu"), "unknown backend 'tpu'"),
        ((*WANTED, "--device", "abacus"), "device 'abacus' cannot be used: expected one of cpu, cuda"),
        ((*WANTED, "--device", "meta"), "device 'meta' cannot be used: expected one of cpu, cuda"),
        ((*WANTED, "--dtype", "int3"), "unknown dtype 'int3'"),
        (
            (*WANTED, "--prediction-type", "sample"),
            "prediction type sample: the manifest of these models says epsilon",
        ),
        ((*WANTED, "--latent-scale", "0.5"), "latent scale 0.5: the manifest of these models says"),
        ((*WANTED, "--tokenizer", "nowhere"), "nowhere: no vocab.json and no merges.txt"),
        ((*WANTED, "--long-prompt", "--negative-prompt", "cat " * 100), "longer than the 75 tokens"),
        (("--from", "good.png"), "does not say how it was made"),
        (("--from", "none.png"), "none.png: no such file"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    run: Run, toy_folder: Path, options: tuple[str, ...], message: str
) -> None:
    write_bad_inputs()
    before = sorted(Path().rglob("*"))
    result = run("generate", toy_folder, *options)
    assert isinstance(result.exception, DiffusionError), result.output
    assert message in str(result.exception) and "\n" not in str(result.exception)
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--steps", "0"),
        ("--guidance-scale", "nan"),
        ("--strength", "2"),
        ("--seed", "-1"),
        ("--rng", "dice"),
        ("--scheduler", "plms9"),
        ("--image", "none.png"),
    ],
)
def test_what_no_models_could_do_is_said_before_any_are_loaded(run: Run, option: str, value: str) -> None:
    said = str(run("generate", "nowhere", *WANTED, option, value).exception)
    assert value in said and "no such folder" not in said


def test_no_models_named(run: Run) -> None:
    assert "no models named" in str(run("generate", *WANTED).exception)
    assert "nowhere: no such folder" in str(run("generate", "nowhere", *WANTED).exception)


def test_a_record_whose_input_changed_is_not_repeated(run: Run, toy_folder: Path) -> None:
    picture_file(Path("start.png"))
    run("generate", toy_folder, *WANTED, "--image", "start.png", *FAST)
    picture_file(Path("start.png"), 32)
    changed = run("generate", "--from", "out/p.png").exception
    assert isinstance(changed, InputError) and "start.png has changed since: name the file" in str(changed)
    Path("start.png").unlink()
    gone = str(run("generate", "--from", "out/p.png").exception)
    assert gone.startswith("picture out/p.png: its record names start.png, which is neither next to the picture")
    assert gone.endswith("name it with --image")


def test_a_record_does_not_tell_whose_home_its_files_are_in(
    run: Run, toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names files such that the picture can be repeated in any folder."""
    home = tmp_path / "home" / "ann"
    monkeypatch.setenv("HOME", str(home))
    shutil.copytree(toy_folder, home / "models")
    start = picture_file(tmp_path / "start.png")
    (tmp_path / "work" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    picture_file(Path("mine/mask.png"), mode="L")
    made = run("generate", home / "models", *WANTED, "--image", start, "--mask", "mine/mask.png", *FAST)
    assert made.exit_code == 0, made.output
    record = images.read_metadata(Path("out/p.png"))
    assert record["models"] == "~/models"
    assert (record["image"], record["mask"]) == (start.as_posix(), "mine/mask.png")
    again = run("generate", "--from", "out/p.png", "-o", "again.png")
    assert again.exit_code == 0 and np.array_equal(pixels("out/p.png"), pixels("again.png"))


def test_what_a_record_names_is_looked_for_beside_the_picture_too(
    run: Run, toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(toy_folder, "there/models")
    picture_file(Path("there/start.png"))
    run("generate", "there/models", "--prompt", "", "-o", "there/p.png", "--image", "there/start.png", *FAST)
    (tmp_path / "else").mkdir()
    picture_file(tmp_path / "else" / "start.png", 32)
    monkeypatch.chdir(tmp_path / "else")
    again = run("generate", "--from", "../there/p.png", "-o", "p.png")
    assert again.exit_code == 0 and np.array_equal(pixels("../there/p.png"), pixels("p.png"))
    shutil.rmtree("../there/models")
    gone = str(run("generate", "--from", "../there/p.png").exception)
    assert "its record names models, which is neither next to the picture nor in the current folder" in gone
    assert gone.endswith("name the models, `coreml-sd generate MODELS --from ../there/p.png`")


def test_a_record_holds_how_the_models_were_loaded(run: Run, toy_folder: Path) -> None:
    foreign = shutil.copytree(toy_folder, "foreign", ignore=shutil.ignore_patterns("manifest.json", "*.json.txt"))
    told = ["--prediction-type", "sample", "--latent-scale", "0.5", "--dtype", "bfloat16", "--scheduler", "ddim"]
    made = run("generate", foreign, "--prompt", "a cat", "-o", "one.png", *told, *FAST)
    assert made.exit_code == 0, made.output
    assert run("generate", "--from", "one.png").exit_code == 0
    assert np.array_equal(pixels("one.png"), pixels("one-again.png"))
    assert images.read_metadata(Path("one.png")) == images.read_metadata(Path("one-again.png"))
    other = run("generate", toy_folder, "--from", "one.png", "-o", "other.png")
    assert other.exit_code == 0 and "dtype" not in images.read_metadata(Path("other.png"))


@pytest.mark.parametrize("where", ["diffusion_runtime.guidance.predictor", "PIL.Image.Image.save"])
def test_nothing_is_left_of_an_interrupted_picture(
    run: Run, toy_folder: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """While it is denoised, and while it is written."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(where, stop)
    result = run("generate", toy_folder, *WANTED, *FAST)
    assert result.exit_code == 130 and "note: interrupted: 0 of 1 pictures are finished" in result.output
    assert not Path("out").exists() or list(Path("out").iterdir()) == []


def test_a_model_with_nan_weights_is_reported(run: Run, toy_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(toy_folder, tmp_path / "models")
    toy_models.nan_unet(tmp_path / "models")
    result = run("generate", tmp_path / "models", *WANTED, *FAST)
    assert "unet gave values that are not numbers" in str(result.exception) and not Path("out").exists()


def test_notes_come_with_the_first_step_so_that_a_refusal_is_one_line(run: Run, toy_folder: Path) -> None:
    noted = (toy_folder, *WANTED, *FAST, "--compute-units", "all")
    refused = run("generate", *noted, "--image-guidance-scale", "1.5")
    assert isinstance(refused.exception, InputError) and refused.output == ""
    assert run("generate", *noted).output.count("note: compute units all are Core ML's") == 1


def test_help_answers_without_loading_anything_heavy() -> None:
    code = (
        "import sys; from diffusion_runtime.cli import app; app(['generate', '--help'], standalone_mode=False);"
        "print([m for m in ('torch', 'diffusers', 'transformers', 'coremltools', 'PIL') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip().endswith("[]")
    for taught in (
        "image to image",
        "in-painting",
        "depth to image",
        "upscaling",
        "--from",
        "Examples",
        "mostly 50.",
    ):
        assert taught in shown


def test_doctor_says_what_is_there_and_what_to_do(run: Run) -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.output
    for name in ("python", "torch", "coremltools", "torch backend", "coreml backend", "compute units", "memory"):
        assert name in result.output


def test_doctors_columns_stand_under_each_other(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("x", "an uncommonly long name")
    found = tuple(diagnosis.Finding(name, diagnosis.State.NOTE, "TEXT", "REMEDY") for name in names)
    monkeypatch.setattr(diagnosis, "examine", lambda: found)
    lines = run("doctor").output.splitlines()
    assert [line.index("TEXT") for line in lines[::2]] == [line.index("->") for line in lines[1::2]]
    assert len({line.index("TEXT") for line in lines[::2]}) == 1


@pytest.mark.parametrize(
    ("name", "version", "remedy"),
    [("numpy", "2.4.1", "pip install 'numpy<2.4'"), ("scipy", None, "pip install coreml-sd")],
)
def test_doctor_knows_what_is_broken(
    run: Run, monkeypatch: pytest.MonkeyPatch, name: str, version: str | None, remedy: str
) -> None:
    installed = diagnosis.installed
    monkeypatch.setattr(diagnosis, "installed", lambda asked: version if asked == name else installed(asked))
    result = run("doctor")
    assert result.exit_code == 2
    assert "broken" in result.output and remedy in result.output


@pytest.mark.skipif(platform.system() == "Darwin", reason="macOS has the bindings")
def test_doctor_on_a_mac_without_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    finding = next(found for found in diagnosis.examine() if found.name == "coreml backend")
    assert finding.state is diagnosis.State.BROKEN and "bindings" in finding.text
