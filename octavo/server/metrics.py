"""What `/metrics` tells: the server's own counts, and a look at the engine taken when it is asked.

Names are vLLM's, under a prefix of one's own choice, so that dashboards and alerts made for vLLM fit
with `--metrics-prefix vllm`. Counts are plain numbers of this object, made into Prometheus' text only
when somebody reads them: a token costs a few additions here, a request a few dozen.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from octavo import __version__
from octavo.engine.engine_stats import EngineStats
from octavo.outputs import RequestMetrics
from octavo.server.engine_client import EngineClientInfo

# Upper bounds, in seconds; those of vLLM.
TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
TOKEN_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
    10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_BUCKETS = (
    0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
LENGTH_BUCKETS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))
N_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0)


class Histogram:
    """Counts of values by upper bound. Not thread-safe."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)  # the last one: beyond all bounds
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value

    def cumulative(self) -> list[tuple[str, float]]:
        """As Prometheus wants it: the count up to each bound."""
        total, found = 0, []
        for bound, count in zip((*self.bounds, None), self.counts, strict=True):
            total += count
            found.append(("+Inf" if bound is None else str(bound), float(total)))
        return found


class ServerMetrics:
    """All that the server counts. One event loop owns it."""

    def __init__(self, prefix: str = "octavo") -> None:
        self.prefix = prefix
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0
        self.finished: Counter[str] = (
            Counter()
        )  # requests by finish reason: stop, length, abort, error, timeout
        self.rejected: Counter[str] = Counter()  # requests that never reached the engine, by reason
        self.http: Counter[tuple[str, str, int]] = Counter()  # (method, route, status)
        self.dropped_log_lines = 0
        self.ttft = Histogram(TTFT_BUCKETS)
        self.inter_token = Histogram(TOKEN_BUCKETS)  # between two outputs of a request
        self.per_output_token = Histogram(TOKEN_BUCKETS)  # mean of each request
        self.e2e = Histogram(REQUEST_BUCKETS)
        self.queue = Histogram(REQUEST_BUCKETS)
        self.prefill = Histogram(REQUEST_BUCKETS)
        self.decode = Histogram(REQUEST_BUCKETS)
        self.inference = Histogram(REQUEST_BUCKETS)
        self.prompt_length = Histogram(LENGTH_BUCKETS)
        self.generation_length = Histogram(LENGTH_BUCKETS)
        self.params_n = Histogram(N_BUCKETS)
        self.params_max_tokens = Histogram(LENGTH_BUCKETS)

    def request_ended(self, reasons: Iterable[str], metrics: RequestMetrics | None) -> None:
        """One request to the engine has ended; `metrics` is the engine's account, if it gave one."""
        self.finished.update(reasons)
        if metrics is None or metrics.finished_time is None:
            return
        end, first = metrics.finished_time, metrics.first_token_time
        self.e2e.observe(end - metrics.arrival_time)
        self.prompt_length.observe(metrics.num_prompt_tokens)
        self.generation_length.observe(metrics.num_output_tokens)
        scheduled = metrics.first_scheduled_time
        if scheduled is not None:
            self.queue.observe(scheduled - metrics.arrival_time)
            self.inference.observe(end - scheduled)
        if scheduled is not None and first is not None:
            self.prefill.observe(first - scheduled)
        if first is not None:
            self.decode.observe(end - first)
        if metrics.tpot is not None:
            self.per_output_token.observe(metrics.tpot)


