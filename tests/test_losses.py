"""Heads, outlier terms, distillation and CLUB against numbers of the reference implementations (tests/golden)."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from oodrepro import losses
from oodrepro.training import TrainingSettings, build_optimiser

GOLDEN = Path(__file__).parent / "golden"


def golden(name):
    """Arrays of a file as tensors."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def assert_close(ours, theirs, relative=1e-10, zero=1e-12):
    """Equal up to `relative` of the largest entry."""
    error = (torch.as_tensor(ours).detach() - theirs).abs().max().item()
    assert error <= relative * theirs.abs().max().item() + zero, error


@pytest.fixture(scope="module")
def heads():
    return golden("losses_heads")


# --- AdaCos ---------------------------------------------------------------------------------------------------------

def test_adacos_is_the_reference_over_four_batches():
    arrays = golden("losses_adacos")
    classes, width = arrays["weight"].shape
    head = losses.build_head("adacos", width, classes).double()
    head.weight.data = arrays["weight"].clone()
    head.scale = arrays["s0"].clone()
    for batch in range(int(arrays["n_batches"])):
        start = f"batch{batch}__"
        now = {key.removeprefix(start): value for key, value in arrays.items() if key.startswith(start)}
        assert_close(head.scale, now["s_before"])
        features = now["features"].clone().requires_grad_()
        head.zero_grad()
        loss = head.loss(features, now["labels"])
        loss.backward()
        assert_close(head.scale, now["s"])
        assert_close(loss, now["loss"])
        assert_close(features.grad, now["grad_features"])
        assert_close(head.weight.grad, now["grad_weight"])
        head.eval().loss(features, now["labels"])
        assert_close(head.scale, now["s"])  # evaluation does not renew it
        assert_close(head.logits(features), now["logits"])
        assert_close(head.cosine(features), now["cosine"])
        head.train()


def test_adacos_settles_where_its_probability_is_one_half():
    """At the ideal simplex of ten classes: s = 1.978, cross-entropy ln 2 (sheet, section 1.4)."""
    head = losses.build_head("adacos", 10, 10).double()
    simplex = torch.eye(10, dtype=torch.float64) - 0.1
    head.weight.data = simplex.clone()
    for _ in range(200):
        loss = head.loss(simplex, torch.arange(10))
    assert abs(head.scale.item() - 1.978) < 1e-3 and abs(loss.item() - math.log(2)) < 1e-6


# --- heads of pytorch-metric-learning -------------------------------------------------------------------------------

CASES = {
    "pml_arcface": ("arcface", {"scale": 64}), "pml_arcface_s30": ("arcface", {}),
    "pml_cosface": ("cosface", {"scale": 64}), "pml_cosface_s30": ("cosface", {}),
    "pml_sphereface_m4": ("sphereface", {"eased": False}),
    "pml_sphereface_m2": ("sphereface", {"eased": False, "margin": 2}),
    "pml_normalized_softmax": ("normalized_softmax", {}), "pml_normalized_softmax_t1": ("normalized_softmax",
                                                                                        {"temperature": 1.0})}


@pytest.mark.parametrize("case", CASES)
def test_heads_are_the_librarys(heads, case):
    name, options = CASES[case]
    weight, features = heads["pml_weight"], heads["pml_features"].clone().requires_grad_()
    head = losses.build_head(name, *weight.shape, **options).double()
    head.criterion.W.data = weight.clone()
    loss = head.loss(features, heads["pml_labels"])
    loss.backward()
    assert_close(loss, heads[f"{case}__loss"])
    assert_close(features.grad, heads[f"{case}__grad_features"])
    assert_close(head.criterion.W.grad, heads[f"{case}__grad_weight"])
    assert_close(head.logits(features), heads[f"{case}__margin_free_logits"])
    cosine = F.normalize(heads["pml_features"]) @ F.normalize(weight, dim=0)
    assert_close(head.cosine(features), heads.get(f"{case}__cosine", cosine))


