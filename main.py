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
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
BEST_CHAIN = {"generator": "conv-flow", "generator_conditional": True, "generator_iterations": 8000}
BEST_CHAIN |= {"solver_iterations": 6000, "replay_pool": 20_000, "replay_distortion": 1.0, "replay_elastic": 2.0}
QUICK = NARROW | {"lr": 1e-3, "lr_schedule": "linear", "batch_size": 64, "mnist_permutation_number": 3}
QUICK |= {"generator_z_size": 32, "generator_iterations": 400, "solver_iterations": 300}
QUICK_SVHN = QUICK | {"generator_iterations": 600, "solver_iterations": 900}
DEMO = QUICK | {"image_size": 16, "generator_c_updates_per_g_update": 3, "generator_iterations": 300}
DEMO |= {"solver_channel_size": 128, "solver_iterations": 500}
VAE = SOFT | {"generator": "vae", "solver": "mlp", "lr": 1e-3, "batch_size": 128}
BEST_SVHN = BEST | {"lr": 1e-3, "batch_size": 64}
BEST_SVHN_MNIST = BEST_SVHN | {"generator_z_size": 32, "generator_iterations": 1500}
BEST_SVHN_MNIST |= {"solver_iterations": 3000, "temperature": 4.0}
BEST_PERMUTED = VAE | {"lr_schedule": "linear", "generator_z_size": 32}
VAE_CHAIN = {"solver": "cnn", "solver_channel_size": 128, "solver_iterations": 5000, "temperature": 4.0}
FLOW = QUICK | {"generator": "flow", "generator_iterations": 1500, "replay_pool": 10_000}
FLOW |= {"solver": "mlp", "solver_channel_size": 400, "solver_iterations": 500}
# The defaults that each recipe sets: for the experiments named, and ("") for all others.
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "2017": {"": {}},
    "best": {"": BEST, "permutated-mnist": BEST_PERMUTED, "svhn-mnist": BEST_SVHN_MNIST},
    "quick": {"": QUICK, "svhn-mnist": QUICK_SVHN, "split-svhn": QUICK_SVHN},
    "demo": {"": DEMO},
    "flow": {"": FLOW},
    "vae": {"": VAE, "split-mnist": VAE | {"solver_iterations": 500, "temperature": 4.0}},
}
RECIPES["best"]["split-mnist"] = BEST | {"solver_iterations": 3000, "solver_blur": 1.5, "solver_distortion": 1.0}
RECIPES["best"]["mnist-svhn"] = BEST_SVHN | {"generator": "vae"}
RECIPES["best"]["mnist-chain"], RECIPES["vae"]["mnist-chain"] = BEST | BEST_CHAIN, VAE | VAE_CHAIN


@dataclass(frozen=True, kw_only=True)
class Actions:
    train: bool = option(False, "train a scholar on tasks", None, exclusive="required", group="action (required)")
    test: bool = option(False, "draw from a trained scholar and measure it (same flags)", None, exclusive="required")
    on: str | None = option(None, "with --test: measure on these images", None, parse=data.task_source, metavar="TASK")


