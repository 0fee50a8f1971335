"""The OAL study: terms of the loss, MICL without direction, controls, teachers, contrasts, what a stage depends on."""
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from transformers import ViTConfig, ViTForImageClassification

from oodrepro.classifying import ClassifierSettings, Objective, build_classifier
from oodrepro.latent_outliers import BoundarySettings, SynthesisSettings
from oodrepro.losses import CLUB, distillation_loss, feature_distillation_loss
from oodrepro.metrics import auroc
from oodrepro.oal_study import (FAITHFUL, FIXED, MODES, TRAININGS, OALRun, OutlierTerms, Trial, VisionTransformer,
                                Weights, check_teacher, contrast, latents_of, oal_study, parameter_groups, peak_bytes,
                                plan,
                                pools_of, random_pairings, suite, test_parts as parts_of, train_set, training_named,
                                trial_stage,
                                trials_of, write_rows)
from oodrepro.receipts import check, read_receipts, write_receipt
from oodrepro.settings import generator
from oodrepro.training import Draw, TrainingSettings
from test_latent_outliers import tiny_pipeline

WIDTH, CLASSES = 6, 3


def rows(count, size, *name):
    return torch.randn(count, size, generator=generator("oal test", *name))


def terms(training, mode, pools=None, seed=0):
    """The outlier terms of a training on small made-up pools, its teacher a fixed answer."""
    plan_ = training_named(training)
    pools = pools or {name: rows(40, size, name) for name, size in (("vectors", 8), ("latents", 5))
                      if getattr(plan_, name)}
    lesson = (rows(16, 8, "lesson"), rows(16, CLASSES, "answer"))
    return OutlierTerms(plan_, mode, Weights(), pools, lambda images, draw: lesson, 8, WIDTH, CLASSES, seed), lesson


class Student(torch.nn.Module):
    """The least that the terms ask of a classifier."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, CLASSES)

    def logits(self, features):
        return self.linear(features)


def value(module, features, student, step=0):
    labels = torch.arange(16) % CLASSES
    return module(student, features, student.logits(features), labels, Draw(0, step), None)


# --- the loss -------------------------------------------------------------------------------------------------------

def test_oal_is_the_weighted_sum_of_its_parts():
    """4 KL of logits + 8 KL of features + 0.1 CLUB of vectors + 0.2 CLUB of latents, as released."""
    module, (known, answers) = terms("oal", FAITHFUL)
    student, features = Student(), rows(16, WIDTH, "features").relu()
    draw = Draw(0, 5)
    found = value(module, features, student, 5)
    module, _ = terms("oal", FAITHFUL)  # fresh running statistics
    expected = 4 * distillation_loss(student.logits(features), answers)
    expected = expected + 8 * feature_distillation_loss(features, module.projectors["teacher"](known))
    for name, weight in (("vectors", 0.1), ("latents", 0.2)):
        expected = expected + weight * module.terms[name].bound(module.drawn(name, 16, draw), features)
    assert (found - expected).detach().abs() < 1e-5


@pytest.mark.parametrize("step", [0, 1])
def test_the_whole_loss_is_the_released_trainers(step):
    """Cross-entropy plus `OutlierTerms`, on the networks, batches and picks of the released trainer's own two steps."""
    archive = np.load(Path(__file__).parent / "golden" / "oal_losses_step.npz", allow_pickle=False)
    arrays = {key: torch.from_numpy(np.asarray(archive[key])) for key in archive.files}
    when = ("before", "after1")[step]

    def weight(*names):
        return arrays["__".join((when, *names))]

    hidden = torch.relu(F.linear(arrays[f"data{step}"], weight("student", "l1_weight"), weight("student", "l1_bias")))
    logits = F.linear(hidden, weight("student", "l2_weight"), weight("student", "l2_bias"))
    known = torch.tanh(F.linear(arrays[f"data{step}"], arrays["teacher__body_weight"], arrays["teacher__body_bias"]))
    answers = F.linear(known, arrays["teacher__head_weight"], arrays["teacher__head_bias"])
    pools = {"vectors": arrays["knn_outliers"], "latents": arrays["sd_vectors"]}
    module = OutlierTerms(training_named("oal"), FAITHFUL, Weights(), pools, lambda images, draw: (known, answers),
                          12, 8, 10).double()
    module.terms = torch.nn.ModuleDict({"vectors": CLUB(12, 8, 16), "latents": CLUB(64, 8, 16, deep=True)}).double()
    for name, theirs in (("vectors", "club"), ("latents", "deep_club")):
        module.terms[name].load_state_dict({key: weight(theirs, key.replace(".", "_"))
                                            for key in module.terms[name].state_dict()})
    for number, theirs in ((0, "pre_norm"), (1, "mlp1"), (3, "norm1")):
        layer = module.projectors["teacher"][number]
        layer.weight.data, layer.bias.data = weight("dt", f"{theirs}_weight"), weight("dt", f"{theirs}_bias")
    module.drawn = lambda name, count, draw: pools[name][arrays[f"pick{step}_{'knn' if name == 'vectors' else 'sd'}"]]
    found = F.cross_entropy(logits, arrays[f"label{step}"]) + module(None, hidden, logits, None, Draw(0, step), None)
    assert (found - arrays["losses"][step]).detach().abs() < 1e-9 * float(arrays["losses"][step])


