"""AB: Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons. Heo, Lee, Yun and Choi, 2019,
arXiv 1811.03233.

Which neurons fire for an image matters more than how strongly. In phase 1 each neuron of the student is pushed to the same side
of zero as the teacher's, by at least a margin. In phase 2 the student learns the labels.

    u, v = connector(f_s), f_t                            f: a stage's map before its last ReLU
    cost = max(0, margin + u)^2 where v <= 0,   max(0, margin - u)^2 where v > 0
    L_ab = sum over stages k = 1 ... n of 2^(k - n) / B sum cost      inner sum: over images, channels and positions
    KD   = T^2 mean_i KL(p_t || p_s),   p = softmax(z / T),   T = kd_temperature
    L    = ab_weight L_ab in phase 1,   ce_weight CE + kd_weight KD in phase 2

Taken from HobbitLong/RepDistiller@b84f547 (distiller_zoo/AB.py, helper/pretrain.py), the source of the published tables.
Published: resnet56/resnet20 69.47 (last epoch).
Differences
- from the paper: none in the cost; ab_weight and the factors 2^(k - n) come from the code.
- from the authors' code, bhheo/AB_distillation@a7701d3: its phase 2 is KD alone (T = 3, without T^2).
- from the authors' code: its teacher is in train mode in phase 1.
- from the authors' code: no connectors if the last stages are equally wide, else all bias-free 1x1 convolutions with batch norm.
- from RepDistiller: none in the loss. Its flag -b has no effect on AB.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from common import (
    DistillArgs,
    Positive,
    PositiveInt,
    Run,
    accuracy,
    build,
    cuda_graph,
    fail,
    feature_shapes,
    load_data,
    load_teacher,
)


@dataclass
class Args(DistillArgs):
    teacher: str = "resnet56"
    student: str = "resnet20"
    epochs: int = 240
    batch_size: int = 64
    lr: float | None = None
    milestones: tuple[int, ...] = ()
    momentum: float = 0.9
    weight_decay: float = 5e-4
    ce_weight: float = 1.0
    """weight of the cross-entropy with the labels"""
    kd_weight: float = 0.0
    """weight of the KD term"""
    kd_temperature: Positive = 4.0
    """softmax temperature of the KD term"""
    ab_weight: float = 0.003
    """weight of the AB term, the whole loss of phase 1"""
    margin: Positive = 1.0
    """required distance of a student neuron from zero"""
    init_epochs: PositiveInt = 30
    """epochs of phase 1, at the initial learning rate"""


def kd_loss(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """T^2 KL(p_t || p_s) of logits (B, C), summed over classes, averaged over the batch."""
    log_p_s = F.log_softmax(z_s / temperature, dim=1)
    log_p_t = F.log_softmax(z_t / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, log_target=True, reduction="batchmean")


def convolution(shape_s: tuple[int, int, int], shape_t: tuple[int, int, int]) -> nn.Module:
    """A convolution from maps of shape_s (C, H, W) to maps of shape_t."""
    (c_s, side_s, _), (c_t, side_t, _) = shape_s, shape_t
    if side_s == 2 * side_t:
        return nn.Conv2d(c_s, c_t, 3, stride=2, padding=1)
    if 2 * side_s == side_t:
        return nn.ConvTranspose2d(c_s, c_t, 4, stride=2, padding=1)
    if side_s >= side_t:
        return nn.Conv2d(c_s, c_t, 1 + side_s - side_t)  # 1x1 where the sides are equal
    fail(f"AB cannot upsample {side_s}x{side_s} maps of the student to {side_t}x{side_t}", 2)


class AB(nn.Module):
    """L_ab of the stages' maps before the ReLU, each (B, C, H, W); the connectors are trained."""

    def __init__(self, shapes_s: list[tuple[int, int, int]], shapes_t: list[tuple[int, int, int]], margin: float):
        super().__init__()
        self.connectors = nn.ModuleList()
        for s, t in zip(shapes_s, shapes_t, strict=True):
            self.connectors.append(nn.Identity() if s == t else nn.Sequential(convolution(s, t), nn.BatchNorm2d(t[0])))
        self.margin = margin

    def forward(self, preacts_s: list[Tensor], preacts_t: list[Tensor]) -> Tensor:
        loss, n = 0, len(self.connectors)
        for k, (connector, f_s, v) in enumerate(zip(self.connectors, preacts_s, preacts_t, strict=True), start=1):
            u = connector(f_s)
            cost = torch.where(v > 0, F.relu(self.margin - u), F.relu(self.margin + u)).square()
            loss = loss + 2 ** (k - n) / len(u) * cost.sum()
        return loss  # L_ab


