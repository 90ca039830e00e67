"""Fields that every face takes under one name: what the command line has and other APIs have not.

Beside `bodies.py`, which says what a value is.
"""

from __future__ import annotations

from typing import Any

from fluxmesh.errors import UsageError
from fluxmesh.images import Margins, parse_margins
from fluxmesh_coordinator.server.faces.bodies import Body

MARGINS = 64  # characters in which four margins are said


async def extras(body: Body) -> dict[str, Any]:
    """Fields of a `PaintRequest`. Raises `UsageError`."""
    return {
        "outpaint": _margins(body.fields.get("outpaint")),
        "control": await body.picture("control"),
        "control_from": await body.picture("control_from"),
        "fuse_adapters": body.flag("fuse_adapters"),
        "dtype": body.text("dtype") or None,
        "bits": body.whole("bits"),
        "text_bits": body.whole("text_bits"),
        "t5_padding": body.flag("t5_padding", True),
        "cache": body.number("cache"),
    }


def _margins(value: Any) -> Margins | None:
    """Left, top, right, bottom: a list, or a text with commas. Raises `UsageError`."""
    if value is None or value == "":
        return None
    text = ",".join(map(str, value)) if isinstance(value, list) else value
    if not isinstance(text, str) or len(text) > MARGINS:
        raise UsageError.about("outpaint", "can't be read", "send [left, top, right, bottom]")
    return parse_margins(text)
