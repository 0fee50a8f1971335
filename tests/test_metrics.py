"""metrics: golden values of every historical variant, scikit-learn and naive loops as oracles, intervals, faults."""
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import metrics as oracle

from oodrepro import metrics

GOLDEN = np.load(Path(__file__).parent / "golden" / "metrics.npz")
NAMES = [str(name) for name in GOLDEN["names"]]
CLOSE = 1e-12


def case(name):
    inside, outside = GOLDEN[f"{name}__id"], GOLDEN[f"{name}__ood"]
    return np.r_[inside, outside], np.repeat([False, True], [len(inside), len(outside)])


def same(found, expected):
    return np.allclose(found, expected, rtol=0, atol=CLOSE, equal_nan=True)


def replay(name, variant):
    """Our values in the golden file's column order."""
    score, is_ood = case(name)
    accuracy = metrics.id_accuracy(GOLDEN[f"{name}__label"], GOLDEN[f"{name}__pred"])
    four = ("fpr95", "auroc", "aupr_in", "aupr_out")
    if variant in ("openood_current", "openood_2023", "oal_fork"):
        found = (metrics.openood if variant == "openood_current" else metrics.openood_2023)(score, is_ood)
        return [*(found[key] for key in four), accuracy]
    if variant == "openood_2022":
        return [metrics.openood_2022(score, is_ood)[key] for key in four]
    if variant.startswith("hendrycks"):
        found = metrics.dream_ood(score, is_ood) if "id_positive" in variant else metrics.hendrycks(score, is_ood)
        return [found[key] for key in ("auroc", "aupr", "fpr95")]
    if variant == "pytorch_ood_roles_swapped":
        found = metrics.pytorch_ood_roles_swapped(score, is_ood)
    else:
        found = metrics.pytorch_ood(score.astype(np.float32) if variant.endswith("float32") else score, is_ood)
    return [*(found[key] for key in four), found["autc"]]


VARIANTS = ["openood_current", "openood_2023", "oal_fork", "openood_2022", "pytorch_ood", "pytorch_ood_roles_swapped",
            "pytorch_ood_float32", "hendrycks_ood_positive", "hendrycks_id_positive"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NAMES)
def test_golden_variant(name, variant):
    expected = GOLDEN[f"{name}__{variant}"]
    if np.isnan(expected).all():  # the reference refused
        with pytest.raises(ValueError, match="infinite"):
            replay(name, variant)
        return
    assert same(replay(name, variant), expected)
    if not variant.startswith(("hendrycks", "pytorch_ood_roles")):
        assert replay(name, variant)[0] == expected[0]  # ratios of counts: exactly


@pytest.mark.parametrize("name", NAMES)
def test_golden_scikit_learn_columns(name):
    expected = GOLDEN[f"{name}__sklearn"]
    if np.isnan(expected).all():
        return
    score, is_ood = case(name)
    found = [metrics.auroc(score, is_ood), metrics.aupr(score, is_ood, "id", "average_precision"),
             metrics.aupr(score, is_ood, "ood", "average_precision"), metrics.aupr(score, is_ood, "id"),
             metrics.aupr(score, is_ood, "ood"),
             metrics.fpr_at_tpr(score, is_ood), metrics.fpr95_openood(score, is_ood),
             metrics.fpr_at_tpr(score, is_ood, positive="id"), metrics.fpr95_openood(score, is_ood, "id")]
    assert same(found, expected)
    assert found[5:] == expected[5:].tolist()


def test_evaluate_has_the_promised_keys_and_agrees_with_the_single_functions():
    score, is_ood = case("heavy_ties")
    found = metrics.evaluate(score, is_ood)
    assert list(found) == ["auroc", "fpr95", "fpr95_id_positive", "aupr_in", "aupr_out", "detection_accuracy"]
    assert all(type(value) is float for value in found.values())
    assert found["aupr_in"] == metrics.aupr(score, is_ood, "id") and found["fpr95"] == metrics.fpr_at_tpr(score, is_ood)
    assert found["detection_accuracy"] == metrics.detection_accuracy(score, is_ood)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.int8, np.int64, np.uint8])
