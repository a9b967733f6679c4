"""The page: every number is that of metrics.json, hostile text stays text, and a real browser finds no fault."""

import base64
import io
import json
import random
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from PIL import Image

from sft_phi3v import hub, report, run, scoring
from sft_phi3v.charts import curve, histogram
from sft_phi3v.collator import IGNORED, Collator
from sft_phi3v.data import Template
from sft_phi3v.gallery import MOST_ROWS
from sft_phi3v.recipe import load_recipe
from sft_phi3v.report import mask_faults
from sft_phi3v.scoring import Completion, Scorer, better

REPOSITORY = Path(__file__).resolve().parents[1]
ANSWER = "Product: {title}, Category: {kind}, Price: {price}"
HOSTILE = (
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "\"><b onclick='window.hacked = 1'>${price} {{ 7 * 7 }} $\\frac{1}{2}$",
    "שלום \u202eעולם مرحبا",
    "w" * 400,
    "one\ntwo\u2028three",
)


def text_run(text, tokens, supervised=False, picture=False):
    return {"text": text, "tokens": tokens, "supervised": supervised, "picture": picture}


RIGHT_MASK = [
    text_run("<s><|user|>\n", 3),
    text_run("<|image|>", 313, picture=True),
    text_run("<s>\nWhat is it?<|end|>\n<|assistant|>", 9),
    text_run("A coat.<|end|>", 5, supervised=True),
    text_run("\n", 1),
]


def overview(runs=RIGHT_MASK, leaked=()):
    bins = {"edges": [0, 200, 400, 600], "counts": [3, 5, 2]}
    return {
        "rows": {"train": 10, "held_out": 5},
        "leakage": {"pictures": len(leaked), "rows": list(leaked)},
        "histograms": {"tokens": bins, "image_tokens": {"edges": [312.5, 313.5], "counts": [10]}, "width": bins},
        "supervised_share": 0.0151,
        "example": {"row": 0, "runs": runs},
    }


