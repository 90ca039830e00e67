"""fluxmesh as a user gets it who has no clone: the wheel in an empty environment, by three tools.

Not a part of `make test`: the tools fetch a few hundred megabytes. `make wheel` runs it.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fluxmesh.version import __version__
from tests.paths import ROOT

# On Linux there is an MLX for a CPU and one for CUDA; on macOS there is one, which needs no name.
EXTRA = "" if platform.system() == "Darwin" else "[cpu]"
PATIENCE = 600.0  # seconds, of a slow network


class NewUser:
    """Somebody who has nothing of fluxmesh yet, not even a cached model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("FLUX", "HF_", "PYTHON", "VIRTUAL_ENV", "XDG_"))
        }
        caches = {"PIP_CACHE_DIR": _cache("pip"), "UV_CACHE_DIR": _cache("uv")}
        own = {"HOME": str(folder), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.env = kept | caches | own
        self.program = ""

    def run(self, *command: object, code: int = 0) -> str:
        done = subprocess.run(
            list(map(str, command)),
            cwd=self.folder,
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == code, f"{command}: {done.stdout}\n{done.stderr}"
        return done.stdout

    def fluxmesh(self, *arguments: object) -> str:
        return self.run(self.program, *arguments)


def _cache(tool: str) -> str:
    """The tool's own, so that the same files are not fetched each time."""
    return os.environ.get(f"{tool.upper()}_CACHE_DIR") or str(Path.home() / ".cache" / tool)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip wheel` makes of a copy of this tree: nothing but what is in the tree is in it."""
    folder = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in tracked.stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "tree" / name)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder)]
    subprocess.run([*build, str(folder / "tree")], check=True, timeout=PATIENCE)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="session")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `uv` and `pipx` lie, from PyPI."""
    folder = tmp_path_factory.mktemp("tools") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install = [str(folder / "bin" / "pip"), "install", "-q", "uv", "pipx"]
    subprocess.run(install, check=True, timeout=PATIENCE)
    return folder / "bin"


@pytest.fixture
def user(tmp_path: Path) -> Iterator[NewUser]:
    user = NewUser(tmp_path)
    yield user
    if user.program:
        user.run(user.program, "down", "--force")


def by_pip(user: NewUser, wheel: Path, _tools: Path) -> None:
    user.run(sys.executable, "-m", "venv", user.folder / "venv")
    user.run(user.folder / "venv/bin/pip", "install", "-q", f"{wheel}{EXTRA}")
    user.program = str(user.folder / "venv/bin/fluxmesh")


def by_uv(user: NewUser, wheel: Path, tools: Path) -> None:
    what = f"fluxmesh{EXTRA} @ {wheel.as_uri()}"
    user.run(tools / "uv", "tool", "install", "-q", "--python", sys.executable, what)
    user.program = str(user.folder / ".local/bin/fluxmesh")


def by_pipx(user: NewUser, wheel: Path, tools: Path) -> None:
    what = f"{wheel}{EXTRA}"
    # uv, where pipx finds it, only fetches faster.
    user.env["PATH"] = f"{tools}{os.pathsep}{user.env['PATH']}"
    user.run(tools / "pipx", "install", "-q", "--python", sys.executable, what)
    user.program = str(user.folder / ".local/bin/fluxmesh")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("install", [by_pip, by_uv, by_pipx])
def test_who_has_no_clone_paints(
    user: NewUser, wheel: Path, tools: Path, install: Callable[[NewUser, Path, Path], None]
) -> None:
    install(user, wheel, tools)
    assert user.fluxmesh("--version").split()[-1] == __version__
    size = ("--image-size", "64x64", "--steps", "1", "--seed", "1")
    user.fluxmesh("generate", "a red apple", "--model", "tiny", *size, "--output", "apple.png")
    assert (user.folder / "apple.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.timeout(900)
def test_who_has_no_clone_has_a_mesh(user: NewUser, wheel: Path, tools: Path) -> None:
    by_uv(user, wheel, tools)
    examples = user.fluxmesh("hostfile")
    names = re.findall(r"^([\w-]+)  ", examples, re.MULTILINE)
    assert "thunderbolt-2" in names and "local-2" in names
    for name in names:
        assert user.fluxmesh("hostfile", name) == (ROOT / f"hostfiles/{name}.json").read_text()
    (user.folder / "mesh.json").write_text(user.fluxmesh("hostfile", "local-2"))
    user.fluxmesh("up", "mesh.json", "--model", "tiny", "--no-warm")
    status = json.loads(user.fluxmesh("status", "--json"))
    assert [host["answers"] for host in status["hosts"]] == [True, True]
    assert user.fluxmesh("down") == "The mesh is down: 2 agents ended.\n"
