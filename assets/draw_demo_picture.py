"""Draws assets/demo.jpg, the picture of the demo: somebody at a window at dusk, in the middle of a sentence. Run it to draw it again."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

WIDTH, HEIGHT = 1280, 704
SUPERSAMPLING = 3  # drawn this much larger, then scaled down: smooth edges

Point = tuple[float, float]
Colour = tuple[int, int, int]


class Canvas:
    """A picture in units of final pixels. Every shape is a mask filled with a colour or with a vertical gradient."""

    def __init__(self) -> None:
        self.image = Image.new("RGB", (WIDTH * SUPERSAMPLING, HEIGHT * SUPERSAMPLING))

    def polygon(self, points: list[Point]) -> Image.Image:
        mask = Image.new("L", self.image.size)
        ImageDraw.Draw(mask).polygon([(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in points], fill=255)
        return mask

    def blob(self, points: list[Point]) -> Image.Image:
        """A smooth closed shape through the points (Catmull-Rom)."""
        curve, count = [], len(points)
        for i in range(count):
            a, b, c, d = (np.array(points[(i + k) % count], dtype=float) for k in (-1, 0, 1, 2))
            for t in np.linspace(0, 1, 24, endpoint=False):
                curve.append(tuple(0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)))
        return self.polygon(curve)

    def ellipse(self, x: float, y: float, rx: float, ry: float, tilt: float = 0.0) -> Image.Image:
        """Centre, radii, tilt in degrees clockwise."""
        cos, sin = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))
        angles = np.linspace(0, 2 * math.pi, 120, endpoint=False)
        return self.polygon([(x + rx * math.cos(a) * cos - ry * math.sin(a) * sin, y + rx * math.cos(a) * sin + ry * math.sin(a) * cos) for a in angles])

    def box(self, left: float, top: float, right: float, bottom: float, radius: float = 0) -> Image.Image:
        mask = Image.new("L", self.image.size)
        ImageDraw.Draw(mask).rounded_rectangle([value * SUPERSAMPLING for value in (left, top, right, bottom)], radius * SUPERSAMPLING, fill=255)
        return mask

    def stroke(self, points: list[Point], width: float) -> Image.Image:
        """A smooth open line with round ends."""
        mask = Image.new("L", self.image.size)
        draw, radius = ImageDraw.Draw(mask), width / 2
        (x0, y0), (x1, y1), (x2, y2) = points
        for t in np.linspace(0, 1, 160):
            x, y = (1 - t) ** 2 * x0 + 2 * t * (1 - t) * x1 + t * t * x2, (1 - t) ** 2 * y0 + 2 * t * (1 - t) * y1 + t * t * y2
            draw.ellipse([(x - radius) * SUPERSAMPLING, (y - radius) * SUPERSAMPLING, (x + radius) * SUPERSAMPLING, (y + radius) * SUPERSAMPLING], fill=255)
        return mask

    def fill(self, mask: Image.Image, *colours: Colour, soft: float = 0, strength: float = 1.0, inside: Image.Image | None = None) -> None:
        """Colours run from top to bottom of the shape. soft blurs its edge by that many pixels; `inside` cuts it off at another shape."""
        left, top, right, bottom = mask.getbbox() or (0, 0, 1, 1)
        margin = round(3 * soft * SUPERSAMPLING)
        area = (max(left - margin, 0), max(top - margin, 0), min(right + margin, mask.width), min(bottom + margin, mask.height))
        mask = mask.crop(area)
        if soft:
            mask = mask.filter(ImageFilter.GaussianBlur(soft * SUPERSAMPLING))
        alpha = np.asarray(mask, dtype=np.float32) / 255 * strength
        if inside is not None:
            alpha *= np.asarray(inside.crop(area), dtype=np.float32) / 255
        position = np.clip((np.arange(area[1], area[3]) - top) / max(bottom - top, 1), 0, 1) * (len(colours) - 1)
        column = np.stack([np.interp(position, range(len(colours)), [colour[i] for colour in colours]) for i in range(3)], axis=-1)
        base = np.asarray(self.image.crop(area), dtype=np.float32)
        mixed = base + (column[:, None, :] - base) * alpha[..., None]
        self.image.paste(Image.fromarray(np.round(mixed).astype(np.uint8)), area[:2])

    def finished(self) -> Image.Image:
        return self.image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


PANE = (96, 56, 640, 556)  # left, top, right, bottom of the glass


def draw_room(canvas: Canvas) -> None:
    canvas.fill(canvas.box(0, 0, WIDTH, HEIGHT), (74, 58, 82), (52, 40, 64))
    canvas.fill(canvas.ellipse(1180, 250, 330, 330), (255, 190, 110), soft=90, strength=0.42)  # lamp light on the wall
    canvas.fill(canvas.ellipse(360, 320, 420, 340), (255, 150, 110), soft=90, strength=0.20)  # and that of the dusk


def draw_view(canvas: Canvas) -> None:
    """Sky, sea, hills and a lighthouse, behind the glass."""
    glass = canvas.box(*PANE)
    canvas.fill(glass, (38, 48, 98), (92, 72, 132), (206, 106, 118), (250, 168, 104), (255, 208, 138))
    for x, y, size in (
        (140, 96, 1.6),
        (214, 82, 1.2),
        (286, 128, 1.5),
        (402, 90, 1.7),
        (468, 132, 1.1),
        (560, 84, 1.5),
        (604, 142, 1.2),
        (170, 158, 1.1),
        (520, 176, 1.0),
    ):
        canvas.fill(canvas.ellipse(x, y, size, size), (255, 246, 226), strength=0.9)
    for x, y, rx, ry in ((200, 262, 120, 10), (300, 280, 150, 9), (500, 236, 110, 9), (560, 256, 130, 8), (150, 330, 90, 6)):
        canvas.fill(canvas.ellipse(x, y, rx, ry), (255, 190, 160), soft=6, strength=0.55, inside=glass)
    canvas.fill(canvas.ellipse(268, 404, 120, 120), (255, 226, 160), soft=40, strength=0.7, inside=glass)
    canvas.fill(canvas.ellipse(268, 404, 44, 44), (255, 244, 206), (255, 222, 150), inside=glass)
    canvas.fill(canvas.box(96, 412, 640, 556), (226, 132, 116), (110, 78, 122), (58, 52, 96), inside=glass)  # sea
    for i, y in enumerate(range(420, 552, 11)):
        canvas.fill(
            canvas.box(268 - 40 + (i * 37) % 23 - 2 * i, y, 268 + 40 - (i * 29) % 21 + 2 * i, y + 3, 1.5),
            (255, 216, 160),
            strength=0.75 - 0.04 * i,
            inside=glass,
        )
    canvas.fill(canvas.blob([(60, 418), (120, 400), (180, 408), (230, 416), (230, 424), (60, 426)]), (112, 70, 108), inside=glass)
    canvas.fill(
        canvas.blob([(400, 470), (440, 420), (500, 398), (560, 380), (640, 372), (680, 400), (680, 580), (420, 580)]), (66, 46, 84), (40, 32, 64), inside=glass
    )
    draw_lighthouse(canvas, glass)


def draw_lighthouse(canvas: Canvas, glass: Image.Image) -> None:
    canvas.fill(canvas.polygon([(548, 243), (60, 140), (60, 216)]), (255, 236, 180), soft=6, strength=0.22, inside=glass)
    canvas.fill(canvas.polygon([(548, 242), (640, 214), (640, 262)]), (255, 236, 180), soft=5, strength=0.35, inside=glass)
    tower = canvas.polygon([(534, 262), (562, 262), (572, 390), (524, 390)])
    canvas.fill(tower, (244, 224, 214), (196, 160, 168))
    for top in (286, 330, 374):
        canvas.fill(canvas.box(510, top, 590, top + 20), (196, 70, 74), inside=tower)
    canvas.fill(canvas.box(528, 256, 568, 264, 2), (60, 42, 72))
    canvas.fill(canvas.box(537, 230, 559, 258, 3), (255, 240, 190))
    canvas.fill(canvas.polygon([(531, 232), (565, 232), (548, 212)]), (150, 52, 66))
    canvas.fill(canvas.ellipse(548, 243, 22, 22), (255, 246, 206), soft=9, strength=0.8)


def draw_window_frame(canvas: Canvas) -> None:
    left, top, right, bottom = PANE
    wood, shade = (236, 214, 190), (190, 160, 148)
    for box in (
        (left - 22, top - 22, right + 22, top),
        (left - 22, top, left, bottom),
        (right, top, right + 22, bottom),
        (left, 222, right, 232),
        (363, top, 373, bottom),
    ):
        canvas.fill(canvas.box(*box), wood, shade)
    canvas.fill(canvas.box(left - 52, bottom, right + 52, bottom + 26, 5), (246, 226, 202), (206, 176, 160))
    canvas.fill(canvas.box(left - 36, bottom + 26, right + 36, bottom + 40), (40, 30, 52), soft=8, strength=0.6)
    for x, away in ((60, -1), (676, 1)):  # curtains
        canvas.fill(
            canvas.blob(
                [
                    (x - 44, -20),
                    (x + 44, -20),
                    (x + 30 * away + 20, 240),
                    (x + 46 * away + 14, 470),
                    (x + 40 * away + 26, 660),
                    (x + 40 * away - 46, 660),
                    (x + 46 * away - 30, 400),
                ]
            ),
            (150, 84, 96),
            (104, 56, 84),
        )
        for fold in (-22, 0, 20):
            canvas.fill(canvas.stroke([(x + fold, 0), (x + fold + 8 * away, 300), (x + fold + 42 * away, 650)], 5), (84, 44, 74), soft=3, strength=0.55)
    canvas.fill(canvas.box(0, 0, WIDTH, 18), (66, 46, 66), (46, 34, 54))


def draw_still_life(canvas: Canvas) -> None:
    """A plant and a steaming mug on the sill, a lamp at the right."""
    for tip, bend, colour in (
        ((150, 396), (176, 440), (72, 118, 92)),
        ((206, 380), (196, 430), (88, 140, 100)),
        ((262, 404), (232, 440), (66, 108, 90)),
        ((178, 372), (186, 430), (98, 152, 106)),
        ((240, 372), (222, 430), (80, 128, 98)),
    ):
        for width in range(14, 3, -2):
            share = 1 - width / 18
            canvas.fill(
                canvas.stroke([(206, 508), bend, (206 + (tip[0] - 206) * (0.55 + share / 2), 508 + (tip[1] - 508) * (0.55 + share / 2))], width), colour
            )
    canvas.fill(canvas.polygon([(170, 496), (244, 496), (234, 556), (180, 556)]), (214, 126, 92), (160, 84, 74))
    canvas.fill(canvas.box(164, 490, 250, 506, 4), (228, 146, 108), (190, 104, 84))
    canvas.fill(canvas.ellipse(514, 534, 17, 15), (222, 232, 234))
    canvas.fill(canvas.ellipse(514, 534, 10, 8), (74, 60, 98))
    canvas.fill(canvas.box(452, 508, 510, 556, 9), (236, 242, 242), (168, 182, 198))
    canvas.fill(canvas.ellipse(481, 510, 27, 5), (92, 58, 48))
    for x in (470, 490):
        canvas.fill(canvas.stroke([(x, 502), (x + 16, 474), (x - 4, 446)], 6), (255, 240, 230), soft=4, strength=0.5)
    canvas.fill(canvas.box(1176, 330, 1184, 720), (52, 38, 52))
    canvas.fill(canvas.polygon([(1136, 180), (1224, 180), (1262, 336), (1098, 336)]), (255, 226, 164), (250, 180, 104))
    canvas.fill(canvas.ellipse(1180, 300, 120, 90), (255, 220, 150), soft=40, strength=0.35)


SKIN, SKIN_SHADE, HAIR, SWEATER = (242, 190, 158), (206, 136, 116), (62, 36, 42), (44, 124, 128)


def draw_person(canvas: Canvas) -> None:
    x = 880  # of the middle of the face
    back = [
        (x - 140, 300),
        (x - 122, 180),
        (x - 40, 112),
        (x + 50, 110),
        (x + 128, 176),
        (x + 148, 300),
        (x + 156, 420),
        (x + 130, 500),
        (x + 40, 470),
        (x - 60, 470),
        (x - 128, 496),
        (x - 152, 420),
    ]
    canvas.fill(canvas.blob(back), (76, 44, 48), (44, 26, 36))
    neck = canvas.blob([(x - 46, 400), (x + 50, 400), (x + 54, 500), (x + 80, 560), (x, 600), (x - 78, 560), (x - 50, 500)])
    canvas.fill(neck, (216, 150, 126), (236, 178, 148))
    canvas.fill(canvas.ellipse(x + 8, 446, 66, 30), (160, 92, 88), soft=12, strength=0.7, inside=neck)
    draw_sweater(canvas, x)
    face = canvas.blob(
        [
            (x - 104, 270),
            (x - 92, 196),
            (x - 40, 156),
            (x + 30, 152),
            (x + 88, 194),
            (x + 104, 270),
            (x + 98, 348),
            (x + 66, 414),
            (x + 2, 448),
            (x - 62, 416),
            (x - 98, 348),
        ]
    )
    for side in (-1, 1):
        canvas.fill(canvas.ellipse(x + 106 * side, 306, 17, 28, 8 * side), SKIN, SKIN_SHADE)
    canvas.fill(face, (248, 204, 172), (240, 184, 152))
    canvas.fill(canvas.ellipse(x + 110, 330, 62, 140), (190, 108, 104), soft=26, strength=0.60, inside=face)  # shade away from the window
    canvas.fill(canvas.ellipse(x - 108, 290, 44, 120), (255, 216, 160), soft=20, strength=0.75, inside=face)  # dusk on the cheek
    for side in (-1, 1):
        canvas.fill(canvas.ellipse(x + 60 * side, 350, 26, 17), (232, 112, 104), soft=9, strength=0.55, inside=face)
    draw_features(canvas, x)
    draw_fringe(canvas, x, face)


def draw_sweater(canvas: Canvas, x: float) -> None:
    body = canvas.blob(
        [(x - 86, 522), (x - 176, 560), (x - 232, 640), (x - 250, 760), (x + 250, 760), (x + 240, 640), (x + 186, 560), (x + 90, 522), (x + 4, 580)]
    )
    canvas.fill(body, SWEATER, (26, 84, 98))
    canvas.fill(canvas.ellipse(x - 222, 650, 44, 110), (120, 190, 170), soft=22, strength=0.5, inside=body)
    canvas.fill(canvas.ellipse(x + 230, 680, 90, 130), (12, 44, 66), soft=30, strength=0.6, inside=body)
    canvas.fill(canvas.stroke([(x - 84, 526), (x + 2, 640), (x + 90, 526)], 30), (58, 146, 146), (36, 108, 116))
    for shift in (-150, 150):
        canvas.fill(canvas.stroke([(x + shift, 610), (x + shift * 1.02, 660), (x + shift * 0.96, 720)], 4), (18, 66, 82), soft=2, strength=0.7)


def draw_features(canvas: Canvas, x: float) -> None:
    for side in (-1, 1):
        eye = canvas.blob([(x + 46 * side - 25, 296), (x + 46 * side, 279), (x + 46 * side + 25, 296), (x + 46 * side, 311)])
        canvas.fill(eye, (252, 246, 240), (236, 222, 218))
        canvas.fill(canvas.ellipse(x + 46 * side - 4, 294, 14.5, 15.5), (98, 62, 46), (62, 36, 34), inside=eye)
        canvas.fill(canvas.ellipse(x + 46 * side - 4, 294, 7, 7.5), (28, 16, 22), inside=eye)
        canvas.fill(canvas.ellipse(x + 46 * side - 9, 288, 4, 4), (255, 252, 244))
        canvas.fill(canvas.stroke([(x + 46 * side - 27, 296), (x + 46 * side, 266), (x + 46 * side + 27, 296)], 5), (48, 26, 34))
        canvas.fill(canvas.stroke([(x + 46 * side - 28, 255 - 5 * side), (x + 47 * side, 233), (x + 46 * side + 28, 255 + 5 * side)], 7), (70, 40, 44))
    canvas.fill(canvas.stroke([(x + 2, 310), (x + 14, 344), (x + 3, 350)], 4), (198, 122, 106), strength=0.8)
    canvas.fill(canvas.stroke([(x - 14, 350), (x, 358), (x + 14, 350)], 4.5), (196, 114, 102))
    mouth = canvas.blob([(x - 31, 385), (x - 10, 380), (x, 382), (x + 10, 380), (x + 31, 385), (x + 20, 399), (x, 405), (x - 20, 399)])
    canvas.fill(
        canvas.blob([(x - 38, 384), (x - 11, 373), (x, 376), (x + 11, 373), (x + 38, 384), (x + 24, 406), (x, 413), (x - 24, 406)]),
        (206, 84, 88),
        (190, 72, 82),
    )
    canvas.fill(mouth, (92, 24, 38))
    canvas.fill(canvas.box(x - 23, 376, x + 23, 388, 4), (255, 248, 240), inside=mouth)
    canvas.fill(canvas.ellipse(x, 404, 15, 7), (226, 112, 112), inside=mouth)
    canvas.fill(canvas.ellipse(x, 421, 20, 4), (190, 112, 102), soft=4, strength=0.5)


def draw_fringe(canvas: Canvas, x: float, face: Image.Image) -> None:
    canvas.fill(canvas.ellipse(x, 196, 110, 36), (150, 84, 84), soft=10, strength=0.45, inside=face)  # the hair's shadow on the forehead
    canvas.fill(
        canvas.blob([(x + 26, 132), (x - 54, 140), (x - 116, 210), (x - 124, 320), (x - 112, 342), (x - 98, 268), (x - 56, 224), (x + 10, 196)]),
        (88, 52, 52),
        (58, 34, 42),
    )
    canvas.fill(
        canvas.blob([(x - 10, 128), (x + 60, 134), (x + 120, 204), (x + 128, 320), (x + 114, 344), (x + 100, 268), (x + 62, 222), (x + 8, 190)]),
        (78, 44, 48),
        (50, 30, 40),
    )
    for shift, strength in ((0, 0.5), (15, 0.28), (28, 0.16)):  # dusk in the hair
        canvas.fill(canvas.stroke([(x - 140 + shift, 420), (x - 158 + shift, 190), (x - 46 + shift, 128)], 5), (240, 150, 104), soft=3.5, strength=strength)
    canvas.fill(canvas.ellipse(x - 112, 344, 6, 8), (255, 220, 140), (220, 160, 80))
    canvas.fill(canvas.ellipse(x + 112, 344, 6, 8), (240, 200, 120), (180, 120, 70))


def draw_demo_picture() -> Image.Image:
    canvas = Canvas()
    for draw in (draw_room, draw_view, draw_window_frame, draw_still_life, draw_person):
        draw(canvas)
    return canvas.finished()


if __name__ == "__main__":
    draw_demo_picture().save(Path(__file__).with_name("demo.jpg"), quality=90, optimize=True)
