"""What a user can do about a request that does not fit, in sentences that name the options.

`fluxmesh/planning/remedies.py` has found out what helps; `plan`, `generate` and `up` tell it.
"""

from __future__ import annotations

from collections.abc import Sequence

from fluxmesh.planning.remedies import Remedy


def told(remedies: Sequence[Remedy]) -> str:
    """One sentence a remedy, the least change first; "" where nothing helps."""
    changes = [one for one in remedies if not one.freed and not one.wired_mib]
    said = [f"It fits with {_options(one)} ({one.needed / 1e9:.1f} GB)." for one in changes]
    for one in remedies:
        if one.freed:
            said.append("It fits as it is once other programs there give memory back.")
        if one.wired_mib:
            said.append(
                "On a Mac that nobody sits at, it fits as it is after "
                f"`sudo sysctl iogpu.wired_limit_mb={one.wired_mib}`, until that restarts."
            )
    return " ".join(said)


def _options(remedy: Remedy) -> str:
    options = []
    if remedy.one_by_one:
        options.append("neither `preload` nor `decoding_batch_size`")
    if remedy.bits is not None:
        options.append(f"`quantize` `bits` {remedy.bits}")
    if remedy.low_memory:
        options.append("`low_memory`")
    if remedy.side:
        options.append(f"`image_size` {remedy.side}x{remedy.side}")
    return " ".join(options)
