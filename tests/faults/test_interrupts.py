"""Every command, interrupted at many moments in every way: what is left, what is said, what works.

Each case takes one command in one state of the machine, strikes it at moments drawn by a seed and
at phases by name, and then lets it run: no process, no half file, no traceback, the cursor is back,
exit code 130 (or the command was done), and the next command works. `make test` takes a sample;
with `--faults all` each command is struck `MOMENTS` times (environment), and a table is printed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from fluxmesh.models.registry import PUBLISHED
from tests.checkpoints import make_checkpoint
from tests.datasets import make_dataset
from tests.faults import strike
from tests.flux2_checkpoint import make_flux2
from tests.hub_server import Handler, Hub
from tests.interrupting import BLOWS, TerminalUser
from tests.ports import free_ports

MOMENTS = int(os.environ.get("MOMENTS", "12"))
PULLED = {"flux1": "schnell", "flux2": "klein-4b"}  # from a Hub of our own


@dataclass
class StruckMachine:
    """A user's machine, before a command is struck."""

    user: TerminalUser
    model: str
    alias: str  # of a model that the Hub has
    data: Path
    meant: list[int] = field(default_factory=list)  # what may run before and after

    def hostfile(self, hosts: int) -> Path:
        path = self.user.work / f"{hosts}.json"
        if not path.exists():
            entries = [
                {"ssh": "127.0.0.1", "ips": ["127.0.0.1"], "control": f"127.0.0.1:{port}"}
                for port in free_ports(hosts)
            ]
            path.write_text(json.dumps(entries))
        return path

    def has_mesh_of(self, hosts: int) -> None:
        """A mesh that is there before the command, and shall be after it; with 0, none."""
        running = set(self.user.processes())
        if len(self.meant) == 2 * hosts and set(self.meant) == running:
            return
        self.down()
        if hosts:
            up = ("up", self.hostfile(hosts), "--model", self.model, "--no-warm")
            done = self.user.run(*up)
            assert done.returncode == 0, done.stderr
            self.meant = list(self.user.processes())

    def down(self) -> None:
        self.meant = []
        done = self.user.run("down", "--force")
        assert done.returncode == 0, done.stderr


# With whether the command was done before it was struck: what is wrong.
Look = Callable[[StruckMachine, bool], list[str]]


@dataclass(frozen=True)
class StruckCommand:
    """One command, and the state of the machine that it meets."""

    arguments: Callable[[StruckMachine], list[object]]
    phases: tuple[str, ...] = ()  # what it says, after which it is struck too
    hosts: int = 0  # of a mesh that is up before and after it; 0 is none
    before: Callable[[StruckMachine], object] = lambda scene: None  # each time
    after: Look = lambda scene, done: []  # each time: what is wrong, put right
    ends_by_itself: bool = True
    asks_again: bool = False  # one Ctrl-C is not enough, where nothing is under way


def _generate(scene: StruckMachine, *more: object) -> list[object]:
    size = ("--image-size", "32x32", "--steps", 12)
    return [
        "generate",
        "a red apple",
        "--model",
        scene.model,
        *size,
        "-o",
        "a.png",
        "--force",
        *more,
    ]


def _half_picture(scene: StruckMachine, done: bool) -> list[str]:
    """A picture is whole, or it is not there."""
    problems = []
    for path in scene.user.work.glob("*.png"):
        try:
            with Image.open(path) as picture:
                picture.load()
        except OSError as error:
            problems.append(f"{path.name}: {error}")
        path.unlink()
    return problems


def _whole_folder(name: str) -> Look:
    def look(scene: StruckMachine, done: bool) -> list[str]:
        folder = scene.user.work / name
        if not folder.exists():
            return ["the folder is missing"] if done else []
        problems = [] if (folder / "fluxmesh.json").exists() else [f"{name} is half a folder"]
        shutil.rmtree(folder)
        return problems

    return look


def _up_or_nothing(scene: StruckMachine, done: bool) -> list[str]:
    """A mesh that came up goes down; one that did not has left nothing, on record neither."""
    if done:
        scene.down()
    names = ("started.json", "agent.json", "mesh.json")
    left = [path.name for name in names for path in scene.user.folder.rglob(name)]
    return [f"on record: {left}"] if left else []


def _down_again(scene: StruckMachine, done: bool) -> list[str]:
    scene.down()
    return _up_or_nothing(scene, False)


def _forget_training(scene: StruckMachine) -> None:
    shutil.rmtree(scene.user.work / "trained", ignore_errors=True)