def write_run(folder, rows, *, answer=ANSWER, wrong=(), images=None, noise=False, **keys):
    """A data set of these rows, and what a run on it would leave; `wrong` rows are answered with the next row's."""
    source, output = folder / "source", folder / "out"
    source.mkdir(parents=True)
    output.mkdir()
    for index, row in enumerate(rows):
        if images is None:
            row["image"] = f"{index % 9}.jpg" if noise else f"{index}.png"
            picture = Image.effect_noise((320, 240), 90) if noise else Image.new("RGB", (40, 30), (index % 256, 90, 90))
            if not (source / row["image"]).exists():
                picture.convert("RGB").save(source / row["image"])
    for split in ("train", "test"):
        lines = [json.dumps(row) for row in rows]
        (source / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    keys = {
        "model_name_or_path": str(REPOSITORY / "recipes" / "tiny_base"),
        "dataset_name": str(source),
        "output_dir": str(output),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        **({"answer": answer} if answer else {}),
        **keys,
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(keys))
    if answer:
        references = [Template(answer).render(row) for row in rows]
    else:
        references = [row["messages"][-1]["content"] for row in rows]
    texts = {
        "before": ["a plain picture"] * len(rows),
        "after": [references[(index + (index in wrong)) % len(rows)] for index in range(len(rows))],
        "after_shuffled": references[1:] + references[:1],
    }
    scorer = Scorer(answer, references)
    completions = {
        name: [Completion(row, *pair, True) for row, pair in enumerate(zip(references, some, strict=True))]
        for name, some in texts.items()
    }
    metrics = {"baseline": scorer.baseline(references, references)}
    metrics |= {name: scorer.score(found) for name, found in completions.items()}
    metrics["after_shuffled"]["moved"] = len(rows)
    values = {name: scorer.main_values(found) for name, found in completions.items()}
    for name, key in (("before", "better_than_before"), ("after_shuffled", "better_than_shuffled")):
        metrics["after"][key] = {field: better(values["after"][field], values[name][field]) for field in scorer.fields}
    metrics["after"]["errors"] = scorer.worst(completions["after"])
    (output / "metrics.json").write_text(json.dumps(metrics))
    (output / "data.json").write_text(json.dumps(overview()))
    lines = [
        {"row": row, "reference": reference}
        | {
            name: {"text": some[row], "stopped": row % 5 > 0, "fields": scorer.parse(some[row])}
            for name, some in texts.items()
        }
        for row, reference in enumerate(references)
    ]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (output / "completions.jsonl").write_text(text + "\n", encoding="utf-8")
    history = [{"step": step, "loss": 5 / step, "grad_norm": 1.0, "data_wait": 0.02} for step in range(1, 40)]
    history += [{"step": 20, "eval_loss": 0.4, "eval_title_exact": 0.5}, {"step": 39, "eval_loss": 0.2}]
    (output / "trainer_state.json").write_text(json.dumps({"log_history": history, "global_step": 39}))
    return output, [str(recipe)]


KINDS = ("BAGS", "<b>COATS</b>", 'HATS "x"')


def catalogue(count, titles=None):
    titles = titles or [f"Thing {index}" for index in range(count)]
    return [
        {"title": titles[index], "kind": KINDS[index % len(KINDS)], "price": 100.0 + 50 * index}
        for index in range(count)
    ]


def page_of(folder, argv):
    report.main(argv)
    return folder / "report.html"


def text_of(folder, argv):
    return page_of(folder, argv).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    titles = [*HOSTILE, *(f"Plain {index}" for index in range(30))]
    return write_run(folder, catalogue(36, titles), wrong={1, 2, 7, 20})


@pytest.fixture(scope="module")
def hostile_page(hostile_run):
    return page_of(*hostile_run)


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("there is no chromium on this machine")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@pytest.fixture
def visit(browser):
    """Opens a page; at the end of the test nothing was wrong with it, and nothing but itself was asked for."""
    contexts, troubles = [], []

    def visit(path, *, width=1000, height=900, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: troubles.append(dialog.message))
        page.on("request", lambda request: request.url.startswith("data:image/jpeg") or troubles.append(request.url))
        page.goto(path.as_uri())
        assert troubles == [path.as_uri()], "the page asks for itself and nothing else, and complains of nothing"
        troubles.clear()
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not troubles


class DataElements(HTMLParser):
    """Every <data> element of a page: its key, its value, and what is read."""

    def __init__(self):
        super().__init__()
        self.found, self.open = [], None

    def handle_starttag(self, tag, attributes):
        if tag == "data":
            self.open = [dict(attributes)["data-key"], dict(attributes)["value"], ""]

    def handle_data(self, data):
        if self.open:
            self.open[2] += data

    def handle_endtag(self, tag):
        if tag == "data":
            self.found.append(tuple(self.open))
            self.open = None


def numbers(tree, path=""):
    if isinstance(tree, dict | list):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {
            key: value
            for name, inner in pairs
            for key, value in numbers(inner, f"{path}/{str(name).replace('~', '~0').replace('/', '~1')}").items()
        }
    return {path[1:]: tree} if tree is not None else {}


@pytest.mark.parametrize("run", ["merged_run", "hostile_run"])
def test_every_number_of_the_metrics_is_on_the_page_and_every_one_on_the_page_is_theirs(run, request):
    found = request.getfixturevalue(run)
    folder, argv = (found, [str(found / "recipe.yaml"), "--output_dir", str(found)]) if run == "merged_run" else found
    parser = DataElements()
    parser.feed(text_of(folder, argv))
    expected = numbers(json.loads((folder / "metrics.json").read_text()))
    assert len(expected) > 50
    assert {key for key, _, _ in parser.found} == expected.keys()
    for key, value, text in parser.found:
        assert json.loads(value) == expected[key]
        shown = float(text.strip("%").replace(",", ""))
        if text.endswith("%"):
            assert shown == pytest.approx(100 * expected[key], abs=0.051)
        else:
            assert shown == pytest.approx(expected[key], rel=6e-3)
    shares = {key for key, _, text in parser.found if text.endswith("%")}
    assert "after/parsed" in shares
    assert any("/intervals/" in key for key in shares)
    assert any("/confusion/" in key for key in expected) == (run == "hostile_run")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_loads_alone_and_never_scrolls_sideways(visit, hostile_page, scheme):
    for width in (390, 820, 1600):
        page = visit(hostile_page, width=width, color_scheme=scheme)
        page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
        wide, there = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert wide <= there == width
        # Only boxes that are meant to may scroll; nothing sticks out of the others, or is cut off in them.
        assert page.evaluate(
            """[...document.querySelectorAll("main *, header *")]
            .filter((one) => !one.closest(".scroll, svg, .skip, select"))
            .filter((one) => one.getBoundingClientRect().right > innerWidth + 1 ||
              (one.clientWidth && one.scrollWidth > one.clientWidth + 1))
            .map((one) => one.outerHTML.slice(0, 80))"""
        ) == []  # fmt: skip


def test_hostile_text_is_text(visit, hostile_page):
    page = visit(hostile_page)
    page.wait_for_timeout(50)
    assert page.evaluate("window.hacked") is None
    said = page.locator(".cards").text_content()
    for title in HOSTILE:
        assert title in said
    assert page.locator(".card").count() == 36
    assert page.locator(".card b, .card script").count() == 0
    assert page.locator(".card img").count() == 36
    assert [page.locator("select[name=category-1] option").nth(place).text_content() for place in range(1, 4)] == [
        f"{kind} (12)" for kind in sorted(KINDS)
    ]


def shown_rows(page):
    return [
        int(text.removeprefix("Row ")) for text in page.locator(".card:visible h3 > span:first-child").all_inner_texts()
    ]


def test_filters_show_exactly_the_rows_that_the_data_say(visit, hostile_page):
    page = visit(hostile_page)
    wrong, every = {1, 2, 7, 20}, set(range(36))
    assert shown_rows(page)[4:] == sorted(every - wrong), "worst first, then as they come"
    assert set(shown_rows(page)[:4]) == wrong

    def choose(**values):
        page.get_by_role("button", name="Show all").click()
        for name, value in values.items():
            control = page.locator(f"#filters [name={name.replace('_', '-')}]")
            control.fill(value) if name == "text" else control.select_option(value)
        rows = set(shown_rows(page))
        assert page.locator("#shown[aria-live]").inner_text() == f"{len(rows)} of 36 rows"
        return rows

    coats = {row for row in every if KINDS[row % 3] == "<b>COATS</b>"}
    near = {20}  # row 20 names row 21's price, which is within 10 %
    assert choose() == every
    assert choose(result="wrong") == wrong
    assert choose(result="right") == every - wrong
    assert choose(result="wrong 0") == wrong
    assert choose(result="right 1") == every - wrong
    assert choose(result="wrong 2") == wrong - near
    assert choose(category_1="=<b>COATS</b>") == coats
    assert choose(category_1="=<b>COATS</b>", result="wrong") == coats & wrong
    assert choose(text="plain 2") == {7, 8, *range(26, 36)}, "row 7 is answered with the title of row 8"
    assert choose(text="nothing like it") == set()
    assert choose() == every


def test_everything_is_reached_by_keyboard_and_seen_when_it_is(visit, hostile_page):
    page = visit(hostile_page)
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            "[document.activeElement.className || document.activeElement.name || document.activeElement.type || "
            "document.activeElement.getAttribute('href'), getComputedStyle(document.activeElement).outlineStyle]"
        )
        assert outline != "none", name
        reached.append(name)
        if name == "button":
            break
    assert reached[0] == "skip"
    assert [name for name in reached if name in ("result", "category-1", "text", "button")] == [
        "result",
        "category-1",
        "text",
        "button",
    ]
    page.locator("[name=result]").focus()
    page.keyboard.press("ArrowDown")
    assert set(shown_rows(page)) == {1, 2, 7, 20}
    page.locator(".card:visible summary").first.focus()
    page.keyboard.press("Enter")
    assert page.locator(".card:visible details[open]").count() == 1
    assert "grey pictures" in page.locator("#scores").inner_text()


