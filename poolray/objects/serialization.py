"""Values to bytes and back: pickle where it is enough, cloudpickle where it is needed.

What: `Serializer` makes frames, `deserialize` reads them; large buffers stay out of the pickle
stream at 64-byte alignment, so that a reader maps instead of copying.
Who calls: clients and workers. The machines never look inside a value.
May touch: nothing but the objects it is given.
Invariants: a frame that starts with pickle's own first byte is a bare pickle; any other starts
with `_MAGIC` or `_MAGIC_FROZEN`. What a value refers to (`ObjectRef`s inside) is reported, never
guessed.
"""

from __future__ import annotations

import copyreg
import importlib.util
import io
import pickle
import struct
import sys
import types
from collections import ChainMap
from collections.abc import Callable, Mapping
from functools import partial
from threading import local as ThreadLocal
from typing import Any, final

import cloudpickle

from poolray.ids import ObjectId
from poolray.objects import reducers
from poolray.objects.reducers import OUT_OF_BAND_MIN_BYTES, ThawingUnpickler

ALIGNMENT_BYTES = 64

_MAGIC = b"\x01PRF"
#: The same, and some of the buffers were read-only where they were written.
_MAGIC_FROZEN = b"\x02PRF"
_HEADER = struct.Struct("<4sIQ")  # magic, number of buffers, bytes of pickle
_LENGTH = struct.Struct("<Q")
#: No frame begins with it.
PICKLE_FIRST_BYTE = 0x80
_MAIN = b"__main__"
#: multiprocessing's connections pickle into a number that means nothing elsewhere, without error.
_CONNECTION = b".connection"

_NEEDS_CLOUDPICKLE = (pickle.PicklingError, AttributeError, TypeError)


_ARRAY_MODULES = ("array", "numpy", "numpy.ma", "numpy.ma.core", "numpy.rec")

#: Empty unless the user has registered serializers: then plain pickle does not do.
_registered = reducers.registered


class _Context(ThreadLocal):
    """What the running `serialize` of this thread has met."""

    #: Ids of the refs inside the value, or None outside of `serialize`.
    refs: list[ObjectId] | None = None


_context = _Context()


def note_reference(object_id: ObjectId) -> bool:
    """Called as an `ObjectRef` is pickled; False when it happens outside of our serialization."""
    refs = _context.refs
    if refs is None:
        return False
    refs.append(object_id)
    return True


@final
class Serialized:
    """A value as a pickle stream with buffers beside it.

    Attributes
    ----------
    data : bytes
        The pickle stream.
    buffers : list of memoryview
        Out-of-band buffers, each contiguous bytes.
    refs : list of ObjectId
        Objects that the value refers to.
    size_bytes : int
        Bytes of the frame that `write_into` writes.
    """

    __slots__ = ("buffers", "data", "refs", "size_bytes")

    def __init__(self, data: bytes, buffers: list[memoryview], refs: list[ObjectId]) -> None:
        self.data = data
        self.buffers = buffers
        self.refs = refs
        self.size_bytes = _frame_size(len(data), buffers) if buffers else len(data)

    def to_bytes(self) -> bytes:
        """The frame as one bytes object (for small values)."""
        if not self.buffers:
            return self.data
        frame = bytearray(self.size_bytes)
        self.write_into(memoryview(frame))
        return bytes(frame)

    def write_into(self, target: memoryview) -> None:
        """Write the frame to `target`, which is at least `size_bytes` long."""
        position = 0
        for piece in self.pieces():
            end = position + len(piece)
            target[position:end] = piece
            position = end

    def pieces(self) -> list[bytes | memoryview]:
        """The frame as what is to be written one after the other."""
        if not self.buffers:
            return [self.data]
        magic = _MAGIC_FROZEN if any(b.readonly for b in self.buffers) else _MAGIC
        head = [_HEADER.pack(magic, len(self.buffers), len(self.data))]
        head.extend(_LENGTH.pack(buffer.nbytes) for buffer in self.buffers)
        head.append(self.data)
        found: list[bytes | memoryview] = [b"".join(head)]
        position = len(found[0])
        for buffer in self.buffers:
            start = _aligned(position)
            if start > position:
                found.append(bytes(start - position))
            found.append(buffer)
            position = start + buffer.nbytes
        return found


