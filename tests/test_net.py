"""The network's interface and how it reads weights."""

import hashlib

import pytest
import torch
from torch import nn

from benchmarks.network import Plain
from net import backbones, create_model, l2_normalize, load_model
from net.bn_inception import BNInception
from recipe import prepare_epoch
from storage import write_checkpoint
from utils import UserError

D = 8
IMAGES = torch.linspace(-100, 100, 2 * 3 * 64 * 64).view(2, 3, 64, 64)


@pytest.fixture(scope="module")
def disent():
    torch.manual_seed(0)
    return create_model("bn_inception", D, disent=True).eval()


@pytest.fixture
def imagenet(tmp_path, disent):
    """A file as the ImageNet one: no prefix, no heads or counters, some [1, ...] tensors."""
    state = {}
    for name, tensor in disent.state_dict().items():
        if "embedding" in name or name.endswith("num_batches_tracked"):
            continue
        lead = name.endswith("_bn.weight")
        state[name.removeprefix("model.")] = tensor.unsqueeze(0) if lead else tensor.clone()
    path = tmp_path / "bn_inception.pth"
    torch.save(state, path)
    return path, state


def test_embed_is_the_normalised_mean(disent):
    mu = disent(IMAGES)[0][:, :D]
    torch.testing.assert_close(disent.embed(IMAGES), mu / mu.norm(dim=1, keepdim=True))


def test_without_l2_norm_the_specific_head_reads_the_same_vector(disent):
    plain = create_model("bn_inception", D, disent=True, l2_norm=False).eval()
    plain.load_state_dict(disent.state_dict())
    head, head_specific = plain(IMAGES)
    torch.testing.assert_close(head_specific, plain.model.embedding_specific(head))
    torch.testing.assert_close(disent(IMAGES)[0], head / head.norm(dim=1, keepdim=True))
    torch.testing.assert_close(plain.embed(IMAGES), disent.embed(IMAGES))


