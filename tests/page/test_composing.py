"""The form: a prompt, its settings, pictures that are attached, adapters, and what is wrong."""

from __future__ import annotations

import base64
import io
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import BrowserContext, Page, Route, expect

from fluxmesh_coordinator.artifacts.recipe import read_recipe
from tests.page.actions import LONG, attach, dropped, finished, names, paint, png, set_up, until
from tests.page.conftest import ADAPTER, Served
from tests.page.gallery_actions import hold


def test_a_prompt_becomes_a_picture_that_is_seen_while_it_is_painted(
    page: Page, served: Served
) -> None:
    before = names(page)
    set_up(page, "a red apple on a yellow background", steps="40", side="64", seed="7")
    page.get_by_label("Prompt").press("Control+Enter")
    expect(page.locator(".tile img.preview")).to_be_visible()
    source = page.locator(".tile img.preview").get_attribute("src") or ""
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as shown:
        assert shown.size == (8, 8)
    name = finished(page, before)
    assert names(page)[0] == name
    recipe = read_recipe(served.pictures / name)
    assert (recipe.prompt, recipe.seed) == ("a red apple on a yellow background", 7)
    assert (recipe.steps, recipe.height, recipe.width) == (40, 64, 64)
    expect(page.get_by_text("Nothing here yet.")).to_be_hidden()


def test_several_pictures_and_a_shape_of_the_models_own_size(page: Page, served: Served) -> None:
    page.get_by_role("radio", name="Wide").check(force=True)
    page.get_by_label("How many pictures").select_option("2")
    page.get_by_label("Prompt").fill("two dogs")
    page.get_by_label("More settings").click()
    page.get_by_label("Steps", exact=True).fill("12")  # so that both tiles are seen
    before = names(page)
    page.get_by_role("button", name="Paint", exact=True).click()
    expect(page.locator(".tile")).to_have_count(2)
    expect(page.locator("#pictures li")).to_have_count(len(before) + 2)
    first, second = (read_recipe(served.pictures / name) for name in reversed(names(page)[:2]))
    assert (first.width, first.height) == (176, 96)
    assert second.seed == first.seed + 1


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_a_picture_that_is_dropped_or_pasted_is_begun_from(
    page: Page, served: Served, kind: str
) -> None:
    before = names(page)
    set_up(page, "a cat")
    dropped(page, kind, png())
    expect(page.locator(".attachment")).to_have_count(1)
    expect(page.get_by_label("How much changes")).to_be_visible()
    page.get_by_label("How much changes").fill("0.5")
    page.get_by_role("button", name="Paint", exact=True).click()
    recipe = read_recipe(served.pictures / finished(page, before))
    assert recipe.source is not None and recipe.source.strength == 0.5
    page.get_by_role("button", name="Remove this picture").click()
    expect(page.locator(".attachment")).to_have_count(0)
    expect(page.get_by_label("How much changes")).to_be_hidden()


def test_a_picture_goes_from_a_model_that_paints_over_to_one_that_edits(
    page: Page, served: Served
) -> None:
    before = names(page)
    edit = page.get_by_role("button", name="Edit it with tiny-klein")
    expect(edit).to_be_hidden()
    attach(page, png(64))
    expect(page.get_by_text("tiny paints over it.")).to_be_visible()
    edit.click()
    expect(page.get_by_label("Model")).to_have_value("tiny-klein")
    expect(page.get_by_label("How much changes")).to_be_hidden()
    expect(edit).to_be_hidden()
    set_up(page, "make the background blue", side="64")
    page.get_by_role("button", name="Paint", exact=True).click()
    recipe = read_recipe(served.pictures / finished(page, before))
    assert recipe.source is None and len(recipe.references) == 1
    assert recipe.model == "tiny-klein"


