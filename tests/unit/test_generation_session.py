"""One generation's life, event by event: who is given what, and in which order it comes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fluxmesh import events
from fluxmesh.errors import WeightsError
from fluxmesh.request import SourceImage
from fluxmesh.wire import messages
from tests.fakes import FEATURES, READ
from tests.unit.simulated_jobs import PLACEMENTS, GenerationSimulation


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


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_previews_come_behind_their_steps_and_only_where_they_are_asked_for(
    placement: Any,
) -> None:
    done = GenerationSimulation(2, n_images=2, placement=placement, preview_every=2).run()
    done.check()
    shown = sorted((event.image, event.step) for event in done.of(events.Preview))
    assert shown == [(0, 2), (1, 2)]  # of three steps each, told once, by whoever has the latents
    for event in done.of(events.Preview):
        assert (event.steps, event.pixels.max()) == (3, 2)
        steps = [e for e in done.events if isinstance(e, events.Step) and e.image == event.image]
        assert done.events.index(event) == done.events.index(steps[1]) + 1
    assert not GenerationSimulation(2, placement=placement).run().of(events.Preview)


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


def test_the_end_of_a_prompt_that_is_cut_is_told_where_it_begins() -> None:
    for words, said in ((14, (15, READ, "11 12 13")), (11, (0, 0, ""))):
        prompt = " ".join(map(str, range(1, words)))
        done = GenerationSimulation(1, n_images=1, prompt=f"0 {prompt}").run()
        (encoded,) = done.of(events.Encoded)
        assert (encoded.tokens, encoded.kept, encoded.dropped) == said
        assert not encoded.negative_dropped


def test_the_end_of_a_negative_prompt_that_is_cut_is_told_as_the_prompt_s_is() -> None:
    negative = " ".join(map(str, range(14)))
    done = GenerationSimulation(1, n_images=1, negative=negative, cfg=2.0).run()
    (encoded,) = done.of(events.Encoded)
    assert (encoded.negative_tokens, encoded.negative_kept) == (15, READ)
    assert (encoded.negative_dropped, encoded.dropped) == ("11 12 13", "")
    (said,) = [cut.sentence(end, what) for what, cut, end in encoded.cuts]
    assert said == (
        f"The model reads {READ} of the 15 tokens of the negative prompt; left out is all from "
        "“11 12 13” on."
    )


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


def test_a_picture_that_was_encoded_with_other_files_is_refused_too() -> None:
    """Whoever reads it need not paint, nor have read the prompt."""

    def swap(mesh: GenerationSimulation) -> None:
        for machine in mesh.machines.values():
            is_reading = isinstance(machine.at, messages.EncodeSource)
            machine.engine.content = "newer" if is_reading else "older"

    source = SourceImage(np.zeros((32, 32, 3), np.uint8), 1.0)
    mesh = GenerationSimulation(2, placement="sequence", faults=swap, source=source).run()
    assert mesh.end is not None and isinstance(mesh.end.error, WeightsError)
    assert "were changed while this job used them" in str(mesh.end.error)
    assert mesh.messages(messages.Paint) == []
