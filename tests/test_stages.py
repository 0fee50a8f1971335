"""Stages under fault: killed processes, planted corruption, two at once; and what does and does not change a key."""
import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from oodrepro import settings as settings_module
from oodrepro.stages import (Stages, StageBusy, atomic_path, code_fingerprint, file_digest, progress, read_json,
                             write_json)


def write_text(text):
    """A `make` that writes `text` into one file."""
    return lambda folder: (folder / "out.txt").write_text(text)


def script(tmp_path, body):
    """Start a Python process that runs `body`."""
    path = tmp_path / "child.py"
    path.write_text(textwrap.dedent(body))
    return subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True, bufsize=1)


COUNTING = """
    import sys, time
    from pathlib import Path
    from oodrepro.stages import Stages, atomic_path

    def make(folder):
        for part in range(40):
            if (folder / f"part{part:02d}.txt").exists():
                continue
            with atomic_path(folder / f"part{part:02d}.txt") as path, open(path, "w") as file:
                for line in range(20):
                    file.write(f"{part} {line}\\n"); file.flush()
                    time.sleep(0.0005)
            print(part, flush=True)

    stage = Stages(sys.argv[1] if len(sys.argv) > 1 else FOLDER).run("count", make, settings={"parts": 40})
    print("resumed", stage.manifest["resumed"], flush=True)
"""


def test_killed_at_any_moment_then_whole(tmp_path):
    """kill -9 after a varying number of parts, until one process gets to the end: every part whole, none made twice."""
    body, kills, seen = COUNTING.replace("FOLDER", repr(str(tmp_path / "cache"))), 0, []
    for attempt in range(12):
        child = script(tmp_path, body)
        for number, line in enumerate(child.stdout):
            if line.split()[0].isdigit():
                seen.append(int(line.split()[0]))
            if kills < 5 and number == 2 + 2 * attempt:
                time.sleep(0.003 * attempt)
                os.kill(child.pid, signal.SIGKILL)
        if child.wait() == 0:
            break
        kills += 1
        assert not list((tmp_path / "cache" / "count").glob("*/stage.json")), "an interrupted stage carries a manifest"
    assert kills == 5 and child.returncode == 0
    stage = Stages(tmp_path / "cache").explain("count", settings={"parts": 40})
    assert stage.cached
    parts = {f"part{n:02d}.txt": "".join(f"{n} {line}\n" for line in range(20)) for n in range(40)}
    assert {path.name for path in stage.folder.iterdir()} == {*parts, "stage.json"}
    assert all((stage / name).read_text() == text for name, text in parts.items())
    assert len(seen) == len(set(seen)), "a finished part was made again"


def test_killed_between_manifest_and_renaming(tmp_path):
    """A whole partial folder is put in place, not made again."""
    stage = Stages(tmp_path).run("one", write_text("1"), settings={})
    os.replace(stage.folder, stage.folder.with_name(stage.key + ".partial"))
    again = Stages(tmp_path).run("one", lambda folder: pytest.fail("made again"), settings={})
    assert (again / "out.txt").read_text() == "1"


@pytest.mark.parametrize("damage, words", [
    (lambda path: path.write_text("12345678"), "the contents of out.txt changed"),
    (lambda path: path.write_text("123"), "out.txt has 3 bytes instead of 8"),
    (lambda path: path.unlink(), "out.txt is missing"),
    (lambda path: (path.parent / "stage.json").unlink(), "it has no manifest"),
    (lambda path: (path.parent / "stage.json").write_text("{"), "its manifest is unreadable"),
    (lambda path: (path.parent / "stage.json").write_text("[]"), "its manifest is unreadable"),
    (lambda path: (path.parent / "stage.json").write_text('{"key": "x", "files": {}, "input_contents": {}}'),
     "belongs to another key"),
    (lambda path: (path.parent / "stage.json").write_text('{"key": "x", "files": {}}'), "its manifest is unreadable"),
])
def test_damage_is_named_and_repaired(tmp_path, damage, words):
    lines = []
    stages = Stages(tmp_path, log=lines.append)
    stage = stages.run("one", write_text("abcdefgh"), settings={})
    damage(stage / "out.txt")
    repaired = stages.run("one", write_text("abcdefgh"), settings={})
    assert not repaired.cached and words in repaired.reason and words in "\n".join(lines)
    assert (repaired / "out.txt").read_text() == "abcdefgh"
    assert stages.run("one", write_text("abcdefgh"), settings={}).cached
    assert not list(tmp_path.rglob("*.old")) and not list(tmp_path.rglob("*.partial"))


