"""--precision: what is computed in which type, and which settings of the process that takes."""

import json
import shlex
from pathlib import Path

import pytest
import torch

import evaluate
import search
import train
import utils
from losses import LOSSES, PROXY_LOSSES
from net import create_model, load_model
from net.export import save_model
from recipe import build_training, prepare_epoch, settle_loss, train_step
from tests.conftest import TINY, checkpoint_of, fails, make_cub, make_folder, metrics, run_folder
from tests.operations import Operations
from tests.test_net import BACKBONES

PIXELS = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8)


def convolutions(seen):
    """Notes the (inputs, weights) that convolutions are computed with, behind autocast."""

    def look(operation, args, _):
        if operation is torch.ops.aten.convolution.default:
            seen.append(args[:2])

    return Operations(look)


def test_frozen_batchnorm_is_folded_in_float32_and_then_cast_to_bfloat16():
    torch.manual_seed(0)
    model = create_model("bn_inception", 8, precision="bf16").eval()
    layers = dict(model.model.named_modules())
    folded = []
    for name, bn in layers.items():
        if name.endswith("_bn"):
            bn.running_var.uniform_(0.5, 1.5)
            bn.weight.data.uniform_(0.5, 1.5)
            scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
            folded.append((layers[name[:-3]].weight * scale.view(-1, 1, 1, 1)).bfloat16())
    with convolutions(seen := []):
        model(model.prepare(PIXELS))
    assert len(seen) == len(folded) == 69
    for (inputs, weight), expected in zip(seen, folded):
        assert inputs.dtype == torch.bfloat16 and torch.equal(weight, expected)


def training(flags):
    args = train.build_parser().parse_args(shlex.split(TINY + flags))
    settle_loss(args)
    return build_training(args, 2, torch.device("cpu"), None)


def step_of(side):
    """A training step, after which loss, parameters and gradients are float32 and finite."""
    images = side.model.prepare(PIXELS[:, :32, :32])
    step = train_step(side.model, side.criterion, side.optimizer, images, torch.arange(4) % 2)
    parameters = [*side.model.parameters(), *side.criterion.parameters()]
    gradients = [p.grad for p in parameters if p.grad is not None]
    assert all(x.dtype == torch.float32 and x.isfinite().all()
               for x in (step["loss"], *parameters, *gradients))  # fmt: skip


@pytest.mark.parametrize("bn_freeze", [True, False])
@pytest.mark.parametrize("name", ["toy", "bn_inception"])
def test_bf16_trains_float32_parameters_through_bfloat16_maps_and_float32_heads(name, bn_freeze):
    side = training(f"--model {name} --precision bf16")
    model, maps, heads = side.model, [], []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda *call: maps.append(call[2].dtype))
    for head in model.heads():
        head.register_forward_hook(lambda *call: heads.extend([call[1][0].dtype, call[2].dtype]))
    prepare_epoch(model, epoch=1, warm=1, bn_freeze=bn_freeze)
    before = model.model.embedding.weight.detach().clone()
    with convolutions(seen := []):
        step_of(side)
    assert {x.dtype for pair in seen for x in pair} == {torch.bfloat16}
    assert set(maps) <= {torch.bfloat16} and heads == [torch.float32] * 4
    assert not torch.equal(model.model.embedding.weight, before)


@pytest.mark.parametrize("flags", [*(f"--loss {name} --disent False" for name in LOSSES),
                                   *(f"--loss {name}" for name in PROXY_LOSSES)])  # fmt: skip
def test_bf16_hands_each_loss_float32_embeddings_and_leaves_float32_parameters(flags):
    side, seen = training(f"--precision bf16 {flags}"), []
    metric_loss = getattr(side.criterion, "metric_loss", side.criterion)
    metric_loss.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    step_of(side)
    assert seen == [torch.float32]


