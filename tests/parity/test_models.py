"""Every flag of the decoder against transformers, in float32, through the paged oracle backend.

Logits agree to 1e-4 and greedy tokens are equal, for prompts computed whole, in chunks, mixed with
another request, and with padding rows in between.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.attention.torch_backend import TorchBackend
from octavo.layers.ops import TorchOps
from octavo.models.config import ModelConfig
from octavo.models.decoder import CausalLM
from octavo.models.registry import build_model
from octavo.models.weights import load_weights
from tests.checkpoints import make_checkpoint
from tests.paged import PagedRun

pytestmark = pytest.mark.parity

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama mqa": ("LlamaForCausalLM", {"num_key_value_heads": 1}),
    "llama mha": ("LlamaForCausalLM", {"num_key_value_heads": 6}),
    "llama biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama head_dim": ("LlamaForCausalLM", {"head_dim": 10}),
    "llama linear": ("LlamaForCausalLM", {"rope_scaling": {"type": "linear", "factor": 2.5}}),
    "llama dynamic": (
        "LlamaForCausalLM",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 3.0}, "max_position_embeddings": 24},
    ),
    "llama yarn": ("LlamaForCausalLM", {"rope_scaling": YARN, "head_dim": 16}),
    "llama yarn mscale": (
        "LlamaForCausalLM",
        {
            "rope_scaling": YARN
            | {"mscale": 1.3, "mscale_all_dim": 0.7, "beta_fast": 8, "beta_slow": 2, "truncate": False}
        },
    ),
    "llama yarn attention factor": (
        "LlamaForCausalLM",
        {"rope_parameters": YARN | {"attention_factor": 1.7, "rope_theta": 5000.0}},
    ),
    "llama llama3": ("LlamaForCausalLM", {"rope_scaling": LLAMA3, "head_dim": 16}),
    "llama rope_parameters": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
    ),
    "mistral": ("MistralForCausalLM", {"head_dim": 10}),
    "mistral window": ("MistralForCausalLM", {"sliding_window": 7}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2 window": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen2 window off": ("Qwen2ForCausalLM", {"use_sliding_window": False, "sliding_window": 5}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "qwen3 layer types": (
        "Qwen3ForCausalLM",
        {
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


def load(folder: Path, dtype: torch.dtype = torch.float32) -> CausalLM:
    config = ModelConfig.from_folder(folder)
    model = build_model(config, dtype, torch.device("cpu"), TorchOps(), TorchBackend(), max_model_len=160)
    load_weights(model, folder)
    return model


def reference(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def random_ids(count: int, vocab_size: int = 131, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab_size, (count,), generator=generator).tolist()


def reference_greedy(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    with torch.inference_mode():
        ids = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=-1,
        )
    return [int(token) for token in ids[0, len(prompt) :]]


@pytest.mark.parametrize("case", CASES)
def test_equal_to_transformers(case: str, tmp_path: Path) -> None:
    architecture, overrides = CASES[case]
    folder = make_checkpoint(tmp_path, architecture, **overrides)
    theirs, ours = reference(folder), load(folder)
    prompt, other = random_ids(19), random_ids(33, seed=2)
    backend = TorchBackend()

    # logits of every row: one request whole; the other in chunks, interleaved with the first's decode
    long = "dynamic" in case  # a longer prompt than the original length is a stated difference
    other = other[:20] if long else other
    with torch.inference_mode():
        expected = theirs(torch.tensor([prompt])).logits[0]
        expected_other = theirs(torch.tensor([other])).logits[0]
    run = PagedRun(ours, backend, num_requests=2, max_len=80, block_size=16)
    whole = run.step([(1, prompt)], padding=3)
    assert (whole - expected).abs().max() < 1e-4
    num_tokens = 40
    expected_tokens = reference_greedy(theirs, prompt, num_tokens)
    drawn, done, chunks = [int(whole[-1].argmax())], 0, []
    while len(drawn) < num_tokens:
        rows: list[tuple[int, list[int]]] = [(1, drawn[-1:])]
        if done < len(other):
            rows.insert(0, (0, other[done : done + 7]))
        logits = run.step(rows, padding=len(drawn) % 3)
        drawn.append(int(logits[-1].argmax()))
        chunks.append(logits[:-1])
        done += 7
    assert drawn == expected_tokens
    assert (torch.cat(chunks) - expected_other).abs().max() < 1e-4

    # and alone, one token at a time
    single = PagedRun(ours, backend, num_requests=1, max_len=80, block_size=16, seed=3)
    assert single.greedy(0, prompt, num_tokens, chunk=1) == expected_tokens


def test_a_long_prompt_under_dynamic_scaling_does_not_depend_on_its_chunks(tmp_path: Path) -> None:
    """Beyond the original length every position has its own frequencies (octavo.layers.rotary)."""
    folder = make_checkpoint(
        tmp_path, rope_scaling={"rope_type": "dynamic", "factor": 3.0}, max_position_embeddings=24
    )
    ours, prompt = load(folder), random_ids(60)
    runs = [PagedRun(ours, TorchBackend(), num_requests=1, max_len=64, seed=seed) for seed in range(2)]
    whole = runs[0].step([(0, prompt)])
    pieces = [runs[1].step([(0, prompt[start : start + 7])]) for start in range(0, 60, 7)]
    assert (whole - torch.cat(pieces)).abs().max() < 1e-4
    # transformers, given the prompt token by token, makes the same keys
    theirs, cache, rows = reference(folder), None, []
    with torch.inference_mode():
        for token in prompt:
            out = theirs(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits[0, -1])
    assert (whole - torch.stack(rows)).abs().max() < 1e-4


@pytest.mark.parametrize("form", [{"shards": 3}, {"pickled": True}, {"pickled": True, "shards": 2}])
def test_other_files_of_the_same_weights(form: dict[str, Any], tmp_path: Path) -> None:
    plain = load(make_checkpoint(tmp_path / "plain", seed=5))
    other = load(make_checkpoint(tmp_path / "other", seed=5, **form))
    prompt = random_ids(17)
    first, second = (
        PagedRun(model, TorchBackend(), num_requests=1, max_len=32).step([(0, prompt)])
        for model in (plain, other)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_close(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "Qwen3ForCausalLM")
    prompt = random_ids(17)
    exact, rounded = (
        PagedRun(load(folder, kind), TorchBackend(), num_requests=1, max_len=32).step([(0, prompt)])
        for kind in (torch.float32, dtype)
    )
    assert rounded.dtype == torch.float32
    assert (exact - rounded).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.slow
def test_smollm2_greedy(smollm2_path: Path) -> None:
    """The default model: 50 prompts in one batch, 32 tokens each, against one forward a text.

    A token that differs must be a near-tie of transformers' two best logits.
    """
    theirs, ours = reference(smollm2_path), load(smollm2_path)
    prompts = [random_ids(8 + seed, vocab_size=49_152, seed=seed) for seed in range(50)]
    run = PagedRun(ours, TorchBackend(), num_requests=50, max_len=96)
    texts = [[*prompt, int(run.step([(i, prompt)])[-1].argmax())] for i, prompt in enumerate(prompts)]
    for _ in range(31):
        best = run.step([(i, text[-1:]) for i, text in enumerate(texts)]).argmax(-1)
        for text, token in zip(texts, best.tolist(), strict=True):
            text.append(token)
    for prompt, text in zip(prompts, texts, strict=True):
        with torch.inference_mode():
            logits = theirs(torch.tensor([text[:-1]])).logits[0, len(prompt) - 1 :]
        drawn = logits.gather(1, torch.tensor(text[len(prompt) :])[:, None])
        assert (logits.max(-1, keepdim=True).values - drawn).max() < 1e-4
