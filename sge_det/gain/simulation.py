"""Experiments without training: how often the intervals hold and the verdicts are false.

Detectors are made up: their boxes miss annotated objects by errors that depend on the image, on the object, on the arm,
and on a skill that the seed gives. All else is real: the boxes are matched and scored by COCO's rules, the images are
resampled, and the intervals are those of a report. The true difference is known from a population of many images and
of all skills, of which an experiment sees a few.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import hotcoco
import numpy as np
import scipy.optimize
import scipy.special
import scipy.stats
from tabulate import tabulate

from ..errors import UserError
from ..evaluation.bootstrap import Scorer
from ..evaluation.matching import Matches, Objects
from ..files import read_json
from .inference import (
    ALPHA,
    MARGIN,
    Interval,
    both_interval,
    image_interval,
    outcome,
    outcomes,
    seed_interval,
    sequential_levels,
    welch_interval,
)

SEEDS = (3, 5, 10)
EFFECTS = (0.0, 0.5, 1.0)
CORRELATIONS = (-0.5, 0.0, 0.7)
# Skills over seeds in standard deviations: some seeds of the skewed kind fail.
NOISES = ("normal", "skewed")
_SHAPE = 2.0
# What one standard deviation of skill does to the logarithm of a box's error; about half an AP point.
_SKILL = 0.015
_LEAST_SKILL, _MOST_SKILL = -5.0, 6.0
# Of the mean skill of an arm, above that of the first.
_LEAST_SHIFT, _MOST_SHIFT = -2.0, 4.0
# A detector that is less probable for a seed counts for nothing in a mean.
_NO_SHARE = 1e-6
_WIDTH, _HEIGHT = 640, 480
LOOKS = tuple(range(3, 11))
# Looks that stop at a width stop at this one, in AP points, over the root of the number of images.
_WIDTH_OF_ONE = 110.0
ARMS = (2, 3, 6)
KINDS = ("two arms", "looks", "arms")
COVERED = ("seeds", "welch", "images", "both", "both, unpaired")
_UNPAIRED = ("welch", "both, unpaired")
_ASTRAY = ("seeds, of new images", "images, of new seeds")


@dataclass
class Tally:
    """Counts of experiments in which something was so, by what it is.

    Experiments on the same draw of images are alike, so the standard error is that of the draws.
    """

    experiments: dict[str, int] = field(default_factory=dict)
    hits: dict[str, int] = field(default_factory=dict)
    draws: dict[str, int] = field(default_factory=dict)
    # sums over draws of experiments^2, experiments * hits and hits^2
    squares: dict[str, int] = field(default_factory=dict)
    products: dict[str, int] = field(default_factory=dict)
    hit_squares: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, found: Sequence[bool]) -> None:
        """Adds the experiments of one draw."""
        number, hits = len(found), int(sum(found))
        one = {"experiments": number, "hits": hits, "draws": 1}
        one |= {"squares": number**2, "products": number * hits, "hit_squares": hits**2}
        self.merge(Tally(**{kind: {name: count} for kind, count in one.items()}))

    def merge(self, other: "Tally") -> None:
        """Adds the counts of other draws."""
        for mine, theirs in zip(vars(self).values(), vars(other).values()):
            for name, count in theirs.items():
                mine[name] = mine.get(name, 0) + count

    def rate(self, name: str) -> tuple[float, float]:
        """The share in which it was so, and its standard error, as of a ratio over draws."""
        draws, experiments = self.draws[name], self.experiments[name]
        share = self.hits[name] / experiments
        apart = self.hit_squares[name] - 2 * share * self.products[name] + share**2 * self.squares[name]
        return share, math.sqrt(max(apart, 0) * draws / max(draws - 1, 1)) / experiments


def read_tally(path: Path) -> Tally:
    """The counts in a file that ``tools/simulate_coverage.py`` wrote.

    Raises:
        UserError: it is not there, or is none.
    """
    remedy, kinds = "give a file that simulate_coverage.py --output wrote", Tally.__dataclass_fields__.keys()
    try:
        content = read_json(path, remedy, tuple(kinds))
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there: {remedy}") from error
    if content.keys() != kinds or any(part.keys() != content["hits"].keys() for part in content.values()):
        raise UserError(f"{path} holds no counts of a simulation: {remedy}")
    if any(type(count) is not int or count < 0 for part in content.values() for count in part.values()):
        raise UserError(f"{path} holds what is no count: {remedy}")
    odd = next((name for name, count in content["experiments"].items() if not (count and _is_cell(name))), None)
    if odd is not None or any(count < 1 for count in content["draws"].values()):
        raise UserError(f"{path} holds counts of no experiment that is known: {remedy}")
    return Tally(**content)


# The parts of the names of counts: "<images>|<kind>|<noise>|...|<what was so>".
_CELLS = {
    "two arms": (float, float, int),
    "looks": (float,),
    "arms": (int,),
}


def _is_cell(name: str) -> bool:
    """Whether counts go by this name."""
    images, kind, noise, *numbers, _ = name.split("|") if name.count("|") > 2 else ("", "", "", "")
    try:
        int(images)
        parts = [number(part) for number, part in zip(_CELLS[kind], numbers, strict=True)]
    except (KeyError, ValueError):
        return False
    return noise in NOISES and all(map(math.isfinite, parts))


class Population:
    """Made-up detectors on a data set that stands for all images.

    Attributes:
        ap: (arms, detectors) true AP of each, in points; the detectors of an arm have evenly spread skills.

    Args:
        arms: kinds of detectors, each with images that it likes.
        detectors: of each arm.
        images: of the population.
        seed: of all that is random.
    """

    def __init__(self, arms: int = 2, detectors: int = 24, images: int = 4000, seed: int = 0):
        generator = np.random.default_rng(seed)
        self.images = images
        self.skills = np.linspace(_LEAST_SKILL, _MOST_SKILL, detectors)
        self._shifts: dict[tuple[str, int, float], float] = {}
        scene = _Scene(images, generator)
        self.matches: list[list[Matches]] = []
        for _ in range(arms):
            liking = generator.normal(0, 0.1, images)
            self.matches.append([scene.detect(skill, liking, generator) for skill in self.skills])
        ones = np.ones((1, images), dtype=np.int32)
        self.ap = np.array([[_ap(Scorer(matches), ones)[0] for matches in arm] for arm in self.matches])

    def shares(self, noise: str, shift: float = 0.0) -> np.ndarray:
        """(detectors,) how probable each is for a seed of an arm whose skills are ``shift`` above the mean."""
        bounds = (self.skills[1:] + self.skills[:-1]) / 2 - shift
        return np.diff(_cumulative(noise, bounds), prepend=0, append=1)

    def shift(self, noise: str, arm: int, effect: float) -> float:
        """How much above the mean the skills of an arm must be for its AP to be ``effect`` above that of the first.

        Raises:
            UserError: no skills make it so.
        """
        key = noise, arm, effect
        if key not in self._shifts:
            mean = self.shares(noise) @ self.ap[0]

            def reached(shift: float) -> float:
                return float(self.shares(noise, shift) @ self.ap[arm] - mean)

            low, high = reached(_LEAST_SHIFT), reached(_MOST_SHIFT)
            if not low < effect < high:
                raise UserError(
                    f"detectors whose AP differs by {effect:g} cannot be made up here: give --effects between "
                    f"{low:.2f} and {high:.2f}"
                )
            self._shifts[key] = scipy.optimize.brentq(
                lambda shift: reached(shift) - effect, _LEAST_SHIFT, _MOST_SHIFT, xtol=1e-9
            )
        return self._shifts[key]

    def seeds(
        self, noise: str, shifts: Sequence[float], correlation: float, shape: tuple[int, ...], generator
    ) -> np.ndarray:
        """(arms, *shape) detectors of seeds whose skills correlate between arms."""
        arms = len(shifts)
        covariance = np.full((arms, arms), correlation) + (1 - correlation) * np.eye(arms)
        normal = np.moveaxis(generator.multivariate_normal(np.zeros(arms), covariance, shape), -1, 0)
        skills = normal if noise == "normal" else _skewed(normal)
        bounds = (self.skills[1:] + self.skills[:-1]) / 2
        return np.stack([np.searchsorted(bounds, of_arm + shift) for of_arm, shift in zip(skills, shifts)])

    def draw(self, images: int, samples: int, generator: np.random.Generator) -> "Drawn":
        """Draws images for experiments, and again from them for the bootstrap."""
        drawn, counts = np.unique(generator.integers(self.images, size=images), return_counts=True)
        weights = generator.multinomial(images, counts / images, samples)
        return Drawn(self, drawn, np.concatenate([counts[None], weights]).astype(np.int32))


class Drawn:
    """Detectors on images that were drawn from a population; each is scored when it is first asked for.

    Args:
        drawn: (images,) which.
        weights: (1 + samples, images) how often each was drawn, and in each bootstrap sample.
    """

    def __init__(self, population: Population, drawn: np.ndarray, weights: np.ndarray):
        self._population, self._drawn, self._weights = population, drawn, weights
        self._place = np.full(population.images, -1, dtype=np.int32)
        self._place[drawn] = np.arange(len(drawn))
        shape = population.ap.shape
        self._ap, self._resampled = np.full(shape, np.nan), np.empty((*shape, len(weights) - 1))
        self._is_resampled = np.zeros(shape, dtype=bool)

    def ap(self, arm: int, detectors: Sequence[int]) -> np.ndarray:
        """(n,) AP of detectors of an arm on the images."""
        for detector in np.unique(detectors):
            if np.isnan(self._ap[arm, detector]):
                self._ap[arm, detector] = _ap(self._scorer(arm, detector), self._weights[:1])[0]
        return self._ap[arm, detectors]

    def resampled(self, arm: int, detectors: Sequence[int]) -> np.ndarray:
        """(n, samples) the same for each bootstrap sample."""
        for detector in np.unique(detectors):
            if not self._is_resampled[arm, detector]:
                scorer, found = self._scorer(arm, detector), self._resampled[arm, detector]
                for start in range(0, len(found), scorer.rows):
                    stop = start + scorer.rows
                    found[start:stop] = _ap(scorer, self._weights[1 + start : 1 + stop])
                self._is_resampled[arm, detector] = True
        return self._resampled[arm, detectors]

    def expected(self, arm: int, shares: np.ndarray) -> float:
        """The mean AP on the images over all seeds, of which detectors have ``shares``."""
        likely = np.flatnonzero(shares > _NO_SHARE)
        return float(shares[likely] @ self.ap(arm, likely) / shares[likely].sum())

    def _scorer(self, arm: int, detector: int) -> Scorer:
        return Scorer(_on(self._population.matches[arm][detector], self._drawn, self._place))


class _Scene:
    """Images of one category with objects, and background that looks like some."""

    def __init__(self, images: int, generator: np.random.Generator):
        self.image = np.repeat(np.arange(images), 1 + generator.poisson(0.5, images))
        self.boxes = _boxes(len(self.image), generator)
        hard = generator.normal(0, 0.4, images)
        self.hard = hard[self.image] + generator.normal(0, 0.4, len(self.image))
        self.background = np.repeat(np.arange(images), generator.poisson(0.6, images))
        self.ghosts = _boxes(len(self.background), generator)
        self.likeness = generator.normal(-1, 0.7, len(self.background))
        annotations = [
            {"id": place, "image_id": image, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for place, (image, box) in enumerate(zip(self.image.tolist(), self.boxes.tolist()), 1)
        ]
        entries = [{"id": image, "file_name": "", "width": _WIDTH, "height": _HEIGHT} for image in range(images)]
        content = {"images": entries, "categories": [{"id": 1, "name": "thing"}], "annotations": annotations}
        self.objects = Objects(hotcoco.COCO(content), "bbox", content, areas=("all",))

    def detect(self, skill: float, liking: np.ndarray, generator: np.random.Generator) -> Matches:
        """The matches of a detector's boxes."""
        count = len(self.image)
        error = self.hard - _SKILL * skill - liking[self.image] + generator.normal(0, 0.3, count)
        moved = generator.normal(0, 0.085 * np.exp(error)[:, None], (count, 4))
        boxes = self.boxes.copy()
        boxes[:, :2] += moved[:, :2] * self.boxes[:, 2:]
        boxes[:, 2:] *= np.exp(moved[:, 2:])
        found = generator.random(count) > scipy.special.expit(-2.2 + 1.5 * error)
        score = scipy.special.expit(1 - 1.2 * error + generator.normal(0, 0.7, count))
        seen = generator.random(len(self.background)) < 0.7
        likeness = scipy.special.expit(self.likeness + generator.normal(0, 0.7, len(self.background)))
        return self.objects.match(
            [
                {"image_id": image, "category_id": 1, "bbox": box, "score": value}
                for image, box, value in zip(
                    np.concatenate([self.image[found], self.background[seen]]).tolist(),
                    np.concatenate([boxes[found], self.ghosts[seen]]).tolist(),
                    np.concatenate([score[found], likeness[seen]]).tolist(),
                )
            ]
        )


