"""How some types are taken apart: those whose own pickling would copy, and those that users named.

What: reducers for arrays that numpy copies into the stream (dates, subclasses, gaps between their
elements), for memoryviews, `array.array` and torch's tensors; and the table of serializers that
users register.
Who calls: `objects/serialization.py`; the functions at the end run in readers.
May touch: nothing but the values; numpy and torch only if the program has imported them.
Invariants: what a reducer gives can be read by any process that has poolray and the library.
"""

from __future__ import annotations

import array
import pickle
import sys
from collections.abc import Callable
from typing import Any, final

import cloudpickle

#: Buffers smaller than this go inside the pickle stream when the reader may write to them: a copy
#: of them costs less than keeping track of a mapping.
OUT_OF_BAND_MIN_BYTES = 32 * 1024

Reducer = Callable[[Any], Any]

# ---- what users register -------------------------------------------------------------------------


@final
class _Registered:
    """A class with the two functions that take its instances apart and put them together."""

    __slots__ = ("cls", "deserializer", "serializer", "travels")

    def __init__(
        self, cls: type, serializer: Callable[[Any], Any], deserializer: Callable[[Any], Any]
    ) -> None:
        self.cls = cls
        self.serializer = serializer
        self.deserializer = deserializer
        #: Whether readers can be given the serializer too; asked at its first use.
        self.travels: bool | None = None

    def reduce(self, value: Any) -> Any:
        """What stands for an instance in the stream."""
        if self.travels is None:
            self.travels = _can_travel((self.cls, self.serializer))
        payload = self.serializer(value)
        if self.travels:
            return _read_registered, (self.cls, self.serializer, self.deserializer, payload)
        return self.deserializer, (payload,)


#: Class -> how its instances travel. Of this process; a reader learns of an entry with the first
#: value that was written by it, so that it can send such values back.
registered: dict[type, _Registered] = {}


def register(
    cls: type, serializer: Callable[[Any], Any], deserializer: Callable[[Any], Any]
) -> None:
    """Instances of exactly this class are written by `serializer` from now on."""
    registered[cls] = _Registered(cls, serializer, deserializer)


def deregister(cls: type) -> None:
    """Instances are pickled as they are again."""
    registered.pop(cls, None)


def _can_travel(value: object) -> bool:
    try:
        cloudpickle.dumps(value)
    except Exception:
        return False  # then only its products travel
    return True


def _read_registered(
    cls: type,
    serializer: Callable[[Any], Any],
    deserializer: Callable[[Any], Any],
    payload: Any,
) -> Any:
    if cls not in registered:
        register(cls, serializer, deserializer)
    return deserializer(payload)


# ---- tables --------------------------------------------------------------------------------------


def table() -> dict[type, Reducer]:
    """Reducers by exact type, for the libraries that are loaded now."""
    found: dict[type, Reducer] = {array.array: _reduce_array_array}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        for kind in (numpy.ndarray, numpy.memmap, numpy.recarray):
            found[kind] = _reduce_array
        found[numpy.ma.MaskedArray] = _reduce_masked
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "Tensor"):  # not while it is being imported
        found[torch.Tensor] = _reduce_tensor
    for cls, entry in registered.items():
        found[cls] = entry.reduce
    return found


#: What the streams of values mention that the table above might write better: arrays that numpy
#: copied (`_reconstruct`, `_mareconstruct`), `array.array` (`_array_reconstructor`), tensors.
_MENTIONS = (b"reconstruct", b"_rebuild_tensor")
#: Arrays of Python objects are copied in any case, and pickling them twice would be slow.
_OBJECT_DTYPE = b"\x8c\x02O8"
#: A mention further into a stream is not found: looking costs a millisecond per megabyte.
_LOOK_BYTES = 256 * 1024


def may_shrink(stream: bytes) -> bool:
    """Whether a large pickle stream probably has array data in it that could be kept out."""
    return (
        any(stream.find(mention, 0, _LOOK_BYTES) >= 0 for mention in _MENTIONS)
        and stream.find(_OBJECT_DTYPE, 0, _LOOK_BYTES) < 0
    )


# ---- numpy ---------------------------------------------------------------------------------------


def _reduce_array(value: Any) -> Any:
    if value.nbytes < OUT_OF_BAND_MIN_BYTES or value.dtype.hasobject:
        return value.__reduce_ex__(5)
    import numpy

    kind = type(value)
    plain = value.view(numpy.ndarray)
    order = "F" if plain.flags.f_contiguous and not plain.flags.c_contiguous else "C"
    # One copy if there are gaps or steps backwards; the default makes two.
    flat = numpy.ascontiguousarray(plain.T if order == "F" else plain).reshape(-1)
    # As bytes: some types of elements, dates among them, refuse to be looked at as buffers.
    octets: Any = flat.view(numpy.uint8)
    buffer = pickle.PickleBuffer(octets)
    return _rebuild_array, (
        buffer,
        value.dtype,
        value.shape,
        order,
        None if kind is numpy.ndarray else kind,
    )


def _rebuild_array(buffer: Any, dtype: Any, shape: Any, order: str, kind: Any) -> Any:
    import numpy

    flat = numpy.frombuffer(thawed(buffer), dtype=numpy.uint8).view(dtype)
    value = flat.reshape(shape, order=order)
    return value if kind is None else value.view(kind)


