"""A converted tokenizer gives the ids of transformers' AutoTokenizer on the same folder, or is refused."""

import itertools
import json

import pytest
import transformers
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN_WORDS

from funnel_engine.checkpoints.tokenizer_files import find_tokenizer
from funnel_engine.hugging_face_config import read_model_config
from funnel_engine.inputs import read_inputs
from funnel_engine.text import TextConfig, read_tokenizer
from funnel_kernels import CheckpointError
from sentence_models import (
    BYTE_TEXTS,
    TEXTS,
    VOCAB_SIZE,
    train_byte_tokenizer,
    train_sentencepiece,
    train_tokenizer,
    write_json,
)

ADDED_FIELDS = ("add_bos_token", "add_eos_token")
FLAGS = [
    {name: flag for name, flag in zip(ADDED_FIELDS, flags, strict=True) if flag is not None}
    for flags in itertools.product((None, False, True), repeat=2)
]
CONFIGS = {
    "gemma": transformers.GemmaConfig(vocab_size=VOCAB_SIZE),
    "gemma3": transformers.Gemma3TextConfig(vocab_size=VOCAB_SIZE),
    "embeddinggemma": transformers.Gemma3TextConfig(vocab_size=VOCAB_SIZE, use_bidirectional_attention=True),
    "t5gemma": transformers.T5GemmaConfig(
        encoder={"vocab_size": VOCAB_SIZE}, decoder={"vocab_size": VOCAB_SIZE}, vocab_size=VOCAB_SIZE
    ),
}


@pytest.fixture(scope="module")
def sentencepiece_model():
    return train_sentencepiece()


@pytest.fixture
def folder(tmp_path):
    CONFIGS["gemma"].save_pretrained(tmp_path)
    return tmp_path


def find(folder):
    return find_tokenizer(folder, read_model_config(json.loads((folder / "config.json").read_text())))


def our_ids(folder, texts=TEXTS, **options):
    text, file = find(folder)
    options = {"vocab_size": VOCAB_SIZE, "max_length": 1000} | options
    ragged = read_inputs(texts, read_tokenizer(file), text, **options)
    return [ragged.ids[a:b].tolist() for a, b in itertools.pairwise(ragged.offsets)]


def their_ids(folder, texts=TEXTS, **options):
    return transformers.AutoTokenizer.from_pretrained(folder)(texts, **options)["input_ids"]


def refusal(folder):
    with pytest.raises(CheckpointError) as error:
        find(folder)
    return str(error.value)


# ------------------------------------------------------------------------------------------- tokenizer.json


POST_PROCESSORS = [
    "<bos> $A",
    "$A <eos>",
    "<bos> $A <eos>",
    "$A",
    None,
    "<eos> $A <bos>",
    "a $A",
    "$A a",
    "<bos> $A $A",
]


@pytest.mark.parametrize("post_processor", POST_PROCESSORS)
@pytest.mark.parametrize("name", ["GemmaTokenizer", "GemmaTokenizerFast", "PreTrainedTokenizerFast", None])
def test_post_processor_of_tokenizer_json(folder, post_processor, name):
    train_tokenizer(post_processor).save(str(folder / "tokenizer.json"))
    fields = {} if name is None else {"tokenizer_class": name}
    write_json(folder / "tokenizer_config.json", bos_token="<bos>", eos_token="<eos>", **fields)
    assert our_ids(folder) == their_ids(folder)


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize(
    ("post_processor", "added"),
    [
        ("<bos> $A", (True, False)),
        ("$A <eos>", (False, True)),
        ("<bos> $A <eos>", (True, True)),
        (None, (False, False)),
    ],
)
def test_flags_beside_tokenizer_json_must_agree_with_it(folder, flags, post_processor, added):
    """Version 5 of transformers ignores them; 4 let them replace the post-processor of a Gemma tokenizer."""
    train_tokenizer(post_processor).save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_class="GemmaTokenizer", **flags)
    wrong = [name for name, adds in zip(ADDED_FIELDS, added, strict=True) if flags.get(name, adds) != adds]
    if wrong:
        message = refusal(folder)
        assert f"{wrong[0]} is {flags[wrong[0]]}, but the post-processor of {folder / 'tokenizer.json'} adds" in message
        assert "set tokenizer.add_bos_token and tokenizer.add_eos_token to True or False, and save it" in message
    else:
        assert our_ids(folder) == their_ids(folder)


