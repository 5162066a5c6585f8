"""A set of names that stays small: 16 bytes of a hash each, in one table.

A Python set of a hundred thousand ids takes some ten megabytes; this takes three. Two names with the
same 128 bits of BLAKE2 will not be met.
"""

from __future__ import annotations

import hashlib

_SLOT = 16  # bytes
_FREE = bytes(_SLOT)
_MIN_SLOTS = 1 << 10


class KeySet:
    """Names that were added; they cannot be taken out, nor listed."""

    def __init__(self) -> None:
        self._table = bytearray(_MIN_SLOTS * _SLOT)
        self._num_slots = _MIN_SLOTS
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, key: str) -> bool:
        digest = digest_of(key)
        start = self._find(digest)
        return self._table[start : start + _SLOT] == digest

    def add(self, key: str) -> bool:
        """False if it was there already."""
        digest = digest_of(key)
        start = self._find(digest)
        if self._table[start : start + _SLOT] == digest:
            return False
        self._table[start : start + _SLOT] = digest
        self._count += 1
        if self._count * 3 > self._num_slots * 2:
            self._grow()
        return True

    def _find(self, digest: bytes) -> int:
        """Where it is, or the free slot where it would be."""
        slot = int.from_bytes(digest[:8], "little") & (self._num_slots - 1)
        while True:
            start = slot * _SLOT
            found = self._table[start : start + _SLOT]
            if found in (digest, _FREE):
                return start
            slot = (slot + 1) & (self._num_slots - 1)

    def _grow(self) -> None:
        before = self._table
        self._num_slots *= 2
        self._table = bytearray(self._num_slots * _SLOT)
        for start in range(0, len(before), _SLOT):
            digest = bytes(before[start : start + _SLOT])
            if digest != _FREE:
                place = self._find(digest)
                self._table[place : place + _SLOT] = digest


def digest_of(name: str) -> bytes:
    """16 bytes that stand for a name, never all of them zero."""
    found = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=_SLOT).digest()
    return found if found != _FREE else b"\x01" * _SLOT
