"""Single files against diffusers' own converter and against the architectures built in torch.

The layout of a single file is written out below from CompVis's description of the networks: rows of
blocks, numbered through. It shares nothing with the rules under test.
"""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, UNet2DConditionModel
from diffusers.loaders import single_file_utils as oracle
from safetensors.numpy import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from jaxgen.types import UserError
from jaxgen.weights import single_file
from jaxgen.weights.files import Tensor, open_file


def affine(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def ldm_resnet(name, i, o, emb):
    return (
        affine(f"{name}.in_layers.0", i)
        | affine(f"{name}.in_layers.2", o, i, 3, 3)
        | affine(f"{name}.emb_layers.1", o, emb)
        | affine(f"{name}.out_layers.0", o)
        | affine(f"{name}.out_layers.3", o, o, 3, 3)
        | (affine(f"{name}.skip_connection", o, i, 1, 1) if i != o else {})
    )


def ldm_transformer(name, c, context, linear):
    block = f"{name}.transformer_blocks.0"
    kernel = (c, c) if linear else (c, c, 1, 1)
    keys = affine(f"{name}.norm", c)
    keys |= affine(f"{name}.proj_in", *kernel) | affine(f"{name}.proj_out", *kernel)
    for attn, width in (("attn1", c), ("attn2", context)):
        keys |= {f"{block}.{attn}.to_q.weight": (c, c)}
        keys |= {f"{block}.{attn}.to_{x}.weight": (c, width) for x in "kv"}
        keys |= affine(f"{block}.{attn}.to_out.0", c, c)
    keys |= affine(f"{block}.ff.net.0.proj", 8 * c, c) | affine(f"{block}.ff.net.2", c, 4 * c)
    return keys | {k: s for i in "123" for k, s in affine(f"{block}.norm{i}", c).items()}


def ldm_unet(widths, layers, context, linear, channels=4):
    """All levels but the last attend, as in every Stable Diffusion 1.x and 2.x."""
    emb, last = 4 * widths[0], len(widths) - 1
    keys = affine("time_embed.0", emb, widths[0]) | affine("time_embed.2", emb, emb)
    keys |= affine("input_blocks.0.0", widths[0], channels, 3, 3)
    c, n, skips = widths[0], 1, [widths[0]]
    for level, width in enumerate(widths):
        for _ in range(layers):
            keys |= ldm_resnet(f"input_blocks.{n}.0", c, width, emb)
            if level != last:
                keys |= ldm_transformer(f"input_blocks.{n}.1", width, context, linear)
            c, n = width, n + 1
            skips.append(c)
        if level != last:
            keys |= affine(f"input_blocks.{n}.0.op", c, c, 3, 3)
            n += 1
            skips.append(c)
    keys |= ldm_resnet("middle_block.0", c, c, emb) | ldm_resnet("middle_block.2", c, c, emb)
    keys |= ldm_transformer("middle_block.1", c, context, linear)
    n = 0
    for level, width in reversed(list(enumerate(widths))):
        for j in range(layers + 1):
            keys |= ldm_resnet(f"output_blocks.{n}.0", c + skips.pop(), width, emb)
            c = width
            if level != last:
                keys |= ldm_transformer(f"output_blocks.{n}.1", c, context, linear)
            if level and j == layers:
                slot = 1 if level == last else 2
                keys |= affine(f"output_blocks.{n}.{slot}.conv", c, c, 3, 3)
            n += 1
    keys |= affine("out.0", c) | affine("out.2", 4, c, 3, 3)
    return {f"model.diffusion_model.{k}": s for k, s in keys.items()}


def ldm_vae(widths, layers):
    def block(name, i, o):
        keys = affine(f"{name}.norm1", i) | affine(f"{name}.conv1", o, i, 3, 3)
        keys |= affine(f"{name}.norm2", o) | affine(f"{name}.conv2", o, o, 3, 3)
        return keys | (affine(f"{name}.nin_shortcut", o, i, 1, 1) if i != o else {})

    top, last = widths[-1], len(widths) - 1
    keys = affine("quant_conv", 8, 8, 1, 1) | affine("post_quant_conv", 4, 4, 1, 1)
    keys |= affine("encoder.conv_in", widths[0], 3, 3, 3) | affine("decoder.conv_in", top, 4, 3, 3)
    keys |= affine("encoder.norm_out", top) | affine("decoder.norm_out", widths[0])
    keys |= affine("encoder.conv_out", 8, top, 3, 3)
    keys |= affine("decoder.conv_out", 3, widths[0], 3, 3)
    for side in ("encoder", "decoder"):
        keys |= block(f"{side}.mid.block_1", top, top) | block(f"{side}.mid.block_2", top, top)
        keys |= affine(f"{side}.mid.attn_1.norm", top)
        for x in ("q", "k", "v", "proj_out"):
            keys |= affine(f"{side}.mid.attn_1.{x}", top, top, 1, 1)
    c = widths[0]
    for level, width in enumerate(widths):
        for j in range(layers):
            keys |= block(f"encoder.down.{level}.block.{j}", c, width)
            c = width
        if level != last:
            keys |= affine(f"encoder.down.{level}.downsample.conv", c, c, 3, 3)
    for level, width in reversed(list(enumerate(widths))):
        for j in range(layers + 1):
            keys |= block(f"decoder.up.{level}.block.{j}", c, width)
            c = width
        if level:
            keys |= affine(f"decoder.up.{level}.upsample.conv", c, c, 3, 3)
    return {f"first_stage_model.{k}": s for k, s in keys.items()}


def ldm_clip(width, layers, vocabulary):
    keys = {
        "embeddings.token_embedding.weight": (vocabulary, width),
        "embeddings.position_embedding.weight": (77, width),
    }
    keys |= affine("final_layer_norm", width)
    for i in range(layers):
        layer = f"encoder.layers.{i}"
        for x in "qkv":
            keys |= affine(f"{layer}.self_attn.{x}_proj", width, width)
        keys |= affine(f"{layer}.self_attn.out_proj", width, width)
        keys |= affine(f"{layer}.layer_norm1", width) | affine(f"{layer}.layer_norm2", width)
        keys |= affine(f"{layer}.mlp.fc1", 4 * width, width)
        keys |= affine(f"{layer}.mlp.fc2", width, 4 * width)
    return {f"cond_stage_model.transformer.text_model.{k}": s for k, s in keys.items()}


def ldm_open_clip(width, layers, vocabulary):
    keys = {"positional_embedding": (77, width), "token_embedding.weight": (vocabulary, width)}
    keys |= {"text_projection": (width, width), "logit_scale": ()} | affine("ln_final", width)
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        keys |= {f"{block}.attn.in_proj_weight": (3 * width, width)}
        keys |= {f"{block}.attn.in_proj_bias": (3 * width,)}
        keys |= affine(f"{block}.attn.out_proj", width, width)
        keys |= affine(f"{block}.ln_1", width) | affine(f"{block}.ln_2", width)
        keys |= affine(f"{block}.mlp.c_fc", 4 * width, width)
        keys |= affine(f"{block}.mlp.c_proj", width, 4 * width)
    return {f"cond_stage_model.model.{k}": s for k, s in keys.items()}


NOISE = {
    "betas": (1000,),
    "sqrt_one_minus_alphas_cumprod": (1000,),
    "posterior_mean_coef1": (1000,),
    "model_ema.diffusion_modeltime_embed0weight": (4, 4),
    "model_ema.decay": (),
    "first_stage_model.loss.logvar": (),
}
VAE = ldm_vae([32, 64], 1)
CLIP, OPEN_CLIP = ldm_clip(32, 2, 50), ldm_open_clip(64, 24, 50)
IDS = {"cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77)}
FIRST = ldm_unet([32, 64], 2, 32, linear=False) | VAE | CLIP | NOISE | IDS
SHAPES = {
    "1.x": FIRST,
    "1.x inpainting": ldm_unet([32, 64], 2, 32, False, channels=9) | VAE | CLIP,
    "2.x": ldm_unet([32, 64, 128], 1, 64, linear=True) | VAE | OPEN_CLIP,
}


def tensors_of(shapes):
    """Tensors without values: what is asked of them must do with names and shapes."""
    return {k: Tensor(tuple(s), np.dtype(np.float32), None) for k, s in shapes.items()}


@pytest.fixture(scope="module", params=SHAPES)
def checkpoint(request, tmp_path_factory):
    """Name, path and values (torch) of a tiny random single file."""
    rng = np.random.default_rng(0)
    shapes = SHAPES[request.param]
    values = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    save_file(values, path)
    return request.param, path, {k: torch.from_numpy(v.copy()) for k, v in values.items()}


def converted(values, configs):
    """What diffusers makes of the file, with the prefix `text_model.` that it drops or keeps."""
    clip = oracle.convert_ldm_clip_checkpoint(dict(values))
    if configs["text_encoder"]["hidden_act"] == "gelu":
        some_clip = CLIPTextModel(CLIPTextConfig(**configs["text_encoder"]))
        clip = oracle.convert_open_clip_checkpoint(some_clip, dict(values))
    clip.pop("text_model.embeddings.position_ids", None)
    return {
        "unet": oracle.convert_ldm_unet_checkpoint(dict(values), configs["unet"]),
        "vae": oracle.convert_ldm_vae_checkpoint(dict(values), configs["vae"]),
        "text_encoder": clip,
    }


def test_every_tensor_is_what_diffusers_converts_it_to(checkpoint):
    _, path, values = checkpoint
    tensors = open_file(path)
    parts = single_file.split(tensors, str(path))
    expected = converted(values, single_file.configs(tensors, path))
    assert parts.keys() == expected.keys()
    for name, part in parts.items():
        assert part.keys() == expected[name].keys()
        for key, tensor in part.items():
            theirs = expected[name][key].numpy()
            assert tensor.shape == theirs.shape, key
            np.testing.assert_array_equal(tensor.numpy(), theirs, err_msg=key)
            block = tuple(slice(n // 3, n // 2 + 1) for n in tensor.shape)
            np.testing.assert_array_equal(tensor.read(block), theirs[block], err_msg=key)


def test_parts_load_strictly_into_torch_models_of_the_inferred_configs(checkpoint):
    _, path, _ = checkpoint
    tensors = open_file(path)
    parts, configs = single_file.split(tensors, str(path)), single_file.configs(tensors, path)
    with torch.device("meta"):
        models = {
            "unet": UNet2DConditionModel.from_config(configs["unet"]),
            "vae": AutoencoderKL.from_config(configs["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
        }
    for name, model in models.items():
        state = {
            k.removeprefix("text_model."): torch.from_numpy(np.array(t.numpy()))
            for k, t in parts[name].items()
        }
        model.load_state_dict(state, strict=True, assign=True)


FULL = {
    "1.5": (
        ldm_unet([320, 640, 1280, 1280], 2, 768, linear=False),
        ldm_clip(768, 12, 49408),
        {"cross_attention_dim": 768, "attention_head_dim": 8},
        {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
        {"num_hidden_layers": 12, "hidden_act": "quick_gelu"},
        859_520_964,
    ),
    "2.1": (
        ldm_unet([320, 640, 1280, 1280], 2, 1024, linear=True),
        ldm_open_clip(1024, 24, 49408),
        {
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
            "upcast_attention": True,
            "sample_size": 96,
        },
        {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16},
        {"num_hidden_layers": 23, "hidden_act": "gelu"},
        865_910_724,
    ),
}


@pytest.mark.parametrize("version", FULL)
def test_full_size_files_have_the_keys_and_configs_of_the_released_folders(version):
    unet, text, unet_config, widths, rest, count = FULL[version]
    tensors = tensors_of(unet | ldm_vae([128, 256, 512, 512], 2) | text)
    parts, configs = single_file.split(tensors, "it"), single_file.configs(tensors)
    with torch.device("meta"):  # the defaults of UNet2DConditionModel are those of 1.5
        expected = {
            "unet": UNet2DConditionModel(**({"sample_size": 64} | unet_config)),
            "vae": AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                sample_size=512 if version == "1.5" else 768,
            ),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**widths, **rest)),
        }
    for name, model in expected.items():
        shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
        ours = {k.removeprefix("text_model."): t.shape for k, t in parts[name].items()}
        assert ours == shapes
        theirs = dict(model.config) if name != "text_encoder" else model.config.to_dict()
        for key, value in configs[name].items():
            if key not in ("_class_name", "architectures"):
                assert value == (list(v) if isinstance(v := theirs[key], tuple) else v), key
    assert sum(int(np.prod(t.shape)) for t in parts["unet"].values()) == count


def test_noise_is_dropped_and_an_unknown_tensor_is_left_in_its_part_or_logged(caplog):
    stray = {
        "model.diffusion_model.input_blocks.1.0.gate.weight": (1,),
        "model.diffusion_model.input_blocks.0.0.op.weight": (1,),  # no downsampler stands there
        "first_stage_model.encoder.down.0.block.0.odd": (1,),
        "cond_stage_model.transformer.text_model.more": (1,),
        "scale_factor": (),
    }
    parts = single_file.split(tensors_of(FIRST | stray), "a.safetensors")
    bare = single_file.split(tensors_of({k: s for k, s in FIRST.items() if k not in NOISE}), "b")
    assert {name: sorted(parts[name].keys() - bare[name].keys()) for name in parts} == {
        "unet": ["conv_in.op.weight", "down_blocks.0.resnets.0.gate.weight"],
        "vae": ["encoder.down_blocks.0.resnets.0.odd"],
        "text_encoder": ["text_model.more"],
    }
    assert [r.getMessage() for r in caplog.records] == [
        "a.safetensors: ignored 1 unknown tensors: scale_factor"
    ]


def test_a_text_encoder_of_the_old_prefix_reads_the_same():
    old = {k.replace(".text_model.", "."): s for k, s in FIRST.items()}
    expected = single_file.split(tensors_of(FIRST), "it")["text_encoder"]
    assert single_file.split(tensors_of(old), "it")["text_encoder"].keys() == expected.keys()


@pytest.mark.parametrize(("blocks", "kept"), [(24, 23), (23, 23), (5, 4)])
def test_only_a_block_that_conditions_nothing_is_dropped(blocks, kept):
    shapes = SHAPES["2.x"].keys() - OPEN_CLIP.keys()
    file = {k: SHAPES["2.x"][k] for k in shapes} | ldm_open_clip(64, blocks, 50)
    configs = single_file.configs(tensors_of(file), prediction_type="epsilon")
    assert configs["text_encoder"]["num_hidden_layers"] == kept


def test_input_channels_heads_and_layers_are_those_of_the_shapes():
    pix = ldm_unet([32, 64], 2, 32, False, channels=8) | VAE | CLIP
    assert single_file.configs(tensors_of(pix))["unet"]["in_channels"] == 8
    unet = single_file.configs(tensors_of(SHAPES["1.x inpainting"]))["unet"]
    assert (unet["in_channels"], unet["attention_head_dim"], unet["layers_per_block"]) == (9, 8, 2)
    unet = single_file.configs(tensors_of(SHAPES["2.x"]))["unet"]
    assert (unet["attention_head_dim"], unet["layers_per_block"]) == ([1, 1, 2], 1)


@pytest.mark.parametrize(
    ("name", "yaml", "given", "prediction", "size", "warns"),
    [
        ("1.x", None, None, "epsilon", 64, False),
        ("1.x", '    parameterization: "v"  # finetuned', None, "v_prediction", 64, False),
        ("2.x", None, None, "v_prediction", 96, True),
        ("2.x", "model:\n  params:\n    parameterization: 'v'", None, "v_prediction", 96, False),
        ("2.x", "model:\n  params:\n    linear_start: 0.1", None, "epsilon", 64, False),
        ("2.x", "    parameterization: v", "epsilon", "epsilon", 64, False),
        ("2.x", None, "epsilon", "epsilon", 64, False),
    ],
)
def test_prediction_type_is_given_or_read_beside_the_file_or_guessed_aloud(
    name, yaml, given, prediction, size, warns, tmp_path, caplog
):
    if yaml:
        (tmp_path / "a.yaml").write_text(yaml)
    with caplog.at_level(logging.WARNING):
        tensors = tensors_of(SHAPES[name])
        configs = single_file.configs(tensors, tmp_path / "a.safetensors", given)
    assert configs["scheduler"]["prediction_type"] == prediction
    assert configs["unet"]["sample_size"] == size
    assert configs["unet"]["upcast_attention"] == (size == 96)
    assert ("`--prediction epsilon`" in caplog.text) == warns


def test_an_inpainting_model_of_2_is_taken_to_predict_epsilon(caplog):
    file = ldm_unet([32, 64], 2, 64, True, channels=9) | VAE | OPEN_CLIP
    configs = single_file.configs(tensors_of(file))
    assert configs["scheduler"]["prediction_type"] == "epsilon"
    assert not caplog.text


@pytest.mark.parametrize(
    ("prediction", "cls"), [("epsilon", PNDMScheduler), ("v_prediction", DDIMScheduler)]
)
def test_the_scheduler_is_the_one_of_the_released_folders(prediction, cls):
    config = single_file.configs(tensors_of(SHAPES["2.x"]), None, prediction)["scheduler"]
    theirs = cls.from_config(config)
    assert config["_class_name"] == cls.__name__
    np.testing.assert_allclose(theirs.alphas_cumprod[-1], 0.00466010, rtol=1e-5)  # methods.md 1.5
    theirs.set_timesteps(50)
    assert theirs.timesteps[0] == 981


BROKEN = {
    "SDXL": (FIRST | {"conditioner.embedders.1.model.ln_final.bias": (4,)}, "Stable Diffusion XL"),
    "Flux": ({"double_blocks.0.img_attn.norm.key_norm.scale": (4,)}, "Flux"),
    "ControlNet": ({"control_model.time_embed.0.weight": (4, 4)}, "a ControlNet"),
    "LoRA": ({"lora_unet_mid_block.lora_down.weight": (4, 4)}, "a LoRA"),
    "depth": (SHAPES["2.x"] | {"depth_model.model.a": (4,)}, "depth"),
    "VAE alone": ({k.removeprefix("first_stage_model."): s for k, s in VAE.items()}, "one part"),
    "no VAE": ({k: s for k, s in FIRST.items() if k not in VAE}, "no vae"),
    "something else": ({"transformer.wte.weight": (4, 4)}, "no unet"),
    "a key twice": (
        FIRST | {"cond_stage_model.transformer.final_layer_norm.bias": (4,)},
        "final_layer_norm.bias twice",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_of_another_kind_is_named_in_one_line(case):
    shapes, words = BROKEN[case]
    for read in (single_file.split, single_file.configs):
        with pytest.raises(UserError, match=words) as error:
            read(tensors_of(shapes), Path("x.safetensors"))
        assert "x.safetensors" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.input_blocks.1.1.proj_in.weight",
        "model.diffusion_model.input_blocks.4.0.out_layers.3.weight",
        "first_stage_model.encoder.down.0.block.0.conv2.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
    ],
)
@pytest.mark.parametrize("shape", [None, ()], ids=["missing", "scalar"])
def test_a_file_cut_or_changed_where_shapes_are_read_is_an_error_of_one_line(key, shape):
    shapes = {k: s for k, s in FIRST.items() if k != key} | ({key: shape} if shape == () else {})
    with pytest.raises(UserError, match=r"^x\.safetensors has no .*of \d axes"):
        single_file.configs(tensors_of(shapes), Path("x.safetensors"))


def test_an_unknown_prediction_type_is_refused_with_the_options():
    with pytest.raises(UserError, match="'eps' is none of"):
        single_file.configs(tensors_of(FIRST), None, "eps")
