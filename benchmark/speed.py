"""How fast is our training loop beside the usual one? One process, KD on one pair, the loops in alternating rounds.

    ours                    as in methods/kd.py: images on the device, channels_last, fused SGD, no synchronisation in an epoch
    peer-like               PIL transforms in a DataLoader with workers, .item() every step, default memory format, plain SGD
    peer-like, resident     the peer-like loop, fed with our images on the device

A round is one epoch of --steps full batches for each loop. A ratio is taken within a round, so that what slows the machine
down for a while slows both; printed are the median over the rounds and the smallest and largest. Two checks that the fast
loop is still the right one end the program with exit code 1 if they fail.

    python benchmark/speed.py --pair resnet56/resnet20 --json speed.json
"""

import copy
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as V
import tyro
from PIL import Image
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import DATASETS, NETWORKS, Images, RawData, build, fail, git, graphed, write
from methods import kd
from methods.kd import kd_loss


@dataclass
class Args:
    pair: str = "resnet56/resnet20"
    """teacher/student, names in common.NETWORKS"""
    rounds: int = 5
    """rounds that count; one more goes before them to warm up"""
    steps: int = 20
    """training steps of each loop in a round"""
    batch_size: int = 64
    """images a step"""
    workers: int = 2
    """processes that transform the peer-like loop's images"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cuda, cuda:1, ... or cpu"""
    dataset: str = "synthetic"
    """cifar100, cifar10, or synthetic: the pixels' values do not matter for speed"""
    data: Path = Path("data")
    """folder of the data sets"""
    json: Path | None = None
    """file for all numbers of the table and every round's seconds"""


