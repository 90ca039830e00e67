"""LoRA files: four key formats in and out, by way of one form. Imports no mlx.

A low-rank adapter adds `scale * B @ A` to a linear's weight (Hu et al. 2021,
https://arxiv.org/abs/2106.09685). Inside fluxmesh an adapter is a `LowRank` for each of BFL's
modules; a file may spell these in four ways, with or without a prefix:

- diffusers and PEFT: `transformer.transformer_blocks.0.attn.to_q.lora_A.weight`
- kohya: `lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight`, with an `.alpha`
- BFL-style: `diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight`
- Apple's example: `double_blocks.0.img_attn.qkv.lora_a`, transposed

Where a file adapts q, k and v apart, the fused matrix gets their ranks side by side, block by
block. `lora.py` applies the result to a model.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fluxmesh.errors import AdapterError, ModelNotFoundError, UsageError, WeightsError
from fluxmesh.models.flux1.config import FluxConfig
from fluxmesh.models.flux1.tensor_maps import Rows, to_diffusers, transformer_tensors
from fluxmesh.storage import apple_double, bfloat16
from fluxmesh.storage.atomic import Opens, new_file
from fluxmesh.storage.safetensors import Entry, Header, read_header, read_tensor, write_tensors

FORMATS = ("diffusers", "kohya", "bfl", "apple")
PREFIXES = ("base_model.model.", "model.", "transformer.", "diffusion_model.", "unet.")
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_")  # kohya's, before underscores for dots
ROLES = (
    # how a key ends, which factor it is, whether it is stored transposed
    (re.compile(r"(.+)\.lora_A(?:\.\w+)?\.weight"), "a", False),
    (re.compile(r"(.+)\.lora_B(?:\.\w+)?\.weight"), "b", False),
    (re.compile(r"(.+)\.lora[_.]down\.weight"), "a", False),
    (re.compile(r"(.+)\.lora[_.]up\.weight"), "b", False),
    (re.compile(r"(.+)\.lora_a"), "a", True),
    (re.compile(r"(.+)\.lora_b"), "b", True),
    (re.compile(r"(.+)\.alpha"), "alpha", False),
)
PEFT_METADATA = "lora_adapter_metadata"  # JSON that diffusers writes into the file's header


@dataclass(frozen=True)
class LowRank:
    """One module's adapter: the weight grows by `scale * b @ a`."""

    a: np.ndarray = field(repr=False)  # float32 [rank, in]
    b: np.ndarray = field(repr=False)  # float32 [out, rank]
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])


Adapter = dict[str, LowRank]  # by BFL's module name, "double_blocks.0.img_attn.qkv"


@dataclass
class _Part:
    """What a file says of one of its own modules."""

    factors: dict[str, Entry] = field(default_factory=dict)
    transposed: bool = False


def find_adapter(path: str | Path) -> Path:
    """The adapter's file; a folder stands for the one that trainers leave in it.

    Raises `ModelNotFoundError`.
    """
    file = Path(os.path.expanduser(path))
    if os.path.isdir(file):
        names = ("final_adapters.safetensors", "pytorch_lora_weights.safetensors")
        files = [file / name for name in names if (file / name).is_file()]
        files = files or list(apple_double.without(file.glob("*.safetensors")))
        if len(files) != 1 and not (files and files[0].name in names):
            raise ModelNotFoundError(
                f"The folder {path} holds {len(files)} .safetensors files; name the adapter's file."
            )
        return files[0]
    if not os.path.isfile(file):
        raise ModelNotFoundError(f"No adapter file {path}; check the path.")
    return file


def read_adapter(path: str | Path, config: FluxConfig) -> Adapter:
    """Reads a LoRA of any of the four formats, for a transformer of these sizes.

    Raises `ModelNotFoundError` for a missing file, `WeightsError` for a damaged one, and
    `AdapterError` naming the keys that match nothing in the model or have the wrong shape.
    """
    file = find_adapter(path)
    header = read_header(file)
    parts = _parts(file, header)
    targets = _module_rows(config)
    shapes = {
        name.removesuffix(".weight"): target.shape
        for name, target in transformer_tensors(config).items()
        if name.endswith(".weight")
    }
    pieces: dict[str, list[tuple[tuple[Rows, ...], LowRank]]] = {}
    unknown = []
    for module, part in parts.items():
        rows = _match(module, targets)
        if rows is None:
            unknown += [entry.key for entry in part.factors.values()]
            continue
        low = _low_rank(file, module, part, _peft_scale(header, module, part))
        target = rows[0].key
        expected = (sum(piece.count for piece in rows), shapes[target][1])
        if (low.b.shape[0], low.a.shape[1]) != expected:
            raise AdapterError(
                f"{file}: {module} adapts a matrix of {low.b.shape[0]}x{low.a.shape[1]} where the "
                f"model has {expected[0]}x{expected[1]}; the adapter belongs to another model."
            )
        pieces.setdefault(target, []).append((rows, low))
    if unknown:
        raise _unmatched(file, unknown)
    if not pieces:
        raise AdapterError(f"{file} holds no LoRA weights; name an adapter.")
    return {name: _joined(shapes[name][0], low_ranks) for name, low_ranks in pieces.items()}


