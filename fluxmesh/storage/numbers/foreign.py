"""Quantized forms that are not read, told by the names in a file's header alone. No mlx.

Who has such a file should hear what it is and what to take instead, not that a tensor is missing or
of a strange shape.
"""

from __future__ import annotations

import re
from pathlib import Path

from fluxmesh.errors import WeightsError
from fluxmesh.storage.safetensors import Header

BITSANDBYTES = re.compile(r".+\.quant_state\.bitsandbytes__(\w+)")
# How keys end that only one form has; the first that any key of the file ends in names it.
_ENDINGS = (
    (("SCB",), "bitsandbytes' int8"),
    (("wscales", "wcscales", "smooth_factor"), "SVDQuant's (nunchaku)"),
    (("qweight", "qzeros", "g_idx"), "GPTQ's or AWQ's"),
    (("weight_packed",), "compressed-tensors' packed"),
    (("weight_scale_2",), "NVFP4's"),
    (("_data", "weight_qtype"), "quanto's"),
    (("qdata", "_weight_qdata", "weight:qdata"), "torchao's"),
    (("W_q",), "HQQ's"),
    (("float8_data",), "flux-fp8-api's"),
)


def form_of(header: Header) -> str | None:
    """What a file's quantized form is called, as an adjective; None for none of these."""
    for key in header.entries:
        match = BITSANDBYTES.fullmatch(key)
        if match:
            return f"bitsandbytes' {match[1]}"
    endings = {key.rpartition(".")[2] for key in header.entries}
    for keys, name in _ENDINGS:
        if not endings.isdisjoint(keys):
            return name
    return None


def refuse(header: Header) -> None:
    """Raises `WeightsError` for a file in a form that is not read."""
    form = form_of(header)
    if form is not None:
        raise unread(next(iter(header.entries.values())).path, form)


def unread(path: Path, form: str, key: str = "") -> WeightsError:
    """The sentence for a form of that name."""
    what = f"{key} in" if key else "its weights in"
    return WeightsError(
        f"{path} stores {what} {form} form, which fluxmesh doesn't read; name the same model in "
        "bfloat16, float16, fp8, GGUF (Q8_0 to Q4_0) or MLX's quantized form."
    )
