"""One job's life, event by event: who is given what, and that no loss costs a picture or a step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxmesh import events
from fluxmesh.errors import FluxmeshError, WeightsError
from fluxmesh.request import SourceImage
from fluxmesh.wire import messages
from fluxmesh_coordinator.jobs.host import HostState
from fluxmesh_coordinator.jobs.types import Answered, Gone, Reported
from tests.fakes import FEATURES
from tests.unit.simulated_jobs import GenerationSimulation

PLACEMENTS = ["data", "sequence", "tensor"]


@pytest.mark.parametrize("hosts", [1, 2, 3, 4])
@pytest.mark.parametrize("images", [1, 5])
def test_images_are_shared_out_and_each_is_the_one_of_its_seed(hosts: int, images: int) -> None:
    done = GenerationSimulation(hosts, n_images=images, placement="data").run()
    done.check()
    made = [len(machine.made) // 3 for machine in done.machines.values()]
    assert sum(made) == images
    assert max(made) - min(made) <= 1 or images < hosts
    assert done.messages(messages.Join) == []
    assert len(done.messages(messages.Encode)) == 1


@pytest.mark.parametrize("placement", ["sequence", "tensor"])
@pytest.mark.parametrize("hosts", [2, 4])
def test_a_ring_makes_every_step_together(placement: Any, hosts: int) -> None:
    done = GenerationSimulation(hosts, n_images=2, placement=placement).run()
    done.check()
    for machine in done.machines.values():
        assert machine.made == [(image, step) for image in (0, 1) for step in (1, 2, 3)]
    joins = done.messages(messages.Join)
    assert [(join.rank, join.size) for join in joins] == [(rank, hosts) for rank in range(hosts)]
    assert len({join.nonce for join in joins}) == 1
    assert len(done.messages(messages.AskPorts)) == hosts


def test_nothing_moves_before_the_ring_has_proved_itself() -> None:
    done = GenerationSimulation(2, placement="sequence").run()
    kinds = [type(send.message) for send in done.sent]
    assert max(i for i, kind in enumerate(kinds) if kind is messages.Join) < min(
        i for i, kind in enumerate(kinds) if kind in (messages.Load, messages.Encode)
    )


def test_a_ring_that_stands_is_used_again() -> None:
    first = GenerationSimulation(2, placement="sequence").run()
    second = GenerationSimulation(2, placement="sequence")
    for rank, machine in second.machines.items():
        nonce = first.messages(messages.Join)[rank].nonce
        machine.leased = replace(
            machine.leased,
            fence=2,
            ring_generation=1,
            is_up=True,
            ring=messages.ring_name(nonce),
            ring_rank=rank,
            ring_size=2,
        )
        machine.engine = first.machines[rank].engine
    second.run().check()
    assert second.messages(messages.Join) == []
    assert {message.ring_generation for message in second.messages(messages.Paint)} == {1}


def test_events_come_in_the_order_of_the_work() -> None:
    done = GenerationSimulation(1, n_images=2).run()
    kinds = [type(event) for event in done.events if not isinstance(event, events.Loading)]
    image = [*[events.Step] * 3, events.Picture]
    assert kinds[:3] == [events.Planned, events.Encoded, events.Peak]
    assert sorted(kinds[3:-2], key=str) == sorted(image * 2, key=str)
    assert {event.phase: event.bytes for event in done.of(events.Peak)} == {
        "text": 3,
        "denoise": 4,
        "decode": 5,
    }


def test_images_are_decoded_in_groups_that_do_not_depend_on_the_hosts() -> None:
    for hosts in (1, 3):
        done = GenerationSimulation(
            hosts, n_images=5, decoding_batch_size=2, placement="data"
        ).run()
        done.check()
        groups = {decode.images for decode in done.messages(messages.Decode)}
        assert groups == {(0, 1), (2, 3), (4,)}


def test_with_low_memory_nothing_is_decoded_before_all_is_painted() -> None:
    done = GenerationSimulation(2, n_images=4, low_memory=True).run()
    done.check()
    kinds = [type(event) for event in done.events]
    assert kinds.index(events.Picture) > max(
        i for i, kind in enumerate(kinds) if kind is events.Step
    )


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("after", range(1, 33, 3))
@pytest.mark.parametrize("fault", ["kill_engine", "lose"])
def test_a_death_changes_no_picture_that_a_cache_approximates(
    placement: Any, after: int, fault: str
) -> None:
    """A lost cache is made again from what the last computed step began from."""

    def break_one(mesh: GenerationSimulation) -> None:
        if mesh.reports == after and not struck:
            struck.append(True)
            getattr(mesh, fault)(1)

    struck: list[bool] = []
    keys = {"n_images": 2, "steps": 9, "cache": 0.1, "placement": placement}
    done = GenerationSimulation(3, **keys, faults=break_one).run()
    done.check()
    assert struck
    for event in done.of(events.Picture):
        assert (event.steps, event.reused) == (9, 5)
    steps = {(event.image, event.step): event.reused for event in done.of(events.Step)}
    assert [steps[0, k + 1] for k in range(9)] == [False, True, True] * 2 + [False, True, False]
    sent = [paint for paint in done.messages(messages.Paint) if paint.first]
    assert all(paint.basis < paint.first for paint in sent)


def test_without_a_cache_no_latents_travel_for_one() -> None:
    def break_one(mesh: GenerationSimulation) -> None:
        if mesh.reports == 12 and not mesh.of(events.HostLost):
            mesh.kill_engine(0)

    done = GenerationSimulation(1, steps=9, faults=break_one).run()
    done.check()
    assert {(event.steps, event.reused) for event in done.of(events.Picture)} == {(9, 0)}
    paints = done.messages(messages.Paint)
    assert [paint.first > 1 for paint in paints] == [False, True]
    assert all(paint.basis_latents is None for paint in paints)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(PLACEMENTS),
    st.integers(1, 5),
    st.lists(
        st.tuples(
            st.integers(0, 60),
            st.sampled_from(["kill_engine", "stop_engine", "lose"]),
            st.integers(0, 3),
        ),
        max_size=3,
    ),
)
def test_any_three_faults_on_four_hosts_lose_nothing(
    placement: Any, images: int, faults: list[tuple[int, str, int]]
) -> None:
    left = list(faults)

    def break_some(mesh: GenerationSimulation) -> None:
        for fault in [fault for fault in left if fault[0] <= mesh.reports]:
            left.remove(fault)
            if fault[2] in mesh.machines and fault[2] in mesh.session.state.hosts:
                getattr(mesh, fault[1])(fault[2])

    GenerationSimulation(4, n_images=images, placement=placement, faults=break_some).run().check()


def test_a_first_step_is_waited_for_as_the_plan_reckons(monkeypatch: pytest.MonkeyPatch) -> None:
    expected: list[tuple[str, float, bool]] = []

    def expect(host: HostState, paint: messages.Paint, seconds: float, *, measured: bool) -> None:
        expected.append((paint.placement, seconds, measured))

    monkeypatch.setattr(HostState, "expect", expect)
    done = GenerationSimulation(2, placement="sequence").run()
    option = done.session.state.option
    assert option is not None
    assert expected == [("sequence", option.phases[0].step_seconds, option.measured)] * 2


def test_a_death_outside_of_a_ring_touches_nobody_else() -> None:
    def break_one(mesh: GenerationSimulation) -> None:
        if len(mesh.of(events.Step)) == 2 and not mesh.of(events.HostLost):
            mesh.kill_engine(0)

    done = GenerationSimulation(2, n_images=4, placement="data", faults=break_one).run()
    done.check()
    assert len(done.messages(messages.Kill, 0)) == 1, "what was on its way is not done twice"
    assert not done.messages(messages.Kill, 1)
    assert len(done.messages(messages.Load, 0)) == 2
    assert len(done.messages(messages.Load, 1)) == 1


def test_a_death_in_a_ring_ends_all_its_engines_and_begins_a_new_ring_generation() -> None:
    def break_one(mesh: GenerationSimulation) -> None:
        if len(mesh.of(events.Step)) == 2 and not mesh.of(events.HostLost):
            mesh.kill_engine(1)

    done = GenerationSimulation(2, placement="sequence", steps=6, faults=break_one).run()
    done.check()
    assert [kill.ring_generation for kill in done.messages(messages.Kill)] == [2, 2]
    joins = done.messages(messages.Join)
    assert [join.ring_generation for join in joins] == [1, 1, 3, 3]
    assert joins[0].nonce != joins[2].nonce
    assert joins[0].files != joins[2].files
    firsts = [(paint.first, paint.ring_generation) for paint in done.messages(messages.Paint, 0)]
    assert firsts == [(0, 1), (2, 3)]


@pytest.mark.parametrize(
    "asked", [{"placement": "sequence"}, {"placement": "tensor"}, {"force_shard": True}]
)
def test_a_ring_lost_for_a_late_host_is_not_formed_again_and_nobody_is_blamed(
    asked: dict[str, Any],
) -> None:
    def break_it(
        mesh: GenerationSimulation,
    ) -> None:  # as it would each time: the peer compiles again
        ring = mesh.session.state.ring
        if ring is not None and ring.is_up and len(mesh.of(events.Step)) >= 2:
            mesh.break_ring(0, "The GPU waited for too long.", messages.PEER_LATE)

    done = GenerationSimulation(3, steps=6, faults=break_it, **asked).run()
    done.check()
    assert [lost.host for lost in done.of(events.HostLost)] == [0]
    assert len({join.ring_generation for join in done.messages(messages.Join)}) == 1
    assert [plan.placement for plan in done.of(events.Planned)][1:] == ["data"]
    assert len(done.of(events.Step)) == 6  # what the ring had done stays done
    assert sorted(done.session.state.hosts) == [0, 1, 2]
    assert all(done.session.given_up([rank]) is None for rank in range(3))


def test_a_model_that_no_host_holds_goes_on_in_a_ring_after_a_late_host() -> None:
    def break_it(mesh: GenerationSimulation) -> None:
        if len(mesh.of(events.Step)) == 2 and not mesh.of(events.HostLost):
            mesh.break_ring(0, "The GPU waited for too long.", messages.PEER_LATE)

    mesh = GenerationSimulation(2, placement="tensor", steps=6, faults=break_it)
    size = 100_000
    mesh.give(size)
    while mesh.plan().winner is None:  # to the least with which one shard fits
        size += size // 10
        mesh.give(size)
    mesh.run().check()
    assert [plan.placement for plan in mesh.of(events.Planned)] == ["tensor", "tensor"]


def test_an_agent_that_hangs_has_failed_once() -> None:
    """Its engine's deadline passes first, then the agent itself is found to be silent."""
    mesh = GenerationSimulation(1, steps=5).begin()
    while len(mesh.of(events.Step)) < 2:
        mesh.turn()
    mesh.stop_engine(0)
    agent = mesh.machines.pop(0)
    while not mesh.messages(messages.Kill):
        mesh.turn()
    mesh.feed(Gone(0, "Its agent is silent."))
    assert mesh.stuck
    mesh.start_agent(0)
    mesh.begin().go_on()
    mesh.check()
    assert agent.made + mesh.machines[0].made == [(0, step) for step in range(1, 6)]


