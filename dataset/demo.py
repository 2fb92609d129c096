"""The demo data set: drawn with Pillow from a seed, in CUB's folder layout.

A class is a shape filled with a texture. Background, colours, pose and scale vary in the same way
in all classes, so they do not tell the class.
"""

import math
import random

from PIL import Image, ImageDraw

from dataset import drawing
from utils import say

KS = (1, 2, 4, 8)
RECIPE = {"weights": "none", "image_size": 64, "lr_decay_step": 8, "warm": 0, "bn_freeze": False}
IMAGES_PER_CLASS = 40
SIZE = 80  # pixels of a generated JPEG's side
CANVAS = 128  # shapes and textures are drawn larger, then turned and scaled down


def read(root):
    return drawing.read(root, "demo")


def prepare(root):
    """Draw the images unless they are there."""
    folder = drawing.folder_of(root, "demo")
    if not folder.exists():
        say(f"drawing {len(SHAPES) * len(TEXTURES) * IMAGES_PER_CLASS} images into {folder}")
        drawing.write(folder, draw())


def draw(seed=0):
    """Yields (CLASS/NAME, image, {factor: value}) for every image."""
    rng = random.Random(seed)
    classes = [(shape, texture) for shape in SHAPES for texture in TEXTURES]
    rng.shuffle(classes)  # so that both halves hold most shapes and most textures
    for number, (shape, texture) in enumerate(classes, start=1):
        for index in range(IMAGES_PER_CLASS):
            image, factors = draw_image(rng, SHAPES[shape], TEXTURES[texture])
            name = f"{number:03d}.{shape}_{texture}/{shape}_{texture}_{index:04d}.jpg"
            yield name, image, {"shape": shape, "texture": texture, **factors}


def draw_image(rng, shape, texture):
    def colour():
        return tuple(rng.randrange(256) for _ in range(3))

    background = colour()
    image = Image.new("RGB", (SIZE, SIZE), background)
    brush = ImageDraw.Draw(image)
    for _ in range(3):  # clutter
        x, y, r = rng.randrange(SIZE), rng.randrange(SIZE), rng.randrange(4, 16)
        brush.ellipse((x - r, y - r, x + r, y + r), fill=colour())

    mask, pattern = Image.new("L", (CANVAS, CANVAS)), Image.new("L", (CANVAS, CANVAS))
    shape(ImageDraw.Draw(mask))
    texture(ImageDraw.Draw(pattern))
    angle, side = rng.uniform(-20, 20), rng.randrange(SIZE * 7 // 10, SIZE)
    mask, pattern = (
        layer.rotate(angle, Image.Resampling.BICUBIC).resize((side, side))
        for layer in (mask, pattern)
    )
    dark, light = rng.randrange(0, 60), rng.randrange(195, 256)  # the texture stays visible
    tint = [rng.uniform(0.7, 1.0) for _ in range(3)]
    corner = (rng.randrange(SIZE - side + 1), rng.randrange(SIZE - side + 1))
    colours = (
        Image.new("RGB", (side, side), tuple(int(shade * t) for t in tint))
        for shade in (light, dark)
    )
    image.paste(Image.composite(*colours, pattern), corner, mask)
    names = ("background_red", "background_green", "background_blue", "angle", "side", "x", "y",
             "dark", "light", "red", "green", "blue")  # fmt: skip
    return image, dict(zip(names, (*background, angle, side, *corner, dark, light, *tint)))


def _regular_polygon(corners, inner=1.0):
    """A polygon, or with `inner` < 1 a star, of radius 0.45 canvas."""

    def draw(brush):
        points = []
        count = corners if inner == 1.0 else 2 * corners
        for i in range(count):
            radius = CANVAS * 0.45 * (inner if i % 2 and inner < 1 else 1)
            angle = 2 * math.pi * i / count - math.pi / 2
            points.append((CANVAS / 2 + radius * math.cos(angle),
                           CANVAS / 2 + radius * math.sin(angle)))  # fmt: skip
        brush.polygon(points, fill=255)

    return draw


def _circle(brush):
    brush.ellipse((CANVAS * 0.08, CANVAS * 0.08, CANVAS * 0.92, CANVAS * 0.92), fill=255)


def _ring(brush):
    _circle(brush)
    brush.ellipse((CANVAS * 0.32, CANVAS * 0.32, CANVAS * 0.68, CANVAS * 0.68), fill=0)


def _cross(brush):
    brush.rectangle((CANVAS * 0.36, CANVAS * 0.06, CANVAS * 0.64, CANVAS * 0.94), fill=255)
    brush.rectangle((CANVAS * 0.06, CANVAS * 0.36, CANVAS * 0.94, CANVAS * 0.64), fill=255)


def _plain(brush):
    brush.rectangle((0, 0, CANVAS, CANVAS), fill=255)


def _stripes(brush):
    for y in range(0, CANVAS, 24):
        brush.rectangle((0, y, CANVAS, y + 11), fill=255)


def _bars(brush):
    for x in range(0, CANVAS, 24):
        brush.rectangle((x, 0, x + 11, CANVAS), fill=255)


def _dots(brush):
    for x in range(12, CANVAS, 26):
        for y in range(12, CANVAS, 26):
            brush.ellipse((x - 8, y - 8, x + 8, y + 8), fill=255)


def _checks(brush):
    for x in range(0, CANVAS, 32):
        for y in range(0, CANVAS, 32):
            brush.rectangle((x, y, x + 15, y + 15), fill=255)
            brush.rectangle((x + 16, y + 16, x + 31, y + 31), fill=255)


def _target(brush):
    for r in range(CANVAS, 0, -24):
        box = (CANVAS / 2 - r / 2, CANVAS / 2 - r / 2, CANVAS / 2 + r / 2, CANVAS / 2 + r / 2)
        brush.ellipse(box, fill=255 if r // 24 % 2 else 0)


SHAPES = {
    "Circle": _circle,
    "Cross": _cross,
    "Triangle": _regular_polygon(3),
    "Star": _regular_polygon(5, inner=0.45),
}
TEXTURES = {
    "Plain": _plain,
    "Stripes": _stripes,
    "Bars": _bars,
    "Dots": _dots,
    "Checks": _checks,
    "Target": _target,
}
