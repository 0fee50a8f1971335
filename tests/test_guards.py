"""Every guard finds nothing in this repository, and finds the fault that is planted for it in a small one."""
import json
import shutil
from pathlib import Path

import guards
import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
PARAMETERS = 'tier = "smoke"\nseeds = [0]\nroot = ""\ndata_root = ""\nforce = []'


def write(path, *cells, tags=None):
    """A notebook of code cells; `tags` of the first one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    for number, cell in enumerate(book.cells):
        cell.id = f"{path.stem[:2]}{number:06d}"
    book.cells[0].metadata = {"tags": tags} if tags else {}
    book.metadata = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    path.write_text(json.dumps(book, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


@pytest.fixture(scope="session")
def healthy(tmp_path_factory):
    """A repository of two library notebooks and a paper, exported and clean."""
    root = tmp_path_factory.mktemp("healthy")
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copyfile(ROOT / name, root / name)
    (root / "oodrepro").mkdir()
    (root / "oodrepro" / "__init__.py").write_text('__version__ = "0.1.0"\n')
    write(root / "nbs" / "00_first.ipynb", "#| default_exp first", "#| export\nimport math",
          "#| export\nLIMIT = 3\n\ndef grow(x):\n    return x + LIMIT + math.pi", "assert grow(0) > 3")
    write(root / "nbs" / "01_second.ipynb", "#| default_exp second", "#| export\nfrom oodrepro.first import grow",
          "#| export\ndef twice(x):\n    return grow(grow(x))", "assert twice(0) > 6")
    write(root / "nbs" / "papers" / "1_paper.ipynb", PARAMETERS, "from oodrepro.second import twice",
          "twice(len(seeds))", tags=["parameters"])
    guards._nbdev("nbdev_export", root)
    guards._nbdev("nbdev_clean", root)
    return root


@pytest.fixture
def tree(healthy, tmp_path):
    """A copy of the healthy repository, to plant a fault in."""
    return shutil.copytree(healthy, tmp_path / "tree")


def edit(path, old, new):
    """Replace a text that must be there."""
    text = path.read_text()
    assert old in text, f"{old!r} is not in {path}"
    path.write_text(text.replace(old, new))


def change(path, number, **parts):
    """Set parts of a cell, such as its metadata, in the file itself."""
    book = json.loads(path.read_text())
    book["cells"][number].update(parts)
    path.write_text(json.dumps(book, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


@pytest.mark.parametrize("guard", guards.GUARDS, ids=lambda guard: guard.__name__)
def test_this_repository(guard):
    assert guard(ROOT) == []


@pytest.mark.parametrize("guard", guards.GUARDS, ids=lambda guard: guard.__name__)
def test_the_small_repository_is_healthy(guard, healthy):
    assert guard(healthy) == []


PAPER, FIRST, SECOND = "nbs/papers/1_paper.ipynb", "nbs/00_first.ipynb", "nbs/01_second.ipynb"
FAULTS = {
    "parameters tag stripped": (guards.parameters_missing, "0 code cells tagged 'parameters'",
                                lambda root: change(root / PAPER, 0, metadata={})),
    "a parameter forgotten": (guards.parameters_missing, "does not declare force",
                              lambda root: edit(root / PAPER, "force = []", "farce = []")),
    "a default that is not the smallest": (guards.parameters_missing, "the default of tier is 'gpu'",
                                           lambda root: edit(root / PAPER, "smoke", "gpu")),
    "an injected cell": (guards.executed_over_source, "cell 2 is an injected-parameters cell",
                         lambda root: change(root / PAPER, 1, metadata={"tags": ["injected-parameters"]})),
    "outputs left": (guards.executed_over_source, "cell 4 has outputs",
                     lambda root: change(root / FIRST, 3, execution_count=4,
                                         outputs=[{"output_type": "stream", "name": "stdout", "text": ["7"]}])),
    "papermill's metadata": (guards.executed_over_source, "papermill's metadata",
                             lambda root: edit(root / PAPER, '"metadata": {\n  "kernelspec"',
                                               '"metadata": {\n  "papermill": {},\n  "kernelspec"')),
    "a relative path": (guards.relative_paths, "cell 4 opens the relative path '../data/x.csv'",
                        lambda root: edit(root / FIRST, "assert grow(0) > 3", "open('../data/x.csv')")),
    "a place on one machine": (guards.relative_paths, "cell 3 names a place on one machine",
                               lambda root: edit(root / PAPER, "twice(len(seeds))", "twice('/home/me/data')")),
    "a module without its notebook": (guards.stale_modules, "00_first.ipynb is gone",
                                      lambda root: (root / FIRST).unlink()),
    "a module exported no more": (guards.stale_modules, "no notebook exports to first",
                                  lambda root: edit(root / FIRST, "default_exp first", "default_exp other")),
    "a module written by hand": (guards.stale_modules, "extra.py: no notebook wrote it",
                                 lambda root: (root / "oodrepro" / "extra.py").write_text("x = 1\n")),
    "two notebooks for one module": (guards.stale_modules, "exported by 00_first.ipynb and 01_second.ipynb",
                                     lambda root: edit(root / SECOND, "default_exp second", "default_exp first")),
    "a paper that exports": (guards.papers_that_export, "cell 3 exports",
                             lambda root: edit(root / PAPER, "twice(len", "#| export\\ntwice(len")),
    "a leaked global": (guards.leaked_names, "Undefined name `LIMIT`",
                        lambda root: edit(root / "oodrepro" / "first.py", "LIMIT = 3\n", "")),
    "a star import": (guards.leaked_names, "first import *",
                      lambda root: edit(root / SECOND, "first import grow", "first import *")),
    "an upward import": (guards.upward_imports, "imports second, which is notebook 01",
                         lambda root: edit(root / FIRST, "assert grow(0) > 3", "from oodrepro.second import twice")),
    "an upward import of a module": (guards.upward_imports, "imports second, which is notebook 01",
                                     lambda root: edit(root / FIRST, "import math", "from oodrepro import second")),
    "imports among code": (guards.imports_mixed_with_code, "cell 2 mixes imports",
                           lambda root: edit(root / FIRST, "import math", "import math\\nPI = math.pi")),
    "a device literal": (guards.house_rules, ".cuda()",
                         lambda root: edit(root / "oodrepro" / "first.py", "return x +", "return x.cuda() +")),
    "a global statement": (guards.house_rules, "global LIMIT",
                           lambda root: edit(root / "oodrepro" / "first.py", "    return x +",
                                             "    global LIMIT\n    return x +")),
    "module state": (guards.house_rules, "seen is module state",
                     lambda root: edit(root / "oodrepro" / "first.py", "LIMIT = 3", "LIMIT = 3\nseen = {}")),
    "a notebook edited, not exported": (guards.unsynced, "oodrepro/first.py: not what its notebook exports",
                                        lambda root: edit(root / FIRST, "LIMIT = 3", "LIMIT = 4")),
    "a module edited by hand": (guards.unsynced, "oodrepro/second.py: not what its notebook exports",
                                lambda root: edit(root / "oodrepro" / "second.py", "grow(grow(x))", "grow(x)")),
    "a notebook saved by an editor": (guards.uncleaned, "nbs/00_first.ipynb: not clean",
                                      lambda root: change(root / FIRST, 1, metadata={"scrolled": True})),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, tree):
    guard, words, plant = FAULTS[fault]
    plant(tree)
    findings = guard(tree)
    assert any(words in line for line in findings), findings


def test_every_guard_has_a_fault():
    assert {guard for guard, _, _ in FAULTS.values()} == set(guards.GUARDS)


def test_guards_change_nothing(tree):
    """Uncommitted work in the tree survives the check, even when it is out of step."""
    edit(tree / FIRST, "LIMIT = 3", "LIMIT = 4")
    before = {path: path.read_bytes() for path in tree.rglob("*") if path.is_file()}
    for guard in guards.GUARDS:
        guard(tree)
    assert {path: path.read_bytes() for path in tree.rglob("*") if path.is_file()} == before


def test_nbdev_keeps_the_parameters_tag(tree):
    """The setting that keeps nbdev_clean from stripping the tag works; without it the tag would be lost."""
    guards._nbdev("nbdev_clean", tree)
    assert guards.parameters_missing(tree) == []
    for name in ("settings.ini", "pyproject.toml"):
        lines = (tree / name).read_text().splitlines()
        (tree / name).write_text("\n".join(line for line in lines if "allowed_cell_metadata_keys" not in line))
    guards._nbdev("nbdev_clean", tree)
    assert guards.parameters_missing(tree) != []
