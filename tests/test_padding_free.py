"""Batches without padding, and positions without a label left out: another way to the same numbers."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from trl.trainer.utils import add_fused_lm_head

from sft_phi3v import run
from sft_phi3v.collator import IGNORED, Collator, only_supervised, row_numbers
from sft_phi3v.model import load_model
from sft_phi3v.phi3_v import SDPA_BY_ROW, Phi3VForCausalLM, Phi3VProcessor
from sft_phi3v.phi3_v.modeling_phi3_v import Phi3VModel
from sft_phi3v.recipe import load_recipe

REPOSITORY = Path(__file__).resolve().parents[1]
BASE = REPOSITORY / "recipes" / "tiny_base"
pytestmark = pytest.mark.usefixtures("one_thread")


def picture(width, height, seed):
    values = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(values.to(torch.uint8).numpy())


def example(row, *turns, images=()):
    roles = ("user", "assistant") * len(turns)
    messages = [{"role": role, "content": content} for role, content in zip(roles, turns, strict=False)]
    return {"images": list(images), "messages": messages, "row": row}


EXAMPLES = [
    example(0, "What is shown in this image?", "A red coat.", images=[picture(400, 300, 0)]),
    example(1, "Hello?", "Yes."),
    example(
        2, "Two of them.", "A hat, a scarf.", "Which?", "The hat and nothing else.", images=[picture(90, 700, 1)] * 2
    ),
    example(3, "And this one?", "An umbrella.", images=[picture(300, 300, 2)]),
]


@pytest.fixture(scope="module")
def processor():
    return Phi3VProcessor.from_pretrained(BASE, num_crops=1)


def model_of(implementation):
    model = Phi3VForCausalLM.from_pretrained(BASE, dtype=torch.float32, attn_implementation=implementation).train()
    add_fused_lm_head(model)
    return model


def step(model, batch):
    """The loss over all supervised tokens, and all gradients."""
    model.zero_grad()
    loss = model(**batch, fused_lm_head=True).loss
    loss.backward()
    return loss.item(), {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def padded_step(processor, examples=EXAMPLES):
    """The plain way: padded rows, eager attention, logits at all positions, transformers' own loss."""
    model = model_of("eager")
    output = model(**Collator(processor)(examples))
    output.loss.backward()
    return output.loss.item(), {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


@pytest.fixture(scope="module")
def plain(processor):
    return padded_step(processor)


def assert_close(found, expected):
    (loss, gradients), (expected_loss, expected_gradients) = found, expected
    assert loss == pytest.approx(expected_loss, rel=2e-6)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        scale = expected_gradients[name].abs().max()
        # 1e-7: softmax does not see what is added to all keys, so that the gradient of their bias is noise around zero.
        assert (gradient - expected_gradients[name]).abs().max() <= 1e-4 * scale + 1e-7, name


@pytest.mark.parametrize("implementation", ["eager", "sdpa", SDPA_BY_ROW])
@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("supervised", [False, True])
def test_loss_and_gradients_are_those_of_the_padded_batch(processor, plain, implementation, padding_free, supervised):
    batch = Collator(processor, padding_free=padding_free)(EXAMPLES)
    batch = only_supervised(batch) if supervised else batch
    assert_close(step(model_of(implementation), batch), plain)


def test_each_row_gets_the_loss_that_it_gets_alone(processor):
    model = model_of(SDPA_BY_ROW).eval()
    batch = Collator(processor, padding_free=True)(EXAMPLES)
    kept = only_supervised(batch)
    found = model(**kept, fused_lm_head=True).log_probs[0]
    rows = row_numbers(batch)[0][kept["kept_positions"]]
    for number, one in enumerate(EXAMPLES):
        alone = model(**Collator(processor)([one]), fused_lm_head=True)
        assert found[rows == number].sum().item() == pytest.approx(alone.log_probs.sum().item(), rel=1e-5)


def test_a_row_does_not_see_another(processor):
    """Another first row, of the same length, leaves the others' logits as they were, bit for bit."""
    model = model_of(SDPA_BY_ROW).eval()
    batch = Collator(processor, padding_free=True)(EXAMPLES)
    other = example(0, "What is shown in this image?", "A red coat.", images=[picture(400, 300, 9)])
    changed = Collator(processor, padding_free=True)([other, *EXAMPLES[1:]])
    first = int(batch["cu_seq_lens_q"][1])
    before, after = (model(**{k: v for k, v in one.items() if k != "labels"}).logits[0] for one in (batch, changed))
    assert not torch.equal(before[:first], after[:first])
    assert torch.equal(before[first:], after[first:])


def test_a_flattened_batch_holds_no_padding(processor):
    padded = Collator(processor)(EXAMPLES)
    batch = Collator(processor, padding_free=True)(EXAMPLES)
    lengths = padded["attention_mask"].sum(dim=1)
    assert batch.keys() == padded.keys() - {"attention_mask"} | {
        "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"
    }  # fmt: skip
    assert batch["input_ids"].shape == (1, lengths.sum())
    assert batch["cu_seq_lens_q"].tolist() == [0, *lengths.cumsum(0).tolist()]
    assert batch["max_length_q"] == batch["max_length_k"] == lengths.max()
    for row, (ids, labels) in enumerate(zip(padded["input_ids"], padded["labels"], strict=True)):
        mine = (row_numbers(batch) == row)[0]
        assert torch.equal(batch["input_ids"][0][mine], ids[: lengths[row]])
        assert torch.equal(batch["labels"][0][mine], labels[: lengths[row]])
        assert torch.equal(batch["position_ids"][0][mine], torch.arange(lengths[row]))
        assert batch["labels"][0][mine][0] == IGNORED  # or the row before would learn to predict it


@pytest.mark.parametrize("padding_free", [False, True])
def test_what_only_fills_up_a_batch_is_not_learned(processor, padding_free):
    collator = Collator(processor, padding_free=padding_free)
    filled = collator([*EXAMPLES[:2], EXAMPLES[2] | {"repeated": True}])
    assert_close(step(model_of(SDPA_BY_ROW), only_supervised(filled)), padded_step(processor, EXAMPLES[:2]))


@pytest.mark.parametrize("padding_free", [False, True])
def test_a_batch_without_labels_gives_zero_and_gradients(processor, padding_free):
    batch = Collator(processor, padding_free=padding_free)([one | {"repeated": True} for one in EXAMPLES[:2]])
    loss, gradients = step(model_of(SDPA_BY_ROW), only_supervised(batch))
    assert loss == 0
    assert gradients and all(not gradient.any() for gradient in gradients.values())


def test_activation_checkpointing_changes_nothing(processor):
    batch = only_supervised(Collator(processor, padding_free=True)(EXAMPLES))
    expected = step(model_of(SDPA_BY_ROW), batch)
    model = model_of(SDPA_BY_ROW)
    model.activation_checkpointing_enable({"use_reentrant": False})
    loss, gradients = step(model, batch)
    assert loss == expected[0]
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected[1].items())


