"""Two gloo processes, by our launcher (with Detectron2's set-up) and as torchrun starts them: one and the same run."""

import json
import multiprocessing
import os
import signal
from unittest import mock

import pytest
import torch
from conftest import TINY
from detectron2.engine.launch import _find_free_port
from detectron2.utils import comm
from started_tool import NARROW

from sge_det.engine.launching import launch
from sge_det.engine.training import Trainer, argument_parser, evaluate, setup_config

FASTER = "sample/faster_rcnn_SGE_R_50_FPN.yaml"


def arguments(folder, datasets, *more):
    words = ["--config-file", FASTER, "--timeout", "120"]
    words += [word for triple in datasets for word in ("--dataset", *triple)]
    # the statistics of BN are those of each process by itself
    overrides = ["MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "", "MODEL.ROI_BOX_HEAD.NORM", ""]
    overrides += ["SOLVER.MAX_ITER", "2", "OUTPUT_DIR", str(folder)]
    return argument_parser().parse_args([*words, *more, *TINY, *NARROW, *overrides])


def run(args):
    """Trains, and writes what this process has in the end."""
    cfg = setup_config(args.config_file, args.opts, args.dataset)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    state = trainer.model.module.state_dict()
    torch.save({"state": state, "world": comm.get_world_size()}, f"{cfg.OUTPUT_DIR}/rank{comm.get_rank()}.pt")


def as_torchrun(rank, port, args):
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    with mock.patch.dict(os.environ, {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}):
        launch(run, args)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, sample_datasets):
    """The folder of a run by each launcher."""
    folder = tmp_path_factory.mktemp("two")
    launch(run, arguments(folder / "own", sample_datasets, "--num-gpus", "2"))
    args, port = arguments(folder / "torchrun", sample_datasets), _find_free_port()
    # not forked from here, where other tests have started threads
    spawn = multiprocessing.get_context("spawn")
    pair = [spawn.Process(target=as_torchrun, args=(rank, port, args)) for rank in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(timeout=240)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
    assert [process.exitcode for process in pair] == [0, 0]
    return {"own": folder / "own", "torchrun": folder / "torchrun"}


def test_all_processes_have_the_same_parameters_whoever_started_them(folders):
    saved = [torch.load(path / f"rank{rank}.pt", weights_only=True) for path in folders.values() for rank in range(2)]
    assert [one["world"] for one in saved] == [2, 2, 2, 2]
    first = saved[0]["state"]
    for other in saved[1:]:
        assert [name for name, value in first.items() if not torch.equal(value, other["state"][name])] == []


def test_two_processes_find_what_one_finds(folders, tmp_path, sample_datasets):
    found = {}
    for name, path in folders.items():
        found[name] = json.loads((path / "inference/coco_instances_results.json").read_text())
    args = arguments(tmp_path, sample_datasets)
    args.opts += ["MODEL.WEIGHTS", str(folders["own"] / "model_final.pth")]
    evaluate(setup_config(args.config_file, args.opts, args.dataset, eval_only=True))
    alone = json.loads((tmp_path / "inference/coco_instances_results.json").read_text())
    assert found["own"] == found["torchrun"]

    def ordered(detections):
        return sorted(detections, key=lambda one: (one["image_id"], -one["score"], one["category_id"], one["bbox"]))

    assert ordered(alone) == ordered(found["own"])
