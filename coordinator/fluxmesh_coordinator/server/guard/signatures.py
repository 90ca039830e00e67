"""Addresses of pictures that open without the key, for an hour: what `response_format=url` gives.

Programs hand such an address to a browser, or fetch it without their key. So it carries a token: an
HMAC of the picture's path and of the second in which it expires, which only who has the key can
make. It opens this one picture and nothing else, and a new key ends all that were given.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from urllib.parse import parse_qs

SECONDS = 3600  # that an address is good for, as those of OpenAI are
PATH = re.compile(r"/api/pictures/[0-9A-Za-z.-]+")  # a picture: neither its thumbnail nor a list


def signed(path: str, key: str, now: float) -> str:
    """The path of a picture with its token; `now` is in seconds since 1970."""
    expires = int(now) + SECONDS
    return f"{path}?expires={expires}&token={_token(path, key, expires)}"


def is_signed(method: str, path: str, query: str, key: str, now: float) -> bool:
    """Whether a request brings a token for what it asks for, which has not expired."""
    if method not in ("GET", "HEAD") or PATH.fullmatch(path) is None or "token" not in query:
        return False
    try:
        fields = parse_qs(query, max_num_fields=8)
    except ValueError:
        return False
    (expires, *_), (token, *_) = fields.get("expires", [""]), fields.get("token", [""])
    if not (expires.isascii() and expires.isdecimal() and len(expires) <= 12):
        return False
    wanted = _token(path, key, int(expires))
    is_right = hmac.compare_digest(token.encode(errors="replace"), wanted.encode())
    return is_right and now < int(expires)


def _token(path: str, key: str, expires: int) -> str:
    said = f"fluxmesh picture {expires} {path}".encode()
    return hmac.new(key.encode(), said, hashlib.sha256).hexdigest()