def test_one_host_that_fails_twice_fails_the_job_in_a_sentence() -> None:
    def break_it(mesh: GenerationSimulation) -> None:
        if mesh.of(events.Step) and mesh.session.state.hosts:
            mesh.kill_engine(0)

    done = GenerationSimulation(1, faults=break_it).run()
    assert type(done.error) is FluxmeshError
    assert str(done.error) == "mac0 failed twice: It was killed."


def test_a_host_whose_files_are_broken_is_left_out_while_another_has_them() -> None:
    def break_it(mesh: GenerationSimulation) -> None:
        for rank in bad:
            if rank in mesh.session.state.hosts and isinstance(
                mesh.machines[rank].at, messages.Load
            ):
                mesh.fail(rank, "WeightsError", "model.safetensors is truncated.")

    bad = [1]
    done = GenerationSimulation(2, n_images=2, placement="data", faults=break_it).run()
    done.check()
    assert done.machines[1].made == []
    bad = [0, 1]
    done = GenerationSimulation(2, n_images=2, placement="data", faults=break_it).run()
    assert isinstance(done.error, WeightsError)
    assert "mac0: model.safetensors is truncated." in str(done.error)
    assert "mac1: model.safetensors is truncated." in str(done.error)


def test_a_step_is_late_after_four_times_what_the_last_took_and_then_patience_doubles() -> None:
    def break_one(mesh: GenerationSimulation) -> None:
        if not stopped:
            mesh.now += 3.9
        if len(mesh.of(events.Step)) == 3 and not stopped:
            stopped.append(mesh.now)
            mesh.stop_engine(0)

    stopped: list[float] = []
    done = GenerationSimulation(1, steps=6, faults=break_one).run()
    done.check()
    (lost,) = done.of(events.HostLost)
    assert "a step did not come within 16 s" in lost.reason
    assert done.session.state.hosts[0].patience == 2


