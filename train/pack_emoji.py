"""Packs `jaxgen/assets/emoji_scenes/artwork.zip` from Microsoft's Fluent emoji, in four styles.

    npm pack fluentui-emoji@1.3.0 @lobehub/fluent-emoji-3d@1.1.0      # unpack each with tar xzf
    pip install resvg-py pillow numpy
    python train/pack_emoji.py FLUENTUI/package/icons FLUENT3D/package/assets

It stands here because what is packed is what the embedded model is trained on; training itself
reads the archive alone. Subjects are written down in the order of their frequency: the place of a
subject in these lists is its number for good, and the models shipped know it by that number.

A picture is cut to what is visible and scaled so that its longer side is 64 pixels. Line art has
nothing inside its outlines: what they enclose is made white, as on a sticker, so that it reads on
every background. Each style is one sheet, lossless, without any colour under what is transparent.
"""

import io
import json
import math
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

OUT = Path(__file__).parents[1] / "jaxgen" / "assets" / "emoji_scenes" / "artwork.zip"
RENDERED, SIDE, COLUMNS = 256, 64, 15
FAINT, INKED = 8, 200  # alpha from which a pixel is seen at all, and is a line

# Emoji and file name in the package; where that is not what one would say, also the name.
HEAD = """
🍎red-apple 🦉owl 🦊fox 🐸frog 🐼panda 🐧penguin 🐷pig-face=pig 🐱cat-face=cat 🐶dog-face=dog 🦁lion
🍌banana 🍓strawberry 🍕pizza 🍩doughnut 🍔hamburger 🍉watermelon 🥕carrot 🍋lemon 🍍pineapple
🍇grapes 🚗automobile=car 🚲bicycle 🚀rocket 🚌bus ⛵sailboat 🚂locomotive 🚜tractor 🚁helicopter
🌻sunflower 🌵cactus 🌷tulip 🍄mushroom 🌲evergreen-tree=pine_tree 🌴palm-tree 🐝honeybee=bee 🦀crab
🐙octopus 🐳spouting-whale=whale 🦋butterfly 🐌snail 🐘elephant 🦒giraffe 🐢turtle 🦜parrot
🏠house 🎸guitar 👑crown ☂umbrella 🔑key 🔔bell ⚽soccer-ball 🤖robot 👻ghost 🎈balloon
🎁wrapped-gift=present ⏰alarm-clock ⭐star 🧸teddy-bear 🧁cupcake ⛄snowman-without-snow=snowman
"""
MIDDLE = """
🐨koala 🐵monkey-face=monkey 🐯tiger-face=tiger 🐻bear 🐮cow-face=cow 🐔chicken 🦆duck 🦄unicorn
🐞lady-beetle=ladybug 🦩flamingo 🐟fish 🦈shark 🍐pear 🍒cherries 🍑peach 🍆eggplant 🥑avocado
🥦broccoli 🌽ear-of-corn=corn_cob 🥐croissant 🧀cheese-wedge=cheese 🍪cookie 🍭lollipop
🍟french-fries 🌮taco 🍦soft-ice-cream=ice_cream_cone 🚑ambulance 🚕taxi 🚒fire-engine=fire_truck
🛹skateboard 🛸flying-saucer 🚢ship 🌹rose 🌸cherry-blossom 🍀four-leaf-clover=clover 🍁maple-leaf
🌳deciduous-tree=tree 🎄christmas-tree 🏀basketball 🥁drum 🎺trumpet 🎻violin 🎩top-hat 👕t-shirt
👗dress 🧦socks 🎒backpack 📷camera 📺television 💻laptop 🔨hammer 🧲magnet 🪣bucket 🏆trophy
💎gem-stone=diamond ⚓anchor 🏰castle 🎃jack-o-lantern 💡light-bulb 🌙crescent-moon=moon
"""
TAIL = """
🦝raccoon 🦔hedgehog 🦢swan 🐬dolphin 🦐shrimp 🐍snake 🐓rooster 🦚peacock 🥥coconut 🍅tomato
🍿popcorn 🥨pretzel 🫖teapot 🎂birthday-cake 🥝kiwi-fruit=kiwi 🛶canoe 🛵motor-scooter=scooter
🚚delivery-truck 🪷lotus 🪴potted-plant 🎷saxophone 🪗accordion 🪁kite 🪑chair 🌋volcano 🔥fire
🌈rainbow 🧭compass 🪐ringed-planet=planet 🛁bathtub
"""
HELD = """
🦓zebra 🦙llama 🦞lobster 🦂scorpion 🐺wolf 🐡blowfish 🐜ant 🦘kangaroo 🐭mouse-face=mouse
🐠tropical-fish 🍣sushi 🍺beer-mug 🍳cooking=frying_pan 🥓bacon 🧅onion 🌭hot-dog 🍬candy
🍊tangerine 🚓police-car 🚤speedboat 🌺hibiscus 🌱seedling 🔭telescope 🔬microscope 🪓axe 🧣scarf
🎡ferris-wheel 🧶yarn 🛼roller-skate ⏳hourglass-not-done=hourglass
"""
GROUPS = {"head": HEAD, "middle": MIDDLE, "tail": TAIL, "held": HELD}
HYPHENED = {"t-shirt", "jack-o-lantern"}
# Things that come in pairs or numbers, or have no edge, take no article.
PLAIN = {
    "grapes", "cherries", "broccoli", "cheese", "french fries", "socks", "popcorn", "fire", "sushi",
    "bacon", "candy", "yarn",
}  # fmt: skip
SPOKEN_AS_VOWELS = {"umbrella", "hourglass"}


