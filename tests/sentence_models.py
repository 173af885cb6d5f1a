"""Tiny tokenizers trained with Gemma's flags, and tiny models in the folders that sentence-transformers saves."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import Gemma3TextModel, Qwen3Model
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN_WORDS

import hugging_face_models as hf

VOCAB_SIZE = 512  # of the models; the tokenizers need fewer ids
SPECIAL = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}
SYMBOLS = ["<mask>", "<start_of_turn>", "\n\n", "▁▁"]  # user-defined: found in a text before anything else
WORDS = ("the", "small", "funnel", "pools", "pairs", "of", "tokens", "and", "a", "large", "keeps", "every", "memory")

PROMPTS = {"query": "task: search result | query: ", "document": "title: none | text: "}
DENSE_SIZES = (68, 36)  # of the two layers after the pooling of an EmbeddingGemma

# Special tokens inside, spaces and newlines everywhere, bytes of what no piece covers.
TEXTS = [
    "a small funnel",
    " leading",
    "  two leading and two  inner  ",
    "one\nline\n\nparagraph\n\n\nend\n",
    "tab\tand\r\nreturn",
    "émile \N{GRINNING FACE} 日本語 e\N{COMBINING ACUTE ACCENT}",
    "x <bos> y",
    "<eos>end",
    "<pad>",
    "<bos><bos> funnel<eos> pools <unk> <mask>",
    "a <start_of_turn>b <0x41> <s>",
    "aaaaaaaaaaaaaaaaaaaaaaaaa",
    " ",
    "▁",
    "<bo",
    "the large memory keeps every token " * 20,
]


def corpus() -> list[str]:
    generator = np.random.default_rng(0)
    ends = ["", ".", "\n", "  two", "\n\nnext"]
    return [" ".join(generator.choice(WORDS, 12)) + str(generator.choice(ends)) for _ in range(400)]


def train_sentencepiece(**options: Any) -> bytes:
    """The content of a tokenizer.model with Gemma's flags; `options` are those of the trainer."""
    model = io.BytesIO()
    special = {f"{name}_id": number for name, number in (("pad", 0), ("eos", 1), ("bos", 2), ("unk", 3))}
    pieces = {f"{name}_piece": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    gemma = {
        "model_type": "bpe",
        "vocab_size": 400,
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "user_defined_symbols": SYMBOLS,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, **gemma | special | pieces | options
    )
    return model.getvalue()


def train_tokenizer(post_processor: str | None = "<bos> $A") -> Tokenizer:
    """A tokenizer.json with Gemma's parts, trained by the tokenizers library."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = BpeTrainer(vocab_size=200, special_tokens=[*SPECIAL, "<mask>"], max_token_length=8, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    content = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    if post_processor is not None:
        known = [*SPECIAL.items(), ("a", tokenizer.token_to_id("a"))]
        tokenizer.post_processor = TemplateProcessing(single=post_processor, special_tokens=known)
    return tokenizer


# Scripts, composed and decomposed characters, digits, contractions, emoji, whitespace of all kinds, special tokens.
BYTE_TEXTS = [
    *TEXTS,
    "Größe, \N{ANGSTROM SIGN} and A\N{COMBINING RING ABOVE}; it's, I'LL, don't",
    "Ελληνικά и русский, עברית العربية हिन्दी ภาษาไทย",
    "日本語のテキストと한국어 텍스트、中文。",
    "1234567 3.14 ½ 2²",
    "\N{WOMAN}\N{ZERO WIDTH JOINER}\N{PERSONAL COMPUTER} \N{REGIONAL INDICATOR SYMBOL LETTER D}",
    "def f(x):\n\treturn  x[0]  \r\n\r\n   # end \u00a0\u3000.",
    "a<|endoftext|>b <|im_end|>  c",
    "Instruct: find pairs\nQuery:what is a funnel",
]
BYTE_SPECIAL = ("<|endoftext|>", "<|im_end|>", "<|begin_of_text|>")


def train_byte_tokenizer(words: str, post_processor: str | None = "$A <|endoftext|>", **options: Any) -> Tokenizer:
    """A byte-level tokenizer.json as Qwen and Llama 3 have it.

    Args:
        words: the regular expression that cuts a text into words.
        options: of the model.
    """
    tokenizer = Tokenizer(BPE(**options))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False, trim_offsets=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=420,
        special_tokens=list(BYTE_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*corpus(), *BYTE_TEXTS * 20], trainer)
    if post_processor is not None:
        known = [(token, number) for number, token in enumerate(BYTE_SPECIAL)]
        template = TemplateProcessing(single=post_processor, special_tokens=known)
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return tokenizer


def write_json(path: Path, **fields: Any) -> None:
    """Sets fields of a JSON file, which is made if it is not there."""
    path.parent.mkdir(exist_ok=True)
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | fields))


def text_of(tokenizer: Any, length: int, seed: int = 0) -> str:
    """A random text of `length` tokens, with those that the transformers tokenizer adds."""
    generator = np.random.default_rng(seed)
    text = ""
    while len(tokenizer(longer := text + str(generator.choice(WORDS)) + " ")["input_ids"]) <= length:
        text = longer
    text += "7" * (length - len(tokenizer(text)["input_ids"]))  # in no piece, so a byte each
    assert len(tokenizer(text)["input_ids"]) == length
    return text


def save_sentence_model(folder: Path, model: Any, modules: list[torch.nn.Module], **options: Any) -> None:
    """A sentence-transformers folder as the library writes it: `model` and an EmbeddingGemma-like tokenizer, then
    `modules`, whose weights become random. `options` are those of `SentenceTransformer`."""
    model.save_pretrained(folder / "encoder")
    train_tokenizer("<bos> $A <eos>").save(str(folder / "encoder" / "tokenizer.json"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in torch.nn.ModuleList(modules).parameters():
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
    transformer = Transformer(str(folder / "encoder"))
    SentenceTransformer(modules=[transformer, *modules], device="cpu", **options).save(str(folder / "source"))


def save_embedding_gemma(folder: Path, layers: int = 4) -> None:
    """Folder `source` of a model built like EmbeddingGemma: a window of 256 to either side, mixed layer types, two
    linear layers, BOS and EOS."""
    config = hf.gemma3(
        use_bidirectional_attention=True, sliding_window=512, num_hidden_layers=layers, vocab_size=VOCAB_SIZE
    )
    width, (middle, out) = config.hidden_size, DENSE_SIZES
    modules = [
        Pooling(width, pooling_mode="mean"),
        Dense(width, middle, bias=False, activation_function=torch.nn.Identity()),
        Dense(middle, out, bias=False, activation_function=torch.nn.Identity()),
        Normalize(),
    ]
    save_sentence_model(folder, hf.build(Gemma3TextModel, config), modules, prompts=PROMPTS)


QWEN_PROMPTS = {"query": "Instruct: Given a web search query, retrieve passages that answer it\nQuery:", "document": ""}


def save_qwen3_embedding(folder: Path, *, padding_side: str = "left", max_tokens: int = 131072) -> Path:
    """A model in the files that Qwen3-Embedding is published in: its tokenizer puts <|endoftext|> after a text, and the
    vector is the row of that token."""
    model = hf.build(Qwen3Model, hf.qwen3(use_sliding_window=False, vocab_size=VOCAB_SIZE))
    model.save_pretrained(folder)
    write_json(folder / "config.json", architectures=["Qwen3ForCausalLM"])
    train_byte_tokenizer(QWEN_WORDS).save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        tokenizer_class="Qwen2Tokenizer",
        add_bos_token=False,
        add_prefix_space=False,
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        errors="replace",
        model_max_length=max_tokens,
        padding_side=padding_side,
        split_special_tokens=False,
    )
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    flags = {f"pooling_mode_{mode}": mode == "lasttoken" for mode in modes}
    size = model.config.hidden_size
    write_json(folder / "1_Pooling" / "config.json", word_embedding_dimension=size, **flags, include_prompt=True)
    write_json(
        folder / "config_sentence_transformers.json",
        prompts=QWEN_PROMPTS,
        default_prompt_name=None,
        similarity_fn_name="cosine",
    )
    return folder
