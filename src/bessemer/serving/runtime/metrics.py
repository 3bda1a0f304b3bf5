"""`/metrics`: the engine's statistics for Prometheus, under the names that vLLM gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeAlias

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from bessemer.inference.statistics import EngineStatistics, Histogram

#: The form of what `render` returns.
CONTENT_TYPE = CONTENT_TYPE_LATEST
_LABELS = ("model_name", "engine")

_GAUGES = {
    "num_requests_running": ("Sequences that are computed now.", lambda found: found.running),
    "num_requests_waiting": ("Sequences that wait for a place.", lambda found: found.waiting),
    "kv_cache_usage_perc": ("Share of the KV blocks that running sequences hold, 1 is all.", lambda found: _used(found)),
}
_COUNTERS = {
    "prefix_cache_queries": ("Tokens looked up in the prefix cache.", lambda found: found.prefix_cache_query_tokens),
    "prefix_cache_hits": ("Tokens found in the prefix cache.", lambda found: found.prefix_cache_hit_tokens),
    "num_preemptions": ("Times that a sequence gave up its blocks.", lambda found: found.preemptions),
    "prompt_tokens": ("Tokens of prompts.", lambda found: found.prompt_tokens),
    "generation_tokens": ("Tokens that were generated.", lambda found: found.generated_tokens),
    "spec_decode_num_drafts": ("Drafts that were verified.", lambda found: found.drafts),
    "spec_decode_num_draft_tokens": ("Tokens of drafts.", lambda found: found.draft_tokens_proposed),
    "spec_decode_num_accepted_tokens": ("Tokens of drafts that were accepted.", lambda found: found.draft_tokens_accepted),
}
_HISTOGRAMS = {
    "time_to_first_token_seconds": ("From the request to its first token.", lambda found: found.time_to_first_token_seconds),
    "inter_token_latency_seconds": ("Between tokens that follow each other.", lambda found: found.inter_token_seconds),
    "request_time_per_output_token_seconds": (
        "Mean time of the tokens after the first, of a request.",
        lambda found: found.time_per_output_token_seconds,
    ),
    "e2e_request_latency_seconds": ("From the request to its end.", lambda found: found.request_seconds),
    "request_queue_time_seconds": ("From the request to its first step.", lambda found: found.queue_seconds),
    "request_prefill_time_seconds": ("From the first step to the first token.", lambda found: found.prefill_seconds),
    "request_decode_time_seconds": ("From the first token to the end.", lambda found: found.decode_seconds),
    "request_prompt_tokens": ("Tokens of a request's prompt.", lambda found: found.request_prompt_tokens),
    "request_generation_tokens": ("Tokens that a request generated.", lambda found: found.request_generated_tokens),
    "iteration_tokens_total": ("Tokens that a step computed.", lambda found: found.step_tokens),
}


class MeasuredEngine(Protocol):
    """What is told of an engine."""

    @property
    def statistics(self) -> EngineStatistics:
        """Counts and times, between two steps."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the loaded adapters."""


#: The model's name, which of its replicas it is, and the engine of every model that is open.
Engines: TypeAlias = Callable[[], Sequence[tuple[str, str, MeasuredEngine]]]


class EngineCollector(Collector):
    """The statistics of engines as metrics, when they are asked for."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        """The metrics of this moment. It waits for the steps under way."""
        engines = self._engines()
        found = [((name, replica), engine.statistics) for name, replica, engine in engines]
        for name, (text, value) in _GAUGES.items():
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=_LABELS)
            for labels, each in found:
                gauge.add_metric(labels, value(each))
            yield gauge
        for name, (text, value) in _COUNTERS.items():
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=_LABELS)
            for labels, each in found:
                counter.add_metric(labels, value(each))
            yield counter
        finished = CounterMetricFamily(
            "vllm:request_success", "Requests that have ended, by why.", labels=(*_LABELS, "finished_reason")
        )
        for labels, each in found:
            for reason, count in each.finished.items():
                finished.add_metric((*labels, reason), count)
        yield finished
        for name, (text, value) in _HISTOGRAMS.items():
            family = HistogramMetricFamily(f"vllm:{name}", text, labels=_LABELS)
            for labels, each in found:
                _add_histogram(family, labels, value(each))
            yield family
        blocks = GaugeMetricFamily("vllm:cache_config_info", "The KV cache, always 1.", labels=(*_LABELS, "num_gpu_blocks"))
        for labels, each in found:
            blocks.add_metric((*labels, str(sum(total for total, _ in each.blocks))), 1)
        yield blocks
        adapters = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "The loaded adapters, whether or not a request uses them now; always 1.",
            labels=(*_LABELS, "max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        for name, replica, engine in engines:
            adapters.add_metric((name, replica, str(len(engine.adapters)), ",".join(engine.adapters), ""), 1)
        yield adapters


class Metrics:
    """The metrics of a server."""

    def __init__(self, engines: Engines) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(EngineCollector(engines))

    def render(self) -> bytes:
        """All of them in Prometheus' text form. It waits for the steps under way."""
        return generate_latest(self._registry)


def _add_histogram(family: HistogramMetricFamily, labels: tuple[str, ...], values: Histogram) -> None:
    bounds = [*(f"{bound:g}" if bound != int(bound) else f"{bound:.1f}" for bound in values.bounds), "+Inf"]
    family.add_metric(labels, list(zip(bounds, values.cumulative, strict=True)), values.sum)


def _used(found: EngineStatistics) -> float:
    total = sum(total for total, _ in found.blocks)
    return sum(used for _, used in found.blocks) / total if total else 0.0
