"""The embedded model can be made again: each of its parts by its config, and the same each time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxgen.load import open_model
from jaxgen.training import configs

ROOT = Path(__file__).parents[2]
SHORT = "--steps 3 --batch-size 4 --log-every 1 --samples.prompts --data.threads 2".split()


def losses(part, out, cache):
    """Of the first steps of a part's config, run as the README says but shorter."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "jaxgen", "train", str(ROOT / f"configs/mini_{part}.py")]
    done = subprocess.run(
        [*command, *SHORT, "--out", str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


SLOW = [pytest.param(part, marks=pytest.mark.slow) for part in ("vae", "unet")]


@pytest.mark.parametrize("part", ["clip", *SLOW])
def test_a_part_is_made_again_with_the_same_losses(part, tmp_path):
    first, second = (losses(part, tmp_path / name, tmp_path / "cache") for name in "ab")
    assert len(first) == 3
    assert first == pytest.approx(second, rel=1e-5)
    model, _ = open_model(tmp_path / "a" / "model")
    assert (model.tokenizer.size, model.tokenizer.length) == (1199, 40)


def test_parts_are_learned_from_nothing_on_scenes_of_the_training_split():
    for part, name in {"vae": "vae", "clip": "text_encoder", "unet": "unet"}.items():
        config = configs.read(ROOT / f"configs/mini_{part}.py", ())
        assert config.data.source == "emoji_scenes"
        assert name in config.task.fresh
