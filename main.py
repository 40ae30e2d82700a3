#!/usr/bin/env python3
"""Deep generative replay on the command line: train a scholar on a sequence of tasks, or draw samples from one.

    ./main.py --train                                  permutated MNIST with generative replay, at full size
    ./main.py --train --replay-mode=none --quick       the lower reference, at a size for a laptop
    ./main.py --test --quick                           samples of a scholar trained with the same flags

Every option is here; `./main.py --help` explains them. The method is in dgr.py.
"""

import argparse
import itertools
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

import data
import dgr
import models
import train
import utils
import visual
from utils import UserError

# What --quick changes: defaults only, so that every flag given still wins.
QUICK = {
    "mnist_permutation_number": 3,
    "importance_of_new_task": "auto",
    "generator_z_size": 32,
    "generator_c_channel_size": 16,
    "generator_g_channel_size": 16,
    "solver_channel_size": 256,
    "generator_iterations": 400,
    "solver_iterations": 300,
    "lr": 1e-3,
    "lr_schedule": "linear",
    "batch_size": 64,
}

# And for an experiment whose first task is the harder one, and takes longer.
QUICK_FOR = {"svhn-mnist": {"generator_iterations": 600, "solver_iterations": 900}}

# Experiments in which every scholar learns from scratch, from the one before it alone.
CHAINS = {"mnist-chain"}

# Of soft targets; van de Ven and Tolias 2019 use 2.
SOFT_TEMPERATURE = 2.0

# Directories that a run writes to.
DIRECTORIES = ("result_dir", "checkpoint_dir", "sample_dir")

# Ends the name of the state of a run under way, beside its scholar.
UNFINISHED = ".unfinished"

# Options that shape the networks: a checkpoint fits only where they are the same.
ARCHITECTURE = [
    *("generator", "generator_z_size", "generator_c_channel_size", "generator_g_channel_size"),
    *("solver", "solver_depth", "solver_reducing_layers", "solver_channel_size"),
]


# ----------------------------------------------------------------------------------------------------- options