def test_an_engine_that_ticks_is_not_taken_for_dead() -> None:
    mesh = GenerationSimulation(1).begin()
    while not isinstance(mesh.machines[0].at, messages.Encode):
        mesh.report(0)
    ring_generation = mesh.session.state.hosts[0].ring_generation
    for _ in range(20):
        mesh.now += 3.0
        mesh.feed(
            Reported(0, messages.Beat(job="job", ring_generation=ring_generation, doing="encoding"))
        )
        mesh.tick()
    assert mesh.of(events.HostLost) == []
    mesh.now += 6.0
    mesh.tick()
    assert "no sign for 6 s" in mesh.of(events.HostLost)[0].reason


@pytest.mark.parametrize(
    ("every", "seconds", "reason"),
    [(0.0, 6, "no sign for 6 s while loading"), (1.0, 61, "not one byte was loaded for 60 s")],
)
def test_a_load_must_tick_and_its_bytes_must_come(every: float, seconds: int, reason: str) -> None:
    mesh = GenerationSimulation(1).begin()
    while not isinstance(mesh.machines[0].at, messages.Load):
        mesh.report(0)
    ring_generation = mesh.session.state.hosts[0].ring_generation
    mesh.feed(
        Reported(
            0,
            messages.LoadProgress(
                job="job",
                ring_generation=ring_generation,
                component="transformer",
                done_bytes=1,
                total_bytes=100,
            ),
        )
    )
    for _ in range(seconds):
        assert mesh.of(events.HostLost) == []
        mesh.now += 1.0
        if every:
            mesh.feed(
                Reported(
                    0, messages.Beat(job="job", ring_generation=ring_generation, doing="loading")
                )
            )
        mesh.tick()
    assert reason in mesh.of(events.HostLost)[0].reason


