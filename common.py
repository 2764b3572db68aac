"""What must be the same for every method: pixels, networks, teachers, accuracy, and the folder a run lives in.

A method file imports from here and from nothing else of the project; nothing here knows a method. In this order: data
(`load_data`), networks (`build`, `shapes`), `accuracy`, `graphed`, teachers (`load_teacher`), runs (`Run`).
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NamedTuple, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two processes out of one run folder
    fcntl = None

ROOT = Path(__file__).resolve().parent
SAVE_EVERY = 20.0  # seconds of training between two checkpoints, at least
GRAPH = os.environ.get("CUDA_GRAPH") == "1"  # off by default: see `graphed`


def fail(message: str, code: int = 1) -> NoReturn:
    """End the program with one line on stderr; exit code 2 is for bad flags, 1 for everything else."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def clock(seconds: float) -> str:
    """A duration as a person says it: 12.3 s, 5 min 12 s, 3 h 28 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    if seconds < 3599.5:
        return "{} min {:02} s".format(*divmod(round(seconds), 60))
    return "{} h {:02} min".format(*divmod(round(seconds / 60), 60))


# Data


class RawData(NamedTuple):
    """A data set as read: uint8 pixels (N, 32, 32, 3) and int64 labels (N,) of both splits, and how to normalise."""

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


# The official binary versions: records of label bytes (the last one counts) and 3 x 32 x 32 pixels; {file: SHA-256}
CIFAR: dict[str, dict[str, Any]] = {
    "cifar100": dict(
        archive=("cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),
        folder="cifar-100-binary",
        label_bytes=2,
        train={"train.bin": "f31298fc616915fa142368359df1c4ca2ae984d6915ca468b998a5ec6aeebf29"},
        test={"test.bin": "d8b1e6b7b3bee4020055f0699b111f60b1af1e262aeb93a0b659061746f8224a"},
        statistics=(100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    ),
    "cifar10": dict(
        archive=("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
        folder="cifar-10-batches-bin",
        label_bytes=1,
        train={
            "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
            "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
            "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
            "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
            "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
        },
        test={"test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"},
        statistics=(10, (0.4914, 0.4824, 0.4467), (0.2471, 0.2435, 0.2616)),
    ),
}


def read_cifar(name: str, data: Path) -> RawData:
    """CIFAR from the folder `data`, else from its authors' site; every file is checked by hash."""
    cifar = CIFAR[name]
    folder, skip = data / cifar["folder"], cifar["label_bytes"]
    if not folder.is_dir():
        download(*cifar["archive"], folder)

    def read(hashes: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
        records = []
        for file, sha256 in hashes.items():
            path = folder / file
            raw = np.fromfile(path, np.uint8) if path.is_file() else np.empty(0, np.uint8)
            if hashlib.sha256(raw).hexdigest() != sha256:
                found = f"is not the official file: {raw.size:,} bytes, another SHA-256" if path.is_file() else "is missing"
                fail(f"{path} {found}; delete the folder {folder} and start again to download it")
            records.append(raw.reshape(-1, skip + 3072))
        rows = np.concatenate(records)
        return rows[:, skip:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, skip - 1].astype(np.int64)

    return RawData(read(cifar["train"]), read(cifar["test"]), *cifar["statistics"])


def download(archive: str, md5: str, folder: Path) -> None:
    """Fetch and unpack an archive; `folder` appears whole or not at all, also if two runs do this at once."""
    from torchvision.datasets.utils import download_and_extract_archive

    url, unfinished = f"https://www.cs.toronto.edu/~kriz/{archive}", folder.parent / f".{folder.name}.{os.getpid()}"
    try:
        print(f"downloading {url} to {folder.parent}", flush=True)
        unfinished.mkdir(parents=True)
        download_and_extract_archive(url, str(unfinished), md5=md5, remove_finished=True)
        if not folder.is_dir():
            os.replace(unfinished / folder.name, folder)
    except (OSError, RuntimeError) as error:
        fail(f"cannot download {url} ({one_line(error)}): put its files under {folder}, or try --dataset synthetic")
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def synthetic(data: Path) -> RawData:
    """100 classes of a random pattern plus noise, 2,000 + 500 images: to try things out without a download."""
    random = np.random.default_rng(0)
    patterns = random.normal(size=(100, 1, 1, 3)) + random.normal(size=(100, 4, 4, 3)).repeat(8, axis=1).repeat(8, axis=2)

    def draw(n: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(n) % 100
        pixels = 128 + 40 * patterns[labels] + 10 * random.normal(size=(n, 32, 32, 3))
        return pixels.clip(0, 255).astype(np.uint8), labels

    return RawData(draw(2000), draw(500), 100, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


# name -> function of the --data folder; add a line for a data set of your own
DATASETS: dict[str, Callable[[Path], RawData]] = {name: partial(read_cifar, name) for name in CIFAR} | {"synthetic": synthetic}


class Images:
    """One split of a data set, on the device as uint8, padded by 4 before any normalisation.

    `crop` and `normalise` together equal torchvision's RandomCrop(32, padding=4), RandomHorizontalFlip, ToTensor and
    Normalize bit for bit for the same offsets, on every device.
    """

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, raw: RawData, args: Any, padding: str = "constant"):
        self.args, self.device, self.classes = args, torch.device(args.device), raw.classes
        padded = np.pad(pixels, [(0, 0), (4, 4), (4, 4), (0, 0)], mode=padding)
        self.pixels = torch.from_numpy(padded).to(self.device).flatten(0, 2)  # (N * 40 * 40, 3)
        self.labels = torch.from_numpy(labels).to(self.device)
        self.mean, self.std = torch.tensor(raw.mean), torch.tensor(raw.std)
        table = (torch.arange(256)[:, None] / 255 - self.mean) / self.std  # made on the CPU: the same floats everywhere
        self.table = table.T.flatten().to(self.device)  # (3 * 256,)
        self.channel = 256 * torch.arange(3, device=self.device)
        self.side = torch.arange(32, device=self.device)
        self.generator = torch.Generator()
        self.estimated = False

    def __len__(self) -> int:
        return len(self.labels)

    def offsets(self) -> Tensor:
        """Row and column of the crop (0 to 8) and flip (0 or 1) for all N images, int64 (3, N), drawn from `self.generator`."""
        crop = torch.randint(9, (2, len(self)), generator=self.generator)
        flip = torch.randint(2, (1, len(self)), generator=self.generator)
        return torch.cat([crop, flip]).to(self.device)

    def crop(self, index: Tensor, offsets: Tensor) -> Tensor:
        """uint8 views (B, 3, 32, 32) of the images `index` (B,), cropped and flipped by `offsets` (3, B)."""
        top, left, flip = offsets[:, :, None]
        rows = index[:, None] * 40 + top + self.side
        columns = left + torch.where(flip == 1, 31 - self.side, self.side)
        return self.pixels[rows[:, :, None] * 40 + columns[:, None, :]].permute(0, 3, 1, 2)

    def normalise(self, pixels: Tensor) -> Tensor:
        """float32 (pixel / 255 - mean) / std of uint8 pixels (B, 3, 32, 32), looked up in a table of 3 x 256 values."""
        return self.table[pixels.permute(0, 2, 3, 1) + self.channel].permute(0, 3, 1, 2)

    def epoch(self, epoch: int, phase: str = "") -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All images once in random order and view: batches of x (B, 3, 32, 32), y (B,) and the images' index (B,).

        The draws depend on (seed, phase, epoch) alone: they are the same for every method and device and after a resume.
        All are made before the first batch, so what a method draws from `self.generator` later cannot shift them.
        """
        self.generator.manual_seed(int(np.random.SeedSequence([self.args.seed, epoch, *phase.encode()]).generate_state(1)[0]))
        order = torch.randperm(len(self), generator=self.generator).to(self.device)
        size, offsets = self.args.batch_size, self.offsets()
        for step, (index, offset) in enumerate(zip(order.split(size), offsets.split(size, dim=1))):
            if step in (10, 20) and not self.estimated and not phase:
                self.estimate(step, self.args.epochs - epoch + 1)
            yield self.normalise(self.crop(index, offset)), self.labels[index], index

    def estimate(self, step: int, epochs: int) -> None:
        """Time the steps 10 to 20, as the very first are slower, and say how long the `epochs` to go will take."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if step == 10:
            self.started = time.perf_counter()
            return
        self.estimated, one = True, (time.perf_counter() - self.started) / 10 * math.ceil(len(self) / self.args.batch_size)
        advice = "; a CUDA GPU is far faster, or try --epochs 5" if self.device.type == "cpu" and epochs * one > 3600 else ""
        print(f"estimate    {clock(one)} an epoch, {clock(epochs * one)} for the {epochs} to go{advice}", flush=True)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All images once, in order, neither cropped nor flipped: batches of x (500, 3, 32, 32), y (500,)."""
        middle = torch.tensor([[4], [4], [0]], device=self.device)
        for index in torch.arange(len(self), device=self.device).split(500):
            yield self.normalise(self.crop(index, middle.expand(3, len(index)))), self.labels[index]


def load_data(args: Any, padding: str = "constant") -> tuple[Images, Images]:
    """Training and test images of args.dataset on args.device; `padding` is a mode of numpy.pad, "constant" pads black."""
    raw = DATASETS[args.dataset](Path(args.data))
    train, test = Images(*raw.train, raw, args, padding), Images(*raw.test, raw, args)
    if args.batch_size > len(train):
        fail(f"--batch-size {args.batch_size} is larger than the {len(train):,} training images of {args.dataset}", 2)
    if (len(train) - 1) % args.batch_size == 0:
        fail(f"--batch-size {args.batch_size} leaves a last batch of one image, which has no batch statistics; take another", 2)
    return train, test


# Networks: the definitions and parameter names of RepDistiller, so that its and mdistiller's checkpoints load


class Features(NamedTuple):
    """What a network shows beside its logits. `shapes(net)` gives the same with shapes for one image in place of tensors."""

    maps: list[Any]  # f0 (stem), f1 ... fk (stages), each (B, C, H, W), as the published code takes them
    preacts: list[Any]  # the same before their last ReLU
    last: Any  # the map that is pooled into the classifier
    pooled: Any  # (B, C), the classifier's input


def conv(c_in: int, c_out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


class Staged(nn.Module):
    """Stem conv1-bn1-ReLU, stages layer1 ... layerk of blocks that return (output, preact), pooling, a linear classifier.

    `top`, where given, is the width of a 1x1 convolution between the last stage and the pooling.
    """

    def __init__(self, stem: nn.Conv2d, layers: list[list[nn.Module]], width: int, classes: int, classifier: str, top: int = 0):
        super().__init__()
        self.conv1, self.bn1 = stem, nn.BatchNorm2d(stem.out_channels)
        self.layers = [f"layer{k}" for k in range(1, len(layers) + 1)]
        for name, blocks in zip(self.layers, layers):
            self.add_module(name, nn.Sequential(*blocks))
        if top:
            self.conv2, self.bn2 = conv(width, top, 1), nn.BatchNorm2d(top)
        self.top, self.classifier = bool(top), classifier
        self.add_module(classifier, nn.Linear(top or width, classes))

    def forward(self, x: Tensor) -> tuple[Tensor, Features]:
        x = F.relu(self.bn1(self.conv1(x)))
        maps, preacts = [x], [x]
        for name in self.layers:
            for block in getattr(self, name):
                x, preact = block(x)
            maps.append(x)
            preacts.append(preact)
        last = F.relu(self.bn2(self.conv2(x))) if self.top else x
        pooled = last.mean((2, 3))
        return getattr(self, self.classifier)(pooled), Features(maps, preacts, last, pooled)


class BasicBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv(c_in, c_out, 3, stride), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = conv(c_out, c_out), nn.BatchNorm2d(c_out)
        self.downsample = nn.Sequential()
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(conv(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        preact = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.downsample(x)
        return F.relu(preact), preact


def resnet(classes: int, depth: int, widths: tuple[int, ...] = (16, 16, 32, 64)) -> nn.Module:
    """CIFAR ResNet of 6n + 2 layers (He et al. 2016) with projection shortcuts; widths are those of stem and stages."""
    plan = zip(widths, widths[1:], (1, 2, 2))
    layers = [[BasicBlock(a, b, s), *(BasicBlock(b, b, 1) for _ in range((depth - 2) // 6 - 1))] for a, b, s in plan]
    return init_kaiming(Staged(conv(3, widths[0]), layers, widths[-1], classes, "fc"))


class Bottleneck(nn.Module):
    def __init__(self, c_in: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv(c_in, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        self.shortcut = nn.Sequential()
        if stride != 1 or c_in != 4 * width:
            self.shortcut = nn.Sequential(conv(c_in, 4 * width, 1, stride), nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        preact = self.bn3(self.conv3(out)) + self.shortcut(x)
        return F.relu(preact), preact


def resnet50(classes: int) -> nn.Module:
    """The ImageNet ResNet-50 with a 3x3 stem of stride 1 and no max pool."""
    plan = (64, 64, 3, 1), (256, 128, 4, 2), (512, 256, 6, 2), (1024, 512, 3, 2)
    layers = [[Bottleneck(a, b, s), *(Bottleneck(4 * b, b, 1) for _ in range(n - 1))] for a, b, n, s in plan]
    return init_kaiming(Staged(conv(3, 64), layers, 2048, classes, "linear"))


class WideBlock(nn.Module):
    """Pre-activation block; its second output is its batch-normalised *input*, the preact of the stage before it."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), conv(c_in, c_out, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(c_out), conv(c_out, c_out)
        self.convShortcut = conv(c_in, c_out, 1, stride) if c_in != c_out else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        preact = self.bn1(x)
        activated = F.relu(preact)
        out = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return out + (x if self.convShortcut is None else self.convShortcut(activated)), preact


class WideResNet(nn.Module):
    """WRN-depth-k (Zagoruyko & Komodakis 2016), no dropout. Stage outputs are the blocks' raw sums, with negative values."""

    def __init__(self, classes: int, depth: int, k: int):
        super().__init__()
        widths, n = (16, 16 * k, 32 * k, 64 * k), (depth - 4) // 6
        self.conv1 = conv(3, 16)
        for i, stride in (1, 1), (2, 2), (3, 2):
            blocks = [WideBlock(widths[i - 1] if j == 0 else widths[i], widths[i], stride if j == 0 else 1) for j in range(n)]
            self.add_module(f"block{i}", nn.ModuleDict({"layer": nn.Sequential(*blocks)}))
        self.bn1, self.fc = nn.BatchNorm2d(widths[3]), nn.Linear(widths[3], classes)
        init_normal(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Features]:
        maps, normalised_inputs = [self.conv1(x)], []
        for stage in self.block1, self.block2, self.block3:
            x, preact = stage["layer"][0](maps[-1])
            for block in stage["layer"][1:]:
                x, _ = block(x)
            maps.append(x)
            normalised_inputs.append(preact)
        preacts = [maps[0], *normalised_inputs[1:], self.bn1(x)]
        last = F.relu(preacts[-1])
        pooled = last.mean((2, 3))
        return self.fc(pooled), Features(maps, preacts, last, pooled)


class VGG(nn.Module):
    """VGG with batch norm for 32x32 images: five blocks, max pools after the first three, one linear layer."""

    def __init__(self, classes: int, convs: tuple[int, ...]):
        super().__init__()
        c_in = 3
        for k, (width, n) in enumerate(zip((64, 128, 256, 512, 512), convs)):
            layers: list[nn.Module] = []
            for _ in range(n):
                layers += [nn.Conv2d(c_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                c_in = width
            self.add_module(f"block{k}", nn.Sequential(*layers[:-1]))  # the last ReLU is applied in forward
        self.classifier = nn.Linear(512, classes)
        init_normal(self, linear_std=0.01)

    def forward(self, x: Tensor) -> tuple[Tensor, Features]:
        maps, preacts = [], []
        for block in self.block0, self.block1, self.block2, self.block3, self.block4:
            preacts.append(block(x))
            maps.append(F.relu(preacts[-1]))
            x = F.max_pool2d(maps[-1], 2) if len(maps) < 4 else maps[-1]
        pooled = x.mean((2, 3))
        return self.classifier(pooled), Features(maps, [maps[0], *preacts[1:]], x, pooled)


class InvertedResidual(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int):
        super().__init__()
        wide = c_in * expansion
        self.residual = stride == 1 and c_in == c_out
        self.conv = nn.Sequential(
            *(conv(c_in, wide, 1), nn.BatchNorm2d(wide), nn.ReLU()),
            *(conv(wide, wide, 3, stride, groups=wide), nn.BatchNorm2d(wide), nn.ReLU()),
            *(conv(wide, c_out, 1), nn.BatchNorm2d(c_out)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 of half width. Stage outputs are linear: their preacts are the maps themselves."""

    def __init__(self, classes: int):
        super().__init__()
        self.conv1 = nn.Sequential(conv(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.ModuleList()
        c_in = 16
        plan = (1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1)
        for t, c, n, stride in plan:
            blocks = [InvertedResidual(c if i else c_in, c, 1 if i else stride, t) for i in range(n)]
            self.blocks.append(nn.Sequential(*blocks))
            c_in = c
        self.conv2 = nn.Sequential(conv(c_in, 1280, 1), nn.BatchNorm2d(1280), nn.ReLU())
        self.classifier = nn.Sequential(nn.Linear(1280, classes))
        init_normal(self, linear_std=0.01)

    def forward(self, x: Tensor) -> tuple[Tensor, Features]:
        x = self.conv1(x)
        maps = [x]
        for k, row in enumerate(self.blocks):
            x = row(x)
            if k in (1, 2, 4, 6):  # the last row of each resolution
                maps.append(x)
        last = self.conv2(x)
        pooled = last.mean((2, 3))
        return self.classifier(pooled), Features(maps, maps, last, pooled)


class ShuffleUnitV1(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.stride, mid = stride, c_out // 4
        self.groups = 1 if c_in == 24 else 3  # 24 stem channels are too few to group
        self.conv1, self.bn1 = conv(c_in, mid, 1, groups=self.groups), nn.BatchNorm2d(mid)
        self.conv2, self.bn2 = conv(mid, mid, 3, stride, groups=mid), nn.BatchNorm2d(mid)
        self.conv3, self.bn3 = conv(mid, c_out, 1, groups=3), nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = F.channel_shuffle(F.relu(self.bn1(self.conv1(x))), self.groups)
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        preact = torch.cat([out, F.avg_pool2d(x, 3, 2, padding=1)], 1) if self.stride == 2 else out + x
        return F.relu(preact), preact


def shufflenetv1(classes: int) -> nn.Module:
    """ShuffleNet (3 groups); a stage's first unit concatenates its pooled input to fewer channels of its own."""
    plan = (24, 240, 4), (240, 480, 8), (480, 960, 4)
    layers = [[ShuffleUnitV1(a, b - a, 2), *(ShuffleUnitV1(b, b, 1) for _ in range(n - 1))] for a, b, n in plan]
    return Staged(conv(3, 24, 1), layers, 960, classes, "linear")


class ShuffleUnitV2(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        c = width // 2
        self.conv1, self.bn1 = conv(c, c, 1), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = conv(c, c, 3, groups=c), nn.BatchNorm2d(c)
        self.conv3, self.bn3 = conv(c, c, 1), nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, out = x.chunk(2, 1)
        preact = self.bn3(self.conv3(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(out)))))))
        return F.channel_shuffle(torch.cat([kept, F.relu(preact)], 1), 2), torch.cat([kept, preact], 1)


class ShuffleDownV2(nn.Module):
    def __init__(self, c_in: int, width: int):
        super().__init__()
        c = width // 2
        self.conv1, self.bn1 = conv(c_in, c_in, 3, 2, groups=c_in), nn.BatchNorm2d(c_in)
        self.conv2, self.bn2 = conv(c_in, c, 1), nn.BatchNorm2d(c)
        self.conv3, self.bn3 = conv(c_in, c, 1), nn.BatchNorm2d(c)
        self.conv4, self.bn4 = conv(c, c, 3, 2, groups=c), nn.BatchNorm2d(c)
        self.conv5, self.bn5 = conv(c, c, 1), nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        left = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        right = self.bn5(self.conv5(self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)))))))
        preact = torch.cat([left, right], 1)
        return F.channel_shuffle(F.relu(preact), 2), preact


