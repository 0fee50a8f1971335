"""Training of classifiers: two processes, equal bits, what goes into a batch, hooks, faults; files."""
import json
import os
import runpy
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch import nn

from oodrepro.classifiers import SharedBatchNorm
from oodrepro.classifying import (Classifier, ClassifierSettings, accuracy, augmented, build_classifier, extract,
                                  load_classifier, save_classifier, train_classifier)
from oodrepro.losses import HEADS
from oodrepro.training import TrainingSettings

DRAWS = np.random.default_rng(0)
LABELS = np.arange(48) % 4
IMAGES = (DRAWS.integers(0, 60, (48, 8, 8, 1)) + 60 * LABELS[:, None, None, None]).astype(np.uint8)
OUTLIERS = DRAWS.integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
SHORT = TrainingSettings(steps=4, batch_size=12, learning_rate=0.05, warmup=0, optimiser="sgd", ema=0.0,
                         precision="fp32", checkpoint_every=100)


def train(folder, settings=ClassifierSettings(), training=SHORT, **options):
    return train_classifier(IMAGES, LABELS, settings, training, folder, **{"log": lambda text: None, **options})


def states_equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


# --- several processes ----------------------------------------------------------------------------------------------

SCRIPT = textwrap.dedent("""
    import sys, numpy as np, torch
    from accelerate import PartialState
    from torch import nn
    from oodrepro.classifiers import SharedBatchNorm
    from oodrepro.classifying import ClassifierSettings, train_classifier
    from oodrepro.training import TrainingSettings
    data, place = np.load(sys.argv[1]), sys.argv[2]
    settings = ClassifierSettings(loss="adacos", augment="crop_flip", outlier_batch_size=8)
    training = TrainingSettings(steps=6, batch_size=12, learning_rate=0.02, warmup=0, optimiser="sgd", precision="fp32",
                                ema=0.0)
    for name in ("shared", "apart"):
        if name == "apart":
            SharedBatchNorm.forward = nn.BatchNorm2d.forward
        classifier, trained = train_classifier(data["images"], data["labels"], settings, training, f"{place}/{name}",
                                               outliers=data["outliers"])
        if PartialState().is_main_process:
            torch.save({"processes": PartialState().num_processes, "state": classifier.state_dict()}, f"{place}/{name}.pt")
""")


