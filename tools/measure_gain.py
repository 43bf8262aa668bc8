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
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import quiet  # noqa: F401
from detectron2.utils.logger import setup_logger

from sge_det.engine.launching import TIMEOUT_SECONDS, check_launch
from sge_det.engine.stopping import signals_handled
from sge_det.engine.training import add_dataset_option
from sge_det.errors import UserError, user_errors
from sge_det.gain import (
    Cluster,
    Launch,
    Looks,
    Matrix,
    Measurement,
    Question,
    RunFailed,
    compare_classified,
    compare_results,
    decide_gain,
    draw_report,
    measure_classified_gain,
    measure_gain,
    report_gain,
    write_figures,
)
from sge_det.gain.arms import BUILT_IN
from sge_det.gain.classified import METRICS as CLASSIFIED
from sge_det.gain.cluster import KINDS
from sge_det.gain.inference import MARGIN
from sge_det.gain.looks import FIRST_SEEDS, MOST_SEEDS
from sge_det.gain.parts import DIFFERENCE, TASK_NAMES
from sge_det.gain.plan import declare, declared
from sge_det.gain.power import check_wanted, from_pilot, in_words, published, tables
from sge_det.gain.power import given as given_spread
from sge_det.gain.run import Run
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


def cluster_of(args: argparse.Namespace, options: Sequence[str], overrides: Sequence[str]) -> Cluster | None:
    """Where the runs go as jobs; a job gets the same options, but for those that are this command's alone."""
    if args.cluster != "slurm" and (args.partition or args.sbatch):
        raise UserError("--partition and --sbatch go with --cluster slurm")
    if args.cluster is None:
        return None
    alone = {"--run": args.run, "--report-only": args.report_only, "--num-machines": args.num_machines > 1}
    alone |= {"--until": args.until, "--decide": args.decide is not None, "--jobs": args.jobs > 1}
    if given := [option for option, value in alone.items() if value]:
        raise UserError(f"--cluster makes a job of each run: leave out {', '.join(given)}")
    hours = 24.0 if math.isnan(args.hours) else args.hours
    if not 0 < hours < 24 * 365:
        raise UserError(f"--hours {args.hours:g} must be how long a job may take, above 0")
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_cluster_options(own)
    for name in ("--no-wait", "--keep-going"):
        own.add_argument(name, action="store_true")
    command = [sys.executable, str(Path(__file__).resolve()), *own.parse_known_args(options)[1]]
    sbatch = tuple((name, value) for name, value in args.sbatch)
    return Cluster(args.cluster, tuple(command), tuple(overrides), hours, args.num_gpus, args.partition, sbatch)


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


def run(args: argparse.Namespace, options: Sequence[str], overrides: list[str]) -> Measurement | None:
    if args.plan:
        return plan(args, overrides)
    if args.output is None:
        raise UserError("give the folder of the runs and the report with --output DIR")
    if args.draw:
        return draw(args, overrides)
    if args.compare:
        return compare(args, overrides)
    only_plan = {"--pilot": args.pilot, "--sd": args.sd}
    if given := [option for option, value in only_plan.items() if value]:
        raise UserError(f"{', '.join(given)} goes with --plan")
    if args.metric in CLASSIFIED or args.pretrain is not None:
        return classify(args, overrides)
    if args.gt or args.arm_results or args.images:
        raise UserError("--gt, --arm-results and --images go with --compare")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise UserError("measure_gain starts the processes of its runs itself: start it without torchrun")
    args.timeout = TIMEOUT_SECONDS
    cluster = cluster_of(args, options, overrides)
    if cluster is None:
        check_launch(args, None)
    launch = Launch(args.num_gpus, args.num_machines, args.machine_rank, args.dist_url or "auto", tuple(args.imports))
    looks = looks_of(args)
    seeds = args.seeds or default_seeds(args, looks)
    if looks:
        seeds = [*seeds, *(seed for seed in range(max(seeds) + 1 + looks.most) if seed not in seeds)][: looks.most]
    matrix = Matrix(
        args.config_file,
        args.output,
        arm_names=args.arms or ["plain", "sge"],
        custom_arms=args.arm,
        seeds=seeds,
        overrides=overrides,
        datasets=args.dataset,
        launch=launch,
        report_only=args.report_only,
    )
    how = {"bootstrap": args.bootstrap, "question": asked(args), "against": args.against}
    if args.run:
        wanted = run_asked(matrix, *args.run)  # before anything is declared
        if args.seeds and launch.is_main:
            declare(matrix, how["question"], against=args.against)
        return run_one(matrix, wanted)
    if not launch.is_main:
        matrix.execute(args.jobs)
        return None
    if args.report_only:
        return report_gain(matrix, **how)
    if looks:
        return decide_gain(matrix, looks, jobs=args.jobs, **how)
    return measure_gain(
        matrix, jobs=args.jobs, wait=not args.no_wait, keep_going=args.keep_going, cluster=cluster, **how
    )


