"""How large a message may be on the wire, whatever it says. Pure.

What a single field may hold stands on the field (`fluxmesh/bounds.py`).
"""

from __future__ import annotations

from fluxmesh.bounds import MAX_ARRAY

MAX_FRAME = MAX_ARRAY  # bytes
MAX_HEADER = 1 << 20  # bytes
MAX_FRAMES = 14  # of one message; `Paint` has the header, 5 arrays and at most 8 features
MAX_MESSAGE = 8 * MAX_FRAME  # bytes of all frames together
