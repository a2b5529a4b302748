"""`coreml-sd serve` as a process, a client of it, and the pictures of requests and answers."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
from PIL import Image, ImageDraw

from forked import process_of

COMMAND = [sys.executable, "-c", "from diffusion_convert.cli.main import main; main()", "serve"]
SHORT = {"num_inference_steps": 3, "seed": 5}


class Served:
    """A server and a client of it. ``python`` runs it: `forked_python` where its start is not what is tested."""

    def __init__(self, log: Path, *arguments: object, python: str | Path = sys.executable) -> None:
        self.log, self.python = log, python
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [python, *COMMAND[1:], *map(str, arguments), "--port", "0", "--threads", "1"],
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + 300
        while "serving " not in log.read_text():
            assert self.process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        found = re.search(r"serving .* at (http://\S+)", log.read_text())
        assert found is not None
        self.url = found[1]
        self.client = httpx.Client(base_url=self.url, timeout=300, trust_env=False)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def pid(self) -> int:
        """Of the process that serves."""
        is_forked = self.python != sys.executable
        return process_of(Path(self.python), self.process) if is_forked else self.process.pid

    @property
    def workers(self) -> list[int]:
        """Processes below the server that hold models. Needs /proc."""
        found = subprocess.run(["pgrep", "-P", str(self.pid)], capture_output=True, text=True, check=False).stdout
        return [pid for pid in map(int, found.split()) if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels, as /metrics tells it."""
        told = self.client.get("/metrics").text
        return sum(map(float, re.findall(rf"^coreml_sd_{name}(?:{{.*}})? (\S+)$", told, re.MULTILINE)))

    def stop(self) -> int:
        self.client.close()
        self.process.terminate()
        return self.process.wait(300)


@contextmanager
def serving(log: Path, *arguments: object, python: str | Path = sys.executable) -> Iterator[Served]:
    one = Served(log, *arguments, python=python)
    try:
        yield one
    finally:
        ended = one.stop()
    assert ended == 0, log.read_text()


def decoded(text: str) -> Image.Image:
    """The picture that an answer holds in base64."""
    return Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")


def pixels(text: str) -> bytes:
    return decoded(text).tobytes()


def in_base64(image: Image.Image) -> str:
    written = io.BytesIO()
    image.save(written, "PNG")
    return base64.b64encode(written.getvalue()).decode()


def start_image() -> Image.Image:
    image = Image.new("RGB", (64, 64), "navy")
    ImageDraw.Draw(image).ellipse((10, 10, 50, 50), fill="orange")
    return image


def left_mask(transparent: bool = False) -> Image.Image:
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    if not transparent:
        return mask
    image = start_image().convert("RGBA")
    image.putalpha(mask.point(lambda value: 255 - value))
    return image


def score(columns: list[str], *rows: Any, **parameters: Any) -> dict[str, Any]:
    """A request for /score, `SHORT` where it says nothing else."""
    return {"input_data": {"columns": columns, "data": list(rows), "parameters": {**SHORT, **parameters}}}
