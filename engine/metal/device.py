"""Metal through ctypes: every call is a message to an Objective-C object, real or emulated; no extension is built."""
from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from ctypes import byref, c_bool, c_char_p, c_double, c_float, c_int, c_uint, c_uint64, c_void_p
from math import prod
from typing import Any

from ..errors import UserError
from . import msl
from .steps import Dispatch, Unsupported

P, U = c_void_p, c_uint64
# What each message returns, and what it takes beside the receiver and the selector.
MESSAGES: dict[str, tuple[Any, ...]] = {
    "new": (P,), "retain": (P,), "release": (None,), "respondsToSelector:": (c_bool, P),
    "stringWithUTF8String:": (P, c_char_p), "UTF8String": (c_char_p,), "localizedDescription": (P,),
    "setLanguageVersion:": (None, U), "setMathMode:": (None, U), "setMathFloatingPointFunctions:": (None, U),
    "setFastMathEnabled:": (None, c_bool),
    "setConstantValue:type:withName:": (None, P, U, P),
    "name": (P,), "architecture": (P,), "recommendedMaxWorkingSetSize": (U,), "maxBufferLength": (U,),
    "newCommandQueue": (P,), "newFence": (P,), "newLibraryWithSource:options:error:": (P, P, P, P),
    "newFunctionWithName:constantValues:error:": (P, P, P, P),
    "newComputePipelineStateWithFunction:error:": (P, P, P), "maxTotalThreadsPerThreadgroup": (U,),
    "newBufferWithLength:options:": (P, U, U), "newBufferWithBytesNoCopy:length:options:deallocator:": (P, P, U, U, P),
    "contents": (P,), "newResidencySetWithDescriptor:error:": (P, P, P), "addResidencySet:": (None, P),
    "addAllocation:": (None, P), "removeAllocation:": (None, P), "commit": (None,), "requestResidency": (None,),
    "waitUntilCompleted": (None,), "error": (P,), "GPUStartTime": (c_double,), "GPUEndTime": (c_double,),
}
CONSTANTS: dict[str, Any] = {"float": c_float, "int": c_int, "uint": c_uint, "bool": c_bool}
# Metal 3.1 is the first with bfloat; NaN and infinity mean what IEEE 754 says; exp and its like are good to 4 ulp.
OPTIONS = {"setLanguageVersion:": 3 << 16 | 1, "setFastMathEnabled:": 0, "setMathMode:": 0,
           "setMathFloatingPointFunctions:": 1}
SHARED_UNTRACKED = 0x100             # MTLResourceOptions: the host sees it, and barriers and a fence order its use


class Objc:
    """The Objective-C runtime: the real one, or the emulated one, of one library. Nothing else tells them apart."""

    def __init__(self, runtime: ctypes.CDLL, metal: ctypes.CDLL) -> None:
        self._selector, self._class = runtime.sel_registerName, runtime.objc_getClass
        self._push, self._pop = runtime.objc_autoreleasePoolPush, runtime.objc_autoreleasePoolPop
        self.system_device = metal.MTLCreateSystemDefaultDevice
        for function, result, *arguments in ((self._selector, P, c_char_p), (self._class, P, c_char_p),
                                             (self._push, P), (self._pop, None, P), (self.system_device, P)):
            function.restype, function.argtypes = result, arguments
        self.address: int = ctypes.cast(runtime.objc_msgSend, P).value or 0

    @functools.cache  # noqa: B019 - one object a process
    def selector(self, name: str) -> int:
        return self._selector(name.encode())

    @functools.cache  # noqa: B019
    def _message(self, name: str) -> tuple[Any, int]:
        result, *arguments = MESSAGES[name]
        return ctypes.CFUNCTYPE(result, P, P, *arguments)(self.address), self.selector(name)

    def send(self, receiver: int | None, name: str, *arguments: Any) -> Any:
        """[receiver name: arguments]. Objects are addresses; those of new… are the caller's to release."""
        function, selector = self._message(name)
        return function(receiver, selector, *arguments)

    def new(self, name: str) -> int:
        return self.send(self._class(name.encode()), "new")

    def string(self, text: str) -> int:
        """An NSString that the pool around releases."""
        return self.send(self._class(b"NSString"), "stringWithUTF8String:", text.encode())

    def text(self, string: int | None) -> str:
        return self.send(string, "UTF8String").decode() if string else ""

    def responds(self, receiver: int, name: str) -> bool:
        return self.send(receiver, "respondsToSelector:", self.selector(name))

    @contextlib.contextmanager
    def own(self, made: int) -> Iterator[int]:
        """An object that is released at the end of the block."""
        try:
            yield made
        finally:
            self.send(made, "release")

    @contextlib.contextmanager
    def pool(self) -> Iterator[None]:
        """Objects that Objective-C hands out without giving them away live until the end of the block."""
        pool = self._push()
        try:
            yield
        finally:
            self._pop(pool)

    def made(self, receiver: int, name: str, *arguments: Any, what: str = "") -> int:
        """The object that a message with a last argument `error:` makes. RuntimeError with the error's own text."""
        error = c_void_p()
        made = self.send(receiver, name, *arguments, byref(error))
        if not made:
            why = self.text(self.send(error.value, "localizedDescription")) or "no reason given"
            raise RuntimeError(f"[metal] {what}: {why}")
        return made


