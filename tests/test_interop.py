"""Parity with pytorch-ood, where it is installed (`make test-interop`): our detectors, its own, its own in our wrapper.

pytorch-ood needs torchvision, which does not import beside the CPU build of torch that the project is pinned to, so
these tests live in an environment of their own and are skipped elsewhere.
"""
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from oodrepro.detectors import FROM_FEATURES, detector, extract, score_all, wrap_pytorch_ood

theirs = pytest.importorskip("pytorch_ood.detector", exc_type=ImportError,
                             reason="pytorch-ood (extra [interop]) is not installed here; `make test-interop` has it")
GOLDEN = np.load(Path(__file__).parent / "golden" / "detectors.npz", allow_pickle=False)


class Network(nn.Module):
    """Images (n, 40, 1, 1) that are the frozen features, a convolution that may mix them, and the frozen head."""

    def __init__(self, mix: bool = False):
        super().__init__()
        self.mix = nn.Conv2d(40, 40, 1, bias=False) if mix else nn.Identity()
        self.fc = nn.Linear(40, 6)
        self.fc.weight.data = torch.from_numpy(GOLDEN["head_weight"])
        self.fc.bias.data = torch.from_numpy(GOLDEN["head_bias"])

    def maps(self, images):
        return self.mix(images).relu()

    def features(self, images):
        return self.maps(images).flatten(1)

    def logits(self, features):
        return self.fc(features.flatten(1))

    def forward(self, images):
        return self.logits(self.features(images))


def images(name):
    return torch.from_numpy(GOLDEN[name])[:, :, None, None]


def pairs(net, images_too=True):
    """{name: (ours, theirs)} on one network, with equal options."""
    options = {"msp": {"t": 2.0}, "energy": {"t": 2.0}, "gen": {"M": 4}, "knn": {"k": 20}, "vim": {"d": 16},
               "ash": {"variant": "ash-b", "percentile": 0.8}, "scale": {"percentile": 0.85}, "odin": {"eps": 0.05}}
    built = {"msp": theirs.MaxSoftmax(net, t=2.0), "max_logit": theirs.MaxLogit(net),
             "energy": theirs.EnergyBased(net, t=2.0), "gen": theirs.GEN(net, M=4), "odin": theirs.ODIN(net, eps=0.05),
             "mahalanobis": theirs.Mahalanobis(net.features), "rmd": theirs.RMD(net.features),
             "knn": theirs.KNN(net.features, k=20),
             "vim": theirs.ViM(net.features, d=16, w=net.fc.weight, b=net.fc.bias),
             "react": theirs.ReAct(net.maps, net.logits), "ash": theirs.ASH(net.maps, net.logits, "ash-b", 0.8),
             "scale": theirs.SCALE(net.maps, net.logits, 0.85)}
    return {name: (detector(name, net, **options.get(name, {})), inner) for name, inner in built.items()}


def close(ours, other, name):
    """Equal up to single precision, which theirs computes scatter matrices and residuals in."""
    largest = float(other.abs().max())
    return float((ours - other).abs().max()) <= (1e-4 if name in ("mahalanobis", "rmd", "vim") else 1e-5) * largest


@pytest.mark.parametrize("name", ["msp", "max_logit", "energy", "gen", "odin", "mahalanobis", "rmd", "knn", "vim",
                                  "react", "ash", "scale"])
@pytest.mark.parametrize("mix", [False, True])
def test_on_images(name, mix):
    """Fitted on images and asked about images: theirs, ours, and theirs in our wrapper."""
    torch.manual_seed(0)
    net = Network(mix).eval()
    ours, inner = pairs(net)[name]
    wrapped = wrap_pytorch_ood(inner)
    labels, queries = torch.from_numpy(GOLDEN["fit_labels"]), torch.cat([images("id_features"), images("ood_features")])
    ours.fit(images("fit_features"), labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.fit(images("fit_features"), labels)
    found, other = ours.predict(queries), inner.predict(queries).detach()
    assert close(found, other, name)
    assert close(wrapped.predict(queries).to(other), other, "exact") and len(other) == 400
    threshold = wrapped.calibrate(images("id_features"))
    assert wrapped.is_ood(queries).tolist() == (wrapped.predict(queries) > threshold).tolist()


def test_wrapped_detectors_share_extracted_features():
    """Their detectors and ours from one extraction; the network is not run again."""
    net = Network().eval()
    fit = extract(net, images("fit_features"), torch.from_numpy(GOLDEN["fit_labels"]))
    sets = {"id": extract(net, images("id_features")), "ood": extract(net, images("ood_features"))}
    both = {name: parts for name, parts in pairs(net).items() if name in FROM_FEATURES}
    ours = score_all({name: parts[0] for name, parts in both.items()}, fit, sets)
    other = score_all({name: wrap_pytorch_ood(parts[1]) for name, parts in both.items()}, fit, sets)
    assert set(ours) == set(other) and len(other) == 11
    for name in ours:
        for place in sets:
            assert close(ours[name][place], other[name][place].to(ours[name][place]), name), (name, place)


def others(net):
    """{name: a detector of theirs that we have not}, with the options of the stored scores."""
    return {"entropy": theirs.Entropy(net), "klm": theirs.KLMatching(net), "she": theirs.SHE(net.features, net.logits),
            "fdbd": theirs.fDBD(net.features, net.fc),
            "dice": theirs.DICE(net.features, net.fc.weight, net.fc.bias, p=0.7)}


@pytest.mark.parametrize("name", ["entropy", "klm", "she", "fdbd", "dice"])
def test_detectors_that_only_they_have_come_in_by_the_wrapper(name):
    net = Network().eval()
    fit = extract(net, images("fit_features"), torch.from_numpy(GOLDEN["fit_labels"]))
    queries = extract(net, torch.cat([images("id_features"), images("ood_features")]))
    found = score_all({name: wrap_pytorch_ood(others(net)[name])}, fit, {"all": queries})[name]["all"]
    stored = GOLDEN[f"pytorch_ood__{name}"]
    assert np.abs(found.detach().numpy() - stored).max() < 1e-5 * np.abs(stored).max()
