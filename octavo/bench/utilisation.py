"""How near a run came to what its device can do at best.

    R   bytes a second that the device reads, measured            F   operations a second, measured
    W   bytes of the weights that one step reads                  P   parameters that one row uses

A step reads every weight once, whatever its number of rows, and a row takes 2 P operations. So of a run of
`steps` steps and `rows` rows in `seconds` (of which some may have been idle), at the least

    bandwidth   steps x W / (seconds x R)
    FLOP        rows x 2 P / (seconds x F)

The KV cache, attention's own arithmetic and a drafter's passes are not in it: both are lower bounds. Where
the engine does not tell its steps and rows, both are None.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from octavo.bench.spec import RunSpec
from octavo.errors import OctavoError

_SIDE = {"cpu": 1024, "cuda": 8192}
_TRIES = 8


@dataclass(frozen=True)
class Ceiling:
    """What one device does at best, measured now."""

    device: str
    name: str
    dtype: str  # of the products
    read_bytes_s: float
    operations_s: float

    @classmethod
    def measure(cls, options: Mapping[str, Any]) -> Ceiling:
        """Takes about half a second, and gives back the memory it used."""
        float32 = options.get("dtype") == "float32"
        return _measure(options.get("device") or "auto", "float32" if float32 else "bfloat16")

    def again(self) -> Ceiling:
        """The best of this and another look, on a CPU: a limit measured beside other work is no limit."""
        if self.device != "cpu":  # the engine holds the card's memory now, and had it to itself before
            return self
        other = _measure("cpu", self.dtype)
        return replace(
            self,
            read_bytes_s=max(self.read_bytes_s, other.read_bytes_s),
            operations_s=max(self.operations_s, other.operations_s),
        )


def _measure(asked: str, dtype: str) -> Ceiling:
    from octavo.platform import detect, memory_bandwidth_probe

    machine = detect(asked)
    operations = _operations(machine.device, dtype)
    if machine.gpu is None or machine.device == "cpu":
        reading = memory_bandwidth_probe() * 1e9
        return Ceiling(machine.device, machine.cpu_model, dtype, reading, operations)
    ceiling = Ceiling(machine.device, machine.gpu.name, dtype, _gpu_reading(), operations)
    import torch

    torch.cuda.empty_cache()  # what is to be measured wants all of it
    return ceiling


def _operations(device: str, dtype: str) -> float:
    """Operations a second of a square product."""
    import torch

    side = _SIDE[device]
    square = torch.ones((side, side), dtype=getattr(torch, dtype), device=device)
    return 2 * side**3 / _best(lambda: square @ square, device)


def _gpu_reading() -> float:
    """Bytes a second, from a copy, which reads and writes each byte once."""
    import torch

    source = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), "cuda")


def _best(work: Callable[[], object], device: str) -> float:
    """Seconds of the fastest try."""
    import torch

    fastest = float("inf")
    for _ in range(_TRIES):
        if device == "cuda":
            torch.cuda.synchronize()
        before = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - before)
    return fastest


def utilisation(
    ceiling: Ceiling | None,
    model_path: str | None,
    spec: RunSpec,
    engine: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """The summary's `utilisation`: both shares with the measured ceilings, or None with the reason."""
    if ceiling is None or model_path is None:
        return _unknown("the engine runs in a process of its own, whose device was not measured")
    told: dict[str, Any] = {
        "device": ceiling.name,
        "measured_read_gb_s": ceiling.read_bytes_s / 1e9,
        "measured_tflop_s": ceiling.operations_s / 1e12,
        "measured_with": ceiling.dtype,
    }
    steps, rows = engine.get("steps"), _rows(engine)
    if steps is None or rows is None or seconds <= 0:
        return {**_unknown("the engine does not tell its steps and rows"), **told}
    try:
        weights, parameters = model_size(model_path, spec.engine_options.get("dtype"), ceiling.device)
    except OctavoError as error:
        return {**_unknown(f"the model's size is not known: {error}"), **told}
    return {
        "bandwidth": steps * weights / (seconds * ceiling.read_bytes_s),
        "flops": rows * 2 * parameters / (seconds * ceiling.operations_s),
        "reason": None,
        "weight_bytes": weights,
        **told,
    }


def model_size(model_path: str, dtype: str | None, device: str) -> tuple[int, int]:
    """(bytes of weights that a step reads, parameters that a row uses), from the model's config.

    An input embedding that is not the output head as well is left out: a row reads one line of it.
    """
    from octavo.models.config import ModelConfig
    from octavo.platform import detect

    config = ModelConfig.from_folder(model_path)
    wanted = {"half": "float16"}.get(dtype or "auto", dtype or "auto")
    if wanted == "auto":
        wanted = config.dtype or detect(device).dtype_default
    parameters = config.weight_bytes("float32") // 4
    if not config.tie_word_embeddings:
        parameters -= config.vocab_size * config.hidden_size
    return parameters * (4 if wanted == "float32" else 2), parameters


def _rows(engine: Mapping[str, Any]) -> float | None:
    rows = [engine.get(name) for name in ("prompt_rows", "decode_rows")]
    return None if None in rows else sum(rows)  # type: ignore[arg-type]


def _unknown(reason: str) -> dict[str, Any]:
    return {"bandwidth": None, "flops": None, "reason": reason}
