"""The demo draws, trains, scores and explains; its scores are held by the slow test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sft_phi3v import demo

REPOSITORY = Path(__file__).resolve().parents[1]


def test_the_summary_is_made_of_the_runs_own_numbers():
    def scores(parsed, category, price):
        fields = {"category3_code": {"exact": category}, "full_price": {"median_ape": 0.1, "within_10pct": price}}
        return {"rows": 2, "parsed": parsed, "stopped": 1.0, "fields": fields}

    metrics = {
        "before": scores(0.0, 0.01, 0.02),
        "after": scores(0.97, 0.91, 0.83),
        "after_shuffled": scores(0.96, 0.13, 0.21),
        "baseline": scores(1.0, 0.12, 0.22),
    }
    completions = [
        {"row": 17, "reference": "wanted", "before": {"text": "a caption"}, "after": {"text": "an answer"}}
    ] * 2
    text = demo.summary(metrics, completions, "outputs/somewhere", 4.2)
    for piece in ("0% → 97%", "1% → 91%", "2% → 83%", "13%", "12%", "22%", "4.2 minutes", "Of 2 held-out", "row 17"):
        assert piece in text
    for piece in ("wanted", "a caption", "an answer", "outputs/somewhere/", "recipes/burberry.yaml"):
        assert piece in text


def test_a_drawing_that_was_cut_is_started_again(tmp_path, monkeypatch):
    def cut(folder, **kwargs):
        folder.mkdir()
        (folder / "train.parquet").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo, "write_catalogue", cut)
        with pytest.raises(KeyboardInterrupt):
            demo.ensure_catalogue(tmp_path / "catalogue")
    assert not (tmp_path / "catalogue").exists()

    def draw(folder, **kwargs):
        folder.mkdir()
        (folder / "train.parquet").write_bytes(b"whole")

    monkeypatch.setattr(demo, "write_catalogue", draw)
    demo.ensure_catalogue(tmp_path / "catalogue")
    assert (tmp_path / "catalogue" / "train.parquet").read_bytes() == b"whole"
    monkeypatch.setattr(demo, "write_catalogue", lambda folder: pytest.fail("drawn twice"))
    demo.ensure_catalogue(tmp_path / "catalogue")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_learns_what_it_claims(tmp_path):
    """The README's table, from the very command: `make demo` runs `python -m sft_phi3v.demo`."""
    for name in ("accelerate_configs", "recipes", "sft_phi3v"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    result = subprocess.run(
        [sys.executable, "-m", "sft_phi3v.demo"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1700,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = json.loads((tmp_path / "outputs" / "tiny" / "metrics.json").read_text())
    category = {name: scores["fields"]["category3_code"]["exact"] for name, scores in metrics.items()}
    price = {name: scores["fields"]["full_price"]["within_10pct"] for name, scores in metrics.items()}
    assert metrics["before"]["parsed"] <= 0.05
    assert metrics["after"]["parsed"] >= 0.95
    assert metrics["after"]["stopped"] >= 0.95
    assert category["after"] >= 0.85
    assert price["after"] >= 0.75
    assert category["after_shuffled"] <= category["baseline"] + 0.10
    assert "What happened" in result.stdout