class MetricsPage:
    """Renders the page. `info` is None while the model loads."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics
        self._process = ProcessCollector(registry=None)  # the front end's memory, files, processor time

    def render(
        self,
        info: EngineClientInfo | None,
        stats: EngineStats | None,
        *,
        num_open: int,
        is_up: bool,
        accept: str = "",
    ) -> tuple[bytes, str]:
        """(body, content type). `stats` is None where the engine could not be asked."""
        encode, content_type = choose_encoder(accept)
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Once(self._families(info, stats, num_open, is_up)))
        registry.register(self._process)
        return encode(registry), content_type

    def _families(
        self, info: EngineClientInfo | None, stats: EngineStats | None, num_open: int, is_up: bool
    ) -> Iterator[Metric]:
        m, made = self._metrics, _Maker(self._metrics.prefix, info.served_model_names[0] if info else "")
        yield made.gauge("engine_up", "1 while the engine serves, 0 before and after.", float(is_up))
        yield made.gauge("num_requests_open", "Requests that the front end has not answered yet.", num_open)
        yield made.counter("prompt_tokens", "Prompt tokens taken in.", m.num_prompt_tokens)
        yield made.counter("generation_tokens", "Tokens generated and received.", m.num_generation_tokens)
        yield made.counters(
            "request_success", "Requests that have ended, by the way they did.", "finished_reason", m.finished
        )
        yield made.counters(
            "requests_rejected", "Requests that never reached the engine, by reason.", "reason", m.rejected
        )
        yield made.counter("access_log_dropped", "Log lines that could not be written.", m.dropped_log_lines)
        histograms = (
            ("time_to_first_token_seconds", "From a request's arrival to its first token.", m.ttft),
            ("inter_token_latency_seconds", "Between two outputs of a request.", m.inter_token),
            (
                "request_time_per_output_token_seconds",
                "After the first token, by request.",
                m.per_output_token,
            ),
            ("e2e_request_latency_seconds", "From a request's arrival to its end.", m.e2e),
            ("request_queue_time_seconds", "From a request's arrival to its first step.", m.queue),
            ("request_prefill_time_seconds", "From a request's first step to its first token.", m.prefill),
            ("request_decode_time_seconds", "From a request's first token to its end.", m.decode),
            ("request_inference_time_seconds", "From a request's first step to its end.", m.inference),
            ("request_prompt_tokens", "Prompt tokens of a request.", m.prompt_length),
            (
                "request_generation_tokens",
                "Generated tokens of a request (its longest answer).",
                m.generation_length,
            ),
            ("request_params_n", "n of a request.", m.params_n),
            ("request_params_max_tokens", "max_tokens of a request.", m.params_max_tokens),
        )
        for name, text, histogram in histograms:
            yield made.histogram(name, text, histogram)
        yield self._http()
        if info is not None:
            yield made.info(info)
        if stats is not None:
            yield from _engine_families(made, stats)

    def _http(self) -> Metric:
        """The one family without prefix: its name is a convention beyond vLLM."""
        family = CounterMetricFamily(
            "http_requests", "HTTP requests answered.", labels=("method", "handler", "status")
        )
        for (method, route, status), count in sorted(self._metrics.http.items()):
            family.add_metric((method, route, str(status)), count)
        return family


def _engine_families(made: _Maker, stats: EngineStats) -> Iterator[Metric]:
    yield made.gauge("num_requests_running", "Sequences the engine computes.", stats.num_running)
    yield made.gauge("num_requests_waiting", "Sequences in the engine's queue.", stats.num_waiting)
    yield made.gauge("kv_cache_usage_perc", "Share of the KV blocks in use; 1 is all.", stats.kv_usage)
    yield made.counter(
        "num_preemptions", "Sequences that had to give their blocks back.", stats.num_preemptions
    )
    yield made.counter("prefix_cache_queries", "Prompt tokens looked up.", stats.num_prefix_queries)
    yield made.counter("prefix_cache_hits", "Prompt tokens found.", stats.num_prefix_hits)
    yield made.counter("engine_steps", "Steps of the engine.", stats.num_steps)
    rows = {"prompt": stats.num_chunk_rows, "decode": stats.num_verify_rows}
    yield made.counters("engine_rows", "Token rows computed, by kind.", "kind", rows)
    if stats.energy_joules is not None:
        text = "What the hardware under the engine has used since the start, idle time included."
        yield made.counters("energy_joules", text, "counter", stats.energy_joules)
    speculation = stats.speculation
    if speculation is None:
        return
    yield made.counter("spec_decode_num_drafts", "Verifications.", speculation.num_steps)
    yield made.counter("spec_decode_num_draft_tokens", "Tokens drafted.", speculation.drafted)
    yield made.counter("spec_decode_num_accepted_tokens", "Drafts accepted.", speculation.accepted)
    by_position = {str(i): n for i, n in enumerate(speculation.accepted_by_position)}
    yield made.counters(
        "spec_decode_num_accepted_tokens_per_pos", "Drafts accepted at a position.", "position", by_position
    )
    drafted = {str(i): n for i, n in enumerate(speculation.drafted_by_position)}
    yield made.counters(
        "spec_decode_num_draft_tokens_per_pos", "Drafts made at a position.", "position", drafted
    )
    yield made.counter("spec_decode_draft_seconds", "Device time of drafting.", speculation.draft_seconds)
    if speculation.net_speedup is not None:
        yield made.gauge(
            "spec_decode_net_speedup",
            "Time of plain decoding for the same tokens over the time taken, estimated.",
            speculation.net_speedup,
        )


class _Maker:
    """Families with the prefix and the model's name."""

    def __init__(self, prefix: str, model_name: str) -> None:
        self._prefix = prefix
        self._labels = {"model_name": model_name, "engine": "0"}

    def gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(self._name(name), text, labels=tuple(self._labels))
        family.add_metric(tuple(self._labels.values()), value)
        return family

    def counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(self._name(name), text, labels=tuple(self._labels))
        family.add_metric(tuple(self._labels.values()), value)
        return family

    def counters(self, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
        family = CounterMetricFamily(self._name(name), text, labels=(*self._labels, label))
        for key, value in values.items():
            family.add_metric((*self._labels.values(), key), value)
        return family

    def histogram(self, name: str, text: str, histogram: Histogram) -> Metric:
        family = HistogramMetricFamily(self._name(name), text, labels=tuple(self._labels))
        family.add_metric(tuple(self._labels.values()), histogram.cumulative(), histogram.sum)
        return family

    def info(self, info: EngineClientInfo) -> Metric:
        labels = {
            "version": __version__,
            "dtype": info.dtype,
            "block_size": str(info.block_size),
            "num_gpu_blocks": str(info.num_blocks),
            "max_model_len": str(info.max_model_len),
            "max_num_seqs": str(info.max_num_seqs),
            "speculative_method": info.speculative_method or "",
        }
        family = GaugeMetricFamily(
            self._name("cache_config_info"),
            "What the engine was built with.",
            labels=(*self._labels, *labels),
        )
        family.add_metric((*self._labels.values(), *labels.values()), 1.0)
        return family

    def _name(self, name: str) -> str:
        return f"{self._prefix}:{name}"


class _Once(Collector):
    """A registry wants a collector; this one yields what it was given."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families
