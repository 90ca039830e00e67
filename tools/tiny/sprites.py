"""Sprites: the glyphs of Noto Color Emoji as square RGBA pictures, and scenes drawn from them.

The font is Debian's `fonts-noto-color-emoji` (SIL Open Font License 1.1, see
fluxmesh/tiny/NOTICE); the astronaut, a ligature, needs a Pillow with libraqm (its wheels have it).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scenes import OBJECTS, RGB, Scene

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
SIDE = 128  # pixels of a stored sprite
BITMAP_SIZE = 109  # the one size that the font's bitmaps have


def render_sprites(font: Path = FONT) -> np.ndarray:
    """Every object of `OBJECTS`, uint8 [objects, SIDE, SIDE, 4], its longer side filling SIDE."""
    face = ImageFont.truetype(str(font), BITMAP_SIZE)
    return np.stack([_render(face, glyph) for glyph, _ in OBJECTS.values()])


def _render(face: ImageFont.FreeTypeFont, glyph: str) -> np.ndarray:
    canvas = Image.new("RGBA", (4 * BITMAP_SIZE, 2 * BITMAP_SIZE))
    ImageDraw.Draw(canvas).text((BITMAP_SIZE, 20), glyph, font=face, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise SystemExit(f"{face.path} has no glyph for {glyph!r}; install Noto Color Emoji.")
    glyph_image = canvas.crop(box)
    scale = SIDE / max(glyph_image.size)
    size = tuple(max(1, round(side * scale)) for side in glyph_image.size)
    glyph_image = premultiplied_resize(glyph_image, size)
    square = Image.new("RGBA", (SIDE, SIDE))
    square.paste(glyph_image, ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    return np.asarray(square)


def premultiplied_resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resizes without letting the colour of transparent pixels bleed in ("RGBa" holds c·alpha)."""
    return image.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")


def pyramid(sprites: np.ndarray, sides: tuple[int, ...]) -> dict[int, np.ndarray]:
    """Sprites shrunk to each of `sides`, float32 [objects, side, side, 4], premultiplied, 0..1."""
    levels = {}
    for side in sides:
        shrunk = [
            np.asarray(premultiplied_resize(Image.fromarray(sprite), (side, side)))
            for sprite in sprites
        ]
        level = np.stack(shrunk).astype(np.float32) / 255
        level[..., :3] *= level[..., 3:]
        levels[side] = level
    return levels


def draw(scene: Scene, sprites: np.ndarray, height: int, width: int) -> np.ndarray:
    """The picture of a scene, uint8 [height, width, 3]; places are rounded to whole pixels."""
    canvas = Image.new("RGB", (width, height), tuple(int(c) for c in RGB[scene.background]))
    for thing in scene.things:
        side = max(1, round(thing.size * min(height, width)))
        sprite = premultiplied_resize(Image.fromarray(sprites[thing.name]), (side, side))
        corner = (round(thing.x * width - side / 2), round(thing.y * height - side / 2))
        canvas.paste(sprite, corner, sprite)
    return np.asarray(canvas)
