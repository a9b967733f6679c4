"""A run that reads image features learns what one that computes them learns; and whatever happens to the cache."""

import json
import os
import pickle
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from sft_phi3v import checkpoints, data, features, preview, run
from sft_phi3v.features import Cache, break_even, verdict
from sft_phi3v.phi3_v import Phi3VForCausalLM
from sft_phi3v.phi3_v.image_processing_phi3_v import Phi3VImageProcessor
from sft_phi3v.recipe import load_recipe

REPOSITORY = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")
IMAGES = [["a"], ["b", "c"], [], ["d", "d"], ["copy of a", "b"], ["e"], [], ["f"]]  # of each row


def turns(*contents):
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 3, contents, strict=False)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows with one picture, several, equal ones and none; six different pictures of as many shapes."""
    folder = tmp_path_factory.mktemp("features")
    torch.manual_seed(0)
    for number, name in enumerate("abcdef"):
        pixels = torch.randint(0, 256, (60 + 90 * number, 400 - 60 * number, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{name}.png")
    shutil.copy(folder / "a.png", folder / "copy of a.png")
    found = [
        {"images": [f"{name}.png" for name in names], "messages": turns("Which one is it?", f"Answer no. {number}.")}
        for number, names in enumerate(IMAGES)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, found)))
    return folder / "rows.jsonl"


@pytest.fixture
def recipe(write_recipe, rows, tmp_path):
    def write(**changes):
        keys = {"dataset_name": str(rows), "answer": None, "held_out": 1, "num_crops": 4, "lora_dropout": 0.0}
        keys |= {"model_name_or_path": str(REPOSITORY / "recipes" / "tiny_base"), "generation_rows": 0, "eval_rows": 1}
        keys |= {"max_new_tokens": 1, "feature_cache": str(tmp_path / "cache"), "logging_steps": 1}
        keys |= {"train_sampling_strategy": "sequential"}
        return write_recipe(**(keys | changes))

    return write


def set_up(path):
    return run.set_up(load_recipe([path]))[0]


def loss_and_gradients(trainer, order):
    """Of one batch of all rows, with LoRA's B matrices away from zero."""
    batch = trainer.data_collator([trainer.train_dataset[index] for index in order])
    torch.manual_seed(0)
    trained = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    for name, weight in trained.items():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    rows = batch.pop("rows")
    trainer.model.train()
    with trainer.accelerator.autocast():
        loss = trainer.model(**batch).loss
    trainer.model.zero_grad()
    loss.backward()
    return rows, batch, loss.detach(), {name: weight.grad.clone() for name, weight in trained.items()}


@pytest.fixture(scope="module")
def shards():
    return lambda folder: sorted(folder.rglob("*.safetensors"))


@pytest.fixture
def computed(monkeypatch):
    """How many pictures were computed in each call, without those that are measured."""
    calls = []
    original = Cache.compute

    def compute(self, pixel_values, image_sizes):
        calls.append(len(image_sizes))
        return original(self, pixel_values, image_sizes)

    monkeypatch.setattr(Cache, "compute", compute)
    monkeypatch.setattr(Cache, "measure", lambda self, features: (0.02, 0.01))
    return calls


