"""What is seen of operations as they run, in backward too."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """In a `with`: `look(operation, its arguments, its result)` after each operation."""

    def __init__(self, look):
        super().__init__()
        self.look = look

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.look(operation, args, result)
        return result


class Waits(Operations):
    """`seen`: the operations for which, on a GPU, the host would wait; not copies by `to`."""

    NAMES = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique2",
             "unique_dim", "unique_consecutive", "is_nonzero"}  # fmt: skip

    def __init__(self):
        super().__init__(self.note)
        self.seen, self.patch = [], pytest.MonkeyPatch()

    def __enter__(self):
        for name in ("tolist", "cpu", "numpy"):  # on the CPU these call no operation
            self.patch.setattr(torch.Tensor, name, self.noting(getattr(torch.Tensor, name)))
        return super().__enter__()

    def __exit__(self, *exception):
        self.patch.undo()
        return super().__exit__(*exception)

    def noting(self, method):
        def noted(*args, **kwargs):
            self.seen.append(method)
            return method(*args, **kwargs)

        return noted

    def note(self, operation, args, result):
        name = operation.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        if name in self.NAMES or by_mask:
            self.seen.append(operation)
