"""Two results are compared by their content, and the first difference of each pair is explained."""

from __future__ import annotations

import asyncio
import copy
import json
from pathlib import Path
from typing import Any

import pytest

from octavo.batch.compare.check import Comparison, TextDifference, compare
from octavo.batch.compare.entries import AnswerFile, Text, open_results
from octavo.batch.compare.explain import Prompt, Scorer, explain, logit_gap
from octavo.batch.compare.origins import RequestFile
from octavo.batch.work import WorkItem
from octavo.batch.workers import EngineWorkers
from octavo.errors import ConfigError
from octavo.sampling_params import SamplingParams
from tests.batch.normal import chat, completion, write_lines
from tests.checkpoints import make_checkpoint


def answer(custom_id: str, *texts: str, seed: int = 1, run: int = 0, **choice: Any) -> dict[str, Any]:
    """A line of an answer file, as the run with this number writes it."""
    choices = [
        {
            "index": i,
            "text": text,
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
            **choice,
        }
        for i, text in enumerate(texts)
    ]  # fmt: skip
    body = {
        "id": f"cmpl-{run}", "created": 1000 + run, "object": "text_completion", "model": "m",
        "choices": choices,
        "usage": {
            "prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": run},
        },
    }  # fmt: skip
    response = {"status_code": 200, "request_id": f"req-{run}", "body": body}
    return {"id": f"b-{run}", "custom_id": custom_id, "response": response, "error": None, "seed": seed}


def bad(number: int, message: str) -> dict[str, Any]:
    error = {"code": "invalid_json", "message": message, "line": number}
    return {"id": "b", "custom_id": None, "response": None, "error": error}


def check(tmp_path: Path, a: list[Any], b: list[Any], **options: Any) -> Comparison:
    one = open_results(write_lines(tmp_path / "a", a))
    return compare(one, open_results(write_lines(tmp_path / "b", b)), **options)


def test_ids_times_counts_of_the_run_and_the_order_do_not_count(tmp_path: Path) -> None:
    a = [answer("x", "one", "two"), answer("y", "three"), bad(3, "no"), bad(4, "nor this")]
    b = [bad(4, "nor this"), answer("y", "three", run=1), bad(3, "no"), answer("x", "one", "two", run=2)]
    found = check(tmp_path, a, b)
    assert found.is_same
    assert (found.num_pairs, found.num_equal, found.num_different) == (4, 4, 0)


def test_each_kind_of_difference_is_told_by_its_first(tmp_path: Path) -> None:
    refused = copy.deepcopy(answer("refused", "x"))
    refused["response"] |= {"status_code": 400, "body": {"error": {"message": "too hot"}}}
    a = [
        answer("same", "x"), answer("only a", "x"), answer("refused", "x"), answer("seed", "x", seed=1),
        answer("text", "equal", "hello brave world"), answer("end", "x"), answer("number", "x"),
        answer("rest", "x", logprobs={"tokens": ["x"], "token_logprobs": [-0.5]}), bad(9, "a"),
    ]  # fmt: skip
    b = [
        answer("same", "x"), answer("only b", "x"), refused, answer("seed", "y", seed=2),
        answer("text", "equal", "hello new world"), answer("end", "x", finish_reason="stop"),
        answer("number", "x", "y"),
        answer("rest", "x", logprobs={"tokens": ["x"], "token_logprobs": [-0.25]}),
        bad(9, "b"),
    ]  # fmt: skip
    found = check(tmp_path, a, b)
    told = {d.name: (d.kind, d.what) for d in found.shown}
    assert told.pop('custom_id "text"') == (
        "text",
        'choice 1: after 6 equal characters, … "hello ": A goes on "brave world", B "new world"',
    )
    assert told == {
        'custom_id "only a"': ("missing", "only in A"),
        'custom_id "only b"': ("missing", "only in B"),
        'custom_id "refused"': ("error", "B failed: 400: too hot"),
        'custom_id "seed"': ("seed", "seed 1 in A, 2 in B"),
        'custom_id "end"': ("end", "the same text, ended by length in A, stop in B"),
        'custom_id "number"': ("other", "1 answers in A, 2 in B"),
        'custom_id "rest"': (
            "other",
            "the same text; choices[0].logprobs.token_logprobs[0]: -0.5 in A, -0.25 in B",
        ),
        "line 9": ("error", "A failed (a), B otherwise (b)"),
    }
    assert (found.num_pairs, found.num_equal, found.num_different) == (8, 1, 9)
    assert not found.is_same
    few = check(tmp_path, a, b, max_shown=2)
    assert (len(few.shown), few.num_different) == (2, 9)


