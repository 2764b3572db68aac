"""Pixels: files read and checked, the views of an epoch, test images, folders, holdout, accuracy."""

import hashlib
import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from golden import ROOT, load
from PIL import Image
from running import FULL, SHARED, Script, common, random_weights, same_end
from torch import nn

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STATISTICS = {
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "cifar10": ((0.4914, 0.4824, 0.4467), (0.2471, 0.2435, 0.2616)),
    "stl10": ((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2712)),
    "tinyimagenet": IMAGENET,
}
MEAN, STD = STATISTICS["cifar100"]
NUMBERS = itertools.count()


def some(n, size=32, pixels=None):
    """`n` training and 10 test images of random pixels with the statistics of CIFAR-100; image i has label i modulo 100."""
    if pixels is None:
        pixels = np.random.default_rng(n).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    return FULL._replace(train=(pixels, np.arange(n) % 100), test=(pixels[:10].copy(), np.arange(min(n, 10))), mean=MEAN, std=STD)


def loaded(monkeypatch, raw, padding="constant", **flags):
    """load_data of a data set that is `raw`, with `flags`."""
    name = f"set {next(NUMBERS)}"
    monkeypatch.setitem(common.DATASETS, name, lambda data, size: raw)
    return common.load_data(load("vanilla").Args(**{"dataset": name, "device": "cpu", "batch_size": 16} | flags), padding)


def read(name, data, **flags):
    return common.load_data(load("vanilla").Args(**dict(dataset=name, data=data, device="cpu", batch_size=7) | flags))


def again(folder):
    """The same folder in another spelling, so that nothing is taken from memory."""
    return folder / ".." / folder.name


def all_of(batches):
    return [torch.cat(parts) for parts in zip(*batches)]


def plain(images, mean=MEAN, std=STD):
    """What torchvision's ToTensor and Normalize make of images."""
    return torch.stack([tv.normalize(tv.to_tensor(image), mean, std) for image in images])


