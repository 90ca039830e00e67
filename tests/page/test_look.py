"""Colours, widths, names for who does not see, and no motion for who wants none."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect

from tests.page.actions import LONG, attach, names, paint, png, set_up


def background(page: Page, theme: str) -> str:
    """The page's, once it has taken that theme."""
    expect(page.locator("html")).to_have_attribute("data-theme", theme)
    return str(page.evaluate("() => getComputedStyle(document.body).backgroundColor"))


def test_colours_follow_the_system_until_somebody_chooses(page: Page) -> None:
    page.emulate_media(color_scheme="light")
    light = background(page, "light")
    page.emulate_media(color_scheme="dark")
    dark = background(page, "dark")
    assert light != dark
    page.get_by_role("button", name="Light colours").click()
    assert background(page, "light") == light
    page.reload()
    assert background(page, "light") == light
    page.get_by_role("button", name="Dark colours").click()
    assert background(page, "dark") == dark


@pytest.mark.parametrize("is_empty", [False, True])
@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_is_wider_than_the_screen(page: Page, width: int, is_empty: bool) -> None:
    page.set_viewport_size({"width": width, "height": 780})
    if is_empty:
        nothing = {"pictures": [], "next": ""}
        page.route("**/api/pictures?*", lambda route: route.fulfill(json=nothing))
        page.reload()
        expect(page.locator("#examples li")).to_have_count(3)
    elif not names(page):
        paint(page, "a dog")
    attach(page, png())
    if page.locator("#details").is_hidden():
        page.get_by_label("More settings").click()
    for opened in ("", "#mesh-open"):
        if opened:
            page.locator(opened).click()
        wide = page.evaluate(
            """() => [...document.querySelectorAll("main *, header *, dialog[open] *")]
              .filter((e) => e.checkVisibility() && !e.closest(".hidden, svg, option"))
              .filter((e) => e.getBoundingClientRect().right > innerWidth + 1
                          || e.getBoundingClientRect().left < -1)
              .map((e) => e.outerHTML.slice(0, 80))"""
        )
        assert wide == []
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")


def test_everything_that_is_used_has_a_name_and_is_large_enough_for_a_finger(page: Page) -> None:
    page.set_viewport_size({"width": 390, "height": 780})
    attach(page, png())
    page.get_by_label("More settings").click()
    used = page.evaluate(
        """() => [...document.querySelectorAll("button, a[href], select, textarea, input")]
          .filter((e) => e.checkVisibility() && !e.closest(".skip, dialog:not([open])"))
          .map((e) => {
            const inside = e.labels?.[0]?.contains(e); // then the label takes the finger
            const box = (inside ? e.labels[0] : e).getBoundingClientRect();
            const own = e.getAttribute("aria-label");
            const label = own || e.labels?.[0]?.textContent || e.textContent;
            return [e.id || e.className || e.value, label.trim(), box.width, box.height];
          })"""
    )
    assert len(used) > 15
    for what, label, width, height in used:
        assert label, f"{what} has no name"
        assert min(width, height) >= 36, f"{what} is {width} x {height}"
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.locator("[role=status]#told").count() == 1


def test_what_is_painted_is_as_wide_as_the_form_however_long_its_prompt(page: Page) -> None:
    page.set_viewport_size({"width": 390, "height": 780})
    set_up(page, "a long picture of two dogs on a blue background before a green house", **LONG)
    page.get_by_role("button", name="Paint", exact=True).click()
    expect(page.locator(".job")).to_have_count(1)
    card, form = (page.locator(name).bounding_box() for name in (".job", "#composer"))
    assert card is not None and form is not None and card["width"] <= form["width"]
    page.get_by_role("button", name="Cancel", exact=True).click()
    expect(page.locator(".job")).to_have_count(0)


def test_who_wants_no_motion_gets_none(page: Page) -> None:
    page.emulate_media(reduced_motion="reduce")
    set_up(page, "a long picture", **LONG)
    page.get_by_role("button", name="Paint", exact=True).click()
    expect(page.locator(".job")).to_have_count(1)
    running = page.evaluate(
        "() => document.getAnimations().filter((a) => a.playState === 'running').length"
    )
    assert running == 0
    page.get_by_role("button", name="Cancel", exact=True).click()
    expect(page.locator(".job")).to_have_count(0)