@pytest.mark.parametrize(("token", "agrees"), [("<bos>", True), ({"content": "<bos>"}, True), ("<eos>", False)])
def test_flag_is_about_the_token_that_tokenizer_config_names(folder, token, agrees):
    train_tokenizer("<bos> $A").save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", bos_token=token)
    assert find(folder)[0].begin == 2
    write_json(folder / "tokenizer_config.json", add_bos_token=True)
    if agrees:
        assert find(folder)[0].begin == 2
    else:
        assert "add_bos_token is True, but the post-processor of" in refusal(folder)


@pytest.mark.parametrize("flags", [flags for flags in FLAGS if flags])
def test_the_remedy_for_flags_that_disagree(folder, flags):
    train_tokenizer("$A" if True in flags.values() else "<bos> $A <eos>").save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        tokenizer_class="GemmaTokenizer",
        bos_token="<bos>",
        eos_token="<eos>",
        **flags,
    )
    assert "To make them agree" in refusal(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_bos_token, tokenizer.add_eos_token = True, False
    tokenizer.save_pretrained(folder)
    assert our_ids(folder) == their_ids(folder)
    assert find(folder)[0] == TextConfig(2, None)


@pytest.mark.parametrize(
    "model",
    [
        WordLevel({"x": 0}, unk_token="<unk>"),
        BPE({"x": 0}, [], unk_token="<unk>"),
        Unigram([("x", 0.0)]),
        WordPiece({"x": 0}, unk_token="<unk>"),
    ],
    ids=lambda model: type(model).__name__,
)
def test_tokenizer_json_that_cannot_read_a_text(folder, model):
    Tokenizer(model).save(str(folder / "tokenizer.json"))
    message = refusal(folder)
    assert f"{folder / 'tokenizer.json'} cannot read the text 'a'" in message
    assert "lacks the unknown token" in message


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_tokenizer_json_alone(tmp_path, config):
    config.save_pretrained(tmp_path)
    train_tokenizer("<bos> $A <eos>").save(str(tmp_path / "tokenizer.json"))
    assert our_ids(tmp_path) == their_ids(tmp_path)
    assert find(tmp_path) == (TextConfig(2, 1), tmp_path / "tokenizer.json")


@pytest.mark.parametrize("post_processor", ["<bos> $A", "$A <eos>", "<bos> $A <eos>", "$A"])
@pytest.mark.parametrize("max_length", [3, 6, 40])
def test_truncation(folder, post_processor, max_length):
    train_tokenizer(post_processor).save(str(folder / "tokenizer.json"))
    theirs = their_ids(folder, truncation=True, max_length=max_length)
    assert our_ids(folder, max_length=max_length, truncate=True) == theirs
    assert max(map(len, theirs)) == max_length


def test_what_a_tokenizer_json_says_of_padding_and_truncation_is_ignored(folder):
    tokenizer = train_tokenizer()
    expected = tokenizer.encode(TEXTS[0]).ids
    tokenizer.enable_padding(length=50)
    tokenizer.enable_truncation(3)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert our_ids(folder, TEXTS[0]) == [expected]


@pytest.mark.parametrize("single", ["<bos> <bos> $A", "$A <eos> <eos>", "<bos>"])
def test_post_processor_that_the_engine_does_not_have(folder, single):
    train_tokenizer(single).save(str(folder / "tokenizer.json"))
    message = refusal(folder)
    assert f"{folder / 'tokenizer.json'} makes [" in message
    assert "set tokenizer.add_bos_token and tokenizer.add_eos_token to True or False, and save it" in message


def test_the_remedy_for_such_a_post_processor(folder):
    train_tokenizer("<bos> <bos> $A").save(str(folder / "tokenizer.json"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_bos_token = True
    tokenizer.save_pretrained(folder)
    assert our_ids(folder) == their_ids(folder)
    assert find(folder)[0] == TextConfig(2, None)


@pytest.mark.parametrize("content", ["{", '{"version": "1.0", "model": {}}', '{"model": "nonsense"}'])
def test_broken_tokenizer_json(folder, content):
    (folder / "tokenizer.json").write_text(content)
    message = refusal(folder)
    assert f"{folder / 'tokenizer.json'} is not a tokenizer that the tokenizers library reads" in message
    assert "or convert without it" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("truncation_side", "left"),
        ("split_special_tokens", True),
        ("tokenizer_class", "LlamaTokenizer"),
        ("auto_map", {"AutoTokenizer": ["t.T", None]}),
        ("sp_model_kwargs", {"enable_sampling": True}),
        ("fast_tokenizer_files", ["tokenizer.4.0.0.json"]),
        ("fix_mistral_regex", True),
    ],
)
def test_options_that_the_engine_does_not_have(folder, field, value):
    train_tokenizer().save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", **{field: value})
    assert f"tokenizer_config.json: {field} is {value!r}; this engine only supports" in refusal(folder)


def test_tokenizer_of_a_larger_vocabulary_than_the_models(folder):
    write_json(folder / "config.json", vocab_size=2)
    train_tokenizer().save(str(folder / "tokenizer.json"))
    assert "adds id 2 to every text, but the model's vocabulary has 2" in refusal(folder)


def test_no_tokenizer(folder):
    assert find(folder) == (TextConfig(), None)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("tokenizer_config.json", {"pad_token": "<new>"}),
        ("tokenizer_config.json", {"extra_special_tokens": ["<new>"]}),
        ("tokenizer_config.json", {"additional_special_tokens": [{"content": "<new>"}]}),
        ("tokenizer_config.json", {"extra_special_tokens": {"new_token": "<new>"}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"460": {"content": "<new>"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9": {"content": "<bos>"}}}),
        ("special_tokens_map.json", {"mask_token": {"content": "<new>"}}),
        ("added_tokens.json", {"<new>": 460}),
    ],
)
def test_tokens_that_tokenizer_json_does_not_have(folder, name, fields):
    """transformers adds them, and finds them in a text as one token."""
    train_tokenizer().save(str(folder / "tokenizer.json"))
    write_json(folder / name, **fields)
    message = refusal(folder)
    assert f"tokenizer.json does not have all the tokens that {folder / name} adds to it" in message
    assert "load the tokenizer with transformers and save it" in message


@pytest.mark.parametrize("class_name", ["GemmaTokenizer", "PreTrainedTokenizerFast"])
def test_the_remedy_for_such_tokens(folder, class_name):
    train_tokenizer().save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_class=class_name, extra_special_tokens=["<new>"])
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    texts = [*TEXTS, "a <new> b"]
    assert our_ids(folder, texts) == their_ids(folder, texts)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word", "normalized"])
def test_other_flags_of_an_added_token(folder, flag):
    train_tokenizer().save(str(folder / "tokenizer.json"))
    token = {"content": "<mask>", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    write_json(folder / "tokenizer_config.json", added_tokens_decoder={"4": token | {"special": True}})
    assert our_ids(folder) == their_ids(folder)
    write_json(folder / "tokenizer_config.json", added_tokens_decoder={"4": token | {flag: True, "special": True}})
    assert f"has other flags for '<mask>' than {folder / 'tokenizer.json'} ('{flag}')" in refusal(folder)


@pytest.mark.parametrize("name", ["GemmaTokenizer", "GemmaTokenizerFast", None])
@pytest.mark.parametrize("change", ["lower", "no normalizer", "bytes", "fallback"])
def test_rules_that_are_not_gemmas(folder, name, change):
    """transformers 5 replaces them in a tokenizer of Gemma's class, 4 keeps them."""
    tokenizer = train_tokenizer()
    if change == "lower":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), tokenizer.normalizer])
    elif change == "no normalizer":
        tokenizer.normalizer = None
    elif change == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    else:
        tokenizer.model.byte_fallback = False
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_class=name, bos_token="<bos>")
    assert "does not have the rules of Gemma's tokenizer" in refusal(folder)
    write_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")  # the remedy
    assert our_ids(folder) == their_ids(folder)


