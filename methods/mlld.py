"""MLLD: Multi-Level Logit Distillation. Jin, Wang and Lin, 2023 (CVPR), arXiv: none. Also called MLKD.

Both networks see a weak view of an image (crop and flip) and a strong one (another crop and flip, then RandAugment). The student
matches the teacher's predictions at five temperatures and, on the weak view, the relations between images and between classes.

    KD_T(a)   = T^2 mean_i KL(p_t || p_s),   p = softmax(z(x_a) / T)
    G_T       = ||P_t P_t' - P_s P_s'||^2 / B       P (B, C): p on the weak view;   between images, loss_bc
    H_T       = ||P_t' P_t - P_s' P_s||^2 / C       between classes, loss_cc
    m         = share of the images (for H, classes) on which the teacher's confidence is at most the median: 1/2
    L_kd      = sum_{T, 3, 5, 2, 6} m KD(w) + sum_{T, 3, 5} KD(s) + sum_{2, 6} KD(w)          T = kd_temperature
    L         = ce_weight (CE(x_w) + CE(x_s)) + kd_weight (L_kd + sum_{T, 3, 5, 2, 6} m (G + H))

The loss that the authors' code, Jin-Ying/Multi-Level-Logit-Distillation@5ee473f, executes; the recipe is KD's except for lr 0.025
and the second view, drawn per image from train.generator. Published: resnet56/resnet20 72.19, not comparable (480 epochs).
Differences
- from the paper: not checked.
- from the code: RandAugment of tensors, not PIL images (equal to within one gray level); last epoch reported; runs seeded.
"""

import math
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
from torchvision.transforms.v2.functional import adjust_sharpness, autocontrast, equalize, rgb_to_grayscale

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from common import DistillArgs, Positive, PositiveInt, Run, accuracy, build, cuda_graph, load_data, load_teacher


@dataclass
class Args(DistillArgs):
    teacher: str = "resnet56"
    student: str = "resnet20"
    epochs: int = 240
    batch_size: int = 64
    lr: float | None = None
    """initial learning rate; by default 0.025, or 0.01 for mobilenetv2 and the shufflenets"""
    milestones: tuple[int, ...] = ()
    momentum: float = 0.9
    weight_decay: float = 5e-4
    ce_weight: float = 0.1
    """weight of the cross-entropy with the labels, for each view"""
    kd_weight: float = 0.9
    """weight of all other terms, tuned for batches of 64 because of G"""
    kd_temperature: Positive = 4.0
    """the first of the five temperatures; the others are 2, 3, 5 and 6"""
    mask: Literal["half", "image"] = "half"
    """m: half (as executed), or image (1 up to the median confidence and 0 above it, as was probably intended)"""
    operations: PositiveInt = 2
    """RandAugment operations per image, before its cutout"""


