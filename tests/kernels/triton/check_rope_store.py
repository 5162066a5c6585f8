"""qk-norm, rotary and store: the kernel for heads that turn as a whole against the one for all others."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.triton import interpreter

interpreter.enable()

from octavo.kernels.triton import rope_store as kernels  # noqa: E402

TOKENS, BLOCK_SIZE = 21, 4


@pytest.mark.parametrize("few", [0, 512])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 4), (6, 2), (3, 1)])
def test_as_the_kernel_of_a_head(
    heads: int, kv_heads: int, normed: bool, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_FEW_TOKENS", few)
    generator = torch.Generator().manual_seed(heads)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    rows, dim = numbers(TOKENS, (heads + 2 * kv_heads) * 32), 32
    norms = (numbers(dim), numbers(dim)) if normed else None
    cos, sin = numbers(50, dim // 2), numbers(50, dim // 2)
    positions = torch.randint(0, 50, (TOKENS,), generator=generator)
    slots = torch.randperm(40, generator=generator)[:TOKENS]
    positions[5] = slots[5] = -1  # padding

    def run(keeps: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        qkv, cache = rows.clone(), torch.full((10, 2, kv_heads, BLOCK_SIZE, dim), 7.0)
        q = kernels.rope_store(qkv, norms, 1e-6, cos, sin, positions, slots, cache, keeps)
        return q, cache, qkv

    for keeps in (False, True):
        ours = run(keeps)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "_heads_of_a_program", lambda *_: 0)
            expected = run(keeps)
        for one, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(one, other)
        assert (ours[1] == 7.0).any()  # what no token has keeps what it held
        assert torch.equal(ours[2], rows) != keeps


def test_which_heads() -> None:
    assert [kernels._heads_of_a_program(*shape) for shape in (
        (16, 8, 128, 128), (6, 2, 64, 64), (9, 3, 64, 64), (16, 8, 128, 64), (16, 8, 80, 80), (4, 4, 8, 8)
    )] == [4, 2, 1, 0, 0, 0]  # fmt: skip
