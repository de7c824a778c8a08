"""CUDA graphs on a CPU: the same operations, again, on the same memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class SimulatedGraph:
    """What ``torch.cuda.CUDAGraph`` does; ``operations`` are filled by :class:`Capture`."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, tuple, dict, list[Tensor]]] = []

    def pool(self) -> None: ...

    def replay(self) -> None:
        with torch.no_grad():
            for operation, args, kwargs, outputs in self.operations:
                again = tensors(operation(*args, **kwargs))
                for output, new in zip(outputs, again, strict=True):
                    if output.data_ptr() != new.data_ptr():  # neither a view nor in place
                        output.copy_(new)


class Capture(TorchDispatchMode):
    """What ``torch.cuda.graph`` does: operations are noted, and have no effect before a replay.

    Here they are computed too, and what they changed is put back at the end.
    """

    def __init__(self, graph: SimulatedGraph, **how: Any) -> None:
        super().__init__()
        self.graph, self.rng = graph, torch.get_rng_state()
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # by address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        lifted = func is torch.ops.aten.lift_fresh.default and args[0].dim() > 0
        if lifted or func is torch.ops.aten._local_scalar_dense.default:  # a copy here or from here
            raise RuntimeError("operation not permitted when stream is capturing")
        for place, argument in enumerate(func._schema.arguments):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written or argument.name.startswith("running_"):  # batch norm's schema is silent
                changed = args[place] if place < len(args) else kwargs[argument.name]
                for x in tensors(changed):
                    self.before.setdefault(x.data_ptr(), (x.detach(), x.detach().clone()))
        out = func(*args, **kwargs)
        self.graph.operations.append((func, args, kwargs, tensors(out)))
        return out

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_rng_state(self.rng)
        for tensor, value in self.before.values():
            tensor.copy_(value)


def tensors(values: Any) -> list[Tensor]:
    """All that are in a nest, as autograd does not see them."""
    return [x.detach() for x in tree_leaves(values) if isinstance(x, Tensor)]
