"""What callers import: it is there, documented, typed, and found to be wrong by a type checker where it is."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
import typing
from pathlib import Path
from types import ModuleType

import pytest

import diffusion_convert
import diffusion_runtime
from diffusion_convert import AttentionKind, ConvertOptions, Lora, Precision
from diffusion_runtime import callbacks
from diffusion_runtime.arguments import Arguments

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (diffusion_runtime, diffusion_convert)
NAMES = [(package, name) for package in PACKAGES for name in package.__all__]

CLIENT = """
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from diffusion_convert import AttentionKind, Conversion, ConvertOptions, Event, Lora, Precision, convert
from diffusion_runtime import ComputeUnits, InputError, Pipeline, Request, Result, RuntimeNote, Step, load_pipeline


def report(event: Event) -> None:
    print(event.part, event.phase, event.fraction)


ConvertOptions(attention="original", precision="float32", components="unet,vae_decoder", vae=Path("vae"))
ConvertOptions(attention=["original", AttentionKind.SPLIT_EINSUM_V2], loras="style.safetensors:0.8")
ConvertOptions(loras=[Lora("a.safetensors", 0.5), "b.safetensors", Path("c")], precision=Precision.AUTO)
made: Conversion = convert("checkpoint", Path("models"), ConvertOptions(nbits=6), report)
pipe: Pipeline = load_pipeline(made.output, compute_units=ComputeUnits.CPU_AND_GPU)


def step(step: Step) -> None:
    preview: Image.Image = pipe.preview(step)
    preview.save("preview.png")


result: Result[list[Image.Image]] = pipe("a cat", num_inference_steps=25, seed=2**63, on_step=step, clip_skip=None)
result.images[0].save("cat.png")
array: np.ndarray = pipe("a cat", output_type="np").images
tensor: torch.Tensor = pipe(["a cat", "a dog"], output_type="latent", negative_prompt="red").images
Request(("a cat",), steps=3)
try:
    load_pipeline("nowhere")
except InputError as error:
    print(error)
