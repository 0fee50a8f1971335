"""Guards against faults that give no error message of their own.

Each guard is a function of the repository's root that returns findings, one line each; none means all is well.
`python tests/guards.py` runs them all and exits 1 if there is a finding; nothing in the tree is changed.
tests/test_guards.py runs them too, and shows each one failing on a fault planted in a small repository.
"""
import ast
import difflib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

BIN = Path(sys.executable).parent
PARAMETERS = {"tier": "smoke", "seeds": [0], "root": "", "data_root": "", "force": []}  # of every paper notebook
HAND_WRITTEN = {"__init__.py", "_modidx.py"}  # nbdev's own


def notebooks(root: Path) -> list[Path]:
    """All notebooks of the tree, in order."""
    return sorted(path for path in (root / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)


def papers(root: Path) -> list[Path]:
    """The paper notebooks."""
    return [path for path in notebooks(root) if path.parent.name == "papers"]


def cells(path: Path, kind: str | None = None) -> list[dict]:
    """Cells of a notebook, with `source` as one text."""
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [{**cell, "source": "".join(cell["source"])} for cell in found if kind in (None, cell["cell_type"])]


def directives(source: str) -> list[str]:
    """The words behind `#|` in a cell, e.g. ["export"]."""
    return [line[2:].strip() for line in source.splitlines() if line.startswith("#|")]


def exported(path: Path) -> str | None:
    """The module that a notebook is exported to, if any."""
    names = [words.split()[1] for cell in cells(path, "code") for words in directives(cell["source"])
             if words.startswith("default_exp ")]
    return names[0] if names else None


def trees(path: Path) -> Iterator[tuple[int, ast.Module]]:
    """(cell number, syntax tree) of the code cells that are Python."""
    for number, cell in enumerate(cells(path), 1):
        if cell["cell_type"] == "code":
            lines = ["pass" if line.lstrip().startswith(("%", "!")) else line for line in cell["source"].splitlines()]
            try:
                yield number, ast.parse("\n".join(lines))
            except SyntaxError:
                continue  # the notebook's own test reports it


# --- papermill ------------------------------------------------------------------------------------------------------

def parameters_missing(root: Path) -> list[str]:
    """Paper notebooks whose tier and seeds could not be set: papermill would run the defaults and exit 0."""
    from oodrepro.execution import declared_parameters
    found = []
    for path in papers(root):
        try:
            declared = declared_parameters(path)
        except ValueError as problem:
            found.append(str(problem))
            continue
        for name, default in PARAMETERS.items():
            if name not in declared:
                found.append(f"{path}: the parameters cell does not declare {name}")
            elif declared[name] != default:
                found.append(f"{path}: the default of {name} is {declared[name]!r}, not the smallest, {default!r}")
    return found


def executed_over_source(root: Path) -> list[str]:
    """Notebooks that an executed copy was saved over: an injected cell, papermill's notes, or outputs."""
    found = []
    for path in notebooks(root):
        metadata = json.loads(path.read_text(encoding="utf-8"))["metadata"]
        if "papermill" in metadata:
            found.append(f"{path}: has papermill's metadata")
        for number, cell in enumerate(cells(path), 1):
            if "injected-parameters" in cell["metadata"].get("tags", ()):
                found.append(f"{path}: cell {number} is an injected-parameters cell")
            if cell.get("outputs") or cell.get("execution_count"):
                found.append(f"{path}: cell {number} has outputs; notebooks are committed without")
    return found


def relative_paths(root: Path) -> list[str]:
    """Literal paths in notebooks: nbdev_test, papermill and JupyterLab each have another working folder."""
    openers = {"Path", "open", "read_csv", "read_json", "load", "loadtxt", "imread", "read_text", "mkdir", "savefig"}
    machine = re.compile(r"^(/(?!some/|proc/)[\w.-]+/|[A-Z]:\\|~/)")
    looks_like_file = re.compile(r"^\.{1,2}(/|$)|^[\w-]+/[\w./-]+$"
                                 r"|^[^/].*\.(csv|json|npz|npy|png|svg|pt|pth|yaml|txt|safetensors)$")
    found = []
    for path in notebooks(root):
        for number, tree in trees(path):
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and machine.match(node.value):
                    found.append(f"{path}: cell {number} names a place on one machine, {node.value!r}")
                called = node.func if isinstance(node, ast.Call) else None
                name = getattr(called, "id", getattr(called, "attr", ""))
                first = node.args[0] if called is not None and node.args else None
                if name in openers and isinstance(first, ast.Constant) and isinstance(first.value, str) \
                        and looks_like_file.search(first.value):
                    found.append(f"{path}: cell {number} opens the relative path {first.value!r}")
    return found


# --- nbdev ----------------------------------------------------------------------------------------------------------

def stale_modules(root: Path) -> list[str]:
    """Modules whose notebook is gone or exports elsewhere; modules that no notebook wrote; two notebooks for one."""
    sources: dict[str, list[Path]] = {}
    for path in notebooks(root):
        if exported(path):
            sources.setdefault(exported(path), []).append(path)
    found = [f"{name}: exported by {' and '.join(path.name for path in paths)}"
             for name, paths in sources.items() if len(paths) > 1]
    for module in sorted((root / "oodrepro").glob("*.py")):
        if module.name in HAND_WRITTEN:
            continue
        match = re.search(r"File to edit: (\S+)\.\n", module.read_text(encoding="utf-8"))
        if not match:
            found.append(f"{module}: no notebook wrote it")
        elif not (module.parent / match[1]).resolve().is_file():
            found.append(f"{module}: its notebook {match[1]} is gone; delete the module")
        elif module.stem not in sources:
            found.append(f"{module}: no notebook exports to {module.stem} any more; delete the module")
    return found


def papers_that_export(root: Path) -> list[str]:
    """Paper notebooks tell a story and export nothing."""
    return [f"{path}: cell {number} exports" for path in papers(root) for number, cell in enumerate(cells(path), 1)
            if any(words.startswith(("export", "default_exp")) for words in directives(cell["source"]))]


def leaked_names(root: Path) -> list[str]:
    """Star imports, and names that a module or a notebook uses without having them: NameError, but after import."""
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--isolated", "--output-format", "concise",
               "--select", "F821,F403,F405", "oodrepro", "nbs"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stderr)
    return [line for line in done.stdout.splitlines() if re.search(r": (F\d+|invalid-syntax)", line)]


