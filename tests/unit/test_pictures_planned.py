"""Pictures that come with a request, as the planner counts them: who encodes them, in which memory,
and what is computed of them before the first step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fluxmesh.cluster.snapshot import HostInfo, MeshView
from fluxmesh.models.flux1.conditions import kontext
from fluxmesh.models.registry import published
from fluxmesh.planning import activations
from fluxmesh.planning.activations import decoding_bytes
from fluxmesh.planning.plan import Plan, plan
from fluxmesh.planning.workload import ModelSizes, Workload
from fluxmesh.request import GenerateRequest, SourceImage
from fluxmesh.wire import messages
from tests.unit.meshes import full, mac, without, won
from tests.unit.simulated_jobs import GenerationSimulation

KLEIN = ModelSizes(published("klein-4b"))
KV = ModelSizes(published("klein-9b-kv"))
FILL = ModelSizes(published("fill"))
CANNY = ModelSizes(published("canny"))
DEV = ModelSizes(published("dev"))
SQUARE = np.zeros((1024, 1024, 3), np.uint8)


def filled(sizes: ModelSizes, **keys: Any) -> Any:
    size = {"height": 512, "width": 512} | keys
    return sizes.fill(GenerateRequest("make it night", 0, "m", **size))


def work(sizes: ModelSizes, **keys: Any) -> Workload:
    return Workload.of(filled(sizes, **keys), sizes)


def source(side: int, mask: bool = False) -> SourceImage:
    pixels = np.zeros((side, side, 3), np.uint8)
    return SourceImage(pixels, 0.6, pixels[:, :, 0] if mask else None)


def host(rank: int, nbytes: int) -> HostInfo:
    return mac(rank, holds=None, memory_bytes=nbytes, free_bytes=nbytes, platform="metal")


def choose(view: MeshView, sizes: ModelSizes, **keys: Any) -> Plan:
    return plan(filled(sizes, **keys), view, sizes)


# Memory


@pytest.mark.parametrize(
    ("sizes", "keys", "pixels"),
    [
        (KLEIN, {"references": [SQUARE]}, 1 << 20),
        (KLEIN, {"references": [SQUARE[:512], SQUARE]}, 1 << 20),  # one after the other
        (DEV, {"source": source(512)}, 1 << 18),
        (FILL, {"source": source(512, mask=True)}, 1 << 18),
        (CANNY, {"control": SQUARE}, 1 << 18),  # brought to the output's size
        (FILL, {}, 1 << 18),  # a plan without the picture that painting takes
        (CANNY, {}, 1 << 18),
        (KLEIN, {}, 0),
    ],
)
def test_the_largest_picture_is_what_an_encode_takes(
    sizes: ModelSizes, keys: Any, pixels: int
) -> None:
    """128 channels of bfloat16 at all of its pixels, and what a convolution holds beside them."""
    asked = work(sizes, **keys)
    arrays = decoding_bytes(pixels * 128 * 2, "metal")
    needed = asked.encoding_memory(1, "metal")
    if not pixels:
        assert needed == 0
        return
    assert needed == asked.transformer.on_each_of(1) + asked.autoencoder_bytes + arrays
    assert work(sizes, **keys, low_memory=True).encoding_memory(1, "metal") == (
        asked.autoencoder_bytes + arrays
    )


def test_an_encode_has_no_tiles() -> None:
    sides = (2048, 4096)
    small, large = (work(DEV, height=s, width=s, source=source(s)) for s in sides)
    assert small.memory("data", 1, 1).decode == large.memory("data", 1, 1).decode
    least, most = (each.encoding_memory(1, "cuda") for each in (small, large))
    weights = small.transformer.on_each_of(1) + small.autoencoder_bytes
    assert most - weights == pytest.approx(4 * (least - weights), abs=8)
    assert most > large.memory("data", 1, 1).decode


def test_pictures_are_encoded_by_a_host_that_has_the_memory_for_them() -> None:
    """The others need no more than for the rest: one host encodes, each picture once."""
    side = 3072
    size = {"height": side, "width": side}
    keys = {"source": source(side), "n_images": 2, "low_memory": True, "bits": 4, **size}
    asked = work(DEV, **keys)
    least = max(asked.memory("data", 1, 1, "metal"))
    encode = asked.encoding_memory(1, "metal")
    assert encode > least
    view = full(host(0, least), host(1, encode))
    winner = won(choose(view, DEV, **keys))
    assert (winner.ranks, winner.picture_rank) == ((0, 1), 1)
    assert [need.needed for need in winner.memory] == [least, encode]
    assert [usage.pictures for usage in winner.usage] == [0, encode]
    alone = without(view, 1)
    nobody = choose(alone, DEV, **keys)
    assert nobody.winner is None
    assert f"host 0 needs {encode / 1e9:.1f} GB and may use {least / 1e9:.1f} GB" in nobody.reason
    smaller = next(remedy.side for remedy in nobody.remedies if remedy.side)
    assert smaller == 1024
    # What is encoded already, nobody has to.
    again = plan(filled(DEV, **keys), alone, DEV, are_encoded=True)
    assert won(again).picture_rank is None


def test_who_reads_the_prompt_encodes_the_pictures_where_that_fits() -> None:
    big = 100 * 10**9
    winner = won(choose(full(host(0, big), host(1, big)), KLEIN, references=[SQUARE], n_images=2))
    assert winner.text is not None and winner.picture_rank == winner.text.rank


def test_many_references_take_more_than_the_step_that_they_precede() -> None:
    """For klein 9B KV, whose references are read by themselves: ten of them are 40960 tokens."""
    one, ten = (work(KV, references=[SQUARE] * n) for n in (1, 10))
    kept = 2 * 4096 * 32 * 4096 * 2  # keys and values, in all blocks
    state = 4096 * 2
    more = ten.memory("data", 1, 1).denoise - one.memory("data", 1, 1).denoise
    assert more == 9 * kept + 24 * (40960 - 4096) * state


# Time


def test_keys_and_values_of_references_are_computed_before_the_first_step_of_a_request() -> None:
    """At 1024x1024, a reference of that size costs about as much as a step once."""
    size = {"height": 1024, "width": 1024}
    edit, plain = work(KV, references=[SQUARE], **size), work(KV, **size)
    assert plain.begin_flops == 0 and work(KLEIN, references=[SQUARE]).begin_flops == 0
    tokens, D, blocks = 4096, 4096, 32
    matrices = 4 * D * D + D * 9 * D  # a block's: attention's, and a gated MLP of 3 D
    assert edit.begin_flops == blocks * tokens * (2 * matrices + 4 * tokens * D)
    view = full(mac(0, holds=None), mac(1, holds=None))
    for name, hosts in (("data", 1), ("sequence", 2), ("tensor", 2)):
        once, twice = (
            next(
                each
                for each in choose(view, KV, references=[SQUARE], steps=steps, **size).options
                if (each.name, len(each.ranks)) == (name, hosts)
            )
            for steps in (4, 8)
        )
        step = once.phases[0].step_seconds
        first = step * edit.begin_flops / edit.step_flops
        decode_and_load = once.seconds - 4 * step - first
        assert twice.seconds == pytest.approx(8 * step + first + decode_and_load)
        assert decode_and_load == pytest.approx(
            next(
                each.seconds - 4 * each.phases[0].step_seconds
                for each in choose(view, KV, steps=4, **size).options
                if (each.name, len(each.ranks)) == (name, hosts)
            ),
            rel=0.02,
        )


# In a job


def edit_with_room(monkeypatch: pytest.MonkeyPatch, able: set[int], **keys: Any) -> Any:
    """Three hosts, of which only `able` ones have the memory to encode the reference."""
    monkeypatch.setattr(kontext, "SIZES", ((512, 512),))
    monkeypatch.setattr(activations, "DECODE_ARRAYS", 40)  # its tokens are many, for a small model
    pixels = np.random.default_rng(1).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    keys = {"n_images": 3, "placement": "data", "references": (pixels,), **keys}
    mesh = GenerationSimulation(3, **keys)
    work = Workload.of(mesh.request, mesh.sizes)
    least = max(work.memory("data", 1, 1)) + work.text_bytes + work.text_working_bytes
    encode = work.encoding_memory(1, "cuda")
    assert encode > least
    for rank, machine in mesh.machines.items():
        room = (encode if rank in able else 0) + least
        info = replace(machine.leased.info, memory_bytes=room, free_bytes=room, platform="cuda")
        machine.leased = replace(machine.leased, info=info)
    return mesh


def encoders(mesh: Any) -> list[int]:
    return [each.rank for each in mesh.sent if isinstance(each.message, messages.EncodePictures)]


def test_the_host_that_was_planned_encodes(monkeypatch: pytest.MonkeyPatch) -> None:
    done = edit_with_room(monkeypatch, {1}).run()
    done.check()
    assert encoders(done) == [1]
    (unit,) = done.messages(messages.EncodePictures)
    assert unit.text_stays and not unit.makes_room
    low = edit_with_room(monkeypatch, {1}, low_memory=True).run()
    low.check()
    assert all(unit.makes_room for unit in low.messages(messages.EncodePictures))


@pytest.mark.parametrize("fault", ["kill_engine", "lose"])
def test_after_a_death_another_host_that_has_the_memory_encodes(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    struck: list[int] = []

    def strike(mesh: Any) -> None:
        at = [r for r, m in mesh.machines.items() if isinstance(m.at, messages.EncodePictures)]
        if at and not struck:
            struck.append(at[0])
            getattr(mesh, fault)(at[0])

    mesh = edit_with_room(monkeypatch, {1, 2})
    mesh.faults = strike
    done = mesh.run()
    done.check()
    first, second = encoders(done)
    assert struck == [first] == [1] and second == (1 if fault == "kill_engine" else 2)
