"""Processes of a run: started here, or by torchrun or Slurm, whose environment says which one this is."""

import argparse
import contextlib
import functools
import os
import pickle
import re
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
from detectron2.engine.launch import _distributed_worker, _find_free_port
from detectron2.utils import comm
from torch import multiprocessing

from ..errors import Resumable, Stopped, UserError
from .stopping import asked, signals_handled, waiting

TIMEOUT_SECONDS = 1800
_POLL_SECONDS = 0.2
# For the others to end by themselves, once one has.
_GRACE_SECONDS = 5.0
# Exit codes of what was asked to stop, SIGINT's and SIGTERM's.
_STOPPED = (130, 143)


@dataclass(frozen=True)
class Place:
    """Which of the processes that somebody else started this one is."""

    starter: str
    rank: int
    world: int
    local_rank: int
    local_world: int
    url: str


def find_place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """The place of this process among those that torchrun or Slurm's ``srun`` started; None where neither did.

    Raises:
        UserError: the environment does not say enough.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return _place("torchrun", environment, "RANK", "WORLD_SIZE", "LOCAL_RANK", environment.get("LOCAL_WORLD_SIZE"))
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in environment:
        counts = re.fullmatch(r"(\d+)(\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
        if counts is None:
            raise UserError("Slurm starts other numbers of tasks on each node: give srun --ntasks-per-node")
        return _place("srun", environment, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", counts[1])
    return None


def _place(
    starter: str, environment: Mapping[str, str], rank: str, world: str, local_rank: str, local_world: str | None
) -> Place:
    host, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    try:
        size = int(environment[world])
        local = int(local_world or size)
        if host is None and local == size:
            host = "127.0.0.1"
        if host is None and starter == "srun":
            host = _first_node(environment.get("SLURM_STEP_NODELIST", ""))
        if port is None and "SLURM_JOB_ID" in environment:
            port = str(20000 + int(environment["SLURM_JOB_ID"]) % 20000)
        if host is None or port is None:
            raise UserError(
                f"{starter} started this process, but MASTER_ADDR and MASTER_PORT do not say where the processes meet: "
                "set them to the first node's name and a free port"
            )
        own = int(environment.get(local_rank, int(environment[rank]) % local))
        return Place(starter, int(environment[rank]), size, own, local, f"tcp://{host}:{int(port)}")
    except (KeyError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the environment of {starter} does not say which process this is: {error}") from error


def _first_node(nodes: str) -> str | None:
    """The node of process 0 in Slurm's notation: ``node03`` of ``node[03-04,7],other``; None of an empty list."""
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", nodes).split(",")[0] or None


def launch(function: Callable, args: argparse.Namespace, *, own_only: bool = False, twice: bool = True) -> None:
    """Runs ``function(args)`` in the processes that the launch arguments of ``args`` ask for, or in this one of those
    that torchrun or ``srun`` started.

    Without GPUs, ``--num-gpus N`` starts N processes on the CPU, which talk through gloo. Signals to this process are
    those of all.

    Args:
        own_only: whatever started this process is no business of the run's.
        twice: the second signal ends all at once.

    Raises:
        UserError: one of the processes raised it, was killed, or does not answer.
        Stopped: a signal asked for it, and all have ended.
    """
    place = None if own_only else find_place()
    check_launch(args, place)
    timeout = timedelta(seconds=args.timeout)
    with signals_handled(twice=twice):
        if place is not None and place.world > 1:
            _join(place, timeout)
            try:
                function(args)
            finally:
                torch.distributed.destroy_process_group()
        elif args.num_gpus * args.num_machines > 1:
            _start(function, args, timeout)
        else:
            function(args)


def check_launch(args: argparse.Namespace, place: Place | None) -> None:
    """Checks the launch arguments against each other and against who started this process.

    Raises:
        UserError: they cannot be.
    """
    if args.timeout <= 0:
        raise UserError(f"--timeout {args.timeout} must be a number of seconds above 0")
    if min(args.num_gpus, args.num_machines) < 1 or not 0 <= args.machine_rank < args.num_machines:
        raise UserError(
            f"--num-gpus {args.num_gpus} --num-machines {args.num_machines} --machine-rank {args.machine_rank}: there "
            "must be one of each at least, and ranks count from 0"
        )
    if place is not None:
        if args.num_machines > 1 or args.num_gpus not in (1, place.local_world):
            raise UserError(
                f"{place.starter} has started {place.world} processes, {place.local_world} on this machine: leave out "
                "--num-gpus and --num-machines"
            )
    elif args.num_machines > 1 and args.dist_url in (None, "auto"):
        raise UserError(
            f"--num-machines {args.num_machines} needs --dist-url tcp://HOST:PORT, a free port of the machine with "
            "--machine-rank 0"
        )
    available = torch.cuda.device_count()
    if place is None and available and args.num_gpus > available:
        raise UserError(f"--num-gpus {args.num_gpus}: this machine has {available}")