@pytest.mark.parametrize("training", [training for training in TRAININGS if training.vectors or training.latents])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_every_term_reaches_the_student(training, mode):
    module, _ = terms(training.name, mode)
    student, features = Student(), rows(16, WIDTH, "features").relu().requires_grad_(True)
    value(module, features, student).backward()
    assert torch.isfinite(features.grad).all() and features.grad.abs().max() > 0
    for name in module.terms:
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in module.terms[name].parameters()), name


def test_energy_reads_features_or_logits():
    student, features = Student(), rows(16, WIDTH, "features").relu()
    module, _ = terms("energy", FIXED)
    value(module, features, student).backward()
    through_head = student.linear.weight.grad.clone()
    student.zero_grad()
    module, _ = terms("energy", FAITHFUL)
    value(module, features, student).backward()
    logits_only = student.linear.weight.grad
    assert (through_head - logits_only).abs().max() > 1e-4  # the released term never sees the head


def test_outliers_are_drawn_by_step_and_shared_by_processes():
    module, _ = terms("oal", FIXED)
    first, again, later = (module.drawn("vectors", 16, Draw(0, step)) for step in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, later)
    assert len({tuple(row.tolist()) for row in first}) == 16  # without repetition
    halves = [module.drawn("vectors", 8, Draw(0, 3, rank, 2)) for rank in range(2)]
    assert torch.equal(torch.cat([half[:, None] for half in halves], 1).flatten(0, 1), first)
    few, _ = terms("oal", FIXED, {"vectors": rows(4, 8, "few"), "latents": rows(3, 5, "few")})
    assert few.drawn("latents", 16, Draw(0, 0)).shape == (16, 5)


def test_terms_start_alike_whatever_the_mode_and_the_source():
    """Same initialisation: a control differs from OAL in its outliers alone."""
    names = ("oal", "oal_zeros", "oal_noise_outliers")
    states = [terms(name, mode)[0].state_dict() for name in names for mode in MODES]
    for state in states[1:]:
        assert all(torch.equal(state[key], states[0][key]) for key in states[0])


def test_learning_rates_are_the_released_ones():
    for mode, scale in ((FAITHFUL, 0.02), (FIXED, 10.0)):
        classifier = build_classifier(1, CLASSES, ClassifierSettings())
        objective = Objective(classifier, 0.5, terms("oal", mode)[0])
        groups = parameter_groups(objective)
        assert [group.get("lr_scale", 1.0) for group in groups] == [1.0, 2.0, scale]
        assert sum(len(group["params"]) for group in groups) == len(list(objective.parameters()))


