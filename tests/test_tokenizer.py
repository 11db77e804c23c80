"""tokenizer.py: text to ids and back for gpt2, byte and char."""

import re

import numpy as np
import pytest
import tiktoken
from conftest import decode

from common.errors import UserError
from common.files import write_json
from common.tokenizer import (
    CharTokenizer,
    byte_tokenizer,
    encode,
    get_tokenizer,
    read_meta,
    token_bytes,
)

TEXTS = {
    "ascii": "Hello, world! It's 2024.\n\n\tdef f(x):\r\n    return x\n",
    "utf-8": "naïve Straße Ελληνικά русский 日本語 العربية",
    "emoji": "👍🏽 👩‍👩‍👧‍👦 🇨🇭 e\u0301",
    "controls": "\x00\x1c\x7f\x85\u00a0\u200b\ufeff\u2028",
    "empty": "",
    "the letters of <|endoftext|>": "before<|endoftext|>after <|endoftext|>",
    "long": "a" * 1000 + " " * 1000,
}
ALL_CHARACTERS = sorted(set("".join(TEXTS.values())))
TOKENIZERS = ["gpt2", "byte", "char"]


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    if request.param == "gpt2":
        return request.getfixturevalue("gpt2_tokenizer")
    return (
        byte_tokenizer()
        if request.param == "byte"
        else CharTokenizer([*ALL_CHARACTERS, "<|endoftext|>"])
    )


@pytest.fixture(params=TEXTS.values(), ids=TEXTS.keys())
def text(request):
    return request.param


def meta_file(folder, content):
    (folder / "meta.json").write_text(content, encoding="utf-8")
    return folder


def test_text_survives_the_round_trip(tokenizer, text):
    assert decode(tokenizer, encode(tokenizer, text)) == text


def test_ids_are_a_vector_of_uint32(tokenizer, text):
    ids = encode(tokenizer, text)
    assert ids.ndim == 1 and ids.dtype == np.uint32


def test_ids_are_below_n_vocab(tokenizer, text):
    assert all(id < tokenizer.n_vocab for id in encode(tokenizer, text))


def test_no_text_encodes_to_the_end_of_text_token(tokenizer, text):
    assert tokenizer.eot_token not in encode(tokenizer, text)


def test_token_bytes_add_up_to_the_utf8_length(tokenizer, text):
    assert token_bytes(tokenizer)[encode(tokenizer, text)].sum() == len(text.encode("utf-8"))


def test_token_bytes_has_one_length_per_id(tokenizer):
    assert token_bytes(tokenizer).shape == (tokenizer.n_vocab,)


def test_the_end_of_text_token_has_no_bytes_of_text(tokenizer):
    assert token_bytes(tokenizer)[tokenizer.eot_token] == 0


def test_the_end_of_text_token_reads_as_its_name(tokenizer):
    assert decode(tokenizer, [tokenizer.eot_token]) == "<|endoftext|>"


@pytest.mark.parametrize("lone", ["a\ud83db", "\udc4d", "a\ud800"])
@pytest.mark.parametrize("name", ["gpt2_tokenizer", "byte"])
def test_half_a_surrogate_pair_becomes_the_replacement_character(request, name, lone):
    tokenizer = byte_tokenizer() if name == "byte" else request.getfixturevalue(name)
    expected = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in lone)
    assert decode(tokenizer, encode(tokenizer, lone)) == expected


def test_a_pair_of_surrogates_is_the_character_that_it_stands_for():
    assert decode(byte_tokenizer(), encode(byte_tokenizer(), "\ud83d\udc4d")) == "👍"


def test_half_a_surrogate_pair_is_unknown_to_char():
    with pytest.raises(UserError, match="�"):
        encode(CharTokenizer("ab"), "a\ud800")


def test_bytes_that_are_not_utf8_decode_to_the_replacement_character():
    assert decode(byte_tokenizer(), [ord("a"), 0xFF]) == "a\ufffd"


def test_gpt2_ids_are_tiktokens(gpt2_tokenizer, text):
    assert encode(gpt2_tokenizer, text).tolist() == tiktoken.get_encoding("gpt2").encode_ordinary(
        text
    )


def test_gpt2_ids_are_the_published_ones(gpt2_tokenizer):
    assert encode(gpt2_tokenizer, "Hello world").tolist() == [15496, 995]


