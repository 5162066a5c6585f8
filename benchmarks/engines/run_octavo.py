"""Octavo through its public interface, in process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.engines import job


class Octavo:
    """One `LLM`. The threads are those of the cores this process may use."""

    def __init__(self, options: dict[str, Any]) -> None:
        import octavo

        self.version = f"octavo {octavo.__version__}"
        self._llm = octavo.LLM(
            model=options["model"],
            dtype="bfloat16",
            kv_cache_memory=options["kv_bytes"],
            max_model_len=options["max_model_len"],
            max_num_seqs=options["max_num_seqs"],
        )
        self._params = octavo.SamplingParams

    def _sampling(self, request: job.Request) -> Any:
        return self._params(temperature=0.0, max_tokens=request.new_tokens, ignore_eos=True)

    def stream(self, request: job.Request, arrived: job.Arrived) -> None:
        """Tokens as the public stream brings them, detokenized on the way."""
        seen = 0
        for output in self._llm.generate(request.prompt, self._sampling(request), stream=True):
            count = len(output.outputs[0].token_ids)
            arrived(count - seen)
            seen = count

    def complete(self, requests: Sequence[job.Request]) -> int:
        """All of them in one call."""
        outputs = self._llm.generate(
            [request.prompt for request in requests],
            [self._sampling(request) for request in requests],
            use_tqdm=False,
        )
        for output in outputs:
            if output.error is not None:
                raise RuntimeError(output.error)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    def close(self) -> None:
        """Free it."""
        self._llm.shutdown()


if __name__ == "__main__":
    job.run(Octavo)
