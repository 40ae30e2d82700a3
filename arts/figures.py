#!/usr/bin/env python3
"""Draw every figure and write arts/RESULTS.md from the kept runs, without training (`make figures`).

    arts/figures.py                                        all figures, GIFs and tables
    arts/figures.py --keep results/NAME ...                first keep finished runs
    arts/figures.py --keep-ablations results/ablations     first keep those of benchmarks/ablations.py (or levers)

runs.csv has one row per run, curves.csv.xz what was measured during training, samples.zip the pictures of --sample-log.
The prose of RESULTS.md is in RESULTS.template.md, where {{...}} stands for a table or for numbers (see `numbers`).
"""

import csv
import io
import json
import lzma
import re
import shutil
import statistics
import sys
import tempfile
import textwrap
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

ARTS = Path(__file__).resolve().parent
sys.path[:0] = [str(ARTS.parent), str(ARTS.parent / "benchmarks")]

from ablations import LEVERS, VARIATIONS  # noqa: E402

import main  # noqa: E402
import models  # noqa: E402
import utils  # noqa: E402
import visual  # noqa: E402
from utils import MODES, Run, Setting, UserError, flag  # noqa: E402

# ------------------------------------------------------------------------------------------------ the kept runs

SUMMARY = ("average_precision", "forgetting", "precision", "seconds")
OPTIONS = ("generator_iterations", "solver_iterations", "test_size")
VERSIONS = ("python", "torch", "torchvision", "numpy")
AS_JSON = ("precision", "measures", "data", "tasks", "command")
FURTHER = (*utils.MEASURES, "generator")  # what summary.json has of these; earlier runs have none
MEASURED = ("phase", "task", "iteration", "name", "value")
VARIATION = "variation="  # what benchmarks/ablations.py puts before a variation's name, among the flags


def to_row(run: Run) -> dict[str, str]:
    """A run as a row of runs.csv."""
    row = {"run": run.name, "experiment": run.experiment, "variation": run.config.get("variation", "")}
    row |= {"replay_mode": run.replay_mode, "recipe": run.recipe}
    row["flags"] = " ".join(flag for flag in run.flags if not flag.startswith(VARIATION))
    row |= {"seed": run.seed} | {key: run.summary[key] for key in SUMMARY}
    row["measures"] = {key: run.summary[key] for key in FURTHER if key in run.summary}
    row |= {key: run.config[key] for key in ("device", "dtype", "commit", "data", "tasks")}
    row |= {key: run.options[key] for key in OPTIONS} | {key: run.config["versions"][key] for key in VERSIONS}
    row |= {"started": run.config["started"], "command": run.config["command"]}
    text = {key: json.dumps(value) if key in AS_JSON else str(value) for key, value in row.items()}
    return text | {"commit": run.config["commit"] or ""}


def to_run(row: dict[str, str], measured: Sequence[dict[str, str]], samples: Path) -> Run:
    """The run of a row of runs.csv. samples: the directory with the unpacked pictures."""
    config: dict[str, Any] = row | {key: json.loads(row.get(key, "{}")) for key in AS_JSON}
    config |= {"name": row["run"], "seed": int(row["seed"]), "flags": row["flags"].split()}
    config["flags"] += [VARIATION + row["variation"]] if row["variation"] else []
    config["versions"] = {key: row[key] for key in VERSIONS}
    config["options"] = {"sample_dir": samples} | {key: int(row[key]) for key in OPTIONS}
    summary = {key: config[key] if key in AS_JSON else float(row[key]) for key in SUMMARY} | config["measures"]
    return Run(Path(row["run"]), config, summary, measured)


def read_kept(samples: Path) -> list[Run]:
    """The kept runs. samples: an empty directory to unpack their pictures into."""
    with zipfile.ZipFile(ARTS / "samples.zip") as archive:
        archive.extractall(samples)
    measured: dict[str, list[dict[str, str]]] = {}
    with lzma.open(ARTS / "curves.csv.xz", "rt", newline="") as file:
        for row in csv.DictReader(file):
            measured.setdefault(row.pop("run"), []).append(row)
    with (ARTS / "runs.csv").open(newline="") as file:
        return [to_run(row, measured[row["run"]], samples) for row in csv.DictReader(file)]


