"""The list of pictures: longer than one answer, and changed while the server is asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.page.actions import names
from tests.page.conftest import Served
from tests.page.gallery_actions import (
    Held,
    begin_to_load,
    expect_viewed,
    hold,
    load,
    press_delete_twice,
    store,
    swept,
    view,
)

PAGE = 50  # pictures of one answer
LISTS = "**/api/pictures?*"
ONE = "**/api/pictures/*"


@pytest.fixture
def folder(page: Page, served: Served) -> Iterator[Path]:
    """Of the server; the page has its first answer. What a test stores there is removed again."""
    with swept(served.pictures):
        store(served.pictures, 2 * PAGE + 10)
        page.reload()
        page.wait_for_selector("html[data-ready]", state="attached")
        assert names(page) == listed(served.pictures)[:PAGE]
        yield served.pictures


def listed(folder: Path) -> list[str]:
    """As the server lists them."""
    return sorted((path.name for path in folder.glob("*.png")), reverse=True)


def show_more(page: Page) -> None:
    shown = len(names(page))
    page.get_by_role("button", name="Show more").click()
    expect(page.locator("#pictures li")).not_to_have_count(shown)


def unanswered_deletion(page: Page, name: str) -> Held:
    view(page, name)
    deletions = hold(page, ONE, ("DELETE",))
    press_delete_twice(page)
    deletions.wait_for(1)
    return deletions


def test_no_picture_is_lost_or_twice_when_new_ones_come(page: Page, folder: Path) -> None:
    show_more(page)
    store(folder, 1, first=200)
    load(page)
    assert names(page) == listed(folder)[: 2 * PAGE + 1]
    store(folder, PAGE + 3, first=300)  # more than one answer has
    load(page)
    assert names(page) == listed(folder)[: 3 * PAGE + 4]
    show_more(page)
    assert names(page) == listed(folder)[: 4 * PAGE + 4]
    expect(page.locator("#show-more")).to_be_hidden()
    page.locator("#pictures button").nth(5).focus()
    load(page)
    focused = page.locator("#pictures button").nth(5)
    expect(focused).to_be_focused()  # who is there stays there
    expect(focused).to_have_attribute("tabindex", "0")


def test_pictures_that_were_deleted_elsewhere_leave_the_page(page: Page, folder: Path) -> None:
    show_more(page)
    for name in listed(folder)[10:]:
        if name.startswith("20990101"):
            (folder / name).unlink()
    load(page)
    assert names(page) == listed(folder)
    expect(page.locator("#show-more")).to_be_hidden()


def test_more_is_asked_for_once_whatever_happens_meanwhile(page: Page, folder: Path) -> None:
    more = hold(page, "**/api/pictures?*before=*")
    button = page.locator("#show-more")
    button.focus()
    for _ in range(3):
        page.keyboard.press("Enter")
    expect(button).to_be_disabled()
    store(folder, 2, first=200)
    load(page)
    more.wait_for(1)
    more.answer()
    expect(page.locator("#pictures li")).to_have_count(2 * PAGE + 2)
    assert names(page) == listed(folder)[: 2 * PAGE + 2]
    assert not more.routes
    expect(page.locator("#pictures button").nth(PAGE + 2)).to_be_focused()
    page.locator("#show-more").click()
    more.wait_for(1)
    page.get_by_label("Prompt").focus()
    more.answer()
    expect(page.locator("#show-more")).to_be_hidden()
    expect(page.get_by_label("Prompt")).to_be_focused()  # who went elsewhere is not called back


def test_the_end_of_the_list_can_change_while_more_is_asked_for(page: Page, folder: Path) -> None:
    more = hold(page, "**/api/pictures?*before=*")
    page.locator("#show-more").click()
    more.wait_for(1)
    old = listed(folder)[5:]
    kept = {name: (folder / name).read_bytes() for name in old}
    for name in old:
        (folder / name).unlink()
    load(page)
    for name, data in kept.items():  # the answer that comes has pictures; the list has ended
        (folder / name).write_bytes(data)
    with page.expect_response("**/api/pictures?*before=*"):
        more.answer()
    expect(page.locator("#show-more")).to_be_enabled()
    load(page)
    assert names(page) == listed(folder)[:PAGE]
    page.locator("#show-more").click()
    more.wait_for(1)
    more.answer()
    expect(page.locator("#pictures li")).to_have_count(2 * PAGE)
    assert names(page) == listed(folder)[: 2 * PAGE]


def test_more_that_fails_is_told_and_asked_for_again(page: Page, folder: Path) -> None:
    page.route(LISTS, lambda route: route.abort())
    button = page.locator("#show-more")
    button.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#told")).to_have_text("The server does not answer.")
    expect(button).to_be_focused()
    page.unroute(LISTS)
    page.keyboard.press("Enter")
    expect(page.locator("#pictures li")).to_have_count(2 * PAGE)


def test_of_two_lists_the_one_that_was_asked_for_last_is_shown(page: Page, folder: Path) -> None:
    lists = hold(page, LISTS)
    old = page.request.get(f"{page.url}api/pictures?limit={PAGE}").json()
    begin_to_load(page)
    lists.wait_for(1)
    store(folder, 3, first=200)
    begin_to_load(page)
    lists.wait_for(2)
    lists.answer(1)
    expect(page.locator("#pictures li").first).to_have_attribute("data-name", listed(folder)[0])
    with page.expect_response(LISTS):
        lists.routes.pop().fulfill(json=old)
    page.wait_for_timeout(100)
    assert names(page) == listed(folder)[: PAGE + 3]


def test_a_late_deletion_takes_its_own_picture_off_the_page(page: Page, folder: Path) -> None:
    first = listed(folder)
    view(page, first[0])
    deletions = hold(page, ONE, ("DELETE",))
    press_delete_twice(page)
    deletions.wait_for(1)
    new = store(folder, 2, first=200)
    load(page)
    assert names(page)[:3] == [*new, first[0]]
    page.keyboard.press("ArrowLeft")
    expect_viewed(page, new[1])  # newer ones can be gone to at once
    deletions.answer()
    expect(page.locator(f'[data-name="{first[0]}"]')).to_have_count(0)
    assert names(page)[:3] == [*new, first[1]]
    expect_viewed(page, new[1])  # not that of which the server told


def test_a_window_that_was_closed_stays_closed_when_a_deletion_is_answered(
    page: Page, folder: Path
) -> None:
    first = listed(folder)
    deletions = unanswered_deletion(page, first[1])
    page.keyboard.press("Escape")
    expect(page.locator("#viewer")).to_be_hidden()
    deletions.answer()
    expect(page.locator(f'[data-name="{first[1]}"]')).to_have_count(0)
    expect(page.locator("#viewer")).to_be_hidden()
    assert names(page)[:2] == [first[0], first[2]]


def test_a_list_that_was_asked_for_before_a_deletion_brings_nothing_back(
    page: Page, folder: Path
) -> None:
    first = listed(folder)
    lists = hold(page, LISTS)
    old = page.request.get(f"{page.url}api/pictures?limit={PAGE}").json()
    view(page, first[0])
    begin_to_load(page)
    lists.wait_for(1)
    press_delete_twice(page)
    expect_viewed(page, first[1])
    with page.expect_response(LISTS):
        lists.routes.pop().fulfill(json=old)
    page.wait_for_timeout(100)
    assert names(page)[:2] == first[1:3]


def test_a_window_goes_on_although_a_list_knew_of_the_deletion_first(
    page: Page, folder: Path
) -> None:
    first = listed(folder)
    deletions = unanswered_deletion(page, first[1])
    (folder / first[1]).unlink()
    load(page)
    assert names(page)[:2] == [first[0], first[2]]
    expect_viewed(page, first[1])
    deletions.routes.pop().fulfill(status=204)
    expect_viewed(page, first[2])


def test_the_window_of_a_picture_that_was_deleted_elsewhere_closes(
    page: Page, folder: Path
) -> None:
    first = listed(folder)
    view(page, first[1])
    load(page)
    expect_viewed(page, first[1])
    (folder / first[1]).unlink()
    load(page)
    expect(page.locator("#viewer")).to_be_hidden()
    expect(page.locator("#told")).to_have_text("The picture was deleted elsewhere.")
    view(page, first[2])


def test_who_deletes_all_that_is_shown_is_not_told_that_there_is_nothing(
    page: Page, folder: Path
) -> None:
    last = listed(folder)[0]
    few = page.request.get(f"{page.url}api/pictures?limit=1").json()
    page.route(LISTS, lambda route: route.fulfill(json=few), times=1)
    page.reload()
    page.wait_for_selector("html[data-ready]", state="attached")
    assert names(page) == [last]
    view(page, last)
    press_delete_twice(page)
    expect(page.locator("#viewer")).to_be_hidden()
    expect(page.get_by_text("Nothing here yet.")).to_be_hidden()
    page.get_by_role("button", name="Show more").click()
    expect(page.locator("#pictures li")).to_have_count(PAGE)
    assert names(page) == listed(folder)[:PAGE]


def test_a_finished_picture_that_is_gone_is_not_opened(page: Page, folder: Path) -> None:
    opened = "(name) => import('/app.js').then(({ gallery }) => gallery.open(name))"
    (new,) = store(folder, 1, first=200)
    page.evaluate(opened, new)
    expect_viewed(page, new)
    page.keyboard.press("Escape")
    (folder / new).unlink()
    load(page)
    page.evaluate(opened, new)
    expect(page.locator("#told")).to_have_text("The picture is not there any more.")
    expect(page.locator("#viewer")).to_be_hidden()
