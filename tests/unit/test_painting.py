"""From events to files and reports, with a runner that paints by counting."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from fluxmesh.errors import OutputError, WeightsError
from fluxmesh.events import (
    BackendChanged,
    Encoded,
    Event,
    HostLost,
    Loading,
    Peak,
    Picture,
    Planned,
    Queued,
    Step,
)
from fluxmesh.request import GenerateRequest
from fluxmesh_coordinator.artifacts.pictures import PictureFiles, PicturePath, StepFiles
from fluxmesh_coordinator.artifacts.recipe import Recipe, read_recipe
from fluxmesh_coordinator.commands.generate import Painting, ReadyPrompt, paint
from fluxmesh_coordinator.console.generate_report import (
    GenerateJsonReporter,
    GenerateTerminalReporter,
    TimeLeftColumn,
)
from tests.unit.meshes import resolved

ASKED = GenerateRequest("dogs", 5, n_images=2, height=16, width=32, steps=2, stepwise=True)
REQUEST = resolved(ASKED).request
READY = ReadyPrompt(resolved(ASKED), Recipe.of(resolved(ASKED)))
RECIPE = READY.recipe


def pixels(value: int) -> np.ndarray:
    return np.full((16, 32, 3), value, np.uint8)


def events(stop_after: int | None = None, error: BaseException | None = None) -> Iterator[Event]:
    """What the runner tells of `REQUEST`; raises `error` after `stop_after` pictures."""
    yield Loading("transformer", 0, 10)
    yield Loading("transformer", 10, 10)
    yield Encoded("dogs", 0.5, cached=False)
    yield Peak("text", 3 * 2**30)
    for image in range(2):
        if image == stop_after and error is not None:
            raise error
        for step in (1, 2):
            yield Step(
                image=image, step=step, steps=2, seconds=0.25, preview=pixels(10 * image + step)
            )
        yield Picture(image=image, seed=5 + image, pixels=pixels(100 + image), seconds=1.5, steps=2)
    yield Peak("denoise", 2**30)
    yield Peak("denoise", 2**29)


@pytest.fixture
def terminal() -> tuple[GenerateTerminalReporter, io.StringIO]:
    """A reporter that believes in its terminal, and what that shows."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, highlight=False)
    return GenerateTerminalReporter(verbose=True, console=console), screen


def painting(folder: Path, *, save_raw: bool, stepwise: bool = False) -> Painting:
    files = PictureFiles(PicturePath.parse(str(folder)), n_images=2, save_raw=save_raw)
    steps = StepFiles(str(folder / "steps"), 1, 2, force=False) if stepwise else None
    return Painting(READY, files, steps=steps)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_raw_pictures_are_files_of_their_own_seed(tmp_path: Path) -> None:
    saved = paint(events(), painting(tmp_path, save_raw=True), GenerateJsonReporter())
    assert [path.name for path in saved] == ["out.0.png", "out.1.png"]
    recipes = [read_recipe(path) for path in saved]
    assert [(recipe.seed, recipe.n_images) for recipe in recipes] == [(5, 1), (6, 1)]
    assert np.asarray(Image.open(saved[1])).max() == 101


def test_a_grid_is_one_file_with_the_recipe_of_all(tmp_path: Path) -> None:
    (path,) = paint(events(), painting(tmp_path, save_raw=False), GenerateJsonReporter())
    assert read_recipe(path) == RECIPE
    assert np.asarray(Image.open(path)).shape == (16, 72, 3)


def test_steps_are_files_that_say_which_step(tmp_path: Path) -> None:
    paint(events(), painting(tmp_path, save_raw=False, stepwise=True), GenerateJsonReporter())
    names = sorted(path.name for path in (tmp_path / "steps").iterdir())
    assert names == [f"image-{image}-step-{step:02}.png" for image in (0, 1) for step in (1, 2)]
    with Image.open(tmp_path / "steps" / "image-1-step-02.png") as picture:
        assert np.asarray(picture).max() == 12
        assert json.loads(picture.text["fluxmesh"])["step"] == 2
        assert json.loads(picture.text["fluxmesh"])["seed"] == 6


