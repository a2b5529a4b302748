"""Whether the tests notice when a figure or a comparison that decides is moved.

    python tools/mutation_check.py [PART OF A FILE'S NAME ...]

Each fault of the list is planted in a copy of the source, the tests that should notice run with it, and the table
says which faults were found ("killed"). Ends with status 1 where one was not, or where its text is no longer in the
source.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
THRESHOLDS = "tests/convert/test_thresholds.py::test_"


@dataclass(frozen=True, slots=True)
class Fault:
    """``old`` stands in ``file`` exactly once and becomes ``new``; ``tests`` are pytest's arguments."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]


FOLDER = "convert/diffusion_convert/verification/folder.py"
COMPARE = "convert/diffusion_convert/verification/compare.py"
BOUNDS = "convert/diffusion_convert/verification/bounds.py"
PART = "convert/diffusion_convert/conversion/part.py"
WORKSPACE = "convert/diffusion_convert/conversion/workspace.py"
CHUNK = "convert/diffusion_convert/chunk.py"
INTEGRITY = "runtime/diffusion_runtime/bundle/integrity.py"
ZIPS = "runtime/diffusion_runtime/zips.py"
COMPONENT_FILES = "convert/diffusion_convert/components"
COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder", "safety_checker", "depth_estimator")
VERIFY = ("tests/convert/test_verify.py",)
RECORD = (f"{THRESHOLDS}verify_lets_a_figure_be_a_decibel_below_its_record",)
CLAIM = (f"{THRESHOLDS}a_record_that_claims_little_does_not_lower_the_bound",)
NOISE = (f"{THRESHOLDS}the_16_bit_forms_own_noise_is_allowed_for",)
PUBLISHED = (f"{THRESHOLDS}no_component_is_published_below_60_db",)
WIDTHS = ("tests/convert/palettize/test_damage.py::test_bounds_lie_between_widths",)
ZIP = (f"{THRESHOLDS}zips_of_too_much_are_refused",)
BEYOND = (f"{THRESHOLDS}values_beyond_the_limit_are_found",)
ROOM = (f"{THRESHOLDS}a_conversion_leaves_room_on_the_disk",)
HALVES = (f"{THRESHOLDS}halves_that_differ_a_little_from_the_whole_are_refused",)
PRECISION = ("tests/convert/test_precision.py",)


def bits(width: str) -> tuple[str, ...]:
    """The test of the bound at that width."""
    if width == "3":
        return (f"{THRESHOLDS}three_bits_lie_between_two_and_four",)
    return (f"{THRESHOLDS}bounds_of_bits_are_near_what_bits_keep[{width}]",)