@pytest.mark.parametrize("name", ["arcface", "cosface"])
def test_heads_are_the_adacos_papers_where_both_agree(heads, name):
    """4uiiurz1's heads differ beyond pi - m (rows 0-3) and on the class vector (rows 4-5) alone."""
    scale, margin = heads[f"{name}__s_m"].tolist()
    rows = slice(6, None) if name == "arcface" else slice(None)
    head = losses.build_head(name, heads["weight"].shape[1], heads["weight"].shape[0], scale=scale,
                             margin=math.degrees(margin) if name == "arcface" else margin).double()
    head.criterion.W.data = heads["weight"].T.clone()
    theirs = F.cross_entropy(heads[f"{name}__logits"][rows], heads["labels"][rows])
    assert_close(head.loss(heads["features"][rows], heads["labels"][rows]), theirs)


@pytest.mark.parametrize("name", [*losses.HEADS, "pml:SubCenterArcFaceLoss", "pml:LargeMarginSoftmaxLoss",
                                  "pml:ProxyAnchorLoss", "pml:SoftTripleLoss"])
def test_every_head_keeps_its_promises(name):
    """Learnable weights inside the module, full precision under autocast, rank of classes, a loss that falls."""
    draws = torch.Generator().manual_seed(0)
    centres, labels = torch.randn(4, 8, generator=draws), torch.arange(64) % 4
    features = F.relu(centres[labels] + 0.3 * torch.randn(64, 8, generator=draws))
    head = losses.build_head(name, 8, 4, seed=1)
    assert len(list(head.parameters())) >= 1 and head.logits(features).shape == (64, 4)
    with torch.autocast("cpu", torch.bfloat16):
        half = head.logits(features.bfloat16())
        assert torch.equal(half, head.logits(features.bfloat16().float())) and half.dtype == torch.float32
        assert head.loss(features.bfloat16(), labels).dtype == torch.float32
    optimiser = torch.optim.SGD(head.parameters(), 0.1)
    before = head.loss(features, labels).item()
    for _ in range(30):
        optimiser.zero_grad()
        head.loss(features, labels).backward()
        optimiser.step()
    assert head.loss(features, labels).item() < before
    again = losses.build_head(name, 8, 4, seed=1)
    again.load_state_dict(head.state_dict())
    assert torch.equal(again.logits(features), head.logits(features)), "the checkpoint holds all there is"


def test_cosine_of_heads_with_many_vectors_per_class():
    assert losses.build_head("pml:SubCenterArcFaceLoss", 8, 4).cosine(torch.ones(2, 8)).shape == (2, 4)
    with pytest.raises(ValueError, match="SoftTripleLoss has no single vector per class"):
        losses.build_head("pml:SoftTripleLoss", 8, 4).cosine(torch.ones(2, 8))


@pytest.mark.parametrize("name", losses.HEADS)
def test_feature_of_norm_zero(name):
    head, features = losses.build_head(name, 8, 4), torch.ones(3, 8)
    features[1] = 0
    labels = torch.tensor([0, 1, 2])
    lost = features.clone().requires_grad_()
    head.loss(lost, labels).backward()
    assert torch.isfinite(lost.grad).all(), "training goes on"
    with pytest.raises(ValueError, match="1 of 3 features have norm 0 .first in row 1."):
        head.eval().cosine(features)
    assert (head.cosine(features, allow_zero=True)[1].abs() < 1e-6).all()


