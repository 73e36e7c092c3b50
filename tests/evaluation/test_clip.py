"""CLIP scores against transformers; what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from jaxgen.evaluation import clip
from jaxgen.refs import ASSETS
from jaxgen.types import UserError
from tests.torch_oracle import error, randomise

TEXTS = ["a red apple", "an owl left of a fox, flat style", "", "a crab on a blue " * 12]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny CLIP with every parameter random, as transformers writes it."""
    torch.manual_seed(0)
    widths = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    widths |= {"num_attention_heads": 2}
    text = {**widths, "vocab_size": 1199, "max_position_embeddings": 40, "hidden_act": "gelu"}
    text |= {"bos_token_id": 1197, "eos_token_id": 1198, "pad_token_id": 1198}
    vision = {**widths, "image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    randomise(model)
    out = tmp_path_factory.mktemp("clip")
    model.save_pretrained(out)
    shutil.copytree(ASSETS / "mini" / "tokenizer", out, dirs_exist_ok=True)
    return out


def pictures():
    rng = np.random.default_rng(0)
    sizes = [(32, 32), (64, 64), (50, 41), (37, 90)]
    small = (rng.integers(0, 256, (5, 5, 3)).astype(np.uint8) for _ in sizes)
    return [np.asarray(Image.fromarray(x).resize(s[::-1])) for x, s in zip(small, sizes)]


@torch.no_grad()
def test_embeddings_and_scores_are_those_of_transformers(folder):
    theirs = CLIPModel.from_pretrained(folder).eval()
    size = {"shortest_edge": 32}
    process = CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32})
    pixels = process(pictures(), return_tensors="pt")["pixel_values"]
    tokens = CLIPTokenizer.from_pretrained(folder)(
        TEXTS, padding="max_length", truncation=True, max_length=40, return_tensors="pt"
    )
    wanted = theirs(pixel_values=pixels, **tokens)

    ours = clip.open_clip(folder)
    assert error(clip.embed_images(ours, pictures()), wanted.image_embeds) < 1e-5
    assert error(clip.embed_texts(ours, TEXTS), wanted.text_embeds) < 1e-5
    cosines = (wanted.image_embeds * wanted.text_embeds).sum(-1)
    assert error(clip.clip_score(ours, pictures(), TEXTS), 100 * cosines.clamp(min=0)) < 1e-5


def test_retrieval_counts_who_is_nearest(folder, monkeypatch):
    scores = np.array([[3, 0, 0, 2], [5, 4, 0, 0], [1, 0, 2, 0], [0, 0, 9, 1]], np.float32)
    monkeypatch.setattr(clip, "embed_images", lambda *_: scores)
    monkeypatch.setattr(clip, "embed_texts", lambda *_: np.eye(4, dtype=np.float32))
    found = clip.retrieval(clip.open_clip(folder), pictures(), TEXTS)
    assert found == {"caption of a picture": 0.5, "picture of a caption": 0.25}


def test_a_batch_more_changes_nothing(folder, monkeypatch):
    ours = clip.open_clip(folder)
    whole = clip.embed_images(ours, pictures())
    monkeypatch.setattr(clip, "BATCH", 3)
    assert error(clip.embed_images(ours, pictures()), whole) < 1e-5


@pytest.mark.parametrize("damage", ["missing", "kind", "tensor"])
def test_what_is_no_clip_is_one_line(folder, tmp_path, damage):
    if damage != "missing":
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    data = json.loads((folder / "config.json").read_text())
    if damage == "kind":
        (tmp_path / "config.json").write_text(json.dumps(data | {"model_type": "siglip"}))
    if damage == "tensor":
        data["vision_config"]["num_hidden_layers"] = 3
        (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(UserError) as raised:
        clip.open_clip(tmp_path)
    assert str(tmp_path) in str(raised.value)
    if damage == "tensor":  # all are listed
        assert "vision_model.encoder.layers.2.mlp.fc1.weight" in str(raised.value)
    else:
        assert "\n" not in str(raised.value)


def test_a_vocabulary_that_does_not_fit_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "clip")
    path = tmp_path / "clip" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 77}))
    with pytest.raises(UserError, match="fills 77 places, its text encoder 1199 and 40"):
        clip.open_clip(tmp_path / "clip")


def test_each_picture_needs_a_text(folder):
    with pytest.raises(UserError, match="4 pictures have 3 texts"):
        clip.clip_score(clip.open_clip(folder), pictures(), TEXTS[:3])
