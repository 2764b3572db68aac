"""How fast is our training loop beside the usual one? One process, KD on one pair, the loops in alternating rounds.

    ours                    as in methods/kd.py: images on the device, channels_last, fused SGD, no synchronisation in an epoch
    ours, graphed           the same with the step as a CUDA graph (CUDA only)
    peer-like               PIL transforms in a DataLoader with workers, .item() every step, default memory format, plain SGD
    peer-like, resident     the peer-like loop, fed with our images on the device

A round is one epoch of --steps full batches for each loop. A ratio is taken within a round, so that what slows the machine
down for a while slows both; printed are the median over the rounds and the smallest and largest. --variants adds our loop
with one thing changed, to see what it buys. Below stand yardsticks: a step's arithmetic at the rate of a large matrix
product, and on CUDA a graph of as many kernels that do next to nothing. --at-once times several runs as processes that share
the device. Checks that the fast loop is still the right one end the program with exit code 1 if they
fail.

    python benchmark/speed.py --pair resnet56/resnet20 --json speed.json
"""

import contextlib
import copy
import dataclasses
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as V
import tyro
from PIL import Image
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
from common import DATASETS, NETWORKS, Images, RawData, build, fail, git, graphed, hardware, write
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
    variants: bool = False
    """also race our loop with one thing changed"""
    at_once: tuple[int, ...] | None = None
    """how many runs to time as processes at once; by default 1, 2, 3 and 5 on CUDA, and none on a CPU"""
    json: Path | None = None
    """file for all numbers of the table and every round's seconds"""


# What --variants changes in our loop
VARIANTS = (
    *("folded teacher", "default memory format", "plain SGD", "uncounted batches", "teacher on a second stream"),
    "bfloat16",  # other numbers, unlike the rest
)

IN_FLOAT64 = "step unlike a naive loop's, in float64"
LIMITS = {IN_FLOAT64: 1e-9}  # of the checks; the others allow no difference


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


def side_by_side(teacher: nn.Module, student: nn.Module) -> tuple[Callable, Callable]:
    """Teacher and student such that the first works on a second stream until the second is done."""
    second = torch.cuda.Stream()

    def teach(x: Tensor) -> Any:
        second.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(second):
            z_t, features = teacher(x)
        z_t.record_stream(torch.cuda.current_stream())
        return z_t, features

    def learn(x: Tensor) -> Any:
        result = student(x)
        torch.cuda.current_stream().wait_stream(second)
        return result

    return teach, learn


def in_bfloat16(net: nn.Module) -> Callable:
    """`net` with its convolutions and products in bfloat16, its logits in float32."""

    def forward(x: Tensor) -> Any:
        with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):  # a graph must cast anew at each replay
            z, features = net(x)
        return z.float(), features

    return forward


def our_loop(kd_args: kd.Args, train: Images, graph: bool = False, variant: str = "") -> Callable[[int], object]:
    """Our epoch, as a CUDA graph or not, with nothing or one of VARIANTS changed; takes the epoch's number."""
    teacher, student = networks(kd_args, train.classes)
    fused = None if variant == "plain SGD" else True
    optimizer = SGD(student.parameters(), kd_args.lr, momentum=0.9, weight_decay=kd_args.weight_decay, fused=fused)
    if fused and kd_args.device != "cpu":
        optimizer.param_groups[0]["lr"] = torch.tensor(kd_args.lr, device=kd_args.device)  # as common.Run makes it
    if variant == "default memory format":
        teacher, student = (net.to(memory_format=torch.contiguous_format) for net in (teacher, student))
    if variant == "folded teacher":  # batch norm becomes part of the convolution before it
        teacher = fuse(teacher).to(memory_format=torch.channels_last)
    if variant == "uncounted batches":
        for module in student.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.num_batches_tracked = None
    pair = teacher, student
    if variant == "bfloat16":
        pair = in_bfloat16(teacher), in_bfloat16(student)
    if variant == "teacher on a second stream":
        pair = side_by_side(teacher, student)
    with mock.patch.object(common, "GRAPH", graph):
        step = our_step(kd_args, *pair, optimizer)

    def epoch(number: int) -> object:
        batches = train.epoch(number, phase="speed")
        if variant == "default memory format":
            batches = ((x.contiguous(), y, index) for x, y, index in batches)
        return sum(step(*batch) for batch in batches).tolist()

    return epoch