def test_every_real_dtype_gives_the_same_ranks(kind):
    score = np.random.default_rng(0).integers(0, 20, 100).astype(kind)
    is_ood = np.arange(100) % 3 == 0
    assert metrics.evaluate(score, is_ood) == metrics.evaluate(score.astype(np.float64), is_ood)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_and_lists(kind):
    score, is_ood = torch.arange(6, dtype=kind, requires_grad=True), torch.tensor([False, True] * 3)
    assert metrics.evaluate(score, is_ood) == metrics.evaluate(list(range(6)), [False, True] * 3)


@pytest.mark.parametrize("seed", range(5))
def test_order_and_monotone_maps_change_nothing_but_rounding_of_sums(seed):
    rng = np.random.default_rng(seed)
    score, is_ood = rng.normal(size=300).round(1), rng.random(300) < 0.3
    shuffled = rng.permutation(300)
    assert metrics.evaluate(score, is_ood) == metrics.evaluate(score[shuffled], is_ood[shuffled])
    assert metrics.evaluate(score, is_ood) == metrics.evaluate(np.exp(score / 2), is_ood)
    turned = metrics.evaluate(-score, ~is_ood)  # roles exchanged
    straight = metrics.evaluate(score, is_ood)
    assert turned["fpr95"] == straight["fpr95_id_positive"] and same(turned["aupr_in"], straight["aupr_out"])


def test_a_curve_agrees_with_scikit_learns_on_every_point():
    score, is_ood = case("mixed_step_ties")
    false_rate, true_rate, _ = oracle.roc_curve(is_ood, score, drop_intermediate=False)
    points = metrics.curve(score, is_ood)
    assert same(points.false_rate, false_rate[1:]) and same(points.true_rate, true_rate[1:])


def test_resampled_rows_equal_resampled_scores():
    """The blocked, counted bootstrap gives what re-sorting every resample would give."""
    score, is_ood = case("heavy_ties")
    block = next(metrics._resamples([metrics._groups(score)], is_ood, 5, seed=0))[0]
    draw_ood, draw_id = (np.random.default_rng(metrics.derive_seed("bootstrap", name, 0)).integers(n, size=(5, n))
                         for name, n in (("ood", is_ood.sum()), ("id", (~is_ood).sum())))
    for row in range(5):
        again = np.r_[score[~is_ood][draw_id[row]], score[is_ood][draw_ood[row]]]
        expected = metrics.evaluate(again, np.sort(is_ood))
        for name in metrics.METRICS:
            assert same(metrics.measure(block, name)[row], expected[name]), name


def test_bootstrap_does_not_depend_on_its_block_size():
    score, is_ood = case("normal")
    whole, parts = ([metrics.measure(curves[0], "fpr95") for curves in
                     metrics._resamples([metrics._groups(score)], is_ood, 10, seed=3, cells=cells)]
                    for cells in (10 ** 6, 3 * len(score)))
    assert len(whole) == 1 and len(parts) == 4
    assert np.array_equal(np.concatenate(whole), np.concatenate(parts))


def test_delong_variance_by_the_textbook_loop():
    score, is_ood = case("heavy_ties")
    outside, inside = score[is_ood], score[~is_ood]
    kernel = (outside[:, None] > inside) + 0.5 * (outside[:, None] == inside)
    expected = kernel.mean(1).var(ddof=1) / len(outside) + kernel.mean(0).var(ddof=1) / len(inside)
    assert same(metrics.delong_interval(score, is_ood).standard_error, expected ** 0.5)
    assert same(metrics.placements(score, is_ood)[is_ood], kernel.mean(1))
    assert same(metrics.placements(score, is_ood)[~is_ood], kernel.mean(0))