def number(
    low: float, high: float = 2**31 - 1, *, kind: type = float, above: bool = False, below: bool = False
) -> Callable[[str], Any]:
    """Reads a number from low (or above it) to high (or below it)."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not ((low < value if above else low <= value) and (value < high if below else value <= high)):
            limits = f"{'above' if above else 'of at least'} {low:g}"
            limits += f" and {'below' if below else 'at most'} {high:.10g}" if high < 2**31 - 1 or value > high else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number {limits}")
        return value

    return parse


integer = partial(number, kind=int)


def importance(text: str) -> float | str:
    return text if text == "auto" else number(0, 1)(text)


def task_source(text: str) -> str:
    """The name of a data set, or the path of a .npz file."""
    if text not in data.DATA_SETS and not (text.endswith(".npz") and os.path.isfile(text)):
        choices = ", ".join(data.DATA_SETS)
        raise argparse.ArgumentTypeError(f"{text!r} is neither an existing .npz file nor one of {choices}")
    return text


def make_parser() -> utils.Parser:
    parser = utils.Parser(
        prog="main.py",
        description="Continual learning with deep generative replay (Shin et al. 2017).",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=40, width=110),
    )

    def add(group: Any, name: str, default: Any, meaning: str, kind: Any = None, **settings: Any) -> None:
        """An option whose help ends with its default and what --quick makes of it."""
        key = name.lstrip("-").replace("-", "_")
        quick = f"; with --quick: {QUICK[key]}" if key in QUICK else ""
        quick += "".join(f", {changes[key]} for {name}" for name, changes in QUICK_FOR.items() if key in changes)
        shown = "" if default is None else f" (default: {default}{quick})"
        if kind:
            settings = {"metavar": "PATH" if kind is Path else "X" if isinstance(default, float) else "N"} | settings
        group.add_argument(name, default=default, help=(meaning + shown).replace("%", "%%"), type=kind, **settings)

    def switch(group: Any, name: str, meaning: str) -> None:
        group.add_argument(name, action="store_true", help=meaning)

    what = parser.add_argument_group("what to do (one of the two is required)")
    what = what.add_mutually_exclusive_group(required=True)
    switch(what, "--train", "train a scholar on the tasks of an experiment")
    switch(what, "--test", "draw samples from a scholar trained with the same flags")

    group = parser.add_argument_group("experiment")
    tasks = group.add_mutually_exclusive_group()
    add(tasks, "--experiment", "permutated-mnist", "the sequence of tasks", choices=list(data.EXPERIMENTS))
    meaning = f"instead of an experiment: a task for each .npz file or name ({', '.join(data.DATA_SETS)})"
    add(tasks, "--tasks", None, meaning, task_source, metavar="TASK", nargs="+")
    add(group, "--replay-mode", "generative-replay", "where the past comes from", choices=list(dgr.REPLAY_MODES))
    meaning = (
        "what the solver is to answer to it: true labels, the old solver's class (hard) or probabilities (soft) "
        "(default: true for exact-replay, else hard; with --quick: soft for hard)"
    )
    add(group, "--replay-targets", None, meaning, choices=["true", "hard", "soft"])
    meaning = f"of soft targets (default: {SOFT_TEMPERATURE:g})"
    add(group, "--temperature", None, meaning, number(0.01, 1000), metavar="X")
    meaning = "r of equation 1, in [0, 1], or auto: 1/i at task i"
    add(group, "--importance-of-new-task", 0.3, meaning, importance, metavar="R")
    add(group, "--mnist-permutation-number", 5, "tasks of permutated-mnist", integer(1))
    add(group, "--mnist-permutation-seed", 0, "seed of the permutations", integer(0))
    add(group, "--mnist-split-number", 5, "tasks of split-mnist: parts of the ten digits", integer(1, 10))
    add(group, "--seed", 0, "seed of all other randomness", integer(0))
    switch(group, "--quick", "smaller defaults: minutes on a laptop instead of hours; flags given still win")

    group = parser.add_argument_group("generator")
    add(group, "--generator", "wgan", "WGAN-GP, or a variational autoencoder", choices=list(models.GENERATORS))
    add(group, "--generator-lambda", 10.0, "weight of the gradient penalty (wgan)", number(0))
    add(group, "--generator-z-size", 100, "size of the noise", integer(1))
    add(group, "--generator-c-channel-size", 64, "channels of the critic's first layer (wgan)", integer(1))
    meaning = "channels of the generator's last hidden layer; a VAE has 16 times as many units"
    add(group, "--generator-g-channel-size", 64, meaning, integer(1))
    add(group, "--generator-c-updates-per-g-update", 5, "critic updates in a generator iteration (wgan)", integer(1))
    add(group, "--generator-iterations", 3000, "iterations for each task", integer(1))

    group = parser.add_argument_group("solver")
    add(group, "--solver", "cnn", "a convolutional network, or one of linear layers", choices=list(models.SOLVERS))
    add(group, "--solver-depth", 5, "layers: convolutions, then one linear layer (cnn)", integer(2, 32))
    meaning = "of the convolutions, the last so many halve height and width (cnn)"
    add(group, "--solver-reducing-layers", 3, meaning, integer(0, 5))
    meaning = "channels of the last convolution, halved from layer to layer before it; units of an mlp's hidden layers"
    add(group, "--solver-channel-size", 1024, meaning, integer(1))
    add(group, "--solver-iterations", 1000, "iterations for each task", integer(1))

    group = parser.add_argument_group("optimisation (Adam, all networks)")
    add(group, "--lr", 1e-4, "learning rate", number(0, above=True))
    meaning = "linear: from --lr down to 0, anew for each task's generator and solver"
    add(group, "--lr-schedule", "constant", meaning, choices=["constant", "linear"])
    add(group, "--beta1", 0.5, "decay of the gradient's mean", number(0, 1, below=True))
    add(group, "--beta2", 0.9, "decay of the squared gradient's mean", number(0, 1, below=True))
    add(group, "--weight-decay", 1e-5, "L2 penalty on weights", number(0))
    add(group, "--batch-size", 32, "images of a batch; the solver sees as many replayed ones", integer(1))

    group = parser.add_argument_group("measuring and samples")
    meaning = "test images of each task for the curves; the summary uses them all"
    add(group, "--test-size", 1024, meaning, integer(1))
    add(group, "--sample-size", 36, "images of a sample grid, six a row", integer(1, 11_000))  # JPEG has no more rows
    meaning = "keep sample grids through training, and train the generator in every replay mode"
    switch(group, "--sample-log", meaning)
    add(group, "--sample-log-interval", 300, "generator iterations between kept grids", integer(1))
    add(group, "--image-log-interval", 100, "generator iterations between newest grids", integer(1))
    add(group, "--eval-log-interval", 50, "solver iterations between measurements", integer(1))
    add(group, "--loss-log-interval", 30, "iterations between logged losses", integer(1))

    group = parser.add_argument_group("files")
    default = Path(os.environ.get("DGR_DATA_DIR") or "./datasets")
    add(group, "--data-dir", default, "data sets; DGR_DATA_DIR sets the default", Path)
    switch(group, "--unverified-data", "accept data files that are not the official ones, with a warning")
    meaning = "go on with an unfinished run of this name, or start one; a finished one is left alone"
    switch(group, "--resume", meaning)
    meaning = "seconds between saved states of a run, besides one after each phase"
    add(group, "--checkpoint-interval", 300.0, meaning, number(0))
    add(group, "--result-dir", Path("./results"), "files of runs: PATH/NAME/", Path)
    add(group, "--checkpoint-dir", Path("./checkpoints"), "trained scholars: PATH/NAME", Path)
    add(group, "--sample-dir", Path("./samples"), "sample grids: PATH/NAME-sample.jpg", Path)

    group = parser.add_argument_group("machine and live plots")
    meaning = "what networks compute in; auto: bf16 where faster (GPUs, CPUs with AMX, AMD with AVX512-BF16), else fp32"
    add(group, "--precision", "auto", meaning, choices=["auto", "fp32", "tf32", "bf16"])
    meaning = "launch every update as one CUDA graph, not kernel by kernel (needs a GPU and a constant rate)"
    switch(group, "--cuda-graphs", meaning)
    switch(group, "--no-gpus", "use the CPU even where there is a GPU")
    add(group, "--visdom-server", "localhost", "where live plots go, if a server answers", metavar="HOST")
    add(group, "--visdom-port", 8097, "its port", integer(1, 65535))
    switch(group, "--no-visdom", "no live plots")
    meaning = "scalars, samples and options for TensorBoard too, in the run's directory"
    switch(group, "--tensorboard", f"{meaning} (needs: pip install tensorboard)")
    return parser


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read and check the options; exits with status 2 and one line on standard error if they make no sense."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.quick:
        parser.set_defaults(**QUICK | QUICK_FOR.get(options.experiment, {}))
        options = parser.parse_args(arguments)

    if options.solver == "cnn":
        check_cnn(parser, options)
    if options.cuda_graphs and options.lr_schedule != "constant":
        parser.error("argument --cuda-graphs: an update that it records keeps its rate: give --lr-schedule=constant")
    written = DIRECTORIES if options.train else ("sample_dir",)
    check_replay(parser, options)
    if options.tasks:
        stems = [re.sub(r"[^A-Za-z0-9_.-]", "_", Path(task).stem).lstrip(".") or "task" for task in options.tasks]
        options.experiment = "+".join(stems)[:100]
        if options.experiment in data.EXPERIMENTS:  # whose name says more than where the images are from
            options.experiment = f"own-{options.experiment}"
    for directory in written:
        if problem := utils.not_writable(getattr(options, directory)):
            parser.error(f"argument {flag(directory)}: {problem}")
    for directory, other in itertools.combinations(written, 2):
        if os.path.realpath(getattr(options, directory)) == os.path.realpath(getattr(options, other)):
            parser.error(
                f"argument {flag(other)}: it is {flag(directory)} too, and a run has files of one name in both: give "
                "another"
            )
    return options


def check_cnn(parser: utils.Parser, options: argparse.Namespace) -> None:
    """Refuse convolutions that can't be made, or can't learn."""
    halvings = options.solver_depth - 2
    if options.solver_channel_size % 2**halvings:
        parser.error(
            f"argument --solver-channel-size: {options.solver_channel_size} can't be halved {halvings} times, once for "
            f"each convolution but the last of --solver-depth {options.solver_depth}: give a multiple of {2**halvings}"
        )
    if options.solver_reducing_layers > options.solver_depth - 1:
        parser.error(
            f"argument --solver-reducing-layers: {options.solver_reducing_layers} is more than the "
            f"{options.solver_depth - 1} convolutions of --solver-depth {options.solver_depth}"
        )
    if options.batch_size == 1 and options.solver_reducing_layers == 5:
        parser.error(
            "argument --batch-size: with --solver-reducing-layers 5, 1 leaves batch normalisation a single value of "
            "each channel: give at least 2"
        )


def check_machine(options: argparse.Namespace) -> None:
    """Refuse what this machine can't do; apart from `parse`, for runs of other machines are listed with it too."""
    parser = make_parser()
    if options.cuda_graphs and (options.no_gpus or not torch.cuda.is_available()):
        why = "--no-gpus leaves the GPU out" if options.no_gpus else "this machine has none that PyTorch can use"
        parser.error(f"argument --cuda-graphs: it needs a GPU, and {why}")
    if options.tensorboard:
        try:
            from torch.utils import tensorboard  # noqa: F401
        except ImportError as error:
            parser.error(f"argument --tensorboard: {utils.reason(error)}: pip install tensorboard")


