"""What a picture does not need is not imported for it, and is there when something asks for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from diffusion_runtime import later


def run(code: str) -> str:
    """What ``code`` prints, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    return done.stdout


def test_a_scheduler_and_a_model_load_neither_statistics_nor_symbols_nor_torchs_compiler(network: Path) -> None:
    said = run(f"""
import inspect
import sys
from pathlib import Path
from diffusion_runtime.backends.torch_mil import TorchBackend
from diffusion_runtime.schedulers import SCHEDULERS, build
for name in SCHEDULERS:
    build({{}}, name).set_timesteps(4)
TorchBackend().load(Path({str(network)!r}))
inspect.getmodule(inspect.currentframe())
print(*sys.modules, *(f"torch.{{name}}" for name in vars(sys.modules["torch"])))
""")
    unwanted = {
        "scipy.stats._stats_py",
        "scipy.integrate._quadrature",
        "sympy",
        "torch._dynamo",
        *later.WITHOUT_SYMBOLS,
    }
    assert "torch.fx" in said and not unwanted & set(said.split())


def test_diffusers_lists_no_installed_files_until_asked_of_a_package() -> None:
    said = run("""
from importlib import metadata
from unittest import mock
with mock.patch.object(metadata, "packages_distributions", wraps=metadata.packages_distributions) as listed:
    from diffusion_runtime.later import import_diffusers
    import_diffusers()
    assert metadata.packages_distributions is listed and not listed.called
    from diffusers.utils.import_utils import _package_map
    assert "PIL" in _package_map and _package_map["PIL"] == ["pillow"] and len(_package_map) > 20
    print(listed.call_count)
""")
    assert said == "1\n"


def test_they_are_there_for_whoever_needs_them() -> None:
    """scipy.stats for beta sigmas, and its parts by name; the compiler, and what it was told to leave alone."""
    said = run("""
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
assert not {"torch._dynamo", "sympy"} & set(sys.modules)
with no_compiler():
    import sympy
    assert sympy.Symbol("n") + 1 != 1
    import torch._dynamo
    assert torch._dynamo.config.verbose is False
from torch._dynamo import allow_in_graph
import torch._dynamo.utils
assert allow_in_graph.__module__ == "torch._dynamo.decorators"
from torch._refs import lt
assert torch.compile(lambda x: x < 0, backend="eager")(torch.ones(2)).sum() == 0
print("all there")
""")
    assert said == "all there\n"


@pytest.mark.filterwarnings("ignore:guard_size_oblivious")
def test_sizes_that_are_numbers_are_answered_as_torch_answers() -> None:
    from torch.fx.experimental import symbolic_shapes

    arguments: dict[str, tuple[tuple[object, ...], ...]] = {
        "sym_eq": ((3, 3), (3, 4), ((1, 2), [1, 2]), ((1, 2), (1, 3)), ((1,), (1, 2)), ((), ())),
        **dict.fromkeys(("sym_and", "sym_or"), ((True,), (True, False), (False, True, True), (False, False))),
        **dict.fromkeys(("guarding_hint_or_throw", "has_guarding_hint", "is_nested_int"), ((3,), (0,), (True,))),
    }
    for name, ours in later.WITHOUT_SYMBOLS[symbolic_shapes.__name__].items():
        for given in arguments.get(name, ((True,), (False,))):
            assert ours(*given) is getattr(symbolic_shapes, name)(*given), (name, given)
