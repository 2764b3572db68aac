"""R2KD: Robustness-Reinforced Knowledge Distillation with Correlation Distance and Network Pruning.
Kim, Ham, Cho and Kim, 2023, arXiv 2311.13934.

The student matches the softened probabilities of a teacher mixed with a pruned copy of itself: within each image, within each
class over the batch, and in rank. It does so again on an augmented copy x' of the batch, whose labels are not used.

    z_t     = p T(x) + (1 - p) T'(x),   T' is T without its smallest weights                             Eq. 1
    C(a, b) = <a, b> / (|a| |b| + 1e-8)                                                                  Eq. 2
    L_value = T^2 (1 - mean_rows |C(q_s, q_t)| + 1 - mean_columns |C(q_s, q_t)|),   q = softmax(z / T)    Eq. 3
    R_i     = rank of z_i from 1 to C; soft: 1/2 + sum_j sigmoid((z_i - z_j) / (T rho)), j = i too        Eq. 4
    L_rank  = 1 - mean_rows C(R_s - mean R_s, R_t - mean R_t),   R over 1 + 2 + ... + C                   Eq. 5
    L       = r CE(x) + sum over x and x' of (a T^2 KL(p_t || p_s) + w_v L_value + w_r L_rank)            Eq. 6

r = 1, a = 0, T = 4, w_v = w_r = 2, p = 0.7. The equation numbers are ours. Read in the authors' code, but for what is ours below.

Differences
- from the paper: not compared. Soft ranks (rho above 0) and the KD term, for comparison, are ours.
- from the authors' code (Seonghak35/R2KD, commit ece240e, mdistiller/distillers/R2KD.py): the pruned teacher is in eval mode;
  theirs stays in train mode, so its statistics drift. cutmixpick keeps, as its inventors do (MingSun-Tse/Good-DA-in-KD, commit
  75443f9), the 64 of two batches of CutMix images that have the highest entropy; theirs scores the images before mixing them,
  in one batch, as -p log p, NaN where p is 0, and keeps all. No x' and no pruning are choices here. The weights are its defaults,
  as it has no configuration for CIFAR-100. The last epoch counts, not the best on the test set.
- kept although odd: hard ranks carry no gradient, so L_rank is a constant; |C| is C; a draw of x' serves the whole batch.

    python methods/r2kd.py --teacher resnet56 --student resnet20
"""

import sys
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

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
from common import Images, Run, accuracy, build, fail, graphed, load_data, load_teacher

AUGMENTATIONS = ("none", "mixup", "cutmix", "cutmixpick", "cutout", "autoaugment")


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
    """a, weight of the KD term; with the two weights below at 0 it shows what the augmentation does for plain KD"""
    kd_temperature: float = 4.0
    """T, by which both networks' logits are divided in all terms but the cross-entropy"""
    value_weight: float = 2.0
    """w_v, weight of the value distances"""
    rank_weight: float = 2.0
    """w_r, weight of the rank distance, which teaches nothing unless --rank-temperature is above 0"""
    rank_temperature: float = 0.0
    """rho, softness of the ranks; 0 takes hard ranks as released, 0.1 is a start for soft ones"""
    prune_rate: float = 0.1
    """share of each layer's weights that the pruned teacher lacks, in [0, 1)"""
    teacher_mix: float = 0.7
    """p, weight of the teacher's logits; the pruned teacher's have 1 - p"""
    augment: str = "cutmix"
    """what makes x': none (there is no x'), mixup, cutmix, cutmixpick, cutout or autoaugment"""


