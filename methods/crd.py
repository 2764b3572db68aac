"""CRD: Contrastive Representation Distillation. Tian, Krishnan and Isola, 2020, arXiv 1910.10699.

An image's student vector must pick the same image's teacher vector among those of thousands of images of other classes, and
the other way round. Two banks keep one vector of every training image, one bank for each network.

    e_s, e_t  = normalised linear projections of the pooled features f_s, f_t                             Eq. 1
    u_ij      = exp(<e_s,i, m_t,j> / tau) / Z_s,   m_t the teacher's bank                                 Eq. 2
    h(u)      = u / (u + K / N),   K negatives an image, N training images                                Eq. 3
    L_s       = -mean over i of [ ln h(u_ii) + sum over the negatives j of i of ln(1 - h(u_ij)) ]         Eq. 4
    m_i       = normalised c * m_i + (1 - c) * e_i, in both banks, after the losses                       Eq. 5
    L         = r * CE + a * T^2 * KL(p_t || p_s) + beta * (L_s + L_t),   L_t with the roles swapped      Eq. 6

r = 1, a = 0, beta = 0.8, tau = 0.07, K = 16384, c = 0.5; a = 1 makes CRD+KD. Z is N times the mean of the first batch's
exponentials, and constant from then on. The equation numbers are ours.

Differences
- from the paper: Z, and 1e-7 added to the denominators of h and 1 - h, stand in its authors' code alone.
- from its authors' code (HobbitLong/RepDistiller, commit b84f547, crd/, mode exact): negatives are drawn on the device and
  with replacement (there without, by numpy, 45 core-seconds an epoch); a product scores all images and the drawn ones are
  picked (there the drawn vectors are copied, 0.5 GiB a bank); banks and Z are in the checkpoint (there a stop loses them).
- kept although odd: the teacher's projection is trained too; the positive is what the bank holds of the image, an epoch old.

    python methods/crd.py --teacher resnet56 --student resnet20
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from common import Images, Run, accuracy, build, fail, graphed, load_data, load_teacher, shapes


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
    """a, weight of the KD term; 1 for CRD+KD"""
    kd_temperature: float = 4.0
    """T, by which both networks' logits are divided in the KD term"""
    crd_weight: float = 0.8
    """beta, weight of the CRD term"""
    crd_temperature: float = 0.07
    """tau, by which the similarities are divided"""
    negatives: int = 16384
    """K, negatives an image; never more than there are images of other classes"""