def objc(emulated: bool) -> Objc:
    """The libraries. UserError where there is no Metal."""
    if emulated:
        from .emulated import load
        return Objc(load(), load())
    if sys.platform != "darwin":
        raise UserError(f"[metal] there is no Metal on {sys.platform}", "LAZULITE_METAL=emulated runs it on the CPU")
    # Without CoreGraphics a command-line process has no default device.
    *_, metal = (ctypes.CDLL(f"/System/Library/Frameworks/{name}.framework/{name}")
                 for name in ("Foundation", "CoreGraphics", "Metal"))
    return Objc(ctypes.CDLL("/usr/lib/libobjc.A.dylib"), metal)


class Device:
    """The GPU: its limits, one command queue, and pipelines, compiled when first asked for and kept."""

    def __init__(self, runtime: Objc) -> None:
        self.objc, send = runtime, runtime.send
        self.handle: int = runtime.system_device() or 0
        if not self.handle:
            raise UserError("[metal] this machine has no GPU that Metal can use", "choose the CPU: LAZULITE_DEVICE=cpu")
        with runtime.pool():
            self.name = runtime.text(send(self.handle, "name"))
            architecture = runtime.responds(self.handle, "architecture") and send(self.handle, "architecture")
            self.architecture = runtime.text(send(architecture, "name")) if architecture else self.name
            self.working_set: int = send(self.handle, "recommendedMaxWorkingSetSize")
            self.longest_buffer: int = send(self.handle, "maxBufferLength")
            self.queue: int = send(self.handle, "newCommandQueue")
            self.fence: int = send(self.handle, "newFence")
            self.residency, self.changed = self._residency(), False
        self._libraries: dict[str, int] = {}
        self._pipelines: dict[Any, tuple[int, int]] = {}     # and the most threads

    def _residency(self) -> int:
        """The set of buffers that stay wired between command buffers (macOS 15), or 0."""
        name = "newResidencySetWithDescriptor:error:"
        if not self.objc.responds(self.handle, name):
            return 0
        with self.objc.own(self.objc.new("MTLResidencySetDescriptor")) as descriptor:
            made = self.objc.made(self.handle, name, descriptor, what="residency set")
        self.objc.send(self.queue, "addResidencySet:", made)
        return made

    def compile(self, dispatches: Iterable[Dispatch]) -> None:
        """Makes the libraries of all dispatches side by side, since a compiler takes its time."""
        files = {text(d): d.file for d in dispatches}
        if wanted := [source for source in files if source not in self._libraries]:
            with ThreadPoolExecutor(os.cpu_count()) as threads:
                made = threads.map(lambda source: self._library(source, files[source]), wanted)
                self._libraries |= zip(wanted, made, strict=True)

    def _library(self, source: str, file: str) -> int:
        with self.objc.pool(), self.objc.own(self.objc.new("MTLCompileOptions")) as options:
            for name, value in OPTIONS.items():
                if self.objc.responds(options, name):
                    self.objc.send(options, name, value)
            return self.objc.made(self.handle, "newLibraryWithSource:options:error:", self.objc.string(source), options,
                                  what=f"{file}.metal")

    def pipeline(self, d: Dispatch) -> int:
        """The compiled function of a dispatch. Unsupported where the GPU cannot run it with so many threads."""
        key = d.source or d.file, d.function, tuple(d.defines.items()), tuple(d.constants.items())
        if key not in self._pipelines:
            self.compile([d])
            with self.objc.pool():
                made = self._pipeline(d)
            self._pipelines[key] = made, self.objc.send(made, "maxTotalThreadsPerThreadgroup")
        pipeline, most = self._pipelines[key]
        if prod(d.threads) > most:
            raise Unsupported(f"{d.function} needs {prod(d.threads)} threads a threadgroup, this GPU has {most}")
        return pipeline

    def _pipeline(self, d: Dispatch) -> int:
        objc, source, what = self.objc, text(d), f"{d.file}.metal, {d.function}"
        types = msl.parse(source).constants
        with objc.own(objc.new("MTLFunctionConstantValues")) as values:
            for name, value in d.constants.items():
                kind = types[name].type
                objc.send(values, "setConstantValue:type:withName:", byref(CONSTANTS[kind](value)),
                          msl.DATA_TYPES[kind], objc.string(name))
            function = objc.made(self._libraries[source], "newFunctionWithName:constantValues:error:",
                                 objc.string(d.function), values, what=what)
        with objc.own(function):
            return objc.made(self.handle, "newComputePipelineStateWithFunction:error:", function, what=what)

    def resident(self, change: str, buffer: int) -> None:
        """Adds a buffer to the set that stays wired, or takes it out; the next command buffer sees it."""
        self.objc.send(self.residency, change, buffer)
        self.changed = True

    def settle(self) -> None:
        """Makes the set's changes count."""
        if self.changed:
            self.objc.send(self.residency, "commit")
            self.objc.send(self.residency, "requestResidency")
            self.changed = False


def text(dispatch: Dispatch) -> str:
    """What the compiler reads for a dispatch."""
    return msl.source(dispatch.file, dispatch.defines, dispatch.source)
