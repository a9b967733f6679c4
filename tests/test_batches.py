"""Planned batches: every row once an epoch, never over the budget, as many for each process and in each epoch."""

import itertools
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from sft_phi3v import batches, preview, run, trainer
from sft_phi3v.batches import Planned, plan_batches
from sft_phi3v.collator import Lengths
from sft_phi3v.estimate import Shape
from sft_phi3v.fit import oom_message
from sft_phi3v.model import load_config
from sft_phi3v.recipe import load_recipe

REPOSITORY = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")
DRAW = np.random.default_rng(0)
BUDGET = 4096
ROWS = {
    "one": [700],
    "fewer than processes": [900, 40, 3000],
    "equal": [512] * 101,
    "none fits with another": [3000 + 7 * one for one in range(30)],
    "one is the budget": [BUDGET, *[30] * 50],
    "short": DRAW.integers(1, 60, 500),
    "two kinds": [*[2509] * 60, *[313] * 90],
    "catalogue": np.clip(DRAW.lognormal(6.5, 0.5, 700).astype(int), 40, 2600),
    "long": DRAW.integers(1500, 2600, 120),
}
LENGTHS = pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS.keys())
PADDED = pytest.mark.parametrize("padded", [True, False], ids=["padded", "not padded"])


def cost(batch, lengths, *, padded, multiple=1):
    found = [-(-int(lengths[row]) // multiple) * multiple for row in batch]
    return max(found) * len(found) if padded else sum(int(lengths[row]) for row in batch)


def epoch_of(plan, seed, epoch):
    """What each process gets: `[process][step]` rows."""
    made = []
    for process in range(plan.processes):
        sampler = Planned(plan, seed=seed, process=process)
        sampler.set_epoch(epoch)
        made.append(list(sampler))
        assert len(made[-1]) == len(sampler)
    return made


def learned(plan, made):
    """The batches that are learned from: not those that only fill up the last step."""
    real = plan.processes - plan.missing
    return [
        batch
        for process, own in enumerate(made)
        for step, batch in enumerate(own)
        if step < plan.steps - 1 or process < real
    ]


@LENGTHS
@PADDED
@pytest.mark.parametrize(("processes", "multiple"), [(1, None), (2, 8), (8, None)])
def test_every_row_comes_once_an_epoch_and_no_batch_is_over_the_budget(lengths, padded, processes, multiple):
    plan = plan_batches(lengths, BUDGET, padded=padded, processes=processes, multiple=multiple)
    for epoch in range(4):
        made = epoch_of(plan, 7, epoch)
        assert {len(own) for own in made} == {plan.steps}
        batches = learned(plan, made)
        assert Counter(row for batch in batches for row in batch) == Counter(range(len(lengths)))
        assert len(batches) == plan.steps * processes - plan.missing
        costs = [cost(batch, lengths, padded=padded, multiple=multiple or 1) for batch in batches]
        assert max(costs) <= BUDGET
        if plan.missing:  # only where no batch is left to be cut
            assert all(len(batch) == 1 for batch in batches)
            assert [own[-1] for own in made][-plan.missing :] == [[int(np.argmin(lengths))]] * plan.missing


@LENGTHS
@PADDED
def test_a_plan_is_the_same_whatever_the_order_of_rows_and_chance_is_the_seeds_and_the_epochs(lengths, padded):
    plan = plan_batches(lengths, BUDGET, padded=padded, processes=2)
    again = plan_batches(lengths, BUDGET, padded=padded, processes=2)
    shuffled = plan_batches(DRAW.permutation(lengths), BUDGET, padded=padded, processes=2)
    assert plan.starts.tolist() == again.starts.tolist() == shuffled.starts.tolist()
    assert epoch_of(plan, 3, 1) == epoch_of(again, 3, 1)
    if len(lengths) > 100:
        orders = [epoch_of(plan, seed, epoch) for seed, epoch in ((3, 0), (3, 1), (4, 0))]
        assert all(one != other for one, other in itertools.combinations(orders, 2))
        rows = [{frozenset(batch) for own in order for batch in own if len(batch) > 1} for order in orders]
        if any(rows) and len(set(map(int, lengths))) > 1:  # other rows are together, not only in another order
            assert all(len(one & other) < 0.7 * len(one) for one, other in itertools.combinations(rows, 2))


@PADDED
def test_equal_rows_fill_the_budget_to_the_last_token(padded):
    plan = plan_batches([500] * 30, 2500, padded=padded)
    assert [len(batch) for batch in epoch_of(plan, 0, 0)[0]] == [5] * 6
    assert plan.full == 1


@PADDED
def test_a_row_as_long_as_the_budget_fits_and_a_longer_one_is_named(padded):
    plan_batches([100, 1000], 1000, padded=padded)
    with pytest.raises(ValueError) as error:
        plan_batches([100, 1001, 1200], 1000, padded=padded, names=["a", "b", "c"])
    assert str(error.value) == (
        "`max_tokens_per_batch` is 1,000, expected 1,200 or more: 2 of 3 rows alone are longer: row c has 1,200, b has "
        "1,001. A row is never cut. Raise max_tokens_per_batch, lower num_crops, or leave these rows out with "
        "`max_length: 1000` and `overlong: drop`."
    )
    with pytest.raises(ValueError, match="expected 1,008 or more: 1 of 1 rows alone are longer: row 0 has 1,008"):
        plan_batches([1000], 1000, padded=padded, multiple=16)


def test_the_budget_holds_what_lengths_are_padded_up_to():
    padded = plan_batches([57] * 640, 640, padded=True, multiple=8)
    assert {len(batch) for batch in epoch_of(padded, 0, 0)[0]} == {10}  # 11 × 57 would be 627, but they are 64 each
    assert {len(batch) for batch in epoch_of(plan_batches([57] * 640, 640, padded=True), 0, 0)[0]} >= {11}
    assert len(plan_batches([50] * 20, 101, padded=False).starts) == 10
    assert len(plan_batches([50] * 20, 101, padded=False, multiple=8).starts) == 20  # 100 tokens are padded to 104


def test_not_a_token_is_over_the_budget():
    lengths = [60] * 4 + [21] * 4 + [20] * 4
    assert len(plan_batches(lengths, 101, padded=False).starts) == 4
    assert len(plan_batches(lengths, 100, padded=False).starts) == 5


def test_of_batches_that_cost_the_same_the_one_with_the_longest_rows_is_the_worst():
    assert plan_batches([4096, *[32] * 128], 4096, padded=True).worst() == (1, 4096)


@PADDED
def test_halves_are_halves(padded):
    plan = plan_batches(ROWS["one is the budget"], BUDGET, padded=padded, processes=4)
    assert sorted(len(batch) for [batch] in epoch_of(plan, 0, 0)) == [1, 12, 13, 25]


def test_padded_rows_make_as_few_batches_as_can_be():
    """Against all ways to cut the sorted rows; any other grouping is no better than one of them."""
    for _ in range(40):
        lengths = np.sort(DRAW.integers(10, 1000, 12))[::-1]
        fewest = [0]
        for end in range(1, 13):
            fits = [start for start in range(end) if (end - start) * lengths[start] <= 2000]
            fewest.append(min(fewest[start] for start in fits) + 1)
        # Classes are wider than a token: where that costs a batch, a budget of as much more would have saved it.
        plan = plan_batches(lengths, 2000, padded=True)
        assert fewest[-1] <= len(plan.starts) <= fewest[-1] + 1
        assert len(plan_batches(lengths, 2200, padded=True).starts) <= fewest[-1]


def test_few_long_rows_are_put_together_until_they_fill_the_budget(monkeypatch):
    lengths = DRAW.integers(1400, 2650, 2000)  # the largest six come to some 15,900, and no row is left for the rest
    plan = plan_batches(lengths, 16384, padded=False)
    assert plan.full > 0.975
    monkeypatch.setattr(batches, "MANY", 0)
    assert plan_batches(lengths, 16384, padded=False).full < 0.965


def test_rows_that_are_not_padded_fill_batches_nearly():
    for name, least in (("catalogue", 0), ("short", 0), ("equal", 0), ("two kinds", 60), ("one is the budget", 2)):
        plan = plan_batches(ROWS[name], BUDGET, padded=False)
        fewest = max(least, math.ceil(sum(map(int, ROWS[name])) / BUDGET))
        assert fewest <= len(plan.starts) <= 1.02 * fewest
        costs = [cost(batch, ROWS[name], padded=False) for batch in epoch_of(plan, 0, 0)[0]]
        assert np.mean(costs) / BUDGET == pytest.approx(plan.full)
        if name in ("catalogue", "short"):
            assert min(costs) > 0.9 * max(costs)  # the last batch is not what is left over


@pytest.mark.parametrize("name", ["catalogue", "long"])
@PADDED
def test_batches_of_a_step_cost_nearly_the_same(name, padded):
    lengths, processes = ROWS[name], 4
    plan = plan_batches(lengths, BUDGET, padded=padded, processes=processes)
    assert not plan.missing
    waits = []
    for epoch in range(3):
        made = epoch_of(plan, 0, epoch)
        costs = np.array([[cost(own[step], lengths, padded=padded) for own in made] for step in range(plan.steps)])
        waits.append(costs.max(axis=1).sum() / costs.mean(axis=1).sum() - 1)
    assert waits[0] == pytest.approx(plan.imbalance)
    assert max(waits) < 0.02
    drawn = np.random.default_rng(0).permutation(costs.reshape(-1)).reshape(-1, processes)
    assert waits[-1] < 0.5 * (drawn.max(axis=1).sum() / drawn.mean(axis=1).sum() - 1)
    # No process always gets the largest, and a run does not go from long rows to short ones.
    assert max(Counter(costs.argmax(axis=1).tolist()).values()) < 0.7 * plan.steps
    shares = costs.mean(axis=1)
    assert abs(np.corrcoef(shares, np.arange(plan.steps))[0, 1]) < 0.6


@pytest.mark.parametrize(("rows", "processes"), [(9, 8), (17, 8), (5, 2), (16, 8), (3, 2)])
@PADDED
def test_batches_are_cut_in_two_until_all_processes_have_as_many(rows, processes, padded):
    plan = plan_batches([100 + one for one in range(rows)], 240, padded=padded, processes=processes)
    assert plan.missing == (0 if rows >= processes * plan.steps else processes * plan.steps - rows)
    assert plan.steps == math.ceil(math.ceil(rows / 2) / processes)  # not a step more than without
    assert sum(map(len, learned(plan, epoch_of(plan, 0, 0)))) == rows


def test_what_fills_up_an_epoch_is_not_always_beside_the_shortest_rows():
    lengths = [1000 + one for one in range(21)]
    plan = plan_batches(lengths, 1100, padded=True, processes=4)
    assert plan.missing == 3
    rows = [[row for [row] in epoch_of(plan, 0, epoch)[0]] for epoch in range(12)]
    assert len({own[-1] for own in rows}) > 3
    assert sum(own[:-1] == sorted(own[:-1], reverse=True) for own in rows) < 4  # nor do steps come in order of length


@LENGTHS
@PADDED
def test_the_largest_batch_is_as_large_as_any_that_comes(lengths, padded):
    plan = plan_batches(lengths, BUDGET, padded=padded, processes=2)
    crops = DRAW.integers(1, 18, len(lengths))
    rows, tokens = plan.worst()
    most = plan.most(crops)
    seen = [batch for epoch in range(20) for batch in learned(plan, epoch_of(plan, 1, epoch))]
    largest = max(cost(batch, lengths, padded=padded) for batch in seen)
    assert largest <= rows * tokens <= 1.1 * largest
    assert rows in {len(batch) for batch in seen}
    assert max(int(crops[batch].sum()) for batch in seen) <= most <= int(np.sort(crops)[-plan._sizes.max() :].sum())


def test_the_memory_of_planned_batches_is_not_that_of_the_longest_row_in_every_row(write_recipe):
    """A row of 2,500 tokens with 17 crops, and many of 100 without: 25 of these are no 25 of that."""
    recipe = load_recipe([write_recipe(max_tokens_per_batch=2500, per_device_train_batch_size=None)])
    lengths = [Lengths(2500, 2400, 30, ((1344, 1344),)), *[Lengths(100, 0, 20)] * 100]
    plan = plan_batches([row.tokens for row in lengths], 2500, padded=True)
    shape = Shape.of(lengths, recipe, 16, plan)
    assert (shape.rows, shape.tokens, shape.image_tokens, shape.crops) == (1, 2500, 2400, 17)
    assert shape.supervised == 25 * 20  # of the batches of short rows: each number is the most of any batch
    lengths = [*[Lengths(100, 10, 20)] * 99, Lengths(100, 10, 50)]
    shape = Shape.of(lengths, recipe, 16, plan_batches([100] * 100, 2500, padded=True))
    assert (shape.rows, shape.tokens, shape.image_tokens, shape.padded) == (25, 100, 10, False)
    assert shape.supervised == 22  # 25 of 22 are more than 24 of 20 and one of 50, not by a row


def test_accelerate_and_a_resumed_run_get_the_batches_of_their_epoch():
    """As transformers resumes: it skips batches, and tells what it then finds in the loader of the epoch."""
    plan = plan_batches(ROWS["catalogue"], BUDGET, padded=True, processes=2)
    sampler = Planned(plan, seed=5, process=1)
    data = torch.utils.data.DataLoader(list(range(700)), batch_sampler=sampler, collate_fn=list)
    loader = prepare_data_loader(data, num_processes=1, process_index=0)
    for epoch in range(2):
        loader.set_epoch(epoch)
        assert list(loader) == list(plan.batches(5, epoch, 1))
    skipping = skip_first_batches(loader, 3)
    skipping.batch_sampler.batch_sampler.set_epoch(4)
    assert list(skipping) == list(plan.batches(5, 4, 1))[3:]


@pytest.mark.parametrize(("process", "last", "masked"), [(0, True, False), (1, True, True), (1, False, False)])
def test_nothing_is_learned_from_what_only_fills_up_an_epoch(process, last, masked):
    made = object.__new__(trainer.Trainer)
    made.plan = plan_batches([1000, 1001, 1002], 1100, padded=True, processes=2)
    assert made.plan.missing == 1
    state = SimpleNamespace(end_of_dataloader=last)
    made.accelerator = SimpleNamespace(gradient_state=state, process_index=process)
    made.model_accepts_loss_kwargs, made.compute_loss_func = False, None
    found = [{"labels": torch.zeros(1, 9), "rows": [number]} for number in range(2)]
    made._get_num_items_in_batch(found, torch.device("cpu"))
    assert [bool((batch["labels"] == -100).all()) for batch in found] == [False, masked]


KEYS = {"max_tokens_per_batch": 1500, "per_device_train_batch_size": None, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize("accumulated", [1, 3])
def test_preview_says_the_plan_and_its_steps_are_those_of_the_trainer(write_recipe, tmp_path, capsys, accumulated):
    keys = KEYS | {"gradient_accumulation_steps": accumulated, "num_train_epochs": 2.5, "max_steps": -1}
    recipe = load_recipe([write_recipe(**keys)])
    prepared = preview.prepare(recipe)
    plan, rows = prepared.plan, len(prepared.train)
    said = capsys.readouterr().out
    assert f"batches:             {len(plan.starts)} planned of at most 1,500 tokens, 4.0 rows and " in said
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", num_train_epochs=2.5,
        gradient_accumulation_steps=accumulated,
    )  # fmt: skip
    made = Trainer(model=torch.nn.Linear(1, 1), args=arguments, train_dataset=list(range(rows)))
    made.plan = plan
    values = made.set_initial_training_values(arguments, trainer.Trainer.get_train_dataloader.__get__(Planning(made))())
    epoch, total = preview.steps(rows, recipe, plan)
    assert (epoch, total) == (values[1], values[-1])
    assert epoch == math.ceil(plan.steps / accumulated) and rows / plan.steps == 4.0
    assert f"steps:               {epoch:>6} per epoch of {rows} rows, {rows / epoch:.1f} rows per step on" in said
    report = preview.fit(recipe, prepared)
    assert report.startswith("memory, estimated for 4 rows of ")
    assert f"an epoch of {epoch:,} steps: " in preview.fit(recipe_with(recipe, gpu="H100"), prepared)


def test_where_memory_was_not_enough_a_smaller_budget_is_named(write_recipe):
    recipe = load_recipe([write_recipe(**KEYS)])
    shape = Shape(4, 355, 313, 2, 20, ((336, 336),))
    said = oom_message(recipe, load_config(recipe), shape)
    assert "max_tokens_per_batch: 750 with gradient_accumulation_steps: 4: " in said
    assert "per_device" not in said
    assert "max_tokens_per_batch" not in oom_message(recipe, load_config(recipe), replace(shape, rows=1))


def recipe_with(recipe, **preview):
    return replace(recipe, preview=replace(recipe.preview, **preview))


class Planning:
    """What of our trainer makes its loader, without a model."""

    _planned = trainer.Trainer._planned

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)


def test_preview_names_rows_that_are_longer_than_a_batch(write_recipe):
    with pytest.raises(ValueError, match=r"`max_tokens_per_batch` is 300, expected 355 or more: 32 of 32 rows alone"):
        preview.prepare(load_recipe([write_recipe(**KEYS | {"max_tokens_per_batch": 300})]))


def test_without_padding_lengths_are_not_padded_up(write_recipe):
    keys = KEYS | {"max_tokens_per_batch": 370, "pad_to_multiple_of": 64, "padding_free": True}
    recipe = load_recipe([write_recipe(**keys)])
    assert preview.prepare(recipe).plan.worst()[1] <= 370  # rows of up to 362 tokens, not of 384


def test_a_run_that_is_cut_in_its_second_epoch_goes_on_to_the_same_bits(write_recipe, tmp_path, monkeypatch):
    keys = KEYS | {"model_name_or_path": str(REPOSITORY / "recipes" / "tiny_base"), "held_out": 24}
    keys |= {"max_steps": 5, "save_steps": 3, "lora_dropout": 0.1, "logging_steps": 1, "eval_rows": 1}
    keys |= {"max_new_tokens": 1, "generation_rows": 0}
    seen = []
    original = run.Trainer._get_num_items_in_batch
    monkeypatch.setattr(
        run.Trainer,
        "_get_num_items_in_batch",
        lambda self, batches, device: (
            seen.append([batch["rows"] for batch in batches]) or original(self, batches, device)
        ),
    )
    run.main([write_recipe(**keys, output_dir=str(tmp_path / "whole"))])
    whole = list(seen)
    # Three batches an epoch make two steps, of two batches and of one.
    assert [len(step) for step in whole] == [2, 1, 2, 1, 2]
    epochs = [sorted(row for step in whole[first : first + 2] for batch in step for row in batch) for first in (0, 2)]
    assert epochs[0] == epochs[1] and len(set(epochs[0])) == len(epochs[0]) == 12
    assert whole[0] != whole[2]

    class PowerCut(Exception):
        pass

    def cut(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise PowerCut
        return step(self, *args, **kwargs)

    step = run.Trainer.training_step
    path = write_recipe(**keys, output_dir=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        patch.setattr(run.Trainer, "training_step", cut)
        with pytest.raises(PowerCut):
            run.main([path])
    seen.clear()
    run.main([path])
    assert seen == whole[3:]
    adapters = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut")]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(weight, adapters[1][name]) for name, weight in adapters[0].items())
    state = json.loads((tmp_path / "whole" / "trainer_state.json").read_text())
    assert state["epoch"] == pytest.approx(2 + 2 / 3)
