"""Draws workflows/*.jpg, the pictures in ComfyUI's template browser, from the demo picture: python assets/draw_thumbnails.py"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps

ROOT = Path(__file__).resolve().parent.parent
SIDE = 480  # px; the browser shows squares
BAND = 118  # px at the bottom, for the words
INK, ACCENT, NIGHT = (255, 255, 255), (255, 196, 107), (24, 22, 40)
Draw = Callable[[Image.Image], Image.Image]


def photo(size: tuple[int, int], centre: tuple[float, float]) -> Image.Image:
    """The demo picture, cut to `size` around a centre (0..1 across, 0..1 down)."""
    with Image.open(ROOT / "assets" / "demo.jpg") as picture:
        return ImageOps.fit(picture.convert("RGB"), size, Image.Resampling.LANCZOS, centering=centre)


def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)  # Pillow's own, so that every machine draws the same


def draw_wave(canvas: Image.Image, middle: int, height: int, left: int = 24, right: int = SIDE - 24) -> None:
    """Sound as bars, louder and softer like speech."""
    draw = ImageDraw.Draw(canvas)
    for x in range(left, right, 10):
        loud = abs(math.sin(x / 37) * math.sin(x / 11 + 1)) * 0.85 + 0.12
        draw.rounded_rectangle((x, middle - loud * height / 2, x + 5, middle + loud * height / 2), 2, fill=ACCENT)


def draw_play(canvas: Image.Image, x: int, y: int, radius: int = 38) -> None:
    """A play button around (x, y)."""
    glass = Image.new("L", canvas.size)
    ImageDraw.Draw(glass).ellipse((x - radius, y - radius, x + radius, y + radius), fill=150)
    canvas.paste(NIGHT, mask=glass)
    ImageDraw.Draw(canvas).polygon([(x - radius * 0.3, y - radius * 0.5), (x - radius * 0.3, y + radius * 0.5), (x + radius * 0.55, y)], fill=INK)


def from_picture(canvas: Image.Image) -> Image.Image:
    canvas.paste(photo((SIDE, SIDE), (0.86, 0.5)))
    draw_wave(canvas, 318, 64)
    draw_play(canvas, 84, 196)
    return canvas


def from_text(canvas: Image.Image) -> Image.Image:
    words = '"A lighthouse keeper\nin a storm turns to\nthe camera and\nshouts: Ship ahoy!"'
    ImageDraw.Draw(canvas).multiline_text((36, 80), words, INK, font(38), spacing=10)  # below the browser's badge
    draw_wave(canvas, 318, 64)
    return canvas


def from_two(canvas: Image.Image) -> Image.Image:
    evening = photo((SIDE // 2 - 3, SIDE - BAND), (0.92, 0.5))
    night = ImageEnhance.Brightness(Image.blend(ImageOps.mirror(evening), Image.new("RGB", evening.size, (30, 50, 140)), 0.4)).enhance(0.8)
    canvas.paste(evening, (0, 0))
    canvas.paste(night, (SIDE // 2 + 3, 0))
    draw_play(canvas, 240, 180)
    return canvas


def from_sound(canvas: Image.Image) -> Image.Image:
    canvas.paste(photo((SIDE, SIDE), (0.86, 0.5)))
    draw_wave(canvas, 262, 170, right=220)  # up to her mouth
    return canvas


def from_film(canvas: Image.Image) -> Image.Image:
    for frame, centre in enumerate((0.80, 0.86, 0.92)):
        canvas.paste(photo((200, 170), (centre, 0.4)), (frame * 208 - 64, 44))
    draw = ImageDraw.Draw(canvas)
    for x in range(8, SIDE, 40):
        for y in (14, 226):
            draw.rounded_rectangle((x, y, x + 22, y + 18), 4, fill=INK)
    draw_wave(canvas, 308, 84)
    return canvas


def from_core(canvas: Image.Image) -> Image.Image:
    canvas.paste(ImageEnhance.Brightness(photo((SIDE, SIDE), (0.86, 0.5))).enhance(0.45))
    draw = ImageDraw.Draw(canvas)
    boxes = {"Load CLIP": (24, 84), "Load VAE": (24, 236), "MOVA": (268, 160)}
    for name, (x, y) in boxes.items():
        if x == 24:
            draw.line([(x + 188, y + 42), (240, y + 42), (240, 202), (268, 202)], ACCENT, 5, joint="curve")
        draw.rounded_rectangle((x, y, x + 188, y + 84), 12, fill=(53, 53, 60), outline=ACCENT if name == "MOVA" else (120, 120, 130), width=3)
        draw.text((x + 94, y + 42), name, INK, font(30), anchor="mm")
    return canvas


def from_tags(canvas: Image.Image) -> Image.Image:
    draw_wave(canvas, 104, 96)
    draw = ImageDraw.Draw(canvas)
    heard = {"Waves": (30, 400, ACCENT), "Seagulls": (250, 330, ACCENT), "Music": (150, 210, (226, 84, 92))}
    for row, (name, (start, end, colour)) in enumerate(heard.items()):
        y = 176 + row * 58
        draw.rounded_rectangle((24, y, SIDE - 24, y + 48), 8, fill=(44, 42, 62))
        draw.rounded_rectangle((24 + start, y, 24 + end, y + 48), 8, fill=colour)
        draw.text((38, y + 24), name, INK, font(28), anchor="lm", stroke_width=3, stroke_fill=NIGHT)
    return canvas


def from_idea(canvas: Image.Image) -> Image.Image:
    """A line, an arrow, and the paragraphs it becomes, the last one about sound."""
    draw = ImageDraw.Draw(canvas)
    draw.rounded_rectangle((36, 84, 304, 138), 12, fill=(44, 42, 62))  # below the browser's badge
    draw.text((54, 111), '"She says hello."', INK, font(28), anchor="lm")
    draw.polygon([(340, 98), (340, 124), (372, 111)], fill=ACCENT)
    for y, width in ((168, 408), (194, 396), (220, 330), (264, 400), (290, 250)):
        draw.rounded_rectangle((36, y, 36 + width, y + 14), 7, fill=INK if y < 264 else (120, 120, 140))
    draw_wave(canvas, 334, 40, right=330)
    return canvas


def from_takes(canvas: Image.Image) -> Image.Image:
    """Four takes, the best one framed."""
    draw = ImageDraw.Draw(canvas)
    for take, centre in enumerate((0.80, 0.86, 0.90, 0.94)):
        x, y = 24 + take % 2 * 222, 30 + take // 2 * 168
        shown = photo((210, 152), (centre, 0.4))
        canvas.paste(shown if take == 1 else ImageEnhance.Brightness(shown).enhance(0.5), (x, y))
        if take == 1:
            draw.rectangle((x - 4, y - 4, x + 213, y + 155), outline=ACCENT, width=6)
            draw.line([(x + 150, y + 114), (x + 168, y + 134), (x + 198, y + 92)], ACCENT, 12, joint="curve")
    return canvas


def from_loras(canvas: Image.Image) -> Image.Image:
    """The model and what is put on top of it, one after the other."""
    canvas.paste(ImageEnhance.Brightness(photo((SIDE, SIDE), (0.86, 0.5))).enhance(0.45))
    draw = ImageDraw.Draw(canvas)
    for step, name in enumerate(("MOVA", "my style", "my voice")):  # below the browser's badge
        x, y = 28 + step * 118, 70 + step * 98
        if step:
            draw.line([(x - 58, y - 14), (x - 58, y + 42), (x, y + 42)], ACCENT, 5, joint="curve")
        draw.rounded_rectangle((x, y, x + 188, y + 84), 12, fill=(53, 53, 60), outline=ACCENT if step else (120, 120, 130), width=3)
        draw.text((x + 94, y + 42), name, INK, font(30), anchor="mm")
    return canvas


PICTURES: dict[str, tuple[Draw, str, str]] = {
    "mova_image_to_video_audio": (from_picture, "Picture to film", "with voice, music and effects"),
    "mova_text_to_video_audio": (from_text, "Prompt to film", "picture and sound from text alone"),
    "mova_first_last_frame": (from_two, "First to last picture", "everything between, with sound"),
    "mova_audio_driven": (from_sound, "Your voice, MOVA's picture", "lips and gestures follow"),
    "mova_resound": (from_film, "New sound for a film", "its picture stays as it is"),
    "mova_best_of_n": (from_takes, "Several takes, the best", "lips and sound are checked"),
    "mova_prompt_enhancer": (from_idea, "Idea to prompt to film", "a line becomes the whole scene"),
    "mova_lora": (from_loras, "With your LoRAs", "a style here, a voice there"),
    "cat_sound_check": (from_tags, "Is it the right sound?", "heard, missing, unwanted"),
    "mova_core_nodes": (from_core, "With Wan's own files", "core text encoder and VAE"),
}


def main() -> None:
    for name, (draw, title, subtitle) in PICTURES.items():
        canvas = draw(Image.new("RGB", (SIDE, SIDE), NIGHT))
        canvas.paste(NIGHT, (0, SIDE - BAND, SIDE, SIDE))
        pen = ImageDraw.Draw(canvas)
        pen.text((24, SIDE - BAND + 22), title, INK, font(36))
        pen.text((24, SIDE - BAND + 72), subtitle, ACCENT, font(24))
        canvas.save(ROOT / "workflows" / f"{name}.jpg", quality=85, optimize=True)


if __name__ == "__main__":
    main()
