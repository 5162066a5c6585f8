"""`octavo generate`: continue prompts, from flags or from stdin, as text or as JSON lines."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from octavo.cli.console import load_llm, read_stdin, stdin_is_typed, stream_answer, with_model_defaults
from octavo.cli.options import (
    SectionCommand,
    engine_kwargs,
    engine_options,
    sampling_options,
    sampling_params,
)
from octavo.errors import RequestError

if TYPE_CHECKING:
    from octavo import LLM, RequestOutput, SamplingParams
    from octavo.outputs import LogprobsAt


@click.command(cls=SectionCommand)
@click.argument("model")
@click.option("--prompt", "prompts", multiple=True, help="Text to continue; may be repeated; - is stdin.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each answer.")
@click.option("--stats", is_flag=True, help="Print the speed to stderr.")
@click.option("-q", "--quiet", is_flag=True, help="No memory plan, only warnings.")
@sampling_options()
@engine_options
def command(
    model: str, prompts: tuple[str, ...], as_json: bool, stats: bool, quiet: bool, **given: Any
) -> None:
    """Continue one or more prompts with MODEL, a folder, a .gguf file, a hub id, or an alias.

    Without --prompt the prompt is read from stdin. A single answer is streamed.
    """
    params = sampling_params(given)
    if not as_json and params is not None and (params.logprobs, params.prompt_logprobs) != (None, None):
        raise click.UsageError("--logprobs and --prompt-logprobs are shown with --json only; add it.")
    texts = _read_prompts(prompts)
    llm = load_llm(engine_kwargs(model, given), quiet=quiet)
    try:
        params = with_model_defaults(llm, params)
        if len(texts) == 1 and not as_json and (params is None or params.num_samples == 1):
            _stream_one(llm, texts[0], params, stats)
        else:
            _generate_all(llm, texts, params, as_json, stats)
    finally:
        llm.shutdown()


def _read_prompts(prompts: tuple[str, ...]) -> list[str]:
    if not prompts:
        if stdin_is_typed():
            raise click.UsageError("No prompt: give --prompt TEXT, or pipe one in.")
        prompts = ("-",)
    if prompts.count("-") > 1:
        raise click.UsageError("--prompt - reads all of stdin, so it can be given once only.")
    return [read_stdin() if prompt == "-" else prompt for prompt in prompts]


def _stream_one(llm: LLM, prompt: str, params: SamplingParams | None, stats: bool) -> None:
    _, speed, stopped = stream_answer(llm.generate([prompt], params, stream=True, use_tqdm=False))
    if stats:
        click.echo(speed.line(), err=True)
    if stopped:
        raise KeyboardInterrupt


def _generate_all(
    llm: LLM, prompts: list[str], params: SamplingParams | None, as_json: bool, stats: bool
) -> None:
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=sys.stderr.isatty() and len(prompts) > 1)
    seconds = time.perf_counter() - start
    for number, output in enumerate(outputs):
        if as_json:
            for record in _records(number, output):
                click.echo(json.dumps(record, ensure_ascii=False))
        else:
            _print_text(number, output)
    if stats:
        tokens = sum(len(answer.token_ids) for output in outputs for answer in output.outputs)
        rate = tokens / seconds if seconds > 0 else 0.0
        click.echo(
            f"[{len(outputs)} prompts, {tokens} tokens in {seconds:.2f} s, {rate:.1f} tok/s]", err=True
        )
    failed = [output.error for output in outputs if output.error is not None]
    if failed:
        raise RequestError(f"{len(failed)} of {len(outputs)} prompts failed: {failed[0]}")


def _print_text(number: int, output: RequestOutput) -> None:
    """Text of every answer, each under a header line as `head` and `tail` print for several files."""
    for answer in output.outputs:
        lead = "\n" if number or answer.index else ""
        title = (output.prompt or "").replace("\n", " ")
        title = title if len(title) <= 60 else f"{title[:59]}…"
        suffix = f" ({answer.index + 1})" if len(output.outputs) > 1 else ""
        click.echo(f"{lead}==> {title}{suffix} <==")
        click.echo(answer.text if answer.error is None else f"error: {answer.error}")


def _records(number: int, output: RequestOutput) -> list[dict[str, Any]]:
    """One plain object for each answer of a prompt."""
    records = []
    for answer in output.outputs:
        record: dict[str, Any] = {
            "prompt_index": number,
            "index": answer.index,
            "prompt": output.prompt,
            "text": answer.text,
            "token_ids": list(answer.token_ids),
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
            "num_prompt_tokens": len(output.prompt_token_ids),
        }
        if answer.error is not None:
            record["error"] = answer.error
        if answer.logprobs is not None:
            record["cumulative_logprob"] = answer.cumulative_logprob
            record["logprobs"] = [_logprobs_record(at) for at in answer.logprobs]
        if output.prompt_logprobs is not None:
            record["prompt_logprobs"] = [_logprobs_record(at) for at in output.prompt_logprobs]
        records.append(record)
    return records


def _logprobs_record(at: LogprobsAt | None) -> list[dict[str, Any]] | None:
    if at is None:
        return None
    return [
        {"token_id": token, "token": entry.decoded_token, "logprob": entry.logprob, "rank": entry.rank}
        for token, entry in at.items()
    ]