def _aligned(position: int) -> int:
    return (position + ALIGNMENT_BYTES - 1) & -ALIGNMENT_BYTES


def _frame_size(data_bytes: int, buffers: list[memoryview]) -> int:
    position = _HEADER.size + _LENGTH.size * len(buffers) + data_bytes
    for buffer in buffers:
        position = _aligned(position) + buffer.nbytes
    return position


#: Values that plain pickle writes as any reader needs them.
_SCALARS = frozenset({int, float, bool, complex, str, type(None)})


@final
class Serializer:
    """Serializes for one kind of reader.

    Parameters
    ----------
    main_definitions : mapping of str to object, or None
        Functions and classes of `__main__` that the reader has under the same name. Those go by
        reference, all others of `__main__` by value. None: plain pickle decides, which is right
        for a worker writing to its driver.
    out_of_band_all : bool
        Keep every buffer out of band, however small: it then arrives read-only, as the runtime
        API promises. Otherwise small buffers travel inside the stream and arrive writable.
    shared_globals : str or None
        Functions that go by value share the globals of their module within this scope on the
        reader's side (a Pool's initializer can then set a global that its functions see).
        None: each function brings globals of its own.
    modules : frozenset of str or None
        Modules that the reader has, or None when that is not known. Functions of any other module
        go by reference only if it can be imported.
    """

    __slots__ = ("_main_definitions", "_modules", "_out_of_band_all", "_shared_globals")

    def __init__(
        self,
        *,
        main_definitions: Mapping[str, object] | None,
        out_of_band_all: bool,
        shared_globals: str | None = None,
        modules: frozenset[str] | None = None,
    ) -> None:
        self._main_definitions = main_definitions
        self._out_of_band_all = out_of_band_all
        self._shared_globals = shared_globals
        self._modules = modules

    def dumps(self, value: object) -> bytes | Serialized:
        """Serialize: bytes when the frame is a bare pickle without refs, else a `Serialized`.

        Raises
        ------
        TypeError, pickle.PicklingError, AttributeError
            Neither pickle nor cloudpickle can write the value; the message names the part.
        """
        outer = _context.refs
        refs: list[ObjectId] = []
        _context.refs = refs
        buffers: list[memoryview] = []
        try:
            keep = partial(_keep, buffers, 0 if self._out_of_band_all else OUT_OF_BAND_MIN_BYTES)
            try:
                if not _registered:
                    data = pickle.dumps(value, 5, buffer_callback=keep)
                else:
                    data = _dumps_by_table(value, keep)
            except _NEEDS_CLOUDPICKLE:
                by_value = True
            except RecursionError as error:
                # CPython's own wording does not say which of our steps it was.
                raise pickle.PicklingError(
                    "Could not pickle object as excessively deep recursion required."
                ) from error
            else:
                by_value = (self._main_definitions is not None and _MAIN in data) or (
                    _CONNECTION in data
                )
            if by_value:
                refs.clear()
                buffers.clear()
                data = self._dumps_by_value(value, keep)
            elif len(data) > OUT_OF_BAND_MIN_BYTES and reducers.may_shrink(data):
                refs.clear()
                buffers.clear()
                data = b""  # it may be as large as all the memory that is left
                data = _dumps_by_table(value, keep)
        finally:
            _context.refs = outer
        if not buffers and not refs:
            return data
        return Serialized(data, buffers, refs)

    def dumps_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes | Serialized:
        """The same for the arguments of a call, `(args, kwargs)`, which are often a few numbers
        and names: these need none of the care above (measured: 0.5 instead of 2 us).
        """
        if not kwargs:
            for argument in args:
                if type(argument) not in _SCALARS:
                    break
            else:
                data = pickle.dumps((args, kwargs), 5)
                if len(data) <= OUT_OF_BAND_MIN_BYTES:
                    return data
        return self.dumps((args, kwargs))

    def dumps_flat(self, value: object) -> bytes | Serialized:
        """The same for a value that is often nothing but many bytes: these are not copied, nor is
        an array that plain pickle would copy tried with it first.
        """
        kind = type(value)
        if kind in _SCALARS:
            data = pickle.dumps(value, 5)
            if len(data) <= OUT_OF_BAND_MIN_BYTES:
                return data
        if (kind is bytes or kind is bytearray) and len(value) > OUT_OF_BAND_MIN_BYTES:  # type: ignore[arg-type]
            return self.dumps(reducers.Flat(value))  # type: ignore[arg-type]
        if kind.__module__ in _ARRAY_MODULES and not _registered:
            wrapped = reducers.Wrapped.of(value)
            if wrapped is not None:
                return self.dumps(wrapped)
        return self.dumps(value)

    def dumps_function(self, function: object) -> tuple[bytes | Serialized, bool]:
        """Serialize a callable; tells whether it went by reference.

        Raises
        ------
        TypeError, pickle.PicklingError, AttributeError
            As `dumps`.
        """
        if not self._reader_lacks(function):
            data = self.dumps(function)
            return data, isinstance(data, bytes) and data == _reference_to(function)
        stream = io.BytesIO()
        module = str(getattr(function, "__module__", ""))
        _ByValuePickler(
            stream,
            lambda buffer: True,
            self._main_definitions or {},
            self._shared_globals,
            by_value=module,
        ).dump(function)
        return stream.getvalue(), False

    def _reader_lacks(self, function: object) -> bool:
        """Whether a function's module is one that the reader neither has nor can import."""
        module = getattr(function, "__module__", None)
        if self._modules is None or not isinstance(module, str) or module in self._modules:
            return False
        try:
            return importlib.util.find_spec(module) is None
        except (ImportError, ValueError):
            return True

    def _dumps_by_value(self, value: object, keep: Callable[[pickle.PickleBuffer], bool]) -> bytes:
        stream = io.BytesIO()
        _ByValuePickler(stream, keep, self._main_definitions or {}, self._shared_globals).dump(
            value
        )
        return stream.getvalue()