@dataclass(frozen=True, kw_only=True)
class Options(
    Actions, data.ExperimentOptions, models.ScholarOptions, train.TrainingOptions, utils.FileOptions, visual.PlotOptions
):
    """All options; what the command line leaves open is filled in by `parse`."""

    recipe: str = "2017"

    @property
    def name(self) -> str:
        """<experiment>-<replay-mode>-r<importance>, then what of recipe, targets and networks is not the default."""
        r = 0 if self.chain else self.r if dgr.REPLAY_MODES[self.replay_mode] else 1
        parts = [self.experiment, self.replay_mode, f"r{r if isinstance(r, str) else format(r, 'g')}"]
        parts += [self.recipe] if self.recipe != Options.recipe else []
        changed = self.changed()
        keys = ("replay_targets", "generator", "solver", "penalty")
        parts += [changed[key].replace(":", ".") for key in keys if key in changed]
        words = {"heads": "task-heads", "generator_conditional": "conditional", "validation": "validation"}
        parts += ["un" * (changed[key] is False) + words[key] for key in words if key in changed]
        parts += [f"{self.image_size}px"] if "image_size" in changed else []
        return "-".join(parts + (["continued"] if self.continue_from else []))

    @property
    def paths(self) -> RunPaths:
        return RunPaths(self.name, self)

    @property
    def flags(self) -> list[str]:
        """The flags, besides experiment, replay mode, recipe and seed, that decide what is learned."""
        flags = [flag(key, value) for key, value in self.changed().items()]
        return flags + ([f"--continue-from={self.continue_from.name}"] if self.continue_from else [])

    @property
    def deciding(self) -> list[str]:
        """The options that decide what is learned, with these networks, tasks and replay mode."""
        mode, idle = dgr.REPLAY_MODES[self.replay_mode], set(self.unused)
        idle |= {"importance_of_new_task"} if mode is None or self.chain else set()
        idle |= {"sample_log"} if mode is not None and mode.needs_generator else set()
        return [f.name for f in fields(self) if f.metadata.get("changes") and f.name not in idle]

    @property
    def unused(self) -> dict[str, str]:
        """The options without effect beside these networks and tasks, and what takes it from them."""
        return models.unused(self) | data.unused(self) | train.unused(self)

    @property
    def defaults(self) -> dict[str, Any]:
        return {f.name: utils.default_of(f) for f in fields(self)} | recipe_defaults(self.recipe, self.experiment)

    def changed(self) -> dict[str, Any]:
        """The options, among those that decide what is learned, that differ from the recipe."""
        recipe, mode = recipe_defaults(self.recipe, self.experiment), dgr.REPLAY_MODES[self.replay_mode]
        default = self.defaults
        default["replay_targets"], _ = targets_and_temperature(mode, None, None, recipe)
        _, default["temperature"] = targets_and_temperature(mode, self.replay_targets, None, recipe)
        keys = [key for key in self.deciding if key not in ("experiment", "tasks", "replay_mode", "seed")]
        return {key: getattr(self, key) for key in keys if getattr(self, key) != default[key]}


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
    check_combinations(parser, options, recipe)
    models.check_networks(parser, options)
    if options.tasks:
        stems = "+".join(Path(task).stem.lstrip(".") or "task" for task in options.tasks)
        name = re.sub(r"[^\w.+\-\xa1-\ud7ff\ue000-\U0010ffff]", "_", stems).encode()[:100].decode(errors="ignore")
        options.experiment = f"own-{name}" if name in data.EXPERIMENTS else name
    written = DIRECTORIES if options.train else ("sample_dir",)
    for directory in written:
        if problem := utils.not_writable(getattr(options, directory)):
            parser.error(f"argument {flag(directory)}: {problem}")
    for directory, other in itertools.combinations(written, 2):
        if os.path.realpath(getattr(options, directory)) == os.path.realpath(getattr(options, other)):
            parser.error(f"argument {flag(other)}: a run has files of the same name in {flag(directory)}: use another")
    options = Options(**vars(options))
    kept = options.train and options.continue_from and Path(os.path.realpath(options.continue_from))
    if kept and kept.name == options.name and Path(os.path.realpath(options.checkpoint_dir)) in kept.parents:
        parser.error(f"argument --continue-from: {kept} would be this run's own scholar: give it another name first")
    return options


