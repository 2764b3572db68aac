"""ICD: Invariant Consistency for Knowledge Distillation. Giakoumoglou and Stathaki, 2024, arXiv 2407.11802.
v2: Invariant Causal Knowledge Distillation in Neural Networks.
v3 and later: Discriminative and Consistent Representation Distillation (DCD).

Student and teacher features are projected to unit vectors. A student vector must pick out its own teacher vector from the batch
(contrast), and the student-to-teacher and teacher-to-student distributions must agree (invariance). This is the objective of
ReLIC (arXiv 2010.07922) between student and teacher instead of between two augmentations.

    e_s, e_t = normalize(W_s f_s), normalize(W_t f_t)                 f: pooled features, the classifier's input
    S_ij     = a <e_s_i, e_t_j> + b,   a = min(exp(tau), 10)          W_s, W_t, tau and b are learned
    P, Q     = softmax over the rows of S, of S transposed
    L_con    = mean_i -log P_ii
    L_inv    = mean_i KL(Q_i || P_i)
    KD       = T^2 mean_i KL(p_t || p_s),   p = softmax(z / T),   T = kd_temperature
    L        = ce_weight CE + kd_weight KD + icd_weight (L_con + alpha L_inv)

Taken from the authors' code, giakoumoglou/distillers@9ba0bfd; ICD still runs at 2f95cea and breaks at 7d31ca6. The loss in the
code is the same under both names, ICD and DCD. Published: resnet56/resnet20 71.18, with KD 71.81 (README, 4 September 2024).
The numbers changed between README versions over five months with the same loss, each change raising one, e.g. resnet110/resnet20
with KD 71.57 -> 72.03, resnet32x4/shufflenetv1 with KD 75.27 -> 76.01.
Differences
- from the paper: checked against the abstract only.
- from the code: the incomplete last batch of an epoch is kept, and runs are seeded.
- caveat: its table compares ICD+KD (weights 1, 1) with KD at 0.1, 0.9; a fair control is `kd.py --ce-weight 1 --kd-weight 1`.
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
from common import DistillArgs, Positive, Run, accuracy, build, cuda_graph, feature_shapes, load_data, load_teacher


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
    """weight of the KD term; 1 gives ICD+KD"""
    kd_temperature: Positive = 4.0
    """softmax temperature of the KD term"""
    icd_weight: float = 1.0
    """weight of the ICD term; the authors' batches have 64 images: an image's negatives are the rest of its batch"""
    alpha: float = 0.5
    """weight of the invariance within the ICD term"""
    init_tau: float = 1.0
    """initial log of the scale; 0 starts at 1, as in filipbasara0/relic, whose code this follows, and was probably intended"""


def kd_loss(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """T^2 KL(p_t || p_s) of logits (B, C), summed over classes, averaged over the batch."""
    log_p_s = F.log_softmax(z_s / temperature, dim=1)
    log_p_t = F.log_softmax(z_t / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, log_target=True, reduction="batchmean")


class ICD(nn.Module):
    """L_con and L_inv of pooled features f_s (B, dim_s) and f_t (B, dim_t)."""

    def __init__(self, dim_s: int, dim_t: int, init_tau: float, dim: int = 128, max_scale: float = 10.0):
        super().__init__()
        self.project_s = nn.Linear(dim_s, dim)  # W_s
        self.project_t = nn.Linear(dim_t, dim)  # W_t: trained, although the teacher is not
        self.tau = nn.Parameter(torch.tensor(init_tau))
        self.bias = nn.Parameter(torch.tensor(0.0))  # cancels in the softmax, so it gets no gradient
        self.max_scale = max_scale

    def scale(self) -> Tensor:
        """a, an inverse temperature. Where the clamp is active, tau gets no gradient."""
        return self.tau.exp().clamp(max=self.max_scale)

    def forward(self, f_s: Tensor, f_t: Tensor) -> tuple[Tensor, Tensor]:
        e_s = F.normalize(self.project_s(f_s), dim=1)
        e_t = F.normalize(self.project_t(f_t), dim=1)
        similarity = self.scale() * (e_s @ e_t.T) + self.bias  # S
        log_p = F.log_softmax(similarity, dim=1)
        log_q = F.log_softmax(similarity.T, dim=1)
        contrast = -log_p.diagonal().mean()  # L_con, in one direction only; images of the same class count as negatives
        invariance = F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")  # L_inv, with gradients through P and Q
        return contrast, invariance  # L_con, L_inv


def main(args: Args) -> float:
    run = Run(__file__, args)  # prints the result and exits if this run is already finished
    train, test = load_data(args)
    teacher = load_teacher(run, test)  # frozen, in eval mode

    torch.manual_seed(args.seed)  # the same initial student for every method
    student = build(args.student, train.classes, args.device)
    icd = ICD(feature_shapes(student, train.size).pooled, feature_shapes(teacher, train.size).pooled, args.init_tau)
    trained = nn.ModuleDict(dict(student=student, icd=icd)).to(args.device)  # optimized and checkpointed
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
        loss_con, loss_inv = icd(features_s.pooled, features_t.pooled)
        loss = args.ce_weight * loss_ce + args.kd_weight * loss_kd + args.icd_weight * (loss_con + args.alpha * loss_inv)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return dict(loss=loss, ce=loss_ce, kd=loss_kd, con=loss_con, inv=loss_inv, accuracy=(z_s.argmax(1) == y).float().mean())

    for epoch in run.epochs(args.epochs, trained=trained, optimizer=optimizer, scheduler=scheduler):  # resumes and saves
        trained.train()
        meter = run.meter(len(train))  # sums on the device, read once per epoch
        for x, y, index in train.epoch(epoch):
            meter.add(step(x, y, index), len(y))
        run.log(epoch, train=meter.mean(), test=accuracy(student, test), scale=icd.scale())
        scheduler.step()
    return run.finish(student, teacher)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
