"""The nodes, one file per stage. Everything that touches ComfyUI beside comfy_api.latest is in host.py."""

from comfy_api.latest import ComfyExtension, io

from . import host
from .decode import MOVADecodeAudio, MOVADecodeVideo
from .denoise import MOVADenoise
from .encode_audio import MOVAEncodeAudio
from .encode_text import MOVAEncodeText
from .estimate import MOVAEstimate
from .image_to_video_audio import MOVAImageToVideoAudio
from .keep_stream import MOVAKeepStream
from .load import MOVALoadAudioVAE, MOVALoadModel, MOVALoadTextEncoder, MOVALoadVideoVAE


class MOVAStudio(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        host.register_folders()
        return [
            MOVALoadModel,
            MOVALoadTextEncoder,
            MOVALoadVideoVAE,
            MOVALoadAudioVAE,
            MOVAEncodeText,
            MOVAImageToVideoAudio,
            MOVADenoise,
            MOVAKeepStream,
            MOVADecodeVideo,
            MOVADecodeAudio,
            MOVAEncodeAudio,
            MOVAEstimate,
        ]


async def comfy_entrypoint() -> MOVAStudio:
    return MOVAStudio()
