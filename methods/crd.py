"""CRD: Contrastive Representation Distillation. Tian, Krishnan and Isola, 2020, arXiv 1910.10699.

The student's vector of an image must pick out the teacher's vector of the same image from those of thousands of images of other
classes, and vice versa. Two memory banks, one per network, hold a vector for every training image.

    e_s, e_t = normalize(W_s f_s), normalize(W_t f_t)            f: pooled features, the classifier's input
    u_ij     = exp(<e_s_i, m_t_j> / crd_temperature) / Z_s       m_s, m_t: the banks
    Z_s      = N mean_ij exp(<e_s_i, m_t_j> / crd_temperature)   over the first batch, constant from then on
    h(u)     = u / (u + K / N)                                   K = negatives; N: number of training images
    L_s      = -mean_i (log h(u_ii) + sum_j log(1 - h(u_ij)))    j: K images of other classes; L_t: with s and t swapped
    m_s_i   <- normalize((m_s_i + e_s_i) / 2)                    after the losses; m_t_i in the same way
    KD       = T^2 mean_i KL(p_t || p_s),   p = softmax(z / T),   T = kd_temperature
    L        = ce_weight CE + kd_weight KD + crd_weight (L_s + L_t)

Taken from the authors' code, HobbitLong/RepDistiller@b84f547 (crd/, dataset/cifar100.py, mode exact), the source of the published
tables. Published: resnet56/resnet20 71.16 (last epoch), with KD 71.63 (quoted from the paper).
Differences
- from the paper: Z, and the 1e-7 in the denominators of h and 1 - h, appear only in the code.
- from the code: negatives are drawn on the device, not by numpy in loader workers (45 core-seconds per epoch).
- from the code: they are drawn with replacement, not without.
- from the code: one matrix product scores all images; the code copies the negatives' vectors, 0.5 GiB per bank.
- from the code: banks and Z are in the checkpoint, so that a run can resume.
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
from common import DistillArgs, Positive, PositiveInt, Run, accuracy, build, cuda_graph, feature_shapes, load_data, load_teacher


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
    """weight of the KD term; 1 gives CRD+KD"""
    kd_temperature: Positive = 4.0
    """softmax temperature of the KD term"""
    crd_weight: float = 0.8
    """weight of the CRD term"""
    crd_temperature: Positive = 0.07
    """temperature of the similarities"""
    negatives: PositiveInt = 16384
    """negatives per image, drawn from the images of other classes"""


def kd_loss(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """T^2 KL(p_t || p_s) of logits (B, C), summed over classes, averaged over the batch."""
    log_p_s = F.log_softmax(z_s / temperature, dim=1)
    log_p_t = F.log_softmax(z_t / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, log_target=True, reduction="batchmean")


class CRD(nn.Module):
    """L_s + L_t of pooled features f_s (B, dim_s) and f_t (B, dim_t). Banks and Z are buffers, so that checkpoints hold them."""

    def __init__(self, dim_s: int, dim_t: int, images: int, temperature: float, momentum: float = 0.5, dim: int = 128):
        super().__init__()
        self.project_s = nn.Linear(dim_s, dim)  # W_s
        self.project_t = nn.Linear(dim_t, dim)  # W_t: trained, although the teacher is not
        bound = (3 / dim) ** 0.5
        self.register_buffer("bank_s", torch.empty(images, dim).uniform_(-bound, bound))  # m_s
        self.register_buffer("bank_t", torch.empty(images, dim).uniform_(-bound, bound))  # m_t
        self.register_buffer("Z_s", torch.tensor(0.0))  # 0 until the first batch sets it
        self.register_buffer("Z_t", torch.tensor(0.0))
        self.temperature, self.momentum = temperature, momentum

    def forward(self, f_s: Tensor, f_t: Tensor, index: Tensor, negatives: Tensor) -> Tensor:
        """`index` (B,) and `negatives` (B, K): bank rows of the images and of their negatives."""
        e_s = F.normalize(self.project_s(f_s), dim=1)
        e_t = F.normalize(self.project_t(f_t), dim=1)
        rows = torch.cat([index[:, None], negatives], dim=1)  # the positive comes first: the bank's vector, one epoch old
        loss_s = self.contrast(e_s, self.bank_t, self.Z_s, rows)  # L_s
        loss_t = self.contrast(e_t, self.bank_s, self.Z_t, rows)  # L_t
        self.update(self.bank_s, e_s, index)
        self.update(self.bank_t, e_t, index)
        return loss_s + loss_t

    def contrast(self, e: Tensor, bank: Tensor, Z: Tensor, rows: Tensor, eps: float = 1e-7) -> Tensor:
        """L_s or L_t of vectors e (B, dim) against `rows` (B, 1 + K) of the other network's bank."""
        similarity = e @ bank.clone().T  # cloned: the backward pass needs the bank as it was before the update
        exp = (similarity.gather(1, rows) / self.temperature).exp()
        Z.copy_(torch.where(Z > 0, Z, exp.detach().mean() * len(bank)))  # set by the first batch, constant from then on
        u, noise = exp / Z, (rows.shape[1] - 1) / len(bank)  # u, K / N
        log_h = (u[:, 0] / (u[:, 0] + noise + eps)).log()  # log h(u_ii)
        log_not_h = (noise / (u[:, 1:] + noise + eps)).log()  # log(1 - h(u_ij))
        return -(log_h + log_not_h.sum(1)).mean()

    @torch.no_grad()
    def update(self, bank: Tensor, e: Tensor, index: Tensor) -> None:
        """Update a network's bank by a moving average with its vectors e (B, dim)."""
        bank[index] = F.normalize(self.momentum * bank[index] + (1 - self.momentum) * e, dim=1)


