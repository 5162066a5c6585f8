"""Other people's clients, as their users call them: litellm, langchain-openai, schemathesis.

They are large, so they are an extra of their own (pip install 'octavo[clients]'); where they are
missing their tests say so and are skipped.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from octavo.server.base_client import OpenRequest
from tests.server.serving import HERMES, serving

ROOT = Path(__file__).resolve().parents[2]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern"}}\n</tool_call>'
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def needs(module: str) -> None:
    """Skip, and say how the missing package is installed. Nothing is imported here: it takes seconds."""
    import importlib.util

    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed: pip install 'octavo[clients]'")


def run(program: str, url: str) -> Any:
    """The JSON that a small program prints; in a process of its own, with its packages' own warnings."""
    head = f"import json\nURL = {url!r}\nTOOL = {TOOL!r}\n"
    result = subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(program)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def script(request: OpenRequest) -> str:
    if request.params.structured_outputs is not None:
        return '{"name": "Bern"}'
    return CALL if "get_weather" in str(request.prompt) else "Hello to you"


@pytest.mark.slow
def test_litellm() -> None:
    needs("litellm")
    program = """
        import litellm
        litellm.suppress_debug_info = True
        hi = [{"role": "user", "content": "Hi"}]
        common = dict(model="hosted_vllm/fake", api_base=URL + "/v1", api_key="none", num_retries=0)
        whole = litellm.completion(messages=hi, temperature=0.5, max_tokens=20, **common)
        parts = litellm.completion(messages=hi, stream=True, stream_options={"include_usage": True}, **common)
        chunks = list(parts)
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        called = litellm.completion(messages=hi, tools=[TOOL], **common).choices[0].message.tool_calls[0]
        usage = [c.usage.completion_tokens for c in chunks if getattr(c, "usage", None)]
        try:
            litellm.completion(messages=hi, top_p=7, **common)
            refused = None
        except litellm.BadRequestError as error:
            refused = "top_p" in str(error)
        plain = litellm.text_completion(
            model="text-completion-openai/fake", prompt="x", api_base=URL + "/v1", api_key="none",
            max_tokens=50
        )
        print(json.dumps([whole.choices[0].message.content, whole.usage.completion_tokens, text, usage,
            called.function.name, called.function.arguments, refused, plain.choices[0].text]))
    """
    with serving(script, template=HERMES) as server:
        whole, count, text, usage, name, arguments, refused, plain = run(program, server.url)
    assert (whole, text, plain) == ("Hello to you",) * 3
    assert count > 0
    assert usage == [count]
    assert (name, json.loads(arguments)) == ("get_weather", {"city": "Bern"})
    assert refused


@pytest.mark.slow
def test_langchain() -> None:
    needs("langchain_openai")
    program = """
        from langchain_openai import ChatOpenAI, OpenAI
        from pydantic import BaseModel
        class City(BaseModel):
            name: str
        llm = ChatOpenAI(model="fake", base_url=URL + "/v1", api_key="none", max_retries=0, stream_usage=True)
        whole = llm.invoke("Hi")
        parts = list(llm.stream("Hi"))
        calls = llm.bind_tools([TOOL]).invoke("Hi").tool_calls
        gathered = None
        for part in llm.bind_tools([TOOL]).stream("Hi"):
            gathered = part if gathered is None else gathered + part
        city = llm.with_structured_output(City, method="json_schema").invoke("Hi")
        plain = OpenAI(model="fake", base_url=URL + "/v1", api_key="none", max_retries=0).invoke("x")
        print(json.dumps([whole.content, whole.usage_metadata["output_tokens"],
            "".join(p.content for p in parts), calls[0]["name"], calls[0]["args"],
            gathered.tool_calls[0]["args"], city.name, plain]))
    """
    with serving(script, template=HERMES) as server:
        whole, count, text, name, arguments, streamed, city, plain = run(program, server.url)
    assert (whole, text, plain) == ("Hello to you",) * 3
    assert count > 0
    assert (name, arguments, streamed) == ("get_weather", {"city": "Bern"}, {"city": "Bern"})
    assert city == "Bern"


def schemathesis(url: str, folder: Path, phases: str, examples: int) -> None:
    """Requests made from our own OpenAPI page: no answer that it does not allow, and never a 5xx."""
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    code = "import sys; from schemathesis.cli import schemathesis; sys.exit(schemathesis())"
    result = subprocess.run(
        [
            sys.executable, "-c", code, "run", f"{url}/openapi.json", "--checks", checks, "--seed", "1",
            "--max-examples", str(examples), "--phases", phases, "--workers", "1", "--no-color",
            "--generation-database", "none", "--exclude-path-regex", "^/(health|ready|metrics)$",
        ],
        capture_output=True,
        text=True,
        cwd=folder,  # it leaves a cache where it runs
        timeout=1200,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert "Tested: 8" in result.stdout


def test_a_little_of_our_own_page(tmp_path: Path) -> None:
    needs("schemathesis")
    with serving("fine", template=HERMES) as server:
        schemathesis(server.url, tmp_path, "fuzzing", 5)


@pytest.mark.slow
def test_our_own_page(tmp_path: Path) -> None:
    needs("schemathesis")
    with serving("fine", template=HERMES) as server:
        schemathesis(server.url, tmp_path, "coverage,fuzzing", 100)
        assert server.engine.num_open == 0
