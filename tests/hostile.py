"""Requests that nobody should send, drawn by hypothesis: for a sample in the tests, and for many.

`tests/unit/test_hostile_requests.py` sends a few hundred, `tools/hostile_requests.py` 10,000.
"""

from __future__ import annotations

import base64
import json
import struct
import zlib
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

PATHS = (
    *("/v1/images/generations", "/v1/images/edits", "/v1/models", "/v1/models/tiny"),
    *("/sdapi/v1/txt2img", "/sdapi/v1/img2img", "/sdapi/v1/options", "/sdapi/v1/interrupt"),
    *("/sdapi/v1/skip", "/sdapi/v1/memory", "/sdapi/v1/refresh-checkpoints"),
    *("/sdapi/v1/progress", "/sdapi/v1/loras", "/api", "/api/jobs", "/api/plan", "/api/models"),
    *("/api/status", "/api/pictures", "/api/session", "/metrics", "/healthz", "/"),
)
NAMES = (
    "../../etc/passwd",
    "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "..\\..",
    "a\x00b",
    "x" * 2000,
    "é",
    ".",
)
FIELDS = (
    *("prompt", "model", "n", "n_images", "size", "width", "height", "steps", "guidance", "seed"),
    *("image", "mask", "init_images", "references", "control", "strength", "denoising_strength"),
    *("adapters", "loras", "stream", "partial_images", "response_format", "output_format"),
    *("output_compression", "negative_prompt", "cfg", "cfg_scale", "batch_size", "n_iter", "id"),
    *("placement", "previews", "key", "sd_model_checkpoint", "override_settings", "user"),
)


@dataclass(frozen=True)
class HostileRequest:
    """A request, ready to be sent."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    check = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + check


def png(width: int, height: int, rows: bytes, *more: bytes) -> bytes:
    """A PNG that says that it is so large, whatever is in it."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    end = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + end


def zeros(megabytes: int, wbits: int = zlib.MAX_WBITS) -> bytes:
    """So many MB of nothing, as a zlib stream of a thousandth; gzip with 16 more `wbits`.

    Looking for runs alone, which is what there are, takes half of the time: all that collect the
    tests wait for it.
    """
    packer = zlib.compressobj(wbits=wbits, strategy=zlib.Z_RLE)
    return packer.compress(bytes(megabytes << 20)) + packer.flush()


ZEROS = zeros(80)
TEXT_BOMB = chunk(b"zTXt", b"a\0\0" + ZEROS)
PICTURES = (
    png(60_000, 60_000, b""),  # gigabytes, it says
    png(8_000, 8_000, bytes(100)),  # cut off
    png(16, 16, bytes(16 * 49), TEXT_BOMB),  # a text of 80 MB in 80 KB
    png(0, 5, b""),
    png(16, 16, bytes(16 * 49)),  # a good one
    b"GIF89a" + b"\xff" * 40,
    b"RIFF\xff\xff\xff\xffWEBPVP8X" + b"\xff" * 30,
    b"\xff\xd8\xff\xe0" + b"\0" * 50,
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n",
    b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
)
PICTURE_TEXTS = tuple(base64.b64encode(data).decode() for data in PICTURES)

values: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=True),
        st.text(max_size=60),
        st.sampled_from((*NAMES, *PICTURE_TEXTS, "9" * 5000, "1e999", "\ud800")),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
pictures = st.fixed_dictionaries(
    {
        field: st.one_of(st.sampled_from(PICTURE_TEXTS), st.lists(st.sampled_from(PICTURE_TEXTS)))
        for field in ("image", "init_images")
    },
    optional={"mask": st.sampled_from(PICTURE_TEXTS), "stream": st.booleans()},
)
# A prompt that is right and one step, so that some of them get as far as the line.
json_bodies = st.one_of(
    st.dictionaries(st.sampled_from(FIELDS), values, max_size=6), pictures
).map(
    lambda fields: json.dumps({"prompt": "a dog", "width": 64, "height": 64, "steps": 1} | fields)
    .encode("utf-8", "surrogatepass")
)  # fmt: skip


@st.composite
def forms(draw: st.DrawFn) -> bytes:
    """Parts of a form, some of them files, well formed or not."""
    parts = []
    for _ in range(draw(st.integers(0, 6))):
        name = draw(st.sampled_from((*FIELDS, "image[]", "")))
        file = draw(st.sampled_from(("", '; filename="x.png"', '; filename="../../x"', "; x")))
        data = draw(st.one_of(st.binary(max_size=50), st.sampled_from(PICTURES)))
        head = f'--b\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
        parts.append(head.encode() + data + b"\r\n")
    return b"".join(parts) + draw(st.sampled_from((b"--b--\r\n", b"", b"--b", b"\r\n\r\n")))


bodies: st.SearchStrategy[tuple[str, bytes]] = st.one_of(
    st.tuples(st.just("application/json"), json_bodies),
    st.tuples(st.just("application/json"), st.binary(max_size=200)),
    st.tuples(st.just("application/json"), st.sampled_from((b"[" * 50_000, b'{"a":' * 50_000))),
    st.tuples(st.just("multipart/form-data; boundary=b"), forms()),
    st.tuples(st.sampled_from(("multipart/form-data", "text/plain", "")), st.binary(max_size=99)),
)
plain = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=60)
headers = st.dictionaries(
    st.sampled_from(
        ("host", "origin", "sec-fetch-site", "authorization", "cookie", "last-event-id",
         "idempotency-key", "x-fluxmesh-client", "x-forwarded-for", "range", "accept")
    ),
    st.one_of(plain, st.sampled_from(("127.0.0.1", "evil.example", "null", "Basic ====", "-1"))),
    max_size=3,
)  # fmt: skip


@st.composite
def requests(draw: st.DrawFn) -> HostileRequest:
    """Any of it."""
    kind, body = draw(bodies)
    path = draw(
        st.one_of(
            st.sampled_from(PATHS),
            st.sampled_from(NAMES).map(lambda name: f"/api/pictures/{name}"),
            st.sampled_from(NAMES).map(lambda name: f"/api/jobs/{name}/events"),
            st.sampled_from(NAMES).map(lambda name: f"/api/pictures?before={name}&limit={name}"),
            plain.map(lambda text: f"/{text}"),
        )
    )
    method = draw(st.sampled_from(("GET", "POST", "POST", "POST", "DELETE", "PUT", "HEAD")))
    return HostileRequest(method, path, {"content-type": kind, **draw(headers)}, body)
