"""What a persona job is: whose items, which samples, and everything that shapes them.

A sample is named by its user, item and number, and its seed is made of these and the job's seed alone.
So a sample is the same in whatever order, company or attempt it is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from octavo.batch.checkpoint import fingerprint
from octavo.batch.persona.data import Item, Scenario, User
from octavo.batch.persona.datasets import Ablation, Dataset
from octavo.batch.work import seed_of, shaping_options
from octavo.config import EngineArgs
from octavo.sampling_params import SamplingParams

EngineName = Literal["octavo", "transformers"]

# Changed whenever other prompts are made of the same data: their samples do not belong together.
PROMPT_VERSION = 1
MAX_MODEL_LEN = 8192  # unless the user says otherwise, or the model has less


@dataclass(frozen=True)
class PersonaOptions:
    """What the user asked for. `params` has no seed: each sample brings its own."""

    checkpoint: str
    dataset: Dataset
    ablation: Ablation
    output: Path
    params: SamplingParams
    seed: int = 42
    num_samples: int = 5
    max_items: int | None = None  # the first so many only
    engine: EngineName = "octavo"
    engine_kwargs: dict[str, Any] = field(default_factory=dict)
    num_replicas: int = 1
    batch_size: int = 1  # of the transformers engine
    cleans: bool = False
    overwrite: bool = False
    retries_failed: bool = False
    quiet: bool = False


@dataclass(frozen=True, slots=True)
class Sample:
    """One text to be made."""

    user: User
    item: Item
    index: int
    seed: int

    @property
    def key(self) -> str:
        """Its name in the journal."""
        return f"{self.user.user_hash}/{self.item.index}/{self.index}"

    @property
    def group(self) -> str:
        """The same for all samples of a prompt."""
        return f"{self.user.user_hash}/{self.item.index}"


def sample_seed(seed: int, user_hash: str, item_index: int, sample_index: int) -> int:
    """What names a sample's draws: made of these four alone."""
    return seed_of("persona", seed, user_hash, item_index, sample_index)


@dataclass(frozen=True)
class Plan:
    """The items that samples are made for, user by user, and those that are left out."""

    users: list[tuple[User, list[Item]]]
    num_skipped: int  # without a context, where the ablation needs one
    num_without_history: int  # items whose user has none, where the ablation asks for it
    num_samples: int  # of an item
    seed: int

    @property
    def num_items(self) -> int:
        """Items that samples are made for."""
        return sum(len(items) for _, items in self.users)

    @property
    def total_samples(self) -> int:
        """Samples of the whole job."""
        return self.num_items * self.num_samples

    def samples_of(self, user: User, item: Item) -> list[Sample]:
        """The samples of one item, in their order."""
        return [
            Sample(user, item, index, sample_seed(self.seed, user.user_hash, item.index, index))
            for index in range(self.num_samples)
        ]

    def items(self) -> Iterator[tuple[User, Item]]:
        """All items in the job's order."""
        for user, items in self.users:
            for item in items:
                yield user, item


def make_plan(scenario: Scenario, options: PersonaOptions) -> Plan:
    """Which samples the job consists of."""
    users: list[tuple[User, list[Item]]] = []
    num_skipped = num_without_history = num_items = 0
    limit = options.max_items
    for user in scenario.users:
        kept = []
        for item in user.items:
            if limit is not None and num_items >= limit:
                break
            if options.ablation.context and not item.turns:
                num_skipped += 1
                continue
            num_without_history += options.ablation.history and not user.history
            num_items += 1
            kept.append(item)
        users.append((user, kept))
    if limit is not None:
        users = [(user, items) for user, items in users if items]
    return Plan(users, num_skipped, num_without_history, options.num_samples, options.seed)


def identity(options: PersonaOptions, scenario: Scenario, model_path: Path) -> dict[str, Any]:
    """All that shapes the samples. Two jobs may share an output folder if and only if this is equal."""
    shaping = shaping_options(EngineArgs.from_kwargs(model=options.checkpoint, **options.engine_kwargs))
    del shaping["model"]  # wherever it lies: its contents are looked at
    return {
        "kind": "persona",
        "prompt_version": PROMPT_VERSION,
        "dataset": options.dataset.name,
        "ablation_config": options.ablation.name,
        "scenario_sha256": scenario.digest,
        "checkpoint_sha256": fingerprint(model_path),
        "engine": options.engine,
        "engine_options": shaping,
        # Rows of a static batch are padded to its longest: another size gives other roundings.
        "batch_size": options.batch_size if options.engine == "transformers" else None,
        "num_samples": options.num_samples,
        "max_items": options.max_items,
        "seed": options.seed,
        "sampling_params": sampling_record(options.params),
    }


def sampling_record(params: SamplingParams) -> dict[str, Any]:
    """The sampling parameters as they are used, under their own names."""
    return {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "max_tokens": params.max_tokens,
        "ignore_eos": params.ignore_eos,
    }
