"""Masks that are brushed, by hand and by keyboard."""

from __future__ import annotations

import numpy as np
from PIL import Image
from playwright.sync_api import Page, expect

from tests.page.actions import finished, names, paint, pixel, tab_to
from tests.page.conftest import Served


def test_a_finished_picture_is_edited_under_a_mask_that_is_brushed(
    page: Page, served: Served
) -> None:
    name = paint(page, "a yellow sun", side="64")
    page.locator(f'[data-name="{name}"] button').click()
    page.get_by_role("button", name="Edit", exact=True).click()
    expect(page.locator(".attachment")).to_have_count(1)
    expect(page.get_by_label("Prompt")).to_have_value("a yellow sun")
    page.get_by_role("button", name="Brush a mask").click()
    box = page.locator("#mask-canvas").bounding_box()
    assert box is not None
    done = page.get_by_role("button", name="Use mask")
    expect(done).to_be_disabled()
    untouched = pixel(page, 0.5, 0.5)
    page.mouse.click(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5)
    page.mouse.move(box["x"] + 2, box["y"] + 2)  # its circle is drawn around the pointer
    assert pixel(page, 0.5, 0.5) != untouched  # a tap is a dot
    page.get_by_role("button", name="Undo").click()
    assert pixel(page, 0.5, 0.5) == untouched
    expect(done).to_be_disabled()
    page.mouse.move(box["x"] + box["width"] * 0.85, box["y"] + box["height"] * 0.1)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.85, box["y"] + box["height"] * 0.9, steps=8)
    page.mouse.up()
    expect(done).to_be_enabled()
    page.keyboard.press("Control+z")
    expect(done).to_be_disabled()
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.85, box["y"] + box["height"] * 0.1, steps=8)
    page.mouse.up()
    done.click()
    expect(page.get_by_role("button", name="Change mask")).to_be_visible()
    before = names(page)
    page.get_by_label("Prompt").fill("a green tree")
    page.get_by_role("button", name="Paint", exact=True).click()
    edited = finished(page, before)
    with Image.open(served.pictures / name) as old, Image.open(served.pictures / edited) as new:
        was, now = np.asarray(old.convert("RGB")), np.asarray(new.convert("RGB"))
    assert was.shape == now.shape
    assert np.array_equal(was[:, :32], now[:, :32])  # what was not brushed over stays, to the byte
    assert not np.array_equal(was[:, 40:], now[:, 40:])


def test_a_mask_is_brushed_by_keyboard_alone(page: Page, served: Served) -> None:
    name = paint(page, "a yellow sun", side="64")
    tab_to(page, page.locator(f'[data-name="{name}"] button'))
    page.keyboard.press("Enter")
    tab_to(page, page.get_by_role("button", name="Edit", exact=True))
    page.keyboard.press("Enter")
    tab_to(page, page.get_by_role("button", name="Brush a mask"))
    page.keyboard.press("Enter")
    canvas, done = page.locator("#mask-canvas"), page.get_by_role("button", name="Use mask")
    expect(canvas).to_be_focused()
    expect(page.locator("#mask-keys")).to_be_visible()  # which says what there is to press
    expect(page.locator("#mask-keys")).to_contain_text("Space puts it down")
    untouched = pixel(page, 0.5, 0.5), pixel(page, 0.5, 0.9)
    for _ in range(4):  # to the right edge
        page.keyboard.press("Shift+ArrowRight")
    expect(done).to_be_disabled()  # nothing is painted by moving
    page.keyboard.press("Space")
    expect(page.locator("#mask-keys")).to_contain_text("The brush is down")
    for _ in range(5):
        page.keyboard.press("Shift+ArrowUp")
    for _ in range(20):
        page.keyboard.press("Shift+ArrowDown")
    page.keyboard.press("Escape")  # lifts it, and closes nothing
    expect(page.locator("#mask-keys")).to_contain_text("Space puts it down")
    assert (pixel(page, 0.5, 0.5), pixel(page, 0.5, 0.9)) == untouched
    brushed = pixel(page, 0.97, 0.25)
    for _ in range(6):
        page.keyboard.press("ArrowLeft")
    assert pixel(page, 0.97, 0.25) == brushed
    page.keyboard.press("e")
    expect(page.get_by_label("Erase")).to_be_checked()
    page.keyboard.press("Space")
    for _ in range(20):
        page.keyboard.press("Shift+ArrowUp")
    page.keyboard.press("Space")
    page.keyboard.press("Control+z")  # of the eraser
    assert pixel(page, 0.97, 0.25) == brushed
    tab_to(page, done)
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Change mask")).to_be_visible()
    before = names(page)
    tab_to(page, page.get_by_label("Prompt"))
    page.keyboard.press("Control+a")
    page.keyboard.type("a green tree")
    page.keyboard.press("Control+Enter")
    edited = finished(page, before)
    with Image.open(served.pictures / name) as old, Image.open(served.pictures / edited) as new:
        was, now = np.asarray(old.convert("RGB")), np.asarray(new.convert("RGB"))
    assert np.array_equal(was[:, :32], now[:, :32])
    assert not np.array_equal(was[:, 60:], now[:, 60:])
