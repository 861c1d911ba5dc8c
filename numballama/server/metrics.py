"""`Metrics`: figures for Prometheus, with the names of vLLM under `numballama:`."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

if TYPE_CHECKING:
    from .service import Service

PREFIX = "numballama:"
CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
"""Buckets of times to the first token."""
TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
"""Buckets of times between tokens."""
REQUEST_SECONDS = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
"""Buckets of times of whole requests and of their parts."""
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
"""Buckets of numbers of tokens."""


class Metrics:
    """Counters and histograms of one server, and gauges that ask its engine."""

    def __init__(self, service: Service) -> None:
        self._registry, self._engine = CollectorRegistry(), EngineFigures(service)
        http = Counter(f"{PREFIX}http_requests", "HTTP requests answered", ["path", "status"], registry=self._registry)
        self._answered = cache(http.labels)  # which looks for labels behind a lock
        self.reloads = Counter(
            f"{PREFIX}model_reloads", "Times that the model was loaded again", registry=self._registry
        )
        self.begun = False
        """Whether `begin` was called."""

    def begin(self, name: str) -> None:
        """Create what requests for the model are counted with, now that it is loaded and has a name."""
        self.begun = True

        def histogram(what: str, text: str, bounds: Sequence[float]) -> Distribution:
            found = Distribution(PREFIX + what, text, name, bounds)
            self._registry.register(found)
            return found

        self.first_token = histogram(
            "time_to_first_token_seconds", "From the request's arrival to its first token", SECONDS
        )
        self.inter_token = histogram("inter_token_latency_seconds", "Between tokens of one text", TOKEN_SECONDS)
        self.end_to_end = histogram(
            "e2e_request_latency_seconds", "From the request's arrival to its last token", REQUEST_SECONDS
        )
        self.queue = histogram("request_queue_time_seconds", "Waiting for a slot and for pages", REQUEST_SECONDS)
        self.prefill = histogram("request_prefill_time_seconds", "From the slot to the first token", REQUEST_SECONDS)
        self.decode = histogram("request_decode_time_seconds", "From the first token to the last one", REQUEST_SECONDS)
        self.prompt_tokens = histogram("request_prompt_tokens", "Tokens of a prompt", TOKENS)
        self.generated_tokens = histogram("request_generation_tokens", "Tokens generated for a prompt", TOKENS)
        success = Counter(
            f"{PREFIX}request_success", "Texts that ended", ["model_name", "finished_reason"], registry=self._registry
        )
        self.success = {reason: success.labels(name, reason) for reason in ("stop", "length")}
        self.aborted = Counter(
            f"{PREFIX}request_aborted",
            "Requests whose client left, or that took too long",
            ["model_name"],
            registry=self._registry,
        ).labels(name)

    def answered(self, path: str, status: int) -> None:
        """An HTTP request was answered. There are few different paths and states."""
        self._answered(path, status).inc()

    def text(self, counted: Sequence[str] | None = None) -> bytes:
        """All figures in Prometheus' text format. `counted`: those that several processes have counted."""
        return _text(self._engine) + (self.counted() if counted is None else Summed(counted).text())

    def counted(self) -> bytes:
        """What this process has counted."""
        return generate_latest(self._registry)