def loops(args: Args, kd_args: kd.Args, raw: RawData) -> dict[str, Callable[[int], object]]:
    """The loops to compare, by name: functions that train for one epoch, given its number."""
    take = np.arange(args.steps * args.batch_size) % len(raw.train[1])
    pixels, labels = raw.train[0][take], raw.train[1][take]
    train, loader = Images(pixels, labels, raw, kd_args), pil_loader(pixels, labels, raw, args)
    cuda = torch.device(args.device).type == "cuda"

    def peer(batches: Callable[[int], Iterable]) -> Callable[[int], object]:
        teacher, student = (net.to(memory_format=torch.contiguous_format) for net in networks(kd_args, raw.classes))
        optimizer = SGD(student.parameters(), kd_args.lr, momentum=0.9, weight_decay=kd_args.weight_decay)
        return lambda epoch: peer_epoch(kd_args, teacher, student, optimizer, batches(epoch))

    def resident(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return ((x.contiguous(), y) for x, y, _ in train.epoch(epoch, phase="speed"))

    found = {"ours": our_loop(kd_args, train)} | ({"ours, graphed": our_loop(kd_args, train, graph=True)} if cuda else {})
    for variant in VARIANTS if args.variants else ():
        if cuda or "stream" not in variant:
            found[f"ours, {variant}"] = our_loop(kd_args, train, graph=cuda, variant=variant)
    return found | {"peer-like, resident": peer(resident), "peer-like": peer(lambda epoch: loader)}


def set_up(device: str, ours: bool) -> None:
    """What holds for the whole process: as common.Run sets it for us, as RepDistiller and mdistiller do for the peers."""
    if device != "cpu":
        torch.cuda.set_device(torch.device(device).index or 0)
    torch.use_deterministic_algorithms(device != "cpu" and ours, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = not ours


def race(args: Args, contestants: dict[str, Callable[[int], object]]) -> dict[str, list[float]]:
    """Seconds of each loop in each round; who begins changes from round to round, and the first round does not count."""
    cuda = torch.device(args.device).type == "cuda"
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(args.rounds + 1):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            set_up(args.device, ours=name.startswith("ours"))
            start = time.perf_counter()
            contestants[name](turn)
            if cuda:
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    set_up(args.device, ours=True)
    return {name: values[1:] for name, values in seconds.items()}


def best_seconds(act: Callable[[], object], cuda: bool, times: int = 10) -> float:
    """The shortest time that `act` takes on the device, of several."""
    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        act()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def yardsticks(kd_args: kd.Args, classes: int) -> dict[str, float]:
    """What to hold a step against: its arithmetic, the device's rates of a large matrix product and copy, a graph's own cost."""
    device, cuda = kd_args.device, torch.device(kd_args.device).type == "cuda"
    teacher, student = networks(kd_args, classes)
    optimizer = SGD(student.parameters(), kd_args.lr, momentum=0.9, fused=True)
    step = our_step(kd_args, teacher, student, optimizer)
    x = torch.randn(kd_args.batch_size, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    batch = x, torch.zeros(len(x), dtype=torch.int64, device=device), torch.arange(len(x), device=device)
    with FlopCounterMode(display=False) as counter:
        step(*batch)
    n = 8192 if cuda else 2048
    a, big = torch.randn(n, n, device=device), torch.zeros(2**28 if cuda else 2**24, device=device)
    other = torch.empty_like(big)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32  # at the rate that the convolutions may have
    rate = 2 * n**3 / best_seconds(lambda: a @ a, cuda)
    torch.backends.cuda.matmul.allow_tf32 = False
    flop, copied = counter.get_total_flops(), 8 * len(big) / best_seconds(lambda: other.copy_(big), cuda)
    found = dict(gflop=flop / 1e9, product_gflop_s=rate / 1e9, arithmetic_ms=1000 * flop / rate, copy_gb_s=copied / 1e9)
    if cuda:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step(*batch)
            torch.cuda.synchronize()
        kernels = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
        graph, one = torch.cuda.CUDAGraph(), torch.zeros(1, device=device)
        with torch.cuda.graph(graph):
            for _ in range(kernels):
                one += 1  # each waits for the one before
        found |= dict(kernels=kernels, trivial_graph_ms=1000 * best_seconds(graph.replay, cuda))
    return found


def work(args: Args, kd_args: kd.Args, raw: RawData, start: Any, seconds: Any) -> None:
    """One of several processes: warms up, waits for the others, and says how long its epochs take."""
    cuda = torch.device(args.device).type == "cuda"
    set_up(args.device, ours=True)
    take = np.arange(args.steps * args.batch_size) % len(raw.train[1])
    epoch = our_loop(kd_args, Images(raw.train[0][take], raw.train[1][take], raw, kd_args), graph=cuda)
    epoch(0)
    start.wait()
    begin = time.perf_counter()
    for turn in range(args.rounds):
        epoch(1 + turn)
    seconds.put(time.perf_counter() - begin)


def together(args: Args, kd_args: kd.Args, raw: RawData, n: int) -> float:
    """Steps a second of `n` runs at once on the device, all together, until the slowest is done."""
    spawn = multiprocessing.get_context("spawn")
    start, seconds = spawn.Barrier(n, timeout=120), spawn.Queue()  # if one process dies, the others give up
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // n))}):
        processes = [spawn.Process(target=work, args=(args, kd_args, raw, start, seconds)) for _ in range(n)]
        for process in processes:
            process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        fail(f"one of {n} runs at once failed: see above")
    return n * args.rounds * args.steps / max(seconds.get() for _ in processes)


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


class Killed(BaseException):
    """Stands for the end of a run's process."""


def runs_differ(kd_args: kd.Args, raw: RawData) -> dict[str, float]:
    """Largest difference between the weights of a short run of methods/kd.py and those of runs that must end alike.

    The run has 21 steps, each third of them with 16 images (other batches being larger), and its learning rate falls before the
    last epoch. "resumed" is killed an epoch before that; "graphed", on CUDA only, replays a graph. A last one, whose rate never
    falls, must end elsewhere.
    """
    n = 2 * kd_args.batch_size + 16
    few = raw._replace(train=tuple(part[:n] for part in raw.train), test=tuple(part[:64] for part in raw.test))
    write_checkpoint = common.write_checkpoint

    def write_and_die(path: Path, state: dict[str, Any]) -> None:
        write_checkpoint(path, state)
        if len(state["rows"]) == 5:
            raise Killed

    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "teacher.pt"
        torch.save(networks(kd_args, raw.classes)[0].state_dict(), weights)

        def train(name: str, graph: bool = False, kill: bool = False, milestone: int = 6) -> dict[str, Tensor]:
            place = dict(teacher_weights=weights, runs=Path(folder) / name, dataset="few", epochs=7)
            run = dataclasses.replace(kd_args, **place, milestones=(milestone,))
            die = mock.patch.multiple(common, SAVE_EVERY=0, write_checkpoint=write_and_die)
            with contextlib.redirect_stdout(io.StringIO()), mock.patch.object(common, "GRAPH", graph):
                if kill:
                    with contextlib.suppress(Killed), die:
                        kd.main(run)
                kd.main(run)
            (student,) = Path(folder, name).glob("*/student.pt")
            return torch.load(student, weights_only=True)

        with mock.patch.dict(DATASETS, few=lambda data: few):
            whole = train("whole")
            others = {"resumed": train("resumed", kill=True)}
            if torch.device(kd_args.device).type == "cuda":
                others |= {"graphed": train("graphed", graph=True), "graphed, resumed": train("both", graph=True, kill=True)}
            others |= {"rate never falls": train("flat", milestone=7)}
    return {name: max((whole[key].double() - end[key]).abs().max().item() for key in whole) for name, end in others.items()}


def checks(kd_args: kd.Args, raw: RawData) -> dict[str, float]:
    """What shows that the fast loop is the right one: numbers that must be 0, or as small as LIMITS says."""
    differ = runs_differ(kd_args, raw)
    found = {"views unlike torchvision's, of 200": views_differ(raw, kd_args), IN_FLOAT64: step_error(kd_args, raw.classes)}
    found |= {"runs that never lower the rate end alike": differ.pop("rate never falls") == 0}
    found |= {f"run unlike the whole, eager one: {name}": value for name, value in differ.items()}
    for name, value in found.items():
        print(f"{name:50}{value:.1e}", flush=True)
    return found


def print_race(seconds: dict[str, list[float]], steps: int) -> dict[str, dict[str, Any]]:
    """The table of the race, from each loop's seconds in each round."""
    rows = {}
    for name, values in seconds.items():
        ratios = [theirs / own for theirs, own in zip(values, seconds["ours"])]
        row = dict(ms=1000 * median(values) / steps, ratio=median(ratios), min=min(ratios), max=max(ratios), seconds=values)
        print(f"{name:34}{row['ms']:9.2f}   {row['ratio']:.2f} ({row['min']:.2f} to {row['max']:.2f})", flush=True)
        rows[name] = row
    return rows


def print_yardsticks(bounds: dict[str, float]) -> dict[str, float]:
    print(f"{'yardstick: the arithmetic':34}{bounds['arithmetic_ms']:9.2f}   {bounds['gflop']:.1f} GFLOP", end="")
    print(f" at the {bounds['product_gflop_s']:,.0f} GFLOP/s of a large matrix product")
    if "kernels" in bounds:
        print(f"{'yardstick: trivial kernels':34}{bounds['trivial_graph_ms']:9.2f}   {bounds['kernels']} kernels")
    print(f"a large copy: {bounds['copy_gb_s']:,.0f} GB/s, of what is read and what is written", flush=True)
    return bounds


def print_together(args: Args, kd_args: kd.Args, raw: RawData) -> dict[int, float]:
    """Steps a second of each number of runs at once."""
    usual = () if args.device == "cpu" else (1, 2, 3, 5)
    found = {}
    for n in usual if args.at_once is None else args.at_once:
        found[n] = together(args, kd_args, raw, n)
        print(f"{f'{n} at once':34}{1000 / found[n]:9.2f}   {found[n]:.2f} steps a second, all together", flush=True)
    return found


def main(args: Args) -> None:
    teacher, _, student = args.pair.partition("/")
    if teacher not in NETWORKS or student not in NETWORKS:
        fail(f"--pair {args.pair} is not TEACHER/STUDENT: take two of {', '.join(NETWORKS)}", 2)
    if args.dataset not in DATASETS:
        fail(f"--dataset {args.dataset} is unknown: take one of {', '.join(DATASETS)}", 2)
    if min(args.rounds, args.steps, args.batch_size, args.workers) < 1:
        fail("--rounds, --steps, --batch-size and --workers must be at least 1", 2)
    if args.device != "cpu" and args.steps < 4:
        fail("--steps must be at least 4 on CUDA: a graph is captured after three", 2)
    raw = DATASETS[args.dataset](args.data)
    kd_args = kd.Args(teacher, student, device=args.device, batch_size=args.batch_size, lr=0.05)
    common.resolve(kd_args)
    common.check(kd_args)
    if args.json and not args.json.parent.is_dir():
        fail(f"--json {args.json}: there is no folder {args.json.parent}", 2)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as common.Run does
    set_up(args.device, ours=True)
    machine = hardware(args.device) | dict(cores=os.cpu_count())
    print(", ".join(f"{name} {value}" for name, value in machine.items() if value is not None))
    print(f"{args.pair}, batch {args.batch_size}, {args.rounds} rounds of {args.steps} steps, {args.workers} workers")
    print(f"{'':34}ms a step   times ours: median (min to max)", flush=True)
    facts = {flag: value for flag, value in dataclasses.asdict(args).items() if flag not in ("data", "json")}
    facts |= machine | dict(commit=git("rev-parse", "HEAD"))
    parts = {
        "loops": lambda: print_race(race(args, loops(args, kd_args, raw)), args.steps),
        "yardsticks": lambda: print_yardsticks(yardsticks(kd_args, raw.classes)),
        "at_once": lambda: print_together(args, kd_args, raw),
        "checks": lambda: checks(kd_args, raw),
    }
    for part, measure in parts.items():
        facts[part] = measure()
        if part == "checks":
            facts["right"] = all(value <= LIMITS.get(name, 0) for name, value in facts["checks"].items())  # not so if one is NaN
        if args.json:  # after each part: what comes later cannot lose it
            write(args.json, json.dumps(facts, indent=1) + "\n")
    if not facts["right"]:
        fail("the fast loop does not compute what it should: the last rows must be 0, the float64 one below 1e-9")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