def write_kept(runs: Sequence[Run]) -> None:
    def write_rows(file: Any, rows: list[dict[str, str]]) -> None:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)

    curves = io.StringIO()
    write_rows(curves, [{"run": run.name} | {key: row[key] for key in MEASURED} for run in runs for row in run.rows])
    with utils.atomic_write(ARTS / "curves.csv.xz", "wb") as file:
        file.write(lzma.compress(curves.getvalue().encode()))
    with utils.atomic_write(ARTS / "samples.zip", "wb") as file, zipfile.ZipFile(file, "w") as archive:
        for run in runs:
            for path in run.kept_samples().values():
                archive.writestr(zipfile.ZipInfo(f"{run.name}/{path.name}"), path.read_bytes())  # of no date
    with utils.atomic_write(ARTS / "runs.csv") as file:
        write_rows(file, [to_row(run) for run in runs])


def keep(kept: list[Run], run: Run, samples: Path) -> None:
    """Add a finished run to the kept ones. It replaces the same run, if that is kept, and no other."""
    if run.summary is None:
        raise UserError(f"{run.directory} is not finished")
    if run.options["tasks"]:
        raise UserError(f"{run.directory} has tasks of its own, and RESULTS.md is about the experiments")
    same = [at for at, other in enumerate(kept) if (other.setting, other.seed) == (run.setting, run.seed)]
    row = to_row(run) | {"run": kept[same[0]].name if same else new_name(run, kept)}
    row["command"] = json.dumps(without_directories(run.config["command"]))
    files = run.config["data"]["checksums"]
    for other in kept:  # it may have names for data that are not the official ones
        if files.items() <= other.config["data"]["checksums"].items():
            sets = {file.split("/")[0] for file in files}
            names = {key: name for key, name in other.config["data"].items() if key in sets}
            row["data"] = json.dumps(run.config["data"] | names)
    every = 5 * run.options["loss_log_interval"]
    measured = [row for row in run.rows if utils.PRECISION.fullmatch(row["name"]) or int(row["iteration"]) % every == 0]
    pictures = list(run.kept_samples().values()) if run.seed == 0 else []  # figures show those of one seed
    shutil.rmtree(samples / row["run"], ignore_errors=True)
    for picture in pictures:
        (samples / row["run"]).mkdir(exist_ok=True)
        shutil.copy(picture, samples / row["run"])
    kept[slice(same[0], same[0] + 1) if same else slice(len(kept), None)] = [to_run(row, measured, samples)]
    print(f"kept: {row['run']}" + (", in place of the same run" if same else ""))


def new_name(run: Run, kept: Sequence[Run]) -> str:
    """Experiment, replay mode, recipe (or the variation), a number if other flags or data have these, and the seed."""
    settings = {other.name.rsplit("-seed", 1)[0]: other.setting for other in kept}
    variation = run.config.get("variation")
    parts = ["ablation", variation] if variation else [run.experiment, run.replay_mode, run.recipe]
    stem = re.sub(r"[^\w.-]+", "-", "-".join(parts))
    names = [stem, *(f"{stem}-{number}" for number in range(2, len(kept) + 3))]
    return next(name for name in names if settings.get(name, run.setting) == run.setting) + f"-seed{run.seed}"


def without_directories(command: Sequence[str]) -> list[str]:
    """A command without the directories of the machine where it ran."""
    script = "benchmarks/ablations.py" if Path(command[0]).name == "ablations.py" else "./main.py"
    words = "\0".join(["", *command[1:]])
    return [script, *re.sub(r"\0--([a-z]+-dir|results)[=\0][^\0]*", "", words).split("\0")[1:]]


# --------------------------------------------------------------------------------------------- tables, figures

