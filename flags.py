"""The flags that scripts share, their types, and flags stored in a checkpoint."""

import argparse

from PIL import ImageColor

from utils import UserError, did_you_mean

VERSION = "0.2.0"
PRECISIONS = {"fp32": "float32", "tf32": "TF32", "bf16": "bfloat16"}  # --precision, in words
PRECISION_HELP = (
    "tf32: on GPUs, convolutions and matrix products in TF32, those of the loss included; "
    "bf16: the backbone in bfloat16, the rest in float32"
)
GPU_HELP = "the GPU to use; by default the first, or the CPU where there is none; torchrun chooses"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """One line a flag where it fits; a flag without a type of its own takes a number."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=28, width=100)

    def _get_help_string(self, action):
        unset = action.default in (None, "") or action.default is False  # a switch that is off
        return action.help if unset else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action):
        return "BOOL" if action.type is boolean else "NUMBER"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError and takes no abbreviated flags."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)
        self.add_argument("--version", action="version", version=f"DDML {VERSION}")

    def parse_args(self, argv=None, namespace=None):
        args, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            near = did_you_mean(unknown[0].partition("=")[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
        return args

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def add_data_flags(parser, data_set, choices, batch_size):
    """Flags of the data; `data_set`: the type of --dataset. Returns the group's add_argument."""
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="cub", type=data_set, metavar="NAME", help=choices)
    add("--data-root", default="./data", metavar="DIR",
        help="folder of the data sets; with --dataset folder, of your own images")  # fmt: skip
    add("--background", type=colour, metavar="COLOUR",
        help="colour under transparent pixels of your own images, a name or #rrggbb; by default "
        "white")  # fmt: skip
    add("--skip-unreadable", **SWITCH,
        help="find your own images that cannot be read, name them and leave them out")  # fmt: skip
    add("--ks", nargs="+", type=at_least(1), metavar="K",
        help="the K of Recall@K; by default the data set's published ones, or 1 2 4 8")  # fmt: skip
    add("--metrics", **SWITCH, help="also compute MAP@R and R-Precision")
    add("--image-size", default=224, type=at_least(1, maximum=2**12),
        help="side of the input in pixels; tests resize to 256/224 of it and crop the centre")
    add("--batch-size", default=batch_size, type=at_least(1), help="images in a batch")
    add("--workers", default=4, type=at_least(0), help="processes that load images")
    return add


def add_network_flags(parser, model, choices):
    """Flags of the network; `model`: the type of --model. Returns the group's add_argument."""
    add = parser.add_argument_group("network").add_argument
    add("--model", default="bn_inception", type=model, metavar="NAME", help=choices)
    add("--embedding-size", default=512, type=at_least(1, maximum=2**13),
        help="dimensions of the embedding")  # fmt: skip
    add("--l2-norm", default=True, type=boolean, help="L2-normalise each head")
    add("--precision", default="fp32", choices=PRECISIONS, help=PRECISION_HELP)
    add("--gpu-id", type=at_least(-1), help=GPU_HELP)
    return add


def given_flags(parser, argv):
    """All flags as a namespace, and {name: value} of those on the command line."""
    args, unset = parser.parse_args(argv), object()
    parsed = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset)))
    return args, {name: value for name, value in vars(parsed).items() if value is not unset}


def parse_stored(parser, flags, path):
    """The flags stored in a checkpoint as a namespace, checked as typed ones are."""
    argv = []
    for name, value in flags.items():
        if value is not None and name not in ("resume", "overwrite", "quiet"):  # no settings
            listed = isinstance(value, list)  # --ks
            argv += [flag_of(name), *map(str, value)] if listed else [f"{flag_of(name)}={value}"]
    try:
        return parser.parse_args(argv)
    except UserError as error:
        raise UserError(f"{path}: its stored flags are not valid: {error}") from error


def flag_of(name):
    """`--batch-size` for `batch_size`."""
    return f"--{name.replace('_', '-') if name.islower() else name}"  # LOG_DIR has its own


def boolean(text):
    """argparse type: true/false, 1/0, yes/no in any case."""
    # differs: the script has type=bool, and bool("False") is True
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise ValueError(text)  # argparse names the flag and the value
    return values[text.lower()]


# --flag, --flag True, --flag False
SWITCH = {"default": False, "const": True, "nargs": "?", "type": boolean}


def compile_mode(text):
    """argparse type of --compile: a boolean, or torch.compile's mode with CUDA graphs."""
    return text if text == "reduce-overhead" else boolean(text)


def at_least(low, kind=int, maximum=10**9):
    """argparse type: a number from `low` to `maximum`."""

    def parse(text):
        value = kind(text)
        if not low <= value <= maximum:
            raise ValueError(text)
        return value

    parse.__name__ = f"number ({low} to {maximum:,})"
    return parse


def share(text):
    """argparse type: a number above 0 and below 1."""
    value = float(text)
    if not 0 < value < 1:
        raise ValueError(text)
    return value


share.__name__ = "share (above 0, below 1)"


def colour(text):
    """argparse type: a colour that Pillow knows, as #rrggbb."""
    red, green, blue = ImageColor.getrgb(text)  # ValueError if it is none, or has an alpha
    return f"#{red:02x}{green:02x}{blue:02x}"


def name_part(text):
    """argparse type: a part of a folder's name."""
    if "/" in text or not text.isprintable():
        raise argparse.ArgumentTypeError(f"a folder's name cannot hold {ascii(text)}")
    return text
