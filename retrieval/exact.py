"""Matrix products that no setting of the process makes less precise."""

import contextlib

import torch


@contextlib.contextmanager
def exact_products():
    """In it, or in a function that it decorates, products have the precision of their factors:
    TensorFloat-32 and autocast are off, and as they were afterwards."""
    settings = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for setting, precision in zip(settings, before):
            setting.fp32_precision = precision
