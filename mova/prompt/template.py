"""The composer that needs no model: fields to a prompt of the shape MOVA was trained with (spec/mova.md 7.6, 8)."""

from __future__ import annotations

import random
import re

from ..pipeline import NEGATIVE_PROMPT
from .fields import Fields, Line
from .quotes import ENDERS, NO_BLANKS, find_quotes, lines_of, split_sentences

NO_SUBTITLES = "This video has no subtitles."  # the sentence of the training captions (spec/mova.md 7.6)
SOUND_BUDGET = 600  # characters of an idea's own sentences that may go into the paragraph about sound, which is never cut
CAMERA_WORDS = (
    r"\b(?:(?:long|wide|medium|full|tracking|establishing|low-angle|high-angle|close|dolly|aerial|drone|static|handheld|over-the-shoulder|two) ?-?shot|shot of|close-?up|zoom\w*"
    r"|(?:camera|view|frame) (?:is|moves|pans|tilts|follows|pushes|pulls|orbits|circles|tracks|glides|rises|zooms|dollies|stays|holds|stands)|(?:low|high|dutch|eye-level) angle|pov|bird's[- ]eye)\b"
    r"|镜头|特写|近景|远景|全景|中景|俯拍|仰拍|航拍"
)
LOOK_WORDS = r"\b(?:light\w*|lit|sun\w*|dusk|dawn|night|moon\w*|neon|candle\w*|cinematic|style|anime|cartoon|photo\w*|film|painting|watercolou?r|black and white|3d)\b|光|夜|黄昏|清晨|风格|动漫|卡通|水彩"
HEARD = r"\b(?:heard?|hears?|hearing|sounds?|audio|music|soundtrack|noises?|audible|melody|song plays)\b|声音|听到|听见|音乐|音频|音效|声响"
# What is not told differs from take to take; with a picture the picture tells it.
CAMERAS = (
    "A medium shot at eye level opens the scene.",
    "A medium close-up at eye level opens the scene.",
    "A wide shot from chest height opens the scene.",
    "A three-quarter medium shot, slightly below eye level, opens the scene.",
)
LOOKS = (
    "Soft natural light falls from one side, and colours look true to life.",
    "Warm light gives depth to faces and surfaces, with gentle contrast.",
    "Clear daylight brings out fine texture, with a gently blurred background.",
    "Diffuse light wraps around everything, with rich, natural colours.",
)
KEEPING = "The place and the look of the first frame stay the same throughout, and every movement flows naturally."
AMBIENCE = "the natural sounds of the scene, clear and close, from beginning to end"
SOUND_OPENING = re.compile(r"(?:the (?:audio|sound ?track|soundscape)\b|(?:audio|sounds?|sound ?track|soundscape)\s*[:：—–-]|音频|声音[:：])\s*", re.IGNORECASE)
# What makes a sound when an idea names it.
SOUNDS = {
    r"\brain\w*|雨": "falling rain", r"\bthunder\w*|雷": "rolling thunder", r"\bwind(?!ow)\w*|\bbreeze\b|风声|大风": "wind",
    r"\b(?:sea|ocean|waves?|surf|tide|beach)\b|海": "waves", r"\b(?:river|stream|brook|waterfall)\b|河|瀑布": "running water",
    r"\b(?:fire|campfire|fireplace|flames?)\b|火": "a crackling fire", r"\bdogs?\b|\bbark\w*|狗": "a dog", r"\bcats?\b|\bmeow\w*|猫": "a cat",
    r"\bbirds?\b|\bgulls?\b|\bchirp\w*|鸟": "birds", r"\bhors\w+|\bgallop\w*|马蹄|骑马": "hooves", r"\b(?:cars?|traffic|engines?|motorcycles?|truck)\b|汽车|引擎": "engines",
    r"\btrains?\b|火车": "a train", r"\bcrowds?\b|\bmarket\b|人群": "a crowd", r"\bfootsteps?\b|\bwalk\w*|\bruns?\b|\brunning\b|脚步|走|跑": "footsteps",
    r"\bdoors?\b|门": "a door", r"\blaugh\w*|笑": "laughter", r"\bcr(?:y|ies|ying)\b|\bsob\w*|哭": "crying", r"\bclap\w*|\bapplau\w+|鼓掌|掌声": "applause",
    r"\bguitars?\b|吉他": "a guitar", r"\bpianos?\b|钢琴": "a piano", r"\bviolins?\b|小提琴": "a violin", r"\bdrums?\b|\bdrumm\w+|鼓声|打鼓": "drums",
    r"\bsings?\b|\bsinging\b|\bsang\b|唱": "singing", r"\bbells?\b|钟声|铃": "bells", r"\bclocks?\b": "a ticking clock", r"\bphones?\b|电话": "a phone",
}  # fmt: skip


