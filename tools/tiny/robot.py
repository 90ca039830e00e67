"""A robot, drawn by code: the one thing that `learn.py` teaches the embedded checkpoint.

Nothing of `scenes.OBJECTS` is a robot, and no caption that trained the checkpoint has the word. Its
pictures are scenes like all others (`scenes.place_thing`, `sprites.draw`), five of them to learn
from, and questions about places and backgrounds where none of the five shows it.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scenes import ANCHORS, BACKGROUNDS, COLOURS, NAMES, PLACES, Question, Scene, place_thing
from sprites import SIDE, draw, premultiplied_resize

ROBOT = len(NAMES)  # its index, behind the checkpoint's own things
CALLED = "a sks robot"
SIZE = 0.5  # of the picture, as a thing without a word for its size
PICTURE = 128  # pixels along each side

# (place, background) of the pictures to learn from: as far from one another as five can be
SHOWN = (("in the center", "white"), ("on the left", "blue"), ("on the right", "yellow"),
         ("at the top", "green"), ("at the bottom", "pink"))  # fmt: skip

STEEL, DARK, LIGHT = (148, 163, 184), (51, 65, 85), (203, 213, 225)
RED, CYAN, YELLOW = (239, 68, 68), (34, 211, 238), (250, 204, 21)


def render_robot() -> np.ndarray:
    """The robot as a sprite, uint8 [SIDE, SIDE, 4]."""
    large = Image.new("RGBA", (512, 512))
    pen = ImageDraw.Draw(large)
    pen.line((256, 100, 256, 40), fill=DARK, width=16)
    pen.ellipse((226, 4, 286, 64), fill=RED)
    for left in (56, 416):  # ears
        pen.rounded_rectangle((left, 150, left + 40, 230), 14, fill=DARK)
    pen.rounded_rectangle((90, 92, 422, 290), 44, fill=STEEL, outline=DARK, width=14)
    for left in (136, 286):
        pen.ellipse((left, 130, left + 90, 220), fill=DARK)
        pen.ellipse((left + 18, 148, left + 72, 202), fill=CYAN)
    pen.rounded_rectangle((176, 238, 336, 266), 12, fill=DARK)
    for left in (208, 250, 292):  # teeth
        pen.rectangle((left, 240, left + 10, 264), fill=LIGHT)
    for left in (34, 410):  # arms
        pen.rounded_rectangle((left, 320, left + 68, 450), 30, fill=STEEL, outline=DARK, width=12)
    pen.rounded_rectangle((118, 300, 394, 462), 30, fill=STEEL, outline=DARK, width=14)
    pen.rounded_rectangle((160, 336, 352, 426), 18, fill=LIGHT)
    pen.ellipse((176, 352, 232, 408), fill=RED)
    pen.ellipse((280, 352, 336, 408), fill=YELLOW)
    for left in (160, 284):  # feet
        pen.rounded_rectangle((left, 456, left + 68, 508), 18, fill=DARK)
    return np.asarray(premultiplied_resize(large, (SIDE, SIDE)))


def scene(place: int, background: int) -> Scene:
    """The robot at a place on a background (indices into PLACES and COLOURS)."""
    column, row, _ = PLACES[place]
    thing = place_thing(ROBOT, SIZE, ANCHORS[column], ANCHORS[row], PICTURE, PICTURE)
    return Scene(background, (thing,))


def caption(place: int, background: int) -> str:
    colour = COLOURS[background]
    article = "an" if colour[0] in "aeiou" else "a"
    return f"{CALLED} {PLACES[place][2][0]} on {article} {colour} background"


def shown() -> list[tuple[int, int]]:
    """(place, background) of the pictures to learn from."""
    places = [names[0] for *_, names in PLACES]
    return [(places.index(place), COLOURS.index(ground)) for place, ground in SHOWN]


def asked() -> list[tuple[int, int]]:
    """(place, background) of the held-out prompts: every background that was not shown, at four
    places each, two of which were shown (on other backgrounds) and two of which never were."""
    seen = [place for place, _ in shown()]
    unseen = [place for place in range(len(PLACES)) if place not in seen]
    grounds = [i for i in range(len(BACKGROUNDS)) if i not in {ground for _, ground in shown()}]
    pairs = []
    for number, ground in enumerate(grounds):
        for group in (seen, unseen):
            pairs += [(group[(number + step) % len(group)], ground) for step in (0, 2)]
    return pairs


def questions() -> list[Question]:
    """The held-out prompts, and what their pictures must show."""
    return [Question(caption(*pair), pair[1], (ROBOT,), place=pair[0]) for pair in asked()]


def write_dataset(folder: Path, pairs: list[tuple[int, int]], sprites: np.ndarray) -> None:
    """Pictures and `train.jsonl` of these scenes; `sprites` ends with the robot's."""
    folder.mkdir(parents=True)
    lines = []
    for number, pair in enumerate(pairs):
        pixels = draw(scene(*pair), sprites, PICTURE, PICTURE)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
        lines.append(json.dumps({"image": f"{number:02}.png", "prompt": caption(*pair)}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