# --- MICL -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("scale", [0.39, 27.0])  # lengths of the released CIFAR-100 and CIFAR-10 vectors
def test_micl_has_no_direction(deep, scale):
    """Over random pairings mean bound and mean gradient are those of pure noise, whatever the network."""
    outliers = scale * torch.nn.functional.normalize(rows(64, 64, deep), dim=1)
    found = random_pairings(CLUB(64, 16, 32, deep=deep), outliers, rows(64, 16, "y").relu(), 400)
    assert abs(found.bounds.mean()) < 4 * found.bounds.std() / 20
    assert 0.6 / 20 < found.remaining < 1.6 / 20
    assert found.averaged[99] / found.lengths.mean() > 1.5 * found.remaining  # 1/10 after 100, 1/20 after 400


def test_a_pairing_that_means_something_has_a_direction():
    """The test above can fail: outliers that go with their features leave a gradient that does not average out."""
    club, features = CLUB(8, 8, 16), rows(64, 8, "paired")
    optimiser = torch.optim.Adam(club.parameters(), 1e-2)
    for _ in range(60):
        loss = club.likelihood_loss(features, features)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    y = features.clone().requires_grad_(True)
    gradient, = torch.autograd.grad(club.bound(features, y), y)
    assert gradient.norm() > 5 * random_pairings(club, features, features, 200).averaged[-1]
    assert club.bound(features, features).detach() > 1


# --- teachers ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ViTForImageClassification(ViTConfig(hidden_size=12, num_hidden_layers=1, num_attention_heads=2, image_size=16,
                                            intermediate_size=16, patch_size=8, num_labels=3)).save_pretrained(folder)
    return folder


def test_a_vision_transformer_can_teach(vit):
    teacher, images = VisionTransformer(vit, local_files_only=True), rows(4, 64, "images").view(4, 1, 8, 8).clamp(-1, 1)
    assert check_teacher(teacher, images, 3) == 12
    with torch.no_grad():
        larger = torch.nn.functional.interpolate(images.expand(-1, 3, -1, -1), (16, 16), mode="bilinear")
        assert torch.allclose(teacher.logits(teacher.features(images)), teacher.model(larger).logits, atol=1e-6)
    with pytest.raises(ValueError, match="fine-tune it on these 10 classes"):
        check_teacher(teacher, images, 10)


def test_teachers_that_are_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no image classifier"):
        VisionTransformer(tmp_path, local_files_only=True)
    with pytest.raises(ValueError, match="no logits"):
        check_teacher(torch.nn.Module(), torch.zeros(1, 1, 8, 8), 3)


# --- the study --------------------------------------------------------------------------------------------------------