def check_replay(parser: utils.Parser, options: argparse.Namespace) -> None:
    """Refuse what can't be combined, and fill in the targets that are the mode's own."""
    kinds = dgr.REPLAY_MODES[options.replay_mode].target_kinds
    if options.replay_targets and options.replay_targets not in kinds:
        can = f"has {' or '.join(kinds)} targets" if kinds else "replays nothing"
        parser.error(
            f"argument --replay-targets: {options.replay_targets} is not for {options.replay_mode}, which {can}"
        )
    options.replay_targets = options.replay_targets or default_targets(options)
    if options.temperature is not None and options.replay_targets != "soft":
        parser.error("argument --temperature: it is for --replay-targets=soft")
    if options.experiment in CHAINS and options.replay_mode == "none":
        parser.error(f"argument --replay-mode: {options.experiment} learns from replay alone, and none has no replay")
    options.temperature = options.temperature or (SOFT_TEMPERATURE if options.replay_targets == "soft" else 1.0)


def default_targets(options: argparse.Namespace) -> str:
    """The mode's first kind; with --quick soft instead of hard ones, which say more about poor samples."""
    kinds = dgr.REPLAY_MODES[options.replay_mode].target_kinds
    if options.quick and kinds[:1] == ("hard",) and "soft" in kinds:
        return "soft"
    return kinds[0] if kinds else "hard"


