"""A unit that fluxmesh does not know, done by a real engine: dispatched by its class alone."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fluxmesh.wire import messages
from fluxmesh.wire.transport.stream import Channel
from tests.messages import same
from tests.new_unit import Polished, Rubbed, polish

FEATURES = {"shine": np.arange(6, dtype=np.float32).reshape(1, 6)}


@pytest.fixture
def polisher(tmp_path: Path) -> Iterator[Channel]:
    """An engine that can polish, from the agent's side."""
    near, far = socket.socketpair()
    config = {
        "fd": far.fileno(),
        "scratch": str(tmp_path),
        "adapters": str(tmp_path),
        "models": None,
        "roots": [],
        "memory": None,
    }
    command = [sys.executable, "-c", "from tests.new_unit import main; main()", json.dumps(config)]
    near.settimeout(60)
    with near, subprocess.Popen(command, pass_fds=[far.fileno()]) as process:
        far.close()
        channel = Channel(near)
        assert isinstance(channel.receive()[1], messages.Device)
        yield channel
        channel.close()
        assert process.wait(60) == 0


def heard(channel: Channel, last: type[messages.Message]) -> list[messages.Message]:
    """What an engine says, to the first of `last`."""
    said: list[messages.Message] = []
    while not (said and isinstance(said[-1], last)):
        said.append(channel.receive()[1])
    return said


def names(said: list[messages.Message]) -> list[str]:
    return [
        f"over {each.is_over}" if isinstance(each, messages.Account) else type(each).__name__
        for each in said
    ]


def test_an_engine_does_it_and_is_free_before_the_report_that_ends_it(polisher: Channel) -> None:
    polisher.send(polish(FEATURES))
    said = heard(polisher, Polished)
    rubbed = ["over False", "Rubbed"]
    assert names(said) == [*rubbed, *rubbed, "over True", "Polished"]
    assert isinstance(said[1], Rubbed) and (said[1].job, said[1].side) == ("job", 0)
    assert same(said[-1], Polished(job="job", ring_generation=0, features=FEATURES))


def test_one_that_ranks_do_together_begins_even_where_it_was_cancelled(polisher: Channel) -> None:
    for work in (
        polish(FEATURES, together=True, waits=True, sides=1),  # until the cancel below is heard
        polish(FEATURES),
        polish(FEATURES, together=True, sides=3),
    ):
        polisher.send(work)
    polisher.send(messages.Cancel(fence=1, job="job"))
    said = heard(polisher, messages.Cancelled)
    kinds = [name for name in names(said) if name != "over False"]
    assert kinds[:3] == ["Rubbed", "over True", "Polished"]
    assert kinds[3] == "over True"  # the one that is alone never began
    assert kinds[4:] == ["Rubbed"] * 3 + ["over True", "Polished", "Cancelled"]