def test_headings_are_in_order_and_everything_has_a_name(visit, hostile_page):
    page = visit(hostile_page)
    assert page.locator("html").get_attribute("lang") == "en"
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map((one) => +one.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))
    assert page.locator("svg").count() > 5
    for chart in page.locator("svg").all():
        assert chart.get_attribute("role") == "img"
        assert len(chart.get_attribute("aria-label")) > 20
    assert page.locator("img:not([alt])").count() == 0
    identifiers = page.evaluate("[...document.querySelectorAll('[id]')].map((one) => one.id)")
    assert len(identifiers) == len(set(identifiers))


CONTRASTS = """(selectors) => selectors.map((selector) => {
  const numbers = (colour) => {
    const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (colour) => numbers(colour).slice(0, 3).map((one) => one / 255)
    .map((one) => (one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4))
    .reduce((sum, one, place) => sum + one * [0.2126, 0.7152, 0.0722][place], 0);
  const element = document.querySelector(selector);
  let behind = element;
  while (behind && numbers(getComputedStyle(behind).backgroundColor)[3] < 255) behind = behind.parentElement;
  const style = getComputedStyle(element);
  const text = light(element.closest("svg") ? style.fill : style.color);
  const page = light(getComputedStyle(behind).backgroundColor);
  return [selector, (Math.max(text, page) + 0.05) / (Math.min(text, page) + 0.05)];
})"""


