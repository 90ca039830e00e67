"""What a model is called: aliases, addresses, names that are misspelt or lead nowhere."""

from __future__ import annotations

import re
import sys

import pytest

from fluxmesh.errors import (
    ModelNotFoundError,
    NoSuchNameError,
    NotFetchedError,
)
from fluxmesh.weights import hub
from tests.checkpoints import make_checkpoint


@pytest.mark.parametrize(
    ("alias", "names"),
    [
        ("schnell", ("schnell", "flux-schnell", "FLUX-Schnell", "FLUX.1-schnell", "flux1-schnell")),
        ("dev", ("dev", "FLUX.1-dev", "black-forest-labs/FLUX.1-dev")),
        ("krea-dev", ("krea-dev", "flux1-krea-dev", "FLUX.1-Krea-dev")),
        ("klein-4b", ("klein", "klein-4b", "flux2-klein-4b", "flux-2-klein-4b", "FLUX.2-klein-4B")),
        ("klein-4b", ("black-forest-labs/FLUX.2-klein-4B", "black-forest-labs/flux.2-klein-4b")),
        ("klein-9b", ("klein-9b", "flux2-klein-9b", "FLUX.2-klein-9B")),
        ("klein-9b-kv", ("klein-9b-kv", "flux-2-klein-9b-kv", "FLUX.2-klein-9b-kv")),
        ("klein-base-4b", ("klein-base", "klein-base-4b", "FLUX.2-klein-base-4B")),
        ("klein-base-9b", ("klein-base-9b", "flux2-klein-base-9b")),
        ("flux2-dev", ("flux2-dev", "flux-2-dev", "FLUX.2-dev", "black-forest-labs/FLUX.2-dev")),
    ],
)
def test_a_model_has_several_spellings(alias, names, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fluxmesh.weights.download", None)  # importing it would fail
    monkeypatch.chdir(tmp_path)
    for name in names:
        assert (hub.alias_of(name), hub.full_name(name)) == (alias, alias)
        hub.check_name(name)
        with pytest.raises(NotFetchedError, match=f"models pull {alias}`"):
            hub.resolve(name, download=False)


@pytest.mark.parametrize("name", ["flux", "klein-4b.safetensors", "other/FLUX.2-dev", "2-dev", ""])
def test_what_no_model_is_called_is_no_alias(name):
    assert hub.alias_of(name) is None


def test_a_folder_here_goes_before_the_long_spelling_of_an_alias(tmp_path, monkeypatch):
    """As `hf download` with a folder of the repository's own name leaves it."""
    made = make_checkpoint(tmp_path / "FLUX.2-klein-4B").folder
    make_checkpoint(tmp_path / "black-forest-labs" / "FLUX.1-dev")
    monkeypatch.chdir(tmp_path)
    assert hub.full_name("FLUX.2-klein-4B") == str(made)
    assert hub.resolve("FLUX.2-klein-4B").revision.startswith("local-")
    assert hub.resolve("black-forest-labs/FLUX.1-dev").revision.startswith("local-")


def test_a_name_is_full_as_resolve_reads_it(tmp_path, monkeypatch):
    """A folder that happens to be called like a model changes nothing."""
    for folder in ("tiny", "dev", "mine"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path)
    assert [hub.full_name(name) for name in ("tiny", "flux-Dev", "FLUX-schnell")] == [
        "tiny",
        "dev",
        "schnell",
    ]
    assert hub.full_name("mine") == str(tmp_path / "mine")
    assert hub.full_name("someone/flux") == "someone/flux"


def test_no_name_is_not_this_folder(tmp_path, monkeypatch):
    make_checkpoint(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve(".").kind == "diffusers"
    with pytest.raises(NoSuchNameError, match="No model is called ''"):
        hub.resolve("")


def test_a_folder_of_an_owners_name_hides_no_repository(tmp_path, monkeypatch):
    """What is not nearly the name of something there, the Hub is asked for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "black-forest-labs" / "FLUX.2-dev").mkdir(parents=True)
    for name in ("black-forest-labs/FLUX.1-dev", "black-forest-labs/other"):
        hub.check_name(name)
        with pytest.raises(ModelNotFoundError, match="is not on this machine"):
            hub.resolve(name, download=False)


@pytest.mark.parametrize(
    "name",
    [
        "nonesuch",
        "../../etc/passwd",
        "owner/../repo",
        "a/b/c",
        "owner/repo/../..",
        "-owner/repo",
        "owner/repo--x",
        "",
        "\0/x",
        "~nobody-of-this-name/x",
        "x" * 5000,
    ],
)
def test_a_name_that_leads_nowhere_is_refused_without_asking_the_network(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "fluxmesh.weights.download", None)  # importing it would fail
    with pytest.raises(ModelNotFoundError) as caught:
        hub.resolve(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("schnel", "schnell"),
        ("TINNY", "tiny"),
        ("my-modle", "my-model"),
        ("models/dev-4bti", "models/dev-4bit"),
        ("./my-modle", "./my-model"),
    ],
)
def test_a_misspelt_name_is_told_with_the_one_that_was_meant(name, meant, tmp_path, monkeypatch):
    """Also where it could be a Hub id: a folder that is here is looked at first."""
    monkeypatch.setitem(sys.modules, "fluxmesh.weights.download", None)  # importing it would fail
    monkeypatch.chdir(tmp_path)
    for folder in ("my-model", "models/dev-4bit"):
        (tmp_path / folder).mkdir(parents=True)
    for ask in (hub.resolve, hub.check_name):
        with pytest.raises(ModelNotFoundError, match=rf"did you mean {re.escape(meant)}\?"):
            ask(name)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("https://huggingface.co/owner/repo", "owner/repo"),
        ("https://huggingface.co/owner/re.po/blob/main/flux1-dev.safetensors", "owner/re.po"),
        ("hf.co/owner/repo?x=1", "owner/repo"),
        ("owner/repo/", "owner/repo"),
        ("file:///my%20models/flux", "/my models/flux"),
    ],
)
def test_an_address_is_told_with_the_name_that_it_stands_for(name, meant, monkeypatch):
    monkeypatch.setitem(sys.modules, "fluxmesh.weights.download", None)
    for ask in (hub.resolve, hub.check_name):
        with pytest.raises(NoSuchNameError, match=rf"did you mean {re.escape(meant)}\?"):
            ask(name)


def test_what_stands_in_the_place_of_a_file_is_told(tmp_path, monkeypatch):
    """Also where the name could be a Hub id, which nobody is asked for."""
    monkeypatch.setitem(sys.modules, "fluxmesh.weights.download", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "flux").symlink_to("/Volumes/T7/flux")
    (tmp_path / "models" / "loop").symlink_to("loop")
    (tmp_path / "models" / ".dev.safetensors.icloud").write_bytes(b"bplist00")
    (tmp_path / "models" / "schnell.safetensors.crdownload").write_bytes(b"x")
    for name, said in (
        ("models/flux", "models/flux is a link to /Volumes/T7/flux, where nothing is; connect"),
        ("models/flux/transformer", "models/flux/transformer is behind models/flux, a link to"),
        ("models/loop", "a link to loop"),
        ("models/dev.safetensors", ".dev.safetensors.icloud, which iCloud keeps elsewhere"),
        ("models/schnell.safetensors", "schnell.safetensors.crdownload, a download that has not"),
    ):
        for ask in (hub.resolve, hub.check_name):
            with pytest.raises(NoSuchNameError, match=re.escape(said)):
                ask(name)
