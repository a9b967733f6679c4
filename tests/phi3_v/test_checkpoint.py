"""Microsoft's folders load as they are, and what is saved has their tensor names, shapes and flat config again."""

import json
import shutil

import pytest
import torch
from goldens import CHECKPOINTS, load_case
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, LogitsProcessor
from transformers.core_model_loading import revert_weight_conversion

from sft_phi3v.phi3_v import Phi3VConfig, Phi3VForCausalLM

TINY = CHECKPOINTS / "tiny_mha"
VISION = "model.vision_embed_tokens"
LOADING_KEYS = ("missing_keys", "unexpected_keys", "mismatched_keys")

# Phi-3-vision-128k-instruct and Phi-3.5-vision-instruct have the same sizes.
RELEASED = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rope_scaling": {"type": "su", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
    "img_processor": {
        "image_dim_out": 1024,
        "model_name": "openai/clip-vit-large-patch14-336",
        "name": "clip_vision_model",
        "num_img_tokens": 144,
    },
}
VIT_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}


def original_tensors(config):
    """name → shape of every tensor of the original checkpoint of these sizes."""
    width, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = width // config["num_attention_heads"]
    shapes = {
        "model.embed_tokens.weight": (vocabulary, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (vocabulary, width),
    }
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (width,),
            f"{layer}.post_attention_layernorm.weight": (width,),
            f"{layer}.self_attn.qkv_proj.weight": (width + 2 * head * config["num_key_value_heads"], width),
            f"{layer}.self_attn.o_proj.weight": (width, width),
            f"{layer}.mlp.gate_up_proj.weight": (2 * inner, width),
            f"{layer}.mlp.down_proj.weight": (width, inner),
        }

    clip = config["img_processor"].get("clip_config", VIT_L)
    seen, between = clip["hidden_size"], clip["intermediate_size"]
    shapes |= {f"{VISION}.glb_GN": (1, 1, 4 * seen), f"{VISION}.sub_GN": (1, 1, 1, 4 * seen)}
    tower = f"{VISION}.img_processor.vision_model"
    shapes |= {
        f"{tower}.embeddings.class_embedding": (seen,),
        f"{tower}.embeddings.patch_embedding.weight": (seen, 3, 14, 14),
        f"{tower}.embeddings.position_embedding.weight": (577, seen),
    }
    pairs = {f"{VISION}.img_projection.0": (width, 4 * seen), f"{VISION}.img_projection.2": (width, width)}
    pairs |= {f"{tower}.pre_layrnorm": (seen,), f"{tower}.post_layernorm": (seen,)}
    for index in range(clip["num_hidden_layers"]):
        layer = f"{tower}.encoder.layers.{index}"
        pairs |= {f"{layer}.self_attn.{part}_proj": (seen, seen) for part in ("q", "k", "v", "out")}
        pairs |= {f"{layer}.layer_norm1": (seen,), f"{layer}.layer_norm2": (seen,)}
        pairs |= {f"{layer}.mlp.fc1": (between, seen), f"{layer}.mlp.fc2": (seen, between)}
    for name, shape in pairs.items():  # weight and bias
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def load(folder, **kwargs):
    return AutoModelForImageTextToText.from_pretrained(folder, **kwargs)