def test_vision_in_batches_changes_nothing(processor):
    batch = only_supervised(Collator(processor)(EXAMPLES))
    model = model_of("sdpa")
    model.model.vision_tower.requires_grad_(False)
    expected = step(model, batch)
    seen = []
    model.model.vision_tower.embeddings.register_forward_pre_hook(lambda _, crops: seen.append(len(crops[0])))
    model.model.vision_batch_size = 3
    assert_close(step(model, batch), expected)
    assert max(seen) == 3 and sum(seen) == len(batch["pixel_values"]) + len(batch["image_sizes"])


def test_bytes_are_what_pixels_are(processor):
    """The model normalises them, and makes the global crops, to the same bits."""
    pictures = [picture(400, 300, 0), picture(90, 700, 1), picture(300, 300, 2)]
    for num_crops in (1, 2, 4, 16):
        as_pixels = processor.image_processor(pictures, num_crops=num_crops)
        as_bytes = processor.image_processor(pictures, num_crops=num_crops, do_normalize=False)
        assert as_bytes["pixel_values"].dtype == torch.uint8
        assert len(as_bytes["pixel_values"]) == len(as_pixels["pixel_values"]) - len(pictures)
        seen = []
        model = SimpleNamespace(
            vision_batch_size=None, _vision_features=seen.append, _merge_patches=lambda _: torch.zeros(1)
        )
        model.multi_modal_projector = lambda _: None
        model.multi_modal_projector.arrange = lambda *_: None
        for one in (as_pixels, as_bytes):
            Phi3VModel.get_image_features(model, one["pixel_values"], one["image_sizes"])
        assert torch.equal(*seen)


