"""Suites and the resize guard: planted faults are found, honest pairs raise no alarm."""

import os
import warnings
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from oodrepro.datasets import load, subset
from oodrepro.images import ImageSet, as_dataset
from oodrepro.suites import (
    ResizeWarning,
    Suite,
    fine_share,
    harmonise,
    openood_suite,
    resize,
    resize_guard,
    to_channels,
)

DATA = os.environ.get("OODREPRO_DATA")
needs_data = pytest.mark.skipif(not DATA or not (Path(DATA) / "cifar10").is_dir(), reason="OODREPRO_DATA is not set")


@lru_cache
def whole(name, options):
    return load(name, **dict(options))


def few(name, n=100, **options):
    return subset(whole(name, tuple(options.items())), n)


def test_smoke_suite_has_the_stated_sizes_and_no_trace_of_resizing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        suite = Suite("digits", near=["glyphs"], far=["photos", "noise"])
    table = suite.table().set_index("set")
    assert dict(table["images"]) == {"digits": 500, "glyphs": 600, "photos": 600, "noise": 600}
    assert dict(table["group"]) == {"digits": "id", "glyphs": "near", "photos": "far", "noise": "far"}
    assert set(table["pixels"]) == {"8 x 8 x 1"} and not table["ID copies"].any()
    assert "glyphs" in repr(suite) and "<table" in suite._repr_html_()
    assert [len(part) for part in suite.subset(50).ood.values()] == [50] * 3


def test_a_suite_takes_what_users_have(tmp_path):
    digits, glyphs = few("digits", 40), few("glyphs", 40)
    for number, image in enumerate(glyphs.images):
        Image.fromarray(image[..., 0]).save(tmp_path / f"{number}.png")
    suite = Suite(
        as_dataset(digits),
        {"folder": tmp_path, "path text": str(tmp_path)},
        {"array": glyphs.images[::-1].copy(), "floats": glyphs.images[..., 0] / 255, "dataset": as_dataset(glyphs)},
    )
    assert suite.id.name == "id" and all(len(part) == 40 for part in suite.ood.values())
    assert suite.ood["folder"].content == suite.ood["dataset"].content == glyphs.content


