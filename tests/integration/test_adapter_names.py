"""`--adapter` with names of the Hub: fetched as models are, from a Hub of our own on loopback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fluxmesh.adapters.find import HubAdapter, find_adapter, split_scale
from fluxmesh.adapters.reading import open_adapter
from fluxmesh.errors import ModelNotFoundError, OutputError, UsageError, WeightsError
from fluxmesh.request import AdapterRef, GenerateRequest
from fluxmesh.storage.safetensors import read_header
from fluxmesh.weights import download
from fluxmesh.weights.cache import hub_cache
from fluxmesh_coordinator.runtime.adapter_upload import by_hash
from tests import checkpoints
from tests.adapter_files import write
from tests.flux1_adapters import transformer_targets
from tests.integration.test_download import Hub, sentence, server

__all__ = ["server"]  # a fixture

FILE = {
    "transformer.x_embedder.lora_A.weight": np.ones((4, 64), np.float32),
    "transformer.x_embedder.lora_B.weight": np.ones((64, 4), np.float32),
}


def repository(server: Hub, folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, FILE, {"file": name})
    (folder / "README.md").write_text("an adapter")
    (folder / "picture.png").write_bytes(b"x" * 1000)
    server.repos["owner/repo"] = folder


def metadata_file(path: Path) -> str:
    return read_header(path).metadata["file"]


def test_a_repository_with_one_adapter_needs_no_more_than_its_name(server, tmp_path):
    repository(server, tmp_path / "a", "dog.safetensors")
    heard = []
    path = find_adapter("owner/repo", progress=lambda *seen: heard.append(seen))
    assert metadata_file(path) == "dog.safetensors" and server.fetched == ["dog.safetensors"]
    assert heard[-1][0] == heard[-1][1] == (tmp_path / "a" / "dog.safetensors").stat().st_size
    shutil.rmtree(tmp_path / "a")
    server.repos.clear()  # what is here is not asked for again
    assert find_adapter("owner/repo") == path == find_adapter("owner/repo:dog.safetensors")
    cached = hub_cache() / "models--owner--repo"
    assert find_adapter(cached) == path


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("owner/repo", "pytorch_lora_weights.safetensors"),
        ("owner/repo:more/cat.safetensors", "more/cat.safetensors"),
        ("https://huggingface.co/owner/repo", "pytorch_lora_weights.safetensors"),
        ("https://huggingface.co/owner/repo/tree/main", "pytorch_lora_weights.safetensors"),
        ("https://huggingface.co/owner/repo/blob/main/dog.safetensors", "dog.safetensors"),
        (
            "https://huggingface.co/owner/repo/resolve/main/more/cat.safetensors?download=true",
            "more/cat.safetensors",
        ),
        ("https://hf.co/owner/repo/blob/main/two%20dogs.safetensors", "two dogs.safetensors"),
    ],
)
def test_a_file_of_several_is_named_in_any_way_that_a_browser_or_a_user_has(
    server, tmp_path, name, file
):
    names = ("dog.safetensors", "two dogs.safetensors", "more/cat.safetensors")
    repository(server, tmp_path / "a", "pytorch_lora_weights.safetensors", *names)
    assert metadata_file(find_adapter(name)) == file
    assert server.fetched == [file]


def test_several_without_a_known_name_are_listed(server, tmp_path):
    repository(server, tmp_path / "a", "dog.safetensors", "cat.safetensors")
    with pytest.raises(ModelNotFoundError) as caught:
        find_adapter("owner/repo")
    text = sentence(caught)
    assert "cat.safetensors, dog.safetensors" in text and "owner/repo:cat.safetensors" in text
    with pytest.raises(ModelNotFoundError) as caught:
        find_adapter("owner/repo:bird.safetensors")
    assert "holds no bird.safetensors" in sentence(caught)
    assert server.fetched == []


def test_one_file_in_the_cache_is_not_taken_for_another(server, tmp_path):
    repository(server, tmp_path / "a", "dog.safetensors", "cat.safetensors")
    find_adapter("owner/repo:dog.safetensors")
    assert metadata_file(find_adapter("owner/repo:cat.safetensors")) == "cat.safetensors"


def test_a_peft_repository_comes_with_its_settings(server, tmp_path):
    folder = tmp_path / "a"
    repository(server, folder, "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 2}))
    path = find_adapter("owner/repo")
    assert sorted(server.fetched) == ["adapter_config.json", "adapter_model.safetensors"]
    targets = transformer_targets(checkpoints.TRANSFORMER)
    change = open_adapter(path, targets).change("transformer", "img_in")
    assert change.joined().scale == 0.5
    # On a mesh the settings travel in the file's own header.
    (named,), files = by_hash([AdapterRef("owner/repo")])
    sent = tmp_path / "sent.safetensors"
    sent.write_bytes(b"".join(files[named.path].pieces()))
    assert sent.stat().st_size == files[named.path].size
    assert open_adapter(sent, targets).change("transformer", "img_in").joined().scale == 0.5
    assert metadata_file(sent) == "adapter_model.safetensors"


def test_settings_of_one_file_are_not_anothers(server, tmp_path):
    folder = tmp_path / "a"
    repository(server, folder, "adapter_model.safetensors", "dog.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 2}))
    path = find_adapter("owner/repo:dog.safetensors")
    assert server.fetched == ["dog.safetensors"]
    targets = transformer_targets(checkpoints.TRANSFORMER)
    assert open_adapter(path, targets).change("transformer", "img_in").joined().scale == 1


# --- as models are fetched ----------------------------------------------------------------------


def test_a_download_that_broke_off_goes_on(server, tmp_path, monkeypatch):
    from huggingface_hub import constants

    from tests import hub_server

    repository(server, tmp_path / "a", "dog.safetensors")
    large = FILE | {"padding": np.zeros(1 << 20, np.float32)}  # more than comes at once
    write(tmp_path / "a" / "dog.safetensors", large, {"file": "dog.safetensors"})
    monkeypatch.setattr(hub_server, "CUT", "dog.safetensors")
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)  # of 10 MB: what is kept
    server.cut = 1
    assert metadata_file(find_adapter("owner/repo")) == "dog.safetensors"
    assert server.ranges == ["dog.safetensors"]


def test_a_damaged_file_is_removed(server, tmp_path):
    repository(server, tmp_path / "a", "dog.safetensors")
    server.sha256 = "0" * 64
    with pytest.raises(WeightsError, match="arrived damaged"):
        find_adapter("owner/repo")
    assert not list(hub_cache().rglob("*.safetensors"))


def test_what_the_hub_refuses_is_one_sentence(server, tmp_path, monkeypatch):
    repository(server, tmp_path / "a", "dog.safetensors")
    server.gated = True
    with pytest.raises(ModelNotFoundError, match="accept its licence"):
        find_adapter("owner/repo")
    with pytest.raises(ModelNotFoundError) as caught:
        find_adapter("owner/other")
    assert "no model owner/other" in sentence(caught)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    server.gated = False
    with pytest.raises(OutputError, match="needs"):
        find_adapter("owner/repo")
    (tmp_path / "a" / "dog.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match=r"holds no \.safetensors file"):
        find_adapter("owner/repo")


def test_without_a_network_the_cache_is_enough(server, tmp_path, monkeypatch):
    repository(server, tmp_path / "a", "dog.safetensors")
    find_adapter("owner/repo")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert find_adapter("owner/repo").name == "dog.safetensors"
    with pytest.raises(ModelNotFoundError, match="check the network"):
        find_adapter("owner/other")


# --- names and strengths ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "name", "strength"),
    [
        ("dog.safetensors", "dog.safetensors", 1.0),
        ("dog.safetensors:0.8", "dog.safetensors", 0.8),
        ("dog.safetensors@0.8", "dog.safetensors", 0.8),
        ("dog.safetensors@-1", "dog.safetensors", -1.0),
        ("owner/repo@.5", "owner/repo", 0.5),
        ("owner/repo:0.5", "owner/repo", 0.5),
        ("owner/repo:dog.safetensors", "owner/repo:dog.safetensors", 1.0),
        ("owner/repo:dog.safetensors@0.5", "owner/repo:dog.safetensors", 0.5),
        ("owner/repo:dog.safetensors:0.5", "owner/repo:dog.safetensors", 0.5),
        ("https://huggingface.co/owner/repo@2", "https://huggingface.co/owner/repo", 2.0),
        ("me@home/dog.safetensors", "me@home/dog.safetensors", 1.0),
    ],
)
def test_a_strength_stands_behind_any_name(value, name, strength):
    assert split_scale(value) == (name, strength)


def test_a_path_that_exists_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("dog@0.5", "dog:0.5"):
        (tmp_path / name).write_bytes(b"x")
        assert split_scale(name) == (name, 1.0)
        assert find_adapter(name) == Path(name)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "repo").write_bytes(b"x")
    assert find_adapter("owner/repo") == Path("owner/repo")


@pytest.mark.parametrize("value", ["@0.5", ":1", "dog@nan", "dog:inf"])
def test_a_strength_of_nothing_and_one_that_is_not_finite_are_none(value):
    with pytest.raises(ValueError, match=value.partition("@")[0] or "0.5"):
        split_scale(value)


@pytest.mark.parametrize(
    "name",
    ["owner/repo:../../secret.safetensors", "owner/repo:/etc/passwd", "a/b/c", "../repo", "owner"],
)
def test_no_name_leads_out_of_the_cache(name):
    assert HubAdapter.of(name) is None
    with pytest.raises(ModelNotFoundError):
        find_adapter(name)


def test_addresses_elsewhere_are_told():
    with pytest.raises(ModelNotFoundError, match="no address of a repository or file"):
        find_adapter("https://civitai.com/models/123")


# --- in Python ----------------------------------------------------------------------------------


def test_adapters_of_a_request_may_be_names_and_pairs():
    asked = GenerateRequest("a dog", 1, adapters=["a.safetensors", ("b.safetensors", 0.5)])
    assert asked.adapters == (AdapterRef("a.safetensors"), AdapterRef("b.safetensors", 0.5))
    assert GenerateRequest("a", 1, adapters=[AdapterRef("c"), Path("d")]).adapters[1].path == "d"


@pytest.mark.parametrize("wrong", ["a.safetensors", [("a", "much")], [3], 5, [("a", 1, 2)]])
def test_what_is_no_adapter_is_one_sentence(wrong):
    with pytest.raises(UsageError, match="`adapters`") as caught:
        GenerateRequest("a dog", 1, adapters=wrong)
    assert "\n" not in str(caught.value)
