"""The op mechanism: one op is one contract, several backends, and one ``autograd.Function``.

A *contract* is a Python function that checks its arguments and allocates its outputs. It is the
fake implementation; the real one is the contract, followed by a backend's *launcher*, which writes
into the outputs. Shapes, dtypes and error wording therefore cannot drift between eager mode,
``torch.compile`` and the backends.

    define("lora_linear", schema)    the contract becomes an operator of ``torch.ops.pyfastft``
    implement(op, backend)           a launcher: ``launch(*outputs, *inputs) -> None``
    differentiable(op)               an ``autograd.Function`` becomes the operator's derivative
    not_differentiable(op)           differentiating the operator raises

Backends are found by convention: the launchers of an op whose contract stands in
``pyfastft/ops/<family>.py`` stand in ``<folder of the backend>/<family>.py``, which is imported the
first time that backend is considered. Importing pyfastft therefore imports no Triton.

Dispatch between backends sits below the operator boundary: Dynamo never sees it, and switching
backend needs no recompilation.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import _C
from torch.autograd import forward_ad

NAMESPACE = "pyfastft"
ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
FOLDERS = {
    "cpu": "pyfastft.native",
    "cuda": "pyfastft.native",
    "triton": "pyfastft.triton_kernels",
    "reference": "pyfastft.reference",
}
BACKENDS = tuple(FOLDERS)

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
# Sparse tensors reach the contract too, which refuses them in its own words.
_KEYS = ("CPU", "CUDA", "SparseCPU", "SparseCUDA", "SparseCsrCPU", "SparseCsrCUDA")
_AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_log = logging.getLogger("pyfastft")

_Class = TypeVar("_Class", bound=type)
_Launch = TypeVar("_Launch", bound=Callable[..., None])


def _backend_name(name: str | None) -> str | None:
    if name is None or name in ("", "auto"):
        return None
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)} or auto, got {name!r}")
    return name


# Process-wide on purpose: the backward of a CUDA graph runs in autograd's own threads, where a
# context variable would be lost.
_forced: str | None = _backend_name(os.environ.get("PYFASTFT_BACKEND"))


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Force every op onto one backend, in the whole process, while the context is open.

    Args:
        name: ``"cpu"``, ``"cuda"``, ``"triton"``, ``"reference"``; ``None`` or ``"auto"`` restores
            the choice by device. ``PYFASTFT_BACKEND`` sets the same for a whole run.

    Raises:
        ValueError: there is no backend of that name.
    """
    global _forced
    previous, _forced = _forced, _backend_name(name)
    try:
        yield
    finally:
        _forced = previous


@dataclass(frozen=True)
class Impl:
    """A backend of an op: its launcher, the reason why it cannot take these arguments, and which of
    its engines would take them, where it has several."""

    launch: Callable[..., None]
    unsupported: Callable[..., str | None]
    engine: Callable[..., str | None] = lambda *args: None


@dataclass(frozen=True)
class Explanation:
    """Which backend an op would run on, and why each backend considered before it would not;
    ``engine`` says which of the backend's engines and why, where it has several."""

    op: str
    device: str
    chosen: str | None
    reasons: dict[str, str]
    engine: str | None = None

    def __str__(self) -> str:
        head = f"{self.op} on {self.device}: {self.chosen or 'no backend can run it'}"
        if self.engine is not None:
            head += f", engine {self.engine}"
        return "\n".join([head, *(f"  {name}: {why}" for name, why in self.reasons.items())])