def default_seeds(args: argparse.Namespace, looks: Looks | None) -> list[int]:
    if args.run and args.run[1].isdecimal():
        return [int(args.run[1])]
    if looks:
        return list(range(looks.first))
    plan = declared(args.output) if args.report_only else None
    return plan["seeds"] if plan else [0]


def classify(args: argparse.Namespace, overrides: list[str]) -> Measurement:
    if args.metric not in CLASSIFIED:
        raise UserError(f"--pretrain trains classifiers: give --metric {' or '.join(CLASSIFIED)}")
    if args.pretrain is None:
        raise UserError(
            f"--metric {args.metric} is of classifiers: train them by --pretrain and options of tools/pretrain.py, or "
            "give --compare and --arm-results NAME FOLDER for each arm"
        )
    idle = {"--config-file": args.config_file, "--dataset": args.dataset, "--jobs": args.jobs > 1, "--run": args.run}
    idle |= {"--import": args.imports, "--gt": args.gt, "--images": args.images, "--arm-results": args.arm_results}
    idle |= {"--until": args.until, "--decide": args.decide is not None, "--report-only": args.report_only}
    idle |= {"--no-wait": args.no_wait, "--keep-going": args.keep_going, "--cluster": args.cluster}
    idle |= {"KEY VALUE": overrides}
    if given := [option for option, value in idle.items() if value]:
        raise UserError(f"--pretrain trains classifiers one after the other: leave out {', '.join(given)}")
    args.timeout = TIMEOUT_SECONDS
    check_launch(args, None)
    from sge_det.gain.pretraining import PretrainingMatrix  # needs timm

    setup_logger(name="sge_det")
    seeds = [0] if args.seeds is None else args.seeds
    arms = {"arm_names": args.arms or ["plain", "sge"], "custom_arms": args.arm, "seeds": seeds}
    matrix = PretrainingMatrix(args.pretrain, args.output, **arms)
    question = asked(args)
    return measure_classified_gain(matrix, args, bootstrap=args.bootstrap, question=question, against=args.against)


def asked(args: argparse.Namespace) -> Question:
    margin = args.margin if args.decide is None else args.decide
    return Question(args.metric, margin, not args.unpaired, args.difference)


def looks_of(args: argparse.Namespace) -> Looks | None:
    alone = {"--run": args.run, "--report-only": args.report_only}
    alone |= {"--no-wait": args.no_wait, "--keep-going": args.keep_going}
    if args.until == 0 and args.decide is None:
        if args.max_seeds is not None:
            raise UserError("--max-seeds goes with --until or --decide")
        chosen = [option for option, value in alone.items() if value]
        if (args.run and len(chosen) > 1) or (args.report_only and len(chosen) > 1):
            raise UserError(f"{chosen[0]} goes without {', '.join(chosen[1:])}")
        return None
    if given := [option for option, value in alone.items() if value]:
        raise UserError(f"--until and --decide train whatever is needed: leave out {', '.join(given)}")
    if args.num_machines > 1:
        raise UserError("--until and --decide go with one machine a run: the others do not see the answers")
    if args.decide is not None and not args.decide > 0:
        raise UserError(f"--decide {args.decide} must be a difference in AP points above 0")
    looks = Looks(
        len(args.seeds) if args.seeds else FIRST_SEEDS,
        MOST_SEEDS if args.max_seeds is None else args.max_seeds,
        args.until,
        args.decide is not None,
    )
    looks.check()
    return looks


