"""`/metrics`: the engine's statistics for Prometheus, under the names that vLLM gives them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from bessemer.inference.statistics import EngineStatistics, Histogram

#: Content type of `render_metrics`.
CONTENT_TYPE = CONTENT_TYPE_LATEST
_LABELS = ("model_name", "engine")


def _kv_cache_usage(engine: EngineStatistics) -> float:
    total = sum(total for total, _ in engine.blocks)
    return sum(used for _, used in engine.blocks) / total if total else 0.0


_GAUGES = {
    "num_requests_running": ("Sequences that are computed now.", lambda engine: engine.running),
    "num_requests_waiting": ("Sequences that wait for a place.", lambda engine: engine.waiting),
    "kv_cache_usage_perc": ("Share of the KV blocks that running sequences hold, 1 is all.", _kv_cache_usage),
}
_COUNTERS = {
    "prefix_cache_queries": ("Tokens looked up in the prefix cache.", lambda engine: engine.prefix_cache_query_tokens),
    "prefix_cache_hits": ("Tokens found in the prefix cache.", lambda engine: engine.prefix_cache_hit_tokens),
    "num_preemptions": ("Times that a sequence gave up its blocks.", lambda engine: engine.preemptions),
    "prompt_tokens": ("Tokens of prompts.", lambda engine: engine.prompt_tokens),
    "generation_tokens": ("Tokens that were generated.", lambda engine: engine.generated_tokens),
    "spec_decode_num_drafts": ("Drafts that were verified.", lambda engine: engine.drafts),
    "spec_decode_num_draft_tokens": ("Tokens of drafts.", lambda engine: engine.draft_tokens_proposed),
    "spec_decode_num_accepted_tokens": ("Tokens of drafts that were accepted.", lambda engine: engine.draft_tokens_accepted),
}
_HISTOGRAMS = {
    "time_to_first_token_seconds": ("From the request to its first token.", lambda engine: engine.time_to_first_token_seconds),
    "inter_token_latency_seconds": ("Between tokens that follow each other.", lambda engine: engine.inter_token_seconds),
    "request_time_per_output_token_seconds": (
        "Mean time of the tokens after the first, of a request.",
        lambda engine: engine.time_per_output_token_seconds,
    ),
    "e2e_request_latency_seconds": ("From the request to its end.", lambda engine: engine.request_seconds),
    "request_queue_time_seconds": ("From the request to its first step.", lambda engine: engine.queue_seconds),
    "request_prefill_time_seconds": ("From the first step to the first token.", lambda engine: engine.prefill_seconds),
    "request_decode_time_seconds": ("From the first token to the end.", lambda engine: engine.decode_seconds),
    "request_prompt_tokens": ("Tokens of a request's prompt.", lambda engine: engine.request_prompt_tokens),
    "request_generation_tokens": ("Tokens that a request generated.", lambda engine: engine.request_generated_tokens),
    "iteration_tokens_total": ("Tokens that a step computed.", lambda engine: engine.step_tokens),
}


class MeasuredEngine(Protocol):
    """What metrics need of an engine."""

    @property
    def statistics(self) -> EngineStatistics:
        """Counts and times, between two steps."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the loaded adapters."""


#: Name, replica number and engine of every open model.
Engines: TypeAlias = Sequence[tuple[str, str, MeasuredEngine]]


@dataclass(eq=False)
class EngineCollector(Collector):
    """Metrics of engines."""

    engines: Engines

    def collect(self) -> Iterator[Metric]:
        """Current values. Waits for the engines' current steps."""
        measured = [((name, replica), engine.statistics) for name, replica, engine in self.engines]
        for kind, metrics in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, (text, value) in metrics.items():
                family = kind(f"vllm:{name}", text, labels=_LABELS)
                for labels, statistics in measured:
                    family.add_metric(labels, value(statistics))
                yield family
        finished = CounterMetricFamily(
            "vllm:request_success", "Requests that have ended, by why.", labels=(*_LABELS, "finished_reason")
        )
        for labels, statistics in measured:
            for reason, count in statistics.finished.items():
                finished.add_metric((*labels, reason), count)
        yield finished
        for name, (text, histogram) in _HISTOGRAMS.items():
            distribution = HistogramMetricFamily(f"vllm:{name}", text, labels=_LABELS)
            for labels, statistics in measured:
                _add_histogram(distribution, labels, histogram(statistics))
            yield distribution
        blocks = GaugeMetricFamily("vllm:cache_config_info", "The KV cache, always 1.", labels=(*_LABELS, "num_gpu_blocks"))
        for labels, statistics in measured:
            blocks.add_metric((*labels, str(sum(total for total, _ in statistics.blocks))), 1)
        yield blocks
        adapters = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "The loaded adapters, whether or not a request uses them now; always 1.",
            labels=(*_LABELS, "max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        for name, replica, engine in self.engines:
            adapters.add_metric((name, replica, str(len(engine.adapters)), ",".join(engine.adapters), ""), 1)
        yield adapters


def render_metrics(engines: Engines) -> bytes:
    """Metrics in Prometheus' text format. Waits for the engines' current steps."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(EngineCollector(engines))
    return generate_latest(registry)


def _add_histogram(family: HistogramMetricFamily, labels: tuple[str, ...], values: Histogram) -> None:
    bounds = [*(f"{bound:g}" if bound != int(bound) else f"{bound:.1f}" for bound in values.bounds), "+Inf"]
    family.add_metric(labels, list(zip(bounds, values.cumulative, strict=True)), values.sum)
