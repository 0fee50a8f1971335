"""The runner and the command line, on a tiny notebook in the place of a paper's."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from oodrepro import execution, reproduce
from oodrepro.pages import requests_of

ROOT = Path(__file__).resolve().parent.parent
DEFAULTS = 'tier = "smoke"\nseeds = [0]\nroot = ""\ndata_root = ""\nforce = []'
WORK = """from pathlib import Path
from oodrepro.stages import Stages
stages = Stages(Path(root) / "runs" / tier / "lmd" / "cache", force=force)
for seed in seeds:
    stages.run("square", lambda folder: (folder / "n.txt").write_text(str(seed**2)), settings={"seed": seed})
(Path(root) / "results" / tier / "lmd").mkdir(parents=True, exist_ok=True)
print("end of", tier)"""


def write_book(folder, *sources, tags=("parameters",), name="3_lmd.ipynb"):
    """A paper notebook made of `sources`, its first code cell tagged."""
    cells = [nbformat.v4.new_markdown_cell("# A paper\n\nWith $x^2$.")]
    cells += [nbformat.v4.new_code_cell(source) for source in sources]
    cells[1].metadata["tags"] = list(tags)
    folder.mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / name)


@pytest.fixture
def books(tmp_path, monkeypatch):
    """An empty folder in the place of nbs/papers, and a working folder of its own."""
    monkeypatch.setattr(reproduce, "notebook_folder", lambda: tmp_path / "papers")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "papers"


def test_a_whole_run(books, tmp_path, capsys):
    write_book(books, DEFAULTS, WORK)
    source = (books / "3_lmd.ipynb").read_bytes()
    assert reproduce.main(["reproduce", "--tier", "laptop", "--seeds", "0-1"]) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "oodrepro-runs" / "runs" / "laptop" / "lmd"
    for line in ("lmd: Unsupervised Out-of-Distribution Detection with Diffusion Inpainting",
                 "  tier laptop, seeds 0, 1", "  | stage square: running (missing)", "  | stage square: running (settings changed: seed 0 -> 1)",
                 "  | end of laptop", f"  page     {folder / '3_lmd.html'}"):
        assert line in out.splitlines(), out
    assert {path.name for path in folder.iterdir() if path.is_file()} == {"3_lmd.ipynb", "3_lmd.html", "finished.json"}
    assert (books / "3_lmd.ipynb").read_bytes() == source
    page = (folder / "3_lmd.html").read_text()
    assert requests_of(page) == [] and "end of laptop" in page and 'class="equation"' in page

    assert reproduce.main(["reproduce", "lmd", "--tier", "laptop", "--force", "square", "--force", "sqare"]) == 0
    out = capsys.readouterr().out
    assert "  | stage square: running (forced)" in out and "--force sqare matched no stage" in out
    assert "--force square" not in out


def test_a_failing_cell_is_shown_and_kept(books, tmp_path, capsys):
    write_book(books, DEFAULTS, "print('so far')", "def divide(x):\n    return 1 / x\ndivide(0)", "after = 1")
    assert reproduce.main(["reproduce", "lmd"]) == 1
    errors = capsys.readouterr().err
    folder = tmp_path / "oodrepro-runs" / "runs" / "smoke" / "lmd"
    assert "3_lmd.ipynb: cell 4 failed with ZeroDivisionError: division by zero" in errors
    assert "    divide(0)" in errors and "\x1b" not in errors and "oodrepro: 1 of 1 failed: lmd" in errors
    assert [path.name for path in folder.iterdir()] == ["3_lmd.failed.ipynb"]
    partial = nbformat.read(folder / "3_lmd.failed.ipynb", as_version=4)
    assert "so far" in json.dumps(partial.cells) and "ZeroDivisionError" in json.dumps(partial.cells)


def test_one_failure_does_not_stop_the_others(books, tmp_path, capsys):
    write_book(books, DEFAULTS, "raise ValueError('no')", name="1_ddpm_label_mixup.ipynb")
    write_book(books, DEFAULTS, WORK)
    assert reproduce.main(["reproduce", "all"]) == 1
    out, errors = capsys.readouterr()
    assert "lmd: done in" in out and "oodrepro: 1 of 2 failed: ddpm_label_mixup" in errors


def test_a_dead_kernel_is_a_failure(books, tmp_path, capsys):
    write_book(books, DEFAULTS, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    assert reproduce.main(["reproduce", "lmd"]) == 1
    assert "3_lmd.ipynb stopped: DeadKernelError" in capsys.readouterr().err


@pytest.mark.parametrize("sources, tags, words", [
    ([DEFAULTS, WORK], (), "0 code cells tagged 'parameters'"),
    ([DEFAULTS, WORK], ("injected-parameters",), "an executed copy was saved over it"),
    ([DEFAULTS.replace("seeds = [0]\n", ""), WORK], ("parameters",), "does not declare seeds"),
])
def test_notebooks_that_cannot_be_set_are_refused(books, tmp_path, capsys, sources, tags, words):
    write_book(books, *sources, tags=tags)
    assert reproduce.main(["reproduce", "lmd"]) == 1
    assert words in capsys.readouterr().err
    assert not list((tmp_path / "oodrepro-runs").rglob("*.ipynb")), "something ran"


@pytest.mark.parametrize("words, message", [
    (["reproduce", "lmdd"], "unknown paper 'lmdd'"), (["reproduce", "oal"], "2_oal_latent_outliers.ipynb, is not in"),
    (["reproduce", "lmd", "oal"], "2_oal_latent_outliers.ipynb, is not in"),
    (["reproduce", "lmd", "--seeds", "a"], "seeds 'a'"), (["cite", "x"], "unknown paper 'x'"),
])
def test_bad_requests(books, capsys, words, message):
    write_book(books, DEFAULTS, WORK)
    assert reproduce.main(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [["reproduce", "lmd", "--tier", "huge"], ["data", "get"], [], ["data", "eat", "x"]])
def test_bad_words_show_the_usage(books, capsys, words):
    with pytest.raises(SystemExit) as stopped:
        reproduce.main(words)
    assert stopped.value.code == 2 and "usage: oodrepro" in capsys.readouterr().err


def test_dry_run_writes_nothing(books, tmp_path, capsys):
    write_book(books, DEFAULTS, WORK)
    before = sorted(tmp_path.rglob("*"))
    assert reproduce.main(["reproduce", "--dry-run", "--tier", "paper", "--root", "elsewhere"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    assert f"  root {tmp_path / 'elsewhere'}" in capsys.readouterr().out


def test_a_module_may_offer_its_plan(books, monkeypatch, capsys):
    write_book(books, DEFAULTS, WORK)
    class Module:
        @staticmethod
        def plan(tier, seeds, root, data_root):
            return [f"stage train at {tier}: cached"]
    monkeypatch.setattr(reproduce, "_module", lambda name: Module if name == "oodrepro.lmd_study" else None)
    assert reproduce.main(["reproduce", "--dry-run"]) == 0
    assert "  stage train at smoke: cached" in capsys.readouterr().out.splitlines()


CHILD = """
import sys
from pathlib import Path
from oodrepro import reproduce
reproduce.notebook_folder = lambda: Path("papers").absolute()
sys.exit(reproduce.main(sys.argv[1:]))
"""


def test_killed_then_run_again(books, tmp_path):
    """kill -9 of the runner: nothing appears under the final name, and the next run reuses whole stages."""
    write_book(books, DEFAULTS, WORK, "import time\nopen(Path(root) / 'here', 'w').close()\ntime.sleep(60)")
    command = [sys.executable, "-c", CHILD, "reproduce", "lmd", "--root", "."]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "here").exists():
        assert child.poll() is None, child.stdout.read()
        time.sleep(0.05)
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 1 and f"process {child.pid} on" in second.stderr, second.stderr
    assert "is making lmd at tier smoke" in second.stderr
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    folder = tmp_path / "runs" / "smoke" / "lmd"
    assert not (folder / "3_lmd.ipynb").exists()
    litter = tmp_path / "results" / "smoke" / "lmd" / ".a.tmp-123-0123abcd.json"  # what a killed writer leaves
    litter.write_text("half")
    write_book(books, DEFAULTS, WORK)
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and not litter.exists(), again.stderr
    assert "  | stage square: reused" in again.stdout.splitlines(), again.stdout
    assert {path.name for path in folder.iterdir() if path.is_file()} == {"3_lmd.ipynb", "3_lmd.html", "finished.json"}


def test_the_kernel_is_this_interpreter_whatever_the_notebook_says(books, tmp_path):
    """A `python3` kernel specification that points elsewhere must not be used."""
    write_book(books, DEFAULTS, "import sys\nprint(sys.executable, sys.path[0])")
    book = nbformat.read(books / "3_lmd.ipynb", as_version=4)
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "another", "language": "python"}
    nbformat.write(book, books / "3_lmd.ipynb")
    fake = tmp_path / "jupyter" / "kernels" / "python3"
    fake.mkdir(parents=True)
    (fake / "kernel.json").write_text(json.dumps({"argv": ["/bin/false"], "display_name": "x", "language": "python"}))
    before = os.environ.get("JUPYTER_PATH")
    os.environ["JUPYTER_PATH"] = str(tmp_path / "jupyter")
    try:
        lines = []
        execution.execute(books / "3_lmd.ipynb", tmp_path / "out.ipynb", {}, log=lines.append)
        assert os.environ["JUPYTER_PATH"] == str(tmp_path / "jupyter")
    finally:
        os.environ.pop("JUPYTER_PATH") if before is None else os.environ.update(JUPYTER_PATH=before)
    assert lines[0].split()[0] == sys.executable


def test_resume_leaves_alone_what_is_finished(books, tmp_path, capsys):
    """With --resume a run is repeated only if something that decides its result, or a file of its result, changed."""
    write_book(books, DEFAULTS, WORK + "\n(Path(root) / 'results' / tier / 'lmd' / 'n.txt').write_text('7')")

    def again(*words):
        assert reproduce.main(["reproduce", "lmd", "--resume", "--root", ".", *words]) == 0
        return capsys.readouterr().out

    folder, number = tmp_path / "runs" / "smoke" / "lmd", tmp_path / "results" / "smoke" / "lmd" / "n.txt"
    assert "lmd: not finished before" in again()
    executed = (folder / "3_lmd.ipynb").read_bytes()
    out = again()
    assert "nothing to do" in out and "seeds 0, took" in out and "finished stages at hand: 1" in out
    assert (folder / "3_lmd.ipynb").read_bytes() == executed
    assert "lmd: seeds changed" in again("--seeds", "0-1")
    number.write_text("8")
    assert "results/smoke/lmd/n.txt changed" in again("--seeds", "0-1") and number.read_text() == "7"
    (folder / "finished.json").write_text("{")
    assert "finished.json is unreadable" in again("--seeds", "0-1")
    write_book(books, DEFAULTS, WORK, "more = 1")
    assert "lmd: notebook changed" in again("--seeds", "0-1")
    assert "  | stage square: running (forced)" in again("--seeds", "0-1", "--force", "square")


def test_the_plan_comes_first_and_counts_what_is_there(books, tmp_path, capsys):
    write_book(books, DEFAULTS, WORK)
    assert reproduce.main(["reproduce", "lmd", "--seeds", "0-2"]) == 0
    out = capsys.readouterr().out
    assert out.index("no finished stages at hand") < out.index("stage square: running")
    (tmp_path / "oodrepro-runs/runs/smoke/lmd/cache/square/abc.partial").mkdir()
    assert reproduce.main(["reproduce", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "    square: 3" in lines and "  unfinished, to be taken up again: square" in lines
    assert any(line.startswith("  finished stages at hand: 3, 0.0 MB") for line in lines)


def test_figures_and_doctor_hand_over(tmp_path, capsys):
    assert reproduce.main(["figures", "--root", str(tmp_path)]) == 1
    assert "no figures/<tier>/<paper>/*.json below" in capsys.readouterr().err


def test_check_and_data_hand_over(tmp_path, monkeypatch, capsys):
    pytest.importorskip("oodrepro.receipts")
    (tmp_path / "results").mkdir()
    assert reproduce.main(["check", "--root", str(tmp_path)]) == 0
    assert "every number below" in capsys.readouterr().out
    assert reproduce.main(["check", "--root", str(tmp_path / "nowhere")]) == 1
    assert reproduce.main(["data", "list", "--data-root", str(tmp_path)]) == 0
    assert "mnist" in capsys.readouterr().out
    assert reproduce.main(["data", "where", "mnist", "--data-root", str(tmp_path)]) == 0
    assert "train-images-idx3-ubyte" in capsys.readouterr().out
    assert reproduce.main(["data", "where", "mnisst", "--data-root", str(tmp_path)]) == 2


def test_every_paper_is_cited_in_the_repository():
    """CITATION.cff names the same titles and identifiers as `oodrepro cite`."""
    import yaml
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    references = {item["title"]: item for item in citation["references"]}
    for paper in reproduce.PAPERS:
        fields = dict(paper.fields)
        if paper.kind == "software":  # this project's own comparison is cited as the project
            assert paper.title == citation["title"] and fields["version"] == citation["version"]
            continue
        reference = references[paper.title]
        assert int(fields["year"]) == reference["year"]
        assert fields["eprint"] in json.dumps(reference)
        assert [name.split(",")[0] for name in fields["author"].split(" and ")] \
            == [author["family-names"] for author in reference["authors"]]
        facts = ROOT / "oodrepro" / "published" / f"{paper.name}.yaml"
        if facts.is_file():
            known = yaml.safe_load(facts.read_text())
            assert known["title"] == paper.title and fields["year"] in known["venue"]
            assert known["authors"].split(", ") == [" ".join(reversed(name.split(", ")))
                                                    for name in fields["author"].split(" and ")]