def test_sphereface_is_eased_in_over_training_steps(heads):
    """The loss runs from that without margin to that with a sixth of it; evaluation leaves the counter alone."""
    weight, features, labels = heads["pml_weight"], heads["pml_features"], heads["pml_labels"]
    head = losses.build_head("sphereface", *weight.shape).double()
    head.criterion.W.data = weight.clone()
    cosine, norms = head.cosine(features).detach(), features.norm(dim=1)
    for step in (0, 1, 100, 5000):
        head.criterion.steps.fill_(step)
        ease = max(5.0, 1000 / (1 + 0.12 * step))
        logits = head.logits(features).clone()
        for row, label in enumerate(labels):
            theta = math.acos(cosine[row, label])
            k = math.floor(4 * theta / math.pi)
            psi = (-1) ** k * math.cos(4 * theta) - 2 * k
            logits[row, label] = norms[row] * (ease * cosine[row, label] + psi) / (1 + ease)
        assert_close(head.loss(features, labels), F.cross_entropy(logits, labels), relative=1e-6)
        assert head.criterion.steps == step + 1
        head.eval().loss(features, labels)
        assert head.train().criterion.steps == step + 1


# --- outliers -------------------------------------------------------------------------------------------------------

def test_outlier_exposure_is_the_reference():
    arrays = golden("losses_outliers")
    own, foreign = (arrays[f"{kind}_logits"].clone().requires_grad_() for kind in ("id", "ood"))
    term = losses.uniform_cross_entropy(foreign)
    assert_close(term, arrays["hendrycks_oe_term"])
    total = F.cross_entropy(own, arrays["id_labels"]) + 0.5 * term
    total.backward()
    for who in ("hendrycks", "openood"):
        assert_close(total, arrays[f"{who}_total"])
        assert_close(own.grad, arrays[f"{who}_grad_id_logits"])
        assert_close(foreign.grad, arrays[f"{who}_grad_ood_logits"])
    probabilities = foreign.detach().softmax(1)
    assert_close(foreign.grad, 0.5 * (probabilities - 1 / 6) / 12)


def test_energy_loss_is_the_reference():
    arrays = golden("losses_outliers")
    own, foreign = (arrays[f"{kind}_logits"].clone().requires_grad_() for kind in ("id", "ood"))
    total = F.cross_entropy(own, arrays["id_labels"]) + 0.1 * losses.energy_margin_loss(own, foreign)
    total.backward()
    assert_close(total, arrays["pytorch_ood_energy_regularised"])
    theirs = arrays["pytorch_ood_energy_regularised_grad"]
    id_first = torch.cat([own.grad, foreign.grad])
    assert_close(id_first, theirs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite(bad):
    logits = torch.zeros(5, 3)
    logits[3, 1] = bad
    fine = torch.zeros(5, 3)
    for call in (lambda: losses.uniform_cross_entropy(logits), lambda: losses.energy_margin_loss(fine, logits),
                 lambda: losses.energy_margin_loss(logits, fine), lambda: losses.distillation_loss(fine, logits)):
        with pytest.raises(ValueError, match="NaN or infinity in 1 of 5 rows .first: 3."):
            call()


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[1e4, 0.0, 0.0, -1e4]])
    assert losses.uniform_cross_entropy(logits).item() == 1e4
    assert losses.energy_margin_loss(logits, -logits).isfinite()


# --- distillation ---------------------------------------------------------------------------------------------------

def test_distillation_is_oals():
    arrays = golden("oal_losses_kd")
    student = arrays["student_logits"].clone().requires_grad_()
    loss = losses.distillation_loss(student, arrays["teacher_logits"])
    loss.backward()
    assert_close(loss, arrays["logit_loss"])
    assert_close(student.grad, arrays["logit_loss_grad_student"])


LAYERS = {"pre_norm": "0", "mlp1": "1", "norm1": "3"}  # of the projector


def load_projector(module, arrays, prefix):
    """Weights called `prefix`pre_norm_weight and so on."""
    module.load_state_dict({f"{place}.{kind}": arrays[f"{prefix}{layer}_{kind}"] for layer, place in LAYERS.items()
                            for kind in ("weight", "bias")}, strict=False)
    return module


