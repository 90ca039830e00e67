"""How long anybody waits stands in one table: whoever waits takes it from there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from fluxmesh.deadlines import DEADLINES, Deadlines
from tools.house import FOLDERS

# What waits, and where it stands that it does: the name of the call, or a keyword of any call.
CALLS = {"sleep", "timeout", "wait_for", "settimeout", "call_later", "Timer", "select"}
KEYWORDS = {"timeout", "seconds"}


def waits(path: Path) -> Iterator[str]:
    """Module constants by which a module waits."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = [*node.args.defaults, *(kw for kw in node.args.kw_defaults if kw)]
            names = [*(arg.arg for arg in node.args.args[-len(node.args.defaults) :])]
            values = [value for name, value in zip(names, given, strict=False) if name in KEYWORDS]
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            values = [*node.args] if called in CALLS else []
            values += [kw.value for kw in node.keywords if kw.arg in KEYWORDS]
        else:
            continue
        for value in values:
            names = [part.id for part in ast.walk(value) if isinstance(part, ast.Name)]
            yield from (name for name in names if name.isupper() and name != "DEADLINES")


def test_no_module_waits_by_a_constant_of_its_own() -> None:
    paths = [path for folder in FOLDERS.values() for path in sorted(folder.rglob("*.py"))]
    assert len(paths) > 200
    assert [f"{path.name}: {name}" for path in paths for name in waits(path)] == []


def test_the_check_sees_a_constant_that_is_waited_by(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(
        "ONE = TWO = THREE = FOUR = 1.0\n"
        "def ask(seconds: float = ONE) -> None:\n"
        "    time.sleep(2 * TWO)\n"
        "    subprocess.run([], timeout=THREE)\n"
        "    time.sleep(DEADLINES.tick)\n"
    )
    assert sorted(waits(module)) == ["ONE", "THREE", "TWO"]


def test_everything_in_the_table_is_waited_for_somewhere() -> None:
    text = "\n".join(
        path.read_text(encoding="utf-8")
        for folder in FOLDERS.values()
        for path in folder.rglob("*.py")
        if path.name != "deadlines.py"
    )
    names = {field.name for field in fields(Deadlines)}
    asked = {f"ask_{action}" for action in re.findall(r'remote\.ask\(\w+, "(\w+)"', text)}
    asked.add("ask_start")  # `launch.py` names its actions by a variable
    unused = {name for name in names if not re.search(rf"(?i)deadlines\.{name}\b", text)} - asked
    assert unused == set()
    assert asked <= names


def test_no_deadline_is_zero_and_pauses_grow() -> None:
    for field in fields(Deadlines):
        value = getattr(DEADLINES, field.name)
        low, high = value if isinstance(value, tuple) else (0.0, value)
        assert 0 <= low < high, field.name
    assert DEADLINES.heartbeat < DEADLINES.silence
    assert DEADLINES.tell_place < DEADLINES.hear_place
    assert DEADLINES.tick < DEADLINES.standstill
