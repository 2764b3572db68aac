"""Distilling Invariant Representations with Dual Augmentation. Giakoumoglou and Stathaki, 2024, arXiv 2410.09474.

Status: a reconstruction from the abstract, not the authors' settings. The full text is public but was not read here. arXiv v2 and
v3 withdraw it as "Not completed work"; v4 (8 pages, 3 tables) is from "a project that we have since discontinued".

Student and teacher see different views of an image, and ICD (methods/icd.py) must hold across them. This restores the two
augmentations of ReLIC (arXiv 2010.07922). The student gets the harder view, the teacher the kind of view it was trained on.

    x_s, x_t = A_s(x), A_t(x)                                         two crops and flips; by default x_s also gets color changes
    e_s, e_t = normalize(W_s f_s(x_s)), normalize(W_t f_t(x_t))       f: pooled features, the classifier's input
    S_ij     = a <e_s_i, e_t_j> + b,   a = min(exp(tau), 10)          W_s, W_t, tau and b are learned
    P, Q     = softmax over the rows of S, of S transposed
    L_con    = mean_i -log P_ii,   L_inv = mean_i KL(Q_i || P_i)
    KD       = T^2 mean_i KL(p_t(x_t) || p_s(x_s)),   p = softmax(z / T),   T = kd_temperature
    L        = ce_weight CE(x_s) + kd_weight KD + icd_weight (L_con + alpha L_inv)

Differences
- from the paper: not compared; all but the abstract's "different augmentations applied to both models" is ours.
- from the authors' code: no version has a second view (giakoumoglou/distillers@a2ee80b); the related methods/crld.py has one.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Generator, Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR
from torchvision.transforms.functional import rgb_to_grayscale

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
    """weight of the KD term; 1 gives ICD+KD"""
    kd_temperature: Positive = 4.0
    """softmax temperature of the KD term"""
    icd_weight: float = 1.0
    """weight of the ICD term; the authors' batches have 64 images: an image's negatives are the rest of its batch"""
    alpha: float = 0.5
    """weight of the invariance within the ICD term"""
    init_tau: float = 1.0
    """initial log of the scale; 0 starts at 1, as in filipbasara0/relic, whose code this follows, and was probably intended"""
    student_aug: Literal["weak", "color", "cutout"] = "color"
    """A_s after crop and flip: weak (nothing else), color (jitter and gray) or cutout (a square of the mean color)"""
    teacher_aug: Literal["weak", "color", "cutout"] = "weak"
    """A_t after crop and flip, same choices"""
    same_view: bool = False
    """show the teacher the student's view (--teacher-aug has no effect); with --student-aug weak this is plain ICD"""


