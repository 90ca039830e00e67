"""An error about a path is told in the words in which the user named it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fluxmesh.errors import WeightsError
from fluxmesh.storage.own_words import in_own_words


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `models/flux/ae` and a link `link` to `models`; the user is in it."""
    folder = tmp_path / "here"
    (folder / "models" / "flux").mkdir(parents=True)
    (folder / "models" / "flux" / "ae").write_bytes(b"")
    (folder / "link").symlink_to("models")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder)
    return folder


def sentence_of(name: str, sentence: str) -> str:
    with pytest.raises(WeightsError) as caught, in_own_words(name):
        raise WeightsError(sentence)
    return str(caught.value)


@pytest.mark.parametrize("name", ["models/flux", "link/flux", "models/../models/flux", "~/models/"])
def test_a_folder_and_what_is_in_it(here: Path, name: str) -> None:
    path = os.path.expanduser(name)
    for known in (os.path.realpath(path), os.path.abspath(path), os.path.join(here, path)):
        known = known.rstrip("/")
        said = sentence_of(name, f"{known}/vae is cut off; see {known}.")
        assert said == f"{name.rstrip('/')}/vae is cut off; see {name.rstrip('/')}."


@pytest.mark.parametrize("name", ["models/flux/ae", "models/../models/flux/ae", "link/flux/ae"])
def test_a_file_and_what_is_beside_it(here: Path, name: str) -> None:
    folder = here / os.path.dirname(name)
    assert sentence_of(name, f"{here / name} lacks x.") == f"{name} lacks x."
    assert sentence_of(name, f"{folder}/t5 is empty.") == f"{os.path.dirname(name)}/t5 is empty."


def test_a_file_right_here(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here / "models" / "flux")
    assert sentence_of("ae", f"{here}/models/flux/t5 is empty.") == "t5 is empty."


@pytest.mark.parametrize("name", [".", "..", "", "no/path", "owner/repo"])
def test_what_is_no_path_and_what_is_whole_stay(here: Path, name: str) -> None:
    for sentence in (f"{here}/models is empty.", "/etc/x is empty."):
        assert sentence_of(name, sentence) == sentence
    whole = str(here / "models")
    assert sentence_of(whole, f"{whole}/x is empty.") == f"{whole}/x is empty."
