"""One job of a comparison, in a process of its own: `python -m octavo.bench.compare_child JOB`.

JOB is a pickle that `octavo.bench.compare` wrote for this process alone. What came of it goes to the answer
file as JSON; results go where the job says.
"""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from octavo.errors import OctavoError


def main(path: str) -> int:
    """Do the job; 0 if it could be done, whatever its figures are."""
    job: dict[str, Any] = pickle.loads(Path(path).read_bytes())
    answer: dict[str, Any]
    try:
        answer = _run(job) if job["kind"] == "run" else {"gaps": logit_gaps(job["spec"], job["places"])}
    except OctavoError as error:
        answer = {"error": str(error)}
    except Exception as error:  # the other runs go on, and the report says why this one is missing
        answer = {"error": f"{type(error).__name__}: {error}"}
    job["answer"].write_text(json.dumps(answer), encoding="utf-8")
    return int("error" in answer)


def _run(job: dict[str, Any]) -> dict[str, Any]:
    from octavo import platform

    platform.prepare_environment()
    from octavo.bench.banner import outcome
    from octavo.bench.live import TerminalView
    from octavo.bench.record import save
    from octavo.bench.runner import run

    result = run(job["spec"], job["prompts"], live=TerminalView(log_requests=not job["quiet"]))
    save(result, job["path"], force=job["force"])
    for line in outcome(result):
        print(line)
    print(f"  Result: {job['path']}", flush=True)
    return {"exit_code": result.exit_code}


def logit_gaps(spec: Any, places: Sequence[tuple[Sequence[int], int, int]]) -> list[float | None]:
    """For each (tokens before, one token, another): the logit of the one less that of the other.

    None where the text does not fit the context.
    """
    from octavo import LLM, SamplingParams, platform

    platform.prepare_environment()
    llm = LLM(**spec.octavo_kwargs())
    try:
        longest = llm._engine_parts().plan.max_model_len - 2
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        gaps: list[float | None] = []
        for before, one, other in places:
            if len(before) > longest:
                gaps.append(None)
                continue
            found = []
            for token in (one, other):
                prompt = {"prompt_token_ids": [*before, token]}
                output = llm.generate([prompt], params, use_tqdm=False)[0]
                entry = output.prompt_logprobs[-1] if output.prompt_logprobs else None
                if entry is not None:
                    found.append(entry[token].logprob)
            gaps.append(found[0] - found[1] if len(found) == 2 else None)
        return gaps
    finally:
        llm.shutdown()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
