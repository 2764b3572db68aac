"""CTKD: Curriculum Temperature for Knowledge Distillation. Li, Li, Yang, Zhao, Song, Luo, Li and Yang, 2022, arXiv 2211.16231.

The temperature of KD is learned, and adversarially: theta ascends the loss that the student descends. Its gradient is scaled up
from zero over the first epochs, a curriculum from easy to hard.

    T      = low + span sigmoid(theta)                                    one for all images; 15.6 at the start
    KD     = T^2 mean_i KL(p_t || p_s),   p = softmax(z / T)
    L      = ce_weight CE + kd_weight KD
    lambda = (cos(pi min(epoch, ramp_epochs) / ramp_epochs) - 1) / 2      from 0 to -1; multiplies the gradient of theta

Taken from the authors' code, zhengli97/CTKD@7d52522 (global temperature). Published: resnet56/resnet20 71.19.
T falls to its lower bound within about four epochs and stays there (the authors' issue 16; all 17 logs, with bound 2, in
sunshangquan/logit-standardization-KD@f6e5aa5). From then on this is KD at T = 1: watch `temperature` in the log, and compare with
the control, methods/kd.py --kd-temperature 1.
Differences
- from the paper: checked against the abstract only; its instance-wise temperature is neither in the released code nor here.
- from the code: runs are seeded.
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
from common import DistillArgs, Positive, PositiveInt, Run, accuracy, build, cuda_graph, load_data, load_teacher


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
    ce_weight: float = 0.1
    """weight of the cross-entropy with the labels"""
    kd_weight: float = 0.9
    """weight of the KD term"""
    theta: float = 1.0
    """initial theta; 1 starts at T = 15.6"""
    low: Positive = 1.0
    """lower bound of T"""
    span: Positive = 20.0
    """upper minus lower bound of T"""
    ramp_epochs: PositiveInt = 10
    """epochs over which lambda goes from 0 to -1"""


def kd_loss(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """T^2 KL(p_t || p_s) of logits (B, C), summed over classes, averaged over the batch."""
    log_p_s = F.log_softmax(z_s / temperature, dim=1)
    log_p_t = F.log_softmax(z_t / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, log_target=True, reduction="batchmean")


class Temperature(nn.Module):
    """T; its gradient is multiplied by lambda before it reaches theta."""

    def __init__(self, theta: float, low: float, span: float):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta))  # has weight decay like all other parameters
        self.low, self.span = low, span

    def forward(self, lambda_: Tensor | float) -> Tensor:
        theta = self.theta.detach() + lambda_ * (self.theta - self.theta.detach())  # theta itself, with lambda times its gradient
        return self.low + self.span * theta.sigmoid()


def curriculum(epoch: int, ramp_epochs: int) -> float:
    """lambda for an epoch, counted from 1. It is negative, so theta ascends."""
    return (math.cos(math.pi * min(epoch, ramp_epochs) / ramp_epochs) - 1) / 2


def main(args: Args) -> float:
    run = Run(__file__, args)  # prints the result and exits if this run is already finished
    train, test = load_data(args)
    teacher = load_teacher(run, test)  # frozen, in eval mode

    torch.manual_seed(args.seed)  # the same initial student for every method
    student = build(args.student, train.classes, args.device)
    temperature = Temperature(args.theta, args.low, args.span)
    trained = nn.ModuleDict(dict(student=student, temperature=temperature)).to(args.device)  # optimized and checkpointed
    lr = args.lr or (0.01 if args.student in ("mobilenetv2", "shufflenetv1", "shufflenetv2") else 0.05)
    optimizer = SGD(trained.parameters(), lr, momentum=args.momentum, weight_decay=args.weight_decay, fused=True)
    milestones = args.milestones or sorted({args.epochs * k // 8 for k in (5, 6, 7)} - {0})
    scheduler = MultiStepLR(optimizer, milestones, gamma=0.1)

    @cuda_graph
    def step(x, y, index, lambda_):
        with torch.no_grad():
            z_t, _ = teacher(x)
        z_s, _ = student(x)

        loss_ce = F.cross_entropy(z_s, y)
        loss_kd = kd_loss(z_s, z_t, temperature(lambda_))  # T^2 is differentiated too
        loss = args.ce_weight * loss_ce + args.kd_weight * loss_kd

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return dict(loss=loss, ce=loss_ce, kd=loss_kd, accuracy=(z_s.argmax(1) == y).float().mean())

    for epoch in run.epochs(args.epochs, trained=trained, optimizer=optimizer, scheduler=scheduler):  # resumes and saves
        trained.train()
        meter = run.meter(len(train))  # sums on the device, read once per epoch
        lambda_ = torch.tensor(curriculum(epoch, args.ramp_epochs), device=args.device)
        for x, y, index in train.epoch(epoch):
            meter.add(step(x, y, index, lambda_), len(y))
        run.log(epoch, train=meter.mean(), test=accuracy(student, test), temperature=temperature(lambda_))
        scheduler.step()
    return run.finish(student, teacher)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
