"""Of the tests of this folder themselves: each names its fact, and one that is marked tells us and SCDL apart."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
FACT = re.compile(r"(1\.[1-9]|9\.\d+|[1-6])\b")


def facts() -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every test of a fact, under its file and name."""
    for path in sorted(HERE.glob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if path != Path(__file__) and isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                yield f"{path.name}::{node.name}", node


def names(nodes: list[ast.expr] | list[ast.stmt]) -> set[str]:
    return {name.id for node in nodes for name in ast.walk(node) if isinstance(name, ast.Name)}


def test_each_test_begins_with_the_number_of_its_fact() -> None:
    assert [test for test, node in facts() if not FACT.match(ast.get_docstring(node) or "")] == []


def test_who_differs_states_both_outcomes() -> None:
    marked = {test for test, node in facts() if "differs" in names(node.decorator_list)}
    apart = {test for test, node in facts() if names(node.body) & {"OURS", "either"}}
    assert marked - apart == set() and len(marked) > 40


def test_names_are_not_used_twice() -> None:
    found = [test for test, _ in facts()]
    assert len(found) == len(set(found))