@dataclass(eq=False)
class Op:
    """An operator: call it as the function it is. Built by :func:`define`."""

    name: str
    family: str
    contract: Callable[..., Any]
    parameters: tuple[str, ...]
    mutates: bool
    lists: bool  # takes or returns lists of tensors
    allocate: Callable[..., Any] | None = None  # the contract's outputs, without its checks
    mutated: tuple[int, ...] = ()  # which arguments it writes into
    overload: Any = None
    derivative: Any = None  # its autograd.Function
    eager: Any = None  # the same for the eager short way, which lists of tensors cannot take
    impls: dict[str, Impl | str] = field(default_factory=dict)

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or self.mutates or self.lists or not _is_plain(args):
            return self.overload(*args)
        if torch.is_grad_enabled() and _any_requires_grad(args):
            return self.overload(*args) if self.eager is None else self.eager.apply(*args)
        return self.run(*args)

    def run(self, *args: Any) -> Any:
        """The real implementation: the contract, then the backend that can take the arguments."""
        return self._launch(self.contract(*args), args)

    def run_backward(self, ctx: Any, grad: torch.Tensor, *args: Any) -> Any:
        """The op on (grad, *args) in a backward, where args come from the forward's own.

        On the eager short way the forward's contract has checked what was saved, and the engine
        has held the gradient to the output's shape, dtype and device: nothing is left to check. A
        backward that is to be differentiated itself goes through the op, which refuses.
        """
        if not getattr(ctx, "eager", False) or torch.is_grad_enabled() or not _is_plain((grad,)):
            return self(grad, *args)
        assert self.allocate is not None
        return self._launch(self.allocate(grad, *args), (grad, *args))

    def _launch(self, outputs: Any, args: tuple[Any, ...]) -> Any:
        launch = self.pick(args).launch
        if type(outputs) is tuple:
            launch(*outputs, *args)
        elif outputs is None:
            launch(*args)
        else:
            launch(outputs, *args)
        if self.mutates:
            # What autograd saved of them before must not pass for unchanged.
            torch.autograd.graph.increment_version(self.written(args))
        return outputs

    def written(self, args: tuple[Any, ...]) -> list[torch.Tensor]:
        """The tensors among the arguments that the op writes into."""
        tensors: list[torch.Tensor] = []
        for one in (args[position] for position in self.mutated):
            tensors += one if isinstance(one, list | tuple) else (one,)
        return tensors

    def impl(self, backend: str) -> Impl | str:
        """The backend's implementation, or the reason why there is none on this machine."""
        found = self.impls.get(backend)
        if found is None:
            module = f"{FOLDERS[backend]}.{self.family}"
            found = f"{self.name} has no {backend} implementation"
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:
                if error.name != module:
                    found = f"{module} cannot be imported: {error}"
            except ImportError as error:
                found = f"{module} cannot be imported: {error}"
            found = self.impls.setdefault(backend, found)
        return found

    def pick(self, args: tuple[Any, ...]) -> Impl:
        """The first backend of the device's order that can take the arguments."""
        device = _device_of(args)
        reasons: list[str] = []
        for name in ORDER[device] if _forced is None else (_forced,):
            found = self.impls.get(name) or self.impl(name)
            why = found if isinstance(found, str) else found.unsupported(*args)
            if why is None:
                if reasons and name == "reference":
                    self._fell_back(reasons, args, device)
                return found  # type: ignore[return-value]
            reasons.append(f"  {name}: {why}")
        raise NotImplementedError(
            f"{self.name}: no backend supports ({self._describe(args)}) on {device}\n"
            + "\n".join(reasons)
        )

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        """See :func:`explain`."""
        bound = inspect.signature(self.contract).bind(*args, **kwargs)
        bound.apply_defaults()
        values = tuple(bound.arguments.values())
        device = _device_of(values)
        reasons: dict[str, str] = {}
        for name in ORDER[device] if _forced is None else (_forced,):
            found = self.impl(name)
            why = found if isinstance(found, str) else found.unsupported(*values)
            if why is None:
                engine = found.engine(*values)  # type: ignore[union-attr]
                return Explanation(self.name, device, name, reasons, engine)
            reasons[name] = why
        return Explanation(self.name, device, None, reasons)

    def _fell_back(self, reasons: list[str], args: tuple[Any, ...], device: str) -> None:
        message = (
            f"{self.name}: the reference runs ({self._describe(args)}) on {device}\n"
            + "\n".join(reasons)
        )
        if os.environ.get("PYFASTFT_STRICT") == "1":
            raise NotImplementedError(f"{message}\n  PYFASTFT_STRICT=1 allows no fallback")
        key = (self.name, tuple(reasons))
        if key not in _fallbacks_told:
            _fallbacks_told.add(key)
            _log.warning("%s", message)

    def _describe(self, args: tuple[Any, ...]) -> str:
        return ", ".join(
            f"{name}={tuple(arg.shape)}:{str(arg.dtype).removeprefix('torch.')}"
            for name, value in zip(self.parameters, args, strict=False)
            for arg in (value if isinstance(value, list | tuple) else (value,))
            if isinstance(arg, torch.Tensor)
        )


