"""Why an adapter's file is none of the model's, in a sentence that says what it is instead.

Below `reading.py`. Imports no mlx.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fluxmesh.adapters import foreign
from fluxmesh.adapters.keys import other_kind
from fluxmesh.adapters.targets import AdapterTargets
from fluxmesh.errors import AdapterError
from fluxmesh.storage.safetensors import Entry

Entries = Mapping[str, Entry]


def refuse_control(path: Path, entries: Entries, targets: AdapterTargets) -> None:
    """Raises `AdapterError` for a LoRA that widens `img_in` where the model's can't be."""
    for key, entry in entries.items():
        target = targets.match(key.split(".lora_")[0]) if ".lora_A." in key else None
        if target is None or target.name != "img_in" or len(entry.shape) != 2:
            continue
        own = targets.shapes[target.component]["img_in"][1]
        if entry.shape[1] == 2 * own and not targets.wider[target.component]:
            raise AdapterError(
                f"{path} is a control LoRA: it widens img_in to {entry.shape[1]} channels for a "
                "control picture, which this model does not take; use it with FLUX.1 dev."
            )


def unmatched(
    path: Path, entries: Entries, targets: AdapterTargets, unknown: Sequence[str]
) -> AdapterError:
    """For keys that match nothing in the model."""
    kind = other_kind(list(unknown))
    if kind is not None:
        return AdapterError(
            f"{path} is {kind}, no adapter that fluxmesh reads ({some(unknown)}); it reads LoRA, "
            "LoKr, LoHa, DoRA and differences of weights."
        )
    model = foreign.model_of(entries, targets.family)
    if model is not None:
        return AdapterError(
            f"{path} is an adapter of another model, {model} ({some(unknown)}); use one that was "
            "trained on this model."
        )
    named = ", ".join(sorted(unknown)[:5])
    more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    why = "the adapter belongs to another model, or is of a kind that fluxmesh does not read"
    leaves = {key.rpartition(".")[2] for key in unknown}
    if len(unknown) == len(entries) and leaves <= {"weight", "bias", "scale"}:
        why = "these are a model's own weights; name the file as the model instead"
    if any(".modules_to_save." in key or key.endswith(".bias") for key in unknown):
        why = (
            "they replace weights or biases of the model, as PEFT's `modules_to_save` and `bias` "
            "do, which fluxmesh does not read"
        )
    return AdapterError(f"{path} holds keys that match nothing in the model: {named}{more}; {why}.")


def nothing(
    path: Path, entries: Entries, targets: AdapterTargets, left_out: Mapping[str, Sequence[str]]
) -> AdapterError:
    """For a file of which nothing is left to apply; `left_out` are keys by reason."""
    model = foreign.model_of(entries, targets.family)
    if model is not None:
        return AdapterError(
            f"{path} is an adapter of another model, {model}; use one that was trained on this "
            "model."
        )
    if left_out:
        keys = [key for keys in left_out.values() for key in keys]
        why = "; ".join(left_out)
        return AdapterError(f"{path} holds nothing that can be applied ({some(keys)}): {why}.")
    return AdapterError(f"{path} changes nothing: all that it adds is zero; name another adapter.")


def wrong_size(
    path: Path,
    entries: Entries,
    targets: AdapterTargets,
    module: str,
    shape: tuple[int, int],
    expected: tuple[int, int],
) -> AdapterError:
    """For a module whose matrix has another size in the model."""
    width = next(iter(targets.shapes.values())).get("img_in", (0, 0))[0]
    model = foreign.model_of(entries, targets.family)
    model = model or foreign.model_of_width(entries, width)
    named = f", {model}" if model else ""
    return AdapterError(
        f"{path}: {module} adapts a matrix of {shape[0]}x{shape[1]} where the model has "
        f"{expected[0]}x{expected[1]}; the adapter belongs to another model{named}."
    )


def some(keys: Sequence[str]) -> str:
    """One key of several, for a sentence."""
    return min(keys) + (" and others" if len(keys) > 1 else "")