def _boxes(count: int, generator: np.random.Generator) -> np.ndarray:
    sizes = np.exp(generator.normal(4.2, 0.6, (count, 2))).clip(12, 300)
    return np.concatenate([generator.uniform(0, [_WIDTH, _HEIGHT] - sizes), sizes], axis=1)


def _on(matches: Matches, drawn: np.ndarray, place: np.ndarray) -> Matches:
    """The matches on the images ``drawn``, whose new places ``place`` has; -1 for the others."""
    image = place[matches.image]
    kept = image >= 0
    rows = matches.category[kept], matches.positive[kept], matches.ignored[kept]
    return Matches(image[kept], *rows, matches.objects[drawn])


def _ap(scorer: Scorer, weights: np.ndarray) -> np.ndarray:
    precision, _ = scorer(weights)
    return 100 * precision[:, 0, :, 0].mean(1)


def _skewed(normal: np.ndarray) -> np.ndarray:
    """A gamma distribution's values turned round, with mean 0 and standard deviation 1, skewness -1.4."""
    return (_SHAPE - scipy.stats.gamma.ppf(scipy.stats.norm.cdf(-normal), _SHAPE)) / math.sqrt(_SHAPE)


def _cumulative(noise: str, bounds: np.ndarray) -> np.ndarray:
    if noise == "normal":
        return scipy.stats.norm.cdf(bounds)
    return scipy.stats.gamma.sf(_SHAPE - bounds * math.sqrt(_SHAPE), _SHAPE)


