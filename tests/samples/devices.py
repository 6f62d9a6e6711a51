"""A device that every machine has: tensors that say they are on `cuda`, and refuse to be mixed with others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

__all__ = ["Computed", "IndexedAnywhere", "move", "numbers"]

_CPU = torch.device("cpu")


class Computed(FakeTensorMode):
    """Torch's tensors without data, which check devices, each with the numbers that a processor computes for it.

    So code whose way depends on numbers, such as which tokens are chosen, runs to its end, and what comes out can be
    compared.

    pinned: how many tensors were made in pinned memory.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._inside = False
        self.pinned = 0

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._inside or func is torch.ops.prim.device.default:
            return super().dispatch(func, types, args, kwargs)
        flat, _ = tree_flatten((args, kwargs))
        where = next((one.device for one in flat if isinstance(one, FakeTensor) and one.device != _CPU), _CPU)
        real_args, real_kwargs = tree_map(numbers, (args, kwargs))
        self.pinned += bool(real_kwargs.pop("pin_memory", False))  # of which a processor knows nothing
        self._inside = True  # of an operator that torch composes of others
        try:
            fake = super().dispatch(func, types, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            fake = None
        finally:
            self._inside = False
        with _disable_current_modes():
            real = func(*real_args, **real_kwargs)
        if fake is None:
            fake = tree_map(lambda one: self._fake(one, where), real)
        for one, number in zip(tree_flatten(fake)[0], tree_flatten(real)[0], strict=True):
            if isinstance(one, FakeTensor):
                one.number, one.constant = number, None  # a constant would be computed with once more
        return fake

    def _fake(self, one: Any, where: torch.device) -> Any:
        return FakeTensor(self, one.to("meta"), where) if isinstance(one, Tensor) else one


def numbers(one: Any) -> Any:
    """Return what the processor computed for a tensor of a device."""
    if isinstance(one, FakeTensor):
        return one.number
    return _CPU if isinstance(one, torch.device) else one


class IndexedAnywhere(TorchFunctionMode):
    """Indexing by operators, for the one of Python needs the tensor's device, even where the tensor has no data."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _OPERATORS.get(func, func)(*args, **(kwargs or {}))


def _parts(tensor: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
    """Return a view of a tensor for all of an index but its tensors, and these for the axes of the view."""
    axis, tensors = 0, []
    index = index if isinstance(index, tuple) else (index,)
    for number, one in enumerate(index):
        if one is Ellipsis:
            stop = tensor.ndim - sum(later is not None for later in index[number + 1 :])
            tensors += [None] * (stop - axis)
            axis = stop
            continue
        if isinstance(one, int):
            tensor = tensor.select(axis, one)
            continue
        if one is None:
            tensor = tensor.unsqueeze(axis)
        elif isinstance(one, slice):
            start, stop, step = one.indices(tensor.shape[axis])
            tensor = torch.ops.aten.slice(tensor, axis, start, max(start, stop), step)
        if isinstance(one, Tensor) and one.dtype == torch.bool:
            found: list[Tensor | None] = [*torch.ops.aten.nonzero(one).unbind(1)]
        else:
            found = [one if isinstance(one, Tensor) else None]
        tensors += found
        axis += len(found)
    return tensor, tensors


def _indexed(tensor: Tensor, index: Any) -> Tensor:
    if isinstance(index, (list, range)):
        index = torch.tensor(list(index))
    view, tensors = _parts(tensor, index)
    return torch.ops.aten.index(view, tensors) if any(one is not None for one in tensors) else view


def _assign(tensor: Tensor, index: Any, value: Any) -> None:
    view, tensors = _parts(tensor, index)
    if any(one is not None for one in tensors):
        value = value if isinstance(value, Tensor) else torch.tensor(value, dtype=view.dtype)
        torch.ops.aten.index_put_(view, tensors, value)
    elif isinstance(value, Tensor):
        torch.ops.aten.copy_(view, value)
    else:
        view.fill_(value)


def _moved(tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype)
    device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
    device = device or tensor.device
    dtype = dtype or tensor.dtype
    if not copy and (device.type, dtype) == (tensor.device.type, tensor.dtype):
        return tensor
    return torch.ops.aten._to_copy(tensor, device=device, dtype=dtype)


def _listed(tensor: Tensor) -> Any:
    with _disable_current_modes():
        return numbers(tensor).tolist()


def _made(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
    made = torch.tensor(data, **kwargs)
    return made if device is None else _moved(made, device)


_OPERATORS: dict[Any, Any] = {
    torch.tensor: _made,
    Tensor.__getitem__: _indexed,
    Tensor.__setitem__: _assign,
    Tensor.copy_: torch.ops.aten.copy_,
    Tensor.__bool__: lambda tensor: bool(_listed(tensor)),
    Tensor.__int__: lambda tensor: int(_listed(tensor)),
    Tensor.__invert__: torch.ops.aten.bitwise_not,
    Tensor.new_tensor: lambda like, data: _made(data, device=like.device, dtype=like.dtype),
    Tensor.nonzero: torch.ops.aten.nonzero,
    Tensor.to: _moved,
    Tensor.tolist: _listed,
}


def move(module: nn.Module, device: str) -> None:
    """Move the parameters and buffers of a module, and those of the modules in it."""
    for one in module.modules():
        for held in (one._parameters, one._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    moved = _moved(tensor.detach(), device)
                    held[name] = nn.Parameter(moved, tensor.requires_grad) if held is one._parameters else moved
