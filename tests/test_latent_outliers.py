"""Boundary outliers against the released code's arrays; synthesis through a Stable Diffusion folder made here."""
import json
import shutil
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from oodrepro.latent_outliers import (BoundarySettings, LatentDiffusion, LatentOutliers, LatentSettings, OutlierVectors,
                                      SynthesisSettings, WordCondition, boundary_outliers, boundary_points,
                                      build_latent_networks, choose_far, class_outliers, decode_latents,
                                      evaluations_of, kth_distances, perturb, project, reduce_latents, sample_latents,
                                      synthesise, train_latent_diffusion)
from oodrepro.settings import generator
from oodrepro.training import TrainingSettings

GOLDEN = np.load(Path(__file__).parent / "golden" / "oal_npos.npz", allow_pickle=False)


def case(number):
    """The arrays of one golden case: numbers as they are, arrays as tensors."""
    keys = [key for key in GOLDEN.files if key.startswith(f"case{number}__")]
    return {key.split("__")[1]: torch.from_numpy(np.asarray(GOLDEN[key])) for key in keys}


# --- boundary outliers ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("cells", [2**24, 200])
def test_distances_and_candidates_are_the_released_ones(number, cells):
    found, k = case(number), int(case(number)["hyper"][0])
    points = found["id_normed"]
    assert (kth_distances(points, points, k, cells) - found["id_kth_dist2"]).abs().max() < 2e-6
    candidates = perturb(points[found["picked"]], found["noise"], float(found["sigma"]))
    assert (candidates - found["candidates"]).abs().max() < 2e-6
    assert (kth_distances(candidates, points, k, cells) - found["cand_kth_dist2"]).abs().max() < 2e-6


@pytest.mark.parametrize("number", [0, 1])  # case 2 is the released code's unused inlier mode
def test_boundary_and_choices_are_the_released_ones(number):
    found, (k, select, pic, num, _) = case(number), case(number)["hyper"].tolist()
    assert torch.equal(boundary_points(found["id_normed"], k, select), found["boundary_order"])
    for order, name in (("fixed", "correct"), ("faithful", "shipped")):
        chosen = choose_far(found["cand_kth_dist2"], pic, num, order)
        assert chosen.tolist() == found[f"{name}_flat_index"].tolist()
        assert (found["candidates"][chosen] - found[f"{name}_points"]).abs().max() < 2e-6


def test_shipped_points_have_the_anchors_length():
    found = case(0)
    vectors = OutlierVectors(found["shipped_points"], torch.zeros(20, dtype=torch.int64))
    assert (vectors.scaled(found["anchor"].norm()[None]) - found["shipped_scaled"]).abs().max() < 1e-5


def test_the_released_filter_does_nothing_at_real_proportions():
    """Fixed choices lie at the top of their blocks, faithful ones anywhere."""
    points = torch.nn.functional.normalize(torch.randn(200, 64, generator=generator("real")), dim=1)
    noise = torch.randn(300, 64, generator=generator("noise"))
    distances = kth_distances(perturb(points[:20], noise, 0.2), points, 60)
    rank = distances.view(20, 300).argsort(1).argsort(1).flatten() / 299
    assert rank[choose_far(distances, 20, 2)].min() > 0.99
    assert 0.25 < rank[choose_far(distances, 20, 2, "faithful")].mean() < 0.75
    means = {order: float(distances[choose_far(distances, 20, 2, order)].mean()) for order in ("fixed", "faithful")}
    spread = float(distances.std()) / 40**0.5
    assert abs(means["faithful"] - float(distances.mean())) < 4 * spread < means["fixed"] - float(distances.mean())


