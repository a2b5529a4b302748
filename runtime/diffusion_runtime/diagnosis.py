"""What `doctor` finds out: versions, backends, compute units, what is missing and how to get it."""

from __future__ import annotations

import enum
import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from diffusion_runtime.backends.coreml import default_cache
from diffusion_runtime.coremltools_import import import_coremltools
from diffusion_runtime.errors import InstallationError

LIBRARIES = (
    "torch",
    "coremltools",
    "diffusers",
    "transformers",
    "huggingface_hub",
    "safetensors",
    "numpy",
    "scipy",
)


class State(enum.Enum):
    OK = "ok"
    NOTE = "note"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Finding:
    name: str
    state: State
    text: str
    remedy: str = ""


def examine() -> tuple[Finding, ...]:
    """Everything worth knowing, in the order in which it is shown. Raises nothing."""
    return (
        Finding("coreml-sd", State.OK, installed("coreml-sd") or "not installed as a package"),
        _python(),
        Finding("machine", State.OK, f"{platform.system()} {platform.release()} on {platform.machine()}"),
        *(_library(name) for name in LIBRARIES),
        _writing(),
        _torch_backend(),
        _coreml_backend(),
        _compute_units(),
        _compiler(),
        *_cache(),
        _memory(),
        _disk(),
    )


def installed(name: str) -> str | None:
    """The version of a distribution, None where it is missing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _python() -> Finding:
    version = platform.python_version()
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Finding("python", State.OK, version)
    return Finding("python", State.BROKEN, version, "install Python 3.11, 3.12 or 3.13")


def _library(name: str) -> Finding:
    version = installed(name)
    if version is None:
        return Finding(name, State.BROKEN, "missing", "pip install coreml-sd")
    if name == "numpy" and tuple(map(int, version.split(".")[:2])) >= (2, 4):
        return Finding(
            name, State.BROKEN, f"{version}, which coremltools 9.0 cannot trace with", "pip install 'numpy<2.4'"
        )
    return Finding(name, State.OK, version)


def _writing() -> Finding:
    """coremltools imports anywhere, but writes weights only where its native library is there."""

    try:
        import_coremltools()
    except InstallationError as error:
        return Finding("converting", State.BROKEN, str(error), "pip install --force-reinstall coremltools==9.0")
    return Finding("converting", State.OK, "coremltools can write models")


def _torch_backend() -> Finding:
    try:
        import torch
    except Exception as error:
        return Finding(
            "torch backend", State.BROKEN, f"torch cannot be imported: {error}", "pip install torch==2.13.*"
        )
    devices = ["cpu"]
    devices += ["cuda"] if torch.cuda.is_available() else []
    devices += ["mps"] if torch.backends.mps.is_available() else []
    return Finding("torch backend", State.OK, f"devices {', '.join(devices)}; {torch.get_num_threads()} threads")


def _coreml_backend() -> Finding:
    if platform.system() != "Darwin":
        return Finding("coreml backend", State.NOTE, "needs macOS; here models run on the torch backend")
    if importlib.util.find_spec("coremltools.libcoremlpython") is None:
        remedy = "pip install --force-reinstall coremltools==9.0 with a Python for this Mac's processor"
        return Finding("coreml backend", State.BROKEN, "coremltools lacks its Core ML bindings", remedy)
    release = platform.mac_ver()[0]
    if int(release.split(".")[0]) < 13:
        return Finding("coreml backend", State.BROKEN, f"macOS {release}", "update to macOS 13 or later")
    return Finding("coreml backend", State.OK, f"macOS {release}")


def _compute_units() -> Finding:
    if platform.system() != "Darwin":
        return Finding("compute units", State.NOTE, "cpu-only (the torch backend takes no notice of others)")

    try:
        devices = import_coremltools("models.compute_device").MLComputeDevice.get_all_compute_devices()
    except Exception as error:
        return Finding("compute units", State.NOTE, f"cannot be listed: {error}")
    names = sorted({type(device).__name__.removeprefix("ML").removesuffix("ComputeDevice") for device in devices})
    units = ["all", "cpu-only", *(["cpu-and-gpu"] if "GPU" in names else [])]
    units += ["cpu-and-ne"] if "NeuralEngine" in names else []
    return Finding("compute units", State.OK, ", ".join(units))


def _compiler() -> Finding:
    if platform.system() == "Darwin" and shutil.which("xcrun"):
        return Finding("compiler", State.OK, "built in; Apple's is there for --compiler xcrun")
    return Finding("compiler", State.OK, "built in (Xcode is not needed)")


def _cache() -> tuple[Finding, ...]:
    """Where Core ML's compiled models are kept, and how much they take."""

    folder = default_cache()
    if platform.system() != "Darwin" or not folder.is_dir():
        return ()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**30
    return (Finding("model cache", State.OK, f"{size:.1f} GiB in {folder} (may be deleted)"),)


def _memory() -> Finding:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError):
        return Finding("memory", State.NOTE, "unknown")
    if total < 8:
        return Finding("memory", State.NOTE, f"{total:.0f} GiB", "use --reduce-memory and 6-bit models (--nbits 6)")
    return Finding("memory", State.OK, f"{total:.0f} GiB")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    if free < 10:
        return Finding(
            "disk", State.NOTE, f"{free:.0f} GiB free here", "converting Stable Diffusion 1.5 takes about 10 GiB"
        )
    return Finding("disk", State.OK, f"{free:.0f} GiB free here")
