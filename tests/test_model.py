"""What is quantised, what is adapted, and what is refused."""

import re
from types import MethodType

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm

from sft_phi3v import model as model_module
from sft_phi3v import run
from sft_phi3v.model import kernels_line, landing_table, load_config, load_model, load_processor, lora_config
from sft_phi3v.phi3_v import Phi3VConfig, Phi3VForCausalLM
from sft_phi3v.recipe import load_recipe


@pytest.fixture(scope="module")
def meta_model(tiny_folder):
    with torch.device("meta"):
        return Phi3VForCausalLM(Phi3VConfig.from_pretrained(tiny_folder))


def adapted(model):
    return sorted(
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    )


def test_four_bit_takes_the_language_models_linears_and_nothing_else(write_recipe):
    model = load_model(load_recipe([write_recipe()]))
    quantised = {name for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    kinds = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert quantised == {f"model.language_model.layers.{layer}.{kind}" for layer in range(2) for kind in kinds}
    assert model.lm_head.weight.dtype == torch.float32
    state = model.model.language_model.layers[0].mlp.down_proj.weight.quant_state
    assert state.nested  # double quantisation, as the recipe says
    assert state.quant_type == "nf4"


def test_the_model_reads_as_many_crops_at_a_time_as_the_recipe_says(write_recipe):
    assert load_model(load_recipe([write_recipe(vision_batch_size=3)])).model.vision_batch_size == 3


@pytest.mark.parametrize(
    ("adapt", "expected"),
    [
        (["language_model"], r"model\.language_model\..*(qkv_proj|o_proj|gate_up_proj|down_proj)"),
        (["projector"], r"model\.multi_modal_projector\.linear_[12]"),
        # Layer 2 is CLIP's last one of three: its output is never used.
        (["vision_tower"], r"model\.vision_tower\.encoder\.layers\.[01]\..*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"),
    ],
)
def test_adapters_land_in_the_named_part_and_on_every_linear_of_it(write_recipe, meta_model, adapt, expected):
    recipe = load_recipe([write_recipe(adapt=adapt, load_in_4bit=None)])
    config = lora_config(recipe, meta_model)
    linears = [name for name, module in meta_model.named_modules() if isinstance(module, torch.nn.Linear)]
    wanted = sorted(name for name in linears if re.fullmatch(expected, name))
    assert wanted
    assert sorted(name for name in linears if re.fullmatch(config.target_modules, name)) == wanted


def test_all_parts_together(write_recipe, tiny_folder):
    recipe = load_recipe([write_recipe(adapt=["language_model", "projector", "vision_tower"])])
    model = load_model(recipe)
    model = get_peft_model(model, lora_config(recipe, model))
    assert len(adapted(model)) == 2 * 4 + 2 + 2 * 6
    table = landing_table(model)
    assert re.search(r"language_model .* 8 +8 +[\d,]+ +4-bit nf4 \+ float32", table)
    assert re.search(r"vision_tower .* 0 +12 ", table)
    assert re.search(r"lm_head +2,052,096 +0 +0 +0 +float32", table)


def test_a_four_bit_weight_is_counted_by_the_numbers_it_stands_for(write_recipe):
    recipe = load_recipe([write_recipe()])
    quantised = load_model(recipe)
    plain = load_model(load_recipe([write_recipe(load_in_4bit=None, use_bnb_nested_quant=None)]))
    quantised, plain = (get_peft_model(m, lora_config(recipe, m)) for m in (quantised, plain))
    numbers = [re.search(r"language_model +([\d,]+)", landing_table(m))[1] for m in (quantised, plain)]
    language_model = plain.base_model.model.model.language_model
    expected = sum(p.numel() for name, p in language_model.named_parameters() if ".lora_" not in name)
    assert numbers == [f"{expected:,}"] * 2


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "v_proj"], r"lands elsewhere than `adapt: \['language_model'\]` says: 0 in language_model"),
        (["qkv_proj", "k_proj"], "lands elsewhere"),
        (["qkv_proj", "wq"], r"'wq' hits no module"),
        (["qkv_proj", "lm_head"], "lands elsewhere"),
        ("all-linear", "'all-linear' also adapts layers that are never computed"),
        (r".*language_model.*typo", "hits no module"),
    ],
)
def test_targets_that_miss_are_refused_with_the_right_names(write_recipe, meta_model, targets, message):
    recipe = load_recipe([write_recipe(lora_target_modules=targets)])
    with pytest.raises(ValueError, match=f"lora_target_modules: .*{message}") as error:
        lora_config(recipe, meta_model)
    assert "qkv_proj, o_proj, gate_up_proj and down_proj" in str(error.value)


def test_targets_of_ones_own_are_taken_where_they_hit(write_recipe, meta_model):
    recipe = load_recipe([write_recipe(lora_target_modules=["qkv_proj", "down_proj"])])
    assert set(lora_config(recipe, meta_model).target_modules) == {"qkv_proj", "down_proj"}


def test_clips_last_layer_may_not_be_adapted(write_recipe, meta_model):
    recipe = load_recipe([write_recipe(lora_target_modules=["fc1"], adapt=["vision_tower"])])
    with pytest.raises(ValueError, match="last layer, which is never computed"):
        lora_config(recipe, meta_model)


def test_nothing_to_train_is_an_error(meta_model):
    frozen = Phi3VForCausalLM(meta_model.config).requires_grad_(False)
    with pytest.raises(ValueError, match="Nothing would be trained"):
        landing_table(frozen)