def test_of_several_prompts_each_file_is_told_with_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "a red apple on a\nyellow background, and beside it a bowl of soup"
    request = GenerateRequest(long, seed=5)
    for names_prompts in (True, False):
        reporter = GenerateTerminalReporter(
            names_prompts=names_prompts, console=Console(file=io.StringIO())
        )
        reporter.started(request, {})
        reporter.saved(tmp_path / "out-8.png", [5])
    several, alone = capsys.readouterr().out.splitlines()
    assert several.endswith("out-8.png (seed 5): a red apple on a yellow background, and beside…")
    assert alone.endswith("out-8.png (seed 5)")
    programs = GenerateJsonReporter()
    programs.started(replace(request, prompt="two dogs"), {})
    programs.saved(tmp_path / "out.png", [5])
    assert lines(capsys)[-1]["prompt"] == "two dogs"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), WeightsError("x is truncated.")])
def test_what_was_complete_stays_when_the_runner_stops(
    tmp_path: Path, error: BaseException
) -> None:
    for save_raw, left in ((False, []), (True, ["out.0.png"])):
        with pytest.raises(type(error)):
            paint(events(1, error), painting(tmp_path, save_raw=save_raw), GenerateJsonReporter())
        assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_the_runner_is_closed_when_writing_fails(tmp_path: Path) -> None:
    closed = []

    def watched() -> Iterator[Event]:
        try:
            yield from events()
        finally:
            closed.append(True)

    target = painting(tmp_path, save_raw=True)
    running = watched()
    tmp_path.rmdir()
    with pytest.raises(OutputError, match="can't be read any more: No such file"):
        paint(running, target, GenerateJsonReporter())
    assert closed == [True]


def test_json_lines_tell_every_event_without_pixels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with GenerateJsonReporter() as reporter:
        reporter.started(REQUEST, {"name": "tiny", "revision": "abc"})
        reporter.downloading("dev", 1, 2)
        paint(events(), painting(tmp_path, save_raw=False), reporter)
        reporter.finished()
    printed = lines(capsys)
    assert printed[0]["event"] == "start" and printed[0]["model"] == {
        "name": "tiny",
        "revision": "abc",
    }
    assert printed[0]["cache"] == 0.0
    assert printed[1] == {"event": "download", "model": "dev", "done_bytes": 1, "total_bytes": 2}
    step = {"event": "step", "image": 1, "step": 2, "steps": 2, "seconds": 0.25, "reused": False}
    assert step in printed
    picture = {"event": "picture", "image": 0, "seed": 5, "seconds": 1.5, "placement": "data"}
    assert picture | {"steps": 2, "reused": 0} in printed
    assert printed[-1] == {"event": "done", "files": [str(tmp_path / "out.png")]}


def test_a_terminal_shows_steps_times_peaks_and_the_file(
    tmp_path: Path, terminal: tuple[GenerateTerminalReporter, io.StringIO], capsys: Any
) -> None:
    reporter, screen = terminal
    with reporter:
        reporter.started(REQUEST, {})
        reporter.downloading("dev", 2 * 10**9, 4 * 10**9)
        reporter.progress.refresh()
        paint(events(), painting(tmp_path, save_raw=False), reporter)
        reporter.finished()
    shown = screen.getvalue()
    assert "2.00/4.00 GB" in shown
    assert "Read the prompt in 0.50 s." in shown
    assert "Image 2 (seed 6): 1.50 s." in shown
    assert "Peak memory used for the text:       3.000GB" in shown
    assert "Peak memory used for the generation: 1.000GB" in shown
    assert "Peak memory used overall:            3.000GB" in shown
    assert "Saved" in shown + capsys.readouterr().out


@pytest.mark.parametrize(("total", "said"), [(100, "3:14 left"), (3000, "1:39:54 left")])
def test_a_bar_tells_one_time_and_what_it_is(total: int, said: str) -> None:
    now = [0.0]
    bar = Progress(get_time=lambda: now[0])
    task = bar.add_task("steps", total=total)
    assert str(TimeLeftColumn().render(bar.tasks[0])) == ""
    for done in (1, 2, 3):
        now[0] += 2.0
        bar.update(task, completed=done)
    assert str(TimeLeftColumn().render(bar.tasks[0])) == said


