"""What the command imports for a picture, and how rarely Python looks for garbage meanwhile."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

NOT_NEEDED = {
    *("accelerate", "coremltools", "peft", "scipy.integrate._quadrature", "scipy.stats._stats_py", "sympy"),
    *("torch._dynamo", "torch.fx.experimental.symbolic_shapes", "transformers"),
}


def test_a_picture_needs_neither_transformers_nor_coremltools_nor_symbols(toy_folder: Path, tmp_path: Path) -> None:
    code = f"""
import gc, sys
sys.argv = ["coreml-sd", "generate", {str(toy_folder)!r}, *"--prompt cat -o {tmp_path}/cat.png --steps 1".split()]
import coreml_sd
try:
    coreml_sd.main()
finally:
    print(gc.get_threshold()[0] > 10_000, *sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (tmp_path / "cat.png").is_file(), done.stderr
    few_collections, *modules = done.stdout.splitlines()[-1].split()
    assert few_collections == "True" and {"torch", "diffusers", "tokenizers"} <= set(modules)
    assert not NOT_NEEDED & set(modules)
