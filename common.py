"""Code shared by all methods: flags, runs, data, teachers, features, CUDA graphs, networks, in this order.

A method's file imports from here and from nothing else of the project. Nothing here depends on a distillation method; the one
script known by name is methods/vanilla.py, which trains a teacher where there is none. To copy a method away, take this file
too; networks that you do not need can be cut from its end.
"""

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import io
import json
import math
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Annotated, Any, NamedTuple, NoReturn, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two processes out of one run folder
    fcntl = None

ROOT = Path(__file__).resolve().parent
SAVE_EVERY = 20.0  # least seconds of training between two checkpoints
GRAPH = os.environ.get("CUDA_GRAPH") == "1"  # see `cuda_graph`


def fail(message: str, code: int = 1) -> NoReturn:
    """End the program with one line on stderr; exit code 2 is for bad flags, 1 for everything else."""
    with contextlib.suppress(OSError):
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def say(line: str, end: str = "\n") -> None:
    """Print a line. If stdout is closed or full, say so once on stderr and go on without it."""
    try:
        print(line, end=end, flush=True)
    except OSError as error:
        with contextlib.suppress(OSError):
            print(f"note: stdout is gone ({error.strerror}); the run goes on, its log.jsonl has every epoch", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def one_line(error: BaseException) -> str:
    """The message of an exception without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def duration(seconds: float) -> str:
    """Format a duration: 12.3 s, 5 min 12 s, 3 h 28 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    if seconds < 3599.5:
        return "{} min {:02} s".format(*divmod(round(seconds), 60))
    return "{} h {:02} min".format(*divmod(round(seconds / 60), 60))


# ---------------------------------------------------------------------------------------------------------------------- flags

# A flag's type carries its rule, which returns True or what is wrong. `Run` applies the rules of all flags.
Positive = Annotated[float, lambda v: v > 0 or "must be above 0"]
NonNegative = Annotated[float, lambda v: v >= 0 or "must not be negative"]
Share = Annotated[float, lambda v: 0 <= v <= 1 or "must be from 0 to 1"]
PositiveInt = Annotated[int, lambda v: v >= 1 or "must be at least 1"]
NonNegativeInt = Annotated[int, lambda v: v >= 0 or "must not be negative"]
NetworkName = Annotated[str, lambda v: known_network(v) or f"is unknown: take torchvision.<name> or one of {', '.join(NETWORKS)}"]


def usable_device(device: str) -> bool | str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        return "is unknown: cpu, cuda, cuda:1, ..."
    here = device == "cpu" or int(device[5:] or 0) < torch.cuda.device_count()
    return here or "is not here: PyTorch sees no such GPU; --device cpu works without one"


@dataclass(kw_only=True)
class RunArgs:
    """Flags of every method. A method's file states its values for the first seven; the others cannot change a method."""

    student: NetworkName
    """student architecture: a name in common.NETWORKS, or torchvision.<name>"""
    epochs: PositiveInt
    """passes over the training images"""
    batch_size: PositiveInt
    """images per step; the incomplete last batch of an epoch is kept"""
    lr: Positive | None
    """initial learning rate; by default 0.05, or 0.01 for mobilenetv2 and the shufflenets"""
    milestones: Annotated[tuple[int, ...], lambda v: list(v) == sorted({*v} - {0}) or "must be positive and ascending"]
    """epochs after which the learning rate drops 10x; by default 5/8, 6/8 and 7/8 of all"""
    momentum: Share
    """SGD momentum"""
    weight_decay: NonNegative
    """applied to all parameters, including batch norm and auxiliary modules"""

    dataset: Annotated[str, lambda v: v in DATASETS or v == "folder" or f"is unknown: folder, {', '.join(DATASETS)}"] = "cifar100"
    """cifar100, cifar10, stl10, tinyimagenet, folder (ImageFolder layout), or synthetic (small, nothing to download)"""
    data: Path = Path("data")
    """directory of the data sets; for --dataset folder the one that holds train/ and val/"""
    image_size: Annotated[int, lambda v: v >= 8 or "must be at least 8"] | None = None
    """side of the images in pixels; by default the data set's own, 224 for folder"""
    holdout: NonNegativeInt = 0
    """training images per class to test on in place of the test images: for choosing weights"""
    workers: NonNegativeInt = 4
    """processes that decode the images of a folder"""
    runs: Path = Path("runs")
    """parent directory for runs"""
    seed: Annotated[int, lambda v: 0 <= v < 2**63 or "must be from 0 to 2**63 - 1"] = 1
    """seed for initialization, shuffling and augmentation"""
    device: Annotated[str, usable_device] = "cuda" if torch.cuda.is_available() else "cpu"
    """cuda, cuda:1, ... or cpu"""


@dataclass(kw_only=True)
class DistillArgs(RunArgs):
    """Flags of every method that has a trained teacher."""

    teacher: NetworkName
    """teacher architecture: a name in common.NETWORKS, or torchvision.<name>"""
    teacher_weights: Path | None = None
    """the teacher's checkpoint, or torchvision's weights by name (IMAGENET1K_V1); by default found, downloaded or trained"""


PLACES = ("data", "runs", "workers", "teacher_weights")  # where things are: nothing about the run itself


def check(args: RunArgs) -> None:
    """Refuse a flag that breaks its rule, or is not finite, with one line and exit code 2."""
    for kind in type(args).__mro__[:-1]:
        for flag, hint in inspect.get_annotations(kind).items():
            value = getattr(args, flag)
            rules = [rule for part in (hint, *get_args(hint)) for rule in getattr(part, "__metadata__", ()) if callable(rule)]
            wrong = [wrong for rule in rules if value is not None and (wrong := rule(value)) is not True]
            if isinstance(value, float) and not math.isfinite(value):
                wrong = ["must be a finite number"]
            if flag.endswith("_weight") and value is not None and value < 0:
                wrong = ["must not be negative"]
            if wrong:
                fail(f"--{flag.replace('_', '-')} {shown(value)} {wrong[0]}", 2)
    terms = {flag: value for flag, value in vars(args).items() if flag.endswith("_weight")}
    if terms and all(value == 0 for value in terms.values()):
        fail(f"all weights are 0 ({', '.join(terms)}): nothing would be learned", 2)
    weights = getattr(args, "teacher_weights", None)
    if weights and not weights.is_file() and not args.teacher.startswith("torchvision."):
        fail(f"--teacher-weights {weights} does not exist", 2)


def changed_flags(args: RunArgs) -> dict[str, Any]:
    """The flags that differ from their defaults, without those that a run's name always shows or never does."""
    apart = ("teacher", "student", "dataset", "seed", "device", "data", "runs", "workers")
    fields = [field for field in dataclasses.fields(args) if field.name not in apart]
    return {field.name: getattr(args, field.name) for field in fields if getattr(args, field.name) != field.default}


def shown(value: Any) -> str:
    """A flag's value in a name or message: 1 for 1.0, a list with commas, a file by the start of its SHA-256."""
    if isinstance(value, Path):
        return sha256(value)[:8] if value.is_file() else str(value)
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value).removesuffix(".0")


def run_name(method: str, what: list[str], flags: dict[str, Any], seed: int) -> str:
    """<method>__<teacher>__<student>__<dataset>[__flag=value ...]__seed<n>; past 200 bytes, the flags are a hash."""
    settings = [f"{flag.replace('_', '-')}={shown(value)}".replace("/", "_") for flag, value in flags.items()]
    name = "__".join([method, *what, *settings, f"seed{seed}"])
    if len(name.encode()) > 200:
        name = "__".join([method, *what, hashlib.sha256("__".join(settings).encode()).hexdigest()[:12], f"seed{seed}"])
    return name


# ----------------------------------------------------------------------------------------------------------------------- runs


