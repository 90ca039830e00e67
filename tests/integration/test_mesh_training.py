"""Training on real agents, engines and rings on loopback: the bytes of one host, whoever dies."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fluxmesh import Mesh
from fluxmesh.errors import CancelledError
from fluxmesh.events import HostLost
from fluxmesh.training import checkpoint
from fluxmesh.training.events import Dealt, Encoding, Prepared, Progress, Updated
from fluxmesh.training.request import TrainRequest
from fluxmesh.wire import messages
from tests.datasets import make_dataset
from tests.flux2_checkpoint import TRANSFORMER as FLUX2
from tests.flux2_checkpoint import make_flux2
from tests.integration.test_mesh import mesh_of
from tests.trainings import asked, final, make_place, of, run

SLOW = {"FLUXMESH_DELAYS": "step=0.15"}  # a micro-batch: an update takes 0.45 s at least


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("training"))


def small(place: Path, out: Path, **changed) -> TrainRequest:
    """3 updates of 8 micro-batches, all that is random on; 3 hosts don't divide 8."""
    short = {"iterations": 24, "grad_accumulate": 8, "batch_size": 1, "lora_blocks": 2}
    looks = {"validation": 1, "ema": 0.9, "checkpoint_every": 8}
    return asked(place, out, **{**short, **looks, **changed})


@pytest.fixture(scope="module")
def alone(place, tmp_path_factory) -> str:
    """The adapter that this process makes by itself."""
    out = tmp_path_factory.mktemp("alone")
    run(small(place, out))
    return final(out)


@pytest.fixture(scope="module")
def three(place, tmp_path_factory) -> Iterator[Mesh]:
    with mesh_of(tmp_path_factory.mktemp("three"), 3, place, SLOW) as mesh:
        yield mesh


def pid(mesh: Mesh, rank: int) -> int:
    status = mesh.status()[rank]
    assert isinstance(status, messages.Status) and status.engine_pid is not None, status
    return status.engine_pid


def follow(
    mesh: Mesh, request: TrainRequest, look: Callable[[object], None] = lambda _: None
) -> list[object]:
    """All that a run on the mesh tells; `look` sees each as it comes."""
    events: list[object] = []

    def tell(event: object) -> None:
        events.append(event)
        look(event)

    for event in mesh.train(request, tell):
        tell(event)
    return events


# --- the same training ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("hosts", [1, 2, 3])
def test_any_number_of_hosts_gives_the_same_bytes(place, tmp_path, hosts, dtype):
    wanted = small(place, tmp_path / "alone", dtype=dtype)
    run(wanted)
    with mesh_of(tmp_path, hosts, place) as mesh:
        events = follow(mesh, dataclasses.replace(wanted, output_dir=str(tmp_path / "out")))
        steps = [status.counters.steps for status in mesh.status().values()]
    assert final(tmp_path / "out") == final(tmp_path / "alone")
    (dealt,) = of(events, Dealt)
    assert list(dealt.shares.values()) == {1: [8], 2: [4, 4], 3: [3, 3, 2]}[hosts]
    assert steps == [3] * hosts, "every host makes every update"
    assert len(of(events, Updated)) == 3
    assert checkpoint.iterations(tmp_path / "out") == [8, 16, 24]


def test_any_number_of_hosts_trains_flux2_to_the_same_bytes(tmp_path):
    """Of the smallest size, and klein's base model, whose prompts come with a negative one."""
    sizes = replace(FLUX2, hidden_size=32, num_heads=2, depth=1, depth_single_blocks=1)
    make_flux2(tmp_path / "model", "base", transformer=sizes, text_length=40)
    make_dataset(tmp_path / "data", sizes=((32, 32), (32, 48)))
    pictures = {"progress_prompt": "a cat", "progress_every": 3, "progress_steps": 1}
    wanted = small(tmp_path, tmp_path / "alone", iterations=3, grad_accumulate=3, **pictures)
    run(wanted)
    for hosts in (1, 2, 3):
        out = tmp_path / f"out{hosts}"
        with mesh_of(tmp_path / f"mesh{hosts}", hosts, tmp_path) as mesh:
            events = follow(mesh, dataclasses.replace(wanted, output_dir=str(out)))
        (dealt,) = of(events, Dealt)
        assert list(dealt.shares.values()) == {1: [3], 2: [2, 1], 3: [1, 1, 1]}[hosts]
        assert len(of(events, Progress)) == 2
        assert final(out) == final(tmp_path / "alone")


