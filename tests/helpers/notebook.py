"""Runs a notebook's cells as Jupyter does, as far as this package sees it, without IPython."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


def fake_ipython(monkeypatch: pytest.MonkeyPatch, kernel: object) -> list[dict[str, str]]:
    """Put IPython's `get_ipython` and `display` in place. `kernel` is None in IPython's terminal.

    Returns what is displayed, by MIME type: the first time and at each update.
    """
    bundles: list[dict[str, str]] = []

    def display(bundle: dict[str, str], raw: bool, display_id: bool) -> SimpleNamespace:
        assert raw and display_id
        bundles.append(bundle)
        return SimpleNamespace(update=lambda bundle, raw: bundles.append(bundle))

    top, inner = ModuleType("IPython"), ModuleType("IPython.display")
    top.get_ipython = lambda: SimpleNamespace(kernel=kernel)  # type: ignore[attr-defined]
    inner.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", top)
    monkeypatch.setitem(sys.modules, "IPython.display", inner)
    return bundles


def run_cells(path: Path) -> list[str]:
    """Run a notebook's cells in order. Returns the HTML, or else the text, that the last expression of each shows."""
    names: dict[str, Any] = {"__name__": path.stem}
    shown: list[str] = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        assert not cell["outputs"] and cell["execution_count"] is None, "a notebook is kept without its outputs"
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, path.name, "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), path.name, "eval"), names)
            shown += [_show(value)] if value is not None else []
    return shown


def _show(value: object) -> str:
    if hasattr(value, "_ipython_display_"):
        value._ipython_display_()
        return ""
    return str(value._repr_html_()) if hasattr(value, "_repr_html_") else repr(value)
