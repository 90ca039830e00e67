"""A picture of edits to look at: what a model was given, what it was told, what it made of that.

For people: `evaluate.py` scores, and its contact sheet has hundreds of pictures without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LETTERS = 16  # pixels that a line of text is high, about
GAP = 12  # pixels between cells
WORDS = 240  # pixels that an instruction has in width
INK, PAPER = (32, 32, 32), (255, 255, 255)


class EditExample(NamedTuple):
    """One edit; pictures are uint8 [height, width, 3], all of one size."""

    references: Sequence[np.ndarray]
    instruction: str
    result: np.ndarray


def example_sheet(examples: Sequence[EditExample]) -> Image.Image:
    """A row an edit: its references, its instruction, its result."""
    height, width = examples[0].result.shape[:2]
    most = max(len(example.references) for example in examples)
    left = most * (width + GAP)  # where instructions begin
    size = (left + WORDS + GAP + width, len(examples) * (height + GAP) - GAP)
    sheet = Image.new("RGB", size, PAPER)
    ink, font = ImageDraw.Draw(sheet), ImageFont.load_default(LETTERS)
    for row, example in enumerate(examples):
        top = row * (height + GAP)
        # The last reference stands beside the words, however many there are.
        begin = left - len(example.references) * (width + GAP)
        for place, picture in enumerate(example.references):
            sheet.paste(Image.fromarray(picture), (begin + place * (width + GAP), top))
        sheet.paste(Image.fromarray(example.result), (left + WORDS + GAP, top))
        lines = "\n".join(wrapped(example.instruction, font, WORDS))
        ink.text((left + WORDS / 2, top + height / 2), lines, INK, font, "mm", align="center")
    return sheet


def wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """The lines of a text of so many pixels; a word that is longer has a line of its own."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
