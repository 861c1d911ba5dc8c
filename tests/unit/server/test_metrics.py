"""Figures of several servers in one text. Those of one server are compared in `test_generation.py`."""

from __future__ import annotations

import numpy as np
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from numballama.server.metrics import PREFIX, TOKEN_SECONDS, Distribution, Merged, Summed, process_figures
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


def test_times_between_tokens_are_a_histogram_of_prometheus() -> None:
    """The same samples as of the library's own, which counts one at a time; bounds belong to the bucket below them."""
    name, text, labels = f"{PREFIX}inter_token_latency_seconds", "Between tokens of one text", ["model_name"]
    ours, theirs, rng = CollectorRegistry(), CollectorRegistry(), np.random.default_rng(0)
    times = Distribution(name, text, "m", TOKEN_SECONDS)
    ours.register(times)
    theirs_times = Histogram(name, text, labels, buckets=TOKEN_SECONDS, registry=theirs).labels("m")
    for seconds in [0.0, *TOKEN_SECONDS, 7.0, *rng.exponential(0.1, 50)]:
        count = int(rng.integers(1, 5))
        times.observe(seconds, count)
        for _ in range(count):
            theirs_times.observe(seconds)

    def samples(registry: CollectorRegistry) -> dict[tuple[str, str], float]:
        families = text_string_to_metric_families(generate_latest(registry).decode())
        return {
            (each.name, each.labels.get("le", "")): round(each.value, -3 if each.name.endswith("_created") else 9)
            for family in families
            for each in family.samples
        }

    assert samples(ours) == samples(theirs) and len(samples(ours)) == len(TOKEN_SECONDS) + 4


def test_figures_of_processes_are_added() -> None:
    """But not the time since which they count. A label that one process lacks keeps the other's value."""

    def text(count: int, since: int, more: str = "") -> str:
        lines = ["# TYPE a_total counter", f'a_total{{x="1"}} {count}', more]
        lines += ["# TYPE a_created gauge", f'a_created{{x="1"}} {since}']
        return "\n".join([*lines, "# TYPE h histogram", f'h_bucket{{le="+Inf"}} {count}', f"h_sum {count / 2}", ""])

    found = Summed([text(3, 9), text(4, 7, 'a_total{x="2"} 1'), text(0, 8)])
    samples = {(each.name, *each.labels.values()): each.value for family in found.collect() for each in family.samples}
    assert samples == {
        ("a_total", "1"): 7, ("a_created", "1"): 7, ("a_total", "2"): 1, ("h_bucket", "+Inf"): 7, ("h_sum",): 3.5,
    }  # fmt: skip
    assert Summed([found.text().decode()]).text() == found.text()


def test_figures_about_processes() -> None:
    text = Summed([process_figures(3, 2)]).text().decode()
    assert "\n# TYPE numballama:http_processes gauge\nnumballama:http_processes 3.0\n" in text
    assert "\nnumballama:http_process_restarts_total 2.0\n" in text