def test_a_lost_mesh_goes_on_where_it_stopped_when_a_host_is_back() -> None:
    def break_it(mesh: GenerationSimulation) -> None:
        if len(mesh.of(events.Step)) == 2 and not mesh.of(events.HostLost):
            mesh.lose(0)

    done = GenerationSimulation(1, steps=5, faults=break_it).run()
    assert done.stuck == ["The mesh has no host."] and done.end is None
    done.start_agent(0)
    done.begin().go_on()
    done.check()
    assert done.machines[0].made == [(0, 3), (0, 4), (0, 5)]


def test_a_host_that_returns_helps_with_whole_images() -> None:
    mesh = GenerationSimulation(2, n_images=8, placement="data").begin()
    while len(mesh.of(events.Step)) < 4:
        mesh.turn()
    mesh.lose(1)
    mesh.bring_back(1)
    mesh.go_on()
    mesh.check()
    assert mesh.machines[1].made


def test_what_is_left_over_from_another_ring_generation_or_job_is_dropped() -> None:
    mesh = GenerationSimulation(1).begin()
    while not mesh.of(events.Step):
        mesh.turn()
    latents = np.full((1, 4, 16), 9.0, np.float32)
    mesh.feed(
        Reported(
            0,
            messages.Stepped(
                job="job",
                ring_generation=7,
                image=0,
                step=3,
                is_last=True,
                seconds=0.1,
                peak_bytes=1,
                latents=latents,
            ),
        )
    )
    mesh.feed(
        Reported(
            0,
            messages.Stepped(
                job="other",
                ring_generation=0,
                image=0,
                step=3,
                is_last=True,
                seconds=0.1,
                peak_bytes=1,
                latents=latents,
            ),
        )
    )
    mesh.go_on().check()