"""
WRONG = {
    'pipe("a cat", num_inference_step=25)': "num_inference_step",
    'pipe("a cat", steps=25)': "steps",
    'pipe("a cat", guidance_scale="7")': "guidance_scale",
    'pipe("a cat", output_type="jpeg")': "output_type",
    'pipe("a cat", image="cat.png")': "image",
    'pipe("a cat", output_type="np").images.save("x.png")': "save",
    'tensor = pipe("a cat", output_type="np").images': "Tensor",
    "ConvertOptions(nbit=6)": "nbit",
    "ConvertOptions(attention=3)": "attention",
    'load_pipeline("models", schedular="ddim")': "schedular",
    'pipe("a cat").image': "image",
}


def type_check(folder: Path, text: str) -> str:
    path = folder / "client.py"
    path.write_text(text, encoding="utf-8")
    # Of torch the one name that clients see: more than half of the time would be its thousand modules'.
    torch, config = folder / "stubs" / "torch" / "__init__.pyi", folder / "pyproject.toml"
    torch.parent.mkdir(parents=True)
    torch.write_text("from typing import Any\nclass Tensor: ...\ndef __getattr__(name: str) -> Any: ...\n")
    skipped = '\n[[tool.mypy.overrides]]\nmodule = ["torch.*"]\nfollow_imports = "skip"\n'
    config.write_text((ROOT / "pyproject.toml").read_text() + skipped)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", str(config), str(path)]
    paths = os.pathsep.join(map(str, (folder / "stubs", ROOT / "convert", ROOT / "runtime")))
    cache = {"MYPY_CACHE_DIR": str(folder / "cache"), "MYPYPATH": paths}
    run = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **cache}, check=False
    )
    return run.stdout + run.stderr


@pytest.mark.slow
def test_a_client_is_type_checked(tmp_path: Path) -> None:
    """Right lines pass, and every wrong one is found where it stands."""
    first = CLIENT.count("\n") + 1
    shown = type_check(tmp_path, CLIENT + "\n".join(WRONG) + "\n")
    found = [line for line in shown.splitlines() if "client.py:" in line]
    lines = {int(line.split("client.py:")[1].split(":")[0]) for line in found if ": error:" in line}
    assert lines == set(range(first, first + len(WRONG))), shown


@pytest.mark.parametrize(("package", "name"), NAMES, ids=lambda value: getattr(value, "__name__", value))
def test_hints_of_public_names_can_be_resolved(package: ModuleType, name: str) -> None:
    value = getattr(package, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert typing.get_type_hints(value).keys() >= inspect.get_annotations(value).keys()
    if inspect.isclass(value) and value.__module__.startswith("diffusion_"):
        for member in vars(value).values():
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if inspect.isfunction(function) and function.__module__ == value.__module__:
                typing.get_type_hints(function)


@pytest.mark.parametrize(("package", "name"), NAMES, ids=lambda value: getattr(value, "__name__", value))
def test_public_names_are_documented(package: ModuleType, name: str) -> None:
    value = getattr(package, name)
    assert name in dir(package)
    assert name == "Progress" or len(value.__doc__ or "") > 30


@pytest.mark.parametrize("function", ["load_pipeline", "Pipeline.__call__", "convert"])
def test_every_argument_is_documented(function: str) -> None:
    found: typing.Any = diffusion_convert if function == "convert" else diffusion_runtime
    for part in function.split("."):
        found = getattr(found, part)
    names = [name for name in inspect.signature(found).parameters if name != "self"]
    if "arguments" in names:  # by their TypedDict; what can do nothing is documented where it is declared
        names = [*names[:-1], *Arguments.__annotations__.keys() - callbacks.NEUTRAL.keys(), "clip_skip"]
    arguments = inspect.getdoc(found).partition("Args:")[2].partition("Returns:")[0]  # type: ignore[union-attr]
    documented = [
        name.strip()
        for line in arguments.splitlines()
        if line.startswith("    ") and not line.startswith("     ") and ":" in line
        for name in line.partition(":")[0].split(",")
    ]
    assert sorted(documented) == sorted(names)
    assert "Raises:" in (found.__doc__ or "")


def test_api_pages_are_built_without_a_warning(tmp_path: Path) -> None:
    """As `make docs` builds them."""
    recipe = next(line for line in (ROOT / "Makefile").read_text().splitlines() if "-m pdoc" in line)
    arguments = recipe.partition("python ")[2].partition(" && ")[0].replace(" site ", f" {tmp_path} ").split()
    made = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    page = (tmp_path / "diffusion_runtime.html").read_text()
    assert all(f'id="{name}"' in page for name in diffusion_runtime.__all__)


def test_unknown_names_are_missing() -> None:
    for package in PACKAGES:
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            getattr(package, "nothing")  # noqa: B009


def test_options_have_a_hash() -> None:
    one, same = ConvertOptions(nbits_for={"unet": 6}), ConvertOptions(nbits_for={"unet": 6})
    assert hash(one) == hash(same) and one == same
    assert len({ConvertOptions(), ConvertOptions(), ConvertOptions(attention="original"), one}) == 3
    assert hash(Lora("a", parts={"te": 0.5})) == hash(Lora(Path("a"), parts=(("te", 0.5),)))


@pytest.mark.parametrize("kind", [ConvertOptions, Lora])
def test_what_type_checkers_see_of_options_is_what_there_is(kind: type) -> None:
    """Their signature for type checkers is written by hand."""
    tree = ast.parse(inspect.getsource(kind))
    (written,) = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    assert [argument.arg for argument in written.args.args] == ["self", *inspect.signature(kind).parameters]


def test_documented_spellings_become_the_declared_types() -> None:
    made = ConvertOptions(
        attention="original", precision="float32", components="unet,vae_decoder", loras="a.pt:0.8"
    )
    assert made.attention == (AttentionKind.ORIGINAL,) and made.precision is Precision.FLOAT32
    assert made.components == ("unet", "vae_decoder") and made.loras == (Lora(Path("a.pt"), 0.8),)
