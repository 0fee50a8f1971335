"""The colour half of LMD: SVHN from its official file, seeded halves, shared networks, what the tables say of gaps."""
import hashlib
from dataclasses import replace

import numpy as np
import pytest
from scipy.io import savemat

from oodrepro import datasets, report
from oodrepro.denoisers import DenoiserSettings
from oodrepro.distances import distance_function
from oodrepro.lift_map_detect import LiftMapDetect
from oodrepro.lmd_colour import ColourRun, colour_study, fast_colour, not_run, plan, remarks, traces_control
from oodrepro.lmd_study import Cells, LMDRun, Variant, choose_score, controls, denoiser_of, lmd_study, rows_at_hand, table1
from oodrepro.published import published
from oodrepro.receipts import check, read_receipts
from oodrepro.training import TrainingSettings


def silent(line):
    """Takes a line of a log and keeps it to itself."""


@pytest.fixture
def data(tmp_path):
    """A data root with small CIFAR-10 strips and SVHN in its official form."""
    draws = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 30)):
        (tmp_path / "cifar10").mkdir(exist_ok=True)
        datasets.write_strips(tmp_path / "cifar10" / f"{split}.zip", draws.integers(0, 256, (count, 32, 32, 3), np.uint8),
                              {"label": np.arange(count) % 10})
        (tmp_path / "svhn").mkdir(exist_ok=True)
        savemat(tmp_path / "svhn" / f"{split}_32x32.mat", {"X": draws.integers(0, 256, (32, 32, 3, count), np.uint8),
                                                           "y": np.arange(count)[:, None] % 10 + 1})
    return tmp_path


def small(tier="laptop"):
    return replace(colour_study(tier), test_images=12, validation_images=4, fit_images=0, batch_size=32,
                   validation=("photos",), training=TrainingSettings(steps=2, batch_size=8, precision="fp32"),
                   rows=(Cells("cifar10", ("cifar100", "svhn"), flip=True), Cells("svhn", ("cifar10",))),
                   denoiser=DenoiserSettings(widths=(8, 8), attention=(False, False)), distances=("mse", "ssim"),
                   main=Variant(blocks=8, steps=2, repeats=2))


@pytest.mark.filterwarnings("ignore:.*images, but")
def test_cells_of_svhn_are_filled_by_its_official_file(data, tmp_path):
    run = ColourRun(small(), tmp_path / "out", data, log=silent)
    assert run.missing() == {("cifar10", "cifar100"): "data not at hand: cifar100 test; oodrepro data get cifar100, then "
                                                      "oodrepro reproduce lmd_colour --tier laptop"}
    assert rows_at_hand(run) == [("cifar10", ["svhn"]), ("svhn", ["cifar10"])]
    headline, written = choose_score(run, 0)
    written += table1(run, 0, headline) + controls(run, 0) + traces_control(run, 0)
    receipts = read_receipts(run.results)
    assert check(run.results) == [] and len(receipts) == len(set(written)) == 4 + 4 + 4 + 2
    table = report.compare(receipts[receipts.table == "table1"], published("lmd"), table="table1", not_run=not_run(run))
    verdicts = {(line.row_id, line.column_ood): line.verdict for line in table.itertuples()}
    assert verdicts["cifar10", "cifar100"].startswith("not run: data not at hand: cifar100 test; oodrepro data get")
    assert verdicts["mnist", "kmnist"] == "not run: grey half: oodrepro reproduce lmd --tier laptop"
    assert not verdicts["cifar10", "svhn"].startswith("not run") and not verdicts["svhn", "cifar10"].startswith("not run")
    said = remarks(run)
    assert list(said.id + "/" + said.ood) == ["cifar10/svhn", "svhn/cifar10"]


def test_the_command_in_the_table_is_one_that_exists():
    from oodrepro.reproduce import available_papers
    assert "lmd_colour" in available_papers()
    assert datasets.info("svhn").files[0].address.startswith("http")


@pytest.mark.parametrize("tier", ["gpu", "paper"])
def test_large_tiers_train_the_networks_of_the_whole_study(tier):
    from oodrepro.lmd_study import training_of
    ours, whole = colour_study(tier), lmd_study(tier)
    for id_set in ("cifar10", "cifar100", "svhn"):
        assert training_of(ours, id_set) == training_of(whole, id_set)
    assert {ours.main, *ours.masks} == {whole.main, *whole.masks} and ours.distances == whole.distances


@pytest.mark.filterwarnings("ignore:.*images, but")
def test_halves_are_disjoint_seeded_and_belong_to_the_official_test_set(data):
    train, test = (datasets.load("svhn", f"half_{use}", data) for use in ("as_train", "heldout"))
    whole = datasets.load("svhn", "test", data)
    assert len(train) == len(test) == 15 and set(train.index) | set(test.index) == set(whole.index)
    assert np.array_equal(test.images, datasets.load("svhn", "half_heldout", data).images)
    assert np.array_equal(whole.images[test.index], test.images)
    with pytest.raises(ValueError, match="no split 'half_as_train'"):
        datasets.load("textures", "half_as_train", data)


@pytest.mark.filterwarnings("ignore:.*images, but")
def test_rows_that_are_not_asked_for_are_neither_trained_nor_read(data, tmp_path):
    lines = []
    run = ColourRun(small(), tmp_path / "out", data, log=lines.append, only=["svhn"])
    assert rows_at_hand(run) == [("svhn", ["cifar10"])]
    assert run.missing()["cifar10", "svhn"] == "another part of this tier"
    headline, _ = choose_score(run, 0)
    table1(run, 0, headline)
    assert [line for line in lines if "train-lmd-svhn" in line] and not [line for line in lines if "train-lmd-cifar10" in line]
    with pytest.raises(ValueError, match="'gtsrb' is no in-distribution set"):
        ColourRun(small(), tmp_path / "out", data, log=silent, only=["gtsrb"])


@pytest.mark.filterwarnings("ignore:.*images, but")
def test_the_same_network_whoever_asks(data, tmp_path):
    first = denoiser_of(ColourRun(small(), tmp_path / "out", data, log=silent), "svhn")
    lines = []
    second = denoiser_of(LMDRun(small(), tmp_path / "out", data, log=lines.append), "svhn")
    assert lines == ["stage train-lmd-svhn: reused"]
    digests = [hashlib.sha256(b"".join(value.numpy().tobytes() for value in one.net.state_dict().values())).hexdigest()
               for one in (first, second)]
    assert digests[0] == digests[1]


def test_the_plan_names_what_is_missing_without_reading_or_writing(tmp_path):
    lines = plan("laptop", [0], tmp_path / "out", tmp_path)
    assert len([line for line in lines if "not run: " in line]) == 16 and not list(tmp_path.iterdir())


def test_the_fast_default_in_colour_is_the_one_that_ships():
    """The same holes at the next image size, the same distance and kind of score: nothing is chosen again."""
    shipped, (study, score) = LiftMapDetect.from_pretrained("fast-lmd-mnist"), fast_colour(colour_study("laptop"))
    larger = {"half-7": "half-8", "half-14": "half-16", "quarter-7": "quarter-8"}
    assert tuple(larger.get(hole, hole) for hole in shipped.options.mask) == score.family == study.main.holes
    assert shipped.evaluations_per_image == study.main.evaluations(32) == 12
    assert (shipped.reference.kind, shipped.reference.combine) == ("relative", "smooth_max") and score.kind == "relative-any"
    assert shipped.distance is distance_function("mse") and score.distance == "mse"
