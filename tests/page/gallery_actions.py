"""Pictures that need no painting, and replies that come when a test says so."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, Route, expect

from tests.page.conftest import WAIT

RED, BLUE = (220, 30, 30), (30, 30, 220)
LOAD = "() => import('/app.js').then(({ gallery }) => gallery.load())"
ANSWERABLE = 600  # milliseconds after which the question before a deletion takes an answer


def store(folder: Path, number: int, first: int = 0, colour: tuple[int, ...] = RED) -> list[str]:
    """Puts pictures into a server's folder, newer than all others there; newest first.

    Those with a larger `first` are newer than those with a smaller one.
    """
    made = [f"20990101-000000-{k:03}-0123456789ab-0.png" for k in range(first, first + number)]
    data = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(data, "PNG")
    for name in made:
        (folder / name).write_bytes(data.getvalue())
    return made[::-1]


@contextmanager
def swept(folder: Path) -> Iterator[None]:
    """Without the stored ones at the end."""
    try:
        yield
    finally:
        for path in folder.glob("20990101-*"):
            path.unlink()


def load(page: Page) -> None:
    """Asks for the list anew, as the page does when a job ends, and waits for the answer."""
    page.evaluate(LOAD)


def wait_until(page: Page, holds: Callable[[], bool]) -> None:
    """For what only this process can see."""
    limit = time.monotonic() + WAIT / 1000
    while not holds():
        assert time.monotonic() < limit
        page.wait_for_timeout(20)


def begin_to_load(page: Page) -> None:
    page.evaluate(LOAD.replace("=> gallery", "=> void gallery"))


@dataclass
class Held:
    """Requests of one kind, from now on, each unanswered until it is let go."""

    page: Page
    routes: list[Route] = field(default_factory=list)

    def wait_for(self, number: int) -> None:
        """Until so many are held."""
        wait_until(self.page, lambda: len(self.routes) >= number)

    def answer(self, number: int = 0) -> None:
        """By the server, as it is now."""
        self.routes.pop(number).continue_()


def hold(page: Page, url: str, methods: Sequence[str] = ("GET",)) -> Held:
    """Holds requests that match."""
    held = Held(page)

    def take(route: Route) -> None:
        if route.request.method in methods:
            held.routes.append(route)
        else:
            route.fallback()

    page.route(url, take)
    return held


def view(page: Page, name: str) -> None:
    """Opens a picture of the page."""
    page.locator(f'[data-name="{name}"] button').click()
    expect_viewed(page, name)


def expect_viewed(page: Page, name: str) -> None:
    expect(page.locator("#viewer")).to_be_visible()
    expect(page.locator("#download")).to_have_attribute("download", name)


def press_delete_twice(page: Page) -> None:
    """By keyboard, with a look at the question."""
    page.keyboard.press("Delete")
    expect(page.get_by_role("button", name="Delete for good?")).to_be_visible()
    page.wait_for_timeout(ANSWERABLE)
    page.keyboard.press("Delete")
