"""LoRA in five key formats: read as one form, and written. Imports no mlx.

A low-rank adapter adds `scale * B @ A` to a linear's weight (Hu et al. 2021,
https://arxiv.org/abs/2106.09685). Inside fluxmesh an adapter is a `LowRank` for each of BFL's
modules; fluxmesh writes these in five ways:

- diffusers and PEFT: `transformer.transformer_blocks.0.attn.to_q.lora_A.weight`
- kohya: `lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight`, with an `.alpha`
- ai-toolkit: `diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight`, which ComfyUI reads as
  well as the next, and diffusers alone of the two
- BFL-style: `diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight`
- Apple's example: `double_blocks.0.img_attn.qkv.lora_a`, transposed

`reading.py` reads these and all others, of any kind. Where a file adapts q, k and v apart, the
fused matrix gets their ranks side by side, block by block.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fluxmesh.adapters.changes import LowRank
from fluxmesh.adapters.reading import AdapterFile
from fluxmesh.errors import AdapterError, UsageError
from fluxmesh.models.tensor_map import ComponentNames, Rows, Tensors, to_diffusers
from fluxmesh.storage import bfloat16
from fluxmesh.storage.atomic import Opens, new_file
from fluxmesh.storage.safetensors import write_tensors

FORMATS = ("diffusers", "kohya", "bfl", "ai-toolkit", "apple")
OWNERS = {
    "diffusers": "diffusers'",
    "kohya": "kohya's",
    "bfl": "BFL's",
    "ai-toolkit": "ai-toolkit's",
    "apple": "Apple's",
}

Adapter = dict[str, LowRank]  # by BFL's module name, "double_blocks.0.img_attn.qkv"


def low_ranks(file: AdapterFile, component: str) -> Adapter:
    """A component's linears as one `LowRank` each. Raises `AdapterError` for other kinds."""
    adapter = {}
    if file.replaced or file.inputs:
        raise AdapterError(
            f"{file.path} is a control LoRA, which replaces norms or widens the input: no other "
            "format has a place for that; use it as it is."
        )
    for name in file.linears(component):
        change = file.change(component, name)
        if not change.is_low_rank:
            raise AdapterError(
                f"{file.path} is {' and '.join(file.kinds)}, which can't be written as LoRA; write "
                "it into a model with `fluxmesh adapters fuse`."
            )
        adapter[name] = change.joined()
    return adapter


def write_low_ranks(
    path: Path,
    adapters: Mapping[str, Adapter],
    components: Sequence[ComponentNames],
    file_format: str = "diffusers",
    metadata: Mapping[str, str] | None = None,
    opened: Opens = new_file,
) -> None:
    """Writes a LoRA in one of FORMATS, whole or not at all; `opened` as `write_tensors`.

    `adapters` are by component of `components`, the model's. Each module keeps the dtype that it
    was read from, where fluxmesh writes that one (`stored_as`). The scale is folded into B, so that
    every reader agrees on scale 1 (kohya's `alpha` is the rank). A fused matrix becomes several in
    diffusers' format: A is copied, B's rows are split, and ranks that a part does not use are left
    out. Raises `OutputError`, and `UsageError` for a component that the format has no place for.
    """
    if file_format not in FORMATS:
        raise UsageError(f"Adapter format {file_format!r}; choose one of {', '.join(FORMATS)}.")
    entries: dict[str, Any] = {}
    for names in components:
        for name, low in adapters.get(names.component, {}).items():
            if names is components[0]:
                arrays = _denoiser_arrays(name, low, names.tensors, file_format)
            elif has_place(file_format, names):
                arrays = _text_arrays(names.written[file_format], name, low, file_format)
            else:
                raise UsageError(
                    f"{OWNERS[file_format]} format has no place for text encoders; choose another "
                    "one."
                )
            for key, array in arrays:
                entries[key] = stored_as(array, low.dtype)
    write_tensors(path, entries, {"format": "pt", **(metadata or {})}, opened)


def has_place(file_format: str, names: ComponentNames) -> bool:
    """Whether a format can hold adapters of a component that isn't the denoiser."""
    return file_format in names.written


def stored_as(values: np.ndarray, dtype: str) -> tuple[np.ndarray, str]:
    """float32 as a file of that dtype holds it, and the dtype's name.

    fp8, whose numbers change with the scale, becomes bfloat16; what float16 can't hold, float32.
    """
    values = np.ascontiguousarray(values, dtype=np.float32)
    if dtype in ("BF16", "F8_E4M3", "F8_E5M2"):
        return bfloat16.of_float32(values), "BF16"
    if dtype == "F16" and np.abs(values).max(initial=0) <= np.finfo(np.float16).max:
        return values.astype(np.float16), "F16"
    return values, "F32"


def _denoiser_arrays(
    name: str, low: LowRank, tensors: Tensors, file_format: str
) -> Iterator[tuple[str, np.ndarray]]:
    a, b = low.a, low.scale * low.b
    if file_format == "diffusers":
        for module, rows in _diffusers_modules(tensors, name):
            part = np.concatenate([b[piece.start : piece.stop] for piece in rows])
            used = part.any(axis=0)
            keep = used if used.any() else np.ones_like(used)
            yield f"transformer.{module}.lora_A.weight", a[keep]
            yield f"transformer.{module}.lora_B.weight", part[:, keep]
    elif file_format == "apple":
        module = re.sub(r"(_mlp|adaLN_modulation)\.(\d)", r"\1.layers.\2", name)
        yield f"{module}.lora_a", a.T
        yield f"{module}.lora_b", b.T
    elif file_format == "kohya":
        yield from _kohya_arrays("lora_unet_" + name.replace(".", "_"), a, b)
    else:
        ends = ("lora_A", "lora_B") if file_format == "ai-toolkit" else ("lora_down", "lora_up")
        yield f"diffusion_model.{name}.{ends[0]}.weight", a
        yield f"diffusion_model.{name}.{ends[1]}.weight", b


def _text_arrays(
    prefix: str, name: str, low: LowRank, file_format: str
) -> Iterator[tuple[str, np.ndarray]]:
    a, b = low.a, low.scale * low.b
    module = prefix + name
    if file_format == "kohya":
        yield from _kohya_arrays(module.replace(".", "_"), a, b)
    else:
        ends = ("lora_A", "lora_B") if file_format == "diffusers" else ("lora_down", "lora_up")
        yield f"{module}.{ends[0]}.weight", a
        yield f"{module}.{ends[1]}.weight", b


def _kohya_arrays(module: str, a: np.ndarray, b: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    yield f"{module}.lora_down.weight", a
    yield f"{module}.lora_up.weight", b
    yield f"{module}.alpha", np.array(len(a), dtype=np.float32)


def _diffusers_modules(tensors: Tensors, name: str) -> list[tuple[str, tuple[Rows, ...]]]:
    """diffusers' modules that make up BFL's `name`, with the rows of each."""
    only = to_diffusers({f"{name}.weight": tensors[f"{name}.weight"]})
    return [(key.removesuffix(".weight"), rows) for key, rows in only.items()]
