#!/usr/bin/env python3
"""Deep generative replay on the command line: train a scholar on a sequence of tasks, or draw samples from one.

    ./main.py --train --quick                       permutated MNIST with generative replay, in minutes on a laptop
    ./main.py --train --quick --replay-mode=none    the same without replay
    ./main.py --test --quick                        samples of a scholar trained with the same flags

Here are the recipes, and the parts are put together. Each option is declared where it is used; `--help` shows them all.
"""

import argparse
import itertools
import os
import platform
import re
import sys
import time
from dataclasses import asdict, dataclass, fields
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
from utils import DIRECTORIES, Run, RunPaths, UserError, flag, option

SOFT = {"replay_targets": "soft", "importance_of_new_task": "auto"}  # soft where targets would be hard
NARROW = SOFT | {"generator_c_channel_size": 16, "generator_g_channel_size": 16, "solver_channel_size": 256}
BEST = NARROW | {"lr": 5e-4, "lr_schedule": "linear"}
BEST_CHAIN = {"generator_c_updates_per_g_update": 2, "generator_iterations": 14000, "solver_iterations": 6000}
QUICK = NARROW | {"lr": 1e-3, "lr_schedule": "linear", "batch_size": 64, "mnist_permutation_number": 3}
QUICK |= {"generator_z_size": 32, "generator_iterations": 400, "solver_iterations": 300}
VAE = SOFT | {"generator": "vae", "solver": "mlp", "lr": 1e-3, "batch_size": 128}
VAE_CHAIN = {"solver": "cnn", "solver_channel_size": 128, "solver_iterations": 5000, "temperature": 4.0}
# The defaults that each recipe sets: for the experiments named, and ("") for all others.
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "2017": {"": {}},
    "best": {"": BEST, "permutated-mnist": VAE, "mnist-svhn": NARROW, "svhn-mnist": NARROW},
    "quick": {"": QUICK, "svhn-mnist": QUICK | {"generator_iterations": 600, "solver_iterations": 900}},
    "vae": {"": VAE, "split-mnist": VAE | {"solver_iterations": 500, "temperature": 4.0}},
}
RECIPES["best"]["mnist-chain"], RECIPES["vae"]["mnist-chain"] = BEST | BEST_CHAIN, VAE | VAE_CHAIN


@dataclass(frozen=True, kw_only=True)
class Actions:
    train: bool = option(False, "train a scholar on tasks", None, exclusive="required", group="action (required)")
    test: bool = option(False, "draw samples from a trained scholar (same flags)", None, exclusive="required")


@dataclass(frozen=True, kw_only=True)
class Options(
    Actions, data.ExperimentOptions, models.ScholarOptions, train.TrainingOptions, utils.FileOptions, visual.PlotOptions
):
    """All options; what the command line leaves open is filled in by `parse`."""

    recipe: str = "2017"

    @property
    def name(self) -> str:
        """<experiment>-<replay-mode>-r<importance>, then what of recipe, targets and networks is not the default."""
        r: float | str = 1 if dgr.REPLAY_MODES[self.replay_mode] is None else self.importance_of_new_task
        r = 0 if self.chain else r
        parts = [self.experiment, self.replay_mode, f"r{r if isinstance(r, str) else format(r, 'g')}"]
        parts += [self.recipe] if self.recipe != Options.recipe else []
        changed = self.changed()
        return "-".join(parts + [changed[key] for key in ("replay_targets", "generator", "solver") if key in changed])

    @property
    def paths(self) -> RunPaths:
        return RunPaths(self.name, self)

    @property
    def flags(self) -> list[str]:
        """The flags, besides experiment, replay mode, recipe and seed, that decide what is learned."""
        return [flag(key) + (f"={value}" if value is not True else "") for key, value in self.changed().items()]

    def changed(self) -> dict[str, Any]:
        """The options, among those that decide what is learned, that differ from the recipe."""
        recipe, mode = recipe_defaults(self.recipe, self.experiment), dgr.REPLAY_MODES[self.replay_mode]
        default = {f.name: utils.default_of(f) for f in fields(self)} | recipe
        default["replay_targets"], _ = targets_and_temperature(mode, None, None, recipe)
        _, default["temperature"] = targets_and_temperature(mode, self.replay_targets, None, recipe)
        apart = {"experiment", "tasks", "replay_mode", "seed", "importance_of_new_task" if self.chain else ""}
        if mode is None:
            apart |= {"replay_targets", "temperature", "importance_of_new_task"}
        elif mode.needs_generator:
            apart.add("sample_log")
        keys = [f.name for f in fields(self) if f.metadata.get("changes") and f.name not in apart]
        return {key: getattr(self, key) for key in keys if getattr(self, key) != default[key]}


