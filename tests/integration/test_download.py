"""Fetching from a Hub of our own on loopback: only what is needed, resumed, and every refusal."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fluxmesh.errors import ModelNotFoundError, OutputError, WeightsError
from fluxmesh.weights import download, hub
from tests.checkpoints import make_checkpoint
from tests.mac import mac, until

COMMITS = ("a" * 40, "b" * 40)
CUT = "transformer/diffusion_pytorch_model.safetensors"


@dataclass
class Hub:
    """What the server has, how it misbehaves, and what it was asked for."""

    repos: dict[str, Path] = field(default_factory=dict)
    commit: str = COMMITS[0]
    gated: bool = False
    listing_status: int = 200
    cut: int = 0  # times that the file CUT breaks off half-way
    sha256: str | None = None  # told instead of the true one
    fetched: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    hub: Hub  # set on a subclass for each server

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        listing = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.+)?", path)
        if listing:
            self.listing(listing[1])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(\w+)/(.+)", path):
            self.file(match[1], match[3])
        else:
            self.refuse(404, "")

    def listing(self, repo: str) -> None:
        if repo not in self.hub.repos:
            self.refuse(401, "RepoNotFound")
            return
        if self.hub.listing_status != 200:
            self.refuse(self.hub.listing_status, "")
            return
        root = self.hub.repos[repo]
        siblings = []
        for file in sorted(root.rglob("*")):
            if file.is_file():
                content = file.read_bytes()
                name = file.relative_to(root).as_posix()
                entry: dict[str, object] = {"rfilename": name, "size": len(content)}
                if file.suffix == ".safetensors":
                    digest = self.hub.sha256 or hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 100}
                siblings.append(entry)
        answer = {"id": repo, "modelId": repo, "sha": self.hub.commit, "siblings": siblings}
        self.answer(json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def file(self, repo: str, name: str) -> None:
        if self.hub.gated:
            self.refuse(401, "GatedRepo")
            return
        content = (self.hub.repos[repo] / name).read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": self.hub.commit, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        if self.command == "GET":
            self.hub.fetched.append(name)
            if wanted:
                self.hub.ranges.append(name)
        part = content[start:]
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if self.command == "GET" and name == CUT and self.hub.cut > 0:
            self.hub.cut -= 1
            self.answer(part, headers, 206 if wanted else 200, send=len(part) // 2)
            return
        self.answer(part, headers, 206 if wanted else 200)

    def answer(
        self, body: bytes, headers: dict[str, str], status: int = 200, send: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:send])
        if send is not None:  # hang up in the middle
            self.close_connection = True

    def refuse(self, status: int, code: str) -> None:
        self.answer(b"{}", {"X-Error-Code": code, "X-Error-Message": "refused"}, status)

    def log_message(self, *_: object) -> None:
        """Tests print nothing."""


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[Hub]:
    """A Hub with one model, and a machine whose cache is empty."""
    state = Hub({"black-forest-labs/FLUX.1-schnell": tmp_path / "repo"})
    make_checkpoint(tmp_path / "repo", shards=1)
    # what a real repository holds beside what FLUX needs
    for extra in ("README.md", "flux1-schnell.safetensors", "ae.safetensors", "vae/other.bin"):
        (tmp_path / "repo" / extra).write_bytes(b"x" * 1000)
    handler = type("Bound", (Handler,), {"hub": state})
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{http.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", state.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    for variable in ("AE", "FLUX_DEV", "FLUX_SCHNELL", "HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the library waits between retries
    yield state
    http.shutdown()
    http.server_close()


def sentence(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_only_the_files_that_flux_needs_are_fetched(server):
    checkpoint = hub.resolve("schnell")
    assert checkpoint.revision == COMMITS[0]
    assert len(server.fetched) == len(set(server.fetched))
    assert not any(name.endswith((".md", ".bin")) for name in server.fetched)
    assert not any(name in server.fetched for name in ("flux1-schnell.safetensors",))
    assert CUT in server.fetched
    for component in checkpoint.components.values():
        assert all(file.is_file() for file in component.files)


def test_progress_counts_the_bytes_of_the_model(server, tmp_path):
    progress: list[tuple[int, int]] = []
    hub.resolve("schnell", progress=lambda done, total: progress.append((done, total)))
    needed = download.needed_files(
        [p.relative_to(tmp_path / "repo").as_posix() for p in (tmp_path / "repo").rglob("*")]
    )
    total = sum((tmp_path / "repo" / name).stat().st_size for name in needed)
    assert progress[-1] == (total, total)
    done = [number for number, _ in progress]
    assert done == sorted(done)


def test_what_is_here_is_used_without_asking(server):
    hub.resolve("schnell")
    server.fetched.clear()
    server.listing_status = 500
    assert hub.resolve("schnell").revision == COMMITS[0]
    assert hub.default_model() == "schnell"
    assert server.fetched == []


def test_pulling_again_takes_the_newest_revision_and_only_what_changed(server, tmp_path):
    hub.resolve("schnell")
    server.commit = COMMITS[1]
    server.fetched.clear()
    make_checkpoint(tmp_path / "newer", seed=9)
    shutil.copy(tmp_path / "newer" / CUT, tmp_path / "repo" / CUT)
    assert hub.resolve("schnell").revision == COMMITS[0]
    assert hub.pull("schnell").revision == COMMITS[1]
    assert server.fetched == [CUT]
    assert hub.resolve("schnell").revision == COMMITS[1]


def test_the_command_says_what_came_and_how_large_it_is(server):
    from click.testing import CliRunner

    from fluxmesh_coordinator.cli.models import models

    done = CliRunner().invoke(models, ["pull", "schnell"])
    assert done.exit_code == 0, done.output
    assert f"schnell is here: 6.4 MB, revision {COMMITS[0]}." in done.stdout
    outcome = CliRunner().invoke(models, ["pull", "schnell", "--json"])
    line = json.loads(outcome.stdout)
    assert (line["event"], line["revision"]) == ("pulled", COMMITS[0])
    listed = CliRunner().invoke(models, ["list"])
    assert "schnell (default)" in listed.stdout


def test_a_connection_that_breaks_off_is_taken_up_where_it_stopped(server, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)  # of 10 MB: what is kept
    server.cut = 1
    checkpoint = hub.resolve("schnell")
    assert server.ranges == [CUT]
    (file,) = checkpoint.components["transformer"].files
    assert file.read_bytes() == (tmp_path / "repo" / CUT).read_bytes()


def test_a_download_that_failed_goes_on_at_the_next_call(server, tmp_path):
    server.cut = 100
    with pytest.raises(ModelNotFoundError) as caught:
        hub.resolve("schnell")
    assert "pull again" in sentence(caught)
    assert hub.default_model() == "tiny"
    server.cut = 0
    server.fetched.clear()
    (file,) = hub.resolve("schnell").components["transformer"].files
    assert file.read_bytes() == (tmp_path / "repo" / CUT).read_bytes()
    assert "model_index.json" not in server.fetched


def test_a_file_that_arrives_damaged_is_removed(server, tmp_path):
    server.sha256 = "0" * 64
    with pytest.raises(WeightsError) as caught:
        hub.resolve("schnell")
    assert "SHA-256" in sentence(caught)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    server.sha256 = None
    assert hub.resolve("schnell").revision == COMMITS[0]


def test_a_gated_model_without_a_token_says_how_to_get_it(server):
    server.gated = True
    with pytest.raises(ModelNotFoundError) as caught:
        hub.resolve("schnell")
    message = sentence(caught)
    assert "gated" in message
    assert "https://huggingface.co/black-forest-labs/FLUX.1-schnell" in message
    assert "hf auth login" in message


def test_a_model_that_the_hub_does_not_have_is_named(server):
    with pytest.raises(ModelNotFoundError) as caught:
        hub.resolve("nobody/nothing")
    assert "nobody/nothing" in sentence(caught)
    assert "spelling" in sentence(caught)


@pytest.mark.parametrize("status", [403, 500, 503])
def test_a_hub_that_refuses_is_quoted(server, status):
    server.listing_status = status
    with pytest.raises(ModelNotFoundError) as caught:
        hub.resolve("schnell")
    assert str(status) in sentence(caught)


def test_no_network_is_said_in_one_sentence(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(ModelNotFoundError) as caught:
        hub.resolve("schnell")
    assert "network" in sentence(caught)


@pytest.mark.parametrize("system", ["Darwin", "Linux"])
def test_too_small_a_disk_is_known_before_the_first_byte(server, monkeypatch, system):
    monkeypatch.setattr(download.platform, "system", lambda: system)
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError) as caught:
        hub.resolve("schnell")
    assert "free" in sentence(caught)
    assert "HF_HUB_CACHE" in sentence(caught)
    # Finder shows more: what it would clear by itself counts there.
    assert ("not what macOS would clear" in sentence(caught)) == (system == "Darwin")
    assert server.fetched == []


def test_a_disk_that_fills_up_on_the_way_is_said_in_one_sentence(server, monkeypatch):
    import huggingface_hub

    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    with pytest.raises(OutputError) as caught:
        hub.resolve("schnell")
    assert "disk is full" in sentence(caught)


def test_a_repository_without_flux_is_refused_before_a_byte_of_it(server, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "model-1.safetensors").write_bytes(b"x")
    (tmp_path / "text" / "model-2.safetensors").write_bytes(b"x")
    server.repos["someone/text"] = tmp_path / "text"
    with pytest.raises(ModelNotFoundError, match="neither"):
        hub.resolve("someone/text")
    assert server.fetched == []


def test_a_single_file_repository_borrows_the_text_encoders(server, tmp_path):
    made = make_checkpoint(tmp_path / "full", layout="bfl", seed=4)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(made.path, alone / "finetune.safetensors")
    server.repos["someone/finetune"] = alone
    checkpoint = hub.resolve("someone/finetune")
    assert checkpoint.kind == "bfl"
    assert checkpoint.revision == COMMITS[0]
    assert not any(name.startswith("transformer/") for name in server.fetched)
    assert checkpoint.components["vae"].layout == "diffusers"


def test_names_of_files_beside_the_weights_decide_nothing():
    files = ["model_index.json", "transformer/model.fp16.safetensors", "vae/model.safetensors"]
    files += ["text_encoder_2/model-00001-of-00002.safetensors"]
    files += ["text_encoder_2/model-00002-of-00002.safetensors"]
    files += ["text_encoder_2/model.safetensors.index.json", "text_encoder_2/model.safetensors"]
    assert set(download.needed_files(files)) == {
        "model_index.json",
        "vae/model.safetensors",
        "text_encoder_2/model.safetensors.index.json",
        "text_encoder_2/model-00001-of-00002.safetensors",
        "text_encoder_2/model-00002-of-00002.safetensors",
    }


def test_a_defect_is_not_told_as_a_broken_network(monkeypatch, tmp_path):
    def defective(*_args, **_kwargs):
        raise TypeError("model_info() got an unexpected keyword argument")

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", defective)
    with pytest.raises(TypeError, match="unexpected keyword"):
        hub.pull("someone/flux")


def test_a_mac_stays_awake_while_a_model_is_fetched(server, tmp_path, monkeypatch):
    a_mac = mac(tmp_path / "mac", monkeypatch)
    a_mac.caffeinate()
    hub.pull("schnell", lambda done, total: until(a_mac.is_awake))
    assert not a_mac.is_awake() and len(a_mac.caffeinated()) == 1
