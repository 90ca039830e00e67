"""What `tiny-klein` does to pictures: an instruction, one or two pictures, and what comes of them.

A picture of an edit is a `Layout`: as a scene, in words for sizes instead of numbers, so that it
can be drawn at any size of picture. Everything that an instruction does not speak of stays.
Pictures that training never shows (`scenes.single_held_out`, `pair_held_out`) appear in no edit of
training, neither before nor after it; `questions` asks for edits that make such pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scenes import (
    ANCHORS,
    BACKGROUNDS,
    COLOURS,
    NAMES,
    OBJECTS,
    PAIR_SIZES,
    PLACES,
    RELATIONS,
    SINGLE_SIZES,
    Question,
    Scene,
    article,
    choice,
    pair_held_out,
    place_thing,
    single_held_out,
)

WORDS = ("small", "", "large")  # of sizes, in their order
VERBS = ("add", "change", "delete", "draw", "erase", "exchange", "give", "keep", "make", "move",
         "put", "place", "remove", "replace", "set", "shift", "swap", "take", "turn",
         "use")  # fmt: skip
CELLS = {(column, row): place for place, (column, row, _) in enumerate(PLACES)}


@dataclass(frozen=True)
class Placed:
    """A thing of a layout."""

    name: int  # index into NAMES
    size: str  # of WORDS
    column: int  # of ANCHORS
    row: int
    paired: bool  # whether it has the size of one thing of two


@dataclass(frozen=True)
class Layout:
    """A scene of one or two things, for a picture of any size."""

    background: int  # index into COLOURS
    things: tuple[Placed, ...]

    def scene(self, height: int, width: int) -> Scene:
        return Scene(
            self.background,
            tuple(
                place_thing(
                    thing.name,
                    (PAIR_SIZES if thing.paired else SINGLE_SIZES)[thing.size],
                    ANCHORS[thing.column],
                    ANCHORS[thing.row],
                    height,
                    width,
                )
                for thing in self.things
            ),
        )

    @property
    def is_held_out(self) -> bool:
        """Whether training never shows it."""
        if len(self.things) == 2:
            first, second = self.things
            return pair_held_out(first.name, second.name)
        (thing,) = self.things
        return single_held_out(thing.name, CELLS[thing.column, thing.row], self.background)

    def with_thing(self, index: int, **changes: object) -> Layout:
        """With another size, name or place of one of its things."""
        things = list(self.things)
        things[index] = replace(things[index], **changes)  # type: ignore[arg-type]
        return replace(self, things=tuple(things))


@dataclass(frozen=True)
class Edit:
    """An instruction, the pictures that it speaks of, and what is to be painted.

    `asked` names what it asks for: "background", "count" (a thing is gone), and "object 0",
    "place 0", "size 0" of the target's things. All else stays.
    """

    kind: str
    prompt: str
    references: tuple[Layout, ...]
    target: Layout
    asked: frozenset[str]


# Layouts


def _single(rng: np.random.Generator, sizes: tuple[str, ...] = WORDS) -> Layout:
    column, row, _ = PLACES[int(rng.integers(len(PLACES)))]
    thing = Placed(_name(rng), str(choice(rng, sizes)), column, row, paired=False)
    return Layout(_colour(rng), (thing,))


def _pair(rng: np.random.Generator) -> Layout:
    """Two different things, beside or above one another."""
    first = _name(rng)
    second = _name(rng, first)
    ends = ((0, 1), (2, 1)) if rng.random() < 0.5 else ((1, 0), (1, 2))
    if rng.random() < 0.5:
        ends = ends[::-1]
    things = (
        Placed(name, "" if rng.random() < 0.7 else str(choice(rng, WORDS)), *end, paired=True)
        for name, end in zip((first, second), ends, strict=True)
    )
    return Layout(_colour(rng), tuple(things))


def _any(rng: np.random.Generator) -> Layout:
    return (_single if rng.random() < 0.5 else _pair)(rng)


def _name(rng: np.random.Generator, *others: int) -> int:
    while True:
        name = int(rng.integers(len(NAMES)))
        if name not in others:
            return name


def _colour(rng: np.random.Generator, *others: int) -> int:
    while True:
        colour = int(rng.integers(len(COLOURS)))
        if colour not in others:
            return colour


# Words


def _say(rng: np.random.Generator, *phrases: str, **words: str) -> str:
    return str(choice(rng, phrases)).format(**words)


def _noun(rng: np.random.Generator, name: int) -> str:
    phrase = NAMES[name]
    others = OBJECTS[phrase][1]
    return str(choice(rng, others)) if others and rng.random() < 0.12 else phrase


def _the(rng: np.random.Generator, name: int) -> str:
    return f"the {_noun(rng, name)}"


def _a(rng: np.random.Generator, name: int) -> str:
    return article(_noun(rng, name))


def _it_or(rng: np.random.Generator, layout: Layout, index: int) -> str:
    """The thing's name; where it stands alone, "it" serves too."""
    if len(layout.things) == 1 and rng.random() < 0.25:
        return "it"
    return _the(rng, layout.things[index].name)


