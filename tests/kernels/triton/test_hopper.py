"""Kernels whose speed hangs on what the assembler makes of them, compiled for Hopper GPUs without one."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from octavo.kernels.triton import prompt  # noqa: E402


@pytest.mark.parametrize("has_before", [False, True])
def test_matrix_products_of_long_chunks_overlap(has_before: bool, tmp_path: Path) -> None:
    """Where registers run short the assembler waits behind each product, which costs half the speed."""
    tile = "tensordesc<bf16[64, 1, 128]>"
    kinds = {
        "q_desc": tile, "own_desc": tile, "before_desc": tile, "out_ptr": "*bf16", "tiles_ptr": "*i32",
        "positions_ptr": "*i64", "scale": "fp32",
    }  # fmt: skip
    constants: dict[str, Any] = {
        "HEADS": 16, "KV_HEADS": 8, "D": 128, "BLOCK_Q": prompt.BLOCK_Q, "BLOCK_KV": prompt.BLOCK_KV,
        "STAGES": prompt.STAGES, "HAS_BEFORE": has_before, "PRECISION": "tf32", "PDL": True,
    }  # fmt: skip
    names = prompt.prompt_kernel.arg_names
    aligned = {
        (place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if name.endswith("_ptr")
    }
    signature = {name: kinds.get(name, "constexpr") for name in names}
    source = ASTSource(prompt.prompt_kernel, signature, constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert 2 * (compiled.metadata.shared + 1024) <= 228 * 1024, "two programs do not fit a multiprocessor"
    assembly = tmp_path / "kernel.ptx"
    assembly.write_text(compiled.asm["ptx"])
    command = [
        triton.knobs.nvidia.ptxas.path,
        "-arch=sm_90a",
        "-v",
        str(assembly),
        "-o",
        str(tmp_path / "kernel"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = done.stdout + done.stderr
    assert "registers" in said
    assert "serialized" not in said
    assert "0 bytes spill stores" in said