FAULTS = (
    Fault(FOLDER, "_SLACK_DB = 1.0", "_SLACK_DB = 30.0", RECORD),
    Fault(FOLDER, "_SLACK_DB = 1.0", "_SLACK_DB = 0.0", RECORD),
    Fault(FOLDER, "return max(bound, -10 *", "return min(bound, -10 *", CLAIM),
    Fault(FOLDER, "bound_db(max(palettized.nbits", "bound_db(min(palettized.nbits", CLAIM),
    Fault(FOLDER, "+ 10 ** (-owner.min_psnr_db / 10)", "+ 0 ** (owner.min_psnr_db / 10)", NOISE),
    Fault(FOLDER, "all(value >= self.bound_db", "any(value >= self.bound_db", RECORD),
    *(
        Fault(f"{COMPONENT_FILES}/{name}.py", "min_psnr_db=60.0", f"min_psnr_db={bound}", PUBLISHED)
        for name in COMPONENTS
        for bound in ("30.0", "70.0")
    ),
    *(
        Fault(BOUNDS, old, new, bits(old[0]))
        for old, new in (
            ("1: 3.0", "1: 0.0"), ("1: 3.0", "1: 12.0"), ("2: 6.0", "2: 1.0"), ("2: 6.0", "2: 16.0"),
            ("3: 10.0", "3: 1.0"), ("3: 10.0", "3: 20.0"), ("4: 14.0", "4: 4.0"), ("4: 14.0", "4: 28.0"),
            ("6: 24.0", "6: 14.0"), ("6: 24.0", "6: 38.0"), ("8: 34.0", "8: 24.0"), ("8: 34.0", "8: 52.0"),
        )
    ),
    Fault(COMPARE, "not value >= component.min_psnr_db", "value < component.min_psnr_db", PUBLISHED),
    Fault(COMPARE, "NEAR_LIMIT = FLOAT16_MAX / 2", "NEAR_LIMIT = FLOAT16_MAX * 2", PRECISION),
    Fault(COMPARE, "size > limit or math.isnan(size)", "size > 2 * limit", BEYOND),
    Fault(COMPARE, "worst[name] = min(worst", "worst[name] = max(worst", VERIFY),
    Fault(COMPARE, "10 * math.log10(peak**2", "20 * math.log10(peak**2", VERIFY),
    Fault(COMPARE, "math.isfinite(power) or", "math.isfinite(peak) or", VERIFY),
    Fault(PART, "MIN_CHAIN_PSNR_DB = 80.0", "MIN_CHAIN_PSNR_DB = 8.0", HALVES),
    Fault(PART, "MIN_CHAIN_PSNR_DB = 80.0", "MIN_CHAIN_PSNR_DB = 190.0", HALVES),
    Fault(CHUNK, "MAX_IMBALANCE = 0.1", "MAX_IMBALANCE = 0.9", ("tests/convert/test_chunk.py",)),
    Fault("convert/diffusion_convert/palettize/outputs.py", "if not value >= bound", "if value < bound", WIDTHS),
    Fault("convert/diffusion_convert/palettize/select.py", "MIN_ELEMENTS = 2048", "MIN_ELEMENTS = 3072",
          ("tests/convert/palettize/test_package.py",)),
    Fault("convert/diffusion_convert/palettize/select.py", "MIN_ELEMENTS = 2048", "MIN_ELEMENTS = 512",
          ("tests/convert/palettize/test_package.py",)),
    Fault(WORKSPACE, "_RESERVE_BYTES = 64 << 20", "_RESERVE_BYTES = 0", ROOM),
    Fault(INTEGRITY, "if not is_inside(path, folder)", "if not path.parts", ("tests/convert/test_bundle.py",)),
    Fault(ZIPS, "entries: int = 5_000", "entries: int = 5_000_000", ZIP),
    Fault(ZIPS, "size_bytes: int = 64 << 30", "size_bytes: int = 64 << 50", ("tests/runtime/test_zips.py",)),
    Fault(ZIPS, "ratio: int = 250", "ratio: int = 250_000", ("tests/runtime/test_zips.py",)),
    Fault(ZIPS, "depth: int = 16", "depth: int = 1600", ZIP),
)  # fmt: skip


def planted(fault: Fault, folder: Path) -> str:
    """Plant the fault in the copy in ``folder``, run its tests, take it out again; the verdict."""
    path = folder / fault.file
    sound = path.read_text(encoding="utf-8")
    if sound.count(fault.old) != 1:
        return f"STALE ({sound.count(fault.old)} places)"
    path.write_text(sound.replace(fault.old, fault.new), encoding="utf-8")
    try:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(folder / name) for name in ("convert", "runtime")),
        }
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *fault.tests]
        run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    finally:
        path.write_text(sound, encoding="utf-8")
    if run.returncode not in (0, 1):
        return f"BROKEN ({run.stdout.strip().splitlines()[-1]})"
    return "SURVIVED" if run.returncode == 0 else "killed"


def main() -> int:
    chosen = [fault for fault in FAULTS if all(part in fault.file for part in sys.argv[1:])]
    verdicts = []
    with tempfile.TemporaryDirectory(prefix="coreml-sd-mutants-") as temporary:
        folder = Path(temporary)
        for name in ("convert", "runtime", "tests", "tools", "benchmarks"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        for fault in chosen:
            verdicts.append(planted(fault, folder))
            print(f"{verdicts[-1]:<10} {Path(fault.file).name}: {fault.old}  ->  {fault.new}", flush=True)
    killed = verdicts.count("killed")
    print(f"{killed} of {len(verdicts)} faults were found")
    return 0 if killed == len(verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(main())
