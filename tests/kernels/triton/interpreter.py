"""Triton's interpreter, ready for use: import this before anything that imports octavo's kernels.

The interpreter has to be chosen before the first kernel is defined, so tests of kernels run in a
process of their own (see conftest.py).
"""

from __future__ import annotations

import inspect
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

    # It looks through all of triton.language at every launch and at every call of a device function, a fifth
    # of the tests' time. Which names of a module or class are builtins does not change: they are noted once.
    is_builtin, noted = interpreter.tl.core.is_builtin, dict[Any, list[str]]()

    def patch_builtin(holder: Any, builder: Any, scope: Any) -> None:
        if holder not in noted:
            noted[holder] = [name for name, member in inspect.getmembers(holder) if is_builtin(member)]
        for name in noted[holder]:
            member = getattr(holder, name)
            if is_builtin(member):
                interpreter._patch_attr(holder, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin
