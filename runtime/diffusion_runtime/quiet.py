"""Importing coremltools without its harmless noise.

On Linux coremltools 9.0 logs eight "Failed to load …" lines (there is no Core ML to bind to) and a warning that
the torch version was not tested. A user can do nothing about either. What a user can do something about, a
missing native library that writes weights, is reported as an InstallationError.
"""

from __future__ import annotations

import importlib
import logging
import platform
import sys
from types import ModuleType

from diffusion_runtime.errors import InstallationError


def import_coremltools(submodule: str = "") -> ModuleType:
    """coremltools, or ``coremltools.<submodule>``; the first import takes about three seconds."""
    name = f"coremltools.{submodule}" if submodule else "coremltools"
    logger = logging.getLogger("coremltools")
    before = logger.level
    if "coremltools" not in sys.modules and sys.platform != "darwin":
        logger.setLevel(logging.CRITICAL)
    else:
        logger.setLevel(max(before, logging.ERROR))
    try:
        module = importlib.import_module(name)
        importlib.import_module("coremltools.libmilstoragepython")
    except ImportError as error:
        raise InstallationError(
            f"coremltools cannot be used with Python {platform.python_version()} on {platform.system()} "
            f"{platform.machine()}: {error}; use Python 3.11 to 3.13 and `pip install coremltools==9.0`"
        ) from error
    finally:
        logger.setLevel(before)
    return module
