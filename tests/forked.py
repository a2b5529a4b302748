"""A stand-in for `python -c`: the same process, but forked from one that has imported the libraries.

Importing takes longer than most of what tests ask of a command. `server` starts the process that forks; the words
that it gives stand for ``sys.executable``. They run this file, which hands its arguments, environment, folder and
streams over, passes signals on, and ends as the forked process ends. Where it is killed, that one is killed too, if
only a moment later.

    python -IS forked.py SOCKET -c CODE ARGUMENT …
"""

import json
import os
import signal
import socket
import sys

OWN = ("coreml_sd", "diffusion_convert", "diffusion_runtime")


def client(address: str, arguments: list[str]) -> int:
    """Run it, and say how it ended: its exit code, or less than 0: the signal that ended it."""
    asked = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}  # noqa: PTH109
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, [json.dumps(asked).encode() + b"\n"], [0, 1, 2])
        answers = server.makefile()
        process = int(answers.readline())
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: os.kill(process, number))
        return int(answers.readline())


def serve(address: str) -> None:
    """Fork until the one that has started this is gone."""
    import selectors

    from fuzz.worker import warm_up

    warm_up()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    parent, children = os.getppid(), dict[int, socket.socket]()
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while os.getppid() == parent:
            for key, _ in selector.select(0.01 if children else 1):
                if key.fileobj is listener:
                    asker, _ = listener.accept()
                    process = _forked(asker, listener)
                    children[process] = asker
                    selector.register(asker, selectors.EVENT_READ, process)
                else:  # nothing is said after the question: the asker is gone
                    selector.unregister(key.fileobj)
                    os.kill(key.data, signal.SIGKILL)
            for process in list(children):
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    asker = children.pop(process)
                    if asker.fileno() in selector.get_map():
                        selector.unregister(asker)
                        asker.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
                    asker.close()


def _forked(asker: socket.socket, listener: socket.socket) -> int:
    said, streams, *_ = socket.recv_fds(asker, 1 << 20, 3)
    while not said.endswith(b"\n"):
        said += asker.recv(1 << 20)
    process = os.fork()
    if not process:
        asker.close()
        listener.close()
        _run(json.loads(said), streams)
    for stream in streams:
        os.close(stream)
    asker.sendall(f"{process}\n".encode())
    return process


def _run(asked: dict, streams: list[int]) -> None:  # type: ignore[type-arg]
    """What `python -c` does with it, to the end of the process."""
    import atexit
    import contextlib
    import pathlib
    import tempfile
    import threading
    import traceback

    code = 1
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        # Those of this process know whether what they were opened on can be sought in.
        sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
        # Or they would be closed where a command puts something else in their place.
        sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]
        os.chdir(asked["folder"])
        os.environ.clear()
        os.environ.update(asked["environment"])
        tempfile.tempdir = None  # TMPDIR may be another
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for path in reversed(os.environ.get("PYTHONPATH", "").split(os.pathsep)):
            sys.path.insert(0, path)
        for name in [name for name in sys.modules if name.partition(".")[0] in OWN]:
            del sys.modules[name]  # they may be of another folder
        _, program, *rest = asked["arguments"]
        sys.argv = ["-c", *rest]
        with contextlib.ExitStack() as stack:
            if kept := os.environ.get("COREML_SD_REMEMBERED"):
                from remembered import conversions

                stack.enter_context(conversions(pathlib.Path(kept)))
            exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102 (the tests' own)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    if sys.argv[2:]:
        code = client(sys.argv[1], sys.argv[2:])
        if code < 0:
            if -code != signal.SIGKILL:
                signal.signal(-code, signal.SIG_DFL)
            os.kill(os.getpid(), -code)
        os._exit(code)
    serve(sys.argv[1])


if __name__ == "__main__":
    main()
