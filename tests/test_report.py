"""report: the verdict rule, cells that must not mix, renderers, tables that can be made again, one offline page."""
import html
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from oodrepro import figures, metrics, receipts, report, summaries
from oodrepro.published import published
from oodrepro.reproduce import main

ROOT = Path(__file__).resolve().parent.parent
COUNT = 60


def write(root, row="mnist", column="kmnist", shift=2.5, seed=0, tier="laptop", table="table1", sampled=0, extra=None,
          **variant):
    """A receipt of normal scores `shift` apart; seeds share their images, and those of `sampled` are others."""
    is_ood = np.repeat([False, True], COUNT)
    images = np.random.default_rng(sampled).normal(size=2 * COUNT) + shift * is_ood
    score = images + np.random.default_rng([seed, 7]).normal(scale=0.2, size=2 * COUNT)
    return receipts.write_receipt(
        root / "results" / tier / "lmd", paper="lmd", tier=tier, table=table, row=row, column=column, method="lmd",
        variant={"steps": 20, **variant}, seed=seed, score=score, is_ood=is_ood, nfe_per_image=80, seconds=2.0,
        index=np.r_[np.arange(COUNT), np.arange(COUNT)] + 1000 * sampled, settings={"steps": 20}, extra=extra)


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """Receipts of three seeds on two pairs, written once."""
    folder = tmp_path_factory.mktemp("written")
    for seed in range(3):
        write(folder, seed=seed)
        write(folder, "cifar10", "cifar100", 0.4, seed=seed)
    return folder


@pytest.fixture
def root(written, tmp_path):
    """A copy of those receipts that a test may change."""
    return Path(shutil.copytree(written, tmp_path / "root"))


def cells(table):
    return table.set_index([name for name in table if name not in report._COMPARISON])


@pytest.mark.parametrize("ours, low, high, paper, certainty, tolerance, expected", [
    (0.61, 0.60, 0.62, 0.607, "published", 0.0, "inside interval"),
    (0.61, 0.6074, 0.62, 0.607, "published", 0.0, "inside interval"),
    (0.61, 0.6076, 0.62, 0.607, "published", 0.0, "outside"),
    (0.60, 0.58, 0.6065, 0.607, "published", 0.0, "inside interval"),
    (0.617, 0.61, 0.62, 0.607, "published", 0.01, "outside but within the stated tolerance"),
    (0.618, 0.61, 0.62, 0.607, "published", 0.01, "outside"),
    (0.61, None, None, 0.607, "published", 0.01, "outside but within the stated tolerance"),
    (0.10, 0.09, 0.11, 0.984, "recalled", 0.0, "no verdict (recalled)"),
    (0.10, 0.09, 0.11, 0.984, "reported-by-others", 0.0, "no verdict (reported by others)"),
    (0.10, 0.09, 0.11, math.nan, "unknown", 0.0, "no verdict (not available)"),
    (None, None, None, 0.607, "published", 0.0, "not run"), (None, None, None, 0.9, "recalled", 0.0, "not run")])
def test_verdict_rule(ours, low, high, paper, certainty, tolerance, expected):
    assert report.verdict(ours, low, high, paper, certainty, tolerance) == expected


def test_a_cell_is_the_mean_over_seeds_with_the_interval_of_metrics(root):
    frame = receipts.read_receipts(root)
    line = cells(report.compare(frame, published("lmd"))).loc[("mnist", "kmnist")]
    mine = frame[frame["row_id"] == "mnist"].sort_values("seed")
    scores = [receipts.load_scores(path) for path in mine["path"]]
    expected = metrics.seeds_interval([(s["score"], s["is_ood"], s["index"]) for s in scores])
    assert (line["ours"], line["low"], line["high"]) == (expected.value, expected.low, expected.high)
    assert math.isclose(line["ours"], mine["auroc"].mean()) and line["n_seeds"] == 3 and line["seeds"] == "0, 1, 2"
    assert line["difference"] == line["ours"] - 0.984 and line["std"] == mine["auroc"].std(ddof=1)


def test_only_published_cells_get_a_verdict(root):
    table = report.compare(receipts.read_receipts(root), published("lmd"), not_run="later")
    judged = table[table["verdict"].str.startswith(("inside", "outside"))]
    assert judged[["row_id", "column_ood"]].values.tolist() == [["cifar10", "cifar100"]]
    assert (table["verdict"] == "not run: later").sum() == 13 - 2


