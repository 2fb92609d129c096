"""Types of flags, the flags that scripts share, and flags stored in a checkpoint."""

import argparse

from utils import UserError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and that knows no abbreviated flags."""

    def __init__(self, **kwargs):
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=formatter, **kwargs)

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def add_data_flags(parser, data_set, batch_size):
    """Flags of the data; `data_set` is the type of --dataset. Returns their group's `add`."""
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="cub", type=data_set, help="cub, car, SOP, demo")
    add("--data-root", default="./data", help="folder of the extracted data sets")
    add("--image-size", default=224, type=at_least(1, most=2**12),
        help="pixels; tested at 256/224 of it")  # fmt: skip
    add("--batch-size", default=batch_size, type=at_least(1), help="B")
    add("--workers", default=4, type=at_least(0), help="processes that load images")
    return add


def add_network_flags(parser, model):
    """Flags of the network; `model` is the type of --model. Returns their group's `add`."""
    add = parser.add_argument_group("network").add_argument
    add("--model", default="bn_inception", type=model,
        help="bn_inception, googlenet, resnet18, resnet50, resnet101 or timm/NAME")  # fmt: skip
    add("--embedding-size", default=512, type=at_least(1, most=2**13), help="d")
    add("--l2-norm", default=True, type=boolean, help="L2-normalise the heads")
    add("--gpu-id", default=0, type=at_least(-1), help="-1: all GPUs (not supported yet)")
    return add


def given_flags(parser, argv):
    """All flags as a namespace, and {name: value} of those that the command line gives."""
    args = parser.parse_args(argv)
    unset = object()
    absent = argparse.Namespace(**dict.fromkeys(vars(args), unset))
    parsed = vars(parser.parse_args(argv, absent))
    return args, {name: value for name, value in parsed.items() if value is not unset}


def parse_stored(parser, flags, path, required=()):
    """The flags stored in a checkpoint, as a namespace, held to the same rules as typed ones."""
    argv = list(required)
    for name, value in flags.items():
        if value is not None and name not in ("resume", "overwrite"):  # they are no settings
            flag = name.replace("_", "-") if name.islower() else name  # LOG_DIR, IPC
            argv.append(f"--{flag}={value}")
    try:
        return parser.parse_args(argv)
    except UserError as error:
        raise UserError(f"{path}: its stored flags are not valid: {error}") from error


def boolean(text):
    """argparse type: true/false, 1/0, yes/no in any case."""
    # differs: `bool("False")`, the published type, is True
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    try:
        return values[text.lower()]
    except KeyError:
        raise ValueError(text) from None  # argparse names the flag and the value


def at_least(low, kind=int, most=10**9):
    """argparse type: a number no smaller than `low`, and not beyond all use."""

    def parse(text):
        value = kind(text)
        if not low <= value <= most:
            raise ValueError(text)
        return value

    parse.__name__ = f"number ({low} to {most:,})"
    return parse


def name_part(text):
    """argparse type: what may be part of a folder's name."""
    if "/" in text or not text.isprintable():
        raise argparse.ArgumentTypeError(f"a folder's name cannot hold {ascii(text)}")
    return text
