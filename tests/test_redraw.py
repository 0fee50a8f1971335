"""Figures from receipts alone: the committed ones come out bit for bit, forged and lost ones are found."""
import json
import shutil
from pathlib import Path

import matplotlib
import pytest

from oodrepro import redraw
from oodrepro.reproduce import main

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def found():
    return redraw.redraw_all(ROOT)


def test_committed_figures_come_out_bit_for_bit(found):
    """Needs the matplotlib that saved them: another version may place a label elsewhere, and says so."""
    drawn = [one for one in found if one.state != "not from receipts"]
    assert drawn, "no committed figure can be drawn from receipts"
    for one in drawn:
        if json.loads(one.path.read_text())["matplotlib"] == matplotlib.__version__:
            assert one.state == "same", one
        else:
            assert one.state in ("same", "different") and matplotlib.__version__ in one.words, one


def test_what_cannot_be_drawn_again_shows_images(found):
    """Curves, histograms and intervals all have a recipe; only pictures of images have none."""
    for one in found:
        if one.state == "not from receipts":
            assert not one.path.stem.startswith(("roc", "scores", "ladder", "repetitions", "intervals")), one


@pytest.fixture
def copy(tmp_path):
    """One committed paper with two of its figures."""
    home = next(path for path in sorted((ROOT / "figures").glob("*/*/roc.json"))).parent
    place = home.relative_to(ROOT)
    (tmp_path / place).mkdir(parents=True)
    for name in ("roc",):
        for path in home.glob(f"{name}.*"):
            shutil.copy(path, tmp_path / place)
    results = Path("results", *place.parts[1:])
    runs = json.loads((home / "roc.json").read_text())["provenance"]["drawn"]["runs"]
    (tmp_path / results).mkdir(parents=True)
    for run in runs:
        for suffix in (".json", ".npz"):
            shutil.copy(ROOT / results / f"{run}{suffix}", tmp_path / results)
    return tmp_path, tmp_path / place, tmp_path / results


def test_the_command_finds_and_repairs(copy, capsys):
    root, figures, results = copy
    main(["figures", "--root", str(root)])  # with this matplotlib's own bytes from here on
    assert main(["figures", "--root", str(root), "--check"]) == 0
    honest = {path.name: path.read_bytes() for path in figures.iterdir()}
    (figures / "roc.png").write_bytes(b"painted over")
    (figures / "roc.svg").unlink()
    assert main(["figures", "--root", str(root), "--check"]) == 1
    assert "roc.json: different: roc.svg, roc.png" in capsys.readouterr().out
    assert main(["figures", "--root", str(root)]) == 0
    assert {path.name: path.read_bytes() for path in figures.iterdir()} == honest


@pytest.mark.parametrize("fault, words", [
    (lambda figures, results: next(results.glob("*.json")).unlink(), "receipts are missing"),
    (lambda figures, results: (figures / "roc.json").write_text("{"), "not valid JSON"),
    (lambda figures, results: (figures / "roc.json").write_text((figures / "roc.json").read_text().replace(
        '"function": "roc"', '"function": "pie"')), "unknown function 'pie'"),
])
def test_what_cannot_be_drawn_is_a_failure(copy, capsys, fault, words):
    root, figures, results = copy
    fault(figures, results)
    assert main(["figures", "--root", str(root), "--check"]) == 1
    out = capsys.readouterr().out
    assert "roc.json: failed" in out and words in out


def test_another_matplotlib_is_named(copy, monkeypatch):
    root, figures, _ = copy
    story = json.loads((figures / "roc.json").read_text()) | {"matplotlib": "0.1"}
    (figures / "roc.json").write_text(json.dumps(story))
    [one] = redraw.redraw_all(root)
    assert one.state == "different" and "saved by matplotlib 0.1" in one.words