def run_name(options: argparse.Namespace) -> str:
    """<experiment>-<replay-mode>-r<importance>, and the targets or networks where they are not the default ones."""
    r: float | str = 1 if options.replay_mode == "none" else options.importance_of_new_task
    if options.experiment in CHAINS:
        r = 0
    parts = [options.experiment, options.replay_mode, f"r{r if isinstance(r, str) else format(r, 'g')}"]
    parts += [options.replay_targets] if options.replay_targets != default_targets(options) else []
    parts += [options.generator] if options.generator != "wgan" else []
    parts += [options.solver] if options.solver != "cnn" else []
    return "-".join(parts)


@dataclass(frozen=True)
class Paths:
    """Where a run has its files; README.md says what is in each."""

    results: Path
    scholar: Path
    sample_log: Path

    @classmethod
    def of(cls, options: argparse.Namespace) -> "Paths":
        return cls(*(getattr(options, key) / run_name(options) for key in DIRECTORIES))

    @property
    def state(self) -> Path:
        """Of a run under way: everything that it depends on."""
        return self.scholar.with_name(f"{self.scholar.name}{UNFINISHED}")

    @property
    def drawn(self) -> Path:
        """The picture that --test draws."""
        return self.sample_log.with_name(f"{self.sample_log.name}-sample.jpg")

    @property
    def resumable(self) -> bool:
        """Whether there is a state to go on from."""
        return self.state.exists() or models.previous(self.state).exists()

    @property
    def finished(self) -> bool:
        """Whether the run has left results that can be read, and nothing to resume."""
        try:
            return bool(visual.Run(self.results).summary) and not self.state.exists()
        except UserError:
            return False

    def set_aside(self, *these: Path) -> None:
        """Give the files of an earlier run of this name, or these of them, another one, and say so."""
        # States first: without them, nothing takes what is left for a run to go on with.
        states = [self.state, models.previous(self.state)]
        for path, aside in utils.set_aside(these or [*states, self.results, self.scholar, self.sample_log, self.drawn]):
            print(f"{path} of an earlier run is kept as {aside}")