def refused(capsys, call, *words, code=1):
    """`call` ends the program with `code` and one line on stderr that holds all `words`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        call()
    line = capsys.readouterr().err
    assert exit.value.code == code, line
    assert line.count("\n") == 1 and line.endswith("\n"), line
    assert all(str(word) in line for word in words), line


# Views


def pil_views(images, offsets, padding="constant"):
    """What torchvision's RandomCrop(size, padding=size // 8), flip, ToTensor and Normalize make of images."""
    views, size = [], images.shape[1]
    for pixels, (top, left, flip) in zip(images, offsets.T.tolist(), strict=True):
        image = tv.crop(tv.pad(Image.fromarray(pixels), size // 8, padding_mode=padding), top, left, size, size)
        views.append(tv.hflip(image) if flip else image)
    return plain(views)


@pytest.mark.parametrize(("size", "padding"), [(32, "constant"), (32, "reflect"), (64, "constant"), (96, "reflect")])
def test_every_view_is_bit_equal_to_torchvision(size, padding, monkeypatch):
    places = range(0, size // 4 + 1, size // 32)
    offsets = torch.tensor([[top, left, flip] for top in places for left in places for flip in range(2)]).T
    raw = some(offsets.shape[1], size)
    train, _ = loaded(monkeypatch, raw, padding)
    own = train.normalize(train.crop(torch.arange(len(train)), offsets))
    assert own.dtype == torch.float32
    assert torch.equal(own, pil_views(raw.train[0], offsets, padding))


def test_an_epoch_is_bit_equal_to_torchvision(monkeypatch):
    raw, drawn = some(100), []
    train, _ = loaded(monkeypatch, raw, batch_size=32)
    draw = train.offsets
    monkeypatch.setattr(train, "offsets", lambda: drawn.append(draw()) or drawn[-1])
    batches = list(train.epoch(3, views=2))
    assert [len(y) for *_, y, _ in batches] == [32, 32, 32, 4]
    x_1, x_2, y, index = all_of(batches)
    assert sorted(index.tolist()) == list(range(100)) != index.tolist()
    assert torch.equal(y, index % 100)
    for x, offsets in (x_1, drawn[0]), (x_2, drawn[1]):
        assert torch.equal(x, pil_views(raw.train[0][index], offsets))


def test_two_views(monkeypatch):
    """The first is the one of views=1, the second a draw of its own."""
    train, _ = loaded(monkeypatch, some(5000), batch_size=500)
    once, (x_1, _, *same) = all_of(train.epoch(2)), all_of(train.epoch(2, views=2))
    assert all(map(torch.equal, once, (x_1, *same)))
    train.generator.manual_seed(0)
    first, second = train.offsets(), train.offsets()
    for draws in first, second:
        counts = torch.bincount(draws[0] * 18 + draws[1] * 2 + draws[2], minlength=162)
        assert len(counts) == 162
        assert abs(((counts - 5000 / 162) ** 2 / (5000 / 162)).sum() - 161) < 5 * (2 * 161) ** 0.5  # chi-squared
    assert abs(torch.corrcoef(torch.stack([first[0], second[0]]).double())[0, 1]) < 0.05
    assert abs((first == second).double().mean(1)[0] - 1 / 9) < 0.02


def test_normalize_and_its_inverse(monkeypatch):
    raw = some(8, pixels=np.arange(8 * 32 * 32 * 3).reshape(8, 32, 32, 3).astype(np.uint8))  # all values in all channels
    train, _ = loaded(monkeypatch, raw, batch_size=8)
    pixels = torch.from_numpy(raw.train[0]).permute(0, 3, 1, 2)
    x = train.normalize(pixels)
    assert torch.equal(x, plain(raw.train[0]))
    torch.testing.assert_close(train.normalize(pixels / 255), x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(train.denormalize(x), pixels / 255, rtol=1e-6, atol=1e-6)
    assert torch.equal((train.denormalize(x) * 255).round().to(torch.uint8), pixels)


def test_draws_depend_on_seed_phase_and_epoch_alone(monkeypatch):
    raw = some(50)
    places = [(1, "", 1), (1, "", 2), (2, "", 1), (2, "", 2), (12, "", 1), (1, "", 12)]
    places += [(1, "a", 1), (1, "b", 1), (1, "a", 2), (1, "ab", 1)]
    orders = set()
    for seed, phase, epoch in places:
        first, second = (loaded(monkeypatch, raw, seed=seed, batch_size=size)[0] for size in (16, 50))
        expected = all_of(first.epoch(epoch, phase))
        further = torch.rand(3, generator=first.generator).tolist()
        all_of(second.epoch(5))  # an earlier epoch, another batch size, a method's own draws, the global generator: no matter
        torch.manual_seed(seed + epoch)
        batches = []
        for batch in second.epoch(epoch, phase):
            batches.append(batch)
            torch.rand(3, generator=second.generator)
        assert all(map(torch.equal, expected, all_of(batches)))
        all_of(first.epoch(epoch, phase))
        assert torch.rand(3, generator=first.generator).tolist() == further  # a method's own draws repeat with the epoch
        orders.add(tuple(expected[2].tolist()))
    assert len(orders) == len(places)


@pytest.mark.parametrize("padding", ["constant", "reflect"])
def test_test_images_are_in_order_and_as_they_are(padding, monkeypatch):
    raw = some(1203)
    labels = np.random.default_rng(1).integers(0, 100, 1203)
    _, test = loaded(monkeypatch, raw._replace(test=(raw.train[0], labels)), padding)
    x, y = all_of(test.batches())
    assert torch.equal(y, torch.from_numpy(labels)) and torch.equal(test.labels, y)
    assert torch.equal(x, plain(raw.train[0]))


class Guess(nn.Module):
    """In eval mode, it is right for the images of even label; an image's label is its first pixel."""

    def __init__(self):
        super().__init__()
        self.dropout, self.norm = nn.Dropout(0.9), nn.BatchNorm2d(3)

    def forward(self, x):
        self.norm(x)
        label = ((x[:, 0, 0, 0] * STD[0] + MEAN[0]) * 255).round().long()
        return self.dropout(nn.functional.one_hot(label + label % 2, 11).float() + 0.1), None


def test_accuracy(monkeypatch):
    labels, net = np.arange(507) % 10, Guess()
    pixels = np.zeros((507, 32, 32, 3), np.uint8) + labels[:, None, None, None].astype(np.uint8)
    _, test = loaded(monkeypatch, some(20)._replace(test=(pixels, labels)))
    for training in True, False:
        net.train(training)
        assert common.accuracy(net, test) == pytest.approx(100 * (labels % 2 == 0).mean())
        assert net.training == net.dropout.training == training
    assert not net.norm.running_mean.any()


# What a user's function returns


def with_labels(*labels):
    return lambda raw: raw._replace(train=(raw.train[0], np.array(labels)))


def with_pixels(change, split="train"):
    return lambda raw: raw._replace(**{split: (change(getattr(raw, split)[0]), getattr(raw, split)[1])})


FAULTS = {
    "float pixels": (with_pixels(lambda x: x / 255), "uint8"),
    "channels first": (with_pixels(lambda x: x.transpose(0, 3, 1, 2)), "(20, 3, 32, 32)"),
    "grayscale": (with_pixels(lambda x: x[..., 0]), "(20, 32, 32)"),
    "four channels": (with_pixels(lambda x: np.concatenate([x, x[..., :1]], 3)), "(20, 32, 32, 4)"),
    "not square": (with_pixels(lambda x: x[:, :30]), "(20, 30, 32, 3)"),
    "an image too few": (with_pixels(lambda x: x[1:]), "19"),
    "another size to test": (with_pixels(lambda x: x[:, :24, :24], "test"), "24"),
    "a list": (lambda raw: raw._replace(train=(raw.train[0].tolist(), raw.train[1])), "training"),
    "a label too large": (with_labels(*range(19), 100), "99"),
    "a negative label": (with_labels(*range(19), -1), "0 to 99"),
    "labels that are not whole": (with_labels(*np.arange(20.0)), "integers"),
    "one-hot labels": (lambda raw: raw._replace(test=(raw.test[0], np.eye(10, dtype=int))), "(10, 10)"),
    "no test images": (lambda raw: raw._replace(test=(raw.test[0][:0], raw.test[1][:0])), "test"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_line_for_each_fault_of_own_data(fault, monkeypatch, capsys):
    change, words = FAULTS[fault]
    refused(capsys, lambda: loaded(monkeypatch, change(some(20))), words, "--dataset set")


def test_own_data_of_any_size(monkeypatch):
    for flags, size in ({}, 48), ({"image_size": 24}, 24):
        train, test = loaded(monkeypatch, some(20, 48), **flags)
        assert next(iter(train.epoch(1)))[0].shape == (16, 3, size, size)
        assert (len(train), train.classes, train.names[3], train.size, test.size) == (20, 100, "pattern 3", size, size)


@pytest.mark.parametrize("flag", ["batch_size=51", "batch_size=49", "batch_size=7", "holdout=1", "holdout=2"])
def test_flags_that_50_images_of_50_classes_do_not_allow(flag, monkeypatch, capsys):
    name, value = flag.split("=")
    words = f"--{name.replace('_', '-')} {value}"
    refused(capsys, lambda: loaded(monkeypatch, some(50), **{name: int(value)}), words, code=2)


# Holdout


def test_holdout(monkeypatch):
    raw = some(1000)
    everything, _ = all_of(loaded(monkeypatch, raw)[0].batches())
    found = []
    for seed in 1, 2:
        train, test = loaded(monkeypatch, raw, holdout=3, seed=seed)
        raw.test[0][:] = 0  # the test images play no part
        (kept, y_kept), (held, y_held) = all_of(train.batches()), all_of(test.batches())
        assert (torch.bincount(y_kept).tolist(), torch.bincount(y_held).tolist()) == ([7] * 100, [3] * 100)
        assert sorted(all_of(train.epoch(1))[2].tolist()) == list(range(len(train))) == list(range(700))
        kept, held, known = ({x.numpy().tobytes() for x in images} for images in (kept, held, everything))
        assert kept | held == known and not kept & held
        found.append(held)
    assert found[0] == found[1]  # the same images for every seed


# CIFAR's files


def fake(monkeypatch, name, folder, per_file=7):
    """A tiny data set in CIFAR's binary format under `folder`, its hashes for the official ones; gives {file: records}."""
    random, label_bytes = np.random.default_rng(3), {"cifar100": 2, "cifar10": 1}[name]
    files, records = dict(common.CIFAR[name]), {}
    place = folder / files["folder"]
    place.mkdir(parents=True)
    for split in ("train", "test"):
        hashes = {}
        for file in files[split]:
            records[file] = random.integers(0, 256, (per_file, label_bytes + 3072), dtype=np.uint8)
            records[file][:, :label_bytes] %= 10
            (place / file).write_bytes(records[file].tobytes())
            hashes[file] = hashlib.sha256(records[file].tobytes()).hexdigest()
        files[split] = hashes
    classes = 100 if name == "cifar100" else 10
    (place / files["names"]).write_text("\n".join(f"name{k}" for k in range(classes)) + "\n\n")
    monkeypatch.setitem(common.CIFAR, name, files)
    return records


@pytest.mark.parametrize("name", ["cifar100", "cifar10"])
def test_binary_records(name, monkeypatch, tmp_path):
    records = fake(monkeypatch, name, tmp_path)
    mean, std = STATISTICS[name]
    train, test = read(name, tmp_path)
    assert (len(train), len(test), train.classes) == ((7, 7, 100) if name == "cifar100" else (35, 7, 10))
    assert train.names[1] == test.names[1] == "name1"
    for images, is_test in (train, False), (test, True):
        record = np.concatenate([records[file] for file in records if ("test" in file) == is_test])
        x, y = all_of(images.batches())
        labels = record.shape[1] - 3072
        assert y.tolist() == record[:, labels - 1].tolist()  # the fine label, the last before the pixels
        planes = [record[:, labels + c * 1024 :][:, :1024].reshape(-1, 32, 32) for c in range(3)]  # red, green, blue by rows
        assert torch.equal(x, plain(np.stack(planes, 3), mean, std))


@pytest.mark.parametrize("damage", ["truncated", "a byte", "missing"])
def test_a_damaged_file_is_refused(damage, monkeypatch, tmp_path, capsys):
    fake(monkeypatch, "cifar100", tmp_path)
    path = tmp_path / "cifar-100-binary" / "test.bin"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content[:-1] if damage == "truncated" else content)
    if damage == "missing":
        path.unlink()
    refused(capsys, lambda: read("cifar100", tmp_path), path)


class FakeCIFAR100:
    """Stands in for torchvision's class, which reads cifar-100-python and checks it."""

    def __init__(self, root, train, download):
        self.classes = [f"name{k}" for k in range(100)]
        assert download and Path(root).is_dir()
        n = 10 if train else 7
        self.data = np.random.default_rng(n).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        self.targets = [7 * i for i in range(n)]


def test_the_python_version_of_cifar_is_read_where_it_lies(monkeypatch, tmp_path):
    monkeypatch.setitem(common.CIFAR, "cifar100", common.CIFAR["cifar100"] | {"torchvision": FakeCIFAR100})
    (tmp_path / "cifar-100-python").mkdir()
    train, test = read("cifar100", tmp_path)
    assert (len(train), len(test), train.names[-1]) == (10, 7, "name99")
    assert train.labels.tolist() == [7 * i for i in range(10)]
    expected = FakeCIFAR100(tmp_path, False, True).data
    assert torch.equal(all_of(test.batches())[0], plain(expected))
    fake(monkeypatch, "cifar100", tmp_path)
    assert len(read("cifar100", again(tmp_path))[0]) == 7  # the binary files count where there are both


def test_no_data_and_no_network(monkeypatch, tmp_path, capsys):
    def no_network(*_, **__):
        raise OSError("Temporary failure\nin name resolution")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    for name in "cifar100", "cifar10", "stl10":
        refused(capsys, lambda name=name: read(name, tmp_path / "new" / "data"), tmp_path / "new", "--dataset synthetic")


def test_synthetic_can_be_learned():
    centres = np.stack([FULL.train[0][FULL.train[1] == label].mean(0) for label in range(100)]).reshape(100, -1)
    nearest = [np.argmin(((centres - image) ** 2).sum(1)) for image in FULL.test[0].reshape(500, -1).astype(float)]
    assert (nearest == FULL.test[1]).mean() > 0.9
    again = common.DATASETS["synthetic"](Path("nowhere"), None)
    assert all(map(np.array_equal, (*FULL.train, *FULL.test), (*again.train, *again.test)))


# Decoded and resized once


class FakeSTL10:
    """Stands in for torchvision's class."""

    def __init__(self, root, split, download):
        n = 20 if split == "train" else 12
        self.data = np.random.default_rng(n).integers(0, 256, (n, 3, 96, 96), dtype=np.uint8)
        self.labels = np.arange(n) % 10


@pytest.mark.parametrize("size", [None, 32])
def test_stl10_is_resized_and_cached(size, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(common.datasets, "STL10", FakeSTL10)
    read("stl10", tmp_path, image_size=size)
    monkeypatch.setattr(common.datasets, "STL10", None)
    _, test = read("stl10", again(tmp_path), image_size=size)
    side, images = size or 96, FakeSTL10(None, "test", True).data.transpose(0, 2, 3, 1)
    expected = [tv.resize(Image.fromarray(image), side) if size else image for image in images]
    x, _ = all_of(test.batches())
    assert torch.equal(x, plain(expected, *STATISTICS["stl10"]))
    folder = tmp_path / f"stl10_{side}"
    assert {file.name for file in folder.iterdir()} == {f"{split}_{a}.npy" for split in ("train", "test") for a in "xy"}
    (folder / "test_x.npy").write_bytes((folder / "test_x.npy").read_bytes()[:-1])
    refused(capsys, lambda: read("stl10", again(again(tmp_path)), image_size=size), folder.name, "delete it")


def unpacked(name, folder):
    script = SHARED / name / "unpack.py"
    if not script.exists():
        pytest.skip(f"no {script}")
    subprocess.run([sys.executable, str(script), str(folder)], check=True, capture_output=True)
    return folder


@pytest.mark.real
@pytest.mark.slow
def test_real_stl10(tmp_path):
    train, test = read("stl10", unpacked("stl10", tmp_path), image_size=32, batch_size=64)
    assert (len(train), len(test), train.names[9], train.size) == (5000, 8000, "truck", 32)
    assert torch.bincount(train.labels).tolist() == [500] * 10


@pytest.fixture
def tiny(tmp_path):
    """A tiny data set in the official layout of Tiny-ImageNet, wnids not sorted: two classes of 6 images, the second gray."""
    folder, random = tmp_path / "tiny-imagenet-200", np.random.default_rng(0)
    lines = []
    for k, wnid in enumerate(["n2", "n1"]):
        images = folder / "train" / wnid / "images"
        images.mkdir(parents=True)
        (folder / "val" / "images").mkdir(parents=True, exist_ok=True)
        for i in range(6):
            image = Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).convert("RGB" if k == 0 else "L")
            image.save(images / f"{wnid}_{i}.JPEG")
        image.save(folder / "val" / "images" / f"val_{k}.JPEG")
        lines.append(f"val_{k}.JPEG\t{wnid}\t0\t0\t9\t9\n")
    (folder / "wnids.txt").write_text("n2\nn1\n")
    (folder / "words.txt").write_text("n1\tdog, hound\nn2\tcat\nn3\tcow\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(reversed(lines)))
    return folder


@pytest.mark.parametrize("size", [None, 32])
def test_tinyimagenet(size, tiny):
    train, test = read("tinyimagenet", tiny.parent, image_size=size)
    side = size or 64
    assert (train.names, train.labels.tolist(), test.labels.tolist()) == (["cat", "dog, hound"], [0] * 6 + [1] * 6, [1, 0])
    x, _ = all_of(train.batches())
    files = [tiny / "train" / w / "images" / f"{w}_{i}.JPEG" for w in ("n2", "n1") for i in range(6)]
    assert torch.equal(x, plain([tv.resize(Image.open(file).convert("RGB"), side) for file in files], *IMAGENET))
    shutil.rmtree(tiny / "train")  # decoded once
    assert torch.equal(all_of(read("tinyimagenet", again(tiny.parent), image_size=size)[0].batches())[0], x)


@pytest.mark.parametrize("damage", ["cut", "no image", "missing", "no wnids.txt"])
def test_damaged_tinyimagenet(damage, tiny, capsys):
    file = tiny / "val" / "images" / "val_1.JPEG" if damage == "missing" else tiny / "train" / "n1" / "images" / "n1_3.JPEG"
    if damage == "no wnids.txt":
        file = tiny / "wnids.txt"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:500])
    elif damage == "no image":
        file.write_text("not an image")
    else:
        file.unlink()
    for _ in range(2):  # nothing half decoded is left to be taken
        refused(capsys, lambda: read("tinyimagenet", tiny.parent), file)


@pytest.mark.real
def test_real_tinyimagenet(tmp_path):
    train, test = read("tinyimagenet", unpacked("tiny-imagenet-sample", tmp_path), batch_size=64)
    assert (len(train), len(test), train.classes, train.size) == (1200, 400, 20, 64)
    x, y = all_of(train.batches())
    gray = (train.denormalize(x) * 255).round().std(1).amax((1, 2)) == 0
    assert gray.sum() >= 27 and "sunglasses" in train.names[int(y[gray].mode().values)]


@pytest.mark.real
@pytest.mark.slow
def test_real_cifar100(tmp_path):
    folder = ROOT / "data" if (ROOT / "data" / "cifar-100-binary").is_dir() else unpacked("cifar100", tmp_path)
    train, test = read("cifar100", folder, batch_size=64)
    assert (torch.bincount(train.labels).tolist(), torch.bincount(test.labels).tolist()) == ([500] * 100, [100] * 100)
    x = test.denormalize(all_of(test.batches())[0]).double()
    assert x.mean((0, 2, 3)).tolist() == pytest.approx([0.50879641, 0.48739301, 0.44194221], abs=1e-6)
    assert x.std((0, 2, 3)).tolist() == pytest.approx([0.26825157, 0.25736374, 0.27709577], abs=1e-6)


# Folders


@pytest.fixture
def photos(tmp_path):
    """An image folder: two classes, 12 training and 6 test images of natural sizes, gray and transparent ones among them."""
    random = np.random.default_rng(0)
    for split, n in ("train", 6), ("val", 3):
        for label in "cat", "dog":
            (tmp_path / "photos" / split / label).mkdir(parents=True)
            for i in range(n):
                coarse = Image.fromarray(random.integers(0, 256, (5, 4 + i, 3), dtype=np.uint8))
                image = coarse.resize((60 + 9 * i, 75)).convert(["RGB", "L", "RGBA"][i % 3])
                image.save(tmp_path / "photos" / split / label / f"{i}.png")
    return tmp_path / "photos"


def folder(place, **flags):
    return read("folder", place, **{"image_size": 32, "batch_size": 5, "workers": 0} | flags)


def test_a_folder_is_the_same_with_any_number_of_workers(photos):
    train, test = folder(photos)
    assert (train.labels.tolist(), len(test), train.names, train.size) == ([0] * 6 + [1] * 6, 6, ["cat", "dog"], 32)
    x, y = all_of(test.batches())
    files = sorted((photos / "val").rglob("*.png"))
    views = [tv.center_crop(tv.resize(Image.open(file).convert("RGB"), 36), 32) for file in files]
    assert torch.equal(x, plain(views, *IMAGENET))
    expected = {epoch: all_of(train.epoch(epoch, views=2)) for epoch in (1, 2)}
    for workers in 1, 3:
        again, again_test = folder(photos, workers=workers, batch_size=4)
        for epoch in 2, 1:  # out of order, as after a resume
            state = torch.random.get_rng_state()
            assert all(map(torch.equal, all_of(again.epoch(epoch, views=2)), expected[epoch]))
            assert torch.equal(state, torch.random.get_rng_state())
        assert all(map(torch.equal, all_of(again_test.batches()), (x, y)))
    (x_1, x_2, y, index), once = expected[1], all_of(train.epoch(1))
    assert all(map(torch.equal, once, (x_1, y, index)))
    assert sorted(index.tolist()) == list(range(12)) and torch.equal(y, train.labels[index])
    others = [x_2, expected[2][0], all_of(folder(photos, seed=2)[0].epoch(1))[0]]  # another view, epoch, seed
    assert not {x.numpy().tobytes() for x in x_1} & {x.numpy().tobytes() for other in others for x in other}


def test_the_views_of_a_folder_are_random_resized_crops(photos):
    """Of an image that gets brighter to the right: crops of 8 to 100 % of the area, flipped or not."""
    ramp = np.tile(np.linspace(0, 255, 96)[:, None], (96, 1, 3)).astype(np.uint8)
    for file in photos.rglob("*.png"):
        Image.fromarray(ramp).save(file)
    train, _ = folder(photos)
    x = torch.cat([train.denormalize(x) for epoch in range(1, 9) for x, _, _ in train.epoch(epoch)])
    slope = x[:, 0, 16, -1] - x[:, 0, 16, 0]
    assert 0.3 < (slope < 0).float().mean() < 0.7  # flipped
    assert slope.abs().min() < 0.5 and slope.abs().max() > 0.8 and slope.abs().min() > 0.15


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_file_in_a_folder_is_named(workers, photos, capsys):
    file = photos / "train" / "dog" / "4.png"
    file.write_bytes(file.read_bytes()[:200])
    train, _ = folder(photos, workers=workers)
    refused(capsys, lambda: list(train.epoch(1)), file)
    file.unlink()
    refused(capsys, lambda: list(train.epoch(1)), file)


def test_folders_that_are_none(photos, tmp_path, capsys):
    refused(capsys, lambda: folder(tmp_path / "nothing"), tmp_path / "nothing", "train/<class>/")
    (photos / "val" / "cow").mkdir()
    shutil.copy(photos / "val" / "cat" / "0.png", photos / "val" / "cow")
    refused(capsys, lambda: folder(photos), "cow")
    shutil.rmtree(photos / "val" / "cow")
    for file in (photos / "train" / "dog").iterdir():
        file.unlink()
    refused(capsys, lambda: folder(photos), "dog")
    shutil.rmtree(photos / "val")
    refused(capsys, lambda: folder(photos), photos, "val")


def test_holdout_of_a_folder(photos):
    (photos / "val" / "cat" / "0.png").write_text("not an image")  # the test images are not looked at
    found = []
    for seed in 1, 2:
        train, test = folder(photos, holdout=2, seed=seed)
        assert (train.labels.tolist(), test.labels.tolist()) == ([0] * 4 + [1] * 4, [0, 0, 1, 1])
        found.append(all_of(test.batches())[0])
        assert not {*train.files} & {*test.files} and len({*train.files} | {*test.files}) == 12
    assert torch.equal(*found)


SLOW = [
    pytest.param(f"torchvision.{net}", marks=[pytest.mark.slow, pytest.mark.real]) for net in ("resnet18", "mobilenet_v3_small")
]


@pytest.mark.parametrize("student", ["resnet8", *SLOW])
def test_a_run_on_a_folder_killed_and_resumed(student, photos, monkeypatch, capfd, tmp_path):
    """resnet8 on the images made here; torchvision's networks on real photographs."""
    size = 32
    if student != "resnet8":
        shutil.rmtree(photos)
        size, photos = 64, unpacked("photos", tmp_path) / "photos"
        for label in "dress hat outwear pants shirt".split():  # three of eight classes are left
            for split in "train", "val":
                shutil.rmtree(photos / split / label)
    script = Script(monkeypatch, capfd, tmp_path)
    random_weights("teacher.pt", student, len(list((photos / "train").iterdir())))
    script.usual = f"--dataset folder --data photos --image-size {size} --device cpu --epochs 2 --batch-size 5"
    flags = f"--student {student} --teacher {student} --teacher-weights teacher.pt"
    assert script("kd", flags, "--workers 2 --runs whole").code == 0
    with script.dying():
        assert script("kd", flags, "--workers 1 --runs broken").code == -9
    file = next((photos / "train").rglob("*.*"))
    content = file.read_bytes()
    file.write_bytes(content + b"1")
    refused = script("kd", flags, "--workers 0 --runs broken")
    assert refused.code == 1 and "images" in refused.error()
    file.write_bytes(content)
    done = script("kd", flags, "--workers 0 --runs broken")
    assert (done.code, done.err) == (0, "") and "continuing after epoch 1" in done.out
    same_end("whole", "broken")
    shutil.rmtree(photos)
    again = script("kd", flags, "--runs broken")
    note, result = again.out.splitlines(keepends=True)
    assert (again.code, result) == (0, done.out.splitlines(keepends=True)[-1])
    assert note.startswith("note: photos has no images")