def test_text_is_readable_in_both_themes(visit, hostile_page):
    backgrounds = set()
    for scheme in ("light", "dark"):
        page = visit(hostile_page, color_scheme=scheme)
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        selectors = [
            *("h1", ".verdict", ".answer", ".questions li", "nav a", "main p", ".interval", ".scores .main", "th"),
            *("summary", ".mask", ".mask mark", ".right", ".wrong", ".given", ".card dt", ".card .label", "svg text"),
            *("td.same", "td.other", ".filters label", "select", "pre"),
        ]
        for selector, contrast in page.evaluate(CONTRASTS, selectors):
            assert contrast >= 4.5, (scheme, selector)
    assert len(backgrounds) == 2


def test_paper_gets_the_light_page_without_what_one_clicks(visit, hostile_page):
    page = visit(hostile_page, color_scheme="dark")
    assert page.locator("#filters").is_visible()
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(253, 252, 250)"
    for selector in ("#filters", "nav", ".card details"):
        assert not page.locator(selector).first.is_visible()
    assert page.locator(".card").first.evaluate("(card) => getComputedStyle(card).breakInside") == "avoid"
    assert page.locator(".verdict").is_visible()


def test_without_scripts_everything_is_there(visit, hostile_page):
    page = visit(hostile_page, java_script_enabled=False)
    assert page.locator(".card:visible").count() == 36
    assert not page.locator("#filters").is_visible()


def test_the_first_screen_says_what_there_is_to_know(visit, hostile_page):
    page = visit(hostile_page, width=390, height=844)
    answers = page.locator(".questions .answer")
    assert answers.all_inner_texts() == ["Yes, in 3 of 3 fields", "Yes, in 2 of 3 fields", "36 held-out rows"]
    assert page.locator(".verdict").inner_text().startswith("Better than before in title, kind and price.")
    assert answers.last.bounding_box()["y"] < 844


def test_a_run_gives_the_same_page_twice_and_names_no_path_of_this_machine(merged_run, capsys):
    argv = [str(merged_run / "recipe.yaml"), "--output_dir", str(merged_run)]
    first = page_of(merged_run, argv).read_bytes()
    assert re.search(r"report\.html \(\d+\.\d MB\)$", capsys.readouterr().out.strip())
    assert page_of(merged_run, argv).read_bytes() == first
    hub.check_for_leaks({"report.html": first})
    page = first.decode()
    assert "Merged and verified" in page
    assert "Refused" not in page
    assert page.count('src="data:image/jpeg') == 3
    assert not list(merged_run.glob(".report*"))


