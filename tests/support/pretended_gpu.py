"""A pretended CUDA device, on a torch without CUDA.

    with PretendedGPU(cards=2) as gpu:
        editor = load_editor("miniature", device="cuda")
        ...
    assert not gpu.reads and not gpu.copies

Tensors on it hold real values, computed by the CPU, and say `cuda:0`. It is strict where CUDA is: an operation on tensors of
two devices, a CPU generator for a tensor on the device, numpy of such a tensor, and an index beyond the cards are errors. It
counts in `gpu.reads` every call that makes the host wait for a value (item, tolist, copies to the host, masks as indices), and
in `gpu.copies` every copy from the host for which it waits, and in `gpu.sent` those from pinned memory, for which it does
not; each under the lines of the package that caused it. `gpu.limit` is its memory in
bytes: beyond it an operation is a torch.OutOfMemoryError, as `gpu.live` and `gpu.peak` count. `gpu.before(name, tensors)`
is called before each operation and may raise.

Carriers are wrapper tensors of torch's meta device, which autograd handles in the calling thread. It does not pretend streams,
TF32, or kernels: what a real card computes differently is for tools/gpu_check.py on a real card.
"""

import collections
import contextlib
import sys
import weakref
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

PACKAGE = tuple(str(Path(__file__).resolve().parents[2] / folder) for folder in ("sifm_min", "models"))
aten = torch.ops.aten
READS = {aten._local_scalar_dense.default: "item", aten.nonzero.default: "nonzero", aten.equal.default: "equal",
         aten.masked_select.default: "masked_select", aten.is_nonzero.default: "bool"}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
COPYING = {aten.copy_.default, aten._to_copy.default}


def _where():
    """The two innermost lines of the package that are running."""
    frame, found = sys._getframe(1), []
    while frame and len(found) < 2:
        code = frame.f_code
        if code.co_filename.startswith(PACKAGE):
            found.append(f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back
    return " < ".join(found) or "outside"


class OnCard(torch.Tensor):
    """A tensor on the pretended device: `value` is the CPU tensor that it stands for."""

    @staticmethod
    def __new__(cls, value, gpu):
        self = torch.Tensor._make_wrapper_subclass(
            cls, value.size(), strides=value.stride(), storage_offset=value.storage_offset(), dtype=value.dtype,
            layout=value.layout, device="meta")
        self.value, self.gpu = value, gpu
        gpu.hold(self, value)
        return self

    device = property(lambda self: torch.device("cuda:0"))
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    def __repr__(self, **options):
        return f"OnCard({self.value!r})"

    def get_device(self):
        return 0

    def numpy(self, *args, **options):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory "
                        "first.")

    __array__ = numpy

    def tolist(self):
        self.gpu.read("tolist")
        return self.value.detach().tolist()

    def data_ptr(self):
        return self.value.data_ptr()

    def untyped_storage(self):                               # another than that of any CPU tensor
        return self.value.clone().untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        gpu = next(tensor.gpu for tensor in _tensors(args, kwargs) if isinstance(tensor, OnCard))
        return gpu.call(function, args, kwargs)

    __torch_function__ = torch._C._disabled_torch_function_impl


