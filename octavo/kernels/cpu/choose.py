"""Which CPU kernels this machine gets.

The rule, unless an explicit argument overrides it:

1. bfloat16 model, and the processor has AMX bf16 tiles: "onednn". oneDNN uses the tiles, our
   kernels do not; the layers run one by one through torch. (From 16 rows on the tiles are worth
   more than the fused decoder saves. This has not been measured on a machine of ours with AMX: the
   argument is the tiles' peak, 8 times that of vdpbf16ps.)
2. Otherwise, our library is there: "octavo", the whole decoder in one call.
3. Otherwise: "torch". `Choice.reason` says why, for the start-up message.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from octavo.errors import ConfigError
from octavo.kernels.cpu import onednn
from octavo.kernels.cpu.library import CpuLibrary, CpuLibraryError, has_amx_bf16, load

NAMES = ("octavo", "onednn", "torch")


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen, and one line that says why."""

    name: str  # one of NAMES
    reason: str
    library: CpuLibrary | None  # our kernels if they are there; norms and attention use them anyway


def choose(dtype: torch.dtype, name: str | None = None, isa: str | None = None) -> Choice:
    """Choose linear kernels for a model of this dtype; `name` and `isa` override the rule.

    Raises ConfigError for an unknown name, or one that this machine cannot serve.
    """
    if name is not None and name not in NAMES:
        raise ConfigError(f"CPU kernels {name!r} are unknown; choose one of {', '.join(NAMES)}")
    library, missing, amx = None, "", False
    try:
        library = load(isa)
        amx = has_amx_bf16()
    except CpuLibraryError as error:
        if isa is not None:
            raise ConfigError(str(error)) from error
        missing = str(error)
    served = dtype in (torch.float32, torch.bfloat16)
    if name == "octavo" or (name is None and library is not None and served and not _use_tiles(dtype, amx)):
        if library is None:
            raise ConfigError(missing)
        if not served:
            raise ConfigError(f"the CPU kernels know float32 and bfloat16, not {dtype}; choose another dtype")
        return Choice("octavo", f"our kernels, level {library.isa}", library)
    if name == "onednn" or (name is None and _use_tiles(dtype, amx)):
        if dtype != torch.bfloat16 or not onednn.available():
            raise ConfigError("oneDNN linears need dtype bfloat16 and a torch with oneDNN for this processor")
        return Choice("onednn", "oneDNN linears: the processor has AMX tiles", library)
    if name == "torch":
        return Choice("torch", "plain torch, as asked for", library)
    reason = missing if library is None else f"our kernels know float32 and bfloat16, not {dtype}"
    return Choice("torch", f"plain torch, slower: {reason}", library)


def _use_tiles(dtype: torch.dtype, amx: bool) -> bool:
    return amx and dtype == torch.bfloat16 and onednn.available()
