"""report: the verdict rule, cells that must not mix, renderers, tables that can be made again, one offline page."""
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from oodrepro import figures, metrics, receipts, report
from oodrepro.published import published

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


@pytest.fixture
def root(tmp_path):
    for seed in range(3):
        write(tmp_path, seed=seed)
        write(tmp_path, "cifar10", "cifar100", 0.4, seed=seed)
    return tmp_path


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
              "fpr95": report.compare(frame, metric="fpr95"), "plain": pd.DataFrame({"a": [1.0]})}
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


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(page, width, tmp_path):
    """No console message, every image drawn, and nothing wider than the window."""
    probe = ("<script>onload = () => { document.title = JSON.stringify([document.documentElement.scrollWidth, "
             "innerWidth, [...document.images].every(image => image.naturalWidth > 0)]); }</script></body>")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text()).replace("</body>", probe)
    copy = page.with_name("probe.html")
    copy.write_text(text)
    command = [shutil.which("chromium"), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
               f"--user-data-dir={tmp_path}/profile", "--disable-background-networking", f"--window-size={width},900",
               "--dump-dom"]
    done = subprocess.run([*command, copy.as_uri()], capture_output=True, text=True, timeout=600)
    inside, window, drawn = re.search(r"<title>\[(\d+),(\d+),(\w+)\]</title>", done.stdout).groups()
    assert int(inside) <= int(window) and drawn == "true"
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=600)
    assert "CONSOLE" not in done.stderr and "At a glance" in done.stdout
