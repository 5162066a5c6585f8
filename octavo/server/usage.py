"""What a request cost, as OpenAI's `usage` tells it, and what speculation did for it."""

from __future__ import annotations

from typing import Any

from octavo.outputs import RequestMetrics, RequestOutput, SpeculationMetrics


class UsageCounter:
    """Counts the tokens of one or more prompts and their answers."""

    def __init__(self, num_prompt_tokens: int, *, has_prediction: bool = False) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self.num_output_tokens = 0
        self.num_reasoning_tokens: int | None = None  # None: the model marks no reasoning
        self._num_cached = 0
        self._speculation: list[SpeculationMetrics] = []
        self._energy_joules: float | None = None
        self._has_prediction = has_prediction

    def note(self, output: RequestOutput) -> None:
        """Count a delta, or a whole output; the last one of a request brings its metrics."""
        for answer in output.outputs:
            self.num_output_tokens += len(answer.token_ids)
        if output.finished and output.metrics is not None:
            self._note_end(output.metrics)

    def _note_end(self, metrics: RequestMetrics) -> None:
        self._num_cached += metrics.num_cached_tokens
        if metrics.speculation is not None:
            self._speculation.append(metrics.speculation)
        if metrics.energy_joules is not None:
            self._energy_joules = (self._energy_joules or 0.0) + metrics.energy_joules

    def counts(self) -> dict[str, int]:
        """The three counts so far."""
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_output_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_output_tokens,
        }

    def details(self) -> tuple[dict[str, int], dict[str, int]]:
        """(of the prompt, of the completion), in OpenAI's words."""
        completion = {}
        if self.num_reasoning_tokens is not None:
            completion["reasoning_tokens"] = self.num_reasoning_tokens
        if self._has_prediction:
            accepted = sum(s.accepted for s in self._speculation)
            completion["accepted_prediction_tokens"] = accepted
            completion["rejected_prediction_tokens"] = sum(s.drafted for s in self._speculation) - accepted
        return {"cached_tokens": self._num_cached}, completion

    def usage(self) -> dict[str, Any]:
        """The `usage` of chat and completions."""
        prompt, completion = self.details()
        usage: dict[str, Any] = {**self.counts(), "prompt_tokens_details": prompt}
        if completion:
            usage["completion_tokens_details"] = completion
        if self._speculation:
            usage["speculation"] = self.speculation()
        if self._energy_joules is not None:
            usage["energy_joules"] = round(self._energy_joules, 6)
        return usage

    def speculation(self) -> dict[str, Any]:
        """What speculation did, over all prompts."""
        drafted = sum(s.drafted for s in self._speculation)
        accepted = sum(s.accepted for s in self._speculation)
        num_steps = sum(s.num_steps for s in self._speculation)
        told: dict[str, Any] = {
            "drafted": drafted,
            "accepted": accepted,
            "num_steps": num_steps,
            "acceptance_rate": accepted / drafted if drafted else None,
            "mean_acceptance_length": 1.0 + accepted / num_steps if num_steps else None,
        }
        if any(s.synthetic for s in self._speculation):
            told["synthetic"] = True
        steps = [step for s in self._speculation for step in s.steps or ()]
        if any(s.steps is not None for s in self._speculation):
            told["steps"] = [
                {
                    "drafted_ids": step.drafted_ids,
                    "num_accepted": step.num_accepted,
                    "num_speculative_tokens": step.num_speculative_tokens,
                    "reason": step.reason,
                }
                for step in steps
            ]
        return told
