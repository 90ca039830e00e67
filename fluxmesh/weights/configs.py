"""The JSON configs of a diffusers folder, each value checked for its type. Imports no mlx.

Below `checkpoint.py`, which makes a checkpoint of them, and `lenders.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

from fluxmesh.errors import IncompleteModelError, ModelNotFoundError, WeightsError
from fluxmesh.models.files.configs import UnsupportedConfigError
from fluxmesh.models.files.family import FolderFormat
from fluxmesh.storage.safetensors import read_json

T = TypeVar("T")


def config_in(folder: Path, component: str, form: FolderFormat) -> Any:
    """The config of a component of a diffusers folder.

    Raises `IncompleteModelError` where it is missing, `WeightsError` where it is broken, and
    `ModelNotFoundError` where it is of a model that fluxmesh doesn't run.
    """
    return read_config(folder / component / "config.json", form.configs[component])


def schedule_in(folder: Path, form: FolderFormat) -> Any:
    """As `config_in`, of the scheduler."""
    return read_config(folder / "scheduler" / "scheduler_config.json", form.schedule)


def read_config(path: Path, read: Callable[[Mapping[str, Any]], T]) -> T:
    """What `read` makes of a JSON file. Raises as `config_in`."""
    if not path.is_file():
        raise IncompleteModelError.of(path.parent, path.name)
    # null is how diffusers writes that a value was not given
    values = {key: value for key, value in read_json(path).items() if value is not None}
    _check_plain(path, values)
    try:
        config = read(values)
    except KeyError as error:
        raise WeightsError(f"{path} lacks {error.args[0]!r}; download it again.") from error
    except UnsupportedConfigError as error:
        raise ModelNotFoundError(f"{path}: {error}; name another model.") from error
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{path} has a value of the wrong type; download it again.") from error
    for field, kind in get_type_hints(type(config)).items():
        value = getattr(config, field)
        if not is_of(kind, value):
            raise WeightsError(
                f"{path} gives {field} the value {str(value)[:40]!r}, which is of the wrong type; "
                "download it again."
            )
    return config


def _check_plain(path: Path, values: Mapping[str, Any]) -> None:
    """Raises `ModelNotFoundError` for weights that another library has quantized in its own way."""
    declared = values.get("quantization_config")
    if isinstance(declared, dict):
        method = str(declared.get("quant_method"))[:40]
        raise ModelNotFoundError(
            f"{path} says that the weights are quantized by {method}, whose form fluxmesh doesn't "
            "read; name the same model in bfloat16 or float16, and `bits` makes it as small."
        )


def is_of(kind: Any, value: Any) -> bool:
    """Whether a value out of a JSON file has the type that the config's field declares."""
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(type(item) is int for item in value)
    if kind is float:
        return type(value) in (int, float) and abs(value) < 1e30  # false for nan and infinity
    return type(value) is kind  # not isinstance: True is no number of layers