def simulate(
    population: Population,
    images: int,
    draws: int,
    experiments: int,
    *,
    samples: int = 200,
    seed: int = 0,
    kinds: Sequence[str] = KINDS,
    effects: Sequence[float] = EFFECTS,
    noises: Sequence[str] = NOISES,
    seed_counts: Sequence[int] = SEEDS,
) -> Iterator[Tally]:
    """Simulates experiments with two arms, and with as many as the population has.

    Args:
        images: of the validation set of an experiment.
        draws: of such sets; each yields a tally.
        experiments: on each set and of each kind.
        samples: of the bootstrap.
        kinds: of ``KINDS``.
        effects: true differences of two arms, in AP points.
        noises: of ``NOISES``.
        seed_counts: seeds of an arm, of two.
    """
    generator = np.random.default_rng([seed, images])
    for _ in range(draws):
        drawn = population.draw(images, samples, generator)
        study = _Study(population, images, drawn, experiments, generator, Tally())
        for noise in noises:
            for effect in effects:
                if "two arms" in kinds:
                    for correlation in CORRELATIONS:
                        for seeds in seed_counts:
                            study.two_arms(noise, effect, correlation, seeds)
                if "looks" in kinds:
                    study.with_looks(noise, effect)
            for arms in ARMS if "arms" in kinds else ():
                if arms <= len(population.matches):
                    study.several_arms(noise, arms)
        yield study.tally