def test_reasons_by_cell_by_row_and_none(root):
    reasons = {("svhn", "cifar10"): "no time", "svhn": "no model", ("mnist", "fashion_mnist"): "no data"}
    table = cells(report.compare(receipts.read_receipts(root), published("lmd"), not_run=reasons))["verdict"]
    assert table.loc[("svhn", "cifar10")] == "not run: no time"
    assert table.loc[("svhn", "cifar100")] == "not run: no model"
    assert table.loc[("mnist", "fashion_mnist")] == "not run: no data" and table.loc[("cifar100", "svhn")] == "not run"


@pytest.mark.parametrize("planted, words", [
    (dict(steps=50), "variant_steps.*20.*50"), (dict(distance="mse"), "variant_distance"), (dict(tier="gpu"), "tier"),
    (dict(table="ablation"), "belong to")])
def test_different_experiments_are_never_averaged(root, planted, words):
    write(root, seed=9, **planted)
    with pytest.raises(ValueError, match=words):
        report.compare(receipts.read_receipts(root), published("lmd"))


def test_the_same_seed_twice_is_refused(root):
    frame = receipts.read_receipts(root)
    with pytest.raises(ValueError, match="seed 0 twice"):
        report.compare(pd.concat([frame, frame[frame["seed"] == 0]]))


def test_variants_as_rows_and_other_metrics(root):
    for steps in (5, 10):
        write(root, steps=steps, table="ablation_steps")
    write(root, table="ablation_steps", steps=5, seed=1)
    frame = receipts.read_receipts(root)
    frame = frame[frame["table"] == "ablation_steps"]
    table = report.compare(frame, rows="variant_steps", columns=(), metric="fpr95")
    assert table["variant_steps"].tolist() == [10, 5] or table["variant_steps"].tolist() == [5, 10]
    assert table["method"].str.startswith("bootstrap").all()
    assert list(report.present(table)) == ["steps", "ours", "95 % interval", "seeds"]
    cost = report.compare(frame, rows="variant_steps", columns=(), metric="seconds")
    assert cost["ours"].tolist() == [2.0, 2.0] and cost.loc[cost["n_seeds"] == 1, "low"].isna().all()


def test_the_average_is_over_the_cells_that_were_run_and_says_so(root):
    table = report.compare(receipts.read_receipts(root), published("lmd"), average=True)
    last = table.iloc[-1]
    assert last["row_id"] == "mean of the 2 run" and last["certainty"] == "recalled"
    assert math.isclose(last["paper"], (0.607 + 0.984) / 2) and last["verdict"] == "no verdict (recalled)"
    ran = table[table["runs"].notna()]
    assert math.isclose(last["ours"], ran["ours"].mean()) and math.isclose(last["low"], ran["low"].mean())
    assert cells(table).loc[("average", "average"), "verdict"] == "not run: 2 of its 12 cells run"


def test_the_papers_own_average_is_filled_once_all_cells_are_run(tmp_path):
    known = published("lmd")
    known = known[known["table"] == "table1"]
    for line in known[known["row_id"] != "average"].itertuples():
        write(tmp_path, line.row_id, line.column_ood)
    table = cells(report.compare(receipts.read_receipts(tmp_path), known, average=True))
    line = table.loc[("average", "average")]
    assert line["verdict"] == "no verdict (reported by others)" and math.isclose(line["ours"], table["ours"].iloc[0])


def test_conventions_name_what_a_reader_needs(root):
    write(root, "kmnist", "mnist", sampled=3)
    text = "\n".join(report.conventions(report.compare(receipts.read_receipts(root), published("lmd"))))
    for words in ("OOD is the positive class", f"{COUNT}:{COUNT}", "ddof = 1", "DeLong", "within 0.01", "† recalled",
                  "‡ reported by others", "Yang et al.", "steps 20", "tier laptop",
                  "network evaluations per image 80"):
        assert words in text, words
    write(root, "kmnist", "fashion_mnist", extra={"train_split": "test-a", "id_split": "test-b"})
    text = "\n".join(report.conventions(report.compare(receipts.read_receipts(root))))
    assert text.count("KMNIST: trained on its split 'test-a', ID images from 'test-b'.") == 1 and "CIFAR" not in text
    single = receipts.read_receipts(root)
    single = single[single["seed"] == 0]
    assert "one seed" in "\n".join(report.conventions(report.compare(single, metric="fpr95_id_positive")))
    assert "ID is the positive class" in report.conventions(report.compare(single, metric="fpr95_id_positive"))[0]