def test_after_the_last_step_the_bar_says_decoding_whatever_is_loaded_for_it(
    terminal: tuple[GenerateTerminalReporter, io.StringIO],
) -> None:
    reporter, screen = terminal

    def shown() -> str:
        screen.seek(0), screen.truncate()
        reporter.progress.refresh()
        return screen.getvalue()

    with reporter:
        reporter.started(REQUEST, {})
        reporter.event(Loading("transformer", 10**6, 4 * 10**6))
        assert "Loading transformer" in shown() and "1.0/4.0 MB" in shown()
        reporter.event(Step(image=0, step=1, steps=2, seconds=0.1))
        assert "step 1/2" in shown()
        reporter.event(Step(image=0, step=2, steps=2, seconds=0.1))
        assert "decoding" in shown()
        reporter.event(Loading("autoencoder", 0, 2 * 10**6))
        assert "decoding" in shown() and "Loading" not in shown() and "MB" not in shown()
        reporter.event(Loading("autoencoder", 10**6, 2 * 10**6))
        assert "decoding, autoencoder 1.0/2.0 MB" in shown()
        reporter.event(Loading("autoencoder", 2 * 10**6, 2 * 10**6))
        assert "decoding" in shown() and "MB" not in shown()


def test_a_terminal_tells_how_many_steps_a_cache_approximated(
    terminal: tuple[GenerateTerminalReporter, io.StringIO],
) -> None:
    reporter, screen = terminal
    picture = Picture(image=0, seed=5, pixels=pixels(1), seconds=1.5, steps=20, reused=8)
    with reporter:
        reporter.started(replace(REQUEST, cache=0.12), {})
        reporter.event(picture)
    assert (
        "Image 1 (seed 5): 1.50 s. Approximate (--cache 0.12): 12 of 20 steps computed, 8 reused."
        in screen.getvalue()
    )


def test_the_bar_counts_steps_over_all_images(
    terminal: tuple[GenerateTerminalReporter, io.StringIO],
) -> None:
    reporter, screen = terminal
    with reporter:
        reporter.started(REQUEST, {})
        reporter.event(Step(image=0, step=2, steps=2, seconds=0.1))
        reporter.event(Step(image=1, step=1, steps=2, seconds=0.1))
        (task,) = reporter.progress.tasks
        assert (task.completed, task.total) == (3, 4)
        reporter.progress.refresh()
        assert "Image 2/2" in screen.getvalue() and "step 1/2" in screen.getvalue()
    assert reporter.progress.tasks == []


def test_a_mesh_tells_its_queue_its_plan_and_its_losses(
    terminal: tuple[GenerateTerminalReporter, io.StringIO],
) -> None:
    reporter, screen = terminal
    with reporter:
        reporter.started(REQUEST, {})
        for place, seconds in ((2, 40.4), (2, 38.0), (1, 0.0)):
            reporter.event(Queued(place, seconds, 3))
        reporter.event(
            Planned(placement="tensor", hosts=(0, 1), seconds=12.5, reason="It is the only way.")
        )
        reporter.event(HostLost(1, "mac1", "Its agent is silent."))
        reporter.event(
            BackendChanged(
                hosts=(0, 1), names=("a", "b"), before="jaccl", after="ring", reason="a: errno 60."
            )
        )
        reporter.event(
            Planned(
                placement="data",
                hosts=(0,),
                seconds=20.0,
                reason="The mesh has one host.",
                notice="The first is slow.",
            )
        )
        reporter.event(Peak("decode", 1))
    shown = screen.getvalue()
    assert shown.count("in line") == 2
    changed = "jaccl failed on hosts 0 and 1, which go on over ring until the next `fluxmesh up`: "
    assert f"{changed}a: errno 60.\n" in shown
    assert "Host 3 is in use: 2nd in line, about 40 s." in shown
    assert "Host 3 is in use: 1st in line." in shown
    assert "Plan: tensor on hosts 0, 1, 12.50 s. It is the only way." in shown
    assert "Host 1 (mac1) is lost: Its agent is silent." in shown
    assert "Plan: data on host 0" in shown and shown.count("The first is slow.") == 1
    assert "Took 0.0" in shown and "20.0" in shown.rpartition("Took")[2]


def test_a_terminal_says_what_is_left_out_of_either_text(
    terminal: tuple[GenerateTerminalReporter, io.StringIO],
) -> None:
    reporter, screen = terminal
    left_out = {"negative_tokens": 9, "negative_kept": 7, "negative_dropped": "and blur"}
    with reporter:
        reporter.started(REQUEST, {})
        reporter.event(Encoded("dogs", 0.5, cached=False, **left_out))
        reporter.event(
            Encoded("a dog", 0.5, cached=False, tokens=4, kept=3, dropped="dog", **left_out)
        )
    sentence = "The model reads 7 of the 9 tokens of the negative prompt; left out is all from"
    shown = " ".join(screen.getvalue().split())
    assert shown.count(f"{sentence} “and blur” on.") == 2
    assert shown.count("3 of the 4 tokens of the prompt; left out is all from “dog” on.") == 1


