"""What planner and jobs know of models that an engine keeps beside the one at hand."""

from __future__ import annotations

from dataclasses import replace

from fluxmesh.cluster.snapshot import Holding, KeptModel, MeshView, ModelVariant, TextHolding
from fluxmesh.planning.plan import Plan, plan
from fluxmesh.planning.workload import Workload
from fluxmesh.wire import messages
from fluxmesh_agent.lifecycle import Lifecycle
from tests.unit.meshes import FLUX, GB, ask, mac, won
from tests.unit.simulated_jobs import GenerationSimulation

REQUEST = FLUX.fill(ask(height=1024, width=1024, steps=4))
MINE = Workload.of(REQUEST, FLUX).weights
OTHER = ModelVariant("other")


def kept(weights: ModelVariant, gigabytes: int) -> KeptModel:
    text = TextHolding(weights=weights, nbytes=GB)
    return KeptModel(holds=Holding(weights=weights, nbytes=gigabytes * GB), text=text)


def planned(**keys: object) -> Plan:
    return plan(REQUEST, MeshView((mac(0, **keys),)), FLUX)


def test_a_model_that_is_kept_is_there_at_once() -> None:
    other = Holding(weights=OTHER, nbytes=30 * GB)
    cold = won(planned(holds=other))
    warm = won(planned(holds=other, kept=(kept(OTHER, 1), kept(MINE, 34))))
    assert cold.load_seconds > 0 and warm.load_seconds == 0


def test_memory_of_models_that_are_kept_is_free_for_whoever_needs_it() -> None:
    other = Holding(weights=OTHER, nbytes=5 * GB)
    assert planned(holds=other, free_bytes=10 * GB).winner is None
    room = won(planned(holds=other, free_bytes=10 * GB, kept=(kept(OTHER, 40),))).memory[0]
    assert room.available == 55 * GB


def test_a_host_turns_to_a_model_that_it_keeps_and_keeps_the_one_at_hand() -> None:
    other = Holding(weights=OTHER, nbytes=5 * GB)
    host = mac(0, holds=other, kept=(kept(MINE, 34),))
    turned = host.turned_to(MINE)
    assert turned.holds is not None and turned.holds.weights == MINE
    assert turned.text == kept(MINE, 34).text
    assert [each.holds for each in turned.kept] == [other]
    assert turned.held_bytes == host.held_bytes == 39 * GB
    assert turned.turned_to(MINE) == turned
    assert turned.turned_to(OTHER) == host.turned_to(OTHER) == replace(host, text=host.text)
    assert host.turned_to(ModelVariant("third")) == host


def test_engines_hear_what_a_job_takes_of_their_memory() -> None:
    done = GenerationSimulation(2, n_images=2, placement="data").run()
    given = [each for each in done.sent if isinstance(each.message, messages.ModelWork)]
    option = done.session.state.option
    assert option is not None and given
    needed = {usage.rank: max(usage.text, usage.denoise, usage.decode) for usage in option.usage}
    assert min(needed.values()) > 0
    assert all(each.message.memory_bytes == needed[each.rank] for each in given)


def test_an_engine_that_has_ended_keeps_nothing() -> None:
    life = Lifecycle()
    life.start()
    life.engine_said(
        messages.Account(
            is_over=True,
            holds=None,
            counters=messages.EngineCounters(),
            load_rate=0.0,
            kept=(kept(MINE, 34),),
        )  # fmt: skip
    )
    assert life.kept == (kept(MINE, 34),)
    life.engine_ended("It was killed.")
    assert life.kept == ()