def _parts(file: Path, header: Header) -> dict[str, _Part]:
    """The file's keys, grouped by module. Raises `AdapterError` for keys that are no LoRA's."""
    parts: dict[str, _Part] = {}
    unknown = []
    for key, entry in header.entries.items():
        for pattern, role, transposed in ROLES:
            match = pattern.fullmatch(key)
            if match:
                part = parts.setdefault(match[1], _Part())
                part.factors[role] = entry
                part.transposed |= transposed
                break
        else:
            unknown.append(key)
    if unknown:
        raise _unmatched(file, unknown)
    return parts


def _unmatched(file: Path, keys: list[str]) -> AdapterError:
    named = ", ".join(sorted(keys)[:5])
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    text = any(key.startswith(("lora_te", "text_encoder")) for key in keys)
    why = (
        "fluxmesh adapts the transformer only, so remove the text encoders' keys"
        if text
        else "the adapter belongs to another model, or is of a kind other than LoRA"
    )
    return AdapterError(f"{file} holds keys that match nothing in the model: {named}{more}; {why}.")


def _module_rows(config: FluxConfig) -> dict[str, tuple[Rows, ...]]:
    """Every name that a file may give a linear, and the rows of BFL's module that it adapts.

    A module's own rows come in the order of the file's: those of `norm_out.linear` are swapped.
    """
    tensors = transformer_tensors(config)
    names: dict[str, tuple[Rows, ...]] = {}

    def add(name: str, rows: tuple[Rows, ...]) -> None:
        names[name] = rows
        names[name.replace(".", "_")] = rows

    for name, target in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight":
            add(module, (Rows(module, 0, target.shape[0]),))
    for key, pieces in to_diffusers(tensors).items():
        module, _, leaf = key.rpartition(".")
        if leaf == "weight" and all(piece.key.endswith(".weight") for piece in pieces):
            modules = tuple(
                Rows(piece.key.removesuffix(".weight"), piece.start, piece.stop) for piece in pieces
            )
            add(module, modules)
    return names


def _match(module: str, targets: Mapping[str, tuple[Rows, ...]]) -> tuple[Rows, ...] | None:
    for prefix in FLAT_PREFIXES:
        if module.startswith(prefix):
            return targets.get(module.removeprefix(prefix))
    for prefix in PREFIXES:
        module = module.removeprefix(prefix)
    return targets.get(module.replace(".layers.", "."))  # Apple's nn.Sequential adds `.layers`


