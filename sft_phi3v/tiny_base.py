"""Trains the tiny Phi-3-Vision that `make demo` fine-tunes: `python -m sft_phi3v.tiny_base`.

It has every part of the real model at toy size (two crops per picture, CLIP, HD transform, projector, longrope decoder,
Phi-3-Vision's special tokens over a vocabulary of some hundred entries) and it is really trained, on a CPU:

1. warm-up: vision tower and projector learn to tell kind, colour, pattern, size and background apart;
2. captioning: projector and decoder learn to describe pictures and to answer questions about them, in lower-case
   prose, beside text-only practice (copying, spelling, capitals, numbers) that teaches the characters all later answers
   are made of.

Its pictures are drawn as the sample catalogue's are, from other seeds. It never sees the catalogue's prices, a category
code beside a picture, or the format of the recipe's answer: that is what the demo's fine-tuning teaches.
"""

import argparse

if __name__ == "__main__":  # before torch is imported
    parser = argparse.ArgumentParser(description="Train the tiny base model of the demo, from nothing, on a CPU.")
    parser.add_argument("--output_dir", default="recipes/tiny_base", help="default: %(default)s")
    options = parser.parse_args()

import json
import random
import re
import time
from collections import Counter
from pathlib import Path

import torch
from PIL import Image as PILImage
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import TokenizersBackend, get_cosine_schedule_with_warmup

from sft_phi3v.catalogue import BACKGROUNDS, COLOURS, KINDS, PATTERNS, SIZES, Product, draw_picture, draw_product
from sft_phi3v.collator import Collator
from sft_phi3v.evaluation import generate
from sft_phi3v.phi3_v import Phi3VConfig, Phi3VForCausalLM, Phi3VImageProcessor, Phi3VProcessor

Turn = tuple[str, str]  # question, answer

VOCAB_SIZE = 896
WARM_UP_STEPS = 1600  # of 16 pictures
CAPTION_STEPS = 1000  # of 8 pictures, and 16 rows of practice
_SPECIAL_TOKENS = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>", "<|image|>")
_STRIP_RIGHT = ("<|assistant|>", "<|image|>")  # the released tokenizer lets these swallow the whitespace behind them

QUESTION = "What is shown in this image?"  # the recipe's question; here it asks for a caption
_DESCRIBE = (
    QUESTION,
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
    *("vest", "cape", "sock", "glove", "ring", "watch", "purse", "wallet", "sandal", "apron", "collar", "sleeve"),
    *("button", "pocket", "zip", "logo", "gloves", "socks", "jackets", "jeans", "wool", "cotton", "silk", "leather"),
    *("linen", "long", "short", "new", "old", "light", "dark", "soft", "warm", "full", "half", "product", "products"),
    *("category", "price", "brand", "name", "code", "colour", "number", "weight", "stock", "shop", "order", "sale"),
    *("season", "summer", "winter", "women", "men", "kids", "house", "window", "tree", "river", "bread", "table"),
    *("chair", "paper", "water", "stone", "flower", "garden", "music", "city", "road", "train", "lamp", "book"),
    *("door", "cup", "box", "pen"),
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
    return rng.choice((words, words.title(), code, _number(rng), _number(rng)))


def picture_turns(product: Product, rng: random.Random) -> list[Turn]:
    """Returns a short conversation about the picture of a product; what it says is all in the picture."""
    kind = f"pair of {product.kind}" if product.kind == "trousers" else product.kind
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
    turns = [_in_case(turn, rng) for turn in [*rng.sample(turns, 3), ("Name the product.", thing)]]
    return [(rng.choice(_DESCRIBE), caption), *rng.sample(turns, len(turns))]


def _in_case(turn: Turn, rng: random.Random) -> Turn:
    """Asks for the same answer in title case or in capitals, two times out of three: all words have three forms."""
    question, answer = turn
    return rng.choice(
        (
            turn,
            (f"{question} Write in title case.", answer.title()),
            (f"{question} Write in capitals.", answer.upper()),
        )
    )


def build_tokenizer() -> TokenizersBackend:
    """
    Trains a byte-fallback BPE of `VOCAB_SIZE` entries that treats text as the released tokenizer does.

    Same normaliser (a `▁` in front, spaces become `▁`), `<s>` in front, no pre-tokeniser, the same special tokens with
    the same stripping; digits are always tokens of their own. The ids are its own.
    """
    rng = random.Random("tokenizer")
    corpus = [text for _ in range(4000) for text in practice_turn(rng)]
    for _ in range(2000):
        corpus += [text for turn in picture_turns(draw_product(rng), rng) for text in turn]
    corpus += [form for word in _WORDS for form in (word, word.capitalize()) for _ in range(200)]

    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    draft = Tokenizer(models.BPE())
    draft.normalizer = normalizer
    # Merges are learned inside words only, and digits never merge: the finished tokenizer then needs no pre-tokeniser.
    splits = [pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Digits(individual_digits=True)]
    draft.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.Punctuation()])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(_SPECIAL_TOKENS),
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=[*_CHARACTERS.replace(" ", "▁")],
        show_progress=False,
    )
    draft.train_from_iterator(corpus, trainer)
    learned = json.loads(draft.to_str())["model"]
    merges = [(left, right) for left, right in learned["merges"]]

    tokenizer = Tokenizer(models.BPE(learned["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizer
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, rstrip=token in _STRIP_RIGHT)
            for token in ("<unk>", "<s>", *_SPECIAL_TOKENS)
        ]
    )
    return TokenizersBackend(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=131072,
    )