def _keep(buffers: list[memoryview], minimum: int, buffer: pickle.PickleBuffer) -> bool:
    """Take a buffer out of the pickle stream; True leaves it in there."""
    try:
        raw = buffer.raw()
    except BufferError:  # not contiguous: pickle copies it into the stream
        return True
    if raw.nbytes < minimum and not raw.readonly:
        return True
    # (Inside the stream a read-only buffer would arrive as one; beside it, it is up to the reader.)
    buffers.append(raw)
    return False


def _dumps_by_table(value: object, keep: Callable[[pickle.PickleBuffer], bool]) -> bytes:
    """pickle, with the reducers of `objects/reducers.py`."""
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream, 5, buffer_callback=keep)
    known: Any = copyreg.dispatch_table
    pickler.dispatch_table = ChainMap(reducers.table(), known)
    pickler.dump(value)
    return stream.getvalue()


_INHERITED_REDUCERS: Any = cloudpickle.Pickler.dispatch_table.maps
#: What cloudpickle (3.1.3 and later) writes in the place of the name of a function's file.
_NAMELESS_FILE = "<dynamic-code>"


def _reduce_code(code: types.CodeType) -> Any:
    """Cloudpickle's way, but with the name of the file: tracebacks of tasks show where they are."""
    make, arguments = cloudpickle.cloudpickle._code_reduce(code)[:2]
    return make, tuple(code.co_filename if a == _NAMELESS_FILE else a for a in arguments)