def test_feature_distillation_and_projector_are_oals():
    arrays = golden("oal_losses_kd")
    projector = load_projector(losses.FeatureProjector(*arrays["dt__dims"].tolist()).double(), arrays, "dt__")
    student = arrays["student_feature"].clone().requires_grad_()
    projected = projector(arrays["teacher_feature"])
    assert_close(projected, arrays["dt_output_train"])
    loss = losses.feature_distillation_loss(student, projected)
    loss.backward()
    assert_close(loss, arrays["feature_loss"])
    assert_close(student.grad, arrays["feature_loss_grad_student"])
    for layer, place in LAYERS.items():
        for kind in ("weight", "bias"):
            gradient = projector.get_parameter(f"{place}.{kind}").grad
            assert_close(gradient, arrays[f"feature_loss_grad_dt__{layer}_{kind}"])
    for layer in ("pre_norm", "norm1"):
        for kind in ("running_mean", "running_var"):
            assert_close(projector.get_buffer(f"{LAYERS[layer]}.{kind}"), arrays[f"dt_after__{layer}_{kind}"])
    assert_close(projector.eval()(arrays["teacher_feature"]), arrays["dt_output_eval"])


# --- CLUB -----------------------------------------------------------------------------------------------------------

def load_club(club, arrays, prefix):
    """Weights called `prefix`p_mu_0_weight and so on."""
    state = {f"{key[:key.index('_', 2)]}.{number}.{kind}": arrays[f"{prefix}{key}"]
             for key in (name.removeprefix(prefix) for name in arrays if name.startswith(f"{prefix}p_"))
             for *_, number, kind in [key.split("_")]}
    club.load_state_dict(state)
    return club


@pytest.fixture(params=["club", "deep_club"])
def club(request):
    """(network with the stored weights, its arrays)"""
    arrays = {key.removeprefix(f"{request.param}__"): value for key, value in golden("oal_losses_club").items()
              if key.startswith(f"{request.param}__")}
    network = losses.CLUB(*arrays["dims"].tolist(), deep=request.param == "deep_club").double()
    return load_club(network, arrays, "w_"), arrays


@pytest.mark.parametrize("ours, theirs", [("bound", "bound"), ("likelihood_loss", "learning_loss")])
def test_club_is_the_released_one(club, ours, theirs):
    network, arrays = club
    x, y = (arrays[name].clone().requires_grad_() for name in "xy")
    assert_close(network.p_mu(x), arrays["mu"])
    assert_close(network.p_logvar(x), arrays["logvar"])
    value = getattr(network, ours)(x, y)
    value.backward()
    assert_close(value, arrays[theirs])
    for name, variable in (("x", x), ("y", y)):
        assert_close(variable.grad, arrays[f"{theirs}_grad_{name}"])
    for name, weights in network.named_parameters():
        gradient = torch.zeros_like(weights) if weights.grad is None else weights.grad
        assert_close(gradient, arrays[f"{theirs}_grad_w_{name.replace('.', '_')}"])


@pytest.mark.parametrize("club", ["club"], indirect=True)
def test_club_is_that_of_its_own_authors(club):
    network, arrays = club
    theirs = golden("oal_losses_club")
    assert_close(network.bound(arrays["x"], arrays["y"]), theirs["linear95_club__bound"])
    assert_close(network.likelihood_loss(arrays["x"], arrays["y"]), theirs["linear95_club__learning_loss"])


def test_released_micl_is_zero_over_all_pairings(club):
    """Value and every gradient; a weight in front does not help."""
    network, arrays = club
    y, total = arrays["y"].clone().requires_grad_(), 0.0
    for shift, theirs in enumerate(arrays["cyclic_bounds"]):
        value = network.bound(arrays["x"], y.roll(shift, 0))
        assert_close(value, theirs)
        total = total + value / len(y)
    total.backward()
    assert total.abs() < 1e-13 and y.grad.abs().max() < 1e-13
    assert all(weights.grad.abs().max() < 1e-13 for weights in network.parameters())


def test_one_pairing_does_have_a_gradient(club):
    """So the zero above is no accident of a dead network."""
    network, arrays = club
    y = arrays["y"].clone().requires_grad_()
    network.bound(arrays["x"], y).backward()
    assert y.grad.abs().max() > 1e-4


