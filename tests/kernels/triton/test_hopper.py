"""Kernels whose speed hangs on what the assembler makes of them, compiled for Hopper GPUs without one."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from octavo.kernels.triton import products, prompt  # noqa: E402
from octavo.kernels.triton.attention_few import few_rows_kernel  # noqa: E402
from octavo.kernels.triton.product_kernels import gate_up_kernel, residual_kernel  # noqa: E402
from octavo.kernels.triton.qkv_kernel import qkv_kernel  # noqa: E402

_KINDS = {
    "q_desc": "tensordesc<bf16[64, 1, 128]>", "own_desc": "tensordesc<bf16[64, 1, 128]>",
    "before_desc": "tensordesc<bf16[64, 1, 128]>", "tiles_ptr": "*i32", "scale": "fp32",
    "num_rows": "i32", "eps": "fp32", "positions_ptr": "*i64", "slots_ptr": "*i64", "squares_ptr": "*fp32",
    "items_ptr": "*i32", "table_ptr": "*i32", "table_stride": "i32", "max_spans": "i32", "soft_cap": "fp32",
    "window": "i32", "sums_ptr": "*fp32", "stats_ptr": "*fp32",
    "cos_ptr": "*fp32", "sin_ptr": "*fp32", "partial_ptr": "*fp32", "counter_ptr": "*i32",
}  # fmt: skip


def _compiled(kernel: Any, constants: dict[str, Any], warps: int, **options: Any) -> Any:
    """A kernel for a Hopper GPU; what is no constant and not in _KINDS is a pointer to bf16."""
    names = kernel.arg_names
    aligned = {
        (place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if name.endswith("_ptr")
    }
    signature = {name: "constexpr" if name in constants else _KINDS.get(name, "*bf16") for name in names}
    source = ASTSource(kernel, signature, constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, **options})


@pytest.mark.parametrize("has_before", [False, True])
def test_matrix_products_of_long_chunks_overlap(has_before: bool, tmp_path: Path) -> None:
    """Where registers run short the assembler waits behind each product, which costs half the speed."""
    constants: dict[str, Any] = {
        "HEADS": 16, "KV_HEADS": 8, "D": 128, "BLOCK_Q": prompt.BLOCK_Q, "BLOCK_KV": prompt.BLOCK_KV,
        "STAGES": prompt.STAGES, "HAS_BEFORE": has_before, "PRECISION": "tf32", "PDL": True,
    }  # fmt: skip
    compiled = _compiled(prompt.prompt_kernel, constants, 4)
    assert 2 * (compiled.metadata.shared + 1024) <= 228 * 1024, "two programs do not fit a multiprocessor"
    said = _assembled(compiled, tmp_path)
    assert "serialized" not in said
    assert "0 bytes spill stores" in said


def test_decode_programs_find_a_place(tmp_path: Path) -> None:
    """Four to a multiprocessor for 64 requests: they spill more where places of sums stay in registers."""
    constants: dict[str, Any] = {
        "HEADS": 32, "KV_HEADS": 8, "D": 128, "D_PADDED": 128, "BLOCK_SIZE": 16, "BLOCK_Q": 8, "TOKENS": 64,
        "SPAN": 128, "SHARES": True, "STAGES": 2, "HAS_CAP": False, "HAS_WINDOW": False, "PREFIX_PARTS": 0,
        "EARLY": True, "AHEAD": True, "PRECISION": "tf32", "PDL": True,
    }  # fmt: skip
    compiled = _compiled(few_rows_kernel, constants, 4, maxnreg=128)
    assert 4 * (compiled.metadata.shared + 1024) <= 228 * 1024
    spilled = re.search(r"(\d+) bytes spill stores", _assembled(compiled, tmp_path))
    assert spilled is not None
    assert int(spilled[1]) <= 40


def _assembled(compiled: Any, folder: Path) -> str:
    """What the assembler says of a kernel."""
    assembly = folder / "kernel.ptx"
    assembly.write_text(compiled.asm["ptx"])
    command = [
        triton.knobs.nvidia.ptxas.path, "-arch=sm_90a", "-v", str(assembly), "-o", str(folder / "kernel"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = done.stdout + done.stderr
    assert "registers" in said
    return said


def _sums_of_products(kernel: Any, constants: dict[str, Any], warps: int, fuses: bool) -> int:
    """How many fused multiply-adds add something to a product."""
    compiled = _compiled(kernel, constants, warps, enable_fp_fusion=fuses)
    found = re.findall(r"fma\.rn\.f32\s+.*,\s*(\S+);", compiled.asm["ptx"])
    return sum(addend != "0f00000000" for addend in found)  # "x * y + 0" is a product


@pytest.mark.parametrize("kind", ["qkv", "qkv, part of a head turns", "gate_up", "residual"])
@pytest.mark.parametrize("rows", [1, 26])
def test_the_compiler_fuses_nothing_by_itself(kind: str, rows: int) -> None:
    """Of a * b + c * d it rounded one product with 16 rows and the other with 32: a row's bits changed."""
    heads, kv_heads, head_dim, hidden, width = 8, 2, 128, 256, 512
    shapes = {"qkv": ((heads + 2 * kv_heads) * head_dim, hidden), "gate_up": (2 * width, hidden)}
    n, k = shapes.get(kind.split(",")[0], (hidden, width))
    tiling = products.choose_tiling(kind.split(",")[0], n, k, rows)
    constants: dict[str, Any] = {
        "K": k, "K_PART": k // tiling.split, "SPLIT": tiling.split, "BLOCK_N": tiling.block_n,
        "BLOCK_M": products.padded_rows(rows), "BLOCK_K": tiling.block_k, "STAGES": tiling.stages,
        "EARLY": tiling.early, "PREFETCH": 0, "EVEN": True, "PRECISION": "tf32", "PDL": True,
        "HAS_BIAS": False,
    }  # fmt: skip
    kernel: Any = residual_kernel
    if kind == "residual":
        constants |= {"N": n, "SQUARES": 64}
    elif kind == "gate_up":
        kernel = gate_up_kernel
        constants |= {"N": width, "NORMED": True, "SQUARES": 4, "SQUARES_PADDED": 4}
    else:
        kernel = qkv_kernel
        constants |= {
            "SQUARES": 4, "SQUARES_PADDED": 4, "NORM": True, "HEADS": heads, "KV_HEADS": kv_heads,
            "HALF_ROTARY": head_dim // (2 if kind == "qkv" else 4), "BLOCK_SIZE": 16,
            "BLOCK_E": min(8 * tiling.warps, products.padded_rows(rows)),
        }  # fmt: skip
    ours = _sums_of_products(kernel, constants, tiling.warps, fuses=False)
    assert _sums_of_products(kernel, constants, tiling.warps, fuses=True) == ours
