"""ReviewKD: Distilling Knowledge via Knowledge Review. Chen, Liu, Zhao and Jia, 2021, arXiv 2104.09044.

Each teacher stage supervises the same stage of the student combined with all deeper ones: from deep to shallow, a fusion block
mixes the student's map with the output of the next deeper block. Maps are compared at several resolutions.

    x_k  = batch norm of a 1x1 convolution of f_s,k           f_s: the student's maps of stages 1 ... n; n + 1: pooled features
    r_k  = a x_k + b up(r_k+1),   r_n+1 = x_n+1               a, b: sigmoid of a 1x1 convolution of both, one per position
    g_k  = batch norm of a 3x3 convolution of up(r_k)         up: nearest-neighbor resizing, here to the size of f_t,k
    d_k  = sum_p w_p MSE(p(g_k), p(f_t,k)) / sum_p w_p        f_t: the same for the teacher, but before each stage's last ReLU
    L_review = sum_k d_k                                      p: identity, pooling to 4x4, 2x2, 1x1;   w = 1, 1/2, 1/4, 1/8
    L    = ce_weight CE + review_weight min(epoch / warmup_epochs, 1) L_review

Taken from megvii-research/mdistiller@a08d46f; the authors' dvlab-research/ReviewKD@cede6ea has the same loss.
Published: resnet56/resnet20 71.89 (README of roymiles/ITRD@5d08c6b), 71.79 (DevPranjal/reproduction-review-kd@2b9c4a9).
Differences
- from the paper: checked against the abstract only.
- from the authors' code: it uses batch size 128, lr 0.1 with Nesterov momentum, a warm-up from 0, and a teacher in training mode.
- from both: shapes are read from the networks, so any pair with the same number of stages works; runs are seeded.
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
from common import DistillArgs, PositiveInt, Run, accuracy, build, cuda_graph, fail, feature_shapes, load_data, load_teacher

REVIEW_WEIGHT = {  # (teacher, student): review_weight, from the authors' CIFAR-100/script/reviewKD.sh unless noted
    ("wrn_40_2", "wrn_16_2"): 5.0,
    ("wrn_40_2", "wrn_40_1"): 5.0,
    ("wrn_40_2", "shufflenetv1"): 5.0,
    ("resnet32x4", "resnet8x4"): 5.0,
    ("resnet32x4", "shufflenetv1"): 5.0,
    ("resnet32x4", "shufflenetv2"): 8.0,
    ("resnet56", "resnet20"): 0.6,
    ("resnet110", "resnet32"): 1.0,
    ("resnet110", "resnet20"): 1.0,  # ours
    ("vgg13", "vgg8"): 5.0,  # source unknown
    ("vgg13", "mobilenetv2"): 8.0,  # ours
    ("resnet50", "mobilenetv2"): 30.0,  # mdistiller issue 39, which reports 63.5 to 66.8 for about 7
    ("resnet50", "vgg8"): 5.0,  # ours
}


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
    review_weight: float | None = None
    """weight of the review term; by default the pair's value in REVIEW_WEIGHT, or 1 if it has none"""
    warmup_epochs: PositiveInt = 20
    """epochs over which the weight of the review term rises to its full value; 1 for no warm-up"""


