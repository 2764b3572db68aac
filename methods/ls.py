"""LS: Logit Standardization in Knowledge Distillation. Sun, Ren, Li, Wang and Cao, 2024, arXiv 2403.01427.

KD makes a small student match the spread of the teacher's logits too, because both share one temperature. Here each image's
logits are standardized in both networks, so that only their relations are taught; cross-entropy alone sets the student's scale.

    n    = (z - mean z) / (std z + 1e-7)                                    per image, over the classes; std divides by C - 1
    KD   = T^2 mean_i KL(p_t || p_s),   p = softmax(n / T),   T = kd_temperature
    DKD  = dkd_alpha TCKD + dkd_beta NCKD                                   as in methods/dkd.py, on n instead of z
    L    = ce_weight CE + kd_weight KD                                      --loss kd
    L    = ce_weight CE + min(epoch / warmup_epochs, 1) kd_weight DKD       --loss dkd

Taken from the authors' code, sunshangquan/logit-standardization-KD@f6e5aa5. Published: resnet56/resnet20 71.43 (KD+LS) and 72.32
(DKD+LS), best epoch on the test set. T, kd_weight and dkd_beta were tuned for each pair, as the names of its logs show.
Differences
- from the paper: checked against the abstract only.
- from the code: in DKD, q is computed without the label's class; the code subtracts 1000 from its logit.
- from the code: the last epoch is reported (in its logs, 0.3 below the best on average), and runs are seeded.

    python methods/ls.py --loss dkd      # DKD+LS
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from common import DistillArgs, NonNegative, Positive, PositiveInt, Run, accuracy, build, cuda_graph, load_data, load_teacher

KD_LS = {  # (teacher, student): (T, kd_weight), from the names of the authors' logs; (2, 9) for all other pairs
    ("resnet110", "resnet20"): (4.0, 12.0),
    ("resnet32x4", "wrn_16_2"): (3.0, 9.0),
    ("resnet32x4", "wrn_40_2"): (3.0, 9.0),
    ("wrn_40_2", "mobilenetv2"): (3.0, 9.0),
    ("vgg13", "vgg8"): (3.0, 9.0),
    ("vgg13", "mobilenetv2"): (3.0, 9.0),
    ("resnet50", "mobilenetv2"): (3.0, 1.0),
}
DKD_LS = {  # (teacher, student): (T, kd_weight, dkd_beta), same source; (2, 9, 8) for all other pairs
    ("wrn_40_2", "wrn_16_2"): (2.0, 12.0, 2.0),
    ("wrn_40_2", "wrn_40_1"): (2.0, 12.0, 2.0),
    ("wrn_40_2", "resnet8x4"): (2.0, 18.0, 2.0),
    ("wrn_40_2", "mobilenetv2"): (2.0, 15.0, 2.0),
    ("resnet56", "resnet20"): (3.0, 18.0, 2.0),
    ("resnet110", "resnet20"): (2.0, 15.0, 2.0),
    ("resnet110", "resnet32"): (2.0, 15.0, 2.0),
    ("resnet32x4", "wrn_16_2"): (2.0, 9.0, 2.0),
    ("vgg13", "vgg8"): (2.0, 15.0, 2.0),
    ("vgg13", "mobilenetv2"): (3.0, 9.0, 2.0),
    ("resnet50", "mobilenetv2"): (2.0, 15.0, 2.0),
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
    loss: Literal["kd", "dkd"] = "kd"
    """loss on the standardized logits: kd (KD+LS) or dkd (DKD+LS)"""
    ce_weight: float | None = None
    """weight of the cross-entropy with the labels; by default 0.1 with kd, 1 with dkd"""
    kd_weight: float | None = None
    """weight of the loss on the standardized logits; by default the pair's value in KD_LS or DKD_LS, or 9"""
    kd_temperature: Positive | None = None
    """softmax temperature; by default the pair's value in KD_LS or DKD_LS, or 2"""
    dkd_alpha: float = 1.0
    """weight of TCKD, the label's class against all others"""
    dkd_beta: NonNegative | None = None
    """weight of NCKD, among the other classes; by default the pair's value in DKD_LS, or 8"""
    warmup_epochs: PositiveInt = 20
    """epochs over which the weight of dkd ramps up to its full value; 1 for no warm-up; kd starts at full weight"""


def standardize(z: Tensor, eps: float = 1e-7) -> Tensor:
    """n: logits (B, C) with mean 0 and standard deviation 1 in each row."""
    return (z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + eps)


def kd_loss(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """T^2 KL(p_t || p_s) of logits (B, C), summed over classes, averaged over the batch."""
    log_p_s = F.log_softmax(z_s / temperature, dim=1)
    log_p_t = F.log_softmax(z_t / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, log_target=True, reduction="batchmean")


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
    if args.loss == "dkd":
        ce_weight, (temperature, kd_weight, dkd_beta) = 1.0, DKD_LS.get((args.teacher, args.student), (2.0, 9.0, 8.0))
    else:
        ce_weight, (temperature, kd_weight), dkd_beta = 0.1, KD_LS.get((args.teacher, args.student), (2.0, 9.0)), 0.0
    ce_weight = args.ce_weight if args.ce_weight is not None else ce_weight
    kd_weight = args.kd_weight if args.kd_weight is not None else kd_weight
    temperature = args.kd_temperature if args.kd_temperature is not None else temperature
    dkd_beta = args.dkd_beta if args.dkd_beta is not None else dkd_beta

    @cuda_graph
    def step(x, y, index, warmup):
        with torch.no_grad():
            z_t, _ = teacher(x)
        z_s, _ = student(x)
        n_s, n_t = standardize(z_s), standardize(z_t)

        loss_ce = F.cross_entropy(z_s, y)
        if args.loss == "kd":
            loss_kd = kd_loss(n_s, n_t, temperature)
        else:
            loss_tckd, loss_nckd = dkd_losses(n_s, n_t, y, temperature)
            loss_kd = args.dkd_alpha * loss_tckd + dkd_beta * loss_nckd
        loss = ce_weight * loss_ce + warmup * kd_weight * loss_kd

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return dict(loss=loss, ce=loss_ce, kd=loss_kd, accuracy=(z_s.argmax(1) == y).float().mean())

    for epoch in run.epochs(args.epochs, trained=trained, optimizer=optimizer, scheduler=scheduler):  # resumes and saves
        trained.train()
        meter = run.meter(len(train))  # sums on the device, read once per epoch
        warmup = torch.tensor(min(epoch / args.warmup_epochs, 1.0) if args.loss == "dkd" else 1.0, device=args.device)
        for x, y, index in train.epoch(epoch):
            meter.add(step(x, y, index, warmup), len(y))
        run.log(epoch, train=meter.mean(), test=accuracy(student, test), warmup=warmup)
        scheduler.step()
    return run.finish(student, teacher)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
