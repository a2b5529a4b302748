"""`coreml-sd convert` as a process: exit codes, what it says, what it leaves."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import typer.main
from safetensors.torch import load_file, save_file

import small_bundle
from diffusion_convert import convert
from diffusion_convert.cli import convert as convert_command
from diffusion_convert.cli import main as cli
from diffusion_convert.conversion.convert import Conversion
from diffusion_convert.options import ConvertOptions
from diffusion_runtime.atomic import WORK_FOLDER
from diffusion_runtime.bundle import manifest
from diffusion_runtime.cli.console import INTERRUPTED
from diffusion_runtime.families import AttentionKind

# Where the tests' own parent ignores Ctrl-C, as nohup and background jobs of shells do, every child would too.
MAIN = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from diffusion_convert.cli.main import main; main()"
)
PARTS = ("text_encoder", "vae_encoder")


def start(python: str | Path, *arguments: object) -> subprocess.Popen[str]:
    command = [python, "-c", MAIN, "convert", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"}
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "macOS12"], "error: unknown target 'macOS12': expected one of macOS13"),
        (["--vae", "nowhere"], "error: --vae nowhere: no such file or folder"),
        (["--vae", "a" * 300], "File name too long"),
        (["--bogus"], "No such option: --bogus"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, tiny_checkpoint: Callable[[str], Path], forked_python: Path, tmp_path: Path
) -> None:
    process = start(forked_python, tiny_checkpoint("sd1"), "-o", tmp_path / "models", *arguments)
    shown, said = process.communicate(timeout=120)
    assert process.returncode == cli.BAD_INPUT
    assert message in said.splitlines()[-1]
    assert "Traceback" not in said
    assert shown == ""
    assert list(tmp_path.iterdir()) == []


def test_a_controlnet_of_another_family_is_one_line_and_exit_code_2(
    tiny_checkpoint: Callable[[str], Path], controlnets: Callable[[str], Path], forked_python: Path, tmp_path: Path
) -> None:
    net = controlnets("sdxl") / "edges"
    process = start(forked_python, tiny_checkpoint("sd1"), "-o", tmp_path / "models", "--controlnet", net)
    _, said = process.communicate(timeout=120)
    assert process.returncode == cli.BAD_INPUT
    assert said.splitlines()[-1].startswith(
        f"error: --controlnet {net}: is for another kind of model than sd1 (sd1): "
    )
    assert "Traceback" not in said
    assert not (tmp_path / "models").exists()


def test_ctrl_c_is_one_line_and_exit_code_130(
    tiny_checkpoint: Callable[[str], Path], forked_python: Path, tmp_path: Path
) -> None:
    """What is finished is kept and named; nothing can be seen of the rest; the same conversion goes on."""
    output = tmp_path / "models"
    options = ["--components", ",".join(PARTS), "--attention", "original", "--no-compiled"]
    process = start(forked_python, tiny_checkpoint("sd1"), "-o", output, *options)
    deadline = time.monotonic() + 120
    while not list(output.glob(f"{WORK_FOLDER}/*/parts/{PARTS[0]}/record.json")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    shown, said = process.communicate(timeout=120)
    assert process.returncode == INTERRUPTED, said
    assert (
        said.splitlines()[-1] == f"interrupted: {PARTS[0]} finished and kept; run the same command again to go on"
    )
    assert "Traceback" not in said
    assert shown == ""
    assert [path.name for path in output.iterdir()] == [WORK_FOLDER]

    parts = []
    again = ConvertOptions(attention=(AttentionKind.ORIGINAL,), components=PARTS, compiled=False)
    made = convert(tiny_checkpoint("sd1"), output, again, lambda event: parts.append(event.part))
    assert PARTS[0] not in parts
    assert PARTS[1] in parts
    assert tuple(made.variants["original"].components) == PARTS


def test_it_says_what_takes_long_where_the_result_is_and_what_comes_next(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a terminal, too."""
    output = tmp_path / "my models"
    options = ["--components", "text_encoder", "--attention", "split_einsum_v2", "--no-verify"]
    cli.app(["convert", str(tiny_checkpoint("sd2-depth")), "-o", str(output), *options], standalone_mode=False)
    shown, said = capsys.readouterr()
    assert "compiling split_einsum_v2\nzipping\n" in said
    places = [output / "split_einsum_v2" / kind for kind in ("packages", "compiled")]
    zips = sorted(str(path) for path in output.glob("*.zip"))
    assert len(zips) == 2
    assert shown.splitlines()[-3:] == [
        f"packages: {places[0]}",
        f"compiled: {places[1]}",
        f"zips: {', '.join(zips)}",
    ], "a text encoder alone makes no picture"

    made = manifest.read(places[0])
    needed = dict.fromkeys(("text_encoder", "unet", "vae_decoder"), made.components["text_encoder"])
    whole = made.model_copy(update={"components": needed})
    *_, last = convert_command._what_next(Conversion(output, made.family, {"split_einsum_v2": whole}, {}))
    assert last == (f"next: coreml-sd generate '{output}' --prompt \"...\" --image photo.png -o picture.png")


