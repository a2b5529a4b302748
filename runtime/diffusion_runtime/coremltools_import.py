"""Importing coremltools without its harmless noise.

On Linux coremltools 9.0 logs eight "Failed to load …" lines (there is no Core ML to bind to) and a warning that
the torch version was not tested. A user can do nothing about either. What a user can do something about, a
missing native library that writes weights, is reported as an InstallationError.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import platform
import sys
from pathlib import Path
from types import ModuleType

from diffusion_runtime.errors import InstallationError

_MESSAGES = "coremltools_messages"
_STORAGE = "coremltools.libmilstoragepython"


def import_coremltools(submodule: str = "") -> ModuleType:
    """coremltools, or ``coremltools.<submodule>``; the first import takes about three seconds."""
    name = f"coremltools.{submodule}" if submodule else "coremltools"
    if name in sys.modules and _STORAGE in sys.modules:
        return sys.modules[name]
    logger = logging.getLogger("coremltools")
    before = logger.level
    if "coremltools" not in sys.modules and sys.platform != "darwin":
        logger.setLevel(logging.CRITICAL)
    else:
        logger.setLevel(max(before, logging.ERROR))
    try:
        module = importlib.import_module(name)
        importlib.import_module(_STORAGE)
    except ImportError as error:
        raise InstallationError(
            f"coremltools cannot be used with Python {platform.python_version()} on {platform.system()} "
            f"{platform.machine()}: {error}; use Python 3.11 to 3.13 and `pip install coremltools==9.0`"
        ) from error
    finally:
        logger.setLevel(before)
    return module


def import_messages(name: str) -> ModuleType:
    """One module of coremltools' protobuf messages, without the rest of coremltools.

    ``coremltools/__init__`` imports converters of every framework, for 1.6 s of processor; the messages alone take
    0.04 s. Protobuf knows each message once: these are the same classes that coremltools has, whoever comes first.
    """
    if "coremltools" in sys.modules:
        return importlib.import_module(f"coremltools.proto.{name}")
    if _MESSAGES not in sys.modules:
        found = importlib.util.find_spec("coremltools")
        if found is None or not found.submodule_search_locations:
            raise InstallationError("coremltools is missing: `pip install coremltools==9.0`")
        folder = Path(found.submodule_search_locations[0]) / "proto"
        spec = importlib.util.spec_from_file_location(
            _MESSAGES, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if spec is None or spec.loader is None or not folder.is_dir():
            raise InstallationError(f"{folder} is missing: reinstall with `pip install coremltools==9.0`")
        sys.modules[_MESSAGES] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[_MESSAGES])
    return importlib.import_module(f"{_MESSAGES}.{name}")
