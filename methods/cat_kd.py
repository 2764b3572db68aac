"""CAT-KD: Class Attention Transfer Based Knowledge Distillation. Guo, Yan, Li and Lin, 2023, arXiv 2304.12777.

A class activation map shows where in the image a network sees a class: it is the output of the classifier at each position of the
last map, before pooling. The student's class activation maps must match the teacher's at a low resolution.

    M     = W f                         at every position;   f: the map that is pooled, W: the classifier without its bias
    A(M)  = M average-pooled to resolution x resolution; with normalize, each class's map is then divided by its norm
    L_cat = mean (A(M_s) - A(M_t))^2    over batch, classes and positions
    L     = ce_weight CE + cat_weight L_cat        the student's logits are the mean of M_s over positions

Taken from GzyAftermath/CAT-KD@4467073 (no license, so read but not copied). Despite the name, there is no KD term.
Published: resnet32x4/resnet8x4 76.91 (leaderboard of Seonghak35/Seonghak35.github.io@838a6ef).
Differences
- from the paper: checked against the abstract only.
- from the code: the student's bias is fixed at 0; the code replaces the classifier with an equivalent convolution without bias.
- from the code: W_s is initialized as in every other method; the code uses N(0, 2 / classes), except for vgg and the shufflenets.
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
from common import DistillArgs, PositiveInt, Run, accuracy, build, classifier, cuda_graph, load_data, load_teacher

SETTINGS = {  # (teacher, student): (cat_weight, resolution, normalize), from the code's YAML files, tuned per pair by its authors
    ("resnet56", "resnet20"): (0.7, 2, False),
    ("resnet110", "resnet20"): (1.8, 2, False),  # ours, as for resnet32
    ("resnet110", "resnet32"): (1.8, 2, False),
    ("resnet32x4", "resnet8x4"): (15.0, 2, False),
    ("wrn_40_2", "wrn_16_2"): (12.0, 2, False),
    ("wrn_40_2", "wrn_40_1"): (1.5, 2, False),
    ("vgg13", "vgg8"): (4.5, 2, False),
    ("vgg13", "mobilenetv2"): (15.0, 2, True),
    ("resnet50", "mobilenetv2"): (40.0, 2, True),
    ("resnet50", "vgg8"): (15.0, 2, True),  # ours
    ("resnet32x4", "shufflenetv1"): (600.0, 4, True),
    ("resnet32x4", "shufflenetv2"): (600.0, 4, True),
    ("wrn_40_2", "shufflenetv1"): (80.0, 4, True),
}
OTHERS = (15.0, 2, True)  # ours; with normalize, the weight does not depend on the scale of the logits


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
    cat_weight: float | None = None
    """weight of the CAT term; by default the pair's value in SETTINGS, or 15 if it has none"""
    resolution: PositiveInt | None = None
    """height and width at which maps are compared; by default the pair's value in SETTINGS, or 2 if it has none"""
    normalize: bool | None = None
    """whether to divide each map by its norm; by default the pair's value in SETTINGS, or True if it has none"""


def class_activation_maps(f: Tensor, weight: Tensor) -> Tensor:
    """M (B, classes, H, W) from maps (B, C, H, W) and the classifier's weight (classes, C)."""
    return F.conv2d(f, weight[:, :, None, None])


def cat_loss(m_s: Tensor, m_t: Tensor, resolution: int, normalize: bool) -> Tensor:
    """L_cat of class activation maps (B, classes, H_s, W_s) and (B, classes, H_t, W_t)."""
    a_s, a_t = (F.adaptive_avg_pool2d(m, resolution).flatten(2) for m in (m_s, m_t))
    if normalize:
        a_s, a_t = F.normalize(a_s, dim=2), F.normalize(a_t, dim=2)
    return F.mse_loss(a_s, a_t)


def main(args: Args) -> float:
    run = Run(__file__, args)  # prints the result and exits if this run is already finished
    train, test = load_data(args)
    teacher = load_teacher(run, test)  # frozen, in eval mode
    classifier_t = classifier(teacher)

    torch.manual_seed(args.seed)  # the same initial student for every method
    student = build(args.student, train.classes, args.device)
    classifier_s = classifier(student)
    nn.init.zeros_(classifier_s.bias).requires_grad_(False)  # as released, the teacher's bias is dropped, too
    trained = nn.ModuleDict(dict(student=student)).to(args.device)  # optimized and checkpointed
    lr = args.lr or (0.01 if args.student in ("mobilenetv2", "shufflenetv1", "shufflenetv2") else 0.05)
    optimizer = SGD(trained.parameters(), lr, momentum=args.momentum, weight_decay=args.weight_decay, fused=True)
    milestones = args.milestones or sorted({args.epochs * k // 8 for k in (5, 6, 7)} - {0})
    scheduler = MultiStepLR(optimizer, milestones, gamma=0.1)
    cat_weight, resolution, normalize = SETTINGS.get((args.teacher, args.student), OTHERS)
    cat_weight = args.cat_weight if args.cat_weight is not None else cat_weight
    resolution = args.resolution if args.resolution is not None else resolution
    normalize = args.normalize if args.normalize is not None else normalize

    @cuda_graph
    def step(x, y, index):
        with torch.no_grad():
            _, features_t = teacher(x)
            m_t = class_activation_maps(features_t.last, classifier_t.weight)
        z_s, features_s = student(x)
        m_s = class_activation_maps(features_s.last, classifier_s.weight)

        loss_ce = F.cross_entropy(z_s, y)
        loss_cat = cat_loss(m_s, m_t, resolution, normalize)
        loss = args.ce_weight * loss_ce + cat_weight * loss_cat

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return dict(loss=loss, ce=loss_ce, cat=loss_cat, accuracy=(z_s.argmax(1) == y).float().mean())

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
