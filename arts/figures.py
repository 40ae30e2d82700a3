#!/usr/bin/env python3
"""Make the README's figures and tables from the runs kept in arts/runs, without training (`make figures`).

    arts/figures.py                                 all figures, and the README between its two marks
    arts/figures.py --keep results/NAME ...         first copy finished runs to arts/runs: no paths, fewer loss rows
    arts/figures.py --keep-ablations results        first copy what benchmarks/ablations.py has left there

README.md holds the tables between `<!-- results -->` and `<!-- end of results -->`, and that of all experiments between
`<!-- overview -->` and `<!-- end of overview -->`.
"""

import csv
import json
import re
import shutil
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

ARTS = Path(__file__).resolve().parent
ROOT = ARTS.parent
sys.path.insert(0, str(ROOT))

import main  # noqa: E402
import train  # noqa: E402
import visual  # noqa: E402
from utils import Parser, UserError, atomic_write, run_program, without_flags  # noqa: E402

RUNS = ARTS / "runs"
ABLATIONS = ARTS / "ablations"
README = ROOT / "README.md"
SIZES = {"": "Full size", "-quick": "`--quick` size"}
# The figures of each experiment; `visual.py arts/runs --figures DIR` draws all there are.
SHOWN = {
    "precision": "precision on each task",
    "average": "average precision on the tasks so far",
    "samples": "samples of the generator after each task",
}


# ------------------------------------------------------------------------------------------------------- keep


def keep(directory: Path, suffix: str = "") -> Path:
    """Copy the files of a finished run to arts/runs."""
    run = visual.Run(directory)
    if run.summary is None:
        raise UserError(f"{directory} is not finished")
    if run.options["tasks"]:
        raise UserError(f"{directory} has tasks of its own, and no experiment of the README")
    target = RUNS / f"{run.name}{size_of(run)}-seed{run.seed}{suffix}"
    if target.exists() and target.samefile(directory):
        return target
    if target.exists() and visual.Run(target).learned_with != run.learned_with:  # its name does not hold all flags
        raise UserError(f"{target} is a run with other flags than {directory}: give a --suffix, or take it away first")
    copy_run(run, target)
    return target


def copy_run(run: visual.Run, target: Path) -> None:
    """Copy the files of a run without paths of this machine, and with fewer rows of losses."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    kept_samples = {} if run.seed else run.kept_samples()  # of one seed, which is what figures show
    for path in run.options:
        if path.endswith("_dir"):
            run.options[path] = ""
    script, *words = run.config["command"]
    script = "benchmarks/ablations.py" if Path(script).name == "ablations.py" else "./main.py"
    run.config["command"] = [script, *without_flags(words, "--([a-z]+-dir|results)")]
    for name, content in (("config", run.config), ("summary", run.summary)):
        train.write_json(target / f"{name}.json", content)
    with (target / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, run.rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for row in run.rows if stays(row, run.options))
    if (run.directory / visual.SAMPLES).exists():
        with Image.open(run.directory / visual.SAMPLES) as samples:  # one channel, where all three are the same
            red, *others = samples.convert("RGB").split()
            grey = all(channel.tobytes() == red.tobytes() for channel in others)
            (red if grey else samples).save(target / visual.SAMPLES, optimize=True)
    for path in kept_samples.values():
        (target / visual.SAMPLE_LOG).mkdir(exist_ok=True)
        shutil.copy(path, target / visual.SAMPLE_LOG)


def keep_ablations(results: Path) -> None:
    """Copy the runs of benchmarks/ablations.py, and its list of them."""
    finished = [run for run in visual.find_runs([results / "ablations"]) if run.summary]
    targets = [ABLATIONS / seed.parent.name / seed.name for seed in (run.directory.parents[1] for run in finished)]
    if twice := {str(target) for target in targets if targets.count(target) > 1}:
        raise UserError(f"{results}: runs with different flags of {', '.join(sorted(twice))}: keep those of one call")
    for run, target in zip(finished, targets, strict=True):
        copy_run(run, target)
    shutil.copy(results / "ablations.json", ABLATIONS)


def stays(row: dict[str, str], options: dict) -> bool:
    """Whether a row of metrics stays: all precisions, and of the losses every fifth measurement."""
    every = 5 * options["loss_log_interval"]
    return bool(visual.PRECISION.fullmatch(row["name"])) or int(row["iteration"]) % every == 0


def size_of(run: visual.Run) -> str:
    return "-quick" if run.options["quick"] else ""


# --------------------------------------------------------------------------------------------- tables, figures


def flags_of(run: visual.Run) -> list[str]:
    """The flags that a run's outcome depends on, its seed aside."""
    flags = ["--quick"] * run.options["quick"]
    flags += [f"--experiment={run.experiment}", f"--replay-mode={run.replay_mode}"]
    for key, value in run.learned_with.items():
        if value != getattr(main.parse(["--train", *flags]), key):  # some defaults follow from the flags before
            flags.append(main.flag(key) + (f"={value}" if value is not True else ""))
    return flags