def modules_behind_maps(net: nn.Module, size: int) -> nn.ModuleList:
    """The modules of `net` whose parameters affect no stage's map: the classifier and whatever comes just before it."""
    weight = next(net.parameters())
    _, features = net.eval()(weight.new_zeros(1, 3, size, size))
    gradients = torch.autograd.grad(features.maps[-1].sum(), list(net.parameters()), allow_unused=True)
    unused = {p for p, gradient in zip(net.parameters(), gradients) if gradient is None}
    return nn.ModuleList(m for m in net.modules() if any(p in unused for p in m.parameters(recurse=False)))


def main(args: Args) -> float:
    run = Run(__file__, args)  # prints the result and exits if this run is already finished
    train, test = load_data(args)
    teacher = load_teacher(run, test)  # frozen, in eval mode

    torch.manual_seed(args.seed)  # the same initial student for every method
    student = build(args.student, train.classes, args.device)
    shapes_s, shapes_t = (feature_shapes(net, train.size).preacts[1:] for net in (student, teacher))
    stages_s, stages_t = len(shapes_s), len(shapes_t)
    if stages_s != stages_t:
        fail(f"AB compares stage by stage, but {args.student} has {stages_s} stages and {args.teacher} {stages_t}", 2)
    ab = AB(shapes_s, shapes_t, args.margin)
    lr = args.lr or (0.01 if args.student in ("mobilenetv2", "shufflenetv1", "shufflenetv2") else 0.05)

    # Phase 1. Modules after the last map are frozen and in eval mode, as in RepDistiller. In a wrn they include the batch norm
    # that yields the last stage's preact; with its initial statistics it leaves the map unchanged.
    behind = modules_behind_maps(student, train.size).requires_grad_(False)
    init = nn.ModuleDict(dict(student=student, ab=ab)).to(args.device)
    init_optimizer = SGD(init.parameters(), lr, momentum=args.momentum, weight_decay=args.weight_decay, fused=True)
    init_scheduler = MultiStepLR(init_optimizer, milestones=[])  # constant learning rate

    @cuda_graph
    def init_step(x, y, index):
        with torch.no_grad():
            _, features_t = teacher(x)
        _, features_s = student(x)

        loss_ab = ab(features_s.preacts[1:], features_t.preacts[1:])
        loss = args.ab_weight * loss_ab

        init_optimizer.zero_grad()
        loss.backward()
        init_optimizer.step()
        return dict(loss=loss, ab=loss_ab)

    for epoch in run.epochs(args.init_epochs, trained=init, optimizer=init_optimizer, scheduler=init_scheduler, phase="init"):
        init.train()
        behind.eval()
        meter = run.meter(len(train))
        for x, y, index in train.epoch(epoch, phase="init"):
            meter.add(init_step(x, y, index), len(y))
        run.log(epoch, train=meter.mean())
        init_scheduler.step()
    behind.requires_grad_(True)

    # Phase 2
    trained = nn.ModuleDict(dict(student=student)).to(args.device)  # optimized and checkpointed
    optimizer = SGD(trained.parameters(), lr, momentum=args.momentum, weight_decay=args.weight_decay, fused=True)
    milestones = args.milestones or sorted({args.epochs * k // 8 for k in (5, 6, 7)} - {0})
    scheduler = MultiStepLR(optimizer, milestones, gamma=0.1)

    @cuda_graph
    def step(x, y, index):
        z_s, _ = student(x)

        loss_ce = F.cross_entropy(z_s, y)
        loss_kd = torch.zeros_like(loss_ce)
        if args.kd_weight:  # otherwise phase 2 does not need the teacher, and KD is logged as 0
            with torch.no_grad():
                z_t, _ = teacher(x)
            loss_kd = kd_loss(z_s, z_t, args.kd_temperature)
        loss = args.ce_weight * loss_ce + args.kd_weight * loss_kd

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return dict(loss=loss, ce=loss_ce, kd=loss_kd, accuracy=(z_s.argmax(1) == y).float().mean())

    for epoch in run.epochs(args.epochs, trained=trained, optimizer=optimizer, scheduler=scheduler):  # resumes and saves
        trained.train()
        meter = run.meter(len(train))  # sums on the device, read once per epoch
        for x, y, index in train.epoch(epoch):
            meter.add(step(x, y, index), len(y))
        run.log(epoch, train=meter.mean(), test=accuracy(student, test))
        scheduler.step()
    return run.finish(student, teacher)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