def test_a_text_that_ends_early_is_told_so(tmp_path: Path) -> None:
    found = check(tmp_path, [answer("x", "one")], [answer("x", "one more")])
    assert found.shown[0].what.endswith('… "one": A goes on the end (length), B " more"')


def test_settings_of_both_jobs_are_laid_side_by_side(tmp_path: Path) -> None:
    for name, dtype in (("a", "float32"), ("b", "bfloat16")):
        job = {"job": {"seed": 1, "dtype": dtype, "speculative": {"k": 1}}, "runs": []}
        (tmp_path / f"{name}.job.json").write_text(json.dumps(job))
    found = check(tmp_path, [answer("x", "one")], [answer("x", "one")])
    assert found.settings == ['dtype: "float32" in A, "bfloat16" in B']
    assert found.is_same  # what counts is the outcome


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{}\n", "line 1 of .* is no answer"),
        ("nonsense\n", "line 1 of .* is no answer"),
        (2 * (json.dumps(answer("x", "1")) + "\n"), "line 2 of .* earlier line"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "a").write_text(content)
    with pytest.raises(ConfigError, match=says):
        open_results(tmp_path / "a")
    with pytest.raises(ConfigError, match="no such file or folder"):
        open_results(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no results"):
        open_results(tmp_path / "empty")


# ---------------------------------------------------------------------- persona folders


def persona(folder: Path, texts: dict[str, list[str]], seed: int = 1, **summary: Any) -> Path:
    folder.mkdir()
    for user, generated in texts.items():
        samples = [
            {
                "item_idx": i, "sample_idx": 0, "seed": seed, "generated_text": text, "finish_reason": "stop"
            }
            for i, text in enumerate(generated)
        ]  # fmt: skip
        record: dict[str, Any] = {"user_hash": user, "user_profile": {"name": user}}
        record["context"] = [[] for _ in generated]
        record |= {"history": [], "generated_samples": samples}
        (folder / f"{user}.json").write_text(json.dumps(record))
    facts = {"seed": 1, "engine": "octavo", "timestamp": folder.name, "sampling_params": {"temperature": 0.0}}
    (folder / "inference_summary.json").write_text(json.dumps({**facts, **summary}))
    (folder / "test_leaderboard.json").write_text("[]")
    return folder


def test_persona_folders_are_compared_by_user_item_and_sample(tmp_path: Path) -> None:
    a = persona(tmp_path / "a", {"u1": ["x", "y"], "u2": ["z"]})
    b = persona(tmp_path / "b", {"u2": ["z"], "u1": ["x", "y"]})
    c = persona(tmp_path / "c", {"u1": ["x", "why"], "u3": ["z"]}, engine="transformers")
    assert compare(open_results(a), open_results(b)).is_same
    found = compare(open_results(a), open_results(c))
    assert {(d.name, d.kind) for d in found.shown} == {
        ("user u1, item 1, sample 0", "text"),
        ("user u2, item 0, sample 0", "missing"),
        ("user u3, item 0, sample 0", "missing"),
    }
    assert found.settings == ['engine: "octavo" in A, "transformers" in B']


# ---------------------------------------------------------------------- why


def test_without_a_model_it_says_what_is_known(tmp_path: Path) -> None:
    requests = [completion("greedy", temperature=0), completion("drawn", temperature=1.0), completion("open")]
    source = write_lines(tmp_path / "in", requests)
    names = ["greedy", "drawn", "open", "gone"]
    found = check(tmp_path, [answer(n, "one") for n in names], [answer(n, "two") for n in names])
    asyncio.run(explain(found, RequestFile(source), None))
    why = {d.name.split('"')[1]: d.why for d in found.shown}
    assert why["greedy"].startswith("greedy (--model NAME")
    assert why["drawn"].startswith("sampled with the same seed; the recorded settings are the same")
    assert why["open"].startswith("sampled")
    assert "not known" in why["gone"]


def test_requests_of_another_input_are_refused(tmp_path: Path) -> None:
    results = write_lines(tmp_path / "out", [answer("x", "one")])
    source = write_lines(tmp_path / "in", [completion("x")])
    job = {"job": {"input_sha256": "0" * 64}, "runs": [{"input_file": str(source)}]}
    (tmp_path / "out.job.json").write_text(json.dumps(job))
    assert RequestFile.of(AnswerFile(results), None) is None  # it has changed since
    with pytest.raises(ConfigError, match="is not the file"):
        RequestFile.of(AnswerFile(results), source)


def test_the_logit_gap_is_that_of_the_model(tmp_path: Path) -> None:
    """Against the log-probabilities that the engine gave while it generated."""
    model = make_checkpoint(tmp_path / "m", tokenizer=True, max_position_embeddings=256)
    kwargs = {"dtype": "float32", "kv_cache_memory": "16MB", "device": "cpu", "model": str(model)}

    async def main() -> None:
        workers = await EngineWorkers.open(kwargs)
        tokenizer = workers.tokenizer
        assert tokenizer is not None
        try:
            letters = [tokenizer.encode(c, add_special_tokens=False)[0] for c in "abcdefgh"]
            params = SamplingParams(
                max_tokens=6, temperature=0.0, allowed_token_ids=letters, logprobs=tokenizer.vocab_size - 1
            )
            source = write_lines(
                tmp_path / "in",
                [chat("c", "hello", temperature=0), completion("e", "begin", n=2, echo=True, temperature=0)],
            )
            origins = RequestFile(source, workers)
            for key, part, lead in (("c", "", ""), ("e", "choice 1", "begin")):
                nothing = Text(part, "", "")
                difference = TextDifference(f'custom_id "{key}"', part, 0, nothing, nothing)
                prompt = origins.prompt(difference)
                assert prompt is not None
                assert prompt.answer_prefix == lead
                made = (await workers.run(WorkItem(key, prompt.token_ids, params))).outputs[0]
                for at in (0, 3, 5):
                    other = next(t for t in letters if t != made.token_ids[at])
                    texts = [
                        lead + tokenizer.decode(ids, skip_special_tokens=True)
                        for ids in (made.token_ids, [*made.token_ids[:at], other])
                    ]
                    sides = [Text(part, text, "length") for text in texts]
                    gap = await logit_gap(
                        Scorer(workers, tokenizer), prompt, TextDifference(difference.key, part, at, *sides)
                    )
                    assert made.logprobs is not None
                    here = made.logprobs[at]
                    expected = here[made.token_ids[at]].logprob - here[other].logprob
                    assert gap.value == pytest.approx(expected, abs=1e-4)
                    assert expected != 0
            # A text that was cut off says nothing of its next token; one that stopped says the end token.
            prompt = Prompt(letters)
            for reason, is_known in (("length", False), ("stop", True)):
                difference = TextDifference("k", "", 2, Text("", "ab", reason), Text("", "abc", "length"))
                gap = await logit_gap(Scorer(workers, tokenizer), prompt, difference)
                assert (gap.value is not None) == is_known
        finally:
            await workers.close()

    asyncio.run(main())
