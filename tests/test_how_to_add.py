"""README's "How to add …": a made-up attention kind, component, family and task, in a copy of the packages.

The copy is changed as README says and nowhere else; then the commands are run as a user would run them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tiny_checkpoints

pytestmark = pytest.mark.slow

Run = Callable[..., str]
"""`coreml-sd` of the packages with made-up entries, and what it says."""

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (ROOT / "convert" / "diffusion_convert", ROOT / "runtime" / "diffusion_runtime")
KIND, FAMILY, COMPONENT, COMPILED, TASK = (
    "split_query",
    "sketch",
    "text_encoder_4",
    "TextEncoder4",
    "sketch to image",
)
CHANNELS = 6

ENTRIES = {
    '    SPLIT_EINSUM = "split_einsum"\n': '    SPLIT_QUERY = "split_query"\n',
    "_ATTENTION: Mapping[AttentionKind, Attention] = {\n": (
        "    AttentionKind.SPLIT_QUERY: Attention("
        '"cpu-and-ne", "made-up devices", einsum=True, query_chunk=32, stands_in_for="split_einsum"),\n'
    ),
    "COMPONENTS: Mapping[str, ComponentNames] = {\n": (
        f'    "{COMPONENT}": ComponentNames("{COMPILED}", "{COMPONENT}"),\n'
    ),
    "    for family in (\n": f'        Family("{FAMILY}", "Made-up sketch", {CHANNELS}),\n',
}
"""What is put below which line of families.py."""

ATTENTION_FILE = """
from diffusion_convert.networks.attention.split_einsum import attend_head, join, split, split_heads

