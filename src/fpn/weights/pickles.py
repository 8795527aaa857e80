"""Other libraries' pickled checkpoints, read without Python's unpickler, so that no code in them can run.

`read_pickle` is for detectron2's `.pkl` files of numpy arrays: it goes through the opcodes itself and makes nothing but
plain values and tensors. `read_torch` is for `.pth` files, with torch's restricted reader.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from fpn.errors import CheckpointError

# numpy's codes of the element types that torch has too.
NUMBERS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1")


class Refused(Exception):
    """The pickle wants something that a file of arrays does not need."""


# What readers raise for files that are damaged or made to do harm.
UNREADABLE = (
    Refused,
    SafetensorError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def reason_of(error: BaseException) -> str:
    """Why a file cannot be read, in a few words; without the advice of torch to let the file run its code."""
    text = str(error).strip()
    if refused := re.search(r"GLOBAL ([\w.]+)", text):
        return f"it asks for {refused[1][:200]}, which weights do not need"
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    if not text or not isinstance(error, Refused | SafetensorError | OSError | RuntimeError):
        return "damaged, or of another kind"
    return text.splitlines()[0][:200]


def there(path: str | Path) -> Path:
    """The path of a file. Raises CheckpointError where there is none."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    return path


def read_pickle(path: str | Path) -> Any:
    """What a pickle holds: mappings with names as keys, lists, tuples, texts, numbers, and numpy arrays as tensors.

    The arrays take up no more memory than a few times the size of the file. Raises CheckpointError for anything else
    in it.
    """
    path = there(path)
    try:
        # From memory: a file would try to make room for all the bytes that a pickle claims to have.
        content = path.read_bytes()
        return Machine(budget=2 * len(content)).run(content)
    except UNREADABLE as error:
        raise CheckpointError(f"{path}: not a pickle of plain numbers and arrays ({reason_of(error)})") from error


@dataclass(frozen=True)
class Name:
    """A function or class that the pickle names; only those of `Machine.call` mean anything."""

    text: str


@dataclass
class Array:
    """A numpy array on its way: numpy makes it empty first and fills it by `Machine.build`."""

    value: torch.Tensor | None = None


@dataclass
class Dtype:
    """The type of an array's elements, as numpy's code for it."""

    code: str


