"""A stream gives every row once per epoch, whoever shares it, and goes on where it was cut."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as Pillow
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from sft_phi3v import run, streaming
from sft_phi3v.data import ROW, load_splits
from sft_phi3v.recipe import Recipe, load_recipe
from sft_phi3v.streaming import Passing, Stream, load_stream

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than this machine has cores
]

IMAGE = {"image": Image(), "title": Value("string"), "price": Value("int64")}


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def recipe(name="shop", **keys) -> Recipe:
    given = {"answer": "{title}: {price}", "use_cpu": True, "bf16": False, "per_device_train_batch_size": 2} | keys
    given |= {"model_name_or_path": "m", "dataset_name": name, "output_dir": "o", "dataset_streaming": True}
    Path("recipe.yaml").write_text(json.dumps({key: value for key, value in given.items() if value is not ...}))
    return load_recipe(["recipe.yaml"])


def rows(count: int, start: int = 0) -> list[dict]:
    return [
        {"image": Pillow.new("RGB", (8, 8), (k % 256, 0, 0)), "title": f"T{k}", "price": k}
        for k in range(start, start + count)
    ]


def write_shards(folder="shop", counts=(7, 5, 9), test=4, group=3, features=IMAGE) -> None:
    """A folder as `prepare` makes it: shards of unequal sizes, in row groups."""
    start = 0
    for number, count in enumerate(counts):
        write(
            Path(folder, "data", f"train-{number:05d}-of-{len(counts):05d}.parquet"),
            rows(count, start),
            group,
            features,
        )
        start += count
    if test:
        write(Path(folder, "data", "test-00000-of-00001.parquet"), rows(test, 1000), group, features)
    Dataset.from_dict({"row": [1]}).to_parquet(Path(folder, "manifest.parquet"))


def write(path: Path, table: list[dict], group: int = 3, features=IMAGE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(table, Features(features)).to_parquet(path, batch_size=group)


def seen(stream: Stream, epoch: int, processes: int = 1, workers: int = 0, collate=None) -> list[list[list]]:
    """Batches of row numbers that each process gets in an epoch, through Accelerate's own data loader."""
    found = []
    for process in range(processes):
        loader = DataLoader(stream, batch_size=stream.batch_size, collate_fn=collate or by_row, num_workers=workers)
        loader = prepare_data_loader(loader, num_processes=processes, process_index=process, put_on_device=False)
        loader.set_epoch(epoch)
        batches = list(loader)
        assert len(batches) == len(loader)
        found.append(batches)
    return found


def flat(batches):
    return list(itertools.chain.from_iterable(batches))


def by_row(examples):
    return [example and example["row"] for example in examples]


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (2, 0), (3, 0), (2, 2), (1, 3), (5, 0)])
def test_every_row_comes_once_in_an_epoch_whatever_the_shards(processes, workers):
    write_shards()
    stream, held_out = load_stream(recipe(dataloader_num_workers=workers))
    found = seen(stream, 0, processes, workers)
    assert len({tuple(map(len, batches)) for batches in found}) == 1  # no process waits for another
    given = [row for batches in found for batch in batches for row in batch]
    assert set(given) == set(range(21))
    assert len(given) == math.ceil(21 / processes) * processes  # filled up with first ones, as for rows in memory
    assert len(held_out) == 4


def test_the_order_is_another_in_each_epoch_and_the_same_again_for_the_same_seed():
    write_shards()
    orders = [
        flat(seen(load_stream(recipe(seed=seed))[0], epoch)[0]) for seed, epoch in ((1, 0), (1, 1), (1, 0), (2, 0))
    ]
    assert orders[0] == orders[2] and len({tuple(order) for order in orders}) == 3
    stream, _ = load_stream(recipe(train_sampling_strategy="sequential"))
    assert flat(seen(stream, 1)[0]) == list(range(21))


def test_rows_are_mixed_beyond_a_block_and_within_bounds_of_memory(monkeypatch):
    write_shards(counts=(64,), group=4)
    order = flat(seen(load_stream(recipe())[0], 0)[0])
    assert sum(abs(a - b) == 1 for a, b in itertools.pairwise(order)) < 10
    monkeypatch.setattr(streaming, "WINDOW_BYTES", 1)
    stream, _ = load_stream(recipe())
    assert stream.window == 2 and set(flat(seen(stream, 0)[0])) == set(range(64))


def test_examples_are_those_of_rows_in_memory():
    write_shards(features=IMAGE | {"price": Value("float32")})
    asked = recipe()
    stream, held_out = load_stream(asked)
    train, also = load_splits(asked)
    assert held_out[ROW][:] == also[ROW][:]
    for example in stream:
        assert example["messages"][-1]["content"][0]["text"] == f"T{example['row']}: {float(example['row'])}"
        assert [image.getpixel((0, 0))[0] for image in example["images"]] == [example["row"]]
    assert len(stream) == len(train)
    texts = [text for block in stream.texts() for text in block["title"]]
    assert sorted(texts) == sorted(train["title"])