def test_loss_and_gradients_are_those_of_the_pictures(recipe, monkeypatch, capsys):
    monkeypatch.setattr(features, "FEW", 0)  # with workers that decode
    order = [4, 0, 5, 2, 3, 1, 6]
    cached = loss_and_gradients(set_up(recipe()), order)
    assert "feature_cache: 6 pictures, 0.00 GB in " in capsys.readouterr().out
    plain = loss_and_gradients(set_up(recipe(feature_cache=None)), order)
    assert cached[0] == plain[0]
    assert "pixel_values" not in cached[1] and "image_features" not in plain[1]
    for key in ("input_ids", "labels", "attention_mask", "image_sizes"):
        assert torch.equal(cached[1][key], plain[1][key])
    assert len(plain[1]["image_sizes"]) == 7
    assert float(cached[2]) == pytest.approx(float(plain[2]), rel=1e-6)
    for name, gradient in plain[3].items():
        assert gradient.abs().max() > 0
        error = (cached[3][name] - gradient).norm() / gradient.norm()
        assert error < 1e-6, f"{name}: {error}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_bfloat16_not_a_bit_is_lost(recipe, dtype):
    """The same crops in one batch, as pixels and as what is kept of them: whatever the weights are, in bfloat16."""
    trainer = set_up(recipe(bf16=True, dtype=dtype, held_out=2))
    reader = trainer.data_collator.collator.features
    digests = sorted(reader.places, key=reader.places.__getitem__)  # in the order in which they were computed
    parts = [features.Part(part, data.check_rows(part, trainer.recipe)) for part in data.load_splits(trainer.recipe)]
    crops = features.Crops(parts, digests, trainer.recipe, trainer.processing_class)
    batch = features.together([crops[index] for index in range(6)])
    kept = torch.cat([reader.of(digest) for digest in digests])
    assert kept.dtype == torch.bfloat16
    image, start = trainer.model.config.image_token_id, 1
    ids = torch.tensor(
        [[token for digest in digests for token in [start, *[image] * len(reader.of(digest))]] + [start]]
    )
    found = []
    for pictures in ({"pixel_values": batch["pixel_values"]}, {"image_features": kept}):
        trainer.model.zero_grad()
        with trainer.accelerator.autocast():
            output = trainer.model(input_ids=ids, labels=ids, image_sizes=batch["image_sizes"], **pictures)
        output.loss.backward()
        gradients = [weight.grad for weight in trainer.model.parameters() if weight.requires_grad]
        found.append([output.loss, output.logits, *gradients])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert max(gradient.abs().max() for gradient in found[0][2:]) > 0


def test_a_fill_that_is_cut_goes_on(recipe, tmp_path, shards, monkeypatch, computed):
    monkeypatch.setattr(features, "SHARD_BYTES", 1)  # a picture in each
    whole = tmp_path / "whole"
    set_up(recipe(feature_cache=str(whole)))
    assert computed == [1] * 6

    class PowerCut(Exception):
        pass

    original = features.save_file

    def cut(tensors, path, metadata):
        if len(shards(tmp_path / "cache")) == 4:
            path.write_bytes(b"half")
            raise PowerCut
        original(tensors, path, metadata)

    path = recipe()
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(features, "save_file", cut)
        set_up(path)
    [left] = shards(tmp_path / "cache")[0].parent.glob(".*")
    before = {one: one.stat().st_mtime_ns for one in shards(tmp_path / "cache")}
    os.utime(left, (time.time() - 2 * features.STALE,) * 2)
    computed.clear()
    set_up(path)
    assert computed == [1, 1] and not left.exists()
    assert len(before) == 4 and all(one.stat().st_mtime_ns == then for one, then in before.items())
    assert [one.name for one in shards(tmp_path / "cache")] == [one.name for one in shards(whole)]
    assert [one.read_bytes() for one in shards(tmp_path / "cache")] == [one.read_bytes() for one in shards(whole)]
    computed.clear()
    set_up(path)
    assert computed == []


def test_damaged_files_are_found_and_made_again(recipe, tmp_path, shards, monkeypatch, computed, capsys):
    monkeypatch.setattr(features, "SHARD_BYTES", 1)
    path = recipe()
    set_up(path)
    files = shards(tmp_path / "cache")
    wanted = [one.read_bytes() for one in files]
    files[0].write_bytes(wanted[0][:-100])  # cut off
    files[1].write_bytes(wanted[1][:-100] + bytes([wanted[1][-100] ^ 1]) + wanted[1][-99:])  # one bit has changed
    files[2].write_bytes(b"")
    start = wanted[3].index(b"[[") + 4
    files[3].write_bytes(wanted[3][:start] + b"00" + wanted[3][start + 2 :])  # of another picture, it says
    files[4].unlink()
    computed.clear()
    set_up(path)
    assert computed == [1] * 5
    assert [one.read_bytes() for one in shards(tmp_path / "cache")] == wanted
    assert capsys.readouterr().out.count("is damaged, and made again") == 3


def test_other_weights_crops_and_precision_are_kept_apart(recipe, tmp_path, computed):
    def key(model=None, **changes):
        loaded = load_recipe([recipe(**changes)])
        prepared = preview.prepare(loaded)
        model = model or run.load_model(loaded)
        model.requires_grad_(False)
        processor = prepared.collator.processor
        return Cache(loaded, model, processor, [], precision=torch.autocast("cpu", enabled=False)).folder.name

    known = key()
    assert key() == known
    assert key(learning_rate=1.0, lora_r=4, seed=3, padding_free=True) == known
    model = run.load_model(load_recipe([recipe()])).requires_grad_(False)
    assert key(model) == known
    with torch.no_grad():
        model.model.language_model.norm.weight[0] += 1
        assert key(model) == known
        model.model.multi_modal_projector.separator[0, 0, 0] += 1e-3
    assert len({known, key(model), key(num_crops=2), key(bf16=True), key(dtype="bfloat16")}) == 5


