"""What a picture does not need is not imported for it, and is there when something asks for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr


def test_a_scheduler_and_a_model_load_neither_scipys_statistics_nor_torchs_compiler(network: Path) -> None:
    run(f"""
import inspect
import sys
from pathlib import Path
from diffusion_runtime.backends.torch_mil import TorchBackend
from diffusion_runtime.schedulers import SCHEDULERS, build
for name in SCHEDULERS:
    build({{}}, name).set_timesteps(4)
TorchBackend().load(Path({str(network)!r}))
inspect.getmodule(inspect.currentframe())
loaded = {{"torch._dynamo", "torch._dynamo.utils", "scipy.stats._stats_py", "scipy.integrate._quadrature"}}
assert not loaded & set(sys.modules), loaded & set(sys.modules)
assert "_dynamo" not in vars(sys.modules["torch"])
""")


def test_they_are_there_for_whoever_needs_them() -> None:
    """scipy.stats for beta sigmas, and its parts by name; the compiler, and what it was told to leave alone."""
    run("""
import sys
import torch
from diffusion_runtime.later import import_diffusers, no_compiler
from diffusion_runtime.schedulers import build
made = build({"use_beta_sigmas": True, "_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear"})
made.set_timesteps(4)
assert "scipy.stats._stats_py" in sys.modules
from scipy.stats import norm
from scipy.integrate._quadrature import trapezoid
import scipy
assert scipy.stats.norm is norm and abs(norm.cdf(0) - 0.5) < 1e-12 and scipy.integrate.quad(abs, 0, 1)[0] == 0.5
with no_compiler():
    torch.empty(3, dtype=torch.int64, device="meta") < 0
assert not {"torch._dynamo"} & set(sys.modules)
with no_compiler():
    import torch._dynamo
    assert torch._dynamo.config.verbose is False
from torch._dynamo import allow_in_graph
import torch._dynamo.utils
assert allow_in_graph.__module__ == "torch._dynamo.decorators"
from torch._refs import lt
assert torch.compile(lambda x: x < 0, backend="eager")(torch.ones(2)).sum() == 0
""")
