"""Measures what SGE, or any other change of a config, gains: trains each arm with each seed and compares them.

measure_gain.py --config-file configs/sample/faster_rcnn_SGE_R_50_FPN.yaml --output output/gain --seeds 0 1 2
measure_gain.py --config-file F --output DIR --arms plain sge sge-fixed se --arm wide MODEL.SGE.GROUPS 32
measure_gain.py --config-file F --output DIR --decide 0.5 --max-seeds 12      # adds seeds until the answer is in
measure_gain.py --compare --gt instances.json --arm-results plain P.json --arm-results sge S.json --output DIR
measure_gain.py --metric top1 --output DIR --seeds 0 1 2 --pretrain --train train/ --val val/ --model resnet50
measure_gain.py --compare --metric top1 --arm-results plain out/plain/* --arm-results sge out/sge/* --output DIR
measure_gain.py --plan --pilot DIR --difference 1                             # how many seeds would that take?
Run the same command again to go on where it stopped, or start it several times to share the runs.
"""

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import quiet  # noqa: F401

from sge_det.engine.stopping import signals_handled
from sge_det.engine.training import add_dataset_option
from sge_det.errors import user_errors
from sge_det.gain import Measurement, RunFailed, write_figures
from sge_det.gain.arms import BUILT_IN
from sge_det.gain.cluster import KINDS
from sge_det.gain.command import perform
from sge_det.gain.inference import MARGIN
from sge_det.gain.looks import MOST_SEEDS
from sge_det.gain.parts import DIFFERENCE, TASK_NAMES
from sge_det.gain.tables import metric_table


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="KEY VALUE pairs at the end go to every run; after --arm, put -- before them.",
    )
    add = arguments.add_argument
    add("--config-file", default="", metavar="FILE", help="the config that the arms share")
    add("--output", metavar="DIR", help="folder of the runs and the report")
    add(
        "--seeds",
        nargs="+",
        type=int,
        metavar="K",
        help="a run of each arm for each (default 0; with --report-only those of plan.json)",
    )
    add(
        "--arms",
        nargs="+",
        metavar="NAME",
        help=f"the first is the reference; of {', '.join(BUILT_IN)} and those of --arm (default plain sge)",
    )
    add("--arm", nargs="+", action="append", default=[], metavar=("NAME", "KEY VALUE"), help="an arm of your own")
    add(
        "--pretrain",
        nargs=argparse.REMAINDER,
        metavar="OPTION",
        help="with --metric top1: all that follows are options of tools/pretrain.py, which trains the arms",
    )
    add_dataset_option(arguments, "register a COCO-format data set (repeatable), as in train_net.py")
    add("--jobs", type=int, default=1, metavar="N", help="runs at once; they share the cores and GPUs (default 1)")
    add("--bootstrap", type=int, default=1000, metavar="N", help="image bootstrap samples; 0 for none (default 1000)")
    question = arguments.add_argument_group("question", "what the verdict answers; named before the first run")
    question.add_argument(
        "--metric",
        default="AP",
        help="the primary metric, of boxes, or top1 or top5 of classifiers; all else is exploratory",
    )
    question.add_argument(
        "--margin", type=float, default=MARGIN, metavar="AP", help=f"the least difference that matters ({MARGIN:g})"
    )
    question.add_argument(
        "--difference", type=float, default=DIFFERENCE, metavar="AP", help=f"whose power is told ({DIFFERENCE:g})"
    )
    question.add_argument("--unpaired", action="store_true", help="the runs of a seed do not belong together: Welch")
    question.add_argument("--against", metavar="ARM", help="the reference, if not the first arm")
    looks = arguments.add_argument_group(
        "deciding while it runs", "seeds are added one at a time, after --seeds (0 1 2)"
    )
    looks.add_argument(
        "--until", type=float, default=0.0, metavar="WIDTH", help="until the interval is so wide, low to high, in AP"
    )
    looks.add_argument(
        "--decide", type=float, metavar="DELTA", help="until it is a gain, a loss, or no difference of DELTA (AP)"
    )
    looks.add_argument("--max-seeds", type=int, metavar="N", help=f"at most N seeds an arm (default {MOST_SEEDS})")
    engine = arguments.add_argument_group("for schedulers")
    engine.add_argument("--run", nargs=2, metavar=("ARM", "SEED"), help="this run alone, and no report")
    engine.add_argument("--report-only", action="store_true", help="train nothing, report what has finished")
    engine.add_argument("--no-wait", action="store_true", help="end when only other workers' runs are left")
    engine.add_argument("--keep-going", action="store_true", help="a run that fails does not end the others")
    add_cluster_options(arguments)
    plan = arguments.add_argument_group("planning", "how many seeds? Trains nothing")
    plan.add_argument("--plan", action="store_true", help="print seeds, least differences and hours, and end")
    plan.add_argument("--pilot", metavar="DIR|report.json", help="a finished comparison that shows the spread")
    plan.add_argument("--sd", nargs="+", type=float, metavar="AP", help="or the spread over seeds: of both, or of each")
    plan.add_argument("--correlation", type=float, default=0.0, help="of the arms over seeds (0)")
    plan.add_argument("--image-error", type=float, default=0.0, metavar="AP", help="standard error from the images (0)")
    plan.add_argument("--image-count", type=int, default=5000, metavar="N", help="of the validation set (5000)")
    plan.add_argument(
        "--hours", type=float, default=math.nan, metavar="H", help="of a run (a pilot's are known), or a job (24)"
    )
    add("--import", dest="imports", action="append", default=[], metavar="MODULE", help="imported first by each run")
    launch = arguments.add_argument_group("launch", "handed to each run, as in train_net.py")
    launch.add_argument("--num-gpus", "--gpus-per-run", type=int, default=1, help="GPUs of a run on each machine")
    launch.add_argument("--num-machines", type=int, default=1, help="machines of a run")
    launch.add_argument("--machine-rank", type=int, default=0, help="this machine among them")
    launch.add_argument("--dist-url", default=None, help="where the processes of a run meet")
    add("--figures", action="store_true", help="write the plots as SVG and PDF too, into OUTPUT/figures")
    compare = arguments.add_argument_group("comparing what exists")
    compare.add_argument("--draw", metavar="report.json", help="write pages, tables and figures of a report again")
    compare.add_argument("--compare", action="store_true", help="train nothing, compare result files")
    compare.add_argument("--gt", metavar="INSTANCES.json", help="the annotations that the results are of")
    compare.add_argument("--images", metavar="DIR", help="their images, for the gallery")
    compare.add_argument(
        "--arm-results",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "PRED.json"),
        help="an arm's result files, or folders of pretrain.py, by seed (repeatable, the reference first)",
    )
    return arguments


