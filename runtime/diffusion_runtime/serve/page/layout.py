"""The page's controls, and what happens when they are used."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from diffusion_runtime.errors import InputError
from diffusion_runtime.picture_size import Size, parse_size
from diffusion_runtime.schedulers import SCHEDULERS
from diffusion_runtime.serve.orders import About, Lost, Order, Refused
from diffusion_runtime.serve.page.drawing import Drawings, every, failed
from diffusion_runtime.serve.service import Service, decoded
from diffusion_runtime.tasks.job import DEFAULT_NOISE_LEVEL, DEFAULT_STRENGTH

if TYPE_CHECKING:
    import gradio

HERE = Path(__file__).parent
STEPS = 25
FONTS = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")
OWN_SCHEDULER = "the checkpoint's own"
STRENGTHS = {"none": DEFAULT_STRENGTH, "picture": DEFAULT_STRENGTH, "mask": 1.0}
"""As `tasks.Request` fills them in."""


def blocks(service: Service, most: int) -> gradio.Blocks:
    """The page. What is drawn with it goes through the service; ``most`` bytes of a request."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at import, too
    import gradio as gr

    with gr.Blocks(title="coreml-sd", analytics_enabled=False, fill_width=True) as made:
        page = _Page(service, Drawings(service), _controls(gr, service, most))
        page.connect(gr, made)
    made.queue(default_concurrency_limit=None, api_open=False)  # the engine's queue is the one that counts
    return made


def _controls(gr: Any, service: Service, most: int) -> SimpleNamespace:
    """Gradio's components by what they are."""
    of = SimpleNamespace()  # Gradio lays components out where they are made: so they are made in nested blocks
    names = list(service.engine.sets)
    gr.HTML("<h1>coreml-sd</h1>")
    with gr.Row(equal_height=False):
        with gr.Column(min_width=300):
            of.prompt = gr.Textbox(label="Prompt", lines=2, max_lines=8)
            of.negative = gr.Textbox(label="Negative prompt", info="What the picture should not show")
            with gr.Row():
                of.draw = gr.Button("Draw", variant="primary", min_width=120)
                of.cancel = gr.Button("Cancel", min_width=120)
            of.start = _part(gr, "start", most=most)
            of.strength = gr.Slider(
                0.01, 1, DEFAULT_STRENGTH, step=0.01, label="Strength", visible=False,
                info="How much of the picture may change",
            )  # fmt: skip
            of.noise_level = gr.Slider(0, 350, DEFAULT_NOISE_LEVEL, step=1, label="Noise level", visible=False)
            with gr.Row():
                of.model = gr.Dropdown(names, value=names[0], label="Models", visible=len(names) > 1, min_width=130)
                of.size = gr.Dropdown(["…"], value="…", label="Size", interactive=False, min_width=130)
            most_steps = service.limits.steps
            of.steps = gr.Slider(1, most_steps, min(STEPS, most_steps), step=1, label="Steps")
            with gr.Row():
                of.guidance = gr.Textbox(label="Guidance", placeholder="the models' own", min_width=130)
                of.seed = gr.Textbox(label="Seed", placeholder="new each time", min_width=130)
            of.scheduler = gr.Dropdown([OWN_SCHEDULER, *SCHEDULERS], value=OWN_SCHEDULER, label="Scheduler")
        with gr.Column(min_width=300):
            of.made = _part(gr, "made")
    # In the order of `_Page.draw`.
    of.asked = [of.model, of.prompt, of.negative, of.start, of.strength, of.noise_level]
    of.asked += [of.steps, of.guidance, of.scheduler, of.seed, of.size]
    return of


def _part(gr: Any, name: str, **given: Any) -> Any:
    """What Gradio has not: its HTML never changes, its JavaScript reads and sets its value, which is JSON."""
    html, script = ((HERE / f"{name}.{kind}").read_text(encoding="utf-8") for kind in ("html", "js"))
    return gr.HTML("", html_template=html, js_on_load=script, apply_default_css=False, elem_id=name, **given)