# Published results after the last task, averaged over tasks, read off figures (the chain's: from a table).
PUBLISHED = {
    "mnist-chain": {"paper": {"generative-replay": "0.9856"}},
    "permutated-mnist": {
        "paper": {"none": "0.53", "noise-replay": "0.66", "exact-replay": "0.955", "generative-replay": "0.93"},
        "2017 repository": {
            "none": "0.75 to 0.79",
            "exact-replay": "0.96 to 0.97",
            "generative-replay": "0.89 to 0.91",
        },
    },
    "mnist-svhn": {
        "paper, on SVHN": {"none": "0.843", "exact-replay": "0.945", "generative-replay": "0.94"},
        "2017 repository, on SVHN": {"none": "0.81", "exact-replay": "0.935", "generative-replay": "0.923"},
    },
    "svhn-mnist": {
        "paper, on SVHN": {"none": "0.815", "exact-replay": "0.948", "generative-replay": "0.943"},
        "2017 repository, on SVHN": {"none": "0.815", "exact-replay": "0.945", "generative-replay": "0.915"},
    },
    "split-mnist": {
        "paper": {"none": "0.175", "noise-replay": "0.20", "exact-replay": "0.975", "generative-replay": "0.95"}
    },
}
NETWORKS = {flag(key) for key in models.NETWORKS}
NARROW = [f"{flag(key)}={value}" for key, value in main.NARROW.items() if key in models.NETWORKS]
KINDS = {
    "precision": "precision on each task",
    "average": "average precision on the tasks so far",
    "samples": "samples of the generator after each task",
}


def together(settings: Sequence[Setting]) -> dict[str, list[Setting]]:
    """The settings of an experiment that figures show together, by recipe, and by networks if those are not its own.

    Of each replay mode, the one with the most seeds, and of these the one closest to the recipe. One mode alone is
    shown only if it is the recipe as it is, other networks only beside their result without replay. Those measured on
    held-out training images are not shown.
    """
    settings = [setting for setting in settings if not setting.first.held_out]
    groups: dict[tuple[int, str], dict[str, Setting]] = {}
    plain = {"--sample-log"}  # which changes nothing that a solver learns
    for setting in sorted(settings, key=lambda setting: (len(setting.finished), -len({*setting.first.flags} - plain))):
        run = setting.first
        networks = [flag for flag in run.flags if flag.split("=")[0] in NETWORKS]
        networks = ["narrow"] if set(networks) == set(NARROW) else [flag.removeprefix("--") for flag in networks]
        key = list(main.RECIPES).index(run.recipe), "-".join([run.recipe, *networks])
        groups.setdefault(key, {})[run.replay_mode] = setting
    shown = {}
    for (_, name), by_mode in sorted(groups.items()):
        as_it_is = not any(setting.first.flags for setting in by_mode.values())
        if (len(by_mode) > 1 or as_it_is) and (name in main.RECIPES or "none" in by_mode):
            shown[name] = [by_mode[mode] for mode in MODES if mode in by_mode]
    return shown


def code(flags: Sequence[str]) -> str:
    return " ".join(f"`{flag}`" for flag in flags)


def row_of(setting: Setting) -> dict[str, str]:
    """A setting as a row of a table."""

    def each(key: str) -> str:
        return ", ".join(sorted({run.config[key] for run in setting.runs}))

    cells = visual.cells(setting) | {
        "flags": code(setting.first.flags),
        "device": each("device"),
        "dtype": each("dtype"),
    }
    cells["commit"] = ", ".join(sorted({run.config["commit"][:7] for run in setting.runs}))
    return {key: value for key, value in cells.items() if key != "experiment"}