def test_gradients_by_differences():
    draws = torch.Generator().manual_seed(0)
    x, y, z = (torch.randn(5, width, generator=draws, dtype=torch.float64, requires_grad=True) for width in (4, 3, 3))
    club, contrast = losses.CLUB(4, 3, hidden=6).double(), losses.InfoNCE(4, 3).double()
    energy, labels = losses.EnergyLogistic().double(), torch.tensor([0, 0, 1, 1, 1])
    for call, inputs in ((club.bound, (x, y)), (club.likelihood_loss, (x, y)), (losses.distillation_loss, (y, z)),
                         (losses.uniform_cross_entropy, (y,)), (energy, (y, z)),
                         (lambda a, b: losses.energy_margin_loss(a, b, -2.0, -1.0), (y, z)),
                         (lambda a, b: contrast(a, b, labels), (x, y))):
        assert torch.autograd.gradcheck(call, inputs)


def test_infonce_is_a_loop_over_pairs():
    draws = torch.Generator().manual_seed(1)
    contrast = losses.InfoNCE(6, 4, temperature=0.2).double()
    outliers, features = (torch.randn(7, width, generator=draws, dtype=torch.float64) for width in (6, 4))
    labels, away, costs = torch.tensor([0, 1, 0, 2, 1, 0, 3]), contrast.projector(outliers), []
    for i in range(7):
        for j in range(7):
            if i != j and labels[i] == labels[j]:
                good = (F.cosine_similarity(features[i], features[j], 0) / 0.2).exp()
                bad = sum((F.cosine_similarity(features[i], outlier, 0) / 0.2).exp() for outlier in away)
                costs.append(-(good / (good + bad)).log())
    assert len(costs) == 8
    assert_close(contrast(outliers, features, labels), torch.stack(costs).mean())


def test_infonce_moves_features_away_from_outliers():
    """Gradient steps on free features raise their cosine within classes and lower it to outliers; order is nothing."""
    draws = torch.Generator().manual_seed(0)
    contrast, outliers = losses.InfoNCE(6, 4), torch.randn(16, 6, generator=draws)
    features, labels = torch.randn(12, 4, generator=draws, requires_grad=True), torch.arange(12) % 3

    def cosines():
        with torch.no_grad():
            unit, away = F.normalize(features), F.normalize(contrast.projector(outliers))
            same = (labels[:, None] == labels) & ~torch.eye(12, dtype=torch.bool)
            return (unit @ unit.T)[same].mean().item(), (unit @ away.T).mean().item()

    before = cosines()
    optimiser = torch.optim.SGD([features], 0.5)
    for step in range(60):
        optimiser.zero_grad()
        contrast(outliers[torch.randperm(16, generator=draws)], features, labels).backward()
        optimiser.step()
    assert cosines()[0] > before[0] + 0.2 and cosines()[1] < before[1] - 0.2


# --- OAL's training step, whole -------------------------------------------------------------------------------------

class Student(nn.Module):
    """The small network of the stored steps; the ReLU's output is the feature."""

    def __init__(self):
        super().__init__()
        self.l1, self.l2 = nn.Linear(10, 8), nn.Linear(8, 10)

    def forward(self, x):
        features = F.relu(self.l1(x))
        return features, self.l2(features)


def teach(arrays, data):
    """(features, logits) of the frozen teacher."""
    features = torch.tanh(F.linear(data, arrays["teacher__body_weight"], arrays["teacher__body_bias"]))
    return features, F.linear(features, arrays["teacher__head_weight"], arrays["teacher__head_bias"])


def flat(modules):
    """{name as in the file: weights}"""
    found = {}
    for net, module in modules.items():
        for name, weights in module.named_parameters():
            for layer, place in LAYERS.items() if isinstance(module, losses.FeatureProjector) else ():
                name = name.replace(f"{place}.", f"{layer}.")
            if isinstance(module, losses.EnergyLogistic):
                name = name.replace("linear", "0")
            found[f"{net}__{name.replace('.', '_')}"] = weights
    return found


