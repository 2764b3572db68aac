"""NKD: From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and Customized Soft
Labels. Yang, Zeng, Li, Zhang, Yuan and Li, 2023, arXiv 2303.13005.

KD is split, as in DKD (methods/dkd.py), but into cross-entropies. The label's class is weighted by the teacher's confidence; the
other classes are normalized to sum to 1 in both networks, so that they can be matched.

    p        = softmax(z)                                     y: the label
    q        = softmax(z / T) over the C - 1 other classes,   T = nkd_temperature
    L_target = mean_i -p_t,y log p_s,y
    L_other  = T^2 mean_i -sum_c q_t,c log q_s,c              same gradient as DKD's NCKD
    L        = ce_weight CE + nkd_weight (L_target + gamma L_other)

Taken from the authors' code, yzd-v/cls_KD@1e5d48f. T = 3 and gamma = 3.5 are from its only CIFAR-100 configuration (mmcls's
resnet34 to resnet18); using them for all pairs is our choice, since the authors give no values for the pairs here.
Differences
- from the paper: checked against the abstract only.
- from the code: the recipe is ours; the code uses batches of 128, 200 epochs and lr 0.1. Labels are class indices only.
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
    nkd_weight: float = 1.0
    """weight of the NKD term"""
    nkd_temperature: Positive = 3.0
    """softmax temperature of L_other; the authors use 1 on ImageNet"""
    gamma: float = 3.5
    """weight of L_other within the NKD term; the authors use 1.5 on ImageNet"""


def log_others(z: Tensor, y: Tensor) -> Tensor:
    """log q (B, C) of logits (B, C) and labels (B,); 0 at the label, which then adds nothing to L_other."""
    label = y[:, None] == torch.arange(z.shape[1], device=z.device)
    # From 17 July to 10 October 2023 the authors' mask was True everywhere, so the label's class stayed in. Copies still have it.
    return F.log_softmax(z.masked_fill(label, -torch.inf), dim=1).masked_fill(label, 0)


def nkd_losses(z_s: Tensor, z_t: Tensor, y: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """L_target and L_other of logits (B, C) and labels (B,). Neither is 0 when the student equals the teacher."""
    p_t_y = F.softmax(z_t, dim=1).gather(1, y[:, None])
    target = -(p_t_y * F.log_softmax(z_s, dim=1).gather(1, y[:, None])).mean()
    log_q_s, log_q_t = log_others(z_s / temperature, y), log_others(z_t / temperature, y)
    other = -(log_q_t.exp() * log_q_s).sum(1).mean()
    return target, temperature**2 * other


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
            z_t, _ = teacher(x)
        z_s, _ = student(x)

        loss_ce = F.cross_entropy(z_s, y)
        loss_target, loss_other = nkd_losses(z_s, z_t, y, args.nkd_temperature)
        loss = args.ce_weight * loss_ce + args.nkd_weight * (loss_target + args.gamma * loss_other)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return dict(loss=loss, ce=loss_ce, target=loss_target, other=loss_other, accuracy=(z_s.argmax(1) == y).float().mean())

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