def shufflenetv2(classes: int) -> nn.Module:
    """ShuffleNetV2 of size 1. Preacts are not channel-shuffled although the maps are, as in RepDistiller."""
    plan = (24, 116, 3), (116, 232, 7), (232, 464, 3)
    layers = [[ShuffleDownV2(a, b), *(ShuffleUnitV2(b) for _ in range(n))] for a, b, n in plan]
    return Staged(conv(3, 24, 1), layers, 464, classes, "linear", top=1024)


def init_kaiming(net: nn.Module) -> nn.Module:
    """Kaiming-normal convolutions by fan-out, as in the published ResNets; the linear layer keeps PyTorch's default."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


def init_normal(net: nn.Module, linear_std: float | None = None) -> None:
    """Convolutions N(0, sqrt(2 / (k * k * c_out))), also depthwise ones; biases 0; linear weights N(0, linear_std) if given."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0, math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels)))
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, 0, linear_std)
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)


# name -> function of the number of classes; add a line for a network of your own that returns (logits, Features)
NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    **{f"resnet{depth}": partial(resnet, depth=depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(resnet, depth=depth, widths=(32, 64, 128, 256)) for depth in (8, 32)},
    "resnet50": resnet50,
    **{f"wrn_{depth}_{k}": partial(WideResNet, depth=depth, k=k) for depth in (16, 40) for k in (1, 2)},
    "vgg8": partial(VGG, convs=(1, 1, 1, 1, 1)),
    "vgg11": partial(VGG, convs=(1, 1, 2, 2, 2)),
    "vgg13": partial(VGG, convs=(2, 2, 2, 2, 2)),
    "vgg16": partial(VGG, convs=(2, 2, 3, 3, 3)),
    "vgg19": partial(VGG, convs=(2, 2, 4, 4, 4)),
    "mobilenetv2": MobileNetV2,
    "shufflenetv1": shufflenetv1,
    "shufflenetv2": shufflenetv2,
}


