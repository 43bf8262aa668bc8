"""Reports that exist are drawn again, of this schema and the one before; figures and tables as files of their own."""

import csv
import dataclasses
import io
import json
import math

import pytest
from conftest import ROOT
from PIL import Image
from scipy import stats

from sge_det import UserError
from sge_det.gain import Looks, compare_results, draw_report, from_json, plots, to_json, write_figures
from sge_det.gain.latex import escape_latex
from sge_det.gain.looks import Look
from sge_det.gain.parts import Cost, Declared
from sge_det.gain.schema import read_report
from sge_det.gain.tables import Table, report_tables

OLD = sorted((ROOT / "docs/results").glob("**/*.json"))
OLD = [path for path in OLD if '"schema":1' in path.read_text()[:20]]
NASTY = "=a_b & c|d\\e%$x_{"


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A report of two arms with three seeds, whose arm and category have names that mean something elsewhere."""
    folder = tmp_path_factory.mktemp("compared")
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 50, "width": 50} for i in range(4)]
    box = {"category_id": 1, "bbox": [5, 5, 20, 20]}
    objects = [{"id": i + 1, "image_id": i, "area": 400, "iscrowd": 0, **box} for i in range(4)]
    truth = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": NASTY}]}
    (folder / "truth.json").write_text(json.dumps(truth))
    files = {"plain": [], NASTY: []}
    for arm, found in (("plain", (1, 2, 1)), (NASTY, (2, 4, 3))):
        for seed, count in enumerate(found):
            files[arm].append(folder / f"{len(files['plain'])}_{seed}_{count}.json")
            entries = [{"image_id": i, "score": 0.9 - seed / 100 - count / 1000, **box} for i in range(count)]
            files[arm][-1].write_text(json.dumps(entries))
    measurement = compare_results(folder / "truth.json", files, folder / "out", bootstrap=200)
    return measurement, folder / "out"


def test_old_results_are_marked():
    assert OLD
    for path in OLD:
        assert "cannot be computed anew" in json.loads(path.read_text())["note"]


@pytest.mark.parametrize("path", OLD, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_schema_1_becomes_schema_2(path):
    old, report = json.loads(path.read_text()), to_json(read_report(path))
    assert report["schema"] == 2
    assert "schema 1" in report["verdict"].splitlines()[0]
    for name, by_task in old["differences"].items():
        theirs, ours = (old["arms"][arm]["bbox"]["AP"]["values"] for arm in (old["reference"], name))
        found = report["differences"][name]["bbox"]["AP"]
        assert found["mean"] == pytest.approx(by_task["bbox"]["AP"]["mean"])
        assert found["values"] == pytest.approx(by_task["bbox"]["AP"]["values"])
        expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
        assert list(found["intervals"]["seeds"].values()) == pytest.approx(list(expected))
        expected = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
        assert list(found["intervals"]["welch"].values()) == pytest.approx(list(expected))
        assert found["intervals"]["images"] is None and found["intervals"]["both"] is None
        assert found["images_by_seed"] == [None] * len(ours)


def test_a_schema_1_report_is_drawn(tmp_path):
    draw_report(ROOT / "docs/results/retinanet.json", tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "This report is of schema 1" in page
    assert page.count("<img") == 3
    assert "+1.33" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)["schema"] == 2
    assert sorted(path.name for path in (tmp_path / "figures").iterdir())[:2] == ["arms.pdf", "arms.svg"]


def test_a_report_drawn_again_is_the_same(compared, tmp_path):
    _, folder = compared
    draw_report(folder / "report.json", tmp_path)
    first, again = (json.loads((where / "report.json").read_text()) for where in (folder, tmp_path))
    assert again["provenance"].pop("drawn again from") == str(folder / "report.json")
    assert again == first
    tables = sorted(path.name for path in (folder / "tables").iterdir())
    assert tables == sorted(path.name for path in (tmp_path / "tables").iterdir())
    for name in tables:
        assert (folder / "tables" / name).read_text() == (tmp_path / "tables" / name).read_text()
    with pytest.raises(UserError, match="name another --output"):
        draw_report(folder / "report.json", folder)


@pytest.mark.parametrize("content", ["", "[]", '{"schema": 3}', '{"schema": 1}', "[" * 100_000, "\x00"])
def test_what_is_no_report_is_refused(tmp_path, content):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(UserError, match=r"report\.json"):
        read_report(tmp_path / "report.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_report(tmp_path / "nothing.json")


WRONG = {
    "reference": "nobody",
    "seeds": [],
    "tasks": ["boxes"],
    "images": "many",
    "confidence": True,
    "question": {"metric": "AP99", "margin": 0.5, "paired": True, "difference": 1.0},
    "arms": {"plain": {"bbox": {}}},
    "differences": {},
    "gates": [],
    "verdicts": [{"outcome": "win"}],
    "verdict": None,
    "origins": {"arms": {}},
    "cost": {"plain": {"runs": 1.5}},
    "look": {"seeds": 3},
    "departures": "many",
    "provenance": {"config": 3},
}


@pytest.mark.parametrize("key", WRONG)
def test_a_report_whose_parts_are_wrong_is_refused(compared, tmp_path, key):
    _, folder = compared
    content = json.loads((folder / "report.json").read_text())
    (tmp_path / "report.json").write_text(json.dumps(content | {key: WRONG[key]}))
    with pytest.raises(UserError, match=r"report\.json is no (whole )?report\.json of measure_gain: ") as told:
        read_report(tmp_path / "report.json")
    assert len(str(told.value)) < 500


GATES = {key: {"mean": 0.5, "sd": 0.1, "spatial_sd": None} for key in ("gamma", "beta", "gate")}
FIGURES = ("chance", "before", "after", "gate", "after_minus_before", "gate_minus_chance", "gate_ratio")
PLAYED = {"images": 3} | {figure: {"mean": 0.5, "low": None, "high": None} for figure in FIGURES}


def without(part, *keys):
    """A copy of a part of a report that lacks what lies under ``keys``."""
    kept = dict(part)
    if len(keys) == 1:
        del kept[keys[0]]
    else:
        kept[keys[0]] = without(kept[keys[0]], *keys[1:])
    return kept


@pytest.mark.parametrize(
    ("key", "changed"),
    [
        ("origins", lambda part: without(part, "arms", NASTY)),
        ("origins", lambda part: without(part, "differences", NASTY, "bbox", "ECE")),
        ("origins", lambda part: without(part, "confusions", NASTY, "bbox")),
        ("gates", lambda _: {NASTY: None}),
        ("gates", lambda _: {NASTY: {"0": {"res2": without(GATES, "beta")}}}),
        ("gates", lambda _: {NASTY: {"0": {"res2": GATES | {"gamma": {"mean": "much", "sd": 0}}}}}),
        ("pointing", lambda _: {NASTY: {}}),
        ("pointing", lambda _: {NASTY: {"0": {"bbox": {"res2": {"all": without(PLAYED, "gate")}}}}}),
        ("pointing", lambda _: {NASTY: {"0": {"bbox": {"res2": {"all": PLAYED}}}, "1": {"bbox": {"res3": {}}}}}),
        ("cost", lambda _: {"plain": {"runs": 0, "hours": 1, "gpu_hours": 1, "core_hours": 1}}),
    ],
)
def test_what_no_table_can_show_is_refused_before_anything_is_written(compared, tmp_path, key, changed):
    _, folder = compared
    content = json.loads((folder / "report.json").read_text())
    (tmp_path / "report.json").write_text(json.dumps(content | {key: changed(content.get(key))}))
    with pytest.raises(UserError, match=r"report\.json of measure_gain: "):
        draw_report(tmp_path / "report.json", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def put(part, value, *keys):
    """A copy of a part of a report with another value under ``keys``."""
    first, *others = keys
    inner = put(part[first], value, *others) if others else value
    if isinstance(part, list):
        return [inner if place == first else own for place, own in enumerate(part)]
    return dict(part) | {first: inner}


AP = (NASTY, "bbox", "AP")


@pytest.mark.parametrize(
    ("value", "keys", "words"),
    [
        *(
            (value, ("confidence",), f"the confidence is {value}: it must lie between 0 and 1")
            for value in (1.5, 0, -1, 95)
        ),
        (None, ("confidence",), "the confidence is None"),
        (-4, ("images",), "its number of images is -4: it must be at least 1"),
        (0, ("images",), "its number of images is 0"),
        (-200, ("bootstrap_samples",), "bootstrap_samples is -200: it must be at least 0"),
        (-1, ("seeds", 0), "a seed is -1"),
        (1, ("seeds", 0), "one of its seeds is there twice"),
        (-0.5, ("question", "margin"), "the margin is -0.5"),
        (-0.5, ("arms", *AP, "sd"), "an sd is -0.5"),
        (101, ("arms", *AP, "mean"), "a metric is 101: it must be from"),
        (-1, ("arms", *AP, "values", 0), "a metric is -1"),
        (1.5, ("differences", *AP, "seed_correlation"), "a seed_correlation is 1.5: it must be from -1 to 1"),
        (1.5, ("differences", *AP, "probability_of_improvement"), "a probability_of_improvement is 1.5"),
        ({"low": 2, "high": 1}, ("differences", *AP, "intervals", "both"), "an interval begins at 2 and ends at 1"),
        (1.5, ("verdicts", 0, "p"), "a p is 1.5: it must be from 0 to 1"),
        ({"difference": 1, "probability": 0.5, "more_seeds": -2}, ("verdicts", 0, "power"), "more_seeds is -2"),
        ({"difference": 1, "probability": 2, "more_seeds": 1}, ("verdicts", 0, "power"), "the power is 2"),
        ({"plain": {"runs": -3, "hours": 1, "gpu_hours": 1, "core_hours": 1}}, ("cost",), "an arm's runs is -3"),
        ({"plain": {"runs": 3, "hours": -1, "gpu_hours": 1, "core_hours": 1}}, ("cost",), "the hours of an arm is -1"),
        ({"first": 3, "most": -5, "until": 0, "decide": True, "seeds": 3, "level": 0.1}, ("look",), "the look's most"),
        ({NASTY: {"0": {"res2": GATES | {"beta": {"mean": 0, "sd": -1}}}}}, ("gates",), "the sd of a beta is -1"),
        (
            {NASTY: {"0": {"bbox": {"res2": {"all": PLAYED | {"images": -3}}}}}},
            ("pointing",),
            "the images of the pointing game is -3",
        ),
    ],
)
def test_numbers_that_cannot_be_are_refused_in_a_sentence(compared, tmp_path, value, keys, words):
    _, folder = compared
    content = json.loads((folder / "report.json").read_text())
    (tmp_path / "report.json").write_text(json.dumps(put(content, value, *keys)))
    with pytest.raises(UserError, match=r"report\.json is no report\.json of measure_gain: ") as told:
        read_report(tmp_path / "report.json")
    assert words in str(told.value)


def test_what_runs_recorded_is_read_and_shown(compared):
    _, folder = compared
    content = json.loads((folder / "report.json").read_text())
    played = {"images": 3, "without_objects": 0, "bbox": {"res2": {"all": PLAYED}}}
    report = from_json(content | {"gates": {NASTY: {"0": {"res2": GATES}}}, "pointing": {NASTY: {"0": played}}})
    tables = report_tables(report)
    assert tables["gates"].rows[0][1:3] == ["seed 0, res2", "0.5000 ± 0.1000"]
    assert tables["pointing_bbox"].rows[0][1:4] == ["res2, all", "3", "50.0"]
    assert math.isnan(report.pointing[NASTY]["0"]["bbox"]["res2"]["all"]["chance"]["low"])


def test_every_part_is_read_as_it_was_written(compared):
    """Both ways: the values of a report, with those that only training brings, and what a later version might add."""
    measurement, _ = compared
    report = dataclasses.replace(
        measurement.report,
        look=Look(3, 0.012, Looks(3, 5, 0.0, True)),
        declared=Declared({"seeds": [0, 1, 2], "looks": None}, ("The seeds 2 were added.",)),
        cost={"plain": Cost(3, 1.5, 3.0, 0.25)},
        others={"later": [1, None]},
    )
    content = to_json(report)
    # as text: NaN is not equal to itself
    assert repr(from_json(json.loads(json.dumps(content)))) == repr(report)
    assert content["differences"][NASTY]["bbox"]["AP"]["intervals"]["both"]["low"] < 0
    assert (content["look"]["most"], content["plan"], content["later"]) == (5, report.declared.plan, [1, None])


def test_figures_are_files_of_vectors(compared, tmp_path):
    measurement, _ = compared
    write_figures(tmp_path, measurement)
    names = {"differences", "arms", "categories", "errors", "precision_recall"}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        f"{name}.{kind}" for name in names for kind in ("svg", "pdf")
    }
    svg = (tmp_path / "figures/differences.svg").read_bytes()
    assert b"<svg" in svg and b"<image" not in svg
    assert (tmp_path / "figures/differences.pdf").read_bytes().startswith(b"%PDF")
    assert plots.rendered(plots.forest(measurement.report), "svg") == svg, "the same picture is the same file"
    assert Image.open(io.BytesIO(plots.rendered(plots.forest(measurement.report)))).width > 300


def test_a_legend_has_names_that_begin_with_an_underscore(compared):
    measurement, _ = compared
    report = measurement.report
    renamed = {
        part: {name.replace(NASTY, "_x"): of for name, of in getattr(report, part).items()}
        for part in ("arms", "differences")
    }
    (legend,) = plots.forest(dataclasses.replace(report, **renamed)).legends
    assert [text.get_text().strip() for text in legend.get_texts()] == ["_x"]


def test_tables_as_csv_and_latex(compared):
    measurement, folder = compared
    report = measurement.report
    rows = list(csv.reader((folder / "tables/metrics_bbox.csv").open()))
    assert rows[0][:3] == ["metric", "plain", f"'{NASTY}"]
    assert {row[0] for row in csv.reader((folder / "metrics.csv").open())} == {"arm", "plain", f"'{NASTY}"}
    (ap,) = [row for row in rows if row[0] == "AP"]
    assert ap[3] == f"{report.differences[NASTY]['bbox']['AP'].mean:+.2f}"
    for name, table in report_tables(report).items():
        text = (folder / f"tables/{name}.tex").read_text()
        lines = [line for line in text.splitlines() if line.endswith(r"\\")]
        assert len(lines) == 1 + len(table.rows)
        for line in lines:
            assert line.replace(r"\&", "").count("&") == len(table.header) - 1
    assert r"=a\_b \& c\textbar{}d\textbackslash{}e\%" in (folder / "tables/metrics_bbox.tex").read_text()


def test_text_in_latex_and_spreadsheets():
    # "\\\\" takes what stands in brackets after it, and a star, for its own
    assert escape_latex("[a]*") == "{[}a]{*}"
    assert escape_latex("50% of $x_1 {a} #2~^<>\n±") == (
        r"50\% of \$x\_1 \{a\} \#2\textasciitilde{}\textasciicircum{}\textless{}\textgreater{} $\pm$"
    )
    table = Table(["a", "b"], [["@SUM(1)", "+1.20"], ["-0.5 to +2.0", "+cmd|x"], ["-1", "absent"]])
    cells = list(csv.reader(io.StringIO(table.csv())))
    assert cells[1:] == [["'@SUM(1)", "+1.20"], ["-0.5 to +2.0", "'+cmd|x"], ["-1", "absent"]]
    assert not math.isnan(float(cells[1][1]))
