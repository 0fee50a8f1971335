"""label_mixup: the sampler against a slow one, regeneration in every setting, the gate against loops; the study's hygiene."""
from importlib import resources
from itertools import combinations

import numpy as np
import pytest
import torch

from oodrepro import report
from oodrepro.denoisers import Denoiser
from oodrepro.embedded import digits, noise
from oodrepro.images import ImageSet
from oodrepro.label_mixup import (MIXES, ConditionalSettings, Order, Outliers, Recipe, build_conditional_unet, choose_pairs,
                                  class_distances, class_table, for_classes, mixed_vectors, mixing_weights, orders,
                                  precursor, quality, regenerate, synthesise)
from oodrepro.denoisers import noise_schedule
from oodrepro.label_mixup_study import (KINDS, Case, MixupRun, experiments, label_mixup_study, msp, outliers_of, pixel_mixup,
                                        plan, shared_source)
from oodrepro.published import published
from oodrepro.receipts import read_receipts, write_receipt
from oodrepro.reproduce import find_paper
from oodrepro.settings import generator

SMALL = ConditionalSettings(widths=(8, 8), attention=(False, True))


def denoiser(seed=0, dropout=0.0, prediction="epsilon"):
    """Untrained, so that its images are noise; all that is asked here is which noise."""
    net = build_conditional_unet(1, 8, 5, SMALL.but(label_dropout=dropout), seed).eval()
    return Denoiser(net, noise_schedule("ddpm_linear"), prediction, {"classes": 5})


# --- sampling -------------------------------------------------------------------------------------------------------

def slow_ddim(model, vector, seed, steps, guidance=1.0):
    """DDIM with eta 0 of one image, from the formulas of Song et al. 2021, with the class vector put in by hand."""
    signal = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float32), 0).double()
    times = [round(1000 - 1000 / steps * k) - 1 for k in range(steps)]
    x = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(seed))[None]
    unet, table = model.net, model.net.class_embedding
    for place, t in enumerate(times):
        unet.class_embedding = torch.nn.Identity()
        with torch.no_grad():
            eps = unet(x, t, class_labels=vector[None]).sample
            if guidance != 1:
                free = unet(x, t, class_labels=table.weight[-1:]).sample
                eps = free + guidance * (eps - free)
        unet.class_embedding = table
        now, after = signal[t], signal[times[place + 1]] if place + 1 < steps else torch.tensor(1.0, dtype=torch.float64)
        clean = ((x.double() - (1 - now).sqrt() * eps) / now.sqrt()).clamp(-1, 1)
        eps = (x.double() - now.sqrt() * clean) / (1 - now).sqrt()  # of the clipped estimate
        x = (after.sqrt() * clean + (1 - after).sqrt() * eps).float()
    return x[0].clamp(-1, 1)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_an_outlier_is_what_ddim_makes_of_the_mixed_vector(mix, guidance):
    model = denoiser(dropout=0.0 if guidance == 1 else 0.1)
    recipe = Recipe(per_pair=2, mix=mix, sampler="ddim", steps=5, batch_size=4, guidance=guidance)
    made = synthesise(model, [(1, 3), (0, 4)], recipe)
    table = model.net.class_embedding.weight.detach()
    for image, (_, first, second, (a, b), seed) in zip(made.images, orders([(1, 3), (0, 4)], recipe)):
        slow = slow_ddim(model, a * table[first] + b * table[second], seed, 5, guidance)
        assert np.abs(image[..., 0] / 127.5 - 1 - slow[0].numpy()).max() < 1 / 127.5 / 2 + 1e-3