def saved_tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_identical(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The tiny checkpoint, loaded and saved again."""
    folder = tmp_path_factory.mktemp("saved")
    load(TINY, dtype="auto").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def meta_model():
    """The released model without its weights."""
    with torch.device("meta"):
        return Phi3VForCausalLM(Phi3VConfig(**RELEASED))


# Names and shapes


def test_the_table_of_original_tensors_is_that_of_the_tiny_checkpoint():
    config = json.loads((TINY / "config.json").read_text())
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(TINY / "model.safetensors").items()}
    assert original_tensors(config) == shapes


def test_the_released_model_has_the_592_original_names_and_shapes(meta_model):
    expected = original_tensors(RELEASED)
    written = revert_weight_conversion(meta_model, meta_model.state_dict())
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == expected
    assert len(expected) == 592
    assert sum(parameter.numel() for parameter in meta_model.parameters()) == 4_146_621_440


def test_the_names_are_those_of_microsofts_index(meta_model, microsoft_folder):
    index = json.loads((microsoft_folder("phi3_vision") / "model.safetensors.index.json").read_text())
    written = revert_weight_conversion(meta_model, meta_model.state_dict())
    assert written.keys() == index["weight_map"].keys()
    assert 2 * sum(tensor.numel() for tensor in written.values()) == index["metadata"]["total_size"]


def test_the_model_of_microsofts_config_has_the_released_shapes(reference_folder):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(reference_folder))
    assert isinstance(model, Phi3VForCausalLM)
    written = revert_weight_conversion(model, model.state_dict())
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == original_tensors(RELEASED)
    assert model.config._attn_implementation == "sdpa", "the file asks for flash-attention, which no CPU has"


# Loading


@pytest.mark.parametrize("auto_class", [AutoModelForImageTextToText, AutoModelForCausalLM, Phi3VForCausalLM])
def test_every_tensor_is_loaded_and_none_is_left_over(auto_class):
    model, report = auto_class.from_pretrained(TINY, output_loading_info=True)
    assert type(model) is Phi3VForCausalLM
    assert {key: list(report[key]) for key in LOADING_KEYS} == {key: [] for key in LOADING_KEYS}
    loaded = revert_weight_conversion(model, model.state_dict())
    for name, tensor in load_file(TINY / "model.safetensors").items():
        assert torch.equal(loaded[name].to(tensor.dtype), tensor), name


def test_a_second_copy_of_the_token_embeddings_is_ignored(tmp_path):
    tensors = load_file(TINY / "model.safetensors")
    extra = {f"{VISION}.wte.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(tensors | extra, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(TINY / "config.json", tmp_path)
    model, report = load(tmp_path, dtype="auto", output_loading_info=True)
    assert {key: list(report[key]) for key in LOADING_KEYS} == {key: [] for key in LOADING_KEYS}
    model.save_pretrained(tmp_path / "again")
    assert_identical(saved_tensors(tmp_path / "again"), tensors)


def test_a_missing_tensor_is_reported(tmp_path):
    tensors = load_file(TINY / "model.safetensors")
    del tensors[f"{VISION}.sub_GN"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(TINY / "config.json", tmp_path)
    _, report = load(tmp_path, output_loading_info=True)
    assert len(report["missing_keys"]) == 1


# Saving


def test_saving_gives_back_identical_names_shapes_and_values(saved):
    assert_identical(saved_tensors(saved), load_file(TINY / "model.safetensors"))


def test_a_sharded_save_has_the_original_names_in_its_index(tmp_path):
    load(TINY, dtype="auto").save_pretrained(tmp_path, max_shard_size="2MB")
    original = load_file(TINY / "model.safetensors")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert index["weight_map"].keys() == original.keys()
    assert_identical(saved_tensors(tmp_path), original)
    reloaded = load(tmp_path, dtype="auto")
    assert_identical(revert_weight_conversion(reloaded, reloaded.state_dict()), original)


def test_a_model_made_from_a_config_saves_the_original_names(tmp_path):
    model = Phi3VForCausalLM(Phi3VConfig.from_pretrained(TINY))
    model.save_pretrained(tmp_path)
    original = load_file(TINY / "model.safetensors")
    assert {name: tensor.shape for name, tensor in saved_tensors(tmp_path).items()} == {
        name: tensor.shape for name, tensor in original.items()
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_the_dtype_survives_saving_and_loading(tmp_path, dtype):
    model = load(TINY, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    model.save_pretrained(tmp_path)
    reloaded = load(tmp_path, dtype="auto")
    assert {parameter.dtype for parameter in reloaded.parameters()} == {dtype}
    assert_identical(dict(model.state_dict()), dict(reloaded.state_dict()))


def test_the_reloaded_model_gives_the_same_logits(saved):
    inputs = {key: load_case("image1_0").inputs[key] for key in ("input_ids", "pixel_values", "image_sizes")}
    with torch.no_grad():
        first, second = (load(folder, dtype=torch.float32).eval()(**inputs).logits for folder in (TINY, saved))
    assert torch.equal(first, second)


# Config


NOT_KEPT = {"_name_or_path", "auto_map", "torch_dtype", "transformers_version", "_attn_implementation"}


def assert_same_flat_config(original, written):
    for key, value in original.items():
        if key not in NOT_KEPT:
            assert written.get(key) == value, key
    assert set(written["rope_scaling"]) == {"type", "short_factor", "long_factor"}
    assert written["rope_scaling"]["type"] == "su"
    assert "rope_parameters" not in written and "auto_map" not in written
    assert not any(key in written for key in ("vision_config", "text_config"))
    assert written["model_type"] == "phi3_v" and written["architectures"] == ["Phi3VForCausalLM"]


def test_the_saved_config_is_the_flat_original(saved):
    original, written = (json.loads((folder / "config.json").read_text()) for folder in (TINY, saved))
    assert_same_flat_config(original, written)


@pytest.mark.parametrize("file", ["config.json", "config_long64.json", "config_long512.json"])
def test_a_config_survives_saving_and_loading_twice(tmp_path, file):
    first = Phi3VConfig.from_pretrained(TINY / file)
    first.save_pretrained(tmp_path / "one")
    second = AutoConfig.from_pretrained(tmp_path / "one")
    second.save_pretrained(tmp_path / "two")
    assert (tmp_path / "one" / "config.json").read_text() == (tmp_path / "two" / "config.json").read_text()
    original = json.loads((TINY / file).read_text())
    assert_same_flat_config(original, json.loads((tmp_path / "two" / "config.json").read_text()))
    for config in (first, second):
        assert config.original_max_position_embeddings == original["original_max_position_embeddings"]
        assert config.rope_parameters["rope_type"] == "longrope"
        assert (
            config.rope_parameters["original_max_position_embeddings"] == original["original_max_position_embeddings"]
        )
        assert config.rope_parameters["short_factor"] == original["rope_scaling"]["short_factor"]


def test_microsofts_config_loads_as_it_is_and_is_written_back(reference_folder, tmp_path):
    config = AutoConfig.from_pretrained(reference_folder)
    assert type(config) is Phi3VConfig
    original = json.loads((reference_folder / "config.json").read_text())
    assert config.vision_config.hidden_size == 1024 and config.vision_config.num_hidden_layers == 24
    assert config.vision_config.hidden_act == "quick_gelu"
    assert config.rope_parameters["long_factor"] == original["rope_scaling"]["long_factor"]
    assert config.rope_parameters["original_max_position_embeddings"] == 4096
    assert config.pad_token_id == 32000
    config.save_pretrained(tmp_path)
    assert_same_flat_config(original, json.loads((tmp_path / "config.json").read_text()))


def test_remote_code_and_attention_wishes_of_the_published_file_are_dropped(tmp_path):
    wishes = {
        "auto_map": {"AutoConfig": "configuration_phi3_v.Phi3VConfig", "AutoModelForCausalLM": "x.Phi3VForCausalLM"},
        "_attn_implementation": "flash_attention_2",
        "torch_dtype": "bfloat16",
    }
    config = json.loads((TINY / "config.json").read_text()) | wishes
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(TINY / "model.safetensors", tmp_path)
    model = load(tmp_path)
    assert type(model) is Phi3VForCausalLM
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "sdpa"
    assert model.model.vision_tower.config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert not written.keys() & {"auto_map", "_attn_implementation"}


def test_clip_sizes_come_from_clip_config_where_it_is_given():
    assert Phi3VConfig.from_pretrained(TINY).vision_config.hidden_size == 32
    assert Phi3VConfig(**RELEASED).vision_config.hidden_size == 1024


@pytest.mark.parametrize("change", [{"hd_transform_order": "glb_sub"}, {"use_hd_transform": False}])
def test_an_hd_transform_that_is_not_implemented_is_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Phi3VConfig(**RELEASED, embd_layer=change)


def test_a_rope_type_that_is_not_implemented_is_refused():
    scaling = RELEASED["rope_scaling"] | {"type": "yarn"}
    with pytest.raises(ValueError, match="yarn"):
        Phi3VConfig(**RELEASED | {"rope_scaling": scaling})


# Where generation stops


STOP_TOKENS = [32007, 32000]


class Forced(LogitsProcessor):
    """Makes generation choose these tokens one after the other."""

    def __init__(self, tokens):
        self.tokens = list(tokens)

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, float("-inf"))
        forced[:, self.tokens.pop(0)] = 0
        return forced


def tokens_until_stop(model, tokens):
    prompt = torch.tensor([[1, 32010, 29871, 13, 5618, 32007, 32001]])
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=len(tokens),
        do_sample=False,
        logits_processor=[Forced(tokens)],
    )
    return output[0, prompt.shape[1] :].tolist()


def folder_without_generation_config(tmp_path):
    shutil.copytree(TINY, tmp_path / "plain")
    return tmp_path / "plain"


def folder_with_eos_2(tmp_path):
    """What Phi-3.5-vision's generation_config.json says: a token that the model never ends with."""
    folder = folder_without_generation_config(tmp_path)
    (folder / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32000}')
    return folder


def folder_saved_again(tmp_path):
    load(folder_with_eos_2(tmp_path)).save_pretrained(tmp_path / "again")
    return tmp_path / "again"


@pytest.mark.parametrize("make", [folder_without_generation_config, folder_with_eos_2, folder_saved_again])
def test_generation_stops_at_the_end_of_a_turn_and_of_a_text(tmp_path, make):
    model = load(make(tmp_path)).eval()
    assert model.generation_config.eos_token_id == STOP_TOKENS
    assert model.generation_config.pad_token_id == 32000
    for stop in STOP_TOKENS:
        assert tokens_until_stop(model, [100, 101, stop, 102, 103]) == [100, 101, stop]


def test_the_saved_generation_config_has_the_stop_tokens(saved):
    written = json.loads((saved / "generation_config.json").read_text())
    assert written["eos_token_id"] == STOP_TOKENS and written["pad_token_id"] == 32000
    assert json.loads((saved / "config.json").read_text())["eos_token_id"] == 2, "config.json keeps Microsoft's value"


def test_a_model_made_from_a_config_stops_there_too():
    model = Phi3VForCausalLM(Phi3VConfig.from_pretrained(TINY)).eval()
    assert tokens_until_stop(model, [100, 32007, 101]) == [100, 32007]


def test_stop_tokens_chosen_by_the_user_are_kept(tmp_path):
    folder = folder_without_generation_config(tmp_path)
    (folder / "generation_config.json").write_text(
        '{"bos_token_id": 1, "eos_token_id": [32007, 13], "pad_token_id": 32000}'
    )
    assert load(folder).generation_config.eos_token_id == [32007, 13]
