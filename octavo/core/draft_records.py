"""What became of the drafts: into the requests' chances, and against what they had promised.

A record is cheap and made for every step. The arithmetic that turns records into chances is not, so a few
requests have their turn each step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from octavo.core.acceptance import SharedAcceptance
from octavo.core.draft_plan import DraftState, StepResult
from octavo.core.draft_trials import next_probe

_PROMISE_DECAY = 0.995  # a step
_PROMISE_WEIGHT = 20.0  # tokens for which promises are believed without proof
_FOLDS = 8  # requests whose records are worked into their chances, a step
_HOPE = 32  # steps in which a request that was right without drafting is thought about often


class Records:
    """`shared` are the drafters' priors, by name; `reserves_rows` as in DraftBudget."""

    def __init__(self, shared: Mapping[str, SharedAcceptance], reserves_rows: bool) -> None:
        self._shared = shared
        self._reserves_rows = reserves_rows
        self._to_fold: deque[DraftState] = deque()
        self.promised = self.kept = 0.0  # tokens, decayed
        self.hopeful_until = 0  # the step before which an undrafted request was right a moment ago

    @property
    def trust(self) -> float:
        """The part of what is promised that can be counted on."""
        return min(1.0, (self.kept + _PROMISE_WEIGHT) / (self.promised + _PROMISE_WEIGHT))

    @property
    def waiting(self) -> bool:
        """True if there are records that were not worked in yet."""
        return bool(self._to_fold)

    def pass_steps(self, count: int) -> None:
        """So many steps were read: what was promised in them counts for a little less."""
        self.promised *= _PROMISE_DECAY**count
        self.kept *= _PROMISE_DECAY**count

    def take(self, result: StepResult, step: int, fold_after: int) -> None:
        """The drafts of one step. A request's turn comes after `fold_after` steps with drafts."""
        from_model = result.from_model
        promised = kept = 0.0
        columns = zip(result.states, result.asked, result.drafted, result.accepted, strict=True)
        for index, (state, asked, drafted, accepted) in enumerate(columns):
            if not asked:
                continue
            if state.promised and asked in state.chosen:  # not those of the choice before
                promised += state.promised
                kept += accepted
            source = state.lookup
            if source is not None and index in from_model:
                source.record(asked, 0, 0)  # it had found nothing
                asked = drafted  # the model's part of what was asked for
                source = None
            source = source or state.model
            if source is None:
                continue
            source.record(asked, drafted, accepted)
            if state.queued:
                continue
            idle = not any(state.chosen)
            if idle:
                state.probe = next_probe(result.asked[index], accepted)
                if accepted:
                    state.explored = -step  # the text may have changed: look again soon
                    self.hopeful_until = step + _HOPE
            if idle or source.num_pending >= fold_after or source.num_pending > source.num_folds:
                state.queued = True
                self._to_fold.append(state)
        self.promised += promised
        self.kept += kept

    def fold(self, step: int) -> bool:
        """Work in the records of a few requests. False if there were none."""
        folded: list[DraftState] = []
        while self._to_fold and len(folded) < _FOLDS:
            state = self._to_fold.popleft()
            state.queued = False
            for source in (state.lookup, state.model):
                if source is not None and source.num_pending:
                    source.fold(step)
            folded.append(state)
        if not folded:
            return False
        for shared in self._shared.values():
            shared.refresh()
        for state in folded:
            state.update_curves(self._reserves_rows)
        return True
