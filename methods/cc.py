"""CC: Correlation Congruence for Knowledge Distillation. Peng, Jin, Liu, Zhou, Wu, Liu, Li and Zhang, 2019, arXiv 1904.01802.

Not only each image's features but also the relations between images are to be passed on. In the variant behind the
published CIFAR-100 numbers, two neighbouring images must not miss the teacher in the same components of the embedding.

    d_i  = |e_s(f_s,i) - e_t(f_t,i)|,   e_s and e_t linear to 128 numbers, both trained         Eq. 1
    L_cc = mean over i < B of the inner product of d_i and d_i+1                                Eq. 2
    L    = r * CE + a * T^2 * KL(p_t || p_s) + beta * L_cc                                      Eq. 3

r = 1, a = 0, beta = 0.02, f the pooled features, i the place in the shuffled batch. The equation numbers are ours.

Differences
- from the paper: another loss. The paper compares the two networks' B x B matrices of Gaussian kernels (in KD-Zoo's code by
  Taylor series of order 2 and mean squared difference). Here is what RepDistiller runs, which says it has it from its authors.
- from RepDistiller's code (HobbitLong/RepDistiller, commit b84f547, distiller_zoo/CC.py): none.
- kept although odd: L_cc is zero, and teaches nothing, once e_s and e_t are the same constant, so the norms of their weights
  are logged; and it is not zero for a student equal to the teacher, as e_s and e_t start differently.

    python methods/cc.py --teacher resnet56 --student resnet20
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
    """a, weight of the KD term"""
    kd_temperature: float = 4.0
    """T, by which both networks' logits are divided in the KD term"""
    cc_weight: float = 0.02
    """beta, weight of the correlation term"""


def kd_loss(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(p_t || p_s) of logits (B, C): summed over the classes, averaged over the batch."""
    log_p_s = F.log_softmax(z_s / temperature, 1)
    log_p_t = F.log_softmax(z_t / temperature, 1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, log_target=True, reduction="batchmean")


class CC(nn.Module):
    """The correlation term for pooled features f_s (B, d_s) and f_t (B, d_t); both embeddings are trained."""

    def __init__(self, d_s: int, d_t: int, width: int = 128):
        super().__init__()
        self.embed_s = nn.Linear(d_s, width)
        self.embed_t = nn.Linear(d_t, width)

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        d = (self.embed_s(f_s) - self.embed_t(f_t)).abs()  # Eq. 1
        return (d[:-1] * d[1:]).sum(1).mean()  # Eq. 2

    def norms(self) -> dict[str, Tensor]:
        """Of the embeddings' weights: where both go to 0, the loss vanishes and teaches nothing."""
        return dict(norm_s=self.embed_s.weight.norm(), norm_t=self.embed_t.weight.norm())


def main(args: Args) -> float:
    run = Run(__file__, args)  # a run that is already finished prints its result and ends here
    train, test = load_data(args)
    teacher = load_teacher(args, test)  # frozen, in eval mode

    torch.manual_seed(args.seed)  # right before the student: the same student for every teacher and method
    student = build(args.student, train.classes, args.device)
    cc = CC(shapes(student).pooled, shapes(teacher).pooled).to(args.device)
    trained = nn.ModuleDict(dict(student=student, cc=cc))  # what the optimiser trains and a checkpoint holds
    optimizer = SGD(trained.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=True)
    schedule = MultiStepLR(optimizer, args.milestones, gamma=0.1)

    @graphed
    def step(x, y, index):
        with torch.no_grad():
            z_t, features_t = teacher(x)
        z_s, features_s = student(x)

        loss = args.ce_weight * F.cross_entropy(z_s, y)
        loss = loss + args.kd_weight * kd_loss(z_s, z_t, args.kd_temperature)
        loss = loss + args.cc_weight * cc(features_s.pooled, features_t.pooled)  # Eq. 3

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return torch.stack([loss.detach() * len(y), (z_s.argmax(1) == y).sum()])

    for epoch in run.epochs(args.epochs, trained=trained, optimizer=optimizer, schedule=schedule):
        trained.train()
        sums = sum(step(*batch) for batch in train.epoch(epoch))
        run.log(epoch, sums / len(train), accuracy(student, test), schedule, **cc.norms())
        schedule.step()
    return run.finish(student, teacher)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
