"""Samplers against the LMD authors' code, run in float64 on stored noise (tests/golden/lmd)."""
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from oodrepro.denoisers import Denoiser, SubVP, noise_schedule
from oodrepro.sampling import UNCONDITIONAL, inpaint, inpaint_em

GOLDEN = Path(__file__).parent / "golden" / "lmd"


def golden(name):
    return np.load(GOLDEN / f"{name}.npz", allow_pickle=False)


def network(kind, shape, dtype):
    """The two networks of nets.npz: exact for Gaussian pixels, and a small convolution."""
    nets = golden("nets")
    value = {key: torch.from_numpy(np.asarray(nets[f"{shape}_{key}"])).to(dtype)
             for key in ("mu", "s2", "W1", "b1", "c1", "W2", "b2")}

    def gauss(x, label):
        alpha, sigma = SubVP().level(label.double() / 999)
        return sigma.to(dtype) * (x - alpha.to(dtype) * value["mu"]) / (alpha**2 * value["s2"] + sigma**2).to(dtype)

    def conv(x, label):
        tau = label / 999
        hidden = torch.tanh(F.conv2d(x, value["W1"], value["b1"], padding=1) + tau * value["c1"].view(1, -1, 1, 1))
        return tau * x + F.conv2d(hidden, value["W2"], value["b2"], padding=1)

    return {"gauss": gauss, "conv": conv}[kind]


def tape(arrays, shape, dtype):
    """The authors' noise in their drawing order: one draw to start, two a step."""
    yield torch.from_numpy(arrays[f"{shape}_z_init"]).to(dtype)
    for known, step in zip(arrays[f"{shape}_z_known"], arrays[f"{shape}_z_step"]):
        yield torch.from_numpy(known).to(dtype)
        yield torch.from_numpy(step).to(dtype)


CASES = [(steps, key) for steps in (10, 100, 1000) for key in golden(f"sampler_N{steps}").files if key.endswith("_out")]


@pytest.mark.parametrize("steps, key", CASES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_em_is_the_authors_sampler(steps, key, dtype, tolerance):
    arrays = golden(f"sampler_N{steps}")
    shape, board, kind, _ = key.split("_")
    known = 2 * torch.from_numpy(arrays[f"{shape}_x0"]).to(dtype) - 1
    mask = torch.from_numpy(arrays[f"{shape}_{board}_mask"]).to(dtype)
    denoiser = Denoiser(network(kind, shape, dtype), SubVP())
    painted = inpaint_em(denoiser, known, mask, steps, tape(arrays, shape, dtype).__next__)
    assert np.abs((painted.double().numpy() + 1) / 2 - arrays[key]).max() < tolerance


def test_the_hole_keeps_its_last_noise():
    """The authors return the last noisy state: the noise-free mean would be 1e-4 away, far above the tolerance."""
    arrays = golden("sampler_N100")
    key = next(key for key in arrays.files if key.endswith("_out_mean"))
    assert np.abs(arrays[key] - arrays[key.replace("_out_mean", "_out")]).max() > 1e-4


def test_sub_vp_levels():
    arrays, schedule = golden("schedule"), SubVP()
    for steps in (10, 100, 1000):
        t = torch.from_numpy(arrays[f"N{steps}_t"])
        assert np.abs(torch.linspace(1, 1e-3, steps, dtype=torch.float64).numpy() - t.numpy()).max() < 1e-12
        alpha, sigma = schedule.level(t)
        for name, ours in (("alpha", alpha), ("sigma", sigma), ("beta", schedule.beta(t)),
                           ("g2", schedule.diffusion_squared(t))):
            assert np.abs(ours.numpy() - arrays[f"N{steps}_{name}"]).max() < 1e-12, name


@pytest.mark.parametrize("sampler", UNCONDITIONAL)
@pytest.mark.parametrize("schedule", ["sub_vp", "ddpm_linear", "ddpm_cosine"])
def test_every_sampler_serves_every_schedule(sampler, schedule):
    """With a network that knows the images exactly, the hole is painted with them, whatever it was trained under."""
    truth = torch.linspace(-0.8, 0.8, 64).view(1, 1, 8, 8)
    own = noise_schedule(schedule)

    def oracle(x, label):
        alpha, sigma = own.level(label.double() / 999)
        return (x - alpha.float() * truth) / sigma.float()

    mask = torch.ones(8, 8)
    mask[2:6, 2:6] = 0
    # Euler-Maruyama overshoots where g^2 / (sigma^2 steps) > 2, which at its last times takes about a thousand steps.
    painted = inpaint(Denoiser(oracle, own), truth, mask, sampler, 1000 if sampler == "em" else 40, [5])
    assert (painted - truth).abs().max() < (0.01 if sampler == "em" else 1e-4)