def test_classes_do_not_touch_each_other_and_the_seed_decides():
    settings = BoundarySettings(features=0, neighbours=5, boundary=4, noises=30, rounds=2)
    features = torch.randn(60, 8, generator=generator("features"))
    labels = torch.arange(60) % 3
    whole = class_outliers(features, labels, 3, settings, seed=1)
    shuffled = torch.randperm(60, generator=generator("order"))
    moved = features.clone()
    moved[labels == 2] += 10
    assert torch.equal(class_outliers(moved, labels, 3, settings, 1).vectors[:32], whole.vectors[:32])
    assert torch.equal(class_outliers(features, labels, 3, settings, 1).vectors, whole.vectors)
    assert not torch.equal(class_outliers(features, labels, 3, settings, 2).vectors, whole.vectors)
    assert sorted(class_outliers(features[shuffled], labels[shuffled], 3, settings, 1).labels.tolist()) \
        == sorted(whole.labels.tolist())
    assert not torch.equal(boundary_outliers(features[:20], settings, generator(0)),
                           boundary_outliers(features[:20], settings.but(order="faithful"), generator(0)))


@pytest.mark.parametrize("features, labels, classes, changes, words", [
    (torch.randn(20, 4), [0] * 10 + [2] * 10, 3, {}, "class 1 has 0 features"),
    (torch.randn(20, 4), [0] * 18 + [1] * 2, 2, {}, "class 1 has 2 features"),
    (torch.randn(20, 4), [0] * 10 + [1] * 10, 2, {"neighbours": 11}, "11 are needed"),
    (torch.randn(20, 4), [0] * 10 + [1] * 10, 2, {"boundary": 11}, "11 are needed"),
    (torch.randn(20, 4), [0] * 10 + [1] * 10, 2, {"order": "sorted"}, "unknown order 'sorted'"),
    (torch.randn(20, 4), [0] * 10 + [1] * 10, 2, {"per_point": 99}, "cannot be chosen"),
    (torch.randn(20, 4), [0] * 19, 2, {}, "as many labels"),
    (torch.randn(20, 4), [0] * 10 + [-1] * 10, 2, {}, "between 0 and 1"),
    (torch.full((20, 4), float("nan")), [0] * 20, 1, {}, "20 of 20 features hold NaN"),
    (torch.randn(20), [0] * 20, 1, {}, "must be (n, width)")])
def test_bad_features_are_refused(features, labels, classes, changes, words):
    settings = BoundarySettings(features=0, neighbours=5, boundary=3, noises=10, rounds=1)
    with pytest.raises(ValueError, match=words.replace("(", r"\(").replace(")", r"\)")):
        class_outliers(features, labels, classes, settings.but(**changes))


# --- a Stable Diffusion folder ----------------------------------------------------------------------------------------

CLASSES = ("cat", "dog", "horse")
WIDTH = 16


