"""How large a message may be on the wire, whatever it says. Pure.

What a single field may hold stands on the field (`fluxmesh/bounds.py`).
"""

from __future__ import annotations

from fluxmesh.bounds import MAX_ARRAY

MAX_FRAME = MAX_ARRAY  # bytes
MAX_HEADER = 1 << 20  # bytes
MAX_FRAMES = 26  # of one message; `Paint` has the header, 5 arrays, 8 features and 12 conditions
MAX_MESSAGE = 8 * MAX_FRAME  # bytes of all frames together