class PilImages(Dataset):
    """A data set as torchvision serves it: one PIL image at a time through `transform`."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, transform: Callable):
        self.pixels, self.labels, self.transform = pixels, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[i])), int(self.labels[i])


def pil_loader(pixels: np.ndarray, labels: np.ndarray, raw: RawData, args: Args) -> DataLoader:
    """The DataLoader of the peer-like loop. Its workers live on between epochs, which most peers do not grant themselves."""
    augment = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    transform = transforms.Compose([*augment, transforms.ToTensor(), transforms.Normalize(raw.mean, raw.std)])
    images = PilImages(pixels, labels, transform)
    return DataLoader(images, args.batch_size, shuffle=True, num_workers=args.workers, persistent_workers=True)


def our_step(args: kd.Args, teacher: nn.Module, student: nn.Module, optimizer: SGD) -> Callable[..., Tensor]:
    """The step of methods/kd.py, word for word."""

    @graphed
    def step(x, y, index):
        with torch.no_grad():
            z_t, _ = teacher(x)
        z_s, _ = student(x)

        loss = args.ce_weight * F.cross_entropy(z_s, y) + args.kd_weight * kd_loss(z_s, z_t, args.kd_temperature)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return torch.stack([loss.detach() * len(y), (z_s.argmax(1) == y).sum()])

    return step


def peer_epoch(args: kd.Args, teacher: nn.Module, student: nn.Module, optimizer: SGD, batches: Iterable) -> tuple[float, float]:
    """An epoch as the usual code bases write it: the loss and the right answers are fetched from the device every step."""
    losses = right = 0.0
    for x, y in batches:
        x, y = x.to(args.device), y.to(args.device)
        z_s, _ = student(x)
        with torch.no_grad():
            z_t, _ = teacher(x)
        loss = args.ce_weight * F.cross_entropy(z_s, y) + args.kd_weight * kd_loss(z_s, z_t, args.kd_temperature)
        losses += loss.item() * len(y)
        right += (z_s.argmax(1) == y).sum().item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses, right


def networks(args: kd.Args, classes: int) -> tuple[nn.Module, nn.Module]:
    """Teacher and student, the same at every call; a step with an untrained teacher takes as long as with a trained one."""
    torch.manual_seed(args.seed)
    teacher, student = build(args.teacher, classes, args.device), build(args.student, classes, args.device)
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # takes over the statistics of the next batch, without which deep logits would overflow
    with torch.no_grad():
        teacher.train()(torch.randn(64, 3, 32, 32, device=args.device))
    return teacher.eval().requires_grad_(False), student


def loops(args: Args, kd_args: kd.Args, raw: RawData) -> dict[str, Callable[[int], object]]:
    """The loops to compare, by name: functions that train for one epoch, given its number."""
    take = np.arange(args.steps * args.batch_size) % len(raw.train[1])
    pixels, labels = raw.train[0][take], raw.train[1][take]
    train, loader = Images(pixels, labels, raw, kd_args), pil_loader(pixels, labels, raw, args)

    def ours() -> Callable[[int], object]:
        teacher, student = networks(kd_args, raw.classes)
        optimizer = SGD(student.parameters(), kd_args.lr, momentum=0.9, weight_decay=kd_args.weight_decay, fused=True)
        step = our_step(kd_args, teacher, student, optimizer)
        return lambda epoch: sum(step(*batch) for batch in train.epoch(epoch, phase="speed")).tolist()

    def peer(batches: Callable[[int], Iterable]) -> Callable[[int], object]:
        teacher, student = (net.to(memory_format=torch.contiguous_format) for net in networks(kd_args, raw.classes))
        optimizer = SGD(student.parameters(), kd_args.lr, momentum=0.9, weight_decay=kd_args.weight_decay)
        return lambda epoch: peer_epoch(kd_args, teacher, student, optimizer, batches(epoch))

    def resident(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return ((x.contiguous(), y) for x, y, _ in train.epoch(epoch, phase="speed"))

    return {"ours": ours(), "peer-like, resident": peer(resident), "peer-like": peer(lambda epoch: loader)}


def race(args: Args, contestants: dict[str, Callable[[int], object]]) -> dict[str, list[float]]:
    """Seconds of each loop in each round; who begins changes from round to round, and the first round does not count."""
    cuda = torch.device(args.device).type == "cuda"
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(args.rounds + 1):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            torch.use_deterministic_algorithms(cuda and name == "ours", warn_only=True)  # as common.Run sets it
            torch.backends.cudnn.benchmark = name != "ours"  # as RepDistiller and mdistiller set it
            start = time.perf_counter()
            contestants[name](turn)
            if cuda:
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def views_differ(raw: RawData, kd_args: kd.Args, n: int = 200) -> int:
    """How many of n random views differ from torchvision's, in any bit of any pixel."""
    pixels, labels = raw.train[0][:n], raw.train[1][:n]
    images = Images(pixels, labels, raw, kd_args)
    random = torch.Generator().manual_seed(0)
    offsets = torch.stack([torch.randint(high, (n,), generator=random) for high in (9, 9, 2)])
    own = images.normalise(images.crop(torch.arange(n, device=kd_args.device), offsets.to(kd_args.device))).cpu()
    differ = 0
    for image, (top, left, flip), view in zip(pixels, offsets.T.tolist(), own):
        theirs = V.crop(V.pad(Image.fromarray(image), 4), top, left, 32, 32)
        theirs = V.normalize(V.to_tensor(V.hflip(theirs) if flip else theirs), raw.mean, raw.std)
        differ += not torch.equal(view, theirs)
    return differ