def take(options: argparse.Namespace, kind: type, **others: Any) -> Any:
    """A dataclass filled with the options of the same names."""
    return kind(**{f.name: getattr(options, f.name) for f in fields(kind) if f.name not in others}, **others)


# ------------------------------------------------------------------------------------------------------- train


def run_training(options: argparse.Namespace) -> None:
    """--train: learn the tasks, unless --resume finds that done; no other run of the same name meanwhile."""
    if nothing_to_resume(options):
        return
    device = utils.choose_device(gpus=not options.no_gpus)
    library = data.Library(options.data_dir, device, accept_unverified=options.unverified_data)
    if options.tasks:
        tasks = data.own_tasks(library, options.tasks)
    else:
        tasks = data.EXPERIMENTS[options.experiment](library, take(options, data.ExperimentOptions))
    paths = Paths.of(options)
    with utils.locked(paths.results), utils.locked(paths.scholar), utils.locked(paths.sample_log):
        if not nothing_to_resume(options):  # another run may have ended since
            train_scholar(options, tasks, library)


def nothing_to_resume(options: argparse.Namespace) -> bool:
    """Whether --resume is asked of a finished run, which is said; it must be of a run with the same options."""
    paths = Paths.of(options)
    if not options.resume or not paths.finished:
        return False
    if changes := other_run(options):
        raise UserError(
            f"{paths.results} is of a run with {changes}: leave out --resume to set it aside and start anew"
        )
    print(f"{paths.results} is finished: there is nothing to resume")
    return True


def train_scholar(options: argparse.Namespace, tasks: list[data.Task], library: data.Library) -> None:
    paths, device = Paths.of(options), library.device
    shape = {"image_channels": tasks[0].train.images.shape[1], "classes": data.number_of_classes(tasks)}
    scholar_options = take(options, models.ScholarOptions)
    dtype = utils.choose_precision(options.precision, device)
    schedule = take(
        options,
        train.Schedule,
        train_generator=trains_generator(options),
        replay_targets=dgr.Targets(options.replay_targets, options.temperature),
        importance_of_new_task=1.0 if options.replay_mode == "none" else options.importance_of_new_task,
        chain=options.experiment in CHAINS,
        images_at_once=utils.images_at_once(device),
    )
    config = describe_run(options, tasks, library, dtype)
    start = read_state(paths, config) if options.resume else None
    if start is None:
        paths.set_aside()
    elif is_of_another(paths.results, start["files"]["config"]):
        paths.set_aside(paths.results)
    files = train.RunFiles(paths.results, config, start and start["files"])
    observers = [files, *observers_of(options, len(tasks))]

    def save_scholar(scholar: dgr.Scholar) -> None:
        about = {"generator_trained": schedule.train_generator, "options": config["options"], **shape}
        models.save_checkpoint(paths.scholar, scholar=scholar.state_dict(), **about)

    def save_state() -> None:
        content = {"training": training.state_dict(), "files": files.state_dict()}
        models.save_checkpoint(paths.state, keep_previous=True, **content)

    try:
        with utils.stop_requests() as stop_requested:
            torch.manual_seed(options.seed)
            training = train.Training(
                lambda: models.make_scholar(**shape, options=scholar_options, compute_dtype=dtype).to(device),
                tasks,
                schedule,
                observers=observers,
                sample=lambda scholar: sample_grid(scholar.generator, options),
                save_scholar=save_scholar,
                save_state=save_state,
                stop_requested=stop_requested,
            )
            if start is not None:
                changed = "does not fit the networks, which have changed since: undo that, or leave out --resume"
                with utils.reading(paths.state, f"{paths.state} {changed}"):
                    training.load_state_dict(start["training"])
                done = ", ".join(f"{phase} {count}" for phase, count in training.done.items())
                print(f"{run_name(options)} goes on at task {training.task}; iterations done: {done}")
            matrix = training.run()
        summary = files.write_summary(
            matrix, experiment=options.experiment, replay_mode=options.replay_mode, seed=options.seed
        )
    finally:
        for observer in observers:
            observer.close()
    visual.save_figure([visual.Run(paths.results)], paths.results / "precision.png")
    for path in (paths.state, models.previous(paths.state)):
        path.unlink(missing_ok=True)
    report(options, tasks, summary)


