"""`benchmarks/energy.py` on a tiny model and the CPU: both methods run, and leave results and a report."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import energy, gpu_workloads
from octavo.bench.record import load

TINY = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 128, "vocab_size": 512, "tie_word_embeddings": True,
}  # fmt: skip


def test_plain_and_speculative_leave_results_and_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gpu_workloads.MODELS, "qwen3-8b", TINY)
    monkeypatch.setitem(gpu_workloads.MODELS, "qwen3-0.6b", {**TINY, "num_hidden_layers": 1})
    for name in ("bos_token_id", "eos_token_id"):
        monkeypatch.setitem(gpu_workloads._COMMON, name, 1)
    monkeypatch.setattr("octavo.bench.metrics.LAG_LIMIT", 60.0)  # a busy machine is no failure of this test
    monkeypatch.setattr("octavo.bench.utilisation.Ceiling.measure", lambda options: None)
    code = energy.main(["--device", "cpu", "--dtype", "float32", "--concurrency", "2", "--rounds", "2",
                        "--input-length", "24", "--output-length", "12", "--num-speculative-tokens", "3",
                        "--output", str(tmp_path)])  # fmt: skip
    assert code == 0
    plain, speculative = (
        load(tmp_path / f"qwen3-8b_{method}_c2.json") for method in ("target_ar", "speculative")
    )
    for result in (plain, speculative):
        assert [record.generated_tokens for record in result.requests] == [12] * 4
        assert energy.NOTICE in result.warnings
    # Coins accept most drafts, where two random models never agree.
    assert speculative.summary["total_drafted"] > 0
    assert speculative.summary["avg_acceptance_rate"] > 0.3
    assert plain.effective_config["prompts"]["digest"] == speculative.effective_config["prompts"]["digest"]
    assert "were not compared" in (tmp_path / "energy.html").read_text(encoding="utf-8")
