"""Norms and SiLU against torch in double precision, at every level this machine has."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from octavo.kernels.cpu.library import CpuLibrary, available_isas, load
from octavo.kernels.cpu.norm import add_rms_norm, rms_norm, silu_mul

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8}
EPS = 1e-5


@pytest.fixture(params=available_isas())
def library(request: pytest.FixtureRequest) -> CpuLibrary:
    return load(request.param)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * weight


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 15, 16, 17, 100, 576])
def test_rms_norm(library: CpuLibrary, k: int, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    x, weight = random(40, k, dtype=dtype), random(k, seed=1)
    y = rms_norm(x, weight, EPS, out_dtype, library)
    assert y.dtype == out_dtype
    torch.testing.assert_close(y.double(), reference(x, weight), rtol=TOLERANCE[out_dtype], atol=1e-6)
    assert torch.equal(rms_norm(x[7:8], weight, EPS, out_dtype, library), y[7:8])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [3, 16, 45])
def test_add_rms_norm_changes_the_residual(library: CpuLibrary, k: int, dtype: torch.dtype) -> None:
    x, residual, weight = random(6, k, dtype=dtype), random(6, k, seed=2), random(k, seed=1)
    total = residual + x.float()
    y = add_rms_norm(x, residual, weight, EPS, library=library)
    assert torch.equal(residual, total)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), reference(total, weight), rtol=TOLERANCE[dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 16, 29])
def test_silu_mul(library: CpuLibrary, width: int, dtype: torch.dtype) -> None:
    x = 4 * random(7, 2 * width, dtype=dtype)
    gate, up = x.double().chunk(2, dim=-1)
    y = silu_mul(x, library)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), F.silu(gate) * up, rtol=2 * TOLERANCE[dtype], atol=1e-6)


def test_wrong_arguments_are_named() -> None:
    x, weight = random(3, 8), torch.ones(8)
    with pytest.raises(ValueError, match="x must have shape"):
        rms_norm(x[0], weight, EPS)
    with pytest.raises(ValueError, match="weight must have shape"):
        rms_norm(x, weight[:7], EPS)
    with pytest.raises(ValueError, match=r"weight must be torch\.float32"):
        rms_norm(x, weight.bfloat16(), EPS)
    with pytest.raises(ValueError, match="residual must have shape"):
        add_rms_norm(x, random(2, 8), weight, EPS)
    with pytest.raises(ValueError, match=r"residual must be torch\.float32"):
        add_rms_norm(x, random(3, 8).bfloat16(), weight, EPS)
    with pytest.raises(ValueError, match="x must be contiguous"):
        silu_mul(random(8, 4).T)
    with pytest.raises(ValueError, match="even number of columns"):
        silu_mul(random(3, 7))
