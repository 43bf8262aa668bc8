"""Runs that are chosen one by one, fail, or are added until the answer is in; no run here trains anything."""

import hashlib
import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import filelock
import numpy as np
import pytest
from conftest import TINY
from scipy.stats import ttest_1samp

from sge_det import UserError
from sge_det.engine.fingerprint import FINGERPRINT_FILE
from sge_det.gain import Looks, Matrix, Question, RunFailed, decide_gain, measure_gain, report_gain, to_json
from sge_det.gain import api as api_module
from sge_det.gain import matrix as matrix_module
from sge_det.gain import report as report_module
from sge_det.gain.inference import sequential_levels
from sge_det.gain.plan import declare, declared, departures

CONFIG = "sample/faster_rcnn_SGE_R_50_FPN.yaml"


class Fake:
    """Stands for a run's process: ends at once, with boxes that are off by what the arm and the seed make of it."""

    shift = {"plain": 0.1, "sge": 0.1}  # share of a box's width, by arm
    noise = 0.02
    fails: set = set()

    def __init__(self, run, lock, launch, slot, jobs):
        self.run, self.lock = run, lock

    def ended(self):
        try:
            self.finish()
        finally:
            self.stop()  # last, as of a process that has ended
        return True

    def finish(self):
        if self.run.name in self.fails:
            raise RunFailed(f"{self.run.name} failed (exit 1)")
        truth = json.loads(Path(self.truth).read_text())
        rng = np.random.default_rng([self.run.seed, self.run.arm.name == "sge"])
        shift = self.shift[self.run.arm.name] + self.noise * rng.standard_normal()
        found = []
        for entry in truth["annotations"]:
            x, y, width, height = entry["bbox"]
            box = [x + width * (shift + 0.02 * rng.standard_normal()), y, width, height]
            found.append(
                {"image_id": entry["image_id"], "category_id": entry["category_id"], "bbox": box, "score": rng.random()}
            )
        self.run.predictions.parent.mkdir(parents=True, exist_ok=True)
        self.run.predictions.write_text(json.dumps(found))
        record = {"schema": 1, "seconds": 1.0, "results": {"bbox": {"AP": 1.0}}, "gates": {}, "pointing": {}}
        record["predictions"] = hashlib.sha256(self.run.predictions.read_bytes()).hexdigest()
        (self.run.folder / "result.json").write_text(json.dumps(record))

    def stop(self):
        self.lock.release()

    def ask_to_stop(self):
        pass


@pytest.fixture
def make(sample_datasets, tmp_path, monkeypatch):
    """Makes a matrix whose runs are faked, in the same folder each time."""
    monkeypatch.setattr(matrix_module, "RunProcess", Fake)
    monkeypatch.setattr(matrix_module, "_POLL_SECONDS", 0.0)
    # pictures are test_report's
    monkeypatch.setattr(report_module, "html_page", lambda *anything: "")
    monkeypatch.setattr(api_module, "gallery", lambda *anything: [])
    monkeypatch.setattr(Fake, "fails", set())
    monkeypatch.setattr(Fake, "shift", {"plain": 0.1, "sge": 0.1})
    monkeypatch.setattr(Fake, "truth", sample_datasets[1][1], raising=False)

    def make(seeds, **options):
        return Matrix(CONFIG, tmp_path / "out", overrides=TINY, datasets=sample_datasets, seeds=seeds, **options)

    return make


def finished(matrix):
    return [run.name for run in matrix.runs if run.finished]


def test_seeds_are_added_until_a_gain_is_plain(make, monkeypatch):
    monkeypatch.setattr(Fake, "shift", {"plain": 0.3, "sge": 0.05})
    matrix = make(range(8))
    looks = Looks(first=3, most=8, decide=True)
    report = to_json(decide_gain(matrix, looks, bootstrap=200, question=Question(margin=0.5)).report)
    (verdict,) = [verdict for verdict in report["verdicts"] if verdict["primary"]]
    assert verdict["outcome"] == "gain"
    assert len(report["seeds"]) < 8
    assert len(finished(matrix)) == 2 * len(report["seeds"])
    level = dict(zip(range(3, 9), sequential_levels(tuple(range(3, 9)))))[len(report["seeds"])]
    assert report["look"]["level"] == level < 0.05
    assert report["plan"]["looks"] == {"first": 3, "most": 8, "until": 0.0, "decide": True}
    assert f"at the level {level:.4f}" in report["verdict"]
    # the interval of the verdict is that of the look, wider than the 95% of a fixed number of seeds
    fixed = report["differences"]["sge"]["bbox"]["AP"]["intervals"]["both"]
    assert verdict["low"] < fixed["low"] < fixed["high"] < verdict["high"]