def test_hosts_encode_what_the_cache_lacks_as_this_process_would(place, tmp_path, three):
    fresh = {"cache_dir": str(tmp_path / "cache"), "iterations": 8, "grad_accumulate": 8}
    events = follow(three, small(place, tmp_path / "mesh", **fresh))
    assert {event.what for event in of(events, Encoding)} == {"captions", "pictures"}
    again = follow(three, small(place, tmp_path / "again", **fresh))
    assert not of(again, Encoding)
    run(small(place, tmp_path / "alone", iterations=8, cache_dir=str(tmp_path / "other")))
    mine, theirs = (
        {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.safetensors")}
        for name in ("other", "cache")
    )
    assert mine == theirs


def test_a_progress_picture_is_the_one_of_this_process_and_disturbs_nothing(
    place, tmp_path, three, alone
):
    shown = {"progress_prompt": "a red dog", "progress_every": 8, "progress_steps": 2}
    mine = of(run(small(place, tmp_path / "alone", **shown)), Progress)
    theirs = of(follow(three, small(place, tmp_path / "mesh", **shown)), Progress)
    assert len(mine) == len(theirs) == 4
    assert all((a.pixels == b.pixels).all() for a, b in zip(mine, theirs, strict=True))
    assert final(tmp_path / "mesh") == alone


def test_a_mesh_paints_as_before_once_a_training_is_over(place, tmp_path, three):
    from fluxmesh.request import GenerateRequest

    request = GenerateRequest(
        "a cat", seed=3, model=str(place / "model"), dtype="float32", height=32, width=32, steps=2
    )

    def picture() -> bytes:
        events = list(three.generate(request, "data"))
        return next(e.pixels.tobytes() for e in events if type(e).__name__ == "Picture")

    before = picture()
    follow(three, small(place, tmp_path / "out", iterations=8))
    assert picture() == before


def test_a_prior_is_kept_by_several_hosts_as_by_one(place, tmp_path, three):
    make_dataset(tmp_path / "dogs", sizes=((32, 32), (24, 48)))
    wanted = small(place, tmp_path / "alone", prior_folder=str(tmp_path / "dogs"), iterations=16)
    run(wanted)
    follow(three, dataclasses.replace(wanted, output_dir=str(tmp_path / "mesh")))
    assert final(tmp_path / "mesh") == final(tmp_path / "alone")


# --- deaths --------------------------------------------------------------------------------------


def later(seconds: float, process: int, number: int) -> None:
    """Sends a signal in the middle of what comes next."""
    threading.Timer(seconds, os.kill, (process, number)).start()


def test_engines_that_die_and_hang_within_an_update_change_no_byte(place, tmp_path, three):
    """12 updates; SIGKILL of one engine, later SIGSTOP of another, both while they compute."""
    wanted = small(place, tmp_path / "alone", iterations=96, checkpoint_every=24)
    run(wanted)
    strikes = {4: (1, signal.SIGKILL), 8: (2, signal.SIGSTOP)}

    def strike(event: object) -> None:
        if isinstance(event, Updated) and event.update in strikes:
            rank, number = strikes.pop(event.update)
            later(0.2, pid(three, rank), number)

    events = follow(three, dataclasses.replace(wanted, output_dir=str(tmp_path / "mesh")), strike)
    assert final(tmp_path / "mesh") == final(tmp_path / "alone")
    assert not strikes and len(of(events, HostLost)) >= 2
    assert [event.update for event in of(events, Updated)] == list(range(1, 13)), "nobody notices"
    assert len(of(events, Dealt)) == 3


def test_an_engine_that_dies_while_it_encodes_loses_nothing(place, tmp_path, three, alone):
    struck: list[int] = []

    def strike(event: object) -> None:
        if isinstance(event, Encoding) and event.what == "captions" and not struck:
            struck.append(pid(three, 0))
            os.kill(struck[0], signal.SIGKILL)

    events = follow(
        three, small(place, tmp_path / "out", cache_dir=str(tmp_path / "cache")), strike
    )
    assert struck and of(events, HostLost)
    assert final(tmp_path / "out") == alone


def test_updates_since_the_last_checkpoint_are_done_again_when_a_ring_breaks(
    place, tmp_path, three, alone
):
    struck: list[int] = []

    def strike(event: object) -> None:
        if isinstance(event, Updated) and event.update == 2 and not struck:
            struck.append(pid(three, 2))
            os.kill(struck[0], signal.SIGKILL)

    events = follow(three, small(place, tmp_path, checkpoint_every=1000), strike)
    assert struck and of(events, HostLost)
    assert [event.update for event in of(events, Updated)] == [1, 2, 3]
    assert final(tmp_path) == alone


def test_a_host_that_is_gone_is_done_without(place, tmp_path, alone):
    with mesh_of(tmp_path, 3, place, SLOW) as mesh:
        agent = mesh.status()[2].pid

        def strike(event: object) -> None:
            if isinstance(event, Updated) and event.update == 1:
                os.kill(agent, signal.SIGKILL)

        events = follow(mesh, small(place, tmp_path / "out"), strike)
    assert final(tmp_path / "out") == alone
    assert list(of(events, Dealt)[-1].shares) == [0, 1]


# --- stop and resume -----------------------------------------------------------------------------


@pytest.mark.parametrize("updates", [1, 2])
def test_a_run_that_was_closed_goes_on_to_the_same_bytes(place, tmp_path, three, alone, updates):
    request = small(place, tmp_path, checkpoint_every=1000)
    events = three.train(request)
    for event in events:
        if isinstance(event, Updated) and event.update == updates:
            break
    events.close()
    assert checkpoint.iterations(tmp_path) == [8 * updates]
    resumed = follow(three, dataclasses.replace(request, resume=True))
    assert of(resumed, Prepared)[0].begins_at == updates
    assert final(tmp_path) == alone


def test_ctrl_c_in_an_update_leaves_the_last_whole_one(place, tmp_path, three, alone):
    request = small(place, tmp_path, checkpoint_every=1000)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(CancelledError, match="go on with `resume`"):
            for event in three.train(request):
                if isinstance(event, Updated) and event.update == 1:
                    signal.setitimer(signal.ITIMER_REAL, 0.2)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    (kept,) = checkpoint.iterations(tmp_path)
    assert kept in (8, 16)  # where this process was kept from hearing it, one more was made
    resumed = follow(three, dataclasses.replace(request, resume=True))
    assert of(resumed, Prepared)[0].begins_at == kept // 8
    assert final(tmp_path) == alone


def test_a_run_of_one_process_goes_on_on_a_mesh_and_back(place, tmp_path, three, alone):
    request = small(place, tmp_path, checkpoint_every=8)
    events = three.train(request)
    for event in events:
        if isinstance(event, Updated) and event.update == 1:
            break
    events.close()
    run(dataclasses.replace(request, resume=True))
    assert final(tmp_path) == alone
