"""Training against the LMD authors' loss and optimiser (tests/golden/lmd/loss.npz); interruption and damage."""
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from oodrepro.denoisers import Denoiser, DenoiserSettings, SubVP, build_unet, diffusion_loss
from oodrepro.lmd_study import lmd_study
from oodrepro.training import TrainingSettings, ema_decay_at, fit, learning_rate_at

GOLDEN = Path(__file__).parent / "golden" / "lmd"


def golden(name):
    return np.load(GOLDEN / f"{name}.npz", allow_pickle=False)


class Conv(nn.Module):
    """The small network of nets.npz, with its weights as parameters."""

    def __init__(self):
        super().__init__()
        nets = golden("nets")
        for name in ("W1", "b1", "c1", "W2", "b2"):
            self.register_parameter(name, nn.Parameter(torch.from_numpy(nets[f"b_{name}"]).double()))

    def forward(self, x, label):
        tau = (label / 999).view(-1, 1, 1, 1)
        hidden = torch.tanh(F.conv2d(x, self.W1, self.b1, padding=1) + tau * self.c1.view(1, -1, 1, 1))
        return tau * x + F.conv2d(hidden, self.W2, self.b2, padding=1)


def times(u):
    return torch.from_numpy(u).double() * (1 - SubVP.t_min) + SubVP.t_min


def test_loss_and_gradients_are_the_authors():
    arrays, net = golden("loss"), Conv()
    images = 2 * torch.from_numpy(arrays["x0"]).double() - 1
    noise, t = torch.from_numpy(arrays["z"]).double(), times(arrays["u"])
    assert np.abs(t.numpy() - arrays["t"]).max() < 1e-12
    loss = diffusion_loss(net, images, t, noise, SubVP())
    assert abs(loss.item() - float(arrays["conv_loss"])) < 1e-10
    loss.backward()
    for name, weights in net.named_parameters():
        assert np.abs(weights.grad.numpy() - arrays[f"conv_grad_{name}"]).max() < 1e-10, name
    zero = diffusion_loss(lambda x, label: torch.zeros_like(x), images, t, noise, SubVP())
    assert abs(zero.item() - float(arrays["zero_loss"])) < 1e-10


def test_five_steps_are_the_authors(tmp_path):
    """The whole loop: warm-up from zero, clipping, Adam, and the moving average with its ramp."""
    arrays = golden("loss")
    settings = TrainingSettings(steps=5, batch_size=4, learning_rate=2e-4, warmup=int(arrays["steps_warmup"]),
                                decay="constant", clip=float(arrays["steps_clip"]), ema=0.9999, precision="fp32",
                                checkpoint_every=100)
    images = 2 * torch.from_numpy(arrays["steps_x0"]).double() - 1

    def loss(model, draw):
        noise = torch.from_numpy(arrays["steps_z"][draw.step]).double()
        return diffusion_loss(model, images[draw.step], times(arrays["steps_u"][draw.step]), noise, SubVP())

    for step in range(5):
        assert abs(learning_rate_at(step, settings) - arrays["steps_lr"][step]) < 1e-15
        session = fit(Conv(), loss, settings, tmp_path, stop_after=1, log=lambda line: None)
        average = torch.cat([weights.detach().flatten() for weights in session.model.parameters()]).numpy()
        assert np.abs(average - arrays["steps_ema"][step]).max() < 1e-10
        kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
        weights = torch.cat([kept[name].flatten() for name in ("W1", "b1", "c1", "W2", "b2")]).numpy()
        assert np.abs(weights - arrays["steps_params"][step]).max() < 1e-10
    ramp = [ema_decay_at(update, 0.9999) for update in range(1, 201)]
    assert np.abs(np.array(ramp) - arrays["ema_decay_first_200"]).max() < 1e-12


SCRIPT = textwrap.dedent("""
    import sys, torch
    from oodrepro.denoisers import DenoiserSettings, train_denoiser
    from oodrepro.training import TrainingSettings
    torch.set_num_threads(1)
    images = torch.zeros(32, 8, 8, 1, dtype=torch.uint8)
    images[:, ::2] = 255
    settings = DenoiserSettings(widths=(8, 16), attention=(False, True), dropout=0.1, flip=True)
    training = TrainingSettings(steps=60, batch_size=8, precision="fp32", checkpoint_every=5)
    denoiser, trained = train_denoiser(images, settings, training, sys.argv[1])
    torch.save({"net": denoiser.net.state_dict(), "history": trained.history}, sys.argv[2])
""")


def test_killed_training_resumes_to_the_same_bits(tmp_path):
    """kill -9 in the middle, twice, against a run that was left in peace."""
    def run(folder, result):
        return subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder), str(result)], stdout=subprocess.DEVNULL)

    assert run(tmp_path / "whole", tmp_path / "whole.pt").wait(timeout=300) == 0
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    for _ in range(2):
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        process = run(tmp_path / "killed", tmp_path / "killed.pt")
        limit = time.time() + 120
        while process.poll() is None and time.time() < limit and \
                (not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert checkpoint.exists()
    assert run(tmp_path / "killed", tmp_path / "killed.pt").wait(timeout=300) == 0
    whole, killed = (torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "killed.pt"))
    assert whole["history"] == killed["history"]
    assert all(torch.equal(weights, killed["net"][name]) for name, weights in whole["net"].items())


def test_weights_of_another_shape_are_refused(tmp_path):
    small = DenoiserSettings(widths=(8, 16), attention=(False, False))
    Denoiser(build_unet(1, 8, small), SubVP()).save_pretrained(tmp_path / "own")
    other = build_unet(1, 8, DenoiserSettings(widths=(16, 16), attention=(False, False)))
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "own/unet/diffusion_pytorch_model.safetensors").write_bytes(
        (tmp_path / "other/diffusion_pytorch_model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="own is not a complete denoiser folder"):
        Denoiser.from_pretrained(tmp_path / "own")


def test_the_papers_network_has_the_authors_size():
    """35,218,947 parameters there; diffusers' U-Net of the same widths differs by its attention layers."""
    expected = int(golden("unet")["n_params"][0])
    with torch.device("meta"):
        net = build_unet(3, 32, lmd_study("paper").denoiser)
    assert abs(sum(weights.numel() for weights in net.parameters()) / expected - 1) < 0.05


def test_weights_that_ship_load_by_name_and_know_their_images():
    for cells in lmd_study("laptop").rows:
        denoiser = Denoiser.from_pretrained(f"lmd-{cells.id}", local_files_only=True)
        assert denoiser.shape == (1, 28, 28) and denoiser.card["data"]["name"] == cells.id
