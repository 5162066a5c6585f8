"""What this process may use: cores, memory, flags, GPUs; and what is set before torch is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from octavo import platform
from octavo.errors import ConfigError
from octavo.platform import cgroup, environment, hardware, report

ROOT = Path(__file__).resolve().parent.parent

CPUINFO = """processor\t: 0
model name\t: Example 9000
flags\t\t: fpu sse2 avx2 fma avx512f avx512bw avx512vl amx_tile amx_bf16

processor\t: 1
model name\t: Another
flags\t\t: fpu
"""


@pytest.fixture
def tree(tmp_path: Path) -> Any:
    """Writes files below a root that stands for /."""

    def write(files: dict[str, str]) -> Path:
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content + "\n")
        return tmp_path

    return write


V2_MOUNT = "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw"
V1_MOUNTS = (
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
)


# Control groups


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert cgroup.cpu_quota(tmp_path) is None
    assert cgroup.memory_limit(tmp_path) is None


def test_version_2_takes_the_tightest_of_the_path(tree: Any) -> None:
    root = tree(
        {
            "proc/self/cgroup": "0::/slice/unit",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/slice/unit/cpu.max": "max 100000",
            "sys/fs/cgroup/slice/cpu.max": "250000 100000",
            "sys/fs/cgroup/slice/unit/memory.max": "8000",
            "sys/fs/cgroup/slice/unit/memory.current": "3000",
            "sys/fs/cgroup/slice/unit/memory.stat": "anon 1\ninactive_file 500\nfile 9",
            "sys/fs/cgroup/slice/memory.max": "max",
        }
    )
    assert cgroup.cpu_quota(root) == 2.5
    assert cgroup.memory_limit(root) == (8000, 2500)


def test_version_1_reads_its_own_names(tree: Any) -> None:
    root = tree(
        {
            "proc/self/cgroup": "9:name=systemd:/x\n4:memory:/job\n3:cpu,cpuacct:/job\n0::/",
            "proc/self/mountinfo": V1_MOUNTS,
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "150000",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "1000",
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "700",
            "sys/fs/cgroup/memory/job/memory.stat": "inactive_file 1\ntotal_inactive_file 100",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        }
    )
    assert cgroup.cpu_quota(root) == 1.5
    assert cgroup.memory_limit(root) == (1000, 600)


@pytest.mark.parametrize("path", ["/docker/abc", "/../other"])
def test_a_container_sees_its_group_as_the_root(tree: Any, path: str) -> None:
    root = tree(
        {
            "proc/self/cgroup": f"0::{path}",
            "proc/self/mountinfo": V2_MOUNT.replace(" / /sys", " /docker/abc /sys"),
            "sys/fs/cgroup/cpu.max": "50000 100000",
        }
    )
    assert cgroup.cpu_quota(root) == 0.5


@pytest.mark.parametrize(
    ("affinity", "quota", "cores"), [(8, None, 8), (8, 2.5, 2), (2, 16.0, 2), (4, 0.5, 1), (1, None, 1)]
)
def test_usable_cores(
    monkeypatch: pytest.MonkeyPatch, affinity: int, quota: float | None, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)), raising=False)
    monkeypatch.setattr(hardware, "cpu_quota", lambda: quota)
    assert platform.usable_cores() == cores


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_within_the_groups_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "memory_limit", lambda: None)
    total, available = platform.memory()
    assert 0 < available <= total
    monkeypatch.setattr(hardware, "memory_limit", lambda: cgroup.MemoryLimit(1 << 20, 1 << 18))
    assert platform.memory() == (1 << 20, (1 << 20) - (1 << 18))
    monkeypatch.setattr(hardware, "memory_limit", lambda: cgroup.MemoryLimit(1 << 20, 1 << 21))
    assert platform.memory() == (1 << 20, 0)


# CPU and GPU


def fake_file(monkeypatch: pytest.MonkeyPatch, name: str, content: str) -> None:
    real = Path.read_text

    def read(self: Path, *args: Any, **kwargs: Any) -> str:
        return content if str(self) == name else real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", read)


def test_flags_and_model_come_from_the_first_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    fake_file(monkeypatch, "/proc/cpuinfo", CPUINFO)
    assert platform.cpu_model() == "Example 9000"
    wanted = {"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "amx_tile", "amx_bf16"}
    assert platform.cpu_flags() == wanted
    fake_file(monkeypatch, "/proc/cpuinfo", "Features : fp asimd bf16\nCPU part : 0xd40\n")
    assert platform.cpu_flags() == {"asimd", "bf16"}
    assert platform.cpu_model() == "0xd40"


def fake_gpus(monkeypatch: pytest.MonkeyPatch, *gpus: tuple[str, int, int, int]) -> None:
    properties = [
        SimpleNamespace(name=name, major=major, minor=minor, total_memory=memory)
        for name, major, minor, memory in gpus
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties[index])
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_70", "sm_80", "sm_90", "sm_90a"])


def test_without_a_gpu_the_cpu_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch)
    found = platform.detect()
    assert (found.device, found.gpus, found.gpu, found.driver) == ("cpu", (), None, None)
    assert found.cores == platform.usable_cores()
    assert (found.total_memory, found.cpu_flags) == (platform.memory()[0], platform.cpu_flags())
    with pytest.raises(AttributeError):
        found.cores = 99  # type: ignore[misc]


def test_a_gpu_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match="built for CPUs only"):
        platform.detect("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES=''"):
        platform.detect("cuda")
    with pytest.raises(ConfigError, match="auto, cpu, cuda"):
        platform.detect("tpu")


def test_gpus_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, ("H200", 9, 0, 150 << 30), ("H200", 9, 0, 150 << 30))
    module = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.124.06  Wed Feb 26\nGCC version: 12"
    fake_file(monkeypatch, "/proc/driver/nvidia/version", module)
    found = platform.detect()
    assert (found.device, found.dtype_default, found.driver) == ("cuda", "bfloat16", "570.124.06")
    assert found.gpu == platform.Gpu(0, "H200", (9, 0), 150 << 30)
    assert len(found.gpus) == 2
    assert platform.detect("cpu").device == "cpu"
    assert platform.detect("cpu").gpus == ()
    fake_gpus(monkeypatch, ("V100", 7, 0, 16 << 30))
    assert platform.detect("cuda").dtype_default == "float16"


@pytest.mark.parametrize(
    ("capability", "built_for", "serves"),
    [
        ((7, 0), ["sm_75", "sm_80", "sm_90"], False), ((7, 5), ["sm_70", "sm_80"], True),
        ((9, 0), ["sm_80", "compute_80"], True), ((8, 9), ["sm_80", "sm_90a"], True), ((7, 0), [], True),
        ((9, 0), ["gfx942"], True), ((10, 0), ["sm_90", "compute_120"], False),
    ],
)  # fmt: skip
def test_a_torch_without_code_for_a_gpu(
    capability: tuple[int, int], built_for: list[str], serves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpus(monkeypatch, ("a GPU", *capability, 16 << 30))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built_for)
    if serves:
        assert platform.detect("auto").device == "cuda"
        return
    for asked in ("auto", "cuda"):
        with pytest.raises(ConfigError, match="has no code for a GPU"):
            platform.detect(asked)
    assert platform.detect("cpu").device == "cpu"


def a_machine(capability: tuple[int, int] | None) -> platform.Platform:
    """With a GPU of this compute capability, or with none."""
    found = platform.detect("cpu")
    if capability is None:
        return found
    return replace(found, device="cuda", gpus=(platform.Gpu(0, "a GPU", capability, 16 << 30),))


@pytest.mark.parametrize(
    ("capability", "asked", "name"),
    [
        ((9, 0), "auto", "triton"), ((8, 0), "triton", "triton"), ((8, 0), "sdpa", "sdpa"),
        ((7, 5), "auto", "sdpa"), ((7, 0), "torch", "torch"), (None, "auto", "cpu"), (None, "sdpa", "sdpa"),
    ],
)  # fmt: skip
def test_attention_by_capability(capability: tuple[int, int] | None, asked: str, name: str) -> None:
    found = platform.choose_attention(asked, a_machine(capability), has_triton=True)
    assert found.name == name
    assert (found.reason is None) == (capability != (7, 5))


def test_attention_that_a_machine_cannot_serve() -> None:
    for capability, asked, message in (
        ((7, 5), "triton", "compute capability 7.5.*8.0.*sdpa"),
        ((9, 0), "cpu", "on a CPU only"),
        (None, "triton", "on a GPU only"),
    ):
        with pytest.raises(ConfigError, match=message):
            platform.choose_attention(asked, a_machine(capability), has_triton=True)
    without = platform.choose_attention("auto", a_machine((9, 0)), has_triton=False)
    assert (without.name, without.reason) == ("sdpa", "the package triton is not installed")


@pytest.mark.parametrize(
    ("capability", "asked", "checkpoint", "dtype"),
    [
        ((7, 5), "auto", "bfloat16", "float16"), ((7, 5), "auto", "float32", "float32"),
        ((7, 5), "half", "bfloat16", "float16"), ((7, 0), "float32", "bfloat16", "float32"),
        ((8, 0), "auto", "bfloat16", "bfloat16"), ((8, 0), "bfloat16", "float16", "bfloat16"),
        (None, "bfloat16", "float32", "bfloat16"),
    ],
)  # fmt: skip
def test_dtype_by_capability(
    capability: tuple[int, int] | None, asked: str, checkpoint: str, dtype: str
) -> None:
    assert platform.choose_dtype(asked, checkpoint, a_machine(capability)) == dtype


def test_no_bfloat16_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match=r"compute capability 7\.0.*--dtype float16"):
        platform.choose_dtype("bfloat16", "bfloat16", a_machine((7, 0)))


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [({"avx2", "fma"}, "float32"), ({"avx512f", "avx512bw"}, "bfloat16"), ({"asimd", "bf16"}, "bfloat16")],
)
def test_default_dtype_of_a_cpu(flags: set[str], dtype: str) -> None:
    assert hardware._default_dtype((), frozenset(flags)) == dtype


@pytest.mark.gpu
def test_a_real_gpu() -> None:
    found = platform.detect("cuda")
    assert found.gpu is not None
    free, total = platform.gpu_memory()
    assert 0 < free <= total
    assert found.gpu.capability == torch.cuda.get_device_capability(0)
    assert found.driver


# Environment

SHOW = (
    "import json, os, sys; from octavo import platform; added = platform.prepare_environment();"
    "print(json.dumps(['torch' in sys.modules, added, os.environ['GOMP_SPINCOUNT']]))"
)


def test_the_environment_is_prepared_before_torch() -> None:
    variables = ("GOMP_SPINCOUNT", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM")
    clean = {name: value for name, value in os.environ.items() if name not in variables}
    cores = str(platform.usable_cores())

    def show(**extra: str) -> Any:
        command = [sys.executable, "-c", SHOW]
        result = subprocess.run(
            command, cwd=ROOT, env=clean | extra, capture_output=True, text=True, check=True
        )
        return json.loads(result.stdout)

    added = {"GOMP_SPINCOUNT": "10000", "OMP_NUM_THREADS": cores, "TOKENIZERS_PARALLELISM": "false"}
    assert show() == [False, added, "10000"]
    mine = {"GOMP_SPINCOUNT": "7", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "true"}
    assert show(**mine) == [False, {}, "7"]


def test_after_torch_only_its_threads_are_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.delenv(name, raising=False)
    threads = [8]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(environment, "usable_cores", lambda: 3)
    assert platform.prepare_environment() == {"TOKENIZERS_PARALLELISM": "false"}
    assert threads == [8, 3]
    platform.prepare_environment()
    assert threads == [8, 3]
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")


def test_importing_sets_nothing_and_loads_nothing_heavy() -> None:
    code = (
        "import os, sys; before = dict(os.environ); import octavo.platform, octavo.hub;"
        "assert dict(os.environ) == before;"
        "heavy = {'torch', 'numpy', 'huggingface_hub', 'gguf', 'tokenizers'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# Measured and reported


def test_bandwidth_is_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    from octavo.platform import bandwidth

    monkeypatch.setattr(bandwidth, "_BUFFER_BYTES", 32 << 20)
    assert 0.1 < platform.memory_bandwidth_probe(0.02) < 20_000


def test_the_report_is_plain_data_and_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_gpus(monkeypatch, ("H200", 9, 0, 150 << 30))
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    monkeypatch.setenv("OCTAVO_API_KEY", "sk-secret")
    monkeypatch.setenv("HF_ENDPOINT", "https://user:secret@mirror.example/hub")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.setenv("MY_OWN_PASSWORD", "secret")
    found = platform.describe()
    assert json.loads(json.dumps(found)) == found
    text = str(found)
    assert "secret" not in text
    assert "secret" not in json.dumps(found)
    environment = found["environment"]
    assert environment["HF_TOKEN"] == environment["OCTAVO_API_KEY"] == "(set)"
    assert environment["HF_ENDPOINT"] == "https://mirror.example/hub"
    assert environment["TOKENIZERS_PARALLELISM"] == "true"
    assert found["packages"]["torch"] == torch.__version__
    assert found["cache"] == str(tmp_path)
    assert found["gpus"] == [{"name": "H200", "capability": "9.0", "memory": 150 << 30}]
    for part in ("name H200, capability 9.0, memory 150.0 GiB", f"torch {torch.__version__}", str(tmp_path)):
        assert part in text


def test_the_report_says_what_a_gpu_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch)
    assert platform.describe()["gpu_kernels"] is None
    fake_gpus(monkeypatch, ("V100", 7, 0, 16 << 30))
    assert "compute capability 7.0" in platform.describe()["gpu_kernels"]
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_90"])
    found = platform.describe()
    assert found["gpu_kernels"].startswith("not available: this torch")
    assert (found["device"], found["gpus"]) == ("cpu", [])


def test_the_report_says_when_kernels_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "octavo.kernels.cpu.library", None)
    assert report._cpu_kernels().startswith("not available: ")