def _second(rng: np.random.Generator) -> str:
    """Which picture a thing is taken from."""
    return _say(
        rng, "from the second picture", "from the second picture", "from the second image",
        "of the second picture", "from picture 2", "from image 2", "in the second picture",
        "from the other picture",
    )  # fmt: skip


def _polished(rng: np.random.Generator, text: str) -> str:
    draw = rng.random()
    if draw < 0.06 and text.startswith(VERBS):
        text = f"please {text}"
    elif draw < 0.1:
        text = f"{text}, please"
    if rng.random() < 0.4:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.2 else text


# Edits of one picture


def _background(rng: np.random.Generator) -> Edit:
    before = _any(rng)
    colour = _colour(rng, before.background)
    named = COLOURS[colour]
    others = BACKGROUNDS[named][1]
    if others and rng.random() < 0.12:
        ground = str(choice(rng, others))
        prompt = _say(rng, "put it {g}", "the same {g}", "the same but {g}", g=ground)
    else:
        prompt = _say(
            rng, "make the background {c}", "make the background {c}",
            "change the background to {c}", "set the background to {c}", "on {a} background",
            "put it on {a} background", "the same on {a} background", "turn the background {c}",
            "use {a} background", "{c} background", "a {c} background instead",
            c=named, a=article(named),
        )  # fmt: skip
    return _edit("background", rng, prompt, (before,), replace(before, background=colour),
                 "background")  # fmt: skip


def _remove(rng: np.random.Generator) -> Edit:
    before = _pair(rng)
    index = int(rng.integers(2))
    prompt = _say(
        rng, "remove {x}", "remove {x}", "take away {x}", "delete {x}", "erase {x}",
        "get rid of {x}", "without {x}", "take {x} out", "the same without {x}",
        x=_the(rng, before.things[index].name),
    )  # fmt: skip
    left = replace(before, things=(before.things[1 - index],))
    return _edit("remove", rng, prompt, (before,), left, "count")


def _replace(rng: np.random.Generator) -> Edit:
    before = _any(rng)
    index = int(rng.integers(len(before.things)))
    name = _name(rng, *(thing.name for thing in before.things))
    prompt = _say(
        rng, "replace {x} by {y}", "replace {x} with {y}", "replace {x} by {y}",
        "turn {x} into {y}", "change {x} to {y}", "swap {x} for {y}",
        "make {x} {y}", "{y} instead of {x}",
        x=_it_or(rng, before, index), y=_a(rng, name),
    )  # fmt: skip
    return _edit("replace", rng, prompt, (before,), before.with_thing(index, name=name),
                 f"object {index}")  # fmt: skip


def _move(rng: np.random.Generator) -> Edit:
    before = _single(rng, ("small", "", ""))
    (thing,) = before.things
    while True:
        column, row, phrases = PLACES[int(rng.integers(len(PLACES)))]
        if (column, row) != (thing.column, thing.row):
            break
    phrase = str(choice(rng, phrases))
    _, _, rest = phrase.partition(" ")  # "on the left" is a place, "to the left" the way there
    x = _it_or(rng, before, 0)
    prompt = _say(
        rng, f"move {x} to {rest}", f"move {x} to {rest}", f"put {x} {phrase}",
        f"shift {x} to {rest}", f"place {x} {phrase}", f"{x} should be {phrase}",
    )  # fmt: skip
    target = before.with_thing(0, column=column, row=row)
    return _edit("move", rng, prompt, (before,), target, "place 0")


