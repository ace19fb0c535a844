"""Streamed text: decoding token by token, and ending at a stop string."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sage.llm.workers.text import StopStrings, TextDecoder, TokenBytes

CORPUS = ["Once upon a time there was a cat.", "Es war einmal eine Katze.", "def f(x):\n    return x"]
SCRIPTS = [
    "ACGTACGTTTGACCA" * 4,
    "カタカナと漢字とひらがな",
    "ไทยไม่มีช่องว่าง",
    "aGVsbG8gd29ybGQ=",
    "🧑‍🚀🚀 done",
    "a\n\n  b\n c \n",
    " begins with a blank",
    "…“quoted”…",
]


def byte_level() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer, as in GPT-2: an emoji is several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def metaspace() -> PreTrainedTokenizerFast:
    """A tokenizer as in Llama 2: tokens contain spaces, decoding drops the first space, unknown characters become bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special)
    tokenizer.train_from_iterator([text.replace("\n", " ") for text in CORPUS], trainer)
    spec = tokenizer.to_str().replace('"special":true', '"special":false')
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(spec), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


TOKENIZERS = {"byte-level": byte_level(), "metaspace": metaspace()}
both = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def streamed(tokenizer: Any, ids: list[int], context: list[int] | None = None) -> list[str]:
    decoder = TextDecoder(tokenizer, context)
    return [*map(decoder.push, ids), decoder.flush()]


@both
@pytest.mark.parametrize("text", SCRIPTS)
def test_streamed_text_equals_the_decoded_answer_in_every_script(tokenizer: Any, text: str) -> None:
    ids = encode(tokenizer, text)
    assert "".join(streamed(tokenizer, ids)) == decode(tokenizer, ids) == text


@both
@settings(deadline=None, derandomize=True)
@given(text=st.text(max_size=40))
def test_streamed_text_equals_the_decoded_answer_for_any_text(tokenizer: Any, text: str) -> None:
    ids = encode(tokenizer, text)
    assert "".join(streamed(tokenizer, ids)) == decode(tokenizer, ids)


@settings(deadline=None, derandomize=True)
@given(ids=st.lists(st.integers(0, len(TOKENIZERS["byte-level"]) - 1), max_size=60))
def test_streamed_text_equals_the_decoded_answer_for_any_tokens(ids: list[int]) -> None:
    tokenizer = TOKENIZERS["byte-level"]
    assert "".join(streamed(tokenizer, ids)) == decode(tokenizer, ids)


@both
def test_text_without_spaces_is_streamed_token_by_token(tokenizer: Any) -> None:
    for text in ("ACGTACGTTTGACCA", "!!!!!!!!"):
        ids = encode(tokenizer, text)
        pieces = streamed(tokenizer, ids)
        assert all(pieces[1:-1]), pieces
        assert not pieces[-1]


@both
def test_a_character_of_several_tokens_is_streamed_with_its_last_token(tokenizer: Any) -> None:
    pieces = streamed(tokenizer, encode(tokenizer, "x🚀y"))
    assert [piece for piece in pieces if piece] == ["x", "🚀", "y"]


@both
def test_an_answer_that_continues_its_prompt_keeps_its_first_space(tokenizer: Any) -> None:
    ids = encode(tokenizer, "Once upon a time")
    for cut in range(1, len(ids)):
        answer = "".join(streamed(tokenizer, ids[cut:], context=ids[:cut]))
        assert decode(tokenizer, ids[:cut]) + answer == "Once upon a time"


@both
def test_special_tokens_are_not_text_and_remove_no_space(tokenizer: Any) -> None:
    upon = encode(tokenizer, "Once upon")
    end = [tokenizer.eos_token_id]
    assert "".join(streamed(tokenizer, [*upon[:-1], *end, *upon[-1:]])) == "Once upon"


@both
def test_the_bytes_of_tokens_are_the_bytes_of_the_text(tokenizer: Any) -> None:
    token_bytes = TokenBytes(tokenizer)
    for text in SCRIPTS:
        spelled = b"".join(map(token_bytes.of, encode(tokenizer, text)))
        assert spelled.decode() in (text, f" {text}")


@pytest.mark.parametrize(
    ("pieces", "stops", "text"),
    [
        (["ab", "cd"], (), "abcd"),
        (["ab", "cd"], ("bc",), "a"),
        (["a", "b", "c"], ("abc",), ""),
        (["a", "b", "x"], ("abc",), "abx"),
        (["one two", " three"], ("three", "two"), "one "),
        (["aab"], ("ab", "aab"), ""),
    ],
)
def test_a_text_ends_before_its_stop_string_for_any_split(pieces: list[str], stops: tuple[str, ...], text: str) -> None:
    ending = StopStrings(stops)
    assert "".join([*map(ending.push, pieces), ending.flush()]) == text


def test_only_a_possible_beginning_of_a_stop_string_is_held_back() -> None:
    ending = StopStrings(("\n\nHuman",))
    assert [ending.push(piece) for piece in ("Hello", " you\n", "and", "\n\nHu", "ng")] == [
        "Hello", " you", "\nand", "", "\n\nHung",
    ]  # fmt: skip
