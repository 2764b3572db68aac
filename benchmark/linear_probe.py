"""Transfer to another data set: a trained student is frozen, and a new linear layer learns the new classes from its features.

    z = W f + b,   L = CE        f: pooled features of the frozen student; W starts at random (std 0.01), b at 0

    python benchmark/linear_probe.py --student wrn_16_2 --weights runs/icd__.../student.pt --dataset stl10 --protocol frozen

The CRD paper (arXiv 1910.10699), whose transfer table later papers copy, published no recipe; the three public recipes
contradict each other (PROTOCOLS below). Normalization is by the mean and std of the data set under all three.
"""

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR
from torchvision import transforms

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from common import NonNegative, PositiveInt, Run, RunArgs, accuracy, build, cuda_graph, fail, load_data, load_weights, say, sha256

# adapt: batch norm in train mode, so that its statistics follow the new images; resized: RandomResizedCrop in place of padding
PROTOCOLS = {
    # giakoumoglou/distillers@45e1cf8 (2 September 2024), transfer_student.py; before, the learning rate never dropped
    "icd": dict(epochs=120, lr=0.05, weight_decay=5e-4, nesterov=False, adapt=True, resized=False),
    # DKD's author in megvii-research/mdistiller, issue 59: weight decay 0, batch norm fixed; the rest as icd's (ours)
    "frozen": dict(epochs=120, lr=0.05, weight_decay=0.0, nesterov=False, adapt=False, resized=False),
    # winycg/HSAKD@c4be450, eval_rep.py; its crops are of STL-10's 96x96 images, here of the image at --image-size
    "hsakd": dict(epochs=100, lr=0.1, weight_decay=0.0, nesterov=True, adapt=False, resized=True),
}


@dataclass(kw_only=True)
class Args(RunArgs):
    student: str
    weights: Annotated[Path, lambda v: v.is_file() or "is not a file"]
    """the trained student: student.pt of a run, or any file of its weights"""
    protocol: Literal["icd", "frozen", "hsakd"]
    """icd: as the ICD authors, batch norm adapts; frozen: as DKD's author says; hsakd: as HSAKD, with resized crops"""
    dataset: str = "stl10"
    image_size: int | None = 32
    epochs: PositiveInt | None = None
    """passes over the training images; by default the protocol's"""
    batch_size: int = 64
    lr: float | None = None
    """initial learning rate; by default the protocol's"""
    milestones: tuple[int, ...] = (30, 60, 90)
    """epochs after which the learning rate drops 10x"""
    momentum: float = 0.9
    weight_decay: NonNegative | None = None
    """applied to the new layer; by default the protocol's"""


def load_student(args: Args) -> tuple[nn.Module, dict[str, Any]]:
    """The student, frozen, and what is recorded of it: the SHA-256 of its file, and the method and flags that trained it."""
    classes, bias = 1, list(build(args.student, 1).state_dict())[-1]
    with contextlib.suppress(Exception):  # load_weights says what is wrong with a file
        state = torch.load(args.weights, map_location="cpu", weights_only=True)
        state = state.get("model", state.get("state_dict", state))
        classes = next(len(value) for name, value in state.items() if name.removeprefix("module.") == bias)
    student = build(args.student, classes, args.device)
    load_weights(student, args.weights)

    beside = args.weights.with_name("result.json") if args.weights.name == "student.pt" else args.weights.with_suffix(".json")
    result, digest = json.loads(beside.read_text()) if beside.is_file() else {}, sha256(args.weights)
    if result.get("student_sha256", digest) != digest:
        fail(f"{args.weights} is damaged: its SHA-256 is not the one in {beside}")
    known = {key: result[key] for key in ("method", "args", "last") if key in result}
    say(f"weights     {args.weights}, {classes} classes, {known.get('method', 'method unknown')}, SHA-256 {digest[:12]}")
    return student.requires_grad_(False), dict(weights_sha256=digest, trained_by=known or None)


def main(args: Args) -> float:
    run = Run(__file__, args)  # exits here, printing the result, if this run is already finished
    train, test = load_data(args)
    student, record = load_student(args)
    run.settings |= record  # for result.json

    torch.manual_seed(args.seed)
    protocol = PROTOCOLS[args.protocol]
    linear = [module for module in student.modules() if isinstance(module, nn.Linear)][-1]  # the classifier, made anew
    linear.weight = nn.Parameter(0.01 * torch.randn(train.classes, linear.in_features).to(args.device))
    linear.bias = nn.Parameter(torch.zeros(train.classes, device=args.device))
    linear.out_features = train.classes
    trained = nn.ModuleDict(dict(student=student))  # checkpointed; of its parameters, `linear` alone is optimized
    lr, decay = (protocol[flag] if getattr(args, flag) is None else getattr(args, flag) for flag in ("lr", "weight_decay"))
    optimizer = SGD(linear.parameters(), lr, args.momentum, weight_decay=decay, nesterov=protocol["nesterov"], fused=True)
    scheduler = MultiStepLR(optimizer, args.milestones, gamma=0.1)

    @cuda_graph
    def step(x, y, index):
        z, _ = student(x)

        loss = F.cross_entropy(z, y)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return dict(loss=loss, accuracy=(z.argmax(1) == y).float().mean())

    resized = transforms.Compose([transforms.RandomResizedCrop(train.size), transforms.RandomHorizontalFlip()])
    if crops := protocol["resized"] and args.dataset != "folder":  # a folder's views are such crops already
        whole = torch.cat([x for x, _ in train.batches()])
    fixed = [] if protocol["adapt"] else [(student.eval()(x)[1].pooled, y) for x, y in test.batches()]  # never change

    for epoch in run.epochs(args.epochs or protocol["epochs"], trained=trained, optimizer=optimizer, scheduler=scheduler):
        student.train(protocol["adapt"])
        meter = run.meter(len(train))  # sums on the device, read once per epoch
        for x, y, index in train.epoch(epoch):
            if crops:
                with torch.random.fork_rng(devices=[]):  # torchvision draws from PyTorch's global state
                    torch.default_generator.manual_seed(int(torch.randint(2**31, (), generator=train.generator)))
                    x = torch.stack([resized(image) for image in whole[index]])
            meter.add(step(x, y, index), len(y))
        right = sum((linear(f).argmax(1) == y).sum() for f, y in fixed)
        run.log(epoch, train=meter.mean(), test=100 * int(right) / len(test) if fixed else accuracy(student, test))
        scheduler.step()
    return run.finish(student)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
