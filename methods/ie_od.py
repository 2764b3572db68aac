"""IE-OD: inheritance by overhauled feature distillation (OFD), with exploration. After Huang, Shen, Xing et al., Revisiting
Knowledge Distillation: An Inheritance and Exploration Framework, CVPR 2021, arXiv 2107.00181, which has an IE-OD in its Table 1.

Status: our definition. Of the paper only the abstract was available, and the authors' code has no IE-OD.
One half of the student's channels regresses the teacher's last map (inheritance, as in OFD, arXiv 1904.01866). The other must
differ from that map compressed to a factor by phase 1's auto-encoder (exploration, as in ie_kd.py; negated OFD is unbounded).

    L_rec   = mean |f_t - D_t(E_t(f_t))|                              phase 1, trains E_t and D_t; f: the map that is pooled
    v       = max(g_t, m)         g: the last stage's map before its ReLU; m: mean negative value, from the preceding batch norm
    L_inh   = (1/B) sum (u - v)^2 [u > v or v > 0]                    u: batch norm of a 1x1 convolution of g_inh
    d(F, G) = mean |n(F) - n(G)|,   n(F) = F / norm of an image's whole factor
    L_exp   = -d(E_exp(relu(g_exp)), E_t(f_t))                        g_inh, g_exp: first and second half of g_s
    L       = ce_weight CE + inheritance_weight L_inh + exploration_weight L_exp      phase 2, trains the student, u and E_exp

Recipe: the authors' for CIFAR-10, aliyun/Revisiting-Knowledge-Distillation-an-Inheritance-and-Exploration-Framework@3274ab0.
Published (a picture), only on CIFAR-10 (--dataset cifar10; default: cifar100): resnet56/resnet20 93.47, OFD 93.19, IE-FT 93.43.
Differences
- from OFD: only the last stage is compared, and the teacher's batch norms use their running statistics.
- from the code: the last epoch is reported (the code saves the best on the test set); runs are seeded; unequal sides are pooled.
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
from common import (
    DistillArgs,
    PositiveInt,
    Run,
    accuracy,
    build,
    cuda_graph,
    feature_shapes,
    load_data,
    load_teacher,
    stage_norms,
)


@dataclass
class Args(DistillArgs):
    teacher: str = "resnet56"
    student: str = "resnet20"
    init_epochs: PositiveInt = 30
    """epochs of phase 1, which trains the teacher's auto-encoder"""
    epochs: int = 160
    batch_size: int = 128
    lr: float | None = None
    """initial learning rate of both phases; by default 0.1"""
    milestones: tuple[int, ...] = ()
    """epochs after which the learning rate drops 10x; by default 1/2 and 3/4 of all"""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    ce_weight: float = 1.0
    """weight of the cross-entropy with the labels"""
    inheritance_weight: float = 1e-3
    """weight of the inheritance term, the same as OFD's for the last stage; 0 leaves exploration only"""
    exploration_weight: float = 50.0
    """weight of the exploration term; 0 leaves inheritance only"""


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


class Coder(nn.Sequential):
    """Encoder or decoder: maps (B, c_in, H, W) to (B, c_out, H, W)."""

    def __init__(self, c_in: int, c_out: int):
        layers: list[nn.Module] = [nn.LeakyReLU(0.1)]  # as released; no effect on a map that comes out of a ReLU
        for c, c_next in (c_in, c_in), (c_in, c_out), (c_out, c_out):
            layers += [nn.Conv2d(c, c_next, 3, padding=1, bias=False), nn.BatchNorm2d(c_next), nn.LeakyReLU(0.1)]
            nn.init.kaiming_normal_(layers[-3].weight, mode="fan_out", nonlinearity="relu")
        super().__init__(*layers)


class AutoEncoder(nn.Module):
    """E_t and D_t: a map (B, c_t, H, W) to its factor (B, width, H, W) and back."""

    def __init__(self, c_t: int, width: int):
        super().__init__()
        self.encode, self.decode = Coder(c_t, width), Coder(width, c_t)

    def forward(self, f_t: Tensor) -> Tensor:
        return self.decode(self.encode(f_t))


