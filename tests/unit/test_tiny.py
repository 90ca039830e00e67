"""The embedded checkpoint as it ships, and the scenes that it is trained and scored on."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import fluxmesh

TINY = Path(fluxmesh.__file__).parent / "tiny"
TOOLS = Path(__file__).parents[2] / "tools" / "tiny"


@pytest.fixture(scope="module")
def scenes():
    """`tools/tiny` holds programs, which import each other by bare names."""
    sys.path.insert(0, str(TOOLS))
    try:
        yield importlib.import_module("scenes")
    finally:
        sys.path.remove(str(TOOLS))
        sys.modules.pop("scenes", None)


def test_the_checkpoint_is_small_and_comes_with_its_notice():
    files = [file for file in (TINY / "checkpoint").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 25_000_000
    assert "SIL OPEN FONT LICENSE" in (TINY / "NOTICE").read_text()


def test_its_heads_divide_over_2_3_4_and_6_hosts():
    config = json.loads((TINY / "checkpoint/transformer/config.json").read_text())
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
