"""Octavo: a paged LLM inference engine, small enough to read.

    from octavo import LLM, SamplingParams

    llm = LLM(model="smollm2")
    for output in llm.generate(["The capital of France is"], SamplingParams(max_tokens=8)):
        print(output.outputs[0].text)

`import octavo` loads nothing at all: each public name is imported when it is first used, so that
`octavo --help` answers at once.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing itself takes as long as the rest of `import octavo`
if TYPE_CHECKING:
    from typing import Any

    from octavo import errors
    from octavo.engine.async_engine import AsyncLLM
    from octavo.llm import LLM
    from octavo.outputs import CompletionOutput, RequestOutput
    from octavo.sampling_params import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "RequestOutput",
    "SamplingParams",
    "__version__",
    "errors",
]

# Public name -> the module that defines it.
_LAZY = {
    "LLM": "octavo.llm",
    "AsyncLLM": "octavo.engine.async_engine",
    "SamplingParams": "octavo.sampling_params",
    "RequestOutput": "octavo.outputs",
    "CompletionOutput": "octavo.outputs",
}
_WITH_TORCH = ("octavo.llm", "octavo.engine.async_engine")  # what they import takes seconds


def __getattr__(name: str) -> Any:
    import importlib

    if name == "errors":
        return importlib.import_module("octavo.errors")
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'octavo' has no attribute {name!r}")
    if module in _WITH_TORCH:
        from octavo.platform.head_start import head_start

        with head_start():
            importlib.import_module(module)
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value  # found directly the next time
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
