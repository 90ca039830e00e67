"""A Python with fluxmesh is found behind every kind of login shell, however it was installed."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from fluxmesh_coordinator.agents import find_python

# macOS gives zsh; bash and fish are what people change it to. Those that this machine has.
SHELLS = [shell for shell in ("sh", "bash", "zsh", "fish") if shutil.which(shell)]
PYTHON = """#!/bin/sh
case "$1" in -c) exit {code};; -m) echo "$0 runs $2";; esac
"""


class There:
    """A host with a home of its own, as a command over ssh finds it."""

    def __init__(self, home: Path) -> None:
        self.home, self.path = home, "/usr/bin:/bin"
        self.own = home / "no such" / "python"

    def python(self, place: str, code: int = 0) -> Path:
        """One that has fluxmesh where `code` is 0."""
        path = self.home / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(PYTHON.format(code=code))
        path.chmod(0o755)
        return path

    def file(self, place: str, text: str) -> Path:
        path = self.home / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def find(
        self, shell: str = "sh", script: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """What ssh does: the user's login shell runs one line."""
        path = shutil.which(shell)
        assert path is not None
        script = script or find_python.script(str(self.own), "no_such_fluxmesh")
        env = {"HOME": str(self.home), "SHELL": path, "PATH": self.path}
        return subprocess.run(
            [path, "-c", f"exec sh -c {shlex.quote(script)}"],
            env=env,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=200,
            check=False,
        )


@pytest.fixture
def there(tmp_path: Path) -> There:
    return There(tmp_path)


def output_of(python: Path) -> str:
    return f"{python} runs no_such_fluxmesh\n"


@pytest.mark.parametrize("shell", SHELLS)
def test_every_login_shell_takes_the_script_and_the_same_path_as_here_comes_first(
    there: There, shell: str
) -> None:
    there.own = there.python("a place/it's/python")

    assert there.find(shell).stdout == output_of(there.own)


def test_the_script_holds_no_backslash_which_fish_would_take_for_its_own() -> None:
    assert "\\" not in find_python.script(
        "/opt/venv/bin/python", "fluxmesh_coordinator.agents.bootstrap"
    )


@pytest.mark.parametrize("shell", SHELLS)
def test_a_link_to_a_script_names_its_interpreter_as_pipx_uv_and_homebrew_leave_it(
    there: There, shell: str
) -> None:
    python = there.python("tools/fluxmesh/bin/python3.13")
    script = there.file("tools/fluxmesh/bin/fluxmesh", f"#!{python}\nimport sys\n")
    (there.home / ".local/bin").mkdir(parents=True)
    (there.home / ".local/bin/fluxmesh").symlink_to(script)

    assert there.find(shell).stdout == output_of(python)


def test_an_interpreter_whose_path_has_a_space_stands_in_the_second_line(there: There) -> None:
    python = there.python("Application Support/uv/bin/python3")
    text = f"#!/bin/sh\n'''exec' \"{python}\" \"$0\" \"$@\"\n' '''\nimport sys\n"
    there.file(".local/bin/fluxmesh", text)

    assert there.find().stdout == output_of(python)


def test_a_shim_has_a_python_beside_it(there: There) -> None:
    there.file(".local/bin/fluxmesh", "#!/usr/bin/env bash\nexec pyenv exec fluxmesh\n")
    python = there.python(".local/bin/python")

    assert there.find().stdout == output_of(python)


# What sets the PATH, as people write it there.
FILES = [
    ("sh", ".profile", "PATH={}:$PATH"),
    ("bash", ".bash_profile", "PATH={}:$PATH"),
    ("bash", ".bashrc", "PATH={}:$PATH"),
    ("zsh", ".zprofile", "path=({} $path)"),
    ("zsh", ".zshrc", "path=({} $path)"),
    ("fish", ".config/fish/config.fish", "set -x PATH {} $PATH"),
]


@pytest.mark.parametrize(("shell", "file", "line"), [each for each in FILES if each[0] in SHELLS])
def test_the_path_that_a_file_of_the_shell_sets_counts(
    there: There, shell: str, file: str, line: str
) -> None:
    python = there.python("env/bin/python3.12")
    there.file("env/bin/fluxmesh", f"#!{python}\n")
    there.file(file, f"echo Welcome\n{line.format(there.home / 'env/bin')}\n")

    assert there.find(shell).stdout.endswith(output_of(python))


def test_a_python_without_fluxmesh_is_passed_over_and_none_is_127(there: There) -> None:
    there.own = there.python("own/python", code=1)
    there.file(".local/bin/fluxmesh", f"#!{there.python('broken/python', code=1)}\n")

    done = there.find()

    assert done.returncode == 127 and done.stdout == ""


@pytest.mark.parametrize("has_tools", [True, False])
def test_the_stub_of_macos_is_not_run_without_the_command_line_tools(
    there: There, has_tools: bool
) -> None:
    """It would open a dialog on the screen of that Mac."""
    stub = there.file("stub/python3", f"#!/bin/sh\ntouch {there.home}/asked; exit 1\n")
    tools = there.file("stub/xcode-select", f"#!/bin/sh\nexit {0 if has_tools else 2}\n")
    there.path = f"{stub.parent}:{there.path}"
    script = find_python.script(str(there.own), "no_such_fluxmesh")
    script = script.replace(find_python.STUB, str(stub)).replace(find_python.TOOLS, str(tools))

    assert there.find(script=script).returncode == 127
    assert (there.home / "asked").exists() == has_tools


def test_a_python_that_macos_keeps_private_is_named(there: There) -> None:
    text = "#!/bin/sh\necho 'sh: /x/python: Operation not permitted' >&2; exit 126\n"
    there.own = there.file("Documents/venv/bin/python", text)

    done = there.find()

    assert done.returncode == 127
    assert done.stderr.splitlines()[-1] == f"{there.own}: Operation not permitted"


def test_the_script_is_what_bash_3_2_and_dash_parse(there: There) -> None:
    script = find_python.script("/opt/venv/bin/python", "fluxmesh_coordinator.agents.bootstrap")
    for command in (["bash", "--posix", "-n"], ["dash", "-n"]):
        if shutil.which(command[0]):
            subprocess.run(command, input=script, text=True, check=True, env=dict(os.environ))
    for newer in ("[[", "mapfile", "declare", "<<<", "local ", "${1,,", "|&"):
        assert newer not in script