def test_without_an_answer_the_last_look_ends_it(make):
    matrix = make(range(4))
    report = to_json(
        decide_gain(matrix, Looks(first=3, most=4, decide=True), bootstrap=200, question=Question(margin=0.01)).report
    )
    assert report["seeds"] == [0, 1, 2, 3]
    assert report["verdicts"][0]["outcome"] == "undecided"
    assert "left out" not in report["verdict"] and "added" not in report["verdict"].split("Looked at")[0]


def test_a_width_ends_it_too_and_the_same_call_again_trains_nothing(make, monkeypatch):
    matrix = make(range(6))
    looks = Looks(first=3, most=6, until=100.0)
    first = to_json(decide_gain(matrix, looks, bootstrap=200).report)
    assert first["seeds"] == [0, 1, 2]
    monkeypatch.setattr(matrix_module, "RunProcess", pytest.fail)
    assert to_json(decide_gain(make(range(6)), looks, bootstrap=200).report)["verdicts"] == first["verdicts"]


def test_a_metric_that_is_absent_is_told_before_anything_is_trained(make):
    matrix = make([0])
    for ask in (measure_gain, lambda *args, **options: decide_gain(args[0], Looks(most=4, decide=True), **options)):
        with pytest.raises(UserError, match=r"--metric APl is absent in .*: it has no such objects"):
            ask(matrix, bootstrap=200, question=Question("APl"))
    assert not finished(matrix) and not (matrix.output / "plan.json").exists()


def test_another_question_than_was_declared_is_told(make):
    decide_gain(make(range(4)), Looks(first=3, most=4, until=100.0), bootstrap=200)
    with pytest.raises(UserError, match="begun with another question"):
        decide_gain(make(range(4)), Looks(first=3, most=4, until=100.0), bootstrap=200, question=Question("AP50"))
    report = to_json(measure_gain(make(range(3)), bootstrap=200, question=Question("AP50")).report)
    assert "The metric was declared as AP before the first run and is AP50 here" in report["verdict"]
    assert [verdict["primary"] for verdict in report["verdicts"]] == [False] * len(report["verdicts"])


def test_arms_are_corrected_together_at_all_looks():
    """Against a simulation of its own: five arms that equal their reference, held against a fifth of the levels."""
    arms, rng = 5, np.random.default_rng(2)
    reference = rng.standard_normal((20_000, 8))
    crossed, one = np.zeros(len(reference), bool), []
    for _ in range(arms):
        apart, own = rng.standard_normal(reference.shape) - reference, np.zeros(len(reference), bool)
        for seeds, level in Looks(3, 8, decide=True).levels(arms):
            own |= ttest_1samp(apart[:, :seeds], 0, axis=1).pvalue <= level / arms
        crossed |= own
        one.append(own.mean())
    assert np.mean(one) == pytest.approx(0.05 / arms, abs=0.001)
    assert crossed.mean() <= 0.052


def primary(report):
    return [verdict["primary"] for verdict in report["verdicts"] if verdict["task"] == "bbox"]


@pytest.mark.parametrize(
    ("declared", "done", "sentence", "still_primary"),
    [
        ({}, {}, None, True),
        ({}, {"seeds": [0, 1, 2]}, "The seeds 2 were added to those that were declared, 0, 1:", False),
        ({}, {"seeds": [1]}, "The seeds 0 were declared and are left out here.", False),
        ({}, {"question": Question("AP50")}, "The metric was declared as AP before the first run and is AP50", False),
        ({}, {"question": Question(margin=0.1)}, "The margin was declared as 0.5 before the first run", False),
        ({}, {"question": Question(paired=False)}, "The paired was declared as True before the first run", False),
        ({}, {"question": Question(difference=3.0)}, None, True),
        ({}, {"against": "sge"}, "The reference was declared as plain before the first run and is sge here.", False),
        ({"against": "sge"}, {"against": "sge"}, None, True),
        ({"arms": ["plain", "sge", "sge-fixed"]}, {}, "The arms sge-fixed were declared and are left out", False),
        ({}, {"arms": ["plain", "sge", "sge-fixed"]}, "The arms sge-fixed were added to those", True),
    ],
)
def test_what_departs_from_the_plan_is_told_and_not_primary(tmp_path, declared, done, sentence, still_primary):
    def asked(arms=("plain", "sge"), seeds=(0, 1), question=None, against=None):
        return arms, seeds, question or Question(), against

    arms, seeds, question, against = asked(**declared)
    matrix = SimpleNamespace(
        output=tmp_path, arms=[SimpleNamespace(name=name) for name in arms], seeds=list(seeds), runs=[]
    )
    declare(matrix, question, against=against)
    plan = json.loads((tmp_path / "plan.json").read_text())
    arms, seeds, question, against = asked(**done)
    arms = [against or arms[0], *(name for name in arms if name != (against or arms[0]))]
    found = departures(plan | {"looks": None}, question, arms, seeds)
    assert [each.sentence.startswith(sentence) for each in found] == [True] * (sentence is not None)
    assert any(each.exploratory for each in found) is not still_primary


