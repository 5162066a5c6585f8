"""What is asked for is in the prompt, whole, and nothing else is; what is too long loses whole turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from octavo.batch.persona.data import Item, Scenario, User, read_scenario
from octavo.batch.persona.datasets import ABLATIONS, DATASETS, Ablation, Dataset
from octavo.batch.persona.fitting import PromptMaker
from octavo.batch.persona.prompts import FRAMES, draft, num_turns
from octavo.engine.chat_template import ChatTemplate
from octavo.engine.tokenizer import Tokenizer
from octavo.errors import RequestError
from tests.batch.persona.records import entry, record, scenario, turns
from tests.checkpoints import CHAT_TEMPLATE, write_tokenizer

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "persona"
EXAMPLE_NAMES = ("Chameleons", "DMSC", "RealPersonaChat")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    found = Tokenizer.from_folder(folder)
    assert found is not None
    return found


def maker(
    tokenizer: Tokenizer,
    ablation: Ablation,
    dataset: Dataset = DATASETS["REALTALK"],
    template: str | None = CHAT_TEMPLATE,
    max_tokens: int = 100_000,
) -> PromptMaker:
    return PromptMaker(dataset, ablation, tokenizer, ChatTemplate(template), max_tokens)


def example(name: str) -> Scenario:
    return read_scenario(EXAMPLES / name)


def shown_of_profile(user: User, colon: str) -> list[str]:
    """What is in a prompt only through the profile; the name alone is everywhere."""
    fields = user.person.profile.items()
    texts = [f"{key}{colon}{', '.join(value) if isinstance(value, list) else value}" for key, value in fields]
    texts += [f"{trait.path[-1]}{colon}{trait.value}" for trait in user.person.traits]
    texts += [trait.description for trait in user.person.traits if trait.description]
    return texts + user.person.unstructured.split("\n")


def words_of(item: Item) -> list[str]:
    return [turn.content for turn in item.turns]


@pytest.mark.parametrize("name", EXAMPLE_NAMES)
@pytest.mark.parametrize("ablation", ABLATIONS.values(), ids=ABLATIONS)
def test_what_is_asked_for_is_there_and_nothing_else(
    name: str, ablation: Ablation, tokenizer: Tokenizer
) -> None:
    dataset = DATASETS[name]
    made = maker(tokenizer, ablation, dataset)
    frame = FRAMES[dataset.language]
    for user in example(name).users:
        for item in user.items:
            text = made.text(item, user.history)
            instructions = dataset.task.replace("{name}", str(user.person.name))
            assert instructions in text
            rest = text.replace(instructions, "").replace(item.description, "")
            for shown in shown_of_profile(user, frame.colon):
                assert (shown in rest) == ablation.profile, shown
            past = [entry.continuation for entry in user.history]
            past += [turn for entry in user.history for turn in words_of(entry)]
            for said in past:
                assert said is not None
                if said not in words_of(item):
                    assert (said in rest) == ablation.history, said
            for said in words_of(item):
                assert (said in rest) == ablation.context, said
            # What the person really said is what the model is asked for: it is never shown.
            if item.continuation is not None:
                assert item.continuation not in text
            assert (frame.history.replace("{name}", str(user.person.name)) in rest) == ablation.history
            assert (frame.personality.replace("{name}", str(user.person.name)) in rest) == ablation.profile


def test_every_example_has_something_of_everything_to_show() -> None:
    """Otherwise the test above would prove nothing."""
    for name in EXAMPLE_NAMES:
        users = example(name).users
        assert all(len(shown_of_profile(user, ": ")) > 5 and user.history for user in users)
        assert all(any(item.turns and item.continuation for item in user.items) for user in users)


def test_history_comes_newest_last_and_before_the_context(tokenizer: Tokenizer, tmp_path: Path) -> None:
    train = [record([entry([], "newer", timestamp="2024"), entry([], "older", timestamp="2023")])]
    user = scenario(tmp_path, [record([entry(turns(("Ben", "now")))])], train).users[0]
    text = maker(tokenizer, ABLATIONS["history_and_context"]).text(user.items[0], user.history)
    assert text.index("older") < text.index("newer") < text.index("Ben: now")


def test_items_of_a_user_begin_alike(tokenizer: Tokenizer) -> None:
    """So that the KV of profile and history is computed once."""
    user = example("Chameleons").users[0]
    made = maker(tokenizer, ABLATIONS["profile_and_history_and_context"])
    texts = [made.text(item, user.history) for item in user.items[:2]]
    shared = next(at for at in range(len(texts[0])) if texts[0][at] != texts[1][at])
    assert user.history[-1].continuation is not None
    assert user.history[-1].continuation in texts[0][:shared]


def test_the_profile_is_written_out_whatever_its_shape(tokenizer: Tokenizer, tmp_path: Path) -> None:
    profile: dict[str, Any] = {
        "name": "Anna {x}",
        "job": {"title": "nurse", "years": 3},
        "likes": ["tea", "rain"],
        "pets": [{"kind": "cat"}],
        "married": False,
        "nothing": None,
    }
    user = scenario(tmp_path, [record([entry(turns(("Ben", "hi")))], profile=profile)]).users[0]
    text = maker(tokenizer, ABLATIONS["profile_only"]).text(user.items[0], [])
    for line in ("job.title: nurse", "job.years: 3", "likes: tea, rain", "pets.1.kind: cat", "married: no"):
        assert f"- {line}" in text.replace("<", "\n").split("\n")
    assert "nothing" not in text
    assert "Anna {x}" in text


def test_without_a_name_the_language_has_a_word(tokenizer: Tokenizer, tmp_path: Path) -> None:
    user = scenario(tmp_path, [record([entry(turns(("", "mine")))], profile={"age": 3})]).users[0]
    text = maker(tokenizer, ABLATIONS["context_only"], DATASETS["DMSC"]).text(user.items[0], [])
    assert "这个人：mine" in text
    assert "{name}" not in text


def test_the_answer_goes_on_from_its_prefix(tokenizer: Tokenizer, tmp_path: Path) -> None:
    item = entry(turns(("Ben", "hi")), continuation_prefix="Rating: ")
    user = scenario(tmp_path, [record([item])]).users[0]
    ablation = ABLATIONS["context_only"]
    with_template = maker(tokenizer, ablation).text(user.items[0], [])
    assert with_template.endswith("<|im_start|>assistant\nRating:")
    without = maker(tokenizer, ablation, template=None).text(user.items[0], [])
    assert without.endswith("\n\nAnna: Rating:")


def test_the_chat_template_is_used_where_there_is_one(tokenizer: Tokenizer, tmp_path: Path) -> None:
    user = scenario(tmp_path, [record([entry(turns(("Ben", "hi")))])]).users[0]
    ablation = ABLATIONS["context_only"]
    made = maker(tokenizer, ablation)
    assert made.uses_chat_template
    assert made.text(user.items[0], []).startswith("<|im_start|>system\nYou are Anna")
    plain = maker(tokenizer, ablation, template=None)
    assert not plain.uses_chat_template
    assert plain.text(user.items[0], []).startswith("You are Anna")
    assert plain.text(user.items[0], []).endswith("\n\nAnna:")


REFUSES_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
DROPS_SYSTEM = "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    "template", [REFUSES_SYSTEM + "<u>{{ messages[0]['content'] }}", DROPS_SYSTEM], ids=["refuses", "drops"]
)
def test_a_template_without_a_system_role_loses_nothing(
    template: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    user = scenario(tmp_path, [record([entry(turns(("Ben", "hi")))])]).users[0]
    text = maker(tokenizer, ABLATIONS["context_only"], template=template).text(user.items[0], [])
    assert text.startswith("<u>You are Anna")
    assert "Ben: hi" in text


def long_user(tmp_path: Path) -> User:
    context = turns(*((("Ben", "Anna")[n % 2], f"context {n:02}.") for n in range(12)))
    train = [record([entry(turns(("Ben", f"asked {n:02}.")), f"past {n:02}.")]) for n in range(6)]
    return scenario(tmp_path, [record([entry(context)])], train).users[0]


def kept(text: str) -> list[str]:
    """The turns in a text, by their contents."""
    words = [f"{what} {n:02}." for what in ("asked", "past", "context") for n in range(12)]
    return [word for word in words if word in text]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, None], ids=["chat", "plain"])
def test_too_long_a_prompt_loses_the_oldest_whole_turns(
    template: str | None, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    user = long_user(tmp_path)
    item = user.items[0]
    ablation = ABLATIONS["history_and_context"]
    unlimited = maker(tokenizer, ablation, template=template)
    whole = len(unlimited.make(item, user.history).token_ids)
    assert num_turns(ablation, item, user.history) == 12 + 11
    order = [f"{what} {n:02}." for n in range(6) for what in ("asked", "past")]
    order += [f"context {n:02}." for n in range(12)]
    least = len(tokenizer.encode(unlimited.text(item, [], 11), add_special_tokens=template is None))
    seen = set()
    for limit in range(whole, least - 1, -7):
        prompt = maker(tokenizer, ablation, template=template, max_tokens=limit).make(item, user.history)
        assert len(prompt.token_ids) <= limit
        text = unlimited.text(item, user.history, prompt.num_dropped)
        assert tokenizer.decode(prompt.token_ids, skip_special_tokens=False) == text
        # In the order in which they are dropped: what is left is the end of it, in whole turns.
        assert sorted(kept(text)) == sorted(order[prompt.num_dropped :])
        if prompt.num_dropped:  # and no turn more than needed
            fuller = unlimited.text(item, user.history, prompt.num_dropped - 1)
            assert len(tokenizer.encode(fuller, add_special_tokens=template is None)) > limit
        seen.add(prompt.num_dropped)
    assert len(seen) > 10
    with pytest.raises(RequestError, match="raise --max-model-len or lower --max-tokens"):
        maker(tokenizer, ablation, template=template, max_tokens=least - 1).make(item, user.history)


def test_only_what_the_ablation_shows_is_cut(tokenizer: Tokenizer, tmp_path: Path) -> None:
    user = long_user(tmp_path)
    texts = draft(DATASETS["REALTALK"], ABLATIONS["context_only"], user.items[0], user.history, 3)
    assert sorted(kept(texts.request)) == [f"context {n:02}." for n in range(3, 12)]
    assert kept(texts.instructions) == []