class _ByValuePickler(cloudpickle.Pickler):  # type: ignore[misc]
    """cloudpickle, except that what the reader's `__main__` has goes by reference."""

    def __init__(
        self,
        stream: io.BytesIO,
        keep: Callable[[pickle.PickleBuffer], bool],
        main_definitions: Mapping[str, object],
        shared_globals: str | None,
        by_value: str = "",
    ) -> None:
        # Connections and sockets travel by handing over their descriptor, as in multiprocessing.
        # Set first: the C pickler looks at it once, in its __init__.
        table = {
            memoryview: reducers.reduce_memoryview,
            types.CodeType: _reduce_code,
            **reducers.table(),
        }
        self.dispatch_table = ChainMap(table, descriptor_reducers(), *_INHERITED_REDUCERS)
        super().__init__(stream, protocol=5, buffer_callback=keep)
        self._by_value_module = by_value
        self._main_definitions = main_definitions
        self._scope = shared_globals

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, (types.FunctionType, type)) and obj.__module__ == "__main__":
            known = self._main_definitions.get(obj.__qualname__)
            if known is obj and getattr(sys.modules["__main__"], obj.__qualname__, None) is obj:
                return NotImplemented  # plain pickle: a reference to __main__.<name>
        if (
            self._by_value_module
            and isinstance(obj, (types.FunctionType, type))
            and obj.__module__ == self._by_value_module
        ):
            if isinstance(obj, type):
                return self._dynamic_class_reduce(obj)
            return self._dynamic_function_reduce(obj)
        return super().reducer_override(obj)

    def _dynamic_class_reduce(self, obj: type) -> Any:
        return cloudpickle.cloudpickle._dynamic_class_reduce(obj)

    def _function_getnewargs(self, func: types.FunctionType) -> Any:
        arguments = super()._function_getnewargs(func)
        if self._scope is None:
            return arguments
        module = func.__globals__.get("__name__") or func.__module__ or "?"
        base = self.globals_ref.get(id(func.__globals__))
        if not isinstance(base, _GlobalsReference):
            base = _GlobalsReference(self._scope, module, arguments[1])
            self.globals_ref[id(func.__globals__)] = base
        return (arguments[0], base, *arguments[2:])

    def _dynamic_function_reduce(self, func: types.FunctionType) -> Any:
        reduced = super()._dynamic_function_reduce(func)
        if self._scope is None:
            return reduced
        return (*reduced[:5], _set_function_state)


def descriptor_reducers() -> dict[type, Callable[[Any], Any]]:
    """Reducers that multiprocessing has for connections and sockets, if the program uses them."""
    found: dict[type, Callable[[Any], Any]] = {}
    for name in ("multiprocessing", "multiprocess"):
        reduction = sys.modules.get(f"{name}.reduction")
        if reduction is not None:
            for kind, reducer in reduction.ForkingPickler._extra_reducers.items():
                if kind.__module__ in ("socket", f"{name}.connection"):
                    found[kind] = reducer
    return found


def _reference_to(function: object) -> bytes:
    """What pickle writes for a global."""
    try:
        return pickle.dumps(function, 5)
    except _NEEDS_CLOUDPICKLE:
        return b""


class _GlobalsReference(dict):  # type: ignore[type-arg]
    """Stands, while a function is pickled, for the globals that it will have at its reader.

    These are its module's own, where the reader has that module, else one dictionary per scope.
    A value that the reader's code assigned itself is kept; one that an earlier function brought,
    or that `__main__` had when the process was forked, is replaced by what a later function
    brings. So an initializer's globals survive, and a notebook's redefinitions arrive.
    """

    def __init__(self, scope: str, module: str, basics: dict[str, object]) -> None:
        super().__init__(basics)
        self.key = (scope, module)

    def __reduce__(self) -> Any:
        return _reader_globals, (self.key, dict(self))


class _Brought:
    """What is known of one dictionary of globals in the reading process."""

    __slots__ = ("target", "values")

    def __init__(self, target: dict[str, object], values: dict[str, object]) -> None:
        self.target = target
        #: Name -> the value that a function brought last, or that was there from the start.
        self.values = values


#: (scope, module name) -> globals of functions of modules that this process lacks.
_globals_by_key: dict[tuple[str, str], dict[str, object]] = {}
#: id of a dictionary of globals -> what is known of it.
_brought: dict[int, _Brought] = {}


def remember_main() -> None:
    """In a fresh worker: what `__main__` has now may be replaced by newer definitions."""
    main = _globals_of(sys.modules["__main__"])
    _brought[id(main)] = _Brought(main, dict(main))


def _globals_of(module: types.ModuleType) -> dict[str, Any]:
    """What a module's functions see as their globals: its own names.

    Not so in the `__main__` of a spawned process: multiprocessing runs the program's file and
    makes a module of a copy of what it defined.
    """
    if sys.modules.get("__mp_main__") is module:
        for value in vars(module).values():
            if isinstance(value, types.FunctionType) and value.__module__ == "__mp_main__":
                return value.__globals__
    return vars(module)


def _reader_globals(key: tuple[str, str], basics: dict[str, object]) -> dict[str, object]:
    module = sys.modules.get(key[1])
    if module is not None:
        target = _globals_of(module)
    else:
        target = _globals_by_key.setdefault(key, dict(basics))
    if id(target) not in _brought:
        _brought[id(target)] = _Brought(target, {})
    return target


