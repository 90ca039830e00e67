"""Previews: arithmetic on arrays, what travels, and how a terminal and a program are shown them."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fluxmesh import events
from fluxmesh.bounds import MAX_PREVIEW
from fluxmesh.errors import UsageError, WeightsError
from fluxmesh.request import GenerateRequest
from fluxmesh.sampling.latents import pack
from fluxmesh.sampling.preview import Projection, colours_of, expected, sample_pictures
from fluxmesh.weights import hub
from fluxmesh.wire import messages, protocol
from fluxmesh.wire.values import ProtocolError
from fluxmesh_coordinator.console.generate_report import (
    Display,
    GenerateJsonReporter,
    GenerateTerminalReporter,
)
from fluxmesh_coordinator.console.terminal_pictures import ROWS, TerminalPreview

KITTY = {"TERM": "xterm-kitty"}
ITERM = {"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_where_a_straight_flow_leads_is_known_after_each_step() -> None:
    clean, noise = random(1, 6, 8), random(1, 6, 8, seed=1)

    def at(t: float) -> np.ndarray:
        return (1 - t) * clean + t * noise

    for t, t_next in ((1.0, 0.75), (0.75, 0.2), (0.2, 0.0)):
        np.testing.assert_allclose(expected(at(t), at(t_next), t, t_next), clean, atol=1e-5)


def test_a_projection_is_fitted_to_colours_and_puts_each_pixel_in_its_place() -> None:
    """Latents that are colours, in the order in which tokens are packed: all must come back."""
    colours = np.random.default_rng(3).uniform(0.1, 0.9, (4, 8, 6, 3)).astype(np.float32)
    mixed = np.concatenate([2 * colours[..., ::-1] - 1, random(4, 8, 6, 2)], axis=-1)
    tokens = pack(mixed)  # four pictures of 8 x 6 latents with 5 channels
    wanted = [colours_of((each * 255).round().astype(np.uint8), 1) for each in colours]
    latents = np.concatenate([each.reshape(-1, 5) for each in mixed])
    projection = Projection.fit(latents, np.concatenate(wanted))
    for k in range(4):
        picture = projection.picture(tokens[k : k + 1], (8, 6))
        assert picture.shape == (8, 6, 3) and picture.dtype == np.uint8
        assert np.abs(picture / 255 - colours[k]).max() < 0.02


def test_a_large_picture_is_shown_small_and_a_broken_one_without_a_warning() -> None:
    projection = Projection(random(1, 3), random(3))
    picture = projection.picture(random(1, 300 * 4, 4), (600, 8))
    assert picture.shape == (200, 3, 3) and max(picture.shape) <= MAX_PREVIEW
    tokens = np.full((1, 4, 4), np.nan, np.float32)
    assert not projection.picture(tokens, (4, 4)).any()


def test_a_table_is_read_as_it_was_written_and_nothing_else_is(tmp_path: Path) -> None:
    written, path = Projection(random(8, 3), random(3)), tmp_path / "preview.npy"
    written.write(path)
    again = Projection.read(path)
    np.testing.assert_array_equal(again.factors, written.factors)
    np.testing.assert_array_equal(again.offset, written.offset)
    np.save(path, np.zeros((3, 5), np.float32))
    for content in (path.read_bytes(), b"", b"\x93NUMPY", b"pickle me"):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=r"preview\.npy is no table of a preview"):
            Projection.read(path)


def test_the_embedded_checkpoint_brings_its_table() -> None:
    projection = Projection.read(hub.tiny_folder() / "vae" / "preview.npy")
    assert projection.factors.shape == (16, 3) and np.isfinite(projection.factors).all()


def test_pictures_to_fit_to_are_the_same_everywhere() -> None:
    first, second = sample_pictures(2, 32), sample_pictures(2, 32)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert not np.array_equal(first[0], first[1])
    assert all(picture.std() > 10 for picture in first)


def test_a_preview_that_is_too_large_is_no_report() -> None:
    report = messages.Stepped(
        job="j",
        ring_generation=0,
        image=0,
        step=1,
        is_last=True,
        seconds=0.1,
        peak_bytes=1,
        projected=np.zeros((MAX_PREVIEW, 8, 3), np.uint8),
    )
    assert protocol.decode(protocol.encode(report))[1].projected.shape == (MAX_PREVIEW, 8, 3)
    object.__setattr__(report, "projected", np.zeros((MAX_PREVIEW + 1, 8, 3), np.uint8))
    with pytest.raises(ProtocolError, match="257x8; 256 a side is the most"):
        protocol.decode(protocol.encode(report))


def test_how_often_is_checked() -> None:
    assert GenerateRequest("dogs", 1, preview_every=1).preview_every == 1
    for every in (-1, 1001):
        with pytest.raises(UsageError, match=f"`preview_every` is {every}"):
            GenerateRequest("dogs", 1, preview_every=every)


def preview_of(step: int) -> events.Preview:
    return events.Preview(image=0, step=step, steps=4, pixels=np.full((8, 16, 3), step, np.uint8))


def console(is_terminal: bool = True) -> tuple[Console, io.StringIO]:
    screen = io.StringIO()
    return Console(file=screen, force_terminal=is_terminal, width=80), screen


@pytest.mark.parametrize("environ", [KITTY, ITERM], ids=["kitty", "iterm"])
def test_a_preview_is_drawn_again_in_its_place_and_leaves_nothing(environ: dict[str, str]) -> None:
    target, screen = console()
    preview = TerminalPreview(target, environ)
    preview.erase()
    assert preview.can_show and screen.getvalue() == ""
    preview.show(b"one")
    first = screen.getvalue()
    assert first.startswith("\n" * ROWS + f"\x1b[{ROWS}A\x1b7") and f"\x1b8\x1b[{ROWS}B" in first
    preview.show(b"two")
    second = screen.getvalue().removeprefix(first)
    assert "\n" not in second  # the screen does not scroll any more
    assert second.startswith(f"\x1b[{ROWS}A\x1b7")
    assert base64.b64encode(b"two").decode() in second
    preview.erase()
    assert screen.getvalue().endswith(f"\x1b[{ROWS}A\r\x1b[J")
    assert ("a=d,d=I" in screen.getvalue()) == (environ is KITTY)
    preview.show(b"three")  # begins anew, below what was written meanwhile
    assert screen.getvalue().count("\n" * ROWS) == 2


@pytest.mark.parametrize(
    ("environ", "is_terminal"), [(KITTY, False), ({"TERM": "xterm"}, True), ({}, False)]
)
def test_where_no_picture_can_be_shown_none_is_asked_for(
    environ: dict[str, str], is_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.environ", environ)
    target, screen = console(is_terminal)
    reporter = GenerateTerminalReporter(display=Display(previews=True), console=target)
    assert not reporter.shows_previews
    reporter.event(preview_of(1))
    assert screen.getvalue() == ""


def test_a_preview_makes_way_for_what_is_told_and_for_the_picture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.environ", KITTY)
    target, screen = console()
    with GenerateTerminalReporter(display=Display(previews=True), console=target) as reporter:
        assert reporter.shows_previews
        reporter.started(GenerateRequest("dogs", 1, steps=4), {})
        reporter.event(events.Step(image=0, step=1, steps=4, seconds=0.1))
        reporter.event(preview_of(1))
        reporter.note("Something is to be told.")
        before = screen.getvalue().partition("Something")[0]
        assert "a=d,d=I" in before  # it is erased first
        reporter.event(events.Step(image=0, step=2, steps=4, seconds=0.1))
        reporter.event(preview_of(2))
        picture = np.zeros((16, 16, 3), np.uint8)
        reporter.event(events.Picture(image=0, seed=1, pixels=picture))
        assert screen.getvalue().count("a=d,d=I") == 2
    silent = GenerateTerminalReporter(display=Display(), console=target)
    assert not silent.shows_previews


def test_a_program_is_given_previews_as_png(capsys: pytest.CaptureFixture[str]) -> None:
    assert not GenerateJsonReporter().shows_previews
    reporter = GenerateJsonReporter(previews=True)
    assert reporter.shows_previews
    reporter.event(preview_of(3))
    line = json.loads(capsys.readouterr().out)
    assert (line["event"], line["image"], line["step"], line["steps"]) == ("preview", 0, 3, 4)
    assert re.fullmatch(r"[A-Za-z0-9+/=]+", line["png"]) and "pixels" not in line
    with Image.open(io.BytesIO(base64.b64decode(line["png"]))) as picture:
        assert np.asarray(picture).tolist() == preview_of(3).pixels.tolist()