def test_a_failed_repair_keeps_the_old_files(tmp_path):
    """`force` sets the finished stage aside; it is deleted only when its successor is whole."""
    stage = Stages(tmp_path).run("one", write_text("kept"), settings={})
    with pytest.raises(ZeroDivisionError):
        Stages(tmp_path, force=["one"]).run("one", lambda folder: 1 / 0, settings={})
    assert (stage.folder.with_name(stage.key + ".old") / "out.txt").read_text() == "kept"
    assert Stages(tmp_path).explain("one", settings={}).reason == "missing; taking up an interrupted run"


def test_litter_of_killed_writers_is_not_part_of_a_result(tmp_path):
    def make(folder):
        (folder / ".weights.tmp-123-0123abcd.pt").write_text("half")
        (folder / ".hidden").write_text("wanted")
    assert list(Stages(tmp_path).run("one", make, settings={}).manifest["files"]) == [".hidden"]


def test_two_processes_on_one_stage(tmp_path):
    """The second says who holds the stage; with `wait` it reuses what the first made."""
    body = COUNTING.replace("FOLDER", repr(str(tmp_path / "cache")))
    child = script(tmp_path, body)
    assert child.stdout.readline().startswith("stage count: running")
    assert child.stdout.readline().strip() == "0"
    with pytest.raises(StageBusy, match=f"process {child.pid} on .* is making stage count"):
        Stages(tmp_path / "cache").run("count", write_text("never"), settings={"parts": 40})
    stage = Stages(tmp_path / "cache", wait=600).run("count", lambda folder: pytest.fail("made twice"),
                                                    settings={"parts": 40})
    assert stage.cached and child.wait() == 0
    assert Stages(tmp_path / "cache").run("other", write_text("free"), settings={}).cached is False


def test_a_lock_dies_with_its_process(tmp_path):
    child = script(tmp_path, COUNTING.replace("FOLDER", repr(str(tmp_path / "cache"))))
    assert [child.stdout.readline(), child.stdout.readline()][1] == "0\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert Stages(tmp_path / "cache").run("count", write_text("mine"), settings={"parts": 40}).reason.endswith(
        "taking up an interrupted run")


MODULE = '''"""A module."""
import math

LIMIT = 3  # as in the paper

def grow(x):
    """Grow."""
    # twice
    return 2 * x + LIMIT

class Net:
    "A net."
    width = 8
    def forward(self, x):
        return grow(x)
'''


def load(tmp_path, text, name):
    """Import `text` as a module."""
    path = tmp_path / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("old, new, changes", [
    ('"""Grow."""', '"""Grow, as equation 3 says.\n\n    x: a number.\n    """', ()),
    ("    # twice\n", "", ()), ("2 * x + LIMIT", "(2*x) + LIMIT", ()), ('"""A module."""', "", ()),
    ("LIMIT = 3  # as in the paper", "LIMIT = 3", ()),
    ("2 * x", "3 * x", ("module", "grow")), ("width = 8", "width = 9", ("module", "Net")),
    ("LIMIT = 3 ", "LIMIT = 4 ", ("module",)), ("def grow(x)", "def grow(x=1)", ("module", "grow")),
])
def test_fingerprints_follow_code_and_not_prose(tmp_path, old, new, changes):
    assert old in MODULE
    before = load(tmp_path, MODULE, f"before_{abs(hash(new))}")
    after = load(tmp_path, MODULE.replace(old, new), f"after_{abs(hash(new))}")
    pairs = {"module": (before, after), "grow": (before.grow, after.grow), "Net": (before.Net, after.Net)}
    assert {name for name, (a, b) in pairs.items() if code_fingerprint(a) != code_fingerprint(b)} == set(changes)


def test_a_function_pasted_into_a_notebook_keeps_its_fingerprint(tmp_path):
    """The same text in a cell, in a module or inside another function is the same code."""
    nested = "def outer():\n    def grow(x):\n        return 2 * x + LIMIT\n    return grow\n"
    flat = code_fingerprint(load(tmp_path, MODULE, "flat").grow)
    assert code_fingerprint(load(tmp_path, nested, "nested").outer()) == flat
    from IPython.core.interactiveshell import InteractiveShell
    shell = InteractiveShell()
    shell.run_cell("LIMIT = 3\ndef grow(x):\n    'In a cell.'\n    return 2 * x + LIMIT")
    assert code_fingerprint(shell.user_ns["grow"]) == flat