def tiny_pipeline(folder, width=WIDTH):
    """A whole Stable Diffusion 1.x with random weights: CLIP's kind of tokenizer, text model, U-Net, VAE, PNDM."""
    letters = string.ascii_lowercase + string.digits + "-"
    words = ["ca", "cat</w>", "ho", *letters, *(letter + "</w>" for letter in letters),
             "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\nh o\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text = CLIPTextModel(CLIPTextConfig(
            vocab_size=len(words), hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=77, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1,
            pad_token_id=len(words) - 1)).eval()
        unet = UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=width, norm_num_groups=4,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=8)
        vae = AutoencoderKL(in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8),
                            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                            layers_per_block=1, norm_num_groups=4, sample_size=16)
    scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
                              set_alpha_to_one=False, steps_offset=1)
    return StableDiffusionPipeline(vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
                                   safety_checker=None, feature_extractor=None, requires_safety_checker=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("sd")
    tiny_pipeline(place / "files").save_pretrained(place / "model")
    return place / "model"


@pytest.fixture(scope="module")
def model(folder):
    return LatentDiffusion.from_pretrained(folder, CLASSES)


@pytest.mark.parametrize("label", [0, 1, 2])
def test_the_hook_equals_overwriting_the_token_table(model, label):
    """The released code writes the vector into the table, encodes, and restores the row: the same features, to 0."""
    condition, encoder = model.condition, model.pipe.text_encoder
    vector = torch.randn(1, WIDTH, generator=generator("vector", label))
    ours = condition.embed(torch.tensor([label]), vector)
    table, token = encoder.get_input_embeddings().weight, condition.tokens[label]
    kept = table[token].detach().clone()
    ids = condition.ids[[label]]
    assert int((ids == token).sum()) == 1  # else overwriting a row would change several places
    with torch.no_grad():
        table[token] = vector[0]
        theirs = encoder(ids).last_hidden_state
        table[token] = kept
    assert (ours - theirs).abs().max() == 0
    assert (ours - condition.embed(torch.tensor([label]))).abs().max() > 1e-3
    assert not encoder.get_input_embeddings()._forward_hooks


def test_every_sample_has_its_own_vector(model):
    labels, vectors = torch.tensor([2, 0, 1, 0]), torch.randn(4, WIDTH, generator=generator("vectors"))
    together = model.condition.embed(labels, vectors)
    for row in range(4):
        alone = model.condition.embed(labels[row:row + 1], vectors[row:row + 1])
        assert (together[row:row + 1] - alone).abs().max() < 1e-5
    assert model.condition.norms.shape == (3,) and together.shape == (4, 77, WIDTH)


def test_synthesis_through_the_folder(model, folder, tmp_path):
    """End to end: vectors of another width, latents, pictures, files; the swap decides, plain prompts do not."""
    vectors = OutlierVectors(torch.nn.functional.normalize(torch.randn(30, 24, generator=generator("v")), dim=1),
                             torch.arange(30) % 3)
    settings = SynthesisSettings(count=6, steps=4, guidance=7.5, batch_size=4)
    found = synthesise(model, vectors, settings, decode=6)
    assert found.latents.shape == (6, 4, 8, 8) and found.pictures.shape == (6, 16, 16, 3)
    assert found.about["evaluations"] == evaluations_of(model, 4, 7.5) == 10  # PNDM asks once more than it steps
    plain = synthesise(model, vectors, settings.but(swap=False))
    assert torch.equal(plain.labels, found.labels) and (plain.latents - found.latents).abs().max() > 1e-4
    assert (plain.rows == -1).all() and torch.equal(vectors.labels[found.rows], found.labels)
    again = LatentOutliers.load(found.save(tmp_path / "latents"))
    assert torch.equal(again.latents, found.latents) and again.decoding_seconds == found.decoding_seconds
    other = synthesise(LatentDiffusion.from_pretrained(folder, CLASSES), vectors, settings)
    assert torch.equal(other.latents, found.latents)
    assert decode_latents(model, found.latents[:2]).shape == (2, 3, 16, 16)


def test_prompts_must_contain_their_token(folder, model):
    """The released CIFAR-10 script overwrites "apples" and prompts "airplane"; here that is an error."""
    for options, words in (({"template": "a picture"}, "does not contain the class 'cat'"),
                           ({"template": "the catfish"}, "put {} into the template"),
                           ({"classes": ("cat", "")}, "does not contain the class ''"), ({"classes": ()}, "names")):
        with pytest.raises(ValueError, match=words.replace("{", r"\{")):
            LatentDiffusion.from_pretrained(folder, **{"classes": CLASSES, **options})
    long = WordCondition(model.pipe.tokenizer, model.pipe.text_encoder, ["seahorse"], "of a horse and a {}")
    assert model.pipe.tokenizer("seahorse", add_special_tokens=False).input_ids[0] == long.tokens[0]
    assert long.ids[0, long.places[0]] == long.tokens[0]


@pytest.mark.parametrize("part", ["unet", "vae", "scheduler", "tokenizer", "text_encoder", "model_index.json"])
def test_incomplete_folders_are_refused(folder, tmp_path, part):
    shutil.copytree(folder, tmp_path / "model")
    place = tmp_path / "model" / part
    place.unlink() if place.is_file() else shutil.rmtree(place)
    with pytest.raises(ValueError, match=f"lacks {part}" if place.suffix == "" else "no model_index.json"):
        LatentDiffusion.from_pretrained(tmp_path / "model", CLASSES)


def test_another_embedding_width_is_refused(folder, tmp_path, model):
    wide = tiny_pipeline(tmp_path / "wide", width=32)
    wide.save_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "unet")
    shutil.copytree(folder / "unet", tmp_path / "model" / "unet")
    with pytest.raises(ValueError, match="the U-Net listens to vectors of width 16, the condition gives 32"):
        LatentDiffusion.from_pretrained(tmp_path / "model", CLASSES)
    with pytest.raises(ValueError, match="of width 16: bring them to that width with project"):
        sample_latents(model, [0], torch.ones(1, 24), [0], 2)
    with pytest.raises(ValueError, match="2 samples need 2 seeds"):
        sample_latents(model, [0, 1], torch.ones(2, 16), [0], 2)
    with pytest.raises(ValueError, match="1 of 1 vectors hold NaN"):
        sample_latents(model, [0], torch.full((1, 16), float("nan")), [0], 2)