def test_a_model_of_another_kind_is_refused_by_name(write_recipe, tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    CLIPVisionModel(CLIPVisionConfig(**sizes)).save_pretrained(tmp_path / "clip")
    recipe = load_recipe([write_recipe(model_name_or_path=str(tmp_path / "clip"))])
    for load in (load_config, load_processor, load_model):
        with pytest.raises(ValueError, match=r"model_name_or_path: '.*clip' is a 'clip.*' model, expected 'phi3_v'"):
            load(recipe)


def test_a_model_that_is_not_there_is_refused_by_name(write_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in (str(tmp_path / "nowhere"), "nobody/no-such-model"):
        with pytest.raises(ValueError, match=f"model_name_or_path: '{name}' cannot be read"):
            load_config(load_recipe([write_recipe(model_name_or_path=name)]))


def test_missing_weights_are_an_error_not_random_numbers(write_recipe, tiny_folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_folder, tmp_path / "holes")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.vision_embed_tokens.glb_GN"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    recipe = load_recipe([write_recipe(model_name_or_path=str(folder), load_in_4bit=None, use_bnb_nested_quant=None)])
    with pytest.raises(ValueError, match=r"lacks 1 tensors, such as 'model\.multi_modal_projector\.separator'"):
        load_model(recipe)


def test_evaluating_a_four_bit_model_on_a_cpu_does_not_change_its_gradients(write_recipe):
    """Where the CPU has AVX512-BF16, bitsandbytes would repack the weights on the first evaluation for good."""
    recipe = load_recipe([write_recipe(lora_dropout=0.0)])
    ids = torch.arange(5, 45).view(1, -1)

    def gradients(evaluate_first):
        torch.manual_seed(0)
        model = load_model(recipe)
        model = get_peft_model(model, lora_config(recipe, model))
        if evaluate_first:
            model.eval()
            with torch.no_grad():
                model(input_ids=ids)
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, evaluated = gradients(False), gradients(True)
    assert plain.keys() == evaluated.keys()
    assert all(torch.equal(plain[name], evaluated[name]) for name in plain)
    assert all(plain[name].abs().sum() > 0 for name in plain if "lora_B" in name)


def test_the_cpu_guard_is_set_whatever_this_cpu_can_do(write_recipe, monkeypatch):
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    model_module.quantization_config(load_recipe([write_recipe()]))
    assert bitsandbytes.nn.modules.has_avx512bf16() is False


def test_num_crops_of_the_recipe_reaches_the_processor(write_recipe):
    assert load_processor(load_recipe([write_recipe(num_crops=4)])).image_processor.num_crops == 4
    assert load_processor(load_recipe([write_recipe()])).image_processor.num_crops == 1


@pytest.mark.parametrize("quantise", [{}, {"load_in_4bit": None, "use_bnb_nested_quant": None}])
def test_a_cpu_recipe_stays_on_the_cpu_of_a_machine_with_a_gpu(write_recipe, monkeypatch, quantise):
    recipe = load_recipe([write_recipe(**quantise)])
    seen = {}

    def stop(*args, **kwargs):
        seen.update(kwargs)
        raise InterruptedError

    monkeypatch.setattr(Phi3VForCausalLM, "from_pretrained", stop)
    with pytest.raises(InterruptedError):
        load_model(recipe)
    assert seen["device_map"] == {"": "cpu"}


def test_eight_bit_linears_are_counted_as_quantised(write_recipe):
    keys = {"load_in_4bit": None, "use_bnb_nested_quant": None, "load_in_8bit": True}
    recipe = load_recipe([write_recipe(**keys)])
    model = load_model(recipe)
    assert re.search(r"language_model +[\d,]+ +8 ", landing_table(get_peft_model(model, lora_config(recipe, model))))


def test_flash_attention_can_be_asked_for(write_recipe):
    keys = {"load_in_4bit": None, "use_bnb_nested_quant": None, "attn_implementation": "flash_attention_2"}
    # Not "does not support": only the package is missing.
    with pytest.raises(ImportError, match=r"FlashAttention2.*installed"):
        load_model(load_recipe([write_recipe(**keys)]))


def test_kernels_are_asked_for_by_who_trains_and_nobody_else(write_recipe, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(Phi3VForCausalLM, "set_use_kernels", lambda self, given, *_: asked.append(given))
    recipe = load_recipe([write_recipe(use_kernels=True)])
    load_model(recipe)
    model_module.load_named(recipe, str(recipe.model.model_name_or_path))
    assert asked == [False, False]
    load_model(recipe, kernels=True)
    assert asked[2:] == [True]
    monkeypatch.setattr(run, "check_kernels", lambda recipe: None)
    with pytest.raises(ValueError, match="`use_kernels: true` changed none of the 5 norms"):
        run.set_up(recipe)
    assert asked[3:] == [True], "the run asks for them"


def test_kernels_that_are_used_are_counted(write_recipe, monkeypatch):
    """`kernelize` is not here: it gives each layer another `forward`, or the same one again where it has none."""
    model = load_model(load_recipe([write_recipe()]))
    kernelized = []

    def kernelize(self, given):
        kernelized.append(self.training)
        for name, module in self.named_modules():
            if isinstance(module, Phi3RMSNorm):
                forward = (lambda self, x: x) if "layers" in name else type(module).forward
                module.forward = MethodType(forward, module)

    monkeypatch.setattr(Phi3VForCausalLM, "set_use_kernels", kernelize)
    model._use_kernels = True
    assert kernels_line(get_peft_model(model, LoraConfig(target_modules=["qkv_proj"]))).startswith(
        "kernels: 4 of 5 norms are fused"
    )
    assert kernelized == [True, False] and not model.training
