"""Distilling Invariant Representations with Dual Augmentation. Giakoumoglou and Stathaki, 2024, arXiv 2410.09474.

Status: reconstruction from the abstract, not the authors' settings. Student and teacher see two views of an image and ICD must
hold across them. The student, which is trained, gets the harder view; the teacher one of the kind it was trained on.

    e_s, e_t = normalised linear projections of the pooled features f_s(x_s), f_t(x_t)            Eq. 1
    S_ij     = s <e_s,i, e_t,j> + b,   s = clamp(exp(tau), 0, 10),   tau and b are learned         Eq. 2
    P        = softmax over the rows of S,   Q = softmax over the rows of S transposed             Eq. 3
    L_con    = mean_i -log P_ii                                                                   Eq. 4
    L_inv    = mean_i KL(Q_i || P_i)                                                              Eq. 5
    L        = r * CE(x_s) + a * T^2 * KL(p_t(x_t) || p_s(x_s)) + beta * (L_con + alpha * L_inv)   Eq. 6
    x_s, x_t = A_S(x), A_T(x): crop and flip drawn for each, then by default colour changes on x_s   Eq. 7

Differences
- from the paper: unknown. Its abstract says "different augmentations applied to both models during distillation"; which, how
  strong, on which side and with what weights is ours. On arXiv versions 2 and 3 withdraw it as "Not completed work".
- from the authors' code: none has a second view (giakoumoglou/distillers, commit a2ee80b); the ICD is that of commit 9ba0bfd,
  Eq. 1 to 5, with what is odd in it (the head of methods/icd.py says what). The equation numbers are ours.

    python methods/dual_aug.py --teacher resnet56 --student resnet20
    python methods/dual_aug.py --teacher resnet56 --student resnet20 --student-aug weak --same-view      # plain ICD
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR
from torchvision.transforms.functional import rgb_to_grayscale

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
    """a, weight of the KD term; 1 for ICD+KD"""
    kd_temperature: float = 4.0
    """T, by which both networks' logits are divided in the KD term"""
    icd_weight: float = 1.0
    """beta, weight of the ICD term"""
    alpha: float = 0.5
    """weight of the invariance inside the ICD term"""
    init_tau: float = 1.0
    """logarithm of the logit scale at the start; 0 starts at scale 1, probably what was meant"""
    student_aug: str = "color"
    """A_S, on top of crop and flip: weak (nothing), color (jitter and gray) or cutout (a square of the mean colour)"""
    teacher_aug: str = "weak"
    """A_T, likewise"""
    same_view: bool = False
    """show the teacher the student's view; --teacher-aug then has no effect"""


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


def shift_hue(pixels: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of pixels (B, 3, H, W) in [0, 1] by `shift` (B, 1, 1, 1), in full circles."""
    value, top = pixels.max(1, keepdim=True)
    chroma = value - pixels.amin(1, keepdim=True)
    lead = pixels.gather(1, (top + 1) % 3) - pixels.gather(1, (top + 2) % 3)
    sixths = 2 * top + lead / chroma.clamp(min=1e-6) + 6 * shift  # the hue: red is 0, green 2, blue 4
    distance = (sixths + torch.arange(5, 0, -2, device=pixels.device)[:, None, None]) % 6
    return value - chroma * torch.minimum(distance, 4 - distance).clamp(0, 1)


def color(pixels: Tensor, draws: Tensor, order: list[int]) -> Tensor:
    """Jitter 4 of 5 images, then make 1 of 5 gray: pixels (B, 3, H, W) in [0, 1], `draws` (6, B) uniform in [0, 1).

    An image's own: brightness, contrast and saturation (0.6 to 1.4), hue (-0.1 to 0.1), whether to jitter, whether to make gray.
    """
    brightness, contrast, saturation = 0.6 + 0.8 * draws[:3, :, None, None, None]
    hue, jittered, gray = draws[3:, :, None, None, None]
    operations = [
        lambda x: brightness * x,
        lambda x: rgb_to_grayscale(x).mean((2, 3), keepdim=True).lerp(x, contrast),
        lambda x: rgb_to_grayscale(x).lerp(x, saturation),
        lambda x: shift_hue(x, 0.2 * hue - 0.1),
    ]
    changed = pixels
    for k in order:
        changed = operations[k](changed).clamp(0, 1)
    pixels = torch.where(jittered < 0.8, changed, pixels)
    return torch.where(gray < 0.2, rgb_to_grayscale(pixels), pixels)


def cutout(x: Tensor, draws: Tensor) -> Tensor:
    """Images x (B, C, H, H), in each a square of side 8 set to 0, less what lies outside; `draws` (2, B) in [0, 1) place it."""
    away = torch.arange(x.shape[2], device=x.device) - (draws[:, :, None] * x.shape[2]).floor()
    rows, columns = (away >= -4) & (away < 4)
    return x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


def views(batches: Iterable, train: Images, student_aug: str, teacher_aug: str, same_view: bool) -> Iterator[tuple[Tensor, ...]]:
    """Turns (x, y, index) into (x_s, y, index, x_t). The student's crop and flip are those of x, as in every other method."""
    mean, std = train.mean[:, None, None].to(train.device), train.std[:, None, None].to(train.device)

    def augment(kind: str, x: Tensor, draws: Tensor, order: list[int]) -> Tensor:
        if kind == "color":
            return (color(x * std + mean, draws, order) - mean) / std
        return cutout(x, draws[:2]) if kind == "cutout" else x

    for step, (x, y, index) in enumerate(batches):
        if step == 0:  # any sooner, the generator would not be the epoch's yet
            offsets = train.offsets()
            draws_s, draws_t = torch.rand(2, 6, len(train), generator=train.generator).to(train.device)  # each image's own
        order_s, order_t = torch.rand(2, 4, generator=train.generator).argsort(1).tolist()  # the batch's
        x_s = x_t = augment(student_aug, x, draws_s[:, index], order_s)  # Eq. 7
        if not same_view:
            x_t = augment(teacher_aug, train.normalise(train.crop(index, offsets[:, index])), draws_t[:, index], order_t)  # Eq. 7
        yield x_s, y, index, x_t


def main(args: Args) -> float:
    for flag, kind in ("--student-aug", args.student_aug), ("--teacher-aug", args.teacher_aug):
        if kind not in ("weak", "color", "cutout"):
            fail(f"{flag} {kind} is unknown: take one of weak, color, cutout", 2)
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
    def step(x_s, y, index, x_t):
        with torch.no_grad():
            z_t, features_t = teacher(x_t)
        z_s, features_s = student(x_s)

        loss = args.ce_weight * F.cross_entropy(z_s, y)
        loss = loss + args.kd_weight * kd_loss(z_s, z_t, args.kd_temperature)
        loss = loss + args.icd_weight * icd(features_s.pooled, features_t.pooled)  # Eq. 6

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return torch.stack([loss.detach() * len(y), (z_s.argmax(1) == y).sum()])

    for epoch in run.epochs(args.epochs, trained=trained, optimizer=optimizer, schedule=schedule):
        trained.train()
        sums = sum(step(*batch) for batch in views(train.epoch(epoch), train, args.student_aug, args.teacher_aug, args.same_view))
        run.log(epoch, sums / len(train), accuracy(student, test), schedule, scale=icd.scale())
        schedule.step()
    return run.finish(student, teacher)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
