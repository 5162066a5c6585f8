"""Ids and texts equal those of transformers, and a folder is read as it is found."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as RustTokenizer

from octavo.engine.pieces import DecodeRule
from octavo.engine.tokenizer import Tokenizer, clean_up_spaces
from octavo.errors import CheckpointError, ModelError, RequestError
from tests.engine import sample_tokenizers
from tests.engine.sample_tokenizers import TEXTS, save

SAMPLES = [
    *TEXTS,
    "",
    " ",
    "  two spaces",
    "a<|begin_of_text|>b<|eot|> c <tool call>x",
    "<s>hello</s> hello",
    "\x00\x7f\u200d\n\r\n\t",
]


def load(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    return tokenizer


def transformers_of(folder: Path) -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(str(folder))


def assert_same_as_transformers(folder: Path, texts: list[str] | None = None) -> Tokenizer:
    ours, theirs = load(folder), transformers_of(folder)
    for text in texts or SAMPLES:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            assert ours.decode(ids, special) == theirs.decode(ids, skip_special_tokens=special)
    assert ours.vocab_size == len(theirs)
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_id == theirs.eos_token_id
    added = theirs.added_tokens_decoder
    assert ours.special_ids == {i for i, token in added.items() if token.special}
    return ours


@pytest.mark.parity
class TestAgainstTransformers:
    def test_smollm2(self, smollm2_path: Path) -> None:
        ours = assert_same_as_transformers(smollm2_path)
        assert (ours.bos_token_id, ours.eos_token_id, ours.vocab_size) == (1, 2, 49152)

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.text(max_size=40))
    def test_smollm2_on_any_text(self, smollm2_path: Path, text: str) -> None:
        ours = load_once(smollm2_path)
        ids = ours.encode(text)
        spelled = b"".join(map(ours.token_bytes, ids))  # not all of the text: the vocabulary lacks some bytes
        assert ours.decode(ids, skip_special_tokens=False) == spelled.decode("utf-8", "replace")

    def test_llama3_like(self, tmp_path: Path) -> None:
        rust = sample_tokenizers.byte_level(bos="<|begin_of_text|>")
        config = {
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot|>",
            "clean_up_tokenization_spaces": True,
        }
        ours = assert_same_as_transformers(save(rust, tmp_path, config))
        assert ours.encode("x")[0] == ours.bos_token_id
        assert len(ours.encode("x", add_special_tokens=False)) == 1
        assert ours.decode(ours.encode("a , b .")) == "a , b ."  # no cleaning of byte-level texts

    def test_qwen_like(self, tmp_path: Path) -> None:
        rust = sample_tokenizers.byte_level(nfc=True, individual_digits=True)
        config = {"bos_token": None, "eos_token": "<|eot|>", "pad_token": "<|end_of_text|>"}
        ours = assert_same_as_transformers(save(rust, tmp_path, config))
        assert ours.bos_token_id is None

    def test_llama2_like(self, tmp_path: Path) -> None:
        config = {"bos_token": {"content": "<s>", "__type": "AddedToken"}, "eos_token": "</s>"}
        folder = save(sample_tokenizers.byte_fallback(), tmp_path, config)
        ours = assert_same_as_transformers(folder)
        assert ours.encode("hello")[0] == ours.bos_token_id == 1

    @pytest.mark.parametrize("insists", [False, True])
    def test_clean_up(self, tmp_path: Path, insists: bool) -> None:
        text = "hello , it 's . don 't ' x ' I 've n't ?"
        force = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
        config = {"clean_up_tokenization_spaces": True, force: insists}
        unigram = assert_same_as_transformers(save(sample_tokenizers.metaspace(), tmp_path / "u", config))
        ours = assert_same_as_transformers(
            save(sample_tokenizers.byte_level(), tmp_path / "b", config), [text, *SAMPLES]
        )
        assert (ours.decode(ours.encode(text)) == text) is not insists
        assert unigram.decode_rule.kind == "opaque"

    @pytest.mark.parametrize("asks", [True, False])
    def test_tokenizer_json_decides_about_the_begin_token(self, tmp_path: Path, asks: bool) -> None:
        config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot|>", "add_bos_token": asks}
        assert_same_as_transformers(save(sample_tokenizers.byte_level(), tmp_path / "without", config))
        with_bos = sample_tokenizers.byte_level(bos="<|begin_of_text|>")
        assert_same_as_transformers(save(with_bos, tmp_path / "with", config))

    def test_tokens_that_only_the_config_knows(self, tmp_path: Path) -> None:
        rust = sample_tokenizers.byte_level()
        size = rust.get_vocab_size()
        config = {
            "added_tokens_decoder": {
                str(size): {"content": "<|new|>", "special": True, "normalized": False},
                str(size + 1): {"content": "<plain>", "special": False, "normalized": False, "lstrip": True},
                "2": {"content": "<|start|>", "special": True, "normalized": False, "rstrip": True},
            },
            "eos_token": "<|new|>",
            "extra_special_tokens": ["<|extra|>"],
        }
        ours = assert_same_as_transformers(
            save(rust, tmp_path, config), ["a<|new|>b <plain> c<|start|>  d<|extra|>", *SAMPLES]
        )
        assert ours.eos_token_id == size

    @pytest.mark.parametrize("as_dict", [False, True])
    def test_names_in_special_tokens_map(self, tmp_path: Path, as_dict: bool) -> None:
        folder = save(sample_tokenizers.byte_level(), tmp_path)
        names: dict[str, Any] = {
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot|>",
            "pad_token": "<|pad|>",
        }
        if as_dict:
            names = {key: {"content": value, "lstrip": False} for key, value in names.items()}
        (folder / "special_tokens_map.json").write_text(json.dumps(names))
        ours = assert_same_as_transformers(folder, ["x<|pad|>y", *SAMPLES])
        assert ours.special_tokens["eos_token"] == "<|eot|>"

    def test_ids_beyond_the_vocabulary_are_no_text(self, tmp_path: Path) -> None:
        folder = save(sample_tokenizers.byte_level(), tmp_path)
        ours, theirs = load(folder), transformers_of(folder)
        ids = [*ours.encode("ab"), 10**6, *ours.encode("c")]
        assert ours.decode(ids) == theirs.decode(ids) == "abc"

    def test_folder_without_tokenizer_json(self, tmp_path: Path) -> None:
        rust = sample_tokenizers.byte_level()
        model = json.loads(rust.to_str())["model"]
        (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
        (tmp_path / "merges.txt").write_text("\n".join(" ".join(merge) for merge in model["merges"]))
        names = {"eos_token": "<|eot|>", "bos_token": "<|eot|>", "unk_token": "<|eot|>"}
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "GPT2Tokenizer", **names})
        )
        ours = assert_same_as_transformers(tmp_path, TEXTS)
        assert ours.decode_rule.kind == "bytes"

    def test_python_tokenizer(self, tmp_path: Path) -> None:
        """ByT5 has no file of its own and no Rust form."""
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
        ours, theirs = load(tmp_path), transformers_of(tmp_path)
        for text in TEXTS:
            assert ours.encode(text) == theirs.encode(text)
            assert ours.decode(ours.encode(text)) == text
        assert ours.encode_batch(TEXTS) == [theirs.encode(text) for text in TEXTS]
        assert ours.eos_token_id == theirs.eos_token_id
        assert ours.id_to_token(10**6) is None


_loaded: dict[Path, Tokenizer] = {}


def load_once(folder: Path) -> Tokenizer:
    return _loaded.setdefault(folder, load(folder)) if folder not in _loaded else _loaded[folder]


def test_encode_batch(tmp_path: Path) -> None:
    ours = load(save(sample_tokenizers.byte_level(bos="<|begin_of_text|>"), tmp_path))
    for special in (True, False):
        expected = [ours.encode(text, add_special_tokens=special) for text in SAMPLES]
        assert ours.encode_batch(SAMPLES, add_special_tokens=special) == expected


def test_truncation_and_padding_of_the_file_are_not_used(tmp_path: Path) -> None:
    rust = sample_tokenizers.byte_level()
    rust.enable_truncation(3)
    rust.enable_padding(length=8)
    ours = load(save(rust, tmp_path))
    assert ours.decode(ours.encode(TEXTS[0]), skip_special_tokens=False) == TEXTS[0]


def test_split_special_tokens(tmp_path: Path) -> None:
    ours = load(save(sample_tokenizers.byte_level(), tmp_path, {"split_special_tokens": True}))
    assert len(ours.encode("<|eot|>")) > 1


def test_token_bytes(tmp_path: Path) -> None:
    ours = load(save(sample_tokenizers.byte_level(), tmp_path / "b"))
    for text in TEXTS:
        assert b"".join(map(ours.token_bytes, ours.encode(text))) == text.encode()
    assert ours.token_bytes(2) == b"<|start|>"
    assert ours.token_bytes(10**6) == b""
    pieces = load(save(sample_tokenizers.byte_fallback(), tmp_path / "p"))
    ids = pieces.encode("hello ü", add_special_tokens=False)
    assert b"".join(map(pieces.token_bytes, ids)) == " hello ü".encode()
    assert pieces.token_bytes(3 + 0x0A) == b"\n"
    assert pieces.token_bytes(2) == b"</s>"


def test_what_is_no_text_is_a_request_error(tmp_path: Path) -> None:
    ours = load(save(sample_tokenizers.byte_level(), tmp_path))
    for bad, words in (
        (3, "not int"),
        (None, "not NoneType"),
        ("a\ud800", "character 1"),
        (b"x", "not bytes"),
    ):
        with pytest.raises(RequestError, match=words):
            ours.encode(bad)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match=words):
            ours.encode_batch(["fine", bad])  # type: ignore[list-item]
    for bad_ids in ([-1], ["x"], [2**40]):
        with pytest.raises(RequestError, match="token ids"):
            ours.decode(bad_ids)  # type: ignore[arg-type]


def test_folder_without_any_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert Tokenizer.from_folder(tmp_path) is None


def test_damaged_files(tmp_path: Path) -> None:
    folder = save(sample_tokenizers.byte_level(), tmp_path)
    whole = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer.json").write_text(whole)
    for content in ("{", "[]"):
        (folder / "tokenizer_config.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
            Tokenizer.from_folder(folder)


def test_other_tokenizer_that_cannot_be_read(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "tokenizer.model").write_bytes(b"garbage")
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


def test_other_tokenizer_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"garbage")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match="pip install"):
        Tokenizer.from_folder(tmp_path)


def test_chat_templates_of_a_folder(tmp_path: Path) -> None:
    rust = sample_tokenizers.byte_level()
    assert load(save(rust, tmp_path)).chat_template is None
    save(rust, tmp_path, {"chat_template": "one"})
    assert load(tmp_path).chat_template == "one"
    save(
        rust,
        tmp_path,
        {"chat_template": [{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}]},
    )
    assert load(tmp_path).chat_template == {"default": "a", "rag": "b"}
    (tmp_path / "chat_template.jinja").write_text("file", encoding="utf-8")
    assert load(tmp_path).chat_template == "file"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools", encoding="utf-8")
    assert load(tmp_path).chat_template == {"default": "file", "tool_use": "tools"}


def test_decode_rules() -> None:
    def rule(decoder: Any) -> DecodeRule:
        return DecodeRule.of_decoder(json.loads(decoder.__getstate__()))

    strip = decoders.Strip(" ", 1, 0)
    mark = decoders.Replace("▁", " ")
    assert rule(decoders.ByteLevel()).kind == "bytes"
    llama = rule(decoders.Sequence([mark, decoders.ByteFallback(), decoders.Fuse(), strip]))
    assert llama == DecodeRule("pieces", (("▁", " "),), True, (" ", 1))
    assert rule(decoders.Metaspace(prepend_scheme="never")).first_drops == ""
    assert rule(decoders.Metaspace()).first_drops == "▁"
    for other in (
        decoders.WordPiece(),
        decoders.Sequence([mark, strip]),  # strips each token
        decoders.Sequence([decoders.Fuse(), mark]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 1)]),
        decoders.Sequence([decoders.ByteLevel(), mark]),
        decoders.Replace(__import__("tokenizers").Regex("x+"), "y"),
    ):
        assert rule(other).kind == "opaque", other
    assert DecodeRule.of_decoder(None).kind == "opaque"


def test_no_decoder_at_all(tmp_path: Path) -> None:
    rust = RustTokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    rust.add_tokens([AddedToken("<d>")])
    ours = load(save(rust, tmp_path))
    assert ours.decode([0, 1, 3]) == "a b <d>"


def test_clean_up_spaces() -> None:
    assert clean_up_spaces("it 's , we 've do n't ! ' ok ?") == "it's, we've don't!'ok?"


def test_loading_is_fast(smollm2_path: Path) -> None:
    # processor time, because the machine may be busy
    best = float("inf")
    for _ in range(5):
        begin = time.thread_time()
        Tokenizer.from_folder(smollm2_path)
        best = min(best, time.thread_time() - begin)
    assert best < 0.25


def test_a_normal_start_imports_neither_transformers_nor_torch(smollm2_path: Path) -> None:
    program = (
        "import sys; from octavo.engine.tokenizer import Tokenizer; "
        "from octavo.engine.chat_template import ChatTemplate; import octavo.engine.detokenizer; "
        "import octavo.engine.grammar; "
        f"t = Tokenizer.from_folder({str(smollm2_path)!r}); "
        "ChatTemplate.for_tokenizer(t).render([{'role': 'user', 'content': 'hi'}]); "
        "print([name for name in ('transformers', 'torch', 'llguidance') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