def attend(query, key, value, heads, scale, mask=None):
    sizes = [32] * (query.shape[3] // 32)
    heads_of = split_heads(query, key, value, heads, scale)
    chunked = [[attend_head(part, k, v, mask) for part in split(q, sizes, dim=3)] for q, k, v in heads_of]
    return join([join(parts, dim=3) for parts in chunked], dim=1)
"""
COMPONENT_FILE = """
import numpy as np
from diffusion_convert.checkpoint import torch_networks
from diffusion_convert.components.component import Component, Graph, Port
from diffusion_convert.components.text_encoder import Reference, prompt_ids
from diffusion_convert.networks.attention import ATTENTION
from diffusion_convert.networks.clip import TextEncoder

def build(checkpoint, attention, shape):
    model = torch_networks.build(checkpoint, "text_encoder_4")
    config = checkpoint.models["text_encoder_4"].config
    width = config["hidden_size"]
    return Graph(
        module=Reference(model, False) if attention is None else TextEncoder(model, ATTENTION[attention]).eval(),
        inputs=(Port("input_ids", (1, 77), "float32", "ids"),),
        outputs=(
            Port("last_hidden_state", (1, 77, width), "float32", "states"),
            Port("pooled_outputs", (1, width), "float32", "state"),
        ),
        sample=lambda seed: {"input_ids": prompt_ids(config, seed).astype(np.float32)},
    )

TEXT_ENCODER_4 = Component("text_encoder_4", build, min_psnr_db=60.0)
"""
TASK_FILE = """
from diffusion_runtime import images
from diffusion_runtime.denoising import Start
from diffusion_runtime.tasks import text_to_image
from diffusion_runtime.tasks.job import Prepared, Task

def prepare(job):
    small = images.to_tensor(job.image(job.latent_size), *job.latent_size)
    return Prepared(Start(text_to_image.noise_latents(job), job.scheduler.timesteps), channels=small[:, :2])

TASK = Task("sketch to image", 6, text_to_image.check, prepare, "--image", needs=frozenset({"image"}))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two packages with the entries and files that README names."""
    folder = tmp_path_factory.mktemp("packages")
    convert, runtime = (shutil.copytree(package, folder / package.name) for package in PACKAGES)
    for line, entry in ENTRIES.items():
        put_below(runtime / "families.py", line, entry)
    (convert / "networks" / "attention" / f"{KIND}.py").write_text(ATTENTION_FILE, encoding="utf-8")
    (convert / "components" / f"{COMPONENT}.py").write_text(COMPONENT_FILE, encoding="utf-8")
    (runtime / "tasks" / "sketch_to_image.py").write_text(TASK_FILE, encoding="utf-8")
    tasks = runtime / "tasks" / "__init__.py"
    put_below(
        tasks,
        "from diffusion_runtime.errors import InputError\n",
        "from diffusion_runtime.tasks import sketch_to_image\n",
    )
    put_below(tasks, "TASKS: tuple[Task, ...] = (\n", "    sketch_to_image.TASK,\n")
    return folder


def put_below(path: Path, line: str, entry: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(line) == 1, (path, line)
    path.write_text(text.replace(line, line + entry), encoding="utf-8")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the made-up family, with the network of the made-up component."""
    folder = tmp_path_factory.mktemp("checkpoint") / "made-up"
    tiny_checkpoints.build("sd2-base", folder, in_channels=CHANNELS)
    shutil.copytree(folder / "text_encoder", folder / COMPONENT)
    path = folder / "model_index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**index, COMPONENT: index["text_encoder"]}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(source: Path, coreml_sd: Path, shared: Path) -> Run:
    def said(*arguments: object) -> str:
        command = [str(coreml_sd), *map(str, arguments)]
        environment = {
            **os.environ,
            "PYTHONPATH": str(source),
            "COREML_SD_REMEMBERED": str(shared / "remembered"),
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return said


@pytest.fixture(scope="module")
def models(run: Run, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "models"
    said = run("convert", checkpoint, "-o", folder, "--attention", KIND)
    assert "--image photo.png" in said  # what comes next: what the family's task has to be given
    return folder


def test_it_is_converted_bundled_and_zipped(run: Run, models: Path) -> None:
    (models / "README.md").unlink()
    for path in models.glob("*.zip"):
        path.unlink()
    run("bundle", models, "--zip")
    zips = {f"coreml-made-up_{kind}_compiled.zip" for kind in (KIND, "split_einsum")}
    assert {path.name for path in models.glob("*.zip")} == zips
    assert (models / KIND / "compiled" / f"{COMPILED}.mlmodelc" / "model.mil").is_file()
    card = (models / "README.md").read_text(encoding="utf-8")
    assert f"| `{KIND}` | CPU and Neural Engine | made-up devices |" in card
    assert "pipeline_tag: image-to-image" in card
    described = json.loads((models / KIND / "compiled" / "manifest.json").read_text(encoding="utf-8"))
    assert described["family"] == FAMILY
    assert described["components"]["unet"]["compute_units"] == "cpu-and-ne"


def test_it_is_inspected(run: Run, models: Path) -> None:
    (folder,) = json.loads(run("inspect", models / KIND / "packages", "--json"))
    names = {model["name"]: model["attention"] for model in folder["models"]}
    assert names["Stable_Diffusion_version_made-up_unet.mlpackage"] == KIND
    assert f"Stable_Diffusion_version_made-up_{COMPONENT}.mlpackage" in names


def test_it_is_verified(run: Run, models: Path, checkpoint: Path) -> None:
    rows = [line.split() for line in run("verify", models, "--against", checkpoint).splitlines()[1:]]
    verified = {(folder, component) for folder, component, *_, verdict in rows if verdict == "ok"}
    assert {
        (f"{KIND}/{kind}", name) for kind in ("packages", "compiled") for name in ("unet", COMPONENT)
    } <= verified


def test_it_makes_pictures(run: Run, models: Path, tmp_path: Path) -> None:
    sketch, picture = tmp_path / "sketch.png", tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(sketch)
    run("generate", models, "--prompt", "a cat", "--image", sketch, "--steps", 2, "--seed", 1, "-o", picture)
    record = json.loads(Image.open(picture).text["coreml-sd"])  # type: ignore[attr-defined]
    assert (record["task"], record["family"], record["attention"]) == (TASK, FAMILY, KIND)


def test_it_is_known_without_a_manifest(run: Run, models: Path, tmp_path: Path) -> None:
    """What the interfaces and programs tell: as in folders that other tools made."""
    shutil.copytree(models / KIND / "packages", tmp_path / "plain")
    (tmp_path / "plain" / "manifest.json").unlink()
    said = run("bundle", tmp_path / "plain")
    assert "compiling" in said
    described = json.loads((tmp_path / "plain" / KIND / "packages" / "manifest.json").read_text(encoding="utf-8"))
    assert (described["family"], described["attention"]) == (FAMILY, KIND)
    assert COMPONENT in described["components"]
