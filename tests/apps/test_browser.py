"""Each app in headless Chromium: load, upload, click, result, error, download; nothing leaves the machine.

VISADAPT_SCREENSHOTS=docs/images writes the pictures of the documents, VISADAPT_RUNS=runs takes trained adapters.
"""

import os
import re
import shutil
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from visadapt.data.shapes import draw_scene

pytest.importorskip("gradio", reason="apps need Gradio: pip install 'visadapt[apps]'")
sync = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install playwright")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is missing: apt-get install chromium"),
]
WAIT = 60_000  # milliseconds; the machine may be busy


@pytest.fixture(scope="module")
def browser():
    with sync.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield made
        made.close()


@pytest.fixture
def page(browser):
    """A page that notes every request; none may go to another host."""
    made = browser.new_page(viewport={"width": 1280, "height": 860})
    made.set_default_timeout(WAIT)
    asked, failed = [], []
    made.on("request", lambda request: asked.append(request.url))
    made.on("pageerror", lambda error: failed.append(str(error)))
    yield made
    hosts = {urlsplit(url).hostname for url in asked if urlsplit(url).scheme not in ("data", "blob")}
    made.close()
    assert hosts == {"127.0.0.1"}
    assert not failed


def picture(page, name: str) -> None:
    if folder := os.environ.get("VISADAPT_SCREENSHOTS"):
        page.wait_for_timeout(1500)
        page.screenshot(path=f"{folder}/app_{name}.png", full_page=True)
        image = Image.open(f"{folder}/app_{name}.png").convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE)
        image.save(f"{folder}/app_{name}.png", optimize=True)


def upload(page, *paths) -> None:
    page.locator("input[type=file]:visible, input[type=file]").first.set_input_files([str(path) for path in paths])


def complains(page, text: str) -> None:
    toast = page.locator(".toast-body").filter(has_text=text)
    toast.first.wait_for()


def broken(folder: Path) -> Path:
    (folder / "broken.png").write_text("not a picture")
    return folder / "broken.png"


def test_classify(page, served, tmp_path):
    page.goto(served("classify"))
    page.locator("#examples button img").nth(3).click()
    page.locator("#adapted").get_by_text("%").first.wait_for()
    assert page.locator("#base").get_by_text("%").count() >= 5
    picture(page, "classify")
    before = page.locator("#adapted").inner_text()
    page.locator("input[type=number]").first.fill("0")
    page.get_by_role("button", name="Classify").click()
    page.wait_for_function("before => document.querySelector('#adapted').innerText !== before", arg=before)
    assert page.locator("#adapted").inner_text().split()[1:] == page.locator("#base").inner_text().split()[1:]
    page.get_by_label("Clear").first.click()
    upload(page, broken(tmp_path))
    complains(page, "this is no picture")


def test_segment(page, served, tmp_path):
    page.goto(served("segment"))
    page.locator("#examples_automatic button img").first.click()
    page.get_by_text("railway_0").first.wait_for()
    page.get_by_role("button", name="Find").click()
    page.get_by_text("of the pixels are").wait_for()
    page.locator("#mask img").first.wait_for()
    picture(page, "segment")
    page.get_by_role("tab", name="Clicks and boxes").click()
    page.locator("#examples_clicked button img").first.click()
    canvas = page.locator("#canvas img")
    canvas.wait_for()
    box = canvas.bounding_box()  # of a picture of 256 pixels, letterboxed
    side = min(box["width"], box["height"])
    left, top = (box["width"] - side) / 2, (box["height"] - side) / 2
    canvas.click(position={"x": left + 206 / 256 * side, "y": top + 168 / 256 * side})
    link = page.locator("a[download$='mask.png']:visible")
    link.first.wait_for()
    with page.expect_download() as found:
        link.first.click()
    mask = np.asarray(Image.open(found.value.path()))
    truth = draw_scene(99, 13, 256, train=False)[1]
    truth = truth == truth[168, 206]
    assert ((mask > 0) & truth).sum() / ((mask > 0) | truth).sum() > 0.8
    picture(page, "segment_clicks")
    page.locator("button[aria-label='Clear']:visible, button[aria-label='Remove this file']:visible").first.click()
    page.locator("input[type=file]").last.set_input_files(str(broken(tmp_path)))
    complains(page, "this is no picture")


def test_adapters(page, served, digits_adapter, tmp_path):
    page.goto(served("adapters"))
    page.locator("#sample").click()
    page.get_by_text(".safetensors").first.wait_for()
    page.get_by_role("button", name="Inspect").click()
    page.get_by_text("visadapt adapter").first.wait_for()
    page.locator("#norms img").wait_for()
    page.get_by_role("button", name="Convert").click()
    link = page.locator("#result a[download]")
    link.first.wait_for()
    picture(page, "adapters")
    with page.expect_download() as found:
        link.first.click()
    assert any(name.endswith("adapter_config.json") for name in zipfile.ZipFile(found.value.path()).namelist())
    page.get_by_label("Clear").first.click()
    (tmp_path / "evil.safetensors").write_bytes(b"\x80\x04.")
    upload(page, tmp_path / "evil.safetensors")
    complains(page, "hidden under the name .safetensors")


def test_text_to_image(page, served, picture_run, tmp_path):
    page.goto(served("text_to_image"))
    prompt = page.locator("#prompt textarea")
    prompt.fill("a sks shape on bricks")
    page.get_by_label("number input for Pictures").fill("2" if "VISADAPT_RUNS" not in os.environ else "4")
    page.get_by_label("number input for Steps").fill("2" if "VISADAPT_RUNS" not in os.environ else "20")
    page.get_by_role("button", name="Render").click()
    page.locator("#sheet img").wait_for(timeout=3 * WAIT)
    link = page.locator("#files a[download]")
    link.first.wait_for()
    picture(page, "text_to_image")
    with page.expect_download() as found:
        link.first.click()
    assert Image.open(found.value.path()).format == "PNG"
    upload(page, shutil.copy(picture_run, tmp_path / "mine.safetensors"))
    added = page.get_by_label("number input for Strength of mine")
    added.wait_for()
    before = page.locator("#sheet img").get_attribute("src")
    added.fill("0.5")
    page.get_by_role("button", name="Render").click()
    page.wait_for_function("src => document.querySelector('#sheet img').src !== src", arg=before)
    page.locator("#files a[download]").last.wait_for()
    prompt.fill("")
    page.get_by_role("button", name="Render").click()
    complains(page, "there is no prompt yet")
    (tmp_path / "evil.safetensors").write_bytes(b"\x80\x04.")
    page.get_by_label("Clear").first.click()
    upload(page, tmp_path / "evil.safetensors")
    complains(page, "hidden under the name .safetensors")


def test_text_to_video(page, served, tmp_path):
    page.goto(served("text_to_video"))
    page.get_by_label(re.compile("number input for Strength of .*: temporal")).fill("0.9")
    page.get_by_role("button", name="Render").click()
    page.locator("#animation img").wait_for()
    picture(page, "text_to_video")
    link = page.locator("#files a[download$='adapted_seed0.gif']")
    link.wait_for()
    with page.expect_download() as found:
        link.click()
    with Image.open(found.value.path()) as file:
        assert (file.format, file.n_frames) == ("GIF", 8 if os.environ.get("VISADAPT_RUNS") else 3)
    page.locator("#prompt textarea").fill("")
    page.locator("#prompt textarea").press("Enter")
    complains(page, "there is no prompt yet")
    page.locator("input[type=file]").first.set_input_files(str(broken(tmp_path)))
    complains(page, "broken.png")
