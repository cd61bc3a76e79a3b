"""The one place with side effects on somebody's network: what is done inside leaves no trace.

Measured reasons for each line are in the tests: without it, training differs or crashes.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Restore = Callable[[], None]


@contextmanager
def undisturbed(module: nn.Module, seed: int) -> Iterator[None]:
    """Examine a network in the middle of its training, and leave everything as it was.

    Inside, the network is in eval mode, gradients are enabled (also under ``no_grad`` and
    ``inference_mode``), compiled modules run eagerly, ``log`` and ``log_dict`` do nothing and all
    random number generators are seeded. On leaving, also by an exception, these are as before:
    the generators of torch (CPU and the network's devices), numpy and Python; every submodule's
    ``training``, hooks and attributes; ``requires_grad`` and ``grad`` of every parameter (the same
    tensor object); the content of every buffer; flags of cudnn, determinism and matmul precision.
    Parameters are not copied: a change of their values is noticed and said. Never yield to
    somebody else's code inside.

    Args:
        module: The bare network, never a wrapper of DDP.
        seed: Seed of all generators inside.

    Raises:
        RuntimeError: after restoring, if parameters were changed inside.
    """
    devices = _devices(module)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    versions = {name: (id(p), p._version) for name, p in parameters.items()}
    restores: list[Restore] = [
        _generators(devices),
        _flags(),
        _modules(module),
        _buffers(module),
        _gradients(list(parameters.values())),
    ]
    try:
        _silence(module)
        module.eval()
        _seed(devices, seed)
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),
            warnings.catch_warnings(),
        ):
            yield
    finally:
        with ExitStack() as last_first:  # it goes on where one of them fails
            for restore in restores:
                last_first.callback(restore)
        now = dict(module.named_parameters(remove_duplicate=False))
        changed = [
            name
            for name, before in versions.items()
            if name not in now or (id(now[name]), now[name]._version) != before
        ]
        if changed:
            raise RuntimeError(
                f"Something that examined `{type(module).__name__}` changed its parameters: "
                f"{', '.join(changed[:5])}. Training goes on with changed weights; remove the "
                "method that does it."
            )


def _devices(module: nn.Module) -> set[torch.device]:
    """The accelerators whose generators may be drawn from."""
    devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        devices.add(torch.device("cuda", torch.cuda.current_device()))
    return devices


def _seed(devices: set[torch.device], seed: int) -> None:
    """Seed only the generators that are restored; ``torch.manual_seed`` would seed every GPU."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    for device in devices:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _generators(devices: set[torch.device]) -> Restore:
    python, array, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = {device: torch.cuda.get_rng_state(device) for device in devices}

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(array)
        torch.set_rng_state(cpu)
        for device, state in cuda.items():
            torch.cuda.set_rng_state(state, device)

    return restore


def _flags() -> Restore:
    cudnn = torch.backends.cudnn
    before = (cudnn.enabled, cudnn.benchmark, cudnn.deterministic)
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    dtype, precision = torch.get_default_dtype(), _precision()

    def restore() -> None:
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic = before
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        precision()
        torch.set_default_dtype(dtype)

    return restore


def _precision() -> Restore:
    """Precision of matmul and cudnn, the old way or, from torch 2.9, the new: they do not mix."""
    cudnn = torch.backends.cudnn
    try:
        matmul, tf32 = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    except RuntimeError:  # this process uses the new way
        backends: Any = torch.backends  # the stubs of torch 2.13 do not know the new way yet
        parts = (backends, backends.cuda.matmul, cudnn, backends.cudnn.conv, backends.cudnn.rnn)
        words = [part.fp32_precision for part in parts]

        def restore_words() -> None:
            for part, word in zip(parts, words, strict=True):
                part.fp32_precision = word

        return restore_words

    def restore() -> None:
        torch.set_float32_matmul_precision(matmul)
        cudnn.allow_tf32 = tf32

    return restore


def _modules(module: nn.Module) -> Restore:
    """Attributes of every submodule: its training flag, hooks, children, and what was added.

    Containers are emptied and filled again, not replaced: handles of hooks refer to them.
    """
    before = []
    for part in module.modules():
        attributes = dict(vars(part))
        inside = {
            name: _like(value)
            for name, value in attributes.items()
            if isinstance(value, dict | list | set)
        }
        before.append((part, attributes, inside))

    def restore() -> None:
        for part, attributes, inside in before:
            current = vars(part)
            for name in list(current):
                if name not in attributes:
                    del current[name]
            current.update(attributes)
            for name, content in inside.items():
                own = current[name]
                own.clear()
                (own.extend if isinstance(own, list) else own.update)(content)

    return restore


def _like(container: Any) -> Any:
    """A plain container of the same contents."""
    kind = next(kind for kind in (dict, list, set) if isinstance(container, kind))
    return kind(container)


def _buffers(module: nn.Module) -> Restore:
    """The content too: batch norm changes its statistics without bumping their version.

    Tensors that a module keeps without registering them are meant as well.
    """
    kept = [t for part in module.modules() for t in vars(part).values() if isinstance(t, Tensor)]
    before = [(b, b.detach().clone()) for b in (*module.buffers(), *kept)]

    def restore() -> None:
        with torch.no_grad():
            for buffer, content in before:
                if buffer.shape != content.shape or buffer.dtype != content.dtype:
                    buffer.data = content
                elif not torch.equal(buffer, content):
                    buffer.copy_(content)

    return restore


def _gradients(parameters: list[nn.Parameter]) -> Restore:
    before = [(p, p.requires_grad, p.grad) for p in parameters]
    for p in parameters:
        p.grad = None

    def restore() -> None:
        for p, requires_grad, grad in before:
            p.requires_grad_(requires_grad)
            p.grad = grad

    return restore


def _silence(module: nn.Module) -> None:
    def silent(*_: Any, **__: Any) -> None:
        """Do nothing: what is logged while explaining is not the training's."""

    # parts too: a compiled wrapper's forward is that of the module inside. What has but one of the
    # two is no LightningModule: its `log` may be a logarithm
    names = ("log", "log_dict")
    for part in module.modules():
        if all(callable(getattr(type(part), name, None)) for name in names):
            vars(part).update(dict.fromkeys(names, silent))
