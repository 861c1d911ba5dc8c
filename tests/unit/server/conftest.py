"""One model and one server for the tests of `numballama.server`, which are left out without the extra `serve`."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

import numballama

if TYPE_CHECKING:
    from numballama.model import Model
    from tests.helpers.http_server import Running

if any(find_spec(name) is None for name in ("starlette", "uvicorn", "pydantic", "prometheus_client")):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="package")
def model() -> Iterator[Model]:
    """The story model. Its vocabulary fits Llama 2's template, so it answers messages, with stories."""
    with numballama.compile(None, device="cpu", max_sequences=4) as model:
        yield model


@pytest.fixture(scope="package")
def shared(model: Model) -> Iterator[Running]:
    from tests.helpers.http_server import serving

    with serving(model) as running:
        yield running


@pytest.fixture(scope="package")
def shared_linked(model: Model) -> Iterator[Running]:
    from tests.helpers.http_server import serving_linked

    with serving_linked(model) as running:
        yield running


@pytest.fixture
def linked(shared_linked: Running) -> Iterator[Running]:
    """A server whose engine is behind a link, as that of another process. After each test nothing may be running."""
    from tests.helpers.http_server import eventually

    yield shared_linked
    eventually(lambda: shared_linked.idle, "the end of all requests")


@pytest.fixture(params=["server", "linked"])
def either(request: pytest.FixtureRequest) -> Running:
    """A server whose engine is in this process, and one whose engine is behind a link."""
    found: Running = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def server(shared: Running) -> Iterator[Running]:
    """A server with default settings. After each test nothing may be running."""
    from tests.helpers.http_server import eventually

    yield shared
    eventually(lambda: shared.idle, "the end of all requests")
