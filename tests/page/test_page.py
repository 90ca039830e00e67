"""What people do with the server's page, in a real Chromium against a real server.

Pictures are 32 x 32, so that a CPU paints one at once.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Locator, Page, Route, expect

from fluxmesh.wire.messages.status import State
from fluxmesh_coordinator.artifacts.recipe import read_recipe
from tests.page.conftest import ADAPTER, WAIT, Served, open_page
from tests.server_process import server

expect.set_options(timeout=WAIT)
FILL = "(recipe) => import('/app.js').then(({ composer }) => composer.fill(recipe))"
LONG = {"steps": "150", "side": "256"}  # of a picture that nobody waits for


def set_up(page: Page, prompt: str, *, steps: str = "2", side: str = "32", seed: str = "") -> None:
    """Fills the form in, as somebody does who opens the other settings."""
    page.get_by_label("Prompt").fill(prompt)
    if page.locator("#details").is_hidden():
        page.get_by_label("More settings").click()
    for label, value in (("Steps", steps), ("Width", side), ("Height", side), ("Seed", seed)):
        page.get_by_label(label, exact=True).fill(value)


def names(page: Page) -> list[str]:
    """Finished pictures on the page, newest first."""
    items = page.locator("#pictures li")
    return [str(items.nth(k).get_attribute("data-name")) for k in range(items.count())]


def paint(page: Page, prompt: str, **settings: str) -> str:
    """Paints one picture and returns its name."""
    before = names(page)
    set_up(page, prompt, **settings)
    page.get_by_role("button", name="Paint", exact=True).click()
    return finished(page, before)


def finished(page: Page, before: list[str]) -> str:
    expect(page.locator("#pictures li")).to_have_count(len(before) + 1)
    expect(page.locator(".job")).to_have_count(0)
    (new,) = set(names(page)) - set(before)
    return new


def png(side: int = 32, colour: tuple[int, int, int] = (200, 60, 30)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(out, "PNG")
    return out.getvalue()


def attach(page: Page, data: bytes) -> None:
    page.locator("#file").set_input_files(
        {"name": "photo.png", "mimeType": "image/png", "buffer": data}
    )
    expect(page.locator(".attachment")).to_have_count(1)


def dropped(page: Page, kind: str, data: bytes) -> None:
    """A file that is dropped or pasted."""
    page.evaluate(
        """([kind, text]) => {
          const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
          const files = new DataTransfer();
          files.items.add(new File([bytes], "photo.png", { type: "image/png" }));
          const about = { bubbles: true, cancelable: true };
          document.body.dispatchEvent(kind === "paste"
            ? new ClipboardEvent("paste", { ...about, clipboardData: files })
            : new DragEvent(kind, { ...about, dataTransfer: files }));
        }""",
        [kind, base64.b64encode(data).decode()],
    )


def pixel(page: Page, x: float, y: float) -> list[int]:
    """A colour of the canvas that is brushed on; `x` and `y` are of its width and height."""
    script = """([x, y]) => {
      const canvas = document.getElementById("mask-canvas");
      const at = [Math.floor(x * canvas.width), Math.floor(y * canvas.height)];
      return [...canvas.getContext("2d").getImageData(...at, 1, 1).data];
    }"""
    return list(page.evaluate(script, [x, y]))


def test_the_first_time_it_says_what_there_is_and_how_to_begin(page: Page) -> None:
    expect(page.get_by_label("Prompt")).to_be_focused()
    expect(page.get_by_text("is a small model that comes with fluxmesh")).to_be_visible()
    expect(page.get_by_text("Nothing here yet.")).to_be_visible()
    expect(page.locator("#mesh-words")).to_have_text("1 host")
    example = page.locator("#examples button").first
    text = example.inner_text()
    example.click()
    expect(page.get_by_label("Prompt")).to_have_value(text)
    page.get_by_role("button", name="Got it").click()
    page.reload()
    page.wait_for_selector("html[data-ready]", state="attached")
    expect(page.get_by_text("is a small model that comes with fluxmesh")).to_be_hidden()
    expect(page.get_by_label("Prompt")).to_have_value(text)  # what was typed is not lost


def test_the_hint_is_of_the_model_that_is_chosen(page: Page) -> None:
    hint, edits = page.locator("#hint"), "edits what it has painted"
    expect(hint).to_contain_text("tiny is a small model")
    expect(hint).not_to_contain_text(edits)
    page.get_by_label("Model").select_option("tiny-klein")
    expect(hint).to_contain_text("tiny-klein is a small model")
    expect(hint).to_contain_text(f"at 128 × 128, and {edits}")
    page.reload()  # the choice is kept
    page.wait_for_selector("html[data-ready]", state="attached")
    expect(hint).to_contain_text("tiny-klein is a small model")
    page.evaluate(FILL, {"model": "tiny", "prompt": "a dog"})  # as "Use settings" does
    expect(hint).to_contain_text("tiny is a small model")
    expect(hint).not_to_contain_text(edits)


def test_who_has_flux_is_told_nothing_of_small_models(
    context: BrowserContext, served: Served
) -> None:
    page = context.new_page()

    def with_flux(route: Route) -> None:
        reply = route.fetch()
        known = reply.json()
        flux = {**known["models"][0], "name": "tiny-but-mine", "embedded": False}
        route.fulfill(response=reply, json={**known, "models": [*known["models"], flux]})

    page.route("**/api/models", with_flux)
    open_page(page, served.url)
    expect(page.locator("#model option")).to_have_count(3)
    expect(page.locator("#hint")).to_be_hidden()


def test_a_prompt_becomes_a_picture_that_is_seen_while_it_is_painted(
    page: Page, served: Served
) -> None:
    before = names(page)
    set_up(page, "a red apple on a yellow background", steps="12", side="64", seed="7")
    page.get_by_label("Prompt").press("Control+Enter")
    expect(page.locator(".tile img.preview")).to_be_visible()
    source = page.locator(".tile img.preview").get_attribute("src") or ""
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as shown:
        assert shown.size == (8, 8)
    name = finished(page, before)
    assert names(page)[0] == name
    recipe = read_recipe(served.pictures / name)
    assert (recipe.prompt, recipe.seed) == ("a red apple on a yellow background", 7)
    assert (recipe.steps, recipe.height, recipe.width) == (12, 64, 64)
    expect(page.get_by_text("Nothing here yet.")).to_be_hidden()


def test_several_pictures_and_a_shape_of_the_models_own_size(page: Page, served: Served) -> None:
    page.get_by_role("radio", name="Wide").check(force=True)
    page.get_by_label("How many pictures").select_option("2")
    page.get_by_label("Prompt").fill("two dogs")
    page.get_by_label("More settings").click()
    page.get_by_label("Steps", exact=True).fill("1")
    before = names(page)
    page.get_by_role("button", name="Paint", exact=True).click()
    expect(page.locator(".tile")).to_have_count(2)
    expect(page.locator("#pictures li")).to_have_count(len(before) + 2)
    first, second = (read_recipe(served.pictures / name) for name in reversed(names(page)[:2]))
    assert (first.width, first.height) == (176, 96)
    assert second.seed == first.seed + 1


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


def tab_to(page: Page, target: Locator) -> None:
    """By the Tab key alone."""
    for _ in range(60):
        if target.evaluate("(element) => element === document.activeElement"):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"Tab never comes to {target}")


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
        page.wait_for_function("held.size === 1")
    for _ in range(2):
        page.get_by_role("button", name=re.compile("mask$")).click()
        box = page.locator("#mask-canvas").bounding_box()
        assert box is not None
        page.mouse.click(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5)
        page.get_by_role("button", name="Use mask").click()
        expect(page.get_by_role("button", name="Change mask")).to_be_visible()
        page.wait_for_function("held.size === 2")  # the picture and its newest mask
    page.locator("#file").set_input_files(broken)
    expect(page.locator("#form-error")).to_contain_text("can't be read")
    page.wait_for_function("held.size === 2")
    page.get_by_role("button", name="Remove this picture").click()
    page.wait_for_function("held.size === 0")


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


def test_the_line_shows_a_place_and_is_left_by_a_button(page: Page, browser: Browser) -> None:
    """Two people: one paints something long, the other waits behind it."""
    other = browser.new_context().new_page()
    open_page(other, page.url)
    set_up(other, "a long picture", **LONG)
    other.get_by_role("button", name="Paint", exact=True).click()
    expect(other.locator(".job-state")).to_contain_text(re.compile("Step|Begins|Reading"))
    page.locator("#mesh-open").click()
    expect(page.locator("#queue li")).to_have_count(1)
    expect(page.locator("#queue")).to_contain_text("Somebody’s: 1 picture, tiny")
    expect(page.locator("#queue button")).to_have_count(0)  # nobody cancels what is another's
    expect(page.locator(".host")).to_have_count(1)
    page.keyboard.press("Escape")
    expect(page.locator("#mesh")).to_be_hidden()
    expect(page.locator("#line")).to_contain_text("1 job of others before you")
    before = names(page)
    set_up(page, "a short picture")
    page.get_by_role("button", name="Paint", exact=True).click()
    expect(page.locator(".job-state")).to_contain_text("1st in line")
    page.get_by_role("button", name="Cancel", exact=True).click()
    expect(page.locator(".job")).to_have_count(0)
    other.get_by_role("button", name="Cancel", exact=True).click()
    expect(other.locator(".job")).to_have_count(0)
    assert names(page) == before
    other.context.close()


def test_hosts_show_their_memory_and_the_links_between_them(page: Page) -> None:
    """As a larger mesh would tell of them, in every state that a host may be in."""
    status = page.request.get(f"{page.url}api/status").json()
    (own,) = status["hosts"]
    page.get_by_label("More settings").click()
    expect(page.get_by_label("Spread over hosts")).to_be_hidden()  # over one there is no choice
    memory = {"memory_bytes": 64 * 10**9, "memory_used_bytes": 16 * 10**9}
    states = get_args(State)
    status["hosts"] = [
        *(
            own | memory | {"rank": rank, "name": f"studio {state}", "state": state}
            for rank, state in enumerate(states)
        ),
        own | memory | {"rank": 9, "name": "mini", "state": "gone", "reason": "It is silent."},
    ]
    status["links"] = [{"from": 0, "to": 9, "bytes_per_second": 3.2e9}]
    page.route("**/api/status", lambda route: route.fulfill(json=status))
    page.locator("#mesh-open").click()
    expect(page.locator("#mesh-words")).to_contain_text("1 gone")
    expect(page.locator(".host").first).to_contain_text("16 GB of 64 GB")
    expect(page.locator(".host").last).to_contain_text("It is silent.")
    expect(page.locator("#links li")).to_have_text(re.compile(r"studio idle → mini\s*3\.2 GB/s"))
    kinds = page.locator(".host .dot").evaluate_all("(dots) => dots.map((dot) => dot.className)")
    kind_of = {"idle": "good", "ready": "good", "loading": "busy", "busy": "busy", "failed": "bad"}
    assert kinds == [*(f"dot {kind_of[state]}" for state in states), "dot bad"]
    expect(page.locator("#placement")).to_be_visible()


def test_a_page_that_is_loaded_again_goes_on_with_what_it_asked_for(page: Page) -> None:
    set_up(page, "a long picture", **LONG)
    page.get_by_role("button", name="Paint", exact=True).click()
    expect(page.locator(".job-state")).to_contain_text(re.compile(r"Step \d+ of 150"))
    page.reload()
    expect(page.locator(".job-prompt")).to_have_text("a long picture")
    expect(page.locator(".tile img.preview")).to_be_visible()
    page.get_by_role("button", name="Cancel", exact=True).click()
    expect(page.locator(".job")).to_have_count(0)


def test_a_stream_that_breaks_is_taken_up_where_it_broke(page: Page) -> None:
    """The browser is offline for a moment: each step is shown once, and the picture comes."""
    before = names(page)
    set_up(page, "a blue bird", steps="40", side="64")
    page.get_by_role("button", name="Paint", exact=True).click()
    expect(page.locator(".job-state")).to_contain_text(re.compile("Step"))
    page.context.set_offline(True)
    expect(page.locator("#offline")).to_be_visible()
    page.context.set_offline(False)
    finished(page, before)
    expect(page.locator("#offline")).to_be_hidden()


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
    attach(page, png())
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


@pytest.fixture
def locked(environment: dict[str, str], tmp_path: Path) -> Iterator[str]:
    """A server that asks for a key."""
    key = tmp_path / "key"
    own = {"FLUXMESH_HOME": str(tmp_path / "home"), "FLUXMESH_STATE": str(tmp_path / "state")}
    with server(
        *("--model", "tiny", "--key-file", key, "--pictures", tmp_path / "out"),
        environment=environment | own,
        folder=tmp_path,
    ) as process:
        yield process.url
        process.signal()
        process.ended()


def test_a_server_with_a_key_asks_for_it_once(
    browser: Browser, locked: str, tmp_path: Path
) -> None:
    page = browser.new_context().new_page()
    page.goto(locked)
    expect(page.get_by_role("heading", name="This server has a key")).to_be_visible()
    page.keyboard.press("Escape")
    page.get_by_label("Key", exact=True).fill("a guess")
    page.get_by_role("button", name="Open", exact=True).click()
    expect(page.locator("#key-error")).to_have_text("That is not the key of this server.")
    page.get_by_label("Key", exact=True).fill((tmp_path / "key").read_text().strip())
    page.keyboard.press("Enter")
    expect(page.locator("#mesh-words")).to_have_text("1 host")
    page.reload()
    expect(page.locator("#mesh-words")).to_have_text("1 host")
    expect(page.locator("#locked")).to_be_hidden()
    page.context.close()
