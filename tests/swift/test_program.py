"""The Swift program as a command: records, folders without a manifest, errors, Ctrl-C."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from PIL import Image

import toy_models
from diffusion_runtime import images
from diffusion_runtime.bundle import manifest
from swift.conftest import BUILT, PACKAGE, Swift

PROMPT = "a large (red:1.3) circle, on a white background"
MODES = {"image": "RGB", "mask": "L"}

pytestmark = pytest.mark.slow


@pytest.fixture
def drawn_by_python(coreml_sd: Path, toy_folder: Path, tmp_path: Path) -> Path:
    """A picture with a mask, drawn by the Python command; its inputs lie beside it."""
    for name, mode in MODES.items():
        Image.new(mode, (80, 64), "white").save(tmp_path / f"{name}.png")
    inputs = [text for name in MODES for text in (f"--{name}", str(tmp_path / f"{name}.png"))]
    options = ["--prompt", PROMPT, "--seed", str(2**63 + 5), "--steps", "4", "--strength", "0.7", *inputs]
    output = tmp_path / "python.png"
    command = [
        str(coreml_sd),
        "generate",
        str(toy_folder),
        *options,
        "--scheduler",
        "euler-ancestral",
        "-o",
        str(output),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return output


def test_either_program_repeats_the_others_picture(
    drawn_by_python: Path, coreml_sd: Path, swift_program: Swift, tmp_path: Path
) -> None:
    swift, again = tmp_path / "swift.png", tmp_path / "again.png"
    done = swift_program("generate", "--from", str(drawn_by_python), "-o", str(swift))
    assert done.returncode == 0, done.stderr
    assert _pixels(swift) == _pixels(drawn_by_python)
    subprocess.run([coreml_sd, "generate", "--from", str(swift), "-o", str(again)], check=True, capture_output=True)
    assert _pixels(again) == _pixels(swift)
    told = {"models", "model", "safety_checker", "versions", "guess_mode"}  # Swift draws with no ControlNets
    records = [images.read_metadata(path) for path in (drawn_by_python, swift)]
    first, second = ({k: v for k, v in record.items() if k not in told and v is not None} for record in records)
    assert first == second


def test_a_picture_of_base_and_refiner_is_repeated(
    toy_with_refiner: Path, coreml_sd: Path, swift_program: Swift, tmp_path: Path
) -> None:
    python, swift, alone = (tmp_path / f"{name}.png" for name in ("python", "swift", "alone"))
    options = ["generate", str(toy_with_refiner), "--prompt", PROMPT, "--seed", "5", "--steps", "4"]
    ancestral = ["--scheduler", "euler-ancestral"]
    command = [str(coreml_sd), *options, *ancestral, "--refiner-start", "0.5", "-o", str(python)]
    subprocess.run(command, check=True, capture_output=True)
    done = swift_program("generate", "--from", str(python), "-o", str(swift))
    assert done.returncode == 0, done.stderr
    assert _pixels(swift) == _pixels(python)
    assert images.read_metadata(swift)["refiner_start"] == 0.5
    assert swift_program(*options, *ancestral, "-o", str(alone)).returncode == 0
    assert _pixels(alone) != _pixels(swift)


def test_the_readmes_quick_start_compiles(swift_program: Swift, tmp_path: Path) -> None:
    """As it is printed, against the library, as a program whose caller names a folder, a sketch and a file."""
    assert swift_program("help").returncode == 0
    readme = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    (printed,) = re.findall(r"```swift\n(// Package\.swift: .*?)```", readme, re.DOTALL)
    names = ("folder", "sketch", "file")
    given = "".join(f'let {name} = URL(fileURLWithPath: "{name}")\n' for name in names)
    source = tmp_path / "main.swift"
    modules = BUILT / "Modules"
    checks = ["swiftc", "-typecheck", "-swift-version", "6", "-warnings-as-errors", "-I", str(modules), str(source)]
    for text, is_right in ((printed, True), (printed.replace("generate(", "paint("), False)):
        source.write_text(f"import Foundation\n{given}{text}", encoding="utf-8")
        done = subprocess.run(checks, capture_output=True, text=True, check=False)
        assert (done.returncode == 0) is is_right, done.stderr


def test_an_input_that_changed_since_is_refused(
    drawn_by_python: Path, swift_program: Swift, tmp_path: Path
) -> None:
    Image.new("RGB", (80, 64), "red").save(tmp_path / "image.png")
    done = swift_program("generate", "--from", str(drawn_by_python))
    assert done.returncode == 2 and "has changed since" in done.stderr and "--image" in done.stderr


@pytest.mark.parametrize("is_chunked", [False, True], ids=["whole", "chunked"])
def test_folders_without_a_manifest(
    is_chunked: bool, toy_folder: Path, coreml_sd: Path, swift_program: Swift, tmp_path: Path
) -> None:
    """As Apple's converter writes them; of a UNet and its chunks, the chunks count."""
    folder = Path(shutil.copytree(toy_folder, tmp_path / "models"))
    (folder / manifest.FILE_NAME).unlink()
    if is_chunked:
        shutil.rmtree(folder / f"{toy_models.APPLE}unet.mlpackage")
        toy_models.chunks(folder)
    options = ["--prompt", PROMPT, "--seed", "5", "--steps", "4", "--latent-scale", "0.2"]
    swift, python = tmp_path / "swift.png", tmp_path / "python.png"
    done = swift_program("generate", str(folder), *options, "-o", str(swift))
    assert done.returncode == 0, done.stderr
    assert "has no manifest.json: taken for sd1, 64x64, epsilon prediction, latent scale 0.2" in done.stderr
    subprocess.run(
        [coreml_sd, "generate", str(folder), *options, "-o", str(python)], check=True, capture_output=True
    )
    assert _pixels(swift) == _pixels(python)
    again = tmp_path / "again.png"
    subprocess.run([coreml_sd, "generate", "--from", str(swift), "-o", str(again)], check=True, capture_output=True)
    assert _pixels(again) == _pixels(swift)