@pytest.mark.parametrize("sampler, steps", [("ddpm", 6), ("ddim", 4), ("dpm++", 4)])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_every_image_regenerates_to_the_same_bits(sampler, steps, batch_size, guidance, tmp_path):
    model = denoiser(dropout=0.1)
    recipe = Recipe(per_pair=2, mix="convex", sampler=sampler, steps=steps, batch_size=batch_size, guidance=guidance)
    made = synthesise(model, [(0, 1), (2, 4)], recipe)
    loaded = Outliers.load(made.save(tmp_path))
    for position in range(len(made)):
        image, digest = regenerate(model, loaded.manifest, position)
        assert np.array_equal(image, made.images[position])
        assert digest == made.manifest["images"]["floats"][position]


def test_an_image_does_not_depend_on_what_else_is_in_its_batch():
    model, recipe = denoiser(), Recipe(per_pair=4, batch_size=4, steps=4)
    alone, among = synthesise(model, [(1, 2)], recipe), synthesise(model, [(1, 2), (0, 3), (3, 4)], recipe)
    assert alone.manifest["images"]["floats"] == among.manifest["images"]["floats"][:4]
    assert synthesise(model, [(1, 2)], recipe).manifest == alone.manifest
    assert len(set(among.manifest["images"]["floats"])) == 12


@pytest.mark.parametrize("change", [{"seed": 1}, {"mix": "average"}, {"sampler": "ddim"}, {"steps": 5}])
def test_whatever_the_recipe_says_changes_the_images(change):
    model, recipe = denoiser(), Recipe(per_pair=1, batch_size=2, steps=4)
    first, second = (synthesise(model, [(0, 1)], one) for one in (recipe, recipe.but(**change)))
    assert first.manifest["images"]["floats"] != second.manifest["images"]["floats"]


def test_saved_outliers_are_byte_stable_and_kept_ones_keep_their_numbers(tmp_path):
    model, recipe = denoiser(), Recipe(per_pair=5, batch_size=4, steps=3)
    made = synthesise(model, [(0, 1)], recipe)
    files = [{path.name: path.read_bytes() for path in made.save(tmp_path / name).iterdir()} for name in "ab"]
    assert files[0] == files[1] and set(files[0]) == {"outliers.npz", "manifest.json"}
    kept = made.keep([False, True, False, False, True] * np.ones(5, bool))
    assert kept.manifest["images"]["number"] == [1, 4] and np.array_equal(kept.images, made.images[[1, 4]])
    assert len(made) == 5 == len(made.manifest["images"]["seed"])


def test_broken_weights_are_not_taken_for_outliers():
    model = denoiser()
    with torch.no_grad():
        model.net.conv_out.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        synthesise(model, [(0, 1)], Recipe(per_pair=1, batch_size=1, steps=2))


@pytest.mark.parametrize("vectors", [torch.zeros(3), torch.zeros(2, 7), torch.zeros(2, 2, 32)])
def test_vectors_of_another_shape_are_refused(vectors):
    with pytest.raises(ValueError, match=r"vectors must be \(n, 32\)"):
        for_classes(denoiser(), vectors)


def test_mixed_vectors_are_weighted_sums():
    table = class_table(denoiser())
    wanted = [Order(0, 1, 3, (0.3, 0.7), 5), Order(1, 2, 2, (1.0, 0.0), 6)]
    slow = [a * table[first] + b * table[second] for _, first, second, (a, b), _ in wanted]
    assert torch.equal(mixed_vectors(table, wanted), torch.stack(slow))
    assert sum(mixing_weights("convex", 11)) == pytest.approx(1)


def test_the_precursor_is_what_its_sheet_says():
    network, training = precursor()
    with torch.device("meta"):
        net = build_conditional_unet(3, 32, 10, network)
    assert [kind for kind in net.config.down_block_types].index("AttnDownBlock2D") == 4
    assert [kind for kind in net.config.up_block_types].index("AttnUpBlock2D") == 1
    assert net.class_embedding.weight.shape == (10, 512) and net.config.layers_per_block == 2
    assert (training.learning_rate, training.batch_size, training.warmup, training.ema) == (1e-5, 32, 500, 0)