def test_departures_reach_the_report(make):
    measure_gain(make([0, 1]), bootstrap=0)
    report = to_json(measure_gain(make([0, 1, 2]), bootstrap=0, against="sge").report)
    assert len(report["departures"]) == 2
    assert all(sentence in report["verdict"] for sentence in report["departures"])
    assert "these verdicts are exploratory and none is primary" in report["verdict"]
    assert not any(primary(report))


def test_a_plan_that_comes_after_runs_says_so(make):
    matrix = make([0, 1])
    matrix.execute(runs=[matrix.run_of("plain", 0)])
    report = to_json(measure_gain(make([0, 1]), bootstrap=0).report)
    assert report["departures"] == ["The plan was written when there were runs already: plain/seed0."]


def test_a_report_before_the_end_is_exploratory(make):
    matrix = make([0, 1, 2])
    declare(matrix, Question())
    matrix.execute(runs=[run for run in matrix.runs if run.seed < 2])
    early = to_json(report_gain(make([0, 1, 2]), bootstrap=0).report)
    assert not any(primary(early))
    assert early["departures"] == ["The seeds 2 were declared and are left out here."]
    assert all(primary(to_json(measure_gain(make([0, 1, 2]), bootstrap=0).report)))


@pytest.mark.parametrize(
    "text",
    [
        *("[]", "{}", '{"seeds": []}', '{"seeds": [0], "looks": {"when": 3}}', '{"seeds": [0], "arms": 1}', "{"),
        *('{"seeds": ["0"]}', '{"seeds": [true]}', '{"seeds": [0], "arms": [1]}'),
        *('{"seeds": [0], "finished_before": [1]}', '{"seeds": [0], "looks": {"first": 3.0, "decide": true}}'),
    ],
)
def test_a_plan_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(UserError, match=r"plan.json cannot be read"):
        declared(tmp_path)


def test_a_rule_that_was_not_declared_still_ends_by_its_answer(make):
    """None of its verdicts is primary, which is no answer."""
    measure_gain(make([0, 1, 2]), bootstrap=0)
    looks = Looks(first=3, most=4, decide=True)
    report = to_json(decide_gain(make(range(4)), looks, bootstrap=200, question=Question(margin=0.5)).report)
    assert report["seeds"] == [0, 1, 2, 3]
    assert report["verdicts"][0]["outcome"] == "undecided"
    assert not any(primary(report))


def test_workers_that_decide_together_come_to_the_same_answer(make, monkeypatch):
    """Each run is made once, and both read the same report at each look."""
    made = []

    class Slow(Fake):
        def ended(self):
            if not hasattr(self, "since"):
                self.since = time.monotonic()
                made.append(self.run.name)
            return time.monotonic() - self.since > 0.05 and super().ended()

    monkeypatch.setattr(matrix_module, "RunProcess", Slow)
    monkeypatch.setattr(matrix_module, "_POLL_SECONDS", 0.005)
    workers = [make(range(4)) for _ in range(2)]
    looks = Looks(first=2, most=4, decide=True)
    with ThreadPoolExecutor() as pool:
        tasks = [pool.submit(decide_gain, matrix, looks, jobs=2, bootstrap=200) for matrix in workers]
        reports = [to_json(task.result(timeout=120).report) for task in tasks]
    assert sorted(made) == sorted(f"{arm}/seed{seed}" for arm in ("plain", "sge") for seed in reports[0]["seeds"])
    assert reports[0]["verdicts"] == reports[1]["verdicts"]
    assert reports[0]["look"] == reports[1]["look"]
    assert json.loads((workers[0].output / "report.json").read_text())["look"] == reports[0]["look"]


