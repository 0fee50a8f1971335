"""A batch under fault: killed twenty times, disk full, no right to write, two at once, damaged cache and checkpoint.

The batch is a small double of a paper's notebook: it trains a network, scores by it in parts, and leaves receipts,
tables and a figure through the same services as the papers. Whatever happens to it, it must say what is wrong, lose
nothing that was finished, and end with the very bytes of a batch that nobody disturbed.
"""
import multiprocessing
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from oodrepro import receipts, redraw, report, settings, stages, summaries, training

# Children are forked from a server that has imported everything and done nothing: 20 starts in the time of one.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pytest", "oodrepro.report", "oodrepro.redraw", "oodrepro.training"])
KILLS = 20


def data():
    """Two-dimensional samples, in-distribution and not, and their flags."""
    draw = settings.generator("faults", "data")
    return torch.cat([torch.randn(80, 2, generator=draw), torch.randn(60, 2, generator=draw) + 2]), torch.arange(140) >= 80


def train(folder):
    """A network that learns its input, in 60 steps with a checkpoint after every tenth."""
    samples, _ = data()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 16), nn.SiLU(), nn.Linear(16, 2))

    def loss(model, draw):
        time.sleep(0.004)
        batch = samples[draw.indices(80, 16)]
        return (model(batch) - batch).square().mean()

    asked = training.TrainingSettings(steps=60, batch_size=16, warmup=0, precision="fp32", checkpoint_every=10)
    trained = training.fit(net, loss, asked, folder, "net", log=quiet)
    with stages.atomic_path(folder / "net.pt") as path:
        torch.save(trained.model.state_dict(), path)
    (folder / "checkpoint.pt").unlink()


def score(folder, weights):
    """Distances in parts of twenty samples, each written when it is done."""
    samples, _ = data()
    net = nn.Sequential(nn.Linear(2, 16), nn.SiLU(), nn.Linear(16, 2))
    net.load_state_dict(torch.load(weights, weights_only=True))
    for first in range(0, 140, 20):
        if not (folder / f"{first}.pt").exists():
            time.sleep(0.02)
            part = samples[first:first + 20]
            with torch.inference_mode(), stages.atomic_path(folder / f"{first}.pt") as path:
                torch.save((net(part) - part).square().sum(1), path)


def quiet(text):
    """A log that nobody reads."""


def batch(root, log=print):
    """The double of a notebook."""
    cache = stages.Stages(root / "cache", log=log)
    trained = cache.run("train", train, settings={"steps": 60}, code=[train])
    scored = cache.run("score", lambda folder: score(folder, trained / "net.pt"), settings={}, inputs=[trained],
                       code=[score])
    found = torch.cat([torch.load(scored / f"{first}.pt", weights_only=True) for first in range(0, 140, 20)])
    _, is_ood = data()
    for name, values in (("distance", found), ("rounded", found.round())):
        receipts.write_receipt(root / "results", paper="lmd", tier="smoke", table=f"table_{name}", row="digits",
                               column="noise", method="lmd", variant={"score": name}, seed=0, score=values.numpy(),
                               is_ood=is_ood.numpy(), index=torch.cat([torch.arange(80), torch.arange(60)]).numpy(),
                               nfe_per_image=1, seconds=1.0, settings={})
    frame = receipts.read_receipts(root / "results")
    report.write_tables(root / "results", {
        "table1": report.compare(frame[frame["table"] == "table_distance"]),
        "by_score": summaries.pivot(frame, columns="variant_score")})
    redraw.save_drawn(redraw.roc, frame[frame["table"] == "table_distance"], "roc", root / "figures",
                      alt="The ROC curve of a small double.")


def stop_at(count):
    """End this process without warning at its `count`-th replacing of a file, half the time just before, half after."""
    done, honest = [], os.replace

    def replace(source, target):
        done.append(target)
        if len(done) == count and count % 2:
            os.kill(os.getpid(), signal.SIGKILL)
        honest(source, target)
        if len(done) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace


