"""Any OpenAI-compatible server, by its URL.

The measured requests are sent by client processes (`octavo.bench.clients`), which get this target's `job`.
What runs here is the rest: the warm-up, the model's name, and the counters of /metrics where the server has
such a page in Octavo's or vLLM's words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from octavo.bench.http_client import HttpEngine, HttpJob
from octavo.bench.spec import RunSpec
from octavo.bench.target import Answer, TargetError, TargetRequest
from octavo.errors import ConfigError

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
        """Look at the server's models. One that cannot be reached is not refused here: each request will
        fail, and the result says so."""
        assert self._spec.url is not None
        await self._connect(self._spec.url, self._spec.model)
        if self._spec.repeat > 1:
            self._warnings.append("repeats send the same prompts: from the second on a prefix cache has them")

    async def _connect(self, url: str, model: str) -> None:
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
        self._check_model(await self._models())

    async def _models(self) -> list[str]:
        assert self._engine is not None
        try:
            status, body = await self._engine.get("/v1/models")
        except TargetError as error:
            self._warnings.append(f"the server did not answer before the run: {error}")
            return []
        if status == 401 or status == 403:
            raise ConfigError(
                f"the server at {self._spec.url} wants another API key (HTTP {status}): set OPENAI_API_KEY"
            )
        try:
            return [str(model["id"]) for model in json.loads(body)["data"]] if status == 200 else []
        except (ValueError, KeyError, TypeError):
            return []

    def _check_model(self, served: Sequence[str]) -> None:
        assert self._job is not None
        if served and self._job.model not in served:
            raise ConfigError(
                f"the server at {self._job.url} does not serve {self._job.model!r}: name one of "
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
