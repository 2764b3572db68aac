"""OFD: A Comprehensive Overhaul of Feature Distillation. Heo, Kim, Yun, Park, Kwak and Choi, 2019, arXiv 1904.01866.

The student regresses the teacher's pre-ReLU maps. The ReLU discards negative values, so negative teacher values are clamped from
below at a margin, and the student only has to stay below the result (partial distance). A channel's margin is the mean of its
negative values, computed in closed form from the batch norm before the ReLU.

    v      = max(f_t, m)                                f_t: the teacher's map of stage k before its last ReLU
    m      = E[x | x < 0],  x ~ N(beta, gamma^2)        beta, gamma: of the batch norm before that ReLU; one m per channel
    u      = batch norm of a 1x1 convolution of f_s     f_s: the student's map before the last ReLU of the same stage
    L_ofd  = sum_k 2^(k-n) (1/B) sum (u - v)^2 [u > v or v > 0]    k = 1 ... n; inner sum: over images, channels and positions
    L      = ce_weight CE + ofd_weight L_ofd

Taken from clovaai/overhaul-distillation@76344a8 with the weights and recipe of megvii-research/mdistiller@a08d46f, whose loss is
the same. Published: resnet56/resnet20 70.98 (the KD++ table in WangYZ1608/Knowledge-Distillation-via-ND).
Differences
- from the paper: checked against the abstract only.
- from the authors' code: its recipe is 200 epochs, batch size 128, Nesterov momentum and reflect padding.
- from both: the teacher's batch norms use batch statistics, as both do on purpose, but leave their running statistics unchanged.
- ours: if two maps differ in resolution, the larger is average-pooled; mdistiller always resizes the teacher's.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from common import DistillArgs, Run, accuracy, build, cuda_graph, fail, feature_shapes, load_data, load_teacher, stage_norms


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
    ofd_weight: float = 1e-3
    """weight of the OFD term; 1e-4 for ImageNet"""
    teacher_norm: Literal["batch", "running"] = "batch"
    """statistics in the teacher's batch norms: the batch's, as the authors intended, or the running ones"""


def same_side(f_s: Tensor, f_t: Tensor) -> tuple[Tensor, ...]:
    """Both maps (B, C, H, W) at the lower of their two resolutions; the larger is average-pooled."""
    side = min(f_s.shape[2], f_t.shape[2])
    return tuple(f if f.shape[2] == side else F.adaptive_avg_pool2d(f, side) for f in (f_s, f_t))


def margin(norm: nn.BatchNorm2d) -> Tensor:
    """m (C, 1, 1) of a batch norm over C channels. As released, the shortcut that a residual block adds after it is ignored."""
    beta, gamma = norm.bias.detach(), norm.weight.detach().abs()
    density = (-((beta / gamma) ** 2) / 2).exp() / math.sqrt(2 * math.pi)
    negative = torch.special.ndtr(-beta / gamma)  # the probability of a negative value
    m = torch.where(negative > 0.001, beta - gamma * density / negative, -3 * gamma)  # -3 gamma where that is rare
    return m[:, None, None]


class PartialDistance(nn.Module):
    """(1/B) sum (u - v)^2 [u > v or v > 0] of a stage, with a trained connector. `norm`: the teacher's pre-ReLU batch norm."""

    def __init__(self, c_s: int, norm: nn.BatchNorm2d):
        super().__init__()
        c_t = norm.num_features
        self.connector = nn.Sequential(nn.Conv2d(c_s, c_t, 1, bias=False), nn.BatchNorm2d(c_t))
        nn.init.kaiming_normal_(self.connector[0].weight, mode="fan_out", nonlinearity="relu")
        self.register_buffer("margin", margin(norm))

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        """f_s (B, c_s, H, W) and f_t (B, c_t, H', W'), both before the ReLU."""
        u, f_t = same_side(self.connector(f_s), f_t)
        v = torch.maximum(f_t, self.margin)
        return ((u - v).square() * ((u > v) | (v > 0))).sum() / len(u)


class OFD(nn.Module):
    """L_ofd of two lists of maps (B, C, H, W), one list per network: each stage's map before its last ReLU."""

    def __init__(self, channels_s: list[int], norms: list[nn.BatchNorm2d]):
        super().__init__()
        self.stages = nn.ModuleList(PartialDistance(c_s, norm) for c_s, norm in zip(channels_s, norms, strict=True))

    def forward(self, preacts_s: list[Tensor], preacts_t: list[Tensor]) -> Tensor:
        terms = [stage(f_s, f_t) for stage, f_s, f_t in zip(self.stages, preacts_s, preacts_t, strict=True)]
        return sum(2.0 ** (k - len(terms)) * term for k, term in enumerate(terms, start=1))  # L_ofd


def use_batch_statistics(net: nn.Module) -> None:
    """Make the batch norms of a network in eval mode use batch statistics without updating the running ones."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
            module.track_running_stats = False


def main(args: Args) -> float:
    run = Run(__file__, args)  # prints the result and exits if this run is already finished
    train, test = load_data(args)
    teacher = load_teacher(run, test)  # frozen, in eval mode
    norms = stage_norms(teacher)
    if args.teacher_norm == "batch":
        use_batch_statistics(teacher)

    torch.manual_seed(args.seed)  # the same initial student for every method
    student = build(args.student, train.classes, args.device)
    channels_s = [c for c, _, _ in feature_shapes(student, train.size).preacts[1:]]
    stages_s, stages_t = len(channels_s), len(norms)
    if stages_s != stages_t:
        fail(f"OFD compares stage by stage, but {args.student} has {stages_s} stages and {args.teacher} {stages_t}", 2)
    ofd = OFD(channels_s, norms)
    trained = nn.ModuleDict(dict(student=student, ofd=ofd)).to(args.device)  # optimized and checkpointed
    lr = args.lr or (0.01 if args.student in ("mobilenetv2", "shufflenetv1", "shufflenetv2") else 0.05)
    optimizer = SGD(trained.parameters(), lr, momentum=args.momentum, weight_decay=args.weight_decay, fused=True)
    milestones = args.milestones or sorted({args.epochs * k // 8 for k in (5, 6, 7)} - {0})
    scheduler = MultiStepLR(optimizer, milestones, gamma=0.1)

    @cuda_graph
    def step(x, y, index):
        with torch.no_grad():
            _, features_t = teacher(x)
        z_s, features_s = student(x)

        loss_ce = F.cross_entropy(z_s, y)
        loss_ofd = ofd(features_s.preacts[1:], features_t.preacts[1:])
        loss = args.ce_weight * loss_ce + args.ofd_weight * loss_ofd

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return dict(loss=loss, ce=loss_ce, ofd=loss_ofd, accuracy=(z_s.argmax(1) == y).float().mean())

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
