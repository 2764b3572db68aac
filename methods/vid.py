"""VID: Variational Information Distillation for Knowledge Transfer. Ahn, Hu, Damianou, Lawrence and Dai, 2019, arXiv 1904.05835.

The student should share as much information as possible with the teacher's maps. A lower bound on this mutual information is
the log-likelihood of the teacher's map under a Gaussian whose mean is predicted from the student's map. Its variance, one per
channel, is learned, so channels that the student cannot predict cost little.

    mu(f)     = three 1x1 convolutions without bias, C_s -> C_t -> C_t -> C_t, with ReLUs in between
    sigma_c^2 = softplus(alpha_c) + 1e-5                               5.0 at the start
    L_vid     = sum over stages 1 ... k of mean ((mu(f_s) - f_t)^2 / sigma_c^2 + log sigma_c^2) / 2
    KD        = T^2 mean_i KL(p_t || p_s),   p = softmax(z / T),   T = kd_temperature
    L         = ce_weight CE + kd_weight KD + vid_weight L_vid

The mean is over batch, channels and positions. L_vid can be negative because of the logarithm.
Taken from HobbitLong/RepDistiller@b84f547 (distiller_zoo/VID.py), the source of the published tables.
In megvii-research/mdistiller@a08d46f alpha is not trained, so each stage's term stays 0.1 MSE + 0.805.
Published: resnet56/resnet20 70.38 (last epoch).
Differences
- from the paper: it sums over channels and positions, so its weights have a different scale.
- from the code: same values; softplus replaces log(1 + exp(alpha)), which overflows for a large alpha.
"""

import math
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
    vid_weight: float = 1.0
    """weight of the information term"""


def kd_loss(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """T^2 KL(p_t || p_s) of logits (B, C), summed over classes, averaged over the batch."""
    log_p_s = F.log_softmax(z_s / temperature, dim=1)
    log_p_t = F.log_softmax(z_t / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, log_target=True, reduction="batchmean")


def same_side(f_s: Tensor, f_t: Tensor) -> tuple[Tensor, ...]:
    """Both maps (B, C, H, W) at the lower of their two resolutions; the larger is average-pooled."""
    side = min(f_s.shape[2], f_t.shape[2])
    return tuple(f if f.shape[2] == side else F.adaptive_avg_pool2d(f, side) for f in (f_s, f_t))


def regressor(c_s: int, c_t: int) -> nn.Sequential:
    """mu, from maps (B, c_s, H, W) to maps (B, c_t, H, W)."""
    first, second, third = (nn.Conv2d(c_in, c_t, 1, bias=False) for c_in in (c_s, c_t, c_t))
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)


class VID(nn.Module):
    """L_vid of the stages' maps, each (B, C, H, W); mu and alpha are trained."""

    def __init__(self, channels_s: list[int], channels_t: list[int], init_variance: float = 5.0, eps: float = 1e-5):
        super().__init__()
        self.mu = nn.ModuleList(regressor(c_s, c_t) for c_s, c_t in zip(channels_s, channels_t, strict=True))
        init_alpha = math.log(math.expm1(init_variance - eps))
        self.alpha = nn.ParameterList(torch.full((c_t,), init_alpha) for c_t in channels_t)
        self.eps = eps

    def variance(self, stage: int) -> Tensor:
        """sigma^2 (C_t, 1, 1) of a stage, counted from 0."""
        return F.softplus(self.alpha[stage])[:, None, None] + self.eps

    def forward(self, maps_s: list[Tensor], maps_t: list[Tensor]) -> Tensor:
        loss = 0
        for stage, mu in enumerate(self.mu):
            f_s, f_t = same_side(maps_s[stage], maps_t[stage])
            variance = self.variance(stage)  # sigma^2
            loss = loss + ((mu(f_s) - f_t).square() / variance + variance.log()).mean() / 2
        return loss  # L_vid


def main(args: Args) -> float:
    run = Run(__file__, args)  # prints the result and exits if this run is already finished
    train, test = load_data(args)
    teacher = load_teacher(run, test)  # frozen, in eval mode

    torch.manual_seed(args.seed)  # the same initial student for every method
    student = build(args.student, train.classes, args.device)
    channels_s, channels_t = ([c for c, _, _ in feature_shapes(net, train.size).maps[1:]] for net in (student, teacher))
    stages_s, stages_t = len(channels_s), len(channels_t)
    if stages_s != stages_t:
        fail(f"VID compares stage by stage, but {args.student} has {stages_s} stages and {args.teacher} {stages_t}", 2)
    vid = VID(channels_s, channels_t)
    trained = nn.ModuleDict(dict(student=student, vid=vid)).to(args.device)  # optimized and checkpointed
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
        loss_vid = vid(features_s.maps[1:], features_t.maps[1:])
        loss = args.ce_weight * loss_ce + args.kd_weight * loss_kd + args.vid_weight * loss_vid

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return dict(loss=loss, ce=loss_ce, kd=loss_kd, vid=loss_vid, accuracy=(z_s.argmax(1) == y).float().mean())

    for epoch in run.epochs(args.epochs, trained=trained, optimizer=optimizer, scheduler=scheduler):  # resumes and saves
        trained.train()
        meter = run.meter(len(train))  # sums on the device, read once per epoch
        for x, y, index in train.epoch(epoch):
            meter.add(step(x, y, index), len(y))
        run.log(epoch, train=meter.mean(), test=accuracy(student, test), variance=vid.variance(-1).mean())
        scheduler.step()
    return run.finish(student, teacher)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
