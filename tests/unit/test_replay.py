"""A job that failed goes through the same again, from a file that holds nothing of the user's."""

from __future__ import annotations

import re
import stat
import subprocess
import sys
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest

from fluxmesh.cluster import snapshot
from fluxmesh.cluster.snapshot import ModelVariant, TextHolding, prompt_mark
from fluxmesh.errors import CancelledError, FluxmeshError, UsageError
from fluxmesh.request import FilledRequest, SourceImage
from fluxmesh.wire import messages, protocol
from fluxmesh.wire.messages import training
from fluxmesh.wire.messages.unit import WorkReport
from fluxmesh_coordinator import cli
from fluxmesh_coordinator.jobs import input_log
from fluxmesh_coordinator.jobs.input_log import InputLog, brief, hollow
from fluxmesh_coordinator.jobs.replay import CLASSES, Packer, from_bytes, to_bytes
from fluxmesh_coordinator.jobs.training import tasks
from fluxmesh_coordinator.jobs.types import Instruction, JobFinished, Reported, Tick
from fluxmesh_coordinator.runtime.failed_jobs import KEPT, FailedJobs
from tests.unit.simulated_jobs import GenerationSimulation, TrainingSimulation
from tests.unit.simulation import Simulation

ROOT = Path(__file__).parents[2]
PROMPT = "my aunt Matilda on a bicycle"


def painting(**keys: Any) -> Simulation[Any]:
    source = SourceImage(np.full((32, 32, 3), 77, np.uint8), 1.0, np.full((32, 32), 99, np.uint8))
    return GenerationSimulation(3, prompt=PROMPT, n_images=3, cache=0.1, source=source, **keys)


def broken(sim: Simulation[Any]) -> Simulation[Any]:
    """After all that can happen to a job, one that fails."""
    sim.play(lambda: sim.reports == 9)
    sim.kill_engine(1)
    sim.play(lambda: sim.reports == 14)
    sim.lose(2)
    sim.play(lambda: sim.reports == 18)
    sim.bring_back(2)
    sim.play(lambda: sim.reports == 25)
    sim.stop_engine(0)
    sim.now += 30
    sim.tick()
    sim.play(lambda: sim.reports == 30)
    for rank in list(sim.machines):
        sim.lose(rank, counts=False)
    for rank in sim.ranks:
        sim.start_agent(rank, fence=3)
    sim.play(lambda: sim.reports == 80)
    sim.fail(0, "AdapterError", f"{PROMPT} fits no key.")
    sim.play()
    assert sim.end is not None and sim.end.error is not None
    return sim


def log_of(sim: Simulation[Any]) -> InputLog:
    log = InputLog()
    for (now, event), out in zip(sim.heard, sim.out, strict=True):
        log.note(now, event, out)
    return log


def remembered(sim: Simulation[Any]) -> Simulation[Any]:
    """On a host that remembers this prompt and others."""
    marks = (prompt_mark("a cat"), prompt_mark(PROMPT))
    machine = sim.machines[1]
    holding = TextHolding(weights=ModelVariant("m"), prompts=marks)
    machine.leased = replace(machine.leased, info=replace(machine.leased.info, text=holding))
    return sim


JOBS = {
    "remembered": lambda: remembered(painting(placement="data", steps=20)),
    "data": lambda: painting(placement="data", steps=20),
    "sequence": lambda: painting(placement="sequence", steps=20),
    "training": lambda: TrainingSimulation(3, iterations=60, progress_prompt=PROMPT),
}


@pytest.mark.parametrize("kind", JOBS)
def test_a_session_says_the_same_again_to_what_was_written_down(kind: str) -> None:
    sim = broken(JOBS[kind]())
    replay = from_bytes(to_bytes(sim.session, log_of(sim), "AdapterError: x."))
    then, now = Packer(), Packer()
    heard = [n for n, (_, event) in enumerate(sim.heard) if sim.out[n] or not is_tick(event)]
    assert len(heard) == len(replay.log.noted) > 100
    for place, (when, _, instructions) in zip(heard, replay, strict=True):
        assert when == sim.heard[place][0]
        assert in_full(instructions, now) == in_full(sim.out[place], then), place
    again = from_bytes(to_bytes(sim.session, log_of(sim), "AdapterError: x."))
    assert again.differences() == []