@dataclass
class _Study:
    """Experiments on one draw of images."""

    population: Population
    images: int
    drawn: Drawn
    experiments: int
    generator: np.random.Generator
    tally: Tally

    def two_arms(self, noise: str, effect: float, correlation: float, seeds: int) -> None:
        """Coverage of each interval, for what it speaks of, and outcomes of the verdict."""
        shifts = [0.0, self.population.shift(noise, 1, effect)]
        here = np.subtract(*(self.drawn.expected(arm, self.population.shares(noise, shifts[arm])) for arm in (1, 0)))
        chosen = self.population.seeds(noise, shifts, correlation, (self.experiments, seeds), self.generator)
        found: dict[str, list[bool]] = {}
        for a, b in zip(*chosen):
            reference, arm = self.drawn.ap(0, a), self.drawn.ap(1, b)
            samples = self.drawn.resampled(0, a), self.drawn.resampled(1, b)
            both = both_interval(reference, arm, *samples, self.images)
            of_these = float(self.population.ap[1, b].mean() - self.population.ap[0, a].mean())
            over_images = image_interval(
                float(arm.mean() - reference.mean()), (samples[1] - samples[0]).mean(0), self.images
            )
            unpaired = both_interval(reference, arm, *samples, self.images, paired=False)
            for name, interval, truth in (
                ("seeds", seed_interval(arm - reference), here),
                ("welch", welch_interval(reference, arm), here),
                ("images", over_images, of_these),
                ("both", both, effect),
                ("both, unpaired", unpaired, effect),
                ("seeds, of new images", seed_interval(arm - reference), effect),
                ("images, of new seeds", over_images, effect),
            ):
                found.setdefault(f"covers: {name}", []).append(_covers(interval, truth))
            for name, interval in (("paired", both), ("unpaired", unpaired)):
                verdict = outcome(interval, MARGIN)
                for which in ("gain", "loss", "no relevant difference"):
                    found.setdefault(f"{which}: {name}", []).append(verdict == which)
        self._keep(("two arms", noise, effect, correlation, seeds), found)

    def with_looks(self, noise: str, effect: float) -> None:
        """A look at 3, 4, ... 10 seeds, until there is an answer; with the levels of looks, and with none."""
        shifts = [0.0, self.population.shift(noise, 1, effect)]
        chosen = self.population.seeds(noise, shifts, 0.0, (self.experiments, LOOKS[-1]), self.generator)
        found: dict[str, list[bool]] = {}
        for a, b in zip(*chosen):
            reference, arm = self.drawn.ap(0, a), self.drawn.ap(1, b)
            samples = self.drawn.resampled(0, a), self.drawn.resampled(1, b)
            intervals = [
                both_interval(reference[:look], arm[:look], samples[0][:look], samples[1][:look], self.images)
                for look in LOOKS
            ]
            for name, levels, width in (
                ("with levels", sequential_levels(LOOKS), 0.0),
                ("without", (ALPHA,) * len(LOOKS), 0.0),
                ("until a width", sequential_levels(LOOKS), _WIDTH_OF_ONE / math.sqrt(self.images)),
            ):
                verdict, last, look = _stopped(intervals, levels, width)
                for which in ("gain", "loss", "no relevant difference"):
                    found.setdefault(f"{which}: {name}", []).append(verdict == which)
                found.setdefault(f"covers: {name}", []).append(_covers(last, effect))
                found.setdefault(f"before {LOOKS[-1]} seeds: {name}", []).append(look < LOOKS[-1])
        self._keep(("looks", noise, effect), found)

    def several_arms(self, noise: str, arms: int, seeds: int = 5) -> None:
        """Arms of equal AP: whether any is told as a gain or a loss, with Holm's correction and without."""
        shifts = [self.population.shift(noise, arm, 0.0) for arm in range(arms)]
        chosen = self.population.seeds(noise, shifts, 0.0, (self.experiments, seeds), self.generator)
        found: dict[str, list[bool]] = {"Holm": [], "uncorrected": []}
        for experiment in range(self.experiments):
            of_arms = chosen[:, experiment]
            ap = [self.drawn.ap(arm, detectors) for arm, detectors in enumerate(of_arms)]
            samples = [self.drawn.resampled(arm, detectors) for arm, detectors in enumerate(of_arms)]
            intervals = [both_interval(ap[0], ap[arm], samples[0], samples[arm], self.images) for arm in range(1, arms)]
            corrected = [each.outcome for each in outcomes(intervals)]
            alone = [outcome(interval) for interval in intervals]
            for name, verdicts in (("Holm", corrected), ("uncorrected", alone)):
                found[name].append(any(verdict in ("gain", "loss") for verdict in verdicts))
        self._keep(("arms", noise, arms), found)

    def _keep(self, cell: tuple, found: dict[str, list[bool]]) -> None:
        for name, hits in found.items():
            self.tally.add("|".join(map(str, (self.images, *cell, name))), hits)


