"""common/tokenizer.py: text to token ids and back for gpt2, byte and char; meta.json."""

import re

import numpy as np
import pytest
import tiktoken
from conftest import GPT2, decode

from common.errors import UserError
from common.files import write_json
from common.tokenizer import (
    CharTokenizer,
    byte_tokenizer,
    cached_token_bytes,
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
    "endoftext": "before<|endoftext|>after <|endoftext|>",
    "long": "a" * 1000 + " " * 1000,
}
ALL_CHARACTERS = sorted(set("".join(TEXTS.values())))


def make_tokenizer(request, name):
    """Return the tokenizer of this name."""
    if name == "gpt2":
        return request.getfixturevalue("gpt2_tokenizer")
    if name == "byte":
        return byte_tokenizer()
    return CharTokenizer([*ALL_CHARACTERS, "<|endoftext|>"])


@pytest.fixture(params=[GPT2, "byte", "char"])
def tokenizer(request):
    return make_tokenizer(request, request.param)


@pytest.fixture(params=TEXTS.values(), ids=TEXTS.keys())
def text(request):
    return request.param


def write_meta(folder, content):
    """Write a meta.json with this text and return its folder."""
    (folder / "meta.json").write_text(content, encoding="utf-8")
    return folder


# Encode and decode ----------------------------------------------------------------------------


def test_decoding_the_ids_of_a_text_gives_the_text(tokenizer, text):
    assert decode(tokenizer, encode(tokenizer, text)) == text


def test_ids_are_a_vector_of_uint32_below_n_vocab_without_the_end_of_text(tokenizer, text):
    ids = encode(tokenizer, text)
    assert ids.ndim == 1
    assert ids.dtype == np.uint32
    assert all(token_id < tokenizer.n_vocab for token_id in ids)
    assert tokenizer.eot_token not in ids


def test_the_sum_of_token_bytes_is_the_utf8_length(tokenizer, text):
    lengths = token_bytes(tokenizer)[encode(tokenizer, text)]
    assert lengths.sum() == len(text.encode("utf-8"))


def test_token_bytes_has_one_length_per_id(tokenizer):
    assert token_bytes(tokenizer).shape == (tokenizer.n_vocab,)


def test_the_end_of_text_token_has_no_bytes_of_text(tokenizer):
    assert token_bytes(tokenizer)[tokenizer.eot_token] == 0


def test_the_lengths_of_gpt2s_tokens_are_found_in_the_cache_of_tiktoken(gpt2_tokenizer):
    assert (
        cached_token_bytes({"tokenizer": "gpt2"}).tolist() == token_bytes(gpt2_tokenizer).tolist()
    )


def test_the_end_of_text_token_decodes_to_its_name(tokenizer):
    assert decode(tokenizer, [tokenizer.eot_token]) == "<|endoftext|>"


@pytest.mark.parametrize("lone", ["a\ud83db", "\udc4d", "a\ud800"])
@pytest.mark.parametrize("name", [GPT2, "byte"])
def test_a_lone_surrogate_becomes_the_replacement_character(request, name, lone):
    tokenizer = make_tokenizer(request, name)
    expected = "".join("\ufffd" if "\ud800" <= char <= "\udfff" else char for char in lone)
    assert decode(tokenizer, encode(tokenizer, lone)) == expected


def test_a_pair_of_surrogates_becomes_its_character():
    assert decode(byte_tokenizer(), encode(byte_tokenizer(), "\ud83d\udc4d")) == "👍"


def test_a_lone_surrogate_is_an_unknown_character_for_char():
    with pytest.raises(UserError, match="�"):
        encode(CharTokenizer("ab"), "a\ud800")


def test_bytes_that_are_not_utf8_decode_to_the_replacement_character():
    assert decode(byte_tokenizer(), [ord("a"), 0xFF]) == "a\ufffd"


def test_gpt2_ids_are_those_of_tiktoken(gpt2_tokenizer, text):
    expected = tiktoken.get_encoding("gpt2").encode_ordinary(text)
    assert encode(gpt2_tokenizer, text).tolist() == expected


def test_gpt2_ids_are_the_published_ones(gpt2_tokenizer):
    assert encode(gpt2_tokenizer, "Hello world").tolist() == [15496, 995]


@pytest.mark.parametrize("space", [" ", "\t "])
def test_gpt2_encodes_more_white_space_than_tiktoken_takes_at_once(gpt2_tokenizer, space):
    text = "a" + 1_000_100 * space + "b"
    ids = encode(gpt2_tokenizer, text)
    assert decode(gpt2_tokenizer, ids.tolist()) == text
    assert gpt2_tokenizer.decode(ids[-3:].tolist()).endswith(f"{space[-1]}b")