def test_byte_ids_are_the_utf8_bytes(text):
    assert encode(byte_tokenizer(), text).tolist() == list(text.encode("utf-8"))


def test_char_ids_are_places_in_the_list(text):
    assert encode(CharTokenizer(ALL_CHARACTERS), text).tolist() == [
        ALL_CHARACTERS.index(c) for c in text
    ]


def test_char_takes_its_characters_in_any_order():
    assert encode(CharTokenizer("bca"), "abc").tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    "unknown", ["0", "z", "👍", "\n"]
)  # below, above and between the known ones
def test_char_names_the_character_that_it_does_not_know(unknown):
    with pytest.raises(UserError) as refused:
        encode(CharTokenizer("aX"), f"aX{unknown}Q")
    assert repr(unknown) in str(refused.value) and "\n" not in str(refused.value)


def test_char_without_end_of_text_has_no_such_token():
    assert CharTokenizer("ab").eot_token is None


@pytest.mark.parametrize(("name", "size"), [("gpt2", 50257), ("byte", 257)])
def test_vocabulary_sizes(request, name, size):
    tokenizer = (
        request.getfixturevalue("gpt2_tokenizer")
        if name == "gpt2"
        else get_tokenizer({"tokenizer": name})
    )
    assert tokenizer.n_vocab == size


def test_char_is_found_again_from_its_meta():
    assert encode(get_tokenizer({"tokenizer": "char", "chars": ["b", "a"]}), "ab").tolist() == [
        1,
        0,
    ]


@pytest.mark.parametrize("meta", [{"tokenizer": "char"}, {"tokenizer": "char", "chars": []}])
def test_char_without_its_characters_is_refused(meta):
    with pytest.raises(UserError, match="chars"):
        get_tokenizer(meta)


@pytest.mark.parametrize("meta", [{}, {"tokenizer": "llama"}])
def test_an_unknown_tokenizer_is_refused_naming_the_known_ones(meta):
    with pytest.raises(UserError, match="gpt2, byte, char"):
        get_tokenizer(meta)


def test_gpt2_that_cannot_be_had_is_refused_naming_the_cache(monkeypatch):
    def fail(name):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR") as refused:
        get_tokenizer({"tokenizer": "gpt2"})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("tokenizer", "size"), [("gpt2", 50257), ("byte", 257)])
def test_a_meta_that_only_names_the_tokenizer_is_enough(tmp_path, tokenizer, size):
    meta_file(tmp_path, f'{{"tokenizer": "{tokenizer}"}}')
    assert read_meta(tmp_path) == {"tokenizer": tokenizer, "vocab_size": size}


def test_the_vocab_size_of_char_is_the_number_of_its_characters(tmp_path):
    assert (
        read_meta(meta_file(tmp_path, '{"tokenizer": "char", "chars": ["é", "b"]}'))["vocab_size"]
        == 2
    )


def test_a_vocab_size_in_meta_wins(tmp_path):
    assert (
        read_meta(meta_file(tmp_path, '{"tokenizer": "gpt2", "vocab_size": 50304}'))["vocab_size"]
        == 50304
    )


def test_a_missing_meta_is_refused_with_the_line_that_is_enough(tmp_path):
    with pytest.raises(UserError, match=re.escape('{"tokenizer": "gpt2"}')):
        read_meta(tmp_path)


def test_a_written_meta_is_read_again(tmp_path):
    meta = {"tokenizer": "char", "chars": ["\n", "é", "👍"], "vocab_size": 3}
    write_json(tmp_path / "meta.json", meta)
    assert read_meta(tmp_path) == meta and [path.name for path in tmp_path.iterdir()] == [
        "meta.json"
    ]


DAMAGED = [
    "",
    "{",
    '{"tokenizer": ',
    "[]",
    "null",
    '"gpt2"',
    "{}",
    '{"tokenizer": "llama"}',
    '{"tokenizer": ["gpt2"]}',
]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_meta_is_refused_naming_the_file(tmp_path, content):
    with pytest.raises(UserError, match=r"meta\.json") as refused:
        read_meta(meta_file(tmp_path, content))
    assert "\n" not in str(refused.value)


def test_a_meta_that_is_not_utf8_is_refused_naming_the_file(tmp_path):
    (tmp_path / "meta.json").write_bytes(b'{"tokenizer": "\xff"}')
    with pytest.raises(UserError, match=r"meta\.json"):
        read_meta(tmp_path)
