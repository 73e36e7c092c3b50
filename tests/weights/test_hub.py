"""The hub without a network: what is asked of it, and what is said when it does not answer."""

import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from jaxgen.types import UserError
from jaxgen.weights import hub

TINY = Path(__file__).parents[1] / "assets" / "tiny"


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Neither a cache nor a connection; the client is told nothing about it."""

    def fail(self, *args, **kwargs):
        raise ConnectionError("cannot reach huggingface.co\nTraceback of many lines")

    def absent(*args, **kwargs):
        if kwargs.get("local_files_only"):
            raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")
        raise ConnectionError("cannot reach huggingface.co")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", absent)


def offline_error(ref):
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        hub.fetch(ref)
    assert time.monotonic() - start < 5
    assert "\n" not in str(error.value)
    assert ref in str(error.value)
    assert "copy the model folder here and pass its path" in str(error.value)
    return str(error.value)


def test_without_a_network_the_error_says_how_to_go_on(no_network):
    assert "cannot reach huggingface.co" in offline_error("someone/something")


def test_the_offline_mode_of_the_client_is_obeyed_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    offline_error("someone/something")


def test_a_whole_model_in_the_cache_is_not_asked_for(monkeypatch):
    def cached(ref, local_files_only=False, **kwargs):
        assert local_files_only
        return str(TINY)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    assert hub.fetch("someone/something") == TINY


def test_what_a_repository_of_one_part_is_says_its_config(monkeypatch, no_network):
    """Nothing is asked for where a whole model is in the cache."""
    unet, asked = TINY / "unet", []

    def download(ref, name):
        asked.append(name)
        return str(unet / name)

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda ref, name: None)
    assert hub.part_config("someone/nothing") == {}
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert hub.part_config("someone/part")["_class_name"] == "UNet2DConditionModel"
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda ref, name: str(TINY))
    assert hub.part_config("someone/model") == {}
    assert asked == ["config.json"]


@pytest.mark.parametrize("absent", ["all but the tokenizer", "unet/*.safetensors", "vae/config*"])
def test_a_part_of_a_model_in_the_cache_is_completed(monkeypatch, tmp_path, absent):
    folder = shutil.copytree(TINY, tmp_path / "model")
    if absent == "all but the tokenizer":
        (folder / "model_index.json").unlink()
        for part in ("unet", "vae", "text_encoder", "scheduler"):
            shutil.rmtree(folder / part)
    for path in folder.glob(absent):
        path.unlink()
    names = [str(path.relative_to(TINY)) for path in TINY.rglob("*.*")]
    asked = []

    def download(ref, local_files_only=False, allow_patterns=()):
        asked.append(sorted(allow_patterns))
        return str(folder if local_files_only else TINY)

    siblings = [SimpleNamespace(rfilename=name) for name in [*names, "README.md"]]
    info = SimpleNamespace(siblings=siblings)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **kwargs: info)
    assert hub.fetch("someone/something") == TINY
    assert asked == [[], sorted(names)]


@pytest.mark.parametrize(
    ("ref", "is_id"),
    [
        ("runwayml/stable-diffusion-v1-5", True),
        ("a/b.c_d", True),
        ("model", False),
        ("./a/b", False),
        ("/a/b", False),
        ("../a", False),
        ("a/b/c", False),
        ("a/", False),
        ("", False),
    ],
)
def test_an_id_is_an_organisation_and_a_name(ref, is_id):
    assert hub.is_id(ref) == is_id


def test_of_a_repository_only_one_precision_of_a_model_folder_is_wanted():
    unet = "unet/diffusion_pytorch_model"
    kept = [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/model.fp16.safetensors",  # all there is
        "tokenizer/merges.txt",
        "unet/config.json",
        f"{unet}.safetensors",
        "vae/diffusion_pytorch_model-00001-of-00002.safetensors",
        "vae/diffusion_pytorch_model.safetensors.index.json",
    ]
    refused = [
        "README.md",
        "v1-5-pruned.safetensors",
        "safety_checker/model.safetensors",
        f"{unet}.bin",
        f"{unet}.fp16.safetensors",
        f"{unet}.non_ema.safetensors",
        "vae/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
    ]
    assert sorted(hub.wanted(kept + refused)) == sorted(kept)


def test_a_variant_is_wanted_where_there_is_one_and_the_plain_file_elsewhere():
    unet = "unet/diffusion_pytorch_model"
    kept = [
        "model_index.json",
        "unet/config.json",
        f"{unet}.fp16-00001-of-00002.safetensors",
        f"{unet}.safetensors.index.fp16.json",
        "text_encoder/model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",  # all there is in half precision
    ]
    refused = [
        f"{unet}-00001-of-00002.safetensors",
        f"{unet}.safetensors.index.json",
        "text_encoder/model.safetensors",
        "vae/diffusion_pytorch_model.non_ema.safetensors",
    ]
    assert sorted(hub.wanted(kept + refused, "fp16")) == sorted(kept)


def test_a_model_is_whole_where_some_parts_have_the_variant_and_others_plain_files(tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "model")
    assert hub.is_whole(folder)
    assert not hub.is_whole(folder, "fp16")
    (path,) = (folder / "unet").glob("*.safetensors")
    path.rename(path.with_suffix(".fp16.safetensors"))
    assert hub.is_whole(folder, "fp16")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert not hub.is_whole(folder, "fp16")
