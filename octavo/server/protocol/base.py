"""What all requests share: strict types, and nothing that is dropped in silence.

Every field of a request is honoured, refused, or named in the answer's header `X-Octavo-Warnings`. A
field that is known and has no effect here stands in `IGNORED`, with the reason; one that asks for what
this server cannot do stands in `REFUSED`; one that nobody knows is warned about as such.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from octavo.errors import RequestError

MAX_WARNINGS = 20  # named one by one; a header has no room for more
MAX_NAME_SHOWN = 60

# Python's whole numbers have no end, those of floats and of messages between processes have.
Whole = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]


class ApiModel(BaseModel):
    """A JSON object. Numbers are not read out of texts, and what is unknown is kept, to be warned about."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=())


class ApiRequest(ApiModel):
    """The body of a request."""

    # name -> why it has no effect. "{value}" in neither: what clients send is not sent back in headers.
    IGNORED: ClassVar[Mapping[str, str]] = {}
    # name -> why it is refused, unless its value asks for nothing (see `asks_for_nothing`)
    REFUSED: ClassVar[Mapping[str, str]] = {}

    def check_extra_fields(self) -> list[str]:
        """Warnings about fields that are not used. Raises RequestError for those that are refused."""
        warnings = []
        for name, value in (self.model_extra or {}).items():
            if name in self.REFUSED:
                if not asks_for_nothing(value):
                    raise RequestError(f"{name}: {self.REFUSED[name]}", name)
            elif name in self.IGNORED:
                if not asks_for_nothing(value):
                    warnings.append(f"{name}: {self.IGNORED[name]}")
            else:
                warnings.append(f"{printable(name)}: unknown field, ignored")
        return warnings


def asks_for_nothing(value: Any) -> bool:
    """True for values that say what would be so without them: null, false, 0, empty, "none", "auto"."""
    return not value or value in ("none", "auto", "default")


def printable(name: str) -> str:
    """A client's text as a header may carry it."""
    shown = name if len(name) <= MAX_NAME_SHOWN else name[:MAX_NAME_SHOWN] + "..."
    return "".join(c if " " <= c <= "~" and c not in ";\\" else "?" for c in shown)


def warning_header(warnings: list[str]) -> str:
    """The value of X-Octavo-Warnings: warnings parted by semicolons, plain ASCII."""
    shown = warnings[:MAX_WARNINGS]
    if len(warnings) > MAX_WARNINGS:
        shown.append(f"and {len(warnings) - MAX_WARNINGS} more")
    text = "; ".join(shown)
    return "".join(c if " " <= c <= "~" else "?" for c in text)
