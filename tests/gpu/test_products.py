"""On the card: a layer's products and norms at the shapes of real models, against float32.

What is computed from bfloat16 numbers in float32 is the oracle; the kernels round once, when they store.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from octavo.kernels import triton as triton_kernels
from tests.gpu_report import Record, kind_of

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available() or not triton_kernels.available():
    pytest.skip("needs a CUDA device and Triton", allow_module_level=True)

from octavo.kernels.triton import pointwise, products  # noqa: E402
from octavo.kernels.triton.products import Workspace  # noqa: E402

DEVICE = torch.device("cuda")
EPS = 1e-6
LIMITS = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 6e-6}
SHAPES = {"8B": (4096, 12288), "0.6B": (1024, 3072)}  # hidden, width of the MLP


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)


def deviation(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("model", list(SHAPES))
@pytest.mark.parametrize("dtype", list(LIMITS), ids=kind_of)
def test_products_of_few_rows(model: str, dtype: torch.dtype, record: Record) -> None:
    hidden, width = SHAPES[model]
    space = Workspace.allocate(16 * 2 * width * 64, 2 * width // 16, DEVICE)
    down, gate_up = draw(hidden, width, dtype=dtype) / 64, draw(2 * width, hidden, dtype=dtype) / 64
    norm, bias = draw(hidden, dtype=dtype), draw(hidden, dtype=dtype)
    for rows in (1, 5, 16, 17, 33, 64):
        x, stream = draw(rows, width, dtype=dtype), draw(rows, hidden, dtype=dtype)
        found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        product = F.linear(x.float(), down.float(), bias.float())
        out = torch.full((rows, hidden), float("nan"), dtype=dtype, device=DEVICE)
        products.plain(x, down, bias, out, space)
        found["plain"] = out, product
        scaled, squares = torch.empty_like(stream), torch.empty(rows, hidden // 64, device=DEVICE)
        total = stream.float() + product
        products.residual(x, down, bias, stream, norm, scaled, squares, space)
        found["residual"] = stream, total
        found["sums of squares"] = squares.sum(1), total.square().sum(1)
        active = torch.full((rows, width), float("nan"), dtype=dtype, device=DEVICE)
        products.gate_up(scaled, gate_up, None, squares, EPS, active, space)
        normed = scaled.float() * torch.rsqrt(squares.sum(1, keepdim=True) / hidden + EPS)
        gate, up = F.linear(normed, gate_up.float()).chunk(2, dim=1)
        found["gate and up, SiLU, product"] = active, F.silu(gate) * up
        for name, (ours, expected) in found.items():
            error = deviation(ours, expected)
            record(f"{name}, {kind_of(dtype)}", error)
            assert error < LIMITS[dtype], (name, rows, error)


@pytest.mark.parametrize("dtype", list(LIMITS), ids=kind_of)
def test_norms_and_activation(dtype: torch.dtype, record: Record) -> None:
    x, stream, weight = (
        draw(37, 4096, dtype=dtype, seed=1),
        draw(37, 4096, dtype=dtype),
        draw(4096, dtype=dtype),
    )
    normed = F.rms_norm(x.float(), (4096,), weight.float(), EPS)
    gate, up = x.float().chunk(2, dim=1)
    total = (x + stream).float()
    added = F.rms_norm(total, (4096,), weight.float(), EPS)
    for name, ours, expected in (
        ("norm", pointwise.norm(x, weight, EPS), normed),
        ("norm", pointwise.norm(x, weight, EPS, stream), added),
        ("SiLU, product", pointwise.silu_mul(x), F.silu(gate) * up),
    ):
        error = deviation(ours, expected)
        record(f"{name}, {kind_of(dtype)}", error)
        assert error < LIMITS[dtype], (name, error)
