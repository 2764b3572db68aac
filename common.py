"""What must be the same for every method: pixels, networks, teachers, accuracy, and the folder a run lives in.

A method file imports from here and from nothing else of the project; nothing here knows a method. The parts, in order:
data (`load_data`), networks (`build`, `shapes`, `NETWORKS`), teachers (`load_teacher`), `accuracy`, `graphed`, `Run`.
"""

import dataclasses
import hashlib
import io
import json
import math
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent
SAVE_EVERY = 20.0  # seconds of training between two checkpoints, at least


def fail(message: str, code: int = 1) -> NoReturn:
    """End the program with one line on stderr; exit code 2 is for bad flags, 1 for everything else."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def clock(seconds: float) -> str:
    """A duration as a person says it: 12.3 s, 5 min 12 s, 3 h 28 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s" if seconds < 3600 else f"{minutes // 60} h {minutes % 60:02} min"


# Data


class RawData(NamedTuple):
    """A data set as read: uint8 pixels (N, 32, 32, 3), int64 labels (N,), and the statistics of the normalisation."""

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


CIFAR: dict[str, dict[str, Any]] = {
    "cifar100": dict(
        folder="cifar-100-binary",
        archive="cifar-100-binary.tar.gz",
        md5="03b5dce01913d631647c71ecec9e9cb8",
        label_bytes=2,  # coarse label, fine label
        train={"train.bin": "f31298fc616915fa142368359df1c4ca2ae984d6915ca468b998a5ec6aeebf29"},
        test={"test.bin": "d8b1e6b7b3bee4020055f0699b111f60b1af1e262aeb93a0b659061746f8224a"},
        statistics=(100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    ),
    "cifar10": dict(
        folder="cifar-10-batches-bin",
        archive="cifar-10-binary.tar.gz",
        md5="c32a1d4ab5d03f1284b67883e8d87530",
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
    """CIFAR in its official binary version, from `data` or else from its authors' site; every file is checked by hash."""
    cifar = CIFAR[name]
    folder = data / cifar["folder"]
    if not folder.is_dir():
        download(f"https://www.cs.toronto.edu/~kriz/{cifar['archive']}", cifar["md5"], data, folder)

    def read(hashes: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
        pixels, labels = [], []
        for file, sha256 in hashes.items():
            path = folder / file
            if not path.is_file():
                fail(f"{path} is missing: delete the folder {folder} and start again to download it")
            raw = np.fromfile(path, np.uint8)
            if hashlib.sha256(raw).hexdigest() != sha256:
                fail(f"{path} ({raw.size:,} bytes) is not the official file, its SHA-256 differs: delete the folder {folder} and start again to download it")
            records = raw.reshape(-1, cifar["label_bytes"] + 3072)
            labels.append(records[:, cifar["label_bytes"] - 1].astype(np.int64))
            pixels.append(records[:, cifar["label_bytes"] :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        return np.concatenate(pixels), np.concatenate(labels)

    return RawData(read(cifar["train"]), read(cifar["test"]), *cifar["statistics"])


def download(url: str, md5: str, data: Path, folder: Path) -> None:
    """Fetch and unpack an archive so that `folder` appears whole or not at all; two runs that start together fetch it once."""
    from torchvision.datasets.utils import download_and_extract_archive

    data.mkdir(parents=True, exist_ok=True)
    lock = Lock(data / f".{folder.name}.lock")
    while not lock.take():
        time.sleep(1)
    partial_folder = data / f".{folder.name}.partial"
    try:
        if not folder.is_dir():
            print(f"downloading {url} to {data}", flush=True)
            download_and_extract_archive(url, str(partial_folder), md5=md5, remove_finished=True)
            os.replace(partial_folder / folder.name, folder)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        fail(f"cannot download {url} ({reason}): put its files under {folder}, or try --dataset synthetic, which needs none")
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)
        lock.release()


def synthetic(data: Path) -> RawData:
    """100 classes of a smooth random pattern plus noise, 2,000 + 500 images: for trying things out without a download."""
    random = np.random.default_rng(0)
    patterns = random.normal(size=(100, 1, 1, 3)) + random.normal(size=(100, 4, 4, 3)).repeat(8, axis=1).repeat(8, axis=2)

    def draw(n: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(n) % 100
        pixels = 128 + 40 * patterns[labels] + 10 * random.normal(size=(n, 32, 32, 3))
        return pixels.clip(0, 255).astype(np.uint8), labels

    return RawData(draw(2000), draw(500), 100, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


# name -> function of the --data folder; add a line for a data set of your own
DATASETS: dict[str, Callable[[Path], RawData]] = {
    "cifar100": partial(read_cifar, "cifar100"),
    "cifar10": partial(read_cifar, "cifar10"),
    "synthetic": synthetic,
}


class Images:
    """One split of a data set, resident on the device as uint8, padded by 4 before any normalisation.

    `crop` and `normalise` together equal RandomCrop(32, padding=4), RandomHorizontalFlip, ToTensor and Normalize of
    torchvision bit for bit for the same offsets, on every device.
    """

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, raw: RawData, args: Any, padding: str = "constant"):
        self.device, self.seed, self.batch_size, self.epochs = torch.device(args.device), args.seed, args.batch_size, args.epochs
        self.classes = raw.classes
        padded = np.pad(pixels, [(0, 0), (4, 4), (4, 4), (0, 0)], mode=padding)
        self.pixels = torch.from_numpy(padded).to(self.device).flatten(0, 2)  # (N * 40 * 40, 3)
        self.labels = torch.from_numpy(labels).to(self.device)
        self.mean, self.std = torch.tensor(raw.mean), torch.tensor(raw.std)
        table = ((torch.arange(256)[:, None] / 255 - self.mean) / self.std).T  # (3, 256), made on the CPU: the same floats everywhere
        self.table = table.flatten().to(self.device)
        self.channel = 256 * torch.arange(3, device=self.device)
        self.side = torch.arange(32, device=self.device)
        self.generator = torch.Generator()
        self.timed = False

    def __len__(self) -> int:
        return len(self.labels)

    def offsets(self) -> Tensor:
        """Row and column of the crop (0 to 8) and flip (0 or 1) for N images, int64 (3, N), drawn from `self.generator`."""
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
        return self.table[(pixels.permute(0, 2, 3, 1) + self.channel)].permute(0, 3, 1, 2)

    def epoch(self, epoch: int, phase: str = "") -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All images once in random order and view: batches of x (B, 3, 32, 32), y (B,) and the images' index (B,).

        The draws depend on (seed, phase, epoch) alone, so they are the same for every method and device and after a resume.
        All are made before the first batch: what a method draws from `self.generator` later cannot shift them.
        """
        self.generator.manual_seed(int(np.random.SeedSequence([self.seed, epoch, *phase.encode()]).generate_state(1)[0]))
        order = torch.randperm(len(self), generator=self.generator).to(self.device)
        offsets = self.offsets()
        start = time.perf_counter()
        for step, (index, offset) in enumerate(zip(order.split(self.batch_size), offsets.split(self.batch_size, dim=1))):
            if step == 20 and not self.timed and not phase:
                self.estimate(time.perf_counter() - start, epoch)
            yield self.normalise(self.crop(index, offset)), self.labels[index], index

    def estimate(self, seconds: float, epoch: int) -> None:
        """Say, from the first 20 steps of a run, how long an epoch and the remaining epochs take."""
        self.timed = True
        each = seconds / 20 * math.ceil(len(self) / self.batch_size)
        total = each * (self.epochs - epoch + 1)
        advice = "; a CUDA GPU is far faster, or try --epochs 5" if self.device.type == "cpu" and total > 3600 else ""
        print(f"estimate: {clock(each)} an epoch, {clock(total)} for the {self.epochs - epoch + 1} to go{advice}", flush=True)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All images once in order, neither cropped nor flipped: batches of x (500, 3, 32, 32), y (500,)."""
        for index in torch.arange(len(self), device=self.device).split(500):
            middle = torch.tensor([4, 4, 0], device=self.device)[:, None].expand(3, len(index))
            yield self.normalise(self.crop(index, middle)), self.labels[index]


def load_data(args: Any, padding: str = "constant") -> tuple[Images, Images]:
    """Training and test images of args.dataset on args.device; `padding` is a mode of numpy.pad ("constant" pads black)."""
    raw = DATASETS[args.dataset](Path(args.data))
    train, test = Images(*raw.train, raw, args, padding), Images(*raw.test, raw, args)
    if args.batch_size > len(train):
        fail(f"--batch-size {args.batch_size} is larger than the {len(train):,} training images of {args.dataset}", 2)
    if len(train) % args.batch_size == 1:
        fail(f"--batch-size {args.batch_size} leaves a last batch of one image, for which batch statistics do not exist: take another", 2)
    return train, test


# Networks: the definitions and parameter names of RepDistiller, so that its and mdistiller's checkpoints load


class Features(NamedTuple):
    """What a network shows beside its logits."""

    maps: list[Tensor]  # f0 (stem), f1 ... fk (stages), each (B, C, H, W), as the published code takes them
    preacts: list[Tensor]  # the same before their last ReLU
    last: Tensor  # the map that is pooled into the classifier
    pooled: Tensor  # (B, C), the input of the classifier


def conv3x3(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)


def stages(groups: list[list[nn.Module]], x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Run stages of blocks that return (output, preact); collect what each stage's last block returned."""
    maps, preacts = [], []
    for group in groups:
        for block in group:
            x, preact = block(x)
        maps.append(x)
        preacts.append(preact)
    return maps, preacts


class BasicBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(c_in, c_out, stride), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = conv3x3(c_out, c_out), nn.BatchNorm2d(c_out)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        preact = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        preact = preact + (x if self.downsample is None else self.downsample(x))
        return F.relu(preact), preact


class ResNet(nn.Module):
    """CIFAR ResNet of 6n + 2 layers (He et al. 2016) with projection shortcuts; widths are those of stem and stages."""

    def __init__(self, classes: int, depth: int, widths: tuple[int, int, int, int] = (16, 16, 32, 64)):
        super().__init__()
        n = (depth - 2) // 6
        self.conv1, self.bn1 = conv3x3(3, widths[0]), nn.BatchNorm2d(widths[0])
        for k, stride in (1, 1), (2, 2), (3, 2):
            first = BasicBlock(widths[k - 1], widths[k], stride)
            self.add_module(f"layer{k}", nn.Sequential(first, *(BasicBlock(widths[k], widths[k], 1) for _ in range(n - 1))))
        self.fc = nn.Linear(widths[3], classes)
        init_fan_out(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Features]:
        f0 = F.relu(self.bn1(self.conv1(x)))
        maps, preacts = stages([self.layer1, self.layer2, self.layer3], f0)
        pooled = maps[-1].mean((2, 3))
        return self.fc(pooled), Features([f0, *maps], [f0, *preacts], maps[-1], pooled)


class Bottleneck(nn.Module):
    def __init__(self, c_in: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3x3(width, width, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.shortcut = nn.Sequential()
        if stride != 1 or c_in != 4 * width:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        preact = self.bn3(self.conv3(out)) + self.shortcut(x)
        return F.relu(preact), preact


class ResNet50(nn.Module):
    """The ImageNet ResNet-50 with a 3x3 stem of stride 1 and no max pool."""

    def __init__(self, classes: int):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(3, 64), nn.BatchNorm2d(64)
        c_in = 64
        for k, (width, blocks, stride) in enumerate([(64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)], start=1):
            first = Bottleneck(c_in, width, stride)
            c_in = 4 * width
            self.add_module(f"layer{k}", nn.Sequential(first, *(Bottleneck(c_in, width, 1) for _ in range(blocks - 1))))
        self.linear = nn.Linear(c_in, classes)
        init_fan_out(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Features]:
        f0 = F.relu(self.bn1(self.conv1(x)))
        maps, preacts = stages([self.layer1, self.layer2, self.layer3, self.layer4], f0)
        pooled = maps[-1].mean((2, 3))
        return self.linear(pooled), Features([f0, *maps], [f0, *preacts], maps[-1], pooled)


class WideBlock(nn.Module):
    """Pre-activation block; its second output is the batch-normalised *input*: the preact of the stage before it."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), conv3x3(c_in, c_out, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(c_out), conv3x3(c_out, c_out)
        self.convShortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if c_in != c_out else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        preact = self.bn1(x)
        activated = F.relu(preact)
        out = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return out + (x if self.convShortcut is None else self.convShortcut(activated)), preact


class WideResNet(nn.Module):
    """WRN-depth-k (Zagoruyko & Komodakis 2016), no dropout. Stage outputs are the blocks' raw sums, with negative values."""

    def __init__(self, classes: int, depth: int, k: int):
        super().__init__()
        widths = (16, 16 * k, 32 * k, 64 * k)
        self.conv1 = conv3x3(3, 16)
        for i, stride in (1, 1), (2, 2), (3, 2):
            first = WideBlock(widths[i - 1], widths[i], stride)
            layer = nn.Sequential(first, *(WideBlock(widths[i], widths[i], 1) for _ in range((depth - 4) // 6 - 1)))
            self.add_module(f"block{i}", nn.ModuleDict({"layer": layer}))
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], classes)
        init_normal(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Features]:
        maps, preacts = [self.conv1(x)], []
        for stage in self.block1, self.block2, self.block3:
            first, *rest = stage["layer"]
            out, preact = first(maps[-1])
            for block in rest:
                out, _ = block(out)
            maps.append(out)
            preacts.append(preact)
        preacts = [maps[0], *preacts[1:], self.bn1(maps[-1])]
        last = F.relu(preacts[-1])
        pooled = last.mean((2, 3))
        return self.fc(pooled), Features(maps, preacts, last, pooled)


class VGG(nn.Module):
    """VGG with batch norm for 32x32 images: five blocks, max pools after the first three, one linear layer."""

    def __init__(self, classes: int, convs: tuple[int, ...]):
        super().__init__()
        c_in = 3
        for k, (width, count) in enumerate(zip((64, 128, 256, 512, 512), convs)):
            layers: list[nn.Module] = []
            for _ in range(count):
                layers += [nn.Conv2d(c_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                c_in = width
            self.add_module(f"block{k}", nn.Sequential(*layers[:-1]))  # the last ReLU is applied in forward
        self.classifier = nn.Linear(512, classes)
        init_normal(self, linear_std=0.01)

    def forward(self, x: Tensor) -> tuple[Tensor, Features]:
        maps, preacts = [], []
        for k, block in enumerate([self.block0, self.block1, self.block2, self.block3, self.block4]):
            preacts.append(block(x))
            maps.append(F.relu(preacts[-1]))
            x = F.max_pool2d(maps[-1], 2) if k < 3 else maps[-1]
        pooled = x.mean((2, 3))
        return self.classifier(pooled), Features(maps, [maps[0], *preacts[1:]], x, pooled)


class InvertedResidual(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int):
        super().__init__()
        wide = c_in * expansion
        self.residual = stride == 1 and c_in == c_out
        self.conv = nn.Sequential(
            *(nn.Conv2d(c_in, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()),
            *(nn.Conv2d(wide, wide, 3, stride, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU()),
            *(nn.Conv2d(wide, c_out, 1, bias=False), nn.BatchNorm2d(c_out)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 of half width. Stage outputs are linear: their preacts are the maps themselves."""

    def __init__(self, classes: int):
        super().__init__()
        self.conv1 = nn.Sequential(conv3x3(3, 16, stride=2), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.ModuleList()
        c_in = 16
        for t, c, n, stride in (1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1):
            self.blocks.append(nn.Sequential(*(InvertedResidual(c if i else c_in, c, 1 if i else stride, t) for i in range(n))))
            c_in = c
        self.conv2 = nn.Sequential(nn.Conv2d(c_in, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU())
        self.classifier = nn.Sequential(nn.Linear(1280, classes))
        init_normal(self, linear_std=0.01)

    def forward(self, x: Tensor) -> tuple[Tensor, Features]:
        maps = [self.conv1(x)]
        for first, end in (0, 2), (2, 3), (3, 5), (5, 7):
            x = maps[-1]
            for block in self.blocks[first:end]:
                x = block(x)
            maps.append(x)
        last = self.conv2(maps[-1])
        pooled = last.mean((2, 3))
        return self.classifier(pooled), Features(maps, maps, last, pooled)


class ShuffleUnitV1(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.stride, mid = stride, c_out // 4
        self.groups = 1 if c_in == 24 else 3  # 24 stem channels are too few to group
        self.conv1, self.bn1 = nn.Conv2d(c_in, mid, 1, groups=self.groups, bias=False), nn.BatchNorm2d(mid)
        self.conv2, self.bn2 = nn.Conv2d(mid, mid, 3, stride, padding=1, groups=mid, bias=False), nn.BatchNorm2d(mid)
        self.conv3, self.bn3 = nn.Conv2d(mid, c_out, 1, groups=3, bias=False), nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = F.channel_shuffle(F.relu(self.bn1(self.conv1(x))), self.groups)
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        preact = torch.cat([out, F.avg_pool2d(x, 3, 2, padding=1)], 1) if self.stride == 2 else out + x
        return F.relu(preact), preact


class ShuffleNetV1(nn.Module):
    """ShuffleNet (3 groups); in a stage's first unit the pooled input is concatenated."""

    def __init__(self, classes: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 24, 1, bias=False), nn.BatchNorm2d(24)
        c_in = 24
        for k, (width, units) in enumerate([(240, 4), (480, 8), (960, 4)], start=1):
            first = ShuffleUnitV1(c_in, width - c_in, 2)
            self.add_module(f"layer{k}", nn.Sequential(first, *(ShuffleUnitV1(width, width, 1) for _ in range(units - 1))))
            c_in = width
        self.linear = nn.Linear(960, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Features]:
        f0 = F.relu(self.bn1(self.conv1(x)))
        maps, preacts = stages([self.layer1, self.layer2, self.layer3], f0)
        pooled = maps[-1].mean((2, 3))
        return self.linear(pooled), Features([f0, *maps], [f0, *preacts], maps[-1], pooled)


class ShuffleUnitV2(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        c = width // 2
        self.conv1, self.bn1 = nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, padding=1, groups=c, bias=False), nn.BatchNorm2d(c)
        self.conv3, self.bn3 = nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, out = x.chunk(2, 1)
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(out)))))
        preact = self.bn3(self.conv3(out))
        return F.channel_shuffle(torch.cat([kept, F.relu(preact)], 1), 2), torch.cat([kept, preact], 1)


class ShuffleDownV2(nn.Module):
    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        c = c_out // 2
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_in, 3, 2, padding=1, groups=c_in, bias=False), nn.BatchNorm2d(c_in)
        self.conv2, self.bn2 = nn.Conv2d(c_in, c, 1, bias=False), nn.BatchNorm2d(c)
        self.conv3, self.bn3 = nn.Conv2d(c_in, c, 1, bias=False), nn.BatchNorm2d(c)
        self.conv4, self.bn4 = nn.Conv2d(c, c, 3, 2, padding=1, groups=c, bias=False), nn.BatchNorm2d(c)
        self.conv5, self.bn5 = nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        left = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        right = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)))))
        preact = torch.cat([left, self.bn5(self.conv5(right))], 1)
        return F.channel_shuffle(F.relu(preact), 2), preact


class ShuffleNetV2(nn.Module):
    """ShuffleNetV2 of size 1. Preacts are not channel-shuffled although the maps are, as in RepDistiller."""

    def __init__(self, classes: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 24, 1, bias=False), nn.BatchNorm2d(24)
        c_in = 24
        for k, (width, units) in enumerate([(116, 3), (232, 7), (464, 3)], start=1):
            self.add_module(f"layer{k}", nn.Sequential(ShuffleDownV2(c_in, width), *(ShuffleUnitV2(width) for _ in range(units))))
            c_in = width
        self.conv2, self.bn2 = nn.Conv2d(464, 1024, 1, bias=False), nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Features]:
        f0 = F.relu(self.bn1(self.conv1(x)))
        maps, preacts = stages([self.layer1, self.layer2, self.layer3], f0)
        last = F.relu(self.bn2(self.conv2(maps[-1])))
        pooled = last.mean((2, 3))
        return self.linear(pooled), Features([f0, *maps], [f0, *preacts], last, pooled)


def init_fan_out(net: nn.Module) -> None:
    """Kaiming-normal convolutions by fan-out, as the published ResNets; the linear layer keeps PyTorch's default."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


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
    **{f"resnet{depth}": partial(ResNet, depth=depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(ResNet, depth=depth, widths=(32, 64, 128, 256)) for depth in (8, 32)},
    "resnet50": ResNet50,
    **{f"wrn_{depth}_{k}": partial(WideResNet, depth=depth, k=k) for depth in (16, 40) for k in (1, 2)},
    "vgg8": partial(VGG, convs=(1, 1, 1, 1, 1)),
    "vgg11": partial(VGG, convs=(1, 1, 2, 2, 2)),
    "vgg13": partial(VGG, convs=(2, 2, 2, 2, 2)),
    "vgg16": partial(VGG, convs=(2, 2, 3, 3, 3)),
    "vgg19": partial(VGG, convs=(2, 2, 4, 4, 4)),
    "mobilenetv2": MobileNetV2,
    "shufflenetv1": ShuffleNetV1,
    "shufflenetv2": ShuffleNetV2,
}


def build(name: str, classes: int, device: str | torch.device = "cpu") -> nn.Module:
    """A freshly initialised network of NETWORKS on `device`; channels_last, which measured faster. `net(x)` gives (logits, Features)."""
    if name not in NETWORKS:
        fail(f"unknown network {name}: take one of {', '.join(NETWORKS)}", 2)
    return NETWORKS[name](classes).to(device, memory_format=torch.channels_last)


class Shapes(NamedTuple):
    """Shapes of a network's Features for one image: (C, H, W) each, and the width of the pooled vector."""

    maps: list[tuple[int, int, int]]
    preacts: list[tuple[int, int, int]]
    last: tuple[int, int, int]
    pooled: int


@torch.no_grad()
def shapes(net: nn.Module) -> Shapes:
    """Probe `net` with one black image in eval mode (no statistics move); its mode is restored."""
    training, weight = net.training, next(net.parameters())
    _, f = net.eval()(torch.zeros(1, 3, 32, 32, device=weight.device, dtype=weight.dtype))
    net.train(training)
    return Shapes([tuple(m.shape[1:]) for m in f.maps], [tuple(m.shape[1:]) for m in f.preacts], tuple(f.last.shape[1:]), f.pooled.shape[1])


@torch.no_grad()
def accuracy(net: nn.Module, images: Images) -> float:
    """Top-1 accuracy of `net` in eval mode, in percent; its mode is restored."""
    training = net.training
    net.eval()
    correct = sum((net(x)[0].argmax(1) == y).sum() for x, y in images.batches())
    net.train(training)
    return 100 * int(correct) / len(images)


def graphed(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The training step, as it is. `step` takes tensors and returns one tensor, and reads nothing else that changes.

    Under this contract a CUDA graph may stand in for it without any change to a method file. What a call returns may be
    overwritten by the next one: add it up, do not collect it.
    """
    return step


# Teachers


def load_weights(net: nn.Module, file: Path) -> None:
    """Load a state dict, bare or under "model" or "state_dict", with or without "module." before its names.

    Anything that is not these weights ends the program with one line. Nothing in the file can run code.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        hint = "if it is a checkpoint, save its weights alone" if "Unsupported" in str(error) else "it is damaged or no checkpoint"
        fail(f"{file} does not hold plain tensors, and other content could run code, so it is not loaded: {hint}")
    except Exception as error:  # torch.load raises a different type for every way in which a file can be broken
        fail(f"{file} is not a checkpoint that torch can read ({str(error).splitlines()[0]})")
    for wrapper in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        fail(f"{file} holds no state dict (names with tensors), neither bare nor under 'model' or 'state_dict'")
    state = {name.removeprefix("module."): value for name, value in state.items()}
    own = net.state_dict()
    state |= {name: own[name] for name in own.keys() - state.keys() if name.endswith("num_batches_tracked")}
    wrong = [name for name in [*own, *state] if name not in own or name not in state or own[name].shape != state[name].shape]
    classifier = list(own)[-2:]
    if wrong and all(name in classifier and name in state for name in wrong):
        fail(f"{file} was trained for {len(state[classifier[1]])} classes, this data set has {len(own[classifier[1]])}")
    if wrong:
        fail(f"{file} holds another network's weights: first difference at {wrong[0]}")
    net.load_state_dict(state)


def find_teacher(args: Any) -> tuple[Path, str, int | None]:
    """Weights of args.teacher, where they come from, and the epochs they were trained for; trains a teacher if there is none."""
    if args.teacher_weights is not None:
        return Path(args.teacher_weights), str(args.teacher_weights), None
    shipped = ROOT / "teachers" / args.dataset / f"{args.teacher}.pt"
    if shipped.exists():
        return shipped, f"teachers/{args.dataset}/{shipped.name}", json.loads(shipped.with_suffix(".json").read_text())["epochs"]
    # The flags by which vanilla.py is to train it: those given to this run, unless they are vanilla.py's defaults anyway
    vanilla = {"epochs": 240, "batch_size": 64}
    given = {flag: value for flag, value in unlike_defaults(args).items() if flag in ("epochs", "batch_size", "milestones")}
    given = {flag: value for flag, value in given.items() if value != vanilla.get(flag)}
    folders = [Path(args.runs) / run_name("vanilla", [args.teacher, args.dataset], flags, seed=1) for flags in ({}, given)]
    if not any((folder / "result.json").exists() for folder in folders):
        train_teacher(args, given, folders[1])
    folder = next(folder for folder in folders if (folder / "result.json").exists())
    return folder / "student.pt", str(folder), json.loads((folder / "result.json").read_text())["epochs"]


def train_teacher(args: Any, flags: dict[str, Any], folder: Path) -> None:
    """Run methods/vanilla.py as a user would until `folder` holds a finished run, or wait for the process that is doing so."""
    script = ROOT / "methods" / "vanilla.py"
    if not script.exists():
        fail(f"no teacher {args.teacher} for {args.dataset} and no {script} to train one: name a checkpoint with --teacher-weights")
    options = dict(student=args.teacher, dataset=args.dataset, data=args.data, runs=args.runs, device=args.device, seed=1) | flags
    command = [sys.executable, str(script)]
    for flag, value in options.items():
        command += [f"--{flag.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])]
    waiting = False
    while not (folder / "result.json").exists():
        if Lock.is_taken(folder / ".lock"):
            if not waiting:
                print(f"waiting for the process that trains the teacher in {folder}", flush=True)
            waiting = True
            time.sleep(1)
            continue
        print(f"no teacher {args.teacher} for {args.dataset} yet, training one: {shlex.join(command[1:])}", flush=True)
        code = subprocess.run(command).returncode
        if code and not Lock.is_taken(folder / ".lock"):
            fail(f"the teacher was not trained (exit code {code}); the same command goes on from its last checkpoint", code if code == 130 else 1)


def load_teacher(args: Any, test: Images) -> nn.Module:
    """The network args.teacher, trained, frozen and in eval mode. `teacher.record` says which one it is, as result.json does.

    Taken from --teacher-weights; else teachers/<dataset>/<name>.pt; else a finished run of methods/vanilla.py with its
    default settings; else one with the epochs, milestones and batch size given here, which is trained if it does not exist.
    """
    file, source, epochs = find_teacher(args)
    teacher = build(args.teacher, test.classes, args.device)
    load_weights(teacher, file)
    teacher.eval().requires_grad_(False)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    teacher.record = dict(name=args.teacher, accuracy=accuracy(teacher, test), sha256=sha256, source=source, epochs=epochs)
    trained = f"trained for {epochs} epochs" if epochs else "epochs unknown"
    print(f"teacher     {args.teacher}: {teacher.record['accuracy']:.2f} % test accuracy, {trained}, {source}, SHA-256 {sha256[:12]}", flush=True)
    return teacher


# Runs


class Lock:
    """A file that at most one process holds; the system releases it when the process ends, however it ends."""

    def __init__(self, path: Path):
        self.path = path

    def take(self) -> bool:
        """True if this process now holds the lock, False if another one does."""
        self.file = open(self.path, "a")
        try:
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(self.file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.file.close()
            return False
        return True

    def release(self) -> None:
        self.file.close()

    @staticmethod
    def is_taken(path: Path) -> bool:
        """Whether a process holds the lock `path` right now."""
        if not path.exists():
            return False
        lock = Lock(path)
        if lock.take():
            lock.release()
            return False
        return True


def write(path: Path, content: bytes | str) -> None:
    """Replace `path` in one step, on the disk: a crash or a full disk leaves the old file whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        fail(f"cannot write {path} ({error.strerror}): what was there before is intact; make room and continue with the same command")


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """torch.save, followed by the SHA-256 of what it wrote."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write(path, buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest())


def read_checkpoint(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    if hashlib.sha256(content[:-32]).digest() != content[-32:]:
        fail(f"{path} is damaged, its SHA-256 differs: put back a good copy, or delete it to start this run again")
    return torch.load(io.BytesIO(content[:-32]), map_location="cpu", weights_only=True)


def resolve(args: Any) -> None:
    """Fill in the flags whose default depends on others: learning rate and milestones."""
    if args.lr is None:
        args.lr = 0.01 if args.student in ("mobilenetv2", "shufflenetv1", "shufflenetv2") else 0.05
    if args.milestones is None:
        drops = getattr(args, "drops", (5 / 8, 6 / 8, 7 / 8))
        args.milestones = tuple(sorted({int(args.epochs * drop) for drop in drops} - {0}))


def check(args: Any) -> None:
    """Refuse values of the shared flags that make no sense, each with one line and exit code 2."""
    flags = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}
    for flag, value in flags.items():
        name = f"--{flag.replace('_', '-')} {value}"
        if flag in ("teacher", "student", "peer") and value not in NETWORKS:
            fail(f"{name} is unknown: take one of {', '.join(NETWORKS)}", 2)
        if isinstance(value, float) and not math.isfinite(value):
            fail(f"{name} must be a finite number", 2)
        if flag in ("epochs", "batch_size") and value < 1:
            fail(f"{name} must be at least 1", 2)
        if (flag == "lr" or flag.endswith("temperature")) and value <= 0:
            fail(f"{name} must be above 0", 2)
        if flag == "teacher_weights" and value is not None and not value.is_file():
            fail(f"{name} does not exist", 2)
        if flag in ("seed", "weight_decay") and value < 0:
            fail(f"{name} must not be negative", 2)
    if args.dataset not in DATASETS:
        fail(f"--dataset {args.dataset} is unknown: take one of {', '.join(DATASETS)}", 2)
    if any(b <= a for a, b in zip((0, *args.milestones), args.milestones)):
        fail(f"--milestones {' '.join(map(str, args.milestones))} must be positive and ascending", 2)
    try:
        device = torch.device(args.device)
    except RuntimeError:
        fail(f"--device {args.device} is unknown: cuda, cuda:1, ... or cpu", 2)
    if device.type not in ("cpu", "cuda"):
        fail(f"--device {args.device} is not supported: cuda or cpu", 2)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        fail(f"--device {args.device}: PyTorch sees no such GPU here; --device cpu works without one", 2)


def unlike_defaults(args: Any) -> dict[str, Any]:
    """The settings that differ from what the script does without flags, besides those that a run's name always shows."""
    default = dataclasses.replace(type(args)(), student=args.student)
    usual = default.epochs
    default.epochs = args.epochs  # the default milestones depend on it
    resolve(default)
    default_values = dataclasses.asdict(default) | {"epochs": usual}
    apart = ("teacher", "peer", "student", "dataset", "seed", "data", "runs", "device")
    return {flag: value for flag, value in dataclasses.asdict(args).items() if flag not in apart and value != default_values[flag]}


def shown(value: Any) -> str:
    """A setting as it stands in a run's name: a list with commas, a file by the start of its SHA-256."""
    if isinstance(value, Path):
        return hashlib.sha256(value.read_bytes()).hexdigest()[:8]
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def run_name(method: str, what: list[str], flags: dict[str, Any], seed: int) -> str:
    """<method>__<teacher>__<student>__<dataset>[__flag=value ...]__seed<n>"""
    settings = [f"{flag.replace('_', '-')}={shown(value)}" for flag, value in flags.items()]
    return "__".join([method, *what, *settings, f"seed{seed}"]).replace("/", "-").replace(" ", "-")


def git(*words: str) -> str | None:
    """What git says about the project's own checkout; None outside one."""
    try:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class Run:
    """The folder of one run: settings, log, checkpoints, the student, the result.

    Started again with the same command, a run that was killed at any moment goes on from its last checkpoint and ends with
    the same weights and log rows (on a CPU bit for bit at the same number of threads); a finished one prints its result and
    ends with exit code 0. A checkpoint is written at the end of a phase and of every epoch, but not more often than every
    SAVE_EVERY seconds.
    """

    def __init__(self, script: str, args: Any):
        resolve(args)
        check(args)
        self.args, self.method, self.rows = args, Path(script).stem, []
        self.unlike_defaults = unlike_defaults(args)
        networks = [getattr(args, role) for role in ("teacher", "peer", "student") if hasattr(args, role)]
        self.folder = Path(args.runs) / run_name(self.method, [*networks, args.dataset], self.unlike_defaults, args.seed)
        self.parameters: dict[int, int] = {}
        signal.signal(signal.SIGINT, lambda *_: fail("interrupted: continue with the same command", 130))
        if torch.device(args.device).type == "cuda":  # the same sums in the same order, so that a resumed run ends as an uninterrupted one
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
        self.open(Path(script))
        self.commit, self.dirty = git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))

    def open(self, script: Path) -> None:
        """Take the folder for this process, and make sure that what lies in it was made with the same settings."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"cannot make {self.folder} ({error.strerror}): name another folder with --runs")
        self.lock = Lock(self.folder / ".lock")
        if not self.lock.take():
            fail(f"{self.folder} is in use by another process: wait for it, or name another folder with --runs")
        settings = json.loads(json.dumps(dataclasses.asdict(self.args), default=str))
        file, finished = self.folder / "args.json", self.folder / "result.json"
        if file.exists():
            try:
                found = json.loads(file.read_text())
                differing = [flag for flag in settings if found.get(flag) != settings[flag] and flag not in ("data", "runs")]
            except (ValueError, AttributeError):
                fail(f"{file} is damaged: delete the folder to start this run again")
            if finished.exists() and differing == ["device"]:
                differing = []  # a result can be shown anywhere
            if differing:
                flag = differing[0]
                fail(f"{file} says {flag} = {found.get(flag)}, this command {settings[flag]}: restore it, or name another folder with --runs")
        if finished.exists():
            self.show_result(json.loads(finished.read_text()))
            raise SystemExit(0)
        for source in script, Path(__file__):
            copy = self.folder / source.name
            if not file.exists():
                write(copy, source.read_bytes())
            elif copy.read_bytes() != source.read_bytes():
                print(f"note: {source.name} has changed since this run began with the version kept in {self.folder}", flush=True)
        write(file, json.dumps(settings, indent=1) + "\n")

    def epochs(self, total: int, trained: nn.ModuleDict, optimizer: Any, schedule: Any, phase: str = "") -> Iterator[int]:
        """The epochs still to do of `total`, counted from 1, of the whole run or of one phase of it.

        Before the first one the last checkpoint is loaded into the three; `log` must be called once in each. A finished phase
        loads its final state and yields nothing.
        """
        file = self.folder / (f"checkpoint-{phase}.pt" if phase else "checkpoint.pt")
        self.introduce(trained, phase)
        done, rows = list(self.rows), []
        if file.exists():
            state = read_checkpoint(file)
            try:
                trained.load_state_dict(state["trained"])
                optimizer.load_state_dict(state["optimizer"])
            except (KeyError, RuntimeError, ValueError) as error:
                fail(f"{file} does not fit this script ({str(error).splitlines()[0]}): delete {self.folder} to start again")
            schedule.load_state_dict(state["schedule"])
            rows = state["rows"]
            print(f"continuing after epoch {len(rows)} of {total}{phase and f' of phase {phase}'}", flush=True)
        self.phase, self.total, self.rows = phase, total, done + rows
        saved = time.monotonic()
        for epoch in range(len(rows) + 1, total + 1):
            self.started = time.perf_counter()
            yield epoch
            if epoch == total or time.monotonic() - saved >= SAVE_EVERY:
                state = dict(trained=trained.state_dict(), optimizer=optimizer.state_dict(), schedule=schedule.state_dict())
                write_checkpoint(file, state | {"rows": self.rows[len(done) :]})
                write(self.folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))
                saved = time.monotonic()

    def introduce(self, trained: nn.ModuleDict, phase: str) -> None:
        """Say what is about to be trained, and count its parameters."""
        self.parameters |= {id(p): p.numel() for p in trained.parameters()}
        if phase:
            print(f"phase       {phase}: {count(trained):,} parameters", flush=True)
            return
        if not hasattr(self.args, "teacher"):
            print("teacher     none", flush=True)
        settings = ", ".join(f"{flag.replace('_', '-')} {shown(value)}" for flag, value in self.unlike_defaults.items())
        print(f"student     {self.args.student}, seed {self.args.seed}, {self.args.device}; unlike the defaults: {settings or 'nothing'}")
        student = count(trained["student"])
        extra = sum(self.parameters.values()) - student
        print(f"parameters  {student:,} in the student, {extra:,} more while training, {student:,} left at test time", flush=True)

    def log(self, epoch: int, means: Tensor, test: float | None, schedule: Any, **more: Any) -> None:
        """Print and keep one epoch's row.

        `means`: mean loss and, where there are labels, the share of right answers in training; `test`: test accuracy in
        percent, None where there is none yet; `more`: further numbers worth watching. A loss that is not finite ends the run.
        """
        loss, *right = means.tolist()
        if not math.isfinite(loss):
            fail(f"the loss became {loss} in epoch {epoch}: try a smaller --lr; {self.folder} keeps its last good checkpoint")
        row = {"phase": self.phase, "epoch": epoch, "loss": loss, "train": 100 * right[0] if right else None, "test": test}
        row |= {"lr": float(schedule.get_last_lr()[0]), "seconds": round(time.perf_counter() - self.started, 3)}
        row |= {name: float(value) for name, value in more.items()}
        self.rows.append(row)
        left = row["seconds"] * (self.total - epoch)
        line = f"epoch {epoch:3}/{self.total}  loss {loss:.4f}"
        line += f"  train {row['train']:5.2f} %" * bool(right) + (f"  test {test:5.2f} %" if test is not None else "")
        line += "".join(f"  {name} {row[name]:.4g}" for name in more)
        print(f"{line}  lr {row['lr']:.2g}  {clock(row['seconds'])}  left {clock(left)}", flush=True)

    def finish(self, student: nn.Module, teacher: nn.Module | None = None) -> float:
        """Save the student's weights (float32, contiguous) and the result; give the last epoch's test accuracy in percent."""
        buffer = io.BytesIO()
        torch.save({name: value.cpu().contiguous() for name, value in student.state_dict().items()}, buffer)
        write(self.folder / "student.pt", buffer.getvalue())
        rows = [row for row in self.rows if row["phase"] == ""]
        best = max(rows, key=lambda row: row["test"])
        device = torch.device(self.args.device)
        result = dict(
            method=self.method,
            args=json.loads((self.folder / "args.json").read_text()),
            last=rows[-1]["test"],
            best=best["test"],
            best_epoch=best["epoch"],
            teacher=teacher and teacher.record,
            parameters=dict(student=count(student), extra=sum(self.parameters.values()) - count(student), at_test=count(student)),
            epochs=len(rows),
            seconds=round(sum(row["seconds"] for row in self.rows), 1),
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            commit=self.commit,
            dirty=self.dirty,
        )
        write(self.folder / "result.json", json.dumps(result, indent=1) + "\n")
        self.show_result(result)
        return result["last"]

    def show_result(self, result: dict[str, Any]) -> None:
        best = f"best {result['best']:.2f} % (epoch {result['best_epoch']})"
        print(f"result      last {result['last']:.2f} %, {best}, {result['epochs']} epochs in {clock(result['seconds'])}: {self.folder}", flush=True)


def count(module: nn.Module) -> int:
    """Number of learnable parameters."""
    return sum(p.numel() for p in module.parameters())
