"""The clients that people have, with the trained checkpoint: each gets the picture that `generate` draws."""

from __future__ import annotations

import base64
import io
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
import webuiapi
from PIL import Image

from diffusion_runtime.loading import load_pipeline
from judge_shapes import Caption, judge
from serving import Served, left_mask, pixels, serving

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
CAPTION = Caption("circle", "red", "large", "white")
STEPS, SEED, SCALE = 25, 1, 7.5

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def generate(coreml_sd: Path) -> Callable[..., object]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as many threads as the server's worker has
    return lambda *arguments: subprocess.run(
        [coreml_sd, "generate", *map(str, arguments), "--backend", "torch"], check=True, env=environment
    )


@pytest.fixture(scope="module")
def served(shapes_folder: Path, forked_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("served") / "log.txt"
    with serving(log, f"shapes={shapes_folder}", python=forked_python) as one:
        yield one


@pytest.fixture(scope="module")
def expected(
    generate: Callable[..., object], shapes_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Image.Image:
    """What the command draws for `CAPTION`."""
    file = tmp_path_factory.mktemp("generate") / "circle.png"
    options = {"--prompt": CAPTION.text, "--steps": STEPS, "--seed": SEED, "--guidance-scale": SCALE, "-o": file}
    words = [str(word) for option in options.items() for word in option]
    generate(shapes_folder, *words)
    picture = Image.open(file).convert("RGB")
    assert judge(picture).shows(CAPTION)
    return picture


@pytest.fixture
def web_ui(served: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("NO_PROXY", "*")
    client = webuiapi.WebUIApi(port=served.port, sampler="Automatic", steps=STEPS)
    yield client
    client.session.close()


def test_openais_client(served: Served, expected: Image.Image) -> None:
    with openai.DefaultHttpxClient(trust_env=False) as http:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", http_client=http)
        answer = client.images.generate(
            model="gpt-image-1",
            prompt=CAPTION.text,
            extra_body={"seed": SEED, "num_inference_steps": STEPS, "guidance_scale": SCALE},
        )
    assert answer.data is not None and answer.size == "64x64"
    assert pixels(str(answer.data[0].b64_json)) == expected.tobytes()


def test_a_client_of_the_web_ui(web_ui: Any, shapes_folder: Path, expected: Image.Image) -> None:
    asked = {"prompt": CAPTION.text, "seed": SEED, "cfg_scale": SCALE}
    made = web_ui.txt2img(**asked, width=64, height=64)
    assert made.image.convert("RGB").tobytes() == expected.tobytes()
    assert (made.info["seed"], made.info["notes"]) == (SEED, [])
    pipeline = load_pipeline(shapes_folder, "torch")
    arguments: dict[str, Any] = {"num_inference_steps": STEPS, "seed": SEED, "guidance_scale": SCALE}
    changed = web_ui.img2img(images=[expected], denoising_strength=0.6, **asked)
    again = pipeline(CAPTION.text, image=expected, strength=0.6, **arguments).images[0]
    assert changed.image.convert("RGB").tobytes() == again.tobytes()
    painted = web_ui.img2img(images=[expected], mask_image=left_mask(), denoising_strength=0.9, **asked)
    again = pipeline(CAPTION.text, image=expected, mask_image=left_mask(), strength=0.9, **arguments).images[0]
    assert painted.image.convert("RGB").tobytes() == again.tobytes()
    assert "inpaint_full_res, mask_blur, inpainting_fill: not followed" in painted.info["notes"][0]


def test_a_client_of_the_web_ui_looks_around(web_ui: Any) -> None:
    assert web_ui.util_get_model_names() == [web_ui.util_get_current_model()] == ["shapes"]
    assert {"Euler a", "DPM++ 2M", "DDIM"} <= set(web_ui.util_get_sampler_names())
    assert web_ui.util_get_scheduler_names() == ["automatic", "karras"]
    for sampler in web_ui.util_get_sampler_names():
        assert web_ui.txt2img(prompt=CAPTION.text, sampler_name=sampler, steps=2).info["sampler_name"] == sampler
    web_ui.util_wait_for_ready()
    assert web_ui.interrupt() == {}


def path_of(command: str) -> str:
    return next(word for word in shlex.split(command) if word.startswith("http")).partition("8000")[2]


CURLS = re.findall(r"^curl .*?(?<!\\)\n", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.skipif(
    not (shutil.which("curl") and shutil.which("jq") and shutil.which("bash")), reason="needs curl, jq and bash"
)
@pytest.mark.parametrize("command", CURLS, ids=path_of)
def test_curl_as_readme_prints_it(served: Served, expected: Image.Image, tmp_path: Path, command: str) -> None:
    """README's port may be another server's here: curl is told, in its own settings, to go to this one."""
    assert CAPTION.text in command and f'"seed": {SEED}' in command and f'steps": {STEPS}' in command
    there = f'connect-to = "127.0.0.1:8000:127.0.0.1:{served.port}"\nnoproxy = "*"\n'
    (tmp_path / ".curlrc").write_text(there)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=tmp_path,
        env={**os.environ, "CURL_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "circle.png").convert("RGB").tobytes() == expected.tobytes()


def test_readme_has_a_line_for_each_api() -> None:
    assert {"/v1/images/generations", "/score", "/sdapi/v1/txt2img"} <= set(map(path_of, CURLS))


def test_a_picture_tells_how_it_was_made(
    served: Served, generate: Callable[..., object], shapes_folder: Path, tmp_path: Path
) -> None:
    """`generate --from` draws a served picture once more."""
    body = {"prompt": CAPTION.text, "seed": SEED, "num_inference_steps": 5, "scheduler": "ddim"}
    answer = httpx.post(f"{served.url}/v1/images/generations", json=body, timeout=300, trust_env=False).json()
    data = base64.b64decode(answer["data"][0]["b64_json"])
    (tmp_path / "served.png").write_bytes(data)
    generate(shapes_folder, "--from", tmp_path / "served.png", "-o", tmp_path / "again.png")
    pictures = [Image.open(source).convert("RGB") for source in (io.BytesIO(data), tmp_path / "again.png")]
    assert pictures[0].tobytes() == pictures[1].tobytes()
