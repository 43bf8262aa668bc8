import itertools
import logging
import socket

import pytest
import torch
from conftest import TINY
from detectron2.utils import comm

from sge_det import UserError
from sge_det.config import load_config
from sge_det.engine.loss_guard import LossGuard, NonFiniteLossError
from sge_det.engine.training import Trainer, setup_config


@pytest.fixture
def trainer_of(tmp_path, sample_datasets):
    """A trainer whose losses are spoiled at the given iterations, and the file names of each iteration's images."""

    def make(spoil, *overrides, resume=False):
        config = "sample/retinanet_SGE_R_50_FPN.yaml"
        overrides = [*TINY, "OUTPUT_DIR", str(tmp_path), "MODEL.RESNETS.DEPTH", "18", *overrides]
        overrides += ["MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.MAX_ITER", "5"]
        cfg = setup_config(config, overrides, sample_datasets)
        cfg.DATASETS.TEST = ()
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=resume)
        forward, images = trainer.model.forward, {}

        def spoiled(batch):
            images[trainer.iter] = [image["file_name"] for image in batch]
            losses = forward(batch)
            return spoil(losses) if trainer.iter in trainer.spoiled else losses

        trainer.spoiled = ()
        trainer.model.forward = spoiled
        return trainer, images

    return make


def nan_in_classes(losses):
    return losses | {"loss_cls": losses["loss_cls"] * float("nan")}


def infinite_in_the_model(losses):
    raise FloatingPointError("Predicted boxes or scores contain Inf/NaN. Training has diverged.")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [(nan_in_classes, r"loss_cls nan, loss_box_reg \d"), (infinite_in_the_model, "Training has diverged")],
)
def test_a_loss_that_is_not_finite_stops_the_run_with_all_that_helps(trainer_of, tmp_path, spoil, said, caplog):
    trainer, images = trainer_of(spoil)
    trainer.spoiled = (3,)
    with pytest.raises(UserError, match=rf"no longer finite at iteration 3 \(.*{said}") as raised:
        trainer.train()
    for name in images[3]:
        assert name in str(raised.value)
    assert f"the last good checkpoint is {tmp_path / 'model_0000001.pth'}" in str(raised.value)
    assert "SOLVER.SKIP_NONFINITE" in str(raised.value)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())


def test_steps_are_passed_over_and_counted_over_a_resumption(trainer_of, tmp_path, caplog):
    trainer, images = trainer_of(nan_in_classes, "SOLVER.SKIP_NONFINITE", "2")
    trainer.spoiled = (1, 3)
    states = []
    step = trainer.run_step
    trainer.run_step = lambda: (states.append({k: v.clone() for k, v in trainer.model.state_dict().items()}), step())
    with caplog.at_level(logging.WARNING):
        trainer.train()
    told = [message for message in caplog.messages if "passed over" in message]
    assert [message.split(" is not")[0] for message in told] == ["the loss of iteration 1", "the loss of iteration 3"]
    assert all(name in told[0] for name in images[1])
    same = [all(torch.equal(a[key], b[key]) for key in a) for a, b in itertools.pairwise(states)]
    assert same == [False, True, False, True]

    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    trainer, _ = trainer_of(nan_in_classes, "SOLVER.SKIP_NONFINITE", "2", resume=True)
    assert trainer.start_iter == 4
    trainer.spoiled = (4,)
    with pytest.raises(UserError, match="at iteration 4 after 2 that were passed over"):
        trainer.train()


def test_the_key_is_checked():
    assert load_config("sample/retinanet_SGE_R_50_FPN.yaml").SOLVER.SKIP_NONFINITE == 0
    with pytest.raises(UserError, match=r"SOLVER\.SKIP_NONFINITE -1"):
        load_config("sample/retinanet_SGE_R_50_FPN.yaml", ["SOLVER.SKIP_NONFINITE", "-1"])


class Loss(torch.nn.Module):
    def forward(self, batch):
        return {"loss": batch[0]["loss"], "other": torch.tensor(1.0)}


def test_a_gradient_that_is_not_finite_is_left_to_the_scaler():
    model = Loss()
    LossGuard(model, 0)
    zero = torch.zeros((), requires_grad=True)
    model([{"loss": zero.sqrt(), "file_name": "a.jpg"}])["loss"].backward()
    assert zero.grad == float("inf")


def test_evaluation_is_not_watched():
    model = Loss().eval()
    LossGuard(model, 0)
    model([{"loss": torch.tensor(float("nan"))}])


def _one_of_two(rank, port, queue):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    comm.create_local_process_group(2)
    model, heard = Loss(), []
    guard = LossGuard(model, 0)
    for value in (1.0, float("nan") if rank else 1.0):
        try:
            model([{"loss": torch.tensor(value), "file_name": f"{rank}.jpg"}])
            heard.append("fine")
        except NonFiniteLossError as error:
            heard.append(str(error))
    # the model itself raises, in one of the processes
    model.forward = (lambda batch: _diverge()) if rank else model.forward
    try:
        model([{"loss": torch.tensor(1.0), "file_name": f"{rank}.jpg"}])
    except FloatingPointError as error:
        try:
            guard.handle(error, 7, "cpu", lambda: "there is no checkpoint yet")
        except UserError as told:
            heard.append(str(told))
    queue.put((rank, heard))
    torch.distributed.destroy_process_group()


def _diverge():
    raise FloatingPointError("diverged")


def test_all_processes_stop_where_one_has_a_loss_that_is_not_finite():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = torch.multiprocessing.get_context("fork").SimpleQueue()
    torch.multiprocessing.start_processes(_one_of_two, (port, queue), nprocs=2, start_method="fork")
    heard = dict(queue.get() for _ in range(2))
    first, second = heard[0], heard[1]
    assert first == second
    assert first[:2] == ["fine", "loss nan, other 1; images 1.jpg"]
    assert "finite at iteration 7 (diverged; images 1.jpg)" in first[2]