def trains_generator(options: argparse.Namespace) -> bool:
    return dgr.REPLAY_MODES[options.replay_mode].needs_generator or options.sample_log


def observers_of(options: argparse.Namespace, tasks: int) -> list[visual.Observer]:
    """What shows and keeps how a run goes, besides its files, which must be there already."""
    paths = Paths.of(options)
    newest = visual.SamplePictures(lambda *_: paths.results / visual.SAMPLES, options.image_log_interval)
    observers = [visual.Progress(tasks), newest]
    if options.sample_log:
        kept = partial(visual.kept_sample, paths.sample_log)
        observers.append(visual.SamplePictures(kept, options.sample_log_interval))
    try:
        if not options.no_visdom:
            observers.append(visual.LivePlots(visual.Run(paths.results), options.visdom_server, options.visdom_port))
        if options.tensorboard:
            observers.append(visual.TensorBoard(visual.Run(paths.results)))
    except UserError as error:  # on a full disk, where training goes on
        utils.warn(f"no plots: {error}")
    return observers


def differences(before: dict[str, Any], now: dict[str, Any], keys: Sequence[str]) -> str:
    """Options of two runs that are not the same, for a user to read; empty if there are none."""
    parser = make_parser()
    before = {key: parser.get_default(key) for key in keys} | before  # of a run that is older than an option
    return ", ".join(f"{flag(key)} {before[key]}, not {now[key]}" for key in keys if before[key] != now[key])


def other_run(options: argparse.Namespace) -> str:
    """In what the run that has this name differs from the one that is asked for; empty if in nothing that counts.

    UserError if there is none, or none that can be read.
    """
    now, paths = vars(options), Paths.of(options)
    try:
        before = visual.Run(paths.results).options
    except UserError:
        if not paths.resumable:
            raise
        _, state = last_state(paths)
        before = state["files"]["config"]["options"]
    return differences(before, now, sorted(now.keys() - utils.FREE_TO_CHANGE))


def is_of_another(results: Path, config: dict[str, Any]) -> bool:
    """Whether there are results of another run than this one, which goes on: it may have been given their directory."""
    try:
        there = visual.Run(results)
    except UserError:  # nothing that could be read
        return False
    return (there.config.get("started"), there.seed) != (config["started"], config["options"]["seed"])


def flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def last_state(paths: Paths) -> tuple[Path, dict[str, Any]]:
    """The last good state of an unfinished run, and its file; a damaged one is named, and the one before tried."""
    for candidate in (paths.state, models.previous(paths.state)):
        if candidate.exists():
            try:
                return candidate, models.load_checkpoint(candidate)
            except UserError as error:
                utils.warn(str(error))
    raise UserError(f"{paths.state}: no good state is left; leave out --resume to start again")


