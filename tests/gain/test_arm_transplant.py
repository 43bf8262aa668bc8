"""The arm sge-transplant: from what it starts, and when."""

import json

import pytest
import torch
from conftest import TINY
from reference_models import torchvision_resnet

from sge_det import UserError
from sge_det.checkpoint import convert_file, transplant_state
from sge_det.engine.training import setup_config
from sge_det.gain import Matrix, choose_arms, measure_gain, to_json
from sge_det.gain.arms import examine_arms

pytestmark = pytest.mark.usefixtures("forked_runs")

CONFIG = "sample/faster_rcnn_SGE_R_50_FPN.yaml"
R18 = [
    *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.STEM_OUT_CHANNELS", "64", "MODEL.SGE.GROUPS", "32"),
    *("SOLVER.MAX_ITER", "2", "TEST.EVAL_PERIOD", "2", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
]
ARMS = ["plain", "sge-transplant"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def matrix(output, datasets, *overrides, arm_names=ARMS, **options):
    return Matrix(
        CONFIG, output, overrides=[*TINY, *R18, *overrides], datasets=datasets, arm_names=arm_names, **options
    )


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A plain ResNet-18 for MODEL.WEIGHTS."""
    folder = tmp_path_factory.mktemp("start")
    torch.save(torchvision_resnet(18, False).state_dict(), folder / "r18.pth")
    convert_file(str(folder / "r18.pth"), str(folder / "plain.pth"))
    return folder / "plain.pth"


def load(path):
    return torch.load(path, weights_only=True)["model"]


@pytest.mark.slow
def test_from_the_final_weights_of_a_reference_that_starts_from_scratch(tmp_path, sample_datasets):
    made = matrix(tmp_path / "out", sample_datasets)
    plain, transplanted = made.runs
    assert transplanted.reference is plain
    assert not transplanted.is_ready
    report = to_json(measure_gain(made, jobs=2, bootstrap=0).report)  # two at once, and yet one after the other
    ended = (plain.folder / "result.json").stat().st_mtime_ns
    assert ended < (transplanted.folder / "start.pth").stat().st_mtime_ns
    expected, _ = transplant_state(load(plain.folder / "model_final.pth"), transplanted.config, "")
    found = load(transplanted.folder / "start.pth")
    assert all(torch.equal(found[key], value) for key, value in expected.items() if "num_batches" not in key)
    assert "res5.1.sge.weight" in "".join(found)
    end = load(transplanted.folder / "model_final.pth")
    moved = (end["backbone.bottom_up.stem.conv1.weight"] - found["backbone.bottom_up.stem.conv1.weight"]).abs().max()
    assert 0 < moved < 0.02  # two steps from there, and not from a random start
    assert report["provenance"]["arm sge-transplant"].endswith("from the transplanted final weights of plain")
    assert "sge-transplant went on from the final weights of plain" in report["verdict"]
    assert "twice the 2 iterations" in (tmp_path / "out/report.html").read_text()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.pth")}
    matrix(tmp_path / "out", sample_datasets).execute()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    again = matrix(tmp_path / "out", sample_datasets).runs[1]
    again.fingerprint["start"]["INPUT.FORMAT"] = "'BGR'"
    with pytest.raises(UserError, match=r"made with weights of a run with INPUT.FORMAT 'RGB', here 'BGR'"):
        again.check()
    # its reference's weights are gone when it has to start again
    (plain.folder / "model_final.pth").unlink()
    (transplanted.folder / "result.json").unlink()
    (transplanted.folder / "start.pth").unlink()
    with pytest.raises(UserError, match=r"seed0 starts from .*plain/seed0/model_final.pth, which is not"):
        matrix(tmp_path / "out", sample_datasets).execute()


def test_from_the_start_weights_of_a_reference_that_has_some(tmp_path, sample_datasets, start):
    made = matrix(tmp_path / "out", sample_datasets, "MODEL.WEIGHTS", str(start), seeds=[0, 1])
    assert [run.name for run in made.runs] == [
        "plain/seed0",
        "sge-transplant/seed0",
        "plain/seed1",
        "sge-transplant/seed1",
    ]
    run = made.runs[3]
    assert run.reference is made.runs[2]
    assert run.is_ready  # it waits for nothing
    assert run.fingerprint["content"]["MODEL.WEIGHTS"] == made.runs[2].fingerprint["content"]["MODEL.WEIGHTS"]
    run.folder.mkdir(parents=True)
    run.make_start()
    expected, _ = transplant_state(load(start), run.config, "")
    found = load(run.start)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert run.command[-2:] == ["MODEL.WEIGHTS", str(run.start)]
    arm = made.arms[1]
    assert arm.describe(made.config).endswith("from the transplanted start weights of plain")
    assert arm.caveat(made.config) == ""


def test_workers_wait_for_a_reference_that_another_has(tmp_path, sample_datasets):
    made = matrix(tmp_path / "out", sample_datasets, seeds=[0, 1])
    assert made._claim([made.runs[1]], 0, 1) is None
    made.runs[0].folder.mkdir(parents=True)
    (made.runs[0].folder / "result.json").write_text(json.dumps({}))
    assert made.runs[1].is_ready
    assert not made.runs[3].is_ready


@pytest.mark.parametrize(
    ("names", "custom", "words"),
    [
        (["sge", "sge-transplant"], [], "but sge has an attention already: let a plain arm be the first"),
        (["se", "sge-transplant"], [], "but se has an attention already"),
        (["sge-transplant", "plain"], [], "name that one first"),
    ],
)
def test_what_cannot_be_a_reference(sample_datasets, names, custom, words):
    cfg = setup_config(CONFIG, TINY, sample_datasets)
    with pytest.raises(UserError, match=words):
        choose_arms(cfg, names, custom)


def test_what_the_reference_differs_in_is_kept(sample_datasets):
    cfg = setup_config(CONFIG, TINY, sample_datasets)
    custom = [["wide", "MODEL.FPN.OUT_CHANNELS", "32", "MODEL.SGE.ENABLED", "False"]]
    arms = choose_arms(cfg, ["wide", "sge", "sge-transplant"], custom)
    config = arms[2].config(cfg)
    assert (config.MODEL.FPN.OUT_CHANNELS, config.MODEL.SGE.ENABLED) == (32, True)
    assert choose_arms(cfg, ["plain", "sge", "sge-transplant"])[2].config(cfg).dump() == arms[1].config(cfg).dump()


def test_start_weights_with_sge_are_refused_at_once(tmp_path, sample_datasets):
    torch.save(torchvision_resnet(18, True).state_dict(), tmp_path / "r18.pth")
    convert_file(str(tmp_path / "r18.pth"), str(tmp_path / "sge.pth"))
    with pytest.raises(UserError, match="has SGE already: there is nothing to transplant"):
        matrix(tmp_path / "out", sample_datasets, "MODEL.SGE.GROUPS", "64", "MODEL.WEIGHTS", str(tmp_path / "sge.pth"))
    assert not (tmp_path / "out").exists()


def test_what_the_doctor_finds_in_an_arm(tmp_path, sample_datasets, start):
    cfg = setup_config(
        CONFIG, [*TINY, *R18, "MODEL.WEIGHTS", str(start), "MODEL.BACKBONE.FREEZE_AT", "2"], sample_datasets
    )
    # what all arms share is told of the config: here that its weights are plain and its SGE is frozen
    arms = choose_arms(cfg, ["plain", "sge", "sge-transplant"])
    assert examine_arms(arms, cfg) == []
    cfg.MODEL.SGE.ENABLED = False
    frozen = "MODEL.BACKBONE.FREEZE_AT"
    found = [finding.key for finding in examine_arms(arms, cfg)]
    assert found == ["arm sge: MODEL.WEIGHTS", f"arm sge: {frozen}", f"arm sge-transplant: {frozen}"]


def test_a_backbone_without_sge_is_refused(sample_datasets):
    cfg = setup_config(CONFIG, [*TINY, "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"], sample_datasets)
    with pytest.raises(UserError, match="set it to build_sge_resnet_fpn_backbone"):
        choose_arms(cfg, ARMS)
