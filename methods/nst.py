"""NST: Like What You Like: Knowledge Distill via Neuron Selectivity Transfer. Huang and Wang, 2017, arXiv 1707.01219.

A channel's map shows which regions of an image its neuron responds to. The student's channels, seen as an unordered set of such
maps, must be distributed like the teacher's: the maximum mean discrepancy (MMD) between the two sets is minimized at every stage.

    s, t    = channels of the student's and the teacher's map, each a unit vector of H W positions
    k(a, b) = <a, b>^2                                   for two channels of the same image
    L_nst   = sum over stages 1 ... k of mean k(t, t') - 2 mean k(s, t) + mean k(s, s')
    KD      = T^2 mean_i KL(p_t || p_s),   p = softmax(z / T),   T = kd_temperature
    L       = ce_weight CE + kd_weight KD + nst_weight L_nst

The means are over images and all pairs of channels, including a channel with itself. The numbers of channels may differ.
Taken from HobbitLong/RepDistiller@b84f547 (distiller_zoo/NST.py), the source of the published tables.
Published: resnet56/resnet20 69.60 (last epoch).
Differences
- from the paper: only its polynomial kernel is used, of degree 2 and without a constant, at every stage.
- from the code: same values; matrix products replace its B C C H W tensors, 1 GiB per kernel and stage for resnet32x4.
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
from common import DistillArgs, Positive, Run, accuracy, build, cuda_graph, fail, feature_shapes, load_data, load_teacher


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
    nst_weight: float = 50.0
    """weight of the NST term"""


def kd_loss(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """T^2 KL(p_t || p_s) of logits (B, C), summed over classes, averaged over the batch."""
    log_p_s = F.log_softmax(z_s / temperature, dim=1)
    log_p_t = F.log_softmax(z_t / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, log_target=True, reduction="batchmean")


def same_side(f_s: Tensor, f_t: Tensor) -> tuple[Tensor, ...]:
    """Both maps (B, C, H, W) at the lower of their two resolutions; the larger is average-pooled."""
    side = min(f_s.shape[2], f_t.shape[2])
    return tuple(f if f.shape[2] == side else F.adaptive_avg_pool2d(f, side) for f in (f_s, f_t))


def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
    """Mean of k over images and all pairs of channels of a (B, C, N) and b (B, D, N)."""
    pairs, positions = a.shape[1] * b.shape[1], a.shape[2]
    if pairs <= positions**2:
        return (a @ b.mT).square().mean()
    return (a.mT @ a * (b.mT @ b)).sum((1, 2)).mean() / pairs  # the same sum over N x N numbers instead of C x D


def nst_loss(maps_s: list[Tensor], maps_t: list[Tensor]) -> Tensor:
    """L_nst of the stages' maps, each (B, C, H, W)."""
    loss = 0
    for f_s, f_t in zip(maps_s, maps_t, strict=True):
        s, t = (F.normalize(f.flatten(2), dim=2) for f in same_side(f_s, f_t))
        loss = loss + mean_kernel(t, t) - 2 * mean_kernel(s, t) + mean_kernel(s, s)
    return loss  # L_nst


def main(args: Args) -> float:
    run = Run(__file__, args)  # prints the result and exits if this run is already finished
    train, test = load_data(args)
    teacher = load_teacher(run, test)  # frozen, in eval mode

    torch.manual_seed(args.seed)  # the same initial student for every method
    student = build(args.student, train.classes, args.device)
    stages_s, stages_t = (len(feature_shapes(net, train.size).maps) - 1 for net in (student, teacher))
    if stages_s != stages_t:
        fail(f"NST compares stage by stage, but {args.student} has {stages_s} stages and {args.teacher} {stages_t}", 2)
    trained = nn.ModuleDict(dict(student=student)).to(args.device)  # optimized and checkpointed
    lr = args.lr or (0.01 if args.student in ("mobilenetv2", "shufflenetv1", "shufflenetv2") else 0.05)
    optimizer = SGD(trained.parameters(), lr, momentum=args.momentum, weight_decay=args.weight_decay, fused=True)
    milestones = args.milestones or sorted({args.epochs * k // 8 for k in (5, 6, 7)} - {0})
    scheduler = MultiStepLR(optimizer, milestones, gamma=0.1)

    @cuda_graph
    def step(x, y, index):
        with torch.no_grad():
            z_t, features_t = teacher(x)
        z_s, features_s = student(x)

        loss_ce = F.cross_entropy(z_s, y)
        loss_kd = kd_loss(z_s, z_t, args.kd_temperature)
        loss_nst = nst_loss(features_s.maps[1:], features_t.maps[1:])
        loss = args.ce_weight * loss_ce + args.kd_weight * loss_kd + args.nst_weight * loss_nst

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return dict(loss=loss, ce=loss_ce, kd=loss_kd, nst=loss_nst, accuracy=(z_s.argmax(1) == y).float().mean())

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
