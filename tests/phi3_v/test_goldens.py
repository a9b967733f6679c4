"""The committed subset of the goldens is a true copy, represents every kind of case, and stays small."""

import json

import pytest
from goldens import FULL_SET, REPOSITORY, SUBSET


def kinds(goldens):
    return {json.loads(path.read_text())["kind"] for path in (goldens / "model" / "cases").glob("*.json")}


def test_the_subset_equals_the_full_set_byte_for_byte():
    if not FULL_SET.is_dir():
        pytest.skip(f"the full set is not beside the repository: {FULL_SET} does not exist")
    files = [path for path in SUBSET.rglob("*") if path.is_file()]
    assert len(files) > 50
    for path in files:
        assert path.read_bytes() == (FULL_SET / path.relative_to(SUBSET)).read_bytes(), path
    assert kinds(SUBSET) == kinds(FULL_SET)


def test_every_case_of_the_subset_is_whole():
    cases = SUBSET / "model" / "cases"
    assert len(kinds(SUBSET)) == 19
    for path in cases.glob("*.json"):
        meta = json.loads(path.read_text())
        assert path.with_suffix(".safetensors").is_file()
        assert (SUBSET / "model" / "checkpoints" / meta["checkpoint"] / meta["config"]).is_file()
        assert all((SUBSET / "image" / "inputs" / file).is_file() for file in meta.get("images", []))


def test_the_committed_goldens_stay_under_eight_megabytes():
    assert sum(path.stat().st_size for path in SUBSET.rglob("*") if path.is_file()) < 8_000_000
    assert not list((REPOSITORY / "tests" / "data").rglob("tokenizer.json")), "Microsoft's tokenizer stays outside"
