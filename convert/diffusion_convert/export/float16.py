"""Operations become float16 as they stand, in the place of coremltools 9.0's pass `FP16ComputePrecision`.

The pass makes each operation anew, with casts before and behind it that later passes take away again: a third of
``ct.convert``. Here an operation's own inputs and outputs change, and a cast is made only where float16 meets
float32. What comes out of ``ct.convert`` is the same program, names included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from diffusion_runtime.coremltools_import import import_coremltools

_WIDE, _NARROW = "fp32", "fp16"


def in_place(original: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """What takes the place of ``FP16ComputePrecision.apply``, which is kept for programs with inner blocks."""

    def apply(choice: Any, program: Any) -> None:
        functions = list(program.functions.values())
        if choice.op_selector is None or any(one.blocks for function in functions for one in function.operations):
            original(choice, program)
            return
        for function in functions:
            with function:
                _Narrowing(choice, function).run()

    return apply


@dataclass(slots=True)
class _Narrowing:
    """Of one function. ``choice``: the pass, which says what becomes float16.

    ``narrowed``: values that were float32, and their casts back to that where one was needed. ``casts``: float16 of
    values that stay float32.
    """

    choice: Any
    function: Any
    narrowed: dict[Any, Any] = field(default_factory=dict)
    casts: dict[Any, Any] = field(default_factory=dict)
    builder: Any = field(default_factory=lambda: import_coremltools("converters.mil.mil").Builder)

    def run(self) -> None:
        for operation in list(self.function.operations):
            if operation.op_type != "const":
                chosen = self.choice.is_valid_op(operation) and self.choice.op_selector(operation)
                self._change(operation, chosen)

    def _change(self, operation: Any, chosen: bool) -> None:
        changed, concerned = {}, False
        for parameter, given in operation.inputs.items():
            several = isinstance(given, (list, tuple))
            variables = list(given) if several else [given]
            narrow = chosen and self.choice.should_cast_parameter(operation, parameter)
            concerned |= narrow and any(map(self._was_wide, variables))
            taken = [self._narrow(one, operation) if narrow else self._wide(one) for one in variables]
            if any(new is not old for new, old in zip(taken, variables, strict=True)):
                changed[parameter] = taken if several else taken[0]
        if changed:
            operation.set_inputs(no_check_var_types=True, **changed)
        if concerned:
            self._retype(operation)

    def _retype(self, operation: Any) -> None:
        """The operation and its outputs are called as the pass calls what it makes anew."""
        before = [output.is_tensor_or_scalar_of(_WIDE) for output in operation.outputs]
        operation.type_value_inference(overwrite_output=True)
        operation.name = f"{operation.name}_cast_{_NARROW}"
        names = _names(operation)
        for output, name, was_wide in zip(operation.outputs, names, before, strict=True):
            outer = output.name if output in self.function.outputs else None
            output.name = name
            if was_wide and not output.is_tensor_or_scalar_of(_WIDE):
                self.narrowed[output] = None
            if outer is not None:  # by whatever name, it is the program's own
                self._keep_outside(output, outer)

    def _keep_outside(self, output: Any, name: str) -> None:
        wide = self._wide(output)
        if wide is not output:
            self.function.replace_block_output_var(output, wide)
        wide.name = name

    def _was_wide(self, variable: Any) -> bool:
        return variable in self.narrowed or bool(variable.is_tensor_or_scalar_of(_WIDE))

    def _wide(self, variable: Any) -> Any:
        """The variable as it was, for what stays in float32."""
        if variable not in self.narrowed:
            return variable
        if self.narrowed[variable] is None:
            earlier = map(self.narrowed.get, variable.op.outputs[: variable.op_output_idx])
            last = [variable.op, *(cast.op for cast in earlier if cast is not None)][-1]  # in the outputs' order
            after = self.function.operations._get_node_from_op(last).next
            name, before = f"{variable.name}_to_{_WIDE}", after and after.op
            cast = self.builder.cast(x=variable, dtype=_WIDE, name=name, before_op=before)
            self.function._copy_scope_info(variable, cast)
            self.narrowed[variable] = cast
        return self.narrowed[variable]

    def _narrow(self, variable: Any, user: Any) -> Any:
        if not variable.is_tensor_or_scalar_of(_WIDE):
            return variable
        if variable not in self.casts:
            name = f"{variable.name}_to_{_NARROW}"
            if variable.op is not None and variable.op.op_type == "const":
                made = self.builder.const(val=self._constant(variable), name=name, before_op=user)
            else:
                made = self.builder.cast(x=variable, dtype=_NARROW, name=name, before_op=user)
                self.choice._check_underflow_to_zero(made, variable)
            self.function._copy_scope_info(user.outputs[0], made)
            self.casts[variable] = made
        return self.casts[variable]

    def _constant(self, variable: Any) -> Any:
        """Its value; what would become zero becomes the next to it."""
        cast = import_coremltools("converters.mil.mil.ops.defs.iOS15.elementwise_unary").cast
        value = SimpleNamespace(val=cast.get_cast_value(variable, _NARROW))
        self.choice._check_underflow_to_zero(SimpleNamespace(val=value.val, _sym_val=value), variable)
        return value.val


def _names(operation: Any) -> list[str]:
    """What coremltools calls the outputs of an operation of that name."""
    if len(operation.outputs) == 1:
        return [operation.name]
    return [f"{operation.name}_{index}" for index in range(len(operation.outputs))]
