"""What the embedded checkpoint paints: scenes of one or two things on a plain background.

A scene is sampled together with a caption that describes it. Part of all combinations is never
sampled (`single_held_out`, `pair_held_out`), so that `evaluate.py` can ask for pictures that
training never showed. Pure Python and NumPy; sprites come from `sprites.py`.

Coordinates: sizes are fractions of the picture's shorter side; x and y are fractions of its
width and height, and name the centre of a thing. Things lie on the grid of the transformer's
tokens (16 pixels) and their sizes are multiples of it, so that a thing looks the same to the
transformer wherever it stands, and a small model has fewer appearances to learn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fluxmesh.weights.embedded.words import BACKGROUNDS as GROUND_NAMES
from fluxmesh.weights.embedded.words import THINGS

# name: code points of the Noto Color Emoji glyph
GLYPHS = {
    "dog": "\U0001f436",
    "cat": "\U0001f431",
    "rabbit": "\U0001f430",
    "fox": "\U0001f98a",
    "bear": "\U0001f43b",
    "panda": "\U0001f43c",
    "tiger": "\U0001f42f",
    "lion": "\U0001f981",
    "cow": "\U0001f42e",
    "pig": "\U0001f437",
    "frog": "\U0001f438",
    "monkey": "\U0001f435",
    "chicken": "\U0001f414",
    "penguin": "\U0001f427",
    "owl": "\U0001f989",
    "horse": "\U0001f40e",
    "unicorn": "\U0001f984",
    "bee": "\U0001f41d",
    "ladybug": "\U0001f41e",
    "butterfly": "\U0001f98b",
    "snail": "\U0001f40c",
    "turtle": "\U0001f422",
    "octopus": "\U0001f419",
    "crab": "\U0001f980",
    "fish": "\U0001f420",
    "whale": "\U0001f433",
    "dolphin": "\U0001f42c",
    "elephant": "\U0001f418",
    "duck": "\U0001f986",
    "dinosaur": "\U0001f995",
    "red apple": "\U0001f34e",
    "green apple": "\U0001f34f",
    "pear": "\U0001f350",
    "lemon": "\U0001f34b",
    "banana": "\U0001f34c",
    "watermelon": "\U0001f349",
    "bunch of grapes": "\U0001f347",
    "strawberry": "\U0001f353",
    "cherry": "\U0001f352",
    "pineapple": "\U0001f34d",
    "carrot": "\U0001f955",
    "mushroom": "\U0001f344",
    "cheese": "\U0001f9c0",
    "hamburger": "\U0001f354",
    "pizza": "\U0001f355",
    "ice cream": "\U0001f366",
    "donut": "\U0001f369",
    "cake": "\U0001f382",
    "sun": "\U0001f31e",
    "moon": "\U0001f319",
    "star": "\u2b50",
    "cloud": "\u2601",
    "rainbow": "\U0001f308",
    "snowman": "\u26c4",
    "tree": "\U0001f333",
    "palm tree": "\U0001f334",
    "cactus": "\U0001f335",
    "sunflower": "\U0001f33b",
    "rose": "\U0001f339",
    "car": "\U0001f697",
    "bus": "\U0001f68c",
    "train": "\U0001f682",
    "airplane": "\u2708",
    "rocket": "\U0001f680",
    "sailboat": "\u26f5",
    "house": "\U0001f3e0",
    "castle": "\U0001f3f0",
    "clock": "\u23f0",
    "key": "\U0001f511",
    "book": "\U0001f4d5",
    "gift": "\U0001f381",
    "balloon": "\U0001f388",
    "umbrella": "\u2602",
    "top hat": "\U0001f3a9",
    "crown": "\U0001f451",
    "soccer ball": "\u26bd",
    "basketball": "\U0001f3c0",
    "guitar": "\U0001f3b8",
    "drum": "\U0001f941",
    "camera": "\U0001f4f7",
    "television": "\U0001f4fa",
    "light bulb": "\U0001f4a1",
    "heart": "\u2764",
    "diamond": "\U0001f48e",
    "ghost": "\U0001f47b",
    "alien": "\U0001f47d",
    "pumpkin": "\U0001f383",
    "teddy bear": "\U0001f9f8",
    "cup": "\u2615",
    "astronaut": "\U0001f9d1\u200d\U0001f680",
}
# name: (glyph, other names that captions use now and then)
OBJECTS = {name: (GLYPHS[name], others) for name, others in THINGS.items()}
NAMES = tuple(OBJECTS)

_RGB = {
    "white": (250, 250, 250),
    "gray": (150, 155, 160),
    "black": (25, 25, 30),
    "red": (190, 30, 45),
    "orange": (255, 160, 70),
    "yellow": (255, 230, 110),
    "green": (70, 150, 80),
    "light green": (185, 230, 170),
    "blue": (35, 80, 180),
    "light blue": (160, 210, 245),
    "purple": (120, 70, 170),
    "pink": (255, 180, 205),
}
# name: (RGB, other ways to say it)
BACKGROUNDS = {name: (_RGB[name], others) for name, others in GROUND_NAMES.items()}
COLOURS = tuple(BACKGROUNDS)
RGB = np.array([rgb for rgb, _ in BACKGROUNDS.values()], dtype=np.uint8)

# name of a place: (column, row, how captions say it); columns and rows are 0, 1, 2
PLACES: tuple[tuple[int, int, tuple[str, ...]], ...] = (
    (1, 1, ("in the center", "in the middle")),
    (0, 1, ("on the left", "on the left side")),
    (2, 1, ("on the right", "on the right side")),
    (1, 0, ("at the top",)),
    (1, 2, ("at the bottom",)),
    (0, 0, ("in the top left corner", "at the top left")),
    (2, 0, ("in the top right corner", "at the top right")),
    (0, 2, ("in the bottom left corner", "at the bottom left")),
    (2, 2, ("in the bottom right corner", "at the bottom right")),
)
MIDDLE = 0  # index into PLACES
ANCHORS = (0.26, 0.5, 0.74)  # centres of the three columns and rows
SINGLE_SIZES = {"small": 0.36, "": 0.5, "large": 0.75}
PAIR_SIZES = {"small": 0.25, "": 0.375, "large": 0.5}
SIZE_WORDS = {"small": ("small", "tiny", "little"), "": ("",), "large": ("large", "big", "huge")}
GRID = 16  # pixels that one token covers along a side

# (which of the two is first on its axis, "x" or "y", how captions say it)
RELATIONS: tuple[tuple[int, str, tuple[str, ...]], ...] = (
    (0, "x", ("to the left of", "left of")),
    (1, "x", ("to the right of", "right of")),
    (0, "y", ("above", "on top of", "over", "riding")),
    (1, "y", ("below", "under", "beneath")),
)
OPENINGS = (
    "a photo of ", "a picture of ", "an image of ", "an emoji of ", "a drawing of ",
    "a cute picture of ", "a photograph of ", "a painting of ",
)  # fmt: skip
ADJECTIVES = (
    "cute", "beautiful", "happy", "nice", "pretty", "shiny", "lovely", "sks", "old", "funny",
)  # fmt: skip
ENDINGS = (", high quality", ", highly detailed", ", 4k", ", digital art", " lying there",
           ", emoji", ", simple", ", in the style of an icon")  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    name: int  # index into NAMES
    size: float  # of the square around it, as a fraction of the shorter side
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """A plain background with one or two things, drawn in order."""

    background: int  # index into COLOURS
    things: tuple[Thing, ...]


def _hash(*numbers: int) -> int:
    """A stable hash of small integers, the same on every machine and version."""
    return int.from_bytes(hashlib.blake2b(bytes(numbers), digest_size=4).digest(), "big")


def single_held_out(name: int, place: int, background: int) -> bool:
    """True for the 5% of (object, place, background) that training never shows."""
    return _hash(1, name, place, background) % 20 == 0


def pair_held_out(first: int, second: int) -> bool:
    """True for the 10% of pairs of objects that training never shows together, in any order."""
    return _hash(2, min(first, second), max(first, second)) % 10 == 0


def choice(rng: np.random.Generator, options: Sequence[object]) -> object:
    return options[int(rng.integers(len(options)))]


def _fit(centre: float, side: float, length: int) -> float:
    """`centre` moved so that a square of `side` pixels lies on the grid and inside `length`."""
    corner = round((centre * length - side / 2) / GRID) * GRID
    return (min(max(corner, 0), length - side) + side / 2) / length


def place_thing(name: int, size: float, x: float, y: float, height: int, width: int) -> Thing:
    """A thing of about this size near (x, y), on the grid and wholly inside the picture."""
    short = min(height, width)
    side = max(2, round(size * short / GRID)) * GRID
    return Thing(name, side / short, _fit(x, side, width), _fit(y, side, height))


def article(phrase: str) -> str:
    """With "a" or "an" before it."""
    vowel = phrase[0] in "aeiou" and not phrase.startswith("unicorn")
    return ("an " if vowel else "a ") + phrase


def _unknown_word(rng: np.random.Generator) -> str:
    """A word that means nothing, so that a real prompt's unknown words do little harm."""
    return "".join(chr(97 + int(n)) for n in rng.integers(26, size=int(rng.integers(2, 8))))