LEARNING = [f.name for f in fields(Options) if f.metadata.get("changes")] + ["recipe"]
NETWORKS = [f.name for f in fields(Options) if f.metadata.get("changes") == "networks"]


def recipe_defaults(recipe: str, experiment: str) -> dict[str, Any]:
    return RECIPES[recipe].get(experiment, RECIPES[recipe][""])


def targets_and_temperature(
    mode: type[dgr.ReplayMode] | None, targets: str | None, temperature: float | None, recipe: dict[str, Any]
) -> tuple[str, float]:
    """Those given, or the defaults: the mode's first kind, or the recipe's instead of hard ones; 2 for soft ones."""
    kinds, preferred = mode.target_kinds if mode else ("hard",), recipe.get("replay_targets")
    targets = targets or (preferred if kinds[0] == "hard" and preferred in kinds else kinds[0])
    return targets, temperature or (recipe.get("temperature", 2.0) if targets == "soft" else 1.0)


def make_parser() -> utils.Parser:
    parser = utils.Parser(
        prog="main.py",
        description="Continual learning with deep generative replay (Shin et al. 2017).",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=40, width=110),
    )
    utils.add_options(parser, Actions)
    recipe = parser.add_argument_group("recipe").add_mutually_exclusive_group()
    help = "set of defaults (docs/running.md lists them); any flag you give overrides it (default: %(default)s)"
    recipe.add_argument("--recipe", choices=list(RECIPES), default=Options.recipe, help=help)
    recipe.add_argument("--quick", action="store_const", dest="recipe", const="quick", help="short for --recipe=quick")
    for part in (data.ExperimentOptions, train.TrainingOptions, models.ScholarOptions, utils.FileOptions):
        utils.add_options(parser, part)
    utils.add_options(parser, visual.PlotOptions)
    return parser


def parse(arguments: list[str]) -> Options:
    """Read and check the options; exits with status 2 and one line on standard error if they make no sense."""
    parser = make_parser()
    given = parser.parse_args(arguments)
    recipe = recipe_defaults(given.recipe, "" if given.tasks else given.experiment)
    parser.set_defaults(**{key: value for key, value in recipe.items() if key not in ("replay_targets", "temperature")})
    options = parser.parse_args(arguments)
    options.chain = not options.tasks and data.EXPERIMENTS[options.experiment].chain
    check_replay(parser, options, recipe)
    check_networks(parser, options)
    if options.tasks:
        stems = [re.sub(r"[^A-Za-z0-9_.-]", "_", Path(task).stem).lstrip(".") or "task" for task in options.tasks]
        options.experiment = "+".join(stems)[:100]
        if options.experiment in data.EXPERIMENTS:
            options.experiment = f"own-{options.experiment}"
    written = DIRECTORIES if options.train else ("sample_dir",)
    for directory in written:
        if problem := utils.not_writable(getattr(options, directory)):
            parser.error(f"argument {flag(directory)}: {problem}")
    for directory, other in itertools.combinations(written, 2):
        if os.path.realpath(getattr(options, directory)) == os.path.realpath(getattr(options, other)):
            parser.error(f"argument {flag(other)}: a run has files of the same name in {flag(directory)}: use another")
    return Options(**vars(options))


