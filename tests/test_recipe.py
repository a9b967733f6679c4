"""Every recipe of the repository loads, and every way to get a key wrong is refused in the user's words."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig

from sft_phi3v.recipe import (
    DEFAULTS,
    REFUSED,
    RENAMED,
    RESUMABLE,
    PrepareArguments,
    PreviewArguments,
    PublishArguments,
    Recipe,
    ScoringArguments,
    TaskArguments,
    as_text,
    differences,
    help_text,
    load_recipe,
)

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPES = sorted((REPOSITORY / "recipes").glob("*.yaml"))
MINIMAL = "model_name_or_path: m\ndataset_name: d\noutput_dir: out\nuse_cpu: true\nbf16: false\n"
TRL_PARTS = (ScriptArguments, ModelConfig, SFTConfig, DatasetMixtureConfig)
TRL_KEYS = {field.name for part in TRL_PARTS for field in dataclasses.fields(part)}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def load(text: str = "", *argv: str, base: str = MINIMAL) -> Recipe:
    Path("a.yaml").write_text(base + text)
    return load_recipe(["a.yaml", *argv])


def refused(*args: str, **keys: str) -> str:
    with pytest.raises(ValueError) as caught:
        load(*args, **keys)
    return str(caught.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_survives_being_saved(path, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    recipe = load_recipe([str(path)])
    saved = recipe.save(tmp_path / "out")
    assert load_recipe([str(saved)]) == recipe
    assert sorted(os.listdir(tmp_path / "out")) == ["recipe.yaml"]


def test_burberry_says_what_it_needs():
    recipe = load_recipe([str(REPOSITORY / "recipes" / "burberry.yaml")])
    assert recipe.model.model_name_or_path == "microsoft/Phi-3-vision-128k-instruct"
    assert (recipe.model.dtype, recipe.model.load_in_4bit, recipe.model.use_bnb_nested_quant) == (
        "bfloat16",
        True,
        True,
    )
    assert recipe.task.answer == "Product: {title}, Category: {category3_code}, Full Price: {full_price}"
    assert recipe.training.bf16 and recipe.training.report_to == ["wandb"]
    assert os.environ["WANDB_PROJECT"] == "sft-phi3v"
    assert 30 <= len(recipe.settings) <= 62


def test_our_own_keys_are_these():
    ours = [field.name for field in dataclasses.fields(TaskArguments)]
    assert ours == [
        *("prompt", "answer", "image_column", "num_crops", "held_out", "overlong", "nonfinite", "adapt"),
        *("eval_rows", "generation_rows", "max_new_tokens", "generation_batch_size", "max_tokens_per_batch"),
        *("checkpointed_layers", "use_kernels", "feature_cache", "vision_batch_size"),
    ]
    of_preview = [field.name for field in dataclasses.fields(PreviewArguments)]
    assert of_preview == ["sizes", "gpu", "gpus", "gpu_price", "efficiency"]
    of_scoring = [field.name for field in dataclasses.fields(ScoringArguments)]
    assert of_scoring == ["model", "split", "limit"]
    of_prepare = [field.name for field in dataclasses.fields(PrepareArguments)]
    assert of_prepare == [
        *("source", "source_image_column", "group_column", "stratify_column", "placeholders", "duplicates"),
        *("near_duplicates", "min_side", "max_pixels", "max_bytes", "downscale", "fetch_connections"),
        *("fetch_per_host", "fetch_timeout", "fetch_attempts", "workers", "engine", "push", "prepare"),
    ]
    of_publishing = [field.name for field in dataclasses.fields(PublishArguments)]
    assert of_publishing == [
        *("adapter", "merge_base", "compare_bases", "merge_rows", "merge_tolerance"),
        *("what", "license", "language", "card_examples", "dry_run", "replace"),
    ]
    ours += of_prepare + of_preview + of_scoring + of_publishing
    assert not TRL_KEYS & set(ours)
    assert all(f"--{key} " in help_text() for key in ours)


def test_the_lists_of_keys_match_the_installed_libraries():
    deprecated = {"gradient_checkpointing", "gradient_checkpointing_kwargs"}
    assert set(RENAMED) & TRL_KEYS == deprecated, "these keys exist (again)"
    assert set(REFUSED) <= TRL_KEYS and set(DEFAULTS) <= TRL_KEYS
    named = {word.split(":")[0] for advice in RENAMED.values() for word in advice.split("`")[1::2]}
    unknown = named - TRL_KEYS - {"adapt", "max_tokens_per_batch", "min_num_params", "transformer_layer_cls_to_wrap"}
    assert {word for word in unknown if " " not in word} == set(), "advice names a key that does not exist"


def test_the_command_line_overrides_the_file():
    argv = ["--num_crops", "4", "--lora-r=8", "--learning_rate", "1e-3", "--adapt", "projector", "vision_tower"]
    argv += ["--use_peft", "--max_steps", "-1", "--optim_args", "a=b", "--report_to", "none", "--max_length", "null"]
    argv += ["--checkpointed_layers", "5"]
    recipe = load("num_crops: 16\nmax_length: 9\n", *argv)
    assert (recipe.task.num_crops, recipe.model.lora_r, recipe.training.learning_rate) == (4, 8, 1e-3)
    assert recipe.task.adapt == ["projector", "vision_tower"] and recipe.model.use_peft is True
    assert (recipe.training.max_steps, recipe.training.max_length, recipe.training.report_to) == (-1, None, [])
    assert recipe.training.optim_args == "a=b"
    assert recipe.task.checkpointed_layers == 5 and load("", "--checkpointed_layers", "auto") == load(
        "checkpointed_layers: auto\n"
    )


@pytest.mark.parametrize(
    "text",
    ['"{title} # {price:.2f}"', "yes", "3", "Is it: red?", "[a]", "1e-4", "{a}"],
)
def test_typed_text_stays_as_it_was_typed(text):
    assert load("", "--prompt", text).task.prompt == text


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("learning_rate: 1e-4", "learning_rate", 1e-4),  # text to YAML 1.1
        ("save_steps: 100", "save_steps", 100),
        ("warmup_steps: 0.03", "warmup_steps", 0.03),
        ("adapt: projector\nuse_peft: true", "adapt", ["projector"]),
        ("lora_target_modules: .*qkv_proj", "lora_target_modules", ".*qkv_proj"),
        ("lr_scheduler_kwargs: {num_cycles: 2}", "lr_scheduler_kwargs", {"num_cycles": 2}),
        ("report_to: [wandb, tensorboard]", "report_to", ["wandb", "tensorboard"]),
        ("max_length: null", "max_length", None),
        ("eval_strategy: 'no'", "eval_strategy", "no"),
        ("resume_from_checkpoint: 'true'", "resume_from_checkpoint", "true"),
        ("resume_from_checkpoint: true", "resume_from_checkpoint", "true"),
        ("resume_from_checkpoint: false", "resume_from_checkpoint", "false"),
        ("train_sampling_strategy: sequential", "train_sampling_strategy", "sequential"),
        ("use_peft: true\ndtype: bfloat16", "dtype", "bfloat16"),
        ("checkpointed_layers: auto", "checkpointed_layers", "auto"),
        ("checkpointed_layers: '12'", "checkpointed_layers", 12),
        ("checkpointed_layers: null", "checkpointed_layers", None),
    ],
)
def test_what_a_file_may_say(line, key, value):
    assert load(line).settings[key] == value


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("lora_r: 16.5", "a.yaml: `lora_r` is 16.5, expected a whole number."),
        ("lora_r: true", "`lora_r` is True, expected a whole number."),
        ("num_crops: [1]", "`num_crops` is [1], expected a whole number or null."),
        ("checkpointed_layers: most", "`checkpointed_layers` is 'most', expected a whole number or auto or null."),
        ("checkpointed_layers: true", "`checkpointed_layers` is True, expected a whole number or auto or null."),
        ("checkpointed_layers: -1", "`checkpointed_layers` is -1, expected 0 or more, or auto."),
        ("checkpointed_layers: 3\nactivation_checkpointing: false", "which is for none. Keep one of them."),
        (
            "checkpointed_layers: auto\nactivation_checkpointing_kwargs: {every_n_layers: 2}",
            "`checkpointed_layers` and `every_n_layers` both say how many layers recompute.",
        ),
        ("num_crops: 0", "`num_crops` is 0, expected 1 or more."),
        ("held_out: 1.5", "`held_out` is 1.5, expected a share"),
        ("held_out: 0", "`held_out` is 0, expected a share"),
        ("use_peft: true\nadapt: []", "`adapt` is empty"),
        ("adapt: [projektor]", "expected a list of one of language_model, projector, vision_tower."),
        ("overlong: cut", "`overlong` is 'cut', expected one of error, drop."),
        ("dtype: bfloat32", "expected one of auto, bfloat16, float16, float32 or null."),
        ("loss_type: nnl", "`loss_type` is 'nnl', expected one of nll, dft, chunked_nll. Did you mean 'nll'?"),
        ("optim: adamw_tourch", "Did you mean 'adamw_torch'?"),
        ("lr_scheduler_type: cosin", "Did you mean 'cosine'?"),
        ("eval_strategy: no", "YAML reads a bare no as false: write 'no' in quotes."),
        ("run_name: 2024", "`run_name` is 2024, expected text or null. Put it in quotes: '2024'."),
        ("packing: maybe", "`packing` is 'maybe', expected true or false."),
        ("learning_rate: fast", "`learning_rate` is 'fast', expected a number."),
        ("lr_scheduler_kwargs: [1]", "expected a mapping or text or null."),
        ("lora_target_modules: {a: 1}", "expected text or a list of text or null."),
        ("include_for_metrics: [1]", "expected a list of text."),
        ("num_crop: 4", "`num_crop` is not a recipe key. Did you mean `num_crops`?"),
        ("lora-r: 4", "`lora-r` is not a recipe key. Did you mean `lora_r`?"),
        ("zzz: 4", "`zzz` is not a recipe key. `--help` lists"),
        ("2: 4", "`2` is not a recipe key."),
        ("torch_dtype: bfloat16", "`torch_dtype: bfloat16` is a key of older releases: write `dtype`."),
        ("max_seq_length: 9", "write `max_length`"),
        ("warmup_ratio: 0.1", "write `warmup_steps`, which takes a fraction"),
        ("gradient_checkpointing: false", "write `activation_checkpointing`"),
        ("lora_r: 4\nlora_r: 8", "`lora_r` is written twice, in lines 6 and 7."),
        ("lr_scheduler_kwargs: {a: 1, b: 2}\nlr_scheduler_kwargs: {a: 1}", "written twice"),
        ("packing: true", "`packing: True` is refused: a picture's tokens"),
        ("assistant_only_loss: true", "is refused: the collator supervises"),
        ("completion_only_loss: false", "is refused: the collator supervises"),
        (
            "use_liger_kernel: true",
            "`use_liger_kernel: True` is refused: Liger knows no phi3_v",
        ),
        ("liger_kernel_config: {rms_norm: true}", "is refused: Liger knows no phi3_v"),
        ("streaming: true", "is refused: write `dataset_streaming`, which goes for `datasets` too"),
        ("test_split_size: 0.1", "is refused: write `held_out`"),
        ("dataset_streaming: true\nauto_find_batch_size: true", "rows are shared out by the batch"),
        (
            "dataset_streaming: true\ntrain_sampling_strategy: batch_rebalance",
            "needs every row's length: remove `dataset_streaming`.",
        ),
        ("datasets: [{path: a}]", "`datasets` and `dataset_name` are both given: keep one of them."),
        ("datasets: a", "`datasets` is 'a', expected a list of a mapping."),
        ("datasets: []", "`datasets` is empty: list data sets, such as {path: data/coats}, or write `dataset_name`."),
        ("datasets: [{path: a}, {split: b}]", "`datasets`, number 2: `path` is missing"),
        ("datasets: [{path: a, weight: 2}]", "`datasets`, number 1: `weight` is not one of its keys, which are path,"),
        ("datasets: [{path: a, columns: 3}]", "number 1: `columns` is 3, expected a list of text or null."),
        ("datasets: [{path: a, fraction: 0}]", "`fraction` is 0, expected a number above 0."),
        ("datasets: [{path: a, fraction: 1}, {path: b}]", "Give it to all of them or to none."),
        ("dataset_text_field: caption", "is refused: what the model reads is said by `prompt` and `answer`"),
        ("remove_unused_columns: true", "is refused"),
        ("load_in_4bit: true\nload_in_8bit: true\nuse_peft: true\ndtype: bfloat16", "are both true. Keep one."),
        ("load_in_4bit: true\ndtype: bfloat16", "without `use_peft: true`"),
        ("load_in_4bit: true\nuse_peft: true", "`load_in_4bit: true` computes in `dtype`, which is missing. Write"),
        ("load_in_4bit: true\nuse_peft: true\ndtype: auto", "which is auto. Write `dtype: bfloat16`"),
        ("load_in_8bit: true\nuse_peft: true\ndtype: null", "`load_in_8bit: true` computes in `dtype`, which is null."),
        ("dtype: bfloat16", "too small for 16-bit weights and vanish. Write `dtype: float32`; `bf16: true` still"),
        ("dtype: float16", "`dtype: float16` without `use_peft: true`"),
        ("dtype: auto", "`dtype: auto` without `use_peft: true`"),
        ("adapt: projector", "`adapt` without `use_peft: true`"),
        ("group_by_length: true", "is a key of older releases: write `max_tokens_per_batch`, which plans batches"),
        ("train_sampling_strategy: group_by_length", "is refused: it would read every row for its length."),
        ("max_tokens_per_batch: 0", "`max_tokens_per_batch` is 0, expected 1 or more."),
        ("vision_batch_size: 0", "`vision_batch_size` is 0, expected 1 or more."),
        (
            "max_tokens_per_batch: 9\nper_device_train_batch_size: 2",
            "a.yaml: `max_tokens_per_batch` and `per_device_train_batch_size` are both given: either decides how many",
        ),
        ("max_tokens_per_batch: 9\ndataset_streaming: true", "which a stream does not know. Remove one of them."),
        ("max_tokens_per_batch: 9\nauto_find_batch_size: true", "it would look for a number of rows. Remove one"),
        ("max_tokens_per_batch: 9\ndataloader_drop_last: true", "no planned batch is left unfinished"),
        (
            "max_tokens_per_batch: 9\ntrain_sampling_strategy: sequential",
            "`train_sampling_strategy: sequential` with `max_tokens_per_batch`: the plan decides which rows are",
        ),
        ("prompt: <|image_1|> What?", "`prompt` holds <|image_1|>: the picture and the turns are added for you."),
        ("answer: '{title}<|end|>'", "`answer` holds <|end|>: the picture and the turns are added for you."),
        ("report_to: null", "Write none"),
        ("fp16: true\nbf16: true", "At most one of fp16 and bf16"),
        ("load_best_model_at_end: true", "a.yaml: --load_best_model_at_end requires"),
        ("env: [WANDB_PROJECT]", "`env` is ['WANDB_PROJECT'], expected a mapping"),
        ("lora_r: [", "a.yaml is not valid YAML"),
    ],
)
def test_what_a_file_may_not_say(line, words):
    message = refused(line, base=MINIMAL.replace("bf16: false\n", "") if "bf16" in line else MINIMAL)
    assert words in message and "\n" not in message.split(" is not valid YAML")[0].split(" --load_best")[0], message


def test_a_mixture_names_its_data_sets():
    base = MINIMAL.replace("dataset_name: d\n", "")
    text = "datasets: [{path: a, fraction: 0.7}, {path: b, split: fit, columns: [c], fraction: 0.3}]\n"
    recipe = load(text, base=base)
    assert [(one.path, one.split, one.columns, one.fraction) for one in recipe.mixture.datasets] == [
        ("a", "train", None, 0.7),
        ("b", "fit", ["c"], 0.3),
    ]
    assert load_recipe([str(recipe.save("out"))]) == recipe
    assert load("", "--datasets", "[{path: a}]", base=base).mixture.datasets[0].path == "a"
    for key in ("dataset_config", "dataset_train_split", "source"):
        assert f"`datasets` and `{key}` are both given" in refused(text + f"{key}: x\n", base=base)


def test_the_command_line_says_what_makes_a_batch_whatever_the_file_says():
    recipe = load("per_device_train_batch_size: 2\n", "--max_tokens_per_batch", "9000")
    assert (recipe.task.max_tokens_per_batch, recipe.settings.get("per_device_train_batch_size")) == (9000, None)
    assert load_recipe([str(recipe.save("out"))]) == recipe
    recipe = load("max_tokens_per_batch: 9000\n", "--per_device_train_batch_size", "2")
    assert (recipe.task.max_tokens_per_batch, recipe.training.per_device_train_batch_size) == (None, 2)
    recipe = load("per_device_train_batch_size: 2\n", "--max_tokens_per_batch", "null")
    assert recipe.training.per_device_train_batch_size == 2
    assert "are both given" in refused("", "--max_tokens_per_batch", "9", "--per_device_train_batch_size", "2")


def test_several_mistakes_are_told_at_once():
    message = refused("lora_r: 1.5\nnum_crop: 4\n", "--dtype", "float33")
    assert len(message.splitlines()) == 3 and "command line: `dtype` is 'float33'" in message


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lora_r", "16.5"], "command line: `lora_r` is '16.5', expected a whole number."),
        (["--lora", "16"], "`lora` is not a recipe key."),
        (["--no_packing"], "`no_packing` is not a recipe key. Did you mean `packing`?"),
        (["--run_name"], "command line: `--run_name` stands alone, expected a value after it: text or null."),
        (["--seed", "1", "--seed", "2"], "`--seed` is given twice"),
        (["--run_name", "two", "words"], "`run_name` is 'two words', expected text or null."),
        (["b.yaml"], "'b.yaml' follows the recipe a.yaml"),
        (["--config", "a.yaml"], "give one recipe"),
    ],
)
def test_what_the_command_line_may_not_say(argv, words):
    assert words in refused("", *argv)


@pytest.mark.parametrize("key", ["model_name_or_path", "dataset_name", "output_dir"])
def test_a_recipe_must_name(key):
    assert f"`{key}` is missing" in refused(
        base="".join(line + "\n" for line in MINIMAL.split("\n") if key not in line)
    )


def test_the_path_may_follow_config_and_must_be_there():
    load()
    assert load_recipe(["--config", "a.yaml"]).path == "a.yaml"
    for argv, words in ((["b.yaml"], "no recipe at 'b.yaml'"), (["--seed", "1"], "command line: no recipe")):
        with pytest.raises(ValueError, match=words):
            load_recipe(argv)
    Path("a.yaml").write_text("- a list\n")
    with pytest.raises(ValueError, match="expected lines of `key: value`"):
        load_recipe(["a.yaml"])


def test_the_environment_block_is_set_and_saved(monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "before")
    recipe = load("env: {WANDB_PROJECT: mine, WANDB_API_KEY: abc}\nhub_token: hf_abc\n")
    assert os.environ.pop("WANDB_API_KEY") == "abc" and os.environ["WANDB_PROJECT"] == "mine"
    text = recipe.save("out").read_text()
    assert yaml.safe_load(text)["env"] == {"WANDB_PROJECT": "mine"}
    assert "abc" not in text and "hf_abc" not in repr(recipe)


@pytest.mark.parametrize("written", ["[qkv_proj]", "[qkv_proj, o_proj]", ".*qkv_proj", "null"])
def test_one_name_in_a_list_stays_a_name(written):
    """ModelConfig alone would make "qkv_proj" of it, a pattern that matches no module's whole path."""
    assert load(f"lora_target_modules: {written}").model.lora_target_modules == yaml.safe_load(written)