class PretendedGPU(contextlib.AbstractContextManager):
    """The device while the `with` lasts; see the module."""

    def __init__(self, cards=1, *, capability=(9, 0), limit=None):
        self.cards, self.capability, self.limit = cards, capability, limit
        self.live = self.peak = self.emptied = 0
        self.reads, self.copies, self.sent = (collections.Counter() for _ in range(3))
        self.before = lambda name, tensors: None
        self.initialized, self._building, self._held = False, 0, {}

    # -- what is counted -----------------------------------------------------------------------------------------------

    def forget(self):
        """Count anew."""
        self.reads.clear()
        self.copies.clear()
        self.sent.clear()
        self.peak = self.live

    def read(self, what):
        self.reads[f"{what} at {_where()}"] += 1

    def hold(self, tensor, value):
        """Count the storage of a tensor until the last tensor on it is gone."""
        storage = value.untyped_storage()
        key = storage._cdata if storage.nbytes() else None
        if key is None:
            return
        count, nbytes, kept = self._held.get(key, (0, storage.nbytes(), storage))
        if not count:
            self.live += nbytes
            self.peak = max(self.peak, self.live)
        self._held[key] = count + 1, nbytes, kept            # kept, so that no other storage takes its address
        weakref.finalize(tensor, self._drop, key)

    def _drop(self, key):
        count, nbytes, kept = self._held[key]
        if count > 1:
            self._held[key] = count - 1, nbytes, kept
        else:
            del self._held[key]
            self.live -= nbytes

    def allocate(self, nbytes):
        if self.limit is not None and self.live + nbytes > self.limit:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {nbytes / 2**20:.2f} MiB. GPU 0 has a total "
                                         f"capacity of {self.limit / 2**20:.2f} MiB")

    # -- operations ----------------------------------------------------------------------------------------------------

    def call(self, function, args, kwargs):
        tensors = _tensors(args, kwargs)
        on_card = [tensor for tensor in tensors if isinstance(tensor, OnCard)]
        device = kwargs.get("device")
        wanted = device is not None and torch.device(device).type == "meta" and not self._building
        if not on_card and not wanted:
            return function(*args, **kwargs)
        self.initialized = True
        name = function._schema.name.removeprefix("aten::")
        self.before(name, on_card)
        if function is aten._to_copy.default:
            return self._copied(args[0], args[1:], kwargs)
        if function in (aten.lift_fresh.default, aten.lift.default):
            return args[0]
        self._check(function, args, kwargs, tensors)
        plain, options = [_plain(value) for value in args], {key: _plain(value) for key, value in kwargs.items()}
        if wanted:
            options["device"] = torch.device("cpu")
        results = function(*plain, **options)
        several = isinstance(results, (tuple, list))
        fresh = {storage._cdata: storage.nbytes() for result in (results if several else [results])
                 if isinstance(result, torch.Tensor)
                 for storage in [result.untyped_storage()] if storage._cdata not in self._held}
        self.allocate(sum(fresh.values()))
        written = {id(tensor.value): tensor for tensor in on_card} if function._schema.is_mutable else {}
        carried = [self._carried(result, written) for result in (results if several else [results])]
        return type(results)(carried) if several else carried[0]

    def _carried(self, result, written):
        """The result on the device: the tensor that was written to, or a new one; no tensor as it is."""
        if not isinstance(result, torch.Tensor):
            return result
        known = written.get(id(result))
        return OnCard(result, self) if known is None else known

    def _copied(self, source, args, kwargs):
        """Tensor.to: between devices, or to another dtype or layout."""
        device = kwargs.get("device")
        to_host = device is not None and torch.device(device).type == "cpu"
        options = {key: value for key, value in kwargs.items() if key not in ("device", "non_blocking", "pin_memory")}
        if isinstance(source, OnCard) and to_host:
            self.read("copy to the host")
        if not isinstance(source, OnCard):
            waits = not (kwargs.get("non_blocking") and getattr(source, "pretended_pinned", False))
            (self.copies if waits else self.sent)[_where()] += 1
        if not to_host:
            self.allocate(source.numel() * (options.get("dtype") or source.dtype).itemsize)
        result = torch.clone(aten._to_copy.default(_value(source).detach(), *args, **options))
        return result if to_host else OnCard(result, self)

    def _check(self, function, args, kwargs, tensors):
        """Refuse what CUDA refuses, and count what makes the host wait."""
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type == "cpu":
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        if function in INDEXING and not isinstance(args[0], OnCard):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        for tensor in tensors:
            allowed = isinstance(tensor, OnCard) or tensor.dim() == 0 or function in COPYING or function in INDEXING
            if not allowed:
                raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 "
                                   f"and {tensor.device}! ({function})")
        if function in READS:
            self.read(READS[function])
        if function in INDEXING:
            indices = [tensor for tensor in args[1] if isinstance(tensor, torch.Tensor)]
            if any(index.dtype == torch.bool for index in indices):
                self.read("mask as index")
            if any(not isinstance(index, OnCard) for index in indices):
                self.copies[f"index at {_where()}"] += 1
        if function is aten.copy_.default:
            if not isinstance(args[0], OnCard):
                self.read("copy to the host")
            elif not isinstance(args[1], OnCard) and args[1].dim():
                self.copies[_where()] += 1

    # -- torch's own calls ---------------------------------------------------------------------------------------------

    def __enter__(self):
        self._undo = contextlib.ExitStack()
        for name, call in {
            "is_available": lambda: self.cards > 0, "device_count": lambda: self.cards,
            "is_initialized": lambda: self.initialized, "init": self._init, "_lazy_init": self._init,
            "current_device": self._init, "synchronize": lambda *device: None, "empty_cache": self._empty,
            "reset_peak_memory_stats": self._reset_peak, "max_memory_allocated": lambda *device: self.peak,
            "memory_allocated": lambda *device: self.live, "get_device_name": lambda *device: "Pretended GPU",
            "get_device_capability": lambda *device: self.capability,
            "is_bf16_supported": lambda *args, **options: self.capability[0] >= 8,
        }.items():
            self._replace(torch.cuda, name, call)
        self._replace(torch.autograd, "grad", _grad)
        for mode in (_Devices(self), _Operations(self)):
            self._undo.enter_context(mode)
        return self

    def __exit__(self, *error):
        self._undo.close()

    def _replace(self, module, name, call):
        self._undo.callback(setattr, module, name, getattr(module, name))
        setattr(module, name, call)

    def _init(self):
        if not self.cards:
            raise RuntimeError("No CUDA GPUs are available")
        self.initialized = True
        return 0

    def _empty(self):
        self.emptied += 1

    def _reset_peak(self, device=None):
        if device is None or torch.device(device).index is None:
            self._init()                                     # which asking for the current device does
        elif not self.initialized:
            raise RuntimeError("Invalid device argument 0: did you call init?")
        self.peak = self.live

    def carrier(self, device):
        """The meta device for a name of the pretended one; an error beyond its cards."""
        if (torch.device(device).index or 0) >= self.cards:
            raise RuntimeError("CUDA error: invalid device ordinal\nGPU device may be out of range, do you have enough GPUs?")
        return torch.device("meta")


