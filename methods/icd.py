"""ICD: Invariant Consistency for Knowledge Distillation. Giakoumoglou and Stathaki, 2024, arXiv 2407.11802.

Renamed "Discriminative and Consistent Representation Distillation" (DCD) in v3; the loss in the code is the same. Student and
teacher features are projected to unit vectors. An image's student vector must find the same image's teacher vector among
the batch's (contrast), and the student-to-teacher and teacher-to-student distributions must agree (invariance).

    e_s, e_t = normalised linear projections of the pooled features f_s, f_t                    Eq. 1
    S_ij     = s <e_s,i, e_t,j> + b,   s = clamp(exp(tau), 0, 10),   tau and b are learned       Eq. 2
    P        = softmax over the rows of S,   Q = softmax over the rows of S transposed           Eq. 3
    L_con    = mean_i -log P_ii                                                                 Eq. 4
    L_inv    = mean_i KL(Q_i || P_i)                                                            Eq. 5
    L        = r * CE + a * T^2 * KL(p_t || p_s) + beta * (L_con + alpha * L_inv)                Eq. 6

r = 1, a = 0, beta = 1, alpha = 0.5; a = 1 makes ICD+KD. The equation numbers are ours: the losses and settings come from
the authors' code (giakoumoglou/distillers, commit 9ba0bfd, the last in which ICD runs). The published numbers stand in its
README of 4 September 2024.

Differences
- from the paper: not compared but for its abstract.
- from the authors' code: the last batch of an epoch, 16 images, is kept (they drop it), and seeds are set. Nothing else.
- kept although odd: the bias b changes no softmax, so it learns nothing; tau starts at 1, so s starts at e and not at 1;
  for tau > ln 10 the clamp leaves tau no gradient; the contrast runs in one direction only, and images of the same class
  count as negatives; "parameter-free" means two linear layers and two scalars, all dropped after training.

    python methods/icd.py --teacher resnet56 --student resnet20                    # ICD
    python methods/icd.py --teacher resnet56 --student resnet20 --kd-weight 1      # ICD+KD
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
from common import Run, accuracy, build, graphed, load_data, load_teacher, shapes


@dataclass
class Args:
    teacher: str = "resnet56"
    """the trained network to learn from, a name in common.NETWORKS"""
    student: str = "resnet20"
    """the network to train, a name in common.NETWORKS"""
    dataset: str = "cifar100"
    """cifar100, cifar10, or synthetic (small, nothing to download)"""
    data: Path = Path("data")
    """folder of the data sets"""
    runs: Path = Path("runs")
    """folder in which this run makes its own"""
    seed: int = 1
    """seed of the weights, the order of the images and their views"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cuda, cuda:1, ... or cpu"""
    teacher_weights: Path | None = None
    """checkpoint of the teacher; by default one in teachers/, else a run of methods/vanilla.py, which is started if need be"""
    epochs: int = 240
    """passes over the training images"""
    batch_size: int = 64
    """images a step; the last, smaller batch of an epoch is kept"""
    lr: float | None = None
    """learning rate at the start; by default 0.05, but 0.01 for mobilenetv2, shufflenetv1 and shufflenetv2"""
    milestones: tuple[int, ...] | None = None
    """epochs after which the learning rate falls to a tenth; by default 5/8, 6/8 and 7/8 of all"""
    weight_decay: float = 5e-4
    """on all parameters, those of batch norm and of auxiliary modules too"""
    ce_weight: float = 1.0
    """r, weight of the cross-entropy with the labels"""
    kd_weight: float = 0.0
    """a, weight of the KD term; 1 for ICD+KD"""
    kd_temperature: float = 4.0
    """T, by which both networks' logits are divided in the KD term"""
    icd_weight: float = 1.0
    """beta, weight of the ICD term"""
    alpha: float = 0.5
    """weight of the invariance inside the ICD term"""
    init_tau: float = 1.0
    """logarithm of the logit scale at the start; 0 starts at scale 1, probably what was meant"""


def kd_loss(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(p_t || p_s) of logits (B, C): summed over the classes, averaged over the batch."""
    log_p_s = F.log_softmax(z_s / temperature, 1)
    log_p_t = F.log_softmax(z_t / temperature, 1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, log_target=True, reduction="batchmean")


class ICD(nn.Module):
    """The ICD term for pooled features f_s (B, d_s) and f_t (B, d_t); both projections, tau and b are trained."""

    def __init__(self, d_s: int, d_t: int, alpha: float = 0.5, init_tau: float = 1.0, width: int = 128, max_scale: float = 10.0):
        super().__init__()
        self.project_s = nn.Linear(d_s, width)
        self.project_t = nn.Linear(d_t, width)
        self.tau = nn.Parameter(torch.tensor(init_tau))
        self.bias = nn.Parameter(torch.tensor(0.0))
        self.alpha, self.max_scale = alpha, max_scale

    def scale(self) -> Tensor:
        """s, an inverse temperature."""
        return self.tau.exp().clamp(0, self.max_scale)  # Eq. 2

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        e_s = F.normalize(self.project_s(f_s), dim=1)  # Eq. 1
        e_t = F.normalize(self.project_t(f_t), dim=1)  # Eq. 1
        similarity = self.scale() * e_s @ e_t.T + self.bias  # Eq. 2
        log_p = F.log_softmax(similarity, 1)  # Eq. 3
        log_q = F.log_softmax(similarity.T, 1)  # Eq. 3
        contrast = -log_p.diagonal().mean()  # Eq. 4
        invariance = F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")  # Eq. 5; nothing is detached
        return contrast + self.alpha * invariance


def main(args: Args) -> float:
    if args.batch_size != 64:
        print("note: --icd-weight belongs to batches of 64; an image's negatives are the rest of its batch", flush=True)
    run = Run(__file__, args)  # a run that is already finished prints its result and ends here
    train, test = load_data(args)
    teacher = load_teacher(args, test)  # frozen, in eval mode

    torch.manual_seed(args.seed)  # right before the student: the same student for every teacher and method
    student = build(args.student, train.classes, args.device)
    icd = ICD(shapes(student).pooled, shapes(teacher).pooled, args.alpha, args.init_tau).to(args.device)
    trained = nn.ModuleDict(dict(student=student, icd=icd))  # what the optimiser trains and a checkpoint holds
    optimizer = SGD(trained.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=True)
    schedule = MultiStepLR(optimizer, args.milestones, gamma=0.1)

    @graphed
    def step(x, y, index):
        with torch.no_grad():
            z_t, features_t = teacher(x)
        z_s, features_s = student(x)

        loss = args.ce_weight * F.cross_entropy(z_s, y)
        loss = loss + args.kd_weight * kd_loss(z_s, z_t, args.kd_temperature)
        loss = loss + args.icd_weight * icd(features_s.pooled, features_t.pooled)  # Eq. 6

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return torch.stack([loss.detach() * len(y), (z_s.argmax(1) == y).sum()])

    for epoch in run.epochs(args.epochs, trained=trained, optimizer=optimizer, schedule=schedule):
        trained.train()
        sums = sum(step(*batch) for batch in train.epoch(epoch))
        run.log(epoch, sums / len(train), accuracy(student, test), schedule, scale=icd.scale())
        schedule.step()
    return run.finish(student, teacher)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
