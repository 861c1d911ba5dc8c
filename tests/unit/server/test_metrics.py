"""Figures of several servers in one text. Those of one server are compared in `test_app.py`."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from numballama.server.metrics import Merged
from tests.helpers.http_server import Running


def test_the_figures_of_servers_keep_their_values_and_get_a_label(server: Running) -> None:
    server.post("/v1/completions", {"prompt": "Once", "max_tokens": 2})
    text = server.get("/metrics").body.decode()
    merged = Merged({"a": text, "b": text}).text().decode()
    assert merged.count("# TYPE numballama:generation_tokens_total counter\n") == 1
    one, both = (
        [each for family in text_string_to_metric_families(t) for each in family.samples] for t in (text, merged)
    )
    assert any(each.name == "numballama:generation_tokens_total" and each.value >= 2 for each in one)
    for name in ("a", "b"):
        figures = {(each.name, frozenset((each.labels | {"replica": name}).items())): each.value for each in one}
        assert figures.items() <= {(each.name, frozenset(each.labels.items())): each.value for each in both}.items()
    assert len(both) == 2 * len(one)