def test_every_note_is_said_once(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of the plan when work begins, those of the models when they are made."""
    source = shutil.copytree(tiny_checkpoint("sd1"), tmp_path / "sd1")
    path = source / "text_encoder" / "model.safetensors"
    tensors = {name: value.float() for name, value in load_file(path).items()}
    name = next(name for name in tensors if name.endswith("layers.0.mlp.fc1.bias"))
    tensors[name][0] = -1e5
    save_file(tensors, path)
    options = [
        "--components",
        "text_encoder",
        "--attention",
        "original",
        "--no-compiled",
        "--height=256",
        "--width=256",
    ]
    cli.app(["convert", str(source), "-o", str(tmp_path / "models"), *options], standalone_mode=False)
    shown, said = capsys.readouterr()
    notes = [line for line in (shown + said).splitlines() if line.startswith("note: ")]
    assert len(notes) == len(set(notes))
    assert [len([note for note in notes if part in note]) for part in ("was trained for", "text_encoder: ")] == [
        1,
        1,
    ]
    assert "note: " not in shown


def test_a_working_folder_that_was_removed_is_named(forked_python: Path, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    code = f"import os; os.chdir({str(tmp_path / 'gone')!r}); os.rmdir(os.getcwd())\n{MAIN}"
    command = [str(forked_python), "-c", code, "compile", str(tmp_path / "a.mlpackage"), "-o", "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == cli.BAD_INPUT
    assert done.stderr.splitlines()[-1:] == [
        "error: the working folder is not there any more; change to another one"
    ], done.stderr


def test_names_that_are_not_utf_8(forked_python: Path, tmp_path: Path) -> None:
    packages = small_bundle.write_bundle(tmp_path / "out", ("original",)) / "original" / "packages"
    output = os.fsencode(tmp_path) + b"/caf\xe9"
    command: list[str | bytes | Path] = [
        forked_python,
        "-c",
        MAIN,
        "compile",
        packages / f"{small_bundle.NAME}_unet.mlpackage",
        "-o",
        output,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "caf\\udce9/" in done.stdout
    assert os.listdir(output) == [f"{small_bundle.NAME}_unet.mlmodelc".encode()]  # noqa: PTH208


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    cli.app(["--version"], standalone_mode=False)
    assert capsys.readouterr().out == f"coreml-sd {version('coreml-sd')}\n"


def test_help_fits_80_columns_as_it_is_written() -> None:
    """Paragraphs are printed with their own line breaks: longer lines would be broken again, in examples too."""
    assert max(map(len, convert_command.CONVERT_HELP.splitlines())) <= 78


def test_help_swallows_nothing() -> None:
    """Square brackets are markup to the library that prints the help: what is in them does not appear."""
    commands = typer.main.get_group(cli.app).commands
    for name, command in commands.items():
        for parameter in command.params:
            assert "[" not in (getattr(parameter, "help", None) or ""), f"{name} {parameter.name}"
