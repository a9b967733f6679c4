"""Trains the tiny Phi-3-Vision that `make demo` fine-tunes: `python -m sft_phi3v.tiny_base --output_dir recipes/tiny_base`.

It has every part of the real model at toy size (two crops per picture, CLIP, HD transform, projector, longrope decoder,
Phi-3-Vision's special tokens over a vocabulary of some hundred entries) and it is really trained, on a CPU:

1. warm-up: vision tower and projector learn to tell kind, colour, pattern, size and background apart;
2. captioning: everything learns to describe pictures and to answer questions about them, in lower-case prose, beside
   text-only practice (copying, spelling, capitals, numbers) that teaches the characters every later answer is made of.

Its pictures are drawn like the sample catalogue's, from other seeds and without the held-out pairs of kind and colour. It
never sees the catalogue's prices, its category codes beside a picture, or the format of the recipe's answer: that is what
the demo's fine-tuning teaches.
"""

import argparse
import math
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

from sft_phi3v.catalogue import BACKGROUNDS, COLOURS, KINDS, PATTERNS, SIZES, Product, draw_picture, draw_product

Turn = tuple[str, str]  # question, answer

VOCAB_SIZE = 896
_SPECIAL_TOKENS = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>", "<|image|>")
_STRIP_RIGHT = ("<|assistant|>", "<|image|>")  # the released tokenizer lets these swallow the whitespace behind them

_DESCRIBE = (
    "What is shown in this image?",
    "What is shown in this picture?",
    "Describe the picture.",
    "Describe this image.",
    "What do you see?",
    "Write a caption.",
    "What is in the photo?",
    "Tell me about this product.",
)
# Words for the text-only practice: what the pictures show, and what a shop writes around it.
_WORDS = (
    *KINDS,
    *COLOURS,
    *PATTERNS,
    *SIZES,
    *BACKGROUNDS,
    *"""coats shirts dresses skirts scarves ties hats bags shoes boots belts umbrellas gloves socks jackets jeans
    wool cotton silk leather linen long short new old light dark soft warm full half product products category price
    brand name code colour number weight stock shop order sale season summer winter women men kids house window tree
    river bread table chair paper water stone flower garden music city road train lamp book door cup box pen""".split(),
)
_FIELDS = ("Product", "Category", "Full Price", "Price", "Brand", "Code", "Colour", "Weight", "Size", "Name", "Stock")
_CHARACTERS = "".join(chr(code) for code in range(32, 127))


def practice_turn(rng: random.Random) -> Turn:
    """Returns one text-only exercise about a random string, such as `("Write in capitals: red tree", "RED TREE")`."""
    words = " ".join(rng.sample(_WORDS, rng.randint(1, 4)))
    task = rng.randrange(7)
    if task == 0:
        return f"Write in capitals: {words}", words.upper()
    if task == 1:
        return f"Write in title case: {words}", words.title()
    if task == 2:
        return f"Write in small letters: {rng.choice((words.upper(), words.title()))}", words
    if task == 3:
        word = rng.choice(_WORDS)
        word = rng.choice((word, word.upper(), word.capitalize()))
        return f"Spell: {word}", " ".join(word)
    if task == 4:
        return _repeat("".join(rng.choice(_CHARACTERS[1:]) for _ in range(rng.randint(3, 12))), rng)
    if task == 5:
        return _repeat(", ".join(_number(rng) for _ in range(rng.randint(1, 4))), rng)
    # Never in the order of the recipe's answer: at most two fields, any two, with any value.
    fields = rng.sample(_FIELDS, rng.randint(1, 2))
    return _repeat(", ".join(f"{field}: {_value(rng)}" for field in fields), rng)


def _repeat(text: str, rng: random.Random) -> Turn:
    return f"{rng.choice(('Repeat', 'Copy', 'Say'))}: {text}", text


def _number(rng: random.Random) -> str:
    number = rng.randrange(10 ** rng.randint(1, 4))
    return rng.choice((str(number), f"{number}.0", f"{number}.{rng.randrange(100):02d}"))


def _value(rng: random.Random) -> str:
    words = " ".join(rng.sample(_WORDS, rng.randint(1, 3)))
    code = "".join(rng.choice(_CHARACTERS[33:59]) for _ in range(rng.randint(3, 9)))
    return rng.choice((words, words.title(), words.upper().split()[0], code, _number(rng), _number(rng)))


def picture_turns(product: Product, rng: random.Random) -> list[Turn]:
    """Returns a short conversation about the picture of a product; what it says is all in the picture."""
    kind = f"pair of {product.kind}" if product.kind in ("trousers", "shorts") else product.kind
    article = "an" if kind[0] == "u" else "a"
    thing = f"{product.size} {product.pattern} {product.colour} {product.kind}"
    if kind != product.kind:
        thing = f"pair of {thing}"
    caption = rng.choice(
        (
            f"a {thing} on a {product.background} background",
            f"a {thing} in front of a {product.background} wall",
            f"this is a {thing} on {product.background}",
            f"the picture shows a {thing}, the background is {product.background}",
        )
    )
    asked = rng.choice(list(COLOURS)) if rng.random() < 0.5 else product.colour
    verdict = "yes, it is" if asked == product.colour else f"no, it is {product.colour}"
    turns = [
        ("What kind of product is this?", f"{article} {kind}"),
        ("Which colour is it?", product.colour),
        ("Which pattern does it have?", product.pattern),
        ("How large is it?", product.size),
        ("Which colour is the background?", product.background),
        (f"Is it {asked}?", verdict),
    ]
    return [(rng.choice(_DESCRIBE), caption), *rng.sample(turns, 3)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """
    Trains a byte-fallback BPE of `VOCAB_SIZE` entries that treats text as the released tokenizer does.

    Same normaliser (a `▁` in front, spaces become `▁`), `<s>` in front, no pre-tokeniser, the same special tokens with the
    same stripping; digits are always tokens of their own. The ids are its own.
    """
    rng = random.Random("tokenizer")
    corpus = [text for _ in range(4000) for text in practice_turn(rng)]
    for _ in range(2000):
        corpus += [text for turn in picture_turns(draw_product(rng), rng) for text in turn]
    corpus += [form for word in _WORDS for form in (word, word.capitalize()) for _ in range(200)]

    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # Merges are learned inside words only, digits never merge; the finished tokenizer needs no pre-tokeniser for that.
    splits = [pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Digits(individual_digits=True)]
    trained.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.Punctuation()])
    reserved = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(_SPECIAL_TOKENS),
        special_tokens=reserved,
        initial_alphabet=[*_CHARACTERS.replace(" ", "▁")],
        show_progress=False,
    )
    trained.train_from_iterator(corpus, trainer)
    return trained