# --- pairs and the gate ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("classes", [2, 3, 7])
def test_near_and_far_are_the_ends_of_one_order(classes):
    points = torch.rand(classes, 4, generator=generator("pairs", classes)).numpy()
    distances = class_distances(np.repeat(points, 3, 0), np.repeat(np.arange(classes), 3))
    for a, b in combinations(range(classes), 2):
        assert distances[a, b] == pytest.approx(np.linalg.norm(points[a] - points[b]), abs=1e-6)
    every = choose_pairs("all", classes)
    whole = [choose_pairs(kind, classes, distances, len(every)) for kind in ("near", "far")]
    assert set(whole[0]) == set(every) and whole[0] == whole[1][::-1]
    count = -(-len(every) // 4)
    assert choose_pairs("near", classes, distances) == whole[0][:count]


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 2, 2], [1, 2, 3]])
def test_class_distances_needs_every_class(labels):
    with pytest.raises(ValueError, match="labels must be 0 to C - 1"):
        class_distances(np.zeros((3, 2)), labels)


def test_the_gate_is_what_loops_find():
    draws = generator("gate")
    logits, held = (3 * torch.randn(count, 4, generator=draws) for count in (30, 40))
    features, held_features, train = (torch.rand(count, 6, generator=draws) for count in (30, 40, 50))
    pairs = torch.randint(4, (30, 2), generator=draws).numpy()
    found = quality(pairs, logits, features, held, held_features, train, k=4, confident=0.2)
    least = np.quantile(held.double().softmax(1).amax(1), 0.2)
    usual = [sorted((train.double() - point).norm(dim=1).tolist())[3] for point in held_features.double()]
    for row, line in enumerate(found.itertuples()):
        chance = logits[row].double().softmax(0)
        distance = sorted((train.double() - features[row].double()).norm(dim=1).tolist())[3]
        assert line.entropy == pytest.approx(-(chance * chance.log()).sum().item())
        assert line.top1 == chance.argmax() and line.looks_id == (chance.max() >= least)
        assert line.looks_like_parent == (chance.max() >= least and int(chance.argmax()) in pairs[row])
        assert line.distance == pytest.approx(distance, abs=1e-6)
        assert line.distance_rank == pytest.approx(np.mean([value < distance for value in usual]))


def test_msp_ranks_as_the_probability_and_does_not_saturate():
    logits = 4 * torch.randn(200, 10, generator=generator("msp"), dtype=torch.float64)
    assert np.allclose(msp(logits.numpy()), -logits.softmax(1).amax(1).log().numpy())
    sure = np.zeros((3, 10))
    sure[:, 0] = 30, 60, 300
    assert (np.diff(msp(sure)[:2]) < 0).all() and msp(sure)[2] >= 0
    assert len(np.unique(msp(sure[:2]).astype(np.float32))) == 2
    for wrong in (np.zeros((3, 1)), np.zeros(3), np.full((2, 3), np.inf)):
        with pytest.raises(ValueError, match="logits must be finite"):
            msp(wrong)


# --- the study ------------------------------------------------------------------------------------------------------

def test_no_outlier_is_a_test_image(tmp_path):
    run = MixupRun(label_mixup_study("smoke"), tmp_path)
    tests = {image.tobytes() for name in ("digits", *run.oods) for image in run.test(name).images}
    for kind in ("pixel_mixup", "real", "noise"):
        shown = outliers_of(run, Case(outliers=kind))
        assert len(shown) == 45 * run.study.recipe.per_pair
        assert not tests & {image.tobytes() for image in shown.images}, kind
    assert not tests & {image.tobytes() for image in run.images("digits", "train").images}


