"""A real Chromium before a real server on the embedded checkpoint."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from fluxmesh.weights import hub
from tests.adapter_files import write
from tests.server_process import ServerProcess, server

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ADAPTER = "blue mood"
WAIT = 60_000  # milliseconds for what a loaded machine may paint in

expect.set_options(timeout=WAIT)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    assert path, "These tests need Chromium: install it, or name one with CHROMIUM=/path/to/it."
    with sync_playwright() as playwright:
        # Without its own sandbox: CI runs as root.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("user")
    own = {"FLUXMESH_HOME": str(folder / "home"), "FLUXMESH_STATE": str(folder / "state")}
    # What is on the page while a picture is painted stays there until a test has looked.
    return {**os.environ, **own, "FLUXMESH_DELAYS": "step=0.3"}


def _adapter(folder: Path) -> None:
    """A LoRA for the embedded checkpoint, in the server's folder."""
    folder.mkdir(parents=True)
    size = hub.resolve("tiny").architecture.shape.hidden_size
    generator = np.random.default_rng(0)
    name = "transformer.single_transformer_blocks.0.attn.to_q"
    arrays = {
        f"{name}.lora_A.weight": generator.normal(size=(2, size)).astype(np.float32),
        f"{name}.lora_B.weight": generator.normal(size=(size, 2)).astype(np.float32),
    }
    write(folder / f"{ADAPTER}.safetensors", arrays)


@dataclass
class Served:
    """A server, and where its pictures lie."""

    process: ServerProcess
    pictures: Path

    @property
    def url(self) -> str:
        return self.process.url


@pytest.fixture(scope="session")
def served(
    environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    _adapter(folder / "adapters")
    options = ("--model", "tiny", "--adapters", folder / "adapters", "--pictures", folder / "out")
    with server(*options, environment=environment, folder=folder) as process:
        yield Served(process, folder / "out")
        process.signal()
        assert process.ended() == 0


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    context.set_default_timeout(WAIT)
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext, served: Served) -> Iterator[Page]:
    """The page, as it stands when it is ready; at the end nothing may have gone wrong in it."""
    page, wrong = context.new_page(), []
    asked: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.on(
        "console",
        lambda message: wrong.append(message.text) if _is_refusal(message.text) else None,
    )
    open_page(page, served.url)
    yield page
    assert wrong == []
    own = (f"{served.url}/", "data:", f"blob:{served.url}/")
    assert [url for url in asked if not url.startswith(own)] == []  # nothing from elsewhere


def _is_refusal(text: str) -> bool:
    return "Content Security Policy" in text or "Refused to" in text


def open_page(page: Page, url: str) -> None:
    page.goto(url)
    page.wait_for_selector("html[data-ready]", state="attached")