def overview(experiments: dict[str, dict[str, list[Setting]]]) -> str:
    """Average precision by experiment, recipe and replay mode, above the published numbers."""
    rows = []
    for experiment, groups in experiments.items():
        for name, settings in groups.items():
            cells = {setting.first.replay_mode: visual.cells(setting) for setting in settings}
            precisions = [cells.get(mode, {}).get("average precision", "") for mode in MODES]
            title = next(iter(cells.values()))["experiment"]
            rows.append([title, name.replace("-", ", ", 1), *precisions])
        for source, published in PUBLISHED.get(experiment, {}).items():
            rows.append([experiment, f"*{source}*", *(published.get(mode, "") for mode in MODES)])
    return visual.markdown([dict(zip(["experiment", "recipe", *MODES], row, strict=True)) for row in rows])


def beside_exact(experiments: dict[str, dict[str, list[Setting]]]) -> str:
    """Generative beside exact replay where both were run, and how many points it is behind in runs of the same seed."""
    rows = []
    for experiment, groups in experiments.items():
        for name, settings in groups.items():
            by_mode = {setting.first.replay_mode: setting for setting in settings}
            exact, ours = by_mode.get("exact-replay"), by_mode.get("generative-replay")
            if not exact or not ours or main.data.EXPERIMENTS[experiment].chain:
                continue
            stored = {run.seed: value for run, value in zip(exact.finished, averages(exact), strict=True)}
            pairs = zip(ours.finished, averages(ours), strict=True)
            behind = [100 * (stored[run.seed] - value) for run, value in pairs if run.seed in stored]
            cells = {"experiment": visual.cells(ours)["experiment"], "tasks": str(len(ours.first.tasks))}
            cells["recipe"] = name.replace("-", ", ", 1)
            for mode, setting in (("exact replay", exact), ("generative replay", ours)):
                cells[mode], cells[f"seeds of {mode.split()[0]}"] = (
                    visual.cells(setting)[key] for key in ("average precision", "seeds")
                )
            cells["worst, best seed"] = f"{min(averages(ours)):.3f}, {max(averages(ours)):.3f}"
            cells["points behind, same seed"] = visual.mean_sd(behind, 1)
            cells["minutes"] = visual.mean_sd([run.summary["seconds"] / 60 for run in ours.finished], 0)
            rows.append(cells)
    return visual.markdown(rows) if rows else ""


def write_picture(figure: Any, name: str, title: str) -> list[str]:
    path = ARTS / f"{name}.png"
    visual.write_figure(figure, path)
    few = Image.open(path).convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(path, optimize=True)
    return [f"![{title}]({path.name})", ""]


def draw(experiment: str, name: str, settings: list[Setting]) -> list[str]:
    """Draw the figures of settings shown together. Returns their lines in RESULTS.md."""
    utils.label(settings)
    stem, text = f"{experiment}-{name}".replace("=", "-"), [f"### {experiment}, {name.replace('-', ', ', 1)}", ""]
    chain = settings[0].first.summary["precision"][-1][0] is None
    for kind, title in KINDS.items():
        says_the_same = kind == "average" and (chain or len(settings[0].first.tasks) < 3)  # as the precisions do
        figure = None if says_the_same else visual.FIGURES[kind](settings)
        text += write_picture(figure, f"{stem}-{kind}", f"{experiment}: {title}") if figure else []
    if visual.save_animation(settings, ARTS / f"{stem}.gif"):
        text += [f"![{experiment}: samples through training]({stem}.gif)", ""]
    if chain:
        scholars = {
            f"scholar {number}": visual.mean_sd([final(run)[number - 1] for run in settings[0].finished], 4)
            for number in range(1, len(settings[0].first.tasks) + 1)
        }
        text += [visual.markdown([scholars]), ""]
    return text


def final(run: Run) -> list[float]:
    """The precision on each task in the end; in a chain, that of each scholar."""
    matrix = run.summary["precision"]
    return [next(row[task] for row in reversed(matrix) if row[task] is not None) for task in range(len(matrix))]


# ------------------------------------------------------------------------------------------------- RESULTS.md


