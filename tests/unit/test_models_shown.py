"""`models show` and `models rm`: what is told of a model, and that nothing else is removed."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from fluxmesh.errors import FluxmeshError, ModelNotFoundError, UsageError
from fluxmesh.weights import hub
from fluxmesh.weights.embedded.checkpoints import embedded_names
from fluxmesh.weights.embedded.words import THINGS, known_words, unknown_words
from fluxmesh_coordinator.cli import cli
from fluxmesh_coordinator.commands import models
from fluxmesh_coordinator.console import models_table
from fluxmesh_coordinator.runtime.model_list import listed
from tests.checkpoints import make_checkpoint
from tests.flux2_checkpoint import make_flux2
from tests.paths import ROOT

TINY = hub.tiny_folder()


def run(*words: str, answer: str | None = None) -> Result:
    return CliRunner().invoke(cli, ["models", *words], input=answer)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub's cache with a repository of 3000 bytes, and another one."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for repo in ("black-forest-labs--FLUX.1-dev", "someone--flux-fine"):
        folder = tmp_path / "hub" / f"models--{repo}"
        (folder / "blobs").mkdir(parents=True)
        (folder / "blobs" / "aa").write_bytes(bytes(2993))
        (folder / "snapshots" / "0123456").mkdir(parents=True)
        (folder / "snapshots" / "0123456" / "x").symlink_to("../../blobs/aa")
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0123456")
        (tmp_path / "hub" / ".locks" / f"models--{repo}").mkdir(parents=True)
    return tmp_path / "hub"


def names(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("models--*"))


def test_a_model_that_is_removed_is_gone_and_no_other_is(cache: Path) -> None:
    done = run("rm", "dev", "--yes", "--json")
    line = json.loads(done.output)
    assert (done.exit_code, line["event"], line["bytes"]) == (0, "removed", 3000)
    assert names(cache) == ["models--someone--flux-fine"] * 2  # its locks too
    assert run("rm", "someone/flux-fine", "-y").output.startswith("someone/flux-fine is removed")
    assert names(cache) == []


def test_nobody_is_robbed_without_being_asked(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = names(cache)
    assert "Give --yes" in str(run("rm", "dev").exception)
    assert "Give --yes" in str(run("rm", "dev", "--json").exception)
    monkeypatch.setattr("fluxmesh_coordinator.cli.models.is_asked", lambda: True)
    asked = run("rm", "dev", answer="n\n")
    assert asked.exit_code == 1 and "Remove dev, 0.0 MB in " in asked.output
    assert names(cache) == before
    assert run("rm", "dev", answer="y\n").exit_code == 0
    assert names(cache) != before


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("tiny", "part of fluxmesh itself"),
        ("schnell", "not in the Hub's cache"),
        ("schnel", "did you mean schnell"),
        ("owner/../..", "No model is called"),
        ("../hub", "a path of your own"),
        ("folder", "a path of your own"),
    ],
)
def test_nothing_outside_of_the_cache_is_removed(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: str
) -> None:
    (tmp_path / "work" / "folder").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    before = names(cache)
    with pytest.raises(FluxmeshError, match=error):
        models.removable(name)
    assert names(cache) == before


def test_a_link_to_another_disk_is_left_to_its_owner(cache: Path, tmp_path: Path) -> None:
    (cache / "models--a--b").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="is a link to"):
        models.removable("a/b")


def test_a_removal_that_is_broken_off_leaves_no_model(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_path: object, **_more: object) -> None:
        raise PermissionError(13, "Permission denied", "/x")

    monkeypatch.setattr("shutil.rmtree", fail)
    with pytest.raises(FluxmeshError, match="/x can't be removed: Permission denied"):
        models.remove(models.removable("dev"))
    assert hub.cached_snapshot("black-forest-labs/FLUX.1-dev") is None
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    models.remove(models.removable("dev"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with klein and, not whole, schnell in the Hub's cache; the latter's folder."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("FLUXMESH_STATE", str(tmp_path / "state"))
    for variable in ("AE", "FLUX_DEV", "FLUX_SCHNELL"):
        monkeypatch.delenv(variable, raising=False)

    def snapshot(repo: str) -> Path:
        folder = tmp_path / "hub" / f"models--black-forest-labs--{repo}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0123456")
        return folder / "snapshots" / "0123456"

    make_flux2(snapshot("FLUX.2-klein-4B"))
    part = make_checkpoint(snapshot("FLUX.1-schnell")).folder
    next((part / "vae").glob("*.safetensors")).unlink()
    return part


def test_the_list_tells_programs_all_there_is_to_choose_by(here: Path) -> None:
    lines = [json.loads(line) for line in run("list", "--json").output.splitlines()]
    listed = {line["name"]: line for line in lines}
    first = [line["name"] for line in lines][: len(embedded_names()) + 3]
    assert first == [*embedded_names(), "klein-9b", "klein-9b-kv", "klein-4b"]
    klein, dev, schnell = listed["klein-4b"], listed["flux2-dev"], listed["schnell"]
    assert klein["default"] and klein["usable"] and klein["revision"] == "0123456"
    assert (klein["licence"], klein["commercial"], klein["gated"]) == ("Apache-2.0", True, False)
    assert (klein["family"], klein["steps"], klein["download_bytes"]) == ("FLUX.2", 2, 16 * 10**9)
    files = (here.parents[2]).glob("models--black-forest-labs--FLUX.2-klein-4B/**/*.safetensors")
    assert klein["bytes"] == sum(path.stat().st_size for path in files)
    assert {"klein", "black-forest-labs/FLUX.2-klein-4B"} <= set(klein["also"])
    assert (dev["commercial"], dev["gated"], dev["usable"]) == (False, True, False)
    assert dev["download_bytes"] > 100e9 and dev["bytes"] == 0 and dev["steps"] == 50
    assert {"mask", "adapters"} <= set(dev["takes"])
    assert "negative prompt" in listed["klein-base-4b"]["takes"]
    assert "negative prompt" not in klein["takes"]
    assert not schnell["usable"] and "missing" in schnell["note"] and schnell["gated"]


def test_the_list_is_read_in_80_columns(here: Path) -> None:
    screens = {}
    for width in (80, 160):
        console = Console(file=io.StringIO(), width=width)
        models_table.show(list(listed()), console)
        screens[width] = console.file.getvalue().splitlines()
    narrow, wide = screens[80], screens[160]
    rows = {line.split()[0]: line for line in narrow}
    assert max(len(line) for line in narrow if not line.startswith("schnell can't")) <= 80
    assert rows["klein-4b"].split()[-2:] == ["here,", "default"]
    assert " 113 GB  non-commercial, gated     50  r m - - a" in rows["flux2-dev"]
    assert rows["flux2-dev"].rstrip().endswith("to fetch")
    assert "takes: r references, m mask, c control, n negative prompt, a adapters" in narrow
    assert any(line.startswith("schnell can't be used: ") for line in narrow)
    row = next(line for line in wide if line.startswith("flux2-dev"))
    assert "FLUX Non-Commercial, gated" in row and "mask" in row and "adapters" in row


def test_show_tells_what_a_model_is(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model").path
    about = json.loads(run("show", str(path), "--json").output)
    files = [file for file in path.rglob("*.safetensors") if file.is_file()]
    assert about["bytes"] == sum(file.stat().st_size for file in files)
    assert sum(about["components"].values()) == about["bytes"]
    assert about["folder"] == str(path.resolve()) and "things" not in about
    assert "4 steps" in run("show", "tiny").output
    with pytest.raises(ModelNotFoundError):
        models.description("nobody/nothing")


def test_show_lists_what_tiny_paints() -> None:
    about = json.loads(run("show", "tiny", "--json").output)
    assert len(about["things"]) == 90 and len(about["backgrounds"]) == 12
    shown = " ".join(run("show", "tiny").output.split())
    for phrase in ("red apple (apple)", "teddy bear", "purple", "white (in the snow)"):
        assert phrase in shown


def test_show_tells_how_the_embedded_models_are_asked() -> None:
    """Edits of those alone that take references."""
    tiny, klein = (json.loads(run("show", name, "--json").output) for name in embedded_names())
    assert tiny["prompts"] == klein["prompts"] and "edits" not in tiny
    shown = run("show", "tiny-klein").output
    for phrase in (*klein["prompts"], *klein["edits"], *klein["edits_of_two"]):
        assert f"    {phrase}\n" in shown
    assert "on the left" in shown and all(len(line) <= 78 for line in shown.split("\n")[3:])
    assert "--reference" not in run("show", "tiny").output


def test_the_things_are_those_that_tiny_was_trained_on() -> None:
    """Each in its order: what training holds back is drawn from the numbers."""
    text = (ROOT / "tools" / "tiny" / "scenes.py").read_text(encoding="utf-8")
    glyphs = re.search(r"^GLYPHS = \{(.*?)^\}", text, re.DOTALL | re.MULTILINE)
    assert glyphs
    assert re.findall(r'^    "([^"]+)":', glyphs[1], re.MULTILINE) == list(THINGS)


def test_every_word_of_a_thing_is_known_and_others_are_not() -> None:
    every = " ".join(known_words())
    assert unknown_words(every, TINY) == []
    assert unknown_words("A photo of an astronaut riding a horse on Mars.", TINY) == []
    prompt = "Two Hyenas with a spoon, and the spoon is on an appel"
    assert unknown_words(prompt, TINY) == ["hyenas", "spoon", "appel"]
    assert unknown_words("a ct by a tree, as it is", TINY) == ["ct"]
    assert unknown_words("the 2nd of my dogs; it's 4k, I've seen it", TINY) == ["seen"]
