"""DKD: Decoupled Knowledge Distillation. Zhao, Cui, Song, Qiu and Liang, 2022, arXiv 2203.08679.

For one image, KD is TCKD + (1 - p_t,y) NCKD: how sure the teacher is of the label, and how it rates the other classes. The more
confident the teacher, the less weight KD gives the second part, which the authors find to matter more. DKD decouples the weights.

    b    = (p_y, 1 - p_y),   p = softmax(z / T),   T = dkd_temperature      y: the label
    q    = softmax(z / T) over the C - 1 other classes
    TCKD = T^2 mean_i KL(b_t || b_s)
    NCKD = T^2 mean_i KL(q_t || q_s)
    L    = ce_weight CE + min(epoch / warmup_epochs, 1) (dkd_alpha TCKD + dkd_beta NCKD)

Taken from the authors' code, megvii-research/mdistiller@a08d46f. Published: resnet56/resnet20 71.97, best epoch on the test set.
Differences
- from the paper: checked against the abstract only.
- from the code: q is computed without the label's class; the code subtracts 1000 from its logit, the same up to rounding.
- from the code: the last epoch is reported, and runs are seeded.
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
from common import DistillArgs, NonNegative, Positive, PositiveInt, Run, accuracy, build, cuda_graph, load_data, load_teacher

DKD_BETA = {  # (teacher, student): dkd_beta, from mdistiller's configs/cifar100/dkd; all other pairs get its default, 8
    ("wrn_40_2", "wrn_16_2"): 6.0,
    ("wrn_40_2", "wrn_40_1"): 6.0,
    ("resnet56", "resnet20"): 2.0,
    ("resnet110", "resnet20"): 2.0,  # ours, as for resnet32
    ("resnet110", "resnet32"): 2.0,
    ("vgg13", "vgg8"): 6.0,
    ("vgg13", "mobilenetv2"): 6.0,
}


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
    dkd_alpha: float = 1.0
    """weight of TCKD, the label's class against all others"""
    dkd_beta: NonNegative | None = None
    """weight of NCKD, among the other classes; by default the pair's value in DKD_BETA, or 8"""
    dkd_temperature: Positive = 4.0
    """softmax temperature of TCKD and NCKD"""
    warmup_epochs: PositiveInt = 20
    """epochs over which the weights of TCKD and NCKD ramp up to their full values; 1 for no warm-up"""


def decouple(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """log b (B, 2) and log q (B, C) of logits (B, C) and labels (B,). At the label, log q is 0, which adds nothing to a KL."""
    label = y[:, None] == torch.arange(z.shape[1], device=z.device)
    log_p = F.log_softmax(z, dim=1)
    log_others = log_p.masked_fill(label, -torch.inf)
    log_b = torch.stack([(log_p * label).sum(1), log_others.logsumexp(1)], dim=1)
    return log_b, F.log_softmax(log_others, dim=1).masked_fill(label, 0)


def dkd_losses(z_s: Tensor, z_t: Tensor, y: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """TCKD and NCKD of logits (B, C) and labels (B,)."""
    log_b_s, log_q_s = decouple(z_s / temperature, y)
    log_b_t, log_q_t = decouple(z_t / temperature, y)
    tckd = temperature**2 * F.kl_div(log_b_s, log_b_t, log_target=True, reduction="batchmean")
    nckd = temperature**2 * F.kl_div(log_q_s, log_q_t, log_target=True, reduction="batchmean")
    return tckd, nckd


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
    dkd_beta = args.dkd_beta if args.dkd_beta is not None else DKD_BETA.get((args.teacher, args.student), 8.0)

    @cuda_graph
    def step(x, y, index, warmup):
        with torch.no_grad():
            z_t, _ = teacher(x)
        z_s, _ = student(x)

        loss_ce = F.cross_entropy(z_s, y)
        loss_tckd, loss_nckd = dkd_losses(z_s, z_t, y, args.dkd_temperature)
        loss = args.ce_weight * loss_ce + warmup * (args.dkd_alpha * loss_tckd + dkd_beta * loss_nckd)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return dict(loss=loss, ce=loss_ce, tckd=loss_tckd, nckd=loss_nckd, accuracy=(z_s.argmax(1) == y).float().mean())

    for epoch in run.epochs(args.epochs, trained=trained, optimizer=optimizer, scheduler=scheduler):  # resumes and saves
        trained.train()
        meter = run.meter(len(train))  # sums on the device, read once per epoch
        warmup = torch.tensor(min(epoch / args.warmup_epochs, 1.0), device=args.device)  # a tensor: a CUDA graph freezes numbers
        for x, y, index in train.epoch(epoch):
            meter.add(step(x, y, index, warmup), len(y))
        run.log(epoch, train=meter.mean(), test=accuracy(student, test), warmup=warmup)
        scheduler.step()
    return run.finish(student, teacher)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