def test_given_keys_our_own_and_those_that_define_a_run_are_saved():
    ours = {field.name for field in dataclasses.fields(TaskArguments)}
    saved = load("max_steps: 3", "--resume_from_checkpoint", "true").dump()
    assert set(saved) == {*yaml.safe_load(MINIMAL), "max_steps", "seed", *DEFAULTS, *ours} - {"adapt"}
    saved = load("use_peft: true\nlora_r: 4").save("out")
    lora = {"adapt": ["language_model"], "lora_r": 4, "lora_alpha": 32, "lora_dropout": 0.05}
    assert lora.items() <= yaml.safe_load(saved.read_text()).items()
    assert load_recipe([str(saved)]) == load("use_peft: true\nlora_r: 4")


def test_help_is_there_before_torch_is():
    code = "import sys; from sft_phi3v.recipe import load_recipe\ntry: load_recipe(['--help'])\n"
    code += "except SystemExit as end: assert not end.code and 'torch' not in sys.modules and 'trl' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "--num_crops" in done.stdout and "RECIPE" in done.stdout


def test_a_resumed_run_may_change_these_keys():
    """A key belongs here only if a run that goes on with another value of it is still the run that its recipe names."""
    ours = {field.name for field in dataclasses.fields(TaskArguments)}
    assert " ".join(sorted(key for key in {*TRL_KEYS, *ours, "env"} if RESUMABLE.fullmatch(key))) == (
        "checkpointed_layers dataloader_in_order dataloader_multiprocessing_context dataloader_num_workers "
        "dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor disable_tqdm env "
        "eval_steps eval_strategy feature_cache generation_batch_size gradient_accumulation_steps hub_always_push "
        "hub_model_id hub_private_repo hub_revision hub_strategy hub_token logging_first_step logging_nan_inf_filter "
        "logging_steps logging_strategy max_steps nonfinite num_train_epochs output_dir per_device_eval_batch_size "
        "per_device_train_batch_size push_to_hub report_to run_name save_steps "
        "save_strategy save_total_limit vision_batch_size"
    )


