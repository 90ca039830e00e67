"""The window of a picture: what it shows, which keys it hears, and when it deletes."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from tests.page.actions import names
from tests.page.conftest import Served
from tests.page.gallery_actions import (
    ANSWERABLE,
    BLUE,
    RED,
    expect_viewed,
    hold,
    load,
    press_delete_twice,
    store,
    swept,
    view,
    wait_until,
)


@pytest.fixture
def stored(page: Page, served: Served) -> Iterator[list[str]]:
    """Three red pictures on the page, newest first."""
    with swept(served.pictures):
        made = store(served.pictures, 3)
        load(page)
        assert names(page)[:3] == made
        yield made


@pytest.mark.parametrize("key", ["Delete", "Backspace", "Enter"])
def test_a_key_that_is_held_down_deletes_nothing(
    page: Page, served: Served, stored: list[str], key: str
) -> None:
    """Neither on the button nor elsewhere in the window; who lets go of it and looks may."""
    view(page, stored[0])
    page.locator("#delete").focus()
    page.keyboard.down(key)
    expect(page.get_by_role("button", name="Delete for good?")).to_be_visible()
    page.wait_for_timeout(ANSWERABLE)
    for _ in range(5):
        page.keyboard.down(key)  # as a key repeats
    page.keyboard.up(key)
    expect(page.get_by_role("button", name="Delete for good?")).to_be_visible()
    assert (served.pictures / stored[0]).exists()
    page.keyboard.down(key)
    expect_viewed(page, stored[1])
    for _ in range(5):
        page.keyboard.down(key)
    page.keyboard.up(key)
    page.wait_for_timeout(ANSWERABLE)
    assert [name for name in stored if (served.pictures / name).exists()] == stored[1:]


def test_a_double_press_is_no_answer_to_the_question(
    page: Page, served: Served, stored: list[str]
) -> None:
    for delay in (0, ANSWERABLE):  # a slow one is one, too
        view(page, stored[0])
        expect(page.get_by_role("button", name="Delete", exact=True)).to_be_visible()
        page.locator("#delete").dblclick(delay=delay)
        expect(page.get_by_role("button", name="Delete for good?")).to_be_visible()
        page.keyboard.press("Escape")
    view(page, stored[0])
    page.locator("#delete").evaluate("(e) => { e.click(); e.click(); }")  # as taps, uncounted
    expect(page.get_by_role("button", name="Delete for good?")).to_be_visible()
    page.wait_for_timeout(ANSWERABLE)
    assert (served.pictures / stored[0]).exists()
    page.locator("#delete").click()
    expect_viewed(page, stored[1])
    assert not (served.pictures / stored[0]).exists()


def test_a_picture_that_is_gone_already_is_deleted_and_what_fails_is_told(
    page: Page, served: Served, stored: list[str]
) -> None:
    view(page, stored[0])
    (served.pictures / stored[0]).unlink()
    press_delete_twice(page)
    expect_viewed(page, stored[1])
    page.route("**/api/pictures/*", lambda route: route.abort())
    press_delete_twice(page)
    expect(page.locator("#delete")).to_have_text("The server does not answer.")
    page.unroute("**/api/pictures/*")
    assert names(page)[:2] == stored[1:]
    press_delete_twice(page)
    expect_viewed(page, stored[2])


def middle(page: Page) -> tuple[int, ...]:
    """The colour that is seen in the middle of the window."""
    with Image.open(io.BytesIO(page.locator("#viewer .viewer-stage").screenshot())) as shot:
        pixel = shot.convert("RGB").getpixel((shot.width // 2, shot.height // 2))
    assert isinstance(pixel, tuple)
    return pixel


def is_like(pixel: tuple[int, ...], colour: tuple[int, ...]) -> bool:
    """JPEG is near, no more."""
    return max(abs(a - b) for a, b in zip(pixel, colour, strict=True)) < 25


def test_no_picture_is_seen_under_the_prompt_of_another(
    page: Page, served: Served, stored: list[str]
) -> None:
    """While a file is on its way its small form is seen, and one that comes late is not taken."""
    # By a name of its own: the server keeps the small forms of those that other tests have stored.
    (blue,) = store(served.pictures, 1, first=900, colour=BLUE)
    load(page)
    view(page, stored[0])
    image = page.locator("#viewer-image")
    expect(image).to_have_attribute("src", f"/api/pictures/{stored[0]}")
    wait_until(page, lambda: is_like(middle(page), RED))
    whole = hold(page, f"**/api/pictures/{blue}")
    page.keyboard.press("ArrowLeft")
    expect_viewed(page, blue)
    whole.wait_for(1)
    wait_until(page, lambda: is_like(middle(page), BLUE))
    expect(image).to_have_attribute("src", f"/api/pictures/{blue}/thumbnail")
    page.keyboard.press("ArrowRight")
    expect(image).to_have_attribute("src", f"/api/pictures/{stored[0]}")
    with page.expect_response(f"**/api/pictures/{blue}"):
        whole.answer()
    page.wait_for_timeout(100)
    expect(image).to_have_attribute("src", f"/api/pictures/{stored[0]}")
    wait_until(page, lambda: is_like(middle(page), RED))
    page.unroute(f"**/api/pictures/{blue}")
    page.keyboard.press("ArrowLeft")
    expect(image).to_have_attribute("src", f"/api/pictures/{blue}")
    wait_until(page, lambda: is_like(middle(page), BLUE))


def test_the_window_hears_keys_after_the_last_picture_too(page: Page, stored: list[str]) -> None:
    """The button that went there is disabled, and what is disabled has no focus."""
    view(page, stored[1])
    page.get_by_role("button", name="Newer picture").click()
    expect_viewed(page, stored[0])
    expect(page.locator("#viewer-prompt")).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect_viewed(page, stored[1])
