"""A request's body as fields: JSON, or a form with files, within bounds.

`guard/` has counted its bytes and its seconds already; here it becomes values of a known type, and
every picture in it has been looked at by `uploads.py`.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeGuard

from starlette.exceptions import HTTPException
from starlette.requests import Request

from fluxmesh.errors import UsageError
from fluxmesh_coordinator.server import uploads
from fluxmesh_coordinator.server.problems import ProblemError
from fluxmesh_coordinator.server.threads import of_size

MAX_FIELDS = 64
MAX_FIELD = 1 << 20  # bytes of one that is no file
HALF = re.compile("[\ud800-\udfff]")
TRUE, FALSE = {"true", "1", "yes", "on"}, {"false", "0", "no", "off"}


@dataclass(frozen=True)
class Body:
    """Fields by name; a form's are all text. Every reader raises `UsageError` naming the field."""

    fields: Mapping[str, Any]
    files: Mapping[str, list[bytes]] = field(default_factory=dict)  # of a form, by field

    def text(self, name: str, default: str = "") -> str:
        value = self.fields.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise UsageError.about(name, "is no text", "send a string")
        if "\0" in value:  # no text has it: bytes of something else, which a form passes on
            raise UsageError.about(name, "has a zero byte in it", "send text in UTF-8")
        if HALF.search(value):  # JSON may name it, and no text has it either
            raise UsageError.about(name, "has half of a surrogate pair", "send text in UTF-8")
        return value

    def whole(self, name: str) -> int | None:
        """A whole number; None: it was not given."""
        value = self._number(name)
        if value is None:
            return None
        if value != int(value):
            raise UsageError.about(name, f"is {value}", "send a whole number")
        return int(value)

    def number(self, name: str) -> float | None:
        """A finite number; None: it was not given."""
        value = self._number(name)
        return None if value is None else float(value)

    def seed(self) -> int | None:
        """None: one is to be drawn, which programs say as -1."""
        value = self.whole("seed")
        return None if value == -1 else value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.fields.get(name)
        if value is None or value == "":
            return default
        if isinstance(value, int) and value in (0, 1):
            return bool(value)
        if isinstance(value, str) and value.lower() in TRUE | FALSE:
            return value.lower() in TRUE
        raise UsageError.about(name, "is neither true nor false", "send one of them")

    def items(self, name: str) -> list[Any]:
        """A list; a form has one as JSON."""
        value = self.fields.get(name)
        if isinstance(value, str) and value.lstrip().startswith("["):
            value = parsed(value.encode(), name)
        if value is None or value == "":
            return []
        if not isinstance(value, list) or len(value) > MAX_FIELDS:
            raise UsageError.about(name, "is no list", f"send one of at most {MAX_FIELDS}")
        return value

    async def pictures(self, name: str) -> list[bytes]:
        """The pictures of a field, from files or base64, each within the limits."""
        sent = self.files.get(name) or self.files.get(f"{name}[]") or []
        value = self.fields.get(name)
        texts = [] if value in (None, "") else value if isinstance(value, list) else [value]
        if not sent and not texts:
            return []
        return await asyncio.to_thread(uploads.checked_all, sent, texts, name)

    async def picture(self, name: str) -> bytes | None:
        """The one picture of a field; None: it was not given."""
        pictures = await self.pictures(name)
        if len(pictures) > 1:
            raise UsageError.about(name, "has several pictures", "send one")
        return pictures[0] if pictures else None

    def _number(self, name: str) -> int | float | None:
        value = self.fields.get(name)
        if value is None or value == "":
            return None
        if isinstance(value, str):
            try:
                value = float(value) if not value.strip().lstrip("-").isdecimal() else int(value)
            except ValueError:
                raise UsageError.about(name, "is no number") from None
        if not is_number(value):
            raise UsageError.about(name, "is no number that can be read")
        return value


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether it is a finite number of a size that something here could mean.

    Compared, not asked for `isfinite`: JSON has whole numbers that no float holds.
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 2**63


async def read_body(request: Request) -> Body:
    """Raises `ProblemError` for a body of another kind, or a broken one."""
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise ProblemError(415, "A body that is packed can't be read; send it as it is.", "body")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _form(request)
    if kind not in ("application/json", ""):
        raise ProblemError(
            415, f"A body of {kind[:40]} can't be read; send JSON or multipart/form-data.", "body"
        )
    body = await request.body() or b"{}"
    fields = await of_size(len(body), parsed, body, "")
    if not isinstance(fields, dict):
        raise ProblemError(400, "The body is no JSON object; send one.", "body")
    return Body(fields)


def parsed(data: bytes, setting: str) -> Any:
    """JSON, without the numbers that it does not have. Raises `ProblemError`."""

    def refuse(_word: str) -> NoReturn:
        raise ValueError

    try:
        return json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError):
        where = f"`{setting}`" if setting else "The body"
        raise ProblemError(
            400, f"{where} is no JSON that can be read; send JSON in UTF-8.", "body",
            setting=setting,
        ) from None  # fmt: skip


async def _form(request: Request) -> Body:
    fields: dict[str, Any] = {}
    files: dict[str, list[bytes]] = {}
    try:
        async with request.form(
            max_files=uploads.MAX_FILES, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD
        ) as form:
            for name, value in form.multi_items():
                if isinstance(value, str):
                    fields[name] = value
                else:
                    files.setdefault(name, []).append(await value.read(uploads.MAX_FILE + 1))
    except (HTTPException, UnicodeError, KeyError) as error:
        said = str(getattr(error, "detail", "")).rstrip(".")
        raise ProblemError(
            400, f"The form can't be read{said and f' ({said})'}; send multipart/form-data.", "body"
        ) from None
    return Body(fields, files)
