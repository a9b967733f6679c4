"""Scores worked out by hand, intervals that hold what they promise, and tests that are not fooled by chance."""

import json

import numpy as np
import pytest

from sft_phi3v.scoring import Completion, Scorer, better, field_statistics

ANSWER = "Product: {title}, Category: {category}, Full Price: {price}"


def said(title, category, price):
    return f"Product: {title}, Category: {category}, Full Price: {price}"


REFERENCES = [said("Red Coat", "COATS", "1000.0"), said("Blue Hat", "HATS", "200.0"), said("A, B", "COATS", "50.0")]


def completions(*texts, stopped=True):
    return [
        Completion(row, reference, text, stopped)
        for row, (reference, text) in enumerate(zip(REFERENCES, texts, strict=True))
    ]


def values(kind, found, wanted):
    rows = np.arange(len(wanted))
    return {name: float(statistic(rows)) for name, statistic in field_statistics(kind, found, wanted).items()}


def test_scores_worked_out_by_hand():
    scorer = Scorer(ANSWER, REFERENCES)
    found = scorer.score(
        completions(
            said("Red Coat", "COATS", "1,090.00"),  # 9 % off
            said("Green Hat", "HATS", "250"),  # title wrong, 25 % off
            "a picture of a coat",  # does not parse: wrong in every field
        )
    )
    assert (found["rows"], found["parsed"], found["stopped"]) == (3, pytest.approx(2 / 3), 1.0)
    assert found["length"] == pytest.approx((56 + 51 + 19) / 3)
    title, category, price = (found["fields"][field] for field in ("title", "category", "price"))
    assert title["exact"] == category["exact"] / 2 == pytest.approx(1 / 3)
    assert title["token_f1"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert title["edit_similarity"] == pytest.approx((1 + 5 / 9 + 0) / 3)  # Green → Blue: four edits
    assert price["median_ape"] == price["mean_ape"] == pytest.approx(0.17)
    assert price["within_10pct"] == pytest.approx(1 / 3)
    assert price["median_ae"] == price["mean_ae"] == pytest.approx(70)
    assert price["correlation"] is None  # two numbers always lie on a line


def test_perfect_completions_score_perfectly_and_stopping_is_counted():
    scorer = Scorer(ANSWER, REFERENCES)
    found = scorer.score(completions(*REFERENCES, stopped=False))
    assert (found["parsed"], found["stopped"]) == (1.0, 0.0)
    assert set(found["fields"]["title"].values()) == {1.0}
    price = found["fields"]["price"]
    assert (price["median_ape"], price["mean_ae"], price["within_10pct"]) == (0.0, 0.0, 1.0)
    assert price["correlation"] == pytest.approx(1)
    assert found["intervals"]["parsed"] == [1.0, 1.0]


def test_a_price_that_is_no_number_is_wrong_but_has_no_error_to_take_a_median_of():
    scorer = Scorer(ANSWER, REFERENCES)
    found = scorer.score(completions(*[said("Red Coat", "COATS", "dear")] * 3))
    assert found["fields"]["price"].pop("within_10pct") == 0.0
    assert set(found["fields"]["price"].values()) == {None}
    json.dumps(found, allow_nan=False)


def test_the_references_say_of_what_kind_a_field_is():
    many = [said(f"Title {number}", "AB"[number % 2], number) for number in range(12)]
    assert Scorer(ANSWER, many).kinds == {"title": "text", "category": "category", "price": "number"}
    assert Scorer(ANSWER, [*many, said("x", "A", "on request")]).kinds["price"] == "text"
    assert Scorer(ANSWER, many[:5]).kinds["category"] == "text"  # 2 values in 5 rows may be chance
    assert Scorer(None, ["a cat", "a dog"]).kinds == {"answer": "free"}


def test_a_reference_of_zero_divides_nothing():
    reference = said("x", "y", "0")
    scorer = Scorer(ANSWER, [reference])
    right = scorer.score([Completion(0, reference, reference, True)])["fields"]["price"]
    wrong = scorer.score([Completion(0, reference, said("x", "y", "5"), True)])
    assert (right["median_ape"], right["within_10pct"]) == (0.0, 1.0)
    price = wrong["fields"]["price"]
    assert (price["median_ape"], price["mean_ape"], price["within_10pct"], price["mean_ae"]) == (None, None, 0.0, 5.0)
    json.dumps(wrong, allow_nan=False)


def test_macro_f1_weighs_rare_categories_like_common_ones():
    wanted = ["coat"] * 8 + ["hat"] * 2
    assert values("category", ["coat"] * 10, wanted) == {"exact": 0.8, "macro_f1": pytest.approx(8 / 9 / 2)}
    found = ["coat"] * 7 + ["hat"] + ["hat", None]
    # coat: 7 right of 8 there and 7 given; hat: 1 right of 2 there and 2 given
    assert values("category", found, wanted)["macro_f1"] == pytest.approx((14 / 15 + 2 / 4) / 2)


def test_the_confusion_table_says_what_was_taken_for_what():
    references = [said("x", category, 1) for category in ["COATS"] * 4 + ["HATS"] * 3]
    texts = [said("x", category, 1) for category in ["COATS", "COATS", "HATS", "shoes", "HATS", "HATS"]] + ["no answer"]
    rows = [Completion(0, one, other, True) for one, other in zip(references, texts, strict=True)]
    assert Scorer(ANSWER, references).score(rows)["confusion"]["category"] == {
        "COATS": {"COATS": 2, "HATS": 1, "other": 1},
        "HATS": {"HATS": 2, "other": 1},
    }


def test_text_is_compared_in_several_ways():
    found = values("text", ["red coat!", None, "A big red coat"], ["Red Coat", "Hat", "a red coat"])
    assert found["exact"] == 0
    assert found["normalised"] == pytest.approx(1 / 3)
    assert found["token_f1"] == pytest.approx((1 + 0 + 6 / 7) / 3)
    free = values("free", ["the cat sat on the mat", "x"], ["the cat lay on a mat", "y"])
    assert free["rouge_l"] == pytest.approx((8 / 12 + 0) / 2)  # the cat … on … mat


def test_numbers_correlate():
    found = values("number", ["1", "2", "3", "none", "5"], ["10", "20", "30", "40", "60"])
    assert found["correlation"] == pytest.approx(np.corrcoef([1, 2, 3, 5], [10, 20, 30, 60])[0, 1])
    assert np.isnan(values("number", ["7"] * 5, ["1", "2", "3", "4", "5"])["correlation"])


def test_the_baseline_is_the_majority_and_the_median_of_the_training_rows():
    scorer = Scorer(ANSWER, REFERENCES)
    train = [said("Red Coat", "HATS", "100"), said("Red Coat", "HATS", "190"), said("Old Bag", "BAGS", "9000")]
    found = scorer.baseline(train, REFERENCES)
    assert found["fields"]["title"]["exact"] == found["fields"]["category"]["exact"] == pytest.approx(1 / 3)
    # 190 against 1000, 200 and 50: errors 0.81, 0.05 and 2.8
    assert found["fields"]["price"]["median_ape"] == pytest.approx(0.81)
    assert found["fields"]["price"]["within_10pct"] == pytest.approx(1 / 3)


def test_whitespace_around_an_answer_is_no_mistake():
    assert Scorer(None, ["a cat "]).score([Completion(0, "a cat ", "a cat", True)])["fields"]["answer"]["exact"] == 1
    scorer = Scorer("Name: {title}\n", ["Name: x\n"])
    assert scorer.score([Completion(0, "Name: x\n", "Name: x", True)])["fields"]["title"]["exact"] == 1


def test_references_that_do_not_read_back_break_nothing():
    answer = "{p:.0f} or {p:.2f}"  # the field is there twice, in two forms: it never reads back
    scorer = Scorer(answer, ["3 or 3.14"])
    found = scorer.score([Completion(0, "3 or 3.14", "3 or 3.14", True)])["fields"]["p"]
    assert set(found.values()) == {0.0}
    assert scorer.baseline(["3 or 3.14"], ["3 or 3.14"])["fields"]["p"]["exact"] == 0.0
    found = Scorer("{p} USD", ["5 USD"]).baseline(["on request USD"], ["5 USD"])["fields"]["p"]
    assert (found["median_ape"], found["within_10pct"]) == (None, 0.0)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Of 60 samples of 100 rows from a model that is right in 70 % of them, some 57 intervals hold the 70 %."""
    random = np.random.default_rng(0)
    held = 0
    for _ in range(60):
        right = random.random(100) < 0.7
        rows = [Completion(0, "yes", "yes" if one else "no", True) for one in right]
        low, high = Scorer(None, ["yes"] * 100).score(rows)["intervals"]["fields"]["answer"]["exact"]
        assert 0.1 < high - low < 0.25
        held += low <= 0.7 <= high
    assert 52 <= held <= 60
    assert Scorer(None, ["yes"]).score([Completion(0, "yes", "yes", True)])["intervals"]["parsed"] is None


def test_a_paired_test_finds_a_small_difference_and_is_not_fooled_by_none():
    random = np.random.default_rng(0)
    before = (random.random(200) < 0.5).astype(float)
    after = before.copy()
    after[np.flatnonzero(before == 0)[:15]] = 1  # 15 rows more, and none less
    found = better(after, before)
    assert found["difference"] == pytest.approx(15 / 200) and found["p"] < 0.001
    assert better(before, after)["p"] > 0.99
    assert better(after, after) == {"difference": 0.0, "p": 1.0}
    assert better(random.permutation(before), before)["p"] > 0.05