def test_registered_names_win_over_folders_of_that_name(tmp_path, monkeypatch):
    (tmp_path / "glyphs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert len(Suite("digits", ["glyphs"]).near["glyphs"]) == 600


@pytest.mark.parametrize(
    "near, far, words",
    [
        (["digits"], [], "own name"),
        ({"digits": np.zeros((3, 8, 8), np.uint8)}, [], "own name"),
        ([], [], "at least one"),
        ({"a": "glyphs"}, {"a": "noise"}, "two sets of one name"),
        (["noise", "noise"], [], "two sets of one name"),
        ({"void": np.zeros((0, 8, 8), np.uint8)}, [], "void"),
        (["cifar1000"], [], "unknown set 'cifar1000'"),
    ],
)
def test_suites_that_make_no_sense_are_refused(near, far, words):
    with pytest.raises(ValueError, match=words):
        Suite("digits", near, far)


def test_an_ood_set_equal_to_the_id_set_is_refused_under_any_name_and_order():
    digits = load("digits")
    for same in (digits, digits.take(np.arange(len(digits))[::-1]), subset(digits, 99)):
        with pytest.raises(ValueError, match="equals the ID set"):
            Suite(digits, {"other": same})


def test_single_copies_of_id_images_are_warned_of():
    digits, glyphs = load("digits"), load("glyphs")
    mixed = ImageSet(np.concatenate([glyphs.images, digits.images[:2]]))
    with pytest.warns(UserWarning, match="2 of 602 images are exact copies"):
        suite = Suite(digits, {"mixed": mixed})
    assert suite.table().set_index("set").loc["mixed", "ID copies"] == 2


def test_different_sizes_and_channels_are_warned_of_and_mended():
    with pytest.warns(ResizeWarning, match="harmonise"):
        suite = Suite(few("photos", size=32), {"small": few("glyphs", size=28)})
    mended = suite.harmonised()
    assert mended.table()["pixels"].tolist() == ["32 x 32 x 1"] * 2 and not mended.findings["small"].alarm
    colour = to_channels(few("photos", size=32), 3)
    with pytest.warns(ResizeWarning, match="channel"):
        resize_guard(colour, few("glyphs", size=32))
    assert np.array_equal(to_channels(colour, 1).images, few("photos", size=32).images)


@pytest.mark.parametrize(
    "names, size",
    [
        (("digits", "glyphs", "photos", "noise"), 8),
        (("glyphs", "photos", "noise"), 28),
        (("glyphs", "photos", "noise"), 32),
    ],
)
def test_no_alarm_on_content_alone(names, size):
    sets = [few(name, **({} if size == 8 else {"size": size})) for name in names]
    for first, second in combinations(sets, 2):
        finding = resize_guard(first, second, warn=False)
        assert not finding.alarm and finding.auroc >= 0.5, (first.name, second.name, finding)


@pytest.mark.parametrize(
    "name, low, method",
    [
        ("photos", 8, "bilinear"),
        ("photos", 16, "nearest"),
        ("photos", 16, "lanczos"),
        ("photos", 28, "bilinear"),
        ("photos", 28, "nearest"),
        ("glyphs", 24, "bicubic"),
        ("noise", 16, "bilinear"),
    ],
)
def test_one_side_resized_is_found(name, low, method):
    honest, resized = few("photos", size=32), few(name, size=32, split="train")
    resized = resize(resize(resized, low), 32, method)
    for pair, side in (((honest, resized), 1), ((resized, honest), 0)):
        with pytest.warns(ResizeWarning, match="harmonise"):
            finding = resize_guard(*pair)
        assert finding.alarm and finding.low <= low and finding.side.startswith(pair[side].name)


@pytest.mark.parametrize("name", ["digits", "photos"])
def test_one_side_resized_is_found_at_eight_pixels(name):
    resized = resize(resize(few(name, split="train"), 4), 8)
    assert resize_guard(few("glyphs"), resized, warn=False).kind == "smoothed"


@pytest.mark.parametrize("low", [8, 16, 24])
def test_harmonising_takes_the_confound_away(low):
    honest, resized = few("photos", 200, size=32), few("photos", 200, size=32)
    honest, resized = honest.take(np.arange(100)), resize(resize(resized.take(np.arange(100, 200)), low), 32)
    before = resize_guard(honest, resized, warn=False)
    mended = harmonise(honest, resized)
    after = resize_guard(*mended, warn=False)
    assert before.alarm and before.auroc > 0.9 and not after.alarm and after.auroc < 0.7
    assert mended[0].images.shape == honest.images.shape and "bilinear" in mended[0].source


def test_harmonise_leaves_honest_sets_alone_and_refuses_nonsense():
    first, second = few("glyphs", size=32), few("photos", size=32)
    assert harmonise(first, second)[1].content == second.content
    for options in ({"low": 33}, {"low": 0}):
        with pytest.raises(ValueError, match="low must lie"):
            harmonise(first, second, **options)
    with pytest.raises(ValueError, match="square"):
        harmonise(first, np.zeros((30, 8, 9), np.uint8))
    with pytest.raises(ValueError, match="1 or 3"):
        to_channels(first, 2)


def test_the_guard_says_nothing_where_nothing_can_be_said():
    flat = ImageSet(np.full((50, 16, 16, 1), 7, np.uint8), name="flat")
    assert not resize_guard(flat, few("noise", size=16), warn=False).alarm
    assert "too few" in resize_guard(few("glyphs", 5), few("noise", 5)).message
    assert np.isfinite(fine_share(flat.images)).all()


@needs_data
def test_cifar10_against_cifar100_is_the_clean_pair_and_knows_its_copy():
    with pytest.warns(UserWarning, match="exact copies"):
        suite = Suite(load("cifar10", root=DATA), {"cifar100": load("cifar100", root=DATA)})
    assert not suite.findings["cifar100"].alarm and suite.copies == {"cifar100": 1}
    resized = resize(resize(subset(suite.near["cifar100"], 300), 28), 32, "bicubic")
    assert resize_guard(suite.id, resized, warn=False).kind == "smoothed"


@needs_data
def test_no_alarm_on_the_mnist_family():
    sets = [subset(load(name, root=DATA), 300) for name in ("mnist", "fashion_mnist", "kmnist")]
    for first, second in combinations(sets, 2):
        assert not resize_guard(first, second, warn=False).alarm
    assert resize_guard(sets[0], resize(resize(sets[2], 20), 28), warn=False).alarm


@needs_data
@pytest.mark.filterwarnings("ignore")
def test_openood_sizes():
    table = openood_suite("cifar100", DATA, guard=False).table().set_index("set")
    assert dict(table["images"]) == {
        "cifar100": 9000,
        "cifar10": 8980,
        "tinyimagenet": 6526,
        "mnist": 70000,
        "textures": 1200,
    }
    assert dict(table["listed"])["cifar10"] == 9000 and set(table["pixels"]) == {"32 x 32 x 3"}