def _covers(interval: Interval | None, truth: float) -> bool:
    return interval is not None and interval.low <= truth <= interval.high


def _stopped(
    intervals: Sequence[Interval | None], levels: Sequence[float], width: float
) -> tuple[str, Interval | None, int]:
    """The verdict where looking stops, the interval with the level of its look, and the number of seeds.

    Args:
        width: at which it stops, in AP points; 0 to stop at the first answer.
    """
    for place, (interval, level) in enumerate(zip(intervals, levels)):
        seen, verdict = interval and interval.at(1 - level), outcome(interval, MARGIN, level)
        ends = seen is not None and seen.high - seen.low <= width if width else verdict != "undecided"
        if ends or place == len(intervals) - 1:
            return verdict, seen, LOOKS[place]
    raise ValueError("there are no looks")


def coverage_report(tally: Tally) -> str:
    """The counts of :func:`simulate` as Markdown tables, in per cent."""
    cells = sorted({name.rpartition("|")[0] for name in tally.hits}, key=_natural)
    two_arms, looks, arms = ([c for c in cells if c.split("|")[1] == kind] for kind in ("two arms", "looks", "arms"))
    parts = []
    if two_arms:
        parts += _two_arms_tables(tally, two_arms)
    if looks:
        found = (
            ("false", "with levels"),
            ("false", "without"),
            ("covers", "with levels"),
            ("covers", "without"),
            (f"before {LOOKS[-1]} seeds", "with levels"),
            ("false", "until a width"),
            ("covers", "until a width"),
            (f"before {LOOKS[-1]} seeds", "until a width"),
        )
        rows = [
            [*row, *(_range(tally, of, _looked(of[0], what, how)) for what, how in found)]
            for row, of in _grouped(looks, (0, 3, 2))
        ]
        header = (*("images", "difference", "noise"), *(f"{what}, {how}" for what, how in found))
        parts += [f"## Looks at {LOOKS[0]} to {LOOKS[-1]} seeds, until there is an answer", _table(header, rows)]
    if arms:
        rows = [
            [*row, *(_range(tally, of, [how]) for how in ("Holm", "uncorrected"))]
            for row, of in _grouped(arms, (0, 3, 2))
        ]
        header = ("images", "arms", "noise", "any false gain or loss, Holm", "uncorrected")
        parts += ["## Arms of equal AP, five seeds", _table(header, rows)]
    return "\n\n".join(parts)