def _reduce_masked(value: Any) -> Any:
    import numpy

    if value.nbytes < OUT_OF_BAND_MIN_BYTES or value._baseclass is not numpy.ndarray:
        return value.__reduce_ex__(5)
    mask = numpy.ma.getmaskarray(value)
    return _rebuild_masked, (value.data, mask, value._fill_value)


def _rebuild_masked(data: Any, mask: Any, fill_value: Any) -> Any:
    import numpy

    value: Any = numpy.ma.MaskedArray(data, mask=mask, copy=False)
    value._fill_value = fill_value
    return value


# ---- buffers of the standard library -------------------------------------------------------------


def reduce_memoryview(value: memoryview) -> Any:
    """A memoryview arrives as one, of the same format and shape, over memory of its own."""
    import numpy

    elements = numpy.asarray(value)
    return _rebuild_memoryview, (elements, value.format, value.shape, value.readonly)


def _rebuild_memoryview(elements: Any, format: str, shape: Any, readonly: bool) -> memoryview:
    view: Any = memoryview(elements)
    if view.format != format:  # numpy has no single characters, for instance
        view = view.cast("B").cast(format, shape)
    made: memoryview = view.toreadonly() if readonly else view
    return made


def _reduce_array_array(value: Any) -> Any:
    if len(value) * value.itemsize < OUT_OF_BAND_MIN_BYTES:
        return value.__reduce_ex__(5)
    return _rebuild_array_array, (value.typecode, pickle.PickleBuffer(value))


def _rebuild_array_array(typecode: str, buffer: Any) -> Any:
    value = array.array(typecode)
    value.frombytes(buffer)
    return value


@final
class Flat:
    """Stands for a large `bytes` or `bytearray` that is written without a copy."""

    __slots__ = ("value",)

    def __init__(self, value: bytes | bytearray) -> None:
        self.value = value

    def __reduce__(self) -> Any:
        return type(self.value), (pickle.PickleBuffer(self.value),)


@final
class Wrapped:
    """Stands for an array that numpy itself would copy into the stream."""

    __slots__ = ("reduced",)

    def __init__(self, reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced

    @classmethod
    def of(cls, value: Any) -> Wrapped | None:
        """What stands for a value; None if numpy does as well."""
        if type(value) is array.array:
            large = len(value) * value.itemsize > OUT_OF_BAND_MIN_BYTES
            return cls(_reduce_array_array(value)) if large else None
        import numpy

        if not isinstance(value, numpy.ndarray) or value.nbytes < OUT_OF_BAND_MIN_BYTES:
            return None
        kind = type(value)
        if kind is numpy.ma.MaskedArray:
            # Its parts may be of any of these kinds: the table is for them.
            return None
        flags = value.flags
        plain = kind is numpy.ndarray and value.dtype.kind not in "mMVO"
        if value.dtype.hasobject or (plain and (flags.c_contiguous or flags.f_contiguous)):
            return None
        if kind not in (numpy.ndarray, numpy.memmap, numpy.recarray):
            return None
        return cls(_reduce_array(value))


# ---- torch ---------------------------------------------------------------------------------------


def _reduce_tensor(value: Any) -> Any:
    torch = sys.modules["torch"]
    if (
        value.device.type != "cpu"
        or value.layout is not torch.strided
        or value.is_quantized
        or value.requires_grad
        or value.is_conj()
        or value.is_neg()
        or value.__dict__
        or not value.is_contiguous()
        or value.numel() * value.element_size() < OUT_OF_BAND_MIN_BYTES
        # A view of a part, or one storage behind several tensors: torch keeps them together.
        or value.untyped_storage().nbytes() != value.numel() * value.element_size()
    ):
        return value.__reduce_ex__(5)
    raw = value.reshape(-1).view(torch.uint8).numpy()
    return _rebuild_tensor, (pickle.PickleBuffer(raw), value.dtype, tuple(value.shape))


def _rebuild_tensor(buffer: Any, dtype: Any, shape: Any) -> Any:
    import torch

    buffer = thawed(buffer)
    if memoryview(buffer).readonly:
        # A tensor cannot be read-only, and writing through one must not change the stored object.
        buffer = bytearray(buffer)
    return torch.frombuffer(buffer, dtype=dtype).reshape(shape)


# ---- reading -------------------------------------------------------------------------------------


def thawed(buffer: Any) -> Any:
    """A buffer that was read-only at its writer, as writable as its memory is here.

    Pickle wraps it in a read-only view; a reader that may write is given one object per buffer,
    which is found behind that view.
    """
    if isinstance(buffer, memoryview) and buffer.readonly:
        behind = buffer.obj
        if behind is not None and not isinstance(behind, bytes):
            view = memoryview(behind)
            if not view.readonly and view.nbytes == buffer.nbytes:
                return behind
    return buffer


@final
class ThawingUnpickler(pickle.Unpickler):
    """For a reader that may write: arrays that were read-only at their writer are writable."""

    def find_class(self, module: str, name: str) -> Any:
        """A global that the stream names; numpy puts its arrays together on thawed memory."""
        found = super().find_class(module, name)
        if name == "_frombuffer" and module.partition(".")[0] == "numpy":
            return lambda buffer, *rest: found(thawed(buffer), *rest)
        return found
