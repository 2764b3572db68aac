"""KD: Distilling the Knowledge in a Neural Network. Hinton, Vinyals and Dean, 2015, arXiv 1503.02531.

The student matches the teacher's class probabilities, softened by a temperature so that the small ones count too: they show
which classes look alike to the teacher. The factor T^2 keeps the gradient at about the same size as T changes.

    KD = T^2 mean_i KL(p_t || p_s),   p = softmax(z / T),   T = kd_temperature
    L  = ce_weight CE + kd_weight KD

Taken from RepDistiller (HobbitLong/RepDistiller@b84f547), whose CIFAR-100 table later papers copy.
Differences
- from the paper: it gives no weights for CIFAR-100; 0.1, 0.9 and T = 4 are RepDistiller's. Others use 1 and 1 (SimKD's tables).
- from the code: none in the loss; runs are seeded.
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
    ce_weight: float = 0.1
    """weight of the cross-entropy with the labels"""
    kd_weight: float = 0.9
    """weight of the KD term"""
    kd_temperature: Positive = 4.0
    """softmax temperature of the KD term"""


def kd_loss(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """T^2 KL(p_t || p_s) of logits (B, C), summed over classes, averaged over the batch."""
    log_p_s = F.log_softmax(z_s / temperature, dim=1)
    log_p_t = F.log_softmax(z_t / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, log_target=True, reduction="batchmean")


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
        loss_kd = kd_loss(z_s, z_t, args.kd_temperature)
        loss = args.ce_weight * loss_ce + args.kd_weight * loss_kd

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return dict(loss=loss, ce=loss_ce, kd=loss_kd, accuracy=(z_s.argmax(1) == y).float().mean())

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
