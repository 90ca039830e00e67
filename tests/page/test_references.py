"""Several pictures at once, and a second model: the page before a FLUX.2 model that takes both."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import BrowserContext, Page, expect

from fluxmesh_coordinator.artifacts.recipe import read_recipe
from tests.flux2_checkpoint import make_flux2
from tests.page.actions import finished, names, png, set_up, until
from tests.page.conftest import Served, open_page
from tests.server_process import server


@pytest.fixture(scope="module")
def klein(
    environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """A server of a random model that takes references, and of `tiny`, which takes none."""
    folder = tmp_path_factory.mktemp("klein")
    model = make_flux2(folder / "my-klein")
    options = ("--model", model, "--pictures", folder / "out")
    own = {name: str(folder / name) for name in ("FLUXMESH_HOME", "FLUXMESH_STATE")}
    with server(*options, environment=environment | own, folder=folder) as process:
        yield Served(process, folder / "out")
        process.signal()
        assert process.ended() == 0


@pytest.fixture
def page(context: BrowserContext, klein: Served) -> Page:
    page = context.new_page()
    open_page(page, klein.url)
    return page


def drop(page: Page, *pictures: bytes) -> None:
    """All of them at once, as from a folder's window."""
    page.evaluate(
        """(texts) => {
          const files = new DataTransfer();
          texts.forEach((text, k) => {
            const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
            files.items.add(new File([bytes], `${k}.png`, { type: "image/png" }));
          });
          document.body.dispatchEvent(
            new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer: files }));
        }""",
        [base64.b64encode(data).decode() for data in pictures],
    )
    expect(page.locator(".attachment")).to_have_count(len(pictures))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


COLOURS = ((200, 60, 30), (30, 200, 60), (60, 30, 200))


def test_pictures_that_are_dropped_are_references_of_an_edit(page: Page, klein: Served) -> None:
    sent: list[dict[str, Any]] = []
    page.on(
        "request",
        lambda request: (
            sent.append(request.post_data_json) if request.url.endswith("/api/jobs") else None
        ),
    )
    drop(page, *(png(64, colour) for colour in COLOURS))
    widths = "[...document.querySelectorAll('.attachment img')].map((image) => image.naturalWidth)"
    until(page, f"{widths}.join() === '64,64,64'")
    for number in (1, 2, 3):
        expect(page.get_by_label(f"What picture {number} is for")).to_have_value("references")
    page.get_by_role("button", name="Remove picture 2").click()
    expect(page.locator(".attachment")).to_have_count(2)
    before = names(page)
    set_up(page, "the first on the second", side="64", seed="3")
    page.get_by_role("button", name="Paint", exact=True).click()
    name = finished(page, before)
    expect(page.locator("#told")).to_have_text("The picture is finished.")
    (fields,) = sent
    kept = [base64.b64encode(png(64, COLOURS[k])).decode() for k in (0, 2)]
    assert fields["references"] == kept and "image" not in fields
    assert len(read_recipe(klein.pictures / name).references) == 2
    # They are looked at: without them it is another picture.
    plain = {key: value for key, value in fields.items() if key != "references"}
    job = httpx2.post(f"{klein.url}/api/jobs", json=plain, timeout=60).json()["id"]
    assert "event: done" in httpx2.get(f"{klein.url}/api/jobs/{job}/events", timeout=60).text
    expect(page.locator("#pictures li")).to_have_count(len(before) + 1)
    (other,) = {path.name for path in klein.pictures.glob("*.png")} - {*before, name}
    assert not np.array_equal(pixels(klein.pictures / name), pixels(klein.pictures / other))
    # A finished picture that is edited is what the next one looks at.
    page.locator(f'[data-name="{name}"] button').click()
    page.get_by_role("button", name="Edit", exact=True).click()
    expect(page.locator(".attachment")).to_have_count(1)
    expect(page.get_by_label("What this picture is for")).to_have_value("references")
    expect(page.get_by_label("Prompt")).to_have_value("the first on the second")


def test_another_model_takes_one_of_several_pictures_and_says_which(
    page: Page, klein: Served
) -> None:
    """Nothing is sent that nobody sees, and nothing is lost by looking at another model."""
    drop(page, png(64, COLOURS[0]), png(64, COLOURS[1]))
    page.get_by_label("Model").select_option("tiny")
    items = page.locator(".attachment")
    expect(items.nth(0).get_by_role("button", name="Brush a mask")).to_be_visible()
    expect(items.nth(1)).to_contain_text("Not taken by this model")
    before = names(page)
    set_up(page, "a red apple", side="64")
    page.get_by_role("button", name="Paint", exact=True).click()
    recipe = read_recipe(klein.pictures / finished(page, before))
    assert recipe.model == "tiny" and recipe.source is not None
    page.get_by_label("Model").select_option("my-klein")
    first, second = (page.get_by_label(f"What picture {number} is for") for number in (1, 2))
    expect(first).to_have_value("image")
    expect(second).to_have_value("references")
    second.select_option("image")  # only one can be painted over: they change places
    expect(first).to_have_value("references")
    expect(second).to_have_value("image")
