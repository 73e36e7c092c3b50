"""The parts of a model as folders: how each is stored, and opened with every name checked."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen import config, trees
from jaxgen.models.clip import TextEncoder
from jaxgen.models.controlnet import ControlNet
from jaxgen.models.unet import UNet
from jaxgen.models.vae import VAE
from jaxgen.types import Params, UserError
from jaxgen.weights import files, rename
from jaxgen.weights.files import Tensors


@dataclasses.dataclass(frozen=True)
class Part:
    """How one part of a model folder is stored.

    `read` makes the network from its config, `dump` the config of a network; `tidy` brings old
    tensor names up to date.
    """

    folder: str
    stem: str
    library: str
    class_name: str
    read: Callable[[Mapping[str, Any], str], Any]
    tidy: Callable[[Tensors], Tensors] = lambda tensors: tensors

    def open(self, folder: Path, variant: str = "") -> tuple[Any, Tensors]:
        """The network in a folder, and its tensors under their released names; none is read."""
        where = folder / "config.json"
        data = config.read_json(where)
        found = data.get("_class_name", self.class_name)
        if found != self.class_name:
            raise UserError(f"{where} is of {found}, not of {self.class_name}")
        network = self.read(data, str(where))
        return network, self.tidy(files.open_folder(folder, self.stem, variant))


PARTS = {
    "unet": Part("unet", "diffusion_pytorch_model", "diffusers", "UNet2DConditionModel", UNet.read),
    "vae": Part(
        "vae", "diffusion_pytorch_model", "diffusers", "AutoencoderKL", VAE.read, rename.modern_vae
    ),
    "text_encoder": Part(
        "text_encoder",
        "model",
        "transformers",
        "CLIPTextModel",
        TextEncoder.read,
        rename.prefixed_text,
    ),
}
CONTROLNET = Part(
    "controlnet", "diffusion_pytorch_model", "diffusers", "ControlNetModel", ControlNet.read
)


def checked(network: Any, released: Tensors, where: str) -> Tensors:
    """Released tensors under their paths.

    Raises:
        UserError: unless they are all that the network has; it names every one that is not.
    """
    tensors = rename.by_path(released)
    expected = trees.flatten(trees.shapes(network.init))
    whole = [rename.to_key(p) for p, t in tensors.items() if t.dtype not in files.FLOATS]
    files.report(_keys(expected), _keys(tensors), where, whole)
    return tensors


def _keys(flat: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes and names as released: what a reader of the error can look up in the file."""

    def released(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if path.endswith("/kernel"):
            return tuple(shape[i] for i in rename.TO_TORCH[len(shape)])
        return tuple(shape)

    return {rename.to_key(path): released(path, leaf.shape) for path, leaf in flat.items()}


def released(params: Params) -> Iterator[tuple[str, Callable[[], np.ndarray], int]]:
    """Keys, values and sizes of a tree as PyTorch has them."""
    for path, leaf in trees.flatten(params).items():

        def read(path: str = path, leaf: Any = leaf) -> np.ndarray:
            array = np.asarray(leaf)
            if path.endswith("/kernel"):
                array = array.transpose(rename.TO_TORCH[array.ndim])
            return array

        yield rename.to_key(path), read, leaf.nbytes
