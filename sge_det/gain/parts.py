"""What a report holds, part by part, as values that do not change. Metrics and their differences are in AP points
(0-100); NaN where there is no number. :mod:`.schema` alone knows how ``report.json`` spells them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .inference import MARGIN, Interval
from .looks import Look

TASK_NAMES = {"bbox": "box", "segm": "mask", "classification": "classification"}
# A difference that is spoken of where power is told, in AP points.
DIFFERENCE = 1.0


@dataclass(frozen=True)
class Question:
    """What a comparison is to answer, named before its results are seen.

    Attributes:
        metric: the primary one, of the first task; all else is exploratory.
        margin: the least difference that matters, in AP points; 0 for no test of equivalence.
        paired: by seed: runs of a seed share their images and start values. Else Welch's interval decides.
        difference: of which the power is told, in AP points.
    """

    metric: str = "AP"
    margin: float = MARGIN
    paired: bool = True
    difference: float = DIFFERENCE


DECLARED = Question()


@dataclass(frozen=True)
class Bounds:
    """The ends of an interval, in AP points."""

    low: float
    high: float

    @classmethod
    def of(cls, interval: Interval | None) -> "Bounds | None":
        """Those of an interval, if there is one."""
        return None if interval is None else cls(interval.low, interval.high)


@dataclass(frozen=True)
class Score:
    """A metric of an arm: ``mean``, standard deviation ``sd`` (n - 1; NaN for one seed) and ``values`` by seed."""

    mean: float
    sd: float
    values: tuple[float, ...]


@dataclass(frozen=True)
class Intervals:
    """The intervals of a difference, by what is drawn anew; None where there is none.

    Attributes:
        seeds: new seeds, paired, on these images.
        welch: new seeds, not paired, on these images.
        images: new images, for these detectors.
        both: new seeds and new images, paired or not as declared; a verdict stands on it.
    """

    seeds: Bounds | None
    welch: Bounds | None
    images: Bounds | None
    both: Bounds | None


@dataclass(frozen=True)
class Difference:
    """A metric of an arm minus that of the reference.

    Attributes:
        values: by seed.
        seed_correlation: of the two arms, over the seeds, -1 to 1.
        images_by_seed: the interval over the images of each seed; empty without a bootstrap.
        probability_of_improvement: that a run of the arm beats one of the reference, 0-1.
        effect_size: in standard deviations between runs (Hedges).
    """

    mean: float
    values: tuple[float, ...]
    seed_correlation: float
    intervals: Intervals
    images_by_seed: tuple[Bounds | None, ...]
    probability_of_improvement: float
    effect_size: float


@dataclass(frozen=True)
class Power:
    """What could have been seen: ``probability`` of seeing a true ``difference`` (AP points) with the seeds that there
    are, and how many ``more_seeds`` an arm see it with 80%; None where no number that one can train does."""

    difference: float
    probability: float
    more_seeds: int | None


@dataclass(frozen=True)
class Verdict:
    """What a metric of an arm shows.

    Attributes:
        outcome: one of ``inference.OUTCOMES``.
        primary: whether it is the metric that was declared; what others show is exploratory.
        p, equivalence_p: corrected over the arms; NaN without an interval.
        excludes_zero: of the interval over both, without any correction; None without it.
        power: of the primary metric alone.
        low, high: of the interval over both that the outcome follows from, in AP points, at 95% or, with looks at
            growing numbers of seeds, at the confidence of this look; NaN without it.
    """

    arm: str
    task: str
    metric: str
    outcome: str
    primary: bool
    p: float
    equivalence_p: float
    excludes_zero: bool | None
    power: Power | None
    sentence: str
    low: float
    high: float


@dataclass(frozen=True)
class ErrorScore:
    """A figure of the errors of an arm, points or per cent: ``mean`` and ``values`` by seed."""

    mean: float
    values: tuple[float, ...]


@dataclass(frozen=True)
class ErrorDifference:
    """A figure of the errors of an arm minus the reference's, points or per cent: its ``interval`` is over new seeds,
    None where there is none."""

    mean: float
    values: tuple[float, ...]
    interval: Bounds | None


@dataclass(frozen=True)
class Confusion:
    """Objects of ``category`` that are ``taken_for`` another, per cent of its objects: of the reference and of the arm
    in the mean over seeds, and the difference."""

    category: str
    taken_for: str
    reference: float
    arm: float
    mean: float
    values: tuple[float, ...]
    interval: Bounds | None


@dataclass(frozen=True)
class Origins:
    """Where differences come from.

    Attributes:
        arms: by arm, task and figure.
        differences: the same for all arms but the reference.
        confusions: by arm and task, the pairs of categories that differ most.
    """

    arms: Mapping[str, Mapping[str, Mapping[str, ErrorScore]]]
    differences: Mapping[str, Mapping[str, Mapping[str, ErrorDifference]]]
    confusions: Mapping[str, Mapping[str, tuple[Confusion, ...]]]


@dataclass(frozen=True)
class Cost:
    """What the ``runs`` of an arm cost together: hours of wall time, and of the GPUs and cores that they kept busy; NaN
    where that was not recorded."""

    runs: int
    hours: float
    gpu_hours: float
    core_hours: float


@dataclass(frozen=True)
class Declared:
    """What was declared before the first run, as ``plan.json`` has it (None without one), and a sentence for each way
    in which what was done is something else."""

    plan: Mapping[str, Any] | None
    departures: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """A comparison of arms with a reference.

    Attributes:
        seeds: of the runs of each arm, in the order of all ``values``.
        tasks: "bbox", "segm" or "classification"; the first is the declared metric's.
        images: of the validation set.
        confidence: of all intervals but those of a look's verdicts.
        bootstrap_samples: of the images; 0 for none.
        arms: by arm, the reference first, task and metric.
        differences: the same for all arms but the reference.
        gates: by arm with SGE, seed and stage, what the run recorded (:mod:`sge_det.modeling.gates`).
        verdicts: of the declared metric, by task and arm.
        notes: what is suspected of what was given.
        verdict: all sentences, one a line.
        origins: of detectors.
        look: where seeds are added until there is an answer.
        declared: where arms were trained.
        cost: by arm, where arms were trained.
        pointing: by arm with SGE and seed, what the run recorded (:mod:`sge_det.analysis.pointing`).
        provenance: what was compared, and with what.
        others: what a file held beyond this, which is handed on.
    """

    reference: str
    seeds: tuple[int, ...]
    tasks: tuple[str, ...]
    images: int
    confidence: float
    bootstrap_samples: int
    question: Question
    arms: Mapping[str, Mapping[str, Mapping[str, Score]]]
    differences: Mapping[str, Mapping[str, Mapping[str, Difference]]]
    gates: Mapping[str, Mapping[str, Mapping[str, Any]]]
    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...]
    verdict: str
    origins: Origins | None = None
    look: Look | None = None
    declared: Declared | None = None
    cost: Mapping[str, Cost] | None = None
    pointing: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)

    @property
    def task(self) -> str:
        """The one that the declared metric is of."""
        return self.tasks[0]

    @property
    def several(self) -> bool:
        """Whether there is more than one seed."""
        return len(self.seeds) > 1

    @property
    def lines(self) -> list[str]:
        """The sentences of the verdict."""
        return self.verdict.split("\n")

    @property
    def main_metric(self) -> str:
        """What the dots and curves of runs are of: AP, or the first of the metrics."""
        metrics = self.arms[self.reference][self.task]
        return "AP" if "AP" in metrics else next(iter(metrics))