def check_combinations(parser: utils.Parser, options: argparse.Namespace, recipe: dict[str, Any]) -> None:
    """Refuse what can't be combined, and fill in targets and temperature if they are not given."""
    mode, targets = dgr.REPLAY_MODES[options.replay_mode], options.replay_targets
    if targets and (mode is None or targets not in mode.target_kinds):
        can = f"has {' or '.join(mode.target_kinds)} targets" if mode else "replays nothing"
        parser.error(f"argument --replay-targets: {targets} does not go with {options.replay_mode}, which {can}")
    if options.chain and (mode is None or mode in (dgr.LwF, dgr.Joint)):
        parser.error(f"argument --replay-mode: {options.experiment} learns from the last scholar's replay alone")
    if targets == "own" and not options.generator_conditional:
        parser.error("argument --replay-targets: own needs --generator-conditional")
    most = 6 * ((65_500 - 2) // (options.image_size + 2))  # six a row, as JPEG has no more than 65,500 rows of pixels
    if options.sample_size > most:
        parser.error(f"argument --sample-size: at most {most} with --image-size={options.image_size}")
    if options.on and not options.test:
        parser.error("argument --on: it needs --test")
    chain = {f"--experiment={options.experiment}": options.chain}
    conditional = {"--generator-conditional": options.generator_conditional}
    heads = {"--heads=task": options.heads == "task"}
    penalty = {f"--penalty={options.penalty}": options.penalty != "none"}
    on, measuring = {"--on": options.on}, {"--measure-generator": options.measure_generator}
    continued, joint = {"--continue-from": options.continue_from}, {"--replay-mode=joint": mode is dgr.Joint}
    for one, others in (
        (heads, chain | conditional | on | measuring),
        (penalty, chain),
        (continued, chain | heads | penalty | joint | measuring),
    ):
        (name, given), other = *one.items(), next((name for name, given in others.items() if given), None)
        if given and other:
            parser.error(f"argument {name.split('=')[0]}: {name} does not go with {other}")
    given = options.temperature
    options.replay_targets, options.temperature = targets_and_temperature(mode, targets, given, recipe)
    if given is not None and options.replay_targets != "soft":
        parser.error("argument --temperature: it needs --replay-targets=soft")


def library_of(options: Options, device: torch.device, **settings: Any) -> data.Library:
    settings = {"image_size": options.image_size, "validation": options.validation} | settings
    return data.Library(options.data_dir, device, options.unverified_data, **settings)


def run_training(options: Options) -> None:
    """--train: learn the tasks, unless --resume finds that done; holds the locks of the run's name meanwhile."""
    if nothing_to_resume(options):
        return
    library = library_of(options, models.choose_device(gpus=not options.no_gpus))
    tasks = data.make_tasks(library, options)
    paths = options.paths
    with utils.locked(paths.results), utils.locked(paths.scholar), utils.locked(paths.sample_log):
        if not nothing_to_resume(options):  # another run may have finished since
            train_scholar(options, tasks, library)


def nothing_to_resume(options: Options) -> bool:
    """True (with a message) if --resume finds a finished run; UserError if options differ or its scholar is gone."""
    paths = options.paths
    if not options.resume or not paths.has_results:
        return False
    if changes := changes_since(options):
        raise UserError(f"{paths.results} holds a run with {changes}: without --resume, it is kept elsewhere")
    run = Run.read(paths.results)
    for scholar in [paths.scholar, *([paths.scholar_after(len(run.tasks))] if options.keep_scholars else [])]:
        paths.need(scholar)
    if not paths.figure.exists() or (options.trains_generator and not paths.drawn.exists()):
        draw_pictures(options, lambda: models.load_scholar(paths.scholar, options)[1])
    print(f"{paths.results} is finished: nothing to resume")
    return True


def sample(options: Options, scholar: dgr.Scholar) -> Tensor:
    return models.sample_grid(scholar.generator, options.sample_size, options.seed)


def draw_pictures(options: Options, scholar: Callable[[], dgr.Scholar]) -> None:
    """What the generator draws in the end, and the figure, of a run whose results and scholar are whole."""
    paths = options.paths
    try:
        if options.trains_generator:
            visual.save_samples(sample(options, scholar()), paths.drawn)
        visual.save_figure([Run.read(paths.results)], paths.figure)
    except OSError as error:
        what = "results and scholar are whole; make room, and --resume draws it"
        raise UserError(f"{error.filename or paths.figure}: {utils.reason(error)}: {what}") from error


def changes_since(options: Options) -> str:
    """How the stored run of this name differs in options, data or scholar; empty if it does not, or there is none."""
    if not (config := options.paths.stored_config()):
        return ""
    if utils.data_of(config)[0] != [data.fingerprint(task) for task in options.tasks or ()]:
        return "other data in --tasks"
    scholar = options.continue_from
    if scholar and scholar.exists() and data.checksum(scholar) != config["data"].get("scholar"):
        return "another scholar in --continue-from"
    stored = utils.plain(Options()) | config["options"]
    if found := utils.differences(stored, utils.plain(options), [*options.deciding, "recipe"]):
        return found
    others = data.replaced(config["data"]["checksums"], options.data_dir)
    return f"other files of {' and '.join(others)} in --data-dir" if others else ""


def train_scholar(options: Options, tasks: list[data.Task], library: data.Library) -> None:
    paths, (device, dtype) = options.paths, models.choose(options)
    for key, cause in options.unused.items():
        if getattr(options, key) != options.defaults[key]:
            utils.warn(f"{flag(key)} has no effect with {cause}")
    kept, before, classes = {}, None, data.number_of_classes(tasks)
    if options.continue_from:
        kept, scholar = models.load_scholar(options.continue_from, options)
        if (held_out := kept["options"].get("validation", 0.0)) != options.validation:
            raise UserError(f"--continue-from: its scholar was trained with --validation={held_out:g}: do so here too")
        tasks, classes = data.same_channels(tasks, kept["image_channels"]), max(classes, kept["classes"])
        scholar.solver.net = models.among_more(scholar.solver.net, classes - kept["classes"])
        before = train.continue_from(scholar, kept, tasks, options)
    shape = {"image_channels": tasks[0].train.images.shape[1], "classes": classes, "tasks": len(tasks)}
    where = models.device_name(device), models.dtype_name(dtype, device)
    print(f"{options.name} runs on {where[0]}, in {where[1]}")
    config = utils.describe_run(options, [task.name for task in tasks], *where)
    config["data"] = {"checksums": library.checksums, "unverified": library.unverified}
    config["data"] |= {"scholar": data.checksum(options.continue_from)} if kept else {}
    decide, defaults = [*options.deciding, "recipe"], utils.plain(Options())
    start = paths.read_state(config, decide, defaults) if options.resume else None
    splits = [task.train for task in tasks]
    measured = options.measure_generator and options.trains_generator
    classifier = models.load_classifier(splits, options.data_dir) if measured else None
    if start is None:
        paths.rename_earlier()
    files = utils.RunFiles(paths.results, config, start and start["files"])
    observers = [files, *make_observers(options, len(tasks))]

    def new_scholar() -> dgr.Scholar:
        scholar = models.make_scholar(**shape, options=options, compute_dtype=dtype).to(device)
        if options.replay_targets == "own" and not scholar.generator.classes:
            raise UserError(f"--replay-targets: own needs a conditional generator, and {options.generator} is not one")
        if kept:
            models.inherit(scholar, kept["scholar"])
        return scholar

    def save_scholar(scholar: dgr.Scholar) -> None:
        about = {"generator_trained": options.trains_generator, "options": config["options"], **shape}
        about["learned"] = (before.earlier if before else []) + [split.checksum for split in splits[: training.task]]
        utils.save_checkpoint(paths.scholar, scholar=scholar.state_dict(), **about)
        if options.keep_scholars:
            utils.save_checkpoint(paths.scholar_after(training.task), scholar=scholar.state_dict(), **about)

    def save_state() -> None:
        content = {"training": training.state_dict(), "files": files.state_dict()}
        utils.save_checkpoint(paths.state, keep_previous=True, **content)

    try:
        with utils.stop_requests() as stop_requested:
            torch.manual_seed(options.seed)
            training = train.Training(
                new_scholar,
                tasks,
                options,
                images_at_once=models.images_at_once(device),
                observers=observers,
                sample=partial(sample, options),
                save_scholar=save_scholar,
                keep_state=save_state,
                classifier=classifier,
                stop_requested=stop_requested,
                before=before,
            )
            if start is not None:
                wrong = "does not fit the networks, which have changed since: undo that, or leave out --resume"
                with utils.reading(paths.state, f"{paths.state} {wrong}"):
                    training.load_state_dict(start["training"])
                done = ", ".join(f"{phase} {count}" for phase, count in training.done.items())
                print(f"{options.name} continues at task {training.task}; iterations done: {done}")
            measures = training.run()
        about = {key: config[key] for key in ("experiment", "replay_mode", "recipe", "seed")}
        summary = files.write_summary(**about, **measures)
    finally:
        for observer in observers:
            observer.close()
    draw_pictures(options, lambda: training.scholar)
    for path in (paths.state, utils.previous(paths.state)):
        path.unlink(missing_ok=True)
    images = "held-out training images" if options.validation else "whole test set"
    utils.print_summary(f"{options.name}, seed {options.seed}", config["tasks"], summary, images)
    samples = f", samples: {paths.drawn}" if options.trains_generator else ""
    print(f"files: {paths.results}, scholar: {paths.scholar}{samples}")


def make_observers(options: Options, tasks: int) -> list[utils.Observer]:
    """What shows how a run goes, besides its files, which must be there already."""
    results, log = options.paths.results, options.paths.sample_log
    observers = [visual.Progress(tasks)]
    observers += [visual.SamplePictures(lambda *_: results / utils.SAMPLES, options.image_log_interval)]
    if options.sample_log:
        observers += [visual.SamplePictures(lambda *at: visual.kept_sample(log, *at), options.sample_log_interval)]
    try:
        if not options.no_visdom:
            observers += [visual.LivePlots(Run.read(results), options)]
        if options.tensorboard:
            observers += [visual.TensorBoard(Run.read(results))]
    except UserError as error:  # a full disk, say: training goes on
        utils.warn(f"no plots: {error}")
    return observers


def run_test(options: Options) -> None:
    """--test: draw samples and measure the generator; with --on, measure the solver on other images instead."""
    path = options.paths.scholar
    options.paths.need(path)
    device, dtype = models.choose(options)
    checkpoint, scholar = models.load_scholar(path, options)
    if options.on:
        library = library_of(options, device, validation=0.0)
        (task,) = data.same_channels(data.own_tasks(library, [options.on]), checkpoint["image_channels"])
        test, file = task.test, options.paths.answers(Path(options.on).stem)
        answers = train.scores(scholar.solver, test, models.images_at_once(device)).argmax(dim=1)
        right = int((answers == test.labels).sum()) / len(test)
        with utils.atomic_write(file) as table:
            rows = zip(range(len(test)), test.labels.tolist(), answers.tolist(), strict=True)
            np.savetxt(table, list(rows), fmt="%d", delimiter=",", header="image,label,answer", comments="")
        print(f"precision on {task.name}: {right:.4f} of {len(test)} test images\nanswers: {file}")
        return
    if not checkpoint["generator_trained"]:
        raise UserError(f"{path}: the generator was never trained: {options.replay_mode} needs --sample-log for that")
    visual.save_samples(sample(options, scholar), options.paths.drawn)
    print(f"samples: {options.paths.drawn}")
    try:
        if options.heads == "task":
            raise UserError("with --heads=task, a replayed image has a label for each task")
        library = library_of(options, device, download=False)
        tasks = data.same_channels(data.make_tasks(library, options), checkpoint["image_channels"])
        learned = [task for task in tasks if task.train.checksum in checkpoint["learned"]]
        if set(checkpoint["learned"]) != {task.train.checksum for task in learned}:
            raise UserError("the scholar has learned from other data than those of these flags")
        classifier = models.load_classifier([task.train for task in tasks], options.data_dir)
        shape = {key: checkpoint[key] for key in ("image_channels", "classes")}
        new_scholar = partial(models.make_scholar, **shape, options=options, compute_dtype=dtype)
        at_once = models.images_at_once(device)
        measures = train.measure_generator(scholar, learned, classifier, new_scholar, options, at_once)
        print("\n".join(f"{name}: {np.round(value, 4)}" for name, value in measures.items()))
    except UserError as error:
        print(f"no measures of the generator: {error}")


def main(arguments: list[str] | None = None) -> None:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    models.check_machine(options)
    visual.check_tensorboard(options)
    models.set_deterministic(options.deterministic)
    (run_training if options.train else run_test)(options)


if __name__ == "__main__":
    utils.run_program(main)
