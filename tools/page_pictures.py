"""The page of `fluxmesh serve`, as the pictures of docs/: light, dark, and on a phone.

    python -m tools.page_pictures http://127.0.0.1:8420

Of a server that has painted a dozen pictures. Needs Chromium and `playwright`, as `make page`.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from tools.house import ROOT

LARGEST = 300_000  # bytes of a file
PROMPT = "two dogs on a green background"
SLOW = 600_000  # milliseconds
STEPS = "8"  # slow enough to be seen being painted


def opened(browser: Browser, url: str, width: int, height: int, colours: str) -> Page:
    context = browser.new_context(
        viewport={"width": width, "height": height},
        device_scale_factor=2 if width < 600 else 1,
        is_mobile=width < 600,
        has_touch=width < 600,
        color_scheme="dark" if colours == "dark" else "light",
        reduced_motion="reduce",
    )
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector("html[data-ready]", state="attached")
    page.locator("#hint-close").click()
    page.wait_for_load_state("networkidle")
    return page


def being_painted(page: Page) -> None:
    page.locator("#prompt").fill(PROMPT)
    page.locator("#more").click()
    page.locator("#steps").fill(STEPS)
    page.locator("#more").click()
    page.locator("#number").select_option("3")
    page.locator("#paint").click()
    page.locator(".tile:nth-child(2) img.preview").wait_for(timeout=SLOW)


def save(shot: bytes, name: str) -> Path:
    """Writes it with as many colours as fit."""
    path = ROOT / "docs" / name
    picture = Image.open(io.BytesIO(shot)).convert("RGB")
    picture.save(path, optimize=True)
    if path.stat().st_size > LARGEST:
        picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    return path


def main(url: str) -> None:
    with sync_playwright() as playwright:
        chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = opened(browser, url, 1280, 920, "light")
        being_painted(page)
        paths = [save(page.screenshot(), "page-light.png")]
        page.locator(".job").wait_for(state="detached", timeout=SLOW)
        page = opened(browser, url, 1280, 920, "dark")
        page.locator("#pictures li:nth-child(4) button").hover()
        paths.append(save(page.screenshot(), "page-dark.png"))
        page = opened(browser, url, 390, 844, "light")
        paths.append(save(page.screenshot(), "page-phone.png"))
        browser.close()
    for path in paths:
        print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1])