def kd_loss(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(p_t || p_s) of logits (B, C): summed over the classes, averaged over the batch."""
    log_p_s = F.log_softmax(z_s / temperature, 1)
    log_p_t = F.log_softmax(z_t / temperature, 1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, log_target=True, reduction="batchmean")


class CRD(nn.Module):
    """The CRD term for pooled features f_s (B, d_s) and f_t (B, d_t); both projections are trained, banks and Z are buffers."""

    def __init__(self, d_s: int, d_t: int, images: int, temperature: float = 0.07, momentum: float = 0.5, width: int = 128):
        super().__init__()
        self.project_s = nn.Linear(d_s, width)
        self.project_t = nn.Linear(d_t, width)
        bound = (3 / width) ** 0.5
        for side in "st":
            self.register_buffer(f"bank_{side}", torch.empty(images, width).uniform_(-bound, bound))
            self.register_buffer(f"constant_{side}", torch.zeros(()))  # Z, 0 until the first batch sets it
        self.temperature, self.momentum = temperature, momentum

    def forward(self, f_s: Tensor, f_t: Tensor, index: Tensor, negatives: Tensor) -> Tensor:
        """`index` (B,) and `negatives` (B, K) are rows of the banks: the images themselves and those to tell them from."""
        e_s = F.normalize(self.project_s(f_s), dim=1)  # Eq. 1
        e_t = F.normalize(self.project_t(f_t), dim=1)  # Eq. 1
        rows = torch.cat([index[:, None], negatives], 1)  # the positive first
        loss = self.contrast(e_s, self.bank_t, self.constant_s, rows) + self.contrast(e_t, self.bank_s, self.constant_t, rows)
        with torch.no_grad():
            for bank, e in (self.bank_s, e_s), (self.bank_t, e_t):
                bank[index] = F.normalize(self.momentum * bank[index] + (1 - self.momentum) * e, dim=1)  # Eq. 5
        return loss

    def contrast(self, e: Tensor, bank: Tensor, constant: Tensor, rows: Tensor, eps: float = 1e-7) -> Tensor:
        """L_s or L_t of vectors e (B, width) and, for each, the `rows` (B, 1 + K) of the other network's bank."""
        similarity = e @ bank.clone().T  # of a copy: the bank changes before the backward pass, which needs what was scored
        scores = (similarity.gather(1, rows) / self.temperature).exp()
        constant.copy_(torch.where(constant > 0, constant, scores.detach().mean() * len(bank)))
        u = scores / constant  # Eq. 2
        chance = (rows.shape[1] - 1) / len(bank)
        log_h = (u[:, 0] / (u[:, 0] + chance + eps)).log()  # Eq. 3
        log_not_h = (chance / (u[:, 1:] + chance + eps)).log()  # Eq. 3
        return -(log_h + log_not_h.sum(1)).mean()  # Eq. 4


def with_negatives(batches: Iterator[tuple[Tensor, ...]], train: Images, k: int) -> Iterator[tuple[Tensor, ...]]:
    """The batches, and with each k negatives an image (B, k): any image of another class, each as likely, with replacement."""
    by_class = train.labels.argsort(stable=True)  # a class is a block here, and what is drawn skips the image's own
    size = train.labels.bincount()
    start = size.cumsum(0) - size
    generator = torch.Generator(by_class.device)
    for x, y, index in batches:
        generator.manual_seed(int(torch.randint(2**62, (), generator=train.generator)))
        own, first = size[y][:, None], start[y][:, None]
        place = (torch.rand(len(y), k, dtype=torch.float64, generator=generator, device=y.device) * (len(by_class) - own)).long()
        yield x, y, index, by_class[torch.where(place < first, place, place + own)]


def main(args: Args) -> float:
    if min(args.crd_temperature, args.negatives) <= 0:
        fail(f"--crd-temperature {args.crd_temperature:g} and --negatives {args.negatives} must be above 0", 2)
    run = Run(__file__, args)  # a run that is already finished prints its result and ends here
    train, test = load_data(args)
    teacher = load_teacher(args, test)  # frozen, in eval mode

    torch.manual_seed(args.seed)  # right before the student: the same student for every teacher and method
    student = build(args.student, train.classes, args.device)
    crd = CRD(shapes(student).pooled, shapes(teacher).pooled, len(train), args.crd_temperature).to(args.device)
    k = min(args.negatives, len(train) - int(train.labels.bincount().max()))
    print(f"banks       {2 * crd.bank_s.nbytes / 2**20:.1f} MiB on {args.device}, {k:,} negatives an image", flush=True)
    trained = nn.ModuleDict(dict(student=student, crd=crd))  # what the optimiser trains and a checkpoint holds
    optimizer = SGD(trained.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=True)
    schedule = MultiStepLR(optimizer, args.milestones, gamma=0.1)

    @graphed
    def step(x, y, index, negatives):
        with torch.no_grad():
            z_t, features_t = teacher(x)
        z_s, features_s = student(x)

        loss = args.ce_weight * F.cross_entropy(z_s, y)
        loss = loss + args.kd_weight * kd_loss(z_s, z_t, args.kd_temperature)
        loss = loss + args.crd_weight * crd(features_s.pooled, features_t.pooled, index, negatives)  # Eq. 6

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return torch.stack([loss.detach() * len(y), (z_s.argmax(1) == y).sum()])

    for epoch in run.epochs(args.epochs, trained=trained, optimizer=optimizer, schedule=schedule):
        trained.train()
        sums = sum(step(*batch) for batch in with_negatives(train.epoch(epoch), train, k))
        run.log(epoch, sums / len(train), accuracy(student, test), schedule)
        schedule.step()
    return run.finish(student, teacher)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
