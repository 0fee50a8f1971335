"""Readers, registry, embedded sets and downloads: what they give, and what they refuse."""

import gzip
import hashlib
import http.server
import io
import os
import pickle
import struct
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from oodrepro import datasets, formats
from oodrepro.datasets import OfficialFile, SetInfo, load, load_path, subset
from oodrepro.images import ImageSet, as_image_set, to_uint8, to_unit

GOLDEN = Path(__file__).parent / "golden" / "embedded.npz"
DATA = os.environ.get("OODREPRO_DATA")
needs_data = pytest.mark.skipif(not DATA or not (Path(DATA) / "mnist").is_dir(), reason="OODREPRO_DATA is not set")
COUNTS = pytest.mark.filterwarnings("ignore:.*were found in")  # the fixtures are smaller than the official sets


def pixels(n=6, side=32, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, channels), np.uint8)


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(">u1").tobytes()


def png(image):
    stream = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(stream, "PNG")
    return stream.getvalue()


# Embedded sets


@pytest.mark.parametrize("name", ["digits", "glyphs", "photos", "noise"])
def test_embedded_sets_are_as_they_were(name):
    stored = np.load(GOLDEN)[name]
    found = load(name)
    assert found.images.shape == ((500 if name == "digits" else 600), 8, 8, 1) and found.images.dtype == np.uint8
    # Another processor may round a sample point on an outline to the other side; more than that is a change.
    assert (found.images[: len(stored)] == stored).mean() > 0.998
    assert set(np.unique(found.images)) <= set(np.rint(np.arange(17) * 255 / 16).astype(int))


def test_embedded_sets_ignore_the_global_seed_and_do_not_touch_it():
    torch.manual_seed(1)
    np.random.seed(1)
    expected = torch.rand(1), load("glyphs").content, load("noise").content, load("photos").content
    torch.manual_seed(1)
    found = load("glyphs").content, load("noise").content, load("photos").content
    assert torch.equal(torch.rand(1), expected[0]) and found == expected[1:]


def test_digit_splits_are_disjoint_and_cover_the_set():
    train, test, whole = (load("digits", part) for part in ("train", "test", "all"))
    assert (len(train), len(test), len(whole)) == (1297, 500, 1797)
    assert sorted([*train.index, *test.index]) == list(range(1797))
    assert np.array_equal(whole.images[test.index], test.images) and np.array_equal(
        whole.labels[test.index], test.labels
    )


@pytest.mark.parametrize("name", ["glyphs", "photos", "noise"])
def test_train_and_test_of_embedded_sets_share_no_image(name):
    train, test = ({image.tobytes() for image in load(name, part).images} for part in ("train", "test"))
    assert not train & test and len(test) > 590


# IDX and arrays


def test_idx_types_and_axes(tmp_path):
    for code, kind in formats._IDX_TYPES.items():
        values = np.arange(12).reshape(3, 4).astype(kind)
        (tmp_path / "x").write_bytes(bytes([0, 0, code, 2]) + struct.pack(">2I", 3, 4) + values.tobytes())
        assert np.array_equal(formats.read_idx(tmp_path / "x"), np.arange(12).reshape(3, 4))


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "nothing"),
        (b"\0\0\x08", "not an IDX"),
        (b"\0\0\x07\x01\0\0\0\0", "not an IDX"),
        (b"\0\0\x08\x03\0\0", "header"),
        (idx(pixels()[..., 0])[:-1], "cut off"),
        (idx(pixels()[..., 0]) + b"\0", "6145"),
        (b"\0\0\x08\x04" + b"\xff" * 16, "announces"),
        (gzip.compress(idx(pixels()[..., 0]))[:-9], "gzip"),
    ],
)
def test_damaged_idx_is_named(tmp_path, content, words):
    (tmp_path / "bad-ubyte.gz").write_bytes(content)
    with pytest.raises(ValueError, match="bad-ubyte.gz") as caught:
        formats.read_idx(tmp_path / "bad-ubyte.gz")
    assert words in str(caught.value)


