"""LMD's masks, distances and aggregation against the authors' code (tests/golden/lmd), and what a score may depend on."""
from pathlib import Path

import numpy as np
import pytest
import torch

from oodrepro.denoisers import Denoiser, DenoiserSettings, InpaintingDenoiser, SubVP, build_unet, noise_schedule
from oodrepro.distances import DISTANCES, distance_function, mse, squeezenet_features, ssim
from oodrepro.lift_map_detect import LiftMapDetect, reduce_by_hole
from oodrepro.masks import center, checkerboard, mask_of_repetition, random_mask
from oodrepro.metrics import auroc
from oodrepro.sampling import SAMPLERS
from oodrepro.settings import generator

GOLDEN = Path(__file__).parent / "golden" / "lmd"


def golden(name):
    return np.load(GOLDEN / f"{name}.npz", allow_pickle=False)


def numbers(key):
    """The numbers in a key such as random_s32_p4_r0.5_seed3, by their letters."""
    parts = {}
    for word in key.split("_")[1:]:
        letters = word.rstrip("0123456789.")
        if letters != word:
            parts[letters] = float(word[len(letters):])
    return parts


MASKS = [key for key in golden("masks").files if not key.endswith("_perm") and golden("masks")[key].ndim == 2
         and key.split("_")[0] in ("checkerboard", "center", "random")]


@pytest.mark.parametrize("key", MASKS)
def test_masks_are_the_authors(key):
    expected, given = golden("masks")[key], numbers(key)
    side = int(given["s"])
    if key.startswith("checkerboard_alt"):
        mask = mask_of_repetition("checkerboard_alt", side, int(given["rep"]), int(given["nb"]))
    elif key.startswith("checkerboard"):
        mask = checkerboard(side, int(given["nb"]))
    elif key.startswith("center"):
        mask = center(side)
    else:
        mask = random_mask(side, int(given["p"]), given["r"], int(given["seed"]), as_released=True)
    assert mask.numpy().astype(np.uint8).tolist() == expected.tolist()


def test_refused_blocks_are_the_authors():
    for side, blocks in golden("masks")["rejected_side_blocks"]:
        with pytest.raises(ValueError, match=f"side {side} cannot be cut into {blocks} blocks"):
            checkerboard(int(side), int(blocks))


@pytest.mark.parametrize("name, function", [("mse", mse), ("ssim", ssim)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 5e-6)])
def test_distances_are_the_authors(name, function, dtype, tolerance):
    arrays = golden("detect")
    for side in ("id", "ood"):
        original = 2 * torch.from_numpy(arrays[f"{side}_orig"]).to(dtype) - 1
        recon = 2 * torch.from_numpy(arrays[f"{side}_recon"]).to(dtype) - 1
        expected = arrays[f"{side}_{name}"]
        expected = 1 - expected if name == "ssim" else expected  # theirs is a similarity, its sign not turned
        assert np.abs(function(original, recon).double().numpy() - expected).max() < tolerance


@pytest.mark.parametrize("repeats", [1, 2, 3, 4, 5, 10])
@pytest.mark.parametrize("name", ["mse", "ssim"])
def test_medians_and_auroc_are_the_authors(name, repeats):
    arrays, scores = golden("detect"), []
    for side in ("id", "ood"):
        median = reduce_by_hole(torch.from_numpy(arrays[f"{side}_{name}"][:repeats].T), [repeats])[:, 0]
        assert np.abs(median.numpy() - arrays[f"{side}_{name}_median{repeats}"]).max() < 1e-12
        scores.append(median.numpy() if name == "mse" else -median.numpy())
    is_ood = np.repeat([False, True], [len(part) for part in scores])
    found = auroc(np.concatenate(scores), is_ood)
    expected = float(arrays[f"auroc_{name}_reps{repeats}"])
    assert min(abs(found - expected), abs(1 - found - expected)) < 1e-12  # a similarity left unflipped gives 1 - AUROC


TINY = DenoiserSettings(widths=(16, 32), attention=(False, True))


@pytest.fixture(scope="module")
def denoiser():
    """An untrained U-Net: what it paints is nonsense, but the same nonsense whatever the batch."""
    return Denoiser(build_unet(1, 8, TINY).eval(), SubVP())


@pytest.fixture(scope="module")
def painter():
    """The same, given the known pixels."""
    return InpaintingDenoiser(build_unet(1, 8, TINY, extra_channels=2).eval(), noise_schedule("ddpm_linear"), "v_prediction")


@pytest.mark.parametrize("sampler, holes", [*((sampler, False) for sampler in SAMPLERS), ("conditional", True)])
def test_scores_do_not_depend_on_the_batch(denoiser, painter, sampler, holes):
    net = painter if sampler == "conditional" else denoiser
    images = torch.rand(20, 1, 8, 8, generator=generator("batch")) * 2 - 1
    options = {"sampler": sampler, "steps": 100 if sampler == "em" else 4, "repeats": 2, "blocks": 4}
    if holes:
        options |= {"mask": ("board-2", "quarter-2"), "repeats": 1, "relative": True}
    reference = LiftMapDetect(net, **options, batch_size=256).fit(images).predict(images[:12])
    order = torch.randperm(12, generator=generator("order"))
    for batch_size in (1, 7):
        detector = LiftMapDetect(net, **options, batch_size=batch_size).fit(images)
        tolerance = 1e-5 * reference.abs().max().clamp(min=1)
        assert (detector.predict(images[order]) - reference[order]).abs().max() < tolerance


def test_memory_does_not_grow_with_the_test_set(denoiser):
    """Nothing of an image but its distances is kept: the largest batch the network sees is `batch_size`."""
    seen = []
    handle = denoiser.net.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    detector = LiftMapDetect(denoiser, blocks=4, steps=2, repeats=3, batch_size=8)
    found = detector.measure(torch.rand(50, 1, 8, 8) * 2 - 1, {"mse": mse})
    handle.remove()
    assert max(seen) <= 8 and found["mse"].shape == (50, 3)


def test_evaluations_are_counted_exactly(denoiser, painter):
    for sampler in SAMPLERS:
        network = painter if sampler == "conditional" else denoiser
        for distance in ("mse", "denoiser-features"):
            detector = LiftMapDetect(network, blocks=4, sampler=sampler, steps=5, repeats=3, distance=distance)
            seen = []
            handle = network.net.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
            detector.predict(torch.zeros(4, 1, 8, 8) - 0.5)
            handle.remove()
            assert sum(seen) == 4 * detector.evaluations_per_image


def test_unknown_and_damaged_ingredients(denoiser, tmp_path):
    weights = tmp_path / "weights.npz"
    weights.write_bytes(b"not an archive")
    with pytest.raises(ValueError, match="does not hold SqueezeNet's arrays"):
        squeezenet_features(weights)
    with pytest.raises(ValueError, match=f"known: {', '.join(DISTANCES)}"):
        distance_function("l2", denoiser)
    with pytest.raises(ValueError, match="knows images of shape"):
        LiftMapDetect(denoiser, blocks=4).predict(torch.zeros(2, 3, 8, 8))
