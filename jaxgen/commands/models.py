"""`jaxgen info` and `jaxgen convert`: model folders and files."""

import math
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from jaxgen import controls
from jaxgen.load import describe, load, read_params
from jaxgen.save import check_new, save, save_control


@dataclass(frozen=True)
class Info:
    """Show what a model holds: parts, sizes, prediction type, branches."""

    ref: Positional[str]
    """A folder, a hub id or a single safetensors file."""

    def run(self) -> None:
        """Reads headers alone."""
        print(describe_control(self.ref) if controls.is_control(self.ref) else describe(self.ref))


@dataclass(frozen=True)
class Convert:
    """Write a model as a folder that diffusers loads, in safetensors.

    jaxgen convert v1-5-pruned.safetensors sd15

    jaxgen convert control_v11p_sd15_canny.safetensors canny    # a ControlNet alone
    """

    src: Positional[str]
    """A folder, a hub id or a single safetensors file."""
    dst: Positional[Path]
    """A new or empty folder."""
    dtype: str | None = None
    """f32 or bf16; by default each tensor keeps its own."""
    prediction: str | None = None
    """What the network predicts, where a single file does not say: epsilon or v_prediction."""

    def run(self) -> None:
        """All of it or nothing."""
        check_new(self.dst)
        if controls.is_control(self.src):
            net, tensors = controls.open_control(self.src)
            params = read_params({"controlnet": tensors}, self.dtype)
            save_control(net, params["controlnet"], self.dst)
        else:
            save(*load(self.src, dtype=self.dtype, prediction=self.prediction), self.dst)
        print(f"{self.src} is now in {self.dst}")


def describe_control(ref: str) -> str:
    """What a ControlNet holds, in lines for people."""
    net, tensors = controls.open_control(ref)
    count = sum(math.prod(tensor.shape) for tensor in tensors.values())
    config = net.config
    return "\n".join(
        [
            f"{ref}: a ControlNet",
            f"  parameters    {count:>13,}",
            f"  base          text {config.encoder.cross_attention_dim} wide, "
            f"blocks of {config.encoder.block_out_channels} channels",
            f"  hints         {config.conditioning_channels} channels, f = {config.factor}",
        ]
    )
