"""FLUX.2 from a Hub of our own: the right files, the licence and the size before them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner

from fluxmesh.cluster import hostfile as hostfiles
from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.errors import FluxmeshError, ModelNotFoundError, NotFetchedError, OutputError
from fluxmesh.models.files.kinds import FileContents
from fluxmesh.models.flux2.files.completion import Flux2Files
from fluxmesh.storage.homes import Home
from fluxmesh.weights import hub
from fluxmesh_coordinator.cli.models import models
from fluxmesh_coordinator.console.up_report import JsonWatcher
from fluxmesh_coordinator.deploy.bringup import Bringup, Wish
from fluxmesh_coordinator.runtime.resolved import ResolvedModel
from tests.flux2_checkpoint import make_flux2, make_single_file
from tests.hub_server import COMMITS, Hub, serving

KLEIN, DEV = "black-forest-labs/FLUX.2-klein-4B", "black-forest-labs/FLUX.2-dev"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with klein 4B and dev, each with its single file and more beside its folders."""
    state = Hub()
    for repo, kind in ((KLEIN, "klein"), (DEV, "dev")):
        folder = state.repos[repo] = tmp_path / kind
        make_flux2(folder, kind, text_length=None)  # type: ignore[arg-type]
        file = "flux-2-klein-4b" if kind == "klein" else "flux2-dev"
        make_single_file(folder, folder / f"{file}.safetensors")
        for extra in ("README.md", "teaser.png", "text_encoder/generation_config.json"):
            (folder / extra).write_bytes(b"x" * 1000)
        (folder / "tokenizer" / "chat_template.jinja").write_text("x")
    with serving(state, tmp_path / "cache", monkeypatch):
        yield state


def folders(names: list[str]) -> set[str]:
    return {name.rpartition("/")[0] for name in names}


@pytest.mark.parametrize("name", ["klein", "FLUX.2-klein-4B", KLEIN])
def test_an_alias_fetches_the_folders_and_no_single_file(server: Hub, name: str) -> None:
    checkpoint = hub.pull(name)
    assert (checkpoint.name, checkpoint.revision) == ("klein-4b", COMMITS[0])
    weights = [file for file in server.fetched if file.endswith(".safetensors")]
    assert folders(weights) == {"transformer", "text_encoder", "vae"} and len(weights) == 3
    assert set(server.fetched) - set(weights) == {
        *("model_index.json", "fluxmesh.json", "scheduler/scheduler_config.json"),
        *(f"{part}/config.json" for part in ("transformer", "text_encoder", "vae")),
        "tokenizer/tokenizer.json",
    }
    assert next(hub.preferred_here()).name == "klein-4b"
    server.fetched.clear()
    server.listing_status = 500
    assert hub.resolve("klein").content == checkpoint.content
    assert server.fetched == []


def test_size_room_and_licence_are_told_before_a_gated_model_comes(
    server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=400 * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    server.gated = True
    done = CliRunner().invoke(models, ["pull", "flux2-dev"])
    notice, size = done.stderr.splitlines()
    assert notice.startswith(f"{DEV} is under the licence FLUX Non-Commercial, for non-commercial")
    assert f"https://huggingface.co/{DEV}" in notice and "`hf auth login`" in notice
    assert size.startswith("flux2-dev is ") and size.endswith("cache has 400.0 GB free.")
    assert isinstance(done.exception, ModelNotFoundError) and server.fetched == []
    assert f"{DEV} is gated: accept its licence" in str(done.exception)
    server.gated = False
    done = CliRunner().invoke(models, ["pull", "flux2-dev", "--json"])
    before, after = map(json.loads, done.stdout.splitlines())
    assert (before["event"], before["free_bytes"]) == ("pulling", 400 * 10**9)
    assert before["notice"] == notice and before["bytes"] > after["bytes"] > 0


def test_a_prompt_that_needs_a_download_hears_of_the_licence_once(server: Hub) -> None:
    notes: list[str] = []
    for _ in range(2):  # the second time it is here
        model = ResolvedModel.for_mesh("flux2-dev", None, note=notes.append)
        assert (model.name, model.is_here) == ("flux2-dev", True)
    assert len(notes) == 1 and "non-commercial use alone" in notes[0]


def test_up_tells_the_licence_before_it_asks_for_a_download(server: Hub, tmp_path: Path) -> None:
    said: list[str] = []

    class Recording(JsonWatcher):
        def note(self, text: str) -> None:
            said.append(text)

        def may_pull(self, model: str, nbytes: int | None, free: Mapping[int, int]) -> bool:
            said.append(f"{model}, {nbytes} bytes, on {list(free)}?")
            return False

    hosts = hostfiles.parse('[{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}]')
    wish = Wish(hosts, "hosts.json", "", ModelVariant("flux2-dev"))
    with pytest.raises(FluxmeshError, match="flux2-dev is not on this machine"):
        Bringup(wish, Recording(pull=False), Home(tmp_path / "home")).run()
    assert "FLUX Non-Commercial" in said[0] and said[1].startswith("flux2-dev, ")


def test_a_disk_without_room_for_it_is_known_before_the_first_byte(
    server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match=f"{DEV} needs .* GB more"):
        hub.pull("flux2-dev")
    assert server.fetched == []


def test_an_open_model_is_told_without_a_gate(server: Hub) -> None:
    done = CliRunner().invoke(models, ["pull", "klein"])
    notice, size = done.stderr.splitlines()[:2]
    assert notice == f"{KLEIN} is under the licence Apache-2.0."
    assert re.match(r"klein is \d\.\d MB; .*cache has [\d.]+ GB free\.$", size)
    assert "klein is here: " in done.stdout


def test_bfl_s_file_by_path_gets_the_rest_from_its_model_s_repository(
    server: Hub, tmp_path: Path
) -> None:
    made = tmp_path / "klein" / "flux-2-klein-4b.safetensors"
    file = Path(shutil.copy(made, tmp_path / "my-klein.safetensors"))
    with pytest.raises(NotFetchedError, match=r"models pull .*my-klein.safetensors"):
        hub.resolve(str(file))
    assert server.fetched == []
    checkpoint = hub.pull(str(file))
    assert checkpoint.components["transformer"].files == (file,)
    assert folders(server.fetched) == {"text_encoder", "tokenizer", "vae"}
    assert checkpoint.components["vae"].layout == "diffusers"
    assert checkpoint.architecture.text_length == 512 and checkpoint.defaults.steps == 4


@pytest.mark.parametrize(
    ("width", "repo"), [(7680, "klein-4B"), (12288, "klein-9B"), (15360, "dev"), (96, "klein-4B")]
)
def test_a_transformer_s_width_says_whose_parts_it_takes(width: int, repo: str) -> None:
    file = FileContents(Path("x"), {"txt_in.weight": (64, width)}, {})
    parts = ["text_encoder", "tokenizer", "vae"]
    assert Flux2Files().sources(parts, file, "") == [
        (f"black-forest-labs/FLUX.2-{repo}", tuple(parts))
    ]


def test_a_repository_with_a_transformer_alone_borrows_the_rest(
    server: Hub, tmp_path: Path
) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(tmp_path / "klein" / "flux-2-klein-4b.safetensors", alone / "klein-art.safetensors")
    server.repos["someone/klein-art"] = alone
    checkpoint = hub.resolve("someone/klein-art")
    assert server.fetched[-1] == "klein-art.safetensors"
    assert folders(server.fetched) == {"", "text_encoder", "tokenizer", "vae"}
    assert checkpoint.kind == "bfl" and checkpoint.components["text_encoder"].layout == "diffusers"
