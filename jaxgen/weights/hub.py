"""Model folders from the Hugging Face hub, safetensors only. Asked for by name, never otherwise."""

import re
from pathlib import Path
from typing import Any

from jaxgen.config import read_json
from jaxgen.types import UserError
from jaxgen.weights.files import VARIANTS, is_variant

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
MODEL, PART = "a model", "one part"  # what a repository may hold


def is_id(ref: str) -> bool:
    """Whether `ref` has the form organisation/name."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", ref))


def wanted(names: list[str], variant: str = "", kind: str = MODEL) -> list[str]:
    """Of a repository's files those of a model folder, or of one part: no single files, one
    precision."""
    if kind == PART:
        weights = "diffusion_pytorch_model"
        kept = [n for n in names if n == "config.json" or n.startswith(weights)]
    else:
        folders = re.compile(rf"({'|'.join(PARTS)}|controlnet(_\d+)?)/")
        kept = [n for n in names if n == "model_index.json" or folders.match(n)]
    kept = [n for n in kept if n.endswith((".json", ".txt", ".safetensors"))]
    plain = [re.sub(rf"\.({'|'.join(VARIANTS)})(?=[.-])", "", n) for n in kept]
    chosen = {p for n, p in zip(kept, plain) if is_variant(n, variant)}
    return [
        n
        for n, p in zip(kept, plain)
        if (is_variant(n, variant) if p in chosen else n == p or p not in kept)
    ]


def is_whole(folder: Path, variant: str = "", kind: str = MODEL) -> bool:
    """Whether a cached folder is all of it, not what a broken download or a tokenizer left."""
    needed = []
    for index in folder.rglob("*.safetensors.index*.json"):
        shards = set(read_json(index).get("weight_map", {}).values())
        needed += [str(index.parent.relative_to(folder) / shard) for shard in shards]
    pattern = "*.safetensors"
    if kind == PART:
        pattern = f"*.{variant}*.safetensors" if variant else pattern
        needed.append("config.json")
        return any(folder.glob(pattern)) and all((folder / name).is_file() for name in needed)
    if variant and not any(folder.glob(f"*/*.{variant}*.safetensors")):
        return False  # parts without the variant are read from plain files
    needed += ["model_index.json", "scheduler/scheduler_config.json"]
    needed += [f"{part}/config.json" for part in PARTS[:3]]
    weights = [any((folder / part).glob(pattern)) for part in PARTS[:3]]
    words = [(folder / "tokenizer" / name).is_file() for name in ("vocab.json", "tokenizer.json")]
    return all(weights) and any(words) and all((folder / name).is_file() for name in needed)


def part_config(ref: str) -> dict[str, Any]:
    """The `config.json` of a repository that holds one part; nothing of others, or unanswered."""
    import huggingface_hub as hub

    try:
        if isinstance(hub.try_to_load_from_cache(ref, "model_index.json"), str):
            return {}  # a model; its files are in the cache
        return read_json(Path(hub.hf_hub_download(ref, "config.json")))
    except Exception:  # as in `fetch`, which then says what is wrong
        return {}


def fetch(ref: str, variant: str = "", kind: str = MODEL) -> Path:
    """The local folder of a hub id, from the cache or downloaded.

    Raises:
        UserError: offline, unknown id, or not allowed; with the way to go on without a network.
    """
    import huggingface_hub as hub  # slow to import, and most runs are local
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(hub.snapshot_download(ref, local_files_only=True))
        if is_whole(folder, variant, kind):
            return folder  # of a variant alone, too, which `files.open_folder` says
    except (LocalEntryNotFoundError, OSError, ValueError):
        pass
    try:
        siblings = hub.HfApi().model_info(ref, timeout=10).siblings or []
        names = wanted([file.rfilename for file in siblings], variant, kind)
        if not names:
            raise FileNotFoundError(f"it holds no safetensors of {kind}")
        return Path(hub.snapshot_download(ref, allow_patterns=names))
    except Exception as error:  # the client's own errors are many, and each means the same here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"no folder {ref}, and the hub did not give it ({reason[:160]}); if this machine is "
            "offline, copy the model folder here and pass its path"
        ) from None
