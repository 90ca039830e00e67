"""Many jobs of one browser: each tells of itself, over no more streams than a browser can hold.

A browser has six connections to a server, for all its pages together: a stream a job would leave
none for anything else.
"""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Locator, Page, Route, expect

from tests.page.actions import names, see, until
from tests.page.conftest import open_page
from tests.ports import free_ports
from tests.server_process import server

LONG = {"steps": 150, "width": 256, "height": 256}  # a picture that nobody waits for
SHORT = {"steps": 2, "width": 32, "height": 32}
SEND = "(fields) => import('/app.js').then(({ jobs }) => jobs.submit(fields))"
COUNTS = """
  window.streams = new Set();
  window.EventSource = class extends EventSource {
    constructor(url) { super(url); streams.add(this); }
    close() { streams.delete(this); super.close(); }
  };
"""


def send(page: Page, prompt: str, size: dict[str, int]) -> None:
    page.evaluate(SEND, {"prompt": prompt, "n_images": 1, **size})


def card(page: Page, prompt: str) -> Locator:
    return page.get_by_role("article", name=f"Painting: {prompt}", exact=True)


def cancel(page: Page, prompt: str) -> None:
    card(page, prompt).get_by_role("button", name="Cancel").click()
    expect(card(page, prompt)).to_have_count(0)


@pytest.fixture
def counted(context: BrowserContext, page: Page) -> Page:
    """The page, which counts its open streams."""
    context.add_init_script(COUNTS)
    page.reload()
    page.wait_for_selector("html[data-ready]", state="attached")
    return page


def test_seven_jobs_in_two_windows_leave_connections_for_all_else(
    counted: Page, context: BrowserContext
) -> None:
    page, prompts = counted, [f"dog {number}" for number in range(7)]
    for prompt in prompts:
        send(page, prompt, LONG)
    expect(card(page, "dog 0").locator(".job-state")).to_contain_text(re.compile(r"Step \d+"))
    for place, prompt in ((1, "dog 1"), (2, "dog 2"), (6, "dog 6")):
        state = card(page, prompt).locator(".job-state")
        expect(state).to_contain_text(re.compile(rf"^{place}(st|nd|rd|th) in line"))
    expect(page.locator(".tile:visible")).to_have_count(1)  # that which is painted is not far down
    other = context.new_page()
    open_page(other, page.url)
    expect(other.locator(".job")).to_have_count(7)
    expect(card(other, "dog 0").locator(".job-state")).to_contain_text(re.compile(r"Step \d+"))
    assert [each.evaluate("() => streams.size") for each in (page, other)] == [1, 1]
    cancel(other, "dog 1")
    expect(card(page, "dog 1")).to_have_count(0)
    state = card(page, "dog 6").locator(".job-state")
    expect(state).to_contain_text("5th in line")  # though it has no stream
    for prompt in reversed([prompts[0], *prompts[2:]]):
        cancel(page, prompt)
    expect(other.locator(".job")).to_have_count(0)
    until(page, "streams.size === 0")
    other.close()


def test_jobs_that_wait_become_pictures_one_after_another(counted: Page) -> None:
    before = names(counted)
    for number in range(4):
        send(counted, f"cat {number}", SHORT)
    expect(counted.locator("#pictures li")).to_have_count(len(before) + 4)
    expect(counted.locator(".job")).to_have_count(0)


def test_two_jobs_that_run_side_by_side_both_move(counted: Page) -> None:
    """As a mesh of several hosts would tell of them."""

    def both_run(route: Route) -> None:
        reply = route.fetch()
        status = reply.json()
        for row in status["queue"][:2]:
            row |= {"state": "running", "place": 0, "progress": 0.25}
        route.fulfill(response=reply, json=status)

    counted.route("**/api/status", both_run)
    for number in range(3):
        send(counted, f"bird {number}", LONG)
    until(counted, "streams.size === 2")
    expect(card(counted, "bird 1").locator(".job-state")).to_contain_text("25 % painted")
    for number in (2, 1, 0):
        cancel(counted, f"bird {number}")
    counted.unroute_all(behavior="wait")


