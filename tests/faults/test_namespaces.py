"""A host whose network is cut off: no packet says that it is gone, and it lives on.

Hosts 1 and 2 are network namespaces of this machine, joined by a bridge; "ssh" to them is `ip
netns exec`. Needs Linux, root and iproute2: a sample of faults skips it where they are missing,
and another system always.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from fluxmesh.cluster.snapshot import Placement
from tests.faults import mesh, strike
from tests.faults.conftest import ModelOf
from tests.faults.mesh import paint
from tests.faults.strike import DEADLINE, SLACK, STEP, STEPS, Fault, allowed, difference, heal
from tests.faults.test_hangs import LOOKS
from tests.slowness import slowdown

HOSTS = 3
SSH = """\
#!/bin/sh
while [ "$1" != "--" ]; do shift; done
host=$2
shift 2
exec ip netns exec "{name}-${{host##*.}}" sh -c "$*"
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@dataclass
class Networks:
    """This machine at `net`.1 and a namespace at each of `net`.2, `net`.3."""

    name: str
    net: str

    def address(self, rank: int) -> str:
        return f"{self.net}.{rank + 1}"

    def set(self, rank: int, state: str) -> None:
        """Cuts a host off ("down"), or joins it again ("up")."""
        ip("link", "set", f"{self.name}v{rank + 1}", state)

    def host(self, rank: int, port: int) -> dict[str, object]:
        where = self.address(rank)
        name = where if rank else "127.0.0.1"
        return {"ssh": name, "ips": [where], "control": f"{where}:{port}"}


@pytest.fixture(scope="module")
def networks(pytestconfig: pytest.Config) -> Iterator[Networks]:
    if sys.platform != "linux" or (
        pytestconfig.getoption("faults") == "sample" and not _can_make_namespaces()
    ):
        pytest.skip("network namespaces need Linux, root and iproute2")
    assert os.geteuid() == 0, "namespaces need root: sudo make faults"
    name = f"fm{secrets.token_hex(2)}"
    made = Networks(name, f"10.213.{secrets.randbelow(250)}")
    with ExitStack() as stack:
        bridge = f"{name}br"
        ip("link", "add", bridge, "type", "bridge")
        stack.callback(ip, "link", "del", bridge)
        ip("addr", "add", f"{made.address(0)}/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        for rank in range(1, HOSTS):
            space, near, far = f"{name}-{rank + 1}", f"{name}v{rank + 1}", f"{name}p{rank + 1}"
            ip("netns", "add", space)
            stack.callback(ip, "netns", "del", space)  # and its link with it
            ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", space)
            ip("link", "set", near, "master", bridge, "up")
            ip("-n", space, "addr", "add", f"{made.address(rank)}/24", "dev", far)
            ip("-n", space, "link", "set", far, "up")
            ip("-n", space, "link", "set", "lo", "up")
        yield made


def _can_make_namespaces() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"fm{secrets.token_hex(4)}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    if made.returncode == 0:
        ip("netns", "del", name)
    return made.returncode == 0


@pytest.fixture(scope="module", params=strike.MODEL_FAMILIES)
def family(request: pytest.FixtureRequest) -> strike.ModelFamily:
    """Whose model is painted with."""
    named: strike.ModelFamily = request.param
    return named


@pytest.fixture(scope="module")
def up(
    networks: Networks,
    model_of: ModelOf,
    family: strike.ModelFamily,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[mesh.Up]:
    folder = tmp_path_factory.mktemp("namespaces")
    ssh = folder / "ssh"
    ssh.write_text(SSH.format(name=networks.name))
    ssh.chmod(0o700)
    with mesh.up(
        folder,
        HOSTS,
        model_of(family),
        delays=strike.DELAYS,
        host=networks.host,
        FLUXMESH_SSH=str(ssh),
    ) as up:
        yield up


@pytest.mark.sample(1)
@pytest.mark.parametrize("placement", ["data", "tensor", "sequence"])
@pytest.mark.parametrize("rank", [1, 2])
def test_a_host_that_is_cut_off_is_noticed_in_time_and_may_return(
    networks: Networks, up: mesh.Up, placement: Placement, rank: int
) -> None:
    request = strike.request_for(up.model, placement, HOSTS)
    alone = strike.alone(request)
    with up.connect() as held:
        heal(up, held, placement)
        clean, slow = paint(held, request, placement), slowdown()
        try:
            fault = Fault(placement, "middle", "agent", rank)
            cut = partial(networks.set, rank, "down")
            struck = strike.strike(up, held, request, fault, cut)
        finally:
            networks.set(rank, "up")
        outcome = struck.outcome
        assert outcome.error is None, outcome.error
        assert len(outcome.pictures) == request.n_images
        assert difference(alone, outcome.pictures) <= allowed(placement)
        # An image of its own may be done before the cable is out.
        assert struck.noticed is not None or placement == "data"
        noticed, slow = struck.noticed or 0.0, max(slow, slowdown())
        assert noticed <= DEADLINE + LOOKS * slow
        # Those who are left may have to form a ring of their own, and to load.
        assert outcome.seconds - clean.seconds - noticed <= (STEP + SLACK) * slow
        assert struck.log.again == []
        assert sorted(outcome.steps) == [
            (k, n + 1) for k in range(request.n_images) for n in range(STEPS)
        ]

        heal(up, held, placement)
        after = paint(held, request, placement)
        assert after.lost == []
        assert rank in after.planned[0].hosts
        assert difference(alone, after.pictures) <= allowed(placement)
        assert Path(up.home(rank).log).read_text().count("lost its lease")