def kd_per_image(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """T^2 KL(p_t || p_s) (B,) of logits (B, C)."""
    log_p_s = F.log_softmax(z_s / temperature, dim=1)
    log_p_t = F.log_softmax(z_t / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, log_target=True, reduction="none").sum(1)


def unsure(confidence: Tensor, mask: str) -> Tensor:
    """m for confidences (N,). The code masks a loss that is already averaged, which multiplies it by the mean of the mask."""
    m = (confidence <= confidence.quantile(0.5)).to(confidence.dtype)
    return m.mean() if mask == "half" else m


def gram_distance(p_s: Tensor, p_t: Tensor) -> Tensor:
    """Squared distances (N,) between the rows of P_t P_t' and P_s P_s' (N, N)."""
    return (p_t @ p_t.T - p_s @ p_s.T).square().sum(1)


def mlld_losses(
    z_sw: Tensor, z_ss: Tensor, z_tw: Tensor, z_ts: Tensor, temperature: float, mask: str
) -> tuple[Tensor, Tensor, Tensor]:
    """L_kd and the sums of m G and m H from the logits (B, C) of both networks on the weak and the strong view."""
    p = F.softmax(z_tw, dim=1)
    m_image, m_class = unsure(p.amax(1), mask), unsure(p.sum(0), mask)
    weak, strong, kd, bc, cc = (z_sw, z_tw), (z_ss, z_ts), 0, 0, 0
    for t, view in (temperature, strong), (3.0, strong), (5.0, strong), (2.0, weak), (6.0, weak):  # weak, probably by mistake
        kd = kd + (m_image * kd_per_image(*weak, t)).mean() + kd_per_image(*view, t).mean()
        p_s, p_t = F.softmax(z_sw / t, dim=1), F.softmax(z_tw / t, dim=1)
        bc = bc + (m_image * gram_distance(p_s, p_t)).mean()
        cc = cc + (m_class * gram_distance(p_s.T, p_t.T)).mean()
    return kd, bc, cc


def gray(x: Tensor) -> Tensor:
    """Gray levels (n, 1, H, W) of uint8 images, as float32."""
    return rgb_to_grayscale(x.float()).round()


def blend(base: Tensor | float, x: Tensor, v: Tensor) -> Tensor:
    """uint8 images between base (v = 0) and x (v = 1)."""
    return (base + v * (x - base)).to(torch.uint8)


def warp(x: Tensor, *matrix: Tensor | float) -> Tensor:
    """Images sampled where a 2x3 matrix sends each position: nearest pixel, black outside; (-1, -1) is the upper left corner."""
    theta = torch.zeros(len(x), 6, device=x.device)
    for k, entry in enumerate(matrix):
        theta[:, k] = entry.flatten() if isinstance(entry, Tensor) else entry
    grid = F.affine_grid(theta.reshape(-1, 2, 3), x.shape, align_corners=False)
    return F.grid_sample(x.float(), grid, mode="nearest", align_corners=False).to(torch.uint8)


RANDAUGMENT = [  # (lowest v, highest v, operation on uint8 images x (n, 3, H, W) with v (n, 1, 1, 1))
    (0.0, 1.0, lambda x, v: x),
    (0.0, 1.0, lambda x, v: autocontrast(x)),
    (0.0, 1.0, lambda x, v: equalize(x)),
    (0.05, 0.95, lambda x, v: blend(0.0, x.float(), v)),  # brightness
    (0.05, 0.95, lambda x, v: blend(gray(x), x, v)),  # color
    (0.05, 0.95, lambda x, v: blend(gray(x).mean((1, 2, 3), keepdim=True).round(), x, v)),  # contrast
    (0.05, 0.95, lambda x, v: blend(adjust_sharpness(x, 0.0).float(), x, v)),  # sharpness
    (4.0, 8.0, lambda x, v: x & (256 - 2 ** (8 - v.floor())).to(torch.uint8)),  # posterize to v bits
    (0.0, 256.0, lambda x, v: torch.where(x < v, x, 255 - x)),  # solarize
    (-math.pi / 6, math.pi / 6, lambda x, v: warp(x, v.cos(), -v.sin(), 0, v.sin(), v.cos(), 0)),  # rotate
    (-0.3, 0.3, lambda x, v: warp(x, 1, v, v, 0, 1, 0)),  # shear x
    (-0.3, 0.3, lambda x, v: warp(x, 1, 0, 0, v, 1, v)),  # shear y
    (-0.3, 0.3, lambda x, v: warp(x, 1, 0, 2 * v, 0, 1, 0)),  # translate x
    (-0.3, 0.3, lambda x, v: warp(x, 1, 0, 0, 0, 1, 2 * v)),  # translate y
]


def randaugment(pixels: Tensor, operations: int, generator: Generator) -> Tensor:
    """uint8 images after `operations` draws from RANDAUGMENT (with replacement) and a cutout; `pixels` (B, 3, H, H) in [0, 1]."""
    x, device = (255 * pixels).round().to(torch.uint8), pixels.device
    for _ in range(operations):
        kind = torch.randint(len(RANDAUGMENT), (len(x),), generator=generator)
        share = torch.rand(len(x), 1, 1, 1, generator=generator).to(device, non_blocking=True)
        groups = kind.argsort().to(device, non_blocking=True).split(kind.bincount(minlength=len(RANDAUGMENT)).tolist())
        for (low, high, operation), images in zip(RANDAUGMENT, groups):
            if len(images):
                x[images] = operation(x[images], low + (high - low) * share[images])
    side = x.shape[3]
    size, center = torch.rand(3, len(x), 1, generator=generator).to(device, non_blocking=True).mul(side).split([1, 2])
    start = (center - size / 4).clamp(min=0).floor()  # row and column; the square's side is size / 2, up to half the image's
    place = torch.arange(side, device=device)
    rows, columns = (place >= start) & (place <= start + size / 2)  # (B, H) each
    color = torch.tensor([125, 123, 114], dtype=torch.uint8).to(device, non_blocking=True)[:, None, None]
    return torch.where((rows[:, :, None] & columns[:, None, :])[:, None], color, x)


def main(args: Args) -> float:
    run = Run(__file__, args)  # prints the result and exits if this run is already finished
    train, test = load_data(args)
    teacher = load_teacher(run, test)  # frozen, in eval mode

    torch.manual_seed(args.seed)  # the same initial student for every method
    student = build(args.student, train.classes, args.device)
    trained = nn.ModuleDict(dict(student=student)).to(args.device)  # optimized and checkpointed
    lr = args.lr or (0.01 if args.student in ("mobilenetv2", "shufflenetv1", "shufflenetv2") else 0.025)
    optimizer = SGD(trained.parameters(), lr, momentum=args.momentum, weight_decay=args.weight_decay, fused=True)
    milestones = args.milestones or sorted({args.epochs * k // 8 for k in (5, 6, 7)} - {0})
    scheduler = MultiStepLR(optimizer, milestones, gamma=0.1)

    @cuda_graph
    def step(x_w, x_s, y, index):
        with torch.no_grad():
            (z_tw, _), (z_ts, _) = teacher(x_w), teacher(x_s)
        (z_sw, _), (z_ss, _) = student(x_w), student(x_s)  # one after the other: each view has its own batch statistics

        loss_ce = F.cross_entropy(z_sw, y) + F.cross_entropy(z_ss, y)
        loss_kd, loss_bc, loss_cc = mlld_losses(z_sw, z_ss, z_tw, z_ts, args.kd_temperature, args.mask)
        loss = args.ce_weight * loss_ce + args.kd_weight * (loss_kd + loss_bc + loss_cc)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return dict(loss=loss, ce=loss_ce, kd=loss_kd, bc=loss_bc, cc=loss_cc, accuracy=(z_sw.argmax(1) == y).float().mean())

    for epoch in run.epochs(args.epochs, trained=trained, optimizer=optimizer, scheduler=scheduler):  # resumes and saves
        trained.train()
        meter = run.meter(len(train))  # sums on the device, read once per epoch
        for x_w, x_s, y, index in train.epoch(epoch, views=2):
            x_s = train.normalize(randaugment(train.denormalize(x_s), args.operations, train.generator))
            meter.add(step(x_w, x_s, y, index), len(y))
        run.log(epoch, train=meter.mean(), test=accuracy(student, test))
        scheduler.step()
    return run.finish(student, teacher)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