def _low_rank(file: Path, module: str, part: _Part, peft_scale: float) -> LowRank:
    for role in ("a", "b"):
        if role not in part.factors:
            raise AdapterError(
                f"{file}: {module} has one of LoRA's two matrices and lacks the other; the file is "
                "incomplete."
            )
    a, b = (_float32(part.factors[role]) for role in ("a", "b"))
    if part.transposed:
        a, b = a.T, b.T
    a, b = (x[:, :, 0, 0] if x.ndim == 4 and x.shape[2:] == (1, 1) else x for x in (a, b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or 0 in a.shape:
        raise AdapterError(
            f"{file}: {module} has matrices {a.shape} and {b.shape}, which are no LoRA's; the file "
            "is damaged."
        )
    if "alpha" not in part.factors:
        return LowRank(a, b, peft_scale)
    alpha = _float32(part.factors["alpha"])
    if alpha.size != 1:
        raise AdapterError(f"{file}: {module}.alpha is no single number; the file is damaged.")
    return LowRank(a, b, float(alpha.reshape(())) / a.shape[0])


def _float32(entry: Entry) -> np.ndarray:
    values = read_tensor(entry)
    if entry.dtype == "BF16":
        return bfloat16.to_float32(values)
    return values.astype(np.float32)


def _peft_scale(header: Header, module: str, part: _Part) -> float:
    """`alpha / rank` as PEFT's settings in the file's metadata give it; 1 where there are none."""
    text = header.metadata.get(PEFT_METADATA)
    if not isinstance(text, str) or "a" not in part.factors:
        return 1.0
    rank = part.factors["a"].shape[0]
    try:
        settings = {key.removeprefix("transformer."): v for key, v in json.loads(text).items()}
        patterns = settings.get("alpha_pattern") or {}
        name = module.removeprefix("base_model.model.").removeprefix("transformer.")
        alpha = next(
            (value for key, value in patterns.items() if name == key or name.endswith(f".{key}")),
            settings.get("lora_alpha", rank),
        )
        return float(alpha) / (rank**0.5 if settings.get("use_rslora") else rank)
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        path = part.factors["a"].path
        raise WeightsError(f"{path} has corrupt {PEFT_METADATA} in its header.") from error


def _joined(out: int, low_ranks: list[tuple[tuple[Rows, ...], LowRank]]) -> LowRank:
    """One adapter of a whole module from those of its rows: ranks add up, block by block."""
    if len(low_ranks) == 1 and low_ranks[0][0] == (Rows(low_ranks[0][0][0].key, 0, out),):
        return low_ranks[0][1]
    a = np.concatenate([low.a for _, low in low_ranks])
    b = np.zeros((out, a.shape[0]), dtype=np.float32)
    rank = 0
    for rows, low in low_ranks:
        offset = 0
        for piece in rows:
            block = low.b[offset : offset + piece.count]
            b[piece.start : piece.stop, rank : rank + low.rank] = low.scale * block
            offset += piece.count
        rank += low.rank
    return LowRank(a, b)


def write_adapter(
    path: Path,
    adapter: Mapping[str, LowRank],
    config: FluxConfig,
    file_format: str = "diffusers",
    metadata: Mapping[str, str] | None = None,
    opened: Opens = new_file,
) -> None:
    """Writes a LoRA in one of FORMATS, float32, whole or not at all; `opened` as `write_tensors`.

    The scale is folded into B, so that every reader agrees on scale 1 (kohya's `alpha` is the
    rank). A fused matrix becomes several in diffusers' format: A is copied, B's rows are split,
    and ranks that a part does not use are left out. Raises `OutputError`.
    """
    if file_format not in FORMATS:
        raise UsageError(f"Adapter format {file_format!r}; choose one of {', '.join(FORMATS)}.")
    arrays: dict[str, np.ndarray] = {}
    for name, low in adapter.items():
        a, b = low.a, low.scale * low.b
        if file_format == "diffusers":
            for module, rows in _diffusers_modules(config, name):
                part = np.concatenate([b[piece.start : piece.stop] for piece in rows])
                used = part.any(axis=0)
                keep = used if used.any() else np.ones_like(used)
                arrays[f"transformer.{module}.lora_A.weight"] = a[keep]
                arrays[f"transformer.{module}.lora_B.weight"] = part[:, keep]
        elif file_format == "apple":
            module = re.sub(r"(_mlp|adaLN_modulation)\.(\d)", r"\1.layers.\2", name)
            arrays |= {f"{module}.lora_a": a.T, f"{module}.lora_b": b.T}
        elif file_format == "kohya":
            module = "lora_unet_" + name.replace(".", "_")
            arrays[f"{module}.lora_down.weight"] = a
            arrays[f"{module}.lora_up.weight"] = b
            arrays[f"{module}.alpha"] = np.array(low.rank, dtype=np.float32)
        else:
            arrays[f"diffusion_model.{name}.lora_down.weight"] = a
            arrays[f"diffusion_model.{name}.lora_up.weight"] = b
    entries: dict[str, Any] = {
        key: (np.ascontiguousarray(array, dtype=np.float32), "F32") for key, array in arrays.items()
    }
    write_tensors(path, entries, {"format": "pt", **(metadata or {})}, opened)


def _diffusers_modules(config: FluxConfig, name: str) -> list[tuple[str, tuple[Rows, ...]]]:
    """diffusers' modules that make up BFL's `name`, with the rows of each."""
    tensors = transformer_tensors(config)
    only = to_diffusers({f"{name}.weight": tensors[f"{name}.weight"]})
    return [(key.removesuffix(".weight"), rows) for key, rows in only.items()]