def _resize(rng: np.random.Generator) -> Edit:
    before = _any(rng)
    index = int(rng.integers(len(before.things)))
    level = WORDS.index(before.things[index].size)
    grows = level == 0 or (level == 1 and rng.random() < 0.5)
    x = _it_or(rng, before, index)
    if grows:
        phrases = ["make {x} larger", "make {x} larger", "make {x} bigger", "enlarge {x}",
                   "a larger version of {x}", "increase the size of {x}"]  # fmt: skip
        alone = ["the same, larger", "the same but larger", "the same, bigger", "larger"]
    else:
        phrases = ["make {x} smaller", "make {x} smaller", "shrink {x}", "make {x} less large",
                   "a smaller version of {x}", "reduce the size of {x}"]  # fmt: skip
        alone = ["the same, smaller", "the same but smaller", "the same, less large", "smaller"]
    if len(before.things) == 1:
        phrases += alone
    target = before.with_thing(index, size=WORDS[level + (1 if grows else -1)])
    return _edit("resize", rng, _say(rng, *phrases, x=x), (before,), target, f"size {index}")


def _relation(rng: np.random.Generator, here: Placed, there: Placed) -> str:
    """How a thing at `here` stands to one at `there`."""
    for leads, axis, phrases in RELATIONS:
        mine, other = (here.column, there.column) if axis == "x" else (here.row, there.row)
        if (mine < other) if leads == 0 else (mine > other):
            return str(choice(rng, [phrase for phrase in phrases if phrase != "riding"]))
    raise AssertionError("two things of a layout never share a place")


def _add(rng: np.random.Generator) -> Edit:
    after = _pair(rng)
    index = int(rng.integers(2))
    after = after.with_thing(index, size="")
    new, old = after.things[index], after.things[1 - index]
    before = replace(after, things=(old,))
    beside = "it" if rng.random() < 0.25 else _the(rng, old.name)
    where = _relation(rng, new, old)
    prompt = _say(
        rng, "add {y} {where} {x}", "add {y} {where} {x}", "put {y} {where} {x}",
        "place {y} {where} {x}", "draw {y} {where} {x}", "{y} {where} {x}, too", "add {y}",
        y=_a(rng, new.name), where=where, x=beside,
    )  # fmt: skip
    return _edit("add", rng, prompt, (before,), after, f"object {index}", f"place {index}",
                 f"size {index}")  # fmt: skip


def _swap(rng: np.random.Generator) -> Edit:
    before = _pair(rng)
    first, second = before.things
    x, y = _the(rng, first.name), _the(rng, second.name)
    prompt = _say(
        rng, "swap {x} and {y}", "exchange {x} and {y}", "swap {y} and {x}",
        "{x} and {y} change places", "switch {x} and {y}", x=x, y=y,
    )  # fmt: skip
    target = before.with_thing(0, column=second.column, row=second.row)
    target = target.with_thing(1, column=first.column, row=first.row)
    return _edit("swap", rng, prompt, (before,), target, "place 0", "place 1")


def _keep(rng: np.random.Generator) -> Edit:
    before = _any(rng)
    prompt = _say(rng, "the same", "keep it as it is", "the same picture", "a copy",
                  "do not change anything", "the same picture again")  # fmt: skip
    return _edit("keep", rng, prompt, (before,), before)


# Edits with a second picture


def _put(rng: np.random.Generator) -> Edit:
    """A thing of the second picture comes into the first."""
    after = _pair(rng)
    index = int(rng.integers(2))
    after = after.with_thing(index, size="")
    new, old = after.things[index], after.things[1 - index]
    source = _single(rng).with_thing(0, name=new.name)
    x = "the thing" if rng.random() < 0.2 else _the(rng, new.name)
    prompt = _say(
        rng, "put {x} {second} {where} {y}", "put {x} {second} {where} {y}",
        "add {x} {second} {where} {y}", "place {x} {second} {where} {y}",
        x=x, second=_second(rng), where=_relation(rng, new, old),
        y="it" if rng.random() < 0.15 else _the(rng, old.name),
    )  # fmt: skip
    before = replace(after, things=(old,))
    return _edit("put", rng, prompt, (before, source), after, f"object {index}",
                 f"place {index}", f"size {index}")  # fmt: skip


