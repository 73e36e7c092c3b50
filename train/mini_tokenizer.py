"""Learns the miniature's own tokenizer from the captions of emoji_scenes, in CLIP's form.

    python train/mini_tokenizer.py

Byte-pair encoding (Sennrich et al. 2016) as CLIP has it: 256 bytes, the same at the end of a word,
merges in the order they were learned, start and end. Every word of a caption becomes one token, but
that digits stand alone, as in CLIP, and that hyphens do: words are counted here with their hyphens,
where CLIP's pattern splits them, so that some merges never serve and "jack-o-lantern" is spelled by
its parts. So are other words. Writes `jaxgen/assets/mini/tokenizer`.
"""

import itertools
import json
from collections import Counter
from pathlib import Path

from tokenizers import pre_tokenizers

from jaxgen.data.emoji_scenes import artwork
from jaxgen.data.emoji_scenes.scenes import EmojiScenes

OUT = Path(__file__).parents[1] / "jaxgen" / "assets" / "mini" / "tokenizer"
CAPTIONS, TOKENS, LENGTH = 20_000, 2_000, 40  # length: of the longest caption, with room
START, END, LAST = "<|startoftext|>", "<|endoftext|>", "</w>"


def counts() -> Counter[str]:
    """How often each word occurs, those of subjects that are never trained on among them."""
    scenes = EmojiScenes()
    texts = [scenes.scene(i).caption for i in range(CAPTIONS)]
    texts += [subject.name for subject in artwork.load().subjects]
    words = (word.lower() for text in texts for word in text.replace(",", " ,").split())
    return Counter(words)


def learn(words: Counter[str], most: int) -> list[tuple[str, str]]:
    """Merges: always of the most frequent pair, the first in the alphabet among equals."""
    parts = {word: (*word[:-1], word[-1] + LAST) for word in words}
    merges: list[tuple[str, str]] = []
    while len(merges) < most:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, symbols in parts.items():
            for pair in itertools.pairwise(symbols):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        parts = {word: merged(symbols, best) for word, symbols in parts.items()}
    return merges


def merged(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """The symbols of a word, with every occurrence of a pair as one."""
    found: list[str] = []
    for symbol in symbols:
        if found and (found[-1], symbol) == pair:
            found[-1] += symbol
        else:
            found.append(symbol)
    return tuple(found)


def main() -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = [*letters, *(letter + LAST for letter in letters)]
    merges = learn(counts(), TOKENS - len(base) - 2)
    vocabulary = [*base, *("".join(pair) for pair in merges), START, END]
    settings = {
        "do_lower_case": True,
        "model_max_length": LENGTH,
        "tokenizer_class": "CLIPTokenizer",
    }
    specials = dict.fromkeys(("eos_token", "unk_token", "pad_token"), END)
    OUT.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("vocab.json", {token: i for i, token in enumerate(vocabulary)}),
        ("tokenizer_config.json", settings),
        ("special_tokens_map.json", {"bos_token": START} | specials),
    ):
        (OUT / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (OUT / "merges.txt").write_text("\n".join(lines) + "\n")
    print(f"{len(vocabulary)} tokens in {OUT}")


if __name__ == "__main__":
    main()
