"""Slices: shards that are lost, swapped or forged; every paper stopped many times; a process that is asked twice."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from oodrepro import slices
from oodrepro.classifying import ClassifierSettings
from oodrepro.denoisers import DenoiserSettings
from oodrepro.label_mixup import ConditionalSettings, Recipe
from oodrepro.label_mixup_study import MixupRun, label_mixup_study
from oodrepro.latent_outliers import BoundarySettings, SynthesisSettings
from oodrepro.lmd_colour import ColourRun, colour_study
from oodrepro.lmd_study import Cells, Variant
from oodrepro.oal_study import OALRun, oal_study
from oodrepro.receipts import check
from oodrepro.slices import Piece, TimeUp, left_by, main, pieces_of, read_shards, run_slice, write_shards
from oodrepro.training import TrainingSettings


def silent(line):
    """Takes a line of a log and keeps it to itself."""


def training(steps, **options):
    """Few steps with a checkpoint after each second one."""
    return TrainingSettings(steps=steps, batch_size=16, precision="fp32", warmup=1, checkpoint_every=2, **options)


def tiny_colour(root, steps=12, log=silent):
    study = replace(colour_study("smoke"), rows=(Cells("digits", ("noise",)),), test_images=12, fit_images=20, batch_size=8,
                    training=training(steps), denoiser=DenoiserSettings(widths=(8, 16), attention=(False, False)),
                    main=Variant(blocks=4, steps=2, repeats=2))
    return ColourRun(study, root, log=log)


def tiny_mixup(root, log=silent):
    study = replace(label_mixup_study("smoke"), far=("noise",), near=("glyphs",), test_images=20, accuracy_images=20,
                    denoiser=ConditionalSettings(widths=(8, 8), attention=(False, True)), generator=training(6),
                    recipe=Recipe(per_pair=1, steps=2, batch_size=16), classifier=ClassifierSettings(),
                    training=training(4, optimiser="sgd", ema=0.0), losses=("softmax",), repeated=("softmax",),
                    controls=("unmixed",), sweep=(), mixes=())
    return MixupRun(study, root, log=log)


def tiny_oal(root, log=silent):
    sgd = training(4, optimiser="sgd", ema=0.0)
    study = replace(oal_study("smoke"), near=(("glyphs", "test"),), far=(("noise", "test"),), test_images=20, train_images=200,
                    start=sgd, further=sgd, lessons=sgd, autoencoder=training(3), unet=training(3), counts=(), switches=False,
                    boundary=BoundarySettings(features=0, neighbours=5, boundary=4, noises=10, rounds=1),
                    neighbours=5, bank=50, synthesis=SynthesisSettings(count=6, steps=2, guidance=2.0))
    return OALRun(study, root, log=log)


def scores(run):
    return {path.name: path.read_bytes() for path in run.results.glob("*.npz")}


# --- stopped many times ---------------------------------------------------------------------------------------------

class Interrupting:
    """Ends the slice when a file is renamed to its place: after a checkpoint, a chunk, a stage; ever later in a slice."""

    def __init__(self, monkeypatch):
        self.left, self.stops, rename = 3, 0, os.replace

        def replaced(*names):
            rename(*names)
            self.left -= 1
            if not self.left:
                self.stops += 1
                self.left = 3 + 6 * self.stops  # receipts are written anew in each slice, so slices must grow
                raise TimeUp

        self.switch = lambda on: monkeypatch.setattr(os, "replace", replaced if on else rename)


@pytest.mark.parametrize("make, only", [
    (tiny_colour, ""), (tiny_mixup, "generator|outliers sum|table1"), (tiny_oal, "teacher|diffusion|main (ce|oal-fixed)-s")])
def test_a_study_stopped_at_many_places_gives_the_bits_of_one_that_was_not(make, only, tmp_path, monkeypatch):
    whole = make(tmp_path / "whole")
    assert not run_slice(pieces_of(whole, only=only), log=silent).left
    bomb, left, slices_ = Interrupting(monkeypatch), ["all"], 0
    bomb.switch(True)
    while left:
        run = make(tmp_path / "cut")
        left, slices_ = run_slice(pieces_of(run, only=only), log=silent).left, slices_ + 1
        assert slices_ < 40
    bomb.switch(False)
    assert bomb.stops == slices_ - 1 >= 3
    assert scores(run) == scores(whole) and len(scores(whole)) >= 4 and check(run.results) == []


def test_other_settings_start_anew_and_do_not_take_up_foreign_checkpoints(tmp_path):
    run, length = tiny_colour(tmp_path), 0.5
    while not list(run.stages.folder.glob("train-lmd-digits/*.partial/checkpoint.pt")) and length < 60:
        run_slice(pieces_of(tiny_colour(tmp_path, steps=100_000), only="^train"), length, log=silent)
        length *= 2
    assert list(run.stages.folder.glob("train-lmd-digits/*.partial/checkpoint.pt"))
    lines = []
    run_slice(pieces_of(tiny_colour(tmp_path, log=lines.append), only="^train"), log=silent)
    assert not [line for line in lines if "resumed at step" in line]


def test_a_damaged_checkpoint_is_named(tmp_path):
    length, found = 0.5, []
    while not found and length < 60:
        run = tiny_colour(tmp_path, steps=100_000)
        run_slice(pieces_of(run, only="^train"), length, log=silent)
        found, length = list(run.stages.folder.glob("*/*.partial/checkpoint.pt")), 2 * length
    found[0].write_bytes(found[0].read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a readable checkpoint.*delete it"):
        run_slice(pieces_of(tiny_colour(tmp_path, steps=100_000), only="^train"), log=silent)


def test_pieces_are_done_in_order_and_a_stopped_one_comes_first_again():
    done = []

    def stop():
        raise TimeUp

    work = [Piece("a", lambda: done.append("a")), Piece("b", stop), Piece("c", lambda: done.append("c"))]
    found = run_slice(work, log=silent)
    assert (done, found.done, found.left) == (["a"], ["a"], ["b", "c"])


# --- shards ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def cut(tmp_path):
    """A folder of shards of two files."""
    for name, size in (("one", 5000), ("two", 3)):
        (tmp_path / name).write_bytes(bytes(range(256)) * size)
    write_shards({name: tmp_path / name for name in ("one", "two")}, tmp_path / "cut", limit=0.5)
    return tmp_path / "cut"


def test_shards_of_two_packs_mixed_up_are_refused(cut, tmp_path):
    (tmp_path / "three").write_bytes(b"x" * 1_300_000)
    other = write_shards({"three": tmp_path / "three"}, tmp_path / "other", limit=0.5)
    (cut / "shard-0001").write_bytes(other[1].read_bytes())
    with pytest.raises(ValueError, match="damaged: shard-0001; bring it again"):
        read_shards(cut, tmp_path / "out")


def test_a_list_that_leads_out_of_its_folder_is_refused(cut, tmp_path):
    for name in ("../outside", "/etc/outside"):
        facts = json.loads((cut / "shards.json").read_text())
        facts["files"][0]["name"] = name
        (cut / "shards.json").write_text(json.dumps(facts))
        with pytest.raises(ValueError, match="leads out of"):
            read_shards(cut, tmp_path / "out")
    assert not (tmp_path / "outside").exists()


def test_a_forged_list_and_no_list_at_all(cut, tmp_path):
    facts = json.loads((cut / "shards.json").read_text())
    facts["files"][0]["sha256"] = "0" * 64
    (cut / "shards.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="one does not come out as it went in"):
        read_shards(cut, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))
    (cut / "shards.json").write_text("{}")
    with pytest.raises(ValueError, match="no list of shards"):
        read_shards(cut, tmp_path / "out")


def test_nothing_to_pack_and_senseless_limits(tmp_path):
    (tmp_path / "one").write_bytes(b"1")
    for files, limit in (({}, 1), ({"one": tmp_path / "one"}, 0)):
        with pytest.raises(ValueError, match="nothing to pack"):
            write_shards(files, tmp_path / "cut", limit)


def test_packed_stages_are_the_finished_ones_unless_asked(tmp_path):
    run = tiny_colour(tmp_path)
    run_slice(pieces_of(run, only="^train"), log=silent)
    (run.stages.folder / "map" / "0.partial").mkdir(parents=True)
    (run.stages.folder / "map" / "0.partial" / "chunk.pt").write_bytes(b"1")
    finished = left_by(run)
    assert any(name.endswith("diffusion_pytorch_model.safetensors") for name in finished)
    assert set(left_by(run, unfinished=True)) - set(finished) == {"runs/smoke/lmd/cache/map/0.partial/chunk.pt"}
    assert not [name for name in finished if name.endswith((".lock", ".owner.json"))]


# --- the command ----------------------------------------------------------------------------------------------------

def test_the_command_there_and_back(tmp_path, monkeypatch, capsys):
    study = tiny_colour(tmp_path).study
    monkeypatch.setitem(slices._STUDIES, "lmd_colour", (lambda tier: study, ColourRun))
    work = ["lmd_colour", "--tier", "smoke", "--root", str(tmp_path / "there")]
    bomb = Interrupting(monkeypatch)
    bomb.switch(True)
    assert main(["run", *work, "--minutes", "10", "--only", "^train"]) == 3
    bomb.switch(False)
    assert main(["run", *work]) == 0 and "nothing is left" in capsys.readouterr().out
    assert main(["pack", *work, "--out", str(tmp_path / "back"), "--limit", "0.2"]) == 0
    assert main(["read", str(tmp_path / "back"), "--out", str(tmp_path / "home")]) == 0
    lines = []
    home = ColourRun(study, tmp_path / "home", log=lines.append)
    assert not run_slice(pieces_of(home), log=silent).left
    assert not [line for line in lines if ": running" in line] and check(home.results) == []


def test_it_runs_as_a_module_by_itself(tmp_path):
    done = subprocess.run([sys.executable, "-m", "oodrepro.slices", "run", "oal", "--tier", "smoke", "--list"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": str(Path(slices.__file__).parent.parent)})
    assert done.returncode == 0 and "latent diffusion" in done.stdout.splitlines(), done.stderr
