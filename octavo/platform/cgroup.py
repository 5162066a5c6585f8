"""The limits a Linux control group puts on this process: CPU time and memory.

Containers and batch systems limit a process this way while /proc still shows the whole machine.
Both versions are read. A group's limit binds its children too, so the whole path up to the root
of what can be seen is taken into account. Elsewhere, and without limits, the answer is None.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_ROOT = Path("/")
# Version 1 has no word for "no limit": it shows a number near the largest that 63 bits hold.
_NO_LIMIT = 1 << 60


class MemoryLimit(NamedTuple):
    """The tightest limit, and what of it is used and cannot be reclaimed at once. Bytes."""

    limit: int
    used: int


def cpu_quota(root: Path = _ROOT) -> float | None:
    """Processors' worth of time this process may use, or None for no limit.

    `root` is where /proc and /sys are looked for.
    """
    quotas = []
    for folder in _folders(root, "cpu"):
        words = _read(folder / "cpu.max").split()
        if not words:
            words = [_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")]
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]) > 0:
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def memory_limit(root: Path = _ROOT) -> MemoryLimit | None:
    """The limit that leaves the least room, or None for no limit."""
    limits = []
    for folder in _folders(root, "memory"):
        limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
        if not limit.isdigit() or int(limit) >= _NO_LIMIT:
            continue
        used = _read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes") or "0"
        # File pages count as used, and are given back when something else needs the room.
        reclaimable = _reclaimable(folder)
        limits.append(MemoryLimit(int(limit), max(0, int(used) - reclaimable)))
    return min(limits, key=lambda each: each.limit - each.used, default=None)


def _reclaimable(folder: Path) -> int:
    fields = dict(
        line.split(maxsplit=1) for line in _read(folder / "memory.stat").splitlines() if " " in line
    )
    # Version 1 counts a group apart from its children, and both together under total_.
    value = fields.get("total_inactive_file", fields.get("inactive_file", "0"))
    return int(value) if value.isdigit() else 0


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """The group's folder and its parents' in every hierarchy that has the controller."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            kind = "cgroup2"
        elif controller in controllers.split(","):
            kind = "cgroup"
        else:
            continue
        for mount, mounted_root in _mounts(root, kind, controller):
            inside = _inside(path, mounted_root)
            folder = root / mount.lstrip("/") / inside
            top = root / mount.lstrip("/")
            yield folder
            while folder != top:
                folder = folder.parent
                yield folder


def _mounts(root: Path, kind: str, controller: str) -> Iterator[tuple[str, str]]:
    """(mount point, the group mounted there) of each matching hierarchy."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, separator, after = line.partition(" - ")
        fields, options = before.split(), after.split()
        if not separator or len(fields) < 5 or len(options) < 3 or options[0] != kind:
            continue
        if kind == "cgroup2" or controller in options[2].split(","):
            yield fields[4], fields[3]


def _inside(path: str, mounted_root: str) -> str:
    """The group's path below the mount point.

    A container often sees its own group mounted as the root, while /proc still shows the outer
    path: then what is mounted is the group itself.
    """
    prefix = mounted_root.rstrip("/")
    if ".." in path.split("/") or not (path == prefix or path.startswith(prefix + "/")):
        return ""
    return path[len(prefix) :].strip("/")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