def _set_function_state(obj: types.FunctionType, state: Any) -> None:
    """Fill a function as cloudpickle does, but careful with globals that others use too."""
    target = obj.__globals__
    known = _brought.get(id(target))
    if known is not None and known.target is target:
        values = known.values
        arriving = state[1].pop("__globals__", {})
        state[1]["__globals__"] = {}
        for name, value in arriving.items():
            mine = target.get(name, _ABSENT)
            if mine is _ABSENT or mine is values.get(name, _ABSENT):
                target[name] = value
                values[name] = value
    cloudpickle.cloudpickle._function_setstate(obj, state)


_ABSENT = object()


def dumps_function(function: object, shared_globals: str | None = None) -> bytes:
    """A function by cloudpickle: importable ones by reference, all others by value."""
    stream = io.BytesIO()
    _ByValuePickler(stream, lambda buffer: True, {}, shared_globals).dump(function)
    return stream.getvalue()


def is_frame(data: bytes | memoryview) -> bool:
    """Whether these bytes have buffers beside their pickle stream."""
    return len(data) > 0 and data[0] != PICKLE_FIRST_BYTE


def deserialize(data: bytes | memoryview, writable: bool = False) -> Any:
    """The value of a frame.

    Parameters
    ----------
    data : bytes or memoryview
        The frame. Of a memoryview, the value's buffers are views: the caller keeps the memory
        valid until the views are gone.
    writable : bool
        The reader may write: arrays in `bytes` are copied for it, and those that were read-only
        where they were written are writable here.
    """
    if data[0] == PICKLE_FIRST_BYTE:
        return pickle.loads(data)
    if isinstance(data, bytes):
        stream, buffers = split_frame(memoryview(data))
        # Inline: the offset inside a message has no alignment, and a copy this small is cheap.
        copy: Callable[[memoryview], Any] = bytearray if writable else bytes
        copies = [copy(buffer) for buffer in buffers]
        if writable and data.startswith(_MAGIC_FROZEN):
            return _loads_thawed(stream, copies)
        return pickle.loads(stream, buffers=copies)
    if writable and data[:4] == _MAGIC_FROZEN:
        import numpy

        return load_views(numpy.frombuffer(data, dtype=numpy.uint8), True)
    stream, buffers = split_frame(data)
    return pickle.loads(stream, buffers=buffers)


def load_views(base: Any, writable: bool) -> Any:
    """The value of a frame in an array of bytes; the value's buffers are views of it."""
    view = memoryview(base)
    stream, buffers = split_frame(view)
    if not writable or view[:4] != _MAGIC_FROZEN:
        return pickle.loads(stream, buffers=buffers)
    # Each buffer as an object of its own, for `thawed` to find.
    import numpy

    pieces = [numpy.frombuffer(buffer, dtype=numpy.uint8) for buffer in buffers]
    return _loads_thawed(stream, pieces)


def _loads_thawed(stream: memoryview, buffers: list[Any]) -> Any:
    return ThawingUnpickler(io.BytesIO(stream), buffers=buffers).load()


def split_frame(view: memoryview) -> tuple[memoryview, list[memoryview]]:
    """The pickle stream of a frame and its buffers, as views."""
    magic, count, data_bytes = _HEADER.unpack_from(view, 0)
    if magic not in (_MAGIC, _MAGIC_FROZEN):
        raise pickle.UnpicklingError(f"not a poolray frame: it starts with {bytes(view[:4])!r}")
    position = _HEADER.size
    lengths = []
    for _ in range(count):
        lengths.append(_LENGTH.unpack_from(view, position)[0])
        position += _LENGTH.size
    stream = view[position : position + data_bytes]
    position += data_bytes
    buffers = []
    for length in lengths:
        position = _aligned(position)
        buffers.append(view[position : position + length])
        position += length
    return stream, buffers


def main_definitions() -> dict[str, object]:
    """Functions and classes that `__main__` defines now, by name (what a fork inherits)."""
    main = sys.modules.get("__main__")
    return {
        name: value
        for name, value in vars(main).items()
        if isinstance(value, (types.FunctionType, type))
        and getattr(value, "__module__", None) == "__main__"
    }
