"""Every process of fluxmesh that has many sockets asks for more than macOS's 256 open files."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.paths import ROOT

# Each is run as far as its first own work, which tells the limit instead.
PROGRAMS = {
    "coordinator": """
from fluxmesh_coordinator import cli
cli.cli.main = tell
cli.main([])
""",
    "agent": """
from fluxmesh_agent import cli, process
process.serve = tell
cli.main(["run"])
""",
    "engine": """
import json, sys
from fluxmesh.wire.transport import stream
from fluxmesh_agent import engine
near, far = stream.pair()
engine.Engine.run = tell
config = {"fd": far.detach(), "scratch": "/", "adapters": "/", "models": None, "roots": [],
          "memory": None}
sys.argv[1:] = [json.dumps(config)]
engine.main()
""",
}
BEGIN = """
import resource
kind = resource.RLIMIT_NOFILE
resource.setrlimit(kind, (256, resource.getrlimit(kind)[1]))
def tell(*_, **__):
    print(resource.getrlimit(kind)[0], flush=True)
    return 0
"""


@pytest.mark.parametrize("program", PROGRAMS)
def test_more_than_256_files_may_be_open(program: str) -> None:
    paths = (ROOT, ROOT / "agent", ROOT / "coordinator")
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + PROGRAMS[program]],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) > 256
