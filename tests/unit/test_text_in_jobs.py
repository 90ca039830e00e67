"""A generation whose prompt is read by a host that paints nothing: what is sent, and its losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fluxmesh import events
from fluxmesh.cluster.snapshot import (
    Holding,
    ModelVariant,
    TextHolding,
    TextTiming,
    Timings,
    prompt_mark,
)
from fluxmesh.models.flux1.architecture import Flux1Architecture
from fluxmesh.planning import text_place
from fluxmesh.planning.workload import ModelSizes, Workload
from fluxmesh.wire import messages
from fluxmesh_coordinator.jobs.types import Back
from tests.flux2_checkpoint import architecture_of
from tests.unit.simulated_jobs import PLACEMENTS, SIZES, GenerationSimulation

FAMILIES = {"flux1": SIZES, "flux2": ModelSizes(architecture_of("klein"))}
FASTEST = {0: 5.0, 1: 9.0, 2: 0.1}  # seconds in which hosts were measured to read a prompt


def reader_apart(family: str, placement: Any, **keys: Any) -> GenerationSimulation:
    """Hosts 0 and 1 paint; host 2 is too slow for that, and the one that reads fastest."""
    sizes = keys.pop("sizes", FAMILIES[family])
    mesh = GenerationSimulation(3, placement=placement, sizes=sizes, **keys)
    texts = tuple(
        TextTiming(rank=rank, model="m", dtype="bfloat16", bits=None, seconds=seconds)
        for rank, seconds in FASTEST.items()
    )
    mesh.links = replace(mesh.links, timings=Timings(texts=texts))
    change(mesh, 2, flops_per_second=1e4)
    return mesh


def change(mesh: GenerationSimulation, rank: int, **fields: Any) -> None:
    """What a host told of itself before the job."""
    machine = mesh.machines[rank]
    machine.leased = replace(machine.leased, info=replace(machine.leased.info, **fields))


def while_reading(what: str) -> Callable[[GenerationSimulation], None]:
    """Breaks the host that reads, once, before it has."""
    struck: list[int] = []

    def fault(mesh: GenerationSimulation) -> None:
        reads = [r for r, m in mesh.machines.items() if isinstance(m.at, messages.Encode)]
        if reads and not struck:
            struck.append(reads[0])
            getattr(mesh, what)(reads[0])

    return fault


def readers(mesh: GenerationSimulation) -> list[int]:
    return [send.rank for send in mesh.sent if isinstance(send.message, messages.Encode)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_host_that_reads_paints_nothing_and_loads_no_denoiser(
    family: str, placement: Any
) -> None:
    done = reader_apart(family, placement, n_images=2).run()
    done.check()
    assert readers(done) == [2]
    assert done.machines[2].made == [] and not done.messages(messages.Load, 2)
    assert {rank for rank in (0, 1) if done.machines[rank].made} == {0, 1}
    assert not done.messages(messages.Kill)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("fault", ["kill_engine", "stop_engine", "lose"])
def test_another_host_reads_where_the_first_dies_hangs_or_goes_and_the_rest_goes_on(
    family: str, placement: Any, fault: str
) -> None:
    done = reader_apart(family, placement, faults=while_reading(fault)).run()
    done.check()
    assert readers(done) == [2, 0]
    assert done.lost == [2]
    assert not done.messages(messages.Kill, 0) and not done.messages(messages.Kill, 1)
    formed = len(done.messages(messages.Join, 0))
    assert formed == (placement != "data"), "the ring stays as it is"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_reader_that_is_lost_once_the_prompt_is_read_is_not_missed(
    family: str, placement: Any
) -> None:
    def lose_reader(mesh: GenerationSimulation) -> None:
        if mesh.of(events.Step) and 2 in mesh.machines:
            mesh.lose(2)

    done = reader_apart(family, placement, n_images=2, faults=lose_reader).run()
    done.check()
    assert readers(done) == [2] and done.lost == []
    assert done.let_go == [2], "others may have it as soon as it has read"
    assert not done.messages(messages.Kill)


@pytest.mark.parametrize("placement", ["sequence", "tensor"])
def test_a_prompt_that_is_read_asks_no_host_for_room_when_all_is_planned_anew(
    placement: Any,
) -> None:
    model = SIZES.architecture
    assert isinstance(model, Flux1Architecture)
    wide = replace(SIZES, architecture=replace(model, t5=replace(model.t5, d_ff=1 << 20)))
    done = reader_apart("flux1", placement, n_images=2)
    mesh = GenerationSimulation(3, placement=placement, n_images=2, sizes=wide)
    mesh.links = done.links
    need = max(Workload.of(mesh.request, wide).memory("data", 1, 1))
    for rank in (0, 1):
        change(mesh, rank, memory_bytes=need, free_bytes=need)
    change(mesh, 2, flops_per_second=1e4)

    def lose_reader_then_ring(mesh: GenerationSimulation) -> None:
        if mesh.of(events.Step) and 2 in mesh.machines:
            mesh.lose(2)
            for rank in (0, 1):
                mesh.kill_engine(rank)

    mesh.faults = lose_reader_then_ring
    mesh.run().check()
    assert readers(mesh) == [2] and len(mesh.of(events.Planned)) > 1


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_where_every_reader_is_lost_who_is_left_reads(placement: Any) -> None:
    struck: list[int] = []

    def lose_two(mesh: GenerationSimulation) -> None:
        reads = [r for r, m in mesh.machines.items() if isinstance(m.at, messages.Encode)]
        if reads and len(struck) < 2 and reads[0] not in struck:
            struck.append(reads[0])
            mesh.lose(reads[0])

    done = reader_apart("flux2", placement, faults=lose_two).play()
    done.check()
    assert struck == [2, 0] and readers(done)[-1] == 1


def test_what_a_prompt_took_is_learned_and_what_is_remembered_is_not() -> None:
    done = reader_apart("flux2", "data").run()
    (text,) = [text for text in done.learned.texts if text.rank == 2]
    assert (text.seconds, text.model, text.bits, text.by_layers) == (0.1, "m", None, False)


def tight(family: str, **keys: Any) -> tuple[GenerationSimulation, Workload]:
    """One host that holds the denoiser, and has no room for text encoders beside it."""
    mesh = GenerationSimulation(1, sizes=FAMILIES[family], **keys)
    work = Workload.of(mesh.request, FAMILIES[family])
    memory = max(work.memory("data", 1, 1)) + work.text_working_bytes
    mesh.give(max(memory, work.text_bytes + work.text_working_bytes))
    return mesh, work


def test_encoders_without_room_beside_the_denoiser_leave_before_it_loads() -> None:
    done, _ = tight("flux1")
    option = done.plan().winner
    assert option is not None and option.text is not None and option.text.way == "turns"
    done.run().check()
    (encode,) = done.messages(messages.Encode)
    assert not (encode.stay or encode.by_layers)
    order = [type(send.message) for send in done.sent]
    assert order.index(messages.Encode) < order.index(messages.Load)


def test_a_denoiser_that_is_in_the_way_leaves_and_is_loaded_again() -> None:
    done, work = tight("flux1")
    machine = done.machines[0]
    held = list(machine.engine.work(messages.Load(**HEAD, weights=work.weights)))[-1]
    assert isinstance(held, messages.Loaded)
    nbytes = max(work.memory("data", 1, 1))
    change(done, 0, holds=replace(held.holding, nbytes=nbytes), free_bytes=0)
    option = done.plan().winner
    assert option is not None and option.text is not None and option.text.makes_room
    done.run().check()
    (encode,) = done.messages(messages.Encode)
    assert encode.makes_room and not encode.stay
    assert len(done.messages(messages.Load)) == 1


HEAD: dict[str, Any] = {"fence": 0, "job": "job", "ring_generation": 0}


def test_a_text_encoder_that_fits_nowhere_is_read_by_layers() -> None:
    small = architecture_of("klein")
    wide = replace(small, text=replace(small.text, intermediate_size=1 << 16))
    mesh = GenerationSimulation(1, sizes=ModelSizes(wide))
    work = Workload.of(mesh.request, ModelSizes(wide))
    assert (layer := wide.text_layer_bytes("bfloat16", None)) is not None
    mesh.give(max(work.memory("data", 1, 1)) + layer + work.text_working_bytes)
    option = mesh.plan().winner
    assert option is not None and option.text is not None
    assert option.text.way == "layers"
    mesh.run().check()
    (encode,) = mesh.messages(messages.Encode)
    assert encode.by_layers and not encode.stay and not encode.makes_room


def test_a_host_that_remembers_is_asked_and_may_read_it_after_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(text_place, "WORTH_A_HOST", 0.0)  # encoders are small here
    mesh = GenerationSimulation(2, placement="data")
    text = TextHolding(weights=ModelVariant("m"), prompts=(prompt_mark("a cat"),))
    change(mesh, 1, text=text)
    mesh.run().check()
    (encode,) = mesh.messages(messages.Encode, 1)
    assert encode.stay and encode.by_layers and encode.makes_room
    assert not mesh.learned.texts


def test_a_prompt_that_is_remembered_no_more_is_read_beside_no_denoiser() -> None:
    """As where another prompt has its mark; FLUX.1's encoders are only read as a whole."""
    done = GenerationSimulation(1, n_images=2)
    work = Workload.of(done.request, SIZES)
    text = TextHolding(weights=work.weights, prompts=(work.mark,))
    change(done, 0, text=text, holds=Holding(weights=work.weights, nbytes=1))
    option = done.plan().winner
    assert option is not None and option.text is not None and option.text.way == "remembered"
    done.run().check()
    (encode,) = done.messages(messages.Encode)
    assert encode.makes_room
    info = done.session.state.hosts[0].info.text
    assert info is not None and info.nbytes == 0, "what room was made for does not stay"


