"""RKD: Relational Knowledge Distillation. Park, Kim, Lu and Cho, 2019, arXiv 1904.05068.

The student need not place an image where the teacher does, but the images of a batch must form the same figure: the same
distances between two, up to a common scale, and the same angles between three.

    D_ij  = |f_i - f_j| / mean over all pairs of two images                                      Eq. 1
    A_ijk = cos(f_j - f_i, f_k - f_i)                                                            Eq. 2
    L_rkd = w_d * mean over B^2 of h(D_s - D_t) + w_a * mean over B^3 of h(A_s - A_t)            Eq. 3
    L     = r * CE + a * T^2 * KL(p_t || p_s) + beta * L_rkd                                     Eq. 4

r = 1, a = 0, beta = 1, w_d = 25, w_a = 50; f the pooled features; h(x) = x^2 / 2 up to |x| = 1, |x| - 1 / 2 beyond (smooth
L1). The equation numbers are ours.

Differences
- from the paper: it sums over pairs and triples of different images; the means here run over all B^2 and B^3 entries, also
  those that repeat an image and are equal on both sides.
- from the authors' code (lenscloth/RKD, commit 0a6c3c0, metric/loss.py): none in either term; it is for metric learning and
  weighs them 1 and 2.
- from RepDistiller's code (HobbitLong/RepDistiller, commit b84f547, distiller_zoo/RKD.py): none in value; both relations
  come from one tensor of differences.

    python methods/rkd.py --teacher resnet56 --student resnet20
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
from common import Run, accuracy, build, graphed, load_data, load_teacher


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
    rkd_weight: float = 1.0
    """beta, weight of both relations together"""
    distance_weight: float = 25.0
    """w_d, weight of the distances inside the RKD term"""
    angle_weight: float = 50.0
    """w_a, weight of the angles inside the RKD term"""


def kd_loss(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(p_t || p_s) of logits (B, C): summed over the classes, averaged over the batch."""
    log_p_s = F.log_softmax(z_s / temperature, 1)
    log_p_t = F.log_softmax(z_t / temperature, 1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, log_target=True, reduction="batchmean")


def relations(f: Tensor) -> tuple[Tensor, Tensor]:
    """Distances D (B, B), of mean 1 between two images, and cosines A (B, B, B) for features (B, d)."""
    difference = f - f[:, None]  # [i, j] = f_j - f_i
    distance = difference.square().sum(2).clamp(min=1e-12).sqrt()  # clamped: the root of 0 has an infinite gradient
    unit = difference / distance[:, :, None]
    cosine = unit @ unit.transpose(1, 2)  # Eq. 2
    distance = distance.masked_fill(torch.eye(len(f), dtype=torch.bool, device=f.device), 0)
    return distance / (distance.sum() / (len(f) * (len(f) - 1))), cosine  # Eq. 1


def rkd_loss(f_s: Tensor, f_t: Tensor, distance_weight: float, angle_weight: float) -> Tensor:
    """The RKD term for features f_s (B, d_s) and f_t (B, d_t)."""
    distance_s, cosine_s = relations(f_s)
    distance_t, cosine_t = relations(f_t)
    distance_loss = F.smooth_l1_loss(distance_s, distance_t, reduction="mean", beta=1.0)
    angle_loss = F.smooth_l1_loss(cosine_s, cosine_t, reduction="mean", beta=1.0)
    return distance_weight * distance_loss + angle_weight * angle_loss  # Eq. 3


def main(args: Args) -> float:
    run = Run(__file__, args)  # a run that is already finished prints its result and ends here
    train, test = load_data(args)
    teacher = load_teacher(args, test)  # frozen, in eval mode

    torch.manual_seed(args.seed)  # right before the student: the same student for every teacher and method
    student = build(args.student, train.classes, args.device)
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
        rkd = rkd_loss(features_s.pooled, features_t.pooled, args.distance_weight, args.angle_weight)
        loss = loss + args.rkd_weight * rkd  # Eq. 4

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
