"""Which prompts a run sends: the bundled set, a data set's file, or token ids of given lengths.

Every engine gets the same list in the same order, and one seed decides it: which prompts of a source are
taken, how they are mixed, and what a synthetic prompt holds. Length limits drop prompts, and lines that
cannot be read are skipped; both are counted and said, because a run over fewer prompts than were asked for
is another run.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Protocol, overload

from octavo.errors import ConfigError

BUNDLED_KINDS = ("chat", "code_edit", "summary", "extraction", "long_context")
FORMS = (
    'bundled, bundled:chat,code_edit …, a .json/.jsonl/.txt file, a folder of them, synthetic:512, '
    "synthetic:128-1024, shared_prefix:256+64, or shared_prefix:256+64*4"
)  # fmt: skip
DEFAULT_SYNTHETIC = 32  # prompts, where no number is asked for


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt; exactly one of `messages` (through the chat template), `text` and `token_ids` is set.

    `prompt_id` is the same in every run over the same source, so that answers can be compared.
    `max_tokens` None means the run's limit.
    """

    prompt_id: str
    kind: str = ""
    language: str = ""
    messages: tuple[dict[str, str], ...] | None = None
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    max_tokens: int | None = None

    @property
    def content(self) -> str:
        """All text of the prompt, without the template; empty for token ids."""
        if self.messages is not None:
            return "\n".join(message["content"] for message in self.messages)
        return self.text or ""


@dataclass(frozen=True)
class PromptSet(Sequence[Prompt]):
    """The prompts of a run, and what became of the others.

    `counts` has read, malformed, empty (nothing to answer), too_short, too_long and used; `problems` says of
    the first malformed lines what is wrong; `length_unit` is what the limits counted.
    """

    prompts: tuple[Prompt, ...]
    source: str
    counts: dict[str, int] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    length_unit: str = "tokens"

    @overload
    def __getitem__(self, index: int) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Prompt, ...]: ...

    def __getitem__(self, index: int | slice) -> Prompt | tuple[Prompt, ...]:
        return self.prompts[index]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def digest(self) -> str:
        """SHA-256 of all prompts in order: equal digests are equal work."""
        parts = [[p.prompt_id, p.messages, p.text, p.token_ids, p.max_tokens] for p in self.prompts]
        return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()

    @property
    def warnings(self) -> list[str]:
        """What the reader of a result must know about this list."""
        found = []
        malformed = self.counts.get("malformed", 0)
        if malformed:
            found.append(
                f"{malformed} of {self.counts['read']} lines of {self.source} could not be read and were "
                f"left out: {'; '.join(self.problems)}" + (" …" if malformed > len(self.problems) else "")
            )
        if self.counts.get("empty"):
            found.append(f"{self.counts['empty']} records of {self.source} hold no prompt")
        dropped = self.counts.get("too_short", 0) + self.counts.get("too_long", 0)
        if dropped:
            found.append(
                f"the length limits (in {self.length_unit}) dropped {self.counts.get('too_short', 0)} "
                f"short and {self.counts.get('too_long', 0)} long prompts"
            )
        return found

    def record(self) -> dict[str, Any]:
        """For the result file."""
        kinds = Counter(prompt.kind for prompt in self.prompts)
        languages = Counter(prompt.language or "unknown" for prompt in self.prompts)
        return {
            "source": self.source, "digest": self.digest, "counts": dict(self.counts),
            "length_unit": self.length_unit, "kinds": dict(kinds), "languages": dict(languages),
            "problems": list(self.problems),
        }  # fmt: skip


