import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import sft_phi3v.phi3_v  # noqa: F401  (makes phi3_v known to the Auto classes)
from sft_phi3v.catalogue import KINDS, draw_product
from sft_phi3v.phi3_v import Phi3VForCausalLM, Phi3VProcessor
from sft_phi3v.tiny_base import caption_accuracy, captions, picture_turns, practice_turn

FOLDER = Path(__file__).parents[1] / "recipes" / "tiny_base"
ANSWER = "Product: Large Striped Red Coat, Category: COATS, Full Price: 2150.0"


@pytest.fixture(scope="module")
def model() -> Phi3VForCausalLM:
    return AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32)


@pytest.fixture(scope="module")
def processor() -> Phi3VProcessor:
    return AutoProcessor.from_pretrained(FOLDER)


def test_folder_is_small_and_complete() -> None:
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sum(sizes.values()) < 4_000_000
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
            "preprocessor_config.json", "chat_template.jinja", "README.md"} <= set(sizes)  # fmt: skip


def test_config_is_phi3_vs(model: Phi3VForCausalLM) -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["model_type"] == "phi3_v" and config["architectures"] == ["Phi3VForCausalLM"]
    assert config["rope_scaling"]["type"] == "su" and config["img_processor"]["name"] == "clip_vision_model"
    assert type(model) is Phi3VForCausalLM
    assert model.model.vision_layers == config["img_processor"]["clip_config"]["num_hidden_layers"] - 1


def test_every_linear_of_the_decoder_can_be_quantised(model: Phi3VForCausalLM) -> None:
    linears = [one for one in model.model.language_model.modules() if isinstance(one, torch.nn.Linear)]
    assert len(linears) == 4 * model.config.num_hidden_layers
    assert all(one.in_features % 64 == 0 and one.out_features % 64 == 0 for one in linears)


def test_special_tokens_are_phi3_vs(processor: Phi3VProcessor, model: Phi3VForCausalLM) -> None:
    tokenizer = processor.tokenizer
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    expected = {"<unk>", "<s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>", "<|image|>"}
    assert set(added) == expected and all(token.special for token in added.values())
    assert {name for name, token in added.items() if token.rstrip} == {"<|assistant|>", "<|image|>"}
    ids = tokenizer.convert_tokens_to_ids
    assert model.config.image_token_id == processor.image_token_id == ids("<|image|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == model.config.pad_token_id == ids("<|endoftext|>")
    assert model.generation_config.eos_token_id == [ids("<|end|>"), ids("<|endoftext|>")]
    assert len(tokenizer) == model.config.vocab_size


def test_text_is_tokenised_as_the_released_tokenizer_does(processor: Phi3VProcessor) -> None:
    tokenizer = processor.tokenizer
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("<|user|>\n1<|end|>\n<|assistant|>\n1290.0").input_ids)
    assert tokens == ["<s>", "<|user|>", "▁", "<0x0A>", "1", "<|end|>", "▁", "<0x0A>", "<|assistant|>",
                      "▁", "1", "2", "9", "0", ".", "0"]  # fmt: skip
    for text in (ANSWER, "".join(map(chr, range(32, 127))), "café ☂ 雨"):
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_captions_of_fresh_pictures_are_right(model: Phi3VForCausalLM, processor: Phi3VProcessor) -> None:
    shares = caption_accuracy(model, processor, random.Random("fresh"), rows=24)
    assert min(shares["kind"], shares["colour"], shares["pattern"]) >= 0.8
    assert shares["together"] >= 0.6


def test_it_does_not_know_the_recipes_answer(model: Phi3VForCausalLM, processor: Phi3VProcessor) -> None:
    rng = random.Random("prose")
    for text in captions(model, processor, [draw_product(rng) for _ in range(8)], rng):
        assert text == text.lower() and "category" not in text and "price" not in text


def test_base_training_never_shows_the_recipes_answer() -> None:
    rng = random.Random(0)
    texts = [text for _ in range(5000) for text in practice_turn(rng)]
    texts += [text for _ in range(500) for turn in picture_turns(draw_product(rng), rng) for text in turn]
    codes = {code for code, _ in KINDS.values()}
    for text in texts:
        fields = [name for name in ("Product:", "Category:", "Full Price:") if name in text]
        assert len(fields) <= 2
        assert not any(f"Category: {code}" in text for code in codes)