def further_flags(run: visual.Run) -> list[str]:
    """What of them is not experiment, replay mode or size."""
    return flags_of(run)[2 + run.options["quick"] :]


def is_plain(run: visual.Run) -> bool:
    """Whether nothing that changes what is learned was chosen but experiment, replay mode and size."""
    return not {*further_flags(run)} - {"--sample-log"}


def has_suffix(run: visual.Run) -> bool:
    """Whether a run is kept as one of those that tried other flags."""
    return not run.directory.name.endswith(f"-seed{run.seed}")


def is_narrow(run: visual.Run) -> bool:
    """Whether a network has fewer channels than those of its size have."""
    usual = vars(main.parse(["--train", *["--quick"] * run.options["quick"]]))
    keys = ("generator_c_channel_size", "generator_g_channel_size", "solver_channel_size")
    return any(run.options[key] < usual[key] for key in keys)


def drawn(arms: list[visual.Arm]) -> dict[str, list[visual.Arm]]:
    """The arms of an experiment that figures show together, by what the names of their files end in.

    Those of each pair of networks that has several replay modes, if any has: of each mode the plain arm, or where there
    is none one kept without a suffix, or else that of most seeds, and of these the best.
    """
    chosen: dict[str, dict[str, visual.Arm]] = {}

    def rank(arm: visual.Arm) -> tuple[bool, bool, int, float]:
        precisions = [run.summary["average_precision"] for run in arm.finished]
        return is_plain(arm.first), not has_suffix(arm.first), len(arm.runs), statistics.mean(precisions)

    for arm in sorted(arms, key=rank):
        options = arm.first.options
        networks = "".join(f"-{options[key]}" for key in ("generator", "solver"))
        usual = networks == "-wgan-cnn" and not is_narrow(arm.first)
        chosen.setdefault("" if usual else networks, {})[arm.first.replay_mode] = arm
    most = {networks: by_mode for networks, by_mode in chosen.items() if len(by_mode) > 1} or chosen
    together = {networks: [arm for arm in arms if arm in most[networks].values()] for networks in sorted(most)}
    for shown in together.values():
        visual.label(shown)
    return together


def heading(experiment: str, arms: list[visual.Arm], size: str) -> str:
    """What is above figures: the experiment, its data, its size, and the further flags of the arms."""
    note = f" ({arms[0].first.data_note})" if arms[0].first.data_note else ""
    further = {arm.label: further_flags(arm.first) for arm in arms}
    common = [flag for flag in further[arms[0].label] if all(flag in flags for flags in further.values())]
    text = f"**{experiment}**{note}, {SIZES[size].lower()}" + (f" with {code(common)}" if common else "")
    own = {label: code(flag for flag in flags if flag not in common) for label, flags in further.items()}
    return "; ".join([text, *(f"{label}: {flags}" for label, flags in own.items() if flags)])


def kept_as(arm: visual.Arm) -> str:
    """The directories of an arm's runs in arts/runs, as a shell would expand it."""
    seeds = ",".join(str(run.seed) for run in arm.runs)
    return re.sub(r"-seed\d+", f"-seed{{{seeds}}}" if "," in seeds else f"-seed{seeds}", arm.first.directory.name)


