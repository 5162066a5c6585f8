"""Any OpenAI-compatible server, by its URL.

The measured requests are sent by client processes (`octavo.bench.clients`), which get this target's `job`.
What runs here is the rest: the warm-up, the model's name, and the counters of /metrics where the server has
such a page in Octavo's or vLLM's words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from octavo.bench.http_client import HttpEngine, HttpJob
from octavo.bench.openai_stream import error_message, model_names
from octavo.bench.spec import RunSpec
from octavo.bench.target import Answer, TargetError, TargetRequest
from octavo.errors import ConfigError, OctavoError

LOOK_SECONDS = 30.0  # a busy server is slow, not gone
_SAMPLE = re.compile(r"^(?:octavo|vllm):(\w+?)(?:_total)?(?:\{(.*?)\})? (\S+)$", re.MULTILINE)
# Names on the page -> ours. Rows are one family with a label, in Octavo's words only.
_NAMES = {
    "engine_steps": "steps",
    "num_preemptions": "preemptions",
    "prefix_cache_queries": "prefix_queries",
    "prefix_cache_hits": "prefix_hits",
    "gpu_prefix_cache_queries": "prefix_queries",  # older vLLM
    "gpu_prefix_cache_hits": "prefix_hits",
    "spec_decode_num_drafts": "verifications",
    "spec_decode_num_draft_tokens": "drafted",
    "spec_decode_num_accepted_tokens": "accepted",
    "kv_cache_usage_perc": "kv_usage",
    "gpu_cache_usage_perc": "kv_usage",
    "num_requests_running": "running",
    "num_requests_waiting": "waiting",
}


class UrlTarget:
    """A server that somebody else started."""

    own_dialect = False

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec
        self._engine: HttpEngine | None = None
        self._job: HttpJob | None = None
        self._warnings: list[str] = []
        self._has_metrics = True

    def job(self) -> HttpJob:
        """What client processes must know. Only after `open`."""
        assert self._job is not None
        return self._job

    async def open(self) -> None:
        """Look at the server's models, before any load. Raises OctavoError if nobody answers, ConfigError if
        it wants another key or serves other models. One that dies later makes failures."""
        assert self._spec.url is not None
        self._connect(self._spec.url, self._spec.model)
        await self._look()
        if self._spec.repeat > 1:
            self._warnings.append("repeats send the same prompts: from the second on a prefix cache has them")

    def _connect(self, url: str, model: str) -> None:
        sampling = self._spec.sampling
        self._job = HttpJob(
            url=url,
            model=model,
            endpoint=self._spec.endpoint,
            api_key=self._spec.api_key,
            own_dialect=self.own_dialect,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=sampling.seed,
            ignore_eos=sampling.ignore_eos,
        )
        self._engine = HttpEngine(self._job)

    async def _look(self) -> None:
        assert self._engine is not None
        assert self._job is not None
        url = self._job.url
        try:
            status, body = await self._engine.get("/v1/models", LOOK_SECONDS)
        except TargetError as error:
            raise OctavoError(f"{error}: start the server, or name another with --url") from None
        if status in (401, 403):
            raise ConfigError(
                f"the server at {url} wants another API key (HTTP {status}): set OPENAI_API_KEY"
            )
        if status == 503:
            raise OctavoError(f"the server at {url} is not ready: {error_message(body) or 'HTTP 503'}")
        served = model_names(body) if status == 200 else None
        if not served:  # a server may do without this page, and answer nevertheless
            self._warnings.append(
                f"{url}/v1/models names no model (HTTP {status}): is this an OpenAI-compatible server?"
            )
        if not self._job.model and served and len(served) == 1:
            await self._engine.close()
            self._connect(url, served[0])
        elif not self._job.model:
            there = f": name one of {', '.join(served)}" if served else ""
            raise ConfigError(f"the server at {url} does not say which model is meant{there} with --model")
        elif served and self._job.model not in served:
            raise ConfigError(
                f"the server at {url} does not serve {self._job.model!r}: name one of "
                f"{', '.join(served)} with --model (TARGET_MODEL)"
            )

    async def generate(self, request: TargetRequest, answer: Answer) -> None:
        """One request from this process (the warm-up)."""
        assert self._engine is not None
        await self._engine.generate(request, answer)

    async def counters(self) -> dict[str, float]:
        """From /metrics, if the server has it and words it as Octavo or vLLM do."""
        if self._engine is None or not self._has_metrics:
            return {}
        try:
            status, body = await self._engine.get("/metrics")
        except TargetError:
            return {}
        found = read_metrics(body) if status == 200 else {}
        # A server without such a page is asked once.
        self._has_metrics = bool(found)
        return found

    def description(self) -> dict[str, Any]:
        """Where, and how it was asked."""
        assert self._job is not None
        return {"url": self._job.url, "served_model": self._job.model, "endpoint": self._job.endpoint}

    def warnings(self) -> Sequence[str]:
        """What was noticed."""
        return self._warnings

    def gpu_ids(self) -> list[int]:
        """None that could be known."""
        return []

    def pids(self) -> list[int]:
        """None that could be known."""
        return []

    async def close(self) -> None:
        """Close the connections."""
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.close()


async def check_server(spec: RunSpec) -> None:
    """Raise OctavoError or ConfigError, as `UrlTarget.open` does, if the server of `spec` is not there."""
    target = UrlTarget(spec)
    try:
        await target.open()
    finally:
        await target.close()


def read_metrics(page: str) -> dict[str, float]:
    """Counters of a Prometheus page in Octavo's or vLLM's words, summed over engines."""
    found: dict[str, float] = {}
    for name, labels, value in _SAMPLE.findall(page):
        known = _NAMES.get(name)
        if name == "engine_rows":
            known = "prompt_rows" if 'kind="prompt"' in labels else "decode_rows"
        if known is None:
            continue
        try:
            found[known] = found.get(known, 0.0) + float(value)
        except ValueError:
            continue
    return found
