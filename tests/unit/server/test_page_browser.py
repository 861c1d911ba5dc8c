"""The page in a headless Chromium, with a fake API: what a person does, and what is sent and shown then."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from numballama.model import Model
from tests.helpers.chat_api import HOSTILE, FakeAPI, serving
from tests.helpers.chromium import CHROMIUM, Browser, chromium
from tests.helpers.http_server import eventually
from tests.helpers.http_server import serving as serve_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Debian's package chromium is not installed"),
]

ANSWERS = "[...document.querySelectorAll('.message.assistant:not(.running) .body')].map(e => e.innerText)"
FIGURES = "[...document.querySelectorAll('.figures')].map(e => e.innerText.replaceAll('\\u00a0', ' '))"
MESSAGES = "[...document.querySelectorAll('.message .body')].map(e => e.innerText)"

RENDERED = "document.querySelector('.assistant .body > *') && !document.querySelector('.tail')"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def api() -> FakeAPI:
    return FakeAPI()


@pytest.fixture
def chat(browser: Browser, api: FakeAPI) -> Iterator[Browser]:
    """The page, opened with empty storage: each server has a port, and so an origin, of its own."""
    with serving(api.app) as url:
        browser.size(1280, 800)
        browser.prefer("light")
        browser.troubles.clear()
        browser.open(f"{url}/")
        browser.wait("document.querySelector('#model').textContent || !document.querySelector('#banner').hidden")
        yield browser
        assert not browser.troubles
        browser.open("about:blank")  # the page's connections end before the server does


def say(chat: Browser, text: str, answers: int = 1) -> str:
    """Send a message and wait for the answer; `answers` are then shown."""
    chat.run("document.querySelector('#message').focus()")
    chat.type(text)
    chat.press("Enter")
    chat.wait(f"{ANSWERS}.length === {answers} && !document.querySelector('#send').classList.contains('stops')")
    return str(chat.run(f"{ANSWERS}.at(-1)"))


def button(label: str, number: int = -1) -> str:
    """Click the last button of a name, as a keyboard does."""
    return f"[...document.querySelectorAll('[aria-label={json.dumps(label)}]')].at({number}).click()"


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def stored(chat: Browser) -> list[dict[str, Any]]:
    text = "JSON.stringify(Object.keys(localStorage).filter(k => k.includes('conversation')).map(k => localStorage[k]))"
    return [json.loads(one) for one in json.loads(chat.run(text))]


def choose(chat: Browser, **values: str) -> None:
    """Fill fields of the settings."""
    for name, value in values.items():
        chat.run(
            f"(form => {{ form.elements[{name!r}].value = {value!r}; form.dispatchEvent(new Event('input')); }})"
            "(document.querySelector('#settings-form'))"
        )


def test_a_conversation(chat: Browser, api: FakeAPI) -> None:
    assert chat.run("document.querySelector('#model').textContent") == "SmolLM2-360M-Instruct-Q8_0"
    assert chat.run("document.activeElement.id") == "message"
    assert say(chat, "one") == "Answer 1 to: one."
    assert say(chat, "two", 2) == "Answer 2 to: two."
    first, second = api.requests
    assert first["messages"] == [{"role": "user", "content": "one"}]
    assert second["messages"] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "Answer 1 to: one."},
        {"role": "user", "content": "two"},
    ]
    assert second["stream"] is True and second["stream_options"] == {"include_usage": True}
    assert set(second) == {"model", "messages", "stream", "stream_options"}, "what is not set is left to the server"
    figures = chat.run(FIGURES)[1]
    assert figures.startswith("4 tokens · ") and figures.endswith(" · 40 of 60 prompt tokens cached")
    assert "tokens/s · first token after" in figures
    assert chat.run("document.querySelector('#context').textContent") == "64 of 4,096 tokens of context used"
    assert chat.run("document.title") == "one · numballama"


def test_keys(chat: Browser, api: FakeAPI) -> None:
    """Shift+Enter starts a line, Enter sends, and an empty message is not sent."""
    chat.press("Enter")
    chat.type("a")
    chat.press("Enter", shift=True)
    chat.type("b")
    assert chat.run("document.querySelector('#message').value") == "a\nb" and not api.requests
    chat.press("Enter")
    until(lambda: bool(api.requests))
    assert api.requests[0]["messages"][0]["content"] == "a\nb"
    chat.wait(FIGURES + ".length")
    order = []
    for _ in range(12):
        chat.press("Tab")
        order.append(
            chat.run("document.activeElement.id || document.activeElement.getAttribute('aria-label') || 'body'")
        )
    assert "send" in order and "new-chat" in order and "open-settings" in order
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert chat.run(outline) != "none" or chat.run("document.activeElement === document.body")


def test_markdown_code_and_reasoning(chat: Browser) -> None:
    say(chat, "search")
    chat.wait(RENDERED)
    assert chat.run("document.querySelector('.body table .align-right').innerText") == "Comparisons"
    assert chat.run("document.querySelector('.body pre code').textContent").startswith("def find(")
    assert chat.run("document.querySelector('.code-bar').innerText") == "python"
    assert chat.run("document.querySelector('.body a').rel") == "noopener noreferrer nofollow"
    assert chat.run("document.querySelector('.reasoning').open") is False
    assert "compare two methods" in chat.run("document.querySelector('.thought').textContent")
    chat.send("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    chat.run(button("Copy code"))
    chat.wait("document.querySelector('#toast').innerText === 'Copied'")
    assert chat.run("navigator.clipboard.readText()").endswith("== wanted else None")
    chat.run(button("Copy message"))
    chat.wait("navigator.clipboard.readText().then(text => text.includes('|---|---:|'))")


def test_text_is_shown_before_it_is_rendered(chat: Browser) -> None:
    """Without /render an answer is plain text."""
    chat.run(
        "(() => { const real = fetch;"
        "window.fetch = (url, ...rest) => url === 'render' ? Promise.reject(new TypeError()) : real(url, ...rest); })()"
    )
    assert "a **binary search**" in say(chat, "search").lower()
    assert chat.run("document.querySelector('.body strong')") is None


def test_hostile_answers_stay_text(chat: Browser) -> None:
    assert say(chat, "hostile") == HOSTILE
    chat.wait(RENDERED)
    assert chat.run(f"{ANSWERS}[0]") == HOSTILE
    assert chat.run("window.hacked === undefined && !document.querySelector('.body :is(img, script, a)')") is True
    assert say(chat, HOSTILE, 2) == f"Answer 2 to: {HOSTILE}."
    assert chat.run("window.hacked === undefined && !document.querySelector('#conversations img')") is True


def test_stop(chat: Browser, api: FakeAPI) -> None:
    chat.type("slow")
    chat.press("Enter")
    chat.wait("document.querySelector('.message.assistant .body').innerText.length > 20")
    assert chat.run("document.querySelector('#send').getAttribute('aria-label')") == "Stop generating"
    assert api.running == 1
    chat.press("Escape")
    chat.wait(FIGURES + ".at(-1)?.startsWith('Stopped · about ')")
    until(lambda: api.running == 0)
    assert say(chat, "again", 2) == "Answer 2 to: again."
    assert api.requests[1]["messages"][1]["content"].startswith("word word"), "the part that came is kept"
    chat.run("document.querySelector('#message').focus()")
    chat.type("slow")
    chat.press("Enter")
    chat.wait("document.querySelector('.running .body')?.innerText.length > 20")
    chat.click("#send")
    chat.wait(f"{FIGURES}.length === 3")
    until(lambda: api.running == 0)


def test_edit_makes_a_branch(chat: Browser, api: FakeAPI) -> None:
    say(chat, "one")
    say(chat, "two", 2)
    chat.run(button("Edit message", 0))
    chat.press("Escape")
    assert chat.run(MESSAGES)[0] == "one"
    chat.run(button("Edit message", 0))
    chat.run("document.activeElement.select()")
    chat.type("eins")
    chat.press("Enter")
    chat.wait(f"{ANSWERS}[0] === 'Answer 3 to: eins.'")
    assert chat.run(MESSAGES) == ["eins", "Answer 3 to: eins."]
    assert api.requests[2]["messages"] == [{"role": "user", "content": "eins"}]
    assert chat.run("document.querySelector('.versions').innerText").strip() == "2/2"
    chat.run(button("Previous version"))
    assert chat.run(MESSAGES) == ["one", "Answer 1 to: one.", "two", "Answer 2 to: two."]


def test_regenerate(chat: Browser, api: FakeAPI) -> None:
    say(chat, "one")
    chat.run(button("Regenerate answer"))
    chat.wait(f"{ANSWERS}[0] === 'Answer 2 to: one.'")
    assert api.requests[0] == api.requests[1]
    chat.wait("document.querySelector('.versions')?.innerText.trim() === '2/2'")
    chat.run(button("Previous version"))
    assert chat.run(MESSAGES) == ["one", "Answer 1 to: one."]
    say(chat, "two", 2)
    assert api.requests[2]["messages"][1]["content"] == "Answer 1 to: one.", "the shown version is what is sent"


def test_settings_are_sent(chat: Browser, api: FakeAPI) -> None:
    chat.click("#open-settings")
    choose(chat, system="Be brief.", temperature="0.5", top_p="0.9", top_k="40", min_p="0.05")
    choose(chat, repetition_penalty="1.1", seed="7", max_tokens="100")
    say(chat, "one")
    sent = api.requests[0]
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    wanted = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1, "seed": 7}
    assert {name: sent[name] for name in (*wanted, "max_tokens")} == {**wanted, "max_tokens": 100}
    choose(chat, temperature="9")
    assert chat.run("document.querySelector('#temperature').getAttribute('aria-invalid')") == "true"
    chat.run("document.querySelector('#message').focus()")
    chat.type("two")
    chat.press("Enter")
    chat.wait("document.activeElement.id === 'temperature'")
    assert len(api.requests) == 1, "a value that the server would refuse is not sent"
    assert chat.run("document.querySelector('#message').value") == "two"


def test_structured_output(chat: Browser, api: FakeAPI) -> None:
    chat.click("#open-settings")
    choose(chat, format="json", schema='{"type": ')
    assert chat.run("document.querySelector('#schema-check').textContent").startswith("This is not JSON: ")
    choose(chat, schema="[1]")
    assert "is an object" in chat.run("document.querySelector('#schema-check').textContent")
    choose(chat, schema='{"type": "object"}')
    assert chat.run("document.querySelector('#schema-check').textContent") == "This is valid JSON."
    assert '"year": 2026' in say(chat, "who?")
    form = api.requests[0]["response_format"]
    assert form["type"] == "json_schema" and form["json_schema"]["schema"] == {"type": "object"}
    choose(chat, format="regex", regex="(yes|no)")
    say(chat, "sure?", 2)
    assert api.requests[1]["regex"] == "(yes|no)" and "response_format" not in api.requests[1]


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("busy", "The server is busy. Try again in 3 s."),
        ("fail", "Something failed in the server (500). The server says: a kernel failed"),
        ("break", "The connection ended before the answer was complete."),
    ],
)
def test_errors_and_another_try(chat: Browser, api: FakeAPI, message: str, shown: str) -> None:
    say(chat, message)
    assert chat.run("document.querySelector('.trouble p').innerText") == shown
    assert chat.run("document.querySelector('.trouble').getAttribute('role')") == "alert"
    chat.run("document.querySelector('.trouble button').click()")
    until(lambda: len(api.requests) == 2)
    assert api.requests[0] == api.requests[1]
    assert chat.run("document.querySelectorAll('.message.user').length") == 1


def test_the_server_is_gone(browser: Browser, api: FakeAPI) -> None:
    with serving(api.app) as url:
        browser.open(f"{url}/")
        browser.wait("document.querySelector('#model').textContent")
    browser.type("one")
    browser.press("Enter")
    browser.wait("document.querySelector('.trouble p')?.innerText.startsWith('The server does not answer.')")
    browser.open("about:blank")


def test_api_key(browser: Browser, api: FakeAPI) -> None:
    api.wanted_key = "secret"
    with serving(api.app) as url:
        browser.open(f"{url}/")
        browser.wait("document.querySelector('#banner p')?.innerText.startsWith('The server wants an API key')")
        browser.run("document.querySelector('#banner button').click()")
        browser.wait("document.activeElement.id === 'api-key'")
        browser.type("secret")
        browser.press("Enter")
        browser.wait("document.querySelector('#banner').hidden && document.querySelector('#model').textContent")
        assert say(browser, "one") == "Answer 1 to: one."
        assert api.keys[-1] == "Bearer secret"
        everything = "JSON.stringify(localStorage) + document.cookie"
        assert "secret" not in browser.run(everything), "the key is not kept"
        browser.open("about:blank")


def test_conversations_are_kept_renamed_and_deleted(chat: Browser) -> None:
    titles = "[...document.querySelectorAll('#conversations .open')].map(e => e.innerText)"
    say(chat, "one")
    chat.click("#new-chat")
    assert chat.run(MESSAGES) == [] and chat.run("document.activeElement.id") == "message"
    say(chat, "two")
    assert chat.run(titles) == ["two", "one"]
    chat.reload()
    chat.wait(f"{titles}.length === 2 && {MESSAGES}.length === 2")
    assert chat.run(MESSAGES) == ["two", "Answer 2 to: two."]
    chat.run(button("Rename “one”"))
    chat.run("document.activeElement.select()")
    chat.type("first")
    chat.press("Enter")
    assert chat.run(titles) == ["two", "first"]
    chat.run(button("Delete “two”"))
    assert chat.run(titles) == ["first"] and chat.run(MESSAGES)[0] == "one" and len(stored(chat)) == 1
    chat.run("document.querySelector('#toast button').click()")
    assert chat.run(titles) == ["two", "first"] and len(stored(chat)) == 2


def test_export_and_import(chat: Browser, tmp_path: Path) -> None:
    chat.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    say(chat, "one")
    chat.run(button("Regenerate answer"))
    chat.wait(f"{ANSWERS}[0] === 'Answer 2 to: one.'")
    before = stored(chat)
    chat.click("#export")
    until(lambda: len(list(tmp_path.glob("*.json"))) == 1)
    (file,) = tmp_path.glob("*.json")
    assert json.loads(file.read_text())["conversations"] == before
    chat.run(button("Delete “one”"))
    assert stored(chat) == []

    def load(path: Path) -> None:
        root = chat.send("DOM.getDocument")["root"]["nodeId"]
        node = chat.send("DOM.querySelector", nodeId=root, selector="#import-file")["nodeId"]
        chat.send("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    load(file)
    chat.wait(f"{MESSAGES}.length === 2")
    assert stored(chat) == before and chat.run("document.querySelector('.versions').innerText").strip() == "2/2"
    for text in ("{", "[]", '{"format": "numballama conversations", "version": 1, "conversations": [{"id": "x"}]}'):
        (tmp_path / "bad.json").write_text(text)
        chat.run("document.querySelector('#toast').replaceChildren()")
        load(tmp_path / "bad.json")
        chat.wait("document.querySelector('#toast').innerText.startsWith('Nothing was imported.')")
    assert stored(chat) == before


def test_light_and_dark(chat: Browser) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    light = chat.run(colour)
    chat.prefer("dark")
    dark = chat.run(colour)
    assert light == "rgb(255, 255, 255)" and dark != light
    chat.wait("document.querySelector('#theme').getAttribute('aria-pressed') === 'true'")
    chat.click("#theme")
    assert chat.run(colour) == light
    chat.reload()
    chat.wait(f"document.querySelector('#model').textContent && {colour} === {light!r}")
    chat.prefer("light")
    assert chat.run(colour) == light


def test_sentences_are_announced(chat: Browser) -> None:
    """Not tokens. Code is named and not read."""
    chat.run(
        "window.said = []; new MutationObserver(changes => changes.forEach(c => c.addedNodes.forEach(n => "
        "said.push(n.textContent)))).observe(document.querySelector('#announcements'), {childList: true})"
    )
    assert chat.run("document.querySelector('#announcements').getAttribute('aria-live')") == "polite"
    say(chat, "search")
    said = chat.run("said")
    assert said[0] == "The model is answering" and said[-1] == "End of the answer"
    assert "A binary search halves a sorted list until the value is found." in said
    assert "def find" not in " ".join(said) and "Code block." in said
    assert said[-2] == "2. With few elements a plain loop is as fast; see the manual." and len(said) == 9


def test_names_of_controls(chat: Browser) -> None:
    """Each control has a name that a screen reader can say, and the page has its landmarks."""
    say(chat, "search")
    chat.click("#open-settings")
    nodes = chat.send("Accessibility.getFullAXTree")["nodes"]
    roles = {node["role"]["value"] for node in nodes if not node["ignored"]}
    assert {"navigation", "main", "complementary", "article", "heading"} <= roles
    wanted = {"button", "textbox", "radio", "spinbutton", "link"}
    controls = [node for node in nodes if not node["ignored"] and node["role"]["value"] in wanted]
    assert len(controls) > 20
    assert not [node for node in controls if not node["name"]["value"].strip()]


def test_on_a_phone(chat: Browser, tmp_path: Path) -> None:
    """360 pixels wide: nothing sticks out, and the panels open, close and give the focus back."""
    chat.size(360, 740)
    say(chat, "search")
    chat.wait(RENDERED)
    is_narrow = "document.documentElement.scrollWidth <= 360 && document.querySelector('#scroller').scrollWidth <= 360"
    assert chat.run(is_narrow) is True
    assert chat.run("document.querySelector('#send').getBoundingClientRect().right") <= 360
    small = (
        "[...document.querySelectorAll('button')].filter(e => e.checkVisibility({visibilityProperty: true}))"
        ".map(e => e.getBoundingClientRect()).filter(r => r.width < 24 || r.height < 24).length"
    )
    for name in ("sidebar", "settings"):
        chat.click(f"#open-{name}")
        chat.wait(f"document.querySelector('#{name}').contains(document.activeElement)")
        assert chat.run("document.querySelector('main').inert") is True
        assert chat.run(small) == 0
        assert chat.run(is_narrow) is True
        chat.press("Escape")
        chat.wait(f"document.activeElement.id === 'open-{name}' && !document.querySelector('main').inert")
    chat.screenshot(tmp_path / "phone.png")


def test_a_real_server(browser: Browser, model: Model, tmp_path: Path) -> None:
    """Two turns of a conversation, a regenerated answer, and an answer that follows a schema."""
    with serve_model(model) as server:
        browser.troubles.clear()
        browser.open(f"{server.url}/")
        browser.wait("document.querySelector('#model').textContent")
        choose(browser, max_tokens="100")  # three answers fit the context of 512, whatever is sampled
        assert say(browser, "Tell me of a dog that found a big red ball in the park, and of his friend the cat.")
        assert "tokens/s" in browser.run(f"{FIGURES}.at(-1)")
        assert say(browser, "And then?", answers=2)
        browser.run(button("Regenerate answer"))
        browser.wait(f"{ANSWERS}.length === 2 && !document.querySelector('#send').classList.contains('stops')")
        schema = {"type": "object", "properties": {"dog": {"enum": ["red", "big"]}}, "required": ["dog"]}
        choose(browser, format="json", schema=json.dumps(schema | {"additionalProperties": False}))
        shown = say(browser, "Which dog?", answers=3).removeprefix("json")  # a block of code with its label
        assert json.loads(shown)["dog"] in ("red", "big")
        browser.screenshot(tmp_path / "page.png")
        assert not browser.troubles
        browser.open("about:blank")
        eventually(lambda: server.idle, "the end of all requests")