def read_state(paths: Paths, config: dict[str, Any]) -> dict[str, Any] | None:
    """The last good state of an unfinished run; None if there is none. It must be of a run with the same options."""
    if not paths.resumable:
        return None
    file, state = last_state(paths)
    begun = state["files"]["config"]
    before, now = begun["options"], config["options"]
    if changes := differences(before, now, sorted(now.keys() - utils.FREE_TO_CHANGE)):
        raise UserError(f"{file} is of a run with {changes}: give the same flags, or leave out --resume")
    if begun["data"]["checksums"] != config["data"]["checksums"]:
        raise UserError(f"{file} is of a run on other data files: give the same ones, or leave out --resume")
    if file != paths.state:  # else the next state that is saved would make the damaged one the one before it
        paths.state.unlink(missing_ok=True)
    begun["options"]["sample_dir"] = now["sample_dir"]  # where pictures are from now on
    for key in ("versions", "commit", "device", "compute_dtype"):
        if begun[key] != config[key]:
            utils.warn(f"the run began with {key} {begun[key]}: the rest of it may differ a little")
    return state


def sample_grid(generator: dgr.Generator, options: argparse.Namespace) -> torch.Tensor:
    """Images (n, channels, 32, 32) from noise that is the same every time, and on every machine and device.

    It has a random stream of its own: looking does not change what is learned.
    """
    device = next(generator.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(options.seed)  # all, for a generator that draws more than z
        z = torch.randn(options.sample_size, generator.z_size)
        return generator.sample(options.sample_size, z.to(device))


def describe_run(
    options: argparse.Namespace, tasks: list[data.Task], library: data.Library, dtype: torch.dtype | None
) -> dict[str, Any]:
    """What one needs to know to repeat a run: the content of its config.json."""
    values = vars(options) | {"sample_dir": options.sample_dir.resolve()}
    versions = {module.__name__: str(module.__version__) for module in (torch, torchvision, np)}
    return {
        "name": run_name(options),
        "command": sys.argv,
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in values.items()},
        "tasks": [task.name for task in tasks],
        "data": {"checksums": library.checksums, "unverified": library.unverified},
        "device": utils.device_name(library.device),
        "compute_dtype": str(dtype or torch.float32),
        "versions": {"python": platform.python_version()} | versions,
        "commit": utils.commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def report(options: argparse.Namespace, tasks: list[data.Task], summary: dict[str, Any]) -> None:
    """The last lines of a run: what `summary.json` says, for a person."""
    paths = Paths.of(options)
    title = f"{run_name(options)}, seed {options.seed}"
    print(f"\n{title}: precision on the whole test set of each task after the last one")
    for number, task in enumerate(tasks):
        # The last measurement: of an earlier scholar of a chain, when it was done.
        value = next(row[number] for row in reversed(summary["precision"]) if row[number] is not None)
        print(f"  task {number + 1}, {task.name}: {value:.4f}")
    print(
        f"average precision {summary['average_precision']:.4f}, forgetting {summary['forgetting']:.4f}, "
        f"{summary['seconds']:.0f} s"
    )
    print(f"files: {paths.results}, scholar: {paths.scholar}")


# -------------------------------------------------------------------------------------------------------- test


def run_test(options: argparse.Namespace) -> None:
    """--test: draw samples."""
    paths = Paths.of(options)
    checkpoint = models.load_checkpoint(paths.scholar)
    if changes := differences(checkpoint["options"], vars(options), ARCHITECTURE):
        raise UserError(f"{paths.scholar} was trained with {changes}: give the flags it was trained with")
    if not checkpoint["generator_trained"]:
        raise UserError(
            f"{paths.scholar} has a generator that was never trained: {options.replay_mode} trains one only under "
            "--sample-log"
        )
    scholar_options = take(options, models.ScholarOptions)
    device = utils.choose_device(gpus=not options.no_gpus)
    dtype = utils.choose_precision(options.precision, device)
    channels, classes = checkpoint["image_channels"], checkpoint["classes"]
    scholar = models.make_scholar(channels, classes, scholar_options, compute_dtype=dtype)
    with utils.reading(paths.scholar, f"{paths.scholar} does not fit the flags"):
        scholar.load_state_dict(checkpoint["scholar"])
    scholar.to(device)
    visual.save_samples(sample_grid(scholar.generator, options), paths.drawn)
    print(f"samples: {paths.drawn}")


def main() -> None:
    options = parse(sys.argv[1:])
    check_machine(options)
    if options.train:
        run_training(options)
    else:
        run_test(options)


if __name__ == "__main__":
    utils.run_program(main)