def test_addresses_of_pictures_that_are_shown_no_more_are_given_back(page: Page) -> None:
    """Each holds its picture in the browser's memory for as long as the page is open."""
    page.evaluate(
        """() => {
          window.held = new Set();
          const [create, revoke] = [URL.createObjectURL, URL.revokeObjectURL];
          URL.createObjectURL = (blob) => { const url = create(blob); held.add(url); return url; };
          URL.revokeObjectURL = (url) => { held.delete(url); revoke(url); };
        }"""
    )
    file: Any = {"name": "me.png", "mimeType": "image/png", "buffer": png()}
    broken: Any = {"name": "broken.png", "mimeType": "image/png", "buffer": b"\x89PNG"}
    for _ in range(2):  # the second one takes the first one's place
        page.locator("#file").set_input_files(file)
        expect(page.locator(".attachment img")).to_have_count(1)
        until(page, "held.size === 1")
    for _ in range(2):
        page.get_by_role("button", name=re.compile("mask$")).click()
        box = page.locator("#mask-canvas").bounding_box()
        assert box is not None
        page.mouse.click(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5)
        page.get_by_role("button", name="Use mask").click()
        expect(page.get_by_role("button", name="Change mask")).to_be_visible()
        until(page, "held.size === 2")  # the picture and its newest mask
    page.locator("#file").set_input_files(broken)
    expect(page.locator("#form-error")).to_contain_text("can't be read")
    until(page, "held.size === 2")
    page.get_by_role("button", name="Remove this picture").click()
    until(page, "held.size === 0")


def test_what_is_no_picture_is_told_in_a_sentence(page: Page) -> None:
    for kind, name, data, said in (
        ("text/plain", "notes.txt", b"dogs", "That is no picture that can be used"),
        ("image/png", "broken.png", b"\x89PNG", "That picture can't be read."),
    ):
        file: Any = {"name": name, "mimeType": kind, "buffer": data}
        page.locator("#file").set_input_files(file)
        expect(page.locator("#form-error")).to_contain_text(said)
    expect(page.locator(".attachment")).to_have_count(0)


def test_a_lora_is_chosen_by_name_and_changes_the_picture(page: Page, served: Served) -> None:
    plain = paint(page, "a red apple", seed="5")
    before = names(page)
    page.get_by_label("Add a LoRA").select_option(ADAPTER)
    page.get_by_label(f"Strength of {ADAPTER}").fill("1.5")
    page.get_by_role("button", name="Paint", exact=True).click()
    name = finished(page, before)
    ((adapter, strength, _),) = read_recipe(served.pictures / name).adapters
    assert (adapter, strength) == (ADAPTER, 1.5)
    with Image.open(served.pictures / plain) as one, Image.open(served.pictures / name) as other:
        assert not np.array_equal(np.asarray(one), np.asarray(other))
    page.get_by_role("button", name=f"Without {ADAPTER}").click()
    expect(page.get_by_label(f"Strength of {ADAPTER}")).to_have_count(0)


def test_a_model_that_takes_more_is_given_more(page: Page) -> None:
    """As a FLUX.2 base model would be told of; what would be sent is looked at, and not sent."""
    told = page.request.get(f"{page.url}api/models").json()
    more = {"takes": ["image", "mask", "references", "negative_prompt"], "max_references": 2}
    told["models"][0] |= more | {"guidance": 4.0}
    sent: list[dict[str, Any]] = []

    def take(route: Route) -> None:
        sent.append(route.request.post_data_json)
        about = {"message": "`seed` is not taken today.", "setting": "seed", "code": "no"}
        route.fulfill(status=400, json={"error": about})

    page.route("**/api/models", lambda route: route.fulfill(json=told))
    page.route("**/api/jobs", take)
    page.reload()
    page.wait_for_selector("html[data-ready]", state="attached")
    set_up(page, "the dog of the first on the chair of the second")
    page.get_by_label("What it should not show").fill("cats")
    page.get_by_label("Guidance").fill("3,5")
    expect(page.get_by_label("Add a LoRA")).to_be_hidden()
    file: Any = {"name": "photo.png", "mimeType": "image/png", "buffer": png()}
    for number in (1, 2):
        page.locator("#file").set_input_files(file)
        expect(page.locator(".attachment")).to_have_count(number)
    page.locator("#file").set_input_files(file)
    expect(page.locator("#form-error")).to_have_text("This model takes 2 references at most.")
    page.get_by_label("What picture 1 is for").select_option("image")
    expect(page.get_by_role("button", name="Brush a mask")).to_be_visible()
    page.get_by_role("button", name="Paint", exact=True).click()
    expect(page.locator("#form-error")).to_have_text("Seed is not taken today.")
    (fields,) = sent
    assert fields["negative_prompt"] == "cats" and fields["guidance"] == 3.5
    assert len(fields["references"]) == 1 and fields["strength"] == 0.6 and "mask" not in fields
    assert base64.b64decode(fields["image"]) == png()
    assert "adapters" not in fields and fields["previews"] is True


