"""A program as large as the largest UNet's (9,160 operations, measured) is compiled and read back in seconds."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from diffusion_convert.compile import compile_package
from diffusion_runtime.mil.package import open_package, write_package
from diffusion_runtime.mil.program import Operation, Variable
from small_bundle import ints, small_model

OPERATIONS = 10_000
MAX_SECONDS = 15.0


def test_ten_thousand_operations_compile_and_read_back_in_time(tmp_path: Path) -> None:
    model, _ = small_model("unet", einsum=False)
    function = model.program.functions["main"]
    shape = function.inputs[0].type
    previous = function.inputs[0].name
    operations = []
    for number in range(OPERATIONS // 2):
        axes = ints(0, 1, 2, 3)
        operations.append(Operation("const", {}, (Variable(f"axes_{number}", axes.type),), {"val": axes}))
        inputs = {"perm": (f"axes_{number}",), "x": (previous,)}
        previous = f"turned_{number}"
        operations.append(Operation("transpose", inputs, (Variable(previous, shape),)))
    block = replace(function.block, operations=tuple(operations), outputs=(previous,))
    program = replace(model.program, functions={"main": replace(function, blocks={"CoreML6": block})})
    write_package(replace(model, program=program), tmp_path / "large.mlpackage")
    start = time.process_time()
    compiled = compile_package(tmp_path / "large.mlpackage", tmp_path).path
    read = open_package(compiled).model
    assert time.process_time() - start < MAX_SECONDS
    assert read.program.functions["main"].block == block
