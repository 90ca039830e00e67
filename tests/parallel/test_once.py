"""What is made once for all tests of a session, whichever process asks first."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.parallel.ring import once


def test_who_comes_while_it_is_made_waits_and_gets_the_same(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> None:
    made: list[Path] = []

    def make(folder: Path) -> None:
        time.sleep(0.1)
        made.append(folder)
        (folder / "x").write_text("x")

    name = request.node.name
    with ThreadPoolExecutor(3) as pool:
        folders = list(pool.map(lambda _: once(tmp_path_factory, name, make), range(3)))
    assert len(made) == 1 and len(set(folders)) == 1
    assert (folders[0] / "x").read_text() == "x"


def test_what_failed_is_made_anew_by_the_next(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise AssertionError("rank 1 hung")

    with pytest.raises(AssertionError, match="hung"):
        once(tmp_path_factory, request.node.name, fail)
    folder = once(tmp_path_factory, request.node.name, lambda folder: None)
    assert list(folder.iterdir()) == []