def compose(fields: Fields, *, seed: int | None = None, sees_picture: bool = False) -> list[str]:
    """The paragraphs of a prompt, the last one about sound. The same fields and seed give the same text; texts stay in their language.

    What is said comes held (`Lines`), in its marks, in the idea and the lines.

    seed: draws framing and light where the idea tells none; None = they are left open. sees_picture: a start picture tells them.
    """
    opening, closing = ("", "") if seed is None or sees_picture else invent(fields.idea, seed)
    seen, heard = part_sentences(fields.idea)
    opening = sentence(fields.camera) or opening
    closing = sentence(f"The look is {fields.style}") if fields.style else closing
    scene = [opening, *(sentence(text) for text in seen), closing, KEEPING if sees_picture else ""]
    spoken = [sentence(say(line)) for line in fields.lines]
    return [part for part in (" ".join(filter(None, scene)), " ".join(spoken), describe_sound(fields, heard)) if part]


def invent(idea: str, seed: int) -> tuple[str, str]:
    """(framing, light) as whole sentences, "" for what the idea tells itself."""
    choose = random.Random(seed)
    camera, look = choose.choice(CAMERAS), choose.choice(LOOKS)
    return "" if re.search(CAMERA_WORDS, idea, re.IGNORECASE) else camera, "" if re.search(LOOK_WORDS, idea, re.IGNORECASE) else look


def compose_negative(music: str, avoid: str) -> str:
    """The release's list of picture faults, music where there shall be none, and what else the creator wants to avoid."""
    return ", ".join(filter(None, (NEGATIVE_PROMPT, "music, 音乐" if silent(music) else "", avoid.strip().strip(",，"))))


def part_sentences(idea: str) -> tuple[list[str], list[str]]:
    """(what is seen, what is only heard) of an idea; whatever is said in quotes is part of what is seen."""
    seen, heard, room = [], [], SOUND_BUDGET
    for text in split_sentences(idea):
        only_heard = re.search(HEARD, text, re.IGNORECASE) and not find_quotes(text) and len(text) <= room
        (heard if only_heard else seen).append(text)
        room -= len(text) if only_heard else 0
    return seen, heard


def describe_sound(fields: Fields, heard: list[str]) -> str:
    """The paragraph about sound: voices, what the creator asked for, and what the idea names."""
    told = "" if fields.sounds else unquoted(" ".join(text for text in split_sentences(fields.idea) if text not in heard))
    named = [words for pattern, words in SOUNDS.items() if re.search(pattern, told, re.IGNORECASE)]
    speaks = bool(fields.lines) or bool(lines_of([fields.idea]))
    parts = [voices(fields)] if speaks else []
    parts += [fields.sounds.strip().rstrip(ENDERS + ",;")] if fields.sounds else [f"the sound of {listed(named)}"] if named else []
    texts = [sentence(text) for text in heard]
    if parts or not any(map(SOUND_OPENING.match, texts)):
        texts.insert(0, sentence(f"The audio shows {', with '.join(parts or [AMBIENCE])}"))
    if silent(fields.music):
        texts.append("There is no music.")
    elif fields.music:
        texts.append(sentence(f"Music plays: {fields.music}"))
    return " ".join(texts)


def silent(music: str) -> bool:
    return music.strip().rstrip(ENDERS).lower() in ("none", "no", "no music", "without", "无", "没有", "无音乐")


def voices(fields: Fields) -> str:
    languages = list(dict.fromkeys(line.language for line in fields.lines if line.language))
    return f"clear speech{f' in {listed(languages)}' if languages else ''} in time with the moving lips"


def unquoted(text: str) -> str:
    for quote in reversed(find_quotes(text)):
        text = f"{text[: quote.start]} {text[quote.end :]}"
    return text


def say(line: Line) -> str:
    """`At the end, the woman says in French: "..."`; the text comes in its marks."""
    speaker, language = line.speaker or "a voice", f" in {line.language}" if line.language else ""
    return f"{line.when + ', ' if line.when else ''}{speaker} says{language}: {line.text}"


def listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def sentence(text: str) -> str:
    """With a capital at its beginning and a full stop (of its script) at its end."""
    text = text.strip()
    if not text or text[-1] in ENDERS or (text[-1] in "\"”'’»」』)" and text[-2:-1] and text[-2] in ENDERS):
        return text[:1].upper() + text[1:]
    return text[:1].upper() + text[1:].rstrip(",;:，；：、") + ("。" if NO_BLANKS.match(text[-1]) else ".")