def _device_of(args: tuple[Any, ...]) -> str:
    for arg in args:
        first = arg[0] if isinstance(arg, list | tuple) and arg else arg
        if isinstance(first, torch.Tensor):
            return first.device.type
    raise TypeError("expected a tensor among the arguments, got none")


REGISTRY: dict[str, Op] = {}
_fallbacks_told: set[tuple[str, tuple[str, ...]]] = set()


def define(
    schema: str, *, autocast: Collection[str] = (), allocate: Callable[..., Any] | None = None
) -> Callable[[Callable[..., Any]], Op]:
    """Make an operator of a contract.

    Args:
        schema: the operator's signature in PyTorch's schema language, without its name; the
            parameters in the contract's order.
        autocast: the parameters that ``torch.autocast`` casts. What is not named keeps its dtype.
        allocate: the part of the contract that makes the outputs, of the same arguments. An op with
            one can be called by :meth:`Op.run_backward`.
    """

    def decorate(contract: Callable[..., Any]) -> Op:
        name = contract.__name__
        op = Op(
            name=name,
            family=contract.__module__.split(".")[2],
            contract=contract,
            parameters=tuple(inspect.signature(contract).parameters),
            mutates="!" in schema,
            lists="Tensor[]" in schema,
            allocate=allocate,
        )
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{NAMESPACE}::{name}", contract, lib=_LIBRARY)
        for key in _KEYS:
            _LIBRARY.impl(name, op.run, key)
        op.overload = getattr(getattr(torch.ops, NAMESPACE), name).default
        op.mutated = tuple(
            position
            for position, argument in enumerate(op.overload._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        )
        if autocast:
            for device in ("cpu", "cuda"):
                key = f"Autocast{device.upper()}"
                _LIBRARY.impl(name, _autocast(op, device, frozenset(autocast)), key)
        op.__doc__ = contract.__doc__
        REGISTRY[name] = op
        return op

    return decorate


def _autocast(op: Op, device: str, names: Collection[str]) -> Callable[..., Any]:
    def cast(arg: Any, dtype: torch.dtype) -> Any:
        if isinstance(arg, list | tuple):
            return [cast(one, dtype) for one in arg]
        if isinstance(arg, torch.Tensor) and arg.dtype in _AUTOCAST_DTYPES:
            return arg.to(dtype)
        return arg

    def cast_and_call(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        with torch.amp.autocast(device, enabled=False):
            return op.overload(
                *(
                    cast(arg, dtype) if name in names else arg
                    for name, arg in zip(op.parameters, args, strict=False)
                )
            )

    return cast_and_call


def implement(
    name: str,
    backend: str,
    *,
    unsupported: Callable[..., str | None] = lambda *args: None,
    engine: Callable[..., str | None] = lambda *args: None,
) -> Callable[[_Launch], _Launch]:
    """Register the decorated launcher as one backend of an op.

    Args:
        name: the op.
        backend: one of :data:`BACKENDS`.
        unsupported: takes the op's arguments and returns why this backend cannot run them, or
            ``None`` where it can. The only predicate that a backend has.
        engine: takes the same and says which of the backend's engines would run, and why.
    """

    def decorate(launch: _Launch) -> _Launch:
        REGISTRY[name].impls[backend] = Impl(launch, unsupported, engine)
        return launch

    return decorate


def differentiable(name: str) -> Callable[[_Class], _Class]:
    """Make the decorated ``autograd.Function`` the derivative of an op.

    The class has ``forward``, ``setup_context`` and ``backward`` as static methods. It serves as a
    drop-in by itself, is registered as the operator's autograd formula, and gives the eager short
    way its adapter: a Function whose ``forward`` takes ``ctx`` costs a quarter of one with
    ``setup_context`` to apply. An op with lists of tensors has the formula alone, without
    ``forward``: a Function does not see tensors in lists.
    """

    def decorate(function: _Class) -> _Class:
        op = REGISTRY[name]
        torch.library.register_autograd(
            f"{NAMESPACE}::{name}",
            function.backward,  # type: ignore[attr-defined]
            setup_context=function.setup_context,  # type: ignore[attr-defined]
            lib=_LIBRARY,
        )
        op.derivative = function
        if op.lists:
            return function

        def forward(ctx: Any, *args: Any) -> Any:
            ctx.eager = True
            outputs = op.run(*args)
            function.setup_context(ctx, args, outputs)  # type: ignore[attr-defined]
            return outputs

        op.eager = type(
            f"{function.__name__}Eager",
            (torch.autograd.Function,),
            {
                "forward": staticmethod(forward),
                "backward": staticmethod(function.backward),  # type: ignore[attr-defined]
            },
        )
        return function

    return decorate


def needs_of(ctx: Any, inputs: tuple[Any, ...]) -> list[Any]:
    """``ctx.needs_input_grad`` of an op with lists as it stands in ``setup_context``, one flag per
    input, or one list of flags for a list of tensors: there torch has them in one flat tuple.
    """
    flags = iter(ctx.needs_input_grad)
    return [
        [next(flags) for _ in value]
        if isinstance(value, list) and all(isinstance(one, torch.Tensor) for one in value)
        else next(flags)
        for value in inputs
    ]


def not_differentiable(name: str, why: str = "double backward is not implemented") -> None:
    """Make differentiating an op an error; a plain operator only warns, then may be wrong."""

    def backward(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(f"{name}: {why}")

    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, lib=_LIBRARY)


def explain(op: str | Op | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend would run an op on these arguments, and why the others would not.

    Args:
        op: an op's name, or the function of :mod:`pyfastft.functional` that calls it.
        *args, **kwargs: the op's arguments. Nothing is computed.

    Raises:
        KeyError: there is no op of that name.
    """
    name = op if isinstance(op, str) else getattr(op, "name", None) or getattr(op, "__name__", "")
    if name not in REGISTRY:
        raise KeyError(f"explain: expected an op of {', '.join(sorted(REGISTRY))}, got {name!r}")
    return REGISTRY[name].explain(*args, **kwargs)


# -- the eager short way ---------------------------------------------------------------------------
# Through the dispatcher a call costs about 10 microseconds, with autograd twice that. What the
# dispatcher does for plain tensors in plain eager mode is nothing, so there the op is called
# directly. Whatever could want to intercept the call sends it the long way.


def _keyset(device: str, *wrappers: str) -> int:
    names = (device, f"Autocast{device}", *wrappers)
    keys = (getattr(_C.DispatchKey, name) for name in names)
    keyset = _C.DispatchKeySet(next(keys))
    for key in keys:
        keyset = keyset.add(key)
    return keyset.raw_repr()


# A plain tensor has these dispatch keys and no others; a wrapped, negated, sparse, quantized, fake
# or meta tensor differs. The shorter sets are those of tensors made in inference mode.
_PLAIN_KEYSETS = frozenset(
    keyset
    for device in ("CPU", "CUDA")
    for keyset in (
        _keyset(device, "ADInplaceOrView", f"Autograd{device}"),
        _keyset(device),
    )
)


def _is_plain(args: tuple[Any, ...]) -> bool:
    if (
        _C._is_any_autocast_enabled()
        or _C._len_torch_dispatch_stack()
        or _C._len_torch_function_stack()
        or _C._functorch.peek_interpreter_stack() is not None
        or _C._get_tracing_state() is not None
        or _C._autograd._profiler_enabled()
        or forward_ad._current_level >= 0
    ):
        return False
    for arg in args:
        kind = type(arg)
        if kind is torch.nn.Parameter:
            # No mode or transform wraps into this type, and the contract sees layout and device.
            if arg.is_neg():
                return False
        elif kind is torch.Tensor:
            if _C._dispatch_keys(arg).raw_repr() not in _PLAIN_KEYSETS:
                return False
        elif isinstance(arg, torch.Tensor):
            return False
    return True


def _any_requires_grad(args: tuple[Any, ...]) -> bool:
    for arg in args:  # noqa: SIM110 - a generator would cost as much as the loop
        if isinstance(arg, torch.Tensor) and arg.requires_grad:
            return True
    return False
