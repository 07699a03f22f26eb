"""Tokenisation and word binding, with small tokenizers of both kinds made here."""

import itertools
import json
import logging
import unicodedata

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tokenverse_jax.flux.pretrained import SHIPPED
from tokenverse_jax.flux.text import encode, load_tokenizer, warn_unread
from tokenverse_jax.flux.words import INVISIBLE, find_word, fold, word_key

CORPUS = [
    "a dog and a cat on the beach",
    "a red striped ball beside a blue star",
    "two dogs, a hat; the dog's toy!",
    "photographs of a t-shirt",
] * 20


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer_2")
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace("~", "")
    spaces = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), spaces])
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512}
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | names))
    return folder


@pytest.fixture(scope="module")
def t5(t5_folder):
    return load_tokenizer(t5_folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """In the files of FLUX's tokenizer/: vocab.json and merges.txt, no tokenizer.json."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    end, special = "<|endoftext|>", ["<|startoftext|>", "<|endoftext|>"]
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=90, special_tokens=special, end_of_word_suffix="</w>", show_progress=False),
    )
    tokenizer.model.save(str(folder))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": "<|startoftext|>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | {"eos_token": end, "pad_token": end, "unk_token": end})
    )
    return load_tokenizer(folder)


def pieces(tokenizer, prompt, positions):
    tokens = tokenizer.convert_ids_to_tokens(encode(tokenizer, [prompt], 64)[0].tolist())
    return [tokens[position] for position in positions]


# Ids.


def test_t5_ids_are_padded_after_the_end_token(t5):
    ids = encode(t5, ["a dog", "the dog and the cat"], 24)
    assert ids.shape == (2, 24) and ids.dtype == np.int32
    ends = (ids == 1).argmax(axis=1)
    assert ends[0] < ends[1]
    assert (ids[0, ends[0] + 1 :] == 0).all() and (ids[:, 0] != 0).all()
    np.testing.assert_array_equal(encode(t5, ["a dog"], 24), ids[:1])


def test_clip_ids_stand_between_start_and_end(clip):
    ids = encode(clip, ["a dog"], 12)[0]
    start, end = clip.bos_token_id, clip.eos_token_id
    assert ids[0] == start and ids[-1] == end
    assert clip.convert_ids_to_tokens(ids[1:4].tolist()) == ["a</w>", "dog</w>", "<|endoftext|>"]
    assert (ids[3:] == end).all()
    np.testing.assert_array_equal(encode(clip, ["A  DOG"], 12)[0], ids)


def test_an_empty_prompt_is_an_end_token(t5):
    np.testing.assert_array_equal(encode(t5, [""], 3), [[1, 0, 0]])


def test_a_prompt_may_fill_the_length_but_not_exceed_it(t5, clip):
    for tokenizer in (t5, clip):
        count = len(tokenizer("a dog and a cat")["input_ids"])
        full = encode(tokenizer, ["a dog and a cat"], count)[0]
        assert full[-1] == tokenizer.eos_token_id
        with pytest.raises(ValueError, match=rf"^{count} tokens, but the text length is {count - 1}: .*'a dog and a c"):
            encode(tokenizer, ["a dog", "a dog and a cat"], count - 1)
        cut = encode(tokenizer, ["a dog", "a dog and a cat"], count - 1, truncate=True)[1]
        np.testing.assert_array_equal(cut, [*full[: count - 2], tokenizer.eos_token_id])


def test_a_text_instead_of_a_list_is_refused(t5):
    with pytest.raises(ValueError, match="a list of texts, got the single text 'a dog'"):
        encode(t5, "a dog", 8)


# Words.


@pytest.mark.parametrize(
    ("prompt", "word", "expected"),
    [
        ("a dog and a cat", "dog", ["▁dog"]),
        ("a dog and a dog", "dog#1", ["▁dog"]),
        ("two dogs and a dog", "dog", ["▁dog"]),  # not the one in "dogs"
        ("two dogs and a dog", "dogs", ["▁dog", "s"]),
        ("a dog, a cat", "dog", ["▁dog"]),  # without the comma
        ("(dog) dog", "dog", ["dog"]),
        ("the dog's toy", "dog", ["▁dog"]),
        ("a DOG", "dog", ["<unk>"]),  # another case is another word to T5, but the same position
        ("a dog", "a", ["a"]),  # not the lone "▁" in front, although it claims the same letter
        ("a  dog\n and\tcat", "CAT", ["c", "a", "t"]),
        ("a cat", "cat", ["c", "a", "t"]),
        ("a t-shirt", "t-shirt", ["▁t", "-", "s", "h", "i", "r", "t"]),
        ("a t-shirt", "shirt", ["s", "h", "i", "r", "t"]),
        ("a  dog   toy", "dog toy", ["▁dog", "▁t", "o", "y"]),
        ("a hat", "hat", ["h", "a", "t"]),
    ],
)
def test_words_of_t5(t5, prompt, word, expected):
    assert pieces(t5, prompt, find_word(t5, prompt, word)) == expected


def test_occurrences_are_counted_by_word(t5):
    prompt = "a dog, two dogs, a Dog's dog"
    first, second, third = (find_word(t5, prompt, f"dog#{n}") for n in (1, 2, 3))
    assert find_word(t5, prompt, "dog") == first
    assert first < find_word(t5, prompt, "dogs") < second < third
    assert pieces(t5, prompt, third) == ["▁dog"]


def test_every_word_has_tokens_of_its_own(t5):
    prompt = "two dogs beside a red striped ball"
    positions = [find_word(t5, prompt, word) for word in prompt.split()]
    flat = [position for word in positions for position in word]
    assert flat == sorted(set(flat))
    tokens = t5.convert_ids_to_tokens(t5(prompt)["input_ids"])
    left = [token for position, token in enumerate(tokens) if position not in flat]
    assert set(left) <= {"▁", "</s>"}


def test_words_of_clip(clip):
    prompt = "Two dogs, the dog's dog!"
    assert pieces(clip, prompt, find_word(clip, prompt, "dog#2")) == ["dog</w>"]
    assert find_word(clip, "a dog", "dog") == (2,)  # after the start token and "a"
    assert find_word(clip, "a  DOG", "dog") == (2,)


@pytest.mark.parametrize(
    ("prompt", "word", "message"),
    [
        ("a dog or a Dog", "cat", "'cat' is not in the prompt 'a dog or a Dog'; its words are a, dog, or, a#2, Dog#2$"),
        ("a dog and a Dog", "dog#3", r"'dog#3' is not in .* its words are"),
        ("two dogs", "dog", "'dog' is not in .* its words are two, dogs$"),
        ("a dog", "dog#0", "'dog#0': give a word of the prompt, or word#n .* counted from 1"),
        ("a dog", "", "'': give a word"),
        ("a dog", "#2", "'#2': give a word"),
        ("a dog.", ".+", r"'\.\+' is not in"),  # a word is no regular expression
        ("a ~ dog", "~", r"'~' has 0 tokens \(\) in the prompt 'a ~ dog', but needs at least 1"),
    ],
)
def test_a_word_that_cannot_be_bound(t5, prompt, word, message):
    with pytest.raises(ValueError, match=message):
        find_word(t5, prompt, word)


def test_a_word_with_another_number_of_tokens(t5):
    assert len(find_word(t5, "two dogs", "dogs", num_tokens=2)) == 2
    with pytest.raises(ValueError, match=r"'dogs' has 2 tokens \(▁dog s\) in the prompt 'two dogs', but needs 1"):
        find_word(t5, "two dogs", "dogs", num_tokens=1)


# Words of other scripts, and in other forms.

HINDI = "\u0915\u0941\u0924\u094d\u0924\u093e"  # a dog; with vowels that Unicode has among the marks


@pytest.fixture(scope="module")
def letters():
    """Every character is a token."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.fixture(scope="module")
def japanese():
    """As T5's, normalizer included; it knows some Japanese."""
    known = ["▁", "▁dog", "dog", "▁白い", "白い", "▁犬", "犬", "犬と"]
    known += ["と", "帽子", "T", "シャツ", "が", "、"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -1.0) for piece in known)]
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    spaces = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), spaces])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