@dataclass(frozen=True, slots=True)
class _Page:
    service: Service
    drawings: Drawings
    controls: SimpleNamespace

    def connect(self, gr: Any, page: Any) -> None:
        of, quiet = self.controls, {"show_progress": "hidden", "api_visibility": "private"}

        # Gradio finds what it has to give to a function by the annotations.
        async def draw(request: gr.Request, *values: Any) -> AsyncIterator[str]:
            async for told in self.draw(str(request.session_hash), *values):
                yield json.dumps(told)

        def cancel(request: gr.Request) -> None:
            self.drawings.cancel(str(request.session_hash))

        async def describe(model: str) -> list[Any]:
            return await self.describe(gr, model)

        async def given(event: gr.EventData, model: str, strength: float) -> Any:
            return await self.given(gr, model, strength, str(event._data["kind"]))

        def reuse(event: gr.EventData) -> str:
            return str(event._data["seed"])

        draw.__annotations__["request"] = cancel.__annotations__["request"] = gr.Request
        given.__annotations__["event"] = reuse.__annotations__["event"] = gr.EventData
        triggers = [of.draw.click, of.prompt.submit, of.negative.submit]
        gr.on(triggers, draw, of.asked, of.made, concurrency_limit=None, trigger_mode="once", **quiet)
        of.cancel.click(cancel, None, None, queue=False, **quiet)
        described = [of.size, of.start, of.noise_level]
        page.load(describe, of.model, described, **quiet)
        of.model.change(describe, of.model, described, **quiet)
        # "multiple": the mask may be painted before the picture's strength is there.
        of.start.given(given, [of.model, of.strength], of.strength, trigger_mode="multiple", **quiet)
        of.made.reuse(reuse, None, of.seed, **quiet)

    async def draw(self, tab: str, model: str, *asked: Any) -> AsyncIterator[dict[str, Any]]:
        try:
            order = await self.order(model, *asked)
        except (Refused, Lost) as error:
            yield failed(error)
            return
        async for told in self.drawings.follow(tab, order, model):
            yield told

    async def order(
        self,
        model: str,
        prompt: str,
        negative: str,
        start: str,
        strength: float,
        noise_level: int,
        steps: int,
        guidance: str,
        scheduler: str,
        seed: str,
        size: str,
    ) -> Order:
        """Raises Refused, and Lost where the models cannot be loaded."""
        about = await self.service.about(model)
        image, mask = _pictures(start)
        wanted = self.service.wanted(
            prompt,
            negative_prompt=negative,
            steps=int(steps),
            guidance_scale=_number(guidance),
            seed=_seed(seed),
            scheduler=None if scheduler == OWN_SCHEDULER else scheduler,
            strength=float(strength) if "strength" in about.uses else None,
            noise_level=int(noise_level) if "noise_level" in about.uses else None,
            image=image,
            mask=mask,
            size=_size(about, size),
        )
        return self.service.order([wanted], every(int(steps)))

    async def describe(self, gr: Any, model: str) -> list[Any]:
        """The sizes, the parts for a picture and the noise level that the models take."""
        try:
            about = await self.service.about(model)
        except Lost as error:
            return [gr.Dropdown([str(error)], value=str(error), interactive=False), gr.skip(), gr.skip()]
        sizes = list(map(str, about.sizes))
        size = gr.Dropdown(sizes, value=sizes[0], interactive=len(sizes) > 1)
        told = {"picture": _takes_pictures(about), "mask": "mask" in about.uses, "needs": _needs(about.needs)}
        return [size, gr.HTML(**told), gr.Slider(visible="noise_level" in about.uses)]

    async def given(self, gr: Any, model: str, strength: float, kind: str) -> Any:
        """Strength is asked for where there is a picture, and as far as nobody chose it, is what the task has."""
        uses = (await self.service.about(model)).uses
        value = STRENGTHS.get(kind) if strength in STRENGTHS.values() else strength
        return gr.Slider(value=value, visible=kind != "none" and "strength" in uses)


def _takes_pictures(about: About) -> bool:
    # What an upscaler starts from it sees as it is, without an encoder.
    return "image" in about.uses and (about.can_start_from_pictures or "noise_level" in about.uses)


def _needs(needs: Sequence[str]) -> str:
    if not needs:
        return ""
    return "These models need a picture" + (" and a painted mask." if "mask" in needs else ".")


def _size(about: About, chosen: str) -> Size | None:
    """Raises Refused for what is no size of the models: others may have been chosen since."""
    if len(about.sizes) == 1:
        return None
    try:
        return about.size(*parse_size(chosen))
    except InputError as error:
        raise Refused(str(error)) from None


def _pictures(start: str) -> tuple[bytes | None, bytes | None]:
    """The picture and the mask that the page has. Raises Refused."""
    try:
        given = json.loads(start or "{}")
        image, mask = given.get("image"), given.get("mask")
    except (ValueError, AttributeError, RecursionError):
        raise Refused("the picture: is not what the page sends") from None
    return tuple(  # type: ignore[return-value]
        decoded(one, name) if isinstance(one, str) and one else None
        for name, one in (("picture", image), ("mask", mask))
    )


def _number(text: str) -> float | None:
    try:
        return float(text) if (text or "").strip() else None
    except ValueError:
        raise Refused(f"guidance {text[:30]!r}: expected a number, or nothing for the models' own") from None


def _seed(text: str) -> int | None:
    text = (text or "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= 20):
        raise Refused(f"seed {text[:30]!r}: expected a whole number, or nothing for a new one each time")
    return int(text)