def _two_arms_tables(tally: Tally, cells: Sequence[str]) -> list[str]:
    experiments = [tally.experiments[name] for name in tally.hits]
    errors = [tally.rate(f"{cell}|covers: {name}")[1] for cell in cells for name in COVERED]
    return [
        f"{min(experiments)} experiments of each kind at least. The standard error of a coverage is "
        f"{100 * np.median(errors):.1f}, at most {100 * max(errors):.1f}; experiments on the same draw of images are "
        "alike, which it knows. A range is over effects and correlations of the arms over seeds, where they are not "
        "named.",
        "## How often a 95% interval holds the truth",
        _table(
            ("images", "seeds", "noise", *COVERED, "welch at -0.5", *_ASTRAY),
            [_coverage_row(tally, row, of) for row, of in _grouped(cells, (0, 5, 2))],
        ),
        "`seeds` and `welch` are held against the mean over new seeds on the same images, `images` against the same "
        "detectors on all images, `both` against new seeds on all images; the unpaired ones where the arms do not "
        "correlate. The last three columns take an interval for what it does not speak of.",
        "## How often a verdict is false, one arm against a reference",
        _table(
            (
                *("images", "seeds", "noise"),
                *("0: gain or loss, paired", "0: unpaired", "0.5 or 1: loss", "0.5 or 1: no relevant difference"),
                *("0.5: gain", "1: gain"),
            ),
            [_verdict_row(tally, row, of) for row, of in _grouped(cells, (0, 5, 2))],
        ),
        f"By the true difference in AP points; margin {MARGIN:g}. The last two columns are right, not false.",
    ]


