"""`coreml-sd serve`: the real server as a process, with toy models."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from PIL import Image

from diffusion_runtime.loading import load_pipeline
from diffusion_runtime.schedulers import SCHEDULERS
from diffusion_runtime.serve import pages
from diffusion_runtime.serve.apis.web_ui import KARRAS, SAMPLERS
from serving import COMMAND, SHORT, Served, in_base64, left_mask, pixels, score, serving, start_image

PROMPT = "a private prompt"
EVERYWHERE = "0.0.0.0"  # noqa: S104 with a key


Serve = Callable[..., Served]


@pytest.fixture(scope="module")
def served(toy_folder: Path, forked_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("served") / "log.txt"
    with serving(log, f"toy={toy_folder}", "--queue", 2, "--max-body", 1, python=forked_python) as one:
        yield one
    assert PROMPT not in log.read_text()


@pytest.fixture
def serve(forked_python: Path, tmp_path: Path) -> Iterator[Serve]:
    started: list[Served] = []

    def start(*arguments: object) -> Served:
        started.append(Served(tmp_path / f"log{len(started)}.txt", *arguments, python=forked_python))
        return started[-1]

    yield start
    for one in started:
        one.stop()


@pytest.fixture(scope="module")
def expected(toy_folder: Path) -> Callable[..., bytes]:
    """The pixels that the pipeline itself makes."""
    pipeline = load_pipeline(toy_folder, "torch")

    def pixels(**arguments: Any) -> bytes:
        made: bytes = pipeline(PROMPT, **{**SHORT, **arguments}).images[0].tobytes()
        return made

    return pixels


def test_score_is_azures(served: Served, expected: Callable[..., bytes]) -> None:
    asked = score(["prompt"], PROMPT, "another")
    asked["input_data"]["index"] = [0, 1]
    answer = served.client.post("/score", json=asked)
    assert answer.status_code == 200, answer.text
    first, second = answer.json()
    assert list(first) == ["prompt", "generated_image", "nsfw_content_detected"]
    assert (first["prompt"], second["prompt"], first["nsfw_content_detected"]) == (PROMPT, "another", False)
    assert pixels(first["generated_image"]) == expected()


def test_score_takes_pictures_and_masks(served: Served, expected: Callable[..., bytes]) -> None:
    columns = ["image", "prompt", "mask_image", "negative_prompt"]
    start, mask = in_base64(start_image()), in_base64(left_mask())
    answer = served.client.post("/score", json=score(columns, [start, PROMPT, mask, "grey"], guidance_scale=3))
    assert pixels(answer.json()[0]["generated_image"]) == expected(
        image=start_image(), mask_image=left_mask(), negative_prompt="grey", guidance_scale=3
    )


def test_eta_changes_what_ddim_makes(served: Served, toy_folder: Path) -> None:
    pipeline = load_pipeline(toy_folder, "torch", scheduler="ddim")
    plain, noisy = (
        pipeline(PROMPT, num_inference_steps=3, seed=5, eta=eta).images[0].tobytes() for eta in (0.0, 0.8)
    )
    asked = score(["prompt"], PROMPT, scheduler="ddim", eta=0.8)
    made = pixels(served.client.post("/score", json=asked).json()[0]["generated_image"])
    assert made == noisy != plain
    body = {"prompt": PROMPT, "seed": 5, "steps": 3, "cfg_scale": 7.5, "sampler_name": "DDIM", "eta": 0.8}
    assert pixels(served.client.post("/sdapi/v1/txt2img", json=body).json()["images"][0]) == made
    refused = served.client.post("/score", json=score(["prompt"], PROMPT, eta=2))
    assert refused.status_code == 422 and "eta" in refused.json()["error"]["message"]


def test_openais_client_works_unchanged(served: Served, expected: Callable[..., bytes]) -> None:
    with openai.DefaultHttpxClient(trust_env=False) as http:
        _ask(openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", http_client=http), expected)


def _ask(client: openai.OpenAI, expected: Callable[..., bytes]) -> None:
    answer = client.images.generate(
        model="dall-e-2", prompt=PROMPT, n=2, response_format="b64_json", extra_body=SHORT
    )
    assert answer.data is not None and len(answer.data) == 2
    assert pixels(str(answer.data[0].b64_json)) == expected()
    assert pixels(str(answer.data[1].b64_json)) == expected(seed=6)
    written = io.BytesIO(base64.b64decode(in_base64(left_mask(transparent=True))))
    edited = client.images.edit(
        model="toy",
        prompt=PROMPT,
        image=("a.png", base64.b64decode(in_base64(start_image()))),
        mask=("m.png", written),
        extra_body=SHORT,
    )
    assert edited.data is not None
    assert pixels(str(edited.data[0].b64_json)) == expected(image=start_image(), mask_image=left_mask())
    with pytest.raises(openai.BadRequestError, match="Unknown parameter: 'negativ'"):
        client.images.generate(prompt=PROMPT, extra_body={"negativ": "x"})
    with pytest.raises(openai.BadRequestError, match="64x64"):
        client.images.generate(prompt=PROMPT, size="512x512")
    with pytest.raises(openai.BadRequestError, match="response_format"):
        client.images.generate(prompt=PROMPT, response_format="url")
    assert [model.id for model in client.models.list()] == ["toy"]


def test_edits_take_one_picture_however_clients_spell_it(served: Served, expected: Callable[..., bytes]) -> None:
    form = {"prompt": PROMPT, "num_inference_steps": "3", "seed": "5", "model": "gpt-image-1"}
    picture = ("a.png", base64.b64decode(in_base64(start_image())), "image/png")
    for name in ("image", "image[]"):
        answer = served.client.post("/v1/images/edits", data=form, files=[(name, picture)])
        assert answer.status_code == 200, answer.text
        assert pixels(answer.json()["data"][0]["b64_json"]) == expected(image=start_image())
    for names in ((), ("image", "image"), ("image[]", "image[]"), ("image", "image[]")):
        files = [(name, picture) for name in names] or [("mask", picture)]
        answer = served.client.post("/v1/images/edits", data=form, files=files)
        assert answer.status_code == 400
        assert answer.json()["detail"] == f"image: got {len(names)} pictures, expected one"
    guided = {**form, "image_guidance_scale": "1.5"}  # of models that edit
    answer = served.client.post("/v1/images/edits", data=guided, files=[("image", picture)])
    assert answer.status_code == 400 and "given an image and an image guidance scale" in answer.text


def test_the_web_uis_front_ends_work_unchanged(served: Served, expected: Callable[..., bytes]) -> None:
    asked = {
        "prompt": PROMPT,
        "seed": 5,
        "steps": 3,
        "width": 512,
        "height": 512,
        "n_iter": 2,
        "save_images": False,
    }
    answer = served.client.post("/sdapi/v1/txt2img", json={**asked, "sampler_name": "Euler a"}).json()
    assert pixels(answer["images"][0]) != pixels(answer["images"][1])
    info = json.loads(answer["info"])
    assert (info["all_seeds"], info["width"], len(answer["images"])) == ([5, 6], 64, 2)
    assert "64x64 alone" in info["notes"][0]
    plain = served.client.post("/sdapi/v1/txt2img", json={**asked, "n_iter": 1, "cfg_scale": 3}).json()
    assert pixels(plain["images"][0]) == expected(guidance_scale=3.0)
    again = {**asked, "n_iter": 1, "init_images": [f"data:image/png;base64,{in_base64(start_image())}"]}
    changed = served.client.post(
        "/sdapi/v1/img2img", json={**again, "denoising_strength": 0.6, "cfg_scale": 3, "mask": ""}
    ).json()
    assert pixels(changed["images"][0]) == expected(image=start_image(), strength=0.6, guidance_scale=3.0)
    assert {one["name"] for one in served.client.get("/sdapi/v1/samplers").json()} == set(SAMPLERS)
    assert served.client.get("/sdapi/v1/sd-models").json()[0]["model_name"] == "toy"
    assert served.client.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == "toy"
    assert served.client.get("/sdapi/v1/progress").json()["progress"] == 0.0


def test_the_web_uis_samplers_are_ours(served: Served) -> None:
    assert set(SAMPLERS.values()) <= SCHEDULERS.keys()
    assert {f"{name} karras" for name in KARRAS} <= SCHEDULERS.keys()
    for name, schedule, used in (
        ("DPM++ 2M", "Karras", "dpm++ 2m karras"),
        ("DPM++ 2M Karras", None, "dpm++ 2m karras"),
    ):
        asked = {"prompt": "a", "seed": 5, "steps": 3, "sampler_name": name, "scheduler": schedule}
        answer = served.client.post("/sdapi/v1/txt2img", json=asked).json()
        picture = Image.open(io.BytesIO(base64.b64decode(answer["images"][0])))
        assert json.loads(picture.text["coreml-sd"])["scheduler"] == used  # type: ignore[attr-defined]


CONTROLNET = {"controlnet": {"args": [{"model": "canny", "image": ""}]}}
"""How clients of the web UI ask its ControlNet extension to steer."""


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/score", score(["prompt", "imag"], ["a", "b"]), 400, "imag"),
        ("/score", score(["prompt"], ["a", "b"]), 400, "2 values for 1 columns"),
        ("/score", score(["prompt"], "a", num_inference_steps=1000), 400, "expected 1 to 150"),
        ("/score", score(["prompt"], "a", steps=3), 400, "Unknown parameter"),
        ("/score", score(["prompt"], *["a"] * 11), 400, "1 to 10 per request"),
        ("/score", score(["prompt"], "a" * 20000), 400, "20000 characters"),
        ("/score", score(["prompt", "image"], ["a", "/etc/passwd"]), 400, "is not base64"),
        ("/score", score(["prompt", "image"], ["a", "http://127.0.0.1/x.png"]), 400, "is not base64"),
        ("/score", score(["prompt", "image"], ["a", "QUJD"]), 400, "not a picture"),
        ("/score", score(["prompt"], "a", image_guidance_scale=1.5), 400, "given an image guidance scale"),
        ("/score", {**score(["prompt"], "a"), "model": "other"}, 400, "unknown model 'other': expected one of toy"),
        ("/score", {"input_data": 3}, 422, "input_data"),
        ("/score", score(["prompt"], "a", seed=True), 422, "seed"),
        ("/v1/images/generations", {"prompt": "a", "n": "2"}, 400, "n"),
        ("/v1/images/generations", {"prompt": "a", "n": 0}, 400, "n"),
        ("/sdapi/v1/txt2img", {"prompt": "a", "enable_hr": True}, 400, "enable_hr"),
        ("/sdapi/v1/txt2img", {"prompt": "a", "alwayson_scripts": CONTROLNET}, 400, "alwayson_scripts"),
        ("/sdapi/v1/txt2img", {"prompt": "a", "sampler_name": "Fast"}, 400, "unknown sampler"),
        ("/sdapi/v1/img2img", {"prompt": "a", "init_images": []}, 422, "init_images"),
        ("/nowhere", {}, 404, "Not Found"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(
    served: Served, path: str, body: dict[str, Any], status: int, said: str
) -> None:
    answer = served.client.post(path, json=body)
    assert answer.status_code == status and said in answer.json()["error"]["message"]
    assert answer.json()["detail"] == answer.json()["error"]["message"]


def test_a_picture_bomb_is_refused_by_its_header(served: Served) -> None:
    bomb = Image.new("1", (9000, 9000))
    answer = served.client.post("/score", json=score(["prompt", "image"], ["a", in_base64(bomb)]))
    assert answer.status_code == 400 and "9000x9000 pixels" in answer.text


@pytest.mark.parametrize(
    "headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Host": "127.0.0.1.evil.example:80"}]
)
def test_other_names_and_other_servers_pages_are_refused(served: Served, headers: dict[str, str]) -> None:
    assert served.client.get("/health/live", headers=headers).status_code in (403, 421)
    assert served.client.get("/health/live", headers={"Origin": served.url}).status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_is_refused_and_not_kept(served: Served, chunked: bool) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * (1 << 20)

    answer = served.client.post("/score", content=parts() if chunked else b" " * (100 << 20))
    assert answer.status_code == 413 and "1 MiB" in answer.text


def test_nested_and_broken_json_is_refused(served: Served) -> None:
    for body in (b"[" * 100_000, b"{", b"\xff", b'{"input_data": NaN}'):
        answer = served.client.post("/score", content=body, headers={"content-type": "application/json"})
        assert answer.status_code in (400, 422), answer.text


def test_a_full_queue_is_429_with_a_time_and_nobody_else_suffers(served: Served) -> None:
    long = score(["prompt"], *["a"] * 10, num_inference_steps=20)
    refused: list[httpx.Response] = []
    while not refused:  # on a busy machine the first may be done before the last asks
        with ThreadPoolExecutor(6) as threads:
            answers = list(threads.map(lambda _: served.client.post("/score", json=long), range(6)))
        refused = [answer for answer in answers if answer.status_code == 429]
        assert {answer.status_code for answer in answers if answer not in refused} == {200}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)


def test_pictures_of_many_clients_are_not_mixed_up(served: Served, expected: Callable[..., bytes]) -> None:
    def ask(seed: int) -> bytes:
        while True:
            answer = served.client.post("/score", json=score(["prompt"], PROMPT, seed=seed))
            if answer.status_code == 200:
                return pixels(answer.json()[0]["generated_image"])
            assert answer.status_code == 429
            time.sleep(0.05)

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(ask, range(24)))
    assert found == [expected(seed=seed) for seed in range(24)]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_a_worker_that_is_killed_loses_no_request(served: Served, expected: Callable[..., bytes]) -> None:
    with ThreadPoolExecutor(1) as thread:
        asked = score(["prompt"], PROMPT, *["a"] * 5, num_inference_steps=60)
        waiting = thread.submit(served.client.post, "/score", json=asked)
        time.sleep(0.5)
        for pid in served.workers:
            os.kill(pid, signal.SIGKILL)
        answer = waiting.result()
    assert answer.status_code == 200, answer.text
    assert pixels(answer.json()[0]["generated_image"]) == expected(num_inference_steps=60)


def test_what_the_server_is_told(served: Served) -> None:
    assert served.client.get("/health/live").json() == {"status": "live"}
    assert served.client.get("/health/ready").json() == {"status": "ready"}
    told = served.client.get("/metrics").text
    for name in (
        "requests_total",
        "queue",
        "stage_seconds_sum",
        "step_seconds_count",
        'models_loaded{model="toy"} 1',
    ):
        assert f"coreml_sd_{name}" in told
    page = served.client.get("/docs").text
    document = served.client.get("/openapi.json").json()
    assert page == pages.reference(document) and "src=" not in page and "http" not in page.replace("http-equiv", "")
    assert all(path in page for path in ("/score", "/v1/images/edits", "/sdapi/v1/img2img"))


def test_sigterm_finishes_what_runs_and_refuses_what_waits(serve: Serve, toy_folder: Path) -> None:
    one = serve(f"toy={toy_folder}")
    long = score(["prompt"], *["a"] * 10, num_inference_steps=150)
    answers: list[httpx.Response] = []
    threads = [
        threading.Thread(
            target=lambda: answers.append(httpx.post(f"{one.url}/score", json=long, timeout=300, trust_env=False))
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    while one.metric("queue") != 2 and not answers:
        time.sleep(0.02)
    one.process.terminate()
    for thread in threads:
        thread.join()
    assert sorted(answer.status_code for answer in answers) == [200, 503, 503]
    assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 503)
    assert one.process.wait(60) == 0


def test_a_deadline_and_keys(serve: Serve, toy_folder: Path, tmp_path: Path) -> None:
    key = "k" * 20
    (tmp_path / "keys.txt").write_text(f"{'a' * 20}\n{key}\n")
    options = ("--api-key-file", tmp_path / "keys.txt", "--deadline", 1, "--max-steps", 1000)
    one = serve(f"toy={toy_folder}", *options, "--host", EVERYWHERE)
    url = one.url.replace(EVERYWHERE, "127.0.0.1")
    with httpx.Client(base_url=url, trust_env=False, timeout=100) as client:
        assert client.get("/health/ready").status_code == 200
        assert client.get("/metrics").status_code == 401
        assert client.get("/metrics", headers={"Authorization": f"Bearer {key[1:]}"}).status_code == 401
        basic = base64.b64encode(f"user:{key}".encode()).decode()
        for headers in ({"Authorization": f"Bearer {key}"}, {"api-key": key}, {"Authorization": f"Basic {basic}"}):
            assert client.get("/metrics", headers=headers).status_code == 200
        late = client.post(
            "/score", json=score(["prompt"], *["a"] * 10, num_inference_steps=900), headers={"api-key": key}
        )
        assert late.status_code == 504 and "1 s" in late.text
    assert one.stop() == 0
    assert key not in one.log.read_text()


def test_several_models_share_a_memory_budget(
    serve: Serve, toy_folder: Path, expected: Callable[..., bytes]
) -> None:
    one = serve(f"a={toy_folder}", f"b={toy_folder}", "--memory-budget", 0.01)
    for name in ("b", "a", "b"):
        answer = one.client.post("/score", json={**score(["prompt"], PROMPT), "model": name})
        assert pixels(answer.json()[0]["generated_image"]) == expected()
        loaded = re.findall(r'models_loaded{model="(\w)"} 1.0', one.client.get("/metrics").text)
        assert loaded == [name]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", EVERYWHERE], "--api-key-file"),
        (["--host", EVERYWHERE, "--api-key-file", "short.txt"], "at least 16 characters"),
        (["--host", "203.0.113.7", "--api-key-file", "keys.txt"], "cannot be listened to"),
        (["x={models}"], "{models}"),
        (["nothing"], "nothing: no such folder"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    toy_folder: Path, forked_python: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    (tmp_path / "short.txt").write_text("abc\n")
    (tmp_path / "keys.txt").write_text("k" * 20)
    folders = [f"x={toy_folder}"]
    shown = subprocess.run(
        [forked_python, *COMMAND[1:], *folders, *(one.format(models=toy_folder) for one in arguments)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert shown.returncode == 2, shown.stderr
    assert said.format(models=toy_folder) in shown.stderr.splitlines()[-1]