def test_an_old_fence_means_that_the_host_is_lost() -> None:
    mesh = GenerationSimulation(1).begin()
    load = mesh.messages(messages.Load)[0]
    mesh.feed(Answered(0, load, messages.Refused("fence", "Another coordinator holds it.")))
    assert mesh.stuck and mesh.of(events.HostLost)[0].reason == "Another coordinator holds it."


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_prompts_features_reach_whoever_paints_as_they_were_given(placement: Any) -> None:
    """By names that no model has: nobody but an engine knows what they are."""
    mesh = GenerationSimulation(2, n_images=2, placement=placement).run()
    mesh.check()
    paints = mesh.messages(messages.Paint)
    assert {rank for rank in (0, 1) if mesh.messages(messages.Paint, rank)} == {0, 1}
    for paint in paints:
        assert {name: array.shape for name, array in paint.features.items()} == FEATURES
        given = {array.flat[0] for array in paint.features.values()}
        assert given == {len(mesh.request.prompt)}


def test_the_users_own_pixels_stay_outside_of_the_mask() -> None:
    pixels = np.full((32, 32, 3), 77, np.uint8)
    mask = np.zeros((32, 32), np.uint8)
    mask[:16] = 255
    done = GenerationSimulation(1, source=SourceImage(pixels, 1.0, mask)).run()
    (picture,) = done.of(events.Picture)
    assert (picture.pixels[16:] == 77).all()
    assert not (picture.pixels[:16] == 77).all()
    (paint,) = done.messages(messages.Paint)
    assert paint.source is not None and (paint.mask == mask).all()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_hosts_that_hold_different_files_are_named_before_a_ring_computes(placement: Any) -> None:
    mesh = GenerationSimulation(3, n_images=4, placement=placement)
    for rank, machine in mesh.machines.items():
        machine.engine.content = "newer" if rank == 1 else "older"
    mesh.run()
    assert mesh.end is not None and isinstance(mesh.end.error, WeightsError)
    named = "host 0 (mac0) older, host 1 (mac1) newer"
    assert named in str(mesh.end.error) and "fluxmesh models pull" in str(mesh.end.error)
    if placement != "data":
        assert mesh.messages(messages.Paint) == []
    assert mesh.is_idle


def test_encoders_that_came_from_other_files_are_refused_too() -> None:
    def swap(mesh: GenerationSimulation) -> None:
        for machine in mesh.machines.values():
            is_reading = isinstance(machine.at, messages.Encode)
            machine.engine.content = "newer" if is_reading else "older"

    mesh = GenerationSimulation(2, n_images=2, placement="sequence", faults=swap).run()
    assert mesh.end is not None and isinstance(mesh.end.error, WeightsError)
    assert "newer" in str(mesh.end.error) and "older" in str(mesh.end.error)
    assert mesh.messages(messages.Paint) == []


def test_a_cheap_step_leaves_a_slow_host_the_time_for_a_whole_one() -> None:
    mesh = GenerationSimulation(1, steps=9, cache=0.1).begin()
    while not mesh.messages(messages.Paint):
        mesh.turn()
    (paint,) = mesh.messages(messages.Paint)
    host = mesh.session.state.hosts[0]
    for step, (seconds, reused) in enumerate([(20.0, False), (0.1, True)], start=1):
        report = messages.Stepped(
            job="job",
            ring_generation=host.ring_generation,
            image=0,
            step=step,
            is_last=False,
            seconds=seconds,
            peak_bytes=1,
            latents=paint.noise,
        )
        mesh.feed(Reported(0, replace(report, reused=reused)))
        assert host.step_deadline(paint) == 80.0
