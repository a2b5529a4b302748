"""What is shown of every package that tests make: compiled and read back, it is the same program."""

from __future__ import annotations

from pathlib import Path

from diffusion_convert.compile import compile_package
from diffusion_runtime.mil.package import open_package
from diffusion_runtime.mil.text_parse import parse_text
from diffusion_runtime.mil.text_print import Dialect, program_text


def check_read_back(package: Path, folder: Path, name: str | None = None) -> Path:
    """Compile ``package`` to ``folder``, compare what is read back with it, and return the compiled model.

    The program is also printed and parsed in the dialect that its specification does not use."""
    compiled = compile_package(package, folder, name, share_weights=True).path
    first, second = open_package(package).model, open_package(compiled).model
    assert second.program.functions["main"].block == first.program.functions["main"].block
    assert second.interfaces == first.interfaces
    assert second.specification_version == first.specification_version
    assert dict(second.metadata.user_defined) == dict(first.metadata.user_defined)
    other = Dialect.V1_0 if first.specification_version >= 9 else Dialect.V1_3
    assert parse_text(program_text(first.program, other)) == first.program
    return compiled
