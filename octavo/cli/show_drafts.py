"""Colours for `octavo chat --show-drafts`: which tokens were drafted, and what became of the drafts.

Accepted drafts came for (nearly) free; a bonus is the model's own token behind drafts that were all
accepted; a rejected draft never was part of the text and stands, struck out, in front of the token
that the model chose instead. Everything else was decoded plainly. Without colours (NO_COLOR, a pipe)
brackets say the same.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from octavo import RequestOutput
    from octavo.engine.tokenizer import Tokenizer

_COLOURS: dict[str, dict[str, Any]] = {
    "accepted": {"fg": "green"},
    "bonus": {"fg": "cyan"},
    "rejected": {"fg": "red", "strikethrough": True},
}
_BRACKETS = {"accepted": ("[", "]"), "bonus": ("{", "}"), "rejected": ("[-", "-]")}


def wants_colour() -> bool:
    """True on a terminal, unless NO_COLOR is set (no-color.org) or the terminal is a dumb one."""
    no = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and not no


class DraftPainter:
    """The text of one streamed answer, token by token, each in the colour of its origin."""

    def __init__(self, tokenizer: Tokenizer, *, colour: bool) -> None:
        from octavo.engine.detokenizer import IncrementalDetokenizer

        self._tokenizer = tokenizer
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._colour = colour
        self._ends: list[int] = []  # how much text there is after each token
        self._kinds: dict[int, str] = {}  # by token; the others are plain
        self._rejected: dict[int, int] = {}  # token -> the draft that stood in its place
        self._num_steps = 0
        self._num_tokens = 0  # painted
        self._num_characters = 0
        self.summary = ""  # of what was painted so far

    def legend(self) -> str:
        """One line."""
        shown = [self._styled(kind, kind) for kind in ("accepted", "bonus", "rejected")]
        return (
            f"drafts: {shown[0]}, {shown[1]} (behind accepted ones), {shown[2]}; the rest is plain decoding"
        )

    def paint(self, output: RequestOutput) -> str:
        """What is new in `output`, whose text is cumulative, ready to be printed."""
        answer = output.outputs[0]
        self.summary = _summary(output)
        steps = (output.metrics.trace if output.metrics is not None else None) or []
        for step in steps[self._num_steps :]:
            own = step.start + step.num_accepted
            self._kinds.update(dict.fromkeys(range(step.start, own), "accepted"))
            if step.num_accepted < len(step.drafted_ids):
                self._rejected[own] = step.drafted_ids[step.num_accepted]
            elif step.num_accepted:
                self._kinds[own] = "bonus"
        self._num_steps = len(steps)
        for token in answer.token_ids[len(self._ends) :]:
            self._detokenizer.append([token], False)
            self._ends.append(len(self._detokenizer.text))
        return self._up_to(answer.text, len(answer.token_ids), output.finished)

    def _up_to(self, text: str, num_tokens: int, finished: bool) -> str:
        parts: list[str] = []
        run, run_kind = "", ""

        def close() -> None:
            if run:
                parts.append(self._styled(run_kind, run))

        while self._num_tokens < num_tokens:
            index = self._num_tokens
            last = index == num_tokens - 1
            end = len(text) if finished and last else min(self._ends[index], len(text))
            if self._ends[index] > len(text) and not finished:
                break  # the engine holds this token's text back: a stop string may begin in it
            if index in self._rejected:
                close()
                run = ""
                draft = self._tokenizer.decode([self._rejected[index]], skip_special_tokens=False)
                parts.append(self._styled("rejected", draft))
            kind = self._kinds.get(index, "plain")
            if kind != run_kind:
                close()
                run, run_kind = "", kind
            run += text[self._num_characters : end]
            self._num_characters = max(self._num_characters, end)
            self._num_tokens += 1
        close()
        return "".join(parts)

    def _styled(self, kind: str, text: str) -> str:
        if kind not in _COLOURS:
            return text
        if self._colour:
            return click.style(text, **_COLOURS[kind])
        left, right = _BRACKETS[kind]
        return f"{left}{text}{right}"


def _summary(output: RequestOutput) -> str:
    """What speculation did for an answer, in one line."""
    metrics = output.metrics.speculation if output.metrics is not None else None
    if metrics is None or not metrics.drafted:
        return "[no drafts]"
    parts = [f"{metrics.accepted} of {metrics.drafted} drafts accepted ({metrics.acceptance_rate:.0%})"]
    if metrics.mean_acceptance_length is not None:
        parts.append(f"{metrics.mean_acceptance_length:.2f} tokens a step")
    if metrics.net_speedup is not None:
        parts.append(f"about {metrics.net_speedup:.2f}x plain decoding")
    return f"[{', '.join(parts)}]"