def test_nan_latents_are_refused(model):
    weight = next(model.pipe.unet.parameters())
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    try:
        with pytest.raises(ValueError, match="latents hold NaN"):
            sample_latents(model, [0], None, [0], 2)
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    with pytest.raises(ValueError, match="1 of 3 latents hold NaN"):
        reduce_latents(torch.stack([torch.zeros(4, 8, 8), torch.full((4, 8, 8), torch.nan), torch.zeros(4, 8, 8)]))


# --- the embedded default -------------------------------------------------------------------------------------------

def test_own_latent_diffusion_resumes_saves_and_loads(tmp_path):
    """The same weights whether trained at once or loaded from the folder; anchors travel with the pipeline."""
    images = np.random.default_rng(0).integers(0, 256, (24, 12, 12, 1), np.uint8)
    training = TrainingSettings(steps=3, batch_size=8, precision="fp32", warmup=0)
    arguments = (images, np.arange(24) % 2, ("a", "b"), LatentSettings(width=8), training, training)
    first = train_latent_diffusion(*arguments, tmp_path / "one", log=lambda line: None)
    second = train_latent_diffusion(*arguments, tmp_path / "two", log=lambda line: None)
    loaded = LatentDiffusion.from_pretrained(first.save_pretrained(tmp_path / "saved"))
    drawn = [sample_latents(model, [0, 1], None, [5, 6], 3, 2.0) for model in (first, second, loaded)]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])
    assert drawn[0].shape == (2, 4, 8, 8) and loaded.condition.classes == ("a", "b")
    assert abs(first.pipe.vae.config.scaling_factor - loaded.pipe.vae.config.scaling_factor) < 1e-12


def test_bad_images_of_the_latent_diffusion_are_refused(tmp_path):
    images, training = np.zeros((6, 8, 8, 1), np.uint8), TrainingSettings(steps=1, batch_size=2)
    for labels, classes in (([0] * 6, "ab"), ([0, 1] * 2, "ab"), ([0, 1] * 3, "abc")):
        with pytest.raises(ValueError, match="every one of the"):
            train_latent_diffusion(images, labels, classes, LatentSettings(), training, training, tmp_path)
    with pytest.raises(ValueError, match="multiple of 8"):
        build_latent_networks(1, 12, LatentSettings())


def test_projection_keeps_angles_where_there_is_room():
    vectors = torch.nn.functional.normalize(torch.randn(40, 64, generator=generator("angles")), dim=1)
    wide, narrow = project(vectors, 96), project(vectors, 48)
    assert (wide @ wide.T - vectors @ vectors.T).abs().max() < 1e-5
    assert (narrow @ narrow.T - vectors @ vectors.T).abs().mean() < 0.15 and torch.equal(project(vectors, 96), wide)
