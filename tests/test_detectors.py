"""Post-hoc scores against those of pytorch-ood and OpenOOD on one frozen feature set, and what a score may depend on.

`golden/detectors.npz`: ReLU features of a Gaussian mixture, 6 classes, 40 dimensions, 600 to fit, 200 ID and 200 OOD
queries, one linear head; the scores of pytorch-ood 0.4.0 and OpenOOD 3c35632 in double precision, larger = more OOD.
"""
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from oodrepro.classifying import ClassifierSettings, build_classifier
from oodrepro.detectors import (DETECTORS, FROM_FEATURES, Features, KNN, ViM, batches, class_vectors, detector, extract,
                                kth_largest, score_all, threshold_at, wrap_openood_postprocessor)
from oodrepro.losses import HEADS
from oodrepro.metrics import auroc
from oodrepro.settings import generator

GOLDEN = np.load(Path(__file__).parent / "golden" / "detectors.npz", allow_pickle=False)
IS_OOD = GOLDEN["is_ood"]
HYPER = {key.removeprefix("hyper__"): float(GOLDEN[key]) for key in GOLDEN.files if key.startswith("hyper__")}

# stored name: (ours, options)
SCORES = {"msp": ("msp", {}), "msp_t": ("msp", {"t": HYPER["temperature"]}), "maxlogit": ("max_logit", {}),
          "energy": ("energy", {}), "energy_t": ("energy", {"t": HYPER["temperature"]}),
          "gen": ("gen", {"gamma": HYPER["gen_gamma"]}),
          "gen_m": ("gen", {"gamma": HYPER["gen_gamma"], "M": int(HYPER["gen_M"])}),
          "mahalanobis": ("mahalanobis", {}), "rmd": ("rmd", {}), "knn": ("knn", {"k": int(HYPER["knn_k"])}),
          "knn_raw": ("knn", {"k": int(HYPER["knn_k"]), "normalize": False}),
          "vim": ("vim", {"d": int(HYPER["vim_dim"])}),
          "react": ("react", {"percentile": HYPER["react"]}),
          "ash_s": ("ash", {"variant": "ash-s", "percentile": HYPER["ash"]}),
          "ash_p": ("ash", {"variant": "ash-p", "percentile": HYPER["ash"]}),
          "ash_b": ("ash", {"variant": "ash-b", "percentile": HYPER["ash_b"]}),
          "scale": ("scale", {"percentile": HYPER["scale"]})}


class Frozen(nn.Module):
    """The frozen head; images (n, 40, 1, 1) are the features."""

    def __init__(self, kind=torch.float64):
        super().__init__()
        self.fc = nn.Linear(40, 6, dtype=kind)
        self.fc.weight.data = torch.from_numpy(GOLDEN["head_weight"]).to(kind)
        self.fc.bias.data = torch.from_numpy(GOLDEN["head_bias"]).to(kind)

    def features(self, images):
        return images.flatten(1)

    def logits(self, features):
        return self.fc(features)


def frozen_sets(kind=torch.float64):
    """(classifier, Features to fit on, Features of the 400 queries)."""
    net = Frozen(kind)
    queries = np.concatenate([GOLDEN["id_features"], GOLDEN["ood_features"]])
    fit, queries = (torch.from_numpy(part)[:, :, None, None].to(kind) for part in (GOLDEN["fit_features"], queries))
    return net, extract(net, fit, torch.from_numpy(GOLDEN["fit_labels"])), extract(net, queries)


def relative_error(found, stored):
    return np.abs(found.double().numpy() - stored).max() / np.abs(stored).max()


@pytest.mark.parametrize("name", SCORES)
def test_scores_are_pytorch_oods(name):
    ours, options = SCORES[name]
    stored = GOLDEN[f"pytorch_ood__{name}"]
    for kind, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4 if name in ("vim", "rmd") else 1e-5)):
        net, fit, queries = frozen_sets(kind)
        found = score_all({"it": detector(ours, net, **options)}, fit, {"all": queries})["it"]["all"]
        assert found.dtype == kind and relative_error(found, stored) < tolerance
        row = list(GOLDEN["compare__name"]).index(name)
        difference = abs(auroc(found.numpy(), IS_OOD) - GOLDEN["compare__values"][row, 1])
        assert difference < (1e-9 if kind == torch.float64 else 1e-4)


def openoods(name):
    """OpenOOD's stored scores in pytorch-ood's units: sums for means, scatter per sample, squared distances."""
    stored, n = GOLDEN[f"openood__{name}"], len(GOLDEN["fit_labels"])
    if name == "knn":
        return np.sqrt(stored)
    return stored / {"gen": 6, "gen_m": HYPER["gen_M"], "mahalanobis": 2 * n, "rmd": n}.get(name, 1)


