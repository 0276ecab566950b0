"""IRNet: parameter counts, feature maps, one block by hand, initialisation."""
import pytest
import torch

from nets import irnet

HEADS_68_10 = (512 + 1) * (68 + 2 * 68 + 2 * 680)


@pytest.mark.parametrize(("depth", "millions"), [(18, 11.98), (50, 31.54), (100, 53.11)])
def test_parameter_count_with_heads_is_the_published_one(depth, millions):
    with torch.device("meta"):
        model = irnet.IRNet(depth)
    count = sum(p.numel() for p in model.parameters()) + HEADS_68_10
    assert round(count / 1e6, 2) == millions


def test_features_have_the_declared_channels_and_strides():
    model = irnet.IRNet(18).eval()
    with torch.no_grad():
        features = model(torch.randn(2, 3, 64, 64))
    assert len(features) == 4
    for feature, channels, stride in zip(features, model.channels, model.strides):
        assert feature.shape == (2, channels, 64 // stride, 64 // stride)
        assert torch.isfinite(feature).all()


def test_input_of_256_has_an_8_x_8_grid():
    with torch.device("meta"):
        model = irnet.IRNet(100)
        assert model(torch.empty(1, 3, 256, 256))[-1].shape == (1, 512, 8, 8)


def test_block_is_norm_conv_conv_plus_the_subsampled_input():
    torch.manual_seed(0)
    block = irnet.Block(4, 4, 2, "prelu").eval()
    for norm in (block.norm, block.first.norm, block.second.norm):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.running_mean)
    x = torch.randn(1, 4, 6, 6)
    branch = torch.nn.functional.conv2d(block.norm(x), block.first.conv.weight, padding=1)
    branch = block.first.norm(branch)
    branch = torch.where(branch > 0, branch, 0.25 * branch)
    branch = torch.nn.functional.conv2d(branch, block.second.conv.weight, stride=2, padding=1)
    expected = block.second.norm(branch) + x[:, :, ::2, ::2]
    torch.testing.assert_close(block(x), expected)
    assert (block(x) < 0).any()


def test_a_relu_network_has_no_prelu_weights():
    with torch.device("meta"):
        prelu, relu = irnet.IRNet(18), irnet.IRNet(18, "relu")
    extra = set(prelu.state_dict()) - set(relu.state_dict())
    assert len(extra) == 1 + 8
    assert all(name.endswith("act.weight") for name in extra)


def test_every_parameter_gets_a_gradient():
    model = irnet.IRNet(18)
    sum(f.square().mean() for f in model(torch.randn(2, 3, 64, 64))).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_initialisation_is_kaiming_fan_out():
    weight = irnet.IRNet(18).stages[3][1].second.conv.weight
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.02)


@pytest.mark.parametrize("arguments", [(34,), (18, "gelu")])
def test_unknown_depth_or_activation_is_refused(arguments):
    with pytest.raises(ValueError, match="expected one of"):
        irnet.IRNet(*arguments)
