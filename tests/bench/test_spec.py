"""What is refused before anything is loaded, and what the environment variables mean."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pytest

from octavo.bench.arrivals import read_trace, schedule
from octavo.bench.options import BenchOptions
from octavo.bench.record import result_path
from octavo.bench.slo import parse_slo
from octavo.bench.spec import LoadSpec, PlacementSpec, RunSpec, SamplingSpec, parse_engine
from octavo.bench.targets.placement import device_arguments
from octavo.bench.variables import PRESETS, VARIABLES, preset_lines, read_variables
from octavo.cli.bench_options import named_for, options_from
from octavo.cli.bench_sweep import _verdict
from octavo.errors import ConfigError, OctavoError

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"INFERENCE_ENGINE": "octvo"}, "did you mean octavo"),
        ({"INFERENCE_ENGINE": "url"}, "url=http://HOST:PORT"),
        ({"INFERENCE_METHOD": "specultive"}, "did you mean speculative"),
        ({"INFERENCE_METHOD": "speculative"}, "DRAFTER_MODEL.*prompt_lookup"),
        ({"INFERENCE_METHOD": "drafter_ar"}, "DRAFTER_MODEL"),
        ({"AUTO_RATE": "0"}, "none would ever come"),
        ({"AUTO_RATE": "-1"}, "none would ever come"),
        ({"AUTO_RATE": "inf"}, "NUM_PROMPTS"),
        ({"AUTO_DURATION": "0"}, "AUTO_DURATION"),
        ({"NUM_PROMPTS": "-1"}, "NUM_PROMPTS"),
        ({"ARRIVAL": "poison"}, "did you mean poisson"),
        ({"ARRIVAL": "none.jsonl"}, "there is no trace file none.jsonl"),
        ({"ARRIVAL": "closed", "CONCURRENCY": "0"}, "CONCURRENCY"),
        ({"BURSTINESS": "0", "ARRIVAL": "gamma"}, "BURSTINESS"),
        ({"VLLM_NUM_SPECULATIVE_TOKENS": "17"}, "1 to 16"),
        ({"GAMMA_VALUE": "0"}, "1 to 16"),
        ({"VLLM_TENSOR_PARALLEL_SIZE": "64"}, "more than the GPUs"),
        ({"VLLM_PIPELINE_PARALLEL_SIZE": "2"}, "only 1 is supported"),
        ({"VLLM_DTYPE": "int3"}, "int3"),
        ({"VLLM_MAX_NUM_SEQS": "many"}, "VLLM_MAX_NUM_SEQS='many': write a whole number"),
        ({"OCTAVO_MAX_NUM_SEQS": "x"}, "OCTAVO_MAX_NUM_SEQS='x'"),
        ({"GENERATION_LENGTH": "0"}, "GENERATION_LENGTH"),
        ({"TEMPERATURE": "-1"}, "TEMPERATURE"),
        ({"TOP_P": "2"}, "TOP_P"),
        ({"IGNORE_EOS": "perhaps"}, "write true or false"),
        ({"GPU_STRATEGY": "apart"}, "GPU_STRATEGY"),
        ({"TARGET_GPU_RATIO": "0.9"}, "together at most 1"),
        ({"BATCH_SIZE": "0"}, "BATCH_SIZE"),
        ({"GPU_MONITOR_INTERVAL": "0"}, "GPU_MONITOR_INTERVAL"),
        ({"SHAREGPT_DIR": "here", "PROMPTS": "there.jsonl"}, "give one"),
        (
            {"INFERENCE_ENGINE": "transformers", "INFERENCE_METHOD": "prompt_lookup", "GAMMA_VALUE": "auto"},
            "only octavo",
        ),
        ({"INFERENCE_ENGINE": "url=http://x", "INFERENCE_METHOD": "drafter_ar"}, "serves one model"),
    ],
)  # fmt: skip
def test_mistakes_are_named(variables: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_variables(variables).spec().check()


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ("missing.jsonl", "there is no file missing.jsonl"),
        ("bundeld", "Did you mean bundled"),
        ("", "no prompts"),
    ],
)
def test_missing_prompts_are_named(prompts: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        replace(BenchOptions(), prompts=prompts).source()


def test_an_engine_that_is_not_installed_says_how() -> None:
    if os.environ.get("OCTAVO_TEST_VLLM"):
        pytest.skip("vllm is here")
    with pytest.raises(OctavoError, match="pip install vllm"):
        RunSpec(engine="vllm").check()


def test_defaults_are_those_of_the_specification() -> None:
    options = read_variables({})
    spec = options.spec()
    assert spec.check() == []
    assert (spec.engine, spec.method, spec.model) == ("octavo", "target_ar", "smollm2")
    assert spec.engine_options == {
        "tensor_parallel_size": 1, "pipeline_parallel_size": 1, "gpu_memory_utilization": 0.9,
        "max_model_len": 4096, "max_num_seqs": 128, "max_num_batched_tokens": 8192, "dtype": "auto",
        "disable_log_stats": True,
    }  # fmt: skip
    assert spec.load == LoadSpec("poisson", 0, 1.0, 300.0)
    assert spec.sampling == SamplingSpec(0.0, 1.0, 0, 42, 100, False)
    assert options.output == "benchmark_results.json"
    assert read_variables({"DRAFTER_MODEL": "small"}).spec().method == "speculative"


def test_our_spelling_wins() -> None:
    spec = read_variables({"VLLM_MAX_NUM_SEQS": "64", "OCTAVO_MAX_NUM_SEQS": "32"}).spec()
    assert spec.engine_options["max_num_seqs"] == 32


def test_gamma_is_the_older_name() -> None:
    def drafts(**variables: str) -> int | str | None:
        return read_variables({"INFERENCE_METHOD": "prompt_lookup", **variables}).spec().drafts

    assert drafts(GAMMA_VALUE="3") == 3
    assert drafts(GAMMA_VALUE="3", VLLM_NUM_SPECULATIVE_TOKENS="7") == 7
    assert drafts() == "auto"
    assert drafts(INFERENCE_ENGINE="transformers") == 5


def test_the_switch_for_speculation_warns_and_is_in_the_result() -> None:
    given = {"INFERENCE_METHOD": "prompt_lookup", "VLLM_ENABLE_SPECULATIVE": "false"}
    spec = read_variables(given).spec()
    assert spec.method == "target_ar"
    assert any("speculation is OFF" in warning for warning in spec.check())
    spec = read_variables({"INFERENCE_METHOD": "target_ar", "VLLM_ENABLE_SPECULATIVE": "true"}).spec()
    assert spec.method == "target_ar"
    assert any("INFERENCE_METHOD wins" in warning for warning in spec.check())
    assert (
        read_variables({"INFERENCE_METHOD": "prompt_lookup", "VLLM_ENABLE_SPECULATIVE": "true"})
        .spec()
        .check()
        == []
    )


def test_what_an_engine_does_not_have_is_said() -> None:
    spec = read_variables({"INFERENCE_ENGINE": "transformers", "VLLM_MAX_NUM_SEQS": "4"}).spec()
    assert spec.engine_options == {"dtype": "auto"}
    assert any("VLLM_MAX_NUM_SEQS" in warning for warning in spec.check())
    spec = read_variables({"BATCH_SIZE": "4"}).spec()
    assert any("octavo batches always" in warning for warning in spec.check())
    spec = read_variables({"VLLM_USE_V2_BLOCK_MANAGER": "true"}).spec()
    assert any("only one block manager" in warning for warning in spec.check())
    spec = read_variables({"INFERENCE_ENGINE": "transformers", "INFERENCE_METHOD": "prompt_lookup"}).spec()
    assert any("BATCH_SIZE=1" in warning for warning in spec.check())
    assert spec.effective()["effective_batch_size"] == 1


def test_keys_are_not_in_the_result() -> None:
    spec = read_variables({"INFERENCE_ENGINE": "url=http://x:1/v1", "OPENAI_API_KEY": "sk-secret"}).spec()
    assert spec.api_key == "sk-secret"
    assert "sk-secret" not in str(spec.effective())
    assert "sk-secret" not in repr(spec)


def test_engines_as_users_write_them() -> None:
    assert parse_engine("octavo-served") == {"engine": "octavo", "served": True}
    assert parse_engine("http://h:1/") == {"engine": "url", "url": "http://h:1"}
    assert parse_engine("url=https://h/v1") == {"engine": "url", "url": "https://h"}


def test_names_of_results() -> None:
    assert result_path("out/b.json", "target_ar", "transformers") == Path("out/b_target_ar.json")
    assert result_path("b.json", "prompt_lookup", "octavo") == Path("b_prompt_lookup_octavo.json")
    assert result_path("b", "speculative", "url") == Path("b_speculative_url.json")


def test_each_verb_has_a_result_file_of_its_own() -> None:
    options = options_from({})
    assert (
        named_for("latency", options, {}).output_path().name
        == "benchmark_results_latency_target_ar_octavo.json"
    )
    given = {"output": "here/b.json"}
    assert named_for("serve", options_from(given), given).output == "here/b.json"


def test_what_a_sweep_found_out_in_words() -> None:
    assert _verdict("rate", 2.0, 4.0) == "keeps up to rate 2; not at 4"
    assert _verdict("rate", 2.0, None) == "keeps up to rate 2; more was not tried"
    assert _verdict("rate", None, 1.0) == "does not keep up with rate 1"


# ---------------------------------------------------------------------- the script


def test_the_script_has_one_line_for_each_variable() -> None:
    lines = (ROOT / "run_benchmark.sh").read_text().splitlines()
    exports = [line.split("#")[0].rstrip() for line in lines if line.startswith("export ")]
    wanted = [f'export {v.name}="${{{v.name}:-{v.default}}}"' for v in VARIABLES]
    assert sorted(exports) == sorted(wanted)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_legal(name: str) -> None:
    assert set(PRESETS[name]) <= {variable.name for variable in VARIABLES}
    read_variables(PRESETS[name]).spec().check()


def script(arguments: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LD_LIBRARY_PATH")}
    # Whichever octavo the path may hold, this one is meant.
    environment = {**kept, "PYTHON": sys.executable, "PATH": "/usr/bin:/bin", **variables}
    return subprocess.run(
        ["bash", str(ROOT / "run_benchmark.sh"), *arguments],
        capture_output=True, text=True, env=environment, check=False, cwd=ROOT,
    )  # fmt: skip


@pytest.mark.skipif((ROOT / ".venv").exists(), reason="the script would use .venv")
def test_the_script_passes_presets_variables_and_flags_on() -> None:
    """Ended by a mistake in the last place, so that nothing is loaded; what stands there says who won."""
    done = script(["--seed", "-1"], PRESET="quick", NUM_PROMPTS="3", OUTPUT_FILE="/nowhere/b.json")
    assert done.returncode == 2
    assert "SEED (--seed) must be 0 or more, not -1" in done.stderr
    assert script([], PRESET="fast").returncode != 0


def test_preset_lines_leave_the_callers_values_alone(tmp_path: Path) -> None:
    code = "\n".join([*preset_lines("quick"), 'echo "$NUM_PROMPTS $AUTO_RATE"'])
    done = subprocess.run(
        ["bash", "-c", code], env={"NUM_PROMPTS": "3"}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["3", "inf"]


# ---------------------------------------------------------------------- arrivals


def gaps(load: LoadSpec) -> list[float]:
    moments = [arrival.moment for arrival in schedule(load, seed=1)]
    assert moments == sorted(moments)
    assert moments[0] == 0
    return [after - before for before, after in itertools.pairwise(moments)]


@pytest.mark.parametrize(("arrival", "burstiness", "variation"), [
    ("constant", 1.0, 0.0), ("poisson", 1.0, 1.0), ("gamma", 4.0, 0.5), ("gamma", 0.25, 2.0),
])  # fmt: skip
def test_gaps_have_their_mean_and_their_spread(arrival: str, burstiness: float, variation: float) -> None:
    found = gaps(LoadSpec(arrival, num_prompts=20_000, rate=4.0, burstiness=burstiness))
    assert fmean(found) == pytest.approx(0.25, rel=0.05)
    # The coefficient of variation of Gamma(k) is 1 / sqrt(k).
    assert pstdev(found) / fmean(found) == pytest.approx(variation, abs=0.05 * max(variation, 0.01))


def test_by_time_requests_come_until_the_time_is_over() -> None:
    moments = [arrival.moment for arrival in schedule(LoadSpec("constant", rate=2.0, duration=3.0), 1)]
    assert moments == [0, 0.5, 1.0, 1.5, 2.0, 2.5]
    assert schedule(LoadSpec("poisson", rate=2.0, duration=3.0), 1) == schedule(
        LoadSpec("poisson", rate=2.0, duration=3.0), 1
    )
    assert len(schedule(LoadSpec("poisson", num_prompts=5, rate=math.inf), 1)) == 5


def test_traces(tmp_path: Path) -> None:
    lines = tmp_path / "t.jsonl"
    lines.write_text('{"timestamp": 12.5, "output_length": 7}\n\n{"timestamp": 11.0}\n')
    assert [(a.moment, a.max_tokens) for a in read_trace(lines)] == [(0.0, None), (1.5, 7)]
    table = tmp_path / "t.csv"
    table.write_text("TIMESTAMP_MS,max_tokens\n1000,3\n1250,\n")
    assert [(a.moment, a.max_tokens) for a in read_trace(table)] == [(0.0, 3), (0.25, None)]
    lines.write_text('{"timestamp": 1}\n{"time": 2}\n')
    with pytest.raises(ConfigError, match="line 2"):
        read_trace(lines)
    lines.write_text("{broken")
    with pytest.raises(ConfigError, match="not JSON"):
        read_trace(lines)
    lines.write_text("")
    with pytest.raises(ConfigError, match="holds no request"):
        read_trace(lines)


def test_slos() -> None:
    assert parse_slo("ttft=500ms, tpot=50ms,e2el=2s") == {"ttft": 0.5, "tpot": 0.05, "latency": 2.0}
    for wrong in ("ttft", "ttft=500", "tfft=1s", "ttft=0ms", ""):
        with pytest.raises(ConfigError, match="--slo"):
            parse_slo(wrong)


# ---------------------------------------------------------------------- placement


@pytest.mark.parametrize(
    ("placement", "role", "expected"),
    [
        (PlacementSpec("shared_all"), "target", ({"device_map": "auto"}, None)),
        (PlacementSpec("single", target_gpu=1), "drafter", ({}, "cuda:1")),
        (PlacementSpec("separate", target_gpu=0, drafter_gpu=1), "drafter", ({}, "cuda:1")),
        (PlacementSpec("separate", target_gpu=0, drafter_gpu=1), "target", ({}, "cuda:0")),
        (PlacementSpec("ratio"), "drafter", ({"device_map": "auto", "max_memory": {0: 20, 1: 20}}, None)),
    ],
)
def test_placement(placement: PlacementSpec, role: str, expected: Any) -> None:
    assert device_arguments(placement, role, "cuda", [100, 100]) == expected


def test_placement_on_gpus_that_are_not_there() -> None:
    assert device_arguments(PlacementSpec(), "target", "cpu", []) == ({}, None)
    assert device_arguments(PlacementSpec(), "target", "cuda", [100]) == ({}, "cuda:0")
    with pytest.raises(ConfigError, match="DRAFTER_GPU=3: the GPUs here are 0 to 1"):
        device_arguments(PlacementSpec("separate", drafter_gpu=3), "drafter", "cuda", [100, 100])
