"""vLLM's offline engine on the CPU, run by the Python that has it (`--vllm-python`)."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.engines import job


class Vllm:
    """One `vllm.LLM` with its default settings but for the sizes that every engine is given."""

    def __init__(self, options: dict[str, Any]) -> None:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, options["cores"]))
        os.environ["VLLM_NO_USAGE_STATS"] = os.environ["HF_HUB_OFFLINE"] = "1"
        self._vllm = importlib.import_module("vllm")
        torch = importlib.import_module("torch")
        self.version = f"vllm {self._vllm.__version__}, torch {torch.__version__}"
        self._llm = self._vllm.LLM(
            model=options["model"],
            dtype="bfloat16",
            kv_cache_memory_bytes=options["kv_bytes"],
            max_model_len=options["max_model_len"],
            max_num_seqs=options["max_num_seqs"],
            enable_prefix_caching=True,
            disable_log_stats=True,
        )

    def _params(self, request: job.Request) -> Any:
        return self._vllm.SamplingParams(temperature=0, max_tokens=request.new_tokens, ignore_eos=True)

    def stream(self, request: job.Request, arrived: job.Arrived) -> None:
        """Step the engine by hand: its offline interface does not stream."""
        engine = self._llm.llm_engine
        name = f"stream-{time.monotonic_ns()}"
        engine.add_request(name, {"prompt_token_ids": request.prompt}, self._params(request))
        seen = 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                count = len(output.outputs[0].token_ids)
                arrived(count - seen)
                seen = count

    def complete(self, requests: Sequence[job.Request]) -> int:
        """All of them in one call."""
        outputs = self._llm.generate(
            [{"prompt_token_ids": request.prompt} for request in requests],
            [self._params(request) for request in requests],
            use_tqdm=False,
        )
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    def close(self) -> None:
        """Its processes end with this one."""


if __name__ == "__main__":
    job.run(Vllm)
