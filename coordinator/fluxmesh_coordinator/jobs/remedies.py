"""What a user can do about a request that does not fit, in sentences that name the options.

`fluxmesh/planning/remedies.py` has found out what helps; `plan`, `generate`, `train` and `up` tell
it.
"""

from __future__ import annotations

from collections.abc import Sequence

from fluxmesh.planning.remedies import Remedy


def sentences(remedies: Sequence[Remedy]) -> str:
    """One sentence a remedy, the least change first; "" where nothing helps."""
    changes = [remedy for remedy in remedies if not remedy.freed and not remedy.wired_mib]
    said = [
        f"It fits with {_options(remedy)} ({remedy.needed / 1e9:.1f} GB)." for remedy in changes
    ]
    for remedy in remedies:
        if remedy.freed:
            said.append(f"It fits {_with(remedy)} once other programs there give memory back.")
        if remedy.wired_mib:
            said.append(
                f"On a Mac that nobody sits at, it fits {_with(remedy)} after "
                f"`sudo sysctl iogpu.wired_limit_mb={remedy.wired_mib}`, until that restarts."
            )
    return " ".join(said)


def _with(remedy: Remedy) -> str:
    options = _options(remedy)
    return f"with {options}" if options else "as it is"


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
    if remedy.grad_checkpoint:
        options.append("`grad_checkpoint`")
    if remedy.lora_rank:
        options.append(f"`lora_rank` {remedy.lora_rank}")
    if remedy.resolution:
        options.append(f"`resolution` {remedy.resolution}x{remedy.resolution}")
    return " ".join(options)