def test_a_disk_that_is_too_small_is_refused_before_anything_is_computed(recipe, tmp_path, monkeypatch, computed):
    room = 12_000_000  # six pictures of at most 757 features, 128 float32 each, take 1.9 MB
    for free in (room, 1_000_000):
        monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        if free == room:
            set_up(recipe(save_strategy="no", feature_cache=str(tmp_path / "fits")))
    computed.clear()
    with pytest.raises(
        ValueError, match=r"`feature_cache` .*: what is kept of 6 pictures takes 2\.0 MB, and .* 1\.0 MB"
    ):
        set_up(recipe(save_strategy="no"))
    assert computed == []


def test_while_it_trains_no_picture_is_opened(recipe, monkeypatch):
    trainer = set_up(recipe(eval_strategy="steps", eval_steps=1, max_steps=2, dataloader_num_workers=1))

    def refuse(*args, **kwargs):
        raise AssertionError("a picture is opened")

    monkeypatch.setattr(data, "_file", refuse)
    monkeypatch.setattr(Phi3VImageProcessor, "_preprocess", refuse)
    trainer.train()
    assert trainer.state.global_step == 2
    with pytest.raises(AssertionError, match="a picture is opened"):
        run.to_examples(data.load_splits(trainer.recipe)[0], trainer.recipe)[0]


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_a_run_learns_the_same_and_goes_on_where_the_cache_is_gone(recipe, tmp_path, monkeypatch, capsys):
    keys = {"max_steps": 4, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "num_crops": 1}
    keys |= {"lora_dropout": 0.1}
    run.main([recipe(**keys, output_dir=str(tmp_path / "plain"), feature_cache=None)])
    path = recipe(**keys, output_dir=str(tmp_path / "whole"))
    run.main([path])
    run.main([recipe(**keys, output_dir=str(tmp_path / "found"))])  # nothing is made: no other dropout for that

    class PowerCut(Exception):
        pass

    original = run.Trainer.training_step

    def cut(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise PowerCut
        return original(self, *args, **kwargs)

    path = recipe(**keys, output_dir=str(tmp_path / "cut"))
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(run.Trainer, "training_step", cut)
        run.main([path])
    shutil.rmtree(tmp_path / "cache")
    capsys.readouterr()
    run.main([path, "--feature_cache", str(tmp_path / "elsewhere")])
    assert "6 made in " in capsys.readouterr().out
    plain, whole, found, resumed = (adapter(tmp_path / name) for name in ("plain", "whole", "found", "cut"))
    assert all(torch.equal(whole[name], resumed[name]) and torch.equal(whole[name], found[name]) for name in whole)
    assert all((whole[name] - plain[name]).abs().max() < 1e-5 for name in plain)
    losses = [
        [entry["eval_loss"] for entry in json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
         if "eval_loss" in entry]
        for name in ("plain", "whole")
    ]  # fmt: skip
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_model_counts_features_as_it_counts_pixels(tiny_folder):
    model = Phi3VForCausalLM.from_pretrained(tiny_folder).eval()
    image, sizes = model.config.image_token_id, torch.tensor([[336, 336], [336, 672]])
    found = model.get_image_features(torch.randn(5, 3, 336, 336), sizes)
    ids = torch.tensor([[1, *[image] * 313, 1, *[image] * 457, 1]])
    assert model(ids, image_features=found, image_sizes=sizes).logits.isfinite().all()
    for features_, image_sizes, said in (
        (found[1:], sizes, "hold 770 image tokens .* the 2 pictures give 769 image features"),
        (found, sizes.flip(0), r"runs of \[313, 457\] image tokens, but the pictures give \[457, 313\]"),
        (found[:, 1:], sizes, "image_features are 63 wide, the model 64"),
        (found, None, "image_features need input_ids"),
    ):
        with pytest.raises(ValueError, match=said):
            model(ids, image_features=features_, image_sizes=image_sizes)
    with pytest.raises(ValueError, match="not both"):
        model(ids, image_features=found, image_sizes=sizes, pixel_values=torch.randn(5, 3, 336, 336))
    with pytest.raises(ValueError, match="hold 770 image tokens"):
        model(ids)


def test_workers_read_what_the_process_reads(recipe):
    trainer = set_up(recipe())
    collator, rows = trainer.data_collator, trainer.train_dataset
    wanted = collator([rows[index] for index in range(7)])["image_features"]
    for context in ("fork", "spawn"):
        loader = DataLoader(rows, 7, collate_fn=collator, num_workers=1, multiprocessing_context=context)
        [batch] = loader
        assert torch.equal(batch["image_features"], wanted)
    reader = pickle.loads(pickle.dumps(collator.collator.features))
    assert not reader._open
    assert len(pickle.dumps(rows)) < 100_000


def test_rows_without_pictures_need_no_cache(recipe, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"messages": turns("Hi", "Ho")}) for _ in range(4)))
    trainer = set_up(recipe(dataset_name=str(tmp_path / "rows.jsonl")))
    assert "image_features" not in trainer.data_collator([trainer.train_dataset[0]])
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adapt": ["language_model", "projector"]}, r"`feature_cache` with `adapt: \['projector'\]`"),
        ({"adapt": ["vision_tower"]}, r"`feature_cache` with `adapt: \['vision_tower'\]`"),
        ({"use_peft": None, "load_in_4bit": None, "use_bnb_nested_quant": None}, "`feature_cache` without `use_peft"),
        ({"dataset_streaming": True}, "`feature_cache` with `dataset_streaming: true`"),
        ({"lora_modules_to_save": ["multi_modal_projector"]}, r"multi_modal_projector\..* is trained"),
    ],
)
def test_what_would_change_the_features_is_refused(recipe, tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        set_up(recipe(**changes))
    assert not (tmp_path / "cache").exists()


def test_it_pays_from_the_epoch_on_in_which_it_costs_less():
    for made, written, read in ((1.0, 0.0, 0.0), (1.0, 0.2, 0.1), (1.0, 0.1, 0.7), (1.0, 0.0, 0.5)):
        first = break_even(made=made, written=written, read=read)
        for epochs in range(1, 10):
            assert (made + written + epochs * read < epochs * made) == (epochs >= first)
    assert break_even(made=1.0, written=0.1, read=0.1) == 2
    assert break_even(made=1.0, written=0.1, read=0.1, share=0.0) == 1  # another run has made them
    assert break_even(made=0.1, written=0.1, read=0.1) is None
    assert verdict(2, 3) == "it pays from epoch 2 on, of 3 epochs."
    assert verdict(2, 1).startswith("it does not pay with 1 epoch: it would from epoch 2 on. Remove `feature_cache`")


def test_equal_pictures_count_once_and_sizes_alone_each_on_its_own():
    known = [data.Pictures((b"a", b"b"), ((1, 2), (3, 4))), data.Pictures((), ()), data.Pictures((b"a",), ((1, 2),))]
    assert features.distinct(known) == {b"a": (1, 2), b"b": (3, 4)}
    sized = [data.Pictures((), ((1, 2), (1, 2))), data.Pictures((), ((1, 2),))]
    assert list(features.distinct(sized).values()) == [(1, 2)] * 3


@pytest.mark.parametrize(("epochs", "said"), [(1, "it does not pay with 1 epoch"), (3, "it pays from epoch 2 on")])
def test_preview_says_what_it_takes_and_whether_it_pays(recipe, tmp_path, capsys, epochs, said):
    path = recipe(max_steps=None, num_train_epochs=epochs)
    preview.main([path])
    shown = capsys.readouterr().out
    assert "feature_cache: 6 different pictures, at most 0.00 GB in " in shown and said in shown
    assert not (tmp_path / "cache").exists()
    loaded = load_recipe([path])
    prepared = preview.prepare(loaded)
    sizes = features.distinct([*prepared.pictures, *prepared.held_out_pictures])
    estimate = features.cache_bytes(loaded, preview.load_config(loaded), sizes, 4)
    set_up(path)
    [file] = (tmp_path / "cache").rglob("*.safetensors")
    assert load_file(file)["features"].nbytes == estimate


def test_epochs_are_those_of_planned_batches(recipe, monkeypatch):
    asked = []
    monkeypatch.setattr(run, "cached", lambda *_, epochs, **__: asked.append(epochs))
    keys = {"train_sampling_strategy": None, "per_device_train_batch_size": None, "padding_free": True}
    path = recipe(**keys, max_tokens_per_batch=2000, max_steps=8)
    set_up(path)
    loaded = load_recipe([path])
    assert asked == [8 / preview.prepare(loaded).plan.steps] != [8.0]
