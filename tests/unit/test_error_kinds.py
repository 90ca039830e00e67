"""Errors by their names: an agent names the class of what failed, and the coordinator raises it."""

from __future__ import annotations

import pytest

from fluxmesh import errors
from fluxmesh.wire.messages import ENGINE_KILLED
from fluxmesh_coordinator.jobs import failures

EVERY = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.FluxmeshError)
]


@pytest.mark.parametrize("kind", EVERY)
def test_every_error_is_made_again_of_its_name_its_sentence_and_its_setting(
    kind: type[errors.FluxmeshError],
) -> None:
    made = failures.error_of(kind.__name__, "It can't.", "model")
    assert type(made) is kind and (str(made), made.setting) == ("It can't.", "model")
    other = made.saying("It won't.")
    assert type(other) is kind and (str(other), other.setting) == ("It won't.", "model")
    assert not (failures.is_of_host(kind.__name__) and failures.is_final(kind.__name__))


def test_what_is_no_error_of_ours_is_the_base() -> None:
    for kind in ("Raised", "Self", "annotations", ENGINE_KILLED, ""):
        assert type(failures.error_of(kind, "It can't.")) is errors.FluxmeshError
        assert not failures.is_of_host(kind) and not failures.is_final(kind)


@pytest.mark.parametrize("kind", [kind for kind in EVERY if "Model" in kind.__name__])
def test_a_model_that_is_not_whole_or_not_there_is_its_host_s_affair(
    kind: type[errors.FluxmeshError],
) -> None:
    """Another host may have it; and a ring's backend has nothing to do with it."""
    assert failures.is_of_host(kind.__name__)
    assert not failures.is_of_backend(kind.__name__)


def test_a_folder_that_lacks_files_is_told_with_what_it_lacks() -> None:
    error = errors.IncompleteModelError.of("/models/dev", "ae.safetensors")
    assert error.lacks == "ae.safetensors"
    assert str(error).startswith("/models/dev lacks ae.safetensors; copy what is missing")
