"""Every dataset in its official layout, damaged files, and folders that are read by workers."""

import gzip
import json
import logging
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from support import config
from torch import nn

from decef.data import Images, dataset, folder_identity
from decef.data.small import read_idx
from decef.data.subsets import stratified_subset
from decef.results.comparisons import experiments
from decef.training.config import DatasetConfig, InputError
from decef.training.loop import evaluate
from decef.training.record import load_records
from decef.training.run import run

REAL = Path(os.environ.get("DECEF_DATA", "data"))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise OSError("no network in this test")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setenv("DECEF_DATA", str(tmp_path))


def loaded(name, **settings):
    augment = {key: settings.pop(key) for key in ("flip", "workers") if key in settings}
    return dataset(name, **settings).load(**augment)


# MNIST and Fashion-MNIST ------------------------------------------------------------------------------------------


def write_idx(path, array, compress=False):
    header = b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    data = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if compress else data)


def write_mnist(root, part, images, compress=False, name="MNIST"):
    rng = np.random.default_rng(0)
    suffix = ".gz" if compress else ""
    pixels, labels = rng.integers(0, 256, (images, 28, 28)), np.arange(images) % 10
    write_idx(root / name / "raw" / f"{part}-images-idx3-ubyte{suffix}", pixels, compress)
    write_idx(root / name / "raw" / f"{part}-labels-idx1-ubyte{suffix}", labels, compress)
    return pixels


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
@pytest.mark.parametrize("compress", [False, True])
def test_idx_files_plain_and_compressed(tmp_path, name, folder, compress):
    pixels = write_mnist(tmp_path, "train", 30, compress, folder)
    write_mnist(tmp_path, "t10k", 20, compress, folder)
    train, test = loaded(name)
    assert train.images.shape == (30, 1, 28, 28)
    assert np.array_equal(train.images[:, 0].numpy(), pixels)
    assert test.labels.tolist() == [i % 10 for i in range(20)]


def test_only_the_test_part_of_mnist(tmp_path):
    write_mnist(tmp_path, "t10k", 10_000, compress=True)
    with pytest.raises(FileNotFoundError, match=r"MNIST was not found: .*DECEF_DATA.*dataset\.split_test=true"):
        loaded("mnist")
    train, test = loaded("mnist", split_test=True)
    assert (len(train), len(test)) == (8_500, 1_500)
    assert test.labels.bincount().tolist() == [150] * 10
    again, _ = loaded("mnist", split_test=True)
    assert torch.equal(train.images, again.images)
    write_mnist(tmp_path, "train", 30)
    for part, same in zip((train, test), loaded("mnist", split_test=True), strict=True):  # whatever else is there
        assert torch.equal(part.images, same.images)
        assert torch.equal(part.labels, same.labels)
    assert [len(part) for part in loaded("mnist")] == [30, 10_000]


def test_a_missing_test_part_of_mnist_is_downloaded_to_be_split(tmp_path, monkeypatch):
    write_mnist(tmp_path, "train", 30)
    with pytest.raises(FileNotFoundError, match=r"no MNIST/raw/t10k-images-idx3-ubyte in "):
        loaded("mnist", split_test=True)
    monkeypatch.setattr("torchvision.datasets.MNIST", lambda root, download: write_mnist(Path(root), "t10k", 10_000))
    assert [len(part) for part in loaded("mnist", split_test=True)] == [8_500, 1_500]