def kd_loss(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(p_t || p_s) of logits (B, C): summed over the classes, averaged over the batch."""
    log_p_s = F.log_softmax(z_s / temperature, 1)
    log_p_t = F.log_softmax(z_t / temperature, 1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, log_target=True, reduction="batchmean")


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """C of each row of a and b (N, D)."""
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)  # Eq. 2


def ranks(z: Tensor, rho: float) -> Tensor:
    """Ranks in each row of z (B, C), over their sum and less their mean; rho above 0 makes them soft."""
    rank = 1 + z.argsort(1).argsort(1).to(z.dtype)  # Eq. 4, hard: no gradient
    if rho > 0:
        rank = 0.5 + ((z[:, :, None] - z[:, None, :]) / rho).sigmoid().sum(2)  # Eq. 4, soft
    rank = rank / (z.shape[1] * (z.shape[1] + 1) / 2)
    return rank - rank.mean(1, keepdim=True)


def r2kd_loss(z_s: Tensor, z_t: Tensor, temperature: float, w_v: float, w_r: float, rho: float) -> Tensor:
    """w_v * L_value + w_r * L_rank of logits (B, C)."""
    q_s, q_t = F.softmax(z_s / temperature, 1), F.softmax(z_t / temperature, 1)
    value = temperature**2 * (2 - cosine(q_s, q_t).abs().mean() - cosine(q_s.T, q_t.T).abs().mean())  # Eq. 3; abs is inert
    rank = 1 - cosine(ranks(z_s / temperature, rho), ranks(z_t / temperature, rho)).mean()  # Eq. 5
    return w_v * value + w_r * rank


def pruned(net: nn.Module, rate: float) -> nn.Module:
    """A copy of `net` in which the share `rate` of each convolution's and linear layer's weights, the smallest, is 0."""
    net = deepcopy(net).to(memory_format=torch.contiguous_format)  # all that torch.nn.utils.prune can take
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            prune.l1_unstructured(module, "weight", rate)
            prune.remove(module, "weight")  # what remains is a plain weight
    return net.to(memory_format=torch.channels_last)


def mix(kind: str, x: Tensor, other: Tensor, lam: float, centre: list[int]) -> Tensor:
    """x (B, C, H, H) after mixup, cutmix or cutout, given the permutation `other` (B,), mixing factor and square's centre."""
    if kind == "mixup":
        return lam * x + (1 - lam) * x[other]
    half = 4 if kind == "cutout" else int((1 - lam) ** 0.5 * x.shape[2]) // 2  # of the square's side
    rows, columns = (slice(max(place - half, 0), place + half) for place in centre)
    mixed = x.clone()
    mixed[:, :, rows, columns] = 0 if kind == "cutout" else x[other, :, rows, columns]  # 0 is the mean colour
    return mixed


def pick(x: Tensor, z: Tensor, keep: int) -> Tensor:
    """The `keep` images of x (B, C, H, W), or all if there are fewer, whose logits z (B, C) have the highest entropy."""
    log_p = F.log_softmax(z, 1)
    return x[(-log_p.exp() * log_p).sum(1).argsort()[-keep:]]


def views(batches: Iterable, train: Images, kind: str, teacher: nn.Module) -> Iterator[tuple[Tensor, ...]]:
    """Adds x' to (x, y, index) unless `kind` is none; as released, each draw serves the whole batch."""
    mean, std = train.mean[:, None, None].to(train.device), train.std[:, None, None].to(train.device)
    policy = AutoAugment(AutoAugmentPolicy.CIFAR10)  # for CIFAR-100 too

    def augment(kind: str, x: Tensor) -> Tensor:
        if kind == "autoaugment":
            return train.normalise(policy((255 * (x * std + mean)).round().to(torch.uint8)))
        if kind == "cutmixpick":
            pool = torch.cat([augment("cutmix", x), augment("cutmix", x)])
            return pick(pool, teacher(pool)[0], keep=64)  # scores of the mixed images
        shape = 0.2 if kind == "mixup" else 1.0
        lam, centre = Beta(shape, shape).sample().item(), torch.randint(x.shape[2], (2,)).tolist()
        return mix(kind, x, torch.randperm(len(x)).to(x.device, non_blocking=True), lam, centre)

    for x, y, index in batches:
        seed = torch.randint(2**62, (), generator=train.generator).item()
        with torch.random.fork_rng(devices=[]):  # AutoAugment and Beta can only draw from the global state
            torch.default_generator.manual_seed(seed)
            further = [] if kind == "none" else [augment(kind, x)]
        yield x, y, index, *further


def main(args: Args) -> float:
    if args.augment not in AUGMENTATIONS:
        fail(f"--augment {args.augment} is unknown: take one of {', '.join(AUGMENTATIONS)}", 2)
    if not 0 <= args.prune_rate < 1:
        fail(f"--prune-rate {args.prune_rate} must be in [0, 1)", 2)
    if args.rank_weight and not args.rank_temperature:
        print("note: hard ranks have no gradient, so the rank term shifts the loss and teaches nothing", flush=True)
    run = Run(__file__, args)  # a run that is already finished prints its result and ends here
    train, test = load_data(args)
    teacher = load_teacher(args, test)  # frozen, in eval mode
    teacher_pruned = pruned(teacher, args.prune_rate)  # frozen and in eval mode too, unlike the released one

    torch.manual_seed(args.seed)  # right before the student: the same student for every teacher and method
    student = build(args.student, train.classes, args.device)
    trained = nn.ModuleDict(dict(student=student))  # what the optimiser trains and a checkpoint holds
    optimizer = SGD(trained.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=True)
    schedule = MultiStepLR(optimizer, args.milestones, gamma=0.1)

    @graphed
    def step(x, y, index, *augmented):
        z_s, _ = student(x)

        loss = args.ce_weight * F.cross_entropy(z_s, y)
        for view, z in [(x, z_s), *((view, student(view)[0]) for view in augmented)]:
            with torch.no_grad():
                z_t = args.teacher_mix * teacher(view)[0] + (1 - args.teacher_mix) * teacher_pruned(view)[0]  # Eq. 1
            r2kd = r2kd_loss(z, z_t, args.kd_temperature, args.value_weight, args.rank_weight, args.rank_temperature)
            loss = loss + args.kd_weight * kd_loss(z, z_t, args.kd_temperature) + r2kd  # Eq. 6

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return torch.stack([loss.detach() * len(y), (z_s.argmax(1) == y).sum()])

    for epoch in run.epochs(args.epochs, trained=trained, optimizer=optimizer, schedule=schedule):
        trained.train()
        sums = sum(step(*batch) for batch in views(train.epoch(epoch), train, args.augment, teacher))
        run.log(epoch, sums / len(train), accuracy(student, test), schedule)
        schedule.step()
    return run.finish(student, teacher)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
