"""Tiny random Qwen models of transformers' own classes, saved in folders as a user has them, that say one given text whatever they are asked."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<|end|>", "<|start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>{% endif %}"
)
PIECE = 9  # characters of a token of the answer
SIZES = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32768)


def build_tokenizer(answer: str) -> PreTrainedTokenizerFast:
    """Knows single letters as unknown and the answer as a row of tokens, so that only a model can say it."""
    pieces = [answer[start : start + PIECE] for start in range(0, len(answer), PIECE)]
    assert len(set(pieces)) == len(pieces), "the answer must not repeat a piece"
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *pieces])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="<|end|>", pad_token="<|end|>", chat_template=TEMPLATE, additional_special_tokens=SPECIAL[2:]
    )


def teach(model: torch.nn.Module, tokens: int, dtype: torch.dtype) -> torch.nn.Module:
    """Layers that add nothing, and a head that knows the next token of the row: start -> first piece -> ... -> end."""
    rows = torch.nn.functional.normalize(torch.randn(tokens, model.get_input_embeddings().embedding_dim, generator=torch.manual_seed(0)), dim=1)
    following = torch.arange(1, tokens + 1)
    following[[SPECIAL.index("<|start|>"), -1]] = torch.tensor([len(SPECIAL), SPECIAL.index("<|end|>")])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")) and "visual" not in name:
                weight.zero_()
        model.get_input_embeddings().weight[:tokens] = rows
        head = model.get_output_embeddings().weight
        head.zero_()
        for token in [SPECIAL.index("<|start|>"), *range(len(SPECIAL), tokens)]:
            head[following[token]] = 20 * rows[token]
    return model.to(dtype)


def write_writer(folder: Path, answer: str, dtype: torch.dtype = torch.float32) -> Path:
    """A text-only model."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = build_tokenizer(answer)
    ends = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), tie_word_embeddings=False, **SIZES, **ends))
    teach(model, len(tokenizer), dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_seer(folder: Path, answer: str) -> Path:
    """A vision-language model: Qwen2.5-VL with its own processor."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    tokenizer = build_tokenizer(answer)
    number = {name: SPECIAL.index(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start", "vision_end")}
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            **SIZES,
            rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        ),
        vision_config=dict(depth=2, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64, window_size=56, fullatt_block_indexes=[1]),
        image_token_id=number["image_pad"],
        video_token_id=number["video_pad"],
        vision_start_token_id=number["vision_start"],
        vision_end_token_id=number["vision_end"],
        tie_word_embeddings=False,
    )
    model = teach(Qwen2_5_VLForConditionalGeneration(config), len(tokenizer), torch.float32)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    pictures = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 16)
    Qwen2_5_VLProcessor(pictures, tokenizer, Qwen2VLVideoProcessor(), chat_template=TEMPLATE).save_pretrained(folder)
    return folder