@pytest.mark.parametrize(
    ("prompt", "word", "expected"),
    [
        ("a cafe\u0301 cup", "café", "cafe\u0301"),
        ("a café cup", "cafe\u0301", "café"),
        ("cafe\u0301 cafe", "cafe", "cafe"),  # the second
        ("cafe\u0301 cafe\u0301s", "CAFE\u0301", "cafe\u0301"),
        ("the dog\u2019s hat", "dog's", "dog\u2019s"),
        ("the dog's hat", "dog\u02bcs", "dog's"),
        ("the dog\u02bcs hat", "dog", "dog"),  # no letter, although Unicode says so
        ("the dog\uff07s hat", "dog\u00b4s", "dog\uff07s"),
        ("a 5\u2033 \u201cnail\u201d", '5"', "5\u2033"),
        ("a t\u2011shirt", "t-shirt", "t\u2011shirt"),
        ("\uff44\uff4f\uff47 run", "dog", "\uff44\uff4f\uff47"),
        ("eine STRASSE", "straße", "STRASSE"),
        ("eine Straße hier", "STRASSE", "Straße"),
        ("in \u0130stanbul hier", "istanbul", "\u0130stanbul"),
        ("in istanbul hier", "\u0130STANBUL", "istanbul"),
        ("\u0131\u015f\u0131k \u0130\u0130 dog", "dog", "dog"),  # nothing is shifted by what grows
        ("a do\u00adg runs", "dog", "do\u00adg"),
        ("a dog runs", "d\u200bog", "dog"),
        ("a \u200bdog\u200b runs", "dog", "dog"),
        ("a teddy\u00a0bear sits", "teddy bear", "teddy\u00a0bear"),
        ("a teddy bear sits", "teddy\u2009\u00a0bear", "teddy bear"),
        ("a dog\u2122 runs", "dog", "dog"),
        (f"{HINDI} dog", HINDI, HINDI),
        (unicodedata.normalize("NFD", "두 강아지가"), "강아지가", unicodedata.normalize("NFD", "강아지가")),
        ("a dog and a DOG#", "dog\uff032", "DOG"),
    ],
)
def test_words_that_look_the_same(letters, prompt, word, expected):
    positions = find_word(letters, prompt, word)
    assert positions == tuple(range(positions[0], positions[0] + len(expected)))
    assert prompt[positions[0] : positions[-1] + 1] == expected