def _adapter(scene: StruckMachine) -> Path:
    folder = scene.user.work / "adapter"
    if not folder.exists():
        done = scene.user.run(*_train(scene, folder, 2))
        assert done.returncode == 0, done.stderr
    return folder / "final_adapters.safetensors"


def _train(scene: StruckMachine, folder: object = "trained", iterations: int = 24) -> list[object]:
    small = ("--resolution", "32x32", "--num-augmentations", 1, "--grad-accumulate", 1)
    return [
        *("train", scene.data, "--model", scene.model, "--output-dir", folder, *small),
        *("--iterations", iterations, "--checkpoint-every", 6, "--lora-rank", 2),
    ]


def _serve(scene: StruckMachine) -> list[object]:
    return ["serve", "--model", scene.model, "--port", 0]


def _on_no_record(scene: StruckMachine, done: bool) -> list[str]:
    """Nobody is told of a server that has ended."""
    return [f"on record: {path.name}" for path in scene.user.folder.rglob("serve.json")]


UP_PHASES = ("Looking at", "Starting agents", "Loading", "Timing a step", "Ready for")
CASES: dict[str, StruckCommand] = {
    "up": StruckCommand(
        lambda scene: ["up", scene.hostfile(1), "--model", scene.model],
        UP_PHASES,
        after=_up_or_nothing,
    ),
    "up, two hosts": StruckCommand(
        lambda scene: ["up", scene.hostfile(2), "--model", scene.model],
        (*UP_PHASES, "Measuring the links", "Measuring the ring"),
        after=_up_or_nothing,
    ),
    "up, again": StruckCommand(
        lambda scene: ["up", scene.hostfile(1), "--model", scene.model], UP_PHASES, hosts=1
    ),
    "down": StruckCommand(lambda scene: ["down"], hosts=1, after=_down_again),
    "generate": StruckCommand(
        _generate, ("Painting with", "Loading", "step 3", "decoding"), after=_half_picture
    ),
    "generate on a mesh": StruckCommand(
        _generate, ("Painting with", "step 3", "decoding"), hosts=2, after=_half_picture
    ),
    "train": StruckCommand(
        _train, ("Training", "Encoding", "updates of", "2/24", "saved"), before=_forget_training
    ),
    "train on a mesh": StruckCommand(
        _train, ("Training", "Encoding", "updates of", "2/24"), hosts=2, before=_forget_training
    ),
    "interactive": StruckCommand(
        lambda scene: ["interactive", "--model", scene.model],
        ("fluxmesh> ",),
        ends_by_itself=False,
        asks_again=True,
    ),
    "serve": StruckCommand(_serve, ("Serving on",), ends_by_itself=False, after=_on_no_record),
    "serve on a mesh": StruckCommand(
        _serve, ("Serving on",), hosts=2, ends_by_itself=False, after=_on_no_record
    ),
    "plan": StruckCommand(lambda scene: ["plan", "--model", scene.model]),
    "plan on a mesh": StruckCommand(lambda scene: ["plan", "--model", scene.model], hosts=1),
    "doctor": StruckCommand(lambda scene: ["doctor", "--model", scene.model]),
    "doctor on a mesh": StruckCommand(lambda scene: ["doctor"], hosts=2),
    "status --watch": StruckCommand(
        lambda scene: ["status", "--watch"], ("127.0.0.1",), hosts=1, ends_by_itself=False
    ),
    "logs": StruckCommand(lambda scene: ["logs"], hosts=1),
    "models list": StruckCommand(lambda scene: ["models", "list"]),
    "models pull": StruckCommand(
        lambda scene: ["models", "pull", scene.alias],
        ("Fetching",),
        before=lambda scene: shutil.rmtree(scene.user.folder / "home" / "hub", ignore_errors=True),
    ),
    "models quantize": StruckCommand(
        lambda scene: ["models", "quantize", scene.model, "small"], after=_whole_folder("small")
    ),
    "adapters fuse": StruckCommand(
        lambda scene: ["adapters", "fuse", scene.model, _adapter(scene), "fused"],
        before=_adapter,
        after=_whole_folder("fused"),
    ),
}


# What loads no model is struck once, and not with every family's.
OF_NO_MODEL = ("down", "status --watch", "logs", "models list", "doctor on a mesh")
STRUCK = [
    pytest.param(family, name, id=name if family == "flux1" else f"{family}-{name}")
    for family in strike.MODEL_FAMILIES
    for name in CASES
    if family == "flux1" or name not in OF_NO_MODEL
]