def upward_imports(root: Path) -> list[str]:
    """Library notebooks that import a module of the same or a higher number: circles start so."""
    number_of = {exported(path): int(path.name[:2]) for path in notebooks(root)
                 if exported(path) and path.name[:2].isdigit()}
    found = []
    for path in notebooks(root):
        if path.parent.name == "papers" or not path.name[:2].isdigit():
            continue
        for cell, tree in trees(path):
            for node in ast.walk(tree):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.module:
                    inside = [f"oodrepro.{item.name}" for item in node.names]
                    names = inside if node.module == "oodrepro" else [node.module]
                for name in names:
                    module = name.split(".")[1] if name.startswith("oodrepro.") else None
                    own = module == exported(path)  # a notebook may look at its own module from outside
                    if module in number_of and number_of[module] >= int(path.name[:2]) and not own:
                        found.append(f"{path}: cell {cell} imports {module}, which is notebook {number_of[module]:02d}")
    return found


def imports_mixed_with_code(root: Path) -> list[str]:
    """Exported cells with imports and other code: nbdev runs the imports of such a cell in its documentation."""
    found = []
    for path in notebooks(root):
        for number, tree in trees(path):
            source = cells(path)[number - 1]["source"]
            kinds = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree.body}
            if len(kinds) == 2 and "export" in directives(source):
                found.append(f"{path}: cell {number} mixes imports with other code")
    return found


def house_rules(root: Path) -> list[str]:
    """Device literals, `global`, and module-level containers that are not named as constants."""
    found = []
    for module in sorted((root / "oodrepro").glob("*.py")):
        if module.name in HAND_WRITTEN:
            continue
        tree = ast.parse(module.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
                found.append(f"{module}:{node.lineno}: .cuda(): the device comes from the tensors")
            if isinstance(node, ast.Global):
                found.append(f"{module}:{node.lineno}: global {', '.join(node.names)}: module state")
        for node in tree.body:
            targets = [target.id for target in getattr(node, "targets", ()) if isinstance(target, ast.Name)]
            containers = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
            if isinstance(getattr(node, "value", None), containers):
                found += [f"{module}:{node.lineno}: {name} is module state; a constant is written in capitals"
                          for name in targets if name not in ("__all__", "_all_") and name != name.upper()]
    return found


# --- in step --------------------------------------------------------------------------------------------------------

def _copy(root: Path, target: Path) -> None:
    """What nbdev needs of a tree, copied, so that the working tree is left alone whatever nbdev does."""
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copyfile(root / name, target / name)
    for name in ("nbs", "oodrepro"):
        shutil.copytree(root / name, target / name,
                        ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "pretrained"))


def _nbdev(command: str, folder: Path) -> None:
    """Run an nbdev command in `folder`."""
    done = subprocess.run([str(BIN / command)], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command} failed:\n{done.stdout}{done.stderr}")


def unsynced(root: Path) -> list[str]:
    """Modules that differ from what their notebooks export."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        _copy(root, Path(folder))
        _nbdev("nbdev_export", Path(folder))
        names = {path.name for place in (root, Path(folder)) for path in (place / "oodrepro").glob("*.py")}
        for name in sorted(names):
            ours, theirs = ([] if not path.is_file() else path.read_text(encoding="utf-8").splitlines()
                            for path in (root / "oodrepro" / name, Path(folder) / "oodrepro" / name))
            changed = [line for line in difflib.unified_diff(ours, theirs, lineterm="", n=0) if line[:1] in "+-"][2:]
            if changed:
                found.append(f"oodrepro/{name}: not what its notebook exports (make sync), e.g. {changed[0][:100]}")
    return found


def uncleaned(root: Path) -> list[str]:
    """Notebooks that nbdev_clean would change."""
    with tempfile.TemporaryDirectory() as folder:
        _copy(root, Path(folder))
        _nbdev("nbdev_clean", Path(folder))
        return [f"{path.relative_to(root)}: not clean (make sync)" for path in notebooks(root)
                if path.read_bytes() != (Path(folder) / path.relative_to(root)).read_bytes()]


GUARDS = (parameters_missing, executed_over_source, relative_paths, stale_modules, papers_that_export, leaked_names,
          upward_imports, imports_mixed_with_code, house_rules, unsynced, uncleaned)


if __name__ == "__main__":
    here = Path(__file__).resolve().parent.parent
    findings = {guard.__name__: guard(here) for guard in GUARDS}
    for name, lines in findings.items():
        for line in lines:
            print(f"{name}: {line.replace(str(here) + os.sep, '')}")
    print(f"{len(GUARDS)} guards, {sum(map(len, findings.values()))} findings")
    sys.exit(1 if any(findings.values()) else 0)