@pytest.mark.parametrize("value, norm", [(0.0, 0.0), (10.0, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_of_any_precision_are_normalised_without_overflow(dtype, value, norm):
    x = l2_normalize(torch.full((1, 1024), value, dtype=dtype))
    assert x.dtype == dtype and x.float().norm().item() == pytest.approx(norm, rel=1e-2)


@pytest.fixture
def ours_and_plain():
    """Our backbone and the one without any folding, of the same weights, in float64."""
    torch.manual_seed(0)
    ours, plain = BNInception().double(), Plain().double()
    for name, tensor in ours.state_dict().items():
        if "_bn." in name and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def test_frozen_batchnorm_folded_gives_the_values_and_gradients_of_single_layers(ours_and_plain):
    results = []
    for model in ours_and_plain:
        images = IMAGES.double().requires_grad_()
        features = model.eval().features(images)
        features.square().sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if "last_linear" not in n}
        results.append({"features": features, "images": images.grad, **gradients})
    ours, plain = results
    assert len(ours) == 2 + 4 * 69
    for name, expected in plain.items():
        size = expected.abs().max()
        assert size > 0, name
        torch.testing.assert_close(ours[name] / size, expected / size, rtol=0, atol=1e-9, msg=name)


def test_batchnorm_that_trains_is_not_folded_and_follows_the_batch(ours_and_plain):
    ours, plain = ours_and_plain
    before = {name: buffer.clone() for name, buffer in ours.named_buffers()}
    with torch.no_grad():
        torch.testing.assert_close(ours.features(IMAGES.double()), plain.features(IMAGES.double()))
    after = dict(plain.named_buffers())
    for name, buffer in ours.named_buffers():
        assert not torch.equal(buffer, before[name]), name
        torch.testing.assert_close(buffer, after[name], msg=name)


def test_heads_start_kaiming_normal_with_zero_bias():
    head, specific = create_model("bn_inception", 128, disent=True).heads()
    for layer in (head, specific):
        assert layer.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.02)
        assert not layer.bias.any()


def test_imagenet_file_loads_by_name_and_leaves_the_heads(imagenet):
    path, state = imagenet
    model = create_model("bn_inception", D, weights=str(path))
    torch.testing.assert_close(model.model.conv1_7x7_s2.weight.data, state["conv1_7x7_s2.weight"])
    bn = state["inception_5b_pool_proj_bn.weight"].squeeze(0)
    torch.testing.assert_close(model.model.inception_5b_pool_proj_bn.weight.data, bn)


def test_imagenet_file_is_refused_for_any_other_difference(imagenet, tmp_path):
    path, state = imagenet
    del state["conv2_3x3.bias"]
    state["surplus"] = torch.zeros(1)
    torch.save(state, path)
    with pytest.raises(UserError, match=r"missing model.conv2_3x3.bias; unexpected model.surplus"):
        create_model("bn_inception", D, weights=str(path))


def test_checkpoint_loads_network_alone(tmp_path, disent):
    path = tmp_path / "published.pth"
    torch.save({"model_state_dict": disent.state_dict(), "epoch": 3}, path)
    model = create_model("bn_inception", D, disent=True, weights=str(path)).eval()
    assert torch.equal(model.embed(IMAGES), disent.embed(IMAGES))


@pytest.mark.parametrize("name", ["bn_inception", "googlenet", "resnet18"])
def test_download_names_cache_and_host_and_the_way_out(tmp_path, name):
    with pytest.raises(UserError) as error:
        create_model(name, D, weights="imagenet")
    for part in (str(tmp_path / "hub"), "http", "--weights PATH", "--weights none"):
        assert part in str(error.value)


def test_download_is_checked_against_the_whole_sha256(monkeypatch, imagenet):
    path, _ = imagenet
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    asked = []

    def download(url, destination, hash_prefix):
        asked.append(hash_prefix)
        with open(destination, "wb") as file:
            file.write(path.read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(UserError, match=f"damaged.*{digest}"):
        create_model("bn_inception", D, weights="imagenet")
    assert asked == ["52deb473314542a5c2f87e9e6f26f4ca42fe863d15f986414dbae8c2dfdd2353"]
    original = backbones.download
    monkeypatch.setattr(backbones, "download", lambda url, _: original(url, digest))
    create_model("bn_inception", D, weights="imagenet")


# --- what every backbone has --------------------------------------------------------------------

BACKBONES = [*(name for name in backbones.BACKBONES if name not in ("resnet50", "resnet101")),
             "timm/vit_tiny_patch16_224", "timm/swin_tiny_patch4_window7_224",
             "timm/mobilenetv3_small_050"]  # fmt: skip
PIXELS = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_takes_pixels_to_heads_and_normalised_embeddings(name):
    torch.manual_seed(0)
    model = create_model(name, D, disent=True).eval()
    images = model.prepare(PIXELS)
    assert images.shape == (2, 3, 64, 64)
    assert images.is_contiguous(memory_format=torch.channels_last)
    head, head_specific = model(images)
    assert head.shape == head_specific.shape == (2, 2 * D)
    # GoogLeNet's random weights leave so little signal that the 1e-12 under the root shows
    assert model.embed(images).norm(dim=1).tolist() == pytest.approx([1, 1], rel=1e-4)
    assert model.pool(images).shape == (2, model.num_features(64))


@pytest.mark.parametrize("name", ["resnet18", "timm/vit_tiny_patch16_224"])
def test_a_file_of_the_backbone_alone_loads_by_name_and_leaves_the_heads(tmp_path, name):
    model = create_model(name, D)
    state = dict(backbones.create_backbone(name).network.state_dict())
    for prefix in model.backbone.unused:
        state[f"{prefix}weight"] = torch.zeros(1)  # the classifier, which timm's file has
    torch.save(state, tmp_path / "file.pth")
    loaded = create_model(name, D, weights=str(tmp_path / "file.pth")).state_dict()
    assert all(torch.equal(loaded[f"model.{key}"], state[key])
               for key in state if f"model.{key}" in loaded)  # fmt: skip
    del state[next(iter(state))]
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(UserError, match="missing model"):
        create_model(name, D, weights=str(tmp_path / "file.pth"))


def test_pooling_is_average_plus_maximum_of_maps_and_a_transformers_own_of_tokens():
    resnet = create_model("resnet18", D).eval()
    x = resnet.prepare(PIXELS)
    net = resnet.model
    layers = net.conv1, net.bn1, net.relu, net.maxpool, net.layer1, net.layer2, net.layer3
    maps = net.layer4(nn.Sequential(*layers)(x))
    expected = maps.mean(dim=(2, 3)) + maps.amax(dim=(2, 3))
    torch.testing.assert_close(resnet.pool(x), expected)
    vit = create_model("timm/vit_tiny_patch16_224", D).eval()
    tokens = vit.model.forward_features(vit.prepare(PIXELS))
    torch.testing.assert_close(vit.pool(vit.prepare(PIXELS)), tokens[:, 0])


@pytest.mark.parametrize("name, order, mean, std, resized", [
    ("bn_inception", (2, 1, 0), (104, 117, 128), (1, 1, 1), "bilinear"),
    ("resnet18", (0, 1, 2), (123.675, 116.28, 103.53), (58.395, 57.12, 57.375), "bilinear"),
    ("googlenet", (0, 1, 2), 3 * (127.5,), 3 * (127.5,), "bilinear"),
    ("timm/vit_tiny_patch16_224", (0, 1, 2), 3 * (127.5,), 3 * (127.5,), "bicubic"),
])  # fmt: skip
def test_images_are_prepared_as_the_network_wants_them(name, order, mean, std, resized):
    model, rgb = create_model(name, D), torch.tensor([10, 20, 30], dtype=torch.uint8)
    images = model.prepare(rgb.expand(1, 64, 64, 3))
    expected = [(rgb[c].item() - m) / s for c, m, s in zip(order, mean, std)]
    assert images[0, :, 5, 5].tolist() == pytest.approx(expected, rel=1e-5)
    assert model.interpolation == resized


class OneOfEach(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.one, self.two, self.three = nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.BatchNorm3d(4)
        self.synchronised, self.layer = nn.SyncBatchNorm(4), nn.LayerNorm(4)


def test_bn_freeze_holds_every_batchnorm_and_leaves_layernorm_alone(monkeypatch):
    row = backbones.Backbone(OneOfEach(), lambda net, x: net.conv(x).mean(dim=(2, 3)))
    monkeypatch.setitem(backbones.BACKBONES, "each", lambda: row)
    model = create_model("each", D)
    prepare_epoch(model, epoch=0, warm=0, bn_freeze=True)
    for name in ("one", "two", "three", "synchronised"):
        module = getattr(model.model, name)
        assert not module.training and not module.weight.requires_grad
    assert model.model.layer.training and model.model.layer.weight.requires_grad


@pytest.mark.parametrize("name, disent", [("resnet18", False), ("timm/vit_tiny_patch16_224", True)])
def test_load_model_rebuilds_a_checkpoint_of_ours(tmp_path, name, disent):
    model = create_model(name, D, disent).eval()
    flags = {"model": name, "embedding_size": D, "l2_norm": True, "disent": disent}
    write_checkpoint(tmp_path / "a.pth", {"model_state_dict": model.state_dict(), "args": flags})
    loaded = load_model(tmp_path / "a.pth")
    assert loaded.name == name and not loaded.training
    assert torch.equal(loaded.embed(loaded.prepare(PIXELS)), model.embed(model.prepare(PIXELS)))


def test_a_network_with_parameters_of_five_dimensions_is_built():
    net = create_model("timm/lambda_resnet26t", 8)
    assert any(parameter.ndim == 5 for parameter in net.parameters())
    assert net.num_features(256) > 0


def test_preparing_leaves_the_pixels_as_they_are():
    pixels = torch.rand(2, 8, 8, 3) * 255
    before = pixels.clone()
    create_model("toy", 8).prepare(pixels)
    assert torch.equal(pixels, before)


def test_a_checkpoint_that_does_not_tell_what_its_network_is_is_refused(tmp_path):
    torch.save({"model_state_dict": {"x": torch.ones(1)}}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match="no model.embedding.weight"):
        load_model(tmp_path / "odd.pth")
