"""The merged folder holds the model that was trained, says so in numbers, and is not there if it does not."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import bitsandbytes
import pytest
import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sft_phi3v import merge, run
from sft_phi3v.evaluation import Completion
from sft_phi3v.model import load_trained
from sft_phi3v.phi3_v import Phi3VConfig, Phi3VForCausalLM, Phi3VProcessor
from sft_phi3v.recipe import load_recipe

BASE = Path(__file__).resolve().parents[1] / "recipes" / "tiny_base"
QKV = "model.layers.0.self_attn.qkv_proj.weight"


pytestmark = pytest.mark.usefixtures("one_thread")


def report(folder):
    return json.loads((folder / "merged" / "merge_report.json").read_text())


def hashes(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_weights_are_those_that_the_live_model_multiplies_by(merged_run):
    """Worked out here from the 4-bit storage and the adapter's files; nothing of PEFT's merging is used."""
    recipe = load_recipe([str(merged_run / "recipe.yaml")])
    live = load_trained(recipe, merged_run).get_base_model()
    adapter = load_file(merged_run / "adapter_model.safetensors")
    written = load_file(merged_run / "merged" / "model.safetensors")
    settings = json.loads((merged_run / "adapter_config.json").read_text())
    for layer in range(4):
        for module in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
            inside = f"model.language_model.layers.{layer}.{module}"
            stored = live.get_submodule(inside).base_layer.weight
            weight = bitsandbytes.functional.dequantize_4bit(stored.data, stored.quant_state).float()
            lora_a, lora_b = (adapter[f"base_model.model.{inside}.lora_{side}.weight"] for side in "AB")
            weight += settings["lora_alpha"] / settings["r"] * (lora_b @ lora_a)
            assert torch.equal(written[f"model.layers.{layer}.{module}.weight"], weight.bfloat16()), inside


def test_the_folder_is_complete_and_in_microsofts_form(merged_run):
    folder = merged_run / "merged"
    assert {path.name for path in folder.iterdir()} == {
        *("model.safetensors", "config.json", "generation_config.json", "merge_report.json", "recipe.yaml"),
        *("chat_template.jinja", "preprocessor_config.json", "processor_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "LICENSE"),
    }
    assert (folder / "LICENSE").read_bytes() == (BASE / "LICENSE").read_bytes()
    with (
        safe_open(folder / "model.safetensors", "pt") as written,
        safe_open(BASE / "model.safetensors", "pt") as base,
    ):
        assert set(written.keys()) == set(base.keys())
        for name in base.keys():  # noqa: SIM118
            assert written.get_slice(name).get_shape() == base.get_slice(name).get_shape()
            assert written.get_slice(name).get_dtype() == "BF16"
        # What was never adapted is the base's, to the bit.
        for name in ("lm_head.weight", "model.vision_embed_tokens.img_projection.0.weight", "model.norm.weight"):
            assert torch.equal(written.get_tensor(name), base.get_tensor(name).bfloat16())
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert config["rope_scaling"]["type"] == "su"
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [893, 890]
    text = "<|user|>\nWhat is this?<|end|>\n<|assistant|>\n"
    before, after = Phi3VProcessor.from_pretrained(merged_run), Phi3VProcessor.from_pretrained(folder)
    assert after(text=text)["input_ids"] == before(text=text)["input_ids"]
    assert after.image_processor.num_crops == before.image_processor.num_crops
    recipe = (folder / "recipe.yaml").read_text()
    assert "/" not in re.sub(r"<\|.*?\|>", "", recipe), "a local path"
    assert load_recipe([str(folder / "recipe.yaml")]).task.answer == "Colour: {label}."


def test_the_report_says_what_was_compared_and_of_which_files(merged_run):
    found = report(merged_run)
    assert found["verified"] and not found["problems"]
    numbers = found["against_live_adapter"]
    assert numbers["rows"] == numbers["same_completions"] == 3
    assert numbers["positions"] == 3 * 5  # a short answer of five tokens
    assert 0 < numbers["relative_error"] < 0.01
    assert found["layers"]["adapted"] == 16
    assert 0 < found["layers"]["max_relative_error"] < 0.004
    assert found["scores"]["trained"] == found["scores"]["merged"]
    files = hashes(merged_run / "merged")
    del files["merge_report.json"]
    assert found["files"] == files
    assert found["adapter"].keys() == {"adapter_config.json", "adapter_model.safetensors"}


def test_merging_twice_gives_identical_files(merged_run, finished_run, capsys):
    folder, argv = finished_run
    merge.main(argv)
    first = hashes(folder / "merged")
    merge.main(argv)
    assert hashes(folder / "merged") == first
    assert {path.name for path in folder.iterdir() if path.name.startswith(".")} == {".lock", ".merge.lock"}
    assert "merged and verified" in capsys.readouterr().out


def test_the_original_weights_fit_less_well_and_the_report_says_so(finished_run, merged_run, capsys):
    folder, argv = finished_run
    merge.main([*argv, "--merge_base", "original", "--compare_bases", "true"])
    found, quantised = report(folder), report(merged_run)
    assert found["merged_into"] == "original"
    assert found["against_live_adapter"]["relative_error"] < 0.01  # the arithmetic is right
    assert found["against_trained_model"]["relative_error"] > 5 * quantised["against_trained_model"]["relative_error"]
    told = capsys.readouterr().out
    for name in ("trained ", "merged into the original base", "merged into the quantised base"):
        assert f"\n{name}" in told
    assert "against the model that was trained" in told


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"use_rslora": True, "bnb_4bit_quant_type": "fp4", "use_bnb_nested_quant": None},
        {"adapt": ["language_model", "projector", "vision_tower"]},
        {"load_in_4bit": None, "use_bnb_nested_quant": None},
        {"load_in_4bit": None, "use_bnb_nested_quant": None, "use_peft": None, "lora_r": None},
    ],
    ids=lambda changes: "-".join(f"{key}={value}" for key, value in changes.items()),
)
def test_every_way_to_train_merges(changes, write_recipe, tmp_path, capsys):
    base = str(Path(__file__).resolve().parents[1] / "recipes" / "tiny_base")  # a smaller vocabulary: half the time
    path = write_recipe(**changes, model_name_or_path=base, max_steps=2, learning_rate=1e-2, eval_rows=1)
    run.main([path])
    merge.main([path])
    numbers = report(tmp_path / "out")["against_live_adapter"]
    assert numbers["relative_error"] < 0.01
    written = load_file(tmp_path / "out" / "merged" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in written.values())


@pytest.mark.slow
def test_a_checkpoint_can_be_merged_instead(write_recipe, tmp_path):
    path = write_recipe(save_steps=2, max_steps=4, eval_rows=1)
    run.main([path])
    merge.main([path, "--adapter", str(tmp_path / "out" / "checkpoint-2")])
    halfway = load_file(tmp_path / "out" / "merged" / "model.safetensors")
    merge.main([path])
    assert not torch.equal(load_file(tmp_path / "out" / "merged" / "model.safetensors")[QKV], halfway[QKV])


def test_what_differs_is_not_called_merged(finished_run, monkeypatch, capsys):
    folder, argv = finished_run
    merge.main(argv)
    before = hashes(folder / "merged")

    def forgetful(layer):
        return merge.dequantize_module_weight(layer.get_base_layer())

    monkeypatch.setattr(merge, "_merged_weight", forgetful)
    told = r"(?s)does not equal.*layers: 16 of 16 give something else.*logits: relative error \d.*merged\.refused"
    with pytest.raises(SystemExit, match=told):
        merge.main(argv)
    assert hashes(folder / "merged") == before  # an earlier one stays
    refused = json.loads((folder / "merged.refused" / "merge_report.json").read_text())
    assert not refused["verified"] and refused["problems"]


@pytest.mark.parametrize("share", [0.0, 0.5, 2.0])
def test_one_layer_that_is_forgotten_or_scaled_wrongly_is_named(share, finished_run, monkeypatch):
    """Even where the adapter has changed so little that no logit would tell."""
    folder, argv = finished_run
    weights = load_file(folder / "adapter_model.safetensors")
    small = {name: weight * (0.5 if "lora_B" in name else 1) for name, weight in weights.items()}
    save_file(small, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    right, layers = merge._merged_weight, []

    def wrong(layer):
        layers.append(layer)
        if len(layers) != 3:
            return right(layer)
        base = merge.dequantize_module_weight(layer.get_base_layer()).float()
        return base + share * (right(layer) - base)

    monkeypatch.setattr(merge, "_merged_weight", wrong)
    with pytest.raises(SystemExit, match=r"layers: 1 of 16 give something else than the live ones, such as model\."):
        merge.main(argv)


def test_a_model_that_no_longer_stops_is_found():
    def observed(*stopped):
        scores = {"parsed": 1.0, "stopped": sum(stopped) / len(stopped), "fields": {}}
        completions = [Completion(row, "", "", stop) for row, stop in enumerate(stopped)]
        return merge.Observed(torch.eye(4), completions, scores, {})

    def problems(merged, **layers):
        return merge.differences(merge.Attempt("quantised", observed(*[True] * 4), merged, layers, {}), 0.02)

    assert problems(observed(*[True] * 3, False), first=0.009) == []  # one row is always allowed
    assert problems(observed(True, True, False, False)) == [
        "completions: others in 2 of 4 rows",
        "stopped: 100.0% → 50.0% of 4 rows",
    ]
    (problem,) = problems(observed(*[True] * 4), first=0.001, second=0.02, third=float("nan"))
    assert problem.startswith("layers: 2 of 3 give something else than the live ones, such as second")


def test_the_numbers_of_a_comparison():
    def observed(logits, texts=("a",)):
        return merge.Observed(logits, [Completion(0, "", text, True) for text in texts], {}, {})

    logits = torch.tensor([[3.0, 1.0, -4.0], [0.0, 5.0, -5.0]])
    shifted = logits + torch.tensor([[7.0], [0.0]])  # no probability changes
    found = merge.compare(observed(logits, "ab"), observed(shifted, "ac"))
    assert (found.relative_error, found.same_next_token, found.max_difference) == (pytest.approx(0, abs=1e-7), 1.0, 7.0)
    assert (found.rows, found.same_completions, found.positions) == (2, 1, 2)
    assert found.mean_difference == 3.5
    other = logits.clone()
    other[0, :2] = torch.tensor([1.0, 3.0])
    found = merge.compare(observed(logits), observed(other))
    assert found.same_next_token == 0.5
    assert found.relative_error == pytest.approx((8 / 76) ** 0.5)
    scored = {"parsed": 1.0, "stopped": 1.0, "fields": {}}
    broken = merge.Observed(torch.full((2, 3), float("nan")), [Completion(0, "", "a", True)], scored, {})
    right = merge.Observed(logits, [Completion(0, "", "a", True)], scored, {})
    assert "relative error nan%" in merge.differences(merge.Attempt("original", right, broken, {}, {}), 0.02)[0]


def test_large_models_are_sharded(finished_run, monkeypatch):
    folder, argv = finished_run
    merge.main(argv)
    whole = load_file(folder / "merged" / "model.safetensors")
    monkeypatch.setattr(merge, "SHARD_SIZE", 1_000_000)
    merge.main(argv)
    shards = sorted(path.name for path in (folder / "merged").glob("*.safetensors"))
    assert len(shards) > 1 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((folder / "merged" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in whole.values())
    joined = {name: weight for shard in shards for name, weight in load_file(folder / "merged" / shard).items()}
    assert joined.keys() == whole.keys()
    assert all(torch.equal(joined[name], whole[name]) for name in whole)
    model, loading = Phi3VForCausalLM.from_pretrained(folder / "merged", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert model.dtype == torch.bfloat16


def test_without_room_on_the_disk_it_does_not_begin(finished_run, monkeypatch):
    folder, argv = finished_run
    monkeypatch.setattr(merge.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1_000))
    with pytest.raises(SystemExit, match=r"takes 0\.0 GB, and the disk of .* has 0\.0 GB free"):
        merge.main(argv)
    assert not [path.name for path in folder.iterdir() if "merged" in path.name]


def test_cut_while_writing_it_leaves_nothing_that_looks_merged(finished_run, monkeypatch):
    folder, argv = finished_run

    class PowerCut(Exception):
        pass

    def cut(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise PowerCut

    with monkeypatch.context() as patch:
        patch.setattr(merge, "save_file", cut)
        with pytest.raises(PowerCut):
            merge.main(argv)
    assert not (folder / "merged").exists()
    merge.main(argv)
    assert report(folder)["verified"]


def test_the_processor_that_was_saved_is_the_one_that_is_proved(finished_run, monkeypatch):
    _, argv = finished_run
    right = Phi3VProcessor.save_pretrained

    def wrong(self, save_directory, **kwargs):
        files = right(self, save_directory, **kwargs)
        for name in ("preprocessor_config.json", "processor_config.json"):
            path = Path(save_directory, name)
            path.write_text(path.read_text().replace('"num_crops": 1', '"num_crops": 4'))
        return files

    monkeypatch.setattr(Phi3VProcessor, "save_pretrained", wrong)
    with pytest.raises(SystemExit, match=r"does not equal"):
        merge.main(argv)


@pytest.mark.parametrize("change", [{"eos_token_id": 893}, {"repetition_penalty": 1.3}])
def test_so_are_the_settings_of_generation(change, finished_run, monkeypatch):
    _, argv = finished_run
    right = merge.complete

    def wrong(recipe, trained, collator, folder):
        right(recipe, trained, collator, folder)
        path = folder / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    monkeypatch.setattr(merge, "complete", wrong)
    with pytest.raises(SystemExit, match=r"generation_config: "):
        merge.main(argv)


def test_one_merge_at_a_time_and_only_into_a_folder(finished_run, tmp_path):
    folder, argv = finished_run
    with FileLock(folder / ".merge.lock"), pytest.raises(SystemExit, match=r"is being merged already"):
        merge.main(argv)
    (folder / "merged").symlink_to(tmp_path)
    with pytest.raises(SystemExit, match=r"merged' is not a folder"):
        merge.main(argv)


def test_what_cannot_be_merged_is_said_before_anything_is_loaded(write_recipe, finished_run, tmp_path, monkeypatch):
    folder, argv = finished_run
    monkeypatch.setattr(merge, "load_trained", lambda *args, **kwargs: pytest.fail("loaded"))
    with pytest.raises(SystemExit, match=r"holds no trained model .* Train first: accelerate launch"):
        merge.main([write_recipe()])
    with pytest.raises(SystemExit, match=r"trained by another recipe .it differs in lora_r."):
        merge.main([*argv, "--lora_r", "4"])
    record = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": "else/where"}
    (folder / "adapter_config.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit, match=r"trained on 'else/where' .it records so."):
        merge.main(argv)
    with pytest.raises(SystemExit, match=r"`merge_tolerance` is 2.0, expected a share"):
        merge.main([*argv, "--merge_tolerance", "2"])


def test_a_changed_weight_is_seen_by_its_hash(merged_run, tmp_path):
    shutil.copytree(merged_run / "merged", tmp_path / "merged")
    path = tmp_path / "merged" / "model.safetensors"
    before = merge.file_hashes(tmp_path / "merged", "**/*")
    weights = load_file(path)
    weights[QKV][0, 0] += 0.125
    save_file(weights, path, metadata={"format": "pt"})
    after = merge.file_hashes(tmp_path / "merged", "**/*")
    assert {name for name in before if before[name] != after[name]} == {"model.safetensors"}


def test_other_engines_find_what_they_read(merged_run):
    """As vLLM 0.32, mlx-vlm 0.7 and lmdeploy 0.18 read it; docs/publish.md says which of these were run."""
    folder = merged_run / "merged"
    texts = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    config = texts["config.json"]
    assert (config["model_type"], config["architectures"]) == ("phi3_v", ["Phi3VForCausalLM"])
    for key in (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "max_position_embeddings", "original_max_position_embeddings", "image_token_id"),
    ):
        assert isinstance(config[key], int), key  # mlx-vlm has no default for num_key_value_heads
    assert {"rms_norm_eps", "rope_theta", "tie_word_embeddings"} <= config.keys()
    assert "rope_parameters" not in config
    assert config["rope_scaling"].keys() == {"type", "short_factor", "long_factor"}
    factors = config["hidden_size"] // config["num_attention_heads"] // 2
    assert [len(config["rope_scaling"][key]) for key in ("short_factor", "long_factor")] == [factors, factors]
    assert {"name", "image_dim_out", "num_img_tokens"} <= config["img_processor"].keys()
    embedding = {"use_hd_transform": True, "with_learnable_separator": True, "hd_transform_order": "sub_glb"}
    assert config["embd_layer"] | embedding == config["embd_layer"]
    processor = texts["preprocessor_config.json"]
    assert processor["image_processor_type"] == "Phi3VImageProcessor"
    assert processor["num_img_tokens"] == 144
    inner = texts["processor_config.json"]["image_processor"]
    assert all(processor[key] == inner[key] for key in ("num_crops", "image_mean", "image_std"))
    assert texts["processor_config.json"]["processor_class"] == "Phi3VProcessor"
    tokenizer = texts["tokenizer_config.json"]
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"  # transformers 4 knows no other of ours
    assert "extra_special_tokens" not in tokenizer
    assert (tokenizer["bos_token"], tokenizer["eos_token"], tokenizer["pad_token"]) == ("<s>", *["<|endoftext|>"] * 2)
    assert not [name for name, text in texts.items() if "auto_map" in json.dumps(text)]  # it would name missing code
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert len(names) == 400 - (24 - 3) * 16 + 6 * config["num_hidden_layers"]  # 24 layers of CLIP: 592 with 32
    inside = ("vision_tower", "language_model", "multi_modal_projector", "lora_", "base_layer", "rotary", ".wte.")
    assert not [name for name in names if any(part in name for part in inside)]


def test_the_published_sizes_give_microsofts_592_names():
    layers = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}
    config = Phi3VConfig(hidden_size=3072, intermediate_size=8192, vocab_size=32064, **layers)
    weights = merge.disk_weights(config)
    assert len(weights) == 592
    assert sum(weight.numel() for _, weight in weights.values()) == 4_146_621_440
    assert {name: tuple(weights[name][1].shape) for name in (QKV, "model.vision_embed_tokens.sub_GN")} == {
        QKV: (9216, 3072),
        "model.vision_embed_tokens.sub_GN": (1, 1, 1, 4096),
    }
    assert config.to_dict()["img_processor"]["model_name"] == "openai/clip-vit-large-patch14-336"  # for lmdeploy