class Distribution(Collector):
    """A histogram that the event loop's thread alone writes, so it needs no lock. It can count several equal values at
    once, as the times between tokens of a piece of text."""

    def __init__(self, name: str, text: str, model_name: str, bounds: Sequence[float]) -> None:
        self._name, self._text, self._model_name, self._bounds = name, text, model_name, tuple(bounds)
        self._counts, self._sum = [0] * (len(self._bounds) + 1), 0.0
        self._created = time.time()

    def observe(self, value: float, times: int = 1) -> None:
        """The value was seen so many times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def collect(self) -> Iterator[Metric]:
        found = HistogramMetricFamily(self._name, self._text, labels=["model_name"])
        totals = zip([*(str(float(bound)) for bound in self._bounds), "+Inf"], accumulate(self._counts), strict=True)
        found.add_metric([self._model_name], [(bound, total) for bound, total in totals], self._sum)
        found.add_sample(f"{self._name}_created", {"model_name": self._model_name}, self._created)
        yield found


class EngineFigures(Collector):
    """What the engine counts itself, read when Prometheus asks."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        stats = self._service.stats
        if stats is None:
            return
        name = self._service.name
        pages = stats.pages_used + stats.pages_cached + stats.pages_free

        def gauge(what: str, text: str, value: float) -> Metric:
            found = GaugeMetricFamily(PREFIX + what, text, labels=["model_name"])
            found.add_metric([name], value)
            return found

        def counter(what: str, text: str, value: float) -> Metric:
            found = CounterMetricFamily(PREFIX + what, text, labels=["model_name"])
            found.add_metric([name], value)
            return found

        yield gauge("num_requests_running", "Sequences that have a slot", stats.running)
        yield gauge("num_requests_waiting", "Sequences that wait for a slot or for pages", stats.waiting)
        yield gauge(
            "kv_cache_usage_perc", "Used share of the KV cache's pages, 0 to 1", stats.pages_used / max(pages, 1)
        )
        yield gauge("kv_cache_pages_cached", "Pages kept for prompts that begin alike", stats.pages_cached)
        yield gauge("engine_stalled_seconds", "Since the last step ended; 0 without work", stats.stalled_s)
        yield gauge("prompt_tokens_per_second", "Over the last 10 seconds", stats.prompt_tokens_per_second)
        yield gauge("generation_tokens_per_second", "Over the last 10 seconds", stats.generated_tokens_per_second)
        yield counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache", stats.prefix_queries)
        yield counter("prefix_cache_hits", "Prompt tokens found there", stats.prefix_hits)
        yield counter("prompt_tokens", "Prompt tokens computed", stats.prompt_tokens)
        yield counter("generation_tokens", "Tokens generated", stats.generated_tokens)
        yield counter("num_preemptions", "Sequences that gave their pages to others", stats.preemptions)


class Merged(Collector):
    """The figures of several servers. The label `replica` says whose they are."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        """`texts`: name of a replica → its figures in Prometheus' text format."""
        self._families: dict[str, Metric] = {}
        for replica, text in texts.items():
            for family in text_string_to_metric_families(text):
                empty = Metric(family.name, family.documentation, family.type)
                samples = self._families.setdefault(family.name, empty).samples
                samples += [each._replace(labels={**each.labels, "replica": replica}) for each in family.samples]

    def collect(self) -> Iterable[Metric]:
        return self._families.values()

    def text(self) -> bytes:
        return _text(self)


class Summed(Collector):
    """The figures of processes that serve the same model: the sum of each."""

    def __init__(self, texts: Iterable[str]) -> None:
        """`texts`: what each process has counted, in Prometheus' text format."""
        self._families: dict[str, Metric] = {}
        found: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], Sample]] = {}
        for text in texts:
            for family in text_string_to_metric_families(text):
                empty = Metric(family.name, family.documentation, family.type)
                self._families.setdefault(family.name, empty)
                sums = found.setdefault(family.name, {})
                for each in family.samples:
                    key = each.name, tuple(sorted(each.labels.items()))
                    if (known := sums.get(key)) is not None:
                        first = each.name.endswith("_created")  # a time, of which the first counts
                        value = min(known.value, each.value) if first else known.value + each.value
                        each = known._replace(value=value)
                    sums[key] = each
        for name, sums in found.items():
            self._families[name].samples = list(sums.values())

    def collect(self) -> Iterable[Metric]:
        return self._families.values()

    def text(self) -> bytes:
        return _text(self)


def process_figures(ready: int, restarts: int) -> str:
    """What the process that starts those for HTTP counts, in Prometheus' text format."""

    class Processes(Collector):
        def collect(self) -> Iterator[Metric]:
            yield GaugeMetricFamily(f"{PREFIX}http_processes", "Processes for HTTP that answer requests", ready)
            yield CounterMetricFamily(f"{PREFIX}http_process_restarts", "Times that one was started again", restarts)

    return _text(Processes()).decode()


def _text(collector: Collector) -> bytes:
    """What a collector yields, in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(collector)
    return generate_latest(registry)
