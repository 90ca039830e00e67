"""What the embedded checkpoints paint, in words: how to ask for it, and what they can't read.

`tools/tiny/scenes.py` draws these things and writes the captions that they were trained on. Their
vocabularies have a piece for every word of those captions and letters for all others, so that a
word of several pieces is one that they have never seen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

# Each thing by its name, with the other names that captions use now and then.
THINGS: Mapping[str, tuple[str, ...]] = {
    "dog": ("puppy",),
    "cat": ("kitten",),
    "rabbit": ("bunny",),
    "fox": (),
    "bear": (),
    "panda": (),
    "tiger": (),
    "lion": (),
    "cow": (),
    "pig": ("piglet",),
    "frog": (),
    "monkey": (),
    "chicken": ("hen",),
    "penguin": (),
    "owl": (),
    "horse": (),
    "unicorn": (),
    "bee": (),
    "ladybug": (),
    "butterfly": (),
    "snail": (),
    "turtle": (),
    "octopus": (),
    "crab": (),
    "fish": (),
    "whale": (),
    "dolphin": (),
    "elephant": (),
    "duck": (),
    "dinosaur": (),
    "red apple": ("apple",),
    "green apple": (),
    "pear": (),
    "lemon": (),
    "banana": (),
    "watermelon": (),
    "bunch of grapes": (),
    "strawberry": (),
    "cherry": (),
    "pineapple": (),
    "carrot": (),
    "mushroom": ("toadstool",),
    "cheese": (),
    "hamburger": ("burger",),
    "pizza": (),
    "ice cream": (),
    "donut": (),
    "cake": ("birthday cake",),
    "sun": (),
    "moon": (),
    "star": (),
    "cloud": (),
    "rainbow": (),
    "snowman": (),
    "tree": (),
    "palm tree": (),
    "cactus": (),
    "sunflower": (),
    "rose": (),
    "car": (),
    "bus": (),
    "train": ("locomotive",),
    "airplane": ("plane",),
    "rocket": ("spaceship",),
    "sailboat": ("boat",),
    "house": (),
    "castle": (),
    "clock": (),
    "key": (),
    "book": (),
    "gift": ("present",),
    "balloon": (),
    "umbrella": (),
    "top hat": ("hat",),
    "crown": (),
    "soccer ball": ("football",),
    "basketball": (),
    "guitar": (),
    "drum": (),
    "camera": (),
    "television": ("tv",),
    "light bulb": (),
    "heart": (),
    "diamond": (),
    "ghost": (),
    "alien": (),
    "pumpkin": (),
    "teddy bear": (),
    "cup": ("cup of coffee",),
    "astronaut": (),
}
# Each background by its colour, with other ways to say it.
BACKGROUNDS: Mapping[str, tuple[str, ...]] = {
    "white": ("in the snow",),
    "gray": (),
    "black": ("at night", "in the dark"),
    "red": ("on mars",),
    "orange": (),
    "yellow": ("at the beach", "on the sand"),
    "green": ("on the grass", "in the forest"),
    "light green": (),
    "blue": ("in the sea",),
    "light blue": ("in the sky",),
    "purple": (),
    "pink": (),
}
# How to ask: of each kind one, in words that training used.
PROMPTS = (
    "a red apple in the center on a yellow background",
    "a small dog on the left on the grass",
    "a cat to the right of a tree on a pink background",
)
EDITS = (
    "make the background blue",
    "replace the apple by a pear",
    "make it larger",
    "move it to the right",
    "add a cat to the right of the apple",
    "swap the apple and the cat",
    "remove the cat",
)
EDITS_OF_TWO = (
    "put the dog from the second picture to the right of the apple",
    "the apple from the first picture above the dog from the second picture",
    "replace the apple by the dog from the second picture",
    "use the background of the second picture",
)
# Words that say nothing of what is to be seen; nobody need be told that they are unknown.
_SMALL = re.compile(
    "all|also|am|are|as|be|been|being|both|but|by|do|each|every|few|for|from|go|had|has|have|he|"
    "her|here|hi|his|how|if|into|it|me|my|no|ok|or|so|to|up|us|we|"
    "is|its|just|many|more|most|much|not|onto|only|other|our|out|own|she|should|some|such|than|"
    "that|their|them|then|these|they|this|those|through|too|very|was|were|what|when|where|which|"
    "while|who|whose|will|with|without|would|you|your"
)


def unknown_words(prompt: str, checkpoint: Path) -> list[str]:
    """Words of a prompt that an embedded checkpoint has not whole in its vocabulary.

    In lower case, each once, in their order; single letters and small words are left out.
    """
    words = dict.fromkeys(re.findall(r"(?<![a-z0-9'’])[a-z]{2,}", prompt.lower()))
    is_whole = _vocabulary(checkpoint)
    return [word for word in words if not (_SMALL.fullmatch(word) or is_whole(word))]


def _vocabulary(checkpoint: Path) -> Callable[[str], bool]:
    """Whether a word is one piece of a vocabulary: sentencepiece's, or one with a space before."""
    spiece = next(checkpoint.glob("*/spiece.model"), None)
    if spiece is not None:
        import sentencepiece

        pieces = sentencepiece.SentencePieceProcessor(str(spiece))
        return lambda word: len(pieces.encode(word)) == 1
    from tokenizers import Tokenizer

    vocabulary = Tokenizer.from_file(str(checkpoint / "tokenizer" / "tokenizer.json"))
    # An instruction's first word is capital more often than not, or has no space before it.
    return lambda word: any(
        len(vocabulary.encode(form).ids) == 1 for form in (f" {word}", word, word.capitalize())
    )


def known_words() -> Iterable[str]:
    """Every word that names a thing or a background."""
    phrases = (*THINGS, *BACKGROUNDS)
    others = (
        other for table in (THINGS, BACKGROUNDS) for names in table.values() for other in names
    )
    return dict.fromkeys(word for phrase in (*phrases, *others) for word in phrase.split())
