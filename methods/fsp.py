"""FSP: A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer Learning. Yim, Joo, Bae and
Kim, 2017, arXiv: none (CVPR 2017).

The flow of the solution procedure (FSP) is how a network turns the map of one stage into that of the next. It is described by a
matrix of inner products between the channels of the two maps. In phase 1 the student learns the teacher's matrices, in phase 2
the labels.

    G_k   = 1 / (H W) sum over positions p of f_k(p) f_k+1(p)^T        f_0: the stem's map, f_1 ... f_n: the stages' maps
    L_fsp = sum over k = 0 ... n - 1 of mean (G_k_s - G_k_t)^2         over batch and entries
    KD    = T^2 mean_i KL(p_t || p_s),   p = softmax(z / T),   T = kd_temperature
    L     = fsp_weight L_fsp in phase 1,   ce_weight CE + kd_weight KD in phase 2

Both networks need the same numbers of channels, so FSP does not apply to wrn_40_2/wrn_40_1 or across families.
Taken from HobbitLong/RepDistiller@b84f547 (distiller_zoo/FSP.py, helper/pretrain.py), the source of the published tables.
Published: resnet56/resnet20 69.95 (last epoch).
Differences
- from the paper: it sums the squares over a matrix; the mean is RepDistiller's.
- from the code: same values; a matrix product replaces its B C C H W tensors of up to 1 GiB. Its flag -b has no effect on FSP.
"""

import sys
from dataclasses import dataclass
from itertools import pairwise
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
    fsp_weight: float = 1.0
    """weight of the FSP term, the whole loss of phase 1"""
    init_epochs: PositiveInt = 30
    """epochs of phase 1, at the initial learning rate"""


def kd_loss(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """T^2 KL(p_t || p_s) of logits (B, C), summed over classes, averaged over the batch."""
    log_p_s = F.log_softmax(z_s / temperature, dim=1)
    log_p_t = F.log_softmax(z_t / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, log_target=True, reduction="batchmean")


def same_side(f_s: Tensor, f_t: Tensor) -> tuple[Tensor, ...]:
    """Both maps (B, C, H, W) at the lower of their two resolutions; the larger is average-pooled."""
    side = min(f_s.shape[2], f_t.shape[2])
    return tuple(f if f.shape[2] == side else F.adaptive_avg_pool2d(f, side) for f in (f_s, f_t))


def flow(f: Tensor, f_next: Tensor) -> Tensor:
    """G (B, C, D) of neighboring maps f (B, C, H, W) and f_next (B, D, H', W'); the larger is average-pooled first."""
    f, f_next = (m.flatten(2) for m in same_side(f, f_next))
    return f @ f_next.mT / f.shape[2]


def fsp_loss(maps_s: list[Tensor], maps_t: list[Tensor]) -> Tensor:
    """L_fsp of the maps f_0 ... f_n, each (B, C, H, W)."""
    pairs = zip(pairwise(maps_s), pairwise(maps_t), strict=True)
    return sum((flow(*pair_s) - flow(*pair_t)).square().mean() for pair_s, pair_t in pairs)


def check_channels(args: Args, classes: int, size: int) -> None:
    """Exit unless the two networks' maps have the same numbers of channels."""
    nets = build(args.teacher, classes, "cpu"), build(args.student, classes, "cpu")
    teacher, student = ([c for c, _, _ in feature_shapes(net, size).maps] for net in nets)
    if teacher != student:
        channels = f"{args.teacher} has {' '.join(map(str, teacher))}, {args.student} {' '.join(map(str, student))}"
        fail(f"FSP needs the same numbers of channels in both networks' maps: {channels}", 2)


def main(args: Args) -> float:
    run = Run(__file__, args)  # prints the result and exits if this run is already finished
    train, test = load_data(args)
    check_channels(args, train.classes, train.size)  # before a teacher is trained for nothing
    teacher = load_teacher(run, test)  # frozen, in eval mode

    torch.manual_seed(args.seed)  # the same initial student for every method
    student = build(args.student, train.classes, args.device)
    lr = args.lr or (0.01 if args.student in ("mobilenetv2", "shufflenetv1", "shufflenetv2") else 0.05)

    # Phase 1. Unlike in RepDistiller, batch norms after the last map are in train mode; no map depends on them.
    init = nn.ModuleDict(dict(student=student)).to(args.device)
    init_optimizer = SGD(init.parameters(), lr, momentum=args.momentum, weight_decay=args.weight_decay, fused=True)
    init_scheduler = MultiStepLR(init_optimizer, milestones=[])  # constant learning rate

    @cuda_graph
    def init_step(x, y, index):
        with torch.no_grad():
            _, features_t = teacher(x)
        _, features_s = student(x)

        loss_fsp = fsp_loss(features_s.maps, features_t.maps)
        loss = args.fsp_weight * loss_fsp

        init_optimizer.zero_grad()
        loss.backward()
        init_optimizer.step()
        return dict(loss=loss, fsp=loss_fsp)

    for epoch in run.epochs(args.init_epochs, trained=init, optimizer=init_optimizer, scheduler=init_scheduler, phase="init"):
        init.train()
        meter = run.meter(len(train))
        for x, y, index in train.epoch(epoch, phase="init"):
            meter.add(init_step(x, y, index), len(y))
        run.log(epoch, train=meter.mean())
        init_scheduler.step()

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
