"""Asks a server for a process, hands it what this one was given, and ends as it does: see `server.py`."""

import json
import os
import signal
import socket
import sys

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main() -> None:
    # Whoever starts this may signal it at any time, as soon as it is there.
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    files = [int(name) for name in os.listdir("/proc/self/fd")]
    files = [number for number in files if os.path.exists(f"/proc/self/fd/{number}")]  # not that of the listing
    ignored = [number for number in FORWARDED if signal.getsignal(number) == signal.SIG_IGN]
    request = {
        "arguments": sys.argv[2:],
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "files": files,
        "ignored": ignored,
    }
    payload = json.dumps(request).encode()
    server = socket.socket(socket.AF_UNIX)
    server.connect(os.path.join(sys.argv[1], "socket"))
    socket.send_fds(server, [len(payload).to_bytes(8, "little")], files)
    server.sendall(payload)
    answers = server.makefile()
    process = int(answers.readline())
    for number in FORWARDED:
        if number not in ignored:
            signal.signal(number, lambda number, frame: os.kill(process, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    for number in files:  # a pipe is to be closed when that process closes it
        os.close(number)
    status = int(answers.readline() or 1)
    if status < 0:  # by a signal
        signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    os._exit(status)


main()
