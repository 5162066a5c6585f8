"""Shards: two ranks in one process give what one rank gives, and loaders put pieces in place."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.attention.torch_backend import TorchBackend
from octavo.errors import ConfigError
from octavo.layers.embedding import VocabTable
from octavo.layers.linear import Placement, QKVParallelLinear, RowParallelLinear
from octavo.layers.ops import TorchOps
from octavo.layers.parallel import SingleRank, kv_head_range, shard_range
from octavo.models.config import ModelConfig
from octavo.models.registry import build_model
from octavo.models.weights import load_weights
from octavo.quantization.unquantized import UnquantizedLinearMethod
from tests.checkpoints import make_checkpoint
from tests.paged import PagedRun

CPU = torch.device("cpu")


class _Meeting:
    """Where the ranks of one process lay their tensors side by side."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.tensors: list[torch.Tensor] = [torch.empty(0)] * size
        self.barrier = threading.Barrier(size, timeout=30)

    def exchange(self, rank: int, x: torch.Tensor) -> list[torch.Tensor]:
        self.tensors[rank] = x.clone()
        self.barrier.wait()
        result = list(self.tensors)
        self.barrier.wait()
        return result


class FakeGroup:
    """A rank among threads."""

    def __init__(self, rank: int, meeting: _Meeting) -> None:
        self.rank = rank
        self.size = meeting.size
        self._meeting = meeting

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._meeting.exchange(self.rank, x)).sum(0)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._meeting.exchange(self.rank, x), dim=-1)


def on_all_ranks(size: int, work: Callable[[FakeGroup], torch.Tensor]) -> list[torch.Tensor]:
    meeting = _Meeting(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, [FakeGroup(rank, meeting) for rank in range(size)]))


@pytest.mark.parametrize(
    ("architecture", "size", "heads", "kv_heads"),
    [
        ("LlamaForCausalLM", 2, 6, 2),
        ("LlamaForCausalLM", 6, 6, 2),  # KV heads replicated; widths that do not divide
        ("Qwen2ForCausalLM", 2, 6, 1),
        ("Qwen3ForCausalLM", 3, 6, 6),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_ranks_agree_with_one_rank(
    architecture: str, size: int, heads: int, kv_heads: int, tied: bool, tmp_path: Path
) -> None:
    overrides: dict[str, Any] = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    overrides["tie_word_embeddings"] = tied
    if architecture == "LlamaForCausalLM":
        overrides |= {"attention_bias": True, "mlp_bias": True}
    folder = make_checkpoint(tmp_path, architecture, **overrides)
    config = ModelConfig.from_folder(folder)
    prompt = torch.randint(0, config.vocab_size, (23,), generator=torch.Generator().manual_seed(0)).tolist()

    def run(tp: FakeGroup | SingleRank) -> torch.Tensor:
        model = build_model(config, torch.float32, CPU, TorchOps(), TorchBackend(), tp)
        load_weights(model, folder)
        paged = PagedRun(model, TorchBackend(), num_requests=1, max_len=32)
        return torch.cat([paged.step([(0, prompt[:20])]), paged.step([(0, prompt[20:])])])

    expected = run(SingleRank())
    for logits in on_all_ranks(size, run):
        assert logits.shape == expected.shape
        assert (logits - expected).abs().max() < 1e-4


def test_heads_that_do_not_divide(tmp_path: Path) -> None:
    config = ModelConfig.from_folder(make_checkpoint(tmp_path))
    with pytest.raises(ConfigError, match=r"6 attention heads.*sizes that do: 1, 2, 6"):
        build_model(config, torch.float32, CPU, TorchOps(), TorchBackend(), FakeGroup(0, _Meeting(4)))


@pytest.mark.parametrize(("total", "size"), [(77, 4), (3, 8), (8, 8)])
def test_shards_cover_everything_once(total: int, size: int) -> None:
    ranges = [shard_range(total, FakeGroup(rank, _Meeting(size))) for rank in range(size)]
    assert [i for shard in ranges for i in shard] == list(range(total))
    lengths = {len(shard) for shard in ranges}
    assert max(lengths) - min(lengths) <= 1


def test_replicated_kv_heads_stay_beside_their_queries() -> None:
    heads = [list(kv_head_range(2, FakeGroup(rank, _Meeting(4)))) for rank in range(4)]
    assert heads == [[0], [0], [1], [1]]


def _qkv(tp: FakeGroup | SingleRank) -> QKVParallelLinear:
    place = Placement(torch.float32, CPU, tp, UnquantizedLinearMethod())
    return QKVParallelLinear("attn", 5, 4, 2, 6, True, place)


def test_qkv_pieces_and_names() -> None:
    layer = _qkv(FakeGroup(1, _Meeting(2)))
    assert layer.weights["weight"].shape == (4 * 6, 5)  # two query heads, one key, one value
    names = {tensor.name: tensor.shape for tensor in layer.checkpoint_tensors()}
    assert names["attn.q_proj.weight"] == (24, 5)
    assert names["attn.k_proj.bias"] == (12,)
    full = {name: torch.arange(rows * 5.0).view(rows, 5) for name, rows in (("q", 24), ("k", 12), ("v", 12))}
    for shard_id, loaded in full.items():
        layer.weight_loader(layer.weights["weight"], loaded, shard_id)
    expected = torch.cat([full["q"][12:], full["k"][6:], full["v"][6:]])
    assert torch.equal(layer.weights["weight"].value(), expected)


def test_weights_take_no_memory_before_and_after() -> None:
    place = Placement(torch.float32, CPU, SingleRank(), UnquantizedLinearMethod())
    layer = RowParallelLinear("o", 4, range(4), 3, False, place)
    assert layer.weights["weight"].tensor is None
    layer.weights["weight"].load(torch.ones(3, 4))
    layer.after_load(TorchOps())
    assert layer.weights["weight"].tensor is None
    assert torch.equal(layer.forward(torch.ones(1, 4), TorchOps()), torch.full((1, 3), 4.0))
    with pytest.raises(RuntimeError, match="packed"):
        layer.weights["weight"].value()


def test_a_rank_beyond_the_vocabulary_holds_zeros() -> None:
    """Five tokens on four ranks: the last one has only padding, and it must not be garbage."""
    place = Placement(torch.float32, CPU, FakeGroup(3, _Meeting(4)), UnquantizedLinearMethod())
    table = VocabTable("lm_head", 5, 3, place, embeds=False, heads=True)
    table.weight.tensor = torch.full((2, 3), float("nan"))
    table.weight.load(torch.ones(5, 3))
    assert torch.equal(table.weight.value(), torch.zeros(2, 3))