@pytest.mark.parametrize(
    ("prompt", "word", "words"),
    [
        ("a cafe\u0301", "cafe", "a, cafe\u0301"),
        ("cafés", "cafe\u0301", "cafés"),
        ("Straße", "s", "Straße"),  # half of a letter
        ("Straße STRASSE", "hat", "Straße, STRASSE#2"),
        ("the dog\u02bcs", "cat", "the, dog, s"),
        ("두 강아지가", "강아지", "두, 강아지가"),  # Korean words have their particles
        ("!", "dog", "none"),
    ],
)
def test_words_that_are_others(letters, prompt, word, words):
    with pytest.raises(ValueError, match=f"{word!r} is not in the prompt .*; its words are {words}$"):
        find_word(letters, prompt, word)


@pytest.mark.parametrize(
    ("prompt", "word", "expected"),
    [
        ("白い帽子と犬", "犬", ["犬"]),
        ("白い帽子と犬", "帽子と", ["帽子", "と"]),
        ("白い犬と犬が", "犬", ["犬"]),  # the second: the first is in a token with more
        ("白い 犬 と帽子", "犬", ["▁犬"]),
        ("白いdogと帽子", "DOG", ["dog"]),
        ("Tシャツ", "\uff7c\uff6c\uff82", ["シャツ"]),
        ("T\uff7c\uff6c\uff82と犬", "シャツ", ["シャツ"]),
        ("白い犬、帽子", "帽子", ["帽子"]),
        ("猫鳥、猫", "猫", ["<unk>"]),  # the second, again
    ],
)
def test_words_in_text_without_spaces_are_whole_tokens(japanese, prompt, word, expected):
    assert pieces(japanese, prompt, find_word(japanese, prompt, word)) == expected


@pytest.mark.parametrize(
    ("prompt", "word", "message"),
    [
        (
            "白い犬と帽子",
            "犬",
            r"'犬' is only a part of the token '犬と' \('犬と'\) in the prompt '白い犬と帽子': "
            r"put spaces around it, or take whole tokens: '犬と'; its words are 白い, 犬と, 帽子$",
        ),
        (
            "a 猫鳥犬",
            "猫",
            "'猫' is only a part of the token '<unk>' .*whole tokens: '猫鳥'; its words are a, 猫鳥, 犬$",
        ),
        (
            "猫鳥、犬と",
            "猫#2",
            "'猫#2' is only a part of the token '<unk>' .*whole tokens: '猫鳥'; its words are 猫鳥, 犬と$",
        ),
        ("白い帽子と帽子", "犬", "'犬' is not in the prompt .*; its words are 白い, 帽子, と, 帽子#2$"),
        ("two dogsと帽子", "dog", "'dog' is not in the prompt .*; its words are two, dogs, と, 帽子$"),
    ],
)
def test_words_in_text_without_spaces_that_share_a_token(japanese, prompt, word, message):
    with pytest.raises(ValueError, match=message):
        find_word(japanese, prompt, word)


SIGNS = st.sampled_from(
    "'\u2019\u02bcß\u0130\u0131\u0301\u0307\u00ad\u200dか\u3099\uff76\uff9e\u0e19\u0e49\u0e33\u1100\u1161\u11a8\ufb03\u0345\u037a\ufdfa"
)
CHARACTERS = SIGNS | st.sampled_from("\u00b4\u1ffd\u00a8\u2034") | st.characters(exclude_categories=["Cs"])
FORMS = {form: lambda text, form=form: unicodedata.normalize(form, text) for form in ("NFC", "NFD", "NFKC", "NFKD")}
FORMS |= {"as it is": str, "upper": str.upper, "lower": str.lower}


