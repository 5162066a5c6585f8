"""From an item of a dataset to the text that a model is shown.

A prompt has two parts. The first is the same for all items of a user, so that its KV is computed once:
the task, the profile and the personality, the history. The second is the item's own: its context, and
what is to be written now. Which of profile, history and context are there is the ablation's decision and
nobody else's: `draft` puts in what is asked for, whole, and nothing of the rest.

Of a history that is too long the oldest turns are left out first, and then those of the context, whole
turns each; `num_turns` says how many there are, and `fitting` how many fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from octavo.batch.persona.data import Item, Person, Turn
from octavo.batch.persona.datasets import Ablation, Dataset, Language


@dataclass(frozen=True)
class Frame:
    """What stands around the data, in one language. {name} is the person to be imitated."""

    profile: str
    personality: str
    history: str
    history_item: str
    conversation: str  # heading of a dialogue's context
    given: str  # heading of any other context
    next_turn: str
    next_text: str
    somebody: str  # {name} where the profile has none
    colon: str


FRAMES: dict[Language, Frame] = {
    "en": Frame(
        profile="Profile of {name}:",
        personality="Personality of {name}:",
        history="What {name} said and wrote before, oldest first:",
        history_item="[{number}]",
        conversation="The conversation so far:",
        given="What {name} answers to:",
        next_turn="Write the next turn of {name}: the words alone, without a name before them.",
        next_text="Write what {name} writes: the text alone, without comments on it.",
        somebody="this person",
        colon=": ",
    ),
    "zh": Frame(
        profile="{name}的个人资料：",
        personality="{name}的性格：",
        history="{name}以前说过、写过的内容（由旧到新）：",
        history_item="【{number}】",
        conversation="目前为止的对话：",
        given="{name}要回应的内容：",
        next_turn="请写出{name}的下一句话。只写话语本身，前面不要加名字。",
        next_text="请写出{name}会写的内容。只写正文，不要加说明。",
        somebody="这个人",
        colon="：",
    ),
    "ja": Frame(
        profile="{name}のプロフィール：",
        personality="{name}の性格：",
        history="{name}のこれまでの発言（古い順）：",
        history_item="【{number}】",
        conversation="これまでの会話：",
        given="{name}が答える内容：",
        next_turn="{name}の次の発言を書いてください。名前は付けず、発言だけを書いてください。",
        next_text="{name}が書く文章を書いてください。説明は付けず、本文だけを書いてください。",
        somebody="この人",
        colon="：",
    ),
}


@dataclass(frozen=True, slots=True)
class Draft:
    """A prompt as texts: what it begins with for all items of a user, and what is the item's own."""

    instructions: str
    request: str
    answer_prefix: str  # the answer goes on from here; may be empty
    cue: str  # what a model without a chat template is to continue, such as "Anna:"


def num_turns(ablation: Ablation, item: Item, history: Sequence[Item]) -> int:
    """Turns that `draft` may leave out: all of the history, and all of the context but its last."""
    count = sum(len(turns_of(entry)) for entry in history) if ablation.history else 0
    return count + (max(0, len(item.turns) - 1) if ablation.context else 0)


def turns_of(item: Item) -> tuple[Turn, ...]:
    """An item that is over: its context, and what the person did."""
    if item.continuation is None:
        return item.turns
    said = f"{item.continuation_prefix}{item.continuation}".strip()
    return (*item.turns, Turn(item.person.name or "", said, item.timestamp))


def draft(
    dataset: Dataset, ablation: Ablation, item: Item, history: Sequence[Item], num_dropped: int = 0
) -> Draft:
    """The prompt of an item, without its `num_dropped` oldest turns (see `num_turns`)."""
    frame = FRAMES[dataset.language]
    name = item.person.name or frame.somebody

    def say(text: str) -> str:
        return text.replace("{name}", name)  # not str.format: names and tasks may hold braces

    first = [say(dataset.task)]
    if item.description:
        first.append(item.description)
    if ablation.profile:
        first += _section(say(frame.profile), profile_lines(item.person, frame))
        first += _section(say(frame.personality), personality_lines(item.person, frame))
    if ablation.history:
        lines, num_dropped = _history_lines(history, num_dropped, frame, name)
        first += _section(say(frame.history), lines)
    second = []
    if ablation.context and item.turns:
        heading = frame.conversation if dataset.is_dialogue else frame.given
        kept = item.turns[min(num_dropped, len(item.turns) - 1) :]
        second += _section(say(heading), [turn_line(turn, frame, name) for turn in kept])
    second.append(say(frame.next_turn if dataset.is_dialogue else frame.next_text))
    return Draft(
        "\n\n".join(first),
        "\n\n".join(second),
        item.continuation_prefix.rstrip(),
        f"{name}{frame.colon.rstrip()}",
    )


def _section(heading: str, lines: Sequence[str]) -> list[str]:
    """A heading with its lines, or nothing where there are none."""
    return ["\n".join([heading, *lines])] if lines else []


def _history_lines(
    history: Sequence[Item], num_dropped: int, frame: Frame, name: str
) -> tuple[list[str], int]:
    """The lines that are left, and how many turns are still to be dropped behind them."""
    lines: list[str] = []
    for number, entry in enumerate(history, 1):
        turns = turns_of(entry)
        kept = turns[num_dropped:]
        num_dropped = max(0, num_dropped - len(turns))
        if kept:
            lines.append(frame.history_item.replace("{number}", str(number)))
            lines += [turn_line(turn, frame, name) for turn in kept]
    return lines, num_dropped


def turn_line(turn: Turn, frame: Frame, name: str) -> str:
    """One turn: when, who, what. Turns of the person without a name come under `name`."""
    source = turn.source or name
    when = f"[{turn.timestamp}] " if turn.timestamp else ""
    return f"{when}{source}{frame.colon}{turn.content}"


def profile_lines(person: Person, frame: Frame) -> list[str]:
    """Every field of the profile that holds something."""
    return [f"- {name}{frame.colon}{value}" for name, value in _flat(person.profile)]


def personality_lines(person: Person, frame: Frame) -> list[str]:
    """Every trait, whatever the shape it came in, and then what is told in words."""
    lines = []
    for trait in person.traits:
        told = " — ".join(part for part in (trait.value, trait.description) if part)
        lines.append(f"- {' / '.join(trait.path)}{frame.colon}{told}")
    return [*lines, *([person.unstructured] if person.unstructured else [])]


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(name, text) of a profile's fields; those of an object inside are called outer.inner."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _flat(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        if any(isinstance(part, (dict, list)) for part in value):
            for number, part in enumerate(value, 1):
                yield from _flat(part, f"{name}.{number}")
        elif value:
            yield name, ", ".join(_scalar(part) for part in value)
    elif value is not None and value != "":
        yield name, _scalar(value)


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
