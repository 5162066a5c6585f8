"""/v1/completions: prompts in every form, echo, both ends of log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from octavo.engine.tokenizer import RustBackend, Tokenizer
from octavo.server.base_client import OpenRequest
from octavo.server.settings import ServeSettings
from octavo.server.state import ServedModel
from tests.engine.sample_tokenizers import byte_fallback, byte_level
from tests.server import strict
from tests.server.serving import PLAIN, Server, serving, tokenizer, tokens
from tests.server.test_chat import last_request, post

PATH = "/v1/completions"
SAID = " world, 東京!"


@pytest.fixture(scope="module")
def plain() -> Iterator[Server]:
    """A server that always goes on in the same way."""
    with serving(SAID) as server:
        yield server


def ask(server: Server, **body: Any) -> Any:
    answer = post(server, PATH, **{"prompt": "Hello", **body})
    assert answer.status_code == 200, answer.text
    return strict.completion(answer.json())


def stream(server: Server, **body: Any) -> list[Any]:
    answer = post(server, PATH, **{"prompt": "Hello", "stream": True, **body})
    assert answer.status_code == 200, answer.text
    return strict.completion_chunks(answer.text)


def texts_of(chunks: list[Any]) -> dict[int, str]:
    texts: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    return texts


def test_a_completion(plain: Server) -> None:
    answer = ask(plain, max_tokens=50)
    assert answer.choices[0].text == SAID
    assert answer.choices[0].finish_reason == "stop"
    assert last_request(plain).prompt_ids == tokenizer().encode("Hello")
    assert last_request(plain).continue_prompt
    assert answer.usage.completion_tokens == len(tokens(SAID))
    assert texts_of(stream(plain, max_tokens=50)) == {0: SAID}


def test_sixteen_tokens_unless_told_otherwise(plain: Server) -> None:
    ask(plain)
    assert last_request(plain).params.max_tokens == 16


def test_prompts_in_every_form(plain: Server) -> None:
    ids = tokenizer().encode("Hello")
    for prompt, expected in [
        ("Hello", [ids]),
        (["Hello"], [ids]),
        (ids, [ids]),
        ([ids], [ids]),
        (["Hello", "Hello"], [ids, ids]),
        ([ids, [7, 8]], [ids, [7, 8]]),
    ]:
        before = len(plain.engine.requests)
        answer = ask(plain, prompt=prompt)
        found = [request.prompt_ids for request in plain.engine.requests[before:]]
        assert found == expected
        assert [choice.index for choice in answer.choices] == list(range(len(expected)))
        assert answer.usage.prompt_tokens == sum(map(len, expected))


def test_choices_of_several_prompts() -> None:
    with serving(lambda request: f"<{request.prompt}>") as server:
        prompts = ["a", "b", "c"]
        answer = ask(server, prompt=prompts, n=2)
        expected = ["<a>", "<a>", "<b>", "<b>", "<c>", "<c>"]
        assert [choice.text for choice in answer.choices] == expected
        found = texts_of(stream(server, prompt=prompts, n=2))
        assert [found[index] for index in range(6)] == expected
        chunks = stream(server, prompt=prompts, stream_options={"include_usage": True})
        assert chunks[-1].choices == []
        assert chunks[-1].usage.prompt_tokens == 3


def test_echo(plain: Server) -> None:
    assert ask(plain, echo=True, max_tokens=50).choices[0].text == "Hello" + SAID
    ids = tokenizer().encode("Hello", add_special_tokens=False)
    assert ask(plain, prompt=ids, echo=True, max_tokens=50).choices[0].text == "Hello" + SAID
    assert texts_of(stream(plain, echo=True, max_tokens=50)) == {0: "Hello" + SAID}
    cut = ask(plain, prompt="Hello", echo=True, truncate_prompt_tokens=1, max_tokens=50).choices[0].text
    assert cut == tokenizer().decode(ids[-1:]) + SAID


def test_logprobs(plain: Server) -> None:
    said = tokens(SAID)
    for k in (0, 1, 3):
        logprobs = ask(plain, logprobs=k, max_tokens=50).choices[0].logprobs
        assert len(logprobs.tokens) == len(said)
        assert logprobs.token_logprobs == [-0.5] * len(said)
        assert all(logprobs.tokens[i] in logprobs.top_logprobs[i] for i in range(len(said)))
        parts = [c.logprobs for chunk in stream(plain, logprobs=k, max_tokens=50) for c in chunk.choices]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = [item for part in parts if part for item in getattr(part, name)]
            assert joined == getattr(logprobs, name), name


def test_offsets_lead_to_the_tokens(plain: Server) -> None:
    for body in ({}, {"echo": True}):
        choice = ask(plain, prompt="Grüße", logprobs=1, max_tokens=50, **body).choices[0]
        offsets = [*choice.logprobs.text_offset, len(choice.text)]
        for token, start, end in zip(choice.logprobs.tokens, offsets, offsets[1:], strict=False):
            if "�" not in token:
                assert choice.text[start:end] == token
        assert offsets == sorted(offsets)


def test_a_prompts_own_logprobs(plain: Server) -> None:
    """What lm-eval asks for: the prompt's log-probabilities, and of the answer at most a token."""
    ids = tokenizer().encode("Hello there", add_special_tokens=False)
    for limit in (0, 1):
        body = {"prompt": ids, "echo": True, "logprobs": 1, "max_tokens": limit}
        data = post(plain, PATH, **body).json()
        strict.completion(data)
        logprobs = data["choices"][0]["logprobs"]
        assert logprobs["token_logprobs"] == [None] + [-0.25] * (len(ids) - 1) + [-0.5] * limit
        assert logprobs["top_logprobs"][0] is None
        assert len(logprobs["tokens"]) == len(logprobs["text_offset"]) == len(ids) + limit
        assert data["usage"]["completion_tokens"] == limit
        assert data["choices"][0]["text"].startswith("Hello there")
        assert last_request(plain).params.prompt_logprobs == 1
        assert last_request(plain).params.max_tokens == 1
        chunks = stream(plain, **body)
        assert [t for chunk in chunks for c in chunk.choices for t in c.logprobs.tokens] == logprobs["tokens"]


