"""CC: Correlation Congruence for Knowledge Distillation. Peng, Jin, Liu, Zhou, Wu, Liu, Li and Zhang, 2019, arXiv 1904.01802.

The student should reproduce not only the teacher's features for each image but also the relations between images. In the variant
behind the published CIFAR-100 numbers, two neighbors in the shuffled batch must not err in the same components.

    d_i  = |W_s f_s_i + b_s - (W_t f_t_i + b_t)|         f: pooled features, the classifier's input; d: 128 components
    L_cc = mean over i < B of <d_i, d_i+1>               W_s, b_s, W_t and b_t are learned
    KD   = T^2 mean_i KL(p_t || p_s),   p = softmax(z / T),   T = kd_temperature
    L    = ce_weight CE + kd_weight KD + cc_weight L_cc

Taken from HobbitLong/RepDistiller@b84f547 (distiller_zoo/CC.py), the source of the published tables, which says that the code
came from the authors. Published: resnet56/resnet20 69.63 (last epoch).
Differences
- from the paper: a different loss. The paper compares the two networks' B x B matrices of Gaussian kernels.
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
    """weight of the KD term"""
    kd_temperature: Positive = 4.0
    """softmax temperature of the KD term"""
    cc_weight: float = 0.02
    """weight of the correlation term"""


def kd_loss(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """T^2 KL(p_t || p_s) of logits (B, C), summed over classes, averaged over the batch."""
    log_p_s = F.log_softmax(z_s / temperature, dim=1)
    log_p_t = F.log_softmax(z_t / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, log_target=True, reduction="batchmean")


class CC(nn.Module):
    """L_cc of pooled features f_s (B, dim_s) and f_t (B, dim_t); both embeddings are trained."""

    def __init__(self, dim_s: int, dim_t: int, dim: int = 128):
        super().__init__()
        self.embed_s = nn.Linear(dim_s, dim)  # W_s, b_s
        self.embed_t = nn.Linear(dim_t, dim)  # W_t, b_t: trained, although the teacher is not

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        # Even a student equal to the teacher has a nonzero loss, because the two embeddings start from different weights
        d = (self.embed_s(f_s) - self.embed_t(f_t)).abs()
        return (d[:-1] * d[1:]).sum(1).mean()  # L_cc

    def norms(self) -> dict[str, Tensor]:
        """Norms of W_s and W_t. If both collapse to 0, L_cc vanishes and teaches nothing."""
        return dict(norm_s=self.embed_s.weight.norm(), norm_t=self.embed_t.weight.norm())


def main(args: Args) -> float:
    run = Run(__file__, args)  # prints the result and exits if this run is already finished
    train, test = load_data(args)
    teacher = load_teacher(run, test)  # frozen, in eval mode

    torch.manual_seed(args.seed)  # the same initial student for every method
    student = build(args.student, train.classes, args.device)
    cc = CC(feature_shapes(student, train.size).pooled, feature_shapes(teacher, train.size).pooled)
    trained = nn.ModuleDict(dict(student=student, cc=cc)).to(args.device)  # optimized and checkpointed
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
        loss_cc = cc(features_s.pooled, features_t.pooled)
        loss = args.ce_weight * loss_ce + args.kd_weight * loss_kd + args.cc_weight * loss_cc

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return dict(loss=loss, ce=loss_ce, kd=loss_kd, cc=loss_cc, accuracy=(z_s.argmax(1) == y).float().mean())

    for epoch in run.epochs(args.epochs, trained=trained, optimizer=optimizer, scheduler=scheduler):  # resumes and saves
        trained.train()
        meter = run.meter(len(train))  # sums on the device, read once per epoch
        for x, y, index in train.epoch(epoch):
            meter.add(step(x, y, index), len(y))
        run.log(epoch, train=meter.mean(), test=accuracy(student, test), **cc.norms())
        scheduler.step()
    return run.finish(student, teacher)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