def test_what_changes_a_key(tmp_path):
    stages = Stages(tmp_path)
    weights = tmp_path / "weights.bin"
    weights.write_bytes(b"1")
    model = stages.run("model", write_text("m"), settings={"seed": 0})
    other = stages.run("model", write_text("m"), settings={"seed": 1})
    def key(settings=None, inputs=(model,), code=(write_text,)):
        return stages.explain("score", settings=settings or {"steps": 10}, inputs=inputs, code=code).key
    keys = [key(), key({"steps": 11}), key({"steps": 10, "extra": None}), key({"steps": "10"}), key(inputs=[other]),
            key(inputs=[]), key(inputs=[model, other]), key(inputs=[model, weights]), key(code=[script]), key(code=[]),
            key(code=["v1"]), key(code=[settings_module])]
    assert len(set(keys)) == len(keys) and key({"steps": 10}) == keys[0]
    weights.write_bytes(b"2")
    assert key(inputs=[model, weights]) != keys[7]


def test_reasons_name_the_nearest_earlier_run(tmp_path):
    lines = []
    stages = Stages(tmp_path, log=lines.append)
    for seed, steps in ((0, 10), (1, 10), (0, 50)):
        stages.run("score", write_text("s"), settings={"seed": seed, "net": {"steps": steps}})
    new = stages.explain("score", settings={"seed": 1, "net": {"steps": 20}})
    assert new.reason == "settings changed: net.steps 10 -> 20"
    recoded = stages.explain("score", settings={"seed": 1, "net": {"steps": 10}}, code=[script])
    assert recoded.reason == "code of script changed"
    assert not list(tmp_path.rglob("*.partial")), "explain wrote something"


def test_an_input_remade_differently_remakes_what_follows(tmp_path):
    def chain(text, force=()):
        stages = Stages(tmp_path, force=force)
        first = stages.run("first", write_text(text), settings={})
        text = "result of " + (first / "out.txt").read_text()
        return stages.run("second", write_text(text), settings={}, inputs=[first])
    assert chain("a").reason == "missing"
    assert chain("a", force=["first"]).cached
    second = chain("b", force=["first"])
    assert second.reason == "input first was made again, with another result"
    assert (second / "out.txt").read_text() == "result of b" and chain("b").cached


def test_an_interrupted_run_is_dropped_when_its_input_changed(tmp_path):
    """A checkpoint made from another input must not be continued."""
    def make(folder, text, fail):
        if not (folder / "begun.txt").exists():
            (folder / "begun.txt").write_text(text)
        if fail:
            raise InterruptedError
    def chain(text, fail, force=()):
        stages = Stages(tmp_path, force=force)
        first = stages.run("first", write_text(text), settings={})
        return stages.run("second", lambda folder: make(folder, text, fail), settings={}, inputs=[first])
    with pytest.raises(InterruptedError):
        chain("a", fail=True)
    second = chain("b", fail=False, force=["first"])
    assert (second / "begun.txt").read_text() == "b" and not second.manifest["resumed"]


def test_large_files_are_sampled(tmp_path):
    path = tmp_path / "large.bin"
    with open(path, "wb") as file:
        file.truncate(80 * 2**20)
    before = file_digest(path)
    with open(path, "rb+") as file:
        file.seek(80 * 2**20 - 5)
        file.write(b"x")
    assert before.startswith("sha256-sampled:") and file_digest(path) != before


def test_a_folder_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(OSError):
        Stages(tmp_path / "cache").run("one", write_text("1"), settings={})


def test_atomic_path_wants_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing was written for"):
        with atomic_path(tmp_path / "a.txt"):
            pass
    assert not list(tmp_path.iterdir())
    write_json(tmp_path / "a.json", {"name": "é", "values": (1, 2.5, None, True)})
    assert read_json(tmp_path / "a.json") == {"name": "é", "values": [1, 2.5, None, True]}


def test_progress_is_plain_when_headless(monkeypatch, capsys):
    monkeypatch.setenv("OODREPRO_HEADLESS", "1")
    for _ in progress(range(3), desc="work", unit="steps", interval=0.0):
        pass
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[-1].startswith("work: 3/3 steps, ") and "\r" not in "".join(lines)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    list(progress(range(3), interval=0.0))
    assert capsys.readouterr().out == ""
