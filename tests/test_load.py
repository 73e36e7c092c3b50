"""Reading model folders: errors that say what to do, and no more memory than it takes."""

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

import jaxgen
from jaxgen import sharding, trees
from jaxgen.load import PREDICTIONS, place
from jaxgen.types import UserError
from jaxgen.weights.files import Tensor

TINY = Path(__file__).parent / "assets" / "tiny"
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def refused(ref, *words, **kwargs):
    """Loading fails with one line that holds the words."""
    with pytest.raises(UserError) as error:
        jaxgen.load(ref, **kwargs)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_every_tensor_that_does_not_fit_is_named_at_once(folder):
    tensors = load_file(folder / UNET)
    del tensors["conv_in.bias"], tensors["mid_block.resnets.1.norm2.weight"]
    tensors["position_net.null"] = np.zeros(3, np.float32)
    tensors["conv_out.weight"] = tensors["conv_out.weight"][:3]
    tensors["conv_norm_out.weight"] = np.zeros((2, 16), np.float32)
    save_file(tensors, folder / UNET)
    refused(
        folder,
        "unet does not fit its config",
        "2 missing: conv_in.bias, mid_block.resnets.1.norm2.weight",
        "1 unexpected: position_net.null",
        "2 misshapen: conv_norm_out.weight is [2, 16] and should be [16]",
        "conv_out.weight is [3, 16, 3, 3] and should be [4, 16, 3, 3]",
    )


def test_every_part_that_does_not_fit_is_named_at_once(folder):
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    whole = ("conv_in.bias", "conv_out.bias")
    unet = load_file(folder / UNET)
    save_file(unet | {key: unet[key].astype(np.int32) for key in whole}, folder / UNET)
    save_file(load_file(vae) | {"spare.bias": np.zeros(3, np.float32)}, vae)
    refused(
        folder,
        "unet does not fit its config; 2 of whole numbers: conv_in.bias, conv_out.bias; ",
        "vae does not fit its config; 1 unexpected: spare.bias",
    )


def test_a_kernel_with_too_many_axes_is_misshapen(folder):
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    key = "decoder.mid_block.attentions.0.to_q.weight"  # 1x1 there, as in old files, is well
    save_file(load_file(path) | {key: np.zeros((32, 32, 3, 3), np.float32)}, path)
    refused(folder, f"vae does not fit its config; 1 misshapen: {key} is [32, 32, 3, 3]")


def test_what_a_shard_holds_beside_its_index_is_unexpected(folder):
    tensors, name = load_file(folder / UNET), "diffusion_pytorch_model-00001-of-00001.safetensors"
    (folder / UNET).unlink()
    save_file(tensors | {"spare.bias": np.zeros(3, np.float32)}, folder / "unet" / name)
    index = json.dumps({"weight_map": dict.fromkeys(tensors, name)})
    (folder / f"{UNET}.index.json").write_text(index)
    refused(folder, "unet does not fit its config; 1 unexpected: spare.bias")


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def edit_vae(folder, name, out_channels):
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    edit(folder / "vae" / "config.json", out_channels=out_channels)
    tensors = load_file(path)
    cut = {k: v[:out_channels] for k, v in tensors.items() if k.startswith(name)}
    save_file(tensors | cut, path)


