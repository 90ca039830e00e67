"""`.ci/run` and the Makefile on a Mac: other tools, an older make, files that macOS hides.

The tools are stand-ins that write down how they were called; bash and make are this machine's own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.paths import ROOT

# What `make --help` of each says of options that begin with "o".
HELP = {
    "3.81": "  -o FILE, --old-file=FILE, --assume-old=FILE",
    "4.4.1": "  -o FILE, --old-file=FILE, --assume-old=FILE\n  -O[TYPE], --output-sync[=TYPE]",
}


class BareMachine:
    """A PATH on which nothing lies but a few ordinary tools and what is put there."""

    def __init__(self, folder: Path) -> None:
        self.tools, self.log = folder / "bin", folder / "log"
        self.tools.mkdir()
        self.log.touch()
        for name in ("bash", "sh", "dirname", "env", "awk", "getconf", "head", "sed", "make"):
            (self.tools / name).symlink_to(str(shutil.which(name)))

    def put(self, name: str, script: str) -> None:
        path = self.tools / name
        path.unlink(missing_ok=True)
        path.write_text(f'#!/bin/sh\necho "{name} $*" >> {self.log}\n{script}\n')
        path.chmod(0o700)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if "MAKE" not in name}
        return subprocess.run(
            command,
            cwd=ROOT,
            env={**kept, "PATH": str(self.tools)},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    def called(self, name: str) -> list[str]:
        """The arguments of each call of a tool."""
        lines = self.log.read_text().splitlines()
        return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]


@pytest.fixture
def machine(tmp_path: Path) -> BareMachine:
    return BareMachine(tmp_path)


@pytest.mark.parametrize(
    ("version", "options"), [("3.81", "-j2"), ("4.4.1", "-j2 --output-sync=target")]
)
@pytest.mark.parametrize("system", ["Darwin", "Linux"])
def test_ci_asks_of_make_what_it_has_and_of_each_system_what_it_can(
    machine: BareMachine, system: str, version: str, options: str
) -> None:
    machine.put("uname", f"echo {system}")
    machine.put("make", f"[ \"$1\" != --help ] || echo '{HELP[version]}'")
    if system == "Linux":
        machine.put("apt-get", "")

    done = machine.run(str(ROOT / ".ci" / "run"))

    assert done.returncode == 0, done.stderr
    ssh, emulate = (" ssh page", ["emulate"]) if system == "Linux" else ("", [])
    targets = f"{options} learn parity lint wheel{ssh}"
    assert machine.called("make") == ["test", *emulate, "--help", targets]
    for target in ("ssh", "emulate"):
        assert (f"'make {target}' is left out" in done.stdout) == (system == "Darwin")
    installed = [call for call in machine.called("apt-get") if call.startswith("install")]
    assert [call.split()[-3:] for call in installed] == (
        [["zsh", "fish", "chromium"]] if system == "Linux" else []
    )


def test_ci_without_a_way_to_install_says_what_is_missing(machine: BareMachine) -> None:
    machine.put("uname", "echo Linux")
    done = machine.run(str(ROOT / ".ci" / "run"))
    assert done.returncode == 1 and "zsh fish chromium, and start again" in done.stderr


def test_ci_stops_at_the_first_failure(machine: BareMachine) -> None:
    machine.put("uname", "echo Darwin")
    machine.put("make", '[ "$1" != test ]')
    assert machine.run(str(ROOT / ".ci" / "run")).returncode != 0
    assert machine.called("make") == ["test"]


@pytest.mark.parametrize("system", ["Darwin", "Linux"])
def test_on_a_mac_an_installed_pth_file_is_made_visible_each_time(
    machine: BareMachine, system: str
) -> None:
    """Python skips a hidden one, and then there is no fluxmesh to import."""
    machine.put("uname", f"echo {system}")
    targets = (".venv/.run", ".venv/.test", ".venv/.dev")

    done = machine.run("make", "--dry-run", "EXTRA=none", "--what-if=pyproject.toml", *targets)

    assert done.returncode == 0, done.stderr
    installs = [line for line in done.stdout.splitlines() if ' -e ".' in line]
    assert len(installs) == len(targets)
    show = "chflags nohidden .venv/lib/python*/site-packages/*.pth"
    assert [show in line for line in installs] == [system == "Darwin"] * len(targets)
    assert [line.partition(' -e "')[2].partition('"')[0] for line in installs] == [
        *(".", ".[test]", ".[dev]")
    ]