def two_steps(arrays, modules, loss_of, groups):
    """Run both steps and compare losses and, more telling, every weight's change with the stored ones."""
    for name, weights in flat(modules).items():
        weights.data = arrays[f"before__{name}"].clone()
    base, _, decay, *_ = arrays["optimizer"].tolist()
    optimiser = build_optimiser(groups, TrainingSettings(optimiser="sgd", learning_rate=base, weight_decay=decay))
    for step in range(2):
        for group, rate in zip(optimiser.param_groups, arrays["lr_used"][step].tolist(), strict=True):
            group["lr"] = rate
        optimiser.zero_grad()
        loss = loss_of(step)
        assert_close(loss, arrays["losses"][step])
        loss.backward()
        optimiser.step()
        for name, weights in flat(modules).items():
            before = arrays[f"before__{name}"]
            assert_close(weights - before, arrays[f"after{step + 1}__{name}"] - before, relative=1e-9)


def test_two_training_steps_are_oals():
    arrays = golden("oal_losses_step")
    modules = {"student": Student().double(), "dt": losses.FeatureProjector(12, 8).double(),
               "club": losses.CLUB(12, 8, 16).double(), "deep_club": losses.CLUB(64, 8, 16, deep=True).double()}

    def loss_of(step):
        data, labels = arrays[f"data{step}"], arrays[f"label{step}"]
        features, logits = modules["student"](data)
        teacher_features, teacher_logits = teach(arrays, data)
        parts = {"kl_logit": losses.distillation_loss(logits, teacher_logits),
                 "kl_feature": losses.feature_distillation_loss(features, modules["dt"](teacher_features)),
                 "club": modules["club"].bound(arrays["knn_outliers"][arrays[f"pick{step}_knn"]], features),
                 "deep_club": modules["deep_club"].bound(arrays["sd_vectors"][arrays[f"pick{step}_sd"]], features)}
        for name, value in parts.items():
            assert_close(value, arrays[f"part__{name}"][step], relative=1e-9)
        return F.cross_entropy(logits, labels) + 4 * parts["kl_logit"] + 8 * parts["kl_feature"] + \
            0.1 * parts["club"] + 0.2 * parts["deep_club"]

    groups = [{"params": list(modules[name].parameters())} for name in ("student", "dt")]
    groups += [{"params": list(getattr(modules[name], part).parameters())} for name in ("club", "deep_club")
               for part in ("p_mu", "p_logvar")]
    two_steps(arrays, modules, loss_of, groups)


def test_two_training_steps_of_the_energy_ablation_are_oals():
    arrays = golden("oal_losses_energy")
    modules = {"student": Student().double(), "dt1": losses.FeatureProjector(12, 8).double(),
               "lr1": losses.EnergyLogistic().double(), "dt2": losses.FeatureProjector(64, 8).double(),
               "lr2": losses.EnergyLogistic().double()}

    def loss_of(step):
        data, labels = arrays[f"data{step}"], arrays[f"label{step}"]
        features, logits = modules["student"](data)
        first = modules["dt1"](arrays["knn_outliers"][arrays[f"pick{step}_knn"]])
        second = modules["dt2"](arrays["sd_vectors"][arrays[f"pick{step}_sd"]])
        energy = modules["lr1"](features, first) + modules["lr2"](features, second)
        distilled = losses.distillation_loss(logits, teach(arrays, data)[1])
        return F.cross_entropy(logits, labels) + 4 * distilled + 2.5 * energy

    two_steps(arrays, modules, loss_of, [{"params": list(module.parameters())} for module in modules.values()])


@pytest.mark.parametrize("options, words", [
    ({"x_dim": 3, "y_dim": 2, "deep": True}, "x_dim >= 4"), ({"x_dim": 3, "y_dim": 0}, "y_dim >= 1")])
def test_club_dimensions(options, words):
    with pytest.raises(ValueError, match=words):
        losses.CLUB(**options)
