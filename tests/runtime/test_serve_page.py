"""The page of `coreml-sd serve --ui` in a real browser, with the trained checkpoint."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2 as httpx
import pytest
from PIL import Image, ImageDraw

from diffusion_convert import convert
from diffusion_convert.options import ConvertOptions
from diffusion_runtime.loading import load_pipeline
from diffusion_runtime.pipeline import Pipeline
from serving import Served

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

SHAPES = Path(__file__).resolve().parents[1] / "checkpoints" / "shapes"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
PROMPT, STEPS = "a large red square on a blue background", 8
MANY = 80
"""Steps that take longer than the page waits between two tellings, on an idle machine too."""
LONG = 150
KEY = "a key for the tests of the page"
LOGIN: Any = {"username": "anyone", "password": KEY}
EVERYWHERE = "0.0.0.0"  # noqa: S104 with a key
CONTROLS = (
    "button", "link", "textbox", "searchbox", "combobox", "listbox", "slider", "spinbutton", "checkbox", "radio",
    "application", "progressbar",
)  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not here: make page has it (the extra ui)"),
    pytest.mark.skipif(BROWSER is None, reason=f"no browser is here: none of {', '.join(BROWSERS)} on PATH"),
    pytest.mark.skipif(not (SHAPES / "model_index.json").is_file(), reason="the trained checkpoint is not here"),
]


@pytest.fixture(scope="module")
def models(build_once: Callable[..., Path]) -> Path:
    options = ConvertOptions("original", sizes="64x64,96x64", compiled=False, zip=False, verify=False)
    return build_once("page-shapes", lambda to: convert(SHAPES, to / "models", options)) / "models"


@pytest.fixture(scope="module")
def served(models: Path, browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that other machines may reach, so that every test goes by its key."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "keys.txt").write_text(KEY)
    rules = ("--host", EVERYWHERE, "--api-key-file", folder / "keys.txt", "--queue", 2)
    one = Served(folder / "log.txt", models, "--ui", *rules)
    one.url = one.url.replace(EVERYWHERE, "127.0.0.1")
    one.client = httpx.Client(base_url=one.url, timeout=300, trust_env=False, headers={"Api-Key": KEY})
    yield one
    with browser.new_context(http_credentials=LOGIN) as context:
        context.new_page().goto(one.url)
        begun = time.monotonic()
        assert one.stop() == 0
        assert time.monotonic() - begun < 20  # though the page is still open
    log = one.log.read_text()
    assert "Traceback" not in log, log
    assert PROMPT not in log and KEY not in log


@pytest.fixture(scope="module")
def pipeline(models: Path) -> Pipeline:
    return load_pipeline(models, "torch")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    quiet = ["--no-sandbox", "--disable-background-networking", "--disable-component-update"]
    offline = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"  # what is elsewhere cannot be found
    with sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=BROWSER, args=[*quiet, offline])
        yield one
        one.close()


OpenTab = Callable[..., "Page"]


@pytest.fixture
def open_tab(browser: Browser, served: Served) -> Iterator[OpenTab]:
    """Opens the page; at the end, no request has left the machine, and the browser has complained of nothing."""
    contexts: list[BrowserContext] = []
    elsewhere: list[str] = []
    complaints: list[str] = []

    def opened(**options: Any) -> Page:
        context = browser.new_context(**{"viewport": DESKTOP, "http_credentials": LOGIN, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        own = (f"{served.url}/", "data:", f"blob:{served.url}/")
        page.on("request", lambda asked: None if asked.url.startswith(own) else elsewhere.append(asked.url))
        page.on("websocket", lambda asked: elsewhere.append(asked.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        page.goto(served.url)
        page.wait_for_function("[...document.querySelectorAll('input, textarea')].some(e => /64x64/.test(e.value))")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert elsewhere == []
    assert complaints == []


def ask(page: Page, prompt: str = PROMPT, seed: int | None = 5, steps: int = STEPS) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label("Seed").fill("" if seed is None else str(seed))
    page.get_by_role("spinbutton", name="Steps").fill(str(steps))
    page.get_by_role("button", name="Draw").click()


def wait_for(page: Page, start: str) -> str:
    """What the page says, as soon as it begins so."""
    page.locator(".sd-told").filter(has_text=re.compile(f"^{start}")).wait_for()
    return page.locator(".sd-told").inner_text()


def drawn(page: Page, count: int = 1) -> Image.Image:
    """The picture that can be downloaded, when the gallery has so many."""
    page.locator(".sd-gallery li").nth(count - 1).wait_for()
    wait_for(page, "Done")
    address = str(page.get_by_role("link", name="Download").get_attribute("href"))
    return Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))


def made(pipeline: Pipeline, prompt: str = PROMPT, seed: int = 5, **given: Any) -> bytes:
    arguments = {"num_inference_steps": STEPS, "seed": seed, **given}
    pixels: bytes = pipeline(prompt, **arguments).images[0].tobytes()
    return pixels


@pytest.fixture
def start(tmp_path: Path) -> Path:
    image = Image.new("RGB", (64, 64), "navy")
    ImageDraw.Draw(image).ellipse((10, 10, 50, 50), fill="orange")
    image.save(tmp_path / "start.png")
    return tmp_path / "start.png"


def test_a_picture_from_a_prompt_is_generates(open_tab: OpenTab, pipeline: Pipeline) -> None:
    page = open_tab()
    ask(page, steps=MANY)
    wait_for(page, "Step [0-9]+ of [0-9]+")
    assert page.get_by_role("progressbar").is_visible()
    page.get_by_role("img", name="Preview").wait_for()
    picture = drawn(page)
    assert picture.tobytes() == made(pipeline, num_inference_steps=MANY)
    record = json.loads(picture.info["coreml-sd"])
    page.get_by_text("How it was made").click()
    told = page.locator(".sd-how").inner_text()
    for name in ("prompt", "seed", "scheduler", "steps", "guidance_scale", "task", "model"):
        assert f"{name.replace('_', ' ')}\n{record[name]}" in told
    # A second one, of a new seed; then the first one's seed again, from the gallery.
    page.get_by_label("Seed").fill("")
    page.get_by_role("button", name="Draw").click()
    gallery = page.get_by_role("list", name="Gallery").get_by_role("button")
    assert drawn(page, 2).tobytes() != picture.tobytes()
    gallery.nth(1).click()
    assert drawn(page, 2).tobytes() == picture.tobytes()
    page.get_by_role("button", name="Use this seed").click()
    page.wait_for_function("[...document.querySelectorAll('input, textarea')].some(e => e.value === '5')")
    assert page.get_by_label("Seed").input_value() == "5"


def test_a_size_is_chosen_where_there_are_several(open_tab: OpenTab, pipeline: Pipeline) -> None:
    page = open_tab()
    page.get_by_role("combobox", name="Size").click()
    page.get_by_role("option", name="96x64", exact=True).click()
    ask(page)
    picture = drawn(page)
    assert picture.size == (96, 64)
    assert picture.tobytes() == made(pipeline, width=96, height=64)


def test_what_is_chosen_is_used(open_tab: OpenTab, pipeline: Pipeline) -> None:
    page = open_tab()
    page.get_by_label("Negative prompt").fill("yellow")
    page.get_by_label("Guidance").fill("3.5")
    page.get_by_role("combobox", name="Scheduler").click()
    page.get_by_role("option", name="dpm++ 2m karras", exact=True).click()
    ask(page, seed=2**64 - 1)
    picture = drawn(page)
    record = json.loads(picture.info["coreml-sd"])
    chosen = {"scheduler": "dpm++ 2m karras", "guidance_scale": 3.5, "negative_prompt": "yellow", "seed": 2**64 - 1}
    assert {name: record[name] for name in chosen} == chosen
    page.get_by_label("Seed").fill("five")
    page.get_by_role("button", name="Draw").click()
    assert "expected a whole number" in wait_for(page, "Seed 'five'")


def paint(page: Page) -> None:
    """Over the left half of the picture."""
    canvas = page.get_by_role("application")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    page.get_by_label("Size of the brush").fill("50")
    for y in (0.2, 0.5, 0.8):
        page.mouse.move(box["x"] + box["width"] * 0.1, box["y"] + box["height"] * y)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + box["height"] * y, steps=4)
        page.mouse.up()


def sent(page: Page, act: Callable[[], None]) -> dict[str, Image.Image]:
    """The picture and the mask that the page sends when it draws."""
    with page.expect_request(
        lambda asked: "queue/join" in asked.url and "data:image" in str(asked.post_data)
    ) as now:
        act()
    values = json.loads(str(now.value.post_data))["data"]
    (text,) = [value for value in values if isinstance(value, str) and value.startswith('{"image"')]
    found = {name: value for name, value in json.loads(text).items() if value}
    return {
        name: Image.open(io.BytesIO(base64.b64decode(value.partition(",")[2]))) for name, value in found.items()
    }


def test_a_picture_is_painted_in_where_the_mask_is(open_tab: OpenTab, pipeline: Pipeline, start: Path) -> None:
    page = open_tab()
    assert not page.get_by_label("Strength").first.is_visible()
    page.get_by_label("Start from a picture").last.set_input_files(start)
    page.get_by_role("application").wait_for()
    page.get_by_role("spinbutton", name="Strength").fill("0.6")
    assert set(sent(page, lambda: ask(page))) == {"image"}
    assert drawn(page).tobytes() == made(pipeline, image=Image.open(start), strength=0.6)
    paint(page)
    page.get_by_role("spinbutton", name="Strength").fill("1")
    given = sent(page, lambda: ask(page))
    mask = given["mask"].convert("L")
    assert given["image"].tobytes() == Image.open(start).tobytes()
    assert mask.size == (64, 64) and set(mask.tobytes()) == {0, 255}
    assert mask.getpixel((8, 32)) == 255 and mask.getpixel((56, 32)) == 0
    picture = drawn(page, 2)
    assert json.loads(picture.info["coreml-sd"])["task"].startswith("in-painting")
    assert picture.tobytes() == made(pipeline, image=Image.open(start), mask_image=mask)


def stops(served: Served, before: float) -> bool:
    """Whether no more steps are done, and not all of ``LONG`` were."""
    for _ in range(50):
        last = served.metric("step_seconds_count")
        time.sleep(0.4)
        if served.metric("step_seconds_count") == last:
            return last - before < LONG
    return False


def test_cancel_stops_within_a_step(open_tab: OpenTab, served: Served, pipeline: Pipeline) -> None:
    page, before = open_tab(), served.metric("step_seconds_count")
    ask(page, steps=LONG)
    wait_for(page, "Step")
    page.get_by_role("button", name="Cancel").click()
    wait_for(page, "Cancelled")
    assert stops(served, before)
    ask(page)
    assert drawn(page).tobytes() == made(pipeline)


def test_a_tab_that_is_closed_cancels_its_picture(open_tab: OpenTab, served: Served) -> None:
    page, before = open_tab(), served.metric("step_seconds_count")
    ask(page, steps=LONG)
    wait_for(page, "Step")
    page.close()
    assert stops(served, before)


def test_two_tabs_at_once_get_their_own_pictures(open_tab: OpenTab, pipeline: Pipeline) -> None:
    first, second = open_tab(), open_tab()
    other = "a small yellow circle on a green background"
    ask(first)
    ask(second, other, 6)
    assert drawn(first).tobytes() == made(pipeline)
    assert drawn(second).tobytes() == made(pipeline, other, 6)


def test_a_full_queue_is_said(open_tab: OpenTab, served: Served) -> None:
    page = open_tab()
    asked = {"input_data": {"columns": ["prompt"], "data": ["x"], "parameters": {"num_inference_steps": 60}}}
    with ThreadPoolExecutor(3) as threads:
        others = [threads.submit(served.client.post, "/score", json=asked) for _ in range(3)]
        while "coreml_sd_queue 2.0" not in served.client.get("/metrics").text:
            time.sleep(0.02)
        ask(page)
        assert "try again" in wait_for(page, "The queue is full")
        assert [other.result().status_code for other in others] == [200, 200, 200]


def press(page: Page, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def focus(page: Page, what: str) -> None:
    """Tab on until the control of that name, or that CSS selector, has the focus, and see that this shows."""
    named = """what => { const e = document.activeElement;
        const own = e.matches('button, summary, a') ? e.textContent : '';
        const label = [e.ariaLabel, ...[...(e.labels || [])].map(one => one.textContent), own].join(' ').trim();
        return label.startsWith(what); }"""
    for _ in range(60):
        press(page, "Tab")
        if page.evaluate(named, what):
            style = page.evaluate(
                "(e => [e.outlineStyle, e.boxShadow, e.borderColor])(getComputedStyle(document.activeElement))"
            )
            assert style[0] != "none" or style[1] != "none" or style[2], what
            return
    raise AssertionError(f"{what}: Tab does not lead there")


def test_it_works_by_keyboard_alone(open_tab: OpenTab, pipeline: Pipeline, start: Path) -> None:
    page = open_tab()
    focus(page, "Prompt")
    page.keyboard.type(PROMPT)
    focus(page, "Start from a picture")
    with page.expect_file_chooser() as chooser:
        press(page, "Enter")
    chooser.value.set_files(start)
    focus(page, "Mask")
    press(page, "Shift+ArrowLeft", "Shift+ArrowLeft", "Shift+ArrowUp", " ", "ArrowDown", " ", "ArrowDown", " ")
    focus(page, "number input for Steps")
    press(page, "Control+a")
    page.keyboard.type(str(STEPS))
    focus(page, "Seed")
    page.keyboard.type("5")
    focus(page, "Draw")
    mask = sent(page, lambda: press(page, "Enter"))["mask"].convert("L")
    assert mask.getpixel((19, 27)) == 255 and mask.getpixel((50, 50)) == 0
    assert drawn(page).tobytes() == made(pipeline, image=Image.open(start), mask_image=mask)
    focus(page, "Use this seed")
    focus(page, "How it was made")
    press(page, "Enter")
    assert page.locator(".sd-how").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_off_on_a_phone(open_tab: OpenTab, start: Path, scheme: str) -> None:
    page = open_tab(viewport=PHONE, color_scheme=scheme, has_touch=True)
    page.get_by_label("Start from a picture").last.set_input_files(start)
    page.get_by_role("application").wait_for()
    ask(page)
    drawn(page)
    page.get_by_text("How it was made").click()
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    wide = """() => [...document.querySelectorAll('button, input, textarea, img, canvas, a, dd')]
        .map(e => [e.outerHTML.slice(0, 80), e.getBoundingClientRect()])
        .filter(([, box]) => box.width > 0 && (box.left < 0 || box.right > innerWidth)).map(([text]) => text)"""
    assert page.evaluate(wide) == []
    assert (_brightness(page, "background-color") > _brightness(page, "color")) == (scheme == "light")


def _brightness(page: Page, what: str) -> float:
    text = page.evaluate("what => getComputedStyle(document.body).getPropertyValue(what)", what)
    return sum(map(float, re.findall(r"[\d.]+", text)[:3])) / 3


def test_every_control_has_a_name(open_tab: OpenTab, start: Path) -> None:
    page = open_tab()
    page.get_by_label("Start from a picture").last.set_input_files(start)
    page.get_by_role("application").wait_for()
    ask(page)
    drawn(page)
    client = page.context.new_cdp_session(page)
    nodes = client.send("Accessibility.getFullAXTree")["nodes"]
    assert sum(map(_is_control, nodes)) > 15
    unnamed = [node for node in nodes if _is_control(node) and not _name(node)]
    assert [client.send("DOM.describeNode", {"backendNodeId": one["backendDOMNodeId"]}) for one in unnamed] == []
    assert page.locator("img:not([alt]):visible, img[alt='']:visible").count() == 0


def _is_control(node: dict[str, Any]) -> bool:
    return not node.get("ignored") and str(node["role"]["value"]).lower() in CONTROLS


def _name(node: dict[str, Any]) -> str:
    return str(node.get("name", {}).get("value", "")).strip()


def test_without_the_key_the_browser_asks_for_it(served: Served) -> None:
    with httpx.Client(base_url=served.url, trust_env=False) as client:
        for path in ("/", "/theme.css", "/config", "/gradio_api/queue/data?session_hash=x"):
            refused = client.get(path)
            assert (refused.status_code, refused.headers["www-authenticate"][:6]) == (401, "Basic ")
        assert client.post("/gradio_api/queue/join", json={"data": []}).status_code == 401
    assert served.client.get("/", headers={"Host": "elsewhere.example"}).status_code == 421
    assert served.client.get("/", headers={"Origin": "http://elsewhere.example"}).status_code == 403


@pytest.mark.parametrize(
    "path",
    ["gradio_api/file=/etc/hosts", "gradio_api/upload", "gradio_api/proxy=http://127.0.0.1/", "manifest.json"],
)
def test_what_the_page_does_not_need_cannot_be_reached(served: Served, path: str) -> None:
    assert served.client.get(f"/{path}").status_code == 404
    assert served.client.post(f"/{path}").status_code == 404


def test_no_request_can_name_a_file_or_an_address(served: Served) -> None:
    file = {"path": "/etc/hosts", "url": "http://127.0.0.1/", "meta": {"_type": "gradio.FileData"}}
    asked: tuple[Any, ...] = ({"data": [file]}, {"data": [[file]]}, {"data": [], "event_data": {"kind": file}}, [])
    for values in asked:
        answer = served.client.post("/gradio_api/queue/join", json=values)
        assert (answer.status_code, answer.json()["detail"][:21]) == (400, "expected plain values")


def test_the_page_tells_browsers_to_load_nothing_from_elsewhere(served: Served) -> None:
    answer = served.client.get("/")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "fonts.g" not in answer.text and "cdn" not in served.client.get("/theme.css").text