def test_class_names_and_columns_of_one_block_only_where_asked_for():
    kind = ClassLabel(names=["coat", "hat"])
    table = [{"image": Pillow.new("RGB", (4, 4)), "label": k % 2} for k in range(6)]
    write(Path("shop/train.parquet"), table, features={"image": Image(), "label": kind})
    stream, _ = load_stream(recipe(answer="A {label}.", held_out=1))
    assert {example["messages"][-1]["content"][0]["text"] for example in stream} == {"A coat.", "A hat."}


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_held_out_rows_are_drawn_as_of_rows_in_memory(suffix):
    Path("pictures").mkdir()
    for k in range(40):
        Pillow.new("RGB", (4, 4), (k, 0, 0)).save(f"pictures/{k}.png")
    dataset = Dataset.from_list([{"image": f"pictures/{k}.png", "title": f"T{k}", "price": k} for k in range(40)])
    if suffix == "parquet":
        dataset.to_parquet("rows.parquet", batch_size=7)
    else:
        {"jsonl": dataset.to_json, "csv": dataset.to_csv}[suffix](f"rows.{suffix}")
    for _ in range(2):  # the second time from the Arrow file that the first one made
        stream, held_out = load_stream(asked := recipe(f"rows.{suffix}", held_out=0.2, seed=1))
        assert held_out[ROW][:] == load_splits(asked)[1][ROW][:] == [9, 23, 17, 28, 0, 7, 6, 22]
    assert {example["row"] for example in stream} == set(range(40)) - set(held_out[ROW])
    assert [batch for process in seen(stream, 0, 2) for batch in process for _ in batch][31:]
    assert {image.getpixel((0, 0))[0] for example in stream for image in example["images"]} == set(range(40)) - set(
        held_out[ROW]
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("drop", [False, True])
def test_a_run_that_goes_on_passes_over_rows_without_decoding_or_even_reading_them(workers, drop, monkeypatch):
    write_shards(counts=(40, 30), group=4)
    monkeypatch.setattr(streaming, "WINDOW", 8)
    stream, _ = load_stream(recipe(dataloader_num_workers=workers))
    stream.fits = (lambda example: example["row"] % 5 != 0) if drop else None
    whole = seen(stream, 1, 2, workers)
    for process in range(2):
        loader = DataLoader(stream, batch_size=2, collate_fn=Passing(decoding), num_workers=workers)
        loader = prepare_data_loader(loader, num_processes=2, process_index=process, put_on_device=False)
        loader.dataset.passed = (1, 11)
        rest = skip_first_batches(loader, 11)
        rest.set_epoch(1)
        assert [batch["row"] for batch in rest] == whole[process][11:]
        loader.set_epoch(2)
        assert [batch["row"] for batch in loader] == seen(stream, 2, 2, workers)[process]


def decoding(examples):
    for example in examples:
        example["images"][0].load()
    return {"row": [example["row"] for example in examples], "labels": torch.zeros(len(examples), 1)}


def test_passed_rows_are_not_even_read(monkeypatch):
    write_shards(counts=(40,), group=4)
    monkeypatch.setattr(streaming, "WINDOW", 8)
    stream, _ = load_stream(recipe())
    read = []
    original = Stream.read
    monkeypatch.setattr(Stream, "read", lambda self, *asked: read.append(asked[0]) or original(self, *asked))
    stream.passed = (0, 17)
    assert by_row(stream)[:34] == [None] * 34 and len(read) <= 3


def test_rows_that_do_not_fit_are_counted_and_others_take_their_place():
    write_shards(counts=(20,))
    for workers in (0, 2):
        stream, _ = load_stream(recipe(dataloader_num_workers=workers))
        stream.fits = fits
        for _ in range(2):
            batches = seen(stream, 0, 1, workers)[0]
            given = flat(batches)
            assert len(given) == 20 and set(given) == set(range(10, 20))
            assert stream.left_out.sum() == 10
    stream.fits = lambda example: False
    with pytest.raises(ValueError, match="`overlong: drop` leaves no row"):
        list(stream)


def fits(example):
    return example["row"] >= 10


# --- whole runs ---


@pytest.fixture
def stream_recipe(tmp_path, write_recipe, pictures_folder):
    """Writes a recipe that streams five rows of text and four rows with pictures, the last one with two."""
    picture = {"bytes": (pictures_folder / "red" / "0.png").read_bytes(), "path": None}
    turns = [
        [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Red. " * (1 + k)}] for k in range(5)
    ]
    text = Value("string")
    kinds = {"messages": List({"role": text, "content": text})}
    talk = [{"messages": one} for one in turns]
    chat = [{"messages": one, "images": [picture] * (2 if k == 3 else 1)} for k, one in enumerate(turns[:4])]
    for folder, table in (("talk", talk), ("chat", chat)):
        kinds |= {"images": List(Image())} if folder == "chat" else {}
        write(tmp_path / folder / "data" / "train-0.parquet", table[:3], 2, kinds)
        write(tmp_path / folder / "data" / "train-1.parquet", table[3:], 2, kinds)
        write(tmp_path / folder / "data" / "test-0.parquet", table[:1], 2, kinds)

    def write_one(**changes):
        keys = {"dataset_name": None, "answer": None, "dataset_streaming": True, "max_steps": None}
        keys |= {"datasets": [{"path": "talk"}, {"path": "chat"}], "num_train_epochs": 1, "max_new_tokens": 1}
        return write_recipe(**(keys | {"logging_steps": 1} | changes))

    return write_one


def adapter(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def history(folder):
    return json.loads((Path(folder) / "trainer_state.json").read_text())


def test_a_run_cut_in_an_epoch_resumes_to_the_same_weights_bit_for_bit(stream_recipe, tmp_path, monkeypatch):
    keys = {"num_train_epochs": 1.5, "save_steps": 4, "lora_dropout": 0.1, "dataloader_num_workers": 2}
    keys |= {"model_name_or_path": str(Path(__file__).resolve().parents[1] / "recipes" / "tiny_base")}
    keys |= {"gradient_accumulation_steps": 2}
    run.main([stream_recipe(**keys, output_dir=str(tmp_path / "whole"))])
    whole = history(tmp_path / "whole")
    assert whole["max_steps"] == whole["global_step"] == 5  # 9 rows are 5 batches, which are 3 steps

    class PowerCut(Exception):
        pass

    def cut(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise PowerCut
        return original(self, *args, **kwargs)

    original = run.Trainer.training_step
    path = stream_recipe(**keys, output_dir=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        patch.setattr(run.Trainer, "training_step", cut)
        with pytest.raises(PowerCut):
            run.main([path])
    with pytest.raises(SystemExit, match="rows are shared out by dataloader_num_workers, which changed"):
        run.main([path, "--resume_from_checkpoint", "true", "--dataloader_num_workers", "1"])
    run.main([path, "--resume_from_checkpoint", "true"])
    first, second = adapter(tmp_path / "whole"), adapter(tmp_path / "cut")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert history(tmp_path / "cut")["log_history"][-2]["loss"] == whole["log_history"][-2]["loss"]


LAUNCHED = """
import json, os, sys
from sft_phi3v import run
from sft_phi3v.recipe import load_recipe

recipe, rows = load_recipe(sys.argv[1:]), []
trainer, evaluation, checkpoint = run.set_up(recipe)
collator = trainer.data_collator
trainer.data_collator = lambda examples: rows.append([example["row"] for example in examples]) or collator(examples)
run.train(recipe, trainer, evaluation)
with open(f"{recipe.training.output_dir}/rows-{os.environ['RANK']}.json", "w") as file:
    json.dump(rows, file)
"""


@pytest.mark.distributed
@pytest.mark.timeout(280)
def test_two_processes_share_the_rows_also_where_only_one_has_pictures(stream_recipe, tmp_path):
    config, script = tmp_path / "ddp.yaml", tmp_path / "launched.py"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nuse_cpu: true\n"
        "num_machines: 1\nnum_processes: 2\nmixed_precision: 'no'\nmain_process_port: 0\n"
    )
    script.write_text(LAUNCHED)
    # In the order of files, the first process has text only and the second one all pictures. The last row is too long.
    keys = {"train_sampling_strategy": "sequential", "overlong": "drop", "max_length": 500}
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file", str(config)]
    done = subprocess.run(
        [*launch, str(script), stream_recipe(**keys)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((tmp_path / "out" / f"rows-{process}.json").read_text()) for process in range(2)]
    assert found[0] == [["talk:0", "talk:1"], ["talk:2", "talk:3"], ["talk:4"]]
    assert found[1] == [["chat:0", "chat:1"], ["chat:2", "talk:0"], ["chat:0"]]
    lines = (tmp_path / "out" / "completions.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == ["talk:test:0", "chat:test:0"]
    assert history(tmp_path / "out")["epoch"] == 1
    assert "overlong: 1 rows of the last epoch have more than 500 tokens: left out, others came twice" in done.stdout
    assert done.stdout.count("streaming: looked at here are the first 9 of 9 rows to train on.") == 1