DAMAGE = {
    "an empty folder": (empty, "neither that nor any part of a model"),
    "no index": (lambda f: (f / "model_index.json").unlink(), "only unet, vae, text_encoder"),
    "a cut file": (lambda f: (f / UNET).write_bytes((f / UNET).read_bytes()[:-9]), "truncated"),
    "no weights": (lambda f: (f / UNET).unlink(), "has no diffusion_pytorch_model.safetensors"),
    "pickles only": (
        lambda f: (f / UNET).rename((f / UNET).with_suffix(".bin")),
        "a pickle, which can run code",
    ),
    "no config": (lambda f: (f / "vae" / "config.json").unlink(), "cannot read"),
    "a cut config": (lambda f: (f / "vae" / "config.json").write_text("{"), "not valid JSON"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "scheduler_config.json"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer"),
    "SDXL": (
        lambda f: edit(f / "model_index.json", _class_name="StableDiffusionXLPipeline"),
        "whole SDXL folders are not yet",
    ),
    "Flux": (
        lambda f: edit(f / "model_index.json", _class_name="FluxPipeline"),
        "is of FluxPipeline; only the Stable Diffusion 1.x and 2.x families",
    ),
    "a ControlNet for a UNet": (
        lambda f: edit(f / "unet" / "config.json", _class_name="ControlNetModel"),
        "is of ControlNetModel, not of UNet2DConditionModel",
    ),
    "T5 for CLIP": (
        lambda f: edit(f / "text_encoder" / "config.json", model_type="t5"),
        "model_type 't5'",
    ),
    "GLIGEN": (
        lambda f: edit(f / "unet" / "config.json", attention_type="gated"),
        "attention_type = 'gated' is not supported",
    ),
    "another text width": (
        lambda f: edit(f / "unet" / "config.json", cross_attention_dim=48),
        "the text encoder is 32 wide, the UNet reads 48",
    ),
    "another latent": (
        lambda f: edit(f / "vae" / "config.json", latent_channels=16),
        "the VAE has 16 latent channels, the UNet predicts 4",
    ),
    "a VAE of masks": (
        lambda f: edit_vae(f, "decoder.conv_out", out_channels=1),
        "the VAE has out_channels = 1, and pictures have 3",
    ),
    "another vocabulary": (
        lambda f: edit(f / "text_encoder" / "config.json", vocab_size=599),
        "the tokenizer knows 600 tokens, the text encoder 599",
    ),
    "a longer tokenizer": (
        lambda f: edit(f / "tokenizer" / "tokenizer_config.json", model_max_length=78),
        "the tokenizer fills 78 places, the text encoder has 77",
    ),
    "no scheduler's name": (
        lambda f: edit(f / "scheduler" / "scheduler_config.json", _class_name=None),
        "does not name its _class_name",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_folder_that_cannot_be_read_is_an_error_of_one_line(case, folder):
    damage, words = DAMAGE[case]
    damage(folder)
    refused(folder, str(folder), words)


def test_a_misspelt_folder_is_met_with_a_suggestion(folder):
    refused(folder.parent / "modle", "no model folder or file", f"did you mean {folder}?")
    refused(folder.parent / "nothing" / "like" / "it", "no model folder or file")


def test_arguments_out_of_range_are_named(folder):
    refused(TINY, "dtype 'f8' is not one of f32, bf16", dtype="f8")
    refused(TINY, "prediction 'eps' is not one of epsilon, v_prediction", prediction="eps")
    refused(TINY, "has files of variant fp16; leave it out", variant="fp16")
    refused(folder / "model_index.json", "not safetensors")


@pytest.mark.parametrize("prediction", [None, *PREDICTIONS])
def test_a_prediction_that_is_given_is_the_models(prediction):
    model = jaxgen.load(TINY, prediction=prediction)[0]
    assert model.scheduler["prediction_type"] == (prediction or "epsilon")


def test_a_hub_id_without_a_network_is_an_error_of_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    refused("someone/something", "no folder someone/something", "pass its path")


def test_a_device_is_given_its_own_slice_and_nothing_else_is_read():
    values = np.arange(16 * 6, dtype=np.float32).reshape(16, 6)
    read = []

    def block(index):
        read.append(values[index].nbytes)
        return values[index]

    mesh = sharding.data_mesh(8)
    where = NamedSharding(mesh, PartitionSpec("data"))
    array = place(Tensor(values.shape, values.dtype, block), np.dtype(np.float16), where)
    assert read == [values.nbytes // 8] * 8
    assert array.dtype == np.float16
    for i, shard in enumerate(array.addressable_shards):
        np.testing.assert_array_equal(shard.data, values[2 * i : 2 * i + 2])


def test_rules_say_how_parameters_lie_on_the_mesh():
    mesh = sharding.data_mesh(2)
    rules = [(r"^unet/.*conv1/kernel$", PartitionSpec(None, None, None, "data"))]
    params = jaxgen.load(TINY, mesh=mesh, rules=rules)[1]
    alone = jaxgen.load(TINY)[1]
    kernel = params["unet"]["down_blocks.0"]["resnets.0"]["conv1"]["kernel"]
    assert {s.data.shape for s in kernel.addressable_shards} == {(3, 3, 16, 8)}
    leaves = trees.flatten(params)
    assert {len(leaf.addressable_shards) for leaf in leaves.values()} == {2}
    conv1 = {path for path in leaves if path.endswith("conv1/kernel")}
    split = {path for path, leaf in leaves.items() if not leaf.is_fully_replicated}
    assert split == {path for path in conv1 if path.startswith("unet/")}
    assert any(path.startswith("vae/") for path in conv1)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, alone))


MEASURE = """
    import re, sys, threading, time, jax, jaxgen

    def anonymous():
        return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])

    jaxgen.load(sys.argv[1])  # everything imported and compiled
    before, peak, done = anonymous(), 0, False

    def watch():
        global peak
        while not done:
            peak = max(peak, anonymous())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    params = jaxgen.load(sys.argv[2])[1]
    jax.block_until_ready(params)
    done = True
    thread.join()
    print((peak - before) / sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_loading_takes_little_more_memory_than_the_weights(folder):
    config = folder / "unet" / "config.json"
    edit(config, block_out_channels=[256, 1024])  # 610 MB: of less, a compiler's 100 MB are much
    with torch.device("meta"):
        shapes = UNet2DConditionModel.from_config(json.loads(config.read_text())).state_dict()
    save_file({k: np.ones(v.shape, np.float32) for k, v in shapes.items()}, folder / UNET)
    script = [sys.executable, "-c", textwrap.dedent(MEASURE), str(TINY), str(folder)]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    (folder / UNET).unlink()
    assert float(done.stdout) < 1.3