class TokenizerLike(Protocol):
    """What is needed of a tokenizer: lengths of texts, and ordinary ids for synthetic prompts."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


@dataclass(frozen=True)
class PromptSource:
    """Where prompts come from, as flags or environment variables say it.

    Length limits count tokens of the prompt's text without the chat template where a tokenizer is known,
    otherwise characters. `max_lines` bounds how much of a file is read. `input_length` up to
    `input_length_max` are the lengths of synthetic prompts (behind the prefix for shared_prefix), and
    `prefix_groups` is how many different prefixes there are.
    """

    kind: str = "bundled"  # bundled | sharegpt | jsonl | synthetic | shared_prefix
    path: str | None = None
    min_length: int | None = None
    max_length: int | None = None
    max_lines: int | None = None
    input_length: int = 512
    input_length_max: int | None = None
    prefix_length: int = 256
    prefix_groups: int = 1
    categories: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The source as a person would name it."""
        if self.kind == "bundled":
            return "the bundled set" + (f" ({', '.join(self.categories)})" if self.categories else "")
        if self.kind in ("synthetic", "shared_prefix"):
            spread = f"–{self.input_length_max}" if self.input_length_max else ""
            if self.kind == "synthetic":
                return f"synthetic prompts of {self.input_length}{spread} tokens"
            return (
                f"synthetic prompts of {self.prefix_length} shared + {self.input_length}{spread} own tokens "
                f"({self.prefix_groups} prefix{'es' if self.prefix_groups > 1 else ''})"
            )
        return str(self.path)

    def check(self) -> None:
        """Raise ConfigError for what cannot work; reads no more than the names of files."""
        for name in ("min_length", "max_length", "max_lines", "input_length_max"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        if min(self.input_length, self.prefix_length, self.prefix_groups) < 1:
            raise ConfigError("the lengths of synthetic prompts and their number of prefixes start at 1")
        if self.min_length and self.max_length and self.min_length > self.max_length:
            raise ConfigError(
                f"no prompt can be at least {self.min_length} and at most {self.max_length} long: "
                "change PROMPT_MIN_LENGTH or PROMPT_MAX_LENGTH"
            )
        if self.input_length_max is not None and self.input_length_max < self.input_length:
            raise ConfigError(
                f"a range of lengths goes upwards, not {self.input_length}-{self.input_length_max}"
            )
        if self.kind == "bundled":
            _check_categories(self.categories)
        elif self.kind in ("sharegpt", "jsonl"):
            from octavo.bench.prompt_files import files_of

            files_of(self.path)
        elif self.kind not in ("synthetic", "shared_prefix"):
            raise ConfigError(f"there is no prompt source {self.kind!r}; there are {FORMS}")


def _check_categories(categories: Sequence[str]) -> None:
    for name in categories:
        if name not in BUNDLED_KINDS:
            near = difflib.get_close_matches(name, BUNDLED_KINDS, n=1)
            raise ConfigError(
                f"the bundled prompts have no kind {name!r}"
                + (f"; did you mean {near[0]}?" if near else "")
                + f" There are {', '.join(BUNDLED_KINDS)}."
            )


def parse_source(text: str) -> PromptSource:
    """What `--prompts VALUE` or PROMPTS means; see FORMS. Raises ConfigError for anything else."""
    word, _, rest = text.strip().partition(":")
    kind = word.replace("-", "_")
    if kind == "bundled":
        names = tuple(name.strip().replace("-", "_") for name in rest.split(",") if name.strip())
        source = PromptSource(categories=names)
    elif kind in ("synthetic", "shared_prefix"):
        source = _parse_lengths(kind, rest)
    elif not text.strip():
        raise ConfigError(f"no prompts: give one of {FORMS}")
    else:
        path = Path(text.strip()).expanduser()
        if not path.exists() and not re.search(r"[/\\.]", text):
            near = difflib.get_close_matches(kind, ["bundled", "synthetic", "shared_prefix"], n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{text!r} is neither a file nor a prompt source.{hint} There are {FORMS}.")
        is_plain = path.is_file() and path.suffix in (".jsonl", ".txt")
        source = PromptSource(kind="jsonl" if is_plain else "sharegpt", path=str(path))
    source.check()
    return source


def _parse_lengths(kind: str, rest: str) -> PromptSource:
    prefix = r"(?:(?P<prefix>\d+)\+)?" if kind == "shared_prefix" else ""
    groups = r"(?:\*(?P<groups>\d+))?" if kind == "shared_prefix" else ""
    match = re.fullmatch(rf"{prefix}(?P<low>\d+)(?:-(?P<high>\d+))?{groups}", rest.strip()) if rest else None
    if rest and match is None:
        example = "synthetic:512 or synthetic:128-1024"
        if kind == "shared_prefix":
            example = "shared_prefix:256+64 or shared_prefix:256+64*4 (four prefixes)"
        raise ConfigError(f"{kind}:{rest} is not understood; write {example}")
    given = {key: int(value) for key, value in match.groupdict().items() if value} if match else {}
    plain = PromptSource(kind=kind, input_length=64 if kind == "shared_prefix" else 512)
    return replace(
        plain,
        input_length=given.get("low", plain.input_length),
        input_length_max=given.get("high"),
        prefix_length=given.get("prefix", plain.prefix_length),
        prefix_groups=given.get("groups", 1),
    )


def load_prompts(
    source: PromptSource, *, count: int | None, seed: int, tokenizer: TokenizerLike | None = None
) -> PromptSet:
    """The prompts of a run: `count` of them (None: all there are), chosen and mixed by `seed`.

    Kinds take turns, so that a short list has something of each. A source with fewer prompts than `count`
    starts again, with ids like "chat-en-03#2". Synthetic prompts need a tokenizer. Raises ConfigError where
    nothing is left to send.
    """
    source.check()
    if count is not None and count < 1:
        raise ConfigError(f"the number of prompts must be at least 1, not {count}")
    if source.kind in ("synthetic", "shared_prefix"):
        prompts = _synthetic(source, count or DEFAULT_SYNTHETIC, seed, tokenizer)
        return PromptSet(prompts, source.label, {"read": len(prompts), "used": len(prompts)})
    counts: Counter[str] = Counter(read=0, malformed=0, empty=0, too_short=0, too_long=0)
    problems: tuple[str, ...] = ()
    if source.kind == "bundled":
        found = [p for p in bundled_prompts() if not source.categories or p.kind in source.categories]
        counts["read"] = len(found)
    else:
        from octavo.bench.prompt_files import read_files

        found, counts, problems = read_files(source.path, source.max_lines)
    unit = "characters" if tokenizer is None else "tokens"
    kept = list(_within(found, source, _length(tokenizer), counts))
    if not kept:
        said = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in counts.items())
        first = f"; the first: {problems[0]}" if problems else ""
        raise ConfigError(
            f"no prompts are left of {source.label} ({said}{first}). "
            "Give another file, or wider length limits"
        )
    mixed = _mixed(kept, seed)
    prompts = tuple(_repeated(mixed, len(mixed) if count is None else count))
    counts["used"] = len(prompts)
    return PromptSet(prompts, source.label, dict(counts), problems, unit)


@cache
def bundled_prompts() -> tuple[Prompt, ...]:
    """Every prompt of the package's own set, in the order of its files."""
    return tuple(
        Prompt(row["id"], row["kind"], row["language"], messages=tuple(row["messages"]))
        for row in _bundled_rows()
    )


def copy_heavy_ids() -> frozenset[str]:
    """Ids of the bundled prompts whose answers repeat much of the prompt."""
    return frozenset(row["id"] for row in _bundled_rows() if row["copy_heavy"])


def _bundled_rows() -> Iterator[dict[str, Any]]:
    folder = resources.files("octavo.bench") / "data"
    for kind in BUNDLED_KINDS:
        for line in (folder / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines():
            yield json.loads(line)


# ---------------------------------------------------------------------- inside


def _length(tokenizer: TokenizerLike | None) -> Callable[[Prompt], int]:
    def length(prompt: Prompt) -> int:
        if prompt.token_ids is not None:
            return len(prompt.token_ids)
        if tokenizer is None:
            return len(prompt.content)
        return len(tokenizer.encode(prompt.content, add_special_tokens=False))

    return length


def _within(
    prompts: Sequence[Prompt], source: PromptSource, length: Callable[[Prompt], int], counts: Counter[str]
) -> Iterator[Prompt]:
    """Those within the length limits; the others are counted."""
    for prompt in prompts:
        if source.min_length is not None or source.max_length is not None:
            size = length(prompt)
            if source.min_length is not None and size < source.min_length:
                counts["too_short"] += 1
                continue
            if source.max_length is not None and size > source.max_length:
                counts["too_long"] += 1
                continue
        yield prompt


def _mixed(prompts: Sequence[Prompt], seed: int) -> list[Prompt]:
    """Shuffled within each kind and language; then one of each in turn."""
    piles: dict[tuple[str, str], list[Prompt]] = {}
    for prompt in prompts:
        piles.setdefault((prompt.kind, prompt.language), []).append(prompt)
    names = sorted(piles)
    draw = random.Random(seed)
    draw.shuffle(names)
    for name in names:
        draw.shuffle(piles[name])
    mixed: list[Prompt] = []
    for turn in range(max(map(len, piles.values()))):
        mixed += [piles[name][turn] for name in names if turn < len(piles[name])]
    return mixed


def _repeated(prompts: Sequence[Prompt], count: int) -> Iterator[Prompt]:
    for index in range(count):
        prompt, again = prompts[index % len(prompts)], index // len(prompts)
        yield replace(prompt, prompt_id=f"{prompt.prompt_id}#{again + 1}") if again else prompt


def _synthetic(
    source: PromptSource, count: int, seed: int, tokenizer: TokenizerLike | None
) -> tuple[Prompt, ...]:
    """Token ids drawn from those that ordinary text is made of: no special token ends a prompt early."""
    if tokenizer is None:
        raise ConfigError(
            f"{source.kind} prompts are token ids, so the model's tokenizer is needed and was not found: "
            "give --tokenizer, or other prompts"
        )
    text = "\n".join(prompt.content for prompt in bundled_prompts())
    ordinary = sorted(set(tokenizer.encode(text, add_special_tokens=False)))

    def draw(name: str, length: int) -> tuple[int, ...]:
        return tuple(random.Random(f"{seed}/{name}").choices(ordinary, k=length))

    shared = [
        draw(f"prefix-{group}", source.prefix_length) if source.kind == "shared_prefix" else ()
        for group in range(source.prefix_groups)
    ]
    lengths = random.Random(f"{seed}/lengths")
    prompts = []
    for index in range(count):
        length = lengths.randint(source.input_length, source.input_length_max or source.input_length)
        own = draw(f"prompt-{index}", length)
        name = f"{source.kind}-{index:04d}"
        prompts.append(Prompt(name, source.kind, token_ids=shared[index % len(shared)] + own))
    return tuple(prompts)
