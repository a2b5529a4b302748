"""`make demo`: converts the repository's small trained checkpoint and draws four pictures with the result.

Runs the two commands that a user runs, prints them, and judges each picture with a measure that knows nothing of
the model, so that a demo that draws the wrong thing says so and fails.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from judge_shapes import judge

ROOT = Path(__file__).resolve().parent.parent
COMMAND = str(Path(sys.executable).with_name("coreml-sd"))
PROMPTS = (
    "a large red circle on a white background",
    "a small blue square on a yellow background",
    "a large green triangle on a black background",
    "a small yellow circle on a blue background",
)


def run(*arguments: str) -> str:
    """Run one coreml-sd command in the repository's root; returns it as a user would type it."""
    shown = shlex.join(["coreml-sd", *arguments])
    print(f"\n$ {shown}", flush=True)
    code = subprocess.run([COMMAND, *arguments], cwd=ROOT, check=False).returncode
    if code:
        raise SystemExit(code)
    return shown


def swift(*arguments: str) -> str:
    """Run the Swift program with these arguments, built first; it runs models by this environment's command."""
    start = ["swift", "run", "--package-path", "swift_bridge", "-c", "release", "coreml-sd-swift", *arguments]
    print(f"\n$ {shlex.join(start)}", flush=True)
    environment = {**os.environ, "COREML_SD_COMMAND": COMMAND}
    code = subprocess.run(start, cwd=ROOT, env=environment, check=False).returncode
    if code:
        raise SystemExit(code)
    return shlex.join(start)


def contact_sheet(pictures: list[Path], output: Path) -> None:
    """The pictures side by side, each 192 px wide."""
    sheet = Image.new("RGB", (200 * len(pictures) - 8, 192), "gray")
    for index, path in enumerate(pictures):
        with Image.open(path) as picture:
            sheet.paste(picture.resize((192, 192), Image.Resampling.LANCZOS), (200 * index, 0))
    sheet.save(output)


def main() -> int:
    started = time.perf_counter()
    convert = run("convert", "tests/checkpoints/shapes", "-o", "demo/models", "--attention", "original")
    (ROOT / "demo" / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    draw = swift if "--swift" in sys.argv[1:] else run
    generate = draw(
        "generate", "demo/models", "--prompts-file", "demo/prompts.txt", "--steps", "25", "--seed", "1",
        "-o", "demo/picture.png",
    )  # fmt: skip
    pictures = [ROOT / "demo" / f"picture-{number}.png" for number in range(1, len(PROMPTS) + 1)]
    contact_sheet(pictures, ROOT / "demo" / "pictures.png")
    print(f"\nFour pictures, made in {time.perf_counter() - started:.0f} s, side by side in demo/pictures.png:")
    wrong = 0
    for prompt, path in zip(PROMPTS, pictures, strict=True):
        with Image.open(path) as picture:
            seen = judge(picture.convert("RGB"))
        shown = f"a {seen.size} {seen.color} {seen.shape} on a {seen.background} background"
        wrong += shown != prompt
        print(f"  {path.relative_to(ROOT)}  should show {prompt}: {'yes' if shown == prompt else f'NO, {shown}'}")
    print(f"The two commands that made them:\n  {convert}\n  {generate}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