def _join(rng: np.random.Generator) -> Edit:
    """One thing of each picture, on the background of the first, or on one that is named."""
    after = _pair(rng)
    order = (0, 1) if rng.random() < 0.5 else (1, 0)  # which picture each thing comes from
    after = after.with_thing(0, size="").with_thing(1, size="")
    alone = [_single(rng).with_thing(0, name=after.things[i].name) for i in order]
    first, second = after.things
    texts = ["from the first picture", _second(rng)]
    text = (
        f"{_the(rng, first.name)} {texts[order.index(0)]} {_relation(rng, first, second)} "
        f"{_the(rng, second.name)} {texts[order.index(1)]}"
    )
    if rng.random() < 0.4:
        text += f" on {article(COLOURS[after.background])} background"
    else:
        alone[0] = replace(alone[0], background=after.background)
    asked = (f"{what} {index}" for what in ("object", "place", "size") for index in (0, 1))
    return _edit("join", rng, text, tuple(alone), after, *asked)


def _exchange(rng: np.random.Generator) -> Edit:
    """A thing of the first picture is replaced by that of the second."""
    before = _any(rng)
    index = int(rng.integers(len(before.things)))
    name = _name(rng, *(thing.name for thing in before.things))
    source = _single(rng).with_thing(0, name=name)
    y = "the thing" if rng.random() < 0.2 else _the(rng, name)
    prompt = _say(
        rng, "replace {x} by {y} {second}", "replace {x} with {y} {second}",
        "swap {x} for {y} {second}", "put {y} {second} in the place of {x}",
        x=_it_or(rng, before, index), y=y, second=_second(rng),
    )  # fmt: skip
    return _edit("exchange", rng, prompt, (before, source),
                 before.with_thing(index, name=name), f"object {index}")  # fmt: skip


def _ground(rng: np.random.Generator) -> Edit:
    """The first picture gets the background of the second."""
    before = _any(rng)
    source = replace(_any(rng), background=_colour(rng, before.background))
    prompt = _say(
        rng, "use the background {second}", "put it on the background {second}",
        "change the background to that {second}", "give it the background {second}",
        second=_second(rng),
    )  # fmt: skip
    return _edit("ground", rng, prompt, (before, source),
                 replace(before, background=source.background), "background")  # fmt: skip


def _edit(
    kind: str, rng: np.random.Generator, prompt: str, references: tuple[Layout, ...],
    target: Layout, *asked: str,
) -> Edit:  # fmt: skip
    return Edit(kind, _polished(rng, prompt), references, target, frozenset(asked))


Kind = Callable[[np.random.Generator], Edit]
# By the number of pictures, with how often training sees each.
KINDS: dict[int, tuple[tuple[Kind, float], ...]] = {
    1: ((_background, 0.16), (_remove, 0.16), (_replace, 0.18), (_move, 0.16), (_resize, 0.12),
        (_add, 0.14), (_swap, 0.05), (_keep, 0.03)),
    2: ((_put, 0.4), (_join, 0.2), (_exchange, 0.25), (_ground, 0.15)),
}  # fmt: skip


def sample(rng: np.random.Generator, pictures: int) -> Edit:
    """An edit of one or two pictures as training has them: nothing of it is held out."""
    kinds, shares = zip(*KINDS[pictures], strict=True)
    kind: Kind = kinds[int(rng.choice(len(kinds), p=np.array(shares) / sum(shares)))]
    while True:
        edit = kind(rng)
        if not any(layout.is_held_out for layout in (edit.target, *edit.references)):
            return edit


def answer(question: Question) -> Layout:
    """What a held-out prompt asks for."""
    if question.place is not None:
        column, row, _ = PLACES[question.place]
        return Layout(question.background, (Placed(question.names[0], "", column, row, False),))
    assert question.relation is not None
    leads, axis, _ = RELATIONS[question.relation]
    ends = ((0, 1), (2, 1)) if axis == "x" else ((1, 0), (1, 2))
    things = (
        Placed(name, "", *end, True)
        for name, end in zip(question.names, ends if leads == 0 else ends[::-1], strict=True)
    )
    return Layout(question.background, tuple(things))


def questions(count: int, seed: int) -> list[Edit]:
    """`count` held-out edits, each kind as often as every other; the same for one seed.

    What is to be painted is held out; of a removal, which leaves one thing, what it begins with.
    """
    rng = np.random.default_rng([seed, 1])
    asked = [kind for kinds in KINDS.values() for kind, _ in kinds if kind is not _keep]
    by_prompt: dict[tuple[str, tuple[Layout, ...]], Edit] = {}
    while len(by_prompt) < count:
        edit = asked[len(by_prompt) % len(asked)](rng)
        removal = edit.kind == "remove"
        if (edit.references[0] if removal else edit.target).is_held_out:
            by_prompt[edit.prompt, edit.references] = edit
    return list(by_prompt.values())