def _verdict_row(tally: Tally, row: Sequence[str], cells: Sequence[str]) -> list[str]:
    equal, differ = _having(cells, 3, "0.0"), _having(cells, 3, "0.5", "1.0")
    return [
        *row,
        _range(tally, equal, ["gain: paired", "loss: paired"]),
        _range(tally, _having(equal, 4, "0.0"), ["gain: unpaired", "loss: unpaired"]),
        *(_range(tally, differ, [f"{which}: paired"]) for which in ("loss", "no relevant difference")),
        *(_range(tally, _having(cells, 3, effect), ["gain: paired"]) for effect in ("0.5", "1.0")),
    ]


def _coverage_row(tally: Tally, row: Sequence[str], cells: Sequence[str]) -> list[str]:
    alone = _having(cells, 4, "0.0")
    shares = [_range(tally, alone if name in _UNPAIRED else cells, [f"covers: {name}"]) for name in COVERED]
    shares.append(_range(tally, _having(cells, 4, "-0.5"), ["covers: welch"]))
    return [*row, *shares, *(_range(tally, cells, [f"covers: {name}"]) for name in _ASTRAY)]


def _natural(cell: str) -> list[tuple[float, str]]:
    return [
        (float(part), "") if part.replace(".", "").lstrip("-").isdigit() else (0.0, part) for part in cell.split("|")
    ]


def _grouped(cells: Sequence[str], places: Sequence[int]) -> list[tuple[list[str], list[str]]]:
    """Cells by their parts at ``places``, with these."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for cell in cells:
        groups.setdefault(tuple(cell.split("|")[place] for place in places), []).append(cell)
    return [(list(key), groups[key]) for key in sorted(groups, key=lambda key: _natural("|".join(key)))]


def _having(cells: Sequence[str], place: int, *values: str) -> list[str]:
    return [cell for cell in cells if cell.split("|")[place] in values]


def _looked(cell: str, what: str, how: str) -> list[str]:
    """What is false depends on the truth: a gain and a loss where it is not above and not below 0, and no relevant
    difference where it has the margin.
    """
    if what != "false":
        return [f"{what}: {how}"]
    effect = float(cell.split("|")[3])
    is_false = {"gain": effect <= 0, "loss": effect >= 0, "no relevant difference": abs(effect) >= MARGIN}
    return [f"{which}: {how}" for which, false in is_false.items() if false]


def _range(tally: Tally, cells: Sequence[str], names: Sequence[str]) -> str:
    """The least and the greatest share of any of ``names`` among cells; empty without any."""
    if not cells:
        return ""
    shares = [100 * sum(tally.rate(f"{cell}|{name}")[0] for name in names) for cell in cells]
    low, high = f"{min(shares):.1f}", f"{max(shares):.1f}"
    return low if low == high else f"{low} to {high}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return tabulate(rows, header, tablefmt="github", disable_numparse=True, colalign=("right",) * len(header))
