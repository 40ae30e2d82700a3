#!/usr/bin/env python3
"""Makes the figures of the README, and its tables of results, from the runs kept in arts/runs.

    make figures                                     draw everything again, without training
    python arts/figures.py --keep results/NAME ...   keep runs: their files go to arts/runs, without paths of a machine

A run is kept as <name>-seed<seed>; a run of that name and seed that was there before is replaced.
"""

import argparse
import csv
import re
import shutil
import sys
from pathlib import Path

ARTS = Path(__file__).resolve().parent
ROOT = ARTS.parent
sys.path.insert(0, str(ROOT))

import main  # noqa: E402
import train  # noqa: E402
import visual  # noqa: E402
from utils import UserError, atomic_write, run_program  # noqa: E402

RUNS = ARTS / "runs"
README = ROOT / "README.md"
MARKS = re.compile(r"(<!-- results -->\n).*(<!-- end of results -->)", re.DOTALL)

# What the paper has at the end of training, read off its figures (about .01 exact): mean over tasks.
PUBLISHED = {
    ("permutated-mnist", "none"): 0.53,
    ("permutated-mnist", "noise-replay"): 0.66,
    ("permutated-mnist", "exact-replay"): 0.955,
    ("permutated-mnist", "generative-replay"): 0.93,
    ("split-mnist", "none"): 0.175,
    ("split-mnist", "noise-replay"): 0.20,
    ("split-mnist", "exact-replay"): 0.975,
    ("split-mnist", "generative-replay"): 0.95,
    ("mnist-svhn", "none"): (0.76 + 0.925) / 2,
    ("mnist-svhn", "exact-replay"): (0.985 + 0.905) / 2,
    ("mnist-svhn", "generative-replay"): (0.98 + 0.90) / 2,
    ("svhn-mnist", "none"): (0.64 + 0.99) / 2,
    ("svhn-mnist", "exact-replay"): (0.91 + 0.985) / 2,
    ("svhn-mnist", "generative-replay"): (0.905 + 0.98) / 2,
    ("mnist-chain", "generative-replay"): 0.9856,
}
EXPERIMENTS = list(dict.fromkeys(experiment for experiment, _ in PUBLISHED))
MODES = ["none", "noise-replay", "exact-replay", "generative-replay"]


def keep(directory: Path, suffix: str = "") -> Path:
    """Copy the files of a finished run to arts/runs."""
    run = visual.Run(directory)
    if run.summary is None:
        raise UserError(f"{directory} is not finished")
    target = RUNS / f"{run.config['name']}-seed{run.summary['seed']}{suffix}"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for path in run.config["options"]:
        if path.endswith("_dir"):
            run.config["options"][path] = ""
    run.config["command"] = ["./main.py", *run.config["command"][1:]]
    for name, content in (("config", run.config), ("summary", run.summary)):
        train.write_json(target / f"{name}.json", content)
    with (target / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, run.rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for row in run.rows if thinned(row, run.config["options"]))
    if (directory / visual.SAMPLES).exists():
        shutil.copy(directory / visual.SAMPLES, target)
    return target


def thinned(row: dict[str, str], options: dict) -> bool:
    """Whether a row of metrics stays: all precisions, and of the losses every fifth measurement."""
    every = 5 * options["loss_log_interval"]
    return row["name"].startswith("precision-") or int(row["iteration"]) % every == 0


def order(run: visual.Run) -> tuple:
    options = run.config["options"]
    experiment, mode = options["experiment"], options["replay_mode"]
    return (
        EXPERIMENTS.index(experiment) if experiment in EXPERIMENTS else len(EXPERIMENTS),
        MODES.index(mode),
        run.config["name"],
        options["seed"],
    )


def is_plain(run: visual.Run) -> bool:
    """Whether nothing but experiment, replay mode and --quick was chosen."""
    return run.config["options"]["quick"] and len(flags_of(run)) == 3


def flags_of(run: visual.Run) -> list[str]:
    """The flags that a run's outcome depends on, its seed aside."""
    options = run.config["options"]
    flags = ["--quick"] * options["quick"]
    flags += [f"--experiment={options['experiment']}", f"--replay-mode={options['replay_mode']}"]
    usual = vars(main.parse(["--train", *flags]))
    if options["tasks"] is None:
        changed = {key: value for key, value in options.items() if value != usual[key]}
        kept = [key for key in changed if key not in main.FREE_TO_CHANGE | {"seed"}]
        if "replay_targets" in kept and "temperature" in kept:  # one follows from the other
            kept.remove("temperature")
        flags += [f"--{key.replace('_', '-')}={changed[key]}" for key in kept]
    return flags


def results_table(runs: list[visual.Run]) -> str:
    """A line for each run, with the command that makes it again."""
    lines = [
        "`./main.py --train --quick --experiment=... --replay-mode=...` with the further flags, and `--seed=...`:",
        "",
        "| experiment | replay mode | further flags | seed | paper | ours | forgetting | seconds | commit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        options, summary = run.config["options"], run.summary
        experiment, mode = options["experiment"], options["replay_mode"]
        published = PUBLISHED.get((experiment, mode))
        note = f" ({run.data_note})" if run.data_note else ""
        further = " ".join(f"`{flag}`" for flag in flags_of(run)[3:])
        lines.append(
            f"| {experiment}{note} | {mode} | {further} | {summary['seed']} "
            f"| {'' if published is None else format(published, '.3f')} | **{summary['average_precision']:.3f}** "
            f"| {summary['forgetting']:.3f} | {summary['seconds']:.0f} | {(run.config['commit'] or '')[:7]} |"
        )
    return "\n".join(lines)


def chain_table(run: visual.Run) -> str:
    """The precision of each scholar of a chain."""
    own = [f"{row[i]:.4f}" for i, row in enumerate(run.summary["precision"])]
    head = " | ".join(f"scholar {number}" for number in range(1, len(own) + 1))
    return f"| {head} |\n|{'---|' * len(own)}\n| {' | '.join(own)} |"


def draw_all() -> None:
    runs = sorted((visual.Run(path) for path in RUNS.iterdir() if path.is_dir()), key=order)
    text = [results_table(runs), ""]
    for experiment in EXPERIMENTS:
        plain = [run for run in runs if run.config["options"]["experiment"] == experiment and is_plain(run)]
        plain = [run for run in plain if run.summary["seed"] == 0]
        if not plain:
            continue
        figure = ARTS / f"{experiment}.png"
        visual.save_figure(plain, figure)
        data_note = plain[0].data_note and f" ({plain[0].data_note})"
        text += [f"**{experiment}**{data_note}, seed 0, `--quick`", "", f"![precision on each task]({rel(figure)})", ""]
        if experiment == "mnist-chain":
            text += [chain_table(plain[-1]), ""]
        for run in plain:
            grid = run.directory / visual.SAMPLES
            if run.config["options"]["replay_mode"] == "generative-replay" and grid.exists():
                text += [f"![samples of the generator after the last task]({rel(grid)})", ""]
    new = MARKS.sub(lambda marks: marks[1] + "\n".join(text) + marks[2], README.read_text())
    with atomic_write(README) as file:
        file.write(new)


def rel(path: Path) -> str:
    return str(path.relative_to(ROOT))


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--keep", nargs="+", type=Path, metavar="RUN", default=[], help="runs to keep in arts/runs")
    parser.add_argument("--suffix", default="", metavar="TEXT", help="ends their names, where other flags were chosen")
    options = parser.parse_args()
    for directory in options.keep:
        print(f"kept: {keep(directory, options.suffix)}")
    draw_all()


if __name__ == "__main__":
    run_program(run)