def adam(steps):
    return TrainingSettings(steps=steps, batch_size=16, precision="fp32", warmup=0, ema=0.9)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A study of a few steps on the digits, two classes held out."""
    quick = replace(adam(2), optimiser="sgd", ema=0.0)
    tiny = replace(
        oal_study("smoke"), held_out=(3, 8), near=(("digits", "test"),), far=(("photos", "test"),), test_images=30,
        train_images=240, start=quick, further=quick, lessons=quick, autoencoder=adam(1), unet=adam(1), neighbours=5,
        bank=60, boundary=BoundarySettings(features=0, neighbours=8, boundary=4, noises=15, rounds=1),
        synthesis=SynthesisSettings(count=9, steps=2, guidance=2.0), counts=(3,))
    return OALRun(tiny, tmp_path_factory.mktemp("oal"), log=lambda line: None)


def test_held_out_classes_are_near_ood_and_nothing_else(run):
    parts = parts_of(run)
    assert [(part.name, part.group, part.classes) for part in parts] == [
        ("digits", "id", "0 1 2 4 5 6 7 9"), ("digits", "near", "3 8"), ("photos", "far", "")]
    assert set(train_set(run).labels) == set(range(8)) == set(parts[0].images.labels)
    assert set(parts[1].images.labels) == {3, 8} and not set(parts[0].images.index) & set(parts[1].images.index)
    assert train_set(run).classes == tuple("01245679") and set(suite(run).near) == {"digits (held out)"}


def test_the_controls_have_the_shape_and_length_of_what_they_replace(run):
    for mode in MODES:
        real = pools_of(run, training_named("oal"), mode, 9)
        assert real["latents"].shape == (9, 4 if mode is FAITHFUL else 8)
        for name in ("oal_noise_outliers", "oal_permuted_features"):
            found = pools_of(run, training_named(name), mode, 9)
            for key, values in found.items():
                assert values.shape == real[key].shape and not torch.allclose(values, real[key])
            assert torch.allclose(found["vectors"].norm(dim=1), real["vectors"].norm(dim=1), rtol=1e-4)
        assert not any(values.any() for values in pools_of(run, training_named("oal_zeros"), mode, 9).values())
    lengths = pools_of(run, training_named("oal"), FAITHFUL, 9)["vectors"].norm(dim=1)
    assert torch.allclose(lengths, torch.full_like(lengths, 27.06), rtol=1e-4)


def test_receipts_have_the_fixed_format_and_their_scores_make_the_numbers(run):
    oal = training_named("oal")
    paths = write_rows(run, "main", Trial(oal, FIXED, 0, 0)) + write_rows(run, "sweep", Trial(oal, FIXED, 3, 0))
    assert len(paths) == 2 * 4 + 2 and check(run.results) == []
    found = read_receipts(run.results)
    assert set(found.row_training) == {"oal"} and set(found.row_mode) == {"fixed"} and set(found.method) == {
        "energy", "msp", "knn", "gen"}
    assert set(zip(found.column_ood, found.column_group)) == {("digits", "near"), ("photos", "far")}
    assert set(found.variant_latents.dropna()) == {3} and (found.outliers.isin([3, 9])).all()
    stored = np.load(paths[0].with_suffix(".npz"))
    first = found.set_index("run").loc[paths[0].stem]
    assert abs(auroc(stored["score"], stored["is_ood"]) - first.auroc) < 1e-12
    assert abs(stored["right"][~stored["is_ood"]].mean() - first.id_accuracy) < 1e-12


def test_a_stable_diffusion_folder_and_a_transformer_take_the_embedded_ones_places(run, vit, tmp_path):
    """Naming the folders is the only switch: words of the prompt are replaced, colour pictures brought to size."""
    tiny_pipeline(tmp_path / "files").save_pretrained(tmp_path / "sd")
    study = replace(run.study, held_out=tuple(range(3, 10)), near=(("digits", "test"),), template="a digit {} here")
    other = OALRun(study, tmp_path, log=lambda line: None, sd_folder=tmp_path / "sd", teacher=vit)
    for name in ("oal", "oal_permuted_features", "kd_pixel_outliers"):
        paths = write_rows(other, "main", Trial(training_named(name), FIXED, 0, 0))
        assert other.kept["latent model"].condition.classes == ("0", "1", "2") and paths
    found = read_receipts(other.results)
    assert set(found.variant_diffusion) == {"sd"} and set(found.variant_teacher) == {vit.name}
    assert check(other.results) == []
    assert latents_of(other, FIXED).pictures.shape[1:] == (16, 16, 3)


def test_a_stage_depends_on_what_decides_it(run):
    """Another seed, mode, count or weight is another stage; the number of epochs of the teacher does not touch `ce`."""
    oal, ce = training_named("oal"), training_named("ce")
    keys = {trial_stage(run, trial).key for trial in (Trial(oal, FIXED, 0, 0), Trial(oal, FIXED, 3, 0))}
    assert len(keys) == 2
    other = OALRun(replace(run.study, lessons=replace(run.study.lessons, steps=3)), run.root, log=lambda line: None)
    assert trial_stage(run, Trial(ce, None, 0, 0)).key == trial_stage(other, Trial(ce, None, 0, 0)).key


def test_the_plan_names_what_is_spent(tmp_path):
    lines = plan("smoke", [0, 1, 2], tmp_path)
    assert any("common start, 3 seeds" in line and "600 steps" in line for line in lines)
    further = 3 * (len(trials_of(oal_study("smoke"), 0)) - 1)
    assert any(line.strip().startswith(f"{further} trainings") for line in lines)
    with pytest.raises(ValueError, match="unknown tier 'huge'"):
        plan("huge", [0], tmp_path)
    with pytest.raises(ValueError, match="unknown training 'oall'"):
        training_named("oall")


# --- contrasts --------------------------------------------------------------------------------------------------------

@pytest.fixture
def played(tmp_path):
    """Receipts of trainings with normal scores, `shift` apart; noise of their own, images in common."""
    def write(training, shift, seeds=(0, 1, 2), sampled=0):
        is_ood = np.repeat([False, True], [200, 200])
        for seed in seeds:
            for place, ood in enumerate(("photos", "noise")):
                images = np.random.default_rng([sampled, place]).normal(size=400) + shift * is_ood
                score = images + np.random.default_rng([seed, place, len(training)]).normal(scale=0.3, size=400)
                write_receipt(tmp_path, paper="oal", tier="smoke", table="main", seed=seed, score=score, is_ood=is_ood,
                              row={"id": "digits", "training": training, "mode": None}, method="energy", variant={},
                              column={"ood": ood, "group": "far"}, index=np.r_[:200, :200] + 1000 * sampled,
                              nfe_per_image=1, seconds=1.0, settings={},
                              arrays={"right": np.random.default_rng(seed).random(400) < 0.9 + 0.02 * shift})
        found = read_receipts(tmp_path)
        return found[found.row_training == training]
    return write


def test_contrasts_find_a_difference_and_none(played):
    weak, same, strong = played("weak", 1.0), played("same!", 1.0), played("strongest", 2.0)
    gain, none = contrast(strong, weak), contrast(same, weak)
    assert gain.verdict == "higher" and contrast(weak, strong).verdict == "lower" and gain.seeds == 3
    assert none.verdict == "no difference seen" and none.low < 0 < none.high
    assert abs(gain.difference - (strong.auroc.mean() - weak.auroc.mean())) < 1e-9
    one = contrast(strong[strong.seed == 0], weak[weak.seed == 0])
    assert one.seeds == 1 and one.low < one.difference < one.high
    right = contrast(strong, weak, "id_accuracy")
    assert 0 < right.difference < 0.06 and right.low < right.difference < right.high


def test_contrasts_of_different_things_are_refused(played):
    weak, strong = played("weak", 1.0), played("strong", 2.0, sampled=1)
    with pytest.raises(ValueError, match="scores of different images"):
        contrast(strong, weak)
    with pytest.raises(ValueError, match="one receipt per seed and OOD set"):
        contrast(weak[weak.seed < 2], weak)
    with pytest.raises(ValueError, match="one receipt per seed and OOD set"):
        contrast(pd.concat([weak, weak]), weak)
    with pytest.raises(ValueError, match="one receipt per seed and OOD set"):
        contrast(weak.iloc[:0], weak.iloc[:0])


def test_memory_is_counted_where_it_is_taken():
    weight = torch.zeros(1000, requires_grad=True)

    def step():
        (weight * 2).square().sum().backward()
        weight.grad = None

    assert peak_bytes(lambda: torch.zeros(250)) == 1000
    assert peak_bytes(lambda: [torch.zeros(250) for _ in range(9)]) == 9000
    assert 8000 <= peak_bytes(step) <= 24000
