"""FitNet: FitNets: Hints for Thin Deep Nets. Romero, Ballas, Ebrahimi Kahou, Chassang, Gatta and Bengio, 2015, arXiv 1412.6550.

A feature map in the middle of the teacher is a hint that the student's map at the same stage must predict. A convolutional
regressor bridges the difference in channels and resolution; it is trained with the student and dropped at inference.

    u      = ReLU(BN(conv(f_s)))              f: the map of stage hint_stage; 0 is the stem
    L_hint = mean (u - f_t)^2                 over batch, channels and positions
    KD     = T^2 mean_i KL(p_t || p_s),   p = softmax(z / T),   T = kd_temperature
    L      = ce_weight CE + kd_weight KD + fitnet_weight L_hint

Taken from HobbitLong/RepDistiller@b84f547 (distiller_zoo/FitNet.py, models/util.py), the source of the published tables.
Published: resnet56/resnet20 69.21 (last epoch). In 4 of its 13 pairs the student trained alone is better.
Differences
- from the paper: one phase. The paper first trains the student up to the hint on L_hint alone, then the whole student with KD.
- from the code: none in the loss.
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
    fitnet_weight: float = 100.0
    """weight of the hint term"""
    hint_stage: int = 2
    """stage whose maps are compared; 0 is the stem"""


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
    fail(f"FitNet cannot upsample {side_s}x{side_s} maps of the student to {side_t}x{side_t}: try another --hint-stage", 2)


class FitNet(nn.Module):
    """L_hint of maps f_s (B, C_s, H_s, W_s) and f_t (B, C_t, H_t, W_t); the regressor is trained."""

    def __init__(self, shape_s: tuple[int, int, int], shape_t: tuple[int, int, int]):
        super().__init__()
        self.conv = convolution(shape_s, shape_t)
        self.bn = nn.BatchNorm2d(shape_t[0])

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        u = F.relu(self.bn(self.conv(f_s)))  # cannot reach the negative values in maps of wrn and mobilenetv2
        return (u - f_t).square().mean()  # L_hint


def main(args: Args) -> float:
    run = Run(__file__, args)  # prints the result and exits if this run is already finished
    train, test = load_data(args)
    teacher = load_teacher(run, test)  # frozen, in eval mode

    torch.manual_seed(args.seed)  # the same initial student for every method
    student = build(args.student, train.classes, args.device)
    shapes_s, shapes_t = feature_shapes(student, train.size).maps, feature_shapes(teacher, train.size).maps
    stage, stages = args.hint_stage, min(len(shapes_s), len(shapes_t))
    if not 0 <= stage < stages:
        fail(f"--hint-stage {stage}: {args.student} and {args.teacher} have the stages 0 to {stages - 1} in common", 2)
    fitnet = FitNet(shapes_s[stage], shapes_t[stage])
    trained = nn.ModuleDict(dict(student=student, fitnet=fitnet)).to(args.device)  # optimized and checkpointed
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
        loss_hint = fitnet(features_s.maps[stage], features_t.maps[stage])
        loss = args.ce_weight * loss_ce + args.kd_weight * loss_kd + args.fitnet_weight * loss_hint

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return dict(loss=loss, ce=loss_ce, kd=loss_kd, hint=loss_hint, accuracy=(z_s.argmax(1) == y).float().mean())

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
