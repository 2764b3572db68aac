"""PKT: Learning Deep Representations with Probabilistic Knowledge Transfer. Passalis and Tefas, 2018, arXiv 1803.10837.

Let every image of a batch choose another one as its neighbour, the likelier the more alike their features are. The student
must choose with the teacher's probabilities. Only similarities within the batch are compared, so the widths need not agree.

    K_ij  = (1 + cos(f_i, f_j)) / 2                                                     Eq. 1
    P_ij  = K_ij / sum over j of K_ij                                                   Eq. 2
    L_pkt = 1 / B^2 * sum over i and j of P_t,ij * ln((P_t,ij + e) / (P_s,ij + e))      Eq. 3
    L     = r * CE + a * T^2 * KL(p_t || p_s) + beta * L_pkt                            Eq. 4

r = 1, a = 0, beta = 30000, e = 1e-7, f the pooled features. Each row of P sums to 1 and B^2 terms are averaged, so L_pkt
falls as 1 / B: beta belongs to batches of 64 images, and the 16 images that end an epoch count four times as much. The
equation numbers are ours.

Differences
- from the paper and its authors' code (passalis/probabilistic_kt, commit a58fd1b, nn/pkt.py): the student is trained by L_pkt
  alone there; the cross-entropy and the weight are RepDistiller's. L_pkt is that of the authors' code.
- from RepDistiller's code (HobbitLong/RepDistiller, commit b84f547, distiller_zoo/PKT.py): none in the loss; a batch size
  other than 64 is warned of.
- kept although odd: an image counts as its own neighbour, with K_ii = 1.

    python methods/pkt.py --teacher resnet56 --student resnet20
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
from common import Run, accuracy, build, graphed, load_data, load_teacher


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
    pkt_weight: float = 30000.0
    """beta, weight of the PKT term"""


def kd_loss(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(p_t || p_s) of logits (B, C): summed over the classes, averaged over the batch."""
    log_p_s = F.log_softmax(z_s / temperature, 1)
    log_p_t = F.log_softmax(z_t / temperature, 1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, log_target=True, reduction="batchmean")


def neighbours(f: Tensor, eps: float) -> Tensor:
    """P of features (B, C): rows of probabilities (B, B), whom each image takes as its neighbour."""
    unit = f / (f.norm(dim=1, keepdim=True) + eps)
    similarity = (1 + unit @ unit.T) / 2  # Eq. 1
    return similarity / similarity.sum(1, keepdim=True)  # Eq. 2


def pkt_loss(f_s: Tensor, f_t: Tensor, eps: float = 1e-7) -> Tensor:
    """The PKT term for pooled features (B, C_s) and (B, C_t)."""
    p_s, p_t = neighbours(f_s, eps), neighbours(f_t, eps)
    return (p_t * ((p_t + eps) / (p_s + eps)).log()).mean()  # Eq. 3


def main(args: Args) -> float:
    if args.batch_size != 64:
        print("note: --pkt-weight was tuned for batches of 64; the term falls as 1 / batch size", flush=True)
    run = Run(__file__, args)  # a run that is already finished prints its result and ends here
    train, test = load_data(args)
    teacher = load_teacher(args, test)  # frozen, in eval mode

    torch.manual_seed(args.seed)  # right before the student: the same student for every teacher and method
    student = build(args.student, train.classes, args.device)
    trained = nn.ModuleDict(dict(student=student))  # what the optimiser trains and a checkpoint holds
    optimizer = SGD(trained.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=True)
    schedule = MultiStepLR(optimizer, args.milestones, gamma=0.1)

    @graphed
    def step(x, y, index):
        with torch.no_grad():
            z_t, features_t = teacher(x)
        z_s, features_s = student(x)

        loss = args.ce_weight * F.cross_entropy(z_s, y)
        loss = loss + args.kd_weight * kd_loss(z_s, z_t, args.kd_temperature)
        loss = loss + args.pkt_weight * pkt_loss(features_s.pooled, features_t.pooled)  # Eq. 4

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return torch.stack([loss.detach() * len(y), (z_s.argmax(1) == y).sum()])

    for epoch in run.epochs(args.epochs, trained=trained, optimizer=optimizer, schedule=schedule):
        trained.train()
        sums = sum(step(*batch) for batch in train.epoch(epoch))
        run.log(epoch, sums / len(train), accuracy(student, test), schedule)
        schedule.step()
    return run.finish(student, teacher)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