def test_merges_that_are_dropped_at_random(folder):
    tokenizer = train_tokenizer()
    tokenizer.model.dropout = 0.1
    tokenizer.save(str(folder / "tokenizer.json"))
    assert "drops merges at random" in refusal(folder)


def test_truncation_on_the_left_in_tokenizer_json(folder):
    """transformers takes the side from there where tokenizer_config.json names none."""
    tokenizer = train_tokenizer()
    tokenizer.enable_truncation(3, direction="left")
    tokenizer.save(str(folder / "tokenizer.json"))
    assert "tokenizer.json: truncation_side is 'left'" in refusal(folder)
    write_json(folder / "tokenizer_config.json", truncation_side="right")
    options = {"max_length": 9, "truncation": True}
    assert our_ids(folder, max_length=9, truncate=True) == their_ids(folder, **options)


@pytest.mark.parametrize("fields", [{"model_max_length": 7}, {"max_len": 7}, {"model_max_length": 7, "max_len": 9}])
def test_most_tokens_of_a_text(folder, fields):
    """One rule for whatever stands on the encoder, and transformers' own."""
    train_tokenizer("<bos> $A <eos>").save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", **fields)
    assert find(folder)[0].max_tokens == transformers.AutoTokenizer.from_pretrained(folder).model_max_length == 7
    assert our_ids(folder, max_length=7, truncate=True) == their_ids(folder, truncation=True)