@pytest.mark.slow  # on a busy machine
def test_two_processes_learn_what_one_does(tmp_path, monkeypatch):
    """`accelerate launch` on two CPU processes; AdaCos' scale and batch statistics run over both. 1e-4 is rounding.

    Control: with torch's own normalisation each process goes by its half of the batch, and the weights part.
    """
    np.savez(tmp_path / "data.npz", images=IMAGES, labels=LABELS, outliers=OUTLIERS)
    (tmp_path / "train.py").write_text(SCRIPT)
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf"),
                   "CUDA_VISIBLE_DEVICES": ""}
    words = {count: [str(tmp_path / "train.py"), str(tmp_path / "data.npz"), str(tmp_path / str(count))] for count in (1, 2)}
    for _, _, place in words.values():
        os.mkdir(place)
    done = subprocess.run([sys.executable, *launch, *words[2]], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    monkeypatch.setattr(SharedBatchNorm, "forward", SharedBatchNorm.forward)  # what the script changes is given back
    monkeypatch.setattr(sys, "argv", words[1])
    runpy.run_path(words[1][0])
    found = {}
    for count, (_, _, place) in words.items():
        for name in ("shared", "apart"):
            found[count, name] = torch.load(f"{place}/{name}.pt", weights_only=True)
            assert found[count, name]["processes"] == count

    def largest_difference(name):
        return max((a - found[2, name]["state"][key]).abs().max().item() for key, a in found[1, name]["state"].items())

    assert largest_difference("shared") < 1e-4 < 1e-3 < largest_difference("apart")


# --- equal bits -----------------------------------------------------------------------------------------------------

def test_interrupted_training_ends_at_the_same_bits(tmp_path):
    """With dropout, augmentation, outliers, a scale that follows the training, and an average of the weights."""
    settings = ClassifierSettings(backbone="wrn40_2", dropout=0.3, loss="adacos", augment="crop_flip", outlier_batch_size=5)
    training = SHORT.but(steps=4, batch_size=8, ema=0.9)
    whole = train(tmp_path / "whole", settings, training, outliers=OUTLIERS)
    for session in (1, 1, None):
        parts = train(tmp_path / "parts", settings, training, outliers=OUTLIERS, stop_after=session)
    assert states_equal(whole[0], parts[0]) and whole[1].history == parts[1].history
    again = train(tmp_path / "again", settings, training, outliers=OUTLIERS)
    other = train(tmp_path / "other", settings, training.but(seed=1), outliers=OUTLIERS)
    assert states_equal(whole[0], again[0]) and not states_equal(whole[0], other[0])


def test_the_callers_randomness_changes_nothing(tmp_path):
    torch.manual_seed(1)
    first = train(tmp_path / "a", outliers=OUTLIERS)[0]
    torch.manual_seed(2)
    assert states_equal(first, train(tmp_path / "b", outliers=OUTLIERS)[0])


# --- what goes into a batch -----------------------------------------------------------------------------------------

class Witness:
    """An `extra` term of zero that keeps what it was shown."""

    def __init__(self):
        self.seen = []

    def __call__(self, classifier, features, logits, labels, draw, images):
        self.seen.append((images.clone(), labels.clone(), features.detach(), logits.detach(), draw.step))
        return 0.0 * logits.sum()


def bytes_of(image):
    return ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy().tobytes()


def test_every_image_once_per_epoch_with_its_label(tmp_path):
    witness, known = Witness(), {image.tobytes(): label for image, label in zip(IMAGES, LABELS)}
    train(tmp_path, extra=witness)
    seen = [(bytes_of(image), int(label)) for images, labels, *_ in witness.seen for image, label in zip(images, labels)]
    assert len({image for image, _ in seen}) == 48 == len(seen)
    assert all(known[image] == label for image, label in seen)


def test_hook_sees_id_images_alone(tmp_path):
    witness = Witness()
    classifier, trained = train(tmp_path, extra=witness, outliers=OUTLIERS)
    assert [entry[-1] for entry in witness.seen] == [0, 1, 2, 3]
    for images, labels, features, logits, _ in witness.seen:
        assert len(images) == len(labels) == len(features) == len(logits) == 12
    assert trained.history and isinstance(classifier, Classifier)


@pytest.mark.parametrize("count, expected", [(0, 12), (7, 7), (99, 20)])
def test_one_forward_pass_for_id_images_and_outliers(tmp_path, monkeypatch, count, expected):
    """Both in one batch, equally augmented; outliers are never more than there are."""
    calls, original = [], Classifier.features
    monkeypatch.setattr(Classifier, "features", lambda self, x: calls.append(x.clone()) or original(self, x))
    train(tmp_path, ClassifierSettings(augment="shift", outlier_batch_size=count), outliers=OUTLIERS)
    assert [len(x) for x in calls] == [12 + expected] * 4
    everything = {image.tobytes() for image in np.concatenate([IMAGES, OUTLIERS])}
    for kind in (slice(12), slice(12, None)):
        still = np.mean([bytes_of(image) in everything for x in calls for image in x[kind]])
        assert still < 0.5, "one of nine shifts leaves an image where it is"


def test_outliers_are_not_tied_to_id_images(tmp_path, monkeypatch):
    """As many outliers as images: the two orders must differ."""
    calls, original = [], Classifier.features
    monkeypatch.setattr(Classifier, "features", lambda self, x: calls.append(x.clone()) or original(self, x))
    train(tmp_path, outliers=IMAGES[::-1].copy())
    own = [bytes_of(image) for x in calls for image in x[:12]]
    foreign = [bytes_of(image) for x in calls for image in x[12:]]
    places = {image.tobytes(): place for place, image in enumerate(IMAGES)}
    assert sum(places[a] + places[b] == 47 for a, b in zip(own, foreign)) < 10


def test_outliers_are_pushed_to_equal_probabilities(tmp_path):
    longer = SHORT.but(steps=60)
    exposed = train(tmp_path / "exposed", training=longer, outliers=OUTLIERS, outlier_weight=1.0)[0]
    plain = train(tmp_path / "plain", training=longer)[0]
    unsure = [extract(classifier, OUTLIERS).logits.softmax(1).amax(1).mean() for classifier in (exposed, plain)]
    assert unsure[0] < 0.45 < unsure[1]
    assert accuracy(extract(exposed, IMAGES), LABELS) > 0.9


def test_augmentation_of_every_kind_keeps_range_and_shape():
    images = torch.rand(50, 3, 32, 32) * 2 - 1
    for kind in ("none", "shift", "crop_flip"):
        moved = augmented(images, kind, torch.Generator().manual_seed(0))
        assert moved.shape == images.shape and moved.min() >= -1 and moved.max() <= 1
    marked = torch.full((400, 1, 32, 32), -1.0)
    marked[:, :, 16, 10] = 1
    for kind, reach in (("shift", 2), ("crop_flip", 4)):
        moved = augmented(marked, kind, torch.Generator().manual_seed(0))
        rows, columns = moved.amax(3)[:, 0].argmax(1), moved.amax(2)[:, 0].argmax(1)
        assert {int(row) for row in rows} == set(range(16 - reach, 17 + reach))
        mirrored = set(range(21 - reach, 22 + reach)) if kind == "crop_flip" else set()
        assert {int(column) for column in columns} == set(range(10 - reach, 11 + reach)) | mirrored


# --- heads, hooks, rates, precision ---------------------------------------------------------------------------------

@pytest.mark.parametrize("loss", HEADS)
def test_every_head_learns(tmp_path, loss):
    classifier, trained = train(tmp_path, ClassifierSettings(loss=loss), SHORT.but(steps=60), outliers=OUTLIERS)
    assert accuracy(extract(classifier, IMAGES), LABELS) > 0.9 and not classifier.training
    assert trained.history[-1][1] < trained.history[0][1]


class Centre(nn.Module):
    """An `extra` term with a parameter."""

    def __init__(self):
        super().__init__()
        self.centre = nn.Parameter(torch.zeros(128))

    def forward(self, classifier, features, logits, labels, draw, images):
        return (features - self.centre).pow(2).mean()


def test_groups_give_parts_their_own_rate(tmp_path):
    def groups(objective):
        return [{"params": objective.classifier.backbone.parameters(), "lr_scale": 0.0},
                {"params": [*objective.classifier.head.parameters(), *objective.extra.parameters()], "lr_scale": 1.0}]
    classifier, trained = train(tmp_path, extra=Centre(), groups=groups)
    untouched = build_classifier(1, 4, ClassifierSettings(), SHORT.seed)
    for moved, start in zip(classifier.backbone.parameters(), untouched.backbone.parameters()):
        assert torch.equal(moved, start)
    assert not torch.equal(classifier.head.weight, untouched.head.weight)
    assert trained.model.extra.centre.abs().max() > 0


def test_training_goes_on_from_given_weights(tmp_path):
    first = train(tmp_path / "first")[0]
    before = extract(first, IMAGES).logits
    second = train(tmp_path / "second", training=SHORT.but(learning_rate=1e-30), init=first)[0]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    train(tmp_path / "third", init=first)
    assert torch.equal(extract(first, IMAGES).logits, before), "the one given is not changed"


def test_bf16(tmp_path):
    classifier, trained = train(tmp_path, ClassifierSettings(loss="arcface"), SHORT.but(precision="bf16", steps=40),
                                outliers=OUTLIERS)
    assert all(weights.dtype == torch.float32 for weights in classifier.parameters())
    assert accuracy(extract(classifier, IMAGES), LABELS) > 0.9 and trained.precision == "bf16"


# --- extraction and files -------------------------------------------------------------------------------------------

def test_what_is_said_of_an_image_depends_on_it_alone():
    classifier = build_classifier(1, 4, ClassifierSettings(loss="cosface"))
    whole, order = extract(classifier, IMAGES, 16), np.random.default_rng(1).permutation(48)
    assert classifier.training, "its mode is given back"
    for part in (slice(0, 1), slice(0, 16), slice(0, 33)):
        assert torch.equal(extract(classifier, IMAGES[part], 16).logits, whole.logits[part])
    assert torch.allclose(extract(classifier, IMAGES[order], 16).features, whole.features[order], atol=1e-6)
    assert torch.allclose(extract(classifier, IMAGES, 5).logits, whole.logits, atol=1e-4)
    assert torch.equal(extract(classifier, torch.from_numpy(IMAGES), 16).logits, whole.logits)


@pytest.mark.parametrize("images", [IMAGES[:0], IMAGES[0], IMAGES.astype(np.float32)])
def test_images_that_cannot_be_extracted(images):
    with pytest.raises(ValueError, match="images must be uint8 .n, h, w, c. with n >= 1"):
        extract(build_classifier(1, 4, ClassifierSettings()), images)


@pytest.mark.parametrize("loss", [*HEADS, "pml:SubCenterArcFaceLoss"])
def test_saved_and_loaded(tmp_path, loss):
    settings = ClassifierSettings(loss=loss, loss_options={"sub_centers": 2} if loss.startswith("pml") else {})
    classifier = build_classifier(1, 4, settings, seed=3)
    save_classifier(classifier, tmp_path, settings, {"seed": 3})
    loaded, facts = load_classifier(tmp_path)
    assert torch.equal(extract(loaded, IMAGES).logits, extract(classifier, IMAGES).logits)
    assert facts["settings"] == settings and facts["card"] == {"seed": 3} and not loaded.training


def test_damaged_files(tmp_path):
    settings = ClassifierSettings()
    save_classifier(build_classifier(1, 4, settings), tmp_path, settings)
    card = json.loads((tmp_path / "classifier.json").read_text())
    for damage in ({"classes": 5}, {"settings": {"backbone": "vgg"}}, {"settings": {"depth": 3}}):
        (tmp_path / "classifier.json").write_text(json.dumps({**card, **damage}))
        with pytest.raises(ValueError, match="(?s)not a whole classifier .*save it anew"):
            load_classifier(tmp_path)
    (tmp_path / "classifier.json").write_text(json.dumps(card))
    (tmp_path / "classifier.safetensors").unlink()
    with pytest.raises(ValueError, match="not a whole classifier"):
        load_classifier(tmp_path)


# --- faults ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("outliers", [None, OUTLIERS])
def test_divergence_names_the_remedy(tmp_path, outliers):
    with pytest.raises((FloatingPointError, ValueError), match="lower learning.rate"):
        train(tmp_path, training=SHORT.but(learning_rate=1e30, clip=0.0, steps=10), outliers=outliers)


@pytest.mark.parametrize("changes, words", [
    ({"settings": ClassifierSettings(loss="cosface", loss_options={"scale": 16})}, "other settings"),
    ({"outlier_weight": 0.1}, "other outlier_weight"), ({"outliers": OUTLIERS[1:]}, "other outliers")])
def test_a_folder_is_not_resumed_with_something_else(tmp_path, changes, words):
    start = {"settings": ClassifierSettings(loss="cosface"), "outliers": OUTLIERS}
    train(tmp_path, **start, stop_after=1)
    with pytest.raises(ValueError, match=words):
        train(tmp_path, **{**start, **changes})
    train(tmp_path, **start)


@pytest.mark.parametrize("settings, words", [
    ({"backbone": "vgg"}, "unknown backbone 'vgg'"), ({"loss": "triplet"}, "unknown loss 'triplet'"),
    ({"loss_options": {"scale": 3}}, "does not take these options")])
def test_unknown_names(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        train(tmp_path, ClassifierSettings(**settings))
    with pytest.raises(ValueError, match="unknown setting 'rotate'"):
        ClassifierSettings.from_dict({"rotate": True})
