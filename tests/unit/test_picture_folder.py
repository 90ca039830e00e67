"""Pictures of a server, and what it remembers of jobs: across a restart, and under attack."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL.PngImagePlugin import PngImageFile

from fluxmesh.errors import FluxmeshError, OutputError
from fluxmesh.storage.homes import HomeError
from fluxmesh_coordinator.artifacts.pictures import encode_png
from fluxmesh_coordinator.server import picture_folder
from fluxmesh_coordinator.server.faces.openapi import RECIPE
from fluxmesh_coordinator.server.paint_request import PaintRequest
from fluxmesh_coordinator.server.picture_folder import NoSuchPictureError, PictureFolder
from fluxmesh_coordinator.server.queue import journal as journal_module
from fluxmesh_coordinator.server.queue.journal import JobRecord, Journal
from tests.serving import Serving, record


def ids(records: Sequence[JobRecord]) -> list[str]:
    return [each.id for each in records]


DATA = encode_png(np.zeros((16, 32, 3), np.uint8), None)


def test_pictures_are_listed_newest_first_and_by_pages(tmp_path: Path) -> None:
    folder = PictureFolder(tmp_path / "new" / "pictures")
    names = [folder.commit(f"job-{k}", 1_700_000_000.25 + k, 0, DATA) for k in range(5)]
    assert names[0].startswith("20231114-221320-250-")
    first, after = folder.newest(3)
    assert [picture.name for picture in first] == names[:1:-1] and after == names[2]
    rest, after = folder.newest(3, after)
    assert [picture.name for picture in rest] == names[1::-1] and after == ""
    assert (first[0].width, first[0].height) == (32, 16)
    assert first[0].created == "2023-11-14T22:13:24.250Z"


def test_a_list_unpacks_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = PictureFolder(tmp_path)
    folder.commit("job", 1e9, 0, encode_png(np.zeros((16, 32, 3), np.uint8), '{"a": 1}'))

    def unpack(_self: object) -> None:
        raise AssertionError

    monkeypatch.setattr(PngImageFile, "load", unpack)
    recipes: list[str] = []

    def note(text: str) -> dict[str, str]:
        recipes.append(text)
        return {}

    monkeypatch.setattr(picture_folder, "_recipe", note)
    assert len(folder.newest(1)[0]) == 1 and recipes == ['{"a": 1}']


def test_a_job_s_pictures_stand_in_the_order_of_its_images(tmp_path: Path) -> None:
    folder = PictureFolder(tmp_path)
    names = [folder.commit("a-job", 1e9, image, DATA) for image in (10, 2, 0)]
    folder.commit("another", 1e9, 1, DATA)
    assert folder.of_job("a-job", 1e9, 11) == {0: names[2], 2: names[1], 10: names[0]}
    assert folder.of_job("a-job", 1e9 + 1, 11) == {}
    with pytest.raises(OutputError, match="already"):
        folder.commit("a-job", 1e9, 2, DATA)


@pytest.mark.parametrize(
    "name",
    ["../secret.png", "/etc/passwd", "secret.png", "", ".", "a\0b", "20231114-221320-250-x-0.png"],
)
def test_no_name_of_a_client_becomes_a_path(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.png").write_bytes(DATA)
    folder = PictureFolder(tmp_path / "pictures")
    (folder.folder / "secret.png").write_bytes(DATA)
    for ask in (folder.path, folder.thumbnail, folder.remove):
        with pytest.raises(NoSuchPictureError):
            ask(name)
    assert folder.newest(10) == ([], "")


def test_a_link_is_no_picture(tmp_path: Path) -> None:
    folder = PictureFolder(tmp_path / "pictures")
    name = folder.commit("job", 1e9, 0, DATA)
    os.rename(folder.folder / name, tmp_path / "elsewhere.png")
    os.symlink(tmp_path / "elsewhere.png", folder.folder / name)
    with pytest.raises(NoSuchPictureError):
        folder.path(name)


def test_a_picture_has_a_thumbnail_until_it_is_removed(tmp_path: Path) -> None:
    folder = PictureFolder(tmp_path)
    name = folder.commit("job", 1e9, 0, DATA)
    assert folder.thumbnail(name).startswith(b"\xff\xd8")
    folder.remove(name)
    with pytest.raises(NoSuchPictureError):
        folder.thumbnail(name)


def test_a_journal_knows_what_was_not_finished(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    assert journal.lost == ()
    for id in ("first", "second", "third"):
        journal.accepted(record(id))
    journal.ended("second")
    journal.close()
    with open(path, "a") as file:
        file.write('["ended", "fir')  # killed in the middle of a line
    again = Journal(path)
    assert ids(again.lost) == ["first", "third"] == list(again.new_lost)
    again.close()
    after = Journal(path)
    assert ids(after.lost) == ["first", "third"] and after.new_lost == ()  # told as new once
    after.close()


def test_a_journal_stays_small_and_forgets_no_open_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "LARGEST", 1000)
    journal = Journal(tmp_path / "journal")
    journal.accepted(record("stays-open"))
    for number in range(200):
        journal.accepted(record(f"job-{number}"))
        journal.ended(f"job-{number}")
        assert journal.path.stat().st_size < 1200
    journal.close()
    assert ids(Journal(tmp_path / "journal").lost) == ["stays-open"]


@pytest.mark.parametrize("call", ["open", "write", "replace"])
def test_a_journal_that_can_not_be_begun_anew_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """As one that is killed just then finds it: a server that starts on a full disk, too."""
    journal = Journal(tmp_path / "journal")
    journal.accepted(record("stays-open"))
    journal.close()
    before, right = (tmp_path / "journal").read_bytes(), getattr(os, call)

    def refused(*of: Any) -> Any:
        if call == "open" and not str(of[0]).endswith(".new"):
            return right(*of)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(journal_module.os, call, refused)
        again = Journal(tmp_path / "journal")
        assert ids(again.lost) == ["stays-open"]
    assert (tmp_path / "journal").read_bytes() == before
    again.accepted(record("another"))
    again.close()
    assert ids(Journal(tmp_path / "journal").lost) == ["stays-open", "another"]
    assert sorted(os.listdir(tmp_path)) == ["journal", "journal.lock"]


def test_a_journal_that_can_not_be_shortened_fails_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "journal")
    journal.accepted(record("stays-open"))

    def refused(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(journal_module, "LARGEST", 100)
        patch.setattr(journal_module.os, "replace", refused)
        for number in range(10):
            journal.accepted(record(f"job-{number}"))
            journal.ended(f"job-{number}")
    journal.close()
    assert ids(Journal(tmp_path / "journal").lost) == ["stays-open"]


def test_two_servers_do_not_share_a_journal(tmp_path: Path) -> None:
    first = Journal(tmp_path / "journal")
    first.accepted(record("a-job-of-the-first"))
    with pytest.raises(FluxmeshError, match="Another server writes its pictures to"):
        Journal(tmp_path / "journal")
    first.close()
    again = Journal(tmp_path / "journal")
    assert ids(again.lost) == ["a-job-of-the-first"]
    again.close()


def test_a_journal_that_is_none_is_told(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.mkdir()
    with pytest.raises(HomeError):
        Journal(path)


def test_a_list_tells_of_each_picture_what_a_request_for_it_says(tmp_path: Path) -> None:
    asked = PaintRequest(
        prompt="a dog", width=64, height=64, steps=3, dtype="float32", bits=4, text_bits=8,
        cache=0.1, t5_padding=False,
    )  # fmt: skip
    told = told_of(tmp_path / "plain", asked)
    again = {name: told[name] for name in ("dtype", "bits", "text_bits", "cache", "t5_padding")}
    assert again == {name: getattr(asked, name) for name in again}
    assert (told["references"], told["control"], told["negative_prompt"]) == (0, False, "")
    picture = encode_png(np.zeros((64, 64, 3), np.uint8), None)
    shown = replace(asked, references=(picture, picture), bits=None, text_bits=None)
    assert told_of(tmp_path / "shown", shown)["references"] == 2
    assert set(told) == set(RECIPE["properties"])  # as /api describes it


def told_of(folder: Path, asked: PaintRequest) -> dict[str, Any]:
    """What the list says of a picture that was painted so."""
    folder.mkdir()
    serving = Serving(folder, model=None)

    async def life() -> None:
        await serving.service.open()
        job = await serving.service.submit(asked, "anna")
        assert (await job.events.over()).kind == "done", job.failure
        await serving.service.close()

    asyncio.run(asyncio.wait_for(life(), 60))
    return serving.pictures.newest(1)[0][0].recipe
