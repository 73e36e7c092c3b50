"""The embedded model can be made again: each of its parts by its config, and the same each time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxgen.load import open_model
from jaxgen.training import configs

ROOT = Path(__file__).parents[2]
STEPS = 20
SHORT = "--batch-size 4 --log-every 1 --samples.prompts --data.threads 2".split()


def losses(part, out, cache, *options):
    """Of the first steps of a part's config, run as the README says but with a tiny batch."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "jaxgen", "train", str(ROOT / f"configs/mini_{part}.py")]
    command += ["--steps", str(STEPS), *SHORT, "--out", str(out), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def chain(out, cache):
    """Losses of all parts, each on the model that the one before made."""
    found, base = {}, ()
    for part in ("vae", "decoder", "clip", "unet"):
        found[part] = losses(part, out / part, cache, *base)
        base = ("--task.model", str(out / part / "model"))
    return found


@pytest.mark.slow
def test_a_part_is_made_again_with_the_same_losses(tmp_path):
    first, second = (losses("clip", tmp_path / name, tmp_path / "cache") for name in "ab")
    assert len(first) == STEPS
    assert first == pytest.approx(second, rel=1e-5)
    model, _ = open_model(tmp_path / "a" / "model")
    assert (model.tokenizer.size, model.tokenizer.length) == (1199, 40)


@pytest.mark.slow
def test_all_parts_are_made_again_from_nothing_one_on_the_other(tmp_path):
    first, second = (chain(tmp_path / name, tmp_path / "cache") for name in "ab")
    for part, found in first.items():
        assert len(found) == STEPS
        assert found == pytest.approx(second[part], rel=1e-5), part
    begun, made, whole = (
        open_model(tmp_path / "a" / part / "model")[1]["vae"] for part in ("vae", "decoder", "unet")
    )
    for path, tensor in made.items():  # and not of the model that ships
        np.testing.assert_array_equal(value(whole[path]), value(tensor))
        learned = path.split("/")[0] in ("decoder", "post_quant_conv")
        assert learned != np.array_equal(value(begun[path]), value(tensor)), path


def value(tensor):
    return tensor.read(tuple(slice(0, side) for side in tensor.shape))


def test_parts_are_learned_from_nothing_on_scenes_of_the_training_split():
    for part, name in {"vae": "vae", "clip": "text_encoder", "unet": "unet"}.items():
        config = configs.read(ROOT / f"configs/mini_{part}.py", ())
        assert config.data.source == "emoji_scenes"
        assert name in config.task.fresh
