"""PKT: Learning Deep Representations with Probabilistic Knowledge Transfer. Passalis and Tefas, 2018, arXiv 1803.10837.

Each image in a batch picks another as its neighbor, with a probability that grows with the similarity of their features. The
student must pick with the teacher's probabilities. Only similarities are compared, so the feature sizes may differ.

    K_ij  = (1 + cos(f_i, f_j)) / 2                                   f: pooled features, the classifier's input
    P_ij  = K_ij / sum_j K_ij
    L_pkt = 1 / B^2 sum_ij P_t_ij log((P_t_ij + eps) / (P_s_ij + eps))
    KD    = T^2 mean_i KL(p_t || p_s),   p = softmax(z / T),   T = kd_temperature
    L     = ce_weight CE + kd_weight KD + pkt_weight L_pkt

Taken from HobbitLong/RepDistiller@b84f547 (distiller_zoo/PKT.py), the source of the published tables; the authors' code,
passalis/probabilistic_kt@a58fd1b, has the same L_pkt. Published: resnet56/resnet20 70.34 (last epoch).
Differences
- from the paper and the authors' code: they train without CE.
- from the authors' code: its optional supervised term, L_pkt with a P_t made from the labels, is left out.
- from RepDistiller: none in the loss.
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
    pkt_weight: float = 30000.0
    """weight of the PKT term, tuned for batches of 64: the term falls as 1 / batch size"""


def kd_loss(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """T^2 KL(p_t || p_s) of logits (B, C), summed over classes, averaged over the batch."""
    log_p_s = F.log_softmax(z_s / temperature, dim=1)
    log_p_t = F.log_softmax(z_t / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, log_target=True, reduction="batchmean")


def neighbor_probabilities(f: Tensor, eps: float) -> Tensor:
    """P (B, B) of features (B, dim): row i holds the probabilities with which image i picks each image."""
    unit = f / (f.norm(dim=1, keepdim=True) + eps)
    kernel = (1 + unit @ unit.T) / 2  # K, including K_ii = 1: an image may pick itself
    return kernel / kernel.sum(1, keepdim=True)


def pkt_loss(f_s: Tensor, f_t: Tensor, eps: float = 1e-7) -> Tensor:
    """L_pkt of features f_s (B, dim_s) and f_t (B, dim_t)."""
    p_s, p_t = neighbor_probabilities(f_s, eps), neighbor_probabilities(f_t, eps)
    return (p_t * ((p_t + eps) / (p_s + eps)).log()).mean()


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
        loss_pkt = pkt_loss(features_s.pooled, features_t.pooled)
        loss = args.ce_weight * loss_ce + args.kd_weight * loss_kd + args.pkt_weight * loss_pkt

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return dict(loss=loss, ce=loss_ce, kd=loss_kd, pkt=loss_pkt, accuracy=(z_s.argmax(1) == y).float().mean())

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