def test_a_flipped_bit_in_a_gzip_file_is_found(tmp_path):
    packed = bytearray(gzip.compress(idx(pixels()[..., 0]), 0))
    packed[2000] ^= 1
    with pytest.raises(ValueError, match="corrupt"):
        formats.read_idx("flipped.gz", bytes(packed))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04junk", b"\x93NUMPY\x01\x00junk", b"junk"])
def test_damaged_arrays_are_named(tmp_path, content):
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(ValueError, match="bad.npz"):
        formats.read_arrays(tmp_path / "bad.npz")


# Pickles


class Run:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def evil_pickles(flag):
    touch = f"open({str(flag)!r}, 'w').close()"
    yield pickle.dumps({"data": Run(os.mkdir, str(flag))}, 0)
    yield pickle.dumps({"data": Run(exec, touch)}, 4)
    yield pickle.dumps(np.array([Run(exec, touch)], dtype=object))
    yield b"cbuiltins\nexec\n(S" + repr(touch).encode() + b"\ntR."  # GLOBAL, REDUCE
    yield b"(S" + repr(touch).encode() + b"\nibuiltins\nexec\n."  # INST
    yield b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93(S" + repr(touch).encode() + b"\ntR."  # STACK_GLOBAL
    yield b"cnumpy\ndtype.type.mro\n."  # attributes of what is allowed
    yield b"cnumpy.core.multiarray\nscalar\n."
    yield b"Pwhatever\n."  # a persistent identity


def test_pickles_that_run_code_are_refused_and_do_not_run(tmp_path):
    flag = tmp_path / "ran"
    for number, content in enumerate(evil_pickles(flag)):
        with pytest.raises(ValueError, match=f"evil{number}"):
            formats.read_pickle(f"evil{number}", content)
        assert not flag.exists()


def test_pickles_cannot_change_the_stand_ins():
    # BUILD with a state of (None, {"__call__": ...}) tries to set attributes on what _reconstruct stands for.
    content = b"cnumpy.core.multiarray\n_reconstruct\n(N}(S'__doc__'\nS'changed'\nutb."
    with pytest.raises(ValueError, match="batch"):
        formats.read_pickle("batch", content)


def test_every_cut_of_a_pickle_is_an_error():
    content = pickle.dumps({b"data": pixels(2).reshape(2, -1), b"labels": [0, 1]}, 2)
    for length in [*range(0, 200, 7), len(content) // 2, len(content) - 1]:
        with pytest.raises(ValueError, match="data_batch_1"):
            formats.read_cifar_pickle("data_batch_1", content[:length])


@pytest.mark.parametrize(
    "batch",
    [
        [1, 2],
        {b"data": [1]},
        {b"data": np.zeros((2, 3072)), b"labels": [0, 1]},
        {b"data": np.zeros((2, 3071), np.uint8), b"labels": [0, 1]},
        {b"data": np.zeros((2, 3072), np.uint8)},
        {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]},
    ],
)
def test_batches_of_another_form_are_refused(batch):
    with pytest.raises(ValueError, match="test_batch"):
        formats.read_cifar_pickle("test_batch", pickle.dumps(batch))


# Published sets in their official layouts


def cifar_files(ten, images, labels):
    flat = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    key = b"labels" if ten else b"fine_labels"
    coarse = {} if ten else {b"coarse_labels": [int(label) // 5 for label in labels]}
    python = pickle.dumps({b"data": flat, key: [int(label) for label in labels], **coarse}, 2)
    columns = [labels[:, None]] if ten else [labels[:, None] // 5, labels[:, None]]
    return python, np.concatenate([*columns, flat], axis=1).astype(np.uint8).tobytes()


@COUNTS
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("layout", ["python", "binary", "python archive", "binary archive", "torchvision"])
def test_cifar_layouts(tmp_path, name, layout):
    ten, form = name == "cifar10", "binary" if "binary" in layout else "python"
    inner = {"python": "cifar-10-batches-py", "binary": "cifar-10-batches-bin"}[form] if ten else f"cifar-100-{form}"
    parts = (
        {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
        if ten
        else {"train": ["train"], "test": ["test"]}
    )
    folder = tmp_path if layout == "torchvision" else tmp_path / name
    (folder / inner).mkdir(parents=True)
    expected = {}
    for part, files in parts.items():
        images, labels = pixels(5 * len(files), seed=len(files)), np.arange(5 * len(files)) % 10
        expected[part] = images, labels
        for number, file in enumerate(files):
            chosen = slice(5 * number, 5 * number + 5)
            python, binary = cifar_files(ten, images[chosen], labels[chosen])
            path = folder / inner / (file if form == "python" else file + ".bin")
            path.write_bytes(python if form == "python" else binary)
    if "archive" in layout:
        stem = "cifar-10" if ten else "cifar-100"
        with tarfile.open(folder / f"{stem}-{form}.tar.gz", "w:gz") as archive:
            archive.add(folder / inner, inner)
        for path in (folder / inner).iterdir():
            path.unlink()
        (folder / inner).rmdir()
    for part, (images, labels) in expected.items():
        found = load(name, part, tmp_path)
        assert np.array_equal(found.images, images) and np.array_equal(found.labels, labels)
        assert found.classes[0] == ("airplane" if ten else "apple") and len(found.classes) == (10 if ten else 100)
        assert ten or np.array_equal(found.extra["coarse"], labels // 5)


@COUNTS
@pytest.mark.parametrize(
    "folder, ending", [("fashion_mnist", ".gz"), ("fashion_mnist", ""), ("FashionMNIST/raw", ".gz")]
)
def test_mnist_layouts(tmp_path, folder, ending):
    images, labels = pixels(4, 28, 1), np.array([9, 0, 1, 2])
    (tmp_path / folder).mkdir(parents=True)
    for kind, values in (("images-idx3", images[..., 0]), ("labels-idx1", labels)):
        content = idx(values)
        (tmp_path / folder / f"t10k-{kind}-ubyte{ending}").write_bytes(gzip.compress(content) if ending else content)
    found = load("fashion_mnist", root=tmp_path)
    assert (
        np.array_equal(found.images, images) and list(found.labels) == [9, 0, 1, 2] and found.classes[9] == "Ankle boot"
    )


@COUNTS
def test_labels_that_do_not_fit_the_images_are_named(tmp_path):
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "t10k-images-idx3-ubyte").write_bytes(idx(pixels(4, 28, 1)[..., 0]))
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte").write_bytes(idx(np.arange(3)))
    with pytest.raises(ValueError, match="mnist: 3 labels for 4 images"):
        load("mnist", root=tmp_path)


def test_another_number_of_images_than_announced_is_warned_of(tmp_path):
    (tmp_path / "kmnist").mkdir()
    np.savez_compressed(tmp_path / "kmnist" / "kmnist-test-imgs.npz", pixels(5, 28, 1)[..., 0])
    np.savez_compressed(tmp_path / "kmnist" / "kmnist-test-labels.npz", np.arange(5, dtype=np.uint8))
    with pytest.warns(UserWarning, match="10000 images, but 5"):
        assert np.array_equal(load("kmnist", root=tmp_path).images, pixels(5, 28, 1))


@COUNTS
def test_svhn(tmp_path):
    (tmp_path / "svhn").mkdir()
    path = tmp_path / "svhn" / "extra_32x32.mat"
    savemat(path, {"X": pixels(4).transpose(1, 2, 3, 0), "y": np.array([[10], [1], [2], [9]], np.uint8)})
    found = load("svhn", "extra", tmp_path)
    assert np.array_equal(found.images, pixels(4)) and list(found.labels) == [0, 1, 2, 9]
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ValueError, match="extra_32x32.mat"):
        load("svhn", "extra", tmp_path)
    savemat(path, {"X": pixels(4).transpose(1, 2, 3, 0), "y": np.array([[1], [2]])})
    with pytest.raises(ValueError, match="4 images but 2 labels"):
        load("svhn", "extra", tmp_path)


@COUNTS
@pytest.mark.parametrize("zipped", [False, True])
def test_tinyimagenet_from_its_official_tree(tmp_path, zipped):
    tree = {
        "wnids.txt": b"n02\nn01\n",
        "val/val_annotations.txt": b"".join(
            f"val_{i}.JPEG\t{wnid}\t0\t0\t1\t1\n".encode() for i, wnid in enumerate(["n01"] * 10 + ["n02"])
        ),
    }
    images = pixels(11, 64)
    tree |= {
        f"val/images/val_{i}.JPEG": png(image) for i, image in enumerate(images)
    }  # PNG inside keeps the test exact
    tree |= {"train/n01/images/n01_0.JPEG": png(images[0]), "test/images/test_0.JPEG": png(images[1])}
    (tmp_path / "tinyimagenet").mkdir()
    if zipped:
        with zipfile.ZipFile(tmp_path / "tinyimagenet" / "tiny-imagenet-200.zip", "w") as archive:
            for name, content in tree.items():
                archive.writestr(f"tiny-imagenet-200/{name}", content)
    else:
        for name, content in tree.items():
            path = tmp_path / "tinyimagenet" / "tiny-imagenet-200" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    found = load("tinyimagenet", root=tmp_path)  # val_10 must come after val_9
    assert found.split == "val" and np.array_equal(found.images, images) and list(found.labels) == [1] * 10 + [0]
    assert load("tinyimagenet", "train", tmp_path, size=32).images.shape == (1, 32, 32, 3)


@COUNTS
@pytest.mark.parametrize("zipped", [False, True])
def test_gtsrb_in_the_order_of_its_table(tmp_path, zipped):
    folder = tmp_path / "gtsrb"
    table = "Filename;Width;Height;Roi.X1;ClassId\n00001.ppm;32;32;1;7\n00000.ppm;32;32;1;3\n"
    for number, image in enumerate(pixels(2)):
        path = folder / "GTSRB" / "Final_Test" / "Images" / f"{number:05d}.ppm"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (folder / "GT-final_test.csv").write_text(table)
    if zipped:
        with zipfile.ZipFile(folder / "GTSRB_Final_Test_Images.zip", "w") as archive:
            for path in (folder / "GTSRB").rglob("*.ppm"):
                archive.write(path, path.relative_to(folder).as_posix())
                path.unlink()
        with zipfile.ZipFile(folder / "GTSRB_Final_Test_GT.zip", "w") as archive:
            archive.writestr("GT-final_test.csv", table)
        (folder / "GT-final_test.csv").unlink()
    found = load("gtsrb", root=tmp_path)
    assert np.array_equal(found.images, pixels(2)[[1, 0]]) and list(found.labels) == [7, 3]


@COUNTS
def test_textures_from_their_official_archive(tmp_path):
    (tmp_path / "textures").mkdir()
    with tarfile.open(tmp_path / "textures" / "dtd-r1.0.1.tar.gz", "w:gz") as archive:
        for name in ("dtd/images/zigzagged/z_1.jpg", "dtd/images/banded/b_1.jpg"):
            content = png(pixels(1, 40)[0])
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    found = load("textures", root=tmp_path)
    assert (
        found.images.shape == (2, 32, 32, 3)
        and found.classes == ("banded", "zigzagged")
        and list(found.labels) == [0, 1]
    )


def test_missing_files_are_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("OODREPRO_DATA", str(tmp_path))
    for name in (entry.name for entry in datasets.REGISTRY):
        with pytest.raises(FileNotFoundError) as caught:
            load(name)
        entry = datasets.info(name)
        wanted = [file for file in entry.files if file.split in ("", "test")]
        assert wanted and all(
            word in str(caught.value) for file in wanted for word in (file.name, file.md5, file.address)
        )
        assert str(tmp_path / name) in str(caught.value) and "OODREPRO_DATA" in str(caught.value)
    assert (datasets.list_sets()["at hand"] == "-").sum() == len(datasets.REGISTRY)


def test_root_is_argument_then_environment_then_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OODREPRO_DATA", str(tmp_path / "environment"))
    assert datasets.data_root(tmp_path / "argument") == tmp_path / "argument"
    assert datasets.data_root() == tmp_path / "environment"
    monkeypatch.delenv("OODREPRO_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert datasets.data_root() == tmp_path / "cache" / "oodrepro" / "data"


# Folders, archives, strips, arrays


def test_folders_of_images(tmp_path):
    for number, image in enumerate(pixels(12, 8)):
        (tmp_path / "mine" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / "ab"[number % 2] / f"{number}.png").write_bytes(png(image))
    found = load_path(tmp_path / "mine")
    assert found.classes == ("a", "b") and [name for name in found.extra["file"]][:2] == ["a/0.png", "a/2.png"]
    (tmp_path / "mine" / "a" / "99.png").write_bytes(png(pixels(1, 9)[0]))
    with pytest.raises(ValueError, match=r"a/99.png is 9 x 9.*8 x 8; pass size="):
        load_path(tmp_path / "mine")
    (tmp_path / "mine" / "a" / "99.png").write_bytes(png(pixels(1, 8)[0])[:60])
    with pytest.raises(ValueError, match="99.png: not a readable image"):
        load_path(tmp_path / "mine")
    with pytest.warns(UserWarning, match="left out 1 unreadable"):
        assert len(load_path(tmp_path / "mine", on_error="skip")) == 12
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image found"):
        load_path(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_path(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["../x.png", "/x.png", "a/../../x.png", "C:/x.png", "..\\x.png"])
def test_names_that_leave_the_archive_are_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "slip.zip", "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), png(pixels(1, 8)[0]))
    with tarfile.open(tmp_path / "slip.tar", "w") as archive:
        member = tarfile.TarInfo(name)
        archive.addfile(member, io.BytesIO())
    for archive in ("slip.zip", "slip.tar"):
        with pytest.raises(ValueError, match="outside the archive"):
            formats.read_images(tmp_path / archive)
    assert {path.name for path in tmp_path.parent.iterdir()} >= {tmp_path.name} and not (
        tmp_path.parent / "x.png"
    ).exists()


def test_sixteen_bit_images_are_refused_rather_than_clipped(tmp_path):
    Image.fromarray(np.full((8, 8), 3000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="8 bits"):
        load_path(tmp_path)


def test_strips_keep_many_images_and_refuse_damage(tmp_path):
    images = pixels(40, 16)
    path = formats.write_strips(tmp_path / "s.zip", np.repeat(images, 30, axis=0), {"orig_index": np.arange(1200)})
    found, arrays, meta = formats.read_strips(path)
    assert (
        np.array_equal(found, np.repeat(images, 30, axis=0))
        and meta["per_strip"] == 1023
        and len(arrays["orig_index"]) == 1200
    )
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    for change, words in (
        ({"strip_0001.webp": None}, "1200 images announced but 1023"),
        ({"meta.json": b"{"}, "meta.json"),
        ({"meta.json": None}, "meta.json"),
        ({"strip_0000.webp": b"junk"}, "strip_0000.webp"),
        ({"strip_0001.webp": parts["strip_0000.webp"]}, "too many"),
    ):
        with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
            for name, content in {**parts, **change}.items():
                if content is not None:
                    archive.writestr(name, content)
        with pytest.raises(ValueError, match="bad.zip") as caught:
            formats.read_strips(tmp_path / "bad.zip")
        assert words in str(caught.value)


def test_half_written_strips_leave_nothing(tmp_path):
    with pytest.raises(ValueError):
        formats.write_strips(tmp_path / "s.zip", pixels(2), {"objects": np.array([{}], dtype=object)})
    assert not list(tmp_path.iterdir())


def test_images_of_wrong_type_range_or_shape_are_refused():
    for bad in (np.zeros((2, 8, 8, 1)), np.zeros((2, 8, 8), np.uint8), np.zeros((2, 8, 8, 4), np.uint8)):
        with pytest.raises(ValueError):
            to_unit(bad)
        with pytest.raises(ValueError):
            ImageSet(bad)
    for bad in (
        torch.full((1, 1, 2, 2), float("inf")),
        torch.full((1, 1, 2, 2), -1.5),
        torch.zeros(1, 2, 2),
        torch.zeros(1, 1, 2, 2, dtype=torch.long),
    ):
        with pytest.raises(ValueError):
            to_uint8(bad)
    for bad in (
        np.full((2, 4, 4), 300),
        np.full((2, 4, 4), -1),
        np.full((2, 4, 4), np.nan),
        np.zeros((2, 4, 4, 5)),
        np.zeros(4),
        [],
        [np.zeros((4, 4, 2))],
    ):
        with pytest.raises(ValueError, match="mine"):
            as_image_set(bad, "mine")


# Downloads, from a server on this machine


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        content, asked, plan = self.server.content, self.headers.get("Range"), self.server.plan
        start = int(asked[6:-1]) if asked and plan != "no ranges" else 0
        self.server.asked.append(start)
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = start + 1000 if plan == "breaks" else len(content)
        self.wfile.write(content[start:end])

    def log_message(self, *_):
        pass


@pytest.fixture
def tiny(monkeypatch):
    """A registered set `tiny` whose one file a local server serves."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.content, server.plan, server.asked = np.random.default_rng(3).bytes(2500), "", []
    threading.Thread(target=lambda: server.serve_forever(0.01), daemon=True).start()
    file = OfficialFile(
        "test", "tiny.bin", f"http://127.0.0.1:{server.server_port}/", hashlib.md5(server.content).hexdigest()
    )
    entry = SetInfo("tiny", "Tiny", (("test", 1),), 8, "none", "nobody", "nowhere", (file,))
    monkeypatch.setattr(datasets, "REGISTRY", (*datasets.REGISTRY, entry))
    monkeypatch.setattr(datasets.time, "sleep", lambda seconds: None)
    yield server
    server.shutdown()
    server.server_close()


def quiet(text):
    pass


def test_get_where_verify(tiny, tmp_path):
    assert (
        datasets.verify("tiny", tmp_path)["status"][0] == "missing"
        and datasets.where("tiny", tmp_path)["found"][0] == "-"
    )
    (path,) = datasets.get("tiny", root=tmp_path, log=quiet)
    assert path == tmp_path / "tiny" / "tiny.bin" and path.read_bytes() == tiny.content
    assert datasets.verify("tiny", tmp_path)["status"][0] == "ok" and datasets.where("tiny", tmp_path)["found"][
        0
    ] == str(path)
    datasets.get("tiny", root=tmp_path, log=quiet)
    assert tiny.asked == [0]  # a good file is not fetched again
    path.write_bytes(tiny.content[:-1])
    assert datasets.verify("tiny", tmp_path)["status"][0] == "WRONG"
    datasets.get("tiny", root=tmp_path, log=quiet)
    assert path.read_bytes() == tiny.content


def test_a_broken_connection_is_resumed(tiny, tmp_path):
    tiny.plan = "breaks"
    (path,) = datasets.get("tiny", root=tmp_path, log=quiet)  # three attempts of 1000 bytes
    assert tiny.asked == [0, 1000, 2000] and path.read_bytes() == tiny.content


def test_an_interrupted_get_keeps_what_it_has_and_never_names_it(tiny, tmp_path):
    tiny.plan, target = "breaks", tmp_path / "tiny.bin"
    address = f"http://127.0.0.1:{tiny.server_port}/tiny.bin"
    with pytest.raises(ConnectionError, match="the next call resumes"):
        datasets.fetch(address, target, hashlib.md5(tiny.content).hexdigest(), attempts=2, log=quiet)
    assert not target.exists() and (tmp_path / "tiny.bin.part").stat().st_size == 2000
    datasets.fetch(address, target, hashlib.md5(tiny.content).hexdigest(), log=quiet)
    assert target.read_bytes() == tiny.content and not (tmp_path / "tiny.bin.part").exists()


def test_a_server_without_ranges_starts_anew_and_a_whole_part_needs_nothing(tiny, tmp_path):
    tiny.plan, target = "no ranges", tmp_path / "tiny.bin"
    address, md5 = f"http://127.0.0.1:{tiny.server_port}/tiny.bin", hashlib.md5(tiny.content).hexdigest()
    (tmp_path / "tiny.bin.part").write_bytes(b"x" * 700)
    assert datasets.fetch(address, target, md5, log=quiet).read_bytes() == tiny.content
    tiny.plan = ""
    target.rename(tmp_path / "tiny.bin.part")
    assert datasets.fetch(address, target, md5, log=quiet).read_bytes() == tiny.content


def test_a_wrong_checksum_leaves_nothing(tiny, tmp_path):
    address = f"http://127.0.0.1:{tiny.server_port}/tiny.bin"
    with pytest.raises(ValueError, match="instead of 0000"):
        datasets.fetch(address, tmp_path / "tiny.bin", "0" * 32, log=quiet)
    assert not list(tmp_path.iterdir())


def test_copies_packed_again_are_accepted_by_content(tmp_path, monkeypatch):
    content = idx(pixels(3, 28, 1)[..., 0])
    file = OfficialFile(
        "test", "t10k-images-idx3-ubyte.gz", "http://127.0.0.1/", "0" * 32, hashlib.sha256(content).hexdigest()
    )
    entry = SetInfo("again", "Again", (("test", 3),), 28, "none", "nobody", "nowhere", (file,))
    monkeypatch.setattr(datasets, "REGISTRY", (entry,))
    (tmp_path / "again").mkdir()
    for name, written, status in (
        (file.name, gzip.compress(content), "ok by content"),
        (file.name[:-3], content, "ok by content"),
        (file.name, gzip.compress(content[:-1]), "WRONG"),
    ):
        path = tmp_path / "again" / name
        path.write_bytes(written)
        assert datasets.verify("again", tmp_path)["status"][0] == status
        path.unlink()


# The real sets, where they are at hand


@needs_data
@pytest.mark.parametrize(
    "name, split, count, mean",
    [
        ("mnist", "test", 10000, [0.1325]),
        ("fashion_mnist", "test", 10000, [0.2868]),
        ("kmnist", "test", 10000, [0.1846]),
        ("cifar10", "openood_test", 8980, None),
        ("cifar100", "openood_test", 9000, None),
        ("cifar100", "openood_val", 1000, None),
        ("textures", "test", 1200, None),
        ("gtsrb", "test", 12630, None),
    ],
)
def test_real_sets_are_found_as_they_lie(name, split, count, mean):
    found = load(name, split, DATA)
    assert len(found) == count and len(np.unique(found.index)) == count and found.labels.min() >= 0
    assert mean is None or np.allclose(found.images.mean((0, 1, 2)) / 255, mean, atol=1e-4)


@needs_data
def test_kmnist_stands_in_for_its_own_train_set():
    whole, train, heldout = (load("kmnist", part, DATA) for part in ("test", "test_as_train", "test_heldout"))
    assert (len(train), len(heldout)) == (8000, 2000) and not set(train.index) & set(heldout.index)
    assert np.array_equal(whole.images[heldout.index], heldout.images)
    assert list(datasets.verify("kmnist", DATA)["status"]) == ["missing", "missing", "ok by content", "ok"]


@needs_data
def test_a_seeded_subset_is_the_same_everywhere():
    assert list(subset(load("mnist", root=DATA), 4, seed=0).index) == np.load(GOLDEN)["mnist_subset"].tolist()