def sha256(file: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def take_lock(path: Path, wait: float = 0.0) -> IO | None:
    """Hold a file against all other processes until it is closed or this process ends.

    If another process holds it, wait for at most `wait` seconds, then return None.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file, end = open(path, "a"), time.monotonic() + wait  # noqa: SIM115, it stays open
    while fcntl:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() >= end:
                file.close()
                return None
            time.sleep(0.2)
        except OSError as error:
            fail(f"{path} cannot be locked ({error.strerror}): choose a directory on another file system")
    return file


def in_use(folder: Path) -> bool:
    """Whether a process is working in a run folder."""
    if not folder.exists():
        return False
    try:
        lock = take_lock(folder / ".lock", wait=0.5)  # another look lasts for a moment only
    except OSError as error:
        fail(f"cannot look into {folder} ({error.strerror}): choose another parent directory with --runs")
    if lock:
        lock.close()
    return lock is None


def write(path: Path, content: bytes | str) -> None:
    """Replace `path` atomically: a crash or a full disk leaves the old file whole."""
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with open(unfinished, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        fail(f"cannot write {path} ({error.strerror}); nothing is lost: make room and continue with the same command")


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """`state` as torch.save writes it, followed by its SHA-256: torch.load itself accepts most flipped bits."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write(path, buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `write_checkpoint` wrote; a damaged file ends the program."""
    content = path.read_bytes()
    if hashlib.sha256(content[:-32]).digest() != content[-32:]:
        fail(f"{path} is damaged (its SHA-256 differs): put back a good copy, or delete it to start this run again")
    return torch.load(io.BytesIO(content[:-32]), map_location="cpu", weights_only=True)


def git(*words: str) -> str | None:
    """What git says about the checkout this file is in; None outside one."""
    try:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def hardware(device: str) -> dict[str, Any]:
    """Context for interpreting a result: name and driver of the device, threads, torch version."""
    name, driver = device, None
    if device != "cpu":
        name = torch.cuda.get_device_name(device)
        with contextlib.suppress(OSError, IndexError, subprocess.CalledProcessError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    return dict(device=name, driver=driver, threads=torch.get_num_threads(), torch=torch.__version__)


def count(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())


class Meter:
    """Averages over an epoch of the batch means that `step` returns. Sums stay on the device until `mean` reads them."""

    def __init__(self, total: int, tick: Callable[["Meter"], None]):
        self.total, self.tick, self.sums, self.images, self.steps = total, tick, 0.0, 0, 0

    def add(self, means: dict[str, Tensor], n: int) -> None:
        """Add the means, 0-d tensors by name, of a batch of n images."""
        try:
            self.names = list(means)
            self.sums = self.sums + n * torch.stack([value.detach().reshape(()) for value in means.values()])
        except (AttributeError, RuntimeError, TypeError):
            fail("step must return a dict of batch means, 0-d tensors by name")
        self.images, self.steps = self.images + n, self.steps + 1
        self.tick(self)

    def mean(self) -> dict[str, float]:
        """Mean per image of everything added, by name."""
        return dict(zip(self.names, (self.sums / self.images).tolist()))


class Run:
    """The folder of one run: settings, code, log, checkpoints, student, result.

    Started again with the same command, a run that was killed at any moment continues from its last checkpoint and ends with
    the same weights and log (on a CPU bit for bit, at the same number of threads); a finished run prints its result and exits
    with code 0. Checkpoints are written at the end of each phase and after an epoch if the last one is SAVE_EVERY seconds old.
    """

    def __init__(self, script: str, args: RunArgs):
        check(args)
        self.args, self.method, self.changed = args, Path(script).stem, changed_flags(args)
        what = [getattr(args, flag) for flag in ("teacher", "student", "dataset") if hasattr(args, flag)]
        self.folder = Path(args.runs) / run_name(self.method, what, self.changed, args.seed)
        self.rows: list[dict[str, Any]] = []
        self.parameters: dict[int, int] = {}  # of all phases
        self.saved, self.resumed, self.child, self.estimated = "nothing saved yet", 0, None, False
        signals = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
            signals.append(signal.SIGHUP)
        for number in signals:
            signal.signal(number, self.interrupt)
        if args.device != "cpu":  # the same sums in the same order, so that a resumed run ends as an uninterrupted one
            torch.cuda.set_device(torch.device(args.device).index or 0)  # for what takes no device, like a stream
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # saves a kernel per new tensor
        self.commit, self.dirty = git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
        self.open(Path(script))

    def interrupt(self, number: int, frame: Any) -> None:
        """Signal handler: say what is saved and end, after the process that trains the teacher, if there is one."""
        signal.signal(number, signal.SIG_DFL)  # a second Ctrl-C ends at once
        if self.child:
            self.child.terminate()  # it says what it has saved
            raise SystemExit(128 + number)
        fail(f"interrupted: {self.saved}; continue with the same command", 128 + number)

    def open(self, script: Path) -> None:
        """Take the folder for this process; refuse one that was made with other settings or data."""
        try:
            self.lock = take_lock(self.folder / ".lock", wait=0.5)  # `in_use` may hold it for a moment
        except OSError as error:
            fail(f"cannot use the folder {self.folder} ({error.strerror}): choose another parent directory with --runs")
        if self.lock is None:
            fail(f"{self.folder} is in use by another process: wait for it, or choose another parent directory with --runs")

        self.settings = json.loads(json.dumps(dataclasses.asdict(self.args), default=str))
        found, done = self.kept("args.json"), self.kept("result.json")
        if not done and not any(self.folder.glob("checkpoint*.pt")):
            found = {}  # nothing was trained with what is there
        differing = [flag for flag, value in self.settings.items() if flag not in PLACES and found.get(flag, value) != value]
        if differing == ["device"] and (done or found["device"].split(":")[0] == self.args.device.split(":")[0]):
            differing = []
        if differing:
            began, now = (shown(settings[differing[0]]) for settings in (found, self.settings))
            fail(f"{self.folder} began with {differing[0]} {began}, not {now}: take that, or another --runs")

        self.data = found.get("data_sha256") if done and not on_disk(self.args) else data_sha256(self.args)
        if done and not on_disk(self.args):
            say(f"note: {self.args.data} has no images to compare with those of this run")
        sources = {self.folder / source.name: source.read_bytes() for source in (script, Path(__file__))}
        changed = [copy.name for copy, source in sources.items() if found and copy.exists() and copy.read_bytes() != source]
        if found.get("data_sha256", self.data) != self.data:
            changed.append("the images")
        what = ", ".join(changed)
        if changed and done:
            say(f"note: {what} changed since; for a new result take another --runs, or delete {self.folder}")
        elif "the images" in changed:
            fail(f"{self.folder} began with other images than those in {self.args.data}: restore them, or take another --runs")
        elif changed:
            say(f"note: {what} changed since this run began; it goes on with the new code, its folder keeps the old")
        if done:
            self.show(done)
            raise SystemExit(0)
        for copy, source in sources.items():
            if not found or not copy.exists():
                write(copy, source)
        if not found:
            write(self.folder / "args.json", json.dumps(self.settings | {"data_sha256": self.data}, indent=1) + "\n")

    def kept(self, name: str) -> dict[str, Any]:
        """A JSON file of the run's folder; empty if there is none."""
        file, content = self.folder / name, None
        with contextlib.suppress(ValueError):
            content = json.loads(file.read_text()) if file.exists() else {}
        wanted = {"last", "best", "epochs"} if content and name == "result.json" else set()
        if not isinstance(content, dict) or not wanted <= content.keys():
            fail(f"{file} is damaged: delete the folder to start this run again")
        return content

    def epochs(self, total: int, trained: nn.ModuleDict, optimizer: Any, scheduler: Any, phase: str = "") -> Iterator[int]:
        """The epochs left of `total`, counted from 1, of the run or of one phase of it; call `log` once in each.

        Loads the last checkpoint into the three before the first epoch. A finished phase loads its end and yields nothing.
        """
        file, where = self.folder / "checkpoint.pt", ""
        if phase:
            file, where = self.folder / f"checkpoint-{phase}.pt", f" of phase {phase}"
        self.introduce(trained, phase)
        state = read_checkpoint(file) if file.exists() else {"rows": []}
        if state["rows"]:
            try:
                trained.load_state_dict(state["trained"])
                optimizer.load_state_dict(state["optimizer"])
                scheduler.load_state_dict(state["scheduler"])
            except (KeyError, RuntimeError, ValueError) as error:
                fail(f"{file} does not fit this script ({one_line(error)}): delete {self.folder} to start again")
            self.resumed = state["resumed"] + (len(state["rows"]) < total)
            self.saved = f"saved up to epoch {len(state['rows'])}{where}"
            say(f"continuing after epoch {len(state['rows'])} of {total}")
        for group in optimizer.param_groups:  # a graph reads the rate from the device, where the scheduler changes it in place
            on_device = self.args.device != "cpu" or GRAPH  # with or without a graph, so that both have the same float32
            group["lr"] = torch.as_tensor(group["lr"], device=self.args.device).float() if on_device else float(group["lr"])
        earlier = len(self.rows)
        self.phase, self.total, self.scheduler, self.rows = phase, total, scheduler, self.rows + state["rows"]
        saved, draws = time.monotonic(), torch.random.get_rng_state()
        for epoch in range(len(state["rows"]) + 1, total + 1):
            self.started = time.perf_counter()
            seed = [self.args.seed, epoch, *phase.encode()]  # of what draws from PyTorch's global state, like dropout
            torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
            yield epoch
            if epoch == total or time.monotonic() - saved >= SAVE_EVERY:
                state = dict(trained=trained.state_dict(), optimizer=optimizer.state_dict(), scheduler=scheduler.state_dict())
                if not all(value.isfinite().all() for value in state["trained"].values()):
                    self.diverged(f"a weight is no longer finite after epoch {epoch}")
                write(self.folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))
                write_checkpoint(file, state | dict(rows=self.rows[earlier:], resumed=self.resumed))  # last: the rest is redone
                self.saved, saved = f"saved up to epoch {epoch}{where}", time.monotonic()
        torch.random.set_rng_state(draws)  # what is built after a phase is the same after a resume

    def introduce(self, trained: nn.ModuleDict, phase: str) -> None:
        """Say what is about to be trained, and count its parameters."""
        self.parameters |= {id(p): p.numel() for p in trained.parameters()}
        if phase:
            return say(f"phase       {phase}: {count(trained):,} parameters are trained")
        settings = ", ".join(f"{flag.replace('_', '-')} {shown(value)}" for flag, value in self.changed.items())
        say(f"student     {self.args.student}, seed {self.args.seed}, {self.args.device}; changed flags: {settings or 'none'}")
        folder = self.args.dataset == "folder"
        own = FOLDER_SIZE if folder else read(self.args.dataset, Path(self.args.data), self.args.image_size).train[0].shape[1]
        feature_shapes(trained["student"], self.args.image_size or own)  # ends the program if the images are too small for it
        self.student = count(trained["student"])
        self.extra = sum(self.parameters.values()) - self.student
        say(f"parameters  {self.student:,} in the student" + (f" plus {self.extra:,} in auxiliary modules" if self.extra else ""))

    def meter(self, total: int) -> Meter:
        """A meter for one epoch over `total` images. On a terminal it shows how far the epoch is."""
        self.ticked = time.monotonic()
        return Meter(total, self.tick)

    def tick(self, meter: Meter) -> None:
        """After each step: the estimate, once, from the steps 10 to 20, as the first are slower; the counter on a terminal."""
        if meter.steps in (10, 20) and not self.estimated and not self.phase:
            if self.args.device != "cpu":
                torch.cuda.synchronize(self.args.device)
            if meter.steps == 10:
                self.tenth = time.perf_counter(), meter.images
            else:
                began, images = self.tenth
                epoch = (time.perf_counter() - began) * meter.total / (meter.images - images)
                epochs = self.total - len(self.rows)
                slow = self.args.device == "cpu" and epochs * epoch > 3600
                advice = "; a CUDA GPU is far faster, or try --epochs 5" if slow else ""
                say(f"estimate    {duration(epoch)} per epoch, {duration(epochs * epoch)} for the {epochs} left{advice}")
                self.estimated = True
        if sys.stdout.isatty() and time.monotonic() - self.ticked > 1:
            self.ticked = time.monotonic()
            left = (time.perf_counter() - self.started) * (meter.total / meter.images - 1)
            say(f"\r  {meter.images:,} of {meter.total:,} images, {duration(left)} left in this epoch \033[K", end="\r")

    def log(self, epoch: int, train: dict[str, float], test: float | None = None, **more: Any) -> None:
        """Print and keep one epoch's row. A loss that is not finite ends the run.

        `train`: means over the epoch, "loss" among them and, where there is one, "accuracy" as a share; `test`: accuracy in
        percent; `more`: further numbers worth watching.
        """
        if "loss" not in train:
            fail("step must return the loss under the name loss")
        if not math.isfinite(train["loss"]):
            self.diverged(f"the loss became {train['loss']} in epoch {epoch}")
        terms = {name: value for name, value in train.items() if name != "accuracy"}
        more = {name: torch.as_tensor(value).item() for name, value in more.items()}
        right, rate = train.get("accuracy"), float(self.scheduler.get_last_lr()[0])
        row = {"phase": self.phase, "epoch": epoch} | terms | {"train": None if right is None else 100 * right, "test": test}
        row |= {"lr": float(f"{rate:.6g}"), "seconds": round(time.perf_counter() - self.started, 3)} | more
        self.rows.append(row)
        parts = [f"epoch {epoch:3}/{self.total}", *(f"{name} {value:.4g}" for name, value in terms.items())]
        parts += [f"{name} {row[name]:5.2f} %" for name in ("train", "test") if row[name] is not None]
        parts += [f"{name} {value:.4g}" for name, value in more.items()] + [f"lr {row['lr']:.2g}", duration(row["seconds"])]
        say("  ".join(parts) + f"  left {duration(row['seconds'] * (self.total - epoch))}")

    def diverged(self, what: str) -> NoReturn:
        fail(f"{what}: try a smaller --lr; {self.saved} in {self.folder}")

    def finish(self, deployed: nn.Module, teacher: nn.Module | None = None) -> float:
        """Save the network that is used at inference and the result; return the last epoch's test accuracy in percent."""
        buffer = io.BytesIO()
        torch.save({name: value.cpu().contiguous() for name, value in deployed.state_dict().items()}, buffer)
        write(self.folder / "student.pt", buffer.getvalue())
        rows = [row for row in self.rows if row["phase"] == ""]
        best = max(rows, key=lambda row: row["test"])
        parameters = dict(student=self.student, extra=self.extra, at_test=count(deployed))
        graph = GRAPH and self.args.device != "cpu"
        result = dict(method=self.method, args=self.settings, last=rows[-1]["test"], best=best["test"], best_epoch=best["epoch"])
        result |= dict(teacher=teacher and teacher.record, parameters=parameters)
        result |= dict(student_sha256=sha256(self.folder / "student.pt"), data_sha256=self.data, resumed=self.resumed)
        result |= dict(epochs=len(rows), seconds=round(sum(row["seconds"] for row in self.rows), 1))
        result |= hardware(self.args.device) | dict(cuda_graph=graph, commit=self.commit, dirty=self.dirty)
        write(self.folder / "result.json", json.dumps(result, indent=1) + "\n")
        self.show(result)
        return result["last"]

    def show(self, result: dict[str, Any]) -> None:
        """Print a result in one line."""
        accuracies = f"last {result['last']:.2f} %, best {result['best']:.2f} % (epoch {result['best_epoch']})"
        epochs = f"{result['epochs']} epoch{'s' * (result['epochs'] != 1)}"
        say(f"result      {accuracies}, {epochs} in {duration(result['seconds'])}: {self.folder}")


# ----------------------------------------------------------------------------------------------------------------------- data


Split = tuple[np.ndarray, np.ndarray]  # uint8 pixels (N, size, size, 3), or the files of a folder (N,), and integer labels (N,)


class RawData(NamedTuple):
    """A data set as arrays: what a function in DATASETS returns."""

    train: Split
    test: Split
    names: list[str]  # of the classes, by label
    mean: tuple[float, float, float]  # of pixel / 255
    std: tuple[float, float, float]


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and std
FOLDER_SIZE = 224  # default side of a folder's images in pixels

# The official binary files: records of label bytes (the last one counts) and 3 x 32 x 32 pixels; {file: SHA-256}
CIFAR: dict[str, dict[str, Any]] = {
    "cifar100": dict(
        folder="cifar-100-binary",
        label_bytes=2,
        names="fine_label_names.txt",
        train={"train.bin": "f31298fc616915fa142368359df1c4ca2ae984d6915ca468b998a5ec6aeebf29"},
        test={"test.bin": "d8b1e6b7b3bee4020055f0699b111f60b1af1e262aeb93a0b659061746f8224a"},
        statistics=((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
        torchvision=datasets.CIFAR100,
    ),
    "cifar10": dict(
        folder="cifar-10-batches-bin",
        label_bytes=1,
        names="batches.meta.txt",
        train={
            "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
            "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
            "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
            "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
            "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
        },
        test={"test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"},
        statistics=((0.4914, 0.4824, 0.4467), (0.2471, 0.2435, 0.2616)),
        torchvision=datasets.CIFAR10,
    ),
}


def read_cifar(name: str, data: Path, size: int | None) -> RawData:
    """CIFAR from its binary files, SHA-256 checked, else from its Python version, which torchvision checks or downloads."""
    cifar = CIFAR[name]
    folder, skip = data / cifar["folder"], cifar["label_bytes"]
    if not folder.is_dir():
        train, test = from_torchvision(cifar["torchvision"], data, dict(train=True), dict(train=False))
        splits = [(part.data, np.array(part.targets)) for part in (train, test)]
        return RawData(*splits, train.classes, *cifar["statistics"])

    def records(hashes: dict[str, str]) -> Split:
        for file, official in hashes.items():
            if not (folder / file).is_file() or sha256(folder / file) != official:
                fail(f"{folder / file} is missing or not the official file: delete {folder} and start again to download it")
        rows = np.concatenate([np.fromfile(folder / file, np.uint8).reshape(-1, skip + 3072) for file in hashes])
        return rows[:, skip:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, skip - 1]

    train, test, file = records(cifar["train"]), records(cifar["test"]), folder / cifar["names"]
    names = file.read_text().split() if file.is_file() else [str(k) for k in range(train[1].max() + 1)]
    return RawData(train, test, names, *cifar["statistics"])


def from_torchvision(kind: Any, data: Path, *splits: dict[str, Any]) -> list[Any]:
    """Splits of one of torchvision's data sets, which are downloaded if they are missing; one process at a time."""
    try:
        with take_lock(data / ".lock", wait=math.inf):
            return [kind(data, **split, download=True) for split in splits]
    except (OSError, RuntimeError) as error:
        fail(f"cannot read or download {kind.__name__} in {data} ({one_line(error)}): put it there, or try --dataset synthetic")


def cached(folder: Path, size: int, decode: Callable[[], tuple[Split, Split]]) -> tuple[Split, Split]:
    """The arrays in <folder>_<size>/{train,test}_{x,y}.npy; the first time they are decoded, resized and put there."""
    folder = folder.with_name(f"{folder.name}_{size}")
    files = [folder / f"{part}.npy" for part in ("train_x", "train_y", "test_x", "test_y")]
    if not all(file.is_file() for file in files):
        try:
            with take_lock(folder.with_name(f".{folder.name}.lock"), wait=math.inf):
                if not all(file.is_file() for file in files):  # another process may have written them meanwhile
                    say(f"decoding images into {folder}, once")
                    folder.mkdir(exist_ok=True)
                    for file, array in zip(files, [array for x, y in decode() for array in (resize(x, size), y)]):
                        np.save(folder / "unfinished.npy", array)
                        os.replace(folder / "unfinished.npy", file)
        except OSError as error:
            fail(f"cannot write {folder} ({error.strerror}): choose another --data, or make room")
    try:
        train_x, train_y, test_x, test_y = map(np.load, files)
    except (OSError, ValueError) as error:
        fail(f"{folder} is damaged ({one_line(error)}): delete it to decode the images again")
    return (train_x, train_y), (test_x, test_y)


def resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """Images (N, S, S, 3) as (N, size, size, 3), by PIL's bilinear filter, as torchvision's Resize."""
    if pixels.shape[1] == size:
        return pixels
    return np.stack([np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)) for image in pixels])


def read_stl10(data: Path, size: int | None) -> RawData:
    """The labeled images of STL-10. Mean and std are those of the ICD authors' transfer experiments."""

    def decode() -> tuple[Split, Split]:
        train, test = from_torchvision(datasets.STL10, data, dict(split="train"), dict(split="test"))
        return tuple((part.data.transpose(0, 2, 3, 1), part.labels) for part in (train, test))

    names = "airplane bird car cat deer dog horse monkey ship truck".split()
    return RawData(*cached(data / "stl10", size or 96, decode), names, (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2712))


def read_tinyimagenet(data: Path, size: int | None) -> RawData:
    """Tiny ImageNet from its official folder; classes are numbered as in wnids.txt, grayscale images get three channels.

    Mean and std are ImageNet's, as in the published recipe (Good-DA-in-KD, R2KD); the set's own are (0.4802, 0.4481, 0.3975)
    and (0.2764, 0.2689, 0.2816).
    """
    folder = data / "tiny-imagenet-200"
    try:
        wnids = (folder / "wnids.txt").read_text().split()
        words = dict(line.split("\t") for line in (folder / "words.txt").read_text().splitlines())
        val = [line.split("\t")[:2] for line in (folder / "val" / "val_annotations.txt").read_text().splitlines()]
    except OSError as error:
        fail(f"{error.filename} is missing: unpack tiny-imagenet-200.zip of cs231n.stanford.edu in {data}")

    def decode() -> tuple[Split, Split]:
        by_class = [sorted((folder / "train" / wnid / "images").glob("*.JPEG")) for wnid in wnids]
        train = [(file, k) for k, files in enumerate(by_class) for file in files]
        test = [(folder / "val" / "images" / file, wnids.index(wnid)) for file, wnid in val]
        return tuple(
            (np.stack([open_image(file, 64) for file, _ in part]), np.array([k for _, k in part])) for part in (train, test)
        )

    names = [words.get(wnid, wnid) for wnid in wnids]
    return RawData(*cached(data / "tinyimagenet", size or 64, decode), names, *IMAGENET)


def open_image(file: Path, side: int | None = None) -> Image.Image:
    """An image file as RGB; one that is missing, damaged or not `side` pixels wide and high ends the program."""
    try:
        image = Image.open(str(file)).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        fail(f"{file} is missing or damaged ({one_line(error)}): restore it")
    if side and image.size != (side, side):
        fail(f"{file} has {image.size[0]} x {image.size[1]} pixels, not {side} x {side}: restore it")
    return image


def synthetic(data: Path, size: int | None) -> RawData:
    """100 classes of a random pattern plus noise, 2,000 + 500 images: to try things out without a download."""
    random = np.random.default_rng(0)
    patterns = random.normal(size=(100, 1, 1, 3)) + random.normal(size=(100, 4, 4, 3)).repeat(8, axis=1).repeat(8, axis=2)

    def draw(n: int) -> Split:
        labels = np.arange(n) % 100
        pixels = 128 + 40 * patterns[labels] + 10 * random.normal(size=(n, 32, 32, 3))
        return pixels.clip(0, 255).astype(np.uint8), labels

    return RawData(draw(2000), draw(500), [f"pattern {k}" for k in range(100)], (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


# name -> function of --data and --image-size (which it may ignore); add a line for a data set of your own
DATASETS: dict[str, Callable[[Path, int | None], RawData]] = {
    **{name: partial(read_cifar, name) for name in CIFAR},
    "stl10": read_stl10,
    "tinyimagenet": read_tinyimagenet,
    "synthetic": synthetic,
}


@functools.lru_cache(maxsize=1)
def read(name: str, data: Path, size: int | None) -> RawData:
    """A data set of DATASETS, checked, at `size` x `size` pixels or in its own size."""
    raw = DATASETS[name](data, size)
    if not isinstance(raw, RawData):
        fail(f"--dataset {name}: its function returns {type(raw).__name__}, not RawData")
    statistics = (
        np.array([raw.mean, raw.std], dtype=np.float64) if np.shape(raw.mean) == np.shape(raw.std) == (3,) else np.zeros(1)
    )
    if isinstance(raw.names, (str, int)) or statistics.min() < 0 or statistics.max() > 1 or not statistics[-1].all():
        fail(f"--dataset {name}: names must be a list; mean and std three numbers each, of pixels in [0, 1]")
    raw = raw._replace(train=tuple(map(np.asarray, raw.train)), test=tuple(map(np.asarray, raw.test)))
    for split, (x, y) in dict(training=raw.train, test=raw.test).items():
        if x.dtype != np.uint8:
            wrong = f"pixels are {x.dtype}, not uint8"
        elif x.ndim != 4 or x.shape[3] != 3 or x.shape[1] != x.shape[2]:
            wrong = f"pixels have shape {x.shape}, not (N, size, size, 3)"
        elif y.shape != x.shape[:1]:
            wrong = f"labels have shape {y.shape} for {len(x):,} images"
        elif y.dtype.kind not in "iu" or len(y) == 0 or y.min() < 0 or y.max() >= len(raw.names):
            wrong = f"labels are not integers from 0 to {len(raw.names) - 1}, or there are none"
        elif x.shape[1] != raw.train[0].shape[1]:
            wrong = f"images have a side of {x.shape[1]}, the training images {raw.train[0].shape[1]}"
        else:
            continue
        fail(f"--dataset {name}: the {split} {wrong}")
    size = size or raw.train[0].shape[1]
    return raw._replace(train=(resize(raw.train[0], size), raw.train[1]), test=(resize(raw.test[0], size), raw.test[1]))


def on_disk(args: RunArgs) -> bool:
    """Whether the data set can be read without a download."""
    place = dict(cifar100="cifar-100-*", cifar10="cifar-10-*", stl10="stl10_*", tinyimagenet="tiny*", folder="train")
    return args.dataset not in place or any(Path(args.data).glob(place[args.dataset]))


def data_sha256(args: RunArgs) -> str:
    """What identifies a data set: SHA-256 of its arrays, or of the names and sizes of a folder's files."""
    digest = hashlib.sha256()
    if args.dataset == "folder":
        files = sorted(file for split in ("train", "val") for file in Path(args.data, split).rglob("*.*"))
        if not files:
            fail(f"--data {args.data} needs train/<class>/ and val/<class>/ with images")
        for file in files:
            digest.update(f"{file.relative_to(args.data)} {file.stat().st_size}\n".encode())
    else:
        raw = read(args.dataset, Path(args.data), args.image_size)
        for pixels, labels in raw.train, raw.test:
            digest.update(np.ascontiguousarray(pixels))
            digest.update(labels.astype(np.int64))
    return digest.hexdigest()


class ImageSet:
    """One split of a data set. Every method relies on this and nothing else, whatever the images come from.

    `len(images)`; `classes`, their number, and `names`; `size`, the side of an image in pixels; `labels`, int64 (N,);
    `mean` and `std`, (3, 1, 1), of pixels in [0, 1]; `device`, where labels and batches are; `generator`, on the CPU and
    seeded anew in each epoch, the source of all that a method draws itself; `epoch` and `batches`; `normalize`, `denormalize`.
    """

    def __init__(self, labels: np.ndarray, size: int, raw: RawData, args: RunArgs):
        self.args, self.device, self.size = args, torch.device(args.device), size
        self.names, self.classes = raw.names, len(raw.names)
        self.labels = torch.from_numpy(labels.astype(np.int64)).to(self.device)
        mean, std = (torch.tensor(values, dtype=torch.float32) for values in (raw.mean, raw.std))
        table = (torch.arange(256)[:, None] / 255 - mean) / std  # on the CPU: the same floats on every device
        self.table, self.channel = table.T.flatten().to(self.device), 256 * torch.arange(3, device=self.device)
        self.mean, self.std = mean[:, None, None].to(self.device), std[:, None, None].to(self.device)
        self.generator = torch.Generator()

    def __len__(self) -> int:
        return len(self.labels)

    def normalize(self, pixels: Tensor) -> Tensor:
        """float32 (pixels - mean) / std of images (B, 3, H, W), uint8 (looked up, as ToTensor and Normalize) or in [0, 1]."""
        if pixels.dtype == torch.uint8:
            return self.table[pixels.permute(0, 2, 3, 1) + self.channel].permute(0, 3, 1, 2)
        return (pixels - self.mean) / self.std

    def denormalize(self, x: Tensor) -> Tensor:
        """Pixels in [0, 1] of normalized images (B, 3, H, W)."""
        return x * self.std + self.mean

    def epoch(self, epoch: int, phase: str = "", views: int = 1) -> Iterator[tuple[Tensor, ...]]:
        """All images once, shuffled and augmented: batches of x (B, 3, size, size), once for each view, y (B,), index (B,).

        The views of an image are independent draws; the first is the same for any number of views. `index` counts the
        training images. All draws depend on (seed, epoch, phase) alone: not on method, device, workers or a resume.
        """
        seed = [self.args.seed, epoch, *phase.encode()]
        self.generator.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
        for pixels, index in self.load(torch.randperm(len(self), generator=self.generator), seed, views):
            yield *(self.normalize(view) for view in pixels), self.labels[index], index

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All images once, in order, not augmented: batches of x (B, 3, size, size), y (B,)."""
        for (pixels,), index in self.load(torch.arange(len(self))):
            yield self.normalize(pixels), self.labels[index]

    def load(self, order: Tensor, seed: list[int] | None = None, views: int = 1) -> Iterator[tuple[Sequence[Tensor], Tensor]]:
        """Batches of the images `order` (N,): their views, uint8 (B, 3, size, size), and index (B,); no `seed`: not augmented."""
        raise NotImplementedError


class Resident(ImageSet):
    """Images kept on the device as uint8, padded by an eighth of their side.

    An epoch equals torchvision's RandomCrop, RandomHorizontalFlip, ToTensor and Normalize bit for bit for the same draws.
    """

    def __init__(self, split: Split, raw: RawData, args: RunArgs, padding: str):
        pixels, labels = split
        super().__init__(labels, pixels.shape[1], raw, args)
        self.padding = self.size // 8
        padded = np.pad(pixels, [(0, 0), *[(self.padding, self.padding)] * 2, (0, 0)], mode=padding)
        self.side, self.steps = padded.shape[1], torch.arange(self.size, device=self.device)
        self.pixels = torch.from_numpy(padded).to(self.device).flatten(0, 2)  # (N * side * side, 3)

    def offsets(self) -> Tensor:
        """Row and column of the crop and flip (0 or 1) for all N images, int64 (3, N)."""
        crop = torch.randint(2 * self.padding + 1, (2, len(self)), generator=self.generator)
        flip = torch.randint(2, (1, len(self)), generator=self.generator)
        return torch.cat([crop, flip]).to(self.device)

    def crop(self, index: Tensor, offsets: Tensor) -> Tensor:
        """uint8 views (B, 3, size, size) of the images `index` (B,), cropped and flipped by `offsets` (3, B)."""
        top, left, flip = offsets[:, :, None]
        rows = index[:, None] * self.side + top + self.steps
        columns = left + torch.where(flip == 1, self.size - 1 - self.steps, self.steps)
        return self.pixels[rows[:, :, None] * self.side + columns[:, None, :]].permute(0, 3, 1, 2)

    def load(self, order: Tensor, seed: list[int] | None = None, views: int = 1) -> Iterator[tuple[Sequence[Tensor], Tensor]]:
        middle = torch.tensor([[self.padding], [self.padding], [0]], device=self.device).expand(3, len(self))
        offsets = [self.offsets() if seed else middle for _ in range(views)]  # all before the first batch
        n = self.args.batch_size if seed else 500
        for index, *crops in zip(order.to(self.device).split(n), *(part.split(n, dim=1) for part in offsets)):
            yield [self.crop(index, crop) for crop in crops], index


class Folder(ImageSet):
    """Image files, decoded by worker processes: RandomResizedCrop and flip to train, Resize by 8/7 and CenterCrop to test."""

    def __init__(self, split: Split, raw: RawData, args: RunArgs):
        self.files, labels = split
        super().__init__(labels, args.image_size or FOLDER_SIZE, raw, args)

    def load(self, order: Tensor, seed: list[int] | None = None, views: int = 1) -> Iterator[tuple[Sequence[Tensor], Tensor]]:
        loader = DataLoader(
            Files(self.files, self.size, seed, views),
            batch_sampler=[part.tolist() for part in order.split(self.args.batch_size)],
            num_workers=min(self.args.workers, os.cpu_count()),
            worker_init_fn=ignore_signals,
            generator=torch.Generator(),  # else the loader draws from PyTorch's global state
            pin_memory=self.device.type == "cuda",
        )
        for pixels, index in loader:
            if (index < 0).any():
                open_image(self.files[-1 - int(index.min())])  # ends the program, naming the file
            yield pixels.to(self.device, non_blocking=True).unbind(1), index.to(self.device, non_blocking=True)


class Files(torch.utils.data.Dataset):
    """Image files as views (views, 3, size, size), uint8, drawn from (seed, image) alone; with their index, < 0 if damaged."""

    def __init__(self, files: np.ndarray, size: int, seed: list[int] | None, views: int):
        self.files, self.seed, self.views = files, seed, views
        train = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
        test = [transforms.Resize(size * 8 // 7), transforms.CenterCrop(size)]
        self.transform = transforms.Compose([*(test if seed is None else train), transforms.PILToTensor()])
        self.damaged = torch.zeros(views, 3, size, size, dtype=torch.uint8)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            image = Image.open(str(self.files[index])).convert("RGB")
        except (OSError, SyntaxError, ValueError):
            return self.damaged, -1 - index
        with torch.random.fork_rng(devices=[]):  # the transforms draw from PyTorch's global state
            torch.default_generator.manual_seed(int(np.random.SeedSequence([*(self.seed or []), index]).generate_state(1)[0]))
            return torch.stack([self.transform(image) for _ in range(self.views)]), index


def ignore_signals(worker: int) -> None:
    """A worker leaves Ctrl-C to its parent, which ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def read_folder(data: Path) -> RawData:
    """The files in train/<class>/ and val/<class>/, as torchvision's ImageFolder finds them."""
    try:
        train, test = (datasets.ImageFolder(data / split) for split in ("train", "val"))
    except OSError as error:
        fail(f"--data {data} needs train/<class>/ and val/<class>/ with images: {one_line(error)}")
    if train.classes != test.classes:
        fail(f"{data}: train/ and val/ differ in the classes {', '.join({*train.classes} ^ {*test.classes})}")
    splits = [(np.array([file for file, _ in part.samples]), np.array(part.targets)) for part in (train, test)]
    return RawData(*splits, train.classes, *IMAGENET)


def held_out(labels: np.ndarray, n: int) -> np.ndarray:
    """Which images (N,) --holdout takes out of the training set: n per class, the same ones for every seed."""
    order = np.random.default_rng(0).permutation(len(labels))
    taken = [order[labels[order] == k][:n] for k in np.unique(labels)]
    if min(map(len, taken)) < n or n * len(taken) >= len(labels):
        fail(f"--holdout {n} takes whole classes: there are {len(labels):,} training images in {len(taken)} classes", 2)
    return np.isin(np.arange(len(labels)), np.concatenate(taken))


def load_data(args: RunArgs, padding: str = "constant") -> tuple[ImageSet, ImageSet]:
    """Training and test images of args.dataset; `padding` is a mode of numpy.pad for resident sets, "constant" pads black."""
    folder = args.dataset == "folder"
    raw = read_folder(args.data) if folder else read(args.dataset, Path(args.data), args.image_size)
    train, test = raw.train, raw.test
    if args.holdout:
        held = held_out(train[1], args.holdout)
        train, test = (tuple(array[chosen] for array in train) for chosen in (~held, held))
    if folder:
        train, test = Folder(train, raw, args), Folder(test, raw, args)
    else:
        train, test = Resident(train, raw, args, padding), Resident(test, raw, args, "constant")
    if args.batch_size > len(train):
        fail(f"--batch-size {args.batch_size} is larger than the {len(train):,} training images of {args.dataset}", 2)
    if (len(train) - 1) % args.batch_size == 0:
        fail(f"--batch-size {args.batch_size} leaves a last batch of one image, which has no batch statistics; take another", 2)
    return train, test


# ------------------------------------------------------------------------------------------------------------------- teachers

# chenyaofo/pytorch-cifar-models (BSD-3): the same networks and names as here; {(dataset, name): start of the SHA-256}
PUBLIC_URL = "https://github.com/chenyaofo/pytorch-cifar-models/releases/download/resnet/{}_{}-{}.pt"
PUBLIC = {
    **{("cifar100", f"resnet{n}"): h for n, h in {20: "23dac2f1", 32: "84213ce6", 44: "ffe32858", 56: "f2eff4c8"}.items()},
    **{("cifar10", f"resnet{n}"): h for n, h in {20: "4118986f", 32: "ef93fc4d", 44: "2a3cabcb", 56: "187c023a"}.items()},
}
PUBLIC_CIFAR10_STD = (0.2023, 0.1994, 0.2010)  # by which the CIFAR-10 images they saw were divided


def download(url: str) -> Path:
    """A file in PyTorch's cache, downloaded if missing; the name ends in the start of its SHA-256, which is checked."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    start = re.search(r"-([0-9a-f]{8,})\.", file.name)[1]
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), start)
    if not sha256(file).startswith(start):
        fail(f"{file} is damaged (its SHA-256 differs): delete it to download it again")
    return file


def load_weights(net: nn.Module, file: Path) -> None:
    """Load a state dict, bare or under "model" or "state_dict", with or without "module." before its names.

    Any other content ends the program with one line. Nothing in the file can run code.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # what is wrong is said below
            state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        fail(f"{file} holds more than tensors and could run code, so it is not loaded: save the state dict alone")
    except Exception as error:  # torch.load has a different type for every way in which a file can be broken
        fail(f"{file} is not a checkpoint that torch can read ({one_line(error)})")
    for key in "model", "state_dict":
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state

    def usable(name: Any, value: Any) -> bool:
        return isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized

    if not isinstance(state, dict) or not all(map(usable, state.keys(), state.values())):
        fail(f"{file} holds no state dict (names with dense tensors), neither bare nor under 'model' or 'state_dict'")
    state = {name.removeprefix("module."): value for name, value in state.items()}
    own = net.state_dict()
    state |= {name: own[name] for name in own.keys() - state.keys() if name.endswith("num_batches_tracked")}
    wrong = [name for name in own | state if name not in own or name not in state or own[name].shape != state[name].shape]
    weight, bias = list(own)[-2:]  # the classifier's
    if wrong and set(wrong) <= {weight, bias} <= state.keys():
        fail(f"{file} was trained for {len(state[bias])} classes, this data set has {len(own[bias])}")
    if wrong:
        fail(f"{file} holds another network's weights: the first difference is {wrong[0]}")
    if wrong := [name for name, value in state.items() if not value.isfinite().all()]:
        fail(f"{file} holds weights that are not finite: {wrong[0]}")
    net.load_state_dict(state)


def find_teacher(run: "Run") -> tuple[Path, str]:
    """File of the teacher's weights and its name for people; downloads or trains a teacher if there is none."""
    args, weights = run.args, run.args.teacher_weights
    if weights is not None and not weights.is_file():  # `check` leaves this to torchvision's networks
        try:
            return download(models.get_model_weights(args.teacher.removeprefix("torchvision."))[str(weights)].url), str(weights)
        except (KeyError, OSError) as error:
            fail(f"--teacher-weights {weights} is neither a file nor available weights of {args.teacher} ({one_line(error)})", 2)
    if weights is not None:
        return weights, str(weights)
    shipped = ROOT / "teachers" / args.dataset / f"{args.teacher}.pt"
    if shipped.exists() and not args.holdout and args.image_size is None:
        return shipped, str(shipped.relative_to(ROOT))

    shared = {flag: value for flag, value in run.changed.items() if flag in ("image_size", "holdout")}
    short = {flag: value for flag, value in run.changed.items() if flag in ("epochs", "batch_size", "milestones")}
    names = [run_name("vanilla", [args.teacher, args.dataset], flags, 1) for flags in (shared, short | shared)]
    full, like_student = (Path(args.runs) / name for name in names)
    result, key = full / "result.json", (args.dataset, args.teacher)
    if not result.exists() and key in PUBLIC and not shared:  # public teachers saw the images held out
        url = PUBLIC_URL.format(*key, PUBLIC[key])
        try:
            return download(url), url
        except OSError as error:
            say(f"no public teacher: {url} cannot be downloaded ({one_line(error)})")
    take_full = result.exists() or in_use(full) or result.exists()  # it may have ended in between
    folder, flags = (full, shared) if take_full else (like_student, short | shared)
    if not (folder / "result.json").exists():
        train_teacher(run, flags, folder)
    return folder / "student.pt", str(folder)


def train_teacher(run: "Run", flags: dict[str, Any], folder: Path) -> None:
    """Run methods/vanilla.py as a user would until `folder` holds a finished run, or wait for the process that does so."""
    args, script, result = run.args, ROOT / "methods" / "vanilla.py", folder / "result.json"
    if not script.exists():
        fail(f"no teacher {args.teacher} for {args.dataset}, and no {script} to train one: give --teacher-weights FILE")
    options = dict(student=args.teacher, dataset=args.dataset, data=args.data, runs=args.runs, device=args.device, seed=1) | flags
    command = [sys.executable, str(script)]
    for flag, value in options.items():
        command += [f"--{flag.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])]
    while True:
        if in_use(folder):
            say(f"waiting for the process that trains the teacher in {folder}")
            while in_use(folder):
                time.sleep(1)
        if result.exists():
            return
        say(f"no teacher {args.teacher} for {args.dataset} yet: training one first, then the student: {shlex.join(command[1:])}")
        own_group = dict(process_group=0) if fcntl else {}  # so that Ctrl-C reaches it through `Run.interrupt` alone
        run.child = subprocess.Popen(command, **own_group)
        try:
            code = run.child.wait()
        except SystemExit:  # raised by `Run.interrupt`
            run.child.wait()
            raise
        run.child = None
        if not in_use(folder) and not result.exists():
            fail(f"training the teacher ended with exit code {code}: continue with the same command", code if code > 0 else 1)


def load_teacher(run: "Run", test: ImageSet) -> nn.Module:
    """The trained network args.teacher, frozen and in eval mode; its attribute `record` says which one, as in result.json.

    In this order: --teacher-weights; teachers/<dataset>/<name>.pt; a finished run of methods/vanilla.py; public weights,
    checked by hash; a run of methods/vanilla.py with the epochs, milestones and batch size given here, trained if missing.
    A run keeps its teacher: once begun, it continues with the same bits or not at all.
    """
    args, began = run.args, run.kept("teacher.json")
    if began and not {"file", "source", "sha256"} <= began.keys():
        fail(f"{run.folder / 'teacher.json'} is damaged: delete the folder to start this run again")
    file, source = find_teacher(run) if not began or args.teacher_weights else (Path(began["file"]), began["source"])
    if not file.is_file() or (began and sha256(file) != began["sha256"]):
        which = f"{file} (SHA-256 {began['sha256'][:12]})" if began else file
        fail(f"{run.folder} began with the teacher {which}, which is missing or changed: restore it, or take another --runs")
    name = file.with_name("result.json") if file.name == "student.pt" else file.with_suffix(".json")
    result: dict[str, Any] = {}
    with contextlib.suppress(OSError, TypeError, ValueError):  # there is none, or it is somebody else's
        result = dict(json.loads(name.read_text()))
    digest, epochs = sha256(file), result.get("epochs")
    if result.get("student_sha256", digest) != digest:
        fail(f"{file} is damaged: its SHA-256 is not the one in {name}")
    if args.teacher_weights is None and result.get("data_sha256", run.data) != run.data:
        fail(f"{file} was trained on other images than those in {args.data}: take another --runs, or give --teacher-weights")
    teacher = build(args.teacher, test.classes, args.device)
    load_weights(teacher, file)
    if source.startswith("https") and args.dataset == "cifar10":
        teacher.conv1.weight.data *= test.std / torch.tensor(PUBLIC_CIFAR10_STD, device=test.device)[:, None, None]
    teacher.eval().requires_grad_(False)
    feature_shapes(teacher, test.size)  # ends the program if the images are too small for it
    write(run.folder / "teacher.json", json.dumps(dict(file=str(file), source=source, sha256=digest)) + "\n")
    teacher.record = dict(name=args.teacher, accuracy=accuracy(teacher, test), sha256=digest, source=source, epochs=epochs)
    trained = f"{epochs} epoch{'s' * (epochs != 1)}, " if epochs else ""
    say(f"teacher     {args.teacher}, {teacher.record['accuracy']:.2f} % test accuracy, {trained}{source}, SHA-256 {digest[:12]}")
    return teacher


# ------------------------------------------------------------------------------------------------------------------- features


class Features(NamedTuple):
    """What a network returns besides its logits; `feature_shapes` gives the same with shapes in place of tensors."""

    maps: list[Any]  # f0 (stem), f1 ... fk (stages), each (B, C, H, W), as the published code takes them
    preacts: list[Any]  # the same before their last ReLU
    last: Any  # the map that is pooled into the classifier
    pooled: Any  # (B, C), the classifier's input


@torch.no_grad()
def probe(net: nn.Module, x: Tensor) -> tuple[Tensor, Features]:
    """Logits and features of images (B, 3, H, W) in eval mode. No mode, statistic or random state changes."""
    training, weight = net.training, next(net.parameters())
    try:
        out = net.eval()(x.to(weight.device, weight.dtype))
    except (IndexError, RuntimeError) as error:
        fail(f"a network does not fit images of {x.shape[2]} x {x.shape[3]} pixels ({one_line(error)})", 2)
    net.train(training)
    try:
        logits, (maps, preacts, last, pooled) = out
        fits = logits.ndim == pooled.ndim == 2 and last.ndim == 4 and len(maps) == len(preacts) > 0
    except (AttributeError, TypeError, ValueError):
        fits = False
    if not fits:
        fail("a network must return (logits, Features(maps, preacts, last, pooled)): see the docstring of common.Features", 2)
    return out


def feature_shapes(net: nn.Module, size: int) -> Features:
    """Shapes of a network's features for one image of size x size pixels: (C, H, W) for maps, a number for `pooled`."""
    _, f = probe(net, torch.zeros(1, 3, size, size))
    maps, preacts = ([tuple(m.shape[1:]) for m in kind] for kind in (f.maps, f.preacts))
    return Features(maps, preacts, tuple(f.last.shape[1:]), f.pooled.shape[1])


def classifier(net: nn.Module) -> nn.Linear:
    """The linear layer that turns `pooled`, the mean of the map `last`, into logits; a network without one ends the program."""
    linear = [module for module in net.modules() if isinstance(module, nn.Linear)][-1:]
    _, f = probe(net, torch.linspace(-1, 1, 2 * 3 * 64 * 64).reshape(2, 3, 64, 64))
    if not linear or f.last.mean((2, 3)).shape != f.pooled.shape or not torch.allclose(f.last.mean((2, 3)), f.pooled, atol=1e-5):
        fail("this method needs networks whose classifier is one linear layer on the mean of the last map", 2)
    return linear[0]


def stage_norms(net: nn.Module) -> list[nn.BatchNorm2d]:
    """The batch norm before the last ReLU of each stage f1 ... fk; a network without them ends the program."""
    norms = getattr(net, "stage_norms", None)
    if norms is None:
        fail("this method needs a network with a batch norm before the last ReLU of each stage, which e.g. ShuffleNets lack", 2)
    return [net.get_submodule(name) for name in norms]


@torch.no_grad()
def accuracy(net: nn.Module, images: ImageSet) -> float:
    """Top-1 accuracy of `net` in eval mode, in percent; its mode is restored."""
    training = net.training
    net.eval()
    correct = sum((net(x)[0].argmax(1) == y).sum() for x, y in images.batches())
    net.train(training)
    return 100 * int(correct) / len(images)


# ----------------------------------------------------------------------------------------------------------------- CUDA graph


class Graph:
    """A step as one CUDA graph: see `cuda_graph`."""

    WARM_UP = 3

    def __init__(self, step: Callable[..., dict[str, Tensor]]):
        self.step, self.shapes, self.warm, self.graph = step, None, 0, None

    def __call__(self, *batch: Tensor) -> dict[str, Tensor]:
        shapes = [tensor.shape for tensor in batch]
        self.shapes = self.shapes or shapes
        if shapes != self.shapes:
            return self.step(*batch)
        if self.warm < self.WARM_UP:
            return self.warm_up(*batch)
        if self.graph is None:
            self.capture(batch)  # records the step without taking it
        for place, tensor in zip(self.batch, batch):
            place.copy_(tensor)
        self.graph.replay()
        return self.means

    def warm_up(self, *batch: Tensor) -> dict[str, Tensor]:
        if self.warm == 0:
            self.stream = torch.cuda.Stream()
        self.warm += 1
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            means = self.step(*batch)
        torch.cuda.current_stream().wait_stream(self.stream)
        return means

    def capture(self, batch: tuple[Tensor, ...]) -> None:
        self.graph, self.batch = torch.cuda.CUDAGraph(), [tensor.clone() for tensor in batch]
        try:
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.means = {name: value.detach() for name, value in self.step(*self.batch).items()}
        except RuntimeError as error:
            cause = one_line(error.__context__ or error)  # the end of a failed capture is an error of its own
            fail(f"this step cannot be a CUDA graph ({cause}): continue with the same command without CUDA_GRAPH=1")


def cuda_graph(step: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """A training step; on CUDA, with CUDA_GRAPH=1 in the environment, replayed as a CUDA graph (no GPU has verified that yet).

    `step` takes tensors, updates the weights, and returns 0-d batch means by name. The first three batches are real steps
    that warm up cuDNN and the optimizer; then the step is captured, for the batch shape that came first. Such batches are
    copied to where the graph reads them and replayed with a single launch; batches of other shapes, like the last of an
    epoch, run as they are. So a step must have no side effect on the host and read nothing but its arguments and tensors
    updated in place: a Python number or a host's random draw is frozen at capture time. What a call returns is overwritten
    by the next one: add it up, do not collect it.
    """
    if not GRAPH:
        return step
    graph = Graph(step)
    return lambda *batch: (graph if batch[0].is_cuda else step)(*batch)


# ------------------------------------------------------------------------------------------------------------------- networks


def known_network(name: str) -> bool:
    """Whether `build` can make this network."""
    return name in NETWORKS or name in {f"torchvision.{network}" for network in models.list_models(models)}


def build(name: str, classes: int, device: str | torch.device = "cpu") -> nn.Module:
    """A fresh network on `device`, channels_last: faster on a CPU (README). `net(x)` gives (logits, Features)."""
    if not known_network(name):
        fail(f"unknown network {name}: take torchvision.<name> or one of {', '.join(NETWORKS)}", 2)
    net = NETWORKS[name](classes) if name in NETWORKS else from_torchvision_models(name.removeprefix("torchvision."), classes)
    return net.to(device, memory_format=torch.channels_last)


def from_torchvision_models(name: str, classes: int) -> nn.Module:
    """A classification network of torchvision.models, with its parameter names, that gives (logits, Features).

    maps: the last map of each resolution that nothing bypasses, which excludes the inside of a residual block; preacts: what
    a ReLU turns into them, where there is one; pooled: what enters the last linear layer.
    """
    x = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    entered: list[Tensor] = []
    try:
        model = models.get_model(name, weights=None, num_classes=classes).eval()
        for module in model.modules():
            if hasattr(module, "inplace"):
                module.inplace = False  # else a ReLU overwrites its input, the preact
        last_linear, linear = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
        hook = linear.register_forward_pre_hook(lambda module, x: entered.append(x[0]))
        traced = create_feature_extractor(model, get_graph_node_names(model)[1])
        with torch.no_grad():
            values = {path: value for path, value in traced(x).items() if isinstance(value, Tensor)}
        hook.remove()
        *nodes, end = traced.eval_graph.nodes
        place = {node: k for k, node in enumerate(nodes)}
        last_use = {node: max((place[user] for user in node.users if user is not end), default=0) for node in nodes}
        # narrow[k]: nothing bypasses node k, i.e. no later node reads what was computed before it
        narrow = [all(last_use[m] <= k or m.op == "get_attr" for m in nodes[:k]) for k in range(len(nodes))]

        maps, wanted = {}, {}
        for path, value in values.items():  # the last one that fits wins
            is_map = value.ndim == 4 and value.shape[2] == value.shape[3] > 1 and value.shape[1] != 3  # 3: the image itself
            if is_map and narrow[place[end.args[0][path]]]:
                maps[value.shape[2]] = path
            if torch.equal(value, entered[0]):
                wanted = {path: "pooled", last_linear: "logits"}
        for k, side in enumerate(sorted(maps, reverse=True)):
            after = values[maps[side]]
            before = [path for path, value in values.items() if not value.equal(after) and value.relu().equal(after)]
            wanted |= {maps[side]: f"map{k}"} | ({before[-1]: f"preact{k}"} if before else {})
        if not maps or "pooled" not in wanted.values():
            raise ValueError("its layers give no square maps, or no vector that enters the last linear one")
        net = create_feature_extractor(model, wanted)
    except Exception as error:  # tracing can fail in as many ways as there are networks
        fail(f"torchvision.{name} is no network with maps and a linear classifier that can be traced ({one_line(error)})", 2)
    for graph in net.train_graph, net.eval_graph:
        end = next(iter(reversed(graph.nodes)))
        found = end.args[0]
        maps = [found[f"map{k}"] for k in range(len(maps))]
        preacts = [found.get(f"preact{k}", node) for k, node in enumerate(maps)]
        end.args = ((found["logits"], Features(maps, preacts, maps[-1], found["pooled"])),)
    net.train()  # compiles the graphs anew
    sources = [node if node.op == "call_module" else node.args[0] for node in preacts[1:]]  # a sum has the batch norm first
    norms = [getattr(node, "target", None) for node in sources]
    if all(isinstance(dict(net.named_modules()).get(norm), nn.BatchNorm2d) for norm in norms):
        net.stage_norms = norms
    return net


def conv(c_in: int, c_out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


def conv_bn(c_in: int, c_out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    return conv(c_in, c_out, kernel, stride, groups), nn.BatchNorm2d(c_out)


def projection(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    """The shortcut of a residual block: nothing, or a 1x1 convolution and batch norm where width or resolution changes."""
    return nn.Sequential(*conv_bn(c_in, c_out, 1, stride) if stride != 1 or c_in != c_out else ())


def stage(block: Callable[[int, int, int], nn.Module], c_in: int, c_out: int, stride: int, n: int) -> nn.Sequential:
    """n blocks, made from (c_in, c_out, stride); the first one changes width and resolution."""
    return nn.Sequential(block(c_in, c_out, stride), *(block(c_out, c_out, 1) for _ in range(n - 1)))


def init_convs(net: nn.Module) -> nn.Module:
    """Convolutions N(0, sqrt(2 / (k * k * c_out))), also depthwise ones, as in the published networks; their biases 0."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return net


class Staged(nn.Module):
    """Stem conv1-bn1-ReLU, stages layer1 ... layerk of blocks that return (output, preact), pooling, a linear classifier.

    `plan`: (c_in, c_out, stride, number of blocks) of each stage; `linear`: the classifier's name; `kernel`: the stem's;
    `norm`: the batch norm of a block before its last ReLU; `top`: width of a 1x1 convolution before the pooling.
    """

    def __init__(self, classes: int, block: Any, plan: Any, linear: str, kernel: int = 3, norm: str = "", top: int = 0):
        super().__init__()
        stages = {f"layer{k}": stage(block, *row) for k, row in enumerate(plan, 1)}  # the order of random draws: stages, stem
        self.conv1, self.bn1 = conv_bn(3, plan[0][0], kernel)
        for name, blocks in stages.items():
            self.add_module(name, blocks)
        width = plan[-1][1]
        if top:
            self.conv2, self.bn2 = conv_bn(width, top, 1)
        self.add_module(linear, nn.Linear(top or width, classes))
        self.stages, self.linear_name, self.top = list(stages), linear, top
        if norm:
            self.stage_norms = [f"{name}.{len(blocks) - 1}.{norm}" for name, blocks in stages.items()]

    def forward(self, x: Tensor) -> tuple[Tensor, Features]:
        x = F.relu(self.bn1(self.conv1(x)))
        maps, preacts = [x], [x]
        for name in self.stages:
            for block in self.get_submodule(name):
                x, preact = block(x)
            maps.append(x)
            preacts.append(preact)
        last = F.relu(self.bn2(self.conv2(x))) if self.top else x
        pooled = last.mean((2, 3))
        return self.get_submodule(self.linear_name)(pooled), Features(maps, preacts, last, pooled)


class BasicBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(c_in, c_out, 3, stride)
        self.conv2, self.bn2 = conv_bn(c_out, c_out)
        self.downsample = projection(c_in, c_out, stride)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        preact = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.downsample(x)
        return F.relu(preact), preact


def resnet(classes: int, depth: int, widths: tuple[int, ...] = (16, 16, 32, 64)) -> nn.Module:
    """CIFAR ResNet of 6n + 2 layers (He et al. 2016) with projection shortcuts; widths are those of stem and stages."""
    plan = [(c_in, c_out, stride, (depth - 2) // 6) for c_in, c_out, stride in zip(widths, widths[1:], (1, 2, 2))]
    return init_convs(Staged(classes, BasicBlock, plan, "fc", norm="bn2"))


class Bottleneck(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        mid = c_out // 4
        self.conv1, self.bn1 = conv_bn(c_in, mid, 1)
        self.conv2, self.bn2 = conv_bn(mid, mid, 3, stride)
        self.conv3, self.bn3 = conv_bn(mid, c_out, 1)
        self.shortcut = projection(c_in, c_out, stride)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        preact = self.bn3(self.conv3(out)) + self.shortcut(x)
        return F.relu(preact), preact


def resnet50(classes: int) -> nn.Module:
    """The ImageNet ResNet-50 with a 3x3 stem of stride 1 and no max pool."""
    plan = (64, 256, 1, 3), (256, 512, 2, 4), (512, 1024, 2, 6), (1024, 2048, 2, 3)
    return init_convs(Staged(classes, Bottleneck, plan, "linear", norm="bn3"))


class WideBlock(nn.Module):
    """Pre-activation block; its second output is its batch-normalized *input*, the preact of what comes before it."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), conv(c_in, c_out, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(c_out), conv(c_out, c_out)
        self.convShortcut = conv(c_in, c_out, 1, stride) if c_in != c_out else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        preact = self.bn1(x)
        activated = F.relu(preact)
        out = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return out + (x if self.convShortcut is None else self.convShortcut(activated)), preact


class WideResNet(nn.Module):
    """WRN-depth-k (Zagoruyko & Komodakis 2016), no dropout. Stage outputs are the blocks' raw sums, with negative values."""

    def __init__(self, classes: int, depth: int, k: int):
        super().__init__()
        widths, n = (16, 16 * k, 32 * k, 64 * k), (depth - 4) // 6
        self.conv1 = conv(3, 16)
        for k, stride in (1, 1), (2, 2), (3, 2):
            self.add_module(f"block{k}", nn.ModuleDict(dict(layer=stage(WideBlock, widths[k - 1], widths[k], stride, n))))
        self.bn1, self.fc = nn.BatchNorm2d(widths[3]), nn.Linear(widths[3], classes)
        self.stage_norms = ["block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"]
        init_convs(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Features]:
        maps, normalized = [self.conv1(x)], []
        for blocks in self.block1, self.block2, self.block3:
            first, *others = blocks["layer"]
            x, preact = first(maps[-1])
            for block in others:
                x, _ = block(x)
            maps.append(x)
            normalized.append(preact)
        preacts = [maps[0], *normalized[1:], self.bn1(x)]
        last = F.relu(preacts[-1])
        pooled = last.mean((2, 3))
        return self.fc(pooled), Features(maps, preacts, last, pooled)


class VGG(nn.Module):
    """VGG with batch norm and one linear layer: five blocks, max pools after the first three, from 64x64 pixels on after four."""

    def __init__(self, classes: int, convs: tuple[int, ...]):
        super().__init__()
        c_in = 3
        for k, (width, n) in enumerate(zip((64, 128, 256, 512, 512), convs)):
            layers: list[nn.Module] = []
            for _ in range(n):
                layers += [nn.Conv2d(c_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                c_in = width
            self.add_module(f"block{k}", nn.Sequential(*layers[:-1]))  # the last ReLU is applied in forward
        self.classifier = nn.Linear(512, classes)
        self.stage_norms = [f"block{k}.{3 * n - 2}" for k, n in enumerate(convs) if k]
        init_convs(self)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Features]:
        maps, preacts, pools = [], [], 3 if x.shape[2] < 64 else 4
        for block in self.block0, self.block1, self.block2, self.block3, self.block4:
            preacts.append(block(x))
            maps.append(F.relu(preacts[-1]))
            x = F.max_pool2d(maps[-1], 2) if len(maps) <= pools else maps[-1]
        pooled = x.mean((2, 3))
        return self.classifier(pooled), Features(maps, [maps[0], *preacts[1:]], x, pooled)


class InvertedResidual(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int):
        super().__init__()
        wide = c_in * expansion
        self.residual = stride == 1 and c_in == c_out
        middle = conv_bn(wide, wide, 3, stride, groups=wide)
        self.conv = nn.Sequential(*conv_bn(c_in, wide, 1), nn.ReLU(), *middle, nn.ReLU(), *conv_bn(wide, c_out, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 of half width. Stage outputs are linear: their preacts are the maps themselves."""

    def __init__(self, classes: int):
        super().__init__()
        narrow, wide = (partial(InvertedResidual, expansion=n) for n in (1, 6))
        plan = (8, 12, 1, 2), (12, 16, 2, 3), (16, 32, 2, 4), (32, 48, 1, 3), (48, 80, 2, 3), (80, 160, 1, 1)
        self.conv1 = nn.Sequential(*conv_bn(3, 16, 3, 2), nn.ReLU())
        self.blocks = nn.ModuleList([stage(narrow, 16, 8, 1, 1), *(stage(wide, *row) for row in plan)])
        self.conv2 = nn.Sequential(*conv_bn(160, 1280, 1), nn.ReLU())
        self.classifier = nn.Sequential(nn.Linear(1280, classes))
        self.stage_norms = ["blocks.1.1.conv.7", "blocks.2.2.conv.7", "blocks.4.2.conv.7", "blocks.6.0.conv.7"]
        init_convs(self)
        nn.init.normal_(self.classifier[0].weight, std=0.01)
        nn.init.zeros_(self.classifier[0].bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Features]:
        x = self.conv1(x)
        maps = [x]
        for k, row in enumerate(self.blocks):
            x = row(x)
            if k in (1, 2, 4, 6):  # the last row of each resolution
                maps.append(x)
        last = self.conv2(x)
        pooled = last.mean((2, 3))
        return self.classifier(pooled), Features(maps, maps, last, pooled)


class ShuffleUnitV1(nn.Module):
    """With stride 2 the pooled input is concatenated to fewer channels of the unit's own."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.stride = stride
        self.groups = 1 if c_in == 24 else 3  # 24 stem channels are too few to group
        own = c_out - c_in if stride == 2 else c_out
        mid = own // 4
        self.conv1, self.bn1 = conv_bn(c_in, mid, 1, groups=self.groups)
        self.conv2, self.bn2 = conv_bn(mid, mid, 3, stride, groups=mid)
        self.conv3, self.bn3 = conv_bn(mid, own, 1, groups=3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = F.channel_shuffle(F.relu(self.bn1(self.conv1(x))), self.groups)
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        preact = torch.cat([out, F.avg_pool2d(x, 3, 2, padding=1)], 1) if self.stride == 2 else out + x
        return F.relu(preact), preact


def shufflenetv1(classes: int) -> nn.Module:
    """ShuffleNet with 3 groups."""
    plan = (24, 240, 2, 4), (240, 480, 2, 8), (480, 960, 2, 4)
    return Staged(classes, ShuffleUnitV1, plan, "linear", kernel=1)


class ShuffleUnitV2(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        c = width // 2
        self.conv1, self.bn1 = conv_bn(c, c, 1)
        self.conv2, self.bn2 = conv_bn(c, c, 3, groups=c)
        self.conv3, self.bn3 = conv_bn(c, c, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, out = x.chunk(2, 1)
        preact = self.bn3(self.conv3(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(out)))))))
        return F.channel_shuffle(torch.cat([kept, F.relu(preact)], 1), 2), torch.cat([kept, preact], 1)


class ShuffleDownV2(nn.Module):
    def __init__(self, c_in: int, width: int):
        super().__init__()
        c = width // 2
        self.conv1, self.bn1 = conv_bn(c_in, c_in, 3, 2, groups=c_in)
        self.conv2, self.bn2 = conv_bn(c_in, c, 1)
        self.conv3, self.bn3 = conv_bn(c_in, c, 1)
        self.conv4, self.bn4 = conv_bn(c, c, 3, 2, groups=c)
        self.conv5, self.bn5 = conv_bn(c, c, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        left = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        right = self.bn5(self.conv5(self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)))))))
        preact = torch.cat([left, right], 1)
        return F.channel_shuffle(F.relu(preact), 2), preact


def shufflenetv2(classes: int) -> nn.Module:
    """ShuffleNetV2 of size 1. Preacts are not channel-shuffled although the maps are, as in RepDistiller."""
    plan = (24, 116, 2, 4), (116, 232, 2, 8), (232, 464, 2, 4)

    def block(c_in: int, c_out: int, stride: int) -> nn.Module:
        return ShuffleDownV2(c_in, c_out) if stride == 2 else ShuffleUnitV2(c_out)

    return Staged(classes, block, plan, "linear", kernel=1, top=1024)


# name -> function of the number of classes; add a line for a network of your own that returns (logits, Features)
NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    **{f"resnet{depth}": partial(resnet, depth=depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(resnet, depth=depth, widths=(32, 64, 128, 256)) for depth in (8, 32)},
    "resnet50": resnet50,
    **{f"wrn_{depth}_{k}": partial(WideResNet, depth=depth, k=k) for depth in (16, 40) for k in (1, 2)},
    "vgg8": partial(VGG, convs=(1, 1, 1, 1, 1)),
    "vgg11": partial(VGG, convs=(1, 1, 2, 2, 2)),
    "vgg13": partial(VGG, convs=(2, 2, 2, 2, 2)),
    "vgg16": partial(VGG, convs=(2, 2, 3, 3, 3)),
    "vgg19": partial(VGG, convs=(2, 2, 4, 4, 4)),
    "mobilenetv2": MobileNetV2,
    "shufflenetv1": shufflenetv1,
    "shufflenetv2": shufflenetv2,
}