def build(name: str, classes: int, device: str | torch.device = "cpu") -> nn.Module:
    """A fresh network of NETWORKS on `device`, channels_last: faster on a CPU (README). `net(x)` gives (logits, Features)."""
    if name not in NETWORKS:
        fail(f"unknown network {name}: take one of {', '.join(NETWORKS)}", 2)
    return NETWORKS[name](classes).to(device, memory_format=torch.channels_last)


@torch.no_grad()
def shapes(net: nn.Module) -> Features:
    """Shapes of a network's features for one image: (C, H, W) for maps, a number for `pooled`. No mode or statistic changes."""
    training, weight = net.training, next(net.parameters())
    _, f = net.eval()(torch.zeros(1, 3, 32, 32, device=weight.device, dtype=weight.dtype))
    net.train(training)
    maps, preacts = ([tuple(m.shape[1:]) for m in kind] for kind in (f.maps, f.preacts))
    return Features(maps, preacts, tuple(f.last.shape[1:]), f.pooled.shape[1])


@torch.no_grad()
def accuracy(net: nn.Module, images: Images) -> float:
    """Top-1 accuracy of `net` in eval mode, in percent; its mode is restored."""
    training = net.training
    net.eval()
    correct = sum((net(x)[0].argmax(1) == y).sum() for x, y in images.batches())
    net.train(training)
    return 100 * int(correct) / len(images)


