"""`make demo`: one chat answer, its speed, and what this machine could do at best.

To make one token of one request, every weight is read from memory once. So memory bandwidth
divided by the bytes of the weights is a ceiling that no software passes without reading less
(smaller weights, or several tokens a pass). The bandwidth is measured, with every core the engine
may use. Drafts pass the ceiling by making several tokens a pass: a text is copied with and without.

Not a verb of its own: `python -m octavo.cli.demo`.
"""

from __future__ import annotations

import json
import struct
import sys
import time
from pathlib import Path
from typing import Any, Literal

import click

from octavo.cli.chat import Chat, LocalModel
from octavo.cli.console import load_llm
from octavo.cli.main import main as run_cli
from octavo.errors import CheckpointError

_BYTES = {"F64": 8, "I64": 8, "F32": 4, "F16": 2, "BF16": 2}


@click.command("demo")
@click.argument("model", default="smollm2")
@click.option("--prompt", required=True, help="The message to answer.")
@click.option("--dtype", default="bfloat16", help="Type of the weights.")
@click.option("--max-tokens", default=160, help="Longest answer, in tokens.")
def command(model: str, prompt: str, dtype: str, max_tokens: int) -> None:
    """Answer one message and compare the speed with the machine's limit."""
    from octavo import SamplingParams, platform

    start = time.perf_counter()
    speculative = {"method": "prompt_lookup", "num_speculative_tokens": "auto"}
    llm = load_llm({"model": model, "dtype": dtype, "speculative": speculative})
    loaded = time.perf_counter() - start
    try:
        click.echo(f"\n> {prompt}\n")
        chat = Chat(LocalModel(llm, SamplingParams(temperature=0.0, max_tokens=max_tokens)))
        if chat.answer(prompt):
            raise KeyboardInterrupt
        speed = chat.last_speed
        rewriting = [rewrite(llm, 0), rewrite(llm, "auto")]
        weights = bytes_per_token(Path(llm.model_path), {"float32": 4}.get(dtype, 2))
    finally:
        llm.shutdown()
    bandwidth = platform.memory_bandwidth_probe() * 1e9
    click.echo(f"\nready after {loaded:.1f} s; first token after {speed.first or 0.0:.2f} s")
    ceiling = bandwidth / weights
    click.echo(
        f"this machine reads {bandwidth / 1e9:.1f} GB/s; one token reads {weights / 1e6:.0f} MB of weights: "
        f"at best {ceiling:.1f} tok/s for one request"
    )
    if speed.decode_rate is not None:
        click.echo(
            f"reached: {speed.decode_rate:.1f} tok/s, {100 * speed.decode_rate / ceiling:.0f}% of that limit"
        )
    (plain, plain_rate), (drafted, drafted_rate) = rewriting
    click.echo(
        f"rewriting a text, word for word: {plain_rate:.0f} tok/s plainly, {drafted_rate:.0f} tok/s with the "
        f"text itself as drafter ({drafted_rate / plain_rate:.1f}x), "
        + ("the same tokens" if plain == drafted else "OTHER TOKENS")
    )


_TEXT = (
    "The harbour was quiet before sunrise, and only the gulls seemed to be awake. A short note on the board "
    "said that the ferry would leave an hour late. Mira had packed two sandwiches, a notebook, and the old "
    "camera her uncle gave her. She wanted to write about the lighthouse, because nobody in town had done so."
)


def rewrite(llm: Any, drafts: int | Literal["auto"]) -> tuple[list[int], float]:
    """Copy a text: its tokens, and tokens a second after the first one."""
    from octavo import SamplingParams

    request = f"Copy the following text exactly, word for word. Output only the text.\n\n{_TEXT}"
    params = SamplingParams(temperature=0.0, max_tokens=96, ignore_eos=True, num_speculative_tokens=drafts)
    (output,) = llm.chat([{"role": "user", "content": request}], params, use_tqdm=False)
    return output.outputs[0].token_ids, 1.0 / output.metrics.tpot


def bytes_per_token(folder: Path, element_bytes: int) -> int:
    """Bytes of weights that one decoded token reads, from the checkpoint's headers alone.

    A separate input embedding is left out: one row of it is read. A tied one is the output head
    as well, and is read whole.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"no .safetensors file in {folder}")
    tensors: dict[str, Any] = {}
    for file in files:
        tensors.update(_safetensors_header(file))
    elements = 0
    tied = not any(name.endswith("lm_head.weight") for name in tensors)
    for name, entry in tensors.items():
        if name.endswith("embed_tokens.weight") and not tied:
            continue
        if entry["dtype"] in _BYTES:
            count = 1
            for size in entry["shape"]:
                count *= size
            elements += count
    return elements * element_bytes


def _safetensors_header(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header: dict[str, Any] = json.loads(stream.read(length))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


if __name__ == "__main__":
    sys.exit(run_cli(sys.argv[1:], command))