def test_one_bar_counts_the_bytes_of_all_hosts(
    terminal: tuple[GenerateTerminalReporter, io.StringIO],
) -> None:
    reporter, _ = terminal
    with reporter:
        for host, done in ((0, 1), (1, 2), (0, 3)):
            reporter.event(Loading("transformer", done * 10**9, 4 * 10**9, host))
        (task,) = reporter.progress.tasks
        assert (task.completed, task.total) == (5e9, 8e9)


def test_pictures_that_come_in_any_order_stand_in_their_own(tmp_path: Path) -> None:
    def shuffled() -> Iterator[Event]:
        yield Picture(image=1, seed=6, pixels=pixels(101), seconds=1.0, host=1, placement="tensor")
        yield Picture(image=0, seed=5, pixels=pixels(100), seconds=1.0, host=0, placement="data")

    (path,) = paint(shuffled(), painting(tmp_path, save_raw=False), GenerateJsonReporter())
    sheet = np.asarray(Image.open(path))
    assert (sheet[0, 0, 0], sheet[0, -1, 0]) == (100, 101)
    assert read_recipe(path).placement == "mixed"


def test_each_raw_picture_says_by_which_placement_it_was_made(tmp_path: Path) -> None:
    def made() -> Iterator[Event]:
        yield Planned(placement="tensor", hosts=(0, 1), seconds=1.0, reason="")
        yield Step(image=0, step=1, steps=2, seconds=0.1, preview=pixels(1))
        yield Picture(image=0, seed=5, pixels=pixels(100), seconds=1.0, host=0, placement="tensor")

    (path,) = paint(
        made(), painting(tmp_path, save_raw=True, stepwise=True), GenerateJsonReporter()
    )
    assert read_recipe(path).placement == "tensor"
    assert read_recipe(tmp_path / "steps" / "image-0-step-01.png").placement == "tensor"


@pytest.mark.parametrize("save_raw", [False, True])
def test_a_picture_s_recipe_names_the_files_that_the_hosts_have_read(
    tmp_path: Path, save_raw: bool
) -> None:
    """Not those that were here when it was asked for, if somebody has changed them since."""
    asked = resolved(ASKED)
    model = replace(asked.model, revision="local-older", checkpoint=here("older"))
    ready = replace(READY, resolved=replace(asked, model=model))

    def made() -> Iterator[Event]:
        yield Encoded("dogs", 0.5, cached=False, content="newer", revision="local-newer")
        yield Step(image=0, step=1, steps=2, seconds=0.1, preview=pixels(1))
        yield Picture(image=0, seed=5, pixels=pixels(100))

    target = replace(painting(tmp_path, save_raw=save_raw, stepwise=True), ready=ready)
    (path,) = paint(made(), target, GenerateJsonReporter())
    assert read_recipe(path).revision == "local-newer"
    step = read_recipe(tmp_path / "steps" / "image-0-step-01.png")
    assert step.revision == "local-newer"


def here(content: str, changed: Path | None = None) -> Any:
    """What is asked of a checkpoint whose files are on this machine."""
    return SimpleNamespace(content=content, stamps=SimpleNamespace(changed=changed))


@pytest.mark.parametrize(
    ("told", "changed", "named"),
    [
        (("same", "abc"), None, "abc"),
        (("same", "local-1"), None, "abc"),  # these files, which a host has from elsewhere
        (("other", "local-1"), None, "local-1"),  # another machine's
        (("same", "local-1"), Path("here"), "local-1"),  # ours are others by now
        (("same", ""), None, "abc"),
    ],
)
def test_the_revision_is_ours_where_hosts_have_our_files(
    told: tuple[str, str], changed: Path | None, named: str
) -> None:
    checkpoint = here("same", changed)
    model = replace(resolved(ASKED).model, revision="abc", checkpoint=checkpoint)
    content, revision = told
    encoded = Encoded("dogs", 0.5, cached=False, content=content, revision=revision)
    assert model.revision_read(encoded) == named


def test_what_no_file_here_can_tell_stays_open() -> None:
    """Who makes the picture again could compare it with nothing."""
    model = replace(resolved(ASKED).model, revision="", is_here=False)
    encoded = Encoded("dogs", 0.5, cached=False, content="theirs", revision="local-1")
    assert model.revision_read(encoded) == ""
