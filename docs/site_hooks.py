"""What `mkdocs build` does beside reading docs/: mkdocs calls these functions (mkdocs.yml names this file).

Pages link to files of the repository outside docs/, as GitHub shows them. Here such a file becomes a page of the site:
Markdown as it is, source as a listing with numbered lines. The reference is made from docstrings and from the command
line's --help.
"""

from __future__ import annotations

import argparse
import os
import posixpath
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\]\()([^()\s#:]+)((?:#[^()\s]*)?\))")
FENCE = re.compile(r"^(```|~~~).*?^\1\s*$", re.MULTILINE | re.DOTALL)
OWN_PAGES = {
    "README.md": "readme.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/NOTES.md": "benchmarks/notes.md",
}
"""Files outside docs/ that are in the navigation → their pages."""
LANGUAGES = {".py": "python", ".json": "json", ".toml": "toml", ".sh": "sh"}
LINES: dict[Path, set[str]] = {}
"""Source file → numbers of the lines that pages link to."""
MOST_BYTES = 300_000
"""A file that is larger is no page; the link leads to the overview."""

REFERENCE = {
    "python.md": (
        "Python",
        "What `import numballama` has. A model is compiled, then it generates; errors are at the end.",
        """
        numballama.compile numballama.inspect numballama.load_tokenizer numballama.model.Model
        numballama.sampling.SamplingParams numballama.generate.GenerationResponse numballama.chat.conversation.Chat
        numballama.chat.conversation.Turn numballama.inspection.Inspection numballama.explain.explanation.Explanation
        numballama.explain.explanation.ExplainedText numballama.bench.profiler.Profile
        numballama.bench.perplexity.perplexity numballama.importance.measure numballama.tokenizers.base.Tokenizer
        numballama.errors.Error numballama.errors.FormatError numballama.errors.UnsupportedError
        numballama.errors.DeviceError numballama.errors.ContextError numballama.errors.Interrupted
        """,
    ),
    "engine.md": (
        "The engine",
        "Many requests at once, from any thread: what `model.engine()` returns and what it gives.",
        """
        numballama.generate.TextEngine numballama.engine.engine.Engine numballama.engine.request.Request
        numballama.engine.request.TokenLogprobs numballama.engine.stats.EngineStats
        """,
    ),
    "graph.md": (
        "Graph, plan and kernels",
        "What a new operator, fusion, architecture or backend is made of.",
        """
        numballama.config.ModelConfig numballama.checkpoint.Weight numballama.checkpoint.Checkpoint numballama.ir.Value
        numballama.ir.Op numballama.ir.Rule numballama.ir.rule numballama.ir.fused_rule numballama.ir.Graph
        numballama.ir.verify numballama.graph.KVLayout numballama.graph.Builder numballama.graph.llama_layer
        numballama.graph.build numballama.fusion.fuse numballama.registry.kernel numballama.registry.Kernel
        numballama.plan.Step numballama.plan.Placement numballama.plan.Plan numballama.plan.lower
        numballama.backend.Backend numballama.backend.Program numballama.backend.open_backend
        """,
    ),
}
"""Page → title, first sentence and the objects that it describes."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that docs/ does not have."""
    for name, (title, sentence, objects) in REFERENCE.items():
        text = "\n\n".join([f"# {title}", sentence, *(f"::: {name}" for name in objects.split())])
        files.append(File.generated(config, f"reference/{name}", content=text + "\n"))
    files.append(File.generated(config, "reference/commands.md", content=commands_page()))
    docs = [file.src_uri for file in files.documentation_pages() if file.generated_by is None]
    waiting = [Path("docs", uri) for uri in docs] + [Path(name) for name in OWN_PAGES]
    done: set[Path] = set(waiting)
    sources: dict[Path, str] = {}
    for name, uri in OWN_PAGES.items():
        files.append(File.generated(config, uri, content=(ROOT / name).read_text(encoding="utf-8")))
    while waiting:
        page = waiting.pop()
        if page.suffix != ".md":
            continue
        for target, line in targets(page):
            LINES.setdefault(target, set()).add(line)
            uri = page_of(target)
            if uri is None or target in done or (target.parts[0] == "docs" and target.suffix != ".py"):
                continue
            done.add(target)
            waiting.append(target)
            sources[target] = uri
    for target, uri in sources.items():
        files.append(File.generated(config, uri, content=page_text(target), inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links out of docs/ to the pages that were added."""
    source = repository_path(page.file.src_uri)
    if source is None:
        return markdown
    here = posixpath.dirname(page.file.src_uri)

    def lead(match: re.Match[str]) -> str:
        target = resolve(source, match[2])
        if target is None:
            return match[0]
        uri = page_of(target)
        if uri is None:
            uri = target.relative_to("docs").as_posix() if target.parts[0] == "docs" else None
        if uri is None:  # a large file, which the site does not have
            return f"]({posixpath.relpath('readme.md', here or '.')})"
        anchor = match[3][:-1] if uri.endswith(".md") else ""
        anchor = re.sub(r"^#L(\d+).*", r"#L-\1", anchor)
        return f"{match[1]}{posixpath.relpath(uri, here or '.')}{anchor})"

    return outside_fences(markdown, lambda text: LINK.sub(lead, text))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the listing into the page of a source file. As a part of the Markdown it would be parsed three times."""
    source = repository_path(page.file.src_uri)
    if source is None or source.suffix == ".md" or (ROOT / source).is_dir():
        return html
    formatter = HtmlFormatter(cssclass="highlight", wrapcode=True, lineanchors="L", linenos="inline")
    lexer = get_lexer_by_name(LANGUAGES.get(source.suffix, "text"))
    heading = html.partition("</h1>")[0]
    return f"{heading}</h1>\n{highlight((ROOT / source).read_text(encoding='utf-8'), lexer, formatter)}"


# Links


def targets(page: Path) -> Iterator[tuple[Path, str]]:
    """Files of the repository that a page links to, and the line ("" for none)."""
    text = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    for _, link, end in LINK.findall(text):
        if (target := resolve(page, link)) is not None:
            line = re.match(r"#L(\d+)", end)
            yield target, line[1] if line else ""


def resolve(page: Path, link: str) -> Path | None:
    """The file or folder in the repository that a page's link leads to, as a path from the root. None: no such file."""
    target = Path(os.path.normpath(page.parent / link))
    return target if not target.is_absolute() and ".." not in target.parts and (ROOT / target).exists() else None


def page_of(target: Path) -> str | None:
    """The page of a file or folder of the repository. None: it has none, because it is a picture or too large."""
    name = target.as_posix()
    if name in OWN_PAGES:
        return OWN_PAGES[name]
    if (ROOT / target).is_dir():
        return f"source/{name}.md" if target.parts[0] != "docs" else None
    if target.parts[0] == "docs" and target.suffix != ".py":
        return target.relative_to("docs").as_posix() if target.suffix == ".md" else None
    if (ROOT / target).stat().st_size > MOST_BYTES or target.suffix in (".svg", ".png", ".gguf"):
        return None
    return f"source/{name}" if target.suffix == ".md" else f"source/{name}.md"


def page_text(target: Path) -> str:
    """The Markdown of a page: that of a source file has only its name and the lines that others link to."""
    if target.suffix == ".md":
        return (ROOT / target).read_text(encoding="utf-8")
    if (ROOT / target).is_dir():
        files = sorted(path.name for path in (ROOT / target).iterdir() if not path.name.startswith((".", "__")))
        return "\n".join(
            [
                f"# {target.as_posix()}",
                "",
                "Files of this folder in the repository:",
                "",
                *(f"- `{name}`" for name in files),
            ]
        )
    anchors = "".join(f'<a id="L-{line}"></a>' for line in sorted(LINES[target]) if line)
    return f"---\nhide: [navigation, toc]\nsearch:\n  exclude: true\n---\n\n# {target.as_posix()}\n\n{anchors}\n"


def repository_path(uri: str) -> Path | None:
    """The file of the repository that a page is made of. None for pages that are made otherwise."""
    for name, own in OWN_PAGES.items():
        if uri == own:
            return Path(name)
    if uri.startswith("source/"):
        name = uri.removeprefix("source/")
        return Path(name) if (ROOT / name).exists() else Path(name.removesuffix(".md"))
    return Path("docs", uri) if (ROOT / "docs" / uri).exists() else None


def outside_fences(text: str, change: Callable[[str], str]) -> str:
    """The text with `change` applied to all but its fenced blocks."""
    parts, end = [], 0
    for fence in FENCE.finditer(text):
        parts += [change(text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(text[end:])])


# The command line


def commands_page() -> str:
    """The --help of every command."""
    os.environ["COLUMNS"] = "86"
    sys.path.insert(0, str(ROOT))
    from numballama.cli.main import parser

    main = parser()
    (commands,) = (action for action in main._actions if isinstance(action, argparse._SubParsersAction))
    parts = ["# Commands", "What `numballama COMMAND --help` prints.", "## numballama", _block(main.format_help())]
    for name, command in commands.choices.items():
        parts += [f"## numballama {name}", _block(command.format_help())]
    return "\n\n".join(parts) + "\n"


def _block(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```"
