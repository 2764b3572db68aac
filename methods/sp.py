"""SP: Similarity-Preserving Knowledge Distillation. Tung and Mori, 2019, arXiv 1907.09682.

Two images that cause similar activations in the teacher must do so in the student too. The loss compares B x B matrices of
similarities within the batch, so the maps may differ in channels and resolution.

    G(f) = A A^T with each row divided by its norm       A: the last stage's map, flattened to B rows of C H W numbers
    L_sp = |G(f_t) - G(f_s)|_F^2 / B^2
    KD   = T^2 mean_i KL(p_t || p_s),   p = softmax(z / T),   T = kd_temperature
    L    = ce_weight CE + kd_weight KD + sp_weight L_sp

Taken from HobbitLong/RepDistiller@b84f547 (distiller_zoo/SP.py), the source of the published tables.
Published: resnet56/resnet20 69.67 (last epoch).
Differences
- from the paper: it allows several pairs of layers; the published numbers use the last stage only.
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
    sp_weight: float = 3000.0
    """weight of the similarity term, tuned for batches of 64: the term falls as 1 / batch size"""


def kd_loss(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """T^2 KL(p_t || p_s) of logits (B, C), summed over classes, averaged over the batch."""
    log_p_s = F.log_softmax(z_s / temperature, dim=1)
    log_p_t = F.log_softmax(z_t / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, log_target=True, reduction="batchmean")


def similarity(f: Tensor) -> Tensor:
    """G of maps (B, C, H, W): a matrix (B, B) with unit rows."""
    a = f.flatten(1)
    return F.normalize(a @ a.T, dim=1)


def sp_loss(f_s: Tensor, f_t: Tensor) -> Tensor:
    """L_sp of maps f_s (B, C_s, H_s, W_s) and f_t (B, C_t, H_t, W_t)."""
    return (similarity(f_t) - similarity(f_s)).square().sum() / len(f_s) ** 2


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
        loss_sp = sp_loss(features_s.maps[-1], features_t.maps[-1])
        loss = args.ce_weight * loss_ce + args.kd_weight * loss_kd + args.sp_weight * loss_sp

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return dict(loss=loss, ce=loss_ce, kd=loss_kd, sp=loss_sp, accuracy=(z_s.argmax(1) == y).float().mean())

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