class NegativeSampler:
    """Draws images of other classes, uniformly and with replacement, on the device of the labels (N,)."""

    def __init__(self, labels: Tensor, generator: torch.Generator):
        self.by_class = labels.argsort(stable=True)  # positions in the training set, sorted by class
        self.size = labels.bincount()  # images per class
        self.first = self.size.cumsum(0) - self.size  # where each class begins in by_class
        self.generator = generator

    def draw(self, y: Tensor, k: int) -> Tensor:
        """Training-set positions (B, k) of negatives for images with labels y (B,)."""
        size, first = self.size[y][:, None], self.first[y][:, None]
        seed = int(torch.randint(2**62, (), generator=self.generator))
        generator = torch.Generator(y.device).manual_seed(seed)
        uniform = torch.rand(len(y), k, dtype=torch.float64, generator=generator, device=y.device)
        position = (uniform * (len(self.by_class) - size)).long()
        return self.by_class[torch.where(position < first, position, position + size)]  # skips the image's own class


def main(args: Args) -> float:
    run = Run(__file__, args)  # prints the result and exits if this run is already finished
    train, test = load_data(args)
    teacher = load_teacher(run, test)  # frozen, in eval mode

    torch.manual_seed(args.seed)  # the same initial student for every method
    student = build(args.student, train.classes, args.device)
    dim_s, dim_t = feature_shapes(student, train.size).pooled, feature_shapes(teacher, train.size).pooled
    crd = CRD(dim_s, dim_t, len(train), args.crd_temperature)
    sampler = NegativeSampler(train.labels, train.generator)
    trained = nn.ModuleDict(dict(student=student, crd=crd)).to(args.device)  # optimized and checkpointed
    lr = args.lr or (0.01 if args.student in ("mobilenetv2", "shufflenetv1", "shufflenetv2") else 0.05)
    optimizer = SGD(trained.parameters(), lr, momentum=args.momentum, weight_decay=args.weight_decay, fused=True)
    milestones = args.milestones or sorted({args.epochs * k // 8 for k in (5, 6, 7)} - {0})
    scheduler = MultiStepLR(optimizer, milestones, gamma=0.1)

    @cuda_graph
    def step(x, y, index, negatives):
        with torch.no_grad():
            z_t, features_t = teacher(x)
        z_s, features_s = student(x)

        loss_ce = F.cross_entropy(z_s, y)
        loss_kd = kd_loss(z_s, z_t, args.kd_temperature)
        loss_crd = crd(features_s.pooled, features_t.pooled, index, negatives)
        loss = args.ce_weight * loss_ce + args.kd_weight * loss_kd + args.crd_weight * loss_crd

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return dict(loss=loss, ce=loss_ce, kd=loss_kd, crd=loss_crd, accuracy=(z_s.argmax(1) == y).float().mean())

    for epoch in run.epochs(args.epochs, trained=trained, optimizer=optimizer, scheduler=scheduler):  # resumes and saves
        trained.train()
        meter = run.meter(len(train))  # sums on the device, read once per epoch
        for x, y, index in train.epoch(epoch):
            negatives = sampler.draw(y, args.negatives)
            meter.add(step(x, y, index, negatives), len(y))
        run.log(epoch, train=meter.mean(), test=accuracy(student, test))
        scheduler.step()
    return run.finish(student, teacher)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
