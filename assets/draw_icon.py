"""Draws assets/icon.png, the pack's icon in the Comfy registry: a picture that plays, and its sound. Run it to draw it again."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

SIDE = 400  # px, the registry's limit
SUPERSAMPLING = 4  # drawn this much larger, then scaled down: smooth edges
TOP, BOTTOM = (38, 30, 92), (16, 118, 136)  # dusk to sea
WHITE, AMBER = (250, 248, 242), (255, 190, 92)
BARS = ((228, 60), (262, 128), (296, 92), (330, 44))  # the sound: centre and height of each bar


def scaled(*values: float) -> list[int]:
    return [round(value * SUPERSAMPLING) for value in values]


def draw_icon() -> Image.Image:
    side = SIDE * SUPERSAMPLING
    slope = Image.linear_gradient("L").resize((side, side))
    ground = Image.composite(Image.new("RGB", (side, side), BOTTOM), Image.new("RGB", (side, side), TOP), slope)
    draw = ImageDraw.Draw(ground)
    draw.polygon(list(zip(scaled(84, 196, 84), scaled(116, 200, 284), strict=True)), fill=WHITE, outline=WHITE)
    for centre, height in BARS:
        draw.rounded_rectangle(scaled(centre - 11, 200 - height, centre + 11, 200 + height), radius=11 * SUPERSAMPLING, fill=AMBER)
    outline = Image.new("L", (side, side))
    ImageDraw.Draw(outline).rounded_rectangle((0, 0, side - 1, side - 1), radius=72 * SUPERSAMPLING, fill=255)
    ground.putalpha(outline)
    return ground.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    draw_icon().save(Path(__file__).with_name("icon.png"), optimize=True)