def test_whatever_a_host_tells_of_itself_can_be_read_again() -> None:
    # Of the library alone: other tests of this process may have added some of their own.
    own = (kind for kind in protocol.TYPES.values() if kind.__module__.startswith("fluxmesh."))
    reports = [kind for kind in own if issubclass(kind, WorkReport)]
    told = (snapshot.HostInfo, snapshot.LinkInfo, snapshot.Timings, FilledRequest)
    wanted = {kind for each in (*told, *reports) for kind in _inside(each)}
    assert TextHolding in wanted
    assert {kind.__name__ for kind in wanted} <= CLASSES.keys()


def _inside(hint: Any) -> set[type]:
    """The dataclasses that stand in a type, and in their fields."""
    if is_dataclass(hint) and isinstance(hint, type):
        fields = get_type_hints(hint).values()
        return {hint}.union(*map(_inside, fields))
    return set().union(*map(_inside, get_args(hint)))


def is_tick(event: object) -> bool:
    return isinstance(event, Tick)


def in_full(instructions: list[Instruction], packer: Packer) -> list[Any]:
    """All that they say, but for what is in arrays and texts."""
    return [
        brief(said) if isinstance(said, JobFinished) else packer.pack(said) for said in instructions
    ]


@pytest.mark.parametrize("kind", JOBS)
def test_nothing_of_what_the_user_wrote_or_of_the_jobs_secret_is_in_it(kind: str) -> None:
    sim = broken(JOBS[kind]())
    data = to_bytes(sim.session, log_of(sim), f"AdapterError: {PROMPT} fits no key.")
    assert not any(word.encode() in data for word in PROMPT.split() if len(word) > 4)
    assert b"secret" not in data.replace(b"\xa6secret", b"")  # the field's name
    for join in sim.messages(messages.Join):
        assert join.nonce not in data
    replay = from_bytes(data)
    assert re.fullmatch(r"AdapterError: text \d fits no key\.", replay.error)
    job = replay.session.state.job
    assert job.secret == bytes(6)
    if isinstance(job, tasks.TrainingJob):
        assert all(caption.startswith("text ") for caption in job.plan.captions if caption)
        assert len(job.plan.captions) == len(sim.session.state.job.plan.captions)
    else:
        assert job.request.source.pixels.strides == (0, 0, 0)


def test_arrays_take_no_room() -> None:
    sim = broken(JOBS["sequence"]())
    before = len(to_bytes(sim.session, log_of(sim), ""))
    latents = np.zeros((1, 4096, 64), np.float32)
    report = messages.Stepped(
        job="job",
        ring_generation=0,
        image=0,
        step=1,
        is_last=False,
        seconds=0.1,
        peak_bytes=1,
        latents=latents,
        preview=np.zeros((512, 512, 3), np.uint8),
    )
    light = hollow(Reported(0, report))
    assert isinstance(light, Reported) and isinstance(light.report, messages.Stepped)
    assert light.report.latents is not None and light.report.latents.shape == latents.shape
    assert light.report.latents.strides == (0, 0, 0)
    log = log_of(sim)
    log.note(1.0, Reported(0, report), [])
    assert len(to_bytes(sim.session, log, "")) - before < 400
    kept = log.noted[-1].event
    assert isinstance(kept, Reported) and isinstance(kept.report, messages.Stepped)
    assert kept.report.latents is not None and kept.report.latents.strides == (0, 0, 0)
    state = tasks.OpenTask(1, {"weights": np.zeros(10**6, np.float32)})
    wanted = hollow(tasks.Wanted(1, state))
    assert isinstance(wanted, tasks.Wanted) and isinstance(wanted.task, tasks.OpenTask)
    assert wanted.task.vectors["weights"].strides == (0,)


def test_only_the_last_inputs_are_kept_and_the_others_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(input_log, "KEPT", 50)
    sim = broken(JOBS["data"]())
    whole = log_of(sim)
    assert len(whole.noted) == 50 and whole.missing > 40
    assert from_bytes(to_bytes(sim.session, whole, "")).log.missing == whole.missing


def test_a_tick_that_changed_nothing_is_not_kept() -> None:
    log = InputLog()
    log.note(1.0, Tick(), [])
    assert not log.noted


