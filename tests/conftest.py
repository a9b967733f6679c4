"""Fixtures that several test folders share: Microsoft's public data files, and a small stand-in for its tokenizer."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import constants
from huggingface_hub.utils import _http, disable_progress_bars, enable_progress_bars
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

REPOSITORY = Path(__file__).resolve().parents[1]
REFERENCE = REPOSITORY.parent / "shared" / "reference"
TINY_CONFIG = REPOSITORY / "tests" / "data" / "goldens" / "model" / "checkpoints" / "tiny_mha" / "config.json"


@pytest.fixture(scope="session")
def microsoft_folder():
    """Function: version → folder with the config and tokenizer files of that released model; skips where absent."""

    def folder_of(version: str) -> Path:
        folder = REFERENCE / version
        if not (folder / "tokenizer.json").is_file():
            pytest.skip(f"Microsoft's files of {version} are not in the repository: {folder} does not exist")
        return folder

    return folder_of


@pytest.fixture(scope="session", params=["phi3_vision", "phi3_5_vision"])
def reference_folder(request, microsoft_folder):
    """The folder of each released model in turn; skips where absent."""
    return microsoft_folder(request.param)


SPACE = "\u2581"  # Llama's visible space
MERGED_WORDS = ("Price", "scarf", "What", "this", "coat", "blue", "red", "the", "is")


def special_tokens() -> dict[int, AddedToken]:
    """The 48 added tokens of both released models, with the flag that decides about whitespace on their right."""

    def token(content: str, *, rstrip: bool = False, special: bool = True) -> AddedToken:
        return AddedToken(content, rstrip=rstrip, lstrip=False, normalized=False, special=special)

    tokens = {0: token("<unk>"), 1: token("<s>"), 2: token("</s>", rstrip=True, special=False)}
    tokens[32000] = token("<|endoftext|>")
    tokens[32001] = token("<|assistant|>", rstrip=True)
    tokens[32006] = token("<|system|>")
    tokens[32007] = token("<|end|>")
    tokens[32010] = token("<|user|>")
    tokens[32044] = token("<|image|>", rstrip=True)
    placeholders = [id for id in range(32002, 32044) if id not in tokens]
    tokens |= {id: token(f"<|placeholder{k}|>", rstrip=True) for k, id in enumerate(placeholders, start=1)}
    return tokens


def small_tokenizer() -> Tokenizer:
    """Byte-fallback BPE that behaves like the released tokenizer, with the same ids for everything structural.

    Text costs one token per character, apart from `MERGED_WORDS`, whose first piece differs after a space: enough to
    notice a lost or doubled word-start mark. The other ids below 32000 are filler.
    """
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocabulary[SPACE] = 29871
    characters = [chr(code) for code in range(33, 127)]
    merges = [(SPACE, character) for character in characters]  # first, so that a space sticks to the word it opens
    for word in MERGED_WORDS:
        for start in (SPACE + word[0], word[0]):
            merges += [(start + word[1:end], word[end]) for end in range(1, len(word))]
    pieces = characters + [left + right for left, right in merges]
    for id, piece in enumerate(dict.fromkeys(pieces), start=1000):
        vocabulary[piece] = id
    used = set(vocabulary.values())
    vocabulary |= {f"filler{id}": id for id in range(32000) if id not in used}

    model = BPE(vocabulary, list(dict.fromkeys(merges)), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    for id, token in sorted(special_tokens().items()):
        tokenizer.add_tokens([token])
        assert tokenizer.token_to_id(token.content) == id
    return tokenizer


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory):
    """A model folder in the form of Microsoft's (flat config, `LlamaTokenizer` declared), with the small tokenizer."""
    folder = tmp_path_factory.mktemp("small_phi3_v")
    small_tokenizer().save(str(folder / "tokenizer.json"))
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    added = {str(id): {flag: getattr(token, flag) for flag in flags} for id, token in special_tokens().items()}
    tokenizer_config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": ["<|system|>", "<|end|>", "<|user|>", "<|end|>"],
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "legacy": False,
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }
    preprocessor_config = {
        "num_crops": 4,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Phi3VImageProcessor",
        "processor_class": "Phi3VProcessor",
        "num_img_tokens": 144,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor_config))
    (folder / "config.json").write_text(TINY_CONFIG.read_text())
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, small_folder):
    """A whole random model that can be quantised (widths are multiples of 64), with the small tokenizer."""
    from sft_phi3v.phi3_v import Phi3VConfig, Phi3VForCausalLM, Phi3VProcessor

    folder = tmp_path_factory.mktemp("tiny_phi3_v")
    config = Phi3VConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        eos_token_id=2,
        rope_scaling={"type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
        img_processor={
            "name": "clip_vision_model",
            "image_dim_out": 64,
            "num_img_tokens": 144,
            "clip_config": {
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
            },
        },
    )
    torch.manual_seed(0)
    Phi3VForCausalLM(config).save_pretrained(folder)
    Phi3VProcessor.from_pretrained(small_folder, num_crops=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_processor(tiny_folder):
    from sft_phi3v.phi3_v import Phi3VProcessor

    return Phi3VProcessor.from_pretrained(tiny_folder)


@pytest.fixture(scope="session")
def pictures_folder(tmp_path_factory):
    """An image folder of three classes, twelve plain pictures each, as `datasets` reads it: the class is `label`."""
    folder = tmp_path_factory.mktemp("pictures")
    for colour in ("red", "green", "blue"):
        (folder / colour).mkdir()
        for number in range(12):
            Image.new("RGB", (60 + 3 * number, 80), colour).save(folder / colour / f"{number}.png")
    return folder


# What trains on the CPU within seconds.
RECIPE = {
    "dtype": "float32",
    "load_in_4bit": True,
    "use_bnb_nested_quant": True,
    "use_peft": True,
    "lora_r": 8,
    "answer": "Colour: {label}.",
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "max_new_tokens": 6,
    "eval_rows": 3,
    "generation_rows": 2,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
}


@pytest.fixture
def write_recipe(tmp_path, tiny_folder, pictures_folder):
    """Writes a recipe that trains on the CPU within seconds; keyword arguments override its keys."""

    def write(**changes):
        keys = RECIPE | {
            "model_name_or_path": str(tiny_folder),
            "dataset_name": str(pictures_folder),
            "output_dir": str(tmp_path / "out"),
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in (keys | changes).items() if value is not None}))
        return str(path)

    return write


