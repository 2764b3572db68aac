"""R2KD: Robustness-Reinforced Knowledge Distillation with Correlation Distance and Network Pruning.
Kim, Ham, Cho and Kim, 2023, arXiv 2311.13934.

The teacher's logits are mixed with those of its pruned copy. The student's must correlate with them in value (within an image
and, over the batch, within a class) and in rank, on the batch x and again on an augmented copy x', whose labels are not used.

    z_t     = teacher_mix z(teacher) + (1 - teacher_mix) z(pruned)     pruned: the teacher without its smallest weights
    KD      = T^2 mean_i KL(p_t || p_s),   p = softmax(z / T),   T = kd_temperature
    L_value = T^2 (1 - mean_rows cos(p_s, p_t) + 1 - mean_columns cos(p_s, p_t)),   cos(a, b) = <a, b> / (|a| |b| + 1e-8)
    L_rank  = 1 - mean_rows cos(R_s - mean R_s, R_t - mean R_t)
    R_k     = rank of z_k, or the soft rank 1/2 + sum_l sigmoid((z_k - z_l) / (T rank_temperature)), over the sum of all ranks
    L       = ce_weight CE(x) + sum over x and x' of (kd_weight KD + value_weight L_value + rank_weight L_rank)

Taken from the authors' code (Seonghak35/R2KD@ece240e) with its default weights (no CIFAR-100 configuration). As released, the
pruned teacher stays in train mode (--pruned-bn batch), and hard ranks give L_rank no gradient. Published (its first author's
leaderboard, probably best epochs): vgg13/vgg8 75.26 without x', 76.40 with cutmix; resnet32x4/resnet8x4 77.01 and 77.70.
Differences
- from the paper: checked against the abstract only; soft ranks, the KD term and runs without x' or without pruning are ours.
- from the code: the last epoch, not the best on the test set, is reported; cutmixpick is MingSun-Tse/Good-DA-in-KD@75443f9's.
"""

import sys
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.distributions import Beta
from torch.nn.utils import prune
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from common import DistillArgs, NonNegative, Positive, Run, Share, accuracy, build, cuda_graph, load_data, load_teacher


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
    """weight of the cross-entropy with the labels, on x only"""
    kd_weight: float = 0.0
    """weight of the KD term; with value_weight and rank_weight at 0, it shows what the augmentation does for plain KD"""
    kd_temperature: Positive = 4.0
    """T, softmax temperature of all terms except the cross-entropy"""
    value_weight: float = 2.0
    """weight of the value term"""
    rank_weight: float = 2.0
    """weight of the rank term, which has no gradient unless --rank-temperature is above 0"""
    rank_temperature: NonNegative = 0.0
    """softness of the ranks; 0 gives hard ranks, as released; 0.1 is a starting point for soft ones"""
    teacher_mix: Share = 0.7
    """weight of the teacher's logits; the pruned teacher's get the rest"""
    prune_rate: Share = 0.1
    """share of each layer's weights, the smallest ones, set to 0 in the pruned teacher"""
    pruned_bn: Literal["batch", "running"] = "batch"
    """statistics in the pruned teacher's batch norms: the batch's, as released, or the teacher's running ones"""
    augment: Literal["none", "mixup", "cutmix", "cutmixpick", "cutout", "autoaugment"] = "cutmix"
    """augmentation for x' (cutmixpick: the 64 images with the highest teacher entropy from two cutmix batches); none: no x'"""


