"""Triton's interpreter, ready for use: import this before anything that imports octavo's kernels.

The interpreter has to be chosen before the first kernel is defined, so tests of kernels run in a
process of their own (see conftest.py).
"""

from __future__ import annotations

import os
from typing import Any


def enable() -> None:
    """Kernels defined from now on run on the CPU, as numpy."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        # a scalar is an array of one element there, which numpy 2.4 no longer takes for a loop's bound
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor
