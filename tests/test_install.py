"""The wheel, away from the checkout: it imports without nbdev and reproduces the papers from an empty folder.

By default the new environment sees the packages of the present one, except that whatever only developers need (nbdev and
the rest of dev_requirements) cannot be imported there. With OODREPRO_FRESH_ENVIRONMENT=1 it is truly empty and pip
installs the wheel with its dependencies (`make test-wheel`).
"""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import pytest

from oodrepro.pages import requests_of
from oodrepro.reproduce import available_papers

ROOT = Path(__file__).resolve().parent.parent
FRESH = os.environ.get("OODREPRO_FRESH_ENVIRONMENT") == "1"


def facts() -> dict:
    """settings.ini."""
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    return settings["DEFAULT"]


def names(requirements: str) -> set[str]:
    """The distributions of a requirement list, in their canonical spelling."""
    return {re.sub(r"[-_.]+", "-", re.split(r"[<>=!~\[;]", word)[0]).lower() for word in requirements.split()}


def call(*words, **options):
    """Run a command to its end; its output if it succeeds, a failure that shows the output if not."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{words}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of what it needs, so that no build folder appears in the checkout."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("settings.ini", "constraints.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copyfile(ROOT / name, source / name)
    for name in ("oodrepro", "nbs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    (source / "oodrepro" / "published").mkdir(exist_ok=True)
    call(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", target, source)
    return next(target.glob("*.whl"))


BLOCKER = """import sys

class Blocker:
    "Developers' packages cannot be imported here."
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)", name=name)

sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """The Python of a new environment that holds the wheel."""
    home = tmp_path_factory.mktemp("environment") / "env"
    python = home / "bin" / "python"
    if FRESH:
        call(sys.executable, "-m", "venv", home)
        call(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel)
        return python
    call(sys.executable, "-m", "venv", "--without-pip", home)
    call(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    site = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # A line in a .pth file adds the folder but not what that folder's own .pth files say: the checkout stays unseen.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    blocked = {name.replace("-", "_") for name in names(facts()["dev_requirements"])}
    (site / "sitecustomize.py").write_text(BLOCKER.format(blocked=sorted(blocked)))
    return python


@pytest.fixture(scope="session")
def empty_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("empty")


def clean_environment() -> dict:
    """The present environment variables without those that point at the checkout or at this environment."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "OODREPRO", "JUPYTER"))}


def test_the_wheel_holds_what_it_should(wheel):
    inside = zipfile.ZipFile(wheel).namelist()
    held = {name.removeprefix("oodrepro/") for name in inside if name.startswith("oodrepro/")}
    for folder, pattern in (("published", "*.yaml"), ("pretrained", "*")):
        for path in (ROOT / "oodrepro" / folder).rglob(pattern):
            assert not path.is_file() or path.relative_to(ROOT / "oodrepro").as_posix() in held
    assert {f"notebooks/{path.name}" for path in (ROOT / "nbs" / "papers").glob("*.ipynb")} <= held
    assert {path.name for path in (ROOT / "oodrepro").glob("*.py")} <= held
    others = [name for name in inside if not name.startswith(("oodrepro/", "oodrepro-"))]
    assert others == [] and not [name for name in inside if "__pycache__" in name or "/tests/" in name]
    assert any(name.endswith("LICENSE") for name in inside)


def test_every_import_is_declared():
    """What the modules import is in the standard library or among the requirements."""
    declared, found = names(facts()["requirements"]), set()
    optional = {name for key, value in facts().items() if key.endswith("_requirements") for name in names(value)}
    owners = metadata.packages_distributions()
    for path in (ROOT / "oodrepro").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            for module in {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names) - {"oodrepro"}:
                owner = {re.sub(r"[-_.]+", "-", name).lower() for name in owners.get(module, [module])}
                if not owner & declared and not owner & (optional - names(facts()["dev_requirements"])):
                    found.add(f"{path.name} imports {module} ({', '.join(owner)})")
    assert not found


def test_the_tested_versions_are_inside_the_ranges():
    """constraints.txt pins every requirement, and the pins satisfy settings.ini."""
    from packaging.requirements import Requirement
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = [Requirement(line) for line in lines if line]
    for line in pins:
        assert re.fullmatch(r"==[0-9][\w.]*", str(line.specifier)) and line.url is None, f"not an exact version: {line}"
    for word in (facts()["requirements"] + " " + facts()["dev_requirements"]).split():
        wanted = Requirement(word)
        versions = [str(pin.specifier)[2:] for pin in pins if names(pin.name) == names(wanted.name)]
        assert versions, f"{word} is not pinned in constraints.txt"
        assert all(wanted.specifier.contains(version) for version in versions), f"{word}: {versions}"


def test_every_module_imports_without_the_checkout(installed, empty_folder):
    script = """
import importlib, json, pkgutil, sys
import oodrepro
done = []
for item in pkgutil.iter_modules(oodrepro.__path__):
    if item.name != "_modidx":
        importlib.import_module("oodrepro." + item.name); done.append(item.name)
for name in ("nbdev", "fastcore", "execnb", "ghapi"):
    try: importlib.import_module(name); sys.exit(name + " can be imported")
    except ModuleNotFoundError: pass
print(json.dumps([oodrepro.__file__, done, sorted({name.split(".")[0] for name in sys.modules})]))
"""
    answer = call(installed, "-c", script, cwd=empty_folder, env=clean_environment())
    place, done, loaded = json.loads(answer.splitlines()[-1])
    assert str(ROOT) not in place and set(done) >= {path.stem for path in (ROOT / "oodrepro").glob("[a-z]*.py")}
    assert not {"nbdev", "fastcore", "pytest"} & set(loaded)


AGAIN = ("lmd", "oal")  # run a second time, from the cache; in a fresh environment all are


@pytest.mark.slow
@pytest.mark.parametrize("paper", list(available_papers()) or [pytest.param(None, marks=pytest.mark.skip("no paper yet"))])
def test_papers_from_an_empty_folder(paper, installed, empty_folder):
    """`oodrepro reproduce PAPER` at tier smoke: receipts that check, figures, a page that works offline."""
    command, environment, start = installed.parent / "oodrepro", clean_environment(), time.perf_counter()
    if not FRESH:  # nbconvert's templates lie beside the borrowed libraries, not in the new environment
        environment["JUPYTER_PATH"] = str(Path(sysconfig.get_path("data")) / "share" / "jupyter")
    call(command, "reproduce", paper, "--tier", "smoke", cwd=empty_folder, env=environment)
    first = time.perf_counter() - start
    root = empty_folder / "oodrepro-runs"
    receipts = sorted((root / "results" / "smoke" / paper).glob("*.json"))
    assert receipts, "no receipt was written"
    assert "follows from its scores" in call(command, "check", cwd=empty_folder, env=environment)
    assert list((root / "figures" / "smoke" / paper).glob("*.svg"))
    page = next((root / "runs" / "smoke" / paper).glob("*.html")).read_text()
    assert requests_of(page) == []
    assert sorted(path.name for path in empty_folder.iterdir()) == ["oodrepro-runs"]
    if not FRESH and paper not in AGAIN:
        return
    scores = {path.name: json.loads(path.read_text())["metrics"] for path in receipts}
    start = time.perf_counter()
    call(command, "reproduce", paper, "--tier", "smoke", cwd=empty_folder, env=environment)
    print(f"{paper}: {first:.0f} s, again with everything cached {time.perf_counter() - start:.0f} s", file=sys.stderr)
    assert {path.name: json.loads(path.read_text())["metrics"] for path in receipts} == scores