class Graph:
    """A training step as one CUDA graph: the host starts it with a single call in place of a launch for each kernel.

    The first WARM_UP batches are real steps on the stream of the capture, on which cuDNN and the optimiser set up what they
    keep. Then the step is captured with the first batch's shapes; from there on such a batch is copied to where the graph
    reads it and the graph is replayed. Batches of other shapes, like the last of an epoch, run as they are.
    """

    WARM_UP = 3

    def __init__(self, step: Callable[..., Tensor]):
        self.step, self.shapes, self.warm, self.graph = step, None, 0, None

    def __call__(self, *batch: Tensor) -> Tensor:
        shapes = [tensor.shape for tensor in batch]
        self.shapes = self.shapes or shapes
        if shapes != self.shapes:
            return self.step(*batch)
        if self.warm < self.WARM_UP:
            return self.warm_up(*batch)
        if self.graph is None:
            self.capture(batch)  # records the step without taking it
        for place, tensor in zip(self.batch, batch):
            place.copy_(tensor)
        self.graph.replay()
        return self.sums

    def warm_up(self, *batch: Tensor) -> Tensor:
        if self.warm == 0:
            self.stream = torch.cuda.Stream()
        self.warm += 1
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            sums = self.step(*batch)
        torch.cuda.current_stream().wait_stream(self.stream)
        return sums

    def capture(self, batch: tuple[Tensor, ...]) -> None:
        self.graph, self.batch = torch.cuda.CUDAGraph(), [tensor.clone() for tensor in batch]
        try:
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.sums = self.step(*self.batch)
        except RuntimeError as error:
            cause = one_line(error.__context__ or error)  # the end of a failed capture is an error of its own
            fail(f"this step cannot be a CUDA graph ({cause}): continue with the same command without CUDA_GRAPH=1")