def test_paired_delong_by_the_textbook_covariance():
    rng = np.random.default_rng(0)
    is_ood = rng.random(120) < 0.4
    a = rng.normal(size=120) + is_ood
    b = (a + rng.normal(size=120)).round(1)
    kernels = [(s[is_ood][:, None] > s[~is_ood]) + 0.5 * (s[is_ood][:, None] == s[~is_ood]) for s in (a, b)]
    over_ood = np.cov([kernel.mean(1) for kernel in kernels])
    over_id = np.cov([kernel.mean(0) for kernel in kernels])
    covariance = over_ood / is_ood.sum() + over_id / (~is_ood).sum()
    expected = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    found = metrics.paired_difference(a, b, is_ood)
    assert same(found.standard_error ** 2, expected)
    assert same(found.difference, metrics.auroc(a, is_ood) - metrics.auroc(b, is_ood))


def test_a_perfect_score_keeps_an_honest_interval():
    interval = metrics.delong_interval([0, 1, 2, 5, 6, 7, 8], np.array([False] * 3 + [True] * 4))
    assert interval.value == interval.high == 1 and same(interval.low, 0.025 ** (1 / 3))


def test_seeds_interval_with_separate_samples_averages_the_error():
    rng = np.random.default_rng(0)
    runs = []
    for seed in range(4):
        is_ood = np.repeat([False, True], 200)
        runs.append((rng.normal(size=400) + is_ood, is_ood, np.arange(400) + 1000 * seed))
    shared = [(score, is_ood, np.arange(400)) for score, is_ood, _ in runs]
    apart = metrics.seeds_interval(runs)
    assert "separate" in apart.method and apart.sample_error < 0.6 * metrics.seeds_interval(runs[:1]).sample_error
    assert "same samples" in metrics.seeds_interval(shared).method
    assert apart.std == metrics.aggregate_seeds([metrics.auroc(*run[:2]) for run in runs]).std


def test_every_metric_has_a_bootstrap_interval_that_holds_its_value():
    score, is_ood = case("normal")
    for name in metrics.METRICS:
        found = metrics.bootstrap_interval(score, is_ood, name, n=200)
        assert found.low <= found.value <= found.high and found.value == metrics.evaluate(score, is_ood)[name]


def test_two_million_scores_in_seconds():
    rng = np.random.default_rng(0)
    score, is_ood = rng.normal(size=2_000_000).astype(np.float32), np.repeat([False, True], 1_000_000)
    start = time.perf_counter()
    metrics.evaluate(score, is_ood)
    metrics.delong_interval(score, is_ood)
    assert time.perf_counter() - start < 20  # about 2 s on two quiet cores


ONE_DETECTOR = ["auroc", "fpr_at_tpr", "aupr", "detection_accuracy", "evaluate", "curve", "placements", "autc",
                "bootstrap_interval", "delong_interval", "openood", "openood_2023", "openood_2022", "pytorch_ood",
                "pytorch_ood_roles_swapped", "hendrycks", "dream_ood", "fpr95_openood", "fpr95_hendrycks"]
CALLS = {name: getattr(metrics, name) for name in ONE_DETECTOR} | {
    "paired_difference": lambda score, is_ood: metrics.paired_difference(score, score, is_ood),
    "seeds_interval": lambda score, is_ood: metrics.seeds_interval([(score, is_ood, np.arange(len(score)))])}


@pytest.mark.parametrize("name", CALLS)
def test_bad_input_is_refused_everywhere(name):
    call = CALLS[name]
    two = np.array([False, True, False, True])
    with pytest.raises(ValueError, match="1 of 4 scores are NaN.*position 2"):
        call(np.array([0, 1, np.nan, 3]), two)
    with pytest.raises(ValueError, match="0 samples"):
        call(np.array([]), np.array([], bool))
    with pytest.raises(ValueError, match="one class only: 0 ID and 4 OOD"):
        call(np.arange(4.0), np.ones(4, bool))
    with pytest.raises(TypeError, match="label < 0"):
        call(np.arange(4.0), np.array([0, -1, 0, -1]))
    with pytest.raises(ValueError, match=r"shape \(2, 2\)"):
        call(np.arange(4.0).reshape(2, 2), two)
    with pytest.raises(ValueError, match="3 scores but 4"):
        call(np.arange(3.0), two)
    with pytest.raises(TypeError, match="complex128"):
        call(np.arange(4) + 1j, two)
