"""A stand-in for `python -c`: the same process, but forked from one that has imported the libraries.

Importing takes longer than most of what tests ask of a command. `server` starts the process that forks; the words
that it gives stand for ``sys.executable``. They run this file, which hands its arguments, environment, folder and
streams over, passes signals on, and ends as the forked process ends. Where it is killed, that one is killed too, if
only a moment later. What the forked process starts with multiprocessing is forked as well.

    python -IS forked.py SOCKET -c CODE ARGUMENT …
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

OWN = ("coreml_sd", "diffusion_convert", "diffusion_runtime")


def client(address: str, arguments: list[str]) -> int:
    """Run it, and say how it ended: its exit code, or less than 0: the signal that ended it."""
    files = _open_files()
    asked = {
        "arguments": arguments,
        "environment": dict(os.environ),
        "folder": os.getcwd(),  # noqa: PTH109
        "files": files,
        "client": os.getpid(),
        "parent": os.getppid(),
        "leads": os.getpgrp() == os.getpid(),
    }
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, [json.dumps(asked).encode() + b"\n"], files)
        answers = server.makefile()
        process = int(answers.readline())
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: os.kill(process, number))
        return int(answers.readline() or 1)  # nothing is said where the process that forks has ended


def _open_files() -> list[int]:
    """The numbers of all: multiprocessing hands some over beside the streams."""
    found = []
    for name in os.listdir("/dev/fd"):  # noqa: PTH208 (pathlib takes its time)
        try:
            os.fstat(int(name))
        except OSError:  # of the list itself
            continue
        found.append(int(name))
    return sorted(found)


def serve(address: str) -> None:
    """Fork until the one that has started this is gone."""
    import gc
    import selectors
    import weakref

    from fuzz.worker import warm_up

    warm_up()
    _import_ours()
    for one in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        if (done := one.peek()) and done[1].__module__ == "torch.library":
            one.detach()  # each child would take torch's operators apart at its end
    gc.collect()
    gc.freeze()  # or each child would copy what its first collection looks at
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.new")
    listener.listen()
    os.rename(f"{address}.new", address)  # noqa: PTH104 (who sees it can connect)
    parent, children = os.getppid(), dict[int, tuple[socket.socket, str]]()
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while os.getppid() == parent:
            for key, _ in selector.select(0.01 if children else 1):
                if key.fileobj is listener:
                    asker, _ = listener.accept()
                    asked, files = _question(asker)
                    if asked:
                        process = _forked(asked, files, asker, listener, address)
                        children[process] = asker, f"{address}-{asked['client']}"
                        selector.register(asker, selectors.EVENT_READ, process)
                    for file in files:
                        os.close(file)
                else:  # nothing is said after the question: the asker is gone
                    selector.unregister(key.fileobj)
                    os.kill(key.data, signal.SIGKILL)
            for process in list(children):
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    asker, link = children.pop(process)
                    os.unlink(link)  # noqa: PTH108
                    if asker.fileno() in selector.get_map():
                        selector.unregister(asker)
                        _tell(asker, os.waitstatus_to_exitcode(status))
                    asker.close()


def _import_ours() -> None:
    """All modules of the packages, but those whose libraries are not here."""
    import importlib
    import pkgutil

    for package in map(importlib.import_module, OWN):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                with contextlib.suppress(ImportError):
                    importlib.import_module(module.name)


def _question(asker: socket.socket) -> tuple[dict, list[int]]:  # type: ignore[type-arg]
    """What is asked, and open files. Empty where the one that asks was killed before it had said all."""
    said, files, *_ = socket.recv_fds(asker, 1 << 20, 64)
    while not said.endswith(b"\n") and (more := asker.recv(1 << 20)):
        said += more
    return json.loads(said) if said.endswith(b"\n") else {}, files


def _forked(
    asked: dict,  # type: ignore[type-arg]
    files: list[int],
    asker: socket.socket,
    listener: socket.socket,
    address: str,
) -> int:
    process = os.fork()
    if not process:
        asker.close()
        listener.close()
        _run(asked, files, address)
    os.symlink(str(process), f"{address}-{asked['client']}")  # noqa: PTH211 (for `process_of`)
    _tell(asker, process)
    return process


def _tell(asker: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # it was killed
        asker.sendall(f"{number}\n".encode())


def process_of(words: Path, client: subprocess.Popen) -> int:  # type: ignore[type-arg]
    """The number of the process forked for one that ran ``words``: it has the memory, the children and, where
    ``client`` leads a group, a group of its own. Raises FileNotFoundError where it has ended."""
    link = words.with_name(f"socket-{client.pid}")
    while client.poll() is None and not link.is_symlink():
        time.sleep(0.01)
    return int(link.readlink().name)


def _run(asked: dict, files: list[int], address: str) -> None:  # type: ignore[type-arg]
    """What `python -c` does with it, to the end of the process."""
    import atexit
    import multiprocessing
    import pathlib
    import tempfile
    import threading
    import traceback
    import types

    code = 1
    try:
        _place(files, asked["files"])
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
        if asked["leads"]:
            os.setpgid(0, 0)
        os.getppid = lambda: _parent(asked["parent"])
        multiprocessing.set_executable(str(pathlib.Path(address).with_name("python")))
        for path in reversed(os.environ.get("PYTHONPATH", "").split(os.pathsep)):
            sys.path.insert(0, path)
        _forget_others()
        sys.modules["__main__"] = types.ModuleType("__main__")
        program, *rest = asked["arguments"][asked["arguments"].index("-c") + 1 :]
        sys.argv = ["-c", *rest]
        with contextlib.ExitStack() as stack:
            if kept := os.environ.get("COREML_SD_REMEMBERED"):
                from remembered import conversions

                stack.enter_context(conversions(pathlib.Path(kept)))
            exec(compile(program, "<string>", "exec"), vars(sys.modules["__main__"]))  # noqa: S102 (the tests' own)
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


def _forget_others() -> None:
    """Our modules, where they would now be found in another folder."""
    from importlib.machinery import PathFinder

    found = {name: PathFinder.find_spec(name) for name in OWN}
    if any(spec is None or spec.origin != sys.modules[name].__file__ for name, spec in found.items()):
        for name in [name for name in sys.modules if name.partition(".")[0] in OWN]:
            del sys.modules[name]


def _place(files: list[int], numbers: list[int]) -> None:
    """Give open files these numbers, which may be others' among them."""
    import fcntl

    aside = [fcntl.fcntl(file, fcntl.F_DUPFD, max(numbers) + 1) for file in files]
    for file in files:
        os.close(file)
    for file, number in zip(aside, numbers, strict=True):
        os.dup2(file, number)
        os.close(file)


def _parent(number: int) -> int:
    """What `os.getppid` says in the process that stands here for the forked one."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return 1
    return number


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
