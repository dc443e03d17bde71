import hashlib
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from decef.data import DATASETS, Images, cifar
from decef.data.cifar import load_cifar10

real = Path(os.environ.get("DECEF_DATA", "data"))
needs_cifar = pytest.mark.skipif(
    not (real / cifar.PY_FOLDER).is_dir(), reason="no cifar-10-batches-py under $DECEF_DATA or data/"
)


@pytest.fixture
def small(monkeypatch):
    """Random data in CIFAR-10's form, few images a file; what writes them says what their checksums should be."""
    monkeypatch.setattr(cifar, "MD5", {})
    generator = torch.Generator().manual_seed(0)
    return {
        name: (
            torch.randint(0, 256, (7, 3072), generator=generator, dtype=torch.uint8),
            torch.randint(0, 10, (7,), generator=generator),
        )
        for name in (*cifar.TRAIN_FILES, cifar.TEST_FILE)
    }


def write_py(folder: Path, data) -> None:
    folder.mkdir(parents=True)
    for name, (pixels, labels) in data.items():
        with (folder / name).open("wb") as file:
            pickle.dump({"data": pixels.numpy(), "labels": labels.tolist(), "batch_label": name}, file, protocol=2)
        expect(folder / name)


def write_bin(folder: Path, data) -> None:
    folder.mkdir(parents=True)
    for name, (pixels, labels) in data.items():
        rows = torch.cat([labels.to(torch.uint8)[:, None], pixels], dim=1)
        (folder / f"{name}.bin").write_bytes(rows.numpy().tobytes())
        expect(folder / f"{name}.bin")


def expect(path: Path) -> None:
    """Let this file be the official one of its name."""
    cifar.MD5[path.name] = hashlib.md5(path.read_bytes()).hexdigest()