def distance(f: Tensor, g: Tensor) -> Tensor:
    """d of two factors (B, C, H, W): from 0 to 2 / sqrt(C * H * W). If the sides differ, the larger is average-pooled (ours)."""
    side = min(f.shape[3], g.shape[3])
    f, g = (F.adaptive_avg_pool2d(each, side) if each.shape[3] > side else each for each in (f, g))
    return (F.normalize(f.flatten(1), dim=1) - F.normalize(g.flatten(1), dim=1)).abs().mean()


class IEOD(nn.Module):
    """L_inh and L_exp; the first half of the student's c_s channels inherits. `norm`: the teacher's last pre-ReLU batch norm."""

    def __init__(self, c_s: int, norm: nn.BatchNorm2d):
        super().__init__()
        self.width = c_s // 2
        self.partial_distance = PartialDistance(self.width, norm)
        self.encode_exp = Coder(c_s - self.width, self.width)

    def forward(self, g_s: Tensor, g_t: Tensor, factor_t: Tensor) -> tuple[Tensor, Tensor]:
        """Maps g_s (B, c_s, H, W) and g_t (B, c_t, H', W') before the ReLU, and the factor E_t(f_t) with c_s // 2 channels."""
        inheritance = self.partial_distance(g_s[:, : self.width], g_t)  # L_inh
        exploration = -distance(self.encode_exp(F.relu(g_s[:, self.width :])), factor_t)  # L_exp
        return inheritance, exploration


def main(args: Args) -> float:
    run = Run(__file__, args)  # prints the result and exits if this run is already finished
    train, test = load_data(args, padding="reflect")  # as in the authors' code
    teacher = load_teacher(run, test)  # frozen, in eval mode

    torch.manual_seed(args.seed)  # the same initial student for every method
    student = build(args.student, train.classes, args.device)
    ieod = IEOD(feature_shapes(student, train.size).preacts[-1][0], stage_norms(teacher)[-1])
    autoencoder = AutoEncoder(feature_shapes(teacher, train.size).last[0], ieod.width)
    lr = args.lr or 0.1

    # Phase 1
    init = nn.ModuleDict(dict(autoencoder=autoencoder)).to(args.device)
    init_optimizer = SGD(init.parameters(), lr, momentum=args.momentum, weight_decay=args.weight_decay, nesterov=True, fused=True)
    init_scheduler = MultiStepLR(init_optimizer, milestones=[])  # constant learning rate

    @cuda_graph
    def init_step(x, y, index):
        with torch.no_grad():
            _, features_t = teacher(x)

        loss_rec = F.l1_loss(autoencoder(features_t.last), features_t.last)  # L_rec

        init_optimizer.zero_grad()
        loss_rec.backward()
        init_optimizer.step()
        return dict(loss=loss_rec)

    for epoch in run.epochs(
        args.init_epochs, trained=init, optimizer=init_optimizer, scheduler=init_scheduler, phase="autoencoder"
    ):
        init.train()
        meter = run.meter(len(train))
        for x, y, index in train.epoch(epoch, phase="autoencoder"):
            meter.add(init_step(x, y, index), len(y))
        run.log(epoch, train=meter.mean())
        init_scheduler.step()
    autoencoder.eval().requires_grad_(False)

    # Phase 2
    trained = nn.ModuleDict(dict(student=student, ieod=ieod)).to(args.device)  # optimized and checkpointed
    optimizer = SGD(trained.parameters(), lr, momentum=args.momentum, weight_decay=args.weight_decay, nesterov=True, fused=True)
    milestones = args.milestones or sorted({args.epochs * k // 4 for k in (2, 3)} - {0})
    scheduler = MultiStepLR(optimizer, milestones, gamma=0.1)

    @cuda_graph
    def step(x, y, index):
        with torch.no_grad():
            _, features_t = teacher(x)
            factor_t = autoencoder.encode(features_t.last)
        z_s, features_s = student(x)

        loss_ce = F.cross_entropy(z_s, y)
        loss_inh, loss_exp = ieod(features_s.preacts[-1], features_t.preacts[-1], factor_t)
        loss = args.ce_weight * loss_ce + args.inheritance_weight * loss_inh + args.exploration_weight * loss_exp

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return dict(loss=loss, ce=loss_ce, inh=loss_inh, exp=loss_exp, accuracy=(z_s.argmax(1) == y).float().mean())

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
