"""Speed: the measured step is the one that trains, ways that cannot run keep their line, the command writes its record."""
import json
import shutil
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from oodrepro import embedded, speed
from oodrepro.classifying import ClassifierSettings, build_classifier
from oodrepro.images import to_unit
from oodrepro.speed import Way, classifier_loop, loss_curves, main, measure, ways
from oodrepro.suites import to_channels
from oodrepro.training import TrainingSettings, fit


def silent(line):
    """Takes a line of a log and keeps it to itself."""


@pytest.fixture(scope="module")
def images():
    return to_channels(embedded.digits("train"), 3)


def test_the_measured_step_is_the_one_that_trains(images, tmp_path):
    step = classifier_loop(images, Way(batch_size=8), steps=20)
    ours = [step() for _ in range(20)]
    pixels, labels = to_unit(images.images), torch.as_tensor(images.labels).long()

    def loss(model, draw):
        rows = draw.indices(len(pixels), 8)
        return F.cross_entropy(model(pixels[rows]), labels[rows])

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_classifier(3, 10, ClassifierSettings())
    settings = TrainingSettings(steps=20, batch_size=8, learning_rate=0.05, optimiser="sgd", ema=0.0, precision="fp32")
    with speed._threads(1):
        theirs = fit(model, loss, settings, tmp_path, log=silent).history
    assert theirs == [[20, sum(ours) / 20]]


def test_a_way_without_a_compiler_keeps_its_line(images, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    table = measure("scoring", images, [Way(batch_size=8), Way(batch_size=8, compiled=True)], 1, 0.0, silent)
    assert list(table.why) == ["", "no C++ compiler"] and np.isnan(table.ratio[1]) and table.ratio[0] == 1
    assert speed.fastest(table, "scoring") == Way(batch_size=8)


def test_a_compiler_that_fails_is_reported_and_other_failures_are_not_swallowed(images, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/c++")

    def broken(thing, *options, **more):
        raise RuntimeError("backend is broken")

    monkeypatch.setattr(torch, "compile", broken)
    table = measure("diffusion", images, [Way(batch_size=4), Way(batch_size=4, compiled=True)], 1, 0.0, silent)
    assert table.why[1] == "RuntimeError: backend is broken"
    with pytest.raises(ValueError, match="batch of 5000 from"):
        measure("diffusion", images, [Way(batch_size=5000)], 1, 0.0, silent)


def test_a_compiler_that_never_ends_is_given_up(images, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/c++")

    def endless(thing, *options, **more):
        while True:
            time.sleep(0.01)

    monkeypatch.setattr(torch, "compile", endless)
    table = measure("scoring", images, [Way(batch_size=4), Way(batch_size=4, compiled=True)], 1, 0.0, silent, patience=0.2)
    assert table.why[1] == "not compiled after 0.2 s" and table.ratio[0] == 1


def test_every_way_has_a_name_of_its_own():
    for training in (True, False):
        labels = [way.label for way in ways(training)]
        assert len(set(labels)) == len(labels) and labels[0] == "plain"


def test_curves_start_alike_and_differ_by_seed(images):
    curves = loss_curves("classifier", images, Way(batch_size=8, precision="bf16"), steps=3, seeds=2)
    assert abs(curves.iloc[0, 0] - curves.iloc[0, 1]) < 0.1
    assert curves.iloc[0, 1] != curves.iloc[0, 2]


def test_the_command_writes_one_record_per_loop(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "example_images", lambda root: images)
    monkeypatch.setattr(speed, "ways", lambda training, compiled: [Way(batch_size=64), Way(batch_size=64, channels_last=True)])
    assert main(["--tier", "smoke", "--root", str(tmp_path), "--rounds", "1", "--seconds", "0", "--curve-steps", "2"]) == 0
    folder = tmp_path / "figures" / "smoke" / "speed"
    assert sorted(path.name for path in folder.glob("*.json")) == [f"speed-{name}.json" for name in
                                                                   ("classifier", "diffusion", "scoring")]
    story = json.loads((folder / "speed-classifier.json").read_text())["provenance"]
    assert {line["way"] for line in story["lines"]} == {"plain", "channels last"} and "within" in story["loss"]
    assert "| diffusion | plain |" in capsys.readouterr().out
