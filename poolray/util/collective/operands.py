"""Tensors as the operations of a group see them: bytes, and how two of them are reduced.

What: views of numpy arrays and of torch's tensors on the CPU, without a copy where they are
contiguous.
Who calls: `collective.py`, `group.py`.
May touch: nothing; torch is used where a user's tensor is one of its, and never imported otherwise.
Invariants: whatever is written to `data` is in the user's tensor after `finish`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeAlias, final

import numpy

from poolray.util.collective.types import ReduceOp

__all__ = ["Combine", "Operand", "check_tensor", "open_operand"]

#: Reduces two stretches of bytes into a third, which may be the first.
Combine: TypeAlias = Callable[[Any, Any, Any], None]

_UFUNCS = {
    ReduceOp.SUM: numpy.add,
    ReduceOp.PRODUCT: numpy.multiply,
    ReduceOp.MIN: numpy.minimum,
    ReduceOp.MAX: numpy.maximum,
}
_TORCH_FUNCTIONS = {
    ReduceOp.SUM: "add",
    ReduceOp.PRODUCT: "mul",
    ReduceOp.MIN: "minimum",
    ReduceOp.MAX: "maximum",
}


def _is_torch(tensor: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(tensor, torch.Tensor)


def check_tensor(tensor: Any) -> None:
    """Raise RuntimeError, as the reference does, for what is no tensor."""
    if not isinstance(tensor, numpy.ndarray) and not _is_torch(tensor):
        raise RuntimeError(
            f"Unrecognized tensor type '{type(tensor)}'. Supported types are: np.ndarray, "
            "torch.Tensor."
        )


def open_operand(tensor: Any, *, writes: bool = False) -> Operand:
    """A tensor as bytes.

    Parameters
    ----------
    writes : bool
        Whether the operation writes to it.

    Raises
    ------
    RuntimeError
        It is no tensor, or on a GPU.
    ValueError
        It is read-only and would be written to.
    TypeError
        Its elements are objects.
    """
    check_tensor(tensor)
    return _open_torch(tensor) if _is_torch(tensor) else _open_numpy(tensor, writes)


def _open_numpy(array: Any, writes: bool) -> Operand:
    if array.dtype.hasobject:
        raise TypeError(
            f"An array of {array.dtype} cannot take part in a collective operation: its elements "
            "are objects of this process. Convert it to numbers."
        )
    if writes and not array.flags.writeable:
        raise ValueError(
            "The operation writes to this array, and it is read-only, as those are that `get` "
            "returns and calls are given: pass a copy, array.copy()."
        )
    work = numpy.ascontiguousarray(array)
    is_copy = not array.flags.c_contiguous

    def write_back() -> None:
        array[...] = work.reshape(array.shape)

    dtype = array.dtype
    data = work.reshape(-1).view(numpy.uint8)
    return Operand(data, dtype.str, dtype, write_back if writes and is_copy else None)


def _open_torch(tensor: Any) -> Operand:
    torch: Any = sys.modules["torch"]
    if tensor.device.type != "cpu":
        raise RuntimeError(
            f"A tensor on {tensor.device} cannot take part: the backend 'gloo' is for tensors on "
            "the CPU. Pass tensor.cpu(), or make the group with backend='nccl'."
        )
    plain = tensor.detach()
    work = plain.contiguous()
    is_copy = not plain.is_contiguous()
    data = work.reshape(-1).view(torch.uint8).numpy()
    name, dtype = _torch_dtype(torch, plain.dtype)

    def write_back() -> None:
        plain.copy_(work)

    operand = Operand(data, name, dtype, write_back if is_copy else None)
    if dtype is None:
        operand.torch_dtype = plain.dtype
    return operand


def _torch_dtype(torch: Any, dtype: Any) -> tuple[str, Any]:
    """A name that members can compare, and numpy's type, if it has one."""
    try:
        found = torch.empty(0, dtype=dtype).numpy().dtype
    except TypeError:  # bfloat16 and its like
        return str(dtype).removeprefix("torch."), None
    return found.str, found


@final
class Operand:
    """A tensor while it takes part in an operation."""

    __slots__ = ("_write_back", "data", "dtype", "name", "torch_dtype")

    def __init__(
        self, data: Any, name: str, dtype: Any, write_back: Callable[[], None] | None
    ) -> None:
        #: Its elements as bytes, in one dimension.
        self.data = data
        #: The type of its elements, for comparing.
        self.name = name
        #: The same for numpy; None: numpy has none.
        self.dtype = dtype
        #: The same for torch, where numpy has none.
        self.torch_dtype: Any = None
        self._write_back = write_back

    @property
    def size_bytes(self) -> int:
        """Bytes of all elements."""
        return int(self.data.size)

    def finish(self) -> None:
        """The operation is over: what was written is the user's."""
        if self._write_back is not None:
            self._write_back()

    def combine(self, op: ReduceOp) -> Combine:
        """What reduces two stretches of such elements.

        Raises
        ------
        TypeError
            Such elements cannot be reduced so.
        """
        if not isinstance(op, ReduceOp):
            raise TypeError(f"op must be a ReduceOp, not {op!r:.100}")
        if self.dtype is None:
            return self._combine_in_torch(op)
        dtype, ufunc = self.dtype, _UFUNCS[op]
        if dtype.kind not in "biufc":
            raise TypeError(f"Elements of type {dtype} cannot be reduced by {op.name}.")

        def combine(first: Any, second: Any, out: Any) -> None:
            ufunc(first.view(dtype), second.view(dtype), out=out.view(dtype))

        return combine

    def _combine_in_torch(self, op: ReduceOp) -> Combine:
        torch: Any = sys.modules["torch"]
        dtype, function = self.torch_dtype, getattr(torch, _TORCH_FUNCTIONS[op])

        def combine(first: Any, second: Any, out: Any) -> None:
            parts = [torch.from_numpy(part).view(dtype) for part in (first, second, out)]
            function(parts[0], parts[1], out=parts[2])

        return combine
