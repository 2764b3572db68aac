"""How fast is the training loop, and what does a step of each method cost? One process, all in alternating rounds.

    python benchmark/speed.py             kd.py, on CUDA also as a CUDA graph, and peer-like, a loop like RepDistiller's:
                                          PIL transforms in a DataLoader, .item() in every step, default memory format, plain SGD
    python benchmark/speed.py --methods   every method beside vanilla: the steps of its own main() after any first phase, with its
                                          views, sampling and augmentation, at its default flags but for batch size and rate

In a round each loop takes --steps steps; they take turns in going first. Ratios are taken within a round, so that whatever
slows the machine slows all; shown are their median and, in parentheses, lowest to highest. The teacher is untrained.
"""

import contextlib
import gc
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, chain, count, islice, pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Any
from unittest import mock

import torch
import torch.nn.functional as F
import tyro
from torch.optim import SGD
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets, transforms

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
import common
from common import ROOT, PositiveInt, Resident, build, check, git, hardware, load_weights, usable_device, write
from methods import kd


@dataclass
class Args:
    pair: Annotated[str, lambda v: v.count("/") == 1 or "is not teacher/student"] = "resnet56/resnet20"
    """teacher/student, two names in common.NETWORKS"""
    methods: bool = False
    """time every method"""
    rounds: PositiveInt = 5
    """rounds that count; one more goes before them to warm up"""
    steps: PositiveInt = 20
    """training steps of each loop in a round"""
    batch_size: PositiveInt = 64
    """images per step"""
    workers: PositiveInt = 2
    """processes that transform the peer-like loop's images"""
    device: Annotated[str, usable_device] = "cuda" if torch.cuda.is_available() else "cpu"
    """cuda, cuda:1, ... or cpu"""
    json: Path | None = None
    """file for all numbers; by default benchmark/speed-methods.json with --methods, else none"""


class Bench:
    """The images, an untrained teacher, and loops that train with them."""

    def __init__(self, args: Args, folder: Path):
        self.args, weights, (teacher, student) = args, folder / "teacher.pt", args.pair.split("/")
        self.flags = dict(teacher=teacher, student=student, peer=student, teacher_weights=weights, epochs=1, init_epochs=1)
        self.flags |= dict(batch_size=args.batch_size, lr=1e-4, dataset="synthetic", device=args.device)
        self.kd_args = self.method_args(kd)
        raw = common.synthetic(Path(), None)
        self.raw = raw._replace(train=tuple(part.repeat(25, 0) for part in raw.train), test=tuple(part[:64] for part in raw.test))
        self.train, self.test = (Resident(split, raw, self.kd_args, "constant") for split in self.raw[:2])  # 50,000, as CIFAR
        net = build(teacher, 100).apply(lambda module: setattr(module, "momentum", 1.0))  # batch norm takes over
        net(torch.randn(64, 3, 32, 32))  # the statistics of this batch, without which deep logits overflow
        torch.save(net.state_dict(), weights)

    def method_args(self, module: Any) -> Any:
        return module.Args(**{flag: self.flags[flag] for flag in self.flags.keys() & module.Args.__dataclass_fields__.keys()})

    def now(self) -> float:
        if self.args.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    def drive(self, method: str, rivals: dict[str, Callable] | None = None, graph: bool = common.GRAPH) -> tuple[Any, ...]:
        """Run a method's main, in turn with rivals; return its step, extra parameters, and all seconds by name and round."""
        module, names, steps = importlib.import_module(f"methods.{method}"), ["ours", *(rivals or {})], []
        seconds: dict[str, list[float]] = {name: [] for name in names}

        def epoch(number: int, phase: str = "", views: int = 1) -> Iterator[tuple[Any, ...]]:
            batches = chain.from_iterable(Resident.epoch(self.train, number, phase, views) for number in count(number))
            yield from islice(batches, 5)  # a graph is captured after three
            for turn in range(self.args.rounds + 1 if rivals and not phase else 0):
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    torch.use_deterministic_algorithms(name != "peer-like" and self.args.device != "cpu", warn_only=True)
                    torch.backends.cudnn.benchmark = name == "peer-like"  # as RepDistiller has both
                    start = self.now()
                    if name == "ours":
                        yield from islice(batches, self.args.steps)
                    else:
                        rivals[name]()
                    seconds[name].append(self.now() - start)

        with (
            tempfile.TemporaryDirectory() as runs,
            mock.patch("signal.signal"),  # Ctrl-C ends this program
            mock.patch.object(common, "say"),
            mock.patch.object(common, "GRAPH", graph),
            mock.patch.object(module, "load_data", lambda *args, **more: (self.train, self.test)),
            mock.patch.object(module, "cuda_graph", lambda step: steps.append(common.cuda_graph(step)) or steps[-1]),
            mock.patch.object(self.train, "epoch", epoch),
        ):
            module.main(replace(self.method_args(module), runs=Path(runs)))
            extra = json.loads(next(Path(runs).glob("*/result.json")).read_text())["parameters"]["extra"]
        return steps[-1], extra, {name: values[1:] for name, values in seconds.items()}

    def memory(self, method: str) -> int:
        """Most bytes that a method's networks, optimizer and steps take at once; the images do not count."""
        gc.collect()
        if self.args.device == "cpu":
            with torch.profiler.profile(profile_memory=True) as profile:
                self.drive(method)
            events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
            return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
        before, _ = torch.cuda.memory_allocated(), torch.cuda.reset_peak_memory_stats()
        self.drive(method)
        return torch.cuda.max_memory_allocated() - before

    def loop(self, step: Callable) -> Callable[[], None]:
        """Takes --steps steps as vanilla and kd do."""
        batches = chain.from_iterable(Resident.epoch(self.train, epoch) for epoch in count(1))
        meter = common.Meter(len(self.train), lambda meter: None)

        def run() -> None:
            for x, y, index in islice(batches, self.args.steps):
                meter.add(step(x, y, index), len(y))

        return run

    def peer(self) -> Callable[[], None]:
        """Takes --steps steps as most code does. The workers live on between epochs, which most code does not grant itself."""
        args, n = self.kd_args, self.args.steps * self.args.batch_size
        augment = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        images = object.__new__(datasets.CIFAR100)  # torchvision's data set without its files
        images.data, images.targets, images.target_transform = self.raw.train[0][:n], self.raw.train[1][:n].tolist(), None
        images.transform = transforms.Compose([*augment, transforms.Normalize(self.raw.mean, self.raw.std)])
        batches = DataLoader(images, args.batch_size, True, num_workers=self.args.workers, persistent_workers=True)
        nets = (build(name, 100, args.device) for name in (args.teacher, args.student))
        teacher, student = (net.to(memory_format=torch.contiguous_format) for net in nets)
        load_weights(teacher.eval(), args.teacher_weights)
        optimizer = SGD(student.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)

        def run() -> None:
            losses = correct = 0.0
            for x, y in batches:
                x, y = x.to(args.device), y.to(args.device)
                z_s, _ = student(x)
                with torch.no_grad():
                    z_t, _ = teacher(x)
                loss = args.ce_weight * F.cross_entropy(z_s, y) + args.kd_weight * kd.kd_loss(z_s, z_t, args.kd_temperature)
                losses += loss.item() * len(y)
                correct += (z_s.argmax(1) == y).sum().item()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        return run