# ------------------------------------------------------------------------------------------- Qwen, Llama, Mistral

LLAMAS = {
    "qwen3": transformers.Qwen3Config(vocab_size=VOCAB_SIZE),
    "llama": transformers.LlamaConfig(vocab_size=VOCAB_SIZE),
    "mistral": transformers.MistralConfig(vocab_size=VOCAB_SIZE),
    "eurobert": transformers.EuroBertConfig(vocab_size=VOCAB_SIZE, pad_token_id=0),
}
PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend")
LLAMA_WORDS = QWEN_WORDS.replace(r"\p{N}|", r"\p{N}{1,3}|")
assert LLAMA_WORDS != QWEN_WORDS


def llama_folder(folder, family, tokenizer, name=None, **fields):
    """A folder with config.json and a tokenizer of the class `name`, or of none."""
    LLAMAS[family].save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", **fields | ({} if name is None else {"tokenizer_class": name}))
    return folder


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "Qwen2TokenizerFast", *PLAIN, None])
@pytest.mark.parametrize("post_processor", ["$A <|endoftext|>", "$A", None])
def test_tokenizer_of_qwen3(tmp_path, name, post_processor):
    """As Qwen3-Embedding is published: its post-processor adds the token that last-token pooling reads."""
    tokenizer = train_byte_tokenizer(QWEN_WORDS, post_processor)
    fields = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None, "add_bos_token": False}
    folder = llama_folder(tmp_path, "qwen3", tokenizer, name, padding_side="left", **fields)
    assert our_ids(folder, BYTE_TEXTS) == their_ids(folder, BYTE_TEXTS)
    end = tokenizer.token_to_id("<|endoftext|>") if post_processor == "$A <|endoftext|>" else None
    assert find(folder)[0] == TextConfig(None, end)


def test_truncation_keeps_the_end_of_qwen3(tmp_path):
    folder = llama_folder(tmp_path, "qwen3", train_byte_tokenizer(QWEN_WORDS))
    theirs = their_ids(folder, BYTE_TEXTS, truncation=True, max_length=6)
    assert our_ids(folder, BYTE_TEXTS, max_length=6, truncate=True) == theirs
    assert {len(ids) for ids in theirs} >= {6}