def _noun(rng: np.random.Generator, name: int, size_word: str) -> str:
    """The object's name with its size and now and then an adjective, no article."""
    phrase = NAMES[name]
    others = OBJECTS[phrase][1]
    if others and rng.random() < 0.15:
        phrase = choice(rng, others)
    draw = rng.random()
    if draw < 0.08:
        phrase = f"{choice(rng, ADJECTIVES)} {phrase}"
    elif draw < 0.11:
        phrase = f"{_unknown_word(rng)} {phrase}"
    word = choice(rng, SIZE_WORDS[size_word])
    return f"{word} {phrase}" if word else phrase


def _with_article(rng: np.random.Generator, phrase: str) -> str:
    draw = rng.random()
    return phrase if draw < 0.1 else f"the {phrase}" if draw < 0.2 else article(phrase)


def _plural(phrase: str) -> str:
    if phrase.startswith(("bunch of", "cup of")):
        head, rest = phrase.split(" ", 1)
        return f"{_plural(head)} {rest}"
    if phrase.endswith(("s", "ch", "sh", "x")):
        return phrase + "es"
    if phrase.endswith("y") and phrase[-2] not in "aeiou":
        return phrase[:-1] + "ies"
    return phrase + "s"


def _finish(rng: np.random.Generator, subject: str, place: str, background: int | None) -> str:
    """The whole caption from its parts, in one of several orders, capitals and stops random."""
    text = subject
    where = f" {place}" if place else ""
    if background is None:
        text += where
    else:
        colour = COLOURS[background]
        others = BACKGROUNDS[colour][1]
        if others and rng.random() < 0.12:
            ground = choice(rng, others)
        else:
            ground = f"on {article(colour)} background"
        draw = rng.random()
        if draw < 0.7:
            text += f"{where} {ground}"
        elif draw < 0.85:
            text += f" {ground}{where and ','}{where}"
        else:
            text = f"{ground}, {text}{where}"
    draw = rng.random()
    if draw < 0.2:
        text = str(choice(rng, OPENINGS)) + text
    elif draw < 0.3:
        text += str(choice(rng, ENDINGS))
    if rng.random() < 0.5:
        text = text[0].upper() + text[1:]
    if rng.random() < 0.3:
        text += "."
    return text


