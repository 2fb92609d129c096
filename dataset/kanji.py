"""Kanji: a class is a character, and its images show it in fourteen different typefaces.

Debian packages bring the fonts. The characters do not depend on which fonts are installed. The
first half of them, in order of code point, trains. Code points mostly follow radicals, so many
unseen characters have unseen radicals.
"""

import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from dataset import drawing
from utils import UserError, say, warn

KS = (1, 2, 4, 8)
RECIPE = {"weights": "none", "image_size": 64, "lr_decay_step": 8, "lr_decay_gamma": 0.25,
          "warm": 0, "bn_freeze": False}  # fmt: skip
CHARACTERS, SIDE = 700, 64  # defaults; the side in pixels
ALL = 2961  # the 2,965 of JIS X 0208 level 1 without TWINS
TWINS = "頴曾瀧禰"  # OradanoGSRR draws 穎曽滝祢 exactly like these
FONTS = {  # file: Debian package
    "AoyagiKouzanT.ttf": "fonts-aoyagi-kouzan-t",
    "aoyagi-soseki.ttf": "fonts-aoyagi-soseki",
    "BIZUDMincho-Regular.ttf": "fonts-morisawa-bizud-mincho",
    "DotGothic16-Regular.ttf": "fonts-dotgothic16",
    "kiloji.ttf": "fonts-kiloji",
    "kouzan-mouhitsu-gyosho.ttf": "fonts-kouzan-mouhitsu",
    "KouzanBrushFontSousyo.ttf": "fonts-kouzan-mouhitsu",
    "misaki_gothic.ttf": "fonts-misaki",
    "MTLc3m.ttf": "fonts-motoya-l-cedar",
    "OradanoGSRR.ttf": "fonts-oradano-mincho-gsrr",
    "RampartOne-Regular.ttf": "fonts-rampart",
    "Stick-Regular.ttf": "fonts-stick",
    "TrainOne-Regular.ttf": "fonts-train",
    "YuseiMagic-Regular.ttf": "fonts-yusei-magic",
}
FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts")


def read(root):
    splits = drawing.read(root, "kanji")
    drawn = {Path(path).stem for items in splits.values() for path, _ in items}
    if lacking := {file for file in FONTS if Path(file).stem not in drawn}:
        warn(f"{Path(root, 'kanji')}: drawn without {len(lacking)} of {len(FONTS)} typefaces; "
             f"{how_to_get(lacking)}, then delete the folder for it to be drawn again")  # fmt: skip
    return splits


def prepare(root, characters=CHARACTERS, side=SIDE):
    """Draw the images unless some are there."""
    folder = drawing.folder_of(root, "kanji")
    if folder.exists():
        return
    if len(fonts := installed_fonts()) < 2:
        raise UserError(f"kanji: found {len(fonts)} of {len(FONTS)} typefaces below "
                        f"{', '.join(FOLDERS)}; {how_to_get(FONTS.keys() - fonts)}")  # fmt: skip
    say(f"drawing {characters:,} characters in {len(fonts)} typefaces into {folder}")
    drawing.write(folder, draw(fonts.values(), choose_characters(characters), side))


def installed_fonts():
    """{name of the file: its path}, in the order of FONTS."""
    below = (path for folder in FOLDERS for path in Path(folder).expanduser().rglob("*.ttf"))
    found = {path.name: path for path in below}
    return {file: found[file] for file in FONTS if file in found}


def how_to_get(files):
    return f"apt install {' '.join(sorted({FONTS[file] for file in files}))}"


def choose_characters(count):
    """`count` characters of level 1 (rows 16 to 47), drawn by a fixed seed. All fourteen fonts have
    the default 700; 牙 and 穐, which come later, are missing in some."""
    codes = (bytes([0xA0 + row, 0xA0 + cell]) for row in range(16, 48) for cell in range(1, 95))
    characters = [code.decode("euc_jp", "ignore") for code in codes]
    characters = [each for each in characters if each and each not in TWINS]
    random.Random(0).shuffle(characters)
    return sorted(characters[:count])


def draw(font_files, characters, side):
    """Yields (CHARACTER/TYPEFACE.png, image, {factor: value}) for every image."""
    size = side * 7 // 8  # a character must fit into the test's centre crop
    fonts = {path.stem: ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
             for path in font_files}  # fmt: skip
    # no font has U+FFFF, so this is its picture for a missing character
    unknown = {face: ink_of("\uffff", font, side) for face, font in fonts.items()}
    for character in characters:
        for face, font in fonts.items():
            ink = ink_of(character, font, side)
            if ink in (None, unknown[face]):
                continue
            image = Image.new("L", (side, side), 255)
            image.paste(0, ((side - ink.width) // 2, (side - ink.height) // 2), ink)
            dark = sum(image.histogram()[:128]) / side**2  # share of pixels below middle grey
            yield f"{character}/{face}.png", image, {"typeface": face, "ink": round(dark, 4)}


def ink_of(character, font, side):
    """The character in 255 on 0, cropped to its ink; None if it has no ink."""
    image = Image.new("L", (2 * side, 2 * side))
    ImageDraw.Draw(image).text((side, side), character, 255, font, anchor="mm")
    box = image.getbbox()
    return box and image.crop(box)
