"""The engine: the same files by one process, by several, by dask; nothing left behind by a failure or an interrupt."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest

from oodrepro import reproduce
from oodrepro.engine import Task, run_tasks

PIECES = '''
import os, time
from pathlib import Path

def square(folder, n, log):
    log(f"stage square: running ({n})")
    place = Path(folder) / str(n) / "n.txt"
    place.parent.mkdir(parents=True)
    place.write_text(str(n * n))

def make_shard(folder, n, log):
    """The same as a cached stage."""
    from oodrepro.stages import Stages
    Stages(Path(folder) / "cache", log=log).run(
        "square", lambda work: (work / "n.txt").write_text(str(n * n)), settings={"n": n})

def sleep(folder, n, log):
    Path(folder, f"pid-{n}").write_text(str(os.getpid()))
    time.sleep(120)

def die(log):
    os._exit(9)

def shards(tier, seeds, root, data_root):
    folder = Path(root) / "runs" / tier / "lmd"
    return [{"name": f"square {seed}", "arguments": {"folder": str(folder), "n": seed}, "after": []} for seed in seeds]
'''
BOOK = ["tier = 'smoke'\nseeds = [0]\nroot = ''\ndata_root = ''\nforce = []", """from pathlib import Path
from pieces import make_shard
for seed in seeds:
    make_shard(Path(root) / "runs" / tier / "lmd", seed, print)
results = Path(root) / "results" / tier / "lmd"
results.mkdir(parents=True, exist_ok=True)
total = sum(int(path.read_text()) for path in (Path(root) / "runs" / tier / "lmd").rglob("n.txt"))
(results / "total.txt").write_text(str(total))"""]


@pytest.fixture
def pieces(tmp_path, monkeypatch):
    """A module of small tasks that other processes find too; returns an empty folder to work in."""
    (tmp_path / "pieces.py").write_text(PIECES)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delitem(sys.modules, "pieces", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def some_tasks(folder):
    squares = [Task(f"square {n}", "pieces:square", {"folder": str(folder), "n": n}) for n in range(2)]
    return [*squares, Task("dies", "pieces:die", {}), Task("waits", "pieces:square", {}, after=("dies",)),
            Task("last", "pieces:square", {"folder": str(folder), "n": 2}, after=("square 0", "square 1"))]


def contents(folder):
    """What the tasks wrote, apart from manifests, which name times."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("n.txt"))}


def checked(outcomes, folder):
    errors = {one.name: one.error for one in outcomes}
    assert list(errors) == ["square 0", "square 1", "dies", "waits", "last"]
    assert [errors[name] for name in ("square 0", "square 1", "last")] == ["", "", ""], errors
    assert "status 9 before the work was done" in errors["dies"] and errors["waits"] == "not run, since dies failed"
    assert sorted(contents(folder).values()) == [b"0", b"1", b"4"]


def test_processes_side_by_side(pieces, capsys):
    checked(run_tasks(some_tasks(pieces), jobs=2), pieces)
    out = capsys.readouterr().out
    assert "[square 1] stage square: running" in out and "[dies] failed: its process ended" in out, out
    assert "\r" not in out, "plain lines where nobody watches"


@pytest.fixture
def scheduler(tmp_path):
    """The address of a dask scheduler with one worker, both processes of their own."""
    pytest.importorskip("distributed")
    place = tmp_path / "scheduler.json"
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--port", "0", "--host", "127.0.0.1",
               "--no-dashboard", "--scheduler-file", str(place)]
    started = [subprocess.Popen(command, stderr=subprocess.DEVNULL)]
    while not place.is_file():
        assert started[0].poll() is None, "the scheduler did not start"
        time.sleep(0.1)
    started.append(subprocess.Popen([sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(place),
                                     "--nthreads", "2", "--no-nanny", "--no-dashboard"], stderr=subprocess.DEVNULL))
    yield json.loads(place.read_text())["address"]
    for process in reversed(started):
        process.terminate()
        process.wait()


def test_dask_scheduler_in_another_process(pieces, scheduler, capsys):
    checked(run_tasks(some_tasks(pieces), engine="dask", scheduler=scheduler), pieces)


def test_an_address_where_nobody_listens(pieces, monkeypatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(distributed, "Client", lambda address, timeout: (_ for _ in ()).throw(OSError("no scheduler")))
    with pytest.raises(OSError, match="no scheduler"):
        run_tasks(some_tasks(pieces), engine="dask", scheduler="tcp://127.0.0.1:1")


def test_without_dask_the_remedy_is_named(pieces, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ValueError, match=r"pip install 'oodrepro\[cluster\]'"):
        run_tasks(some_tasks(pieces), engine="dask")


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z" if Path("/proc").is_dir() \
            else os.kill(pid, 0) is None
    except (FileNotFoundError, ProcessLookupError):
        return False


def hear_interrupts():
    """A process started in the background may have been told to ignore Ctrl-C, and its children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGKILL])
def test_nobody_goes_on_when_the_parent_is_gone(pieces, blow):
    script = ("from oodrepro.engine import Task, run_tasks\n"
              f"run_tasks([Task(str(n), 'pieces:sleep', {{'folder': {str(pieces)!r}, 'n': n}}) for n in range(2)], jobs=2)")
    parent = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True,
                              preexec_fn=hear_interrupts)
    while len(list(pieces.glob("pid-*"))) < 2:
        assert parent.poll() is None, parent.stderr.read()
        time.sleep(0.05)
    pids = [int(path.read_text()) for path in pieces.glob("pid-*")]
    assert all(map(alive, pids))
    parent.send_signal(blow)
    parent.wait(timeout=60)
    parent.stderr.close()
    until = time.time() + 30
    while any(map(alive, pids)):
        assert time.time() < until, "children outlive their parent"
        time.sleep(0.05)


def write_book(folder):
    cells = [nbformat.v4.new_code_cell(source) for source in BOOK]
    cells[0].metadata["tags"] = ["parameters"]
    folder.mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "3_lmd.ipynb")


@pytest.mark.slow
def test_shards_first_then_the_notebook_and_the_same_numbers(pieces, tmp_path, monkeypatch, capsys):
    """`oodrepro reproduce --jobs 2` and `--engine dask` leave what one process leaves."""
    write_book(tmp_path / "papers")
    monkeypatch.setattr(reproduce, "notebook_folder", lambda: tmp_path / "papers")
    real = reproduce._module
    monkeypatch.setattr(reproduce, "_module", lambda name: real("pieces") if name == "oodrepro.lmd_shards" else None)
    honest = reproduce.tasks
    monkeypatch.setattr(reproduce, "tasks", lambda *words: [
        replace(task, call=task.call.replace("oodrepro.lmd_shards", "pieces")) for task in honest(*words)])
    pytest.importorskip("distributed")
    left = []
    for number, words in enumerate([[], ["--jobs", "2"], ["--engine", "dask", "--jobs", "2"]]):
        root = tmp_path / f"root{number}"
        assert reproduce.main(["reproduce", "lmd", "--seeds", "1-2", "--root", str(root), *words]) == 0
        out = capsys.readouterr().out
        left.append((contents(root), (root / "results/smoke/lmd/total.txt").read_text()))
        if words:
            assert "3 tasks, engine" in out and "[lmd: square 1] stage square: running" in out
            assert out.count("[lmd]   | stage square: reused") == 2, out
    assert left[0] == left[1] == left[2] and left[0][1] == "5"