def code(flags: Iterable[str]) -> str:
    return " ".join(f"`{flag}`" for flag in flags)


def row_of(arm: visual.Arm) -> dict[str, str]:
    """An arm as a row of the README's table."""
    cells = visual.cells(arm)
    run = arm.first
    return {
        "experiment": cells["experiment"],
        "replay mode": run.replay_mode,
        "further flags": code(further_flags(run)),
        "seeds": cells["seeds"],
        "paper": cells["paper"],
        "2017 repository": cells["2017 repository"],
        "ours": f"**{cells['average precision']}**",
        "forgetting": cells["forgetting"],
        "seconds": cells["seconds"],
        "device": ", ".join(sorted({each.config["device"] for each in arm.runs})),
        "commit": ", ".join(sorted({(each.config["commit"] or "")[:7] for each in arm.runs})),
    }


def chain_table(arm: visual.Arm) -> str:
    """The precision of each scholar of a chain."""
    numbers = [[run.summary["precision"][i][i] for run in arm.finished] for i in range(len(arm.first.tasks))]
    return visual.markdown([{f"scholar {i}": visual.spread(own, 4) for i, own in enumerate(numbers, start=1)}])


def overview(runs: list[visual.Run]) -> list[str]:
    """Average precisions of the arms in figures, a row for each experiment, size and pair of networks."""
    names = {"wgan": "WGAN-GP", "vae": "VAE", "cnn": "CNN", "mlp": "MLP"}
    rows: dict[str, list[dict[str, str]]] = {}
    for size in SIZES:
        for experiment, arms in visual.arms_of([run for run in runs if size_of(run) == size]).items():
            for together in drawn(arms).values():
                cells = {arm.first.replay_mode: visual.cells(arm) for arm in together}
                run = together[-1].first
                row = {"experiment": visual.cells(together[0])["experiment"], "size": "`--quick`" if size else "full"}
                networks = [names.get(run.options[key], run.options[key]) for key in ("generator", "solver")]
                row["networks"] = ", ".join(networks + ["narrow"] * is_narrow(run))
                for mode in visual.MODES:
                    own = cells.get(mode, {"average precision": "", "paper": ""})
                    row[mode] = own["average precision"] + (f" ({own['paper']})" if own["paper"] else "")
                rows.setdefault(experiment, []).append(row)
    order = sorted(rows, key=[run.experiment for run in runs].index)
    return [visual.markdown([row for experiment in order for row in rows[experiment]]), ""]


def draw_size(runs: list[visual.Run], size: str) -> list[str]:
    """Figures of the runs of one size, and what the README says: of the arms in figures, then of all others."""
    if not runs:
        return []
    flags = " --quick" if size else ""
    experiments = visual.arms_of(runs)
    figures = {experiment: drawn(arms) for experiment, arms in experiments.items()}
    shown = {id(arm) for of_networks in figures.values() for together in of_networks.values() for arm in together}
    table: list[dict[str, str]] = []
    others: list[dict[str, str]] = []
    for arm in (arm for arms in experiments.values() for arm in arms):
        (table if id(arm) in shown else others).append(row_of(arm))
    own_data = ", ".join(sorted({called for run in runs for called in run.unofficial.values()}))
    lead = f"`./main.py --train{flags} --experiment=... --replay-mode=... --seed=...`, and"
    lead += f" (with {own_data}: `--unverified-data` too)" if own_data else ""
    text = [f"### {SIZES[size]}", "", f"{lead}:"]
    text += ["", visual.markdown(table), ""]
    if others:
        summary = (
            f"<details><summary>{len(others)} more rows: the same with other flags, to see what they change</summary>"
        )
        text += [summary, "", visual.markdown(others), "", "</details>", ""]
    for experiment, of_networks in figures.items():
        for networks, together in of_networks.items():
            text += draw_experiment(together, ARTS / f"{experiment}{size}{networks}", size)
    return text


