"""Imports modules and waits: whoever asks gets a fork of this process, which goes on as `python ARGUMENTS` would.

    python server.py FOLDER MODULE …        listens at FOLDER/socket until its standard input ends

A request (`client.py`) is its length in 8 bytes with the asker's open files, and a JSON object. The answer is the
process's number and its status, a line each. Between the server and a process that it made stands another one, which
waits for the one and watches the other's connection: an asker who is killed takes its process along.
"""

from __future__ import annotations

import atexit
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import types
import warnings

ABOVE = 600  # numbers of files that no process here has


def serve(folder: str, modules: list[str]) -> dict | None:
    """Returns what was asked for, in a process made for it; None in the server once nobody needs it."""
    for name in modules:
        importlib.import_module(name)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.path.join(folder, "socket"))
    listener.listen(64)
    os.write(1, b"ready\n")
    gc.collect()
    gc.freeze()  # a collection would touch, and so copy, all the pages that a fork shares
    between: list[int] = []
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        between = [process for process in between if os.waitpid(process, os.WNOHANG)[0] == 0]
        if 0 in ready and not os.read(0, 1):
            return None
        if listener in ready:
            connection, _ = listener.accept()
            process = os.fork()
            if process == 0:
                return attend(connection)
            between.append(process)
            connection.close()


def attend(connection: socket.socket) -> dict:
    length, files, _, _ = socket.recv_fds(connection, 8, 253)
    payload = b""
    while len(payload) < int.from_bytes(length, "little"):
        payload += connection.recv(1 << 20)
    request = json.loads(payload)
    process = os.fork()
    if process == 0:
        request["files"] = list(zip(files, request["files"], strict=True))
        return request
    for number in files:
        os.close(number)
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    connection.sendall(b"%d\n" % process)
    ended = os.pidfd_open(process)
    ready, _, _ = select.select([ended, connection], [], [])
    if ended not in ready:
        os.kill(process, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    try:
        connection.sendall(b"%d\n" % status)
    except OSError:
        pass  # nobody is there any more
    os._exit(0)


def become(request: dict) -> None:
    """Gives this process the files, the environment and the folder of the one that asked for it."""
    moved = [(fcntl.fcntl(ours, fcntl.F_DUPFD, ABOVE), theirs) for ours, theirs in request["files"]]
    os.closerange(0, ABOVE)
    for ours, theirs in moved:
        os.dup2(ours, theirs)
        os.close(ours)
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])


def run(arguments: list[str], rest: list[str]) -> None:
    """What `python ARGUMENTS` does, with `rest` at the end of its path; never returns."""
    while arguments[0] in ("-u", "-B", "-W"):
        if arguments[0] == "-W":
            warnings._processoptions([arguments.pop(1)])  # type: ignore[attr-defined]
        arguments = arguments[1:]
    kind, status = arguments[0], 0
    more = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    first = {"-c": "", "-m": os.getcwd()}.get(kind, os.path.dirname(os.path.abspath(kind)))
    sys.path[:] = [first, *more, *rest]
    sys.argv = ["-c", *arguments[2:]] if kind == "-c" else arguments[kind == "-m" :]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__spec__ = None
    try:
        if kind == "-m":
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            exec(compile(arguments[1], "<string>", "exec"), vars(main))
        elif kind.startswith("-"):
            raise ValueError(f"the warm Python does not know {kind}: teach it in {__file__}, or take sys.executable")
        else:
            main.__file__ = kind
            with open(kind, "rb") as file:
                code = compile(file.read(), kind, "exec")
            exec(code, vars(main))
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        seen = error.with_traceback(error.__traceback__.tb_next)  # without this frame
        sys.excepthook(type(seen), seen, seen.__traceback__)
        status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    # As the interpreter ends, but that it does not take apart what all forks share.
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        status = 120
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


OWN = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
REST = [path for path in sys.path[1:] if os.path.abspath(path) not in OWN]
if __name__ == "__main__":
    asked = serve(sys.argv[1], sys.argv[2:])
    if asked is None:
        os._exit(0)
    become(asked)
    run(asked["arguments"], REST)