def test_renderers_agree_on_every_cell(root):
    table = report.compare(receipts.read_receipts(root), published("lmd"), not_run="50 % & more_work | later")
    shown = report.present(table)
    markdown, latex, page = report.to_markdown(table), report.to_latex(table), report.to_html(table)
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(rows) == len(shown) + 2 and len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    assert page.count("<tr>") == len(shown) + 1 and latex.count(r"\\") == len(shown) + 1
    assert r"50 \% \& more\_work | later" in latex and "50 % &amp; more_work | later" in page
    assert r"50 % & more_work \| later" in markdown
    for value in shown["ours"]:
        assert value in markdown and value.replace("–", "--") in latex and value in page


def test_an_empty_result_is_a_table_without_lines(root):
    empty = receipts.read_receipts(root).iloc[:0]
    assert len(report.compare(empty, table="table1")) == 0
    assert report.to_markdown(report.compare(empty, table="table1")).startswith("| ID | OOD |")
    assert len(report.compare(empty, published("lmd"), table="table1", not_run="never")) == 13


def test_tables_can_be_made_again_and_forgeries_are_found(root):
    folder = root / "results" / "laptop" / "lmd"
    frame, known = receipts.read_receipts(root), published("lmd")
    reasons = {"svhn": "no model", ("cifar10", "svhn"): "no time"}
    tables = {"table1": report.compare(frame, known, not_run=reasons, average=True, level=0.9),
              "fpr95": report.compare(frame, metric="fpr95"),
              "seeds": summaries.pivot(frame, columns="seed", values=("auroc", "aupr_in"))}
    paths = report.write_tables(folder, tables, titles={"table1": "Table 1"}, notes={"fpr95": ["a note"]})
    assert len(paths) == 9 and report.check_tables(root) == []
    again = {path: path.read_bytes() for path in paths}
    report.write_tables(folder, tables, titles={"table1": "Table 1"}, notes={"fpr95": ["a note"]})
    assert all(path.read_bytes() == content for path, content in again.items())

    honest = (folder / "table1.md").read_text()
    for old, new in (("0.607", "0.670"), ("†", ""), ("no verdict (recalled)", "inside interval"),
                     ("# Table 1\n", "# Table 1\nbest\n")):
        assert old in honest
        (folder / "table1.md").write_text(honest.replace(old, new, 1))
        assert report.check_tables(root), old
    (folder / "table1.md").write_text(honest)
    assert report.check_tables(root) == []
    next(folder.glob("*cifar100*.json")).unlink()
    assert any("receipts are missing" in line for line in report.check_tables(root))


@pytest.fixture(scope="session")
def tabled(written, tmp_path_factory):
    """Receipts of two tables and every kind of table made from them, written once."""
    root = Path(shutil.copytree(written, tmp_path_factory.mktemp("tabled") / "root"))
    for seed in range(3):
        write(root, seed=seed, shift=1.0, table="controls")
    folder = root / "results" / "laptop" / "lmd"
    frame = receipts.read_receipts(folder)
    main_runs, control = frame[frame["table"] == "table1"], frame[frame["table"] == "controls"]
    made = {"table1": report.compare(main_runs, published("lmd")), "by_table": summaries.pivot(frame, columns="table"),
            "paired": summaries.paired(main_runs[main_runs["row_id"] == "mnist"], control, ("LMD", "control")),
            "cost": summaries.pivot(main_runs, "row_id", values=("auroc", "seconds_per_image"))}
    report.write_tables(folder, made, titles={name: name for name in made})
    return root


@pytest.fixture
def tables(tabled, tmp_path):
    """The results folder of a copy of those."""
    return Path(shutil.copytree(tabled, tmp_path / "tabled")) / "results" / "laptop" / "lmd"


