"""What differs on a Mac, emulated (`tests/as_on_a_mac`): that it is, and that fluxmesh works so.

`make mac` runs all tests so; here is a part of them that stands for the rest.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.allocation import BYTES
from tests.faults import mesh
from tests.integration.conftest import FinishedProcess, environment
from tests.paths import ROOT, python_path
from tests.processes import commands_of

WORDS = ("gpu", "no-proc", "pages", "files", "sockets")
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None,
    reason="emulates a Mac on Linux, and builds with g++",
)
PROBE = f"""
import json, os, resource, socket, subprocess, sys
import mlx.core as mx
from pathlib import Path

def is_there(look):
    try:
        look()
    except FileNotFoundError:
        return False
    return True

def looks():
    yield lambda: open("/proc/meminfo")
    yield lambda: Path("/proc/cpuinfo").read_text()
    yield lambda: os.listdir("/proc")
    yield lambda: next(Path(b"/proc".decode()).iterdir())
    yield lambda: os.stat("/proc/self")
    yield lambda: os.readlink("/proc/self/exe")
    yield lambda: os.open("/proc/stat", os.O_RDONLY)

before = mx.get_active_memory()
array = mx.zeros(({BYTES} + 1,), mx.uint8)
mx.eval(array)
ends = socket.socketpair()
print(json.dumps({{
    "gpu": [str(mx.default_device()), mx.metal.is_available(), "M5" in str(mx.device_info())],
    "no-proc": [is_there(look) for look in looks()]
        + [os.path.exists("/proc"), os.access("/proc", os.R_OK)],
    "pages": mx.get_active_memory() - before - {BYTES},
    "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    "sockets": [end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) for end in ends],
}}))
"""
PLAIN = {
    "gpu": ["Device(cpu, 0)", False, False],
    "no-proc": [True] * 9,
    "pages": 1,
}
ON_A_MAC = {
    "gpu": ["Device(gpu, 0)", True, True],
    "no-proc": [False] * 9,
    "pages": 16384,
    "files": 256,
    "sockets": [8192, 8192],
}


def as_on_a_mac(*words: str) -> dict[str, str]:
    """What is to be in the environment, so that a Python that is started is so."""
    folder = ROOT / "tests" / "as_on_a_mac"
    before = [path for path in python_path().split(os.pathsep) if path != str(folder)]
    paths = [str(folder), *before] if words else before
    return {"PYTHONPATH": os.pathsep.join(paths), "EMULATE": " ".join(words)}


def probe(*words: str) -> dict[str, Any]:
    """What a Python that was started so finds."""
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {PROBE!r}], check=True)"
    done = subprocess.run(  # and even one that such a one starts
        [sys.executable, "-c", code],
        env={**os.environ, **as_on_a_mac(*words)},
        capture_output=True,
        text=True,
        check=True,
    )
    properties: dict[str, Any] = json.loads(done.stdout)
    return properties


@pytest.mark.parametrize("word", WORDS)
def test_a_word_emulates_one_thing_and_nothing_else(word: str) -> None:
    properties = probe(word)
    assert properties.pop(word) == ON_A_MAC[word]
    # The tests themselves may run so, with their limit of files.
    assert {name: properties[name] for name in PLAIN if name != word} == {
        name: value for name, value in PLAIN.items() if name != word
    }


def test_mac_emulates_all_of_it() -> None:
    assert probe("mac") == ON_A_MAC


def test_psutil_still_sees_processes_as_it_does_on_a_mac() -> None:
    code = (
        "import os, psutil\n"
        "me = psutil.Process()\n"
        "print(me.ppid(), me.num_fds() > 0, me.memory_info().rss > 10**6, len(psutil.pids()) > 1)\n"
        "from fluxmesh.storage.processes import started_at\n"
        "print(started_at(me.pid) is not None, started_at(2**22) is None, os.path.exists('/proc'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **as_on_a_mac("no-proc")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(os.getpid()), *["True"] * 5, "False"]


@pytest.mark.parametrize(
    ("asked", "said"), [("gpu,prox", "prox"), ("macs", "none of mac, gpu, no-proc")]
)
def test_a_word_that_means_nothing_is_refused(asked: str, said: str) -> None:
    done = run_tests("tests/unit/test_precision.py", **as_on_a_mac(asked))
    assert done.returncode != 0
    assert said in done.stdout + done.stderr


def run_tests(*what: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *what],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


# Float32 in this process and in others, what a loaded shard takes, a worker, Metal's road of the
# fused operations, and the whole path of a picture.
PART = (
    "tests/unit/test_precision.py",
    "tests/unit/test_stream.py",
    "tests/numerics/test_fused.py",
    "tests/numerics/test_weights.py::test_loading_holds_the_model_and_one_tensor_more",
    "tests/numerics/test_worker.py::test_sizes_in_memory_are_estimated_from_the_configs",
    "tests/numerics/test_worker.py::test_what_is_held_is_said_and_leaves_for_other_weights",
    "tests/parallel/test_sharding.py::test_loading_a_shard_never_holds_more_than_it_and_one_tensor",
)


def test_a_part_of_the_tests_passes_as_on_a_mac() -> None:
    done = run_tests(*PART, EMULATE="mac", MLX_ENABLE_TF32="1")  # the tests set it themselves
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_a_mesh_comes_up_paints_and_goes_down_as_on_a_mac(tmp_path: Path, checkpoint: Path) -> None:
    """Two agents and engines with 256 files each, without /proc, with small socket pairs."""
    with mesh.up(tmp_path, 2, str(checkpoint), **as_on_a_mac("mac")) as up:
        commands = commands_of(up.folder)
        assert len(commands) == len(up.processes()) == 4
        status = json.loads(up.fluxmesh("status", "--json").stdout.splitlines()[-1])
        assert all("gpu" in host["device"] for host in status["hosts"])
        painted = up.fluxmesh(
            *("generate", "x", "--model", checkpoint, "--placement", "sequence", "--n-images", 2),
            *("--dtype", "float32", "--steps", 2, "--seed", 1, "--json", "-o", tmp_path / "x.png"),
        )
        lines = FinishedProcess(0, painted.stdout, painted.stderr)
        assert lines.of("planned")[0]["hosts"] == [0, 1]
        assert {line["host"] for line in lines.of("picture")} == {0, 1}
        assert (tmp_path / "x.png").stat().st_size > 0
    assert commands_of(up.folder) == {}


WITHOUT_PROC = 'mount -t tmpfs none /proc && [ -z "$(ls /proc)" ] && exec "$@"'


def test_a_picture_is_painted_where_proc_is_gone_for_c_libraries_too(
    tmp_path: Path, checkpoint: Path
) -> None:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("a namespace without /proc needs Linux, root and unshare")
    command = [sys.executable, "-m", "fluxmesh_coordinator", "generate", "x", "--model", checkpoint]
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", WITHOUT_PROC, "sh", *map(str, command)]
        + ["--steps", "1", "-n", "1", "--verbose", "-o", str(tmp_path / "x.png")],
        env={**environment(tmp_path), **as_on_a_mac()},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.png").stat().st_size > 0
