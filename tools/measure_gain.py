"""Measures what SGE, or any other change of a config, gains: trains each arm with each seed and compares them.

measure_gain.py --config-file configs/sample/faster_rcnn_SGE_R_50_FPN.yaml --output output/gain --seeds 0 1 2
measure_gain.py --config-file F --output DIR --arms plain sge sge-fixed se --arm wide MODEL.SGE.GROUPS 32
measure_gain.py --compare --gt instances.json --arm-results plain P.json --arm-results sge S.json --output DIR
Run the same command again to go on where it stopped, or start it several times to share the runs.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from sge_det.engine.launching import TIMEOUT_SECONDS, check_launch
from sge_det.engine.stopping import signals_handled
from sge_det.engine.training import add_dataset_option
from sge_det.errors import UserError, user_errors
from sge_det.gain import Launch, Matrix, Measurement, Question, RunFailed, compare_results, measure_gain
from sge_det.gain.arms import BUILT_IN
from sge_det.gain.inference import MARGIN
from sge_det.gain.report import metric_table
from sge_det.gain.verdict import DIFFERENCE, TASK_NAMES


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="KEY VALUE pairs at the end go to every run; after --arm, put -- before them.",
    )
    add = arguments.add_argument
    add("--config-file", default="", metavar="FILE", help="the config that the arms share")
    add("--output", required=True, metavar="DIR", help="folder of the runs and the report")
    add("--seeds", nargs="+", type=int, metavar="K", help="a run of each arm for each (default 0)")
    add(
        "--arms",
        nargs="+",
        metavar="NAME",
        help=f"the first is the reference; of {', '.join(BUILT_IN)} and those of --arm (default plain sge)",
    )
    add("--arm", nargs="+", action="append", default=[], metavar=("NAME", "KEY VALUE"), help="an arm of your own")
    add_dataset_option(arguments, "register a COCO-format data set (repeatable), as in train_net.py")
    add("--jobs", type=int, default=1, metavar="N", help="runs at once; they share the cores and GPUs (default 1)")
    add("--bootstrap", type=int, default=1000, metavar="N", help="image bootstrap samples; 0 for none (default 1000)")
    question = arguments.add_argument_group("question", "what the verdict answers; named before the first run")
    question.add_argument("--metric", default="AP", help="the primary metric, of boxes; all others are exploratory")
    question.add_argument(
        "--margin", type=float, default=MARGIN, metavar="AP", help=f"the least difference that matters ({MARGIN:g})"
    )
    question.add_argument(
        "--difference", type=float, default=DIFFERENCE, metavar="AP", help=f"whose power is told ({DIFFERENCE:g})"
    )
    question.add_argument("--unpaired", action="store_true", help="the runs of a seed do not belong together: Welch")
    question.add_argument("--against", metavar="ARM", help="the reference, if not the first arm")
    add("--import", dest="imports", action="append", default=[], metavar="MODULE", help="imported first by each run")
    launch = arguments.add_argument_group("launch", "handed to each run, as in train_net.py")
    launch.add_argument("--num-gpus", type=int, default=1, help="GPUs of a run on each machine")
    launch.add_argument("--num-machines", type=int, default=1, help="machines of a run")
    launch.add_argument("--machine-rank", type=int, default=0, help="this machine among them")
    launch.add_argument("--dist-url", default=None, help="where the processes of a run meet")
    compare = arguments.add_argument_group("comparing what exists")
    compare.add_argument("--compare", action="store_true", help="train nothing, compare result files")
    compare.add_argument("--gt", metavar="INSTANCES.json", help="the annotations that the results are of")
    compare.add_argument("--images", metavar="DIR", help="their images, for the gallery")
    compare.add_argument(
        "--arm-results",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "PRED.json"),
        help="an arm's result files, in the order of the seeds (repeatable, the reference first)",
    )
    return arguments


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Parts the options from the KEY VALUE pairs at the end, which lists such as ``--seeds`` would swallow."""
    argv = list(argv)
    if "--" in argv:
        place = argv.index("--")
        return argv[:place], argv[place + 1 :]
    option, values = "", 0
    for place, word in enumerate(argv):
        if word.startswith("--"):
            option, values = word, int("=" in word)
            continue
        values += 1
        is_key = re.fullmatch(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)+|SEED|OUTPUT_DIR|VIS_PERIOD|CUDNN_BENCHMARK", word)
        if is_key and option != "--arm" and (values > 1 or option in ("", "--compare")):
            if option == "--dataset" and values <= 3:
                continue
            return argv[:place], argv[place:]
    return argv, []


def run(args: argparse.Namespace, overrides: list[str]) -> Measurement | None:
    if args.compare:
        return compare(args, overrides)
    if args.gt or args.arm_results or args.images:
        raise UserError("--gt, --arm-results and --images go with --compare")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise UserError("measure_gain starts the processes of its runs itself: start it without torchrun")
    args.timeout = TIMEOUT_SECONDS
    check_launch(args, None)
    launch = Launch(args.num_gpus, args.num_machines, args.machine_rank, args.dist_url or "auto", tuple(args.imports))
    matrix = Matrix(
        args.config_file,
        args.output,
        arm_names=args.arms or ["plain", "sge"],
        custom_arms=args.arm,
        seeds=[0] if args.seeds is None else args.seeds,
        overrides=overrides,
        datasets=args.dataset,
        launch=launch,
    )
    if not launch.is_main:
        matrix.execute(args.jobs)
        return None
    return measure_gain(matrix, jobs=args.jobs, bootstrap=args.bootstrap, question=asked(args), against=args.against)


def asked(args: argparse.Namespace) -> Question:
    return Question(args.metric, args.margin, not args.unpaired, args.difference)


def compare(args: argparse.Namespace, overrides: list[str]) -> Measurement:
    if overrides:
        raise UserError(f"--compare trains nothing: leave out {' '.join(overrides)}")
    idle = {"--seeds": args.seeds, "--arms": args.arms, "--arm": args.arm, "--config-file": args.config_file}
    idle |= {"--dataset": args.dataset, "--import": args.imports, "--jobs": args.jobs > 1}
    given = [option for option, value in idle.items() if value]
    if given:
        raise UserError(f"--compare trains nothing: leave out {' '.join(given)}")
    if not args.gt or not args.arm_results:
        raise UserError("--compare needs --gt INSTANCES.json and --arm-results NAME PRED.json for each arm")
    names = [name for name, *_ in args.arm_results]
    if len(set(names)) < len(names):
        raise UserError("--arm-results gives an arm twice: name all files of an arm in one")
    return compare_results(
        args.gt,
        {name: files for name, *files in args.arm_results},
        args.output,
        bootstrap=args.bootstrap,
        image_root=args.images,
        question=asked(args),
        against=args.against,
    )


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    options, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(options)
    try:
        with signals_handled():
            measurement = run(args, overrides)
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    if measurement is None:
        return
    report = measurement.report
    for task in report["tasks"]:
        print(
            f"\n{TASK_NAMES[task].capitalize()} metrics, in points (0-100)\n\n{metric_table(report, task).markdown()}"
        )
    print(f"\n{report['verdict']}\n\nReport: {(Path(args.output) / 'report.html').resolve()}")


if __name__ == "__main__":
    main()