def parse(word: str) -> tuple[str, str, str]:
    """ "🐷pig-face=pig" -> the emoji, the name of its file, and what it is called."""
    emoji, rest = word[0], word[1:]
    file, _, name = rest.partition("=")
    return emoji, file, name.replace("_", " ") or spoken(file)


def spoken(file: str) -> str:
    return file if file in HYPHENED else file.replace("-", " ")


def article(name: str) -> str:
    """The article, with a space behind it, or nothing."""
    if name in PLAIN:
        return ""
    return "an " if name[0] in "aeio" or name in SPOKEN_AS_VOWELS else "a "


def drawn(path: Path) -> Image.Image:
    """An SVG file as RGBA pixels."""
    import resvg_py  # type: ignore[import-not-found]  # of this script alone

    png = resvg_py.svg_to_bytes(svg_path=str(path), width=RENDERED, height=RENDERED)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def filled(art: Image.Image) -> Image.Image:
    """Line art on white wherever its lines keep out what comes from the edge of the picture."""
    lines = Image.new("L", (RENDERED + 2, RENDERED + 2))
    lines.paste(art.getchannel("A").point(lambda a: 255 if a >= INKED else 0), (1, 1))
    ImageDraw.floodfill(lines, (0, 0), 128)
    inside = lines.crop((1, 1, RENDERED + 1, RENDERED + 1)).point(lambda v: 0 if v == 128 else 255)
    white = Image.new("RGBA", art.size, (255, 255, 255, 0))
    white.putalpha(inside)
    return Image.alpha_composite(white, art)


def sprite(art: Image.Image) -> Image.Image:
    """What is seen of a picture, its longer side 64 pixels; scaled with premultiplied colours."""
    box = art.getchannel("A").point(lambda a: 255 if a >= FAINT else 0).getbbox()
    assert box is not None
    width, height = box[2] - box[0], box[3] - box[1]
    scale = SIDE / max(width, height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return art.convert("RGBa").resize(size, Image.Resampling.LANCZOS, box).convert("RGBA")


def sheet(sprites: list[Image.Image]) -> bytes:
    """Sprites in cells of 64x64, each at the upper left of its cell, as a lossless WebP."""
    rows = math.ceil(len(sprites) / COLUMNS)
    pixels = np.zeros((rows * SIDE, COLUMNS * SIDE, 4), np.uint8)
    for i, each in enumerate(sprites):
        y, x = i // COLUMNS * SIDE, i % COLUMNS * SIDE
        pixels[y : y + each.height, x : x + each.width] = np.asarray(each)
    pixels[pixels[..., 3] == 0] = 0
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", lossless=True, quality=100, method=6, exact=True)
    return file.getvalue()


def main(icons: Path, renders: Path) -> None:
    subjects = []
    sheets: dict[str, list[Image.Image]] = {"flat": [], "modern": [], "3d": [], "line": []}
    for group, words in GROUPS.items():
        for emoji, file, name in map(parse, words.split()):
            subjects.append({"name": name, "article": article(name), "group": group})
            code = f"{ord(emoji):04x}"  # some files name the variation selector too
            render = next(renders.glob(f"{code}.webp"), renders / f"{code}-fe0f.webp")
            sheets["flat"].append(sprite(drawn(icons / "flat" / f"{file}.svg")))
            sheets["modern"].append(sprite(drawn(icons / "modern" / f"{file}.svg")))
            sheets["3d"].append(sprite(Image.open(render).convert("RGBA")))
            sheets["line"].append(sprite(filled(drawn(icons / "high-contrast" / f"{file}.svg"))))
    names = [subject["name"] for subject in subjects]
    assert len({*names}) == len(names)

    text = json.dumps({"side": SIDE, "columns": COLUMNS, "subjects": subjects}, indent=1)
    members = {"subjects.json": text.encode()}
    members |= {f"{style}.webp": sheet(sprites) for style, sprites in sheets.items()}
    beside = OUT.with_suffix(".new")  # the archive is read while this runs
    with zipfile.ZipFile(beside, "w") as archive:
        for name, content in members.items():  # dated alike, so that the same input packs the same
            archive.writestr(zipfile.ZipInfo(name), content)
    beside.replace(OUT)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
