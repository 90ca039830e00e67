"""Hosts that a generation loses and that return: no loss costs a picture or a step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxmesh import events
from fluxmesh.errors import FluxmeshError, WeightsError
from fluxmesh.wire import messages
from fluxmesh_coordinator.jobs.types import Answered, Reported
from tests.unit.simulated_jobs import PLACEMENTS, GenerationSimulation


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


@pytest.mark.parametrize("placement", ["sequence", "tensor"])
def test_a_late_host_is_heard_of_too_where_a_neighbour_noticed_first(placement: Any) -> None:
    struck: list[int] = []

    def break_it(mesh: GenerationSimulation) -> None:
        ring = mesh.session.state.ring
        if struck or ring is None or not ring.is_up or len(mesh.of(events.Step)) < 2:
            return
        struck.append(1)
        late = messages.Failed(
            ring_generation=mesh.session.state.hosts[1].ring_generation, job="job",
            kind=messages.PEER_LATE, text="The GPU waited for too long.", fatal=True,
        )  # fmt: skip
        machine = mesh.machines.pop(1)  # its engine has not ended yet
        mesh.break_ring(0, "[ring] connection to a peer was lost")
        (kill,) = (
            sent.message
            for sent in mesh.sent
            if sent.rank == 1 and isinstance(sent.message, messages.Kill)
        )
        mesh.feed(Reported(1, late))
        machine.empty()
        mesh.machines[1] = machine
        mesh.feed(Answered(1, kill, messages.Done()))

    done = GenerationSimulation(3, steps=6, faults=break_it, placement=placement).run()
    done.check()
    assert [plan.placement for plan in done.of(events.Planned)] == [placement, "data"]


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
    assert str(done.error) == "mac0 and mac1: model.safetensors is truncated."
    assert "mac1: model.safetensors is truncated." in str(done.error)


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