def test_text_encoders_leave_a_host_that_comes_back_where_both_do_not_fit() -> None:
    done = GenerationSimulation(2, n_images=6, placement="data")
    work = Workload.of(done.request, SIZES)
    need = max(work.memory("data", 1, 1))
    back: list[int] = []

    def lose_one(mesh: GenerationSimulation) -> None:
        if mesh.of(events.Step) and not back:
            mesh.lose(1)
            back.append(1)
            mesh.start_agent(1)
            text = TextHolding(weights=work.weights, nbytes=need)
            room = {"memory_bytes": 3 * need // 2, "free_bytes": need // 2}
            change(mesh, 1, text=text, **room)
            mesh.feed(Back(mesh.machines[1].leased))

    done.faults = lose_one
    done.run().check()
    *_, load = done.messages(messages.Load, 1)
    assert back and not load.text_stays
    assert any(paint.image for paint in done.messages(messages.Paint, 1))


def test_encoders_leave_where_who_read_has_to_paint_after_all() -> None:
    """It was let go of, and is leased again with what it keeps in memory."""
    done = reader_apart("flux1", "data", n_images=2)
    work = Workload.of(done.request, SIZES)
    room = max(*work.memory("data", 1, 1), work.text_bytes + work.text_working_bytes)
    change(done, 2, memory_bytes=room, free_bytes=room)

    def lose_painters(mesh: GenerationSimulation) -> None:
        if mesh.of(events.Step):
            kept = TextHolding(weights=work.weights, nbytes=work.text_bytes)
            change(mesh, 2, text=kept, free_bytes=room - work.text_bytes)
            for rank in {0, 1} & mesh.machines.keys():
                mesh.lose(rank)

    done.faults = lose_painters
    done.play().check()
    assert done.let_go == [2]
    assert readers(done) == [2] and done.messages(messages.Encode)[0].stay
    (load,) = done.messages(messages.Load, 2)
    assert not load.text_stays, "both do not fit"


@pytest.mark.parametrize("fault", ["kill_engine", "lose"])
def test_who_reads_instead_has_room_made_by_the_denoiser_that_is_on_its_way(fault: str) -> None:
    model = SIZES.architecture
    assert isinstance(model, Flux1Architecture)
    wide = replace(SIZES, architecture=replace(model, t5=replace(model.t5, d_ff=1 << 20)))
    done = reader_apart("flux1", "data", sizes=wide, faults=while_reading(fault))
    work = Workload.of(done.request, wide)
    room = work.text_bytes + work.text_working_bytes
    assert room > max(work.memory("data", 1, 1))
    for rank in (0, 1):
        change(done, rank, memory_bytes=room, free_bytes=room)
    done.run().check()
    assert readers(done) == [2, 0]
    encode = done.messages(messages.Encode)[1]
    assert encode.makes_room and not encode.stay
    assert len(done.messages(messages.Load, 0)) == 2, "what made room is loaded again"


def test_an_engine_that_is_ended_remembers_no_prompt() -> None:
    done, _ = tight("flux1", faults=while_reading("kill_engine"))
    text = TextHolding(weights=ModelVariant("m"), prompts=(prompt_mark("a cat"),))
    change(done, 0, text=text)
    done.run().check()
    first, again = done.messages(messages.Encode)
    assert first.by_layers and first.stay
    assert not (again.by_layers or again.stay), "there is no room beside the denoiser"
