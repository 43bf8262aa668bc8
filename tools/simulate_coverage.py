"""How often the intervals hold and the verdicts are false, in simulated experiments without training.

simulate_coverage.py                                        a minute or two: a first impression
simulate_coverage.py --experiments 10000 --output sim       hours of one core; also writes sim.json and sim.md
simulate_coverage.py --experiments 500 --seed 1 --output part1      a slice; give each its own seed
simulate_coverage.py --merge part1.json part2.json --output sim     slices together
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import quiet  # noqa: F401
from tqdm import tqdm

from sge_det.errors import UserError, user_errors
from sge_det.files import check_folder, write_file, write_json
from sge_det.gain.simulation import (
    EFFECTS,
    KINDS,
    NOISES,
    SEEDS,
    Population,
    Tally,
    coverage_report,
    read_tally,
    simulate,
)


def at_least(least: int) -> Callable[[str], int]:
    """A type of options: whole numbers from ``least`` on."""

    def number(text: str) -> int:
        if not text.strip().isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} must be a whole number of at least {least}")
        return int(text)

    return number


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = arguments.add_argument
    add("--experiments", type=at_least(1), default=200, metavar="N", help="of each kind (default: 200)")
    add(
        "--each", type=at_least(1), default=20, metavar="N", help="experiments on the same draw of images (default: 20)"
    )
    add(
        "--images",
        type=at_least(2),
        nargs="+",
        default=[60, 1000],
        metavar="N",
        help="validation images of an experiment",
    )
    add("--arms", type=at_least(2), default=6, metavar="N", help="arms of the largest comparison (default: 6)")
    add("--population", type=at_least(2), default=4000, metavar="N", help="images that stand for all (default: 4000)")
    add(
        "--detectors",
        type=at_least(2),
        default=24,
        metavar="N",
        help="of each arm, of which seeds are taken (default: 24)",
    )
    add(
        "--kinds", nargs="+", choices=KINDS, default=KINDS, metavar="KIND", help=f"of {', '.join(KINDS)} (default: all)"
    )
    add("--effects", nargs="+", type=float, default=EFFECTS, metavar="AP", help="true differences of two arms")
    add("--seed-counts", nargs="+", type=at_least(2), default=SEEDS, metavar="N", help="seeds of an arm, of two arms")
    add("--noises", nargs="+", choices=NOISES, default=NOISES, metavar="NOISE", help=f"of {', '.join(NOISES)}")
    add("--samples", type=at_least(2), default=200, metavar="N", help="of the bootstrap (default: 200)")
    add("--seed", type=at_least(0), default=0, help="of all that is random")
    add("--merge", type=Path, nargs="+", metavar="FILE", help="add up the counts of these files, simulate nothing")
    add("--output", type=Path, metavar="PATH", help="also write PATH.json (counts) and PATH.md (tables)")
    return arguments


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    tally = Tally()
    if args.output:  # before hours of work
        if not args.output.name:
            raise UserError(f"--output {args.output} is a folder: name the files in it, without their endings")
        check_folder(args.output.parent, "--output")
    if args.merge:
        if len({path.resolve() for path in args.merge}) < len(args.merge):
            raise UserError("--merge names a file twice, whose experiments would count twice: name each once")
        for path in args.merge:
            tally.merge(read_tally(path))
    else:
        population = Population(args.arms, args.detectors, args.population, args.seed)
        draws = -(-args.experiments // args.each)
        for images in args.images:
            found = simulate(
                population,
                images,
                draws,
                args.each,
                samples=args.samples,
                seed=args.seed,
                kinds=args.kinds,
                effects=args.effects,
                noises=args.noises,
                seed_counts=args.seed_counts,
            )
            for counts in tqdm(found, desc=f"{images} images", total=draws, unit="draw", leave=False):
                tally.merge(counts)
    report = coverage_report(tally)
    print(report)
    if args.output:
        write_json(args.output.with_name(f"{args.output.name}.json"), vars(tally))
        write_file(args.output.with_name(f"{args.output.name}.md"), report + "\n")


if __name__ == "__main__":
    main()