def numbers(query: str, settings: Sequence[Setting]) -> str:
    """Numbers of a setting, for the prose.

    A setting is EXPERIMENT RECIPE REPLAY-MODE FLAG..., with "narrow" for NARROW, or the name of a variation. It stands
    for its average precision, mean ± standard deviation. Before it, and a colon: "mean" (without the deviation), "each"
    (of every seed), "seed 0", "task 2" (the precision on that task, or of that scholar), "later" (the mean over tasks
    but the first), "lost" (points from the first scholar to the last), "task_incremental" and other further measures,
    "fitting_capacity after 1" (of the generator, after that task). "points: A - B" is the difference of two means.
    """
    what, _, name = query.rpartition(": ")
    if what == "points":
        ours, theirs = (statistics.mean(averages(find(part, settings))) for part in name.split(" - "))
        return f"{100 * (ours - theirs):.1f}"
    setting = find(name, settings)
    if what == "each":
        return ", ".join(f"{value:.3f}" for value in averages(setting))
    if what.startswith("seed "):
        return f"{averages(setting)[[run.seed for run in setting.finished].index(int(what[5:]))]:.3f}"
    if what == "lost":
        lost = [100 * (final(run)[0] - final(run)[-1]) for run in setting.finished]
        return f"{min(lost):.2f} to {max(lost):.2f}" if len(lost) > 1 else f"{lost[0]:.2f}"
    if what == "later":
        return visual.mean_sd([statistics.mean(final(run)[1:]) for run in setting.finished], 3)
    if what in utils.MEASURES:
        return visual.mean_sd([run.measure(what) for run in setting.finished], 3)
    if " after " in what:
        measure, task = what.split(" after ")
        return visual.mean_sd([run.generator_measure(measure)[int(task)] for run in setting.finished], 3)
    if what.startswith("task "):
        return visual.mean_sd([final(run)[int(what[5:]) - 1] for run in setting.finished], 3)
    both = visual.mean_sd(averages(setting), 3)
    return both.split(" ")[0] if what == "mean" else both


def averages(setting: Setting) -> list[float]:
    return [run.summary["average_precision"] for run in setting.finished]


def find(name: str, settings: Sequence[Setting]) -> Setting:
    experiment, recipe, mode, *flags = f"{name} - - -".split()[: max(3, len(name.split()))]
    flags = {*flags} - {"narrow"} | (set(NARROW) if "narrow" in flags else set())
    found = [setting for setting in settings if name == setting.first.config["variation"]]
    for setting in settings:
        run = setting.first
        if (run.experiment, run.recipe, run.replay_mode, {*run.flags} - {"--sample-log"}) == (
            experiment,
            recipe,
            mode,
            flags,
        ):
            found.append(setting)
    if not found:
        raise UserError(f"RESULTS.template.md: no kept run is {name!r}")
    return found[0]  # those with other data were kept later


def ablations(settings: Sequence[Setting]) -> str:
    """A row for each variation of benchmarks/ablations.py."""
    columns = ("seeds", "average precision", "forgetting", "dtype", "commit")
    names = [setting.first.config["variation"] for setting in settings]
    rows = []
    for name, setting in zip(names, settings, strict=True):
        flags = f" ({code(setting.first.flags[:-1])})" if names.count(name) > 1 else ""
        rows.append({"variation": name + flags} | {key: row_of(setting)[key] for key in columns})
    return visual.markdown(rows)


def ends(runs: Sequence[Run]) -> str:
    """How far precisions on the test images of the curves are from those on whole test sets, and how often compared."""
    away = []
    for run in runs:
        last = {(row["phase"], row["task"], row["name"]): float(row["value"]) for row in run.rows}
        pairs = [(value, last.get(("solver", *key))) for (phase, *key), value in last.items() if phase == "test"]
        away += [abs(whole - some) for whole, some in pairs if some is not None]
    return f"{statistics.mean(away):.4f} on average ({len(away)} curves)"


def wrap(block: str) -> str:
    """A paragraph or list with lines of even length; tables, headings and pictures stay as they are."""
    if block[0] in "|#!":
        return block
    items = [" ".join(item.split()).replace(" ± ", "\u00a0±\u00a0") for item in re.split(r"\n(?=- )", block)]
    how = {"width": 140, "break_long_words": False, "break_on_hyphens": False}
    lines = [textwrap.fill(item, subsequent_indent="  " * item.startswith("- "), **how) for item in items]
    return "\n".join(lines).replace("\u00a0", " ")


