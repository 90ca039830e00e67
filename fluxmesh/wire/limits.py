"""How large what comes over the wire may be: every number, text, tuple and array. Pure.

`protocol.py` holds each field of each message to these, when it is sent and when it arrives. They
are looked up as "Class.field", then "field"; where neither stands, the default holds. They are
far above what FLUX needs, and low enough that no message can fill a host's memory.
"""

from __future__ import annotations

import re

MAX_FRAME = 128 << 20  # bytes: the latents of 16 images at 2048 x 2048 are half of it
MAX_HEADER = 1 << 20  # bytes
MAX_FRAMES = 8  # of one message; `Paint` has the header and 7 arrays
MAX_TEXT = 4096  # characters
MAX_COUNT = 1024  # items of a tuple
MAX_BYTES = 64  # of a nonce or a token
MAX_INTEGER = 2**63 - 1

# Integers from .. to, both allowed; every other one is at least 0.
INTEGERS: dict[str, tuple[int, int]] = {
    "port": (1, 65535),
    "ports": (1, 65535),
    "count": (1, 64),
    "height": (1, 1 << 15),
    "width": (1, 1 << 15),
    "steps": (1, 100_000),
    "first": (0, 100_000),
    "basis": (0, 100_000),
    "step": (1, 100_000),
    "image": (0, 1 << 31),
    "images": (0, 1 << 31),
    "EngineCounters.images": (0, MAX_INTEGER),
    "EngineCounters.steps": (0, MAX_INTEGER),
    "lines": (0, 10_000),
    "rank": (0, 1023),
    "size": (1, 1024),
    "shards": (1, 1024),
    "shard": (0, 1023),
    "StepShape.hosts": (1, 1024),
    "bits": (2, 16),
    "ProbeLink.nbytes": (1, 4 << 30),
    "CollectiveTime.nbytes": (1, 1 << 40),
    "PutFile.total": (1, 16 << 30),
    "PutFile.offset": (0, 16 << 30),
    "total": (1, 1 << 40),
}

# Characters.
TEXTS: dict[str, int] = {
    "prompt": 1 << 17,
    "files": 1 << 16,  # a table of RDMA devices grows with the square of the hosts
    "envs": 1 << 12,
    "job": 128,
    "client": 128,
    "boot": 128,
    "version": 64,
    "request": 1 << 16,
}

# Texts of which a file's or a client's name is made hold nothing that a path could.
PATTERNS: dict[str, re.Pattern[str]] = {
    "sha256": re.compile(r"[0-9a-f]{64}"),
    "client": re.compile(r"[A-Za-z0-9_.-]{1,128}"),
}

# Items of tuples.
COUNTS: dict[str, int] = {
    "lines": 10_000,
    "adapters": 64,
    "components": 8,
    "compiled": 64,
    "envs": 64,
    "files": 8,
    "ports": 64,
    "numbers": 65_536,
    "DropFeatures.features": 16_384,
}

# Arrays: the dtypes and shapes that a field may have; None is any length of at least 1.
ARRAYS: dict[str, tuple[tuple[str, ...], tuple[int | None, ...]]] = {
    "data": (("uint8",), (None,)),
    "pixels": (("uint8",), (None, None, 3)),
    "preview": (("uint8",), (None, None, 3)),
    "mask": (("uint8",), (None, None)),
    "latents": (("float32",), (None, None, None)),
    "basis_latents": (("float32",), (1, None, None)),
    "noise": (("float32",), (1, None, None)),
    "source": (("float32",), (1, None, None)),
    "t5": (("uint16", "float32"), (1, None, None)),  # uint16 holds bfloat16
    "clip": (("uint16", "float32"), (1, None)),
    "numbers": (("float32",), (None,)),
    "sizes": (("int32",), (None, 2)),
    "captions": (("int32",), (None,)),
}
