"""SRRL: Knowledge Distillation via Softmax Regression Representation Learning. Yang, Martinez, Bulat and Tzimiropoulos,
ICLR 2021, arXiv: none.

A connector maps the student's features to the teacher's width. The result has to match the teacher's features, and the teacher's
own frozen classifier has to produce the teacher's logits from it.

    c         = relu(batch norm of a 1x1 convolution of f_s)     f: pooled features, the classifier's input
    L_feature = MSE(c, f_t)
    L_logit   = MSE(W_t c + b_t, z_t)                            W_t, b_t: the teacher's classifier, z: logits
    KD        = T^2 mean_i KL(p_t || p_s),   p = softmax(z / T),   T = kd_temperature
    L         = ce_weight CE + kd_weight KD + srrl_weight (L_feature + L_logit)

This is the CIFAR variant in DefangChen/SimKD@2b389c3, the only one with published CIFAR-100 numbers. Published:
resnet32x4/resnet8x4 75.39 (its README; KD 74.42 with the same weights). The authors' code, jingyang2017/KD_SRRL@d2e802f, is for
ImageNet only. It applies the connector to the last map, then averages, and has no KD term: --connect map --kd-weight 0.
Differences
- from the paper: checked against the abstract only.
- from SimKD's code: none in the loss; zhengli97/CTKD weights CE and KD by 0.1 and 0.9 instead.
- from the authors' code: it initializes the connector from N(0, 2 / width); here it has PyTorch's default.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from common import DistillArgs, Positive, Run, accuracy, build, classifier, cuda_graph, feature_shapes, load_data, load_teacher


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
    kd_weight: float = 1.0
    """weight of the KD term"""
    kd_temperature: Positive = 4.0
    """softmax temperature of the KD term"""
    srrl_weight: float = 1.0
    """weight of the SRRL term"""
    connect: Literal["pooled", "map"] = "pooled"
    """input of the connector: the pooled features, or the map they are pooled from, in which case c is the mean over positions"""


def kd_loss(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """T^2 KL(p_t || p_s) of logits (B, C), summed over classes, averaged over the batch."""
    log_p_s = F.log_softmax(z_s / temperature, dim=1)
    log_p_t = F.log_softmax(z_t / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, log_target=True, reduction="batchmean")


class SRRL(nn.Module):
    """L_feature and L_logit, with a trained connector."""

    def __init__(self, dim_s: int, dim_t: int):
        super().__init__()
        self.connector = nn.Sequential(nn.Conv2d(dim_s, dim_t, 1, bias=False), nn.BatchNorm2d(dim_t), nn.ReLU())

    def forward(self, f_s: Tensor, f_t: Tensor, z_t: Tensor, classifier_t: nn.Linear) -> tuple[Tensor, Tensor]:
        """f_s: pooled features (B, dim_s) or a map (B, dim_s, H, W); f_t (B, dim_t); z_t (B, classes)."""
        f_s = f_s if f_s.dim() == 4 else f_s[:, :, None, None]
        c = self.connector(f_s).mean((2, 3))
        return F.mse_loss(c, f_t), F.mse_loss(classifier_t(c), z_t)  # L_feature, L_logit


def main(args: Args) -> float:
    run = Run(__file__, args)  # prints the result and exits if this run is already finished
    train, test = load_data(args)
    teacher = load_teacher(run, test)  # frozen, in eval mode
    classifier_t = classifier(teacher)

    torch.manual_seed(args.seed)  # the same initial student for every method
    student = build(args.student, train.classes, args.device)
    shapes_s, shapes_t = feature_shapes(student, train.size), feature_shapes(teacher, train.size)
    srrl = SRRL(shapes_s.last[0] if args.connect == "map" else shapes_s.pooled, shapes_t.pooled)
    trained = nn.ModuleDict(dict(student=student, srrl=srrl)).to(args.device)  # optimized and checkpointed
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
        f_s = features_s.last if args.connect == "map" else features_s.pooled
        loss_feature, loss_logit = srrl(f_s, features_t.pooled, z_t, classifier_t)
        loss = args.ce_weight * loss_ce + args.kd_weight * loss_kd + args.srrl_weight * (loss_feature + loss_logit)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return dict(
            loss=loss,
            ce=loss_ce,
            kd=loss_kd,
            feature=loss_feature,
            logit=loss_logit,
            accuracy=(z_s.argmax(1) == y).float().mean(),
        )

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
