"""SimKD: Knowledge Distillation with the Reused Teacher Classifier. Chen, Mei, Zhang, Wang, Feng and Chen, 2022,
arXiv 2203.14001.

The student needs no classifier of its own: a projector learns to turn its last map into the teacher's, and the teacher's
classifier takes it from there. Training uses neither labels nor logits. Projector and classifier are kept at inference.

    g = P3(P2(P1(f_s)))                 P1, P2, P3: 1x1, 3x3, 1x1 convolution, each followed by batch norm and ReLU
    z = W_t mean(g) + b_t               f_s: the map of the student's last stage;   mean: over positions
    L = MSE(g, f_t)                     f_t: the teacher's map that is pooled for its classifier W_t, b_t

Taken from DefangChen/SimKD@2b389c3. Published: resnet32x4/resnet8x4 78.08, 77.88 at --factor 4, 76.73 at --factor 8 (its README).
Differences
- from the paper: checked against the abstract only.
- from the code: f_t is the map that is pooled, for every teacher. For a wrn, the code uses the map before the last batch norm
  and ReLU; it has negative values, which a projector ending in a ReLU cannot produce.
- ours: layers after the student's last stage, including its classifier, are unused but included in the parameter count.
"""

import copy
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
from common import DistillArgs, PositiveInt, Run, accuracy, build, classifier, cuda_graph, feature_shapes, load_data, load_teacher


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
    factor: PositiveInt = 2
    """the projector's hidden layers have this many times fewer channels than the teacher's last map"""


class SimKD(nn.Module):
    """The deployed model: student, projector and a frozen copy of the teacher's classifier. `side_t`: height and width of f_t."""

    def __init__(self, student: nn.Module, c_s: int, side_t: int, classifier_t: nn.Linear, factor: int):
        super().__init__()
        c_t = classifier_t.in_features
        width = c_t // factor
        self.student, self.classifier_t, self.side_t = student, copy.deepcopy(classifier_t), side_t
        self.projector = nn.Sequential(
            *(nn.Conv2d(c_s, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, c_t, 1, bias=False), nn.BatchNorm2d(c_t), nn.ReLU()),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, tuple]:
        """For images x (B, 3, H, W): z (B, classes) and the student's features, with g as `last`."""
        _, features = self.student(x)
        f_s = features.maps[-1]
        if f_s.shape[2] > self.side_t:
            f_s = F.adaptive_avg_pool2d(f_s, self.side_t)
        g = self.projector(f_s)
        pooled = g.mean((2, 3))
        return self.classifier_t(pooled), features._replace(last=g, pooled=pooled)


def same_side(f_s: Tensor, f_t: Tensor) -> tuple[Tensor, ...]:
    """Both maps (B, C, H, W) at the lower of their two resolutions; the larger is average-pooled."""
    side = min(f_s.shape[2], f_t.shape[2])
    return tuple(f if f.shape[2] == side else F.adaptive_avg_pool2d(f, side) for f in (f_s, f_t))


def main(args: Args) -> float:
    run = Run(__file__, args)  # prints the result and exits if this run is already finished
    train, test = load_data(args)
    teacher = load_teacher(run, test)  # frozen, in eval mode

    torch.manual_seed(args.seed)  # the same initial student for every method
    student = build(args.student, train.classes, args.device)
    c_s, side_t = feature_shapes(student, train.size).maps[-1][0], feature_shapes(teacher, train.size).last[1]
    deployed = SimKD(student, c_s, side_t, classifier(teacher), args.factor).to(args.device)
    trained = nn.ModuleDict(dict(student=student, projector=deployed.projector))  # optimized and checkpointed
    lr = args.lr or (0.01 if args.student in ("mobilenetv2", "shufflenetv1", "shufflenetv2") else 0.05)
    optimizer = SGD(trained.parameters(), lr, momentum=args.momentum, weight_decay=args.weight_decay, fused=True)
    milestones = args.milestones or sorted({args.epochs * k // 8 for k in (5, 6, 7)} - {0})
    scheduler = MultiStepLR(optimizer, milestones, gamma=0.1)

    @cuda_graph
    def step(x, y, index):
        with torch.no_grad():
            _, features_t = teacher(x)
        z_s, features_s = deployed(x)

        loss = F.mse_loss(*same_side(features_s.last, features_t.last))

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return dict(loss=loss, accuracy=(z_s.argmax(1) == y).float().mean())

    for epoch in run.epochs(args.epochs, trained=trained, optimizer=optimizer, scheduler=scheduler):  # resumes and saves
        trained.train()
        meter = run.meter(len(train))  # sums on the device, read once per epoch
        for x, y, index in train.epoch(epoch):
            meter.add(step(x, y, index), len(y))
        run.log(epoch, train=meter.mean(), test=accuracy(deployed, test))
        scheduler.step()
    return run.finish(deployed, teacher)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
