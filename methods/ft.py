"""FT: Paraphrasing Complex Network: Network Compression via Factor Transfer. Kim, Park and Kwak, 2018, arXiv 1802.04977.

The teacher's raw features may be hard for a student to follow. In phase 1 an auto-encoder, the paraphraser, learns to compress
them into a factor with half the channels. In phase 2 a translator must extract the same factor from the student's features.

    L_rec = mean (decoder(encoder(f_t)) - f_t)^2                    f: the last stage's map
    Q(F)  = a / |a|,   a = mean of F^2 over the channels, a vector of H W positions
    L_ft  = mean |Q(translator(f_s)) - Q(encoder(f_t))|             over batch and positions
    KD    = T^2 mean_i KL(p_t || p_s),   p = softmax(z / T),   T = kd_temperature
    L     = L_rec in phase 1,   ce_weight CE + kd_weight KD + ft_weight L_ft in phase 2

Taken from HobbitLong/RepDistiller@b84f547 (distiller_zoo/FT.py, models/util.py), the source of the published tables.
Published: resnet56/resnet20 69.84 (last epoch).
Differences
- from the paper and its code, Jangho-Kim/Factor-Transfer-pytorch@19cce26: their Q(F) = F / |F| keeps channels and signs.
- from the paper: its L_rec is a squared L2 norm.
- from the authors' code: its L_rec is a mean absolute error, its translator has no batch norm, and ft_weight is 500.
- from RepDistiller: none in the loss; its p = 2 option for L_ft is left out.

The authors' losses, on this schedule: python methods/ft.py --ft-variant original --ft-weight 500
"""

import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from common import DistillArgs, Positive, PositiveInt, Run, accuracy, build, cuda_graph, feature_shapes, load_data, load_teacher


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
    ft_weight: float = 200.0
    """weight of the FT term; 500 for the original variant"""
    ft_variant: Literal["repdistiller", "original"] = "repdistiller"
    """repdistiller gave the published CIFAR-100 numbers; original is the authors' code's"""
    init_epochs: PositiveInt = 30
    """epochs of phase 1, at a constant learning rate"""


def kd_loss(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """T^2 KL(p_t || p_s) of logits (B, C), summed over classes, averaged over the batch."""
    log_p_s = F.log_softmax(z_s / temperature, dim=1)
    log_p_t = F.log_softmax(z_t / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, log_target=True, reduction="batchmean")


def same_side(f_s: Tensor, f_t: Tensor) -> tuple[Tensor, ...]:
    """Both maps (B, C, H, W) at the lower of their two resolutions; the larger is average-pooled."""
    side = min(f_s.shape[2], f_t.shape[2])
    return tuple(f if f.shape[2] == side else F.adaptive_avg_pool2d(f, side) for f in (f_s, f_t))


def coder(channels: list[int], convolution: type[nn.Module], batch_norm: bool) -> nn.Sequential:
    """3x3 convolutions from each number of channels to the next, each followed by LeakyReLU."""
    layers = []
    for c_in, c_out in pairwise(channels):
        norm = nn.BatchNorm2d(c_out) if batch_norm else nn.Identity()
        layers += [convolution(c_in, c_out, 3, padding=1), norm, nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)


class Paraphraser(nn.Module):
    """Auto-encoder of the teacher's maps (B, C, H, W); their factor is (B, C // 2, H, W)."""

    def __init__(self, c_t: int):
        super().__init__()
        self.encoder = coder([c_t, c_t, c_t // 2, c_t // 2], nn.Conv2d, batch_norm=False)
        self.decoder = coder([c_t // 2, c_t // 2, c_t, c_t], nn.ConvTranspose2d, batch_norm=False)

    def forward(self, f_t: Tensor) -> Tensor:
        return self.decoder(self.encoder(f_t))


def unit(factor: Tensor, variant: str) -> Tensor:
    """Q of factors (B, C, H, W): unit vectors (B, H W), or (B, C H W) in the original variant."""
    a = factor if variant == "original" else factor.square().mean(1)
    return F.normalize(a.flatten(1), dim=1)


def ft_loss(factor_s: Tensor, factor_t: Tensor, variant: str) -> Tensor:
    """L_ft of factors (B, C, H_s, W_s) and (B, C, H_t, W_t)."""
    factor_s, factor_t = same_side(factor_s, factor_t)
    return (unit(factor_s, variant) - unit(factor_t, variant)).abs().mean()


def main(args: Args) -> float:
    run = Run(__file__, args)  # prints the result and exits if this run is already finished
    train, test = load_data(args)
    teacher = load_teacher(run, test)  # frozen, in eval mode

    torch.manual_seed(args.seed)  # the same initial student for every method
    student = build(args.student, train.classes, args.device)
    c_s, c_t = feature_shapes(student, train.size).maps[-1][0], feature_shapes(teacher, train.size).maps[-1][0]
    paraphraser = Paraphraser(c_t)
    translator = coder([c_s, c_s, c_t // 2, c_t // 2], nn.Conv2d, batch_norm=args.ft_variant == "repdistiller")
    lr = args.lr or (0.01 if args.student in ("mobilenetv2", "shufflenetv1", "shufflenetv2") else 0.05)

    # Phase 1
    init = nn.ModuleDict(dict(paraphraser=paraphraser)).to(args.device)
    # As in RepDistiller, except that a resnet50 student keeps lr (0.05) there
    init_lr = 0.01 if args.student.startswith(("resnet", "wrn")) else lr
    init_optimizer = SGD(init.parameters(), init_lr, momentum=args.momentum, weight_decay=args.weight_decay, fused=True)
    init_scheduler = MultiStepLR(init_optimizer, milestones=[])  # constant learning rate

    @cuda_graph
    def init_step(x, y, index):
        with torch.no_grad():
            _, features_t = teacher(x)
        error = paraphraser(features_t.maps[-1]) - features_t.maps[-1]

        loss_rec = error.abs().mean() if args.ft_variant == "original" else error.square().mean()

        init_optimizer.zero_grad()
        loss_rec.backward()
        init_optimizer.step()
        return dict(loss=loss_rec)

    for epoch in run.epochs(args.init_epochs, trained=init, optimizer=init_optimizer, scheduler=init_scheduler, phase="init"):
        init.train()
        meter = run.meter(len(train))
        for x, y, index in train.epoch(epoch, phase="init"):
            meter.add(init_step(x, y, index), len(y))
        run.log(epoch, train=meter.mean())
        init_scheduler.step()

    # Phase 2
    trained = nn.ModuleDict(dict(student=student, translator=translator)).to(args.device)  # optimized and checkpointed
    optimizer = SGD(trained.parameters(), lr, momentum=args.momentum, weight_decay=args.weight_decay, fused=True)
    milestones = args.milestones or sorted({args.epochs * k // 8 for k in (5, 6, 7)} - {0})
    scheduler = MultiStepLR(optimizer, milestones, gamma=0.1)

    @cuda_graph
    def step(x, y, index):
        with torch.no_grad():
            z_t, features_t = teacher(x)
            factor_t = paraphraser.encoder(features_t.maps[-1])
        z_s, features_s = student(x)

        loss_ce = F.cross_entropy(z_s, y)
        loss_kd = kd_loss(z_s, z_t, args.kd_temperature)
        loss_ft = ft_loss(translator(features_s.maps[-1]), factor_t, args.ft_variant)
        loss = args.ce_weight * loss_ce + args.kd_weight * loss_kd + args.ft_weight * loss_ft

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return dict(loss=loss, ce=loss_ce, kd=loss_kd, ft=loss_ft, accuracy=(z_s.argmax(1) == y).float().mean())

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
