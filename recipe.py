"""The recipe: losses and their defaults, what trains when, with which optimiser, one step."""

import math

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import clip_grad_value_, get_total_norm

from distributed import Sum, all_reduced, gather, part, share_batch_norm, sum_gradients, world
from losses import DDML, LOSSES, PROXY_LOSSES, Classes
from net import create_model
from utils import UserError, warn

# with what the published script gives them; fused, a step makes no wait for the device, and can be
# skipped there
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {"fused": True}),
    "rmsprop": (torch.optim.RMSprop, {"alpha": 0.9, "momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"fused": True}),
}
CLIP_VALUE = 10


def own_values(loss):
    """{flag: the loss's own value}; None for what it does not have."""
    choice = LOSSES[loss]
    return {"mrg": choice.margin, "alpha": choice.scale, "proxy_lr_factor": choice.lr_factor}


def settle_loss(args):
    """Give the loss's own values to the flags that were left to it."""
    for name, value in own_values(args.loss).items():
        if getattr(args, name) is None:
            setattr(args, name, value if value is None else float(value))  # as one that is given
        elif value is None:
            what = {"mrg": "margin", "alpha": "scale", "proxy_lr_factor": "proxies"}[name]
            raise UserError(f"--{name.replace('_', '-')}: --loss {args.loss} has no {what}")
    if args.shard_proxies and args.loss != "Proxy_Anchor":
        raise UserError(
            f"--shard-proxies: --loss {args.loss} needs all of its parameters in each process; use "
            "--loss Proxy_Anchor, or leave the flag out"
        )
    if args.disent and args.loss not in PROXY_LOSSES:
        raise UserError(
            f"--disent True: --loss {args.loss} compares pairs of images and has no proxies, which "
            f"DDML's terms need; choose from {', '.join(PROXY_LOSSES)}"
        )
    if args.disent and not args.al + args.be + args.gam:
        warn(
            "--disent True with --al, --be and --gam of 0 trains the plain loss and an unused head"
        )
    if not args.disent and args.al + args.be + args.gam > 0:
        warn("--al, --be and --gam weigh nothing without --disent True: training the plain loss")
    if args.loss not in PROXY_LOSSES and not args.IPC:
        warn(f"--loss {args.loss} learns from pairs of one class; --IPC N puts some in each batch")


def build_criterion(args, num_classes):
    C, parts = num_classes, {}
    if args.shard_proxies:
        parts = {"classes": Classes(C, part(range(C)), Sum.apply)}
        if C < world():
            raise UserError(f"--shard-proxies: {C} classes are fewer than the {world()} processes")
    loss = LOSSES[args.loss].make(C, args.embedding_size, args.mrg, args.alpha, **parts)
    for proxies in loss.parameters():
        proxies.is_part = args.shard_proxies
    return DDML(loss, args.al, args.be, args.gam) if args.disent else loss


def parameter_groups(model, criterion, lr, proxy_lr_factor):
    """Backbone, heads, proxies: all parameters once."""
    heads = [p for head in model.heads() for p in head.parameters()]
    in_heads = set(heads)
    backbone = [p for p in model.parameters() if p not in in_heads]
    proxies = {"params": list(criterion.parameters()), "lr": (proxy_lr_factor or 0) * lr}
    return [{"params": backbone, "lr": lr}, {"params": heads, "lr": lr}, proxies]


def build_optimizer(args, model, criterion):
    groups = parameter_groups(model, criterion, args.lr, args.proxy_lr_factor)
    kind, settings = OPTIMIZERS[args.optimizer]
    optimizer = kind(groups, lr=args.lr, weight_decay=args.weight_decay, **settings)
    scheduler = torch.optim.lr_scheduler.StepLR(
        optimizer, step_size=args.lr_decay_step, gamma=args.lr_decay_gamma
    )
    return optimizer, scheduler


def prepare_epoch(model, epoch, warm, bn_freeze):
    """What trains in this epoch: during warm-up only the heads (and the proxies).

    bn_freeze keeps BatchNorm's running statistics. Its weights and biases train with the
    backbone all the same, as in the published script, unless there is no warm-up at all.
    """
    model.train()
    model.model.requires_grad_(epoch >= warm)
    for head in model.heads():
        head.requires_grad_(True)
    if bn_freeze:
        for module in model.modules():
            if isinstance(module, _BatchNorm):  # of any number of dimensions, SyncBatchNorm too
                module.eval()
                if warm == 0:
                    module.requires_grad_(False)


def train_step(model, criterion, optimizer, images, labels, noise=None, batch_size=None):
    """One step on the network's input, of several processes each with its rows of the batch of
    `batch_size` and all of its noise; returns {each term, "loss", "gradient" (its largest entry):
    detached scalar on the device}."""
    optimizer.zero_grad()
    output, labels = model(images), gather(labels, batch_size)
    if model.disent:
        loss, terms = criterion(*(gather(head, batch_size) for head in output), labels, noise)
    else:
        loss = criterion(gather(output, batch_size), labels)
        terms = {"metric": loss}
    (loss / world()).backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sum_gradients(parameters)
    gradient = get_total_norm([p.grad for p in parameters if p.grad is not None], math.inf)
    # of proxies in parts, each process knows its own; NCCL's maximum may pass over a NaN
    gradient = all_reduced(gradient.nan_to_num(math.inf, math.inf), "max")
    if all(group.get("fused") for group in optimizer.param_groups):  # else it is stopped in time
        optimizer.grad_scale = None
        optimizer.found_inf = (~(loss + gradient).isfinite()).float()  # skips the step
    clip_grad_value_(parameters, CLIP_VALUE)
    optimizer.step()
    values = {**terms, "loss": loss, "gradient": gradient}  # the first that is not finite is named
    return {name: value.detach() for name, value in values.items()}


def loss_noise(shape, device):
    """The two samples' noise [2, B, d] of a step: drawn on the CPU, the same on every device."""
    noise = torch.randn(2, *shape, pin_memory=device.type == "cuda")
    return noise.to(device, non_blocking=True)


class Training:
    """What an epoch changes and a checkpoint holds."""

    def __init__(self, args, num_classes, device, weights, images=None):
        torch.manual_seed(args.seed)
        self.args, self.device, self.images, self.history = args, device, images, []
        self.model = create_model(
            args.model, args.embedding_size, args.disent, args.l2_norm, weights, args.precision
        ).to(device)
        if not args.bn_freeze:
            share_batch_norm(self.model)
        self.criterion = build_criterion(args, num_classes).to(device)
        self.optimizer, self.scheduler = build_optimizer(args, self.model, self.criterion)