def test_both_layouts_give_the_same_images(tmp_path, small, monkeypatch):
    write_py(tmp_path / "py" / cifar.PY_FOLDER, small)
    write_bin(tmp_path / "bin" / cifar.BIN_FOLDER, small)
    train, test = load_cifar10(tmp_path / "py")
    monkeypatch.setenv("DECEF_DATA", str(tmp_path / "bin"))
    for one, other in zip((train, test), load_cifar10(None), strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
    assert train.images.shape == (35, 3, 32, 32)
    assert train.images.dtype == torch.uint8
    pixels, labels = small["data_batch_2"]
    assert torch.equal(train.images[7:14].flatten(1), pixels)
    assert torch.equal(train.labels[7:14], labels)
    assert torch.equal(test.labels, small["test_batch"][1])


def test_the_folder_itself_may_be_named(tmp_path, small):
    write_bin(tmp_path / cifar.BIN_FOLDER, small)
    assert len(load_cifar10(tmp_path / cifar.BIN_FOLDER)[0]) == 35


def test_a_truncated_file_is_named(tmp_path, small):
    write_py(tmp_path / cifar.PY_FOLDER, small)
    write_bin(tmp_path / "b" / cifar.BIN_FOLDER, small)
    for path in (tmp_path / cifar.PY_FOLDER / "data_batch_3", tmp_path / "b" / cifar.BIN_FOLDER / "test_batch.bin"):
        path.write_bytes(path.read_bytes()[:-100])
        root = path.parents[1]
        with pytest.raises(ValueError, match=f"{path} is truncated"):
            load_cifar10(root)


def test_a_flipped_byte_is_found(tmp_path, small):
    write_py(tmp_path / cifar.PY_FOLDER, small)
    write_bin(tmp_path / "b" / cifar.BIN_FOLDER, small)
    for path in (tmp_path / cifar.PY_FOLDER / "test_batch", tmp_path / "b" / cifar.BIN_FOLDER / "data_batch_1.bin"):
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{path} is truncated or damaged: .*MD5.* get CIFAR-10 anew"):
            load_cifar10(path.parents[1])


def test_a_missing_file_is_named(tmp_path, small):
    write_py(tmp_path / cifar.PY_FOLDER, small)
    (tmp_path / cifar.PY_FOLDER / "data_batch_5").unlink()
    with pytest.raises(
        FileNotFoundError, match=f"data_batch_5 is missing; .* remove {tmp_path}.* to download all anew"
    ):
        load_cifar10(tmp_path)


def test_several_that_want_it_at_once_download_it_once(tmp_path, small, monkeypatch):
    fetched, elsewhere = [], tmp_path / "elsewhere"
    _torchvision()
    monkeypatch.delenv("DECEF_DATA", raising=False)

    def cifar10(root, download):
        fetched.append(root)
        time.sleep(0.1)  # in which the others come
        write_py(Path(root) / cifar.PY_FOLDER, small)
        assert cifar.find_cifar10(elsewhere) is None  # which is there when it is complete

    monkeypatch.setattr("torchvision.datasets.CIFAR10", cifar10)
    with ThreadPoolExecutor(3) as pool:
        loaded = list(pool.map(load_cifar10, [elsewhere] * 3))
    assert [len(train) for train, _ in loaded] == [35] * 3
    assert len(fetched) == 1
    assert {path.name for path in elsewhere.iterdir()} == {cifar.PY_FOLDER, ".download.lock"}


def test_a_download_that_broke_off_leaves_nothing(tmp_path, small, monkeypatch):
    monkeypatch.delenv("DECEF_DATA", raising=False)
    some = {name: small[name] for name in cifar.TRAIN_FILES[:2]}
    _torchvision()

    def broken(root, download):
        write_py(Path(root) / cifar.PY_FOLDER, some)
        raise OSError("connection lost")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", broken)
    with pytest.raises(FileNotFoundError, match="connection lost"):
        load_cifar10(tmp_path)
    monkeypatch.setattr(
        "torchvision.datasets.CIFAR10", lambda root, download: write_py(Path(root) / cifar.PY_FOLDER, small)
    )
    assert len(load_cifar10(tmp_path)[0]) == 35


def test_a_pickle_that_runs_code_is_refused(tmp_path, small):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    write_py(tmp_path / cifar.PY_FOLDER, small)
    with (tmp_path / cifar.PY_FOLDER / "test_batch").open("wb") as file:
        pickle.dump(Evil(), file)
    with pytest.raises(ValueError, match="test_batch is truncated or damaged"):
        load_cifar10(tmp_path)
    assert not (tmp_path / "evil").exists()


def test_nowhere_to_be_found_says_what_was_tried_and_the_ways_out(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", offline) if _torchvision() else None
    monkeypatch.setenv("DECEF_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError) as error:
        load_cifar10(tmp_path)
    for part in (str(tmp_path), str(tmp_path / "elsewhere"), "no network", "dataset.root", "DECEF_DATA"):
        assert part in str(error.value)


def _torchvision() -> bool:
    from decef.data.torchvision_cpu import import_torchvision

    return import_torchvision() is not None


@needs_cifar
def test_the_real_cifar10_agrees_with_torchvision():
    _torchvision()
    from torchvision.datasets import CIFAR10

    train, test = load_cifar10(real)
    assert (len(train), len(test)) == (50_000, 10_000)
    assert {name: cifar.MD5[name] for name, _ in CIFAR10.train_list + CIFAR10.test_list} == dict(
        CIFAR10.train_list + CIFAR10.test_list
    )
    for name, part in ((cifar.TEST_FILE, test), ("data_batch_2", train.subset(slice(10_000, 20_000)))):
        rows = torch.cat([part.labels.to(torch.uint8)[:, None], part.images.flatten(1)], dim=1)
        assert hashlib.md5(rows.numpy()).hexdigest() == cifar.MD5[f"{name}.bin"]
    reference = CIFAR10(str(real), train=False)  # checks the files' MD5
    assert torch.equal(test.images, torch.from_numpy(reference.data).permute(0, 3, 1, 2))
    assert test.labels.tolist() == reference.targets
    assert train.labels.bincount().tolist() == [5000] * 10
    info = DATASETS["cifar10"]
    pixels = train.images[:5000].float() / 255
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.tensor(info.mean), atol=0.01, rtol=0)
    torch.testing.assert_close(pixels.std((0, 2, 3)), torch.tensor(info.std), atol=0.01, rtol=0)


def test_digits_are_the_bundled_ones_and_normalised():
    info = DATASETS["digits"]
    train, test = info.load(None)
    assert (len(train), len(test)) == (1437, 360)
    assert train.images.shape[1:] == info.input_size
    assert test.labels.bincount().min() >= 34  # stratified
    again, _ = info.load(None)
    assert torch.equal(train.images, again.images)
    x = train.normalize(train.images)
    torch.testing.assert_close(torch.stack([x.mean(), x.std()]), torch.tensor([0.0, 1.0]), atol=1e-3, rtol=0)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(1, 256, (50, 2, 6, 5), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(50))


def test_every_image_once_when_nothing_is_augmented(images):
    batches = list(images.batches(8, torch.Generator().manual_seed(0)))
    assert [len(labels) for _, labels in batches] == [8] * 6
    seen = torch.cat([labels for _, labels in batches])
    assert len(seen.unique()) == 48
    assert seen.tolist() != sorted(seen.tolist())
    for x, labels in batches:
        assert torch.equal(x, images.images[labels])


def test_augmented_images_are_shifted_and_flipped_ones(images):
    found = {"shifts": set(), "flips": []}
    padded = torch.nn.functional.pad(images.images, (2, 2, 2, 2))
    for x, labels in replace(images, crop_padding=2, flip=True).batches(10, torch.Generator().manual_seed(3)):
        for image, label in zip(x, labels, strict=True):
            matches = [
                (top, left, flip)
                for top in range(5)
                for left in range(5)
                for flip in (False, True)
                if torch.equal(image.flip(2) if flip else image, padded[label, :, top : top + 6, left : left + 5])
            ]
            assert len(matches) == 1
            found["shifts"].add(matches[0][:2])
            found["flips"].append(matches[0][2])
    assert len(found["shifts"]) > 15
    assert 10 < sum(found["flips"]) < 40


def test_the_generator_alone_determines_the_batches(images):
    def epoch(seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.cat([x for x, _ in replace(images, crop_padding=1, flip=True).batches(10, generator)])

    first = epoch(5)
    torch.manual_seed(123)
    assert torch.equal(first, epoch(5))
    assert not torch.equal(first, epoch(6))
