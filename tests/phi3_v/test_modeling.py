"""The model computes what the released code computes: decoder inputs, hidden states, logits, loss, gradients, tokens.

The tolerances are those of the goldens' README, for float32; the smallest real mistake tried there (tanh-GELU instead
of exact GELU in the projector) is ten times larger.
"""

import functools
import inspect
from types import SimpleNamespace

import pytest
import torch
from goldens import CHECKPOINTS, IMAGE_TOKEN, PAD_TOKEN, image_token_count, load_case, model_cases, padded_pixels
from transformers.core_model_loading import revert_weight_conversion

from sft_phi3v.phi3_v import Phi3VConfig, Phi3VForCausalLM

IMPLEMENTATIONS = ("sdpa", "eager")
CHECKPOINT = sorted(path.name for path in CHECKPOINTS.iterdir())[-1]  # tiny_mha, which is always there


def fresh_model(checkpoint=CHECKPOINT, config="config.json", implementation="sdpa", **kwargs):
    config = Phi3VConfig.from_pretrained(CHECKPOINTS / checkpoint / config)
    model = Phi3VForCausalLM.from_pretrained(
        CHECKPOINTS / checkpoint, config=config, dtype=torch.float32, attn_implementation=implementation, **kwargs
    )
    return model.eval()


shared_model = functools.cache(fresh_model)  # never changed by a test; gradients are cleared by whoever makes them


def original_names(model, tensors):
    """{name in memory: tensor} → {name in the checkpoint: tensor}"""
    return revert_weight_conversion(model, dict(tensors))


def gradients(model):
    """Gradient of every parameter by its name in the checkpoint; zeros where there is none. Clears them."""
    found = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }
    model.zero_grad(set_to_none=True)
    return original_names(model, found)


def decoder_inputs_and_output(model, run):
    """Runs `run()` and returns its result with what went into and came out of the decoder."""
    seen = {}

    def before(module, args, kwargs):
        seen["inputs_embeds"] = kwargs["inputs_embeds"].detach()

    def after(module, args, output):
        seen["last_hidden"] = output.last_hidden_state.detach()

    decoder = model.model.language_model
    handles = [decoder.register_forward_pre_hook(before, with_kwargs=True), decoder.register_forward_hook(after)]
    try:
        return run(), seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture(
    scope="module",
    params=[(name, way) for name in model_cases(generation=False) for way in IMPLEMENTATIONS],
    ids="-".join,
)
def computed(request):
    """One forward and backward pass of a golden case; the tests below each look at one part of it."""
    name, implementation = request.param
    case = load_case(name)
    model = shared_model(case.meta["checkpoint"], case.meta["config"], implementation)
    output, seen = decoder_inputs_and_output(model, lambda: model(**case.inputs, use_cache=False))
    output.loss.backward()
    logits = output.logits.detach()
    top2 = logits.topk(2).values
    batch, position = case.expected["pos_batch"].long(), case.expected["pos_seq"].long()
    return SimpleNamespace(
        case=case,
        loss=output.loss.item(),
        logits_sub=logits[batch, position][:, case.expected["vocab_cols"].long()],
        logsumexp=logits.logsumexp(-1),
        argmax=logits.argmax(-1),
        margin=top2[..., 0] - top2[..., 1],
        inputs_embeds_sub=seen["inputs_embeds"][batch, position],
        last_hidden_sub=seen["last_hidden"][batch, position],
        gradients=gradients(model),
    )


def test_decoder_inputs_equal_the_reference(computed):
    expected = computed.case.expected["inputs_embeds_sub"]
    torch.testing.assert_close(computed.inputs_embeds_sub, expected, atol=5e-5, rtol=0)


def test_last_hidden_states_equal_the_reference(computed):
    torch.testing.assert_close(
        computed.last_hidden_sub, computed.case.expected["last_hidden_sub"], atol=1e-4, rtol=1e-4
    )


