"""What runs on a Mac uses nothing that its make 3.81, bash 3.2, BSD tools and Python lack."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.paths import ROOT
from tests.portable import (
    MAKE,
    PYTHON,
    SHELL,
    make_problems,
    paths_of_linux,
    python_problems,
    shell_problems,
)

FOLDERS = ("fluxmesh", "agent", "coordinator", "tests", "tools", "benchmarks", "examples")
# These run on Linux alone, and skip elsewhere; or are about what they refuse.
LINUX = (
    "tests/faults/test_namespaces.py",
    "tests/ssh/server.py",
    "benchmarks/limited.py",
    "benchmarks/emulated/ring.py",
    "tests/integration/test_as_on_a_mac.py",
)
RULES = ("tests/portable.py", "tests/unit/test_portable.py", "tests/as_on_a_mac/as_on_a_mac.py")

NOT_IN_MAKE = [
    ".ONESHELL:",
    "SHELL := bash\n.SHELLFLAGS := -ec",
    "now ::= $(shell date)",
    "now != date",
    "one two &: three",
    "$(file > out,$(names))",
    "$(let x,1,$x)",
    "test: private WORKERS := 1",
    "undefine WORKERS",
    "define two =\nendef",
    "all:\n\tmake -j2 --output-sync=target test lint",
    "all:\n\t@sed -i s/a/b/ file",
    "names := $(shell readlink -f x)",
]
NOT_IN_SHELL = [
    *("make -j2 --output-sync=target learn", "make -O all", "make -j2 -E 'x := 1'"),
    *("declare -A seen", "local -n other=$1", "declare -g x=1", "typeset -u name"),
    *('echo "${name^^}"', 'echo "${name,}"', 'echo "${names[0],,}"', 'echo "${x@Q}"'),
    *("mapfile -t lines < file", "readarray lines", "coproc cat"),
    *("make test &>> log", "make test |& tee log", "wait -n", "wait -p id 7"),
    *("echo $EPOCHSECONDS", "kill $BASHPID", 'echo "${names[-1]}"', 'echo "${x:0:-1}"'),
    *("a) one ;;&", "a) one ;&", "shopt -s globstar", "if [[ -v name ]]; then", "test -v name"),
    *("printf '%(%F)T' -1", "for i in {01..10}; do", "for i in {1..10..2}; do"),
    *("read -t 0.5 line", "read -i x line", "exec {out}>file", "echo $'\\u00e9'"),
    *('run "${options[@]}"', "cp -- a b", "cp --reflink a b", "mkdir --parents a", "rm -r -- x"),
    *("sed -i s/a/b/ file", "sed -Ei 's/a/b/' file", "sed -n -i p file", r"sed 's/a\+/b/' file"),
    *("readlink -f x", "realpath x", "grep -P '\\d' file", "grep -oP x file", "stat -c %s file"),
    *("date -d yesterday", "date -Is", "date +%s%N", "xargs -r rm", "xargs -0 -r rm", "cp -u a b"),
    *("ln -sr a b", "file=$(mktemp)", "mktemp -d", "mktemp -p . x.XXXX", "timeout 5 make"),
    *("x=1; nproc --all", "if setsid make; then", "exec ip link", "sha256sum file", "md5sum x"),
    *("head -n -1 file", "sort -V names", "du -sb x", "df -B1 .", "find . -printf '%p'"),
    *("find -name x", "base64 -w 0 x", "touch -d now x", "sleep infinity", "sleep 5m", "mv -t x a"),
    *("echo -e 'a\\tb'", "hostname -I", "awk '{ print strftime(1) }'", "cat /proc/cpuinfo"),
]
IN_BOTH = [
    'sync=""; case "$(make --help)" in *--output-sync*) sync="--output-sync=target" ;; esac',
    "make -j2 $sync $targets  # not --output-sync, which cp -- knows",
    "if ! command -v apt-get >/dev/null 2>&1; then exit 1; fi",
    "apt-get install -qy --no-install-recommends openssh-server",
    "pip install --quiet --editable .",
    'echo "${x:-1} ${x%/*} ${x##*.} ${#x} ${x:0:2} ${x/a/b}"',
    'run ${options[@]+"${options[@]}"}',
    "sed -i.bak -E 's/a+|b/c/' file",
    "sed -n '3,12s/^# \\{0,1\\}//p' Makefile",
    "mktemp -d /tmp/fluxmesh.XXXXXX",
    "stat -f %z file",
    "date -u +%Y-%m-%dT%H:%M:%SZ",
    "grep -Eo '[0-9]+' file",
    "xargs -0 -n 1 rm",
    "kill -- -$pid; exec sleep 0.5",
    "read -r -p 'yes? ' answer",
    "ps -o pid=,command= -p $$ | head -n 1 | sort -rn | tail -n +2",
    "chflags nohidden .venv/lib/python*/site-packages/*.pth",
    "ssh host --version; git diff --stat -- file",
    "find . -name '*.py' -exec wc -l {} +",
    '[ -n "$x" ] && [ -x /usr/sbin/sshd ] && test -r file',
    "cp -pR a b && ln -s a b && mv -f a b",
]


def files(pattern: str) -> Iterator[Path]:
    for folder in FOLDERS:
        yield from sorted((ROOT / folder).rglob(pattern))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def scripts() -> Iterator[Path]:
    """Every file that a shell runs."""
    yield ROOT / ".ci" / "run"
    for path in files("*"):
        if path.is_file() and path.suffix in ("", ".sh"):
            with open(path, "rb") as file:
                if path.suffix == ".sh" or re.match(rb"#!.*sh\b", file.readline()):
                    yield path


def test_the_makefile_is_understood_by_make_3_81() -> None:
    assert make_problems((ROOT / "Makefile").read_text()) == []


def test_scripts_are_understood_by_bash_3_2_and_call_tools_as_bsd_knows_them() -> None:
    by_file = {name_of(path): shell_problems(path.read_text()) for path in scripts()}
    assert ".ci/run" in by_file
    assert {name: problems for name, problems in by_file.items() if problems} == {}


def test_commands_in_the_documents_run_on_a_mac() -> None:
    texts = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *files("*.md")]
    blocks = [
        (name_of(path), block)
        for path in texts
        for block in re.findall(r"```(?:shell|sh|bash)\n(.*?)```", path.read_text(), re.DOTALL)
    ]
    assert len(blocks) > 10
    assert [(name, problems) for name, text in blocks if (problems := shell_problems(text))] == []


def test_python_and_the_shell_inside_of_it_run_on_a_mac() -> None:
    by_file = {
        name_of(path): python_problems(path.read_text(encoding="utf-8"))
        for path in files("*.py")
        if name_of(path) not in (*LINUX, *RULES)
    }
    assert len(by_file) > 200
    assert {name: problems for name, problems in by_file.items() if problems} == {}


def test_tests_and_tools_ask_no_folder_that_only_linux_has() -> None:
    by_file = {
        name_of(path): paths_of_linux(path.read_text(encoding="utf-8"))
        for path in files("*.py")
        if name_of(path).startswith(("tests/", "tools/")) and name_of(path) not in (*LINUX, *RULES)
    }
    assert {name: paths for name, paths in by_file.items() if paths} == {}


@pytest.mark.parametrize("text", NOT_IN_MAKE)
def test_what_make_3_81_lacks_is_found(text: str) -> None:
    assert make_problems(text)


@pytest.mark.parametrize("text", NOT_IN_SHELL)
def test_what_bash_3_2_and_bsd_lack_is_found(text: str) -> None:
    assert shell_problems(text)
    assert shell_problems(f"true\nif true; then \\\n    {text}\nfi")  # wherever it stands


@pytest.mark.parametrize("text", IN_BOTH)
def test_what_both_have_is_left_alone(text: str) -> None:
    assert shell_problems(text) == []
    assert make_problems("all:\n\t@" + text.replace("$", "$$")) == []


def test_every_rule_finds_something() -> None:
    """One that no example trips could be wrong without anybody seeing it."""
    silent = [rule for rule in SHELL if not any(re.search(rule, text) for text in NOT_IN_SHELL)]
    made = [line for text in NOT_IN_MAKE for line in text.splitlines()]
    silent += [rule for rule in MAKE if not any(re.search(rule, line) for line in made)]
    assert silent == []


@pytest.mark.parametrize(
    "source",
    [
        'import subprocess\nsubprocess.run(["cp", "--", "a", "b"])',
        'COPY = ["sed", "-i", f"s/{x}/{y}/", path]',
        'SSH = f"""\\\n#!/bin/sh\nexec timeout {seconds} cat\n"""',
        'FIND = "for x in $(ls); do\\nreadlink -f $x\\ndone"',
        'multiprocessing.get_context("fork")',
    ],
)
def test_what_stands_in_python_is_found(source: str) -> None:
    assert python_problems(source)


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module in PYTHON for name in PYTHON[module].split()]
)
def test_what_python_has_on_linux_alone_may_be_used_where_it_is_looked_for(
    module: str, name: str
) -> None:
    use = f"import {module}\nx = {module}.{name}\n"
    assert python_problems(use)
    assert python_problems(f'if hasattr({module}, "{name}"):\n    x = {module}.{name}\n') == []


def test_a_path_of_linux_is_found_outside_of_docstrings() -> None:
    assert paths_of_linux('"""/proc is read."""\nx = open(f"/proc/{pid}/stat")\n')
    assert paths_of_linux('Path("/dev/shm")')
    assert not paths_of_linux('"""/proc is read."""\nx = "/processes"\n')