def _make_model(folder: Path, family: strike.ModelFamily) -> Path:
    if family == "flux2":
        return make_flux2(folder)
    return make_checkpoint(folder, dtype="bfloat16").path


@pytest.fixture(scope="session")
def slow_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Hub on loopback that gives a model of each family piece by piece."""
    folder = tmp_path_factory.mktemp("hub")
    state = Hub(
        {
            PUBLISHED[PULLED[family]].repo: _make_model(folder / family, family)
            for family in strike.MODEL_FAMILIES
        }
    )

    class SlowHandler(Handler):
        hub = state

        def do_GET(self) -> None:
            time.sleep(0.05)
            super().do_GET()

    http = ThreadingHTTPServer(("127.0.0.1", 0), SlowHandler)
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()


@pytest.fixture(scope="session")
def family(request: pytest.FixtureRequest) -> strike.ModelFamily:
    """Whose models the commands take."""
    named: strike.ModelFamily = request.param
    return named


@pytest.fixture(scope="session")
def scene(
    tmp_path_factory: pytest.TempPathFactory, slow_hub: str, family: strike.ModelFamily
) -> Iterator[StruckMachine]:
    folder = tmp_path_factory.mktemp("user")
    online = {"HF_ENDPOINT": slow_hub, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    user = TerminalUser(folder, online)
    model = _make_model(folder / "model", family)
    data = make_dataset(folder / "data", [(32, 32), (32, 32)])
    scene = StruckMachine(user, str(model), PULLED[family], data)
    yield scene
    scene.down()
    assert user.left_running() == []


@pytest.mark.sample(2)
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("family", "name"), STRUCK, indirect=["family"])
def test_a_command_that_is_interrupted_leaves_nothing_and_the_next_one_works(
    scene: StruckMachine,
    name: str,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    case, user = CASES[name], scene.user
    draw = random.Random(f"{request.config.getoption('faults_seed')} {name}")
    is_sample = request.config.getoption("faults") == "sample"

    def prepare() -> list[object]:
        scene.has_mesh_of(case.hosts)
        case.before(scene)
        return case.arguments(scene)

    def settle(done: bool) -> list[str]:
        problems = case.after(scene, done)
        return [*problems, *user.left_running(scene.meant), *user.left_files()]

    takes = 3.0
    if case.ends_by_itself and not is_sample:
        arguments, begun = prepare(), time.monotonic()
        alone = user.run(*arguments)
        takes = time.monotonic() - begun
        assert alone.returncode == 0, alone.stderr
        assert settle(True) == []

    problems: list[str] = []
    outcomes: dict[str, int] = {}
    slowest = 0.0
    moments = list(_moments(case, draw, takes, 2 if is_sample else MOMENTS))
    for seconds, phase, blow in moments:
        arguments = prepare()
        struck = user.strike(arguments, blow, seconds=seconds, after=phase, again=case.asks_again)
        when = f"{f'{seconds:.2f} s after {phase!r}' if phase else f'at {seconds:.2f} s'}, {blow}"
        bad = [*struck.problems, *settle(struck.code == 0)]
        problems += [f"{when}: {each}" for each in bad]
        what = "done" if struck.code == 0 else str(struck.code)
        outcomes[what] = outcomes.get(what, 0) + 1
        slowest = max(slowest, struck.seconds)

    if case.ends_by_itself:
        after = user.run(*prepare())
        if after.returncode:
            problems.append(f"the next one fails: {after.stderr[-500:]}")
        problems += settle(True)
    said = ", ".join(f"{count} x {what}" for what, count in sorted(outcomes.items()))
    with capsys.disabled():
        row = f"{len(moments):3} moments  {said:24} slowest {slowest:4.1f} s"
        print(f"\n{name:20} {row}  {f'{len(problems)} PROBLEMS' if problems else 'nothing left'}")
    assert problems == [], "\n".join(problems)


def _moments(
    case: StruckCommand, draw: random.Random, takes: float, count: int
) -> Iterator[tuple[float, str, str]]:
    """(seconds, after which words of the command, what is done to it)."""
    blows = list(BLOWS)
    for number in range(count):
        # A third in the first moments of Python, which every command has.
        early = number % 3 == 2
        yield draw.uniform(0.0, 0.4 if early else 1.02 * takes), "", draw.choice(blows)
    phases = list(case.phases)
    for phase in phases if count > 2 else draw.sample(phases, min(1, len(phases))):
        yield draw.uniform(0.0, 0.3), phase, draw.choice(blows)