def change(pattern, old, new):
    """A fault: the first file of that pattern gets another text."""
    def plant(folder):
        path = sorted(folder.glob(pattern))[0]
        text = path.read_text()
        assert re.search(old, text), f"{path.name} holds no {old}"
        path.write_text(re.sub(old, new, text, count=1))
    return plant


def other_scores(folder):
    """A fault: one score of one file is another."""
    path = sorted(folder.glob("*.npz"))[0]
    with np.load(path) as archive:
        arrays = dict(archive)
    arrays["score"][0] += 1
    np.savez(path, **arrays)


def torn_scores(folder):
    """A fault: one bit of a file has flipped."""
    path = sorted(folder.glob("*.npz"))[0]
    packed = bytearray(path.read_bytes())
    packed[len(packed) // 2] ^= 1
    path.write_bytes(packed)


@pytest.mark.parametrize("name, plant, words", [
    ("a number in Markdown", change("table1.md", r"\[0\.9", "[0.8"), "table1.md, line"),
    ("a number in LaTeX", change("by_table.tex", r"& 0\.", "& 1."), "by_table.tex, line"),
    ("a number in HTML", change("paired.html", r">0\.", ">1."), "paired.html, line"),
    ("a verdict", change("table1.html", "verdict none", "verdict inside"), "table1.html, line"),
    ("a convention", change("cost.md", "seeds 0, 1, 2", "seeds 0"), "cost.md, line"),
    ("a row too many", change("paired.tex", r"(MNIST.*\n)", r"\1\1"), "paired.tex"),
    ("a table without recipe", change("by_table.md", "<!-- recipe", "<!-- was"), "it has no recipe"),
    ("a torn recipe", change("by_table.md", '"kind": ', '"kind" '), "cannot be made again"),
    ("a table of other runs", change("cost.md", r'"runs": \["[^"]*", ', '"runs": ['), "cost.md, line"),
    ("a lost rendering", lambda folder: (folder / "cost.tex").unlink(), "cost.tex: is missing"),
    ("a lost Markdown", lambda folder: (folder / "cost.md").unlink(), "cost.html: a table without its Markdown"),
    ("a metric", change("*.json", r'"auroc": 0\.\d\d', '"auroc": 0.12'), "auroc is 0.12"),
    ("a count", change("*.json", f'"n_id": {COUNT}', '"n_id": 61'), "n_id is 61"),
    ("a setting", change("*.json", '"steps": 20', '"steps": 21'), "belong to a file named"),
    ("a score", other_scores, "checksum differs"), ("a flipped bit", torn_scores, "not a readable npz"),
    ("a lost receipt", lambda folder: sorted(folder.glob("*.json"))[0].unlink(), "receipts are missing"),
    ("lost scores", lambda folder: sorted(folder.glob("*.npz"))[0].unlink(), "are missing"),
])
def test_check_finds_every_planted_fault(tables, capsys, name, plant, words):
    """`oodrepro check`: 0 for honest results, 1 for each fault, which it names."""
    command = ["check", "--root", str(tables.parents[2])]
    assert main(command) == 0 and "45 metrics of 9 receipts and 4 tables, recomputed" in capsys.readouterr().out
    plant(tables)
    assert main(command) == 1, name
    assert words in capsys.readouterr().out


def test_the_committed_results_follow_from_their_scores():
    found, what = report.verify(ROOT / "results")
    assert found == [] and not what.startswith("0 metrics"), what


def test_tables_stand_in_the_order_of_their_importance(tables):
    assert [path.stem for path in report.table_paths(tables)] == ["table1", "by_table", "paired", "cost"]
    text = report.write_report(tables.parents[2]).read_text()
    places = [text.index(f"<h4>{name}</h4>") for name in ("table1", "by_table", "paired", "cost")]
    assert places == sorted(places)


class Page(HTMLParser):
    """Links, images and identifiers of a page."""

    def __init__(self, text):
        super().__init__()
        self.links, self.images, self.names, self.open = [], [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.names |= {attributes["id"]} if "id" in attributes else set()
        self.links += [attributes[key] for key in ("href", "src") if key in attributes]
        self.images += [attributes] if tag == "img" else []
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


@pytest.fixture
def page(root):
    folder = root / "results" / "laptop" / "lmd"
    report.write_tables(folder, {"table1": report.compare(receipts.read_receipts(root), published("lmd"))})
    picture = figures.histograms({"ID": np.arange(50.0), "OOD": np.arange(50.0) + 9})
    figures.save(picture, "histograms", root / "figures" / "laptop" / "lmd", provenance={"function": "histograms"},
                 alt='Histograms of "ID" & <OOD> scores, half overlapping.')
    (root / "runs" / "laptop" / "lmd").mkdir(parents=True)
    (root / "runs" / "laptop" / "lmd" / "3_lmd.html").write_text("<html></html>")
    return report.write_report(root)


def test_the_page_is_whole_and_offline(page):
    text = page.read_text(encoding="utf-8")
    found = Page(text)
    assert found.open == [] and page.name == "index.html" and page.parent.name == "report"
    assert [image["alt"] for image in found.images] == ['Histograms of "ID" & <OOD> scores, half overlapping.']
    assert all(image["src"].startswith("data:image/svg+xml;base64,") for image in found.images)
    for link in found.links:
        if link.startswith("#"):
            assert link[1:] in found.names
        elif not link.startswith("data:"):
            assert (page.parent / link).is_file(), link
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text and "<script" not in text
    assert "no discrepancy" in text and 'class="verdict inside"' in text
    assert report.write_report(page.parent.parent).read_text() == text


def test_the_page_shows_what_is_wrong(page):
    root = page.parent.parent
    broken = next((root / "results").rglob("*.json"))
    broken.write_text("{")
    text = report.write_report(root).read_text()
    assert 'class="problem"' in text and broken.name in text and "no discrepancy" not in text


def test_nothing_to_report(tmp_path):
    with pytest.raises(FileNotFoundError, match="oodrepro reproduce"):
        report.write_report(tmp_path)


PROBE = """<script>onload = () => {
  const parts = colour => colour.match(/[0-9.]+/g).slice(0, 3).map(Number);
  const light = colour => parts(colour).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const ground = element => { for (let e = element; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor; if (!c.startsWith('rgba(0, 0, 0, 0')) return c; } };
  const contrast = element => { const pair = [light(getComputedStyle(element).color), light(ground(element))].sort();
    return (pair[1] + .05) / (pair[0] + .05); };
  const texts = [...document.querySelectorAll('p, td, th, li, a, h1, h2, h3, h4, figcaption, .verdict')];
  document.title = JSON.stringify({
    inside: document.documentElement.scrollWidth, window: innerWidth,
    drawn: [...document.images].every(image => image.naturalWidth > 0 && image.alt.length > 10),
    fetched: performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length,
    dark: light(getComputedStyle(document.body).backgroundColor) < .2,
    contrast: Math.min(...texts.filter(e => e.offsetParent).map(contrast)),
    small: Math.min(...texts.filter(e => e.offsetParent).map(e => parseFloat(getComputedStyle(e).fontSize)))}); }
</script></body>"""


def browse(address, profile, *options):
    """What headless Chromium makes of a page: its document, and its complaints."""
    command = [shutil.which("chromium"), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
               f"--user-data-dir={profile}", "--disable-background-networking", *options, "--dump-dom", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
@pytest.mark.parametrize("width, scheme", [(390, "light"), (1280, "dark")])
def test_the_page_in_a_browser(page, width, scheme, tmp_path):
    """On a phone and at a desk, light and dark: all drawn, nothing too wide, too small, too faint, nothing fetched."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text()).replace("</body>", PROBE)
    copy = page.with_name("probe.html")
    copy.write_text(text)
    done = browse(copy.as_uri(), tmp_path / "profile", f"--window-size={width},900",
                  f"--blink-settings=preferredColorScheme={int(scheme == 'light')}")
    found = json.loads(html.unescape(re.search(r"<title>(\{.*?\})</title>", done.stdout)[1]))
    assert found["inside"] <= found["window"] and found["drawn"] and found["fetched"] == 0, found
    assert found["dark"] == (scheme == "dark") and found["contrast"] >= 4.5 and found["small"] >= 11, found


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_a_browser_has_nothing_to_complain_about(page, tmp_path):
    """The page as it is, with its own security policy."""
    done = browse(page.as_uri(), tmp_path / "profile")
    assert "CONSOLE" not in done.stderr and "At a glance" in done.stdout