def test_bytes_of_other_pictures_are_refused(processor):
    model = model_of("sdpa")
    batch = Collator(processor)(EXAMPLES)
    with pytest.raises(ValueError, match=r"pixel_values hold .* crops, but image_sizes"):
        model(**{**batch, "pixel_values": batch["pixel_values"][1:]})
    with pytest.raises(ValueError, match="the model would normalise with"):
        processor.image_processor([EXAMPLES[0]["images"][0]], do_normalize=False, image_mean=[0.5, 0.5, 0.5])


RUN = {
    "model_name_or_path": str(BASE),
    "max_steps": 3,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "per_device_train_batch_size": 3,
    "per_device_eval_batch_size": 2,
    "generation_rows": 0,
    "eval_rows": 1,
    "max_new_tokens": 1,
}


def test_a_run_without_padding_learns_what_one_with_padding_learns(write_recipe, tmp_path):
    logged = {}
    for padding_free in (False, True):
        folder = tmp_path / str(padding_free)
        run.main([write_recipe(**RUN, padding_free=padding_free, output_dir=str(folder))])
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        keys = ("loss", "grad_norm", "eval_loss", "eval_mean_token_accuracy", "num_supervised_tokens", "num_tokens")
        logged[padding_free] = [entry[key] for entry in history for key in keys if key in entry]
    assert logged[True] == pytest.approx(logged[False], rel=1e-5)
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("False", "True"))
    worst = max(float((first[name] - second[name]).abs().max()) for name in first)
    assert worst < 1e-5 < max(float(weight.abs().max()) for weight in first.values())


def test_attention_that_knows_rows_itself_is_left_as_it_is(write_recipe):
    recipe = load_recipe([write_recipe(**RUN, padding_free=True)])
    assert load_model(recipe).config._attn_implementation == SDPA_BY_ROW
    assert load_model(load_recipe([write_recipe(**RUN)])).config._attn_implementation == "sdpa"
    flex = load_recipe([write_recipe(**RUN, padding_free=True, attn_implementation="flex_attention")])
    assert load_model(flex).config._attn_implementation == "flex_attention"
    with pytest.raises(ValueError, match=r"eager.*Write `attn_implementation: sdpa`"):
        load_recipe([write_recipe(**RUN, padding_free=True, attn_implementation="eager")])


def test_a_window_is_not_forgotten(processor):
    """transformers' `sdpa` says it by a mask, which rows without one have not."""
    batch = Collator(processor, padding_free=True)(EXAMPLES)
    model = model_of(SDPA_BY_ROW)
    model.config.sliding_window = batch["max_length_q"]
    for layer in model.model.language_model.layers:
        layer.self_attn.config.sliding_window = batch["max_length_q"]
    model(**batch)
    for layer in model.model.language_model.layers:
        layer.self_attn.config.sliding_window = batch["max_length_q"] - 1
    with pytest.raises(ValueError, match="sliding_window"):
        model(**batch)


def test_the_recipe_keeps_padding_free(write_recipe, tmp_path):
    recipe = load_recipe([write_recipe(padding_free=True)])
    assert recipe.padding_free and not recipe.training.padding_free  # TRL would refuse it with pictures
    assert load_recipe([str(recipe.save(tmp_path / "saved"))]).padding_free
    assert not load_recipe([write_recipe()]).padding_free