def test_logits_equal_the_reference(computed):
    torch.testing.assert_close(computed.logits_sub, computed.case.expected["logits_sub"], atol=1e-4, rtol=1e-4)


def test_logsumexp_over_the_full_vocabulary_equals_the_reference(computed):
    real = computed.case.expected["argmax"] >= 0  # -1 at padding
    torch.testing.assert_close(computed.logsumexp[real], computed.case.expected["logsumexp"][real], atol=1e-4, rtol=0)


def test_argmax_equals_the_reference(computed):
    expected = computed.case.expected["argmax"].long()
    decided = (expected >= 0) & (computed.margin > 1e-3)
    assert decided.sum() >= 0.99 * (expected >= 0).sum()
    assert torch.equal(computed.argmax[decided], expected[decided])


def test_loss_equals_the_reference(computed):
    assert computed.loss == pytest.approx(computed.case.meta["loss"], abs=2e-5)


def test_gradient_of_every_parameter_equals_the_reference(computed):
    norms = computed.case.meta["grad_norm"]
    assert computed.gradients.keys() == norms.keys()
    for name, expected in norms.items():
        norm = computed.gradients[name].norm().item()
        if expected is None:
            assert norm == 0, f"{name} should get no gradient"
        else:
            assert norm == pytest.approx(expected, rel=1e-3, abs=1e-6), name
    for key, expected in computed.case.expected.items():
        if key.startswith("grad."):
            name = key.removeprefix("grad.")
            actual = computed.gradients[name].flatten()[: len(expected)]
            assert (actual - expected).abs().max() <= 1e-3 * norms[name], name