def draw_all(runs: list[Run]) -> None:
    """Draw all figures and write RESULTS.md."""
    variations = [run for run in runs if run.config["variation"]]
    experiments = utils.group_runs([run for run in runs if not run.config["variation"]])
    shown = {experiment: together(settings) for experiment, settings in experiments.items()}
    sections, others = [], []
    for experiment, settings in experiments.items():
        chosen = [setting for group in shown[experiment].values() for setting in group]
        rest = [setting for setting in settings if setting not in chosen]
        rest.sort(key=lambda setting: list(main.RECIPES).index(setting.first.recipe))
        title = f"## {visual.cells(settings[0])['experiment']}"
        sections += [title, "", visual.markdown([row_of(setting) for setting in chosen]) if chosen else "", ""]
        for name, group in shown[experiment].items():
            sections += draw(experiment, name, group)
        if measured := [setting for setting in settings if setting.measures_generator]:
            utils.label(measured)
            title, picture = f"{experiment}: what the generator knows after each task", f"{experiment}-generator"
            of = "; ".join(f"{s.first.recipe}, {s.first.replay_mode} {code(s.first.flags)}".strip() for s in measured)
            sections += [f"### {experiment}, the generator", "", f"Measured: {of}.", ""]
            sections += write_picture(visual.generator_figure(measured), picture, title)
        others += (
            [f"### Other settings: {experiment}", "", visual.markdown([row_of(s) for s in rest]), ""] if rest else []
        )
    of_variations = [setting for settings in utils.group_runs(variations).values() for setting in settings]
    order = [*VARIATIONS, *LEVERS]
    of_variations.sort(key=lambda setting: order.index(setting.first.config["variation"]))
    filled = {
        "overview": overview(shown),
        "beside exact": beside_exact(shown),
        "experiments": "\n".join(sections).rstrip(),
        "other settings": "\n".join(others).rstrip(),
        "ends": ends([run for run in runs if not run.config["variation"]]),
        "test size": ", ".join(sorted({str(run.options["test_size"]) for run in runs})),
        "runs": str(len(runs)),
        "narrow": code(NARROW),
    }
    for kind, names in (("ablations", VARIATIONS), ("levers", LEVERS)):
        those = [setting for setting in of_variations if setting.first.config["variation"] in names]
        filled[kind] = ablations(those) if those else ""
        filled[f"flags of {kind}"] = code(those[0].first.flags[:-1]) if those else ""
    everything = [setting for settings in experiments.values() for setting in settings] + of_variations

    def fill(found: re.Match[str]) -> str:
        query = " ".join(found[1].split())
        return filled[query] if query in filled else numbers(query, everything)

    text = re.sub(r"\{\{(.*?)\}\}", fill, (ARTS / "RESULTS.template.md").read_text(), flags=re.DOTALL)
    with utils.atomic_write(ARTS / "RESULTS.md") as file:
        file.write("\n\n".join(map(wrap, re.split(r"\n{2,}", text.strip()))) + "\n")


def run(arguments: list[str] | None = None) -> None:
    parser = utils.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--keep",
        nargs="+",
        action="extend",
        type=utils.to_path,
        metavar="RUN",
        default=[],
        help="finished runs to keep",
    )
    parser.add_argument("--keep-ablations", type=utils.to_path, metavar="DIR", help="runs of ablations.py to keep")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        samples = Path(directory)
        runs = read_kept(samples)
        new = [Run.read(directory) for directory in options.keep]
        if options.keep_ablations:
            found = utils.find_runs([options.keep_ablations])
            new += [run for run in found if run.summary and run.config.get("variation")]
        for run in new:
            keep(runs, run, samples)
        if new:
            write_kept(runs)
        draw_all(runs)


if __name__ == "__main__":
    utils.run_program(run)
