"""An engine here and replicas elsewhere do the same work; a replica's end loses nothing."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from octavo.batch.shares import shares
from octavo.batch.work import Result, WorkItem, run_items
from octavo.batch.workers import EngineWorkers, ReplicaWorkers, open_workers
from octavo.config import EngineArgs
from octavo.errors import ConfigError, EngineDeadError, ModelError, OctavoError, RequestError
from octavo.sampling_params import SamplingParams
from tests.checkpoints import make_checkpoint

KWARGS = {"dtype": "float32", "max_num_seqs": 4, "kv_cache_memory": "16MB", "device": "cpu"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = make_checkpoint(tmp_path_factory.mktemp("m"), tokenizer=True, max_position_embeddings=512)
    return str(folder)


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas of these sizes run anywhere; only the check would mind."""
    monkeypatch.setattr("octavo.platform.hardware.usable_cores", lambda: 2)


def work(count: int, max_tokens: int) -> list[WorkItem]:
    found = []
    for i in range(count):
        params = SamplingParams(temperature=1.0, max_tokens=max_tokens, seed=i, ignore_eos=True)
        prompt: Any = f"prompt {i}" if i % 3 else [5 + i, 6, 7]
        if i % 5 == 4:
            prompt = [{"role": "user", "content": f"hello {i}"}]
        found.append(WorkItem(f"k{i}", prompt, params, group=f"g{i // 4}" if i % 2 else None))
    return found


def texts(results: list[Result]) -> dict[str, str]:
    found = {}
    for result in results:
        assert result.output is not None, result.error
        found[result.item.key] = result.output.outputs[0].text
    return found


def test_replicas_do_what_one_engine_does_though_one_is_killed(model: str) -> None:
    async def alone() -> list[Result]:
        workers = await open_workers({"model": model, **KWARGS})
        assert isinstance(workers, EngineWorkers)
        assert workers.tokenizer is not None
        try:
            return [result async for result in run_items(workers, work(40, 60))]
        finally:
            await workers.close()

    async def divided() -> tuple[list[Result], int]:
        workers = await open_workers({"model": model, **KWARGS}, data_parallel_size=2)
        assert isinstance(workers, ReplicaWorkers)
        assert workers.info.num_replicas == 2
        assert workers.info.max_num_seqs == 8
        victim = workers._replicas[1]
        results = []
        busy = 0
        try:
            async for result in run_items(workers, work(40, 60)):
                results.append(result)
                if len(results) == 10:
                    busy = victim.num_open
                    os.kill(workers.process_ids[1], signal.SIGKILL)
            assert not victim.client.is_alive
            assert victim.num_open == 0
            os.kill(workers.process_ids[0], signal.SIGKILL)
            with pytest.raises(EngineDeadError, match="every replica has ended"):
                await workers.run(work(1, 400)[0])
        finally:
            await workers.close()
        return results, busy

    expected = texts(asyncio.run(alone()))
    results, busy = asyncio.run(divided())
    assert busy > 0  # it had work in hand, which was done again
    assert len(results) == 40
    assert texts(results) == expected


def test_a_model_that_cannot_be_loaded_is_the_same_error_from_replicas(tmp_path: Path) -> None:
    for count in (1, 2):
        with pytest.raises(ModelError):
            asyncio.run(open_workers({"model": str(tmp_path), **KWARGS}, data_parallel_size=count))


def test_wrong_items_are_request_errors(model: str) -> None:
    async def main() -> None:
        workers = await open_workers({"model": model, **KWARGS})
        params = SamplingParams(max_tokens=4)
        bad: list[Any] = [[], [10**6], [1] * 600, [{"role": "user"}, 5]]
        try:
            results = [
                r async for r in run_items(workers, [WorkItem(str(i), p, params) for i, p in enumerate(bad)])
            ]
        finally:
            await workers.close()
        assert len(results) == len(bad)
        assert all(isinstance(result.error, RequestError) for result in results)

    asyncio.run(main())


def test_threads_and_memory_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.platform.hardware.usable_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("octavo.platform.hardware.memory", lambda: (64 << 30, 16 << 30))
    parts = shares(EngineArgs(device="cpu"), 4)
    assert [share.variables["OMP_NUM_THREADS"] for share in parts] == ["2"] * 4
    assert sum(share.options["kv_cache_memory"] for share in parts) == 8 << 30
    assert "kv_cache_memory" not in shares(EngineArgs(device="cpu", kv_cache_memory="1GB"), 2)[0].options
    with pytest.raises(ConfigError, match="8 cores"):
        shares(EngineArgs(device="cpu"), 9)


def test_each_replica_gets_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    args = EngineArgs()
    assert [s.variables for s in shares(args, 2)] == [{"CUDA_VISIBLE_DEVICES": n} for n in ("0", "1")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-aa ,7")
    assert [s.variables["CUDA_VISIBLE_DEVICES"] for s in shares(args, 3)] == ["5", "GPU-aa", "7"]
    with pytest.raises(ConfigError, match="shows 3"):
        shares(args, 4)


def test_replicas_without_their_packages_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.batch.workers._NEEDED", ("msgspec", "no_such_package"))
    with pytest.raises(OctavoError, match=r"no_such_package: pip install 'octavo\[server\]'"):
        asyncio.run(open_workers({"model": "x"}, data_parallel_size=2))