@pytest.mark.parametrize(
    ("implementation", "use_cache"),
    [("sdpa", True), ("eager", True), ("sdpa", False)],
    ids=["sdpa", "eager", "sdpa-no-cache"],
)
@pytest.mark.parametrize("name", model_cases(generation=True))
def test_greedy_generation_is_token_exact(name, implementation, use_cache):
    case = load_case(name)
    model = shared_model(case.meta["checkpoint"], case.meta["config"], implementation)
    output = generate(model, case, use_cache=use_cache)
    prompt = case.inputs["input_ids"]
    assert torch.equal(output.sequences[:, : prompt.shape[1]], prompt), "the prompt part comes back as it went in"
    assert output.sequences[:, prompt.shape[1] :].tolist() == case.meta["new_tokens"]
    logits = torch.stack(output.logits, dim=1)[..., case.expected["vocab_cols"].long()]
    torch.testing.assert_close(logits, case.expected["step_logits_sub"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("padding", [1, 4, 30])
def test_generation_crosses_the_longrope_switch_where_the_positions_do_however_much_is_padded(padding):
    """Columns that are padding in every row (pad_to_multiple_of) do not move the switch, with a cache or without."""
    case = load_case("gen_cross_0")
    model = shared_model(case.meta["checkpoint"], case.meta["config"])
    ids = torch.nn.functional.pad(case.inputs["input_ids"], (padding, 0), value=PAD_TOKEN)
    padded = SimpleNamespace(inputs={"input_ids": ids, "attention_mask": (ids != PAD_TOKEN).long()}, meta=case.meta)
    for use_cache in (True, False):
        new = generate(model, padded, use_cache=use_cache).sequences[:, ids.shape[1] :].tolist()
        assert new == case.meta["new_tokens"], f"use_cache={use_cache}"


def generate(model, case, **kwargs):
    settings = {
        "max_new_tokens": case.meta["max_new_tokens"],
        "do_sample": False,
        "eos_token_id": 32000,
        "pad_token_id": PAD_TOKEN,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    return model.generate(**case.inputs, **settings | kwargs)


def only(case, *keys):
    return {key: case.inputs[key] for key in keys if key in case.inputs}


PICTURE_KEYS = ("input_ids", "attention_mask", "pixel_values", "image_sizes")


@pytest.fixture(scope="module")
def model():
    return shared_model()


@pytest.fixture
def own_model():
    """A model that the test may change."""
    return fresh_model()


@pytest.fixture(scope="module")
def one_picture():
    return load_case("image1_0")


@pytest.fixture(scope="module")
def two_pictures():
    return load_case("image2_0")


# Pixels


@pytest.mark.parametrize("fill", [0.0, 7.5])
@pytest.mark.parametrize("name", ["image1_0", "image2_0", "batch_left_0"])
def test_padding_crops_of_the_original_form_change_nothing(model, name, fill):
    case = load_case(name)
    inputs = only(case, "input_ids", "attention_mask", "position_ids", "pixel_values", "image_sizes")
    with torch.no_grad():
        flat = model(**inputs).logits
        padded = model(**inputs | {"pixel_values": padded_pixels(inputs, crops=6, fill=fill)}).logits
    assert torch.equal(flat, padded)


@pytest.mark.parametrize("form", ["flat", "padded"])
def test_only_real_crops_and_only_the_needed_layers_go_through_clip(model, two_pictures, form):
    inputs = only(two_pictures, *PICTURE_KEYS)
    real_crops = len(inputs["pixel_values"])
    if form == "padded":
        inputs["pixel_values"] = padded_pixels(inputs, crops=9)
    tower = model.model.vision_tower
    crops, layers, final_norm = [], [], []
    handles = [tower.embeddings.patch_embedding.register_forward_hook(lambda *args: crops.append(len(args[2])))]
    for index, layer in enumerate(tower.encoder.layers):
        handles.append(layer.register_forward_hook(lambda *args, index=index: layers.append(index)))
    handles.append(tower.post_layernorm.register_forward_hook(lambda *args: final_norm.append(True)))
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    assert sum(crops) == real_crops
    assert sorted(set(layers)) == list(range(len(tower.encoder.layers) - 1))
    assert final_norm == []


@pytest.mark.parametrize(("use_cache", "expected"), [(True, 1), (False, 5)])
def test_pictures_are_encoded_once_per_generation_with_a_cache(model, one_picture, use_cache, expected):
    case = SimpleNamespace(inputs=only(one_picture, *PICTURE_KEYS), meta={"max_new_tokens": 5})
    calls = []
    convolution = model.model.vision_tower.embeddings.patch_embedding
    handle = convolution.register_forward_hook(lambda *args: calls.append(True))
    try:
        generate(model, case, use_cache=use_cache)
    finally:
        handle.remove()
    assert len(calls) == expected


def test_a_sampled_image_token_does_not_end_a_cached_generation(model, one_picture):
    def force(input_ids, scores):
        return torch.zeros_like(scores).index_fill(1, torch.tensor([IMAGE_TOKEN]), 1.0)

    case = SimpleNamespace(inputs=only(one_picture, *PICTURE_KEYS), meta={"max_new_tokens": 4})
    output = generate(model, case, logits_processor=[force])
    assert output.sequences[0, -4:].tolist() == [IMAGE_TOKEN] * 4


def test_image_features_are_one_row_per_image_token(model, two_pictures):
    inputs = only(two_pictures, "pixel_values", "image_sizes")
    with torch.no_grad():
        features = model.get_image_features(**inputs)
    counts = [image_token_count(height, width) for height, width in inputs["image_sizes"].tolist()]
    assert features.shape == (sum(counts), model.config.hidden_size)
    assert counts == [int(count) for count in counts]
    assert (two_pictures.inputs["input_ids"] == IMAGE_TOKEN).sum() == sum(counts)


def test_a_picture_changes_the_logits_after_it_and_none_before(model, one_picture):
    inputs = only(one_picture, *PICTURE_KEYS)
    first = int((inputs["input_ids"][0] == IMAGE_TOKEN).nonzero()[0])
    with torch.no_grad():
        seen = model(**inputs).logits
        other = model(**inputs | {"pixel_values": -inputs["pixel_values"]}).logits
    assert torch.equal(seen[:, :first], other[:, :first])
    assert (seen[:, -1] - other[:, -1]).abs().max() > 0.1


def test_the_ids_given_are_not_changed(model, one_picture):
    inputs = {key: value.clone() for key, value in one_picture.inputs.items()}
    with torch.no_grad():
        model(**inputs)
    assert all(torch.equal(value, one_picture.inputs[key]) for key, value in inputs.items())


# Mismatches are errors, never ignored


def both_numbers(first, second):
    return rf"(?s)(\b{first}\b.*\b{second}\b|\b{second}\b.*\b{first}\b)"


def test_pixels_without_image_tokens_are_refused(model, one_picture):
    inputs = only(one_picture, *PICTURE_KEYS)
    count = image_token_count(*inputs["image_sizes"].tolist()[0])
    inputs["input_ids"] = torch.where(inputs["input_ids"] == IMAGE_TOKEN, 100, inputs["input_ids"])
    with pytest.raises(ValueError, match=both_numbers(0, count)):
        model(**inputs)


def test_image_tokens_without_pixels_are_refused(model, one_picture):
    count = image_token_count(*one_picture.inputs["image_sizes"].tolist()[0])
    with pytest.raises(ValueError, match=both_numbers(count, 0)):
        model(**only(one_picture, "input_ids", "attention_mask"))


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_refuses_image_tokens_without_pixels(model, one_picture, use_cache):
    with pytest.raises(ValueError, match="pixel"):
        model.generate(**only(one_picture, "input_ids", "attention_mask"), max_new_tokens=2, use_cache=use_cache)


@pytest.mark.parametrize("missing", [1, 100])
def test_truncated_image_tokens_are_refused(model, one_picture, missing):
    inputs = only(one_picture, *PICTURE_KEYS)
    count = image_token_count(*inputs["image_sizes"].tolist()[0])
    start = int((inputs["input_ids"][0] == IMAGE_TOKEN).nonzero()[0])
    inputs["input_ids"] = torch.cat([inputs["input_ids"][:, :start], inputs["input_ids"][:, start + missing :]], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with pytest.raises(ValueError, match=both_numbers(count - missing, count)):
        model(**inputs)


def test_one_picture_too_many_is_refused(model, two_pictures):
    inputs = only(two_pictures, *PICTURE_KEYS)
    inputs["image_sizes"] = torch.cat([inputs["image_sizes"], inputs["image_sizes"][:1]])
    height, width = inputs["image_sizes"][0].tolist()
    extra = height // 336 * (width // 336) + 1
    inputs["pixel_values"] = torch.cat([inputs["pixel_values"], inputs["pixel_values"][:extra]])
    counts = [image_token_count(*size) for size in inputs["image_sizes"].tolist()]
    with pytest.raises(ValueError, match=both_numbers(sum(counts[:2]), sum(counts))):
        model(**inputs)


def test_pictures_in_another_order_than_their_image_tokens_are_refused(model):
    case = load_case("image2_0")
    sizes = case.inputs["image_sizes"]
    counts = [image_token_count(*size) for size in sizes.tolist()]
    assert counts[0] != counts[1], "the case has pictures of different sizes"
    crops = case.inputs["pixel_values"].split([height // 336 * (width // 336) + 1 for height, width in sizes.tolist()])
    inputs = only(case, *PICTURE_KEYS) | {"image_sizes": sizes.flip(0), "pixel_values": torch.cat(crops[::-1])}
    with pytest.raises(ValueError, match=both_numbers(*counts)):
        model(**inputs)


@pytest.mark.parametrize("change", [-1, 1])
def test_crops_that_do_not_belong_to_image_sizes_are_refused(model, one_picture, change):
    inputs = only(one_picture, *PICTURE_KEYS)
    crops = len(inputs["pixel_values"])
    pixels = torch.cat([inputs["pixel_values"], inputs["pixel_values"]])[: crops + change]
    with pytest.raises(ValueError, match=both_numbers(crops, crops + change)):
        model(**inputs | {"pixel_values": pixels})


def test_a_padded_picture_with_too_few_crops_is_refused(model):
    case = load_case("image2_0")
    inputs = only(case, *PICTURE_KEYS)
    with pytest.raises(ValueError):
        model(**inputs | {"pixel_values": padded_pixels(inputs, crops=6)[:, :2]})


def test_pixels_without_image_sizes_are_refused(model, one_picture):
    with pytest.raises(ValueError, match="image_sizes"):
        model(**only(one_picture, "input_ids", "attention_mask", "pixel_values"))


# Loss


def test_loss_with_num_items_in_batch_is_the_sum_over_that_number(model, one_picture):
    labels = one_picture.meta["num_label_positions"]
    with torch.no_grad():
        mean = model(**one_picture.inputs).loss
        divided = model(**one_picture.inputs, num_items_in_batch=4 * labels).loss
        tensor = model(**one_picture.inputs, num_items_in_batch=torch.tensor(4 * labels)).loss
    torch.testing.assert_close(divided, mean / 4, atol=2e-6, rtol=0)
    torch.testing.assert_close(tensor, divided)


def test_accumulated_rows_give_the_loss_and_gradients_of_the_whole_batch():
    case = load_case("batch_right_0")
    model = shared_model(case.meta["checkpoint"], case.meta["config"])
    model(**case.inputs).loss.backward()
    together = gradients(model)
    ids, mask, labels = (case.inputs[key] for key in ("input_ids", "attention_mask", "labels"))
    total = int((labels[:, 1:] != -100).sum())
    sizes = case.inputs["image_sizes"]
    crops = case.inputs["pixel_values"].split([height // 336 * (width // 336) + 1 for height, width in sizes.tolist()])
    tokens = [image_token_count(*size) for size in sizes.tolist()]
    losses, used = [], 0
    for row in range(len(ids)):
        length = int(mask[row].sum())
        inputs = {"input_ids": ids[row : row + 1, :length], "labels": labels[row : row + 1, :length]}
        count, here = int((ids[row] == IMAGE_TOKEN).sum()), used
        while sum(tokens[here:used]) < count:
            used += 1
        if used > here:
            inputs |= {"pixel_values": torch.cat(crops[here:used]), "image_sizes": sizes[here:used]}
        loss = model(**inputs, num_items_in_batch=total).loss
        loss.backward()
        losses.append(loss.item())
    assert used == len(tokens)
    assert sum(losses) == pytest.approx(case.meta["loss"], abs=2e-5)
    for name, gradient in gradients(model).items():
        limit = max(1e-3 * together[name].norm().item(), 1e-6)
        torch.testing.assert_close(gradient, together[name], atol=limit, rtol=0)


def test_logits_to_keep_gives_the_same_logits_at_fewer_positions(model, one_picture):
    inputs = only(one_picture, *PICTURE_KEYS)
    with torch.no_grad():
        everything = model(**inputs).logits
        last = model(**inputs, logits_to_keep=3).logits
        chosen = model(**inputs, logits_to_keep=torch.tensor([2, 5])).logits
    torch.testing.assert_close(last, everything[:, -3:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(chosen, everything[:, [2, 5]], atol=1e-5, rtol=1e-5)


def test_the_base_model_gives_the_hidden_states_that_the_head_reads(model, one_picture):
    """TRL's fused head calls `model.base_model(**batch).last_hidden_state` and `model.lm_head` itself."""
    assert model.base_model is model.model
    assert model.get_output_embeddings() is model.lm_head
    inputs = only(one_picture, *PICTURE_KEYS)
    with torch.no_grad():
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
        torch.testing.assert_close(model.lm_head(hidden), model(**inputs).logits, atol=1e-5, rtol=1e-5)


# Training


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_equal_gradients(own_model, two_pictures, use_reentrant):
    own_model.train()
    own_model(**two_pictures.inputs, use_cache=False).loss.backward()
    plain = gradients(own_model)
    own_model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        own_model.enable_input_require_grads()
    calls = {"decoder": 0, "vision": 0}

    def count(part):
        calls[part] += 1

    parts = own_model.model
    parts.language_model.layers[0].input_layernorm.register_forward_hook(lambda *args: count("decoder"))
    parts.vision_tower.encoder.layers[0].layer_norm1.register_forward_hook(lambda *args: count("vision"))
    own_model(**two_pictures.inputs, use_cache=False).loss.backward()
    assert calls == {"decoder": 2, "vision": 2}, "each layer was computed again in the backward pass"
    checkpointed = gradients(own_model)
    assert checkpointed.keys() == plain.keys()
    for name in plain:
        assert torch.allclose(checkpointed[name], plain[name], atol=1e-5, rtol=1e-4), name


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("input_grads", [False, True], ids=["plain-inputs", "inputs-require-grads"])
def test_a_frozen_vision_tower_builds_no_graph(own_model, one_picture, input_grads, checkpointing):
    own_model.train()
    own_model.model.vision_tower.requires_grad_(False)
    own_model.model.multi_modal_projector.requires_grad_(False)
    if checkpointing:
        own_model.activation_checkpointing_enable({"use_reentrant": False})
    if input_grads:
        own_model.enable_input_require_grads()
    features = own_model.get_image_features(**only(one_picture, "pixel_values", "image_sizes"))
    assert not features.requires_grad

    own_model.model.multi_modal_projector.requires_grad_(True)
    graphs = []
    for layer in own_model.model.vision_tower.encoder.layers:
        layer.register_forward_hook(lambda *args: graphs.append(args[2].grad_fn))
    own_model(**one_picture.inputs, use_cache=False).loss.backward()
    assert graphs and set(graphs) == {None}
    assert all(parameter.grad is None for parameter in own_model.model.vision_tower.parameters())
    assert all(parameter.grad is not None for parameter in own_model.model.multi_modal_projector.parameters())


def test_a_text_only_batch_touches_no_vision_parameter(own_model):
    case = load_case("text_0")
    own_model(**case.inputs).loss.backward()
    vision = [*own_model.model.vision_tower.parameters(), *own_model.model.multi_modal_projector.parameters()]
    assert all(parameter.grad is None for parameter in vision)


def test_dropout_free_train_mode_gives_the_same_loss_as_eval_mode(own_model, one_picture):
    assert own_model.train()(**one_picture.inputs).loss.item() == pytest.approx(one_picture.meta["loss"], abs=2e-5)


# Batches


def test_left_padded_rows_give_the_logits_of_the_rows_alone(model):
    long, short = load_case("image1_0"), load_case("text_0")
    rows = [long.inputs["input_ids"][0], short.inputs["input_ids"][0]]
    width = max(len(row) for row in rows) + 3  # padding in every row
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=PAD_TOKEN) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    pixels = only(long, "pixel_values", "image_sizes")
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask, position_ids=positions, **pixels).logits[:, -1]
        alone = [model(**only(case, *PICTURE_KEYS)).logits[0, -1] for case in (long, short)]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-4, rtol=1e-4)


def test_batched_left_padded_generation_equals_the_rows_alone(model):
    long, short = load_case("image1_0"), load_case("text_0")
    rows = [long.inputs["input_ids"][0], short.inputs["input_ids"][0]]
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=PAD_TOKEN) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()
    inputs = {"input_ids": ids, "attention_mask": mask} | only(long, "pixel_values", "image_sizes")
    together = generate(model, SimpleNamespace(inputs=inputs, meta={"max_new_tokens": 6})).sequences[:, width:]
    for row, case in zip(together, (long, short), strict=True):
        alone = SimpleNamespace(inputs=only(case, *PICTURE_KEYS), meta={"max_new_tokens": 6})
        length = case.inputs["input_ids"].shape[1]
        assert generate(model, alone).sequences[0, length:].tolist() == row.tolist()


def test_bfloat16_stays_near_float32(one_picture):
    inputs = only(one_picture, *PICTURE_KEYS)
    with torch.no_grad():
        exact = shared_model()(**inputs).logits
        rough = fresh_model().to(torch.bfloat16)(**inputs).logits
    difference = (rough.float() - exact).abs()
    assert difference.mean() < 0.05 and difference.max() < 0.6  # the reference itself: 0.016 and 0.25


# What the libraries around it rely on


def test_sdpa_is_the_default_for_the_whole_model():
    config = Phi3VConfig.from_pretrained(CHECKPOINTS / CHECKPOINT / "config.json")
    model = Phi3VForCausalLM.from_pretrained(CHECKPOINTS / CHECKPOINT, config=config)
    for part in (model, model.model, model.model.vision_tower, model.model.language_model):
        assert part.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_attention_implementation_reaches_both_towers(implementation):
    model = shared_model(implementation=implementation)
    assert model.model.vision_tower.config._attn_implementation == implementation
    assert model.model.language_model.config._attn_implementation == implementation


def test_what_trl_and_peft_look_up_is_there(model):
    assert model.base_model_prefix == "model"
    assert model.get_input_embeddings() is model.model.language_model.embed_tokens
    assert model.config.get_text_config().hidden_size == model.config.hidden_size
    assert "kwargs" in inspect.signature(model.prepare_inputs_for_generation).parameters
    assert model.supports_gradient_checkpointing
    assert "Phi3DecoderLayer" in model._no_split_modules
    assert model.config.image_token_id == IMAGE_TOKEN


@pytest.mark.parametrize("form", ["crops", "padded crops", "bytes"])
def test_beams_and_samples_see_their_own_rows_pictures(form):
    """Two rows with two and one pictures of several crops each: every copy of a row must get that row's pictures."""
    model = shared_model()
    rows = [load_case(name) for name in ("image2_0", "image1_0")]
    length = max(row.inputs["input_ids"].shape[1] for row in rows)
    ids = torch.full((2, length), PAD_TOKEN)
    for index, row in enumerate(rows):
        ids[index, -row.inputs["input_ids"].shape[1] :] = row.inputs["input_ids"][0]
    sizes = torch.cat([row.inputs["image_sizes"] for row in rows])
    pixels = torch.cat([row.inputs["pixel_values"] for row in rows])
    if form == "bytes":
        noise = torch.Generator().manual_seed(0)
        local = int((sizes // 336).prod(dim=1).sum())
        pixels = torch.randint(0, 256, (local, 3, 336, 336), dtype=torch.uint8, generator=noise)
    if form == "padded crops":
        counts = ((sizes // 336).prod(dim=1) + 1).tolist()
        pixels = torch.nn.utils.rnn.pad_sequence(pixels.split(counts), batch_first=True)
    expanded, kwargs = model._expand_inputs_for_generation(
        expand_size=3, input_ids=ids, attention_mask=(ids != PAD_TOKEN).long(), pixel_values=pixels, image_sizes=sizes
    )
    with torch.no_grad():
        plain = model(ids, attention_mask=(ids != PAD_TOKEN).long(), pixel_values=pixels, image_sizes=sizes).logits[
            :, -1
        ]
        copies = model(expanded, **kwargs).logits[:, -1]
    assert torch.allclose(copies, plain.repeat_interleave(3, dim=0), atol=1e-5)
    assert not torch.allclose(plain[0], plain[1], atol=1e-2)


def test_a_tuple_is_returned_where_it_is_asked_for():
    case = load_case("text_0")
    output = shared_model()(input_ids=case.inputs["input_ids"], return_dict=False)
    assert isinstance(output, tuple)
