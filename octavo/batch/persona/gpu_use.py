"""How busy the GPUs were while a job ran, as NVML says it: the share of time in which a kernel ran."""

from __future__ import annotations

import threading

INTERVAL_SECONDS = 0.5


class GpuUse:
    """Looks at the first `num_gpus` devices every half second, from `start` to `stop`."""

    def __init__(self, num_gpus: int) -> None:
        self._num_gpus = num_gpus
        self._sum = 0.0
        self._count = 0
        self._reason: str | None = None if num_gpus else "no GPU was used"
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to look."""
        if self._num_gpus:
            self._thread = threading.Thread(target=self._watch, name="octavo-gpu-use", daemon=True)
            self._thread.start()

    def stop(self) -> tuple[float | None, str | None]:
        """(mean share of busy time from 0 to 1, None), or (None, why it was not measured)."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if not self._count:
            return None, self._reason or "the job was over before the first look"
        return round(self._sum / self._count / 100, 4), None

    def _watch(self) -> None:
        import torch

        while not self._stop.wait(INTERVAL_SECONDS):
            try:
                for index in range(self._num_gpus):
                    self._sum += torch.cuda.utilization(index)
                    self._count += 1
            except Exception as error:  # no NVML, or a driver that does not answer
                self._reason = f"NVML does not answer: {error}"
                return
