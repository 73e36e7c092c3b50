"""`jaxgen train` and `jaxgen cache`: runs that a config states."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tyro.conf import Positional

from jaxgen import terminal


@dataclass(frozen=True)
class Train:
    """Train a model, or go on with a run that was stopped.

    jaxgen train configs/mini.py --data.source FOLDER --steps 500

    jaxgen train configs/mini.py --help      # everything that a config states

    Checkpoints, metrics.jsonl, TensorBoard files and samples go to the config's folder `out`; in
    the end its `model` is a folder that `jaxgen sample --model` and diffusers load. SIGTERM and
    Ctrl-C save first; the same command goes on from there.
    """

    config: Positional[Path]
    """A Python file that states `config = Train(...)`, as those in configs/ do."""
    options: Positional[tuple[str, ...]] = ()
    """--field value, for any field of the config, as in --optimizer.learning-rate 3e-4."""

    def run(self) -> None:
        """Reads the config, then trains."""
        from jaxgen.training import configs, loop  # what only training needs is slow to import

        parse = partial(terminal.parse, prog=f"jaxgen train {self.config}")
        recipe = configs.read(self.config, self.options, parse)
        terminal.use_compile_cache()
        with terminal.notices_at_once():
            folder = loop.train(recipe)
        if folder:
            print(f"the model is in {folder}; jaxgen sample PROMPT --model {folder}")
        else:
            print(f"stopped and saved in {recipe.out}; the same command goes on from there")


@dataclass(frozen=True)
class Cache:
    """Compute once what training would compute each epoch: latents and text embeddings.

    jaxgen cache configs/mini.py --data.source FOLDER --out CACHE

    jaxgen train configs/mini.py --data.source CACHE

    For text to image, whose VAE does not learn; where the text encoder does, latents alone are
    stored. Captions are still dropped and, where the config says `flip`, pictures mirrored: the
    losses are those of the pictures.
    """

    config: Positional[Path]
    """A Python file that states `config = Train(...)`: model, data, size and flip are read."""
    options: Positional[tuple[str, ...]] = ()
    """--field value, for any field of the config but `out`, as in --data.size 64."""
    out: Path = Path("cache")
    """A new or empty folder for the cache."""

    def run(self) -> None:
        """Reads the config, then the pictures once."""
        from jaxgen.cache import cache  # what only training needs is slow to import
        from jaxgen.data.cached import describe
        from jaxgen.training import configs

        parse = partial(terminal.parse, prog=f"jaxgen cache {self.config}")
        recipe = configs.read(self.config, self.options, parse)
        terminal.use_compile_cache()
        with terminal.notices_at_once():
            folder = cache(recipe, self.out)
        held = describe(str(folder))
        assert held is not None
        size = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
        print(f"{held.examples} examples are in {self.out}, {size:.1f} MiB")
        if held.skipped:
            print(f"bad ones left out: {held.skipped}")
        if not held.text:
            print("they hold latents alone: the text encoder learns")
        print(f"to train on them: jaxgen train {self.config}, with --data.source {self.out}")
