"""Backbones: batch statistics over two real processes, seeds, gradients, images of any size, what is refused."""
import pytest
import torch
from torch import distributed, multiprocessing, nn

from oodrepro.classifiers import SharedBatchNorm, build_backbone

NAMES = ("small_cnn", "resnet18", "wrn40_2")


def batch(count=8, channels=3, side=8, seed=0, dtype=torch.float32):
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


def normalised_by(rank, folder):
    """One of two processes: its half of a batch through a convolution and a shared normalisation."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    net = build_net(SharedBatchNorm)
    share = batch(dtype=torch.float64)[rank::2].requires_grad_()
    out = net(share)
    (out.pow(3).mean()).backward()
    torch.save({"out": out.detach(), "image gradient": share.grad, "buffers": dict(net[1].named_buffers()),
                "gradients": [weights.grad for weights in net.parameters()]}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def build_net(normalisation):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), normalisation(4)).double()
    nn.init.normal_(net[1].weight)
    nn.init.normal_(net[1].bias)
    return net


def test_two_processes_normalise_by_one_batch(tmp_path):
    multiprocessing.spawn(normalised_by, (str(tmp_path),), nprocs=2)
    net, images = build_net(nn.BatchNorm2d), batch(dtype=torch.float64).requires_grad_()
    out = net(images)
    out.pow(3).mean().backward()
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for rank, part in enumerate(parts):
        assert torch.allclose(part["out"], out[rank::2], rtol=0, atol=1e-12)
        # a process's loss is the mean over its half, so its gradients count twice
        assert torch.allclose(part["image gradient"] / 2, images.grad[rank::2], rtol=0, atol=1e-12)
        for name, buffer in net[1].named_buffers():
            assert torch.allclose(part["buffers"][name], buffer, rtol=0, atol=1e-12), name
    for first, second, weights in zip(*(part["gradients"] for part in parts), net.parameters()):
        assert torch.allclose((first + second) / 2, weights.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_weights_come_from_the_seed_alone(name):
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = build_backbone(name, 1, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's randomness is left alone"
    torch.manual_seed(2)
    second, other = build_backbone(name, 1, seed=5), build_backbone(name, 1, seed=6)
    for a, b in zip(first.state_dict().values(), second.state_dict().values()):
        assert torch.equal(a, b)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", [8, 28])
def test_every_weight_gets_a_gradient(name, side):
    backbone = build_backbone(name, 1)
    features = backbone(batch(2, 1, side))
    assert features.shape == (2, backbone.width) and (features >= 0).all()
    features.pow(2).sum().backward()
    assert all(weights.grad is not None and weights.grad.abs().max() > 0 for weights in backbone.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_in_evaluation_an_image_stands_alone(name):
    backbone = build_backbone(name, 3).eval()
    with torch.no_grad():
        together = backbone(batch(4))
        alone = torch.cat([backbone(image[None]) for image in batch(4)])
    assert torch.allclose(together, alone, atol=1e-5 * together.max())


def test_activations_neither_die_nor_explode():
    """He initialisation keeps the size of features within a factor of ten through all depths."""
    for name in NAMES:
        features = build_backbone(name, 3)(batch(16, side=16))
        assert 0.1 < features.mean().item() < 10, name


def test_dropout_acts_in_training_only():
    backbone = build_backbone("wrn40_2", 1, dropout=0.5)
    plain = build_backbone("wrn40_2", 1)
    assert all(torch.equal(a, b) for a, b in zip(backbone.parameters(), plain.parameters()))
    images = batch(2, 1)
    assert not torch.equal(backbone(images), backbone(images))
    assert torch.equal(backbone.eval()(images), backbone(images))


@pytest.mark.parametrize("arguments, words", [
    ({"name": "vgg"}, "unknown backbone 'vgg'"), ({"name": "small_cnn", "channels": 0}, "at least 1, got 0"),
    ({"name": "wrn40_2", "dropout": 1.0}, r"must lie in \[0, 1\)"), ({"name": "small_cnn", "dropout": 0.1}, "only wrn40_2")])
def test_what_cannot_be_built(arguments, words):
    with pytest.raises(ValueError, match=words):
        build_backbone(**{"channels": 1, **arguments})


@pytest.mark.parametrize("images", [torch.zeros(2, 1, 8, 8), torch.zeros(3, 8, 8), torch.zeros(2, 8, 8, 3),
                                    torch.zeros(2, 3, 8, 8, dtype=torch.int64)])
def test_images_of_another_kind(images):
    with pytest.raises(ValueError, match=r"takes floating-point images \(n, 3, h, w\)"):
        build_backbone("small_cnn", 3)(images)
