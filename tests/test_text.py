"""Tokenisation and word binding, with small tokenizers of both kinds made here."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from tokenverse_jax.text import encode, find_word, load_tokenizer

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


def pieces(tokenizer, prompt, places):
    tokens = tokenizer.convert_ids_to_tokens(encode(tokenizer, [prompt], 64)[0].tolist())
    return [tokens[place] for place in places]


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
        ("a DOG", "dog", ["<unk>"]),  # another case is another word to T5, but the same place
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
    places = [find_word(t5, prompt, word) for word in prompt.split()]
    flat = [place for word in places for place in word]
    assert flat == sorted(set(flat))
    tokens = t5.convert_ids_to_tokens(t5(prompt)["input_ids"])
    left = [token for place, token in enumerate(tokens) if place not in flat]
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
