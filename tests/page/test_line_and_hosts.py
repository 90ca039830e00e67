"""The line of jobs, streams that break, and the hosts that paint."""

from __future__ import annotations

import re
from typing import get_args

from playwright.sync_api import APIResponse, Browser, Page, Response, Route, expect

from fluxmesh.wire.messages.status import State
from tests.page.actions import LONG, finished, names, set_up
from tests.page.conftest import WAIT, open_page


def test_the_line_shows_a_place_and_is_left_by_a_button(page: Page, browser: Browser) -> None:
    """Two people: one paints something long, the other waits behind it."""
    other = browser.new_context().new_page()
    other.set_default_timeout(WAIT)
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


def test_a_job_is_shown_once_though_the_line_tells_of_it_before_its_own_answer(page: Page) -> None:
    held: list[tuple[Route, APIResponse]] = []
    page.route("**/api/jobs", lambda route: held.append((route, route.fetch())))
    before = names(page)
    set_up(page, "a dog that is heard of early", steps="20", side="64")
    page.get_by_label("Prompt").press("Control+Enter")

    def tells(response: Response) -> bool:
        if not response.url.endswith("/api/status"):
            return False
        return any(row["mine"] for row in response.json()["queue"])

    with page.expect_response(tells):
        page.locator("#mesh-open").click()  # as long as it is open, the line is asked for often
    page.keyboard.press("Escape")
    while not held:  # it is in the line, so its answer is on the way
        page.wait_for_timeout(50)
    ((route, answer),) = held
    route.fulfill(response=answer)
    expect(page.locator(".job-prompt")).to_have_text("a dog that is heard of early")
    finished(page, before)


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
    set_up(page, "a blue bird", steps="20", side="64")
    page.get_by_role("button", name="Paint", exact=True).click()
    expect(page.locator(".job-state")).to_contain_text(re.compile("Step"))
    page.context.set_offline(True)
    expect(page.locator("#offline")).to_be_visible()
    page.context.set_offline(False)
    finished(page, before)
    expect(page.locator("#offline")).to_be_hidden()


def test_a_job_that_could_not_be_cancelled_can_be_asked_to_end_again(page: Page) -> None:
    set_up(page, "a long picture", **LONG)
    page.get_by_role("button", name="Paint", exact=True).click()
    cancel = page.locator(".job").get_by_role("button", name="Cancel")
    page.route("**/api/jobs/*", lambda route: route.abort(), times=1)
    with page.expect_event("requestfailed"):
        cancel.click()
    expect(cancel).to_be_enabled()
    cancel.click()
    expect(page.locator(".job")).to_have_count(0)


def test_the_keyboard_stays_on_a_row_of_the_line_while_the_line_moves(page: Page) -> None:
    set_up(page, "a long picture", **LONG)
    page.get_by_role("button", name="Paint", exact=True).click()
    page.locator("#mesh-open").click()
    cancel = page.locator("#queue").get_by_role("button", name="Cancel")
    cancel.focus()
    where = page.locator("#queue .where").text_content()
    expect(page.locator("#queue .where")).not_to_have_text(where or "")
    expect(cancel).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#queue")).to_have_text("Nobody waits.")
    expect(page.locator("#mesh-close")).to_be_focused()
