"""Calls of the shared library's handlers from NumPy, with neither XLA nor JAX in between.

The handlers, their operands, results and attributes are those that the library describes itself
with. XLA's side of a call is that of the fuzzer, fuzz/src/frame.cc.
"""

import ctypes
import json
import os
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np

SOURCE = Path(__file__).parents[1] / "fuzz" / "src" / "frame.cc"

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

# XLA_FFI_DataType
_DTYPES = {
    np.dtype(np.float16): 10,
    np.dtype(np.float32): 11,
    np.dtype(np.float64): 12,
    BFLOAT16: 16,
}
_BUFFER, _SCALAR, _STRING = 1, 3, 4
_S64, _F64 = 5, 12


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("rank", ctypes.c_int64),
        ("dims", ctypes.c_void_p),
        ("data", ctypes.c_void_p),
    ]


class _Attribute(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("name_size", ctypes.c_size_t),
        ("kind", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("value", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
    ]


class _Pool(ctypes.Structure):
    _fields_ = [
        ("num_threads", ctypes.c_int64),
        ("schedule", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    ]


class _Call(ctypes.Structure):
    _fields_ = [
        ("handler", ctypes.c_size_t),
        ("args", ctypes.POINTER(_Buffer)),
        ("num_args", ctypes.c_size_t),
        ("rets", ctypes.POINTER(_Buffer)),
        ("num_rets", ctypes.c_size_t),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_size_t),
        ("pool", ctypes.POINTER(_Pool)),
        ("message", ctypes.c_char_p),
        ("message_size", ctypes.c_size_t),
    ]


class Handlers:
    """The handlers for CPUs of a shared library."""

    def __init__(self, library: Path, headers: Path, build: Path):
        """Loads the library, and compiles XLA's side of a call.

        Args:
            library: the shared library.
            headers: folder of XLA's FFI headers, of any version.
            build: folder for what is compiled.
        """
        shim = build / "frame.so"
        compiler = os.environ.get("CXX", "c++")
        options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-isystem", str(headers)]
        subprocess.run([compiler, *options, str(SOURCE), "-o", str(shim)], check=True)
        self._call_frame = ctypes.CDLL(str(shim)).jax_mhc_call_frame
        describe = ctypes.CDLL(str(library)).jax_mhc_describe
        describe.restype = ctypes.c_char_p
        self.description = json.loads(describe())
        version = self.description["target_version"]
        self._addresses = {
            handler["name"]: handler["address"]
            for handler in self.description["handlers"]
            if handler["platform"] == "cpu"
        }
        self._rows = {call["name"]: call for call in self.description["calls"]}
        self._groups = set(self.description["groups"])
        self._suffix = f"_v{version}"
        self._pool = _Pool(num_threads=1)
        self._message = ctypes.create_string_buffer(4096)
        self.num_calls = 0

    def call(self, name, given, sizes, settings):
        """Runs a call.

        Args:
            name: such as `pre_fwd`.
            given: arrays by name, those of the operands and perhaps others. The first operand has
                the dtype of the streams.
            sizes: `tokens`, a tuple, and the letters of docs/calls.md: n, C, K, A.
            settings: attributes by name, those of the call and perhaps others. Operands and results
                of a group whose attribute is 0 are not in the call.

        Returns:
            The results by name, which hold NaN where nothing was written.

        Raises:
            ValueError: the handler refused the call.
        """
        row = self._rows[name]
        sizes = {**sizes, "1": 1}
        names = {attribute["name"] for attribute in row["attributes"]}
        absent = {group for group in self._groups & names if not settings[group]}
        operands = [given[value["name"]] for value in _present(row["operands"], absent)]
        streams = operands[0].dtype
        wide = np.dtype(np.float64 if streams == np.float64 else np.float32)
        results = {}
        for value in _present(row["results"], absent):
            lead = sizes["tokens"] if value["has_tokens"] else ()
            shape = (*lead, *(sizes[letter] for letter in value["dims"]))
            dtype = streams if value["precision"] == "streams" else wide
            results[value["name"]] = np.full(shape, np.nan, dtype)
        args, keep_args = _buffers(operands)
        rets, keep_rets = _buffers(list(results.values()))
        attributes, keep_values = _attributes(row["attributes"], settings)
        call = _Call(
            handler=self._addresses[f"jax_mhc_{name}{self._suffix}"],
            args=args,
            num_args=len(args),
            rets=rets,
            num_rets=len(rets),
            attributes=attributes,
            num_attributes=len(attributes),
            pool=ctypes.pointer(self._pool),
            message=ctypes.cast(self._message, ctypes.c_char_p),
            message_size=len(self._message),
        )
        self.num_calls += 1
        code = self._call_frame(ctypes.byref(call))
        del keep_args, keep_rets, keep_values
        if code:
            raise ValueError(f"code {code}: {self._message.value.decode()}")
        return results


def _present(values, absent):
    """The values of a row, in order, without those of absent groups."""
    return [value for value in values if value["group"] not in absent]


def _buffers(arrays):
    """The arrays as buffers, and what these point to."""
    buffers = (_Buffer * len(arrays))()
    keep = []
    for buffer, array in zip(buffers, arrays, strict=True):
        assert array.flags["C_CONTIGUOUS"], "a handler takes dense arrays"
        dims = (ctypes.c_int64 * array.ndim)(*array.shape)
        keep += [dims, array]
        buffer.kind = _BUFFER
        buffer.dtype = _DTYPES[array.dtype]
        buffer.rank = array.ndim
        buffer.dims = ctypes.addressof(dims)
        buffer.data = array.ctypes.data
    return buffers, keep


def _attributes(row, settings):
    """The attributes in XLA's order, and what they point to."""
    types = {attribute["name"]: attribute["type"] for attribute in row}
    attributes = (_Attribute * len(types))()
    keep = []
    for attribute, name in zip(attributes, sorted(types), strict=True):
        attribute.name, attribute.name_size = name.encode(), len(name)
        if types[name] == "string":
            text = settings[name].encode()
            value = ctypes.create_string_buffer(text)
            attribute.kind, attribute.size = _STRING, len(text)
        elif types[name] == "int64":
            value = ctypes.c_int64(settings[name])
            attribute.kind, attribute.dtype, attribute.size = _SCALAR, _S64, 1
        else:
            value = ctypes.c_double(settings[name])
            attribute.kind, attribute.dtype, attribute.size = _SCALAR, _F64, 1
        attribute.value = ctypes.addressof(value)
        keep.append(value)
    return attributes, keep
