"""NST: Like What You Like: Knowledge Distill via Neuron Selectivity Transfer. Huang and Wang, 2017, arXiv 1707.01219.

A channel's map shows which places of an image its neuron likes. The student's channels, taken as a cloud of points without
order, must be distributed as the teacher's are: their maximum mean discrepancy (MMD) is made small, stage by stage.

    s, t    = the channels of a student's and a teacher's map, as unit vectors of H * W positions      Eq. 1
    k(a, b) = <a, b>^2 for two channels of one image                                                   Eq. 2
    L_nst   = sum over the stages of mean k(t, t') - 2 * mean k(s, t) + mean k(s, s')                  Eq. 3
    L       = r * CE + a * T^2 * KL(p_t || p_s) + beta * L_nst                                         Eq. 4

r = 1, a = 0, beta = 50; the means run over the images and all pairs of channels, t' and s' being any channel, also t and s
themselves. The numbers of channels need not agree; where the sides do not, the larger map is average-pooled first. The
equation numbers are ours.

Differences
- from the paper: of its kernels the polynomial one is taken, of degree 2 and without constant, at every stage.
- from RepDistiller's code (HobbitLong/RepDistiller, commit b84f547, distiller_zoo/NST.py): the value is the same, the memory
  is not. It multiplies all pairs of channels position by position, B * C * C * H * W numbers, 1 GiB a kernel and stage for
  resnet32x4; here it takes matrix products, none larger than B * C * max(C, H * W).

    python methods/nst.py --teacher resnet56 --student resnet20
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
from common import Run, accuracy, build, fail, graphed, load_data, load_teacher, shapes


@dataclass
class Args:
    teacher: str = "resnet56"
    """the trained network to learn from, a name in common.NETWORKS"""
    student: str = "resnet20"
    """the network to train, a name in common.NETWORKS"""
    dataset: str = "cifar100"
    """cifar100, cifar10, or synthetic (small, nothing to download)"""
    data: Path = Path("data")
    """folder of the data sets"""
    runs: Path = Path("runs")
    """folder in which this run makes its own"""
    seed: int = 1
    """seed of the weights, the order of the images and their views"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cuda, cuda:1, ... or cpu"""
    teacher_weights: Path | None = None
    """checkpoint of the teacher; by default one in teachers/, else a run of methods/vanilla.py, which is started if need be"""
    epochs: int = 240
    """passes over the training images"""
    batch_size: int = 64
    """images a step; the last, smaller batch of an epoch is kept"""
    lr: float | None = None
    """learning rate at the start; by default 0.05, but 0.01 for mobilenetv2, shufflenetv1 and shufflenetv2"""
    milestones: tuple[int, ...] | None = None
    """epochs after which the learning rate falls to a tenth; by default 5/8, 6/8 and 7/8 of all"""
    weight_decay: float = 5e-4
    """on all parameters, those of batch norm and of auxiliary modules too"""
    ce_weight: float = 1.0
    """r, weight of the cross-entropy with the labels"""
    kd_weight: float = 0.0
    """a, weight of the KD term"""
    kd_temperature: float = 4.0
    """T, by which both networks' logits are divided in the KD term"""
    nst_weight: float = 50.0
    """beta, weight of the NST term"""


def kd_loss(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(p_t || p_s) of logits (B, C): summed over the classes, averaged over the batch."""
    log_p_s = F.log_softmax(z_s / temperature, 1)
    log_p_t = F.log_softmax(z_t / temperature, 1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, log_target=True, reduction="batchmean")


def same_side(f_s: Tensor, f_t: Tensor) -> tuple[Tensor, Tensor]:
    """Maps (B, C_s, H_s, W_s) and (B, C_t, H_t, W_t), the larger ones average-pooled to the side of the smaller ones."""
    side_s, side_t = f_s.shape[2], f_t.shape[2]
    if side_s > side_t:
        f_s = F.adaptive_avg_pool2d(f_s, side_t)
    elif side_t > side_s:
        f_t = F.adaptive_avg_pool2d(f_t, side_s)
    return f_s, f_t


def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
    """Mean of <a_i, b_j>^2 over the images and all pairs of channels, for unit vectors a (B, C, N) and b (B, D, N)."""
    pairs, positions = a.shape[1] * b.shape[1], a.shape[2]
    if pairs <= positions**2:
        return (a @ b.mT).square().mean()  # Eq. 2
    return (a.mT @ a * (b.mT @ b)).sum((1, 2)).mean() / pairs  # Eq. 2, the same sum over N * N numbers instead of C * D


def nst_loss(maps_s: list[Tensor], maps_t: list[Tensor]) -> Tensor:
    """The NST term for the maps of the stages, (B, C, H, W) each, as many of the student as of the teacher."""
    loss = 0
    for f_s, f_t in zip(maps_s, maps_t, strict=True):
        s, t = (F.normalize(f.flatten(2), dim=2) for f in same_side(f_s, f_t))  # Eq. 1
        loss = loss + mean_kernel(t, t) - 2 * mean_kernel(s, t) + mean_kernel(s, s)  # Eq. 3
    return loss


def main(args: Args) -> float:
    run = Run(__file__, args)  # a run that is already finished prints its result and ends here
    train, test = load_data(args)
    teacher = load_teacher(args, test)  # frozen, in eval mode

    torch.manual_seed(args.seed)  # right before the student: the same student for every teacher and method
    student = build(args.student, train.classes, args.device)
    stages_s, stages_t = len(shapes(student).maps) - 1, len(shapes(teacher).maps) - 1
    if stages_s != stages_t:
        fail(f"NST compares stage by stage: {args.student} has {stages_s} stages, {args.teacher} {stages_t}", 2)
    trained = nn.ModuleDict(dict(student=student))  # what the optimiser trains and a checkpoint holds
    optimizer = SGD(trained.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=True)
    schedule = MultiStepLR(optimizer, args.milestones, gamma=0.1)

    @graphed
    def step(x, y, index):
        with torch.no_grad():
            z_t, features_t = teacher(x)
        z_s, features_s = student(x)

        loss = args.ce_weight * F.cross_entropy(z_s, y)
        loss = loss + args.kd_weight * kd_loss(z_s, z_t, args.kd_temperature)
        loss = loss + args.nst_weight * nst_loss(features_s.maps[1:], features_t.maps[1:])  # Eq. 4

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return torch.stack([loss.detach() * len(y), (z_s.argmax(1) == y).sum()])

    for epoch in run.epochs(args.epochs, trained=trained, optimizer=optimizer, schedule=schedule):
        trained.train()
        sums = sum(step(*batch) for batch in train.epoch(epoch))
        run.log(epoch, sums / len(train), accuracy(student, test), schedule)
        schedule.step()
    return run.finish(student, teacher)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