def test_ctrl_c_ends_with_130_and_leaves_nothing_half_written(
    toy_folder: Path, swift_environment: dict[str, str], swift_program: Swift, tmp_path: Path
) -> None:
    assert swift_program("help").returncode == 0
    program = BUILT / "coreml-sd-swift"
    options = ["--prompt", "x", "--steps", "40", "--count", "100", "--preview", "-o", "picture.png"]
    running = subprocess.Popen(
        [program, "generate", str(toy_folder), *options],
        cwd=tmp_path,
        env=swift_environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "picture-1.png").exists():
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGINT)
    output, words = running.communicate(timeout=60)
    assert running.returncode == 130 and "interrupted: " in words and "of 100 pictures are finished" in words
    written = sorted(tmp_path.iterdir())
    assert [path.name for path in written] == sorted(line.split()[0] for line in output.splitlines())
    for path in written:
        _pixels(path)


def test_what_cannot_be_done_is_one_line_and_exit_code_2(swift_program: Swift, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    plain = ("generate", str(tmp_path), "--prompt", "x", "-o", "x.png")
    for arguments in (
        ("generate", str(tmp_path / "nowhere"), "--prompt", "x", "-o", "x.png"),
        ("generate", str(tmp_path), "--prompt", "x"),
        ("generate", str(tmp_path), "-o", "x.png"),
        plain,
        (*plain, "--scheduler", "magic"),
        (*plain, "--steps", "many"),
        (*plain, "--strength", "2"),
        (*plain, "--refiner-start", "1"),
        (*plain, "--image", str(tmp_path / "text.png")),
        (*plain, "--image", str(tmp_path / "none.png")),
        ("generate", "--from", str(tmp_path / "text.png")),
        ("generate", str(tmp_path), "--prompt", "x", "-o", str(tmp_path / "text.png" / "x.png")),
        ("generate", str(tmp_path), "--colour", "red"),
        ("fly",),
    ):
        done = swift_program(*arguments)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def _pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()