def other_words(tokenizer):
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre_tokenizers.Split(Regex(LLAMA_WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_only])


def with_prefix_space(tokenizer):
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    words = pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_only])


CHANGES = {
    "no normalizer": lambda tokenizer: setattr(tokenizer, "normalizer", None),
    "other normalizer": lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.NFKC()),
    "other words": other_words,
    "space before a text": with_prefix_space,
    "ignores merges": lambda tokenizer: setattr(tokenizer.model, "ignore_merges", True),
    "unknown token": lambda tokenizer: setattr(tokenizer.model, "unk_token", "<|endoftext|>"),
}


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "Qwen2TokenizerFast", None])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_rules_that_are_not_qwens(tmp_path, name, change):
    """transformers 5 replaces them in a tokenizer of Qwen's class, 4 keeps them."""
    tokenizer = train_byte_tokenizer(QWEN_WORDS)
    change(tokenizer)
    folder = llama_folder(tmp_path, "qwen3", tokenizer, name)
    message = refusal(folder)
    assert "does not have the rules of Qwen2's tokenizer (NFC, " in message
    assert f"but its class is {name or 'Qwen2Tokenizer'}" in message
    write_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")  # the remedy
    assert our_ids(folder, BYTE_TEXTS) == their_ids(folder, BYTE_TEXTS)


def test_a_token_that_qwens_class_would_add(tmp_path):
    content = json.loads(train_byte_tokenizer(QWEN_WORDS, "$A").to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<|endoftext|>"]
    folder = llama_folder(tmp_path, "qwen3", Tokenizer.from_str(json.dumps(content)), "Qwen2Tokenizer")
    assert "the token <|endoftext|>" in refusal(folder)


def test_space_before_a_text_of_qwen3(tmp_path):
    """The class reads it from tokenizer_config.json, and only from there."""
    tokenizer = train_byte_tokenizer(QWEN_WORDS)
    folder = llama_folder(tmp_path, "qwen3", tokenizer, "Qwen2Tokenizer", add_prefix_space=True)
    assert "does not have the rules of Qwen2's tokenizer" in refusal(folder)
    with_prefix_space(tokenizer)
    llama_folder(folder, "qwen3", tokenizer)
    assert our_ids(folder, BYTE_TEXTS) == their_ids(folder, BYTE_TEXTS)


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", ("LlamaTokenizer", "LlamaTokenizerFast", *PLAIN, None)),
        ("mistral", ("LlamaTokenizer", "LlamaTokenizerFast", *PLAIN, None)),
        ("eurobert", (*PLAIN, None)),
        ("qwen3", PLAIN),
    ],
)
def test_tokenizer_of_llama_3(tmp_path, family, names):
    """It has merges that whole words ignore, and transformers uses it as it is."""
    tokenizer = train_byte_tokenizer(LLAMA_WORDS, "<|begin_of_text|> $A", ignore_merges=True)
    tokenizer.normalizer = None
    for name in names:
        folder = llama_folder(tmp_path, family, tokenizer, name)
        assert our_ids(folder, BYTE_TEXTS) == their_ids(folder, BYTE_TEXTS)
        assert find(folder)[0] == TextConfig(2, None)
        (folder / "tokenizer_config.json").unlink()


def llama_2():
    """Llama 2's tokenizer, also Mistral's: its normalizer puts a space before every text."""
    tokenizer = train_tokenizer("<bos> $A <eos>")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.pre_tokenizer = None
    return tokenizer


@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast", *PLAIN, None])
def test_tokenizer_of_mistral(tmp_path, name):
    folder = llama_folder(tmp_path, "mistral", llama_2(), name, bos_token="<bos>", eos_token="<eos>", legacy=True)
    assert our_ids(folder) == their_ids(folder)
    assert find(folder)[0] == TextConfig(2, 1)


