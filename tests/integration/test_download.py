"""Fetching from a Hub of our own on loopback: only what is needed, resumed, and every refusal."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fluxmesh.errors import ModelNotFoundError, NotFetchedError, OutputError, WeightsError
from fluxmesh.models.flux1.family import FLUX1
from fluxmesh.models.flux1.files.completion import VOCABULARIES
from fluxmesh.weights import download, hub
from tests.checkpoints import make_checkpoint, write_safetensors
from tests.hub_server import COMMITS, CUT, Hub, serving
from tests.mac import mac, until
from tests.wild_layouts import mflux, variant


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[Hub]:
    """A Hub with one model, and a machine whose cache is empty."""
    state = Hub({"black-forest-labs/FLUX.1-schnell": tmp_path / "repo"})
    make_checkpoint(tmp_path / "repo", shards=1)
    # what a real repository holds beside what FLUX needs
    for extra in ("README.md", "flux1-schnell.safetensors", "ae.safetensors", "vae/other.bin"):
        (tmp_path / "repo" / extra).write_bytes(b"x" * 1000)
    with serving(state, tmp_path / "cache", monkeypatch):
        yield state


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
        [p.relative_to(tmp_path / "repo").as_posix() for p in (tmp_path / "repo").rglob("*")],
        FLUX1.folder,
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
    assert next(hub.preferred_here()).name == "schnell"
    assert server.fetched == []


def test_pulling_again_takes_the_newest_revision_and_only_what_changed(server, tmp_path):
    hub.resolve("schnell")
    server.commit = COMMITS[1]
    server.fetched.clear()
    make_checkpoint(tmp_path / "newer", seed=9)
    shutil.copy(tmp_path / "newer" / CUT, tmp_path / "repo" / CUT)
    before = hub.resolve("schnell")
    assert before.revision == COMMITS[0] and before.stamps.changed is None
    assert hub.pull("schnell").revision == COMMITS[1]
    assert server.fetched == [CUT]
    assert hub.resolve("schnell").revision == COMMITS[1]
    assert before.stamps.changed is not None  # whoever has it in memory reads it anew
    after = hub.resolve("schnell")
    assert after.stamps.changed is None
    hub.pull("schnell")  # nothing newer is there
    assert after.stamps.changed is None


def test_the_command_says_what_came_and_how_large_it_is(server):
    from click.testing import CliRunner

    from fluxmesh_coordinator.cli.models import models

    done = CliRunner().invoke(models, ["pull", "schnell"])
    assert done.exit_code == 0, done.output
    assert f"schnell is here: 6.4 MB, revision {COMMITS[0]}." in done.stdout
    outcome = CliRunner().invoke(models, ["pull", "schnell", "--json"])
    before, line = map(json.loads, outcome.stdout.splitlines())
    assert before["event"] == "pulling" and before["bytes"] > line["bytes"]  # with small files
    assert (line["event"], line["revision"]) == ("pulled", COMMITS[0])
    listed = CliRunner().invoke(models, ["list"])
    (row,) = (row for row in listed.stdout.splitlines() if row.startswith("schnell"))
    assert row.rstrip().endswith("here, default")


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
    assert next(hub.preferred_here()).name == "tiny"
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


def finetune(server: Hub, folder: Path) -> Path:
    """A repository with a transformer alone; its file."""
    made = make_checkpoint(folder / "full", layout="bfl", seed=4)
    alone = folder / "alone"
    alone.mkdir()
    shutil.copy(made.path, alone / "finetune.safetensors")
    server.repos["someone/finetune"] = alone
    return alone / "finetune.safetensors"


def test_a_single_file_repository_borrows_the_text_encoders(server, tmp_path):
    finetune(server, tmp_path)
    progress: list[tuple[int, int]] = []
    checkpoint = hub.resolve("someone/finetune", progress=lambda *now: progress.append(now))
    # what all of it takes is told from the first byte on, and the borrowed parts come first
    assert len({total for _, total in progress}) == 1 and progress[-1][0] == progress[-1][1]
    assert server.fetched[-1] == "finetune.safetensors"
    assert server.heads == ["finetune.safetensors"]
    assert checkpoint.kind == "bfl"
    assert checkpoint.revision == COMMITS[0]
    assert not any(name.startswith("transformer/") for name in server.fetched)
    assert checkpoint.components["vae"].layout == "diffusers"


def test_a_file_of_ones_own_fetches_nothing_until_pull_is_asked(server, tmp_path):
    file = finetune(server, tmp_path)
    with pytest.raises(NotFetchedError) as caught:
        hub.resolve(str(file))
    assert f"fluxmesh models pull {file}" in sentence(caught)
    assert server.fetched == [] and not (tmp_path / "cache").exists()
    checkpoint = hub.pull(str(file))
    assert checkpoint.components["transformer"].files == (file,)
    assert not any(name.startswith("transformer/") for name in server.fetched)
    server.fetched.clear()
    assert hub.pull(str(file)).content == checkpoint.content == hub.resolve(str(file)).content
    assert server.fetched == []


def test_files_that_lack_vocabularies_alone_fetch_those_and_no_more(server, tmp_path):
    made = make_checkpoint(tmp_path / "full", layout="bfl", seed=4)
    for repo, part in VOCABULARIES.items():
        folder = shutil.move(made.folder / part, tmp_path / part)
        (folder / "pytorch_model.bin").write_bytes(b"x" * 1000)
        server.repos[repo] = Path(folder)
    with pytest.raises(NotFetchedError, match="No tokenizers"):
        hub.resolve(str(made.path))
    checkpoint = hub.pull(str(made.path))
    assert set(server.fetched) == {
        *("vocab.json", "merges.txt", "spiece.model", "tokenizer_config.json"),
    }
    assert checkpoint.tokenizers["clip"].parents[1].name == "models--openai--clip-vit-large-patch14"


def test_what_a_repository_lacks_is_told_before_a_byte_of_it(server, tmp_path):
    for missing in ("vae/diffusion_pytorch_model.safetensors", "tokenizer_2/spiece.model"):
        (tmp_path / "repo" / missing).unlink()
    with pytest.raises(ModelNotFoundError) as caught:
        hub.pull("schnell")
    message = sentence(caught)
    assert "vae/" in message and "tokenizer_2/spiece.model" in message
    assert "models pull" not in message  # it was just that
    assert server.fetched == ["model_index.json"] and server.heads == []  # whose model it is
    assert next(hub.preferred_here()).name == "tiny"


def test_another_family_of_models_is_told_by_its_name_and_not_by_what_it_lacks(server, tmp_path):
    (tmp_path / "repo" / "model_index.json").write_text('{"_class_name": "Flux3Pipeline"}')
    shutil.rmtree(tmp_path / "repo" / "text_encoder_2")
    with pytest.raises(ModelNotFoundError) as caught:
        hub.pull("schnell")
    message = sentence(caught)
    assert message.startswith("black-forest-labs/FLUX.1-schnell holds a Flux3Pipeline")
    assert server.fetched == ["model_index.json"]


@pytest.mark.parametrize("problem", ["other sizes", "quantized by others"])
def test_weights_of_the_wrong_shape_are_told_before_any_is_fetched(
    server, tmp_path, monkeypatch, problem
):
    monkeypatch.setattr(download, "WORTH_ASKING", 0)
    if problem == "other sizes":
        config = tmp_path / "repo" / "text_encoder_2" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"d_ff": 4321}))
    else:
        key = "x_embedder.weight.quant_state.bitsandbytes__nf4"
        write_safetensors(tmp_path / "repo" / CUT, {key: np.zeros(4)})
    with pytest.raises(WeightsError, match="4321|bitsandbytes"):
        hub.pull("schnell")
    assert server.heads and not any(name.endswith(".safetensors") for name in server.fetched)


def test_headers_are_asked_for_where_the_server_sends_all(server, monkeypatch):
    """A mirror that knows no ranges answers with the whole file: the beginning is read."""
    monkeypatch.setattr(download, "WORTH_ASKING", 0)
    server.knows_ranges = False
    assert hub.pull("schnell").revision == COMMITS[0]


def test_a_repository_of_another_kind_of_file_is_told_by_what_it_is(server, tmp_path):
    (tmp_path / "lora").mkdir()
    key = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
    write_safetensors(tmp_path / "lora" / "pytorch_lora_weights.safetensors", {key: np.zeros(9)})
    server.repos["someone/lora"] = tmp_path / "lora"
    with pytest.raises(ModelNotFoundError) as caught:
        hub.resolve("someone/lora")
    message = sentence(caught)
    assert message.startswith("someone/lora: pytorch_lora_weights.safetensors is an adapter (LoRA)")
    assert server.fetched == []


def test_a_repository_with_several_transformers_names_them(server, tmp_path):
    file = finetune(server, tmp_path)
    shutil.copy(file, file.with_name("second.safetensors"))
    with pytest.raises(ModelNotFoundError, match="finetune.safetensors, second.safetensors"):
        hub.resolve("someone/finetune")
    assert server.fetched == []


def test_a_repository_of_gguf_files_says_how_to_fetch_one(server, tmp_path):
    folder = tmp_path / "blocks"
    folder.mkdir()
    for form in ("Q4_0", "Q8_0"):
        (folder / f"flux1-dev-{form}.gguf").write_bytes(b"GGUF")
    server.repos["someone/blocks"] = folder
    with pytest.raises(ModelNotFoundError) as caught:
        hub.resolve("someone/blocks")
    message = sentence(caught)
    assert "holds GGUF files (flux1-dev-Q4_0.gguf, flux1-dev-Q8_0.gguf)" in message
    assert "`hf download someone/blocks FILE`" in message
    assert server.fetched == []


def test_a_model_that_mflux_saved_is_fetched_from_the_hub(server, tmp_path):
    server.repos["someone/mflux"] = mflux(tmp_path / "mflux", 8)
    checkpoint = hub.resolve("someone/mflux")
    assert (checkpoint.kind, checkpoint.bits, checkpoint.revision) == ("mflux", 8, COMMITS[0])
    listed = {model.name: model for model in hub.list_models()}
    assert listed["someone/mflux"].revision == COMMITS[0]


def test_a_variant_is_fetched_where_nothing_plainer_is(server, tmp_path):
    server.repos["someone/variant"] = variant(tmp_path / "variant", "bf16", 3)
    checkpoint = hub.resolve("someone/variant")
    assert len(checkpoint.components["transformer"].files) == 3
    assert all(".bf16" in file.name for file in checkpoint.components["vae"].files)


def test_names_of_files_beside_the_weights_decide_nothing():
    files = ["model_index.json", "transformer/notes.safetensors", "vae/model.safetensors"]
    files += ["vae/model.fp16.safetensors", "vae/pytorch_model.bin", "vae/._model.safetensors"]
    files += ["text_encoder_2/model-00001-of-00002.safetensors"]
    files += ["text_encoder_2/model-00002-of-00002.safetensors"]
    files += ["text_encoder_2/model.safetensors.index.json", "text_encoder_2/model.safetensors"]
    assert set(download.needed_files(files, FLUX1.folder)) == {
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