def _value(item):
    return item.value if isinstance(item, OnCard) else item


def _plain(argument):
    """An argument of an operator with CPU tensors for those on the device; lists in it hold no further lists."""
    return [_value(item) for item in argument] if isinstance(argument, (list, tuple)) else _value(argument)


def _tensors(args, kwargs):
    """All tensors among the arguments of an operator."""
    found = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [item for item in value if isinstance(item, torch.Tensor)]
    return found


def _is_cuda(item):
    return isinstance(item, torch.device) and item.type == "cuda" or (
        isinstance(item, str) and (item == "cuda" or item.startswith("cuda:")))


class _Operations(TorchDispatchMode):
    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    @classmethod
    def _should_skip_dynamo(cls):                            # nothing is compiled here, and the wrapper costs time
        return False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self.gpu.call(function, args, kwargs or {})


class _Devices(TorchFunctionMode):
    """Names of the device become the carriers' device."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if function is torch.device or name in ("autocast", "__set__", "__get__"):
            return function(*args, **kwargs)
        if function is torch.Tensor.pin_memory:
            pinned = args[0].clone()
            pinned.pretended_pinned = True
            return pinned
        if function is torch.Tensor.__getitem__ and isinstance(args[0], OnCard):
            args = (args[0], self._index(args[1]))
        named = [value for value in (*args, *kwargs.values()) if isinstance(value, (torch.device, str))]
        if any(isinstance(value, torch.device) and value.type == "meta" for value in named):
            return self._build(function, args, kwargs)
        if not any(map(_is_cuda, named)):
            return function(*args, **kwargs)
        args = tuple(self.gpu.carrier(arg) if _is_cuda(arg) else arg for arg in args)
        kwargs = {key: self.gpu.carrier(value) if _is_cuda(value) else value for key, value in kwargs.items()}
        if function in (torch.tensor, torch.as_tensor, torch.asarray):
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        return function(*args, **kwargs)

    def _build(self, function, args, kwargs):
        """A tensor that the package itself puts on the meta device, as it does with networks before their weights."""
        self.gpu._building += 1
        try:
            return function(*args, **kwargs)
        finally:
            self.gpu._building -= 1

    def _index(self, key):
        """Lists as indices are copied to the device."""
        keys = key if isinstance(key, tuple) else (key,)
        return tuple(torch.tensor(part) if isinstance(part, list) else part for part in keys) if any(
            isinstance(part, list) for part in keys) else key


def _grad(outputs, inputs, grad_outputs=None, retain_graph=None, create_graph=False, allow_unused=None, **more):
    """torch.autograd.grad without its checks of devices, which know the carriers as meta tensors."""
    from torch.autograd.graph import _engine_run_backward
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)
    inputs = (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs)
    given = (grad_outputs,) if isinstance(grad_outputs, torch.Tensor) else grad_outputs
    given = tuple(torch.ones_like(output) for output in outputs) if given is None else tuple(given)
    keep = create_graph if retain_graph is None else retain_graph
    return tuple(_engine_run_backward(outputs, given, keep, create_graph, inputs, bool(allow_unused), accumulate_grad=False))