def test_after_the_answer_a_report_has_the_level_of_its_look_and_more_seeds_are_told(make):
    first = to_json(decide_gain(make(range(4)), Looks(first=3, most=4, until=100.0), bootstrap=200).report)
    again = to_json(report_gain(make(range(4)), bootstrap=200).report)
    assert (again["look"], again["departures"]) == (first["look"], [])
    assert again["verdicts"] == first["verdicts"]
    # within the rule: its last look
    report = to_json(measure_gain(make(range(4)), bootstrap=200).report)
    assert (report["look"]["seeds"], report["departures"]) == (4, [])
    assert report["look"]["level"] == sequential_levels((3, 4))[1]
    # beyond it
    report = to_json(measure_gain(make(range(5)), bootstrap=200).report)
    assert "look" not in report
    assert [sentence.split(" by")[0] for sentence in report["departures"]] == [
        "The rule",
        "The seeds 4 were added to those that were declared, 0, 1, 2, 3: where that was done because of what these "
        "showed, false claims are more frequent than 5%.",
    ]
    assert not any(primary(report))


@pytest.mark.parametrize(
    ("looks", "words"),
    [
        (Looks(), "give --until WIDTH or --decide DELTA"),
        (Looks(until=1.0, decide=True), "one of the two"),
        (Looks(until=-1.0), "must be a width"),
        (Looks(until=float("nan")), "must be a width"),
        (Looks(first=1, decide=True), "two seeds at least"),
        (Looks(first=5, most=4, decide=True), "--max-seeds 4 is less than the 5"),
    ],
)
def test_rules_that_cannot_be(looks, words):
    with pytest.raises(UserError, match=words):
        looks.check()


def test_all_looks_together_keep_their_level():
    """Against a simulation of its own: Student's t of the first 3, 4, ... 8 of 8 normal differences."""
    rng = np.random.default_rng(1)
    draws = rng.standard_normal((40_000, 8))
    crossed = np.zeros(len(draws), bool)
    for seeds, level in Looks(3, 8, decide=True).levels():
        crossed |= ttest_1samp(draws[:, :seeds], 0, axis=1).pvalue <= level
    assert crossed.mean() == pytest.approx(0.05, abs=0.004)


def test_a_failed_run_does_not_end_its_neighbours(make, monkeypatch):
    monkeypatch.setattr(Fake, "fails", {"sge/seed0"})
    matrix = make([0, 1, 2])
    with pytest.raises(RunFailed, match=r"1 of 6 runs failed: sge/seed0 failed .*same command again"):
        measure_gain(matrix, bootstrap=200, keep_going=True)
    assert len(finished(matrix)) == 5
    report = json.loads((matrix.output / "report.json").read_text())
    assert report["seeds"] == [1, 2]
    assert "Not finished, so that their seeds are left out: sge/seed0" in report["verdict"]
    monkeypatch.setattr(Fake, "fails", set())
    assert to_json(measure_gain(make([0, 1, 2]), bootstrap=200, keep_going=True).report)["seeds"] == [0, 1, 2]


def test_without_keep_going_it_ends_all(make, monkeypatch):
    monkeypatch.setattr(Fake, "fails", {"sge/seed0"})
    matrix = make([0, 1])
    with pytest.raises(RunFailed, match=r"^sge/seed0 failed"):
        measure_gain(matrix, bootstrap=200)
    assert finished(matrix) == ["plain/seed0"]


def test_a_transplant_of_a_failed_run_fails_too(make, monkeypatch):
    monkeypatch.setattr(Fake, "fails", {"plain/seed0"})
    matrix = make([0], arm_names=["plain", "sge-transplant", "sge"])
    failed = matrix.execute(keep_going=True).failed
    assert failed["sge-transplant/seed0"] == "sge-transplant/seed0 starts from plain/seed0, which has failed"
    assert finished(matrix) == ["sge/seed0"]


def test_runs_of_other_workers_are_left_to_them(make, capsys):
    matrix = make([0])
    held = matrix.run_of("sge", 0)
    held.folder.mkdir(parents=True)
    with filelock.FileLock(held.folder / ".claim.lock"):
        assert measure_gain(matrix, bootstrap=200, wait=False) is None
    assert "left to other workers: sge/seed0; --report-only reports" in capsys.readouterr().out
    assert finished(matrix) == ["plain/seed0"]
    assert not (matrix.output / "report.json").exists()
    with pytest.raises(UserError, match=r"no seed has finished in every arm, .*: sge/seed0"):
        report_gain(matrix)