def test_tokenizer_of_llama_2(tmp_path):
    """transformers 5 puts its own rules in place of these, which differ where a text begins with a space."""
    folder = llama_folder(tmp_path, "llama", llama_2(), "LlamaTokenizer")
    assert "does not have the rules of Llama's tokenizer in transformers 5" in refusal(folder)
    for name in PLAIN:  # the remedy
        write_json(folder / "tokenizer_config.json", tokenizer_class=name)
        assert our_ids(folder) == their_ids(folder)


@pytest.mark.parametrize(
    ("scheme", "fields"),
    [
        ("first", {}),
        ("first", {"legacy": False}),
        ("always", {"legacy": True}),
        ("never", {"add_prefix_space": False, "legacy": True}),
    ],
)
@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast"])
def test_tokenizer_of_llama_as_transformers_5_saves_it(tmp_path, name, scheme, fields):
    tokenizer = train_tokenizer("<bos> $A")
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme=scheme, split=False)
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>"}
    folder = llama_folder(tmp_path, "llama", tokenizer, name, **tokens, **fields)
    assert our_ids(folder) == their_ids(folder)
    if scheme != "always":  # transformers forgets `legacy` when it saves
        transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
        assert our_ids(folder) == their_ids(folder)
    write_json(folder / "tokenizer_config.json", legacy=scheme != "always", add_prefix_space=scheme == "never" or None)
    assert "does not have the rules of Llama's tokenizer" in refusal(folder)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen3", "LlamaTokenizer"),
        ("qwen3", "GemmaTokenizer"),
        ("qwen3", "GPT2Tokenizer"),
        ("llama", "Qwen2Tokenizer"),
        ("llama", "GemmaTokenizerFast"),
        ("mistral", "MistralCommonBackend"),
        ("eurobert", "LlamaTokenizer"),
        ("eurobert", "RobertaTokenizerFast"),
    ],
)
def test_tokenizer_class_of_another_family(tmp_path, family, name):
    folder = llama_folder(tmp_path, family, train_byte_tokenizer(QWEN_WORDS), name)
    assert f"tokenizer_class is '{name}'; this engine only supports" in refusal(folder)


@pytest.mark.parametrize("family", LLAMAS)
def test_sentencepiece_is_for_gemma(tmp_path, sentencepiece_model, family):
    LLAMAS[family].save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    message = refusal(tmp_path)
    assert f"{tmp_path / 'tokenizer.model'} is a SentencePiece model, which this engine reads for Gemma only" in message


# ------------------------------------------------------------------------------------------- SentencePiece


@pytest.mark.parametrize("flags", [flags for flags in FLAGS if flags])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_flags_beside_a_sentencepiece_model(tmp_path, sentencepiece_model, flags, config):
    config.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    write_json(tmp_path / "tokenizer_config.json", **flags)
    assert our_ids(tmp_path) == their_ids(tmp_path)


@pytest.mark.parametrize("token", ["<start_of_turn>", {"__type": "AddedToken", "content": "<start_of_turn>"}, None])
def test_token_that_tokenizer_config_names(folder, sentencepiece_model, token):
    (folder / "tokenizer.model").write_bytes(sentencepiece_model)
    named = {} if token is None else {"bos_token": token}
    write_json(folder / "tokenizer_config.json", add_bos_token=True, **named)
    assert our_ids(folder) == their_ids(folder)
    assert find(folder)[0].begin == (2 if token is None else 5)


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": None}])
@pytest.mark.parametrize(
    ("name", "added"),
    [("gemma", (2, None)), ("gemma3", (2, None)), ("t5gemma", (2, None)), ("embeddinggemma", (2, 1))],
)
def test_without_flags_the_familys_rule_holds(tmp_path, sentencepiece_model, name, added, flags):
    CONFIGS[name].save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    if flags:
        write_json(tmp_path / "tokenizer_config.json", **flags)
    assert find(tmp_path) == (TextConfig(*added), tmp_path / "tokenizer.model")


