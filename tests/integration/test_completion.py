"""What a shell's Tab offers: the scripts in real shells, and what fluxmesh answers them."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fluxmesh.storage.homes import Home, private_folder
from fluxmesh_coordinator.agents.mesh_file import Member, MeshRecord, save
from fluxmesh_coordinator.cli.completion import BASH
from tests.integration.conftest import environment
from tests.portable import shell_problems

BASH_TAB = """
eval "$(fluxmesh completion bash)"
COMP_WORDS=(fluxmesh "$@"); COMP_CWORD=$#
_fluxmesh_completion fluxmesh
printf '%s\\n' ${COMPREPLY[@]+"${COMPREPLY[@]}"}
"""
ZSH_TAB = """
compdef() { }
eval "$(fluxmesh completion zsh)"
compadd() { print -l -- $completions }
_describe() { print -l -- ${completions_with_descriptions%%:*} }
_path_files() { print -l -- files $1 }
words=(fluxmesh "$@"); CURRENT=$(( $# + 1 ))
_fluxmesh_completion
"""
FISH_TAB = """
fluxmesh completion fish | source
complete --do-complete "fluxmesh $argv"
"""


class Machine:
    """A user with a FLUX in the Hub's cache, a mesh of two hosts, and some files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = environment(folder)
        # A shell finds `fluxmesh` where this Python is.
        (folder / "bin").mkdir()
        command = folder / "bin" / "fluxmesh"
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m fluxmesh_coordinator "$@"\n')
        command.chmod(0o755)
        self.env["PATH"] = f"{folder / 'bin'}{os.pathsep}{self.env['PATH']}"
        self.work = folder / "work"
        (self.work / "loras").mkdir(parents=True)
        for name in ("dog.safetensors", "dog.txt", "cat.safetensors"):
            (self.work / name).touch()
        for repo in ("black-forest-labs--FLUX.1-dev", "someone--flux-fine", "someone--sdxl"):
            cached = folder / "hub" / "hub" / f"models--{repo}"
            (cached / "snapshots" / "0123456").mkdir(parents=True)
            (cached / "refs").mkdir()
            (cached / "refs" / "main").write_text("0123456")
            kind = "StableDiffusionXL" if "sdxl" in repo else "Flux"
            index = f'{{"_class_name": "{kind}Pipeline"}}'
            (cached / "snapshots" / "0123456" / "model_index.json").write_text(index)
        hosts = '[{"ssh": "studio", "ips": ["10.0.0.1"]}, {"ssh": "mini", "ips": ["10.0.0.2"]}]'
        members = tuple(Member(r, f"h{r}:47100", "0" * 40, "", "", "") for r in (0, 1))
        save(MeshRecord("m.json", hosts, members), Home(private_folder(folder / "mesh")))

    def run(self, *command: str, **env: str) -> str:
        done = subprocess.run(
            command,
            cwd=self.work,
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def tab(self, *words: str) -> list[str]:
        """What is answered for the last of the words that stand on the line, however begun."""
        line = " ".join(["fluxmesh", *words])
        out = self.run(
            sys.executable,
            *("-m", "fluxmesh_coordinator"),
            COMP_WORDS=line,
            COMP_CWORD=str(len(words)),
            _FLUXMESH_COMPLETE="bash_complete",
        )
        return out.split()


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(tmp_path_factory.mktemp("user"))


def test_models_adapters_hosts_and_settings_are_those_of_this_machine(machine: Machine) -> None:
    models = ["plain,tiny", "plain,tiny-klein", "plain,dev", "plain,someone/flux-fine"]
    for words in (("generate", "--model"), ("up", "-m"), ("adapters", "fuse"), ("train", "-m")):
        assert machine.tab(*words, "") == models
    assert machine.tab("generate", "--model", "so") == ["plain,someone/flux-fine", "file,so"]
    adapters = ["plain,cat.safetensors", "plain,dog.safetensors", "dir,"]
    assert machine.tab("generate", "--adapter", "") == adapters
    assert machine.tab("interactive", "--adapter", "d") == ["plain,dog.safetensors", "dir,d"]
    assert machine.tab("logs", "") == ["plain,0", "plain,1", "plain,studio", "plain,mini"]
    assert machine.tab("config", "set", "train.lora-r") == ["plain,train.lora-rank"]
    assert machine.tab("models", "q") == ["plain,quantize"]
    assert "plain,--stepwise" in machine.tab("generate", "--st")
    assert machine.tab("up", "m") == ["file,m"]  # a hostfile


def test_a_broken_configuration_stops_no_completion(machine: Machine) -> None:
    config = machine.folder / "mesh" / "config.toml"
    config.write_text("model = schnell\n")
    try:
        assert "plain,--steps" in machine.tab("generate", "--steps")
    finally:
        config.unlink()


def test_a_tab_loads_nothing_heavy(machine: Machine) -> None:
    code = (
        "import sys; from fluxmesh_coordinator.cli import main\n"
        "try: main([])\n"
        "finally: print([m for m in ('mlx', 'zmq', 'huggingface_hub', 'rich') if m in sys.modules])"
    )
    words = {"COMP_WORDS": "fluxmesh generate --model ", "COMP_CWORD": "3"}
    out = machine.run(sys.executable, "-c", code, _FLUXMESH_COMPLETE="bash_complete", **words)
    assert out.splitlines()[-1] == "[]"


def test_a_tab_takes_less_than_a_second_of_the_processor(machine: Machine) -> None:
    """Which is what passes where nothing else runs: it waits for nobody."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        machine.tab("generate", "--model", "")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert 0 < min(once() for _ in range(3)) < 1.0


def test_bash_completes_words_and_paths(machine: Machine) -> None:
    def tab(*words: str) -> list[str]:
        return machine.run("bash", "-c", BASH_TAB, "bash", *words).split()

    assert tab("gen") == ["generate"]
    assert tab("logs", "s") == ["studio"]
    assert tab("generate", "--adapter", "d") == ["dog.safetensors"]
    assert tab("generate", "--adapter", "l") == ["loras"]
    assert tab("generate", "--image", "dog.") == ["dog.safetensors", "dog.txt"]


def test_the_bash_of_a_mac_understands_the_script() -> None:
    assert shell_problems(BASH) == []
    assert "compopt" in BASH and "nosort" not in BASH  # the first is asked for, the second 4.4's


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_completes(machine: Machine) -> None:
    def tab(*words: str) -> list[str]:
        return machine.run("zsh", "-f", "-c", ZSH_TAB, "zsh", *words).split()

    assert tab("gen") == ["generate"]
    assert tab("logs", "s") == ["studio"]
    assert tab("generate", "--adapter", "d") == ["files", "-/", "dog.safetensors"]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_a_zsh_without_completion_gets_it(machine: Machine) -> None:
    home = str(machine.folder)
    script = 'eval "$(fluxmesh completion zsh)"; print -- $_comps[fluxmesh]'
    assert machine.run("zsh", "-f", "-c", script, HOME=home).strip() == "_fluxmesh_completion"


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
def test_fish_completes(machine: Machine) -> None:
    def tab(words: str) -> list[str]:
        out = machine.run("fish", "--no-config", "-c", FISH_TAB, words, HOME=str(machine.folder))
        return [line.split("\t")[0] for line in out.splitlines()]

    assert tab("gen") == ["generate"]
    assert tab("logs s") == ["studio"]
    assert tab("generate --adapter d") == ["dog.safetensors"]
