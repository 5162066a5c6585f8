"""CUDA graphs against eager forwards, and the sampler's kernels against their oracle, on the card."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from octavo.attention.backend import ForwardContext
from octavo.kernels import triton as triton_kernels
from tests.checkpoints import make_checkpoint
from tests.gpu.on_device import DEVICE, _OnDevice, load
from tests.gpu.test_models import WIDE, token_rows
from tests.paged import PagedRun

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available() or not triton_kernels.available():
    pytest.skip("needs a CUDA device and Triton", allow_module_level=True)

from octavo.attention.triton_backend import TritonBackend  # noqa: E402
from octavo.models.decoder import CausalLM  # noqa: E402
from octavo.models.gpu_ops import GpuOps  # noqa: E402
from octavo.sampling.batch import SamplingBatch  # noqa: E402
from octavo.sampling.gpu_draw import GpuDraw  # noqa: E402
from octavo.sampling.sampler import TorchDraw  # noqa: E402
from octavo.worker.cuda_graph import CudaGraphs, StepBuffers  # noqa: E402
from octavo.worker.graph_sizes import GraphSizes  # noqa: E402


class _Graphed(_OnDevice):
    """A model whose steps are replayed."""

    def __init__(self, model: CausalLM, max_len: int) -> None:
        super().__init__(model)
        self.graphs: CudaGraphs | None = None
        self.max_len = max_len

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        caches, meta = self.moved(ctx)
        if self.graphs is None:
            model = self.model
            table = torch.zeros(8, meta.block_table.shape[1], dtype=torch.int32, device=DEVICE)
            self.graphs = CudaGraphs(
                lambda ids, step: model.forward(ids, step.positions, ForwardContext(step, caches)),
                GraphSizes.of([1, 4, 8, 64, 80, 200]),
                StepBuffers.allocate(200, 8, table),
                self.max_len,
            )
            with torch.inference_mode():
                self.graphs.capture_all()
        with torch.inference_mode():
            return self.graphs.replay(input_ids.to(DEVICE), meta)


def test_replay_as_eager(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", "Qwen3ForCausalLM", **WIDE, head_dim=128)
    backend = TritonBackend()
    model = load(folder, torch.bfloat16, GpuOps(), backend)
    eager = PagedRun(_OnDevice(model), backend, 8, 700)  # type: ignore[arg-type]
    replayed = PagedRun(_Graphed(model, 704), backend, 8, 700)  # type: ignore[arg-type]
    steps = [
        [(0, token_rows(0, 150))],
        [(1, token_rows(1, 61)), (0, token_rows(2, 1))],
        [(request, token_rows(request, 1)) for request in (0, 1)],
        [(2, token_rows(3, 70)), (0, token_rows(4, 3)), (1, token_rows(5, 1))],
        [(request, token_rows(request, 2)) for request in (0, 1, 2)],
        [(1, token_rows(6, 1))],
    ]
    for rows in steps:
        expected, got = eager.step(rows), replayed.step(rows)
        assert float((got - expected).norm() / expected.norm()) < 1e-2, rows


@pytest.mark.parametrize("vocab", [1000, 151_936])
def test_draws_as_plain_torch(vocab: int) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(48, vocab, generator=generator) * 3
    logits[3::8] = logits[3::8].round()  # many ties
    logits[5] = float("-inf")
    logits[6, 3] = float("nan")
    kinds = 48 // 8
    batch = SamplingBatch(
        temperature=torch.tensor([0.0, 0.7, 1.0, 1.0, 1.3, 1.0, 1.0, 1.0] * kinds),
        top_k=torch.tensor([0, 5, 0, 7, 3, 40, 0, 0] * kinds, dtype=torch.int32),
        top_p=torch.tensor([1.0, 1.0, 0.8, 0.9, 1.0, 1.0, 0.5, 1.0] * kinds),
        min_p=torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.05, 0.0, 0.0] * kinds),
        seed=torch.arange(48) * 7919 - 3,
        position=torch.arange(48) + 5,
    )
    expected = TorchDraw().draw(logits, batch)
    got = GpuDraw().draw(logits.to(DEVICE), batch).cpu()
    assert int((got != expected).sum()) <= 1  # a float32 near-tie
    assert torch.equal(GpuDraw().argmax(logits.to(DEVICE)).cpu(), TorchDraw().argmax(logits))
    tokens = torch.randint(0, vocab, (48,), generator=generator)
    for ours, theirs in zip(
        GpuDraw().logprobs(logits.to(DEVICE), tokens.to(DEVICE), 9),
        TorchDraw().logprobs(logits, tokens, 9),
        strict=True,
    ):
        torch.testing.assert_close(ours.cpu(), theirs, atol=1e-4, rtol=1e-4, equal_nan=True)