def test_one_run_alone_and_then_the_report(make):
    matrix = make([0, 1])
    for arm, seed in (("plain", 0), ("sge", 0), ("sge", 1)):
        matrix.execute(runs=[matrix.run_of(arm, seed)])
    report = to_json(report_gain(matrix, bootstrap=200).report)
    assert report["seeds"] == [0]
    assert "left out: plain/seed1" in report["verdict"]
    # the code may have changed since, but not between the runs
    made = [run.folder / FINGERPRINT_FILE for run in matrix.runs if run.finished]
    for path in made:
        path.write_text(path.read_text().replace('"sge_det": "', '"sge_det": "0'))
    with pytest.raises(UserError, match="holds a run made with"):
        make([0, 1])
    kept = {"result.json", "fingerprint.json", "config.yaml", "coco_instances_results.json"}
    for path in (path for run in matrix.runs for path in run.folder.rglob("*")):
        if path.is_file() and path.name not in kept:
            path.unlink()
    assert to_json(report_gain(make([0, 1], report_only=True), bootstrap=200).report)["seeds"] == [0]
    made[1].write_text(made[1].read_text().replace('"sge_det": "0', '"sge_det": "'))
    with pytest.raises(UserError, match="holds a run made with"):
        make([0, 1], report_only=True)
    with pytest.raises(UserError, match="there is no run sge 7: the arms are plain, sge, the seeds 0, 1"):
        matrix.run_of("sge", 7)


def test_a_report_alone_is_of_the_seeds_that_were_declared(make, call_tool, sample_datasets, tmp_path):
    """Without --seeds, and at the level of the look that it is."""
    looks = Looks(first=3, most=4, until=100.0)
    first = to_json(decide_gain(make(range(4)), looks, bootstrap=200).report)
    triples = [word for triple in sample_datasets for word in ("--dataset", *triple)]
    options = ["--config-file", CONFIG, "--output", str(tmp_path / "out"), *triples, "--bootstrap", "200"]
    done = call_tool("measure_gain.py", *options, "--report-only", *TINY)
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "out/report.json").read_text())
    assert (again["seeds"], again["departures"]) == ([0, 1, 2], [])
    assert again["look"] == first["look"]


def _remove_what_is_named(told, file):
    (named,) = re.findall(r"or remove the folder (\S+) and|or remove (/\S+) and|remove it\b", told)
    what = Path(next((word for word in named if word), "") or file)
    shutil.rmtree(what) if what.is_dir() else what.unlink()


def test_what_others_damaged_is_told_and_what_is_advised_helps(make, monkeypatch):
    monkeypatch.setattr(api_module, "write_report", lambda *anything: None)
    matrix = make([0])
    before = to_json(measure_gain(matrix, bootstrap=0).report)
    run = matrix.run_of("sge", 0)
    for file in (
        run.folder / "result.json",
        run.folder / FINGERPRINT_FILE,
        run.predictions,
        matrix.output / "plan.json",
    ):
        file.write_text("[]")
        with pytest.raises(UserError, match=re.escape(str(file))) as told:
            measure_gain(make([0]), bootstrap=0)
        _remove_what_is_named(str(told.value), file)
        report = to_json(measure_gain(make([0]), bootstrap=0).report)
        assert json.dumps(report["arms"]) == json.dumps(before["arms"])
        assert ("there were runs already" in report["verdict"]) == (file.name == "plan.json")


BAD_RESULTS = ("", "{}", '{"seconds": 1, "results": [1]}', '{"seconds": 1, "results": {"bbox": 3}}', "[" * 99999)


def test_all_kinds_of_damage_are_told(make):
    run = make([0]).run_of("sge", 0)
    run.folder.mkdir(parents=True)
    for name, contents, read in (
        ("result.json", BAD_RESULTS, run.result),
        (FINGERPRINT_FILE, ("", '{"config": 3}', "[" * 99999, "\xff"), run.check),
        ("../../plan.json", ("", "{}", "[" * 99999), lambda: declared(run.folder / "../..")),
    ):
        for content in contents:
            (run.folder / name).write_text(content, encoding="latin-1")
            with pytest.raises(UserError, match=r"(cannot be read|is not what a run records).*remove"):
                read()
        (run.folder / name).unlink()
    with pytest.raises(UserError, match=r"or remove \S*result\.json and run the same command again"):
        run.check_predictions({"predictions": "0" * 64})
    run.check_predictions({})


def test_curves_that_others_damaged_are_left_out(make):
    matrix = make([0])
    matrix.execute()
    run = matrix.run_of("sge", 0)
    log = run.folder / "metrics.json"
    lines = ['{"iteration": 4, "bbox/AP": 2.0}', "3", "[" * 99999, '{"bbox/AP": 7}', '{"iteration": "x", "bbox/AP": 1}']
    log.write_text("\n".join([*lines, '{"iteration": 6, "bbox/AP": "high"}', '{"iteration": 9, "bbox/AP": NaN}', ""]))
    assert run.curves() == {"bbox/AP": [(5, 2.0), (run.iterations, 1.0)]}
    log.unlink()
    log.mkdir()
    assert run.curves() == {"bbox/AP": [(run.iterations, 1.0)]}