def child(root, place, limits=()):
    """What a child process runs: the batch with its lines in a file; exits 1 with the error as the last line."""
    torch.set_num_threads(1)
    receipts.code_state = lambda: {"commit": None, "dirty": None}  # a commit made meanwhile must not change a byte
    with open(place, "a", buffering=1) as lines:
        try:
            for name, value in limits:
                if name == "files replaced":
                    stop_at(value)
                elif name == "bytes of a file":
                    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (value, value))
                elif os.geteuid() == 0:
                    os.setuid(value)
            batch(root, log=lambda text: lines.write(text + "\n"))
        except Exception as problem:
            lines.write(f"{type(problem).__name__}: {problem}\n")
            os._exit(1)


def start(root, limits=()):
    process = SERVER.Process(target=child, args=(root, root.with_name(root.name + ".log"), limits))
    process.start()
    return process


def run(root, limits=()):
    """Run a batch to its end; its exit status and what it said this time."""
    place = root.with_name(root.name + ".log")
    place.unlink(missing_ok=True)
    process = start(root, limits)
    process.join()
    return process.exitcode, place.read_text() if place.is_file() else ""


def left(root):
    """Every byte that a batch leaves to its readers: receipts, scores, tables, figures.

    Names with a dot in front are unfinished writes, which no reader takes for results and `reproduce` sweeps away.
    """
    return {path.relative_to(root).as_posix(): path.read_bytes() for folder in ("results", "figures")
            for path in sorted((root / folder).rglob("*")) if path.is_file() and not path.name.startswith(".")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What an undisturbed batch leaves, and how long it takes."""
    root = tmp_path_factory.mktemp("undisturbed") / "root"
    run(root.with_name("warm"))
    begun = time.perf_counter()
    code, said = run(root)
    assert code == 0, said
    seconds = time.perf_counter() - begun
    assert receipts.check(root / "results") + report.check_tables(root / "results") == []
    shutil.rmtree(root.with_name("warm"))
    assert len(left(root)) == 2 * 2 + 2 * 3 + 3
    return left(root), seconds


def say(capsys, text):
    """Print past pytest's capture: the counts are part of the evidence."""
    with capsys.disabled():
        print(f"\n    {text}", end=" ")


def where(root):
    """How far a batch has come."""
    if (root / "results").is_dir():
        return "receipts, tables, figure"
    return "scoring" if list((root / "cache" / "train").glob("*/stage.json")) else "training"


def test_killed_twenty_times(undisturbed, tmp_path, capsys):
    """kill -9 at twenty random moments, over as many batches as that takes; each ends with the same bytes.

    Every other time the moment is one of a file being replaced, where a half-done thing would show.
    """
    expected, seconds = undisturbed
    dice, kills, batches, moments = random.Random(20), 0, 0, {}
    while kills < KILLS:
        root, batches = tmp_path / str(batches), batches + 1
        while kills < KILLS:
            by_clock = kills % 2 == 0
            process = start(root, [] if by_clock else [("files replaced", dice.randint(1, 24))])
            process.join(dice.uniform(0.02, 1.0) * seconds if by_clock else None)
            if process.exitcode == 0:
                break
            if process.exitcode is None:
                process.kill()
                process.join()
            assert process.exitcode == -signal.SIGKILL
            kills += 1
            moments[where(root)] = moments.get(where(root), 0) + 1
        code, said = run(root)
        assert code == 0, said
        assert left(root) == expected, f"batch {batches} after {kills} kills differs"
        assert not list(root.rglob("*.partial"))
    counts = ", ".join(f"{count} in {place}" for place, count in sorted(moments.items()))
    say(capsys, f"{kills} kills ({counts}) over {batches} batches: all byte-identical")


@pytest.mark.parametrize("limit", [2000, 12_000])
def test_a_full_disk(undisturbed, tmp_path, capsys, limit):
    """No file may grow beyond a limit, the double of a full disk: an error that says so, then the same bytes."""
    code, said = run(tmp_path / "root", [("bytes of a file", limit)])
    assert code == 1 and "no room to write" in said and "free some space and run again" in said, said
    whole, torn = undisturbed[0], left(tmp_path / "root")
    assert all(whole[name] == content for name, content in torn.items()), "a torn file has a final name"
    code, said = run(tmp_path / "root")
    assert code == 0 and left(tmp_path / "root") == whole, said
    say(capsys, f"no file beyond {limit} bytes: stopped, {len(torn)} whole files kept, then byte-identical")


def test_a_folder_that_may_not_be_written(undisturbed):
    """As another user where the tests run as root: the folder is named, nothing is written, and then it works."""
    home = Path(tempfile.mkdtemp(prefix="oodrepro-faults-"))  # pytest's own folders are closed to other users
    try:
        (home / "root").mkdir()
        home.chmod(0o755)
        (home / "root").chmod(0o555)
        (home / "root.log").touch()
        (home / "root.log").chmod(0o666)
        process = start(home / "root", [("user", 65534)])
        process.join()
        said = (home / "root.log").read_text()
        assert process.exitcode == 1 and "PermissionError" in said and str(home / "root") in said, said
        assert not list((home / "root").iterdir())
        (home / "root").chmod(0o755)
        code, said = run(home / "root")
        assert code == 0 and left(home / "root") == undisturbed[0], said
    finally:
        shutil.rmtree(home)


def test_two_on_one_folder(undisturbed, tmp_path, capsys):
    """Two batches at once: the second waits for nothing and says who is at work; nothing is made twice or torn."""
    root, refused = tmp_path / "root", 0
    for _ in range(3):
        pair = [start(root), start(root)]
        for process in pair:
            process.join()
        refused += sum(process.exitcode for process in pair)
        assert {process.exitcode for process in pair} <= {0, 1}
    said = root.with_name("root.log").read_text()
    assert "is making stage" in said and refused and said.count("stage train: done") == 1, said
    code, said = run(root)
    assert code == 0 and left(root) == undisturbed[0], said
    say(capsys, f"3 pairs on one folder: {refused} told that another is at work, the rest whole")


def test_damaged_cache_entries(undisturbed, tmp_path, capsys):
    """A flipped bit in each file of the cache in turn is noticed, named and repaired."""
    root = tmp_path / "root"
    assert run(root)[0] == 0
    dice, damaged = random.Random(7), 0
    for path in sorted(path for path in (root / "cache").rglob("*") if path.is_file() and path.suffix in (".pt", ".json")):
        if path.name.endswith("owner.json"):
            continue
        content = bytearray(path.read_bytes())
        content[dice.randrange(len(content) // 4)] ^= 1 << dice.randrange(7)
        path.write_bytes(content)
        shutil.rmtree(root / "results")
        code, said = run(root)
        assert code == 0 and left(root) == undisturbed[0], said
        if path.name != "stage.json":  # a manifest's note on the environment may change without harm
            assert f"damaged: the contents of {path.name} changed" in said, said
        damaged += 1
    assert damaged >= 8
    say(capsys, f"{damaged} cache files with a flipped bit: each repaired, byte-identical")


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty"])
def test_a_damaged_checkpoint(undisturbed, tmp_path, damage):
    """Training refuses it, names the file and the remedy; with the file deleted, as told, it ends with the same bytes."""
    root, found = tmp_path / "root", []
    process = start(root)
    while not found:
        assert process.exitcode is None
        found = list((root / "cache" / "train").glob("*.partial/checkpoint.pt"))
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    content = found[0].read_bytes()
    middle = len(content) // 2
    flipped = bytes(byte ^ 1 for byte in content[middle:middle + 400])
    found[0].write_bytes({"torn": content[:middle], "empty": b"",
                          "flipped": content[:middle] + flipped + content[middle + 400:]}[damage])
    code, said = run(root)
    assert code == 1 and "is not a readable checkpoint" in said and str(found[0]) in said and "delete it" in said, said
    assert found[0].is_file() and not (root / "results").exists()
    found[0].unlink()
    code, said = run(root)
    assert code == 0 and left(root) == undisturbed[0], said