@pytest.mark.parametrize("name", [name for name in SCORES if f"openood__{name}" in GOLDEN.files])
def test_scores_are_openoods(name):
    """Up to the factors in `openoods`; no ridge on its scatter, no clamp in GEN and a float32 index cost digits."""
    ours, options = SCORES[name]
    net, fit, queries = frozen_sets()
    found = score_all({"it": detector(ours, net, **options)}, fit, {"all": queries})["it"]["all"]
    tolerance = {"knn": 2e-6, "mahalanobis": 1e-6, "rmd": 1e-6, "gen": 1e-6, "gen_m": 1e-6}.get(name, 1e-9)
    assert relative_error(found, openoods(name)) < tolerance


def test_max_cosine_is_pytorch_metric_learnings():
    net, _, queries = frozen_sets()
    for one in (detector("max_cosine", net), detector("max_cosine", w=net.fc.weight)):
        assert relative_error(one.predict_extracted(queries), GOLDEN["pml__max_cosine"]) < 1e-9


@pytest.mark.parametrize("name", ["msp", "maxlogit", "energy", "gen"])
def test_saturated_logits(name):
    """Probabilities of 0 and 1 to the last bit."""
    logits = torch.from_numpy(GOLDEN["saturated__logits"])
    found = detector(SCORES[name][0]).predict_logits(logits)
    assert relative_error(found, GOLDEN[f"saturated__pytorch_ood__{name}"]) < 1e-9


def test_fitted_states_are_theirs():
    net, fit, _ = frozen_sets()
    vim = detector("vim", net, d=int(HYPER["vim_dim"])).fit_extracted(fit)
    assert abs(vim.alpha - GOLDEN["pytorch_ood_state__vim_alpha"]) < 1e-9 * abs(vim.alpha)
    react = detector("react", net, percentile=HYPER["react"]).fit_extracted(fit)
    assert abs(react.threshold - GOLDEN["pytorch_ood_state__react_threshold"]) < 1e-9 * react.threshold
    root = detector("mahalanobis").fit_extracted(fit).root
    precision = torch.cholesky_inverse(root).numpy()
    stored = GOLDEN["pytorch_ood_state__mahalanobis_precision"]
    assert np.abs(precision - stored).max() < 1e-9 * np.abs(stored).max()


# --- what a score may depend on -------------------------------------------------------------------------------------

class Small(nn.Module):
    """Images (n, 3, 4, 4) -> ReLU features -> logits, with batch normalisation and dropout that must be off."""

    def __init__(self, cosine=False):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.Dropout(0.5))
        self.fc = nn.Linear(24, 4)
        self.cosine = cosine

    def features(self, images):
        return self.body(images).mean((2, 3))

    def logits(self, features):
        if self.cosine:
            return 16 * F.normalize(features) @ F.normalize(self.fc.weight).T
        return self.fc(features)


@pytest.fixture(scope="module", params=["affine", "cosine"])
def trained(request):
    """(network in training mode, images, labels)."""
    torch.manual_seed(3)
    net = Small(request.param == "cosine")
    images = torch.rand(120, 3, 4, 4, generator=generator("detectors", "images")) * 2 - 1
    net.features(images)  # running statistics
    return net.train(), images, torch.arange(120) % 4


@pytest.mark.parametrize("name", DETECTORS)
def test_scores_do_not_depend_on_batch_order_or_door(trained, name):
    net, images, labels = trained
    options = {"knn": {"k": 5}, "odin": {"eps": 0.02}}.get(name, {})
    one = detector(name, net, **options).fit(images[:80], labels[:80], batch_size=80)
    reference = one.predict(images[80:])
    assert reference.shape == (40,) and torch.isfinite(reference).all() and len(reference.unique()) > 30
    order = torch.randperm(40, generator=generator("order"))
    close = dict(rtol=1e-4, atol=1e-5)
    for batch_size in (1, 7):
        assert torch.allclose(one.predict(images[80:][order], batch_size), reference[order], **close)
    loader = [{"data": x, "label": y} for x, y in batches(images[:80], labels[:80], 13)]
    again = detector(name, net, **options).fit(loader)
    assert torch.allclose(again.predict(images[80:]), reference, **close)
    if name in FROM_FEATURES:
        fit, queries = extract(net, images[:80], labels[:80], batch_size=11), extract(net, images[80:])
        shared = score_all({name: detector(name, net, **options)}, fit, {"queries": queries})[name]["queries"]
        assert torch.allclose(shared, reference, **close)
    assert net.training and net.body[1].training, "the mode is put back"
    assert all(parameter.grad is None for parameter in net.parameters())
    assert torch.equal(one.predict(images[80:]), reference), "asked twice, the same bits"


