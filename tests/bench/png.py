"""A PNG as rows of pixels: what the browser's screenshots need, in the standard library alone."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Image:
    """Pixels as [height, width, 3] bytes."""

    pixels: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)"""
        return self.pixels.shape[1], self.pixels.shape[0]

    def crop(self, left: float, top: float, width: float, height: float) -> Image:
        """A part, cut at the edges."""
        x, y = max(0, round(left)), max(0, round(top))
        return Image(self.pixels[y : y + round(height), x : x + round(width)])

    @property
    def num_colours(self) -> int:
        """How many different colours there are."""
        flat = self.pixels.reshape(-1, 3).astype(np.uint32)
        return len(np.unique(flat[:, 0] << 16 | flat[:, 1] << 8 | flat[:, 2]))

    @property
    def brightness(self) -> float:
        """The median of all values: a page's background, 0 to 255."""
        return float(np.median(self.pixels))

    def longest_run(self, colour: tuple[int, int, int], within: int = 6) -> int:
        """The longest horizontal line of pixels of about this colour: a bar has one, text has none."""
        far = np.abs(self.pixels.astype(np.int16) - np.asarray(colour, dtype=np.int16)).max(axis=2) <= within
        run = np.zeros(far.shape[0], dtype=np.int32)
        longest = 0
        for column in range(far.shape[1]):
            run = np.where(far[:, column], run + 1, 0)
            longest = max(longest, int(run.max()))
        return longest

    def share_of(self, colour: tuple[int, int, int], within: int = 24) -> float:
        """The share of pixels that are about this colour."""
        far = np.abs(self.pixels.astype(np.int16) - np.asarray(colour, dtype=np.int16)).max(axis=2)
        return float((far <= within).mean())


def read_png(path: Path) -> Image:
    """Decode 8-bit RGB or RGBA without interlacing, which is what browsers write. Raises ValueError."""
    data = path.read_bytes()
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError(f"{path} is no PNG")
    place, packed = 8, b""
    width = height = channels = 0
    while place < len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        body = data[place + 8 : place + 8 + length]
        if kind == b"IHDR":
            width, height, depth, colour, _, _, interlace = struct.unpack(">IIBBBBB", body)
            if depth != 8 or colour not in (2, 6) or interlace:
                raise ValueError(f"{path}: depth {depth}, colour type {colour}, interlace {interlace}")
            channels = 3 if colour == 2 else 4
        elif kind == b"IDAT":
            packed += body
        place += 12 + length
    rows = np.frombuffer(zlib.decompress(packed), dtype=np.uint8).reshape(height, 1 + width * channels)
    return Image(_unfiltered(rows[:, 0], rows[:, 1:].reshape(height, width, channels))[:, :, :3])


def _unfiltered(kinds: np.ndarray, raw: np.ndarray) -> np.ndarray:
    """[height, width, channels] of what the filters had left. Each pixel needs those to its left and above,
    so the picture is done in diagonals: all pixels of one are independent."""
    if kinds.max() > 4:
        raise ValueError(f"no PNG filter {kinds.max()}")
    height, width, channels = raw.shape
    out = np.zeros((height + 1, width + 1, channels), dtype=np.int16)  # with a border of zeros
    for diagonal in range(width + height - 1):
        y = np.arange(max(0, diagonal - width + 1), min(height - 1, diagonal) + 1)
        x = diagonal - y
        left, up, corner = out[y + 1, x], out[y, x + 1], out[y, x]
        straight = left + up - corner
        a, b, c = np.abs(straight - left), np.abs(straight - up), np.abs(straight - corner)
        paeth = np.where((a <= b) & (a <= c), left, np.where(b <= c, up, corner))
        guess = np.choose(kinds[y][:, None], [np.zeros_like(left), left, up, (left + up) // 2, paeth])
        out[y + 1, x + 1] = (raw[y, x] + guess) & 255
    return out[1:, 1:].astype(np.uint8)