def test_damaged_idx_files_are_named(tmp_path):
    path = tmp_path / "a"
    for data in (b"", b"PK\x03\x04 nothing", b"\0\0\x08\x03\0\0", b"\0\0\x08\x01\0\0\0\x05abc"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"{path} is .*damaged"):
            read_idx(path)
    write_mnist(tmp_path, "train", 30, compress=True)
    cut = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is truncated"):
        read_idx(cut)
    write_mnist(tmp_path, "t10k", 20)
    cut.unlink()
    write_idx(tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte", np.zeros((29, 28, 28), np.uint8), False)
    with pytest.raises(ValueError, match=r"don't belong together: \(29, 28, 28\) images, \(30,\) labels"):
        loaded("mnist")


@pytest.mark.skipif(not (REAL / "MNIST").is_dir(), reason="no MNIST under $DECEF_DATA or data/")
def test_real_mnist(monkeypatch):
    monkeypatch.setenv("DECEF_DATA", str(REAL))
    train, _ = loaded("mnist", split_test=True)
    mean, std = (torch.tensor(v) for v in (dataset("mnist").mean, dataset("mnist").std))
    pixels = train.images.float() / 255
    assert (pixels.mean() - mean).abs() < 0.01
    assert (pixels.std() - std).abs() < 0.01


# CIFAR-100 and SVHN -----------------------------------------------------------------------------------------------


@pytest.fixture
def any_checksum(monkeypatch):
    """The tests' files are not the official ones: they only have to be there and not empty."""

    def there(path, md5=None):
        return Path(path).is_file() and Path(path).stat().st_size > 0

    for module in ("utils", "cifar", "svhn"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", there)


def test_cifar100(tmp_path, any_checksum, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.cifar.CIFAR100._load_meta", lambda self: None)
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part, n in (("train", 12), ("test", 5)):
        batch = {"data": rng.integers(0, 256, (n, 3072), dtype=np.uint8), "fine_labels": [i + 90 for i in range(5)] * 3}
        batch["fine_labels"] = batch["fine_labels"][:n]
        (folder / part).write_bytes(pickle.dumps(batch))
    train, test = loaded("cifar100")
    assert train.images.shape == (12, 3, 32, 32)
    assert train.images.is_contiguous()
    assert test.labels.tolist() == [90, 91, 92, 93, 94]
    (folder / "train").write_bytes(b"")
    with pytest.raises(ValueError, match=f"CIFAR-100 is incomplete or damaged: {folder / 'train'}"):
        loaded("cifar100")


def test_svhn(tmp_path, any_checksum):
    rng = np.random.default_rng(0)
    for part, n in (("train", 12), ("test", 5)):
        pixels = rng.integers(0, 256, (32, 32, 3, n), dtype=np.uint8)
        labels = np.arange(1, n + 1)[:, None] % 11  # 10 stands for 0
        scipy.io.savemat(tmp_path / f"{part}_32x32.mat", {"X": pixels, "y": labels})
    train, test = loaded("svhn")
    assert train.images.shape == (12, 3, 32, 32)
    assert train.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0, 1]
    assert len(test) == 5
    (tmp_path / "test_32x32.mat").write_bytes(b"")
    with pytest.raises(ValueError, match=r"SVHN is incomplete or damaged: .*test_32x32\.mat"):
        loaded("svhn")


@pytest.mark.parametrize("name", ["cifar100", "svhn", "mnist", "fashion_mnist"])
def test_nowhere_to_be_found(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"was not found: .*{tmp_path}.*dataset.root=FOLDER.*DECEF_DATA"):
        loaded(name)
    assert not [path for path in tmp_path.rglob("*") if path.name != ".download.lock"]


# Magnetic tiles ---------------------------------------------------------------------------------------------------


def write_tiles(root, per_class=20):
    rng = np.random.default_rng(0)
    for name in ("Blowhole", "Break", "Crack", "Fray", "Free", "Uneven"):
        folder = root / "magnetic-tile" / f"MT_{name}"
        folder.mkdir(parents=True)
        for i in range(per_class):
            Image.fromarray(rng.integers(0, 256, (30, 50), dtype=np.uint8)).save(folder / f"{i:03}.jpg")


def test_tiles_are_split_before_they_are_enlarged(tmp_path):
    write_tiles(tmp_path)
    train, test = loaded("magnetic_tile")
    assert test.images.shape == (18, 1, 100, 100)
    assert test.labels.bincount().tolist() == [3] * 6
    assert train.labels.bincount().tolist() == [17, 17, 34, 51, 17, 17]
    crack = train.images[train.labels == 2]
    assert torch.equal(crack[:17].flip(3), crack[17:])
    kept = {image.numpy().tobytes() for image in test.images}
    assert not kept & {image.flip(2).numpy().tobytes() for image in train.images}
    whole = [loaded("magnetic_tile", as_published=True)[i] for i in (0, 1)]
    assert sum(map(len, whole)) == 20 * 9
    assert whole[1].labels.bincount()[3] == 9  # copies on both sides


def test_damaged_and_missing_tiles(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no MT_<class> folders in .*dataset\.root"):
        loaded("magnetic_tile")
    write_tiles(tmp_path, 2)
    broken = tmp_path / "magnetic-tile" / "MT_Fray" / "000.jpg"
    broken.write_bytes(broken.read_bytes()[:50])
    with pytest.raises(ValueError, match=f"{broken} is damaged"):
        loaded("magnetic_tile")
    with pytest.raises(FileNotFoundError, match=r"in typo/magnetic-tile, typo\. Get .*dataset\.root=FOLDER$"):
        dataset("magnetic_tile").load(Path("typo"))  # not those of the search path


@pytest.mark.skipif(not (REAL / "magnetic-tile").is_dir(), reason="no magnetic-tile under $DECEF_DATA or data/")
def test_real_tiles(monkeypatch):
    monkeypatch.setenv("DECEF_DATA", str(REAL))
    train, test = loaded("magnetic_tile", as_published=True)
    assert (len(train), len(test)) == (563, 100)  # as many as the authors have


def write_masks(root, per_class=(115, 85, 114, 96, 150, 103)):
    """Masks of one pixel, whose grey level says which it is in the order of the files' names."""
    names = ("Blowhole", "Break", "Crack", "Fray", "Free", "Uneven")
    for name, n in zip(names, per_class, strict=True):
        folder = root / "Magnetic-tile-defect-datasets_torch" / f"MT_{name}"
        folder.mkdir(parents=True)
        for grey, file in enumerate(sorted(f"{i}.png" for i in range(n))):
            Image.fromarray(np.full((1, 1), grey, dtype=np.uint8)).save(folder / file)


def test_masks_are_split_as_the_authors_split_them(tmp_path):
    write_masks(tmp_path)
    order = [(label, grey) for label, n in enumerate((115, 85, 114, 96, 150, 103)) for grey in range(n)]
    torch.manual_seed(48)
    authors = torch.utils.data.random_split(order, [563, 100])
    for part, expected in zip(loaded("magnetic_tile_masks"), authors, strict=True):
        assert part.images.shape == (len(expected), 1, 100, 100)
        assert list(zip(part.labels.tolist(), part.images[:, 0, 0, 0].tolist(), strict=True)) == list(expected)


def test_damaged_and_missing_masks(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"masks were not found: .*CPAC-CNN.*dataset\.root"):
        loaded("magnetic_tile_masks")
    write_masks(tmp_path, (115, 85, 114, 96, 150, 102))
    with pytest.raises(ValueError, match=r"has 662 masks .*, the authors have 663"):
        loaded("magnetic_tile_masks")
    broken = tmp_path / "Magnetic-tile-defect-datasets_torch" / "MT_Crack" / "0.png"
    broken.write_bytes(broken.read_bytes()[:20])
    with pytest.raises(ValueError, match=f"{broken} is damaged"):
        loaded("magnetic_tile_masks")


# Folders ----------------------------------------------------------------------------------------------------------

CLASSES = ("n01", "n02", "n03")
SHAPE = {"num_classes": 3, "size": 16}
SETTINGS = {**SHAPE, "flip": True, "workers": 0}


def write_images(folder, n=4, size=(40, 30)):
    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            pixels = rng.integers(0, 60, (size[1], size[0], 3), dtype=np.uint8)
            pixels[..., label] += 180
            Image.fromarray(pixels).save(folder / name / f"{name}_{i}.JPEG")


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path / "train", 8)
    write_images(tmp_path / "val")
    return tmp_path


@pytest.mark.parametrize("flip", [False, True])
def test_training_images_are_cropped_and_mirrored_by_chance(tmp_path, flip):
    ramp = np.tile(np.arange(64, dtype=np.uint8) * 3, (64, 1))  # brighter to the right
    for part, n in (("train", 40), ("val", 1)):
        (tmp_path / part / "a").mkdir(parents=True)
        for i in range(n):
            Image.fromarray(np.stack([ramp] * 3, 2)).save(tmp_path / part / "a" / f"{i}.png")
    train, _ = loaded("imagefolder", num_classes=1, size=16, flip=flip)
    images = epoch(train, batch_size=20)[0].float()
    left, right = images[..., :8].mean((1, 2, 3)), images[..., 8:].mean((1, 2, 3))
    mirrored = int((left > right).sum())
    assert 5 < mirrored < 35 if flip else mirrored == 0
    assert (left + right).std() > 4  # of other places and sizes; the whole image would always be the same


def epoch(data, batch_size=6, seed=0):
    batches = list(data.batches(batch_size, torch.Generator().manual_seed(seed)))
    return torch.stack([x for x, _ in batches]), torch.stack([labels for _, labels in batches])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # where there is one core only
def test_the_generator_alone_determines_what_workers_read(folder):
    train, _ = loaded("imagefolder", **SETTINGS)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    images, labels = epoch(train)
    assert torch.equal(torch.rand(3), expected)  # the global generator is left alone
    assert images.shape == (4, 6, 3, 16, 16)
    assert images.dtype == torch.uint8
    for workers in (0, 2):
        again = epoch(replace(train, workers=workers))
        assert torch.equal(again[0], images)
        assert torch.equal(again[1], labels)
    assert not torch.equal(epoch(train, seed=1)[0], images)
    halves = [list(train.batches(6, torch.Generator().manual_seed(0), (i, 2))) for i in range(2)]
    joined = torch.stack([torch.cat([a[0], b[0]]) for a, b in zip(*halves, strict=True)])
    assert torch.equal(joined, images)


def test_labels_belong_to_their_images(folder):
    train, test = loaded("imagenet", **SETTINGS)
    for images, labels in (*test.views(5), *train.batches(6, torch.Generator().manual_seed(0))):
        assert torch.equal(images.float().mean((2, 3)).argmax(1), labels)
    assert sum(len(labels) for _, labels in test.views(5)) == 12


def test_the_central_square_is_measured(tmp_path):
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        pixels = np.zeros((64, 128, 3), np.uint8)
        pixels[4:60, 36:92] = 255  # 56 = 64 * 224 / 256
        Image.fromarray(pixels).save(tmp_path / part / "a" / "x.png")
    _, test = loaded("imagefolder", num_classes=1, size=56)
    ((images, _),) = test.views(9)
    assert (images == 255).all()


def test_imagenets_flat_validation_folder(tmp_path):
    write_images(tmp_path / "train")
    (tmp_path / "val").mkdir()
    truth = [2, 3, 1, 2]
    wnids = {1: "n03", 2: "n01", 3: "n02"}  # the devkit's numbers are not in the order of the names
    for i, number in enumerate(truth):
        source = tmp_path / "train" / wnids[number] / f"{wnids[number]}_0.JPEG"
        (tmp_path / "val" / f"ILSVRC2012_val_{i + 1:08}.JPEG").write_bytes(source.read_bytes())
    with pytest.raises(FileNotFoundError, match="put ILSVRC2012_devkit_t12 into"):
        loaded("imagenet", **SETTINGS)
    devkit = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    devkit.mkdir(parents=True)
    (devkit / "ILSVRC2012_validation_ground_truth.txt").write_text("\n".join(map(str, truth)))
    kind = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object)]
    scipy.io.savemat(devkit / "meta.mat", {"synsets": np.array([(n, w, "x") for n, w in wnids.items()], dtype=kind)})
    _, test = loaded("imagenet", **SETTINGS)
    ((images, labels),) = test.views(9)
    assert labels.tolist() == [0, 1, 2, 0]
    assert torch.equal(images.float().mean((2, 3)).argmax(1), labels)
    (devkit / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n")
    with pytest.raises(ValueError, match="has 4 images, but the devkit's ground truth is for 2"):
        loaded("imagenet", **SETTINGS)


def test_damaged_images_are_named_counted_and_left_out(folder, caplog):
    broken = [folder / "train" / "n01" / "n01_1.JPEG", folder / "val" / "n02" / "n02_0.JPEG"]
    broken[0].write_bytes(broken[0].read_bytes()[:100])
    broken[1].write_bytes(b"not an image")
    train, test = loaded("imagefolder", **SETTINGS)
    pixels = 3 * SETTINGS["size"] ** 2
    network = nn.Sequential(nn.Flatten(), nn.Linear(pixels, SETTINGS["num_classes"]))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            images, labels = epoch(train)
            assert torch.equal(images.float().mean((3, 4)).argmax(2), labels)  # another one stands in, with its label
            assert sum(len(labels) for _, labels in test.views(9)) == 11
            evaluate(network, test)  # reads them as the training does
    assert list(train.skipped) == [broken[0]]
    assert list(test.skipped) == [broken[1]]
    assert [str(path) in caplog.text for path in broken] == [True, True]
    assert len(caplog.records) == 2


def test_a_batch_without_a_good_image_is_an_error(folder):
    for path in (folder / "train").rglob("*.JPEG"):
        path.write_bytes(b"")
    train, _ = loaded("imagefolder", **SETTINGS)
    with pytest.raises(ValueError, match=r"none of a batch's images can be read.*JPEG"):
        epoch(train)


def test_too_many_damaged_images_are_an_error_in_the_part_that_has_them(tmp_path):
    write_images(tmp_path / "train", n=14)
    write_images(tmp_path / "val")
    damaged = [path for i in range(11) for path in (tmp_path / "train").rglob(f"*_{i}.JPEG")][:11]
    for path in damaged:
        path.write_bytes(b"")
    train, _ = loaded("imagefolder", **SETTINGS)
    good = train.subset(torch.tensor([i for i, path in enumerate(train.paths) if path not in damaged]))
    with pytest.raises(ValueError, match=r"11 of 42 images cannot be read, among them .*JPEG"):
        list(train.views(6))
    assert sum(len(labels) for _, labels in good.views(6)) == 31


def test_a_run_that_has_no_good_image_to_test_on_fails(folder):
    for path in (folder / "val").rglob("*.JPEG"):
        if path.stem.endswith("_0"):  # few enough to be left out
            path.write_bytes(b"")
        else:
            path.unlink()
    data = {"name": "imagefolder", "root": str(folder), "size": 16, "num_classes": 3, "workers": 0}
    small = config(folder / "results", dataset=data, model={"name": "plain", "width": 0.1}, layer={"name": "conv2d"})
    with pytest.raises(InputError, match="none of the images to test on can be read"):
        run(small)
    (summary,) = (folder / "results" / "runs").glob("*/summary.json")
    assert json.loads(summary.read_text())["status"] == "failed"


def test_other_images_than_were_asked_for_are_not_taken(folder, monkeypatch):
    monkeypatch.setenv("DECEF_DATA", str(folder))
    assert DatasetConfig("imagefolder", size=56).resolved().num_classes == 3
    with pytest.raises(FileNotFoundError, match=r"no folder with train/ and val/ was found, looking at [^,]*/typo"):
        DatasetConfig("imagefolder", root=str(folder / "typo"), size=56).resolved()


def test_runs_on_two_folders_of_images_are_two_runs(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    write_images(other / "train", 9)
    write_images(other / "val")
    moved = shutil.copytree(folder, tmp_path_factory.mktemp("moved") / "away")

    def resolved(root, **known):
        return DatasetConfig("imagefolder", root=str(root), size=56, **known).resolved()

    here = resolved(folder)
    assert here.num_classes == 3
    assert resolved(moved).images_md5 == here.images_md5 != resolved(other).images_md5
    with pytest.raises(ValueError, match="has not the images that the run began with"):
        resolved(other, num_classes=3, images_md5=here.images_md5)


def test_folders_made_of_links_are_told_apart(folder, tmp_path_factory):
    """As parts of ImageNet are: the same classes' names, other images."""
    other, linked = tmp_path_factory.mktemp("other"), tmp_path_factory.mktemp("linked")
    write_images(other / "train", 9)
    write_images(other / "val")
    for name, target in (("one", folder), ("two", other)):
        for path in (*(target / "train").iterdir(), *(target / "val").iterdir()):
            link = linked / name / path.relative_to(target)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    one, two = (folder_identity(linked / name)[1] for name in ("one", "two"))
    assert one == folder_identity(folder)[1] != two


def test_sixteen_bits_are_brought_down_to_eight(folder):
    path = folder / "train" / "n01" / "n01_0.JPEG"
    grey = torch.arange(64 * 64).reshape(64, 64).numpy().astype("uint16") * 16
    Image.fromarray(grey).save(path, format="PNG")
    train, _ = loaded("imagefolder", **SETTINGS)
    images, _ = next(iter(train.subset(torch.tensor([train.paths.index(path)])).views(1)))
    assert 100 < images.float().mean() < 155
    assert images.float().std() > 20
    Image.fromarray(grey.astype("float32"), mode="F").save(path, format="TIFF")
    part = train.subset(torch.tensor([train.paths.index(path)]))
    assert list(part.views(1)) == []
    assert "its pixels have 32 bits (mode F): save it with 8 or 16" in part.skipped[path]


def test_runs_on_two_parts_of_imagenet_are_not_one(call, folder, tmp_path_factory):
    """Their ids are: they are told apart by the images' names in the record."""
    other = tmp_path_factory.mktemp("other")
    write_images(other / "train", 9)
    write_images(other / "val")
    data = {"name": "imagenet", "size": 16, "num_classes": 3, "workers": 0}
    how = {"model": {"name": "plain", "width": 0.1}, "layer": {"name": "conv2d"}}

    def trained(root, seed):
        return run(config(folder / "results", dataset={**data, "root": str(root)}, seed=seed, **how))

    assert trained(folder, 0)["images_md5"] != trained(other, 1)["images_md5"]
    assert trained(folder, 0)["status"] == "finished"
    assert [len(runs) for runs in experiments(load_records(folder / "results"))] == [1, 1]
    with pytest.raises(InputError, match="is of other images than are here"):
        trained(other, 0)
    first = folder / "results" / "runs" / trained(folder, 0)["id"]
    again = call("train.py", "--from", first, f"dataset.root={other}", f"results={other / 'replayed'}")
    assert again.returncode == 2
    assert "is of other images than are here" in again.stderr


def test_folders_that_do_not_fit(folder):
    with pytest.raises(ValueError, match=r"has 3 classes, not 1000: say dataset\.num_classes=3"):
        loaded("imagenet", **{**SETTINGS, "num_classes": 1000})
    assert folder_identity(folder)[0] == 3
    (folder / "val" / "n01").rename(folder / "val" / "n09")
    with pytest.raises(ValueError, match="has not the classes of train: n01, n09"):
        loaded("imagefolder", **SETTINGS)
    (folder / "val").rename(folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match="neither val nor test beside train"):
        loaded("imagefolder", **SETTINGS)
    (folder / "train").rename(folder / "away")
    with pytest.raises(FileNotFoundError, match=r"no folder with train/ and val/.*dataset\.root=FOLDER"):
        loaded("imagefolder", **SETTINGS)


@pytest.mark.parametrize("key", ["size", "num_classes"])
@pytest.mark.parametrize("value", [None, 0, "big", 2.5])
def test_settings_of_a_folder(key, value):
    with pytest.raises(ValueError, match=f"dataset.{key}={value!r} must be a whole number"):
        dataset("imagenet", **{**SHAPE, key: value})


# Parts of a dataset -----------------------------------------------------------------------------------------------


def sorted_by_class(*counts):
    """Images that are their own numbers, class after class; a slice of the first ones would have one class."""
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    return Images(torch.arange(len(labels))[:, None, None, None], labels)


@pytest.mark.parametrize("size", [3, 7, 50, 99, 100])
def test_a_subset_has_the_classes_in_proportion(size):
    data = sorted_by_class(60, 30, 10)
    part = stratified_subset(data, size)
    assert len(part) == size
    assert all(abs(n - size * share) < 1 for n, share in zip(part.labels.bincount(), (0.6, 0.3, 0.1), strict=False))
    chosen = part.images.flatten()
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert torch.equal(data.labels[chosen], part.labels)
    assert torch.equal(stratified_subset(data, size).images, part.images)
    if 3 < size < 99:
        assert chosen.tolist() != [*range(size)]


def test_a_subset_leaves_the_global_generator_alone_and_takes_rare_classes():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    assert stratified_subset(sorted_by_class(1, 0, 8), 8).labels.bincount().tolist() == [1, 0, 7]
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("size", [-1, 0, 2, 101])
def test_subsets_that_cannot_be_drawn(size):
    with pytest.raises(ValueError, match=f"{size} of 100 images .*from 3 to 100"):
        stratified_subset(sorted_by_class(60, 30, 10), size)


def test_a_folder_takes_the_indices_that_images_in_memory_take(folder):
    train, _ = loaded("imagefolder", **SETTINGS)
    mask = torch.zeros(len(train), dtype=torch.bool)
    mask[[1, len(train) - 1]] = True
    for index in (mask, torch.tensor([1, len(train) - 1]), slice(1, None, len(train) - 2)):
        assert train.subset(index).paths == [train.paths[1], train.paths[-1]]
        assert train.subset(index).labels.tolist() == train.labels[index].tolist()


def test_a_subset_of_a_folder(folder):
    train, _ = loaded("imagefolder", **SETTINGS)
    part = stratified_subset(train, 6)
    assert part.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert [path.parent.name for path in part.paths] == ["n01", "n01", "n02", "n02", "n03", "n03"]