@dataclass
class Machine:
    """The stack machine that pickles are written for, with no more instructions than files of arrays need.

    budget: bytes that may still be copied out of the pickle; a small file could ask for one array a thousand times.
        Protocol 2 needs two copies of an array, of its text and of its bytes.
    """

    budget: int
    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def run(self, content: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name == "STOP":
                if len(self.stack) != 1 or self.marks:
                    raise Refused("it ends in the middle of something")
                return plain(self.stack[0])
            self.step(opcode.name, argument)
        raise Refused("it ends too early")

    def step(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.marks.append(len(stack))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[opcode]())
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self.top(int(opcode[-1]))))
            case "TUPLE":
                stack.append(tuple(self.marked()))
            case "APPEND" | "APPENDS":
                values = self.top(1) if opcode == "APPEND" else self.marked()
                expect(stack[-1], list).extend(values)
            case "SETITEM" | "SETITEMS":
                values = self.top(2) if opcode == "SETITEM" else self.marked()
                for key, value in zip(values[::2], values[1::2], strict=True):
                    # No tuples: the hash of one that holds itself many times over takes forever.
                    expect(stack[-1], dict)[expect(key, str, int)] = value
            case "GLOBAL":
                stack.append(Name(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                names = [expect(part, str) for part in self.top(2)]
                if sum(map(len, names)) > 200:  # the whole name is a copy that nothing pays for
                    raise Refused("it names something at great length")
                stack.append(Name(".".join(names)))
            case "REDUCE":
                function, arguments = self.top(2)
                stack.append(self.call(expect(function, Name).text, expect(arguments, tuple)))
            case "BUILD":
                (state,) = self.top(1)
                self.build(stack[-1], state)
            case _ if opcode.startswith(("BININT", "BINFLOAT", "LONG", "BINBYTES", "SHORT_BIN", "BINUNI", "BINSTR")):
                # Integers of megabytes would take forever to count with.
                if isinstance(argument, int) and not -(2**63) <= argument < 2**64:
                    raise Refused("a number is too large")
                stack.append(argument)
            case "BYTEARRAY8":
                stack.append(bytes(argument))
            case _:
                raise Refused(f"the instruction {opcode} has no place in it")

    def top(self, count: int) -> list[Any]:
        """Take the last `count` values off the stack."""
        if count > len(self.stack):
            raise Refused("its stack is empty")
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def marked(self) -> list[Any]:
        """Take off what was put on the stack since the last mark."""
        return self.top(count) if (count := len(self.stack) - self.marks.pop()) else []

    def call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """What the few known functions give, made by ourselves."""
        match name.replace("numpy._core.", "numpy.core."), arguments:
            case "numpy.core.multiarray._reconstruct", (Name("numpy.ndarray"), _, _):
                return Array()
            case "numpy.core.numeric._frombuffer", (data, Dtype(code), shape, order):
                return Array(self.array(data, code, shape, order == "F"))
            case "numpy.core.multiarray.scalar", (Dtype(code), data):
                return self.array(data, code, (), False).item()
            case "numpy.dtype", (str(code), *_):
                return Dtype(code)
            case "_codecs.encode", (str(text), "latin1"):  # how protocol 2 writes bytes
                return self.paid(len(text)) and text.encode("latin1")
            case "__builtin__.bytes", ():
                return b""
            case "collections.OrderedDict", ():
                return {}
        raise Refused(f"it calls {name}")

    def build(self, item: Any, state: Any) -> None:
        match item, state:
            case Array(), (_, tuple(shape), Dtype(code), fortran, data):
                item.value = self.array(data, code, shape, bool(fortran))
            case Dtype(), (_, str(order), None, None, None, -1, -1, 0) if order in "<|=":
                pass
            case _:
                raise Refused(f"it sets the state of a {type(item).__name__} in a way that arrays of numbers do not")

    def array(self, data: Any, code: str, shape: Any, fortran: bool) -> torch.Tensor:
        if code not in NUMBERS:
            raise Refused(f"an array has elements of type {code!r}; there may be {', '.join(NUMBERS)}")
        data = expect(data, bytes, str)
        data = data.encode("latin1") if isinstance(data, str) else data  # Python 2's texts are bytes
        if len(expect(shape, tuple)) > 64 or not all(0 <= expect(length, int) < 2**40 for length in shape):
            raise Refused("an array has a shape that no array can have")
        if math.prod(shape) * int(code[1]) != len(data):
            raise Refused(f"an array of shape {shape} and type {code} has {len(data)} bytes of data")
        self.paid(len(data))
        array = np.frombuffer(data, code).reshape(shape, order="F" if fortran else "C")
        return torch.from_numpy(array.copy(order="C"))

    def paid(self, count: int) -> bool:
        self.budget -= count
        if self.budget < 0:
            raise Refused("its arrays are larger than the file")
        return True


def expect(value: Any, *kinds: type) -> Any:
    if type(value) not in kinds:
        raise Refused(f"a {type(value).__name__} stands where a {kinds[0].__name__} belongs")
    return value


def plain(value: Any) -> Any:
    """Arrays as their tensors, in up to two levels of mappings; deeper no checkpoint of detectron2 has any."""
    if isinstance(value, dict):
        return {
            key: {k: tensor_of(v) for k, v in inner.items()} if isinstance(inner, dict) else tensor_of(inner)
            for key, inner in value.items()
        }
    return tensor_of(value)


def tensor_of(value: Any) -> Any:
    if isinstance(value, Array) and value.value is None:
        raise Refused("an array has no data")
    return value.value if isinstance(value, Array) else value


class Opaque:
    """Takes the place of every foreign object in a `.pth` file; whatever the file does with it has no effect."""

    def __new__(cls, *arguments: Any, **named: Any) -> Opaque:
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **named: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def read_torch(path: str | Path) -> Any:
    """What a file of `torch.save` holds, tensors on the CPU; objects other than tensors and plain values as `Opaque`.

    Training scripts leave objects of their own beside the weights. torch's restricted reader would refuse the file
    for them; here each class that the file names is answered with `Opaque`, which does nothing.
    """
    path = there(path)
    try:
        foreign = [name for name in names_in(path) if not name.startswith(("torch.", "collections."))]
        stand_ins: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [(Opaque, name) for name in foreign]
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise CheckpointError(f"{path}: not a readable weights file ({reason_of(error)})") from error


def names_in(path: Path) -> set[str]:
    """Every class and function that a file of `torch.save` names, without reading anything else of it.

    Such a file is a zip archive with one pickle, or, in the form from before torch 1.6, five pickles and the raw data.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            # torch compresses nothing; a small file could otherwise unpack to fill the memory.
            if any(part.compress_type for part in parts) or sum(part.file_size for part in parts) > path.stat().st_size:
                raise Refused("an archive that holds more than its size")
            inside = next((name for name in archive.namelist() if name.endswith("data.pkl")), None)
            if inside is None:
                raise Refused("an archive without data.pkl")
            pickles, count = io.BytesIO(archive.read(inside)), 1
    else:
        pickles, count = io.BytesIO(path.read_bytes()), 5
    names: set[str] = set()
    for _ in range(count):
        names |= {str(a).replace(" ", ".") for opcode, a, _ in pickletools.genops(pickles) if opcode.name == "GLOBAL"}
    return names