@pytest.mark.parametrize("tier", ["smoke", "laptop", "gpu", "paper"])
def test_the_controls_are_alike_in_all_but_their_images(tier):
    study = label_mixup_study(tier)
    by_table = {}
    for table, case, every_seed in experiments(study):
        by_table.setdefault(table, []).append((case, every_seed))
    base = Case(study.control_losses[0], "mixup")
    assert (base, True) in by_table["table1"]
    for case, every_seed in by_table["controls"]:
        assert case == Case(case.loss, case.outliers) and every_seed and case.loss in study.repeated
    assert {case.outliers for case, _ in by_table["table1"]} == {"none", "mixup"}
    assert {case.pairs for case, _ in by_table["pairs"]} == {"near", "far"}
    assert study.real[0] != study.id and not shared_source(study, "mixup", "noise")
    assert study.accuracy_images >= study.test_images
    assert all(isinstance(value, (str, int, float, bool)) for kind in KINDS for value in Case(outliers=kind).variant(9).values())


def test_pixel_mixup_is_the_mean_of_two_images():
    images = ImageSet(np.array([0, 255, 100, 101], np.uint8).reshape(4, 1, 1, 1), np.array([0, 1, 2, 3]))
    assert pixel_mixup(images, [(0, 1), (2, 3), (0, 2)], 2, 0).ravel().tolist() == [128, 128, 101, 101, 50, 50]
    for pairs, problem in (([(0, 9)], "no image of class"), ([], "no class pairs")):
        with pytest.raises(ValueError, match=problem):
            pixel_mixup(images, pairs, 1, 0)


def test_the_paper_is_registered_with_its_plan(tmp_path):
    paper = find_paper("ddpm_label_mixup")
    assert paper.module == "oodrepro.label_mixup_study"
    lines = plan("smoke", [0, 1], tmp_path, None)
    assert label_mixup_study("smoke").hash in lines[0] and not list(tmp_path.iterdir())


# --- what the paper reports -----------------------------------------------------------------------------------------

def test_none_of_the_papers_numbers_is_known():
    table = published("ddpm_label_mixup")
    assert set(table.certainty) == {"unknown"} and table.value.isna().all()
    assert set(table.row_loss) == {"softmax", "sphereface", "cosface", "arcface", "adacos"}


def test_typing_one_number_into_the_file_is_all_it_takes(tmp_path):
    text = (resources.files("oodrepro") / "published" / "ddpm_label_mixup.yaml").read_text(encoding="utf-8")
    unread = "value: null, convention: *unread, source: *unread_source, certainty: unknown"
    assert unread in text.split("cells:")[0]  # the instructions at the head of the file
    place = text.index(unread, text.index("loss: arcface, outliers: mixup"))
    typed = 'value: 0.75, convention: "AUROC", source: "a table", certainty: published'
    (tmp_path / "ddpm_label_mixup.yaml").write_text(text[:place] + typed + text[place + len(unread):], encoding="utf-8")
    is_ood = np.repeat([False, True], 50)
    write_receipt(tmp_path / "results", paper="ddpm_label_mixup", tier="gpu", table="table1", method="msp", variant={}, seed=0,
                  row={"id": "cifar10", "loss": "arcface", "outliers": "mixup"}, column={"ood": "cifar100", "group": "near"},
                  score=np.random.default_rng(0).normal(size=100) + is_ood, is_ood=is_ood, index=np.r_[:50, :50],
                  nfe_per_image=1, seconds=1.0, settings={})
    cells = report.compare(read_receipts(tmp_path / "results"), published("ddpm_label_mixup", tmp_path), table="table1",
                           rows=("row_id", "row_loss", "row_outliers"))
    judged = cells[cells.ours.notna()]
    assert judged.paper.tolist() == [0.75] and judged.verdict.tolist() == ["inside interval"]
    assert (cells[cells.ours.isna()].verdict == "not run").all() and len(cells) == 30


def test_digits_and_noise_stay_what_the_study_takes_them_for():
    assert len(digits("train")) >= 1000 and sorted(set(digits("train").labels)) == list(range(10))
    assert noise("train", 8, 5).images.shape == (5, 8, 8, 1)
    assert not np.array_equal(noise("train", 8, 5).images, noise("test", 8, 5).images)