def kd_loss(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """T^2 KL(p_t || p_s) of logits (B, C), summed over classes, averaged over the batch."""
    log_p_s = F.log_softmax(z_s / temperature, dim=1)
    log_p_t = F.log_softmax(z_t / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, log_target=True, reduction="batchmean")


class ICD(nn.Module):
    """L_con and L_inv of pooled features f_s (B, dim_s) and f_t (B, dim_t)."""

    def __init__(self, dim_s: int, dim_t: int, init_tau: float, dim: int = 128, max_scale: float = 10.0):
        super().__init__()
        self.project_s = nn.Linear(dim_s, dim)  # W_s
        self.project_t = nn.Linear(dim_t, dim)  # W_t: trained, although the teacher is not
        self.tau = nn.Parameter(torch.tensor(init_tau))
        self.bias = nn.Parameter(torch.tensor(0.0))  # cancels in the softmax, so it gets no gradient
        self.max_scale = max_scale

    def scale(self) -> Tensor:
        """a, an inverse temperature. Where the clamp is active, tau gets no gradient."""
        return self.tau.exp().clamp(max=self.max_scale)

    def forward(self, f_s: Tensor, f_t: Tensor) -> tuple[Tensor, Tensor]:
        e_s = F.normalize(self.project_s(f_s), dim=1)
        e_t = F.normalize(self.project_t(f_t), dim=1)
        similarity = self.scale() * (e_s @ e_t.T) + self.bias  # S
        log_p = F.log_softmax(similarity, dim=1)
        log_q = F.log_softmax(similarity.T, dim=1)
        contrast = -log_p.diagonal().mean()  # L_con, in one direction only; images of the same class count as negatives
        invariance = F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")  # L_inv, with gradients through P and Q
        return contrast, invariance  # L_con, L_inv


def shift_hue(pixels: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hues of pixels (B, 3, H, W) in [0, 1] by `turns` (B, 1, 1, 1) full turns, like torchvision's adjust_hue.

    Hues lie on a circle of length 6: red at 0, green at 2, blue at 4. A pixel's hue is within 1 of its largest channel, toward
    its second largest. Conversely, a channel has the largest value within 1 of the hue and the smallest beyond 2.
    """
    largest, top = pixels.max(1, keepdim=True)
    chroma = largest - pixels.amin(1, keepdim=True)
    side = (pixels.roll(-1, dims=1) - pixels.roll(-2, dims=1)).gather(1, top)  # next channel on the circle minus the previous one
    hue = 2 * top + side / chroma.clamp(min=1e-6) + 6 * turns
    channel = torch.arange(0, 6, 2, device=pixels.device)[:, None, None]  # where red, green and blue lie
    distance = ((channel - hue + 3) % 6 - 3).abs()  # along the circle, at most 3
    return largest - chroma * (distance - 1).clamp(0, 1)


def color(pixels: Tensor, generator: Generator) -> Tensor:
    """Jitter 4 in 5 images of pixels (B, 3, H, W) in [0, 1], then make 1 in 5 gray: usual values in contrastive learning."""
    uniform = torch.rand(6, len(pixels), 1, 1, 1, generator=generator).to(pixels.device)  # per image; ColorJitter draws per call
    brightness, contrast, saturation = 0.6 + 0.8 * uniform[:3]
    operations = [
        lambda x: brightness * x,
        lambda x: rgb_to_grayscale(x).mean((2, 3), keepdim=True).lerp(x, contrast),
        lambda x: rgb_to_grayscale(x).lerp(x, saturation),
        lambda x: shift_hue(x, 0.2 * uniform[3] - 0.1),
    ]
    jittered = pixels
    for k in torch.randperm(4, generator=generator).tolist():  # one order per batch
        jittered = operations[k](jittered).clamp(0, 1)
    pixels = torch.where(uniform[4] < 0.8, jittered, pixels)
    return torch.where(uniform[5] < 0.2, rgb_to_grayscale(pixels), pixels)


def cutout(x: Tensor, side: int, generator: Generator) -> Tensor:
    """Set a square in each of the images x (B, C, H, H) to 0, the mean color. Near an edge, the square is clipped."""
    center = torch.randint(x.shape[3], (2, len(x), 1), generator=generator).to(x.device)  # row and column
    offset = torch.arange(x.shape[3], device=x.device) - center
    rows, columns = (offset >= -(side // 2)) & (offset < side - side // 2)  # (B, H) each
    return x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


def main(args: Args) -> float:
    run = Run(__file__, args)  # prints the result and exits if this run is already finished
    train, test = load_data(args)
    teacher = load_teacher(run, test)  # frozen, in eval mode

    torch.manual_seed(args.seed)  # the same initial student for every method
    student = build(args.student, train.classes, args.device)
    icd = ICD(feature_shapes(student, train.size).pooled, feature_shapes(teacher, train.size).pooled, args.init_tau)
    trained = nn.ModuleDict(dict(student=student, icd=icd)).to(args.device)  # optimized and checkpointed
    lr = args.lr or (0.01 if args.student in ("mobilenetv2", "shufflenetv1", "shufflenetv2") else 0.05)
    optimizer = SGD(trained.parameters(), lr, momentum=args.momentum, weight_decay=args.weight_decay, fused=True)
    milestones = args.milestones or sorted({args.epochs * k // 8 for k in (5, 6, 7)} - {0})
    scheduler = MultiStepLR(optimizer, milestones, gamma=0.1)

    def augment(kind, x):
        if kind == "color":
            return train.normalize(color(train.denormalize(x), train.generator))
        return cutout(x, train.size // 4, train.generator) if kind == "cutout" else x

    @cuda_graph
    def step(x_s, x_t, y, index):
        with torch.no_grad():
            z_t, features_t = teacher(x_t)
        z_s, features_s = student(x_s)

        loss_ce = F.cross_entropy(z_s, y)
        loss_kd = kd_loss(z_s, z_t, args.kd_temperature)
        loss_con, loss_inv = icd(features_s.pooled, features_t.pooled)
        loss = args.ce_weight * loss_ce + args.kd_weight * loss_kd + args.icd_weight * (loss_con + args.alpha * loss_inv)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return dict(loss=loss, ce=loss_ce, kd=loss_kd, con=loss_con, inv=loss_inv, accuracy=(z_s.argmax(1) == y).float().mean())

    for epoch in run.epochs(args.epochs, trained=trained, optimizer=optimizer, scheduler=scheduler):  # resumes and saves
        trained.train()
        meter = run.meter(len(train))  # sums on the device, read once per epoch
        for x_1, x_2, y, index in train.epoch(epoch, views=2):
            x_s = augment(args.student_aug, x_1)
            x_t = x_s if args.same_view else augment(args.teacher_aug, x_2)
            meter.add(step(x_s, x_t, y, index), len(y))
        run.log(epoch, train=meter.mean(), test=accuracy(student, test), scale=icd.scale())
        scheduler.step()
    return run.finish(student, teacher)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
