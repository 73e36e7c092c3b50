"""`jaxgen info` and `jaxgen convert`: model folders and files."""

import math
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from jaxgen import controls, terminal
from jaxgen.load import STORED, describe, open_model, read_params
from jaxgen.save import check_new, save, save_control
from jaxgen.types import UserError


@dataclass(frozen=True)
class Info:
    """Show what a model holds: parts, sizes, prediction type, branches."""

    ref: Positional[str]
    """A folder, a hub id, a single safetensors file, or fresh:NAME."""
    variant: str = ""
    """Which of a folder's files to read, where it holds several: fp16, ..."""

    def run(self) -> None:
        """Reads headers alone; what a hub id names is fetched first."""
        with terminal.notices_after():
            say = describe_control if controls.is_control(self.ref) else describe
            text = say(self.ref, self.variant)
        print(text)


@dataclass(frozen=True)
class Convert:
    """Write a model as a folder that diffusers loads, in safetensors.

    jaxgen convert v1-5-pruned.safetensors sd15

    jaxgen convert control_v11p_sd15_canny.safetensors canny    # a ControlNet alone
    """

    src: Positional[str]
    """A folder, a hub id, a single safetensors file, or fresh:NAME."""
    dst: Positional[Path]
    """A new or empty folder."""
    dtype: str | None = None
    """f32, bf16 or f16; by default each tensor keeps its own (float64 becomes float32)."""
    prediction: str | None = None
    """What the network predicts, where a single file does not say: epsilon, v_prediction or
    sample."""
    variant: str = ""
    """Which of a folder's files to read, where it holds several: fp16, ..."""

    def run(self) -> None:
        """All of it or nothing."""
        if self.dtype not in (None, *STORED):
            raise UserError(f"--dtype {self.dtype} is not one of {', '.join(STORED)}")
        check_new(self.dst)
        with terminal.notices_after():
            if controls.is_control(self.src):
                net, found = controls.open_control(self.src, self.variant)
                params = read_params({"controlnet": found}, self.dtype)
                save_control(net, params["controlnet"], self.dst)
            else:
                model, tensors = open_model(self.src, self.variant, self.prediction)
                save(model, read_params(tensors, self.dtype), self.dst)
        print(f"{self.src} is now in {self.dst}")


def describe_control(ref: str, variant: str = "") -> str:
    """What a ControlNet holds, in lines for people."""
    net, tensors = controls.open_control(ref, variant)
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
