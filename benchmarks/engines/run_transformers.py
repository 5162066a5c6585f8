"""transformers' generate(): one request, or static batches padded on the left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.engines import job


class Arrivals:
    """A streamer that tells when generate() hands over a token; the first call is the prompt."""

    def __init__(self, arrived: job.Arrived) -> None:
        self._arrived = arrived
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        """Called by generate() after every step."""
        if self._prompt_seen:
            self._arrived(1)
        self._prompt_seen = True

    def end(self) -> None:
        """Called by generate() when it is done."""


class Transformers:
    """A causal model in bfloat16."""

    def __init__(self, options: dict[str, Any]) -> None:
        import torch
        import transformers

        torch.set_num_threads(options["threads"])
        self._torch = torch
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"
        load = transformers.AutoModelForCausalLM.from_pretrained
        self._model: Any = load(options["model"], dtype=torch.bfloat16)  # comes in eval mode
        self._model.generation_config.eos_token_id = None  # every request runs to its full length
        self._batch = options["batch_size"]

    def _generate(self, requests: Sequence[job.Request], streamer: Arrivals | None = None) -> int:
        width = max(len(request.prompt) for request in requests)
        gaps = [width - len(request.prompt) for request in requests]
        ids = [[0] * gap + request.prompt for gap, request in zip(gaps, requests, strict=True)]
        output = self._model.generate(
            input_ids=self._torch.tensor(ids),
            attention_mask=self._torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps]),
            do_sample=False,
            max_new_tokens=requests[0].new_tokens,
            pad_token_id=0,
            streamer=streamer,
        )
        return int(output[:, width:].numel())

    def stream(self, request: job.Request, arrived: job.Arrived) -> None:
        """One request through generate()'s streamer."""
        self._generate([request], Arrivals(arrived))

    def complete(self, requests: Sequence[job.Request]) -> int:
        """Static batches, one after another."""
        batches = [requests[at : at + self._batch] for at in range(0, len(requests), self._batch)]
        return sum(self._generate(batch) for batch in batches)

    def close(self) -> None:
        """Nothing to do."""


if __name__ == "__main__":
    job.run(Transformers)
