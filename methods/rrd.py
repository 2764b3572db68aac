"""RRD: Relational Representation Distillation. Giakoumoglou and Stathaki, 2024, arXiv 2407.12073.

A queue holds the teacher's vectors of the most recent images. Each network's similarities between a new image and the queue form
a distribution, and the student's must match the teacher's. No image is singled out as the positive, so similar images need not
be pushed apart.

    e_s, e_t = normalize(W_s f_s), normalize(W_t f_t)       f: pooled features; W_s is learned, W_t is random and fixed
    P_ij     = softmax_j(<e_t_i, q_j> / temperature_t)      q: the queue
    S_ij     = softmax_j(<e_s_i, q_j> / temperature_s)
    L_rrd    = -mean_i sum_j P_ij log S_ij                  afterwards, the batch's e_t replace the oldest q
    KD       = T^2 mean_i KL(p_t || p_s),   p = softmax(z / T),   T = kd_temperature
    L        = ce_weight CE + kd_weight KD + rrd_weight L_rrd

Taken from the authors' 2024 code, giakoumoglou/distillers@72aa7d7. Published: resnet56/resnet20 70.71, with KD 72.19 (README of
September 2024). Their 2025 code, giakoumoglou/rrd@83cefda, has no CIFAR-100 numbers and does the opposite: the batch enters the
queue first, so an image's own vector is among the q, and the teacher's distribution is the sharper one. To run that version:
    python methods/rrd.py --enqueue-first --temperature-s 0.1 --temperature-t 0.02
Differences
- from the paper: checked against the abstract only.
- from the code: the incomplete last batch of an epoch is kept; the queue accepts any batch size, not only divisors of its length.
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
    """weight of the KD term; 1 gives RRD+KD"""
    kd_temperature: Positive = 4.0
    """softmax temperature of the KD term"""
    rrd_weight: float = 1.0
    """weight of the RRD term"""
    temperature_s: Positive = 0.04
    """temperature of the student's similarities"""
    temperature_t: Positive = 0.1
    """temperature of the teacher's similarities"""
    queue_size: PositiveInt = 16384
    """number of teacher vectors in the queue"""
    enqueue_first: bool = False
    """add the batch to the queue before the distributions are computed, as in the 2025 code, instead of after"""


def kd_loss(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """T^2 KL(p_t || p_s) of logits (B, C), summed over classes, averaged over the batch."""
    log_p_s = F.log_softmax(z_s / temperature, dim=1)
    log_p_t = F.log_softmax(z_t / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, log_target=True, reduction="batchmean")


class RRD(nn.Module):
    """L_rrd of pooled features f_s (B, dim_s) and f_t (B, dim_t), and the entropy of P, below which L_rrd cannot fall.

    The queue is a buffer so that checkpoints include it.
    """

    def __init__(
        self, dim_s: int, dim_t: int, size: int, temperature_s: float, temperature_t: float, enqueue_first: bool, dim: int = 128
    ):
        super().__init__()
        self.project_s = nn.Linear(dim_s, dim)  # W_s
        self.project_t = nn.Linear(dim_t, dim).requires_grad_(False)  # W_t: random and fixed; as released, it gets no gradient
        # Normalized along the wrong axis, as released: norms are about 0.09 until the first batches have replaced all vectors.
        self.register_buffer("queue", F.normalize(torch.randn(size, dim), dim=0))  # q
        self.register_buffer("oldest", torch.tensor(0))  # a tensor, since a CUDA graph would freeze a Python number
        self.temperature_s, self.temperature_t, self.enqueue_first = temperature_s, temperature_t, enqueue_first

    def forward(self, f_s: Tensor, f_t: Tensor) -> tuple[Tensor, Tensor]:
        e_s = F.normalize(self.project_s(f_s), dim=1)
        e_t = F.normalize(self.project_t(f_t), dim=1)
        if self.enqueue_first:
            self.enqueue(e_t)
        queue = self.queue.clone()  # the backward pass needs the queue as it was before `enqueue`
        log_p = F.log_softmax(e_t @ queue.T / self.temperature_t, dim=1)
        log_s = F.log_softmax(e_s @ queue.T / self.temperature_s, dim=1)
        if not self.enqueue_first:
            self.enqueue(e_t)
        loss = -(log_p.exp() * log_s).sum(1).mean()  # L_rrd
        entropy = -(log_p.exp() * log_p).sum(1).mean()
        return loss, entropy

    @torch.no_grad()
    def enqueue(self, e_t: Tensor) -> None:
        """Replace the oldest vectors with e_t (B, dim)."""
        e_t = e_t[-len(self.queue) :]  # if the batch is larger than the queue, only its last vectors are kept
        places = (self.oldest + torch.arange(len(e_t), device=e_t.device)) % len(self.queue)
        self.queue[places] = e_t
        self.oldest.copy_((self.oldest + len(e_t)) % len(self.queue))


def main(args: Args) -> float:
    run = Run(__file__, args)  # prints the result and exits if this run is already finished
    train, test = load_data(args)
    teacher = load_teacher(run, test)  # frozen, in eval mode

    torch.manual_seed(args.seed)  # the same initial student for every method
    student = build(args.student, train.classes, args.device)
    dim_s, dim_t = feature_shapes(student, train.size).pooled, feature_shapes(teacher, train.size).pooled
    rrd = RRD(dim_s, dim_t, args.queue_size, args.temperature_s, args.temperature_t, args.enqueue_first)
    trained = nn.ModuleDict(dict(student=student, rrd=rrd)).to(args.device)  # optimized and checkpointed
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
        loss_rrd, entropy = rrd(features_s.pooled, features_t.pooled)
        loss = args.ce_weight * loss_ce + args.kd_weight * loss_kd + args.rrd_weight * loss_rrd

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right = (z_s.argmax(1) == y).float().mean()
        return dict(loss=loss, ce=loss_ce, kd=loss_kd, rrd=loss_rrd, rrd_excess=loss_rrd - entropy, accuracy=right)

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