@pytest.mark.parametrize("name", BACKBONES)
def test_bf16_embeds_near_float32(name):
    torch.manual_seed(0)
    model = create_model(name, 64).eval()
    with torch.inference_mode():
        expected = model.embed(model.prepare(PIXELS))
        model.precision = "bf16"
        embeddings = model.embed(model.prepare(PIXELS))
    assert embeddings.dtype == torch.float32
    assert 0 < (embeddings - expected).abs().max() < 1e-2


def settings():
    """(of products, of convolutions): whether they are in TF32."""
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("precision, words, tf32", [
    ("fp32", "float32", False),
    ("tf32", "TF32", True),
    ("bf16", "bfloat16", False),
])  # fmt: skip
def test_each_script_sets_and_each_run_records_its_precision(
    here, capsys, precision, words, tf32
):  # fmt: skip
    make_folder(here / "photos")
    command = f"{TINY} --dataset folder --data-root photos --precision {precision}"

    def settings_after(main, flags):
        utils.set_precision("fp32" if tf32 else "tf32")
        main(shlex.split(f"{flags} --workers 0"))
        return settings()

    assert settings_after(train.main, command) == (tf32, tf32)
    assert f", {words}: 2 epochs" in capsys.readouterr().out
    folder = run_folder(here)
    assert json.loads((folder / "args.json").read_text())["flags"]["precision"] == precision
    assert ("_precision" in folder.name) == (precision != "fp32")
    last = checkpoint_of(folder)
    found = f"--gallery photos --query '{next(here.glob('photos/*/*'))}'"
    for main, flags in ((evaluate.main, f"'{last}'"), (search.main, f"--resume '{last}' {found}")):
        assert settings_after(main, flags) == (tf32, tf32)
        assert settings_after(main, f"{flags} --precision fp32") == (False, False)
        assert settings_after(main, f"{flags} --precision tf32") == (True, True)
    assert load_model(last).precision == precision
    assert load_model(last, "fp32").precision == "fp32"


def test_a_run_from_before_the_flag_continues_and_evaluates_in_float32(here, capsys):
    make_cub(here / "data")
    train.main(shlex.split(TINY + "--epochs 1"))
    last = checkpoint_of(run_folder(here))
    for path in run_folder(here).glob("*.pth"):
        checkpoint = torch.load(path)
        del checkpoint["args"]["precision"]
        torch.save(checkpoint, path)
    assert "--precision bf16" in fails(f"--resume {last} --precision bf16", capsys)
    train.main(shlex.split(f"--resume {last} --epochs 2"))
    assert "float32: 1 epoch of" in capsys.readouterr().out
    assert len(metrics(run_folder(here))) == 2
    evaluate.main(shlex.split(f"{last} --workers 0 --json recalls.json"))
    recalls, trained = json.loads(Path("recalls.json").read_text()), metrics(run_folder(here))[-1]
    assert recalls.items() >= {k: v for k, v in trained.items() if k.startswith("R@")}.items()


def test_an_index_of_another_precision_is_refused(here, capsys):
    make_folder(here / "photos")
    train.main(shlex.split(TINY + "--dataset folder --data-root photos --epochs 1"))
    query = next(here.glob("photos/*/*"))
    flags = f"--resume '{run_folder(here)}' --query '{query}' --workers 0 --gallery "
    search.main(shlex.split(flags + "photos --save-index G.npz"))
    line = fails(flags + "G.npz --precision bf16", capsys, search.main)
    assert "an index of another checkpoint, --precision or --background" in line
    search.main(shlex.split(flags + "photos --save-index H.npz --precision bf16"))
    search.main(shlex.split(flags + "H.npz --precision bf16"))
    assert "0 of them embedded now" in capsys.readouterr().out


def test_a_network_is_exported_in_float32(tmp_path):
    model = create_model("toy", 8, precision="bf16").eval()
    save_model([model], tmp_path / "toy.pt2", 64, "#ffffff")
    model.precision = "fp32"
    exported = torch.export.load(tmp_path / "toy.pt2").module()
    torch.testing.assert_close(exported(PIXELS), model.embed(model.prepare(PIXELS)))