def test_a_run_that_is_older_than_a_key_went_by_its_default():
    recipe = load()
    saved = recipe.save("out")
    assert differences(saved, recipe) == []
    older = "".join(line for line in saved.read_text().splitlines(True) if not line.startswith("use_kernels"))
    saved.write_text(older)
    assert "use_kernels" not in older and differences(saved, recipe) == []
    assert differences(saved, load("use_kernels: true")) == ["use_kernels"]


def test_what_others_may_read_of_a_recipe_names_nothing_of_this_machine(write_recipe, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_PROJECT", "before")
    path = write_recipe(
        dataset_name="data/mine", source="owner/on_the_hub", env={"WANDB_PROJECT": "x"}, hub_token="hf_secret",
        run_name="me@here", prompt="Is this /home/me?", deepspeed=None, adapter="elsewhere",
    )  # fmt: skip
    public = load_recipe([path]).public()
    assert (public["dataset_name"], public["source"]) == ("mine", "owner/on_the_hub")
    assert (public["output_dir"], public["prompt"]) == ("out", "Is this /home/me?")
    assert not public.keys() & {"env", "hub_token", "run_name", "adapter"}
    assert str(tmp_path) not in str(public) and "tiny_phi3_v" in public["model_name_or_path"]
    copy = tmp_path / "copy.yaml"
    copy.write_text(as_text(public, "recipe.yaml"))
    assert load_recipe([str(copy)]).task == load_recipe([path]).task