def graphed(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The training step; on CUDA, with CUDA_GRAPH=1 in the environment, as a CUDA graph. No GPU has verified that yet.

    `step` takes tensors, returns one tensor, and reads nothing else that changes: a Python number or a random draw of the
    host would keep for ever the value it had in the capture. What a call returns is overwritten by the next one: add it up,
    do not collect it.
    """
    if not GRAPH:
        return step
    graph = Graph(step)
    return lambda *batch: (graph if batch[0].is_cuda else step)(*batch)


# Teachers


def load_weights(net: nn.Module, file: Path) -> None:
    """Load a state dict, bare or under "model" or "state_dict", with or without "module." before its names.

    Anything that is not the weights of such a network ends the program with one line. Nothing in the file can run code.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # what is wrong is said below
            state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        fail(f"{file} is no plain file of tensors; as anything else could run code, it is not loaded: save its weights alone")
    except Exception as error:  # torch.load has a different type for every way in which a file can be broken
        fail(f"{file} is not a checkpoint that torch can read ({one_line(error)})")
    for key in "model", "state_dict":
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        fail(f"{file} holds no state dict (names with tensors), neither bare nor under 'model' or 'state_dict'")
    state = {name.removeprefix("module."): value for name, value in state.items()}
    own = net.state_dict()
    state |= {name: own[name] for name in own.keys() - state.keys() if name.endswith("num_batches_tracked")}
    wrong = [name for name in own | state if name not in own or name not in state or own[name].shape != state[name].shape]
    weight, bias = list(own)[-2:]  # the classifier's
    if wrong and set(wrong) <= {weight, bias} <= state.keys():
        fail(f"{file} was trained for {len(state[bias])} classes, this data set has {len(own[bias])}")
    if wrong:
        fail(f"{file} holds another network's weights: the first difference is {wrong[0]}")
    net.load_state_dict(state)


def find_teacher(args: Any) -> tuple[Path, str, int | None]:
    """File of args.teacher's weights, its name for people, and the epochs it was trained for; trains one if there is none."""

    def epochs(record: Path) -> int | None:
        return json.loads(record.read_text())["epochs"] if record.exists() else None

    if args.teacher_weights is not None:
        return args.teacher_weights, str(args.teacher_weights), epochs(args.teacher_weights.with_name("result.json"))
    shipped = ROOT / "teachers" / args.dataset / f"{args.teacher}.pt"
    if shipped.exists():
        return shipped, str(shipped.relative_to(ROOT)), epochs(shipped.with_suffix(".json"))
    # Of the flags given here, those that vanilla.py would not take by itself
    vanilla = SimpleNamespace(student=args.teacher, lr=None, milestones=None, epochs=args.epochs)
    resolve(vanilla)
    defaults = {"epochs": 240, "batch_size": 64, "milestones": vanilla.milestones}
    flags = {flag: value for flag, value in unlike_defaults(args).items() if flag in defaults and value != defaults[flag]}

    def place(flags: dict[str, Any]) -> Path:
        return Path(args.runs) / run_name("vanilla", [args.teacher, args.dataset], flags, 1)

    if (place({}) / "result.json").exists() or in_use(place({})):  # the full teacher, or it is being trained
        flags = {}
    if not (place(flags) / "result.json").exists():
        train_teacher(args, flags, place(flags))
    return place(flags) / "student.pt", str(place(flags)), epochs(place(flags) / "result.json")


def train_teacher(args: Any, flags: dict[str, Any], folder: Path) -> None:
    """Run methods/vanilla.py as a user would until `folder` holds a finished run, or wait for the process that does so."""
    script, result = ROOT / "methods" / "vanilla.py", folder / "result.json"
    if not script.exists() and not result.exists():
        fail(f"no teacher {args.teacher} for {args.dataset}, and no {script} to train one: give --teacher-weights FILE")
    options = dict(student=args.teacher, dataset=args.dataset, data=args.data, runs=args.runs, device=args.device, seed=1) | flags
    command = [sys.executable, str(script)]
    for flag, value in options.items():
        command += [f"--{flag.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])]
    while not result.exists():
        if in_use(folder):
            print(f"waiting for the process that trains the teacher in {folder}", flush=True)
            while in_use(folder):
                time.sleep(1)
        else:
            print(f"no teacher {args.teacher} for {args.dataset} yet, training one: {shlex.join(command[1:])}", flush=True)
            code = subprocess.run(command).returncode
            if not result.exists() and not in_use(folder):
                fail(f"training the teacher ended with exit code {code}: continue with the same command", code if code > 0 else 1)


def load_teacher(args: Any, test: Images) -> nn.Module:
    """The trained network args.teacher, frozen and in eval mode; its attribute `record` says which one, as result.json does.

    Taken from --teacher-weights; else teachers/<dataset>/<name>.pt; else a finished run of methods/vanilla.py with default
    settings; else one with the epochs, milestones and batch size given here, which is trained if it does not exist yet.
    """
    file, source, epochs = find_teacher(args)
    teacher = build(args.teacher, test.classes, args.device)
    load_weights(teacher, file)
    teacher.eval().requires_grad_(False)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    teacher.record = dict(name=args.teacher, accuracy=accuracy(teacher, test), sha256=sha256, source=source, epochs=epochs)
    known = f"{teacher.record['accuracy']:.2f} % test accuracy, {epochs or 'unknown'} epochs, {source}, SHA-256 {sha256[:12]}"
    print(f"teacher     {args.teacher}, {known}", flush=True)
    return teacher


# Runs


def take_lock(path: Path) -> IO | None:
    """Hold a file against all other processes until it is closed or this process ends in any way; None if one holds it."""
    file = open(path, "a")  # noqa: SIM115, it stays open
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError as error:
        fail(f"{path} cannot be locked ({error.strerror}): name a folder on another file system with --runs")
    return file


def in_use(folder: Path) -> bool:
    """Whether a process is working in a run's folder."""
    lock = take_lock(folder / ".lock") if folder.exists() else None
    if lock:
        lock.close()
    return folder.exists() and lock is None


def write(path: Path, content: bytes | str) -> None:
    """Replace `path` in one step, on the disk: a crash or a full disk leaves the old file whole."""
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with open(unfinished, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        fail(f"cannot write {path} ({error.strerror}), what was there is intact: make room and continue with the same command")


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """What torch.save makes of `state`, then its SHA-256."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write(path, buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest())


def read_checkpoint(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    if hashlib.sha256(content[:-32]).digest() != content[-32:]:
        fail(f"{path} is damaged, its SHA-256 differs: put back a good copy, or delete it to start this run again")
    return torch.load(io.BytesIO(content[:-32]), map_location="cpu", weights_only=True)


def resolve(args: Any, epochs: int | None = None) -> None:
    """Fill in the flags whose default depends on others: the learning rate, and the milestones of `epochs` or args.epochs."""
    if args.lr is None:
        args.lr = 0.01 if args.student in ("mobilenetv2", "shufflenetv1", "shufflenetv2") else 0.05
    if args.milestones is None:
        drops = getattr(args, "drops", (5 / 8, 6 / 8, 7 / 8))
        args.milestones = tuple(sorted({int((epochs or args.epochs) * drop) for drop in drops} - {0}))


def check(args: Any) -> None:
    """Refuse values of the shared flags that make no sense, each with one line and exit code 2."""
    for flag, value in vars(args).items():
        wrong = None
        if flag in ("teacher", "student", "peer") and value not in NETWORKS:
            wrong = f"is unknown: take one of {', '.join(NETWORKS)}"
        elif flag == "dataset" and value not in DATASETS:
            wrong = f"is unknown: take one of {', '.join(DATASETS)}"
        elif flag == "teacher_weights" and value is not None and not value.is_file():
            wrong = "does not exist"
        elif isinstance(value, float) and not math.isfinite(value):
            wrong = "must be a finite number"
        elif flag in ("epochs", "init_epochs", "batch_size") and value < 1:
            wrong = "must be at least 1"
        elif flag in ("lr", "kd_temperature") and value <= 0:
            wrong = "must be above 0"
        elif flag == "seed" and not 0 <= value < 2**63:
            wrong = "must be from 0 to 2**63 - 1"
        elif (flag == "weight_decay" or flag.endswith("temperature")) and value < 0:
            wrong = "must not be negative"
        elif flag == "milestones" and list(value) != sorted({epoch for epoch in value if epoch > 0}):
            wrong = "must be positive and ascending"
        elif flag == "device" and not re.fullmatch(r"cpu|cuda(:\d+)?", value):
            wrong = "is unknown: cpu, cuda, cuda:1, ..."
        elif flag == "device" and value != "cpu" and int(value[5:] or 0) >= torch.cuda.device_count():
            wrong = "is not here: PyTorch sees no such GPU; --device cpu works without one"
        if wrong:
            fail(f"--{flag.replace('_', '-')} {shown(value)} {wrong}", 2)


def unlike_defaults(args: Any) -> dict[str, Any]:
    """The settings that differ from what the script does without flags, besides those that a run's name always shows."""
    default = type(args)(student=args.student)
    resolve(default, args.epochs)  # milestones that follow from the number of epochs are no setting of their own
    apart = ("teacher", "peer", "student", "dataset", "seed", "data", "runs", "device")
    return {flag: value for flag, value in vars(args).items() if flag not in apart and value != getattr(default, flag)}


def shown(value: Any) -> str:
    """A setting in words: 1 for 1.0, a list with commas, a file by the start of its SHA-256."""
    if isinstance(value, Path):
        return hashlib.sha256(value.read_bytes()).hexdigest()[:8] if value.is_file() else str(value)
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value).removesuffix(".0")


def run_name(method: str, what: list[str], flags: dict[str, Any], seed: int) -> str:
    """<method>__<teacher>__<student>__<dataset>[__flag=value ...]__seed<n>"""
    settings = [f"{flag.replace('_', '-')}={shown(value)}" for flag, value in flags.items()]
    return "__".join([method, *what, *settings, f"seed{seed}"])


def run_folder(method: str, args: Any) -> Path:
    """Where a run with these resolved settings lives."""
    what = [getattr(args, role) for role in ("teacher", "peer", "student", "dataset") if hasattr(args, role)]
    return Path(args.runs) / run_name(method, what, unlike_defaults(args), args.seed)


def git(*words: str) -> str | None:
    """What git says about the checkout this file is in; None outside one."""
    try:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def hardware(device: str) -> dict[str, Any]:
    """Name and driver of the device ("cpu" and None on a CPU), threads and torch version: what a record is to be read with."""
    name, driver = device, None
    if device != "cpu":
        name = torch.cuda.get_device_name(device)
        with contextlib.suppress(OSError, IndexError, subprocess.CalledProcessError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    return dict(device=name, driver=driver, threads=torch.get_num_threads(), torch=torch.__version__)


def count(module: nn.Module) -> int:
    """Number of learnable parameters."""
    return sum(p.numel() for p in module.parameters())


class Run:
    """The folder of one run: settings, log, checkpoints, the student, the result.

    Started again with the same command, a run that was killed at any moment goes on from its last checkpoint and ends with
    the same weights and log rows (on a CPU bit for bit at the same number of threads); a finished one prints its result and
    ends with exit code 0. A checkpoint is written at the end of a phase, and after an epoch if the last one is SAVE_EVERY
    seconds old.
    """

    def __init__(self, script: str, args: Any):
        resolve(args)
        check(args)
        signal.signal(signal.SIGINT, lambda *_: fail("interrupted: continue with the same command", 130))
        if args.device != "cpu":  # the same sums in the same order, so that a resumed run ends as an uninterrupted one
            torch.cuda.set_device(torch.device(args.device).index or 0)  # for what takes no device, like a stream
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # else a further kernel for each new tensor
            if GRAPH:
                print("note: CUDA_GRAPH=1 replays the step as a CUDA graph, which no GPU has verified yet", flush=True)
        self.args, self.method, self.unlike_defaults = args, Path(script).stem, unlike_defaults(args)
        self.settings = json.loads(json.dumps(dataclasses.asdict(args), default=str))
        self.folder = run_folder(self.method, args)
        self.rows: list[dict[str, Any]] = []
        self.parameters: dict[int, int] = {}  # of all phases
        self.commit, self.dirty = git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
        self.open(Path(script))

    def open(self, script: Path) -> None:
        """Take the folder for this process, and make sure that what lies in it was made with the same settings."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = take_lock(self.folder / ".lock")
            if self.lock is None:  # perhaps for the moment in which `in_use` looks
                time.sleep(0.5)
                self.lock = take_lock(self.folder / ".lock")
        except OSError as error:
            fail(f"cannot use the folder {self.folder} ({error.strerror}): name another one with --runs")
        if self.lock is None:
            fail(f"{self.folder} is in use by another process: wait for it, or name another folder with --runs")
        file, result = self.folder / "args.json", self.folder / "result.json"
        try:
            found = json.loads(file.read_text()) if file.exists() else self.settings
            places = ("data", "runs")  # which change nothing about the run
            differing = [flag for flag, value in self.settings.items() if found.get(flag) != value and flag not in places]
        except (ValueError, AttributeError):
            fail(f"{file} is damaged: delete the folder to start this run again")
        if differing and not (result.exists() and differing == ["device"]):  # a result can be shown on any device
            flag, began = differing[0], found.get(differing[0])
            fail(f"{file} says that the run began with {flag} {began}, not {self.settings[flag]}: take that, or another --runs")
        if result.exists():
            try:
                self.show(json.loads(result.read_text()))
            except (ValueError, KeyError):
                fail(f"{result} is damaged: delete the folder to start this run again")
            raise SystemExit(0)
        for source in script, Path(__file__):
            copy = self.folder / source.name
            if not (file.exists() and copy.exists()):
                write(copy, source.read_bytes())
            elif copy.read_bytes() != source.read_bytes():
                print(f"note: {source.name} is no longer the one this run began with, which {self.folder} keeps", flush=True)
        write(file, json.dumps(self.settings, indent=1) + "\n")

    def epochs(self, total: int, trained: nn.ModuleDict, optimizer: Any, schedule: Any, phase: str = "") -> Iterator[int]:
        """The epochs still to do of `total`, counted from 1, of the run or of one phase of it; call `log` once in each.

        Before the first one the last checkpoint is loaded into the three. A finished phase loads its end and yields nothing.
        """
        file = self.folder / (f"checkpoint-{phase}.pt" if phase else "checkpoint.pt")
        self.introduce(trained, phase)
        state = read_checkpoint(file) if file.exists() else {"rows": []}
        if state["rows"]:
            try:
                trained.load_state_dict(state["trained"])
                optimizer.load_state_dict(state["optimizer"])
            except (KeyError, RuntimeError, ValueError) as error:
                fail(f"{file} does not fit this script ({one_line(error)}): delete {self.folder} to start again")
            schedule.load_state_dict(state["schedule"])
            print(f"continuing after epoch {len(state['rows'])} of {total}", flush=True)
        for group in optimizer.param_groups:  # a graph reads the rate from the device, where the schedule changes it in place
            on_device = GRAPH or self.args.device != "cpu"  # with or without a graph, so that both have the same float32
            group["lr"] = torch.as_tensor(group["lr"], device=self.args.device).float() if on_device else float(group["lr"])
        earlier = len(self.rows)
        self.phase, self.total, self.rows = phase, total, self.rows + state["rows"]
        saved = time.monotonic()
        for epoch in range(len(state["rows"]) + 1, total + 1):
            self.started = time.perf_counter()
            yield epoch
            if epoch == total or time.monotonic() - saved >= SAVE_EVERY:
                state = dict(trained=trained.state_dict(), optimizer=optimizer.state_dict(), schedule=schedule.state_dict())
                if not all(value.isfinite().all() for value in state["trained"].values()):
                    self.diverged(f"a weight is no longer finite after epoch {epoch}")
                write(self.folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))
                write_checkpoint(file, state | {"rows": self.rows[earlier:]})  # last: what it does not hold is done again
                saved = time.monotonic()

    def introduce(self, trained: nn.ModuleDict, phase: str) -> None:
        """Say what is about to be trained, and count its parameters."""
        self.parameters |= {id(p): p.numel() for p in trained.parameters()}
        if phase:
            print(f"phase       {phase}: {count(trained):,} parameters are trained", flush=True)
            return
        if not hasattr(self.args, "teacher"):
            print("teacher     none")
        settings = ", ".join(f"{flag.replace('_', '-')} {shown(value)}" for flag, value in self.unlike_defaults.items())
        what = f"{self.args.student}, seed {self.args.seed}, {self.args.device}"
        print(f"student     {what}; unlike the defaults: {settings or 'nothing'}")
        student = count(trained["student"])
        extra = sum(self.parameters.values()) - student
        print(f"parameters  {student:,} in the student, {extra:,} more while training, {student:,} left at test time", flush=True)

    def log(self, epoch: int, means: Tensor, test: float | None, schedule: Any, **more: Any) -> None:
        """Print and keep one epoch's row. A loss that is not finite ends the run.

        `means`: the mean loss and, where there is one, the share of right answers in training; `test`: test accuracy in
        percent, if there is one; `more`: further numbers worth watching.
        """
        loss, *right = means.tolist()
        if not math.isfinite(loss):
            self.diverged(f"the loss became {loss} in epoch {epoch}")
        row = {"phase": self.phase, "epoch": epoch, "loss": loss, "train": 100 * right[0] if right else None, "test": test}
        rate = float(schedule.get_last_lr()[0])
        row |= {"lr": float(f"{rate:.6g}"), "seconds": round(time.perf_counter() - self.started, 3)}
        more = {name: torch.as_tensor(value).item() for name, value in more.items()}
        self.rows.append(row | more)
        shares = "".join(f"  {name} {row[name]:5.2f} %" for name in ("train", "test") if row[name] is not None)
        shares += "".join(f"  {name} {value:.4g}" for name, value in more.items())
        times = f"{clock(row['seconds'])}  left {clock(row['seconds'] * (self.total - epoch))}"
        print(f"epoch {epoch:3}/{self.total}  loss {loss:.4f}{shares}  lr {row['lr']:.2g}  {times}", flush=True)

    def diverged(self, what: str) -> NoReturn:
        fail(f"{what}: try a smaller --lr; {self.folder} keeps its last good checkpoint")

    def finish(self, student: nn.Module, teacher: nn.Module | None = None) -> float:
        """Save the student's weights (float32, contiguous) and the result; give the last epoch's test accuracy in percent."""
        buffer = io.BytesIO()
        torch.save({name: value.cpu().contiguous() for name, value in student.state_dict().items()}, buffer)
        write(self.folder / "student.pt", buffer.getvalue())
        rows = [row for row in self.rows if row["phase"] == ""]
        best = max(rows, key=lambda row: row["test"])
        result = dict(method=self.method, args=self.settings, last=rows[-1]["test"], best=best["test"], best_epoch=best["epoch"])
        result["teacher"] = teacher and teacher.record
        extra = sum(self.parameters.values()) - count(student)
        result["parameters"] = dict(student=count(student), extra=extra, at_test=count(student))
        result |= dict(epochs=len(rows), seconds=round(sum(row["seconds"] for row in self.rows), 1))
        graph = GRAPH and self.args.device != "cpu"
        result |= hardware(self.args.device) | dict(cuda_graph=graph, commit=self.commit, dirty=self.dirty)
        write(self.folder / "result.json", json.dumps(result, indent=1) + "\n")
        self.show(result)
        return result["last"]

    def show(self, result: dict[str, Any]) -> None:
        """Print a result in one line."""
        accuracies = f"last {result['last']:.2f} %, best {result['best']:.2f} % (epoch {result['best_epoch']})"
        print(f"result      {accuracies}, {result['epochs']} epochs in {clock(result['seconds'])}: {self.folder}", flush=True)