@pytest.fixture
def waits(monkeypatch):
    """No waiting between the Hub client's tries; the seconds that it would have waited."""
    waits = []
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=waits.append))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    disable_progress_bars()
    yield waits
    enable_progress_bars()


@pytest.fixture(scope="module")
def one_thread():
    """Two threads that get in each other's way are several times slower than one, and sums differ."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def offline_wandb(mode="offline", log_model="end"):
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("WANDB_DIR", "WANDB_RUN_ID", "WANDB_PROJECT"):
            patch.delenv(variable, raising=False)
        patch.setenv("WANDB_DATA_DIR", "set")
        patch.delenv("WANDB_DATA_DIR")  # put back afterwards, that is
        patch.setenv("WANDB_MODE", mode)
        patch.setenv("WANDB_LOG_MODEL", log_model)
        patch.setenv("WANDB_API_KEY", "planted" * 6)
        yield


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory, pictures_folder):
    """Folder of a run that is over and has learned to answer: recipe, 4-bit adapter, scores, examples, W&B's log."""
    from sft_phi3v import run

    folder = tmp_path_factory.mktemp("trained") / "out"
    keys = RECIPE | {
        "model_name_or_path": str(REPOSITORY / "recipes" / "tiny_base"),
        "dataset_name": str(pictures_folder),
        "output_dir": str(folder),
        "lora_r": 16,
        "lora_alpha": 16,
        "max_steps": 24,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "max_new_tokens": 24,
        "eval_strategy": "steps",
        "eval_steps": 12,
        "logging_steps": 6,
        "report_to": ["wandb", "tensorboard"],
        "hub_token": "hf_" + "planted" * 5,
    }
    path = folder.parent / "recipe.yaml"
    path.write_text(yaml.safe_dump(keys))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with offline_wandb():
        run.main([str(path)])
    torch.set_num_threads(before)
    scores = json.loads((folder / "metrics.json").read_text())["after"]
    assert (scores["parsed"], scores["stopped"]) == (1.0, 1.0)
    return folder


@pytest.fixture(scope="session")
def merged_run(trained_run, tmp_path_factory):
    """Folder of that run, with its merged model."""
    from sft_phi3v import merge

    folder = tmp_path_factory.mktemp("merged") / "run"
    shutil.copytree(trained_run, folder, symlinks=True)
    with offline_wandb():
        merge.main([str(folder / "recipe.yaml"), "--output_dir", str(folder)])
    return folder


@pytest.fixture
def finished_run(trained_run, tmp_path):
    """A copy of that run, to be changed at will, and the arguments that name it."""
    folder = tmp_path / "run"
    shutil.copytree(trained_run, folder)
    return folder, [str(folder / "recipe.yaml"), "--output_dir", str(folder)]


@pytest.fixture
def table_row(record_property):
    """Puts a row into a table at the end of the tests' output."""
    return lambda title, *cells: record_property("table", (title, [str(cell) for cell in cells]))


def pytest_terminal_summary(terminalreporter):
    """What tests have told: the tables that they are there to show."""
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    tables = {}
    for report in reports:
        for name, value in report.user_properties:
            if name == "table":
                tables.setdefault(value[0], []).append(value[1])
    for title, rows in tables.items():
        terminalreporter.section(title)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            terminalreporter.write_line("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)))
