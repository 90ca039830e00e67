"""The embedded checkpoint as it ships, and the scenes that it is trained and scored on."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import fluxmesh
from fluxmesh.weights.embedded.checkpoints import embedded_names, folder_of
from fluxmesh.weights.embedded.words import EDITS, EDITS_OF_TWO, PROMPTS, THINGS, unknown_words

TINY = Path(fluxmesh.__file__).parent / "tiny"
TOOLS = Path(__file__).parents[2] / "tools" / "tiny"


@pytest.fixture(scope="module")
def programs():
    """Modules of `tools/tiny`, which holds programs that import each other by bare names."""
    sys.path.insert(0, str(TOOLS))
    names = ("scenes", "edits", "sprites", "score")
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(TOOLS))
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def scenes(programs):
    return programs["scenes"]


@pytest.fixture(scope="module")
def edits(programs):
    return programs["edits"]


@pytest.mark.parametrize("name", embedded_names())
def test_a_checkpoint_is_small_and_comes_with_its_notice(name):
    files = [file for file in folder_of(name).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 25_000_000
    assert "SIL OPEN FONT LICENSE" in (TINY / "NOTICE").read_text()


@pytest.mark.parametrize("name", embedded_names())
def test_its_heads_divide_over_2_3_4_and_6_hosts(name):
    config = json.loads((folder_of(name) / "transformer/config.json").read_text())
    assert config["num_attention_heads"] == 12


@pytest.mark.parametrize("size", [(128, 128), (64, 64), (192, 128), (128, 64)])
def test_things_lie_on_the_grid_and_inside(scenes, size):
    height, width = size
    rng = np.random.default_rng(0)
    for _ in range(500):
        scene, _ = scenes.sample(rng, height, width)
        for thing in scene.things:
            side = thing.size * min(size)
            left, top = thing.x * width - side / 2, thing.y * height - side / 2
            for number in (side, left, top):
                assert abs(number / scenes.GRID - round(number / scenes.GRID)) < 1e-6
            assert 0 <= round(left) <= width - round(side)
            assert 0 <= round(top) <= height - round(side)


def test_training_never_shows_what_evaluation_asks(scenes):
    asked = scenes.questions(200, 0)
    pairs = {frozenset(question.names) for question in asked if question.relation is not None}
    singles = {
        (question.names[0], question.place, question.background)
        for question in asked
        if question.place is not None
    }
    assert len(pairs) > 50 and len(singles) > 50

    rng = np.random.default_rng(0)
    shown_pairs, shown_singles = set(), set()
    cells = {(column, row): place for place, (column, row, _) in enumerate(scenes.PLACES)}
    for _ in range(20_000):
        scene, _ = scenes.sample(rng)
        if len(scene.things) == 2:
            shown_pairs.add(frozenset(thing.name for thing in scene.things))
        elif scene.things[0].size <= 0.5:  # a larger thing is pushed towards the middle
            thing = scene.things[0]
            column, row = (
                int(np.argmin([abs(at - anchor) for anchor in scenes.ANCHORS]))
                for at in (thing.x, thing.y)
            )
            shown_singles.add((thing.name, cells[column, row], scene.background))
    assert len(shown_pairs) > 2000 and len(shown_singles) > 3000
    assert not pairs & shown_pairs
    assert not singles & shown_singles


def test_an_edit_changes_what_it_asks_for_and_nothing_else(edits):
    """Background, number, name, place and size of things: before it and after it."""
    rng = np.random.default_rng(0)
    kinds = set()
    for _ in range(1500):
        edit = edits.sample(rng, 1)
        kinds.add(edit.kind)
        (before,), after = edit.references, edit.target
        changed = set()
        if before.background != after.background:
            changed.add("background")
        if edit.kind == "remove":
            assert set(after.things) < set(before.things) and len(after.things) == 1
            changed.add("count")
        elif edit.kind == "add":
            (new,) = set(after.things) - set(before.things)
            assert len(before.things) == 1 and before.things[0] in after.things
            changed |= {f"{what} {after.things.index(new)}" for what in ("object", "place", "size")}
        else:
            for index, (old, new) in enumerate(zip(before.things, after.things, strict=True)):
                changed |= {
                    f"{what} {index}"
                    for what, differs in {
                        "object": old.name != new.name,
                        "place": (old.column, old.row) != (new.column, new.row),
                        "size": old.size != new.size,
                    }.items()
                    if differs
                }
        assert changed == edit.asked, edit
    assert len(kinds) == len(edits.KINDS[1])


def test_a_second_picture_gives_its_thing_or_its_background(edits):
    rng = np.random.default_rng(1)
    kinds = set()
    for _ in range(800):
        edit = edits.sample(rng, 2)
        kinds.add(edit.kind)
        first, second = edit.references
        names = {thing.name for thing in edit.target.things}
        if edit.kind == "ground":
            assert edit.target == dataclasses.replace(first, background=second.background)
            assert edit.target != first
        else:
            assert {thing.name for thing in second.things} <= names, edit
        named = f"{edits.COLOURS[edit.target.background]} background" in edit.prompt.lower()
        if edit.kind != "ground" and not named:
            assert edit.target.background == first.background, edit
    assert len(kinds) == len(edits.KINDS[2])


def test_training_shows_no_picture_that_held_out_edits_make(edits):
    asked = edits.questions(110, 0)
    assert {edit.kind for edit in asked} == {
        *("background", "remove", "replace", "move", "resize", "add", "swap"),
        *("put", "join", "exchange", "ground"),
    }
    held_out = {
        _same_picture(edit.references[0] if edit.kind == "remove" else edit.target)
        for edit in asked
    }
    rng = np.random.default_rng(2)
    shown = set()
    for number in (1, 2) * 3000:
        edit = edits.sample(rng, number)
        shown |= {_same_picture(layout) for layout in (edit.target, *edit.references)}
    assert not held_out & shown


def _same_picture(layout):
    """What is held out: a thing's place on a background, or that two things are together."""
    if len(layout.things) == 2:
        return frozenset(thing.name for thing in layout.things)
    (thing,) = layout.things
    return thing.name, thing.column, thing.row, layout.background


