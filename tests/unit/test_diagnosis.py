"""What `doctor` says of a mesh, from what its hosts tell."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh_coordinator.deploy import diagnosis


def test_hosts_that_hold_different_files_under_one_name_are_named() -> None:
    def status(name: str, content: str | None, model: str = "/models/mine") -> Any:
        holds = None if content is None else SimpleNamespace(
            weights=ModelVariant(model), content=content
        )  # fmt: skip
        return SimpleNamespace(name=name, holds=holds)

    same = {0: status("a", "one"), 1: status("b", "one"), 2: status("c", None)}
    assert not diagnosis.in_memory(same)
    assert not diagnosis.in_memory({**same, 3: status("d", "two", model="dev")})
    (finding,) = diagnosis.in_memory({**same, 3: status("d", "two")})
    assert (finding.rank, finding.level) == (3, "fail")
    assert "different files under the name /models/mine" in finding.text
    assert "host 0 (a) one" in finding.text and "host 3 (d) two" in finding.text
