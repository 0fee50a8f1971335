"""LMD's masks, distances and aggregation against the authors' code (tests/golden/lmd), and what a score may depend on."""
from pathlib import Path

import numpy as np
import pytest
import torch

from oodrepro.denoisers import Denoiser, DenoiserSettings, SubVP, build_unet
from oodrepro.distances import DISTANCES, distance_function, mse, squeezenet_features, ssim
from oodrepro.lift_map_detect import (LiftMapDetect, center, checkerboard, mask_of_repetition, random_mask,
                                      reduce_repetitions)
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
        median = reduce_repetitions(torch.from_numpy(arrays[f"{side}_{name}"][:repeats].T))
        assert np.abs(median.numpy() - arrays[f"{side}_{name}_median{repeats}"]).max() < 1e-12
        scores.append(median.numpy() if name == "mse" else -median.numpy())
    is_ood = np.repeat([False, True], [len(part) for part in scores])
    found = auroc(np.concatenate(scores), is_ood)
    expected = float(arrays[f"auroc_{name}_reps{repeats}"])
    assert min(abs(found - expected), abs(1 - found - expected)) < 1e-12  # a similarity left unflipped gives 1 - AUROC


@pytest.fixture(scope="module")
def denoiser():
    """An untrained U-Net: what it paints is nonsense, but the same nonsense whatever the batch."""
    net = build_unet(1, 8, DenoiserSettings(widths=(16, 32), attention=(False, True)))
    return Denoiser(net.eval(), SubVP())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_scores_do_not_depend_on_the_batch(denoiser, sampler):
    images = torch.rand(12, 1, 8, 8, generator=generator("batch")) * 2 - 1
    options = {"blocks": 4, "sampler": sampler, "steps": 100 if sampler == "em" else 8, "repeats": 3}
    reference = LiftMapDetect(denoiser, **options, batch_size=256).predict(images)
    order = torch.randperm(12, generator=generator("order"))
    for batch_size in (1, 7):
        detector = LiftMapDetect(denoiser, **options, batch_size=batch_size)
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


def test_evaluations_are_counted_exactly(denoiser):
    for sampler in SAMPLERS:
        for distance in ("mse", "denoiser-features"):
            detector = LiftMapDetect(denoiser, blocks=4, sampler=sampler, steps=5, repeats=3, distance=distance)
            seen = []
            handle = denoiser.net.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
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