def test_prompt_logprobs_in_vllms_shape(plain: Server) -> None:
    data = post(plain, PATH, prompt="Hello", prompt_logprobs=0, return_token_ids=True).json()
    choice = data["choices"][0]
    ids = tokenizer().encode("Hello")
    assert choice["prompt_token_ids"] == ids
    assert choice["token_ids"] == [i for _, i in tokens(SAID)]
    assert choice["prompt_logprobs"][0] is None
    at = choice["prompt_logprobs"][1][str(ids[1])]
    assert at["logprob"] == -0.25
    assert at["rank"] == 1
    assert at["decoded_token"]


def test_forms(plain: Server) -> None:
    ask(plain, guided_choice=["a", "b"])
    assert last_request(plain).params.structured_outputs == {"choice": ("a", "b")}


def test_a_model_without_a_tokenizer() -> None:
    def script(request: OpenRequest) -> list[tuple[str, int]]:
        return [("", 5), ("", 6)]

    with serving(script, template=None) as server:
        data = post(server, PATH, prompt=[1, 2, 3], return_token_ids=True, logprobs=0).json()
        assert data["choices"][0]["token_ids"] == [5, 6]
        assert data["choices"][0]["logprobs"]["tokens"] == ["token_id:5", "token_id:6"]
        for body in ({"prompt": "text"}, {"prompt": [1], "echo": True}):
            assert post(server, PATH, **body).status_code == 400
        assert post(server, messages=[{"role": "user", "content": "x"}]).status_code == 400
        assert post(server, "/tokenize", prompt="x").status_code == 400


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["x"] * 2049}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"echo": True, "prompt_logprobs": 21}, "prompt_logprobs"),
    ],
)
def test_refused(plain: Server, body: dict[str, Any], param: str) -> None:
    answer = post(plain, PATH, **{"prompt": "x", **body})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def use(server: Server, known: Tokenizer) -> None:
    """Let a server have another tokenizer."""
    served = ServedModel.of(server.engine.info, ServeSettings(), known)
    object.__setattr__(server.app.state.octavo, "served", served)


def test_an_empty_text_has_its_begin_token() -> None:
    """Where the tokenizer adds one, even an empty prompt is one."""
    rust = byte_level("<|begin_of_text|>")
    known = Tokenizer(RustBackend(rust), {"bos_token": "<|begin_of_text|>"}, PLAIN)
    with serving(SAID) as server:
        use(server, known)
        ask(server, prompt="")
        assert last_request(server).prompt_ids == [known.bos_token_id]
        choice = ask(server, prompt="ab", echo=True, logprobs=0, max_tokens=50).choices[0]
        assert choice.logprobs.tokens[0] == "<|begin_of_text|>"
        assert choice.logprobs.text_offset[:3] == [0, 0, 1]


def test_offsets_of_an_answer_begin_where_the_prompt_ends() -> None:
    """Llama 2's tokenizer puts a space before the prompt, which the prompt's own text does not have."""
    with serving(lambda request: [(" world", 300)]) as server:
        use(server, Tokenizer(RustBackend(byte_fallback()), {"bos_token": "<s>"}, PLAIN))
        choice = ask(server, prompt="hello", echo=True, logprobs=0).choices[0]
        assert choice.text == "hello world"
        assert choice.logprobs.text_offset[-1] == len("hello")


def test_the_official_client(plain: Server) -> None:
    client = openai.OpenAI(base_url=plain.url + "/v1", api_key="none", max_retries=0)
    answer = client.completions.create(model="fake", prompt="Hello", max_tokens=50, logprobs=1)
    assert answer.choices[0].text == SAID
    text = "".join(
        chunk.choices[0].text
        for chunk in client.completions.create(model="fake", prompt="Hello", max_tokens=50, stream=True)
    )
    assert text == SAID


def test_tokens_of_texts_and_back(plain: Server) -> None:
    ids = tokenizer().encode("Grüße")
    data = post(plain, "/tokenize", prompt="Grüße", return_token_strs=True).json()
    assert data["tokens"] == ids
    assert data["count"] == len(ids)
    assert data["max_model_len"] == 4096
    assert len(data["token_strs"]) == len(ids)
    chat = post(plain, "/tokenize", messages=[{"role": "user", "content": "Hi"}]).json()
    post(plain, messages=[{"role": "user", "content": "Hi"}])
    assert chat["tokens"] == last_request(plain).prompt_ids
    assert post(plain, "/detokenize", tokens=ids).json() == {"prompt": "Grüße"}
    shown = post(plain, "/detokenize", tokens=[2, *ids]).json()["prompt"]
    hidden = post(plain, "/detokenize", tokens=[2, *ids], skip_special_tokens=True).json()["prompt"]
    assert (shown, hidden) == ("<|start|>Grüße", "Grüße")
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": []}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [10**12]}),
        ("/detokenize", {"tokens": ["a"]}),
    ]
    for path, body in wrong:
        assert post(plain, path, **body).status_code == 400