def step_error(kd_args: kd.Args, classes: int, steps: int = 5, batch: int = 8) -> float:
    """Largest difference of the student after some steps of ours and of a naive loop, in float64 on the CPU.

    The naive loop takes the default memory format and writes softmax, losses and SGD out.
    """
    kd_args = dataclasses.replace(kd_args, device="cpu")
    lr, decay, temperature = kd_args.lr, kd_args.weight_decay, kd_args.kd_temperature
    teacher, student = (net.double() for net in networks(kd_args, classes))
    naive_teacher, naive = (copy.deepcopy(net).to(memory_format=torch.contiguous_format) for net in (teacher, student))
    step = our_step(kd_args, teacher, student, SGD(student.parameters(), lr, momentum=0.9, weight_decay=decay, fused=True))
    velocity = [torch.zeros_like(p) for p in naive.parameters()]
    random = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randn(batch, 3, 32, 32, generator=random, dtype=torch.float64)
        y = torch.randint(classes, (batch,), generator=random)
        step(x.to(memory_format=torch.channels_last), y, torch.arange(batch))

        z_t, z_s = naive_teacher(x)[0], naive(x)[0]
        p, p_t, p_s = (z.exp() / z.exp().sum(1, keepdim=True) for z in (z_s, z_t / temperature, z_s / temperature))
        ce = -p[torch.arange(batch), y].log().mean()
        kl = (p_t * (p_t / p_s).log()).sum() / batch
        loss = kd_args.ce_weight * ce + kd_args.kd_weight * temperature**2 * kl
        gradients = torch.autograd.grad(loss, list(naive.parameters()))
        with torch.no_grad():
            for w, g, v in zip(naive.parameters(), gradients, velocity):
                v.mul_(0.9).add_(g + decay * w)
                w -= lr * v
    return max((a - b).abs().max().item() for a, b in zip(student.state_dict().values(), naive.state_dict().values()))


def main(args: Args) -> None:
    teacher, _, student = args.pair.partition("/")
    if teacher not in NETWORKS or student not in NETWORKS:
        fail(f"--pair {args.pair} is not TEACHER/STUDENT: take two of {', '.join(NETWORKS)}", 2)
    if args.dataset not in DATASETS:
        fail(f"--dataset {args.dataset} is unknown: take one of {', '.join(DATASETS)}", 2)
    if min(args.rounds, args.steps, args.batch_size, args.workers) < 1:
        fail("--rounds, --steps, --batch-size and --workers must be at least 1", 2)
    raw = DATASETS[args.dataset](args.data)
    kd_args = kd.Args(teacher, student, device=args.device, batch_size=args.batch_size, lr=0.05)
    cuda = torch.device(args.device).type == "cuda"
    device = torch.cuda.get_device_name(args.device) if cuda else f"cpu, {torch.get_num_threads()} of {os.cpu_count()} cores"
    print(f"{args.pair}, batch {args.batch_size}, {device}, torch {torch.__version__}")
    print(f"{args.rounds} rounds of {args.steps} steps, {args.workers} workers", flush=True)

    rows = {}
    seconds = race(args, loops(args, kd_args, raw))
    print(f"{'':24}ms a step   times ours: median (min to max)")
    for name, values in seconds.items():
        ratios = [theirs / own for theirs, own in zip(values, seconds["ours"])]
        row = dict(ms=1000 * median(values) / args.steps, ratio=median(ratios), min=min(ratios), max=max(ratios), seconds=values)
        print(f"{name:24}{row['ms']:9.2f}   {row['ratio']:.2f} ({row['min']:.2f} to {row['max']:.2f})")
        rows[name] = row

    differ, error = views_differ(raw, kd_args), step_error(kd_args, raw.classes)
    right = differ == 0 and error < 1e-9  # not so if it is NaN
    print(f"views unlike torchvision's, of 200:       {differ}")
    print(f"step unlike a naive loop's, in float64:   {error:.1e}", flush=True)
    if args.json:
        facts = {flag: value for flag, value in dataclasses.asdict(args).items() if flag not in ("data", "json")}
        facts |= dict(device=device, torch=torch.__version__, commit=git("rev-parse", "HEAD"))
        facts |= dict(loops=rows, views_unlike=differ, step_unlike=error, right=right)
        write(args.json, json.dumps(facts, indent=1) + "\n")
    if not right:
        fail("the fast loop does not compute what it should: the last two rows must be 0 and below 1e-9")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
