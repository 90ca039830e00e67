"""When the silence of a host's engine means death: what large work may take, and slow machines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fluxmesh.cluster.hostfile import Host
from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.wire import messages
from fluxmesh_coordinator.jobs.host import HostState
from fluxmesh_coordinator.jobs.types import LeasedHost
from tests.unit.meshes import mac

COMMON: dict[str, Any] = {
    "fence": 1,
    "job": "job",
    "ring_generation": 0,
    "weights": ModelVariant("dev"),
}
LATENTS = np.zeros((1, 4, 64), np.float32)


def host() -> HostState:
    entry = Host(0, "127.0.0.1", ("127.0.0.1",))
    return HostState(LeasedHost(info=mac(0), host=entry, fence=1, ring_generation=0), 0.0)


def paint(side: int) -> messages.Paint:
    return messages.Paint(
        **COMMON,
        placement="data",
        image=0,
        height=side,
        width=side,
        steps=4,
        first=0,
        guidance=3.5,
        low_memory=False,
        preview=False,
        strength=1.0,
        latents=LATENTS,
        noise=LATENTS,
        features={"words": np.zeros((1, 4, 8), np.uint16)},
    )


def decode(side: int, images: int) -> messages.Decode:
    latents = np.zeros((images, 4, 64), np.float32)
    return messages.Decode(
        **COMMON, images=tuple(range(images)), height=side, width=side, latents=latents
    )


def ticks(state: HostState, seconds: int) -> str:
    """What is overdue after so many seconds in which the engine ticks."""
    for now in range(1, seconds + 1):
        state.heard(messages.Beat(job="job", ring_generation=0, doing="at work"), float(now))
        if reason := state.overdue(float(now)):
            return reason
    return ""


def test_weights_that_a_slow_disk_gives_are_no_part_of_the_work_they_are_for() -> None:
    state = host()
    state.sent(messages.Encode(**COMMON, prompt="a dog"), 0.0)
    for now in range(0, 300, 10):
        state.heard(
            messages.LoadProgress(
                job="job",
                ring_generation=0,
                component="text encoders",
                done_bytes=now,
                total_bytes=300,
            ),
            float(now),
        )
        assert state.overdue(float(now)) == ""
    state.heard(messages.Beat(job="job", ring_generation=0, doing="encoding"), 409.0)
    assert state.overdue(409.0) == ""
    state.heard(messages.Beat(job="job", ring_generation=0, doing="encoding"), 411.0)
    assert "reading the prompt took more than 120 s" in state.overdue(411.0)


@pytest.mark.parametrize(
    ("side", "images", "budget"), [(512, 1, 120), (1024, 3, 360), (2048, 1, 480)]
)
def test_a_decode_may_take_longer_for_more_and_larger_pictures(
    side: int, images: int, budget: int
) -> None:
    state = host()
    state.sent(decode(side, images), 0.0)
    assert ticks(state, budget) == ""
    state.heard(messages.Beat(job="job", ring_generation=0, doing="decoding"), budget + 1.0)
    assert f"decoding took more than {budget} s" in state.overdue(budget + 1.0)


@pytest.mark.parametrize(("side", "references"), [(2048, 0), (1024, 3), (512, 3)])
def test_a_large_first_step_may_take_longer_and_so_may_one_with_references(
    side: int, references: int
) -> None:
    """References as large as the picture, and what is no tokens of their own: Fill's channels."""
    rows = LATENTS.shape[1]
    conditions = {
        f"reference_{n}": np.zeros((1, rows, 1, 64), np.float32) for n in range(references)
    }
    channels = {"channels": np.zeros((1, rows, 320), np.float32)}
    state = host()
    state.sent(replace(paint(side), conditions=conditions | channels), 0.0)
    assert ticks(state, 1200) == ""
    state.heard(messages.Beat(job="job", ring_generation=0, doing="first step"), 1201.0)
    assert "a first step took more than 1200 s" in state.overdue(1201.0)


@pytest.mark.parametrize(
    ("measured", "limit"), [({}, 30.0), ({False: 50.0}, 200.0), ({False: 50.0, True: 10.0}, 40.0)]
)
def test_a_first_step_whose_kernels_are_compiled_has_four_times_what_was_reckoned_or_measured(
    measured: dict[bool, float], limit: float
) -> None:
    """A second job of the same size, maybe on a slow machine: a ring that hangs ticks too."""
    state = host()
    for is_measured, seconds in measured.items():
        state.expect(paint(1024), seconds, measured=is_measured)
    state.sent(paint(1024), 0.0)
    for now in range(1, int(limit) + 1):
        state.heard(
            messages.Beat(job="job", ring_generation=0, doing=messages.WARM_STEP), float(now)
        )
        assert state.overdue(float(now)) == ""
    assert f"took more than {limit:.0f} s" in state.overdue(limit + 1.0)


def test_an_engine_that_hangs_in_a_first_step_is_found_by_its_silence() -> None:
    state = host()
    state.heard(messages.Beat(job="other", ring_generation=0, doing="decoding"), 0.0)
    state.expect(paint(1024), 50.0, measured=False)
    state.sent(paint(1024), 1.0)
    assert state.overdue(6.0) == ""
    assert "no sign for 6 s" in state.overdue(7.0)


def test_a_step_that_a_cache_made_cheap_does_not_shorten_the_deadline_of_the_next() -> None:
    state = host()
    state.sent(paint(1024), 0.0)
    state.stepped(paint(1024), 20.0, 20.0)
    state.stepped(paint(1024), 1.0, 21.0, reused=True)
    assert state.step_deadline(paint(1024)) == 80.0
    assert state.overdue(100.0) == ""
    state.stepped(paint(1024), 10.0, 100.0)  # took 79 s, by the clock
    state.stepped(paint(1024), 1.0, 101.0)
    assert state.step_deadline(paint(1024)) == 5.0
