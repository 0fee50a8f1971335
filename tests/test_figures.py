"""Figures: the same bytes in another process and for data that differ in the last bit; nothing left behind."""
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest

from oodrepro import figures

DRAW = """
import sys
import numpy as np
from oodrepro import figures
tiny = float(sys.argv[2])
draw = np.random.default_rng(0)
near, far = draw.normal(1, 1, 400) * (1 + tiny), draw.normal(2, 1, 300) * (1 + tiny)
flags = np.r_[np.zeros(400, bool), np.ones(300, bool)]
made = {"histograms": figures.histograms({"id": near, "ood": far}),
        "roc": figures.roc_curves({"lmd": (np.r_[near, far], flags)}),
        "curve": figures.curve_with_band([1, 2, 4], {"a": (near[:3], near[:3] - 1, near[:3] + 1), "b": far[:3]},
                                         "x", "y"),
        "intervals": figures.intervals({"row": (near[0], near[0] - 1, near[0] + 1)}, "AUROC", {"row": 0.5}),
        "grid": figures.image_grid(np.tanh(draw.normal(size=(6, 1, 8, 8)) * (1 + tiny)), column_labels=list("abc"))}
for name, figure in made.items():
    figures.save(figure, name, sys.argv[1], provenance={"draw": 0}, alt="A picture made by a test.")
"""


def draw(folder, tiny="0", hash_seed="0"):
    """Draw every kind of figure in a fresh process; returns the bytes by file name."""
    import os
    done = subprocess.run([sys.executable, "-c", DRAW, str(folder), tiny], capture_output=True, text=True,
                          env={**os.environ, "PYTHONHASHSEED": hash_seed})
    assert done.returncode == 0, done.stderr
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_same_bytes_everywhere(tmp_path):
    first = draw(tmp_path / "a")
    assert len(first) == 15
    assert draw(tmp_path / "b", hash_seed="7") == first
    assert draw(tmp_path / "c", tiny="1e-13") == first, "the last bits of the data show in the figure"
    for name, content in first.items():
        if name.endswith(".svg"):
            tree = ElementTree.fromstring(content)
            assert tree.get("role") == "img" and tree[1].text == "A picture made by a test."
            assert b"date" not in content.lower() and b"http://" not in content.replace(b"http://www.w3.org", b"") \
                .replace(b"http://purl.org", b"").replace(b"http://creativecommons.org", b"")
        if name.endswith(".png"):
            assert content.startswith(b"\x89PNG") and b"tIME" not in content and b"Software" not in content


def test_a_readers_matplotlib_is_left_alone():
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black"}):
        plain = figures.histograms({"a": [1, 2, 3]})
        assert matplotlib.rcParams["font.size"] == 30
    assert dict(matplotlib.rcParams) == before
    assert plain._repr_mimebundle_() == figures.histograms({"a": [1, 2, 3]})._repr_mimebundle_()


def test_no_figure_stays_open(tmp_path):
    import matplotlib.pyplot as pyplot
    figure, axes = pyplot.subplots()
    axes.plot([1, 2])
    figures.save(figure, "plain", tmp_path, provenance={"n": 2}, alt="A rising line, for a test.")
    figures.histograms({"a": [1, 2, 3]})
    assert pyplot.get_fignums() == []


def test_a_notebook_shows_the_alternative_text(tmp_path):
    figure = figures.image_grid(np.zeros((4, 8, 8), np.uint8))
    figures.save(figure, "grid", tmp_path, provenance={"n": 4}, alt="Four black squares.")
    data, notes = figure._repr_mimebundle_()
    assert data["image/png"].startswith(b"\x89PNG") and notes["image/png"]["alt"] == "Four black squares."


def test_failure_leaves_the_old_figure(tmp_path, monkeypatch):
    """A disk that fills up while saving must not leave a torn picture."""
    save = lambda: figures.save(figures.histograms({"a": [1, 2, 3]}), "f", tmp_path, provenance={"n": 3},  # noqa: E731
                                alt="Three bars in a row.")
    before = {path: path.read_bytes() for path in save()}
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("images, shape", [
    (np.zeros((3, 1, 4, 6), np.float32), (3, 4, 6, 3)), (np.zeros((3, 3, 4, 6)), (3, 4, 6, 3)),
    (np.zeros((3, 4, 6), np.uint8), (3, 4, 6, 3)), (np.zeros((3, 4, 6, 1), np.uint8), (3, 4, 6, 3)),
    (np.zeros((3, 4, 6, 3), np.uint8), (3, 4, 6, 3)),
])
def test_pixels(images, shape):
    assert figures._to_pixels(images).shape == shape


def test_pixel_values_match_the_usual_scale():
    torch = pytest.importorskip("torch")
    values = torch.tensor([-1.0, 0.0, 1.0]).reshape(3, 1, 1, 1)
    assert figures._to_pixels(values)[:, 0, 0, 0].tolist() == [0, 128, 255]


def test_names_and_provenance(tmp_path):
    figure = figures.histograms({"a": [1, 2, 3]})
    _, _, story = figures.save(figure, "a_b-1.c", tmp_path, provenance={"rows": [1, 2]}, alt="Three bars <in> a & row.")
    told = json.loads(story.read_text())
    assert told["provenance"] == {"rows": [1, 2]} and set(told["files"]) == {"a_b-1.c.svg", "a_b-1.c.png"}
    assert ElementTree.parse(tmp_path / "a_b-1.c.svg").getroot()[1].text == "Three bars <in> a & row."
    for name in ("", "../up", "a b", ".hidden", "é"):
        with pytest.raises(ValueError, match="figure name"):
            figures.save(figure, name, tmp_path, provenance={"n": 3}, alt="Three bars in a row.")
    with pytest.raises(TypeError, match="cannot hash a set"):
        figures.save(figure, "x", tmp_path / "no", provenance={"rows": {1}}, alt="Three bars in a row.")


def test_rounding_keeps_extremes():
    values = np.array([1e-310, -1e300, 5e-324, 123456.5, np.nan, -np.inf, 0.0])
    rounded = figures.round_data(values)
    assert np.isnan(rounded[4]) and rounded[5] == -np.inf and rounded[6] == 0
    assert rounded[1] == -1e300 and rounded[3] == 123456 and np.isfinite(rounded[:4]).all()


def test_no_colours_that_look_alike_in_grey_alone():
    """The two colours that carry meaning everywhere (ID and OOD) differ in lightness contrast to white too."""
    def luminance(colour):
        rgb = np.array([int(colour[place:place + 2], 16) / 255 for place in (1, 3, 5)])
        return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]
    assert all(1.05 / (luminance(colour) + 0.05) > 2.1 for colour in figures.PALETTE), "too pale on white"
