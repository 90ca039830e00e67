"""What runs where the project is hosted: on Linux and on Macs, by the targets of the Makefile."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import yaml

from tests.paths import ROOT
from tests.portable import shell_problems

ACTIONS = {"actions/checkout", "actions/setup-python", "actions/cache"}  # all of GitHub's own
PATHS = sorted((ROOT / ".github" / "workflows").glob("*.y*ml"))
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def jobs() -> Iterator[dict[str, Any]]:
    """Every job as it runs, with what its matrix stands for filled in."""
    for path in PATHS:
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            matrix = job.get("strategy", {}).get("matrix", {})
            for values in product(*matrix.values()):
                yield _filled(job, dict(zip(matrix, values, strict=True)))


def _filled(what: Any, values: dict[str, Any]) -> Any:
    match what:
        case dict():
            return {key: _filled(value, values) for key, value in what.items()}
        case list():
            return [_filled(value, values) for value in what]
        case str():
            return re.sub(r"\$\{\{ matrix\.(\w+) \}\}", lambda hit: values[hit[1]], what)
    return what


def steps(job: dict[str, Any], key: str) -> list[str]:
    return [step[key] for step in job["steps"] if key in step]


def commands() -> set[tuple[str, str, str]]:
    """(system, Python, command) of all that is run."""
    return {
        (job["runs-on"], step["with"]["python-version"], command)
        for job in jobs()
        for step in job["steps"]
        if step.get("uses", "").startswith("actions/setup-python@")
        for command in steps(job, "run")
    }


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_a_workflow_parses_and_may_only_read(path: Any) -> None:
    read = yaml.safe_load(path.read_text())
    assert set(read[True]) == {"push", "pull_request"}  # YAML 1.1 takes `on` for true
    assert read["permissions"] == {"contents": "read"}


def test_every_job_has_a_limit_of_time_and_uses_actions_of_github_alone() -> None:
    for job in jobs():
        assert 0 < job["timeout-minutes"] <= 60
        for used in steps(job, "uses"):
            name, _, version = used.partition("@")
            assert name in ACTIONS and re.fullmatch(r"v\d+", version), used


def test_every_command_makes_a_target_that_there_is() -> None:
    steps = commands()
    assert steps
    for _, _, command in steps:
        make, target = command.split()
        assert make == "make" and target in TARGETS, command
        assert shell_problems(command) == []


def test_the_tests_run_on_linux_and_on_every_macos_with_the_oldest_python_and_a_new_one() -> None:
    systems = ("ubuntu-24.04", "macos-14", "macos-15", "macos-26")
    wanted = {(system, python, "make test") for system in systems for python in ("3.11", "3.13")}
    assert wanted <= commands()
    assert 'requires-python = ">=3.11"' in (ROOT / "pyproject.toml").read_text()


def test_the_checkers_and_the_oracles_run_on_linux() -> None:
    for target in ("lint", "parity"):
        assert ("ubuntu-24.04", "3.11", f"make {target}") in commands()