def draw_experiment(arms: list[visual.Arm], stem: Path, size: str) -> list[str]:
    """Figures of the arms of one experiment, named after `stem`, and what the README says of them."""
    experiment = arms[0].first.experiment
    kept = ", ".join(f"`{kept_as(arm)}`" for arm in arms)
    note = "; samples are of the first seed" if any(arm.first.kept_samples() for arm in arms) else ""
    text = [heading(experiment, arms, size), "", f"Runs: {kept}{note}.", ""]
    for kind, says in SHOWN.items():
        if experiment in main.CHAINS and kind == "average":  # of one task at a time: says what precision says
            continue
        if figure := visual.FIGURES[kind](arms):
            path = stem.with_name(f"{stem.name}-{kind}.png")
            visual.write_figure(figure, path)
            Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
            text += [f"![{says}]({path.relative_to(ROOT)})", ""]
    if experiment in main.CHAINS:
        text += [chain_table(arms[-1]), ""]
    animation = stem.with_name(f"{stem.name}.gif")
    if visual.save_animation(arms, animation):
        text += [f"![the generator through all tasks]({animation.relative_to(ROOT)})", ""]
    return text


def ablations() -> list[str]:
    """What the README says of the runs of benchmarks/ablations.py."""
    content = json.loads((ABLATIONS / "ablations.json").read_text())
    rows = []
    for name in content["average_precision"]:
        runs = [visual.Run(ABLATIONS / name.replace(" ", "-") / f"seed-{seed}") for seed in content["seeds"]]
        precisions = [run.summary["average_precision"] for run in runs]
        rows.append({"permutated-mnist": name, "average precision": visual.spread(precisions, 3)})
    seeds, commits = ", ".join(map(str, content["seeds"])), ", ".join(commit[:7] for commit in content["commit"])
    made = f"seeds {seeds}; {', '.join(content['device'])}; commit {commits}"
    lead = "One thing at a time done as the 2017 repository does it, or by a flag (`benchmarks/ablations.py`), with"
    return ["### One thing at a time", "", f"{lead} {code(content['flags'])}; {made}:", "", visual.markdown(rows), ""]


def curves_and_summaries(runs: list[visual.Run]) -> list[str]:
    """How far precisions on evenly spread test images, which curves show, are from those on whole test sets."""
    away = []
    for run in runs:
        last = {(row["phase"], row["task"], row["name"]): float(row["value"]) for row in run.rows}
        pairs = [(value, last.get(("solver", *key))) for (phase, *key), value in last.items() if phase == "test"]
        away += [abs(whole - some) for whole, some in pairs if some is not None]
    images = ", ".join(str(number) for number in sorted({run.options["test_size"] for run in runs}))
    lead = f"Curves, on {images} evenly spread test images, end on average"
    return [f"{lead} {statistics.mean(away):.4f} from the precision on the whole test set ({len(away)} ends).", ""]


def draw_all() -> None:
    runs = visual.find_runs([RUNS])
    text = [line for size in SIZES for line in draw_size([run for run in runs if size_of(run) == size], size)]
    readme = README.read_text()
    text += ablations() + curves_and_summaries(runs)
    for mark, lines in (("overview", overview(runs)), ("results", text)):
        marks = re.compile(rf"(<!-- {mark} -->\n).*(<!-- end of {mark} -->)", re.DOTALL)
        readme = marks.sub(lambda found, lines=lines: found[1] + "\n".join(lines) + found[2], readme)
    with atomic_write(README) as file:
        file.write(readme)


def run() -> None:
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--keep", nargs="+", type=Path, metavar="RUN", default=[], help="runs to keep in arts/runs")
    parser.add_argument("--keep-ablations", type=Path, metavar="DIR", help="results of benchmarks/ablations.py to keep")
    parser.add_argument("--suffix", default="", metavar="TEXT", help="ends their names, where other flags were chosen")
    options = parser.parse_args()
    for directory in options.keep:
        print(f"kept: {keep(directory, options.suffix)}")
    if options.keep_ablations:
        keep_ablations(options.keep_ablations)
    draw_all()


if __name__ == "__main__":
    run_program(run)