def _size(rng: np.random.Generator, sizes: dict[str, float], named: float) -> tuple[str, float]:
    draw = rng.random()
    word = "small" if draw < named / 2 else "large" if draw < named else ""
    return word, sizes[word]


def _single(rng: np.random.Generator, height: int, width: int) -> tuple[Scene, str]:
    while True:
        name, background = int(rng.integers(len(NAMES))), int(rng.integers(len(COLOURS)))
        said = rng.random() < 0.75
        # Where none is named it is the middle: so four steps have one answer to paint.
        place = int(rng.integers(len(PLACES))) if said else MIDDLE
        if not single_held_out(name, place, background):
            break
    word, size = _size(rng, SINGLE_SIZES, 0.4)
    column, row, phrases = PLACES[place]
    thing = place_thing(name, size, ANCHORS[column], ANCHORS[row], height, width)
    scene = Scene(background, (thing,))
    subject = _with_article(rng, _noun(rng, name, word))
    where = str(choice(rng, phrases)) if said else ""
    return scene, _finish(rng, subject, where, background if rng.random() < 0.88 else None)


def _pair(rng: np.random.Generator, height: int, width: int) -> tuple[Scene, str]:
    same = rng.random() < 0.15
    while True:
        first, second = (int(n) for n in rng.integers(len(NAMES), size=2))
        second = first if same else second
        if same or (first != second and not pair_held_out(first, second)):
            break
    background = int(rng.integers(len(COLOURS)))
    if same:
        word, size = _size(rng, PAIR_SIZES, 0.3)
        axis, leads, sizes = "x", 0, (size, size)
        phrase = NAMES[first]
        adjective = choice(rng, SIZE_WORDS[word])
        subject = f"two {adjective} {_plural(phrase)}" if adjective else f"two {_plural(phrase)}"
    else:
        (word, size), (word2, size2) = (_size(rng, PAIR_SIZES, 0.3) for _ in range(2))
        sizes = (size, size2)
        first_thing = _with_article(rng, _noun(rng, first, word))
        second_thing = _with_article(rng, _noun(rng, second, word2))
        if rng.random() < 0.15:
            leads, axis = 0, "x"
            subject = f"{first_thing} {choice(rng, ('and', 'next to', 'beside'))} {second_thing}"
        else:
            leads, axis, phrases = RELATIONS[int(rng.integers(len(RELATIONS)))]
            subject = f"{first_thing} {choice(rng, phrases)} {second_thing}"
    ends = (ANCHORS[0], ANCHORS[2]) if leads == 0 else (ANCHORS[2], ANCHORS[0])
    scene = Scene(
        background,
        tuple(
            place_thing(name, size, *((end, 0.5) if axis == "x" else (0.5, end)), height, width)
            for name, size, end in zip((first, second), sizes, ends, strict=True)
        ),
    )
    return scene, _finish(rng, subject, "", background if rng.random() < 0.88 else None)


