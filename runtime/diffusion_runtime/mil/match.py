"""Small words for graph patterns: nodes of a lowered program by op, operand and declared shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx

from diffusion_runtime.mil.program import TensorType


def operation(node: Any) -> str:
    """The MIL op that computes a node's value ("" of anything else)."""
    return str(node.meta.get("op", "")) if isinstance(node, fx.Node) else ""


def operand(node: fx.Node, name: str, default: Any = None) -> Any:
    """The operand of a MIL parameter: a node, a constant as Python value, or ``default``."""
    return node.kwargs.get(name, default)


def others(node: fx.Node, one: Any) -> list[Any]:
    """Of the two operands of a binary op the one that is not ``one`` (or ``one`` again where both are)."""
    x, y = operand(node, "x"), operand(node, "y")
    return [y] if x is one else [x]


def only_user(node: fx.Node) -> fx.Node | None:
    """The node that uses ``node``; None where none does or several do."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def shape_of(node: Any) -> tuple[int, ...] | None:
    """The declared shape; None where it is not known before the run."""
    kind = node.meta.get("type") if isinstance(node, fx.Node) else None
    if not isinstance(kind, TensorType) or None in kind.shape:
        return None
    return tuple(size for size in kind.shape if size is not None)


def value_of(module: fx.GraphModule, node: Any) -> Tensor | None:
    """The value of a constant node."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value: Tensor = getattr(module, str(node.target))
    return value


def weight_of(module: fx.GraphModule, node: Any) -> Any:
    """The value of a constant node, or the `lower.Stored` weight that stands for one; else None."""
    if not isinstance(node, fx.Node) or node.op not in ("get_attr", "call_module"):
        return None
    return getattr(module, str(node.target))


def scalar(module: fx.GraphModule, node: Any) -> float | None:
    """The value of a constant node of one element."""
    value = value_of(module, node)
    return float(value) if value is not None and value.numel() == 1 else None


def put(
    module: fx.GraphModule, node: fx.Node, function: Callable[..., Any], arguments: Mapping[str, Any], op: str
) -> fx.Node:
    """Compute the value of ``node`` by another function, under the same MIL name; it takes over all users."""
    with module.graph.inserting_before(node):
        new = module.graph.create_node("call_function", function, (), dict(arguments), name=f"{node.name}_{op}")
    new.meta.update(node.meta, op=op)
    node.replace_all_uses_with(new)
    module.graph.erase_node(node)
    return new


def put_buffer(module: fx.GraphModule, before: fx.Node, value: Tensor, suffix: str) -> fx.Node:
    """A new constant, read before the node ``before``."""
    target = f"{before.name}_{suffix}"
    module.register_buffer(target, value.contiguous())
    with module.graph.inserting_before(before):
        node = module.graph.create_node("get_attr", target, name=target)
    node.meta["op"] = "const"
    return node


def drop_unused(module: fx.GraphModule) -> None:
    """Remove nodes that nothing needs, and constants that no node reads."""
    for node in reversed(list(module.graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            module.graph.erase_node(node)
    used = {node.target for node in module.graph.nodes if node.op in ("get_attr", "call_module")}
    for name in [name for name, _ in module.named_buffers() if name not in used]:
        delattr(module, name)
