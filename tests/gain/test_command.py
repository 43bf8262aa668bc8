"""Which options of measure_gain go together, asked from Python as the tool asks."""

import runpy

import pytest
from conftest import ROOT

from sge_det import UserError
from sge_det.gain import command


@pytest.fixture(scope="module")
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        return runpy.run_path(str(ROOT / "tools/measure_gain.py"))


@pytest.fixture(scope="module")
def parser(tool):
    return tool["parser"]()


@pytest.fixture(scope="module")
def ask(parser):
    defaults = vars(parser.parse_args([]))

    def ask(words, overrides=()):
        return command.perform(parser.parse_args(words.split()), defaults, overrides)

    return ask


KINDS = {
    "plan": "--plan",
    "draw": "--draw r.json --output out",
    "compare": "--compare --output out --gt g.json --arm-results a a.json --arm-results b b.json",
    "classify": "--output out --metric top1 --pretrain",
}
VALUES = {"run": ["plain", "0"], "sbatch": ["a", "b"], "arm": ["x", "A.B", "1"], "dataset": ["a", "b", "c"]}


def words_of(action):
    """The words that give an option a value that is not its default."""
    if action.nargs == 0:
        return [action.option_strings[0]]
    if action.choices:
        return [action.option_strings[0], action.choices[0]]
    default = [str(99 if action.type else "x")]
    return [action.option_strings[0], *VALUES.get(action.dest, default)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_option_without_an_effect_is_refused(ask, parser, kind):
    """Each option of the parser, one at a time: it is taken by the kind, or named in the sentence."""
    refused = set()
    for action in parser._actions:
        if action.dest in ("help", "plan", "draw", "compare", "pretrain", "metric"):
            continue
        # before --pretrain, which takes the rest of the line
        args = parser.parse_args([*words_of(action), *KINDS[kind].split()])
        assert command.kind_of(args) == kind
        try:
            command.check_options(kind, args, vars(parser.parse_args([])))
        except UserError as error:
            assert str(error).endswith(f"leave out {action.option_strings[0]}"), error
            refused.add(action.dest)
    known = {action.dest for action in parser._actions}
    assert known - command._TAKES[kind] - {"help", "plan", "draw", "compare", "pretrain", "metric"} == refused
    assert command._TAKES[kind] <= known


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--output out --correlation 0.5", "--correlation goes with --plan"),
        ("--output out --images x", "--gt, --arm-results and --images go with --compare"),
        ("--output out --hours 3", "--hours goes with --plan or --cluster"),
        ("--output out --decide 1 --margin 1", "--decide names the margin: leave out --margin"),
        ("--output out --report-only --jobs 2", "--report-only goes without --jobs"),
        ("--output out --run sge 0 --jobs 2", "--run goes without --jobs"),
        ("--plan --correlation 0.5", "--correlation and --image-error go with --sd"),
        ("--plan --sd 1 --correlation 0.5 --unpaired", "leave out --unpaired"),
        ("--output out --metric top1", "train them by --pretrain"),
        ("--compare", "give the folder of the runs and the report with --output DIR"),
    ],
)
def test_options_that_do_not_go_together(ask, words, told):
    with pytest.raises(UserError, match=told):
        ask(words)


def test_pairs_of_keys_go_with_training_alone(ask):
    for words in KINDS.values():
        with pytest.raises(UserError, match="leave out KEY VALUE"):
            ask(words, ["SEED", "1"])


def test_what_goes_with_a_cluster_goes_with_the_run_of_its_jobs(tool, parser):
    """Each option that ``--cluster`` takes: the job's command is taken too, and asks for the same run."""

    def checked(words):
        args = parser.parse_args(words)
        command.check_options("train", args, vars(parser.parse_args([])))
        command.looks_of(args)
        return args, command.cluster_of(args, (), ())

    cluster, taken = ["--config-file", "F", "--output", "out", "--cluster", "slurm"], set()
    for action in parser._actions:
        if action.dest in ("help", "config_file", "output", "cluster", "plan", "draw", "compare", "pretrain", "metric"):
            continue
        try:
            asked, _ = checked([*cluster, *words_of(action)])
        except UserError:
            continue
        taken.add(action.dest)
        job = tool["job_of"]([*cluster, *words_of(action)])[2:]  # behind Python and the tool
        run, nowhere = checked([*job, "--run", "plain", "0"])
        assert nowhere is None
        if action.dest not in ("hours", "partition", "sbatch", "no_wait", "keep_going"):
            assert getattr(run, action.dest) == getattr(asked, action.dest)
    assert {"hours", "partition", "sbatch", "keep_going", "seeds", "num_gpus", "imports"} <= taken


def test_a_plan_without_pairs_is_of_welch(ask):
    """Two sets of seeds have twice the degrees of freedom, so that few seeds suffice a little earlier."""
    seeds = []
    for words in ("", " --unpaired"):
        printed = ask(f"--plan --sd 0.5 --difference 1{words}")
        (row,) = [line for line in printed.splitlines() if line.startswith("| 1 ")]
        seeds.append(int(row.split("|")[2]))
    assert seeds[0] > seeds[1]


def test_seeds_that_may_be_added(parser):
    args = parser.parse_args(["--seeds", "4", "7", "--decide", "1", "--max-seeds", "5"])
    assert command.seeds_of(args, command.looks_of(args)) == [4, 7, 0, 1, 2]
    assert command.seeds_of(parser.parse_args([]), None) == [0]
    assert command.question_of(args).margin == 1.0