def test_a_refused_merge_is_said_loudly_and_a_changed_adapter_too(merged_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(merged_run, folder, ignore=shutil.ignore_patterns("wandb"))
    argv = [str(folder / "recipe.yaml"), "--output_dir", str(folder)]
    record = json.loads((folder / "merged" / "merge_report.json").read_text())
    assert "proof of another adapter" not in text_of(folder, argv)
    record["adapter"]["adapter_model.safetensors"] = "0" * 64
    (folder / "merged" / "merge_report.json").write_text(json.dumps(record))
    assert "proof of another adapter" in text_of(folder, argv)
    (folder / "merged").rename(folder / "merged.refused")
    record |= {"verified": False, "problems": ["logits: relative error 97.00% <b>"]}
    (folder / "merged.refused" / "merge_report.json").write_text(json.dumps(record))
    page = text_of(folder, argv)
    header = page.split("</header>")[0]
    assert "The last merge was refused" in header
    assert "logits: relative error 97.00% &lt;b&gt;" in page
    assert "Merged and verified" not in page


@pytest.mark.parametrize(
    ("runs", "fault"),
    [
        (RIGHT_MASK, None),
        ([run | {"supervised": False} for run in RIGHT_MASK], "nothing is supervised"),
        ([run | {"supervised": True} for run in RIGHT_MASK], "<|user|> is supervised"),
        ([run | {"supervised": run["supervised"] or run["picture"]} for run in RIGHT_MASK], "a picture is supervised"),
        ([text_run("<|system|>\nBe brief.<|end|>", 5, supervised=True)], "<|system|> is supervised"),
        ([text_run("A coat.", 3, supervised=True), text_run("<|end|>", 1)], "never learns to stop"),
    ],
)
def test_a_wrong_mask_is_said_loudly_and_a_right_one_is_not(hostile_run, visit, tmp_path, runs, fault):
    assert any(fault in found for found in mask_faults(runs)) if fault else not mask_faults(runs)
    if fault not in (None, "<|user|> is supervised"):
        return  # the two pages are enough
    folder = tmp_path / "out"
    shutil.copytree(hostile_run[0], folder)
    (folder / "data.json").write_text(json.dumps(overview(runs)))
    page = visit(page_of(folder, [*hostile_run[1], "--output_dir", str(folder)]))
    assert page.locator("header .warning").count() == len(mask_faults(runs))
    assert page.locator("#mask .warning").count() == len(mask_faults(runs))
    assert page.locator(".mask mark").all_inner_texts()[-1].startswith("A coat." if fault is None else "")
    assert page.locator(".mask mark").first.evaluate("(mark) => getComputedStyle(mark).textDecorationLine") == (
        "underline"
    )
    assert "1.5 % are supervised" in page.locator("#mask").inner_text()
    assert page.locator(".questions .answer").last.inner_text() == (
        "36 held-out rows" if fault is None else "No: look at the mask"
    )


def test_leakage_is_said_beside_the_verdict(hostile_run, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(hostile_run[0], folder)
    argv = [*hostile_run[1], "--output_dir", str(folder)]
    header = text_of(folder, argv).split("</header>")[0]
    assert "None of their pictures was trained on" in header
    assert "Leakage" not in header
    (folder / "data.json").write_text(json.dumps(overview(leaked=["/data/coats:17", 20])))
    header = text_of(folder, argv).split("</header>")[0]
    assert "Leakage: 2 held-out rows" in header
    assert "(row coats:17, 20)" in header
    (folder / "data.json").write_text(json.dumps(overview() | {"leakage": None}))
    assert "Not counted: whether" in text_of(folder, argv).split("</header>")[0]


def test_a_run_that_is_not_over_shows_what_there_is(hostile_run, visit, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(hostile_run[0], folder)
    argv = [*hostile_run[1], "--output_dir", str(folder)]
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({name: metrics[name] for name in ("baseline", "before")}))
    for name in ("data.json", "completions.jsonl", "trainer_state.json"):
        (folder / name).unlink()
    page = visit(page_of(folder, argv))
    assert page.locator(".verdict").inner_text().startswith("The trained model is not scored yet.")
    assert page.locator(".questions .answer").all_inner_texts()[:2] == ["Not known", "Not known"]
    for section in ("#training", "#data", "#mask", "#rows"):
        assert "The run left no" in page.locator(section).inner_text()
    after = {name: scores for name, scores in metrics["after"].items() if not name.startswith("better")}
    (folder / "metrics.json").write_text(json.dumps({"after": after}))
    assert "was scored, but not compared" in text_of(folder, argv)


def test_scores_of_another_model_are_shown_as_those_of_the_trained_one(hostile_run, visit, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(hostile_run[0], folder)
    for name in ("metrics.json", "completions.jsonl"):
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(re.sub(r'"after(_shuffled)?": \{', r'"model\1": {', text), encoding="utf-8")
    page = visit(page_of(folder, [*hostile_run[1], "--output_dir", str(folder)]))
    assert page.locator(".questions .answer").all_inner_texts()[:2] == [
        "Yes, in 3 of 3 fields",
        "Yes, in 2 of 3 fields",
    ]
    assert set(shown_rows(page)[:4]) == {1, 2, 7, 20}
    assert "others’ pictures" in page.locator("#scores table").first.inner_text()
    page.locator("#confusion details").last.locator("summary").click()
    cells = page.locator("#confusion details").last.locator("tbody tr").all_inner_texts()
    assert [" ".join(cell.split()) for cell in cells] == [
        "<b>COATS</b> 12 83.3%",
        'HATS "x" 12 83.3%',
        "BAGS 12 100.0%",
    ]


def test_completions_that_are_not_those_of_the_scores_are_said(hostile_run, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(hostile_run[0], folder)
    argv = [*hostile_run[1], "--output_dir", str(folder)]
    assert "not of one run" not in text_of(folder, argv)
    path = folder / "completions.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("Thing", "Plain").replace("Plain 3", "X"), "utf-8")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    lines[9]["after"]["text"] = "nothing"
    path.write_text("\n".join(json.dumps(line) for line in lines), "utf-8")
    page = text_of(folder, argv)
    assert "are not of one run" in page
    assert "of these rows are no longer in the data set" in page, "their answers differ"


def test_without_the_data_set_the_page_is_written_without_pictures(tmp_path, capsys):
    folder, argv = write_run(tmp_path, catalogue(9))
    shutil.rmtree(tmp_path / "source")
    page = text_of(folder, argv)
    assert "The data set can no longer be read here" in page
    assert "<img" not in page
    assert page.count('<article class="card"') == 9
    assert "without pictures: " in capsys.readouterr().out
    assert str(tmp_path) not in page
    assert "Hardly: 9 rows only" in page


def test_conversations_with_several_pictures_or_none(visit, tmp_path):
    answers = ["The first.\nIt is *older*.", "None.", "A < B"]
    rows = [
        {"images": [f"{index}.png" for index in range(count)], "messages": [
            {"role": "user", "content": f"Which is older, of {count}?"}, {"role": "assistant", "content": answer}
        ]}
        for count, answer in zip((2, 0, 1), answers, strict=True)
    ]  # fmt: skip
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index in range(2):
        Image.new("RGB", (30, 20 + index), "red").save(pictures / f"{index}.png")
    for row in rows:
        row["images"] = [str(pictures / name) for name in row["images"]]
    folder, argv = write_run(tmp_path, rows, answer=None, images=True, wrong={1})
    page = visit(page_of(folder, argv), width=390)
    cards = {card.locator("h3 > span").first.inner_text(): card for card in page.locator(".card").all()}
    assert [cards[f"Row {row}"].locator("img").count() for row in range(3)] == [2, 0, 1]
    said = cards["Row 0"].locator("[data-said]").inner_text()
    assert "Which is older, of 2?" in said
    assert "The first.\nIt is *older*." in said
    assert page.locator(".card").first.locator("h3").inner_text().split() == ["Row", "1", "✗", "wrong"]


def test_of_many_rows_half_are_the_worst_and_half_drawn_and_the_page_stays_small(visit, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "RESAMPLES", 20)
    count, wrong = 330, set(random.Random(1).sample(range(330), 200))
    folder, argv = write_run(tmp_path, catalogue(count), wrong=wrong, noise=True)
    path = page_of(folder, argv)
    assert path.stat().st_size < 10e6
    page = visit(path)
    rows = shown_rows(page)
    assert len(rows) == len(set(rows)) == MOST_ROWS
    assert "300 of 330 rows: the 150 worst, and as many drawn by chance" in page.locator("#rows > p").first.inner_text()
    assert set(rows[:150]) <= wrong
    assert not set(rows) >= wrong
    picture = page.locator(".card img").first.get_attribute("src").removeprefix("data:image/jpeg;base64,")
    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        assert max(image.size) <= 256
        assert not image.getexif()


def test_a_picture_is_shown_upright_and_without_what_the_camera_wrote(tmp_path):
    folder, argv = write_run(tmp_path, catalogue(3))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "secret place"
    Image.new("RGB", (60, 20), "red").save(tmp_path / "source" / "0.png", exif=exif)
    page = text_of(folder, argv)
    sizes = set()
    for found in re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page):
        data = base64.b64decode(found)
        assert b"secret" not in data
        with Image.open(io.BytesIO(data)) as image:
            sizes.add(image.size)
    assert sizes == {(20, 60), (40, 30)}


def test_errors_say_what_to_run_first(tmp_path, hostile_run):
    folder, argv = write_run(tmp_path, catalogue(3))
    (folder / "recipe.yaml").write_text(Path(argv[0]).read_text() + "seed: 7\n")
    with pytest.raises(SystemExit, match=r"error: output_dir: .* a run of another recipe .*seed"):
        report.main(argv)
    (folder / "metrics.json").unlink()
    with pytest.raises(SystemExit, match=r"error: output_dir: .* holds no metrics\.json.* Train and score first"):
        report.main(argv)
    assert not (folder / "report.html").exists()


def test_charts_say_in_words_what_they_show():
    chart = curve(
        "Loss", [(10, 5.0), (300, 0.05)], [(300, 0.04)], logarithmic=True, names=("in training", "on held-out rows")
    )
    assert chart.text == ("in training 5 at step 10, 0.05 at step 300; on held-out rows 0.04 at step 300. Logarithmic.")
    assert "#0" not in re.sub(r"url\(#|href=\"#", "", chart.svg), "a colour that dark mode does not know"
    assert re.findall(r'(?:src|href)="(?!#)[^"]*"', chart.svg) == []
    assert histogram("Tokens", [312.5, 313.5], [10], "rows").text == "313 in each of 10 rows."
    assert "the highest bar, 5, from 200 to 400" in histogram("Tokens", [0, 200, 400], [3, 5], "rows").text


@pytest.mark.slow
def test_a_collator_that_supervises_the_prompt_trains_a_worse_model_and_the_page_shows_why(
    trained_run, tmp_path, monkeypatch
):
    right = Collator.__call__

    def wrong(self, examples):
        batch = right(self, examples)
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)}

    out = tmp_path / "out"
    argv = [str(trained_run / "recipe.yaml"), "--output_dir", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(Collator, "__call__", wrong)
        run.main([*argv, "--report_to", "none", "--eval_strategy", "no"])
    own, broken = (json.loads((folder / "metrics.json").read_text()) for folder in (trained_run, out))
    assert (
        own["after"]["fields"]["label"]["edit_similarity"] > broken["after"]["fields"]["label"]["edit_similarity"] + 0.2
    )
    assert own["after"]["parsed"] == 1.0 > broken["after"]["parsed"]
    header = text_of(out, argv).split("</header>")[0]
    assert "The mask is wrong: &lt;|user|&gt; is supervised" in header and "a picture is supervised" in header
    assert "The mask is wrong" not in report.render(load_recipe(argv[:1]), trained_run)
