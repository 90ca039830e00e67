"""Leases of a host: first come, first served; fences; silence."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fluxmesh.deadlines import DEADLINES
from fluxmesh.wire.messages import JobProgress
from fluxmesh_agent.leases import Holds, InLine, Leases, Loses


def granted(leases: Leases, client: str, now: float = 0.0) -> int:
    leases.ask(client, "job", 10.0, now)
    (notice,) = [n for n in leases.tick(now) if isinstance(n, Holds)]
    assert notice.client == client
    return notice.fence


def test_the_first_who_asks_gets_the_lease_and_the_others_their_places() -> None:
    leases = Leases()
    assert granted(leases, "a") == 1
    leases.ask("b", "job", 5.0, 1.0)
    leases.ask("c", "job", 5.0, 1.0)
    leases.hear("a", 1.0)
    # "a" said that it takes 10 seconds, one of which is over; "b" takes 5 more.
    assert leases.tick(1.0) == [InLine("b", 1, 9.0), InLine("c", 2, 14.0)]
    assert (leases.holder, leases.waiting) == ("a", 2)


def test_those_who_wait_hear_of_a_new_place_at_once_and_of_the_old_one_now_and_then() -> None:
    leases = Leases()
    granted(leases, "a")
    leases.ask("b", "job", 5.0, 0.0)
    leases.ask("c", "job", 5.0, 0.0)
    assert len(leases.tick(0.1)) == 2
    assert leases.tick(0.2) == []
    notices = leases.tick(0.2 + DEADLINES.tell_place)
    assert [n.place for n in notices if isinstance(n, InLine)] == [1, 2]
    leases.leave("b")
    (notice,) = leases.tick(0.3 + DEADLINES.tell_place)
    assert isinstance(notice, InLine)
    assert (notice.client, notice.place) == ("c", 1)


def test_a_lease_that_is_left_goes_to_the_next_with_a_higher_fence() -> None:
    leases = Leases(first_fence=40)
    assert granted(leases, "a") == 40
    leases.ask("b", "job", 5.0, 0.0)
    assert leases.leave("a")
    assert leases.tick(0.1) == [Holds("b", 41)]
    assert leases.is_valid("b", 41)
    assert not leases.is_valid("a", 40)
    assert not leases.is_valid("a", 41)
    assert not leases.is_valid("b", 40)


def test_the_holder_tells_how_far_it_is_and_those_in_line_know_better_how_long() -> None:
    leases = Leases()
    assert leases.held_for(0.0) is None
    leases.heard_progress(JobProgress(unit="image"), 0.0)  # of nobody
    leases.ask("a", "job", 10.0, 0.0, user="anna@studio", title="4 images")
    leases.tick(0.0)
    leases.ask("b", "job", 7.0, 1.0, user="ben@air", title="training")
    leases.ask("c", "job", 5.0, 1.0, user="cleo@mini")
    holder = leases.held_for(4.0)
    assert holder is not None
    assert (holder.user, holder.title, holder.progress.seconds) == ("anna@studio", "4 images", 6.0)
    assert [(job.user, job.title, job.seconds) for job in leases.waiting_jobs(4.0)] == [
        ("ben@air", "training", 6.0),
        ("cleo@mini", "", 13.0),
    ]
    leases.heard_progress(JobProgress(unit="image", done=1, total=4, seconds=30.0), 5.0)
    holder = leases.held_for(8.0)
    assert holder is not None
    assert (holder.progress.done, holder.progress.total, holder.progress.seconds) == (1, 4, 27.0)
    assert [job.seconds for job in leases.waiting_jobs(8.0)] == [27.0, 34.0]
    leases.leave("a")
    leases.hear("b", 9.0)
    leases.tick(9.0)
    holder = leases.held_for(9.0)
    assert holder is not None  # with nothing of the one before
    assert (holder.user, holder.progress.done, holder.progress.seconds) == ("ben@air", 0, 7.0)


def test_nobody_gets_the_lease_before_the_last_holders_work_has_ended() -> None:
    leases = Leases()
    granted(leases, "a")
    leases.ask("b", "job", 5.0, 0.0)
    leases.leave("a")
    assert not any(isinstance(n, Holds) for n in leases.tick(0.1, is_free=False))
    assert leases.tick(0.2, is_free=True) == [Holds("b", 2)]


def test_who_falls_silent_loses_the_lease_and_who_waits_loses_the_place() -> None:
    leases = Leases()
    granted(leases, "a")
    leases.ask("b", "job", 5.0, 0.0)
    leases.ask("c", "job", 5.0, 0.0)
    leases.hear("c", DEADLINES.silence)
    notices = leases.tick(DEADLINES.silence + 0.1)
    assert [n.client for n in notices if isinstance(n, Loses)] == ["a", "b"]
    assert Holds("c", 2) in notices
    assert leases.waiting == 0


def test_any_sign_of_life_keeps_a_lease() -> None:
    leases = Leases()
    granted(leases, "a")
    for second in range(20):
        leases.hear("a", float(second))
        assert leases.tick(second + 0.9) == []
    assert leases.holder == "a"


def test_asking_again_changes_nothing_but_the_job() -> None:
    leases = Leases()
    fence = granted(leases, "a")
    leases.ask("b", "job", 5.0, 0.0)
    assert leases.ask("a", "other", 99.0, 1.0) == [Holds("a", fence)]
    assert leases.ask("b", "job", 5.0, 1.0) == []
    assert leases.waiting == 1


def test_clients_of_yesterday_are_forgotten() -> None:
    leases = Leases()
    for number in range(1000):
        leases.hear(str(number), float(number))
        leases.tick(float(number))
    assert len(leases._heard) < 10


def test_leaving_a_line_is_not_leaving_a_lease() -> None:
    leases = Leases()
    granted(leases, "a")
    leases.ask("b", "job", 5.0, 0.0)
    assert not leases.leave("b")
    assert not leases.leave("nobody")
    assert (leases.holder, leases.waiting) == ("a", 0)


CLIENTS = st.sampled_from(["a", "b", "c"])
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), CLIENTS),
        st.tuples(st.just("leave"), CLIENTS),
        st.tuples(st.just("hear"), CLIENTS),
        st.tuples(st.just("wait"), st.floats(0.0, 4.0)),
    ),
    max_size=60,
)


@given(EVENTS)
def test_whatever_happens_one_holds_it_in_order_and_fences_rise(events) -> None:
    leases = Leases()
    now, fences, line = 0.0, [0], []
    for kind, value in events:
        if kind == "ask":
            leases.ask(value, "job", 1.0, now)
            if value not in line:
                line.append(value)
        elif kind == "leave":
            leases.leave(value)
            line = [client for client in line if client != value]
        elif kind == "hear":
            leases.hear(value, now)
        else:
            now += value
        for notice in leases.tick(now):
            if isinstance(notice, Loses):
                line.remove(notice.client)
            elif isinstance(notice, Holds):
                assert notice.fence > fences[-1]
                fences.append(notice.fence)
        assert leases.holder == (line[0] if line else "")
        assert leases.waiting == max(0, len(line) - 1)


def test_how_long_a_job_says_it_takes_is_a_number_for_all_who_wait() -> None:
    leases = Leases()
    granted(leases, "a")
    for client, seconds in (("b", 1.7e308), ("c", 1.7e308), ("d", -1e308), ("e", 1.0)):
        leases.ask(client, "job", seconds, 0.0)
    waits = [n.seconds for n in leases.tick(0.0) if isinstance(n, InLine)]
    assert waits == [10.0, 10.0 + 1e9, 10.0 + 2e9, 10.0 + 2e9]


def test_who_is_gone_holds_nobody_up_unless_it_comes_back_soon() -> None:
    leases = Leases()
    fence = granted(leases, "a")
    leases.ask("b", "job", 5.0, 1.0)
    leases.gone("a", 1.0)
    assert leases.tick(1.0 + 0.9 * DEADLINES.left)[-1:] != [Holds("b", fence + 1)]
    leases.hear("a", 1.0 + 0.9 * DEADLINES.left)  # another conversation of it
    leases.hear("b", 3.0)
    leases.tick(1.0 + 1.1 * DEADLINES.left)
    assert leases.holder == "a"

    leases.gone("a", 3.0)
    notices = leases.tick(3.0 + 1.1 * DEADLINES.left)
    assert [notice.client for notice in notices if isinstance(notice, Loses)] == ["a"]
    assert Holds("b", fence + 1) in notices
    leases.gone("nobody", 9.0)
