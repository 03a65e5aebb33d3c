"""Between ComfyUI's sockets and the library's tensors: CONDITIONING, LATENT, VAE. No ComfyUI import is needed for that."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..mova.audio_vae import AudioVAEConfig
from ..mova.errors import InputError
from ..mova.latents import LatentSpace

log = logging.getLogger("mova")

Conditioning = list[list[Any]]
Latent = dict[str, Any]

USUAL_TOKENS = 512  # what MOVA was trained with
FPS = 24.0  # where the conditioning does not tell
VIDEO_CHANNELS = 16  # of the Wan 2.1 VAE's latents
MASK_CHANNELS = 4  # one for each pixel frame of a latent frame
RESIZING = {3: "linear", 5: "trilinear"}  # of masks, by the stream's dimensions; as core does

# ---------------------------------------------------------------- CONDITIONING


def read_prompt(conditioning: Conditioning, name: str) -> Tensor:
    """The one text embedding [B, L, text_dim] of a conditioning; InputError when it is combined or limited to some steps."""
    if len(conditioning) != 1:
        raise InputError(f"{name} holds {len(conditioning)} prompts: MOVA follows exactly one. Write both into one text instead of combining them.")
    ((context, keys),) = conditioning
    if keys.get("start_percent", 0.0) > 0 or keys.get("end_percent", 1.0) < 1:
        raise InputError(f"{name} is limited to a part of the steps (start and end percent): MOVA follows one prompt all along. Remove that node.")
    if context.shape[1] > USUAL_TOKENS:
        log.info("%s has %d tokens; MOVA was trained with %d at most.", name, context.shape[1], USUAL_TOKENS)
    return context


def read_frame_rate(positive: Conditioning) -> float:
    """Frames per second that the conditioning was made for."""
    fps = positive[0][1].get("frame_rate")
    if fps is None:
        log.info("The conditioning tells no frame rate: %g frames per second are taken.", FPS)
        return FPS
    return float(fps)


def read_condition(positive: Conditioning, video: Tensor, space: LatentSpace) -> Tensor:
    """The model's condition [1 or B, 20, T, h, w] beside the latents `video` [B, 16, T, h, w]: 4 mask channels (1 = given), 16 normalised latents.

    concat_latent_image [.., 16, T', h, w] is in VAE space, concat_mask [.., 1 or 4, T'', h, w] has 0 = given; what either lacks in time is to be made.
    """
    keys = positive[0][1]
    image, mask = keys.get("concat_latent_image"), keys.get("concat_mask")
    if image is None or mask is None:
        raise InputError(
            "The positive conditioning has no start picture (concat_latent_image and concat_mask): send it through 'MOVA Image to Video+Audio' "
            "(MOVAImageToVideoAudio) first. Without a picture that node makes video from text alone."
        )
    length, height, width = video.shape[2:]
    if image.ndim != 5 or image.shape[2] > length or image.shape[3:] != video.shape[3:]:
        raise InputError(
            f"The start picture was made for latents {list(image.shape[2:])} (time, height, width), the video latents are {[length, height, width]}: "
            "use the same width, height and length in both."
        )
    if mask.ndim != 5 or mask.shape[1] not in (1, MASK_CHANNELS) or mask.shape[2] > length:
        raise InputError(f"concat_mask is {list(mask.shape)}: [1, 1 or {MASK_CHANNELS}, up to {length}, h, w] is needed beside this video.")
    image = lengthen(space.normalize(image), length)
    given = 1 - F.interpolate(mask.float(), size=(mask.shape[2], height, width), mode="trilinear")
    given = lengthen(given.expand(-1, MASK_CHANNELS, -1, -1, -1), length)
    batch = max(len(image), len(given))
    return torch.cat((given.to(image).expand(batch, -1, -1, -1, -1), image.expand(batch, -1, -1, -1, -1)), dim=1)


def lengthen(stream: Tensor, length: int) -> Tensor:
    """[.., T', h, w] -> [.., length, h, w], zeros behind."""
    return F.pad(stream, (0, 0, 0, 0, 0, length - stream.shape[2]))


def with_values(conditioning: Conditioning, values: dict[str, Any]) -> Conditioning:
    """A copy whose entries all carry these values."""
    return [[context, keys | values] for context, keys in conditioning]


# ---------------------------------------------------------------- LATENT


@dataclass
class Stream:
    """One stream of a LATENT. mask: 1 = make, 0 = keep, broadcastable to samples; None = everything is made."""

    latent: Latent
    samples: Tensor
    mask: Tensor | None
    name: str

    @property
    def empty(self) -> bool:
        """All zeros: it tells a size and nothing else."""
        return not self.samples.any()

    def start(self, denoise: float, convert: Callable[[Tensor], Tensor] = Tensor.float) -> Tensor | None:
        """The clean latents to start from or to keep, converted to the denoiser's space; None when everything is made from noise. InputError when there are none."""
        if self.mask is None and denoise >= 1:
            return None
        if self.empty:
            asked = "parts of it are to be kept" if self.mask is not None else f"denoise is {denoise:g}"
            raise InputError(f"The {self.name} latents are empty, but {asked}: connect encoded or earlier made {self.name}, or make everything anew.")
        return convert(self.samples)

    def finish(self, made: Tensor, device: torch.device) -> Latent:
        """The LATENT with what was made; kept cells are those of the input, bit for bit."""
        made = made.to(device)
        if self.mask is not None:
            made = torch.where(self.mask.to(device) == 0, self.samples.to(made), made)
        return self.latent | {"samples": made}


def read_streams(video: Latent, audio: Latent | None) -> tuple[Stream, Stream | None]:
    """The streams of MOVADenoise's two inputs; joint latents on `video` (core's NestedTensor) supply both."""
    if is_joint(video["samples"]):
        if audio is not None:
            raise InputError("The video latents hold sound as well, and audio is connected too: disconnect one, or separate the joint latents first.")
        video, audio = separate(video)
    picture = read_stream(video, "video")
    return picture, None if audio is None else match_batch(read_stream(audio, "audio"), len(picture.samples))


def is_joint(samples: Any) -> bool:
    return getattr(samples, "is_nested", False)


def separate(joint: Latent) -> tuple[Latent, Latent]:
    """Video and audio LATENT of a joint one, each with its own mask; a plain mask belongs to the video, as in core."""
    video, audio, *_ = joint["samples"].unbind()
    mask = joint.get("noise_mask")
    masks = mask.unbind() if is_joint(mask) else [mask]
    others = {key: value for key, value in joint.items() if key not in ("samples", "noise_mask", "type")}
    latents = [others | {"samples": video}, others | {"samples": audio, "type": "audio"}]
    for latent, own in zip(latents, masks, strict=False):
        latent |= {} if own is None else {"noise_mask": own}
    return latents[0], latents[1]


def read_stream(latent: Latent, name: str) -> Stream:
    samples, mask = latent["samples"], latent.get("noise_mask")
    dims = {"video": 5, "audio": 3}[name]
    if is_joint(samples):
        raise InputError(f"Joint latents of video and audio are connected where {name} latents are needed: separate them first.")
    if samples.ndim != dims:
        layout = {"video": "[B, 16, T, h, w]", "audio": "[B, channels, length]"}[name]
        raise InputError(f"The {name} latents are {list(samples.shape)}: {layout} is needed. Connect the {name} output of a MOVA node.")
    masked = mask is not None and not (mask == 1).all()
    return Stream(latent, samples.float(), fit_mask(mask, samples.shape, name) if masked else None, name)


def match_batch(stream: Stream, batch: int) -> Stream:
    """One sound is used for every video of the batch."""
    given = len(stream.samples)
    if given not in (1, batch):
        raise InputError(f"{given} sounds do not fit {batch} videos: give one sound, or one for each video.")
    return Stream(stream.latent, stream.samples.expand(batch, -1, -1), stream.mask, stream.name)


def fit_mask(mask: Tensor, shape: torch.Size, name: str) -> Tensor:
    """A noise mask of any size in the stream's: [1 or B, 1 or C, T, ...]. Pictures [N, 1, H, W] are a mask's frames, as in core."""
    if len(shape) == 5 and mask.ndim in (2, 3, 4):
        mask = mask.reshape(1, 1, -1, *mask.shape[-2:])
    if mask.ndim != len(shape) or mask.shape[0] not in (1, shape[0]) or mask.shape[1] not in (1, shape[1]):
        raise InputError(f"The noise mask of the {name} is {list(mask.shape)} beside latents {list(shape)}: use MOVA Keep Picture / Sound to make one.")
    return F.interpolate(mask.float(), size=shape[2:], mode=RESIZING[len(shape)]).clamp(0, 1)  # weights of 1/3 add up to a little more than 1


def keep_cells(stream: Stream, span: Tensor, keep: float) -> Tensor:
    """The stream's mask, float32, with 1 - keep in the latents of `span` [T]: [1 or B, 1 or C, T, ...], small where nothing was masked yet."""
    shape = (1, 1, -1) + (1,) * (stream.samples.ndim - 3)
    return torch.where(span.view(shape), 1 - keep, torch.ones(shape[:2] + (len(span),) + shape[3:]) if stream.mask is None else stream.mask)


def latents_per_second(stream: Stream) -> float:
    """Of an audio stream; InputError when its LATENT does not tell."""
    rate, hop = stream.latent.get("sample_rate"), stream.latent.get("downscale_ratio_temporal")
    if not rate or not hop:
        raise InputError("The audio latents do not tell how long they are: for a span of seconds, encode the sound with MOVA Audio Encode.")
    return rate / hop


def video_latent(samples: Tensor) -> Latent:
    """A LATENT of video [B, 16, T, h, w] in VAE space."""
    return {"samples": samples}


def audio_latent(samples: Tensor, clock: AudioVAEConfig) -> Latent:
    """A LATENT of audio [B, Ca, Ta]; downscale_ratio_temporal is core's name for samples per latent."""
    return {"samples": samples, **audio_rates(clock)}


def audio_rates(clock: AudioVAEConfig) -> dict[str, Any]:
    return {"type": "audio", "sample_rate": clock.sample_rate, "downscale_ratio_temporal": clock.hop}


def decodable(latent: Latent, stream: int) -> Tensor:
    """The samples of stream 0 (video) or -1 (audio) of a LATENT that may be joint."""
    samples = latent["samples"]
    return samples.unbind()[stream] if is_joint(samples) else samples


# ---------------------------------------------------------------- VAE


def check_video_vae(vae: Any) -> None:
    """InputError unless the VAE is for video and has the latents that MOVA works with."""
    if vae.temporal_compression_decode() is None or vae.latent_channels != VIDEO_CHANNELS:
        raise InputError(
            "The vae is not the Wan 2.1 video VAE, with whose latents (16 channels) MOVA works: connect Load MOVA Video VAE, or core's Load VAE with that file."
        )


def check_audio_vae(vae: Any) -> None:
    """InputError when the VAE is for video."""
    if vae.temporal_compression_decode() is not None:
        raise InputError("The vae is for video: sound needs MOVA's audio VAE. Connect Load MOVA Audio VAE.")


class ConditionVAE:
    """A VAE socket as `mova.image_condition` sees a VAE; latents stay in VAE space, which is what CONDITIONING carries."""

    def __init__(self, vae: Any) -> None:
        check_video_vae(vae)
        self.vae = vae
        self.temporal_compression = vae.temporal_compression_decode()

    def normalize(self, latents: Tensor) -> Tensor:
        return latents

    def encode_chunks(self, chunks: Iterable[Tensor], **settings: Any) -> Tensor:
        """[1, 3, n, H, W] in -1..1, again and again -> [1, 16, T, h, w]; our VAE takes it chunk by chunk, core's as a whole film."""
        if hasattr(self.vae, "encode_chunks"):
            return self.vae.encode_chunks(chunks, **settings)
        film = torch.cat(list(chunks), dim=2)[0].movedim(0, -1)  # [F, H, W, 3]
        return self.vae.encode(film * 0.5 + 0.5).float()