def add_cluster_options(arguments: argparse.ArgumentParser) -> None:
    cluster = arguments.add_argument_group("cluster", "each run as a job, followed to its end; needs submitit")
    cluster.add_argument("--cluster", choices=KINDS, help="the scheduler; local is this machine, all runs at once")
    cluster.add_argument("--partition", default="", metavar="P", help="of Slurm")
    cluster.add_argument("--sbatch", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="for Slurm")


def job_of(options: Sequence[str]) -> list[str]:
    """The words that start a job of a cluster: this command, without the options that are its alone."""
    own = argparse.ArgumentParser(add_help=False)
    add_cluster_options(own)
    own.add_argument("--hours")
    for name in ("--no-wait", "--keep-going"):
        own.add_argument(name, action="store_true")
    return [sys.executable, str(Path(__file__).resolve()), *own.parse_known_args(options)[1]]


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Parts the options from the KEY VALUE pairs at the end, which lists such as ``--seeds`` would swallow."""
    argv = list(argv)
    if "--pretrain" in argv:
        return argv, []
    if "--" in argv:
        place = argv.index("--")
        return argv[:place], argv[place + 1 :]
    alone = {"", *(name for name, action in parser()._option_string_actions.items() if action.nargs == 0)}
    option, values = "", 0
    for place, word in enumerate(argv):
        if word.startswith("--"):
            option, values = word, int("=" in word)
            continue
        values += 1
        is_key = re.fullmatch(
            r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)+|SEED|OUTPUT_DIR|VIS_PERIOD|CUDNN_BENCHMARK|REPORT_TO", word
        )
        if is_key and option != "--arm" and (values > 1 or option in alone):
            if option == "--dataset" and values <= 3:
                continue
            return argv[:place], argv[place:]
    return argv, []


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    options, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    args, defaults = parser().parse_args(options), vars(parser().parse_args([]))
    try:
        with signals_handled():
            done = perform(args, defaults, overrides, job_of(options))
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    if isinstance(done, str):
        print(f"\n{done}\n")
    if not isinstance(done, Measurement):
        return
    if args.figures:
        write_figures(Path(args.output), done)
    report = done.report
    for task in report.tasks:
        print(
            f"\n{TASK_NAMES[task].capitalize()} metrics, in points (0-100)\n\n{metric_table(report, task).markdown()}"
        )
    print(f"\n{report.verdict}\n\nReport: {(Path(args.output) / 'report.html').resolve()}")


if __name__ == "__main__":
    main()