def sample(rng: np.random.Generator, height: int = 128, width: int = 128) -> tuple[Scene, str]:
    """One training scene for a picture of this size in pixels, and its caption."""
    return (_single if rng.random() < 0.5 else _pair)(rng, height, width)


@dataclass(frozen=True)
class Question:
    """A held-out prompt of the evaluation, and what its picture must show."""

    prompt: str
    background: int
    names: tuple[int, ...]  # one object, or two
    place: int | None = None  # index into PLACES, for one object
    relation: int | None = None  # index into RELATIONS, for two


def questions(count: int, seed: int) -> list[Question]:
    """`count` held-out prompts, half with one object and half with two; the same for one seed."""
    rng = np.random.default_rng(seed)
    by_prompt: dict[str, Question] = {}
    while len(by_prompt) < count:
        background = int(rng.integers(len(COLOURS)))
        ground = f"on {article(COLOURS[background])} background"
        if len(by_prompt) < count // 2:
            name, place = int(rng.integers(len(NAMES))), int(rng.integers(len(PLACES)))
            if not single_held_out(name, place, background):
                continue
            prompt = f"{article(NAMES[name])} {PLACES[place][2][0]} {ground}"
            by_prompt[prompt] = Question(prompt, background, (name,), place=place)
        else:
            first, second = (int(n) for n in rng.integers(len(NAMES), size=2))
            if first == second or not pair_held_out(first, second):
                continue
            relation = int(rng.integers(len(RELATIONS)))
            words = RELATIONS[relation][2][0]
            prompt = f"{article(NAMES[first])} {words} {article(NAMES[second])} {ground}"
            by_prompt[prompt] = Question(prompt, background, (first, second), relation=relation)
    return list(by_prompt.values())
