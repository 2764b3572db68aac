"""RKD: Relational Knowledge Distillation. Park, Kim, Lu and Cho, 2019, arXiv 1904.05068.

The student need not place an image where the teacher does, but the images of a batch must form the same shape: equal distances
between pairs, up to a common scale, and equal angles within triplets.

    D_ij   = |f_i - f_j| / mean over pairs of |f_i - f_j|           f: pooled features, the classifier's input
    A_ijk  = cos(f_j - f_i, f_k - f_i)
    L_d    = mean over i, j of h(D_s - D_t)                         h: smooth L1, x^2 / 2 up to |x| = 1, |x| - 1/2 beyond
    L_a    = mean over i, j, k of h(A_s - A_t)
    KD     = T^2 mean_i KL(p_t || p_s),   p = softmax(z / T),   T = kd_temperature
    L      = ce_weight CE + kd_weight KD + distance_weight L_d + angle_weight L_a

Taken from HobbitLong/RepDistiller@b84f547 (distiller_zoo/RKD.py), the source of the published tables. The authors' code,
lenscloth/RKD@0a6c3c0, has the same terms with weights 1 and 2 for metric learning.
Published: resnet56/resnet20 69.61 (last epoch).
Differences
- from the paper: the means run over all B^2 and B^3 entries, including those that repeat an image and thus always agree.
- from the code: same values; distances and angles share one tensor of differences.
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
from common import DistillArgs, Positive, Run, accuracy, build, cuda_graph, load_data, load_teacher


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
    distance_weight: float = 25.0
    """weight of the distance term"""
    angle_weight: float = 50.0
    """weight of the angle term"""


def kd_loss(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """T^2 KL(p_t || p_s) of logits (B, C), summed over classes, averaged over the batch."""
    log_p_s = F.log_softmax(z_s / temperature, dim=1)
    log_p_t = F.log_softmax(z_t / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, log_target=True, reduction="batchmean")


def relations(f: Tensor) -> tuple[Tensor, Tensor]:
    """D (B, B) and A (B, B, B) of features (B, dim)."""
    difference = f - f[:, None]  # [i, j] = f_j - f_i
    distance = difference.square().sum(2).clamp(min=1e-12).sqrt()  # clamped: the root has an infinite gradient at 0
    direction = difference / distance[:, :, None]
    cosine = direction @ direction.mT  # A
    distance = distance.masked_fill(torch.eye(len(f), dtype=torch.bool, device=f.device), 0)
    return distance / (distance.sum() / (len(f) * (len(f) - 1))), cosine


def rkd_losses(f_s: Tensor, f_t: Tensor) -> tuple[Tensor, Tensor]:
    """L_d and L_a of features f_s (B, dim_s) and f_t (B, dim_t)."""
    distance_s, cosine_s = relations(f_s)
    distance_t, cosine_t = relations(f_t)
    return F.smooth_l1_loss(distance_s, distance_t), F.smooth_l1_loss(cosine_s, cosine_t)


def main(args: Args) -> float:
    run = Run(__file__, args)  # prints the result and exits if this run is already finished
    train, test = load_data(args)
    teacher = load_teacher(run, test)  # frozen, in eval mode

    torch.manual_seed(args.seed)  # the same initial student for every method
    student = build(args.student, train.classes, args.device)
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
        loss_d, loss_a = rkd_losses(features_s.pooled, features_t.pooled)
        loss = args.ce_weight * loss_ce + args.kd_weight * loss_kd + args.distance_weight * loss_d + args.angle_weight * loss_a

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return dict(loss=loss, ce=loss_ce, kd=loss_kd, rkd_d=loss_d, rkd_a=loss_a, accuracy=(z_s.argmax(1) == y).float().mean())

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
