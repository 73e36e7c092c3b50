"""Model folders from the Hugging Face hub, safetensors only. Asked for by name, never otherwise."""

import re
from pathlib import Path

from jaxgen.types import UserError

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


def is_id(ref: str) -> bool:
    """Whether `ref` has the form organisation/name."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", ref))


def wanted(names: list[str]) -> list[str]:
    """Of a repository's files those of a model folder: no single files, no second precision."""
    kept = [
        n for n in names if n == "model_index.json" or n.startswith(tuple(f"{p}/" for p in PARTS))
    ]
    kept = [n for n in kept if n.endswith((".json", ".txt", ".safetensors"))]
    plain = [re.sub(r"\.(fp16|bf16|non_ema|ema_only)(?=[.-])", "", n) for n in kept]
    return [n for n, p in zip(kept, plain) if n == p or p not in kept]


def fetch(ref: str) -> Path:
    """The local folder of a hub id, from the cache or downloaded.

    Raises:
        UserError: offline, unknown id, or not allowed; with the way to go on without a network.
    """
    import huggingface_hub as hub  # slow to import, and most runs are local
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(hub.snapshot_download(ref, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        pass
    try:
        siblings = hub.HfApi().model_info(ref, timeout=10).siblings or []
        names = wanted([file.rfilename for file in siblings])
        return Path(hub.snapshot_download(ref, allow_patterns=names))
    except Exception as error:  # the client's own errors are many, and each means the same here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"no folder {ref}, and the hub did not give it ({reason[:160]}); if this machine is "
            "offline, copy the model folder here and pass its path"
        ) from None