def check_replay(parser: utils.Parser, options: argparse.Namespace, recipe: dict[str, Any]) -> None:
    """Refuse what can't be combined, and fill in targets and temperature if they are not given."""
    mode, targets = dgr.REPLAY_MODES[options.replay_mode], options.replay_targets
    if targets and (mode is None or targets not in mode.target_kinds):
        can = f"has {' or '.join(mode.target_kinds)} targets" if mode else "replays nothing"
        parser.error(f"argument --replay-targets: {targets} does not go with {options.replay_mode}, which {can}")
    if mode is None and options.chain:
        parser.error(f"argument --replay-mode: {options.experiment} learns from replay alone, and none has no replay")
    given = options.temperature
    options.replay_targets, options.temperature = targets_and_temperature(mode, targets, given, recipe)
    if given is not None and options.replay_targets != "soft":
        parser.error("argument --temperature: it needs --replay-targets=soft")


def check_networks(parser: utils.Parser, options: argparse.Namespace) -> None:
    """Refuse convolutions that can't be made or can't learn, and updates that can't be recorded."""
    size, depth, reducing = options.solver_channel_size, options.solver_depth, options.solver_reducing_layers
    if options.cuda_graphs and options.lr_schedule != "constant":
        parser.error("argument --cuda-graphs: it needs --lr-schedule=constant, as recorded updates keep their rate")
    if options.solver != "cnn":
        return
    if size % (multiple := 2 ** (depth - 2)):
        parser.error(f"argument --solver-channel-size: {size} is not a multiple of {multiple} (--solver-depth {depth})")
    if reducing > depth - 1:
        parser.error(f"argument --solver-reducing-layers: --solver-depth {depth} has only {depth - 1} convolutions")
    if options.batch_size == 1 and reducing == 5:
        parser.error("argument --batch-size: use at least 2: batch normalisation can't normalise a single value")


def check_machine(options: Options) -> None:
    """Refuse what this machine can't do; not part of `parse`, which also lists runs for other machines."""
    parser = make_parser()
    if options.cuda_graphs and (options.no_gpus or not torch.cuda.is_available()):
        why = "--no-gpus leaves the GPU out" if options.no_gpus else "this machine has none that PyTorch can use"
        parser.error(f"argument --cuda-graphs: it needs a GPU, and {why}")
    if options.tensorboard:
        try:
            from torch.utils import tensorboard  # noqa: F401
        except ImportError as error:
            parser.error(f"argument --tensorboard: {utils.reason(error)}: pip install tensorboard")


def run_training(options: Options) -> None:
    """--train: learn the tasks, unless --resume finds that done; holds the locks of the run's name meanwhile."""
    if nothing_to_resume(options):
        return
    device = models.choose_device(gpus=not options.no_gpus)
    library = data.Library(options.data_dir, device, accept_unverified=options.unverified_data)
    tasks = data.make_tasks(library, options)
    paths = options.paths
    with utils.locked(paths.results), utils.locked(paths.scholar), utils.locked(paths.sample_log):
        if not nothing_to_resume(options):  # another run may have finished since
            train_scholar(options, tasks, library)


def nothing_to_resume(options: Options) -> bool:
    """True (with a message) if --resume was given but the run has finished. Raises UserError if its options differ."""
    if not options.resume or not options.paths.finished:
        return False
    if changes := changes_since(options):
        raise UserError(f"{options.paths.results} holds a run with {changes}: without --resume, it is kept elsewhere")
    print(f"{options.paths.results} is finished: nothing to resume")
    return True


def changes_since(options: Options) -> str:
    """How the options of the stored run of this name differ from these; empty if they do not, or there is no run."""
    config = options.paths.stored_config()
    return utils.differences(config["options"], plain(options), LEARNING) if config else ""