def kd_loss(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """T^2 KL(p_t || p_s) of logits (B, C), summed over classes, averaged over the batch."""
    log_p_s = F.log_softmax(z_s / temperature, dim=1)
    log_p_t = F.log_softmax(z_t / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, log_target=True, reduction="batchmean")


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of each row of a and b (N, D): not centered, although the paper speaks of correlation."""
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)


def value_loss(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """L_value of logits (B, C). The released code uses |cos|, which equals cos here because probabilities are positive."""
    p_s, p_t = F.softmax(z_s / temperature, dim=1), F.softmax(z_t / temperature, dim=1)
    within_image, within_class = 1 - cosine(p_s, p_t).mean(), 1 - cosine(p_s.T, p_t.T).mean()
    return temperature**2 * (within_image + within_class)


def ranks(z: Tensor, softness: float) -> Tensor:
    """R - mean R in each row of z (B, C); hard ranks if `softness` is 0."""
    rank = 1 + z.argsort(1).argsort(1).to(z.dtype)  # hard: no gradient
    if softness > 0:
        rank = 0.5 + ((z[:, :, None] - z[:, None, :]) / softness).sigmoid().sum(2)
    return (rank - rank.mean(1, keepdim=True)) / (z.shape[1] * (z.shape[1] + 1) / 2)  # scale matters only beside the 1e-8 in cos


def rank_loss(z_s: Tensor, z_t: Tensor, softness: float) -> Tensor:
    """L_rank of logits (B, C)."""
    return 1 - cosine(ranks(z_s, softness), ranks(z_t, softness)).mean()


def pruned(net: nn.Module, rate: float, bn: str) -> nn.Module:
    """A copy of `net`, in eval mode, with each convolution's and linear layer's smallest weights, a share `rate`, set to 0."""
    net = deepcopy(net).eval().to(memory_format=torch.contiguous_format)  # a torchvision copy is in train mode; prune needs this
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            prune.remove(prune.l1_unstructured(module, "weight", rate), "weight")  # prunes, then makes it an ordinary parameter
        if isinstance(module, nn.BatchNorm2d) and bn == "batch":
            module.running_mean = module.running_var = None  # without them, the batch's statistics are used in eval mode too
    return net.to(memory_format=torch.channels_last)


def pick(x: Tensor, z: Tensor, keep: int) -> Tensor:
    """The `keep` images of x (B, C, H, W), or all if there are fewer, whose logits z (B, C) have the highest entropy."""
    return x[torch.special.entr(F.softmax(z, dim=1)).sum(1).argsort()[-keep:]]


def augment(kind: str, x: Tensor, dataset: str, train, teacher: nn.Module) -> Tensor:
    """x' of a batch x (B, 3, H, H). As released, one draw serves the whole batch."""
    if kind == "cutmixpick":
        pool = torch.cat([augment("cutmix", x, dataset, train, teacher) for _ in range(2)])
        return pick(pool, teacher(pool)[0], keep=64)  # the code scores unmixed images and keeps them all
    if kind == "autoaugment":
        policy = AutoAugmentPolicy.CIFAR10 if dataset.startswith("cifar") else AutoAugmentPolicy.IMAGENET
        return train.normalize(AutoAugment(policy)((255 * train.denormalize(x)).round().to(torch.uint8)))  # the code truncates
    center, other = torch.randint(train.size, (2,)).tolist(), x[torch.randperm(len(x)).to(x.device)]
    if kind == "mixup":
        lam = Beta(0.2, 0.2).sample().item()
        return lam * x + (1 - lam) * other
    side = train.size // 4 if kind == "cutout" else int((1 - Beta(1.0, 1.0).sample().item()) ** 0.5 * train.size)
    rows, columns = (slice(max(c - side // 2, 0), c + side // 2) for c in center)  # a square, clipped at the edges
    x = x.clone()
    x[:, :, rows, columns] = 0 if kind == "cutout" else other[:, :, rows, columns]  # 0 is the mean color
    return x


def main(args: Args) -> float:
    run = Run(__file__, args)  # prints the result and exits if this run is already finished
    train, test = load_data(args)
    teacher = load_teacher(run, test)  # frozen, in eval mode
    teacher_pruned = pruned(teacher, args.prune_rate, args.pruned_bn)  # frozen too

    torch.manual_seed(args.seed)  # the same initial student for every method
    student = build(args.student, train.classes, args.device)
    trained = nn.ModuleDict(dict(student=student)).to(args.device)  # optimized and checkpointed
    lr = args.lr or (0.01 if args.student in ("mobilenetv2", "shufflenetv1", "shufflenetv2") else 0.05)
    optimizer = SGD(trained.parameters(), lr, momentum=args.momentum, weight_decay=args.weight_decay, fused=True)
    milestones = args.milestones or sorted({args.epochs * k // 8 for k in (5, 6, 7)} - {0})
    scheduler = MultiStepLR(optimizer, milestones, gamma=0.1)

    def augmented(x):
        with torch.random.fork_rng(devices=[]):  # Beta and AutoAugment draw from the global generator only
            torch.default_generator.manual_seed(torch.randint(2**62, (), generator=train.generator).item())
            return augment(args.augment, x, args.dataset, train, teacher)

    @cuda_graph
    def step(x, y, index, *x_aug):
        with torch.no_grad():
            z_t = [args.teacher_mix * teacher(v)[0] + (1 - args.teacher_mix) * teacher_pruned(v)[0] for v in (x, *x_aug)]
        z_s = [student(v)[0] for v in (x, *x_aug)]

        loss_ce = F.cross_entropy(z_s[0], y)
        loss_kd = sum(kd_loss(s, t, args.kd_temperature) for s, t in zip(z_s, z_t))
        loss_value = sum(value_loss(s, t, args.kd_temperature) for s, t in zip(z_s, z_t))
        loss_rank = sum(rank_loss(s, t, args.kd_temperature * args.rank_temperature) for s, t in zip(z_s, z_t))
        loss = args.ce_weight * loss_ce + args.kd_weight * loss_kd + args.value_weight * loss_value + args.rank_weight * loss_rank

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        accuracy_x = (z_s[0].argmax(1) == y).float().mean()
        return dict(loss=loss, ce=loss_ce, kd=loss_kd, value=loss_value, rank=loss_rank, accuracy=accuracy_x)

    for epoch in run.epochs(args.epochs, trained=trained, optimizer=optimizer, scheduler=scheduler):  # resumes and saves
        trained.train()
        meter = run.meter(len(train))  # sums on the device, read once per epoch
        for x, y, index in train.epoch(epoch):
            x_aug = [] if args.augment == "none" else [augmented(x)]
            meter.add(step(x, y, index, *x_aug), len(y))
        run.log(epoch, train=meter.mean(), test=accuracy(student, test))
        scheduler.step()
    return run.finish(student, teacher)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
