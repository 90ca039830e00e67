"""Finished pictures: made again, looked through, deleted, downloaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import BrowserContext, Page, Route, expect

from fluxmesh_coordinator.artifacts.recipe import read_recipe
from tests.page.actions import finished, names, paint
from tests.page.conftest import Served, open_page
from tests.page.gallery_actions import ANSWERABLE


def test_again_vary_and_settings_once_more(page: Page, served: Served) -> None:
    name = paint(page, "a green house", seed="11")
    first = read_recipe(served.pictures / name)
    for action in ("Again", "Vary"):
        before = names(page)
        page.locator(f'[data-name="{name}"] button').click()
        expect(page.locator("#viewer-prompt")).to_have_text("a green house")
        page.get_by_role("button", name=action, exact=True).click()
        made = read_recipe(served.pictures / finished(page, before))
        assert (made.prompt, made.steps, made.height) == ("a green house", 2, 32)
        assert made.seed != first.seed
        assert (made.source is not None) == (action == "Vary")
    page.locator(f'[data-name="{name}"] button').click()
    page.get_by_role("button", name="Use settings").click()
    expect(page.get_by_label("Seed", exact=True)).to_have_value("11")
    before = names(page)
    page.get_by_role("button", name="Paint", exact=True).click()
    same = finished(page, before)
    with (
        Image.open(served.pictures / name) as one,
        Image.open(served.pictures / same) as other,
    ):
        assert np.array_equal(np.asarray(one), np.asarray(other))


def test_again_leaves_nothing_out_that_a_picture_was_made_with(
    context: BrowserContext, served: Served
) -> None:
    """What it can't have again, a picture that it was shown, is told."""
    settings = {
        "negative_prompt": "rain", "cfg": 3.0, "bits": 4, "text_bits": 8, "dtype": "float32",
        "cache": 0.1, "t5_padding": False, "fuse_adapters": True, "steps": 3, "guidance": 2.5,
        "adapters": [{"name": "blue", "strength": 0.5}],
    }  # fmt: skip
    recipe = {"prompt": "a dog", "model": "tiny", "seed": 3, **settings}
    began = [{"references": 2}, {"control": True}, {"from_picture": True, "strength": 0.5}]
    about = {"width": 64, "height": 32, "created": "2026-01-01T00:00:00Z", "url": "/icon.svg"}
    pictures = [
        {**about, "name": f"{k}.png", "thumbnail_url": "/icon.svg", "recipe": {**recipe, **more}}
        for k, more in enumerate([{}, *began])
    ]
    page, sent = context.new_page(), []
    listed = {"pictures": pictures, "next": ""}
    page.route("**/api/pictures?*", lambda route: route.fulfill(json=listed))

    def refuse(route: Route) -> None:
        sent.append(route.request.post_data_json)
        route.fulfill(status=400, json={"error": {"message": "No.", "setting": None, "code": "x"}})

    page.route("**/api/jobs", refuse)
    open_page(page, served.url)
    for k in range(len(pictures)):
        page.locator(f'[data-name="{k}.png"] button').click()
        expect(page.locator("#viewer-recipe")).to_contain_text("rain")
        if k:
            expect(page.locator("#again")).to_be_disabled()
            page.keyboard.press("Escape")
        else:
            page.locator("#again").click()
            expect(page.locator("#form-error")).to_have_text("No.")
    size = {"width": 64, "height": 32, "n_images": 1, "previews": True}
    assert sent == [{"prompt": "a dog", "model": "tiny", **size, **settings}]


def test_by_keyboard_alone_pictures_are_looked_through_and_deleted(
    page: Page, served: Served
) -> None:
    while len(names(page)) < 3:
        paint(page, f"picture {len(names(page))}")
    kept = names(page)
    page.locator("#pictures button").first.focus()
    page.keyboard.press("ArrowRight")
    focused = page.locator("#pictures li:nth-child(2) button")
    expect(focused).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#viewer")).to_be_visible()
    assert kept[1] in str(page.locator("#download").get_attribute("href"))
    page.keyboard.press("ArrowLeft")
    assert kept[0] in str(page.locator("#download").get_attribute("href"))
    page.keyboard.press("Escape")
    expect(page.locator("#viewer")).to_be_hidden()
    expect(page.locator("#pictures li:nth-child(1) button")).to_be_focused()  # that was open last
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.keyboard.press("Delete")
    expect(page.get_by_role("button", name="Delete for good?")).to_be_visible()
    assert (served.pictures / kept[1]).exists()
    page.wait_for_timeout(ANSWERABLE)
    page.keyboard.press("Delete")
    expect(page.locator("#pictures li")).to_have_count(len(kept) - 1)
    assert not (served.pictures / kept[1]).exists()
    page.keyboard.press("Escape")
    expect(page.locator("#viewer")).to_be_hidden()
    page.locator("#pictures button").first.focus()
    page.keyboard.press("/")
    expect(page.get_by_label("Prompt")).to_be_focused()


def test_a_window_that_closes_calls_nobody_back_who_was_faster(page: Page) -> None:
    """A dialog tells of its end late: somebody may be at the prompt by then, or in it again."""
    while len(names(page)) < 2:
        paint(page, f"picture {len(names(page))}")
    first = page.locator("#pictures button").first
    first.click()
    page.evaluate(
        """async () => {
            const [viewer, prompt] = ["viewer", "prompt"].map((id) => document.getElementById(id));
            const told = new Promise((done) => viewer.addEventListener("close", done));
            viewer.close();
            prompt.focus();
            await told;
        }"""
    )
    expect(page.get_by_label("Prompt")).to_be_focused()
    first.click()
    page.evaluate(
        """async () => {
            const viewer = document.getElementById("viewer");
            const told = new Promise((done) => viewer.addEventListener("close", done));
            viewer.close();
            document.querySelector("#pictures button").click();
            await told;
        }"""
    )
    page.keyboard.press("ArrowRight")
    expect(page.locator("#download")).to_have_attribute("download", names(page)[1])


def test_a_picture_is_downloaded_with_its_recipe(page: Page, tmp_path: Path) -> None:
    name = names(page)[0] if names(page) else paint(page, "a dog")
    page.locator("#pictures button").first.click()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    download.value.save_as(tmp_path / "got.png")
    assert download.value.suggested_filename == name
    assert read_recipe(tmp_path / "got.png").model == "tiny"