@pytest.mark.parametrize(
    "data", [b"", b"\x80", b"\x93\x01\x02\x03", b"\x81\xa6format\x02", b"no msgpack at all"]
)
def test_other_bytes_are_a_sentence(data: bytes) -> None:
    with pytest.raises(UsageError):
        from_bytes(data)


def test_no_class_is_made_that_is_not_part_of_a_job() -> None:
    sim = broken(JOBS["data"]())
    data = to_bytes(sim.session, log_of(sim), "")
    with pytest.raises(UsageError, match="no record"):
        from_bytes(data.replace(b"Reported", b"Exploded"))


# --- the file ------------------------------------------------------------------------------------


def keep(folder: Path, sim: Simulation[Any], error: Exception) -> None:
    FailedJobs(folder).keep(sim.session, log_of(sim), error)


def test_the_record_is_its_owners_alone_and_the_error_says_where_it_is(tmp_path: Path) -> None:
    error = FluxmeshError("It failed.")
    keep(tmp_path / "failed", broken(JOBS["data"]()), error)
    (path,) = (tmp_path / "failed").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert error.__notes__ == [f"What its hosts said is in {path}"]
    assert str(error) == "It failed."


def test_a_job_that_was_cancelled_or_never_began_leaves_no_record(tmp_path: Path) -> None:
    keep(tmp_path, broken(JOBS["data"]()), CancelledError("Cancelled."))
    keep(tmp_path, painting(), FluxmeshError("It does not fit."))
    assert list(tmp_path.iterdir()) == []


def test_the_oldest_records_go(tmp_path: Path) -> None:
    sim = broken(JOBS["data"]())
    for number in range(KEPT + 3):
        object.__setattr__(sim.session.state.job, "id", f"job{number:02}")
        keep(tmp_path, sim, FluxmeshError("x."))
    names = sorted(path.stem for path in tmp_path.iterdir())
    assert names == [f"job{number:02}" for number in range(3, KEPT + 3)]


def test_a_record_that_cannot_be_written_hides_no_error(tmp_path: Path) -> None:
    (tmp_path / "failed").write_text("a file")
    error = FluxmeshError("It failed.")
    keep(tmp_path / "failed", broken(JOBS["data"]()), error)
    assert not hasattr(error, "__notes__")


@pytest.mark.parametrize(("arguments", "tells"), [(["-v"], True), (["--json"], False)])
def test_where_it_is_stands_beside_the_error_for_those_who_ask(
    arguments: list[str], tells: bool, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    error = FluxmeshError("It failed.")
    error.add_note("What its hosts said is in FILE")

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(cli.cli, "main", fail)
    with pytest.raises(SystemExit) as end:
        cli.main(["generate", "a cat", *arguments])
    assert end.value.code == 1
    printed = capsys.readouterr()
    assert printed.err.splitlines()[0] == "Error: It failed."
    assert ("FILE" in printed.err) == tells and "FILE" not in printed.out


# --- the tool ------------------------------------------------------------------------------------


def tool(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.replay", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("kind", ["data", "training"])
def test_the_tool_tells_the_job_again_and_makes_a_test_that_fails(
    tmp_path: Path, kind: str
) -> None:
    sim = broken(JOBS[kind]())
    keep(tmp_path, sim, FluxmeshError("It failed."))
    done = tool(tmp_path / "job.msgpack")
    assert done.returncode == 0, done.stderr
    assert "The session does the same again." in done.stdout
    assert "1 is gone, while the coordinator stood still" in done.stdout
    assert "finished with AdapterError" in done.stdout
    test = tmp_path / "test_job.py"
    test.write_text(tool("--test", tmp_path / "job.msgpack").stdout)
    space: dict[str, Any] = {"__file__": str(test)}
    exec(compile(test.read_text(), str(test), "exec"), space)
    with pytest.raises(AssertionError):
        space["test_job_job_comes_to_a_good_end"]()


def test_the_tool_says_what_is_no_record(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"nothing")
    done = tool(tmp_path / "x")
    assert done.returncode == 2 and "no record" in done.stderr
    assert tool(tmp_path / "missing").returncode == 2


def test_every_message_that_a_session_hears_can_be_written_down() -> None:
    sim = broken(JOBS["training"]())
    kinds = {type(getattr(event, "report", event)) for _, event in sim.heard}
    assert {training.Computed, training.UpdateDone, training.VectorPart, messages.Joined} <= kinds
