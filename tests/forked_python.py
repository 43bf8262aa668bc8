"""Processes that are forked from one that has imported torch and Detectron2, which takes a new interpreter seconds.

:func:`start` stands for ``subprocess.Popen`` of this Python and a script or a module. What comes is a process of its
own: number, session, working folder, environment, streams, signals and exit code are those of a new interpreter. What
is not tried is the import of the libraries, what they read of the environment while they are imported, and another seed
of hashes: each tool has a test that starts a new interpreter, and so has what must come out equal.
"""

import atexit
import contextlib
import fcntl
import gc
import importlib
import io
import json
import multiprocessing.util
import os
import random
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
import warnings
from collections.abc import Callable
from pathlib import Path

# As they are before a test changes them; data sets are none of the user's.
PYTHON, FOLDER = sys.executable, os.getcwd()
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "DETECTRON2_DATASETS"}
# What tools and runs import, at once or when they come to it. It registers nothing that depends on a run.
MODULES = (
    *("sge_det.gain.worker", "sge_det.engine.doctor", "sge_det.engine.pretraining", "sge_det.analysis.visualize"),
    *("matplotlib.figure", "torch.utils.tensorboard", "torch.distributed.run"),
)
_server: "Server | None" = None


class Server:
    """The process that others are forked from; it ends with the one that has started it."""

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory(prefix="forked_python")
        self.path = os.path.join(self.folder.name, "socket")
        self.process = subprocess.Popen(
            [PYTHON, str(Path(__file__).resolve()), self.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=FOLDER,
            env={**ENVIRONMENT, "OMP_NUM_THREADS": "1"},  # threads do not outlast a fork
            start_new_session=True,
        )
        assert self.process.stdout.readline() == b"ready\n"
        atexit.register(self.close)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.folder.cleanup()


class Forked:
    """What is used of ``subprocess.Popen``, of a forked process."""

    def __init__(self, path, command, *, cwd=None, env=None, stdin=None, stdout=None, stderr=None):
        self.args, self.returncode, self.stdin = command, None, None
        given, opened = [], []
        for stream in (stdin, stdout, stderr):
            if stream == subprocess.PIPE:
                read, write = os.pipe()
                self.stdin = io.FileIO(write, "w")
                given.append(read)
                opened.append(read)
            elif stream == subprocess.STDOUT:
                given.append(given[1])
            elif stream in (None, subprocess.DEVNULL):
                given.append(os.open(os.devnull, os.O_RDWR))
                opened.append(given[-1])
            else:
                given.append(stream if isinstance(stream, int) else stream.fileno())
        request = {
            "words": command[1:],
            "cwd": str(cwd or os.getcwd()),
            "env": dict(os.environ if env is None else env),
        }
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(path)
        socket.send_fds(self._connection, [b"r"], given)
        self._connection.sendall(json.dumps(request).encode() + b"\n")
        for descriptor in opened:
            os.close(descriptor)
        self._answers = self._connection.makefile("r")
        self.pid = int(self._answers.readline())

    def poll(self, seconds=0):
        if self.returncode is None and select.select([self._connection], [], [], seconds)[0]:
            self.returncode = int(self._answers.readline())
            self._connection.close()
        return self.returncode

    def wait(self, timeout=None):
        if self.poll(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def send_signal(self, signum):
        if self.poll() is None:
            os.kill(self.pid, signum)


def serve():
    """Has the server started, once, for this process and for those that are forked from it."""
    global _server
    _server = _server or Server()


def start(command, *, start_new_session=True, **how):
    """A process in a session of its own; a new interpreter's where ``command`` is not of this Python's."""
    command = [str(word) for word in command]
    if command[0] != PYTHON or "-c" in command[1:4] or not start_new_session:
        return subprocess.Popen(command, start_new_session=start_new_session, **how)
    serve()
    return Forked(_server.path, command, **how)


def run(command, *, timeout, **how):
    """As ``subprocess.run`` with the output as text."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = start(command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, **how)
        try:
            process.wait(timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        texts = []
        for file in (out, errors):
            file.seek(0)
            texts.append(file.read())
    return subprocess.CompletedProcess(command, process.returncode, *texts)


# In place of the module, where runs of the matrix are started.
SUBPROCESS = types.SimpleNamespace(Popen=start, PIPE=subprocess.PIPE, DEVNULL=subprocess.DEVNULL)


def leave(code: int) -> None:
    """Ends a forked process as an interpreter ends; does not return."""
    with contextlib.suppress(Exception):
        threading._shutdown()
        atexit._run_exitfuncs()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _serve(path: str) -> None:
    global _server
    for module in MODULES:
        importlib.import_module(module)
    import sge_det.gain.processes

    # a matrix that is forked forks its runs
    sge_det.gain.processes.subprocess = SUBPROCESS
    _server = types.SimpleNamespace(path=path)
    sys.modules["forked_python"] = sys.modules["__main__"]
    assert len(os.listdir("/proc/self/task")) == 1
    gc.collect()
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    events = selectors.DefaultSelector()
    events.register(0, selectors.EVENT_READ)
    events.register(listener, selectors.EVENT_READ)
    print("ready", flush=True)
    while True:
        for key, _ in events.select():
            if key.fileobj == 0:
                os._exit(0)
            if key.fileobj is listener:
                _fork(listener.accept()[0], listener, events)
            else:
                events.unregister(key.fileobj)
                os.close(key.fileobj)
                pid, connection = key.data
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with contextlib.suppress(OSError):  # who asked for it may be gone
                    connection.sendall(b"%d\n" % code)
                connection.close()


def _fork(connection: socket.socket, listener: socket.socket, events: selectors.BaseSelector) -> None:
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    with connection.makefile("rb") as file:
        request = json.loads(file.readline())
    pid = os.fork()
    if not pid:
        for key in [*events.get_map().values()]:
            if key.data is not None:
                os.close(key.fileobj)
                key.data[1].close()
        for each in (events, listener):
            each.close()
        _become(request, streams, connection)
    for descriptor in streams:
        os.close(descriptor)
    events.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, connection))


def _become(request: dict, streams: list[int], connection: socket.socket) -> None:
    """What a new interpreter is with the words behind its name; does not return."""
    os.setsid()
    connection.sendall(b"%d\n" % os.getpid())
    connection.close()
    for descriptor, stream in enumerate(streams):
        os.dup2(stream, descriptor)
    for stream in streams:
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    tempfile.tempdir = None
    words = request["words"]
    if "--num-gpus" in words and (count := int(words[words.index("--num-gpus") + 1])) > 1:
        _fork_what_will_be_spawned(count)
    _to_the_end(lambda: _execute(words))


def _to_the_end(function: Callable[[], None]) -> None:
    """What an interpreter does from a program's first line on; does not return."""
    code = 0
    try:
        random.seed()
        sys.modules["numpy"].random.seed()
        function()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        traceback.print_exc()
        code = 1
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    leave(code)


def _fork_what_will_be_spawned(count: int) -> None:
    """Children for ``multiprocessing`` to spawn, forked before there is what a new interpreter would not have."""
    waiting, spawn = [], multiprocessing.util.spawnv_passfds
    for _ in range(count):
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if not pid:
            for each in (ours, *(other for other, _ in waiting)):
                each.close()
            _become_spawned(theirs)
        theirs.close()
        waiting.append((ours, pid))

    def spawned(executable, words, descriptors):
        if "--multiprocessing-fork" not in map(os.fsdecode, words) or not waiting:
            return spawn(executable, words, descriptors)
        ours, pid = waiting.pop(0)
        request = {"code": os.fsdecode(words[-2]), "places": list(descriptors), "env": dict(os.environ)}
        with ours:
            socket.send_fds(ours, [b"r"], descriptors)
            ours.sendall(json.dumps(request).encode() + b"\n")
        return pid

    multiprocessing.util.spawnv_passfds = spawned


def _become_spawned(connection: socket.socket) -> None:
    asked, descriptors, _, _ = socket.recv_fds(connection, 1, 16)
    if not asked:
        os._exit(0)  # nothing was spawned
    with connection.makefile("rb") as file:
        request = json.loads(file.readline())
    connection.close()
    above = [fcntl.fcntl(each, fcntl.F_DUPFD, 100) for each in descriptors]
    for each in descriptors:
        os.close(each)
    for each, place in zip(above, request["places"], strict=True):
        os.dup2(each, place)
        os.close(each)
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = ["-c", "--multiprocessing-fork"]
    _to_the_end(lambda: exec(request["code"], {"__name__": "__main__"}))


def _execute(words: list[str]) -> None:
    while words[0] == "-W":
        warnings.simplefilter(words[1])
        sys.warnoptions.append(words[1])  # which a new interpreter that this one starts is given
        words = words[2:]
    is_module = words[0] == "-m"
    sys.argv = words[is_module:]
    sys.path[0] = os.getcwd() if is_module else str(Path(words[0]).resolve().parent)
    if is_module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    _serve(sys.argv[1])
