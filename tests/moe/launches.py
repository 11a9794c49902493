"""Counts what a GPU would be asked to launch, on a CPU: the operations of torch and the kernels, views left out."""

from collections import Counter
from contextlib import contextmanager

from torch.utils._python_dispatch import TorchDispatchMode

from routerzoo.moe import dispatch, kernel_calls, low_memory, softmax_losses

# What makes no kernel: views, allocations, questions.
FREE = frozenset(
    """
    T mT _local_scalar_dense _unsafe_view alias as_strided chunk detach empty empty_like empty_strided expand flatten
    is_contiguous lift_fresh new_empty new_empty_strided numpy_T permute reshape select slice split split_with_sizes
    squeeze sym_size t transpose unsqueeze view
    """.split()  # noqa: SIM905
)
KERNELS = {
    **dict.fromkeys(("place_rows", "activate", "activate_backward", "combine", "product", "weight_grad"), 1),
    **{"bias_grads": 2, "softmax_losses": 2, "softmax_losses_backward": 1},
}
OPERATORS = (
    low_memory._experts,
    low_memory._experts_backward,
    softmax_losses._losses,
    softmax_losses._losses_backward,
)


class Launches(TorchDispatchMode):
    """Counts operations; those of the layer's own operators one by one."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        for operator in OPERATORS:
            if name == operator._qualname:
                with self:
                    return operator._init_fn(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        short = name.split("::")[1]
        free = short in FREE or (short in ("to", "contiguous") and result is args[0])
        if not free:
            self.counts[short] += 1
        return result

    @property
    def total(self):
        return sum(self.counts.values())


@contextmanager
def counted(monkeypatch, means="triton"):
    """Count what is launched inside, with the layer's path for a GPU."""
    launches = Launches()
    monkeypatch.setattr(dispatch, "means_for", lambda x_TD, network: means)
    monkeypatch.setattr(dispatch, "_is_one_operator", lambda *arguments: True)
    monkeypatch.setattr(softmax_losses, "_on_gpu", lambda logits_TE: True)
    low_memory._hybrid.cache_clear()
    for name, number in KERNELS.items():
        original = getattr(kernel_calls, name)

        def count(*args, _name=name, _number=number, _original=original, **kwargs):
            launches.counts["kernel " + _name] += _number
            with _quiet(launches):
                return _original(*args, **kwargs)

        monkeypatch.setattr(kernel_calls, name, count)
    with launches:
        yield launches
    low_memory._hybrid.cache_clear()


@contextmanager
def _quiet(launches):
    before = launches.counts.copy()
    yield
    launches.counts.clear()
    launches.counts.update(before)
