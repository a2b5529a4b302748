"""The command `coreml-sd`, as a script and as `python -m coreml_sd`.

It imports next to nothing, so that Ctrl-C is one word from the first moment on: while the libraries are imported
too, which take seconds and make other errors of an interruption, or nothing at all.
"""

from __future__ import annotations

import gc
import os
import signal
from types import FrameType

_INTERRUPTED = 130  # what shells call a program that was stopped by Ctrl-C
_SAID = b"interrupted\n"
_YOUNG_OBJECTS = 20_000


def main() -> None:
    """Run the command with the arguments of this process, and end it with the command's exit code."""
    # The libraries' million objects live as long as the process: looking for garbage among them after every 700 new
    # ones was a fifth of the time of their import.
    gc.set_threshold(_YOUNG_OBJECTS)
    heeds = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # in the background, it is ignored

    def end(_: int, __: FrameType | None) -> None:
        os.write(2, _SAID)
        os._exit(_INTERRUPTED)

    if heeds:
        signal.signal(signal.SIGINT, end)
    from diffusion_convert.cli.main import main as run

    if heeds:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run()
    finally:
        if heeds:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is left to be cleaned up
