"""The site of the documentation: `mkdocs.yml` names every page, and docs/site_hooks.py leads links where they belong.

`.ci/run` builds it with --strict.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    pytest.importorskip("mkdocs", reason='mkdocs is not installed: pip install ".[docs]"')
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site_hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_navigation_has_every_page() -> None:
    """Both languages of the course too."""
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    named = re.findall(r"^ *- (?:[^:\n]+: )?(\S+\.md)$", navigation, re.MULTILINE)
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert len(named) == len(set(named)) and pages <= set(named), sorted(pages - set(named))


def lead(hooks: ModuleType, page: str, markdown: str) -> str:
    """The Markdown of a page of the site after the hook."""
    return str(hooks.on_page_markdown(markdown, SimpleNamespace(file=SimpleNamespace(src_uri=page)), None, None))


def test_links_out_of_docs_lead_to_pages_of_the_site(hooks: ModuleType) -> None:
    for page, link, expected in (
        ("tour.md", "../numballama/graph.py#L166", "source/numballama/graph.py.md#L-166"),
        ("tour.md", "chat.md#a", "chat.md#a"),
        ("course/zh/19-story.md", "../../../training/MODEL_CARD.md", "../../source/training/MODEL_CARD.md"),
        ("course/15-gemv.md", "gemv/kernels.py", "../source/docs/course/gemv/kernels.py.md"),
        ("start/researcher.md", "../../CONTRIBUTING.md", "../contributing.md"),
        ("readme.md", "docs/engine.md", "engine.md"),
        ("readme.md", "docs/session.svg", "session.svg"),
        ("readme.md", "benchmarks/results", "source/benchmarks/results.md"),
        ("tour.md", "nowhere.md", "nowhere.md"),
    ):
        assert lead(hooks, page, f"a [link]({link}).") == f"a [link]({expected}).", (page, link)
    code = "```python\n[x](../numballama/graph.py)\n```\n"
    assert lead(hooks, "tour.md", code) == code


def test_lines_that_pages_link_to_have_anchors(hooks: ModuleType) -> None:
    target = Path("numballama/graph.py")
    assert target in {file for file, line in hooks.targets(Path("docs/tour.md")) if line}
    hooks.LINES[target] = {"166", ""}
    assert '<a id="L-166"></a>\n' in hooks.page_text(target)
    page = SimpleNamespace(file=SimpleNamespace(src_uri="source/numballama/graph.py.md"))
    assert 'id="L-166"' in hooks.on_page_content("<h1>graph.py</h1>", page, None, None)


def test_a_folder_is_a_list_of_its_files(hooks: ModuleType) -> None:
    page = hooks.page_text(Path("benchmarks/results"))
    assert page.startswith("# benchmarks/results\n") and page.count(".json`") > 3


def test_the_reference_names_objects_that_exist(hooks: ModuleType) -> None:
    names = [name for _, _, names in hooks.REFERENCE.values() for name in names.split()]
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
    assert len(names) > 40


def test_every_command_is_in_the_reference(hooks: ModuleType) -> None:
    page = hooks.commands_page()
    for command in ("story", "generate", "chat", "serve", "inspect", "bench", "doctor", "export", "completion"):
        assert f"\n## numballama {command}\n\n```text\nusage: numballama {command} " in page