@settings(max_examples=300, deadline=None)
@given(
    st.text(CHARACTERS, max_size=8),
    st.text(SIGNS | st.characters(categories=["L", "N"]), min_size=1, max_size=5),
    st.text(CHARACTERS, max_size=8),
    st.sampled_from(sorted(FORMS)),
)
def test_a_word_is_found_where_it_is_in_any_text(letters, left, word, right, form):
    word = INVISIBLE.sub("", word[:1]) + word[1:-1] + INVISIBLE.sub("", word[-1:] if word[1:] else "")
    if not word or unicodedata.category(unicodedata.normalize("NFKC", word)[0]).startswith("M"):
        word = f"x{word}"  # a mark would belong to the space
    prompt = f"{left} {word} {right}"
    start = len(left) + 1
    for number in itertools.count(1):
        positions = find_word(letters, prompt, f"{FORMS[form](word)}#{number}")
        assert fold(prompt[positions[0] : positions[-1] + 1]) == fold(word)
        if positions[0] >= start:
            break
    assert positions == tuple(range(start, start + len(word)))


@given(st.text(CHARACTERS), st.sampled_from(["NFC", "NFD"]))
def test_folded_text_does_not_depend_on_its_form(text, form):
    assert fold(unicodedata.normalize(form, text)) == fold(text)


def test_keys_of_words():
    assert word_key("DOG#1") == word_key("dog") == "dog"
    assert word_key("Teddy\u00a0 bear#2") == "teddy bear#2"
    assert word_key("Cafe\u0301\uff032") == word_key("café#2") != word_key("cafe#2")


# What the text encoders cannot read.


@pytest.fixture(scope="module")
def bytes_clip(tmp_path_factory):
    """With a token for every byte, as the real one has."""
    folder = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"{letter}</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": "<|startoftext|>"}
    config |= dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


@pytest.mark.parametrize(
    ("prompt", "length", "expected"),
    [
        ("", 77, None),
        ("白い dog", 77, None),
        (" \n\t", 77, "it has only spaces or invisible characters, so nothing to draw"),
        ("\u200b\u00ad", 77, "it has only spaces or invisible characters, so nothing to draw"),
        ("dog 猫鳥 魚犬", 77, "T5 does not know '猫鳥', '魚'"),
        ("猫鳥 魚", 77, "T5 knows none of it"),
        ("dog dog dog\u200b", 11, None),
        ("dog dog dog", 10, "CLIP reads 10 tokens only, and does not see 'g', but T5 does"),
        ("dog 犬 dog", 6, "CLIP reads 6 tokens only, and does not see '犬 dog', but T5 does"),
        ("dog cat", 5, "T5 does not know 'cat'; CLIP reads 5 tokens only, and does not see 'cat', but T5 does"),
    ],
)
def test_warnings_of_what_is_not_read(japanese, bytes_clip, caplog, prompt, length, expected):
    with caplog.at_level(logging.WARNING):
        warn_unread(bytes_clip, japanese, [prompt, prompt], length)
        warn_unread(bytes_clip, japanese, [prompt], length)
    assert caplog.messages == ([] if expected is None else [f"prompt {prompt!r}: {expected}"])  # once


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a star", None),
        (
            "a star and a 犬",
            "T5 does not know '犬'; CLIP stops at a character that it does not know, and does not see '犬'",
        ),
        (
            "a star\u2019s cafe\u0301 hat",
            "T5 does not know '\u2019', 'e\u0301'; "
            "CLIP stops at a character that it does not know, and does not see '\u2019s cafe\u0301 hat'",
        ),
        ("白い犬", "T5 knows none of it; CLIP sees none of it"),
    ],
)
def test_warnings_of_the_shipped_model(caplog, prompt, expected):
    folder = SHIPPED["tiny"]
    with caplog.at_level(logging.WARNING):
        warn_unread(load_tokenizer(folder / "tokenizer"), load_tokenizer(folder / "tokenizer_2"), [prompt], 40)
    assert caplog.messages == ([] if expected is None else [f"prompt {prompt!r}: {expected}"])


# Loading.


def test_folders_that_hold_no_tokenizer(tmp_path, t5_folder):
    with pytest.raises(ValueError, match=r"nowhere: no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no tokenizer that can be read .*; the folder holds nothing$"):
        load_tokenizer(tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer_config.json").write_bytes((t5_folder / "tokenizer_config.json").read_bytes())
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken: no tokenizer .*the folder holds tokenizer.json, tokenizer_config"):
        load_tokenizer(broken)