def plain(options: Options) -> dict[str, Any]:
    """The options as JSON can hold them."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(options).items()}


def train_scholar(options: Options, tasks: list[data.Task], library: data.Library) -> None:
    paths, device = options.paths, library.device
    shape = {"image_channels": tasks[0].train.images.shape[1], "classes": data.number_of_classes(tasks)}
    dtype = models.choose_dtype(options.dtype, device)
    config = describe_run(options, tasks, library, dtype)
    start = read_state(paths, config) if options.resume else None
    classifier = models.load_classifier(tasks, options.data_dir) if options.measures_generator else None
    if start is None:
        paths.rename_earlier()
    files = utils.RunFiles(paths.results, config, start and start["files"])
    observers = [files, *make_observers(options, len(tasks))]

    def save_scholar(scholar: dgr.Scholar) -> None:
        about = {"generator_trained": options.trains_generator, "options": config["options"], **shape}
        utils.save_checkpoint(paths.scholar, scholar=scholar.state_dict(), task=training.task, **about)

    def save_state() -> None:
        content = {"training": training.state_dict(), "files": files.state_dict()}
        utils.save_checkpoint(paths.state, keep_previous=True, **content)

    try:
        with utils.stop_requests() as stop_requested:
            torch.manual_seed(options.seed)
            training = train.Training(
                lambda: models.make_scholar(**shape, options=options, compute_dtype=dtype).to(device),
                tasks,
                options,
                images_at_once=models.images_at_once(device),
                observers=observers,
                sample=lambda scholar: models.sample_grid(scholar.generator, options.sample_size, options.seed),
                save_scholar=save_scholar,
                save_state=save_state,
                classifier=classifier,
                stop_requested=stop_requested,
            )
            if start is not None:
                wrong = "does not fit the networks, which have changed since: undo that, or leave out --resume"
                with utils.reading(paths.state, f"{paths.state} {wrong}"):
                    training.load_state_dict(start["training"])
                done = ", ".join(f"{phase} {count}" for phase, count in training.done.items())
                print(f"{options.name} continues at task {training.task}; iterations done: {done}")
            matrix = training.run()
        summary = files.write_summary(
            **{key: config[key] for key in ("experiment", "replay_mode", "recipe", "seed")},
            precision=matrix,
            average_precision=train.average_precision(matrix),
            forgetting=train.forgetting(matrix),
            **({"generator": training.measures} if classifier else {}),
        )
    finally:
        for observer in observers:
            observer.close()
    visual.save_figure([Run.read(paths.results)], paths.results / "precision.png")
    for path in (paths.state, utils.previous(paths.state)):
        path.unlink(missing_ok=True)
    print_summary(options, tasks, summary)


def make_observers(options: Options, tasks: int) -> list[utils.Observer]:
    """What shows how a run goes, besides its files, which must be there already."""
    results, log = options.paths.results, options.paths.sample_log
    observers = [visual.Progress(tasks)]
    observers += [visual.SamplePictures(lambda *_: results / utils.SAMPLES, options.image_log_interval)]
    if options.sample_log:
        observers += [visual.SamplePictures(lambda *at: visual.kept_sample(log, *at), options.sample_log_interval)]
    try:
        if not options.no_visdom:
            observers += [visual.LivePlots(Run.read(results), options.visdom_server, options.visdom_port)]
        if options.tensorboard:
            observers += [visual.TensorBoard(Run.read(results))]
    except UserError as error:  # a full disk, say: training goes on
        utils.warn(f"no plots: {error}")
    return observers


def read_state(paths: RunPaths, config: dict[str, Any]) -> dict[str, Any] | None:
    """The last good state of an unfinished run, or None; raises UserError if its options or data differ.

    Results in its directory that belong to another run are renamed.
    """
    if not paths.resumable:
        return None
    file, state = paths.last_state()
    begun = state["files"]["config"]
    if changes := utils.differences(begun["options"], config["options"], LEARNING):
        raise UserError(f"{file} belongs to a run with {changes}: use the same flags, or leave out --resume")
    if begun["data"]["checksums"] != config["data"]["checksums"]:
        raise UserError(f"{file} belongs to a run on other data files: use the same ones, or leave out --resume")
    if file != paths.state:  # or the next save would make the damaged state the previous one
        paths.state.unlink(missing_ok=True)
    begun["options"]["sample_dir"] = config["options"]["sample_dir"]  # where pictures go from now on
    stored = paths.stored_config()
    if paths.results.exists() and (not stored or stored["started"] != begun["started"]):  # another run's
        paths.rename_earlier(paths.results)
    for key in ("versions", "commit", "device", "dtype"):
        if begun[key] != config[key]:
            utils.warn(f"the run began with {key} {begun[key]}: the rest of it may differ a little")
    return state


def describe_run(options: Options, tasks: list[data.Task], library: data.Library, dtype: Any) -> dict[str, Any]:
    """What it takes to repeat a run: the content of its config.json."""
    versions = {module.__name__: str(module.__version__) for module in (torch, torchvision, np)}
    return {
        "name": options.name,
        "command": sys.argv,
        **{key: getattr(options, key) for key in ("experiment", "replay_mode", "recipe", "flags", "seed")},
        "options": plain(options) | {"sample_dir": str(options.sample_dir.resolve())},
        "tasks": [task.name for task in tasks],
        "data": {"checksums": library.checksums, "unverified": library.unverified},
        "device": models.device_name(library.device),
        "dtype": str(dtype or torch.float32).removeprefix("torch."),
        "versions": {"python": platform.python_version()} | versions,
        "commit": utils.commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def print_summary(options: Options, tasks: list[data.Task], summary: dict[str, Any]) -> None:
    print(f"\n{options.name}, seed {options.seed}: precision on each task's whole test set after the last task")
    for number, task in enumerate(tasks):
        # The last measurement: a chain measures each scholar once.
        value = next(row[number] for row in reversed(summary["precision"]) if row[number] is not None)
        print(f"  task {number + 1}, {task.name}: {value:.4f}")
    print("average precision {average_precision:.4f}, forgetting {forgetting:.4f}, {seconds:.0f} s".format(**summary))
    print(f"files: {options.paths.results}, scholar: {options.paths.scholar}")


def run_test(options: Options) -> None:
    """--test: draw samples, and measure the generator if its data are there."""
    path = options.paths.scholar
    checkpoint = utils.load_checkpoint(path)
    if changes := utils.differences(checkpoint["options"], plain(options), NETWORKS):
        raise UserError(f"{path} was trained with {changes}: use the flags it was trained with")
    if not checkpoint["generator_trained"]:
        raise UserError(f"{path}: the generator was never trained: {options.replay_mode} needs --sample-log for that")
    device = models.choose_device(gpus=not options.no_gpus)
    shape, dtype = (checkpoint["image_channels"], checkpoint["classes"]), models.choose_dtype(options.dtype, device)
    new_scholar = partial(models.make_scholar, *shape, options, compute_dtype=dtype)
    scholar = new_scholar()
    with utils.reading(path, f"{path} does not fit the flags"):
        scholar.load_state_dict(checkpoint["scholar"])
    scholar.to(device)
    visual.save_samples(models.sample_grid(scholar.generator, options.sample_size, options.seed), options.paths.drawn)
    print(f"samples: {options.paths.drawn}")
    try:
        library = data.Library(options.data_dir, device, options.unverified_data, download=False)
        tasks = data.make_tasks(library, options)
        classifier, learned = models.load_classifier(tasks, options.data_dir), tasks[: checkpoint.get("task")]
        measures = train.measure_generator(scholar, learned, classifier, new_scholar, options)
        print("\n".join(f"{name}: {np.round(value, 4)}" for name, value in measures.items()))
    except UserError as error:
        print(f"no measures of the generator: {error}")


def main(arguments: list[str] | None = None) -> None:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    check_machine(options)
    (run_training if options.train else run_test)(options)


if __name__ == "__main__":
    utils.run_program(main)