def test_a_page_that_nobody_sees_holds_no_stream_and_catches_up(counted: Page) -> None:
    before = names(counted)
    send(counted, "a house", {"steps": 40, "width": 64, "height": 64})
    expect(card(counted, "a house").locator(".job-state")).to_contain_text(re.compile("Step"))
    see(counted, is_hidden=True)
    until(counted, "streams.size === 0")
    see(counted, is_hidden=False)
    expect(card(counted, "a house").locator(".job-state")).to_contain_text(re.compile("Step"))
    until(counted, "streams.size === 1")
    see(counted, is_hidden=True)
    status = f"{counted.url}api/status"
    while counted.request.get(status).json()["queue"]:
        counted.wait_for_timeout(100)
    expect(card(counted, "a house")).to_have_count(1)
    see(counted, is_hidden=False)
    expect(card(counted, "a house")).to_have_count(0)
    expect(counted.locator("#pictures li")).to_have_count(len(before) + 1)


def test_a_job_that_ended_badly_while_the_page_was_closed_says_so(
    context: BrowserContext, environment: dict[str, str], tmp_path: Path
) -> None:
    """Its server is killed, and another one begins at the same address."""
    page, (port,) = context.new_page(), free_ports(1)
    own = {name: str(tmp_path / name) for name in ("FLUXMESH_HOME", "FLUXMESH_STATE")}
    options = ("--model", "tiny", "--pictures", tmp_path / "out", "--port", port)
    about = {"environment": environment | own, "folder": tmp_path}
    with server(*options, **about) as process:
        open_page(page, process.url)
        send(page, "a dog that is lost", LONG)
        expect(card(page, "a dog that is lost")).to_contain_text(re.compile("Step"))
        page.goto("about:blank")
        process.signal(signal.SIGKILL)
        process.process.wait()
    with server(*options, **about) as process:
        open_page(page, process.url)
        expect(card(page, "a dog that is lost")).to_contain_text("The server was started anew")
        page.get_by_role("button", name="Close", exact=True).click()
        expect(page.locator(".job")).to_have_count(0)
        page.reload()
        page.wait_for_selector("html[data-ready]", state="attached")
        expect(page.locator(".job")).to_have_count(0)  # it is said once
        process.signal()
        process.ended()


def test_a_job_of_long_ago_leaves_without_a_word(page: Page) -> None:
    notes = "localStorage.getItem('fluxmesh.jobs')"
    note = '{"long-ago-0001": {"prompt": "a dog", "n_images": 1}}'
    page.evaluate("(note) => localStorage.setItem('fluxmesh.jobs', note)", note)
    page.add_init_script(
        """addEventListener("DOMContentLoaded", () => {
          window.seen = 0;
          const look = () => {
            seen += document.querySelectorAll(".job:not([hidden])").length;
            requestAnimationFrame(look);
          };
          look();
        });"""
    )
    page.reload()
    until(page, f"{notes} === '{{}}'")
    expect(page.locator(".job")).to_have_count(0)
    assert page.evaluate("() => seen") == 0


def test_a_window_that_has_heard_less_of_the_line_forgets_no_job_of_another(
    page: Page, context: BrowserContext
) -> None:
    while (idle := page.request.get(f"{page.url}api/status").json())["queue"]:
        page.wait_for_timeout(50)  # of tests before
    other = context.new_page()
    other.route("**/api/status", lambda route: route.fulfill(json=idle))
    open_page(other, page.url)
    send(page, "a dog of the first", LONG)
    with other.expect_response("**/api/status"):
        other.locator("#mesh-open").click()
    other.keyboard.press("Escape")
    expect(card(other, "a dog of the first")).to_contain_text(re.compile("Step"))
    assert "a dog of the first" in page.evaluate("() => localStorage.getItem('fluxmesh.jobs')")
    cancel(page, "a dog of the first")
    expect(other.locator(".job")).to_have_count(0)
    other.close()
