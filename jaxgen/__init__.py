"""Controllable, personalised Stable Diffusion in JAX and Flax."""

from jaxgen.data.hints import Hint
from jaxgen.generate import sample
from jaxgen.load import load
from jaxgen.save import save
from jaxgen.types import UserError

__all__ = ["Hint", "UserError", "load", "sample", "save"]
__version__ = "0.1.0"