@pytest.mark.parametrize("char", ["^", "a", "0", "日", "\n"])
def test_gpt2_encodes_a_million_equal_characters_as_it_encodes_few(gpt2_tokenizer, char):
    few = encode(gpt2_tokenizer, char * 64).tolist()  # with 64 characters no token is cut
    assert encode(gpt2_tokenizer, char * 1_000_000).tolist() == few * (1_000_000 // 64)


def test_byte_ids_are_the_utf8_bytes(text):
    assert encode(byte_tokenizer(), text).tolist() == list(text.encode("utf-8"))


def test_char_ids_are_the_indices_in_the_list(text):
    expected = [ALL_CHARACTERS.index(char) for char in text]
    assert encode(CharTokenizer(ALL_CHARACTERS), text).tolist() == expected


def test_char_accepts_its_characters_in_any_order():
    assert encode(CharTokenizer("bca"), "abc").tolist() == [2, 0, 1]


@pytest.mark.parametrize("unknown", ["0", "z", "👍", "\n"])  # below, above and between a and X
def test_char_refuses_an_unknown_character_with_the_character(unknown):
    with pytest.raises(UserError) as error:
        encode(CharTokenizer("aX"), f"aX{unknown}Q")
    assert repr(unknown) in str(error.value)
    assert "\n" not in str(error.value)


def test_encode_returns_a_list_of_the_ids_and_decode_their_text(text):
    for name in ("byte", "char"):
        tokenizer = get_tokenizer({"tokenizer": name, "chars": ALL_CHARACTERS})
        ordinary = text.replace("<|endoftext|>", "")  # which tiktoken refuses by default
        ids = tokenizer.encode(ordinary)
        assert ids == encode(tokenizer, ordinary).tolist()
        assert all(type(token_id) is int for token_id in ids)
        assert tokenizer.decode(ids) == ordinary


def test_char_decodes_end_of_text_to_its_name():
    assert CharTokenizer(["a", "<|endoftext|>"]).decode([0, 1, 0]) == "a<|endoftext|>a"


def test_char_without_end_of_text_has_no_such_token():
    assert CharTokenizer("ab").eot_token is None


# get_tokenizer --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"), [pytest.param("gpt2", 50257, marks=pytest.mark.gpt2_bpe), ("byte", 257)]
)
def test_get_tokenizer_returns_a_vocabulary_of_the_known_size(name, size):
    assert get_tokenizer({"tokenizer": name}).n_vocab == size


def test_get_tokenizer_returns_a_char_tokenizer_with_the_characters_of_meta():
    tokenizer = get_tokenizer({"tokenizer": "char", "chars": ["b", "a"]})
    assert encode(tokenizer, "ab").tolist() == [1, 0]


@pytest.mark.parametrize("meta", [{"tokenizer": "char"}, {"tokenizer": "char", "chars": []}])
def test_char_without_its_characters_is_refused(meta):
    with pytest.raises(UserError, match="chars"):
        get_tokenizer(meta)


@pytest.mark.parametrize("meta", [{}, {"tokenizer": "llama"}])
def test_an_unknown_tokenizer_is_refused_with_the_known_ones(meta):
    with pytest.raises(UserError) as error:
        get_tokenizer(meta)
    assert all(name in str(error.value) for name in ("gpt2", "byte", "char"))


def test_gpt2_that_is_not_available_is_refused_with_the_cache_variable(monkeypatch):
    def fail(name):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(UserError) as error:
        get_tokenizer({"tokenizer": "gpt2"})
    assert "TIKTOKEN_CACHE_DIR" in str(error.value)
    assert "\n" not in str(error.value)


# meta.json ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size"), [("gpt2", 50257), ("byte", 257)])
def test_a_meta_that_only_names_the_tokenizer_is_enough(tmp_path, name, size):
    write_meta(tmp_path, f'{{"tokenizer": "{name}"}}')
    assert read_meta(tmp_path) == {"tokenizer": name, "vocab_size": size}


def test_the_vocab_size_of_char_is_the_number_of_its_characters(tmp_path):
    write_meta(tmp_path, '{"tokenizer": "char", "chars": ["é", "b"]}')
    assert read_meta(tmp_path)["vocab_size"] == 2


def test_a_vocab_size_in_meta_wins(tmp_path):
    write_meta(tmp_path, '{"tokenizer": "gpt2", "vocab_size": 50304}')
    assert read_meta(tmp_path)["vocab_size"] == 50304


def test_a_missing_meta_is_refused_with_the_content_that_is_enough(tmp_path):
    with pytest.raises(UserError, match=re.escape('{"tokenizer": "gpt2"}')):
        read_meta(tmp_path)


def test_read_meta_returns_what_write_json_wrote(tmp_path):
    meta = {"tokenizer": "char", "chars": ["\n", "é", "👍"], "vocab_size": 3}
    write_json(tmp_path / "meta.json", meta)
    assert read_meta(tmp_path) == meta


def test_write_json_leaves_no_other_file(tmp_path):
    write_json(tmp_path / "meta.json", {"tokenizer": "byte"})
    assert [path.name for path in tmp_path.iterdir()] == ["meta.json"]


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
def test_a_damaged_meta_is_refused_with_its_path(tmp_path, content):
    write_meta(tmp_path, content)
    with pytest.raises(UserError) as error:
        read_meta(tmp_path)
    assert f"{tmp_path}/meta.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_meta_that_is_not_utf8_is_refused_with_its_path(tmp_path):
    (tmp_path / "meta.json").write_bytes(b'{"tokenizer": "\xff"}')
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/meta.json")):
        read_meta(tmp_path)