def build_model(tokenizer: TokenizersBackend) -> Phi3VForCausalLM:
    """Builds the untrained model; every linear of its decoder is a multiple of 64 wide, as 4-bit kernels want it."""
    end, stop = tokenizer.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"])
    head_dim = 32
    config = Phi3VConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_scaling={
            "type": "su",
            "short_factor": [1.0] * (head_dim // 2),
            "long_factor": [1.0 + 2 * step for step in range(head_dim // 2)],
        },
        initializer_range=0.05,
        img_processor={
            "name": "clip_vision_model",
            "image_dim_out": 64,
            "num_img_tokens": 144,
            "clip_config": {
                "hidden_size": 64,
                "intermediate_size": 256,
                "num_hidden_layers": 3,  # the last one is never computed, as in the real model
                "num_attention_heads": 2,
            },
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stop,
        pad_token_id=stop,
        tie_word_embeddings=False,
    )
    model = Phi3VForCausalLM(config)
    model.generation_config.eos_token_id = [end, stop]
    model.generation_config.pad_token_id = stop
    return model


class _Progress:
    """Prints now and then what the figures of a stage were since it last did."""

    def __init__(self, stage: str, steps: int):
        self.stage, self.steps, self.start = stage, steps, time.monotonic()
        self.sums: Counter[str] = Counter()
        self.printed = 0

    def report(self, step: int, **figures: float) -> None:
        self.sums.update(figures)
        if step % 50 == 0 or step == self.steps:
            shown = "  ".join(f"{name} {total / (step - self.printed):.3f}" for name, total in self.sums.items())
            print(f"{self.stage} {step}/{self.steps}  {shown}  {time.monotonic() - self.start:.0f} s", flush=True)
            self.sums.clear()
            self.printed = step


class _Optimizers:
    """Muon for the matrices inside the model, AdamW for everything else, both on one cosine schedule.

    With AdamW alone the vision tower still cannot tell a coat from a belt after the time that all of this takes.
    """

    def __init__(self, module: nn.Module, *, steps: int):
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            inner = parameter.ndim == 2 and not re.search("embed|lm_head|heads", name)
            (matrices if inner else others).append(parameter)
        self.parameters = [*matrices, *others]
        self.optimizers = [
            torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01),
            torch.optim.AdamW(others, lr=2e-3, weight_decay=0.01, betas=(0.9, 0.98)),
        ]
        self.schedules = [
            get_cosine_schedule_with_warmup(optimizer, steps // 20, steps) for optimizer in self.optimizers
        ]

    def step(self, loss: torch.Tensor) -> None:
        """One step down the gradient of the loss."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()


_FACTS: tuple[tuple[str, list[str]], ...] = (
    ("kind", list(KINDS)),
    ("colour", list(COLOURS)),
    ("pattern", list(PATTERNS)),
    ("size", list(SIZES)),
    ("background", list(BACKGROUNDS)),
)


@torch.no_grad()
def give_a_start(model: Phi3VForCausalLM, processor: Phi3VProcessor, rng: random.Random) -> None:
    """
    Sets the vision tower's inputs so that it starts with eyes: which halves what it takes to learn to see.

    Patch filters become the principal components of patches, each scaled to the same spread (fine textures are faint
    beside the mean colour), and positions become sines of row and column, so that neighbours start out alike.
    """
    embeddings = model.model.vision_tower.embeddings
    filters = embeddings.patch_embedding.weight  # (width, 3, 14, 14)
    pictures = [draw_picture(draw_product(rng), rng) for _ in range(128)]
    crops = processor.image_processor(pictures)["pixel_values"][::2]
    patches = nn.functional.unfold(crops, 14, stride=14).transpose(1, 2).flatten(0, 1)  # (128 · 576, 588)
    spread, directions = torch.linalg.eigh(patches.T.cov())  # ascending
    spread, directions = spread[-len(filters) :], directions[:, -len(filters) :]
    filters.copy_((directions / (spread + 0.5).sqrt()).T.reshape(filters.shape))

    waves = torch.pi / 24 * 12 ** torch.linspace(0, 1, len(filters) // 4)
    angles = torch.arange(24)[:, None] * waves
    line = torch.cat([angles.sin(), angles.cos()], dim=1) / 2  # (24, width / 2)
    grid = torch.cat([line[:, None].expand(24, 24, -1), line[None].expand(24, 24, -1)], dim=2)
    embeddings.position_embedding.weight[1:] = grid.flatten(0, 1)  # position 0 is CLIP's class token


class _Reader(nn.Module):
    """Reads the facts of a picture off its image features: for each fact, a weighted mean and a linear head."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, len(values)) for _, values in _FACTS)
        self.attention_heads = nn.Linear(width, len(_FACTS))

    def forward(self, features: torch.Tensor) -> list[torch.Tensor]:
        """`(pictures, features, width)` → for each fact, logits of shape `(pictures, values)`."""
        weights = self.attention_heads(features).softmax(dim=1)
        means = torch.einsum("pfa,pfw->apw", weights, features)
        return [head(mean) for head, mean in zip(self.heads, means, strict=True)]


def warm_up(model: Phi3VForCausalLM, processor: Phi3VProcessor, *, steps: int, rng: random.Random) -> None:
    """
    Trains vision tower and projector to tell the facts of a picture, read off its image features by throw-away heads.

    Captions alone would get there too, after a long plateau: the decoder has nothing to read until the tower sees.
    """
    reader = _Reader(model.config.hidden_size)
    seeing = nn.ModuleList([model.model.vision_tower, model.model.multi_modal_projector, reader])
    optimizers = _Optimizers(seeing, steps=steps)
    progress = _Progress("warm-up", steps)
    for step in range(1, steps + 1):
        products = [draw_product(rng) for _ in range(16)]
        pixels = processor.image_processor([draw_picture(product, rng) for product in products])["pixel_values"]
        # Both crops of these pictures are the same: two pictures share one call, one as global and one as local crop.
        features = model.get_image_features(pixels[::2], torch.full((8, 2), 336)).view(8, 313, -1)
        logits = reader(torch.stack([features[:, 157:], features[:, :156]], dim=1).flatten(0, 1))
        truths = [torch.tensor([values.index(getattr(one, name)) for one in products]) for name, values in _FACTS]
        losses = [nn.functional.cross_entropy(found, truth) for found, truth in zip(logits, truths, strict=True)]
        optimizers.step(torch.stack(losses).sum())
        right = [(found.argmax(1) == truth).float().mean() for found, truth in zip(logits, truths, strict=True)]
        progress.report(step, **{name: float(share) for (name, _), share in zip(_FACTS, right, strict=True)})


def _example(turns: list[Turn], *pictures: PILImage.Image) -> dict[str, object]:
    """A conversation as the collator takes it; the pictures stand before the first question."""
    messages: list[dict[str, object]] = []
    for question, answer in turns:
        shown = [] if messages else [{"type": "image"} for _ in pictures]
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return {"images": list(pictures), "messages": messages, "row": 0}


def _picture_example(rng: random.Random) -> dict[str, object]:
    product = draw_product(rng)
    return _example(picture_turns(product, rng), draw_picture(product, rng))


def teach(model: Phi3VForCausalLM, processor: Phi3VProcessor, *, steps: int, rng: random.Random) -> None:
    """
    Trains projector and decoder to talk about pictures, and beside it on text-only practice.

    The vision tower stays as it is: at the pace that the decoder learns to speak, it would forget how to see.
    """
    collator = Collator(processor)
    model.model.vision_tower.requires_grad_(False)
    optimizers = _Optimizers(model, steps=steps)
    progress = _Progress("captions", steps)
    for step in range(1, steps + 1):
        # Two calls, because a text-only row would be padded to the length of a picture.
        pictures = model(**collator([_picture_example(rng) for _ in range(8)])).loss
        practice = model(**collator([_example([practice_turn(rng) for _ in range(3)]) for _ in range(16)])).loss
        optimizers.step(pictures + practice)
        progress.report(step, pictures=pictures.item(), practice=practice.item())


def captions(
    model: Phi3VForCausalLM, processor: Phi3VProcessor, products: list[Product], rng: random.Random
) -> list[str]:
    """Draws each product and returns what the model says, greedily, when it is asked the recipe's question."""
    examples = [_example([(QUESTION, "-")], draw_picture(product, rng)) for product in products]
    found = generate(model, processor, examples, max_new_tokens=40, batch_size=32, description="captions")
    return [completion.text for completion in found]


def caption_accuracy(
    model: Phi3VForCausalLM, processor: Phi3VProcessor, rng: random.Random, *, rows: int = 256
) -> dict[str, float]:
    """
    Scores captions of fresh pictures.

    Args:
        model ([`Phi3VForCausalLM`]): The model.
        processor ([`Phi3VProcessor`]): Its processor.
        rng (`random.Random`): Draws the pictures.
        rows (`int`): Number of pictures.

    Returns:
        `dict[str, float]`: The share of captions that name each fact; under `together`, kind, colour, pattern and size.
    """
    products = [draw_product(rng) for _ in range(rows)]
    said = [set(text.replace(",", " ").split()) for text in captions(model, processor, products, rng)]
    names = [name for name, _ in _FACTS]
    named = [[getattr(product, name) in words for name in names] for product, words in zip(products, said, strict=True)]
    shares = {name: sum(column) / rows for name, column in zip(names, zip(*named, strict=True), strict=True)}
    return {**shares, "together": sum(all(row[:4]) for row in named) / rows}


def write_readme(folder: Path, model: Phi3VForCausalLM, scores: dict[str, float], minutes: float) -> None:
    """Writes the README of the result: what it is, how it came about, and what it scored."""
    shares = " | ".join(f"{share:.0%}" for share in scores.values())
    table = "\n".join([f"| {' | '.join(scores)} |", "|---" * len(scores) + "|", f"| {shares} |"])
    (folder / "README.md").write_text(
        f"""---
license: apache-2.0
pipeline_tag: image-text-to-text
---
# A tiny Phi-3-Vision, for the demo

{model.num_parameters():,} parameters in the architecture of Phi-3-vision-128k-instruct, with a vocabulary of its own
({VOCAB_SIZE} entries; the special tokens bear the same names). It captions drawn garments and accessories and answers
simple questions about them, in lower-case prose. It knows nothing else: it is what `make demo` fine-tunes.

Trained from nothing by `python -m sft_phi3v.tiny_base --output_dir recipes/tiny_base`, on a CPU ({minutes:.0f} minutes
when these files were made): first the vision tower, on {16 * WARM_UP_STEPS:,} pictures, with throw-away heads that name
kind, colour, pattern, size and background; then projector and decoder, on {8 * CAPTION_STEPS:,} other pictures
with short conversations, beside text-only practice.

What it has seen: pictures drawn by the same code as the sample catalogue, from other seeds, of every kind in every
colour; their words, in prose, in title case and in capitals; random strings, codes and numbers to copy. What it has
not seen: the catalogue's pictures, its prices, which category code belongs to what, or the form of the recipe's answer.

Share of captions of fresh pictures that name each fact ("together": kind, colour, pattern and size), for the question
"{QUESTION}":

{table}
""",
        encoding="utf-8",
    )


def main(folder: Path) -> None:
    """`python -m sft_phi3v.tiny_base --output_dir recipes/tiny_base`"""
    start = time.monotonic()
    torch.manual_seed(0)
    rng = random.Random("tiny base")
    tokenizer = build_tokenizer()
    processor = Phi3VProcessor(Phi3VImageProcessor(num_crops=1), tokenizer)
    model = build_model(tokenizer)
    give_a_start(model, processor, rng)
    warm_up(model, processor, steps=WARM_UP_STEPS, rng=rng)
    teach(model, processor, steps=CAPTION_STEPS, rng=rng)
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(str(folder))
    # Scored as it was saved: rounding to bfloat16 is part of the result.
    model = Phi3VForCausalLM.from_pretrained(folder, dtype=torch.float32)
    scores = caption_accuracy(model, processor, rng)
    print("captions that are right:", "  ".join(f"{name} {share:.1%}" for name, share in scores.items()))
    write_readme(folder, model, scores, (time.monotonic() - start) / 60)


if __name__ == "__main__":
    main(Path(options.output_dir))