def run_asked(matrix: Matrix, arm: str, seed: str) -> Run:
    if not seed.isdecimal():
        raise UserError(f"--run {arm} {seed}: give an arm and a seed, for instance --run sge 0")
    return matrix.run_of(arm, int(seed))


def run_one(matrix: Matrix, wanted: Run) -> None:
    if not wanted.is_ready:
        raise UserError(f"{wanted.name} starts from {wanted.reference.name}, which has not finished: run that first")
    if matrix.execute(runs=[wanted], wait=False).left:
        raise UserError(f"{wanted.name} is being trained by another process: wait for it, or end it")


def plan(args: argparse.Namespace, overrides: list[str]) -> None:
    idle = {"--config-file": args.config_file, "--compare": args.compare, "--run": args.run, "KEY VALUE": overrides}
    idle |= {"--until": args.until, "--decide": args.decide is not None, "--report-only": args.report_only}
    if given := [option for option, value in idle.items() if value]:
        raise UserError(f"--plan trains nothing: leave out {', '.join(given)}")
    check_wanted(args.difference, args.max_seeds, args.hours)
    if args.pilot and args.sd:
        raise UserError("--pilot shows the spread and --sd gives it: leave out one of them")
    if args.pilot:
        outlooks = from_pilot(args.pilot, args.metric, paired=not args.unpaired)
    elif args.sd:
        outlooks = [given_spread(args.sd, args.correlation, args.image_error, args.image_count, 2 * args.hours)]
    else:
        outlooks = published(2 * args.hours)
    for outlook in outlooks:
        print(f"\n{in_words(outlook)}\n")
        arms = len(outlooks) if args.pilot else 1
        for table in tables(outlook, args.difference, args.max_seeds, arms):
            print(f"{table.markdown()}\n")


def draw(args: argparse.Namespace, overrides: list[str]) -> Measurement:
    idle = {"--compare": args.compare, "--config-file": args.config_file, "--arms": args.arms, "KEY VALUE": overrides}
    if given := [option for option, value in idle.items() if value]:
        raise UserError(f"--draw reads a report alone: leave out {', '.join(given)}")
    return draw_report(args.draw, args.output)


def compare(args: argparse.Namespace, overrides: list[str]) -> Measurement:
    if overrides:
        raise UserError(f"--compare trains nothing: leave out {' '.join(overrides)}")
    idle = {"--seeds": args.seeds, "--arms": args.arms, "--arm": args.arm, "--config-file": args.config_file}
    idle |= {"--dataset": args.dataset, "--import": args.imports, "--jobs": args.jobs > 1}
    given = [option for option, value in idle.items() if value]
    if given:
        raise UserError(f"--compare trains nothing: leave out {' '.join(given)}")
    classified = args.metric in CLASSIFIED
    if classified and (args.gt or args.images):
        raise UserError(f"--metric {args.metric} is of classified images: leave out --gt and --images")
    if not (args.gt or classified) or not args.arm_results:
        needed = "--arm-results NAME FOLDER" if classified else "--gt INSTANCES.json and --arm-results NAME PRED.json"
        raise UserError(f"--compare needs {needed} for each arm")
    names = [name for name, *_ in args.arm_results]
    if len(set(names)) < len(names):
        raise UserError("--arm-results gives an arm twice: name all files of an arm in one")
    if classified:
        arms = {name: files for name, *files in args.arm_results}
        return compare_classified(
            arms, args.output, bootstrap=args.bootstrap, question=asked(args), against=args.against
        )
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
            measurement = run(args, options, overrides)
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    if measurement is None:
        return
    if args.figures:
        write_figures(Path(args.output), measurement)
    report = measurement.report
    for task in report.tasks:
        print(
            f"\n{TASK_NAMES[task].capitalize()} metrics, in points (0-100)\n\n{metric_table(report, task).markdown()}"
        )
    print(f"\n{report.verdict}\n\nReport: {(Path(args.output) / 'report.html').resolve()}")


if __name__ == "__main__":
    main()