def test_sentencepiece_and_its_tokenizer_json_give_the_same_ids(folder, sentencepiece_model):
    (folder / "tokenizer.model").write_bytes(sentencepiece_model)
    write_json(folder / "tokenizer_config.json", add_bos_token=True, add_eos_token=True)
    ours = our_ids(folder)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    assert find(folder)[1] == folder / "tokenizer.json"
    assert our_ids(folder) == ours
    assert all(ids[0] == 2 and ids[-1] == 1 for ids in ours)


def test_truncation_of_sentencepiece_ids(folder, sentencepiece_model):
    (folder / "tokenizer.model").write_bytes(sentencepiece_model)
    write_json(folder / "tokenizer_config.json", add_bos_token=True, add_eos_token=True)
    assert our_ids(folder, max_length=7, truncate=True) == their_ids(folder, truncation=True, max_length=7)


@pytest.mark.parametrize("kind", ["bos", "eos"])
def test_sentencepiece_model_without_the_token_to_add(folder, kind):
    model = train_sentencepiece(**{f"{kind}_id": -1, "user_defined_symbols": []})
    (folder / "tokenizer.model").write_bytes(model)
    write_json(folder / "tokenizer_config.json", **{f"add_{kind}_token": True})
    message = refusal(folder)
    assert f"has no {kind.upper()} token to add to every text" in message
    assert f'"add_{kind}_token": false into {folder / "tokenizer_config.json"}' in message
    write_json(folder / "tokenizer_config.json", **{f"add_{kind}_token": False})
    assert find(folder)[0] == TextConfig()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"add_bos_token": True, "bos_token": "<s>"}, "has no BOS token"),
        ({"add_eos_token": "yes"}, "add_eos_token is 'yes'; it must be a JSON bool"),
        ({"add_bos_token": True, "bos_token": 2}, "bos_token is 2; it must be a JSON str"),
        ({"added_tokens_decoder": {"511": {"content": "<extra>"}}}, "e.g. '<extra>'"),
        ({"added_tokens_decoder": {"7": {"content": "<mask>"}}}, "e.g. '<mask>'"),
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder"),
    ],
)
def test_files_that_do_not_fit_the_sentencepiece_model(folder, sentencepiece_model, fields, reason):
    (folder / "tokenizer.model").write_bytes(sentencepiece_model)
    write_json(folder / "tokenizer_config.json", **fields)
    assert reason in refusal(folder)


def test_added_tokens(folder, sentencepiece_model):
    (folder / "tokenizer.model").write_bytes(sentencepiece_model)
    write_json(
        folder / "tokenizer_config.json", added_tokens_decoder={"2": {"content": "<bos>"}, "4": {"content": "<mask>"}}
    )
    write_json(folder / "added_tokens.json", **{"<start_of_turn>": 5})
    assert find(folder)[0].begin == 2
    write_json(folder / "added_tokens.json", **{"<extra>": 400})
    assert "e.g. '<extra>'; load the tokenizer with transformers and save it" in refusal(folder)


def test_added_tokens_beyond_the_models_vocabulary_do_not_count(folder, sentencepiece_model):
    """As Gemma 3's <image_soft_token>, whose id is the size of the text model's vocabulary."""
    (folder / "tokenizer.model").write_bytes(sentencepiece_model)
    write_json(
        folder / "tokenizer_config.json", added_tokens_decoder={str(VOCAB_SIZE): {"content": "<image_soft_token>"}}
    )
    write_json(folder / "added_tokens.json", **{"<extra>": 10**400})
    assert find(folder) == (TextConfig(2), folder / "tokenizer.model")
    write_json(folder / "tokenizer_config.json", added_tokens_decoder={"many": {"content": "<image_soft_token>"}})
    assert "e.g. '<image_soft_token>'" in refusal(folder)


@pytest.mark.parametrize("content", [b"\x00nonsense"])
def test_broken_sentencepiece_model(folder, content):
    (folder / "tokenizer.model").write_bytes(content)
    message = refusal(folder)
    assert f"{folder / 'tokenizer.model'} is not a SentencePiece model" in message
    assert "or convert without it" in message
