"""The recipe: which loss, what trains when, with which optimiser, one step."""

import math

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import clip_grad_value_, get_total_norm

from distributed import all_gather, all_reduce, all_reduce_gradients, rank, world_size
from losses import DDML, LOSSES
from net import create_model
from net.batch_norm import share_batch_norm
from retrieval.structure import at_the_heads
from sharded import ShardedDDML, ShardedProxyAnchor, sharded_parameters
from utils import STEP, UserError, seed_of

# with the published script's settings; fused ones never wait for the device
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {"fused": True}),
    "rmsprop": (torch.optim.RMSprop, {"alpha": 0.9, "momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"fused": True}),
}
CLIP_VALUE = 10


def own_values(loss):
    """{flag: the loss's default}; None where the loss has no such setting."""
    choice = LOSSES[loss]
    return {"mrg": choice.margin, "alpha": choice.scale, "proxy_lr_factor": choice.lr_factor}


def settle_loss(args):
    """Set the flags that were not given to the loss's defaults."""
    for name, value in own_values(args.loss).items():
        if getattr(args, name) is None:
            setattr(args, name, value if value is None else float(value))  # as typed
        elif value is None:
            what = {"mrg": "margin", "alpha": "scale", "proxy_lr_factor": "proxies"}[name]
            raise UserError(f"--{name.replace('_', '-')}: --loss {args.loss} has no {what}")


def build_criterion(args, num_classes):
    """The loss of all classes; with --shard-proxies, this rank's part of it."""
    make, ddml = LOSSES[args.loss].make, DDML
    if args.shard_proxies:
        make, ddml = ShardedProxyAnchor, ShardedDDML
    loss = make(num_classes, args.embedding_size, args.mrg, args.alpha)
    return ddml(loss, args.al, args.be, args.gam) if args.disent else loss


def parameter_groups(model, criterion, lr, proxy_lr_factor):
    """Three groups, backbone, heads and proxies, that hold every parameter once."""
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
    """Set what trains in this epoch: in warm-up only heads and proxies.

    bn_freeze keeps BatchNorm's running statistics. Its weights and biases still train with the
    backbone, as in the published script, unless there is no warm-up at all.
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


def train_step(
    model, criterion, optimizer, images, labels, noise=None, batch_size=None, measured=False
):
    """One step; images, labels: this rank's rows of the batch of `batch_size`; noise: the whole
    batch's. Returns {term: scalar}, with "loss" and "gradient" (its largest entry), on the device;
    if `measured`, also what DDML does `at_the_heads`.
    """
    optimizer.zero_grad()
    output, labels = model(images), all_gather(labels, batch_size)
    if model.disent:
        heads = [all_gather(head, batch_size) for head in output]
        # a compiled backward pass gives the whole loss's gradient alone
        loss, terms = (criterion.forward if measured else criterion)(*heads, labels, noise)
        terms |= at_the_heads(criterion, heads, terms) if measured else {}
    else:
        loss = criterion(all_gather(output, batch_size), labels)
        terms = {"metric": loss}
    (loss / world_size()).backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sharded = sharded_parameters(criterion)
    all_reduce_gradients([p for p in parameters if p not in sharded])
    gradient = get_total_norm([p.grad for p in parameters if p.grad is not None], math.inf)
    # each rank has its own sharded proxies; NCCL's maximum may pass over a NaN
    gradient = all_reduce(gradient.nan_to_num(math.inf, math.inf), "max")
    clip_grad_value_(parameters, CLIP_VALUE)
    optimizer.step()
    values = {**terms, "loss": loss, "gradient": gradient}
    return {name: value.detach() for name, value in values.items()}


def loss_noise(shape, device):
    """The two samples' noise [2, B, d] of a step: drawn on the CPU, the same on every device."""
    noise = torch.randn(2, *shape, pin_memory=device.type == "cuda")
    return noise.to(device, non_blocking=True)


def seeded_noise(training):
    """Seed torch for this step and draw DDML's noise (None without DDML). What a step draws depends
    on --seed, epoch and step alone."""
    args, model, epoch = training.args, training.model, training.epoch
    key = args.seed, STEP, epoch.number, epoch.step
    torch.manual_seed(seed_of(*key))
    noise = None
    if model.disent:
        noise = loss_noise((args.batch_size, model.embedding_size), training.device)
    if rank():
        torch.manual_seed(seed_of(*key, rank()))  # for dropout: other images, other masks
    return noise


class Training:
    """The state of a run: what an epoch changes and a checkpoint holds."""

    def __init__(self, args, device, model, criterion):
        self.args, self.device = args, device
        self.model, self.criterion = model, criterion
        self.optimizer, self.scheduler = build_optimizer(args, model, criterion)
        self.images_digest = None  # a run continues only with the same images
        self.history = []  # of finished epochs, what metrics.jsonl has
        self.start = None  # {metric: per cent} before the first epoch
        self.trained_on = None  # dataset.images.trained_on, on rank 0
        self.epoch = None  # the runs.results.Epoch under way
        self.forecast = None  # the runs.forecast.Forecast


def build_training(args, num_classes, device, weights):
    """The state of a new run. Seeds torch: initial weights and proxies depend on --seed."""
    torch.manual_seed(args.seed)
    model = create_model(
        args.model, args.embedding_size, args.disent, args.l2_norm, weights, args.precision
    )
    if not args.bn_freeze:
        share_batch_norm(model)  # makes new layers, on the CPU
    criterion = build_criterion(args, num_classes).to(device)
    return Training(args, device, model.to(device), criterion)