@pytest.mark.parametrize("name", DETECTORS)
def test_ood_rows_are_ignored_by_fitting(trained, name):
    net, images, labels = trained
    options = {"k": 5} if name == "knn" else {}
    mixed = torch.cat([labels[:80], torch.full((40,), -1)])
    clean = detector(name, net, **options).fit(images[:80], labels[:80])
    dirty = detector(name, net, **options).fit(images, mixed)
    assert torch.allclose(clean.predict(images[80:]), dirty.predict(images[80:]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", DETECTORS)
def test_thresholds_and_decisions(trained, name):
    net, images, labels = trained
    one = detector(name, net, **({"k": 5} if name == "knn" else {})).fit(images[:80], labels[:80])
    threshold = one.calibrate(images[80:], tpr=0.9)
    scores = one.predict(images[80:])
    assert threshold == threshold_at(scores, 0.9) and (scores <= threshold).float().mean() >= 0.9
    assert one.calibrate(scores, tpr=0.9) == threshold, "from scores, or from images"
    assert torch.equal(one.is_ood(images[80:]), scores > threshold)
    assert one.is_ood(images[80]) is bool(one.is_ood(images[80:81])[0])


@pytest.mark.parametrize("tpr", [0.05, 0.5, 0.95, 0.999, 1.0])
@pytest.mark.parametrize("n", [1, 19, 20, 100, 1000])
def test_threshold_is_the_smallest_that_accepts_enough(tpr, n):
    scores = torch.randn(n, generator=generator(n)).round(decimals=1)
    found = threshold_at(scores, tpr)
    enough = [float(t) for t in scores.unique() if (scores <= t).double().mean() >= tpr]
    assert found == min(enough)


# --- KNN ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, tolerance", [(torch.float64, 1e-12), (torch.float32, 3e-7)])
@pytest.mark.parametrize("memory", [1, 10_000, 2**27])
@pytest.mark.parametrize("k", [1, 10, 700])
def test_knn_is_exact_whatever_the_budget(kind, tolerance, memory, k):
    bank, query = (torch.randn(n, 16, generator=generator("knn", n)).to(kind) for n in (1000, 30))
    for normalize in (True, False):
        found = KNN(k=k, normalize=normalize, memory=memory).fit_features(bank).predict_features(query)
        near, far = (F.normalize(part.double()) if normalize else part.double() for part in (query, bank))
        exact = (near[:, None] - far).norm(dim=2).kthvalue(k, 1).values
        assert found.dtype == kind and (found - exact).abs().max() < tolerance * exact.max()


def test_knn_tells_close_neighbours_apart():
    """Distances of 1e-4 are lost in the rounding of a single-precision product, not in the score."""
    bank = F.normalize(torch.randn(500, 64, generator=generator("close")))
    query = F.normalize(bank + 1e-5 * torch.randn(500, 64, generator=generator("moved")))
    found = KNN(k=1).fit_features(bank).predict_features(query)
    exact = (F.normalize(query.double()) - F.normalize(bank.double())).norm(dim=1)
    assert (found - exact).abs().max() < 1e-6 and exact.max() < 2e-4


def test_knn_keeps_to_its_budget(monkeypatch):
    sizes = []
    monkeypatch.setattr("oodrepro.detectors.kth_largest",
                        lambda values, k: sizes.append(values.numel() * 4) or kth_largest(values, k))
    KNN(k=3, memory=100_000).fit_features(torch.rand(2000, 8) + 0.1).predict_features(torch.rand(100, 8) + 0.1)
    assert max(sizes) <= 100_000 and len(sizes) == 9


def test_knn_is_fast():
    """A twentieth of the aim (50,000 x 512 against 2,000): little is spent beside the matrix product itself."""
    bank, query = (torch.randn(n, 512, generator=generator("fast", n)) for n in (10_000, 500))
    knn, ratios = KNN(k=50).fit_features(bank), []
    block = torch.empty(500, 10_000)
    for _ in range(3):
        start = time.process_time()
        torch.mm(query, bank.T, out=block)
        product = time.process_time() - start
        knn.predict_features(query)
        ratios.append((time.process_time() - start - product) / product)
    assert min(ratios) < 3, ratios


# --- heads ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["softmax", "sphereface", "arcface"])
def test_class_vectors_of_heads(name):
    """Affine; |z| times a cosine; scale times a cosine: asked without knowing which."""
    weight, probe = torch.randn(5, 12, generator=generator("head")), torch.randn(9, 12, generator=generator("probe"))
    bias = torch.arange(5.0) if name == "softmax" else torch.zeros(5)
    heads = {"softmax": lambda z: z @ weight.T + bias, "arcface": lambda z: 30 * F.normalize(z) @ F.normalize(weight).T,
             "sphereface": lambda z: z @ F.normalize(weight).T}
    w, b = class_vectors(heads[name], probe)
    assert torch.allclose(F.normalize(w), F.normalize(weight), atol=1e-5) and torch.allclose(b, bias, atol=1e-5)


@pytest.mark.parametrize("loss", HEADS)
def test_classifiers_of_this_project(loss):
    """Every head of `losses`, asked through logits alone: its class vectors, and all thirteen detectors."""
    net = build_classifier(1, 4, ClassifierSettings(loss=loss), seed=1).eval()
    images = torch.rand(300, 1, 8, 8, generator=generator("net")) * 2 - 1
    found, labels = extract(net, images), torch.arange(300) % 4
    with torch.no_grad():
        expected = -net.head.cosine(found.features).amax(1)
    assert torch.allclose(detector("max_cosine", net).predict(images), expected, atol=1e-5)
    for name in DETECTORS:
        scores = detector(name, net, **({"k": 5} if name == "knn" else {})).fit(images, labels).predict(images)
        assert scores.shape == (300,) and torch.isfinite(scores).all(), name


def test_vim_on_a_head_of_lower_rank():
    """Rows that sum to zero up to rounding: the origin must not depend on that rounding."""
    weight = torch.from_numpy(GOLDEN["head_weight"])
    weight = weight - weight.mean(0)
    z, bias = torch.from_numpy(GOLDEN["fit_features"]), torch.from_numpy(GOLDEN["head_bias"])
    rounding = 1e-8 * torch.randn(6, 40, generator=generator("rounding"))
    origins = [ViM(d=16, w=(weight + noise).to(kind), b=bias.to(kind)).fit_features(z.to(kind)).u
               for kind in (torch.float32, torch.float64) for noise in (0.0, rounding)]
    reference = -np.linalg.pinv(weight.double().numpy(), rcond=1e-4) @ bias.double().numpy()
    for origin in origins:
        assert np.abs(origin.numpy() - reference).max() < 1e-4 * np.abs(reference).max()


# --- adapters -------------------------------------------------------------------------------------------------------

class Postprocessor:
    """OpenOOD's protocol with ViM's needs: the training set's features, the head, energies."""

    def setup(self, net, id_loader_dict, ood_loader_dict):
        assert not net.training and all(set(batch) == {"data", "label"} for batch in id_loader_dict["train"])
        self.w, self.b = net.get_fc()
        assert isinstance(self.w, np.ndarray)

    @torch.no_grad()
    def postprocess(self, net, data):
        logits, feature = net(data, return_feature=True)
        ours = feature.numpy() @ self.w.T + self.b
        assert np.abs(ours - logits.numpy()).max() < 1e-4
        assert torch.equal(net.forward_threshold(data, 1e9), logits)
        return logits.argmax(1), torch.logsumexp(logits, 1)


def test_openood_confidences_change_sign_and_join_the_others():
    net, fit, queries = frozen_sets(torch.float32)
    wrapped = wrap_openood_postprocessor(Postprocessor(), net.train())
    found = score_all({"theirs": wrapped, "ours": detector("energy", net)}, fit, {"all": queries})
    assert torch.allclose(found["theirs"]["all"], found["ours"]["all"], rtol=1e-6)
    assert auroc(found["theirs"]["all"].numpy(), IS_OOD) > 0.7 and net.training
    wrapped.calibrate(found["theirs"]["all"][:200])
    assert wrapped.is_ood(queries.features[:, :, None, None]).shape == (400,)


@pytest.mark.parametrize("name", FROM_FEATURES)
def test_every_detector_refuses_nan(name):
    net, fit, queries = frozen_sets(torch.float32)
    one = detector(name, net).fit_extracted(fit)
    broken = Features(queries.features.clone(), queries.logits.clone())
    broken.features[5, 3] = broken.logits[5, 3] = torch.nan
    with pytest.raises(ValueError, match="1 of 400 rows of (features|logits) hold NaN or infinity, the first in row 5"):
        one.predict_extracted(broken)