def _form(scenes, text):
    """A prompt without what differs from one scene to the next: things, sizes, colours, places."""
    text = text.lower().rstrip(".")
    kinds = {
        "PLACE": [phrase for *_, phrases in scenes.PLACES for phrase in phrases]
        + [phrase.partition(" ")[2] for *_, phrases in scenes.PLACES for phrase in phrases],
        "RELATION": [phrase for *_, phrases in scenes.RELATIONS for phrase in phrases],
        "GROUND": [ground for _, grounds in scenes.BACKGROUNDS.values() for ground in grounds],
        "SIZE": [word for words in scenes.SIZE_WORDS.values() for word in words if word],
        "THING": [*THINGS, *(other for others in THINGS.values() for other in others)],
        "COLOUR": list(scenes.COLOURS),
    }
    for kind, phrases in kinds.items():
        longest_first = "|".join(sorted(map(re.escape, phrases), key=len, reverse=True))
        text = re.sub(rf"\b({longest_first})\b", kind, text)
    return re.sub(r"\ban? ", "", text)


def test_what_users_are_told_to_ask_is_what_training_asked(scenes, edits):
    """Each example of `models show` has the wording of a caption or an edit that was trained on."""
    rng = np.random.default_rng(5)
    captions = {_form(scenes, scenes.sample(rng)[1]) for _ in range(4000)}
    asked = {
        pictures: {_form(scenes, edits.sample(rng, pictures).prompt) for _ in range(4000)}
        for pictures in (1, 2)
    }
    assert {_form(scenes, prompt) for prompt in PROMPTS} <= captions
    assert {_form(scenes, edit) for edit in EDITS} <= asked[1]
    assert {_form(scenes, edit) for edit in EDITS_OF_TWO} <= asked[2]
    for prompt in (*PROMPTS, *EDITS, *EDITS_OF_TWO):
        assert not unknown_words(prompt, folder_of("tiny-klein"))


def test_things_of_an_edit_lie_on_the_grid_of_any_picture(scenes, edits):
    rng = np.random.default_rng(3)
    for height, width in ((128, 128), (64, 64), (192, 128)) * 100:
        for thing in edits.sample(rng, 1).target.scene(height, width).things:
            side = thing.size * min(height, width)
            left, top = thing.x * width - side / 2, thing.y * height - side / 2
            for number in (side, left, top):
                assert abs(number / scenes.GRID - round(number / scenes.GRID)) < 1e-6


@pytest.fixture(scope="module")
def reader(programs):
    """Reads pictures of glyphs that need no font: every thing has a pattern of its own."""
    rng = np.random.default_rng(4)
    cells = rng.integers(0, 256, (len(programs["scenes"].NAMES), 4, 4, 4), dtype=np.uint8)
    cells[..., 3] = 255
    sprites = cells.repeat(32, axis=1).repeat(32, axis=2)
    return programs["score"].EditReader(sprites, 128, 128), sprites


def test_an_edit_that_is_done_reads_so_and_one_that_is_not_does_not(programs, edits, reader):
    """The target is right; the first picture left as it was has nothing of what was asked."""
    read, sprites = reader
    for edit in edits.questions(11, 5):
        target, before = (
            programs["sprites"].draw(layout.scene(128, 128), sprites, 128, 128)
            for layout in (edit.target, edit.references[0])
        )
        verdict = read.judge(target, edit)
        assert (verdict.asked, verdict.stays) == (True, True), edit
        assert not read.judge(before, edit).asked, edit


def test_an_edit_that_spoils_the_rest_reads_so(programs, edits, reader):
    read, sprites = reader
    for edit in edits.questions(11, 6):
        other = dataclasses.replace(edit.target, background=(edit.target.background + 5) % 12)
        picture = programs["sprites"].draw(other.scene(128, 128), sprites, 128, 128)
        verdict = read.judge(picture, edit)
        if "background" in edit.asked:
            assert (verdict.asked, verdict.stays) == (False, True), edit
        else:
            assert (verdict.asked, verdict.stays) == (True, False), edit
