"""Which fields a job of `/api` may have; another one is refused by name, and not passed over.

Whoever writes `stepz`, or an option of the command line that the server decides, hears of it.
Below `api.py`; the fields themselves are `openapi.py`'s.
"""

from __future__ import annotations

from dataclasses import fields

from fluxmesh.errors import UsageError
from fluxmesh.spelling import did_you_mean
from fluxmesh_coordinator.commands.generate import Spread
from fluxmesh_coordinator.commands.settings import GenerateSettings
from fluxmesh_coordinator.server.faces.bodies import Body
from fluxmesh_coordinator.server.faces.openapi import JOB

# What the command line, or another server's clients, call otherwise.
CALLED = {
    "adapter": "adapters",
    "fuse_adapter": "fuse_adapters",
    "image_size": "width` and `height",
    "loras": "adapters",
    "n": "n_images",
    "negative": "negative_prompt",
    "no_t5_padding": "t5_padding",
    "quantize": "bits",
    "reference": "references",
    "size": "width` and `height",
}
# What the server decides: of its files, its memory, and of the hosts that others wait for too.
OPTIONS = {each.name for kind in (GenerateSettings, Spread) for each in fields(kind)}
OPTIONS |= {"force", "open", "output", "preload", "prompt_file", "save_raw", "show", "stepwise"}


def check_fields(body: Body) -> None:
    """Raises `UsageError` for a field that no job has."""
    known = set(JOB["properties"])
    for name in [*body.fields, *(name.removesuffix("[]") for name in body.files)]:
        if name in known:
            continue
        if name in CALLED:
            raise UsageError(
                f"`{CALLED[name]}` is what {name!r} is called here.", setting=CALLED[name]
            )
        if name in OPTIONS:
            raise UsageError(
                f"{name!r} is an option of the command line alone: here the server decides it; "
                "leave it out."
            )
        end = did_you_mean(name[:80], known, "; /api lists what there is.")
        raise UsageError(f"`{name[:80]}` is no field of a job{end}", setting=name[:80])
