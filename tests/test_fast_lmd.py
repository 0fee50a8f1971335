"""Fast LMD: what the choice of the default may see, and that its record says the same as the choice."""
from dataclasses import replace

import numpy as np
import pytest

from oodrepro import report, summaries
from oodrepro.fast_lmd import SPOILT, FastRun, FastVariant, choose_default, fast_study, selected, validation_cells
from oodrepro.receipts import load_scores, read_receipts
from oodrepro.training import TrainingSettings

TIERS = ("smoke", "laptop", "gpu", "paper")


@pytest.fixture(scope="module")
def study():
    """The smoke study, with training of a few steps and two families of holes."""
    small, short = fast_study("smoke"), TrainingSettings(steps=4, batch_size=16, precision="fp32", warmup=2)
    holes = ("board-2", "board-4")
    return replace(small, lmd=replace(small.lmd, training=short), training=short, main=FastVariant(holes=holes),
                   families=(("board-2",), holes), distances=("mse",), validation_images=20, fit_images=25, test_images=30)


@pytest.fixture(scope="module")
def chosen(study, tmp_path_factory):
    """A run whose choice was recorded, with (set, positions) of all that was looked at on the way."""
    run = FastRun(study, tmp_path_factory.mktemp("fast"), log=lambda line: None)
    whole, looked = run.chosen, []

    def watched(name, id_set, first, count):
        images = whole(name, id_set, first, count)
        looked.append((name, images.index))
        return images

    run.chosen = watched
    default, tried = choose_default(run, 0)
    validation_cells(run, default, 0)
    return run, default, tried, looked


@pytest.mark.parametrize("tier", TIERS)
def test_no_validation_set_stands_in_the_table(tier):
    study = fast_study(tier)
    tested = {name for cells in study.lmd.rows for name in (cells.id, *cells.oods)}
    assert study.validation and not tested & set(study.validation)


def test_the_choice_looks_at_no_test_image_and_no_ood_set_of_a_pair(study, chosen):
    run, _, _, looked = chosen
    [cells] = study.lmd.rows
    assert looked and not {name for name, _ in looked} & set(cells.oods)
    tested = set(FastRun.chosen(run, cells.id, cells.id, 0, study.test_images).index.tolist())
    assert len(tested) == study.test_images
    assert not tested & set(np.concatenate([index for name, index in looked if name == cells.id]).tolist())


def test_spoilt_images_are_validation_images(study, chosen):
    run = chosen[0]
    validation = run.chosen("digits", "digits", run.first("validation"), 20)
    assert all(np.array_equal(selected(run, "digits", how, 20).index, validation.index) for how in SPOILT)


def test_the_ranking_says_what_was_chosen_and_can_be_checked(study, chosen):
    run, default, tried, _ = chosen
    validated = read_receipts(run.results)
    assert set(validated.column_ood) == set(study.validation)
    name = " ".join(("+".join(default.family), default.distance, default.kind))
    ranking = summaries.ranking(validated, first=3, chosen=name)
    means = tried.groupby(["holes", "distance", "kind"]).auroc.mean()
    line = ranking[ranking.chosen == "yes"]
    assert line["mean"].item() == pytest.approx(means["+".join(default.family), default.distance, default.kind], abs=1e-12)
    assert ranking["rank"][0] == line["rank"].item(), "nothing in this study needs a file or exceeds the budget"
    report.write_tables(run.results, {"fast_choice": ranking}, {"fast_choice": "The choice"})
    assert report.verify(run.results)[0] == []
    text = run.results / "fast_choice.md"
    text.write_text(text.read_text().replace("yes", "no"))
    assert report.verify(run.results)[0]


def test_a_receipt_of_the_choice_holds_the_scores_of_what_was_chosen(chosen):
    run, default, _, _ = chosen
    for line in read_receipts(run.results).to_dict("records"):
        arrays, name = load_scores(line["path"]), " ".join(("+".join(default.family), default.distance, default.kind))
        assert np.array_equal(arrays["score"], arrays["candidates"][:, line["candidates"].index(name)])


def test_a_ranking_refuses_receipts_of_different_choices(chosen):
    validated = read_receipts(chosen[0].results)
    names = list(validated.candidates[0])
    mixed = validated.assign(candidates=[names, *[names[::-1]] * (len(validated) - 1)])
    with pytest.raises(ValueError, match="different candidates"):
        summaries.ranking(mixed)
