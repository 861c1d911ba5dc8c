"""The routes of the page: what is served, with which headers, and what `/render` refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from urllib.parse import urlsplit

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from numballama.server import page
from tests.helpers.chat_api import serving


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(Starlette(routes=[*page.routes(), Mount("/behind/a/prefix", routes=page.routes())])) as url:
        yield url


def ask(
    address: str, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[HTTPResponse, bytes]:
    connection = HTTPConnection(urlsplit(address).netloc, timeout=30)
    connection.request(method, path, body, headers or {})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response, content


def render(address: str, text: bytes, content_type: str = "text/markdown") -> tuple[HTTPResponse, bytes]:
    return ask(address, "POST", "/render", text, {"Content-Type": content_type})


def test_the_page_names_only_files_that_exist(address: str) -> None:
    """In index.html, in imports of scripts; relative, so that the page may stand behind a prefix."""
    for prefix in ("", "/behind/a/prefix"):
        response, html = ask(address, "GET", f"{prefix}/")
        assert response.status == 200 and response.headers["content-type"] == "text/html; charset=utf-8"
        names = re.findall(r'(?:src|href)="(page/[^"#]+)"', html.decode())
        assert {"page/script.js", "page/theme.js", "page/style.css", "page/icon.svg"} <= set(names)
        scripts = [name for name in names if name.endswith(".js")]
        for name in scripts:  # grows by what each imports
            source = ask(address, "GET", f"{prefix}/{name}")[1].decode()
            scripts += {f"page/{other}" for other in re.findall(r'from "\./([^"]+)"', source)} - set(scripts)
        for name in {*names, *scripts}:
            assert ask(address, "GET", f"{prefix}/{name}")[0].status == 200, name
        assert {f"/{name}" for name in {*names, *scripts}} == page.paths() - {"/"}, "no file is without use"


def test_media_types(address: str) -> None:
    for name, kind in (("script.js", "text/javascript"), ("style.css", "text/css"), ("icon.svg", "image/svg+xml")):
        assert ask(address, "GET", f"/page/{name}")[0].headers["content-type"].split(";")[0] == kind


def test_nothing_else_of_the_package_is_served(address: str) -> None:
    for path in ("/page/__init__.py", "/page/", "/page", "/page/../__init__.py", "/page/%2e%2e/__init__.py"):
        assert ask(address, "GET", path)[0].status == 404, path
    assert ask(address, "POST", "/")[0].status == 405


@pytest.mark.parametrize("path", ["/", "/page/script.js", "/render"])
def test_headers(address: str, path: str) -> None:
    response, _ = render(address, b"a") if path == "/render" else ask(address, "GET", path)
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["img-src"] == "'self' data:"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"


def test_files_are_asked_for_again_and_sent_once(address: str) -> None:
    response, content = ask(address, "GET", "/page/script.js")
    tag = response.headers["etag"]
    assert response.headers["cache-control"] == "no-cache" and content
    for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        response, content = ask(address, "GET", "/page/script.js", headers={"If-None-Match": known})
        assert (response.status, content, response.headers["etag"]) == (304, b"", tag)
    assert ask(address, "GET", "/page/script.js", headers={"If-None-Match": '"other"'})[0].status == 200
    assert ask(address, "HEAD", "/page/script.js")[0].headers["etag"] == tag


def test_no_code_and_no_style_in_the_html(address: str) -> None:
    """The policy forbids them: they would do nothing."""
    html = ask(address, "GET", "/")[1].decode()
    assert not re.search(r"<style|\son\w+=|\sstyle=|<script(?![^>]*\ssrc=)", html)
    assert "//" not in re.sub(r"https?://www\.w3\.org/\S+", "", html), "nothing comes from elsewhere"


def test_html_is_made_of_a_string_in_one_place_only() -> None:
    sources = {name: page._files()[name][0].decode() for name in page.paths() if name.endswith(".js")}
    wanted = r"\b(?:innerHTML|outerHTML\s*=|insertAdjacentHTML|document\.write|DOMParser|srcdoc|eval|new Function)\b"
    lines = [f"{name}: {line.strip()}" for name, text in sources.items() for line in text.splitlines()]
    uses = [line for line in lines if re.search(wanted, line)]
    assert uses == ["/page/render.js: template.innerHTML = policy ? policy.createHTML(html) : html;"]


def test_files_of_the_page_are_short() -> None:
    for name, (content, _) in page._files().items():
        assert content.count(b"\n") <= 500, f"{name} is too long: split it"


def test_render(address: str) -> None:
    response, html = render(address, "**ü** <script>".encode(), "Text/Markdown; charset=utf-8")
    assert response.status == 200 and html.decode() == "<p><strong>ü</strong> &lt;script&gt;</p>\n"
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["cache-control"] == "no-store"
    assert render(address, b"")[1] == b""


def test_render_takes_a_text_of_the_largest_size_and_no_larger(address: str) -> None:
    text = b"word " * (page.MAX_RENDER_BYTES // 5 + 1)
    assert render(address, text[: page.MAX_RENDER_BYTES])[0].status == 200
    response, content = render(address, text)
    error = json.loads(content)["error"]
    assert response.status == 413 and error["message"] == "a text to render may have at most 262,144 bytes"
    assert error["type"] == "request_too_large" and response.headers["x-content-type-options"] == "nosniff"


def test_render_refuses_what_is_no_markdown(address: str) -> None:
    response, content = render(address, b"\xff\xfe")
    assert response.status == 400 and b"not UTF-8" in content
    for other in ("text/plain", "application/x-www-form-urlencoded", "application/json", ""):
        assert render(address, b"a", other)[0].status == 415, "a page of another site could send it"
    assert ask(address, "GET", "/render")[0].status == 405


def test_render_does_not_wait_for_ever(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "BODY_TIMEOUT_S", 0.2)
    connection = HTTPConnection(urlsplit(address).netloc, timeout=30)
    connection.putrequest("POST", "/render")
    connection.putheader("Content-Type", "text/markdown")
    connection.putheader("Content-Length", "1000")
    connection.endheaders(b"only a part")
    assert connection.getresponse().status == 408
    connection.close()


def test_a_client_that_goes_away_is_no_error(address: str, caplog: pytest.LogCaptureFixture) -> None:
    connection = HTTPConnection(urlsplit(address).netloc, timeout=30)
    connection.putrequest("POST", "/render")
    connection.putheader("Content-Type", "text/markdown")
    connection.putheader("Content-Length", "1000")
    connection.endheaders(b"only a part")
    connection.close()
    assert render(address, b"next")[0].status == 200
    assert not caplog.records
