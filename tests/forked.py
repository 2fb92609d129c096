"""Processes forked from one that has imported train.py: to import torch anew takes seconds."""

import multiprocessing
import os
import shlex
import sys
from multiprocessing import forkserver
from pathlib import Path

import torch
import torch._inductor.config  # noqa: F401 (else every run's optimizer imports it)

import train
from runs import finish
from tests import toy  # noqa: F401 (it adds --model toy)
from utils import run

ROOT = Path(__file__).parent.parent


def start(function, *args):
    """A process that calls function(*args) in the current folder, and writes to `out` and `err`."""
    here = os.getcwd()
    forkserver.set_forkserver_preload(["tests.forked"])
    os.chdir(ROOT)  # where that is looked for
    try:
        made = multiprocessing.get_context("forkserver").Process(
            target=in_folder, args=(here, torch.get_num_threads(), function, *args)
        )
        made.start()
    finally:
        os.chdir(here)
    return made


def in_folder(here, threads, function, *args):
    os.chdir(here)
    multiprocessing.set_start_method("fork", force=True)  # of workers, as in a process of its own
    os.setsid()
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    torch.set_num_threads(threads)
    function(*args)


def train_py(flags):
    """python train.py FLAGS, but for its curves"""
    finish.draw_curves = lambda history: b"a picture"
    sys.argv = ["train.py", *shlex.split(flags)]
    run(train.main)
