"""A method run as a user types it, but in this process and on a few images: for tests of what a run does around its steps."""

import json
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from harness import ROOT, common

FULL = common.DATASETS["synthetic"](Path())


def few(data):
    """The synthetic set cut to 44 training and 20 test images."""
    return FULL._replace(train=tuple(a[:44] for a in FULL.train), test=tuple(a[:20] for a in FULL.test))


class Killed(BaseException):
    """Stands for the end of the process at this point."""


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    def error(self):
        """The one line on stderr."""
        assert self.err.count("\n") == 1 and self.err.endswith("\n"), self.err
        return self.err.strip()


class Script:
    """`script("icd", "--epochs 2")` is `python methods/icd.py --epochs 2` in an empty folder, with the `usual` flags before."""

    usual = "--dataset synthetic --device cpu --student resnet8 --batch-size 16"

    def __init__(self, monkeypatch, capfd, folder):
        monkeypatch.chdir(folder)
        monkeypatch.setitem(common.DATASETS, "synthetic", few)
        self.monkeypatch, self.capfd = monkeypatch, capfd

    def __call__(self, method, *words):
        words = [*self.usual.split(), *(part for word in words for part in str(word).split())]
        self.monkeypatch.setattr(sys, "argv", [f"{method}.py", *words])
        self.capfd.readouterr()
        code, handler = 0, signal.getsignal(signal.SIGINT)
        try:
            runpy.run_path(str(ROOT / "methods" / f"{method}.py"), run_name="__main__")
        except SystemExit as exit:
            code = exit.code or 0
        except Killed:
            code = -9
        finally:
            signal.signal(signal.SIGINT, handler)
        return Outcome(code, *self.capfd.readouterr())

    def at_epoch(self, n, action):
        """Call `action` at the end of the n-th epoch of the next run, before it is logged. For methods without a teacher."""
        accuracy, calls = common.accuracy, []

        def count(net, images):
            calls.append(net)
            if len(calls) == n:
                action()
            return accuracy(net, images)

        self.monkeypatch.setattr(common, "accuracy", count)

    def interrupt(self, n):
        """Press Ctrl-C in the n-th epoch of the next run."""
        self.at_epoch(n, lambda: os.kill(os.getpid(), signal.SIGINT))


def rows(folder):
    """The log of a run without its times."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def weights(file):
    """All values of a file of weights in one array."""
    net = common.build("resnet8", 100)
    common.load_weights(net, file)
    return np.concatenate([value.flatten().double().numpy() for value in net.state_dict().values()])