def ratio(seconds: list[float], base: list[float]) -> dict[str, float]:
    """Median, lowest and highest ratio of the seconds of two loops within a round."""
    within = [own / other for own, other in zip(seconds, base)]
    return dict(time=median(within), low=min(within), high=max(within))


def race(bench: Bench) -> dict[str, Any]:
    """Ours beside the peer-like loop; as a yardstick, the arithmetic of a step at the rate of a large matrix product."""
    device, rows = bench.args.device, {}
    rivals = {"ours, graphed": bench.loop(bench.drive("kd", graph=True)[0])} if device != "cpu" else {}
    step, _, seconds = bench.drive("kd", rivals | {"peer-like": bench.peer()}, graph=False)
    for name, values in seconds.items():
        rows[name] = dict(ms=1000 * median(values) / bench.args.steps, seconds=values) | ratio(values, seconds["ours"])
        print("{:15}{ms:9.2f} ms per step, {time:.2f} times ours ({low:.2f} to {high:.2f})".format(name, **rows[name]))
    with FlopCounterMode(display=False) as counter:
        step(*next(Resident.epoch(bench.train, 1)))
    gflop, a = counter.get_total_flops() / 1e9, torch.randn([2048 if device == "cpu" else 8192] * 2, device=device)
    starts = [(bench.now(), a @ a)[0] for _ in range(11)]
    rate = 2e-9 * len(a) ** 3 / min(end - start for start, end in pairwise(starts))
    print(f"{'arithmetic':15}{1000 * gflop / rate:9.2f} ms: {gflop:.1f} GFLOP at the {rate:,.0f} GFLOP/s of a large GEMM")
    return dict(loops=rows, gflop=gflop, gemm_gflop_s=rate)


def race_methods(bench: Bench) -> dict[str, Any]:
    """Every method beside vanilla; vanilla beside itself shows how exact a ratio is."""
    names = sorted((path.stem for path in (ROOT / "methods").glob("*.py")), key=lambda name: (name != "vanilla", name))
    vanilla, memory, rows = bench.loop(bench.drive("vanilla")[0]), bench.memory("vanilla"), []
    print(f"times vanilla's: {'time':>7}{'memory':>24}   extra parameters")
    for name in names:
        with contextlib.suppress(SystemExit):  # a method that refuses this pair says why on stderr
            held, (_, extra, seconds) = bench.memory(name), bench.drive(name, {"vanilla": vanilla})
            row = dict(method=name) | ratio(seconds["ours"], seconds["vanilla"]) | dict(extra=extra, memory=held / memory)
            print("{method:14}{time:10.2f} ({low:.2f} to {high:.2f}){memory:10.2f}{extra:12,}".format(**row), flush=True)
            rows.append(row | dict(ms=1000 * median(seconds["ours"]) / bench.args.steps))
    return dict(vanilla_mb=memory / 1e6, rows=rows)


def main(args: Args) -> None:
    check(args)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes to stderr
    facts = asdict(args) | hardware(args.device) | dict(cuda_graph=common.GRAPH, commit=git("rev-parse", "HEAD"))
    file = facts.pop("json") or (ROOT / "benchmark" / "speed-methods.json" if args.methods else None)
    print(", ".join(f"{name} {value}" for name, value in facts.items() if value is not None), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        facts |= (race_methods if args.methods else race)(Bench(args, Path(folder)))
    if file:
        write(file, json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