def _join(place: Place, timeout: timedelta) -> None:
    has_gpu = torch.cuda.is_available()
    try:
        torch.distributed.init_process_group(
            "nccl" if has_gpu else "gloo", place.url, timeout, world_size=place.world, rank=place.rank
        )
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().split("\n")[0]
        raise Resumable(
            f"process {place.rank} of {place.world} does not find the others at {place.url}: {first}"
        ) from error
    comm.create_local_process_group(place.local_world)
    if has_gpu:
        # srun may show each task its own GPU alone
        torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
    comm.synchronize()


def _start(function: Callable, args: argparse.Namespace, timeout: timedelta) -> None:
    url = args.dist_url
    if url in (None, "auto"):
        url = f"tcp://127.0.0.1:{_find_free_port()}"
    world = args.num_gpus * args.num_machines
    stop = multiprocessing.get_context("spawn").Event()
    work = functools.partial(_run, function, stop, os.getpid())
    arguments = (work, world, args.num_gpus, args.machine_rank, url, (args,), timeout)
    with waiting():
        started = multiprocessing.start_processes(_work, arguments, nprocs=args.num_gpus, join=False)
        processes = started.processes
        codes = []
        try:
            _watch(processes, stop)
            codes = [process.exitcode for process in processes]
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()  # one that is stopped does not heed anything less
                process.join()
        _tell(codes, started.error_files, args.machine_rank * args.num_gpus)


def _watch(processes: list, stop) -> None:
    """Waits until all have ended, or one has failed and the others had a while to end too.

    One that has stopped is no reason for haste: all have agreed to, and the first still writes the checkpoint.
    """
    deadline = None
    while any(process.is_alive() for process in processes):
        if asked() is not None:
            stop.set()
        if deadline is None and any(process.exitcode not in (None, 0, *_STOPPED) for process in processes):
            deadline = time.monotonic() + _GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            return
        time.sleep(_POLL_SECONDS)


def _tell(codes: list[int | None], error_files: list[str], first_rank: int) -> None:
    """Raises what counts most of how the processes ended; None among ``codes`` had not."""
    errors = [error for file in error_files if (error := _error_in(file)) is not None]
    # who loses another has a sentence for that too
    errors.sort(key=lambda error: (not isinstance(error, UserError), isinstance(error, Resumable)))
    if errors and isinstance(errors[0], UserError) and not isinstance(errors[0], Resumable):
        raise errors[0]
    stopped = [code for code in codes if code in _STOPPED]
    if stopped:
        raise Stopped(asked() or (signal.SIGINT if stopped[0] == 130 else signal.SIGTERM))
    killed = {rank: code for rank, code in enumerate(codes, first_rank) if code is not None and code < 0}
    for rank, code in killed.items():
        name = signal.Signals(-code).name
        raise Resumable(f"process {rank} of the run was killed by {name}: see to what killed it")
    if errors:
        raise errors[0]
    if any(codes):
        raise RuntimeError(f"processes of the run ended with exit codes {codes}")


def _error_in(path: str) -> BaseException | None:
    """What a process raised: our errors as they were, any other with its traceback."""
    try:
        with open(path, "rb") as file:
            text = pickle.load(file)
    except (OSError, EOFError):
        return None
    found = re.findall(r"^sge_det\.(?:\w+\.)*(UserError|Resumable|Unreadable): (.*)", text, re.S | re.M)
    if not found:
        return RuntimeError(text)
    return (Resumable if found[-1][0] == "Resumable" else UserError)(found[-1][1].strip())


def _work(local_rank: int, function: Callable, *arguments) -> None:
    """In a process of its own: Detectron2's set-up of the group, and what the parent asks for."""
    with signals_handled(twice=False):
        try:
            _distributed_worker(local_rank, function, *arguments)
        except Stopped as stop:
            os._exit(stop.exit_code)  # those that still talk to this one would keep it


def _run(function: Callable, stop, parent: int, args: argparse.Namespace) -> None:
    threading.Thread(target=_listen, args=(stop, parent), daemon=True).start()
    function(args)


def _listen(stop, parent: int) -> None:
    """Hands on what the parent was asked, and ends this process when the parent is gone."""
    while not stop.wait(1.0):
        if os.getppid() != parent:
            os._exit(1)
    os.kill(os.getpid(), signal.SIGTERM)
    while os.getppid() == parent:
        time.sleep(1.0)
    with contextlib.suppress(OSError):
        os._exit(1)
