"""Offline pages: equations drawn, images described, nothing fetched."""
import base64
import re
import shutil
import subprocess

import nbformat
import pytest

from oodrepro.figures import histograms
from oodrepro.pages import equation, notebook_page, requests_of, with_equations

PIXEL = base64.b64encode(base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")).decode()


@pytest.mark.parametrize("tex", [
    r"\hat{x}_0 = \frac{x_t - \sqrt{1-\bar\alpha_t}\,\epsilon_\theta(x_t,t)}{\sqrt{\bar\alpha_t}}",
    r"\mathbb{E}_{q}\left[\lVert \epsilon - \epsilon_\theta \rVert^2\right]", r"x \sim \mathcal N(0, I)",
    r"\tfrac12 \beta(t) x\,dt + \sqrt{g^2(t)}\,dw \tag{3}", r"a \le b \ge c \ne d",
    r"\operatorname{LPIPS} = \sum_l \frac1{H_lW_l} \big\| w_l \big\|", r"\text{if } x \in \mathcal{D}_\text{in}",
    r"\begin{aligned} a &= b \\ c &= d \end{aligned}",
])
def test_equations_of_the_papers_are_drawn(tex):
    assert equation(tex).count("<img") == 1 + tex.count("\\\\ ")


@pytest.mark.parametrize("text", ["it costs $5 and $6", "`$HOME/$x$`", "```\n$a$ and $b$\n```", "$ spaced $",
                                  "a \\$ sign, another \\$"])
def test_what_is_not_an_equation_stays(text):
    assert with_equations(text) == text


def test_equations_in_tables_and_emphasis(tmp_path):
    """Signs that Markdown would take for its own do not break a table or turn into emphasis."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(
        "| a | b |\n|---|---|\n| $|x|_1$ | $\\unknown_a * b_c * d$ |\n")])
    nbformat.write(book, tmp_path / "a.ipynb")
    page = notebook_page(tmp_path / "a.ipynb").read_text()
    row = re.search(r"<tbody>.*?</tbody>", page, re.DOTALL)[0]
    assert row.count("<td") == 2 and "<em>" not in row and row.count('class="equation"') == 2


def executed(folder):
    """A notebook with the outputs that ours have: a table, a picture with its alternative text, plain lines."""
    data, notes = histograms({"a": [1.0, 2.0]})._repr_mimebundle_()
    picture = nbformat.v4.new_output("display_data", {"image/png": base64.b64encode(data["image/png"]).decode()},
                                     metadata={"image/png": {**notes["image/png"], "alt": "Two <bars>"}})
    table = nbformat.v4.new_output("display_data", {"text/html": "<table><tr><td>0.97</td></tr></table>"})
    lines = nbformat.v4.new_output("stream", text="line\n")
    cells = [nbformat.v4.new_markdown_cell(f"# One\n\n$x^2$ ![dot](data:image/png;base64,{PIXEL})"),
             nbformat.v4.new_code_cell("show()", outputs=[picture, table, lines])]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "book.ipynb")
    return folder / "book.ipynb"


def test_a_page_keeps_what_the_notebook_shows(tmp_path):
    page = notebook_page(executed(tmp_path), tmp_path / "deep" / "page.html").read_text()
    assert requests_of(page) == [] and "<script" not in page
    assert 'alt="Two &lt;bars&gt;"' in page and "<td>0.97</td>" in page and "line" in page
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["page.html"]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium to open the page with")
def test_a_browser_opens_it_in_silence(tmp_path):
    """Rendered in headless Chromium: the equation has a height, the console is silent."""
    page = notebook_page(executed(tmp_path))
    page.write_text(page.read_text().replace("</body>", """<script>
        document.title = [...document.images].every(image => image.complete && image.naturalWidth > 0)
            && document.querySelector('img.equation').offsetHeight > 5 ? 'drawn' : 'broken';</script></body>"""))
    done = subprocess.run(["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000",
                           f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--dump-dom",
                           page.as_uri()], capture_output=True, text=True, timeout=600)
    assert "<title>drawn</title>" in done.stdout, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr
