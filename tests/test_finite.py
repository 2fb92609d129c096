"""Numbers that are not finite are neither applied nor saved."""

import shlex

import pytest
import torch

import train
from tests.conftest import TINY, fails, make_cub, metrics, run_folder
from utils import read_checkpoint


@pytest.mark.parametrize("flags", ["--lr 1e9 --weight-decay 1e9", "--lr 1e9 --optimizer sgd"])
def test_an_update_that_overflows_is_not_saved(here, capsys, flags):
    make_cub(here / "data")
    assert "finite" in fails(TINY + flags + " --checkpoint-every 1 --epochs 9", capsys)
    for path in run_folder(here).glob("*.pth"):
        for part in ("model_state_dict", "criterion_state_dict"):
            assert all(t.isfinite().all() for t in read_checkpoint(path)[part].values()), path


@pytest.mark.parametrize("where", ["specific", "gradient"])
def test_a_number_that_is_not_finite_is_neither_applied_nor_saved(here, capsys, monkeypatch, where):
    make_cub(here / "data")
    train.main(shlex.split(TINY + "--epochs 1"))
    folder = run_folder(here)
    before = (folder / "cub_bn_inception_last.pth").read_bytes()
    original = train.DDML.forward

    def forward(self, head, head_specific, *rest):
        total, terms = original(self, head, head_specific, *rest)
        if where == "gradient":
            head.register_hook(lambda gradient: gradient * float("inf"))
            return total, terms
        return total * float("nan"), terms | {where: terms[where] * float("nan")}

    monkeypatch.setattr(train.DDML, "forward", forward)
    error = fails(TINY + "--resume", capsys)
    assert "epoch 1, step 0: the " in error and error.count(".jpg") == 8
    assert ("gradient" if where == "gradient" else "loss") in error
    assert (folder / "cub_bn_inception_last.pth").read_bytes() == before
    assert len(metrics(folder)) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_does_not_move_a_weight(bad):
    args = train.build_parser().parse_args(shlex.split(TINY + "--optimizer sgd --weight-decay 0"))
    model = train.create_model("bn_inception", 8, disent=True)
    criterion = train.build_criterion(args, 2)
    optimizer, _ = train.build_optimizer(args, model, criterion)
    train.prepare_epoch(model, epoch=1, warm=1, bn_freeze=True)
    before = [p.clone() for p in (*model.parameters(), *criterion.parameters())]
    model.model.embedding.bias.register_hook(lambda gradient: gradient * bad)
    values = train.train_step(
        model, criterion, optimizer, torch.randn(4, 3, 32, 32), torch.arange(4) % 2
    )
    assert values["loss"].isfinite() and not values["gradient"].isfinite()
    after = [*model.parameters(), *criterion.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
