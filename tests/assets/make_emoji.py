"""Makes `emoji/`, a small folder of real pictures with captions, from Microsoft's Fluent emoji.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 && tar xzf lobehub-fluent-emoji-3d-1.1.0.tgz
    python tests/assets/make_emoji.py package

The package holds renders of 256x256 with an alpha channel, named after their code points. Here they
are scaled to 96x96 on white, and most are named as the Unicode standard does.
"""

import json
import sys
import unicodedata
from pathlib import Path

from PIL import Image

OUT = Path(__file__).parent / "emoji"
SIDE = 96
SUBJECTS = (
    "🐀🐂🐄🐅🐆🐇🐈🐉🐊🐋🐌🐍🐏🐐🐑🐒🐓🐔🐕🐖🐗🐘🐙🐛🐜🐝🐞🐟🐠🐡🐢🐥🐦🐧🐨🐩🐫🐬"  # animals
    "🦀🦂🦃🦅🦆🦇🦈🦉🦋🦌🦍🦎🦏🦐🦑🦔🦘🦙🦚🦛🦜🦝🦞🦡🦢🦣🦤🦥🦦🦧🦨🦩🦪🦫🦬🦭🪰"
    "🌭🌮🌯🌽🍅🍇🍉🍊🍋🍌🍍🍎🍏🍐🍑🍒🍓🍔🍕🍗🍝🍞🍟🍨🍩🍪🍬🍯🍷🍸🍺"  # food
    "🥐🥑🥒🥓🥔🥕🥖🥗🥚🥜🥝🥞🥟🥥🥦🥧🥨🥪🥬🥭🧀🧁🧂🧃🧄🧅🧇🧈🧊🫐🫑🫒🫓🫖🫘🎂"
    "🌱🌲🌳🌴🌵🌷🌸🌹🌺🌻🌼🍀🍁🍄🪴🪷🪹🪶"  # plants and their like
    "🚀🚁🚂🚃🚆🚊🚌🚑🚒🚓🚕🚗🚙🚚🚜🚢🚤🚲🛴🛵🛶🛸🛹🛼"  # vehicles
    "⌚⏰☕⚽⚾⛄⛲⛵⛺🌋🎀🎁🎃🎄🎈🎒🎓🎤🎥🎨🎩🎷🎸🎺🎻🏀🏆🏈🏐🏠🏢🏥🏫🏭🏰"  # objects
    "👑👓👔👕👖👗👘👙👜👟👠💍💎💡💣💼📀📏📓📗📘📙📡📦📮📱📷📹📻"
    "🔋🔌🔑🔒🔔🔥🔦🔧🔨🔬🔭🔮🚪🛁🛒🥁🥊🧢🧣🧤🧥🧦🧩🧪🧭🧯🧰🧲🧶🧸🧹"
    "🧺🧼🧽🩰🩳🪁🪂🪄🪅🪑🪒🪓🪕🪖🪗🪘🪚🪛🪞🪟🪣🪨"
)
# Where the name of the standard is not what one would call it.
NAMES = {
    "🐞": "ladybug", "🐥": "baby chick", "🌽": "ear of corn", "⛄": "snowman", "🏀": "basketball",
    "🏠": "house", "🏰": "castle", "📏": "ruler", "🔦": "flashlight",
    "🎁": "present", "🎒": "backpack", "💍": "diamond ring", "☕": "cup of coffee",
}  # fmt: skip
# Things that come in pairs or numbers, or have no edge, take no article.
PLAIN = {
    "grapes", "cherries", "french fries", "peanuts", "pancakes", "blueberries", "beans", "jeans",
    "eyeglasses", "gloves", "socks", "ballet shoes", "shorts", "bacon", "garlic", "butter",
    "spaghetti", "bread", "broccoli", "fire", "coral", "baguette bread",
}  # fmt: skip


def caption(name: str) -> str:
    """ "red apple" -> "a 3D emoji of a red apple"."""
    article = "" if name in PLAIN else "an " if name[0] in "aeio" else "a "
    return f"a 3D emoji of {article}{name}"


def on_white(path: Path) -> Image.Image:
    """A render, composited before it is scaled, so that no edge takes colour from nothing."""
    render = Image.open(path).convert("RGBA")
    white = Image.new("RGBA", render.size, "white")
    whole = Image.alpha_composite(white, render).convert("RGB")
    return whole.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def main(package: Path) -> None:
    OUT.mkdir(exist_ok=True)
    lines = []
    for subject in SUBJECTS:
        name = NAMES.get(subject, unicodedata.name(subject).lower())
        file = name.replace(" ", "-") + ".webp"
        picture = on_white(package / "assets" / f"{ord(subject):04x}.webp")
        picture.save(OUT / file, lossless=True, quality=100, method=6)
        lines.append(json.dumps({"file_name": file, "text": caption(name)}, ensure_ascii=False))
    (OUT / "metadata.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