class Fusion(nn.Module):
    """r (B, width, side_t, side_t) and g (B, c_t, side_t, side_t) of a stage from f_s (B, c_s, H, W) and the deeper stage's r."""

    def __init__(self, c_s: int, width: int, c_t: int, side_t: int, deepest: bool):
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(c_s, width, 1, bias=False), nn.BatchNorm2d(width))
        self.leave = nn.Sequential(nn.Conv2d(width, c_t, 3, padding=1, bias=False), nn.BatchNorm2d(c_t))
        self.attention = None if deepest else nn.Conv2d(2 * width, 2, 1)
        for conv in self.enter[0], self.leave[0]:
            nn.init.kaiming_uniform_(conv.weight, a=1)
        self.side_t = side_t

    def forward(self, f_s: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        r = self.enter(f_s)  # x
        if self.attention is not None:
            deeper = F.interpolate(deeper, r.shape[2:], mode="nearest")
            a, b = self.attention(torch.cat([r, deeper], dim=1)).sigmoid().split(1, dim=1)
            r = a * r + b * deeper
        if r.shape[2] != self.side_t:
            r = F.interpolate(r, self.side_t, mode="nearest")  # the next block gets the resized map, too
        return r, self.leave(r)


def context_distance(g: Tensor, f_t: Tensor) -> Tensor:
    """d of two maps (B, C, H, W). Pooling sizes not smaller than the map are skipped; the next one gets the skipped weight."""
    total, weights = F.mse_loss(g, f_t), [1.0]
    for side in (4, 2, 1):
        if side < g.shape[2]:
            weights.append(weights[-1] / 2)
            total = total + weights[-1] * F.mse_loss(F.adaptive_avg_pool2d(g, side), F.adaptive_avg_pool2d(f_t, side))
    return total / sum(weights)


class ReviewKD(nn.Module):
    """L_review of maps (B, C, H, W) from shallow to deep, with the pooled features last as a 1x1 map; shapes: their (C, H, W)."""

    def __init__(self, shapes_s: list[tuple[int, int, int]], shapes_t: list[tuple[int, int, int]], max_width: int = 512):
        super().__init__()
        width = min(max_width, shapes_s[-1][0])
        pairs = zip(reversed(shapes_s), reversed(shapes_t), strict=True)
        self.fusions = nn.ModuleList(
            Fusion(c_s, width, c_t, side_t, deepest=k == 0) for k, ((c_s, _, _), (c_t, side_t, _)) in enumerate(pairs)
        )

    def forward(self, maps_s: list[Tensor], maps_t: list[Tensor]) -> Tensor:
        loss, r = 0, None
        for fusion, f_s, f_t in zip(self.fusions, reversed(maps_s), reversed(maps_t), strict=True):
            r, g = fusion(f_s, r)
            loss = loss + context_distance(g, f_t)
        return loss  # L_review


def main(args: Args) -> float:
    run = Run(__file__, args)  # prints the result and exits if this run is already finished
    train, test = load_data(args)
    teacher = load_teacher(run, test)  # frozen, in eval mode

    torch.manual_seed(args.seed)  # the same initial student for every method
    student = build(args.student, train.classes, args.device)
    shapes_s, shapes_t = feature_shapes(student, train.size), feature_shapes(teacher, train.size)
    stages_s, stages_t = len(shapes_s.maps) - 1, len(shapes_t.preacts) - 1
    if stages_s != stages_t:
        fail(f"ReviewKD compares stage by stage, but {args.student} has {stages_s} stages and {args.teacher} {stages_t}", 2)
    review = ReviewKD([*shapes_s.maps[1:], (shapes_s.pooled, 1, 1)], [*shapes_t.preacts[1:], (shapes_t.pooled, 1, 1)])
    trained = nn.ModuleDict(dict(student=student, review=review)).to(args.device)  # optimized and checkpointed
    lr = args.lr or (0.01 if args.student in ("mobilenetv2", "shufflenetv1", "shufflenetv2") else 0.05)
    optimizer = SGD(trained.parameters(), lr, momentum=args.momentum, weight_decay=args.weight_decay, fused=True)
    milestones = args.milestones or sorted({args.epochs * k // 8 for k in (5, 6, 7)} - {0})
    scheduler = MultiStepLR(optimizer, milestones, gamma=0.1)
    pair_weight = REVIEW_WEIGHT.get((args.teacher, args.student), 1.0)
    review_weight = args.review_weight if args.review_weight is not None else pair_weight

    @cuda_graph
    def step(x, y, index, warmup):
        with torch.no_grad():
            _, features_t = teacher(x)
        z_s, features_s = student(x)

        loss_ce = F.cross_entropy(z_s, y)
        maps_s = [*features_s.maps[1:], features_s.pooled[:, :, None, None]]
        maps_t = [*features_t.preacts[1:], features_t.pooled[:, :, None, None]]
        loss_review = review(maps_s, maps_t)
        loss = args.ce_weight * loss_ce + review_weight * warmup * loss_review

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return dict(loss=loss, ce=loss_ce, review=loss_review, accuracy=(z_s.argmax(1) == y).float().mean())

    for epoch in run.epochs(args.epochs, trained=trained, optimizer=optimizer, scheduler=scheduler):  # resumes and saves
        trained.train()
        meter = run.meter(len(train))  # sums on the device, read once per epoch
        warmup = torch.tensor(min(epoch / args.warmup_epochs, 1.0), device=args.device)  # a tensor: a CUDA graph freezes numbers
        for x, y, index in train.epoch(epoch):
            meter.add(step(x, y, index, warmup), len(y))
        run.log(epoch, train=meter.mean(), test=accuracy(student, test), warmup=warmup)
        scheduler.step()
    return run.finish(student, teacher)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