def test_mistakes_are_told_beside_what_they_are_about(page: Page) -> None:
    page.get_by_label("Prompt").fill("  ")
    page.get_by_role("button", name="Paint", exact=True).click()
    expect(page.locator("#form-error")).to_have_text("Say what to paint.")
    expect(page.get_by_label("Prompt")).to_be_focused()
    set_up(page, "dogs", steps="5000")
    page.get_by_role("button", name="Paint", exact=True).click()
    expect(page.locator("#form-error")).to_contain_text("Steps is 5000; it must be 1 to 200")
    expect(page.get_by_label("Steps", exact=True)).to_be_focused()
    expect(page.get_by_label("Steps", exact=True)).to_have_attribute("aria-invalid", "true")
    page.get_by_label("Steps", exact=True).fill("many")
    page.get_by_role("button", name="Paint", exact=True).click()
    expect(page.locator("#form-error")).to_have_text("Steps is a number.")
    expect(page.locator(".job")).to_have_count(0)


def test_a_request_is_sent_once_however_often_and_long_its_key_is_pressed(page: Page) -> None:
    sent = hold(page, "**/api/jobs", ["POST"])
    before = names(page)
    set_up(page, "one dog")
    page.get_by_label("Prompt").focus()
    page.keyboard.down("Control")
    for _ in range(5):
        page.keyboard.down("Enter")
    page.keyboard.up("Enter")
    page.keyboard.press("Enter")  # its upload takes its time
    page.keyboard.up("Control")
    sent.wait_for(1)
    page.wait_for_timeout(300)
    assert len(sent.routes) == 1
    sent.answer()
    expect(page.locator("#paint")).to_be_enabled()
    page.get_by_label("Steps", exact=True).focus()
    page.keyboard.down("Enter")
    sent.wait_for(1)
    sent.answer()
    expect(page.locator("#paint")).to_be_enabled()
    for _ in range(5):
        page.keyboard.down("Enter")
    page.keyboard.up("Enter")
    page.wait_for_timeout(300)
    assert sent.routes == []
    expect(page.locator("#pictures li")).to_have_count(len(before) + 2)


def test_nothing_is_sent_before_the_models_are_known(
    context: BrowserContext, served: Served
) -> None:
    page = context.new_page()
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.method))
    models = hold(page, "**/api/models")
    page.goto(served.url)
    page.get_by_label("Prompt").fill("a dog")
    page.get_by_label("Prompt").press("Control+Enter")
    expect(page.locator("#form-error")).to_contain_text("has not said yet what it can paint with")
    assert "POST" not in sent
    models.wait_for(1)
    models.answer()
    page.wait_for_selector("html[data-ready]", state="attached")
    expect(page.locator("#form-error")).to_be_hidden()


def test_a_request_whose_answer_was_lost_is_the_same_job_when_it_is_sent_again(page: Page) -> None:
    ids: list[str] = []

    def lose(route: Route) -> None:
        ids.append(route.request.headers["idempotency-key"])
        if len(ids) in (1, 3):
            assert route.fetch().status == 202
            route.abort()
        else:
            route.continue_()

    while (idle := page.request.get(f"{page.url}api/status").json())["queue"]:
        page.wait_for_timeout(50)  # of tests before
    page.route("**/api/status", lambda route: route.fulfill(json=idle))
    page.route("**/api/jobs", lose)
    set_up(page, "a dog that is asked for twice", **LONG)
    paint, job = page.get_by_role("button", name="Paint", exact=True), page.locator(".job")
    paint.click()
    expect(page.locator("#form-error")).to_have_text("The server does not answer.")
    expect(job).to_have_count(0)
    paint.click()
    expect(job).to_have_count(1)
    assert ids[1] == ids[0]
    page.unroute("**/api/status")
    # This time the line tells of it first: who presses again has seen it, and wants another one.
    page.get_by_label("Prompt").fill("another dog")
    paint.click()
    expect(page.locator(".job-prompt", has_text="another dog")).to_have_count(1)
    expect(job).to_have_count(2)
    paint.click()
    expect(job).to_have_count(3)
    assert len(set(ids)) == 3
    for left in (2, 1, 0):
        job.first.get_by_role("button", name="Cancel").click()
        expect(job).to_have_count(left)
