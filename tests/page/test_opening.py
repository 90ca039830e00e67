"""The page as it opens: for the first time, with the small models or with FLUX, and with a key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect

from tests.page.actions import FILL, LONG, names, see, set_up
from tests.page.conftest import WAIT, Served, open_page
from tests.server_process import server


def test_the_first_time_it_says_what_there_is_and_how_to_begin(page: Page) -> None:
    while names(page):  # of tests before
        for name in names(page):
            assert page.request.delete(f"{page.url}api/pictures/{name}").ok
        page.reload()
        page.wait_for_selector("html[data-ready]", state="attached")
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
    page.set_default_timeout(WAIT)
    page.goto(locked)
    expect(page.get_by_role("heading", name="This server has a key")).to_be_visible()
    for _ in range(3):  # a browser lets a page prevent it once
        page.keyboard.press("Escape")
    expect(page.get_by_role("heading", name="This server has a key")).to_be_visible()
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


def test_a_page_that_is_seen_again_shows_what_came_meanwhile(page: Page) -> None:
    """Pictures that others painted, and models that were pulled, beside what the form says."""
    known = page.request.get(f"{page.url}api/models").json()
    pulled = {**known["models"][0], "name": "tiny-pulled", "embedded": False}
    set_up(page, "a dog", steps="7", side="64")
    page.get_by_label("Model").select_option("tiny-klein")
    page.get_by_label("Steps", exact=True).focus()
    before = names(page)
    job = {"prompt": "of another", "steps": 1, "width": 32, "height": 32, "model": "tiny"}
    sent = page.request.post(f"{page.url}api/jobs", data=job).json()
    assert "event: done" in page.request.get(f"{page.url}api/jobs/{sent['id']}/events").text()
    see(page, is_hidden=True)
    see(page, is_hidden=False)
    expect(page.locator("#pictures li")).to_have_count(len(before) + 1)
    expect(page.get_by_label("Steps", exact=True)).to_be_focused()
    listed = {**known, "models": [*known["models"], pulled]}
    page.route("**/api/models", lambda route: route.fulfill(json=listed))
    see(page, is_hidden=False)
    expect(page.locator("#model option")).to_have_count(3)
    expect(page.locator("#hint")).to_be_hidden()  # there is more now than comes with fluxmesh
    for id, said in (("model", "tiny-klein"), ("prompt", "a dog"), ("steps", "7"), ("width", "64")):
        expect(page.locator(f"#{id}")).to_have_value(said)
    # A model that is gone is found out when it is asked for.
    page.get_by_label("Model").select_option("tiny-pulled")
    page.unroute("**/api/models")
    page.get_by_role("button", name="Paint", exact=True).click()
    expect(page.locator("#form-error")).to_contain_text("tiny-pulled is not on this server")
    expect(page.locator("#model option")).to_have_count(2)
    expect(page.get_by_label("Model")).to_have_value("tiny")
    expect(page.locator("#form-error")).to_be_visible()


def test_a_browser_that_remembers_nothing_knows_its_own_jobs(
    context: BrowserContext, served: Served
) -> None:
    page = context.new_page()
    page.add_init_script(
        """Object.defineProperty(window, "localStorage", { get() { throw new Error("no"); } });"""
    )
    open_page(page, served.url)
    set_up(page, "a long picture", **LONG)
    page.get_by_role("button", name="Paint", exact=True).click()
    page.locator("#mesh-open").click()
    page.locator("#queue").get_by_role("button", name="Cancel").click()
    expect(page.locator("#queue")).to_have_text("Nobody waits.")
    expect(page.locator(".job")).to_have_count(0)


def test_notes_that_are_no_json_are_no_reason_to_stand_still(page: Page) -> None:
    page.evaluate("() => localStorage.setItem('fluxmesh.jobs', '{\"a')")
    page.reload()
    page.wait_for_selector("html[data-ready]", state="attached")
    expect(page.locator("#mesh-words")).to_have_text("1 host")
    set_up(page, "a long picture", **LONG)
    page.get_by_role("button", name="Paint", exact=True).click()
    page.locator(".job").get_by_role("button", name="Cancel").click()
    expect(page.locator(".job")).to_have_count(0)
