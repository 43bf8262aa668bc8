"""Who started this process, and what its arguments may say beside that."""

import argparse
from types import SimpleNamespace

import pytest

from sge_det.engine import launching
from sge_det.engine.launching import check_launch, find_place
from sge_det.errors import UserError

TORCHRUN = {
    **{"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
    **{"MASTER_ADDR": "node0", "MASTER_PORT": "29500"},
}
SLURM = {
    **{"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "12345"},
    **{"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "MASTER_ADDR": "node0"},
}


def arguments(**given):
    defaults = {"num_gpus": 1, "num_machines": 1, "machine_rank": 0, "dist_url": None, "timeout": 10}
    return argparse.Namespace(**{**defaults, **given})


def test_nobody_started_it():
    assert find_place({}) is None
    # in a batch script, outside of srun
    assert find_place({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"}) is None
    assert find_place({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}) is None


def test_torchrun_and_srun_say_the_place():
    for environment, starter, url in ((TORCHRUN, "torchrun", "node0:29500"), (SLURM, "srun", "node0:32345")):
        place = find_place(environment)
        assert (place.starter, place.rank, place.world, place.local_rank, place.local_world) == (starter, 3, 4, 1, 2)
        assert place.url == f"tcp://{url}"


def test_srun_on_one_node_needs_no_address():
    alone = {key: value for key, value in SLURM.items() if key != "MASTER_ADDR"}
    assert find_place({**alone, "SLURM_STEP_TASKS_PER_NODE": "4"}).url == "tcp://127.0.0.1:32345"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[03-04]", "gpu03"), ("n[7,9-11],m1", "n7"), ("r[1-2]c[5,8]", "r1c5"), ("a-1.x,b[1-2]", "a-1.x")],
)
def test_processes_of_srun_meet_at_its_first_node(nodes, first):
    """Slurm's notation of nodes, as ``scontrol show hostnames`` takes it apart."""
    alone = {key: value for key, value in SLURM.items() if key != "MASTER_ADDR"}
    assert find_place({**alone, "SLURM_STEP_NODELIST": nodes}).url == f"tcp://{first}:32345"
    assert find_place({**SLURM, "SLURM_STEP_NODELIST": nodes}).url == "tcp://node0:32345"


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({key: value for key, value in TORCHRUN.items() if key != "MASTER_ADDR"}, "MASTER_ADDR"),
        ({key: value for key, value in SLURM.items() if key != "MASTER_ADDR"}, "MASTER_ADDR"),
        ({**TORCHRUN, "RANK": "x"}, "does not say which process"),
        ({**TORCHRUN, "MASTER_PORT": "x"}, "does not say which process"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "3,1"}, "--ntasks-per-node"),
    ],
)
def test_an_environment_that_does_not_say_enough(environment, words):
    with pytest.raises(UserError, match=words):
        find_place(environment)


@pytest.mark.parametrize(
    ("given", "environment", "words"),
    [
        ({"num_gpus": 4}, TORCHRUN, "torchrun has started 4 processes, 2 on this machine: leave out"),
        ({"num_machines": 2, "dist_url": "tcp://a:1"}, SLURM, "srun has started 4 processes"),
        ({"num_machines": 2}, {}, "needs --dist-url tcp://HOST:PORT"),
        ({"num_machines": 2, "dist_url": "auto"}, {}, "needs --dist-url"),
        ({"num_gpus": 0}, {}, "at least"),
        ({"machine_rank": 1}, {}, "ranks count from 0"),
        ({"timeout": 0}, {}, "--timeout"),
    ],
)
def test_arguments_that_cannot_be(given, environment, words):
    with pytest.raises(UserError, match=words):
        check_launch(arguments(**given), find_place(environment))


def test_arguments_that_can_be():
    check_launch(arguments(num_gpus=2), find_place(TORCHRUN))
    check_launch(arguments(), find_place(SLURM))
    check_launch(arguments(num_machines=2, machine_rank=1, dist_url="tcp://a:1"), None)


@pytest.mark.parametrize(("code", "waited"), [(143, True), (1, False)])
def test_the_checkpoint_of_what_is_stopped_is_waited_for(monkeypatch, code, waited):
    """However long the first process writes it after the second has ended; one that fails does not wait for others."""
    polls = iter([True] * 20)
    writing = SimpleNamespace(exitcode=None, is_alive=lambda: next(polls, False))
    ended = SimpleNamespace(exitcode=code, is_alive=lambda: False)
    monkeypatch.setattr(launching, "_GRACE_SECONDS", 0.0)
    monkeypatch.setattr(launching, "_POLL_SECONDS", 0.001)
    launching._watch([writing, ended], None)
    assert (next(polls, None) is None) == waited
