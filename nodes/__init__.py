"""The nodes, one file per stage. Everything that touches ComfyUI beside comfy_api.latest is in host.py."""

from comfy_api.latest import ComfyExtension, io

from . import host
from .best_take import MOVAPickBestTake, MOVASeeds
from .check_lip_sync import MOVACheckLipSync, MOVAFixLag
from .decode import MOVADecodeAudio, MOVADecodeVideo
from .denoise import MOVADenoise
from .encode_audio import MOVAEncodeAudio
from .encode_text import MOVAEncodeText
from .enhance_prompt import MOVAEnhancePrompt, MOVAPromptFields
from .estimate import MOVAEstimate
from .image_to_video_audio import MOVAImageToVideoAudio
from .keep_stream import MOVAKeepStream
from .listen import CATCheckSound, CATCompareAudio, CATLoadEncoder, CATTagAudio
from .load import MOVALoadAudioVAE, MOVALoadModel, MOVALoadTextEncoder, MOVALoadVideoVAE
from .load_lora import MOVALoadLora
from .sift_dataset import CATSiftDataset


class MOVAStudio(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        host.register_folders()
        return [
            MOVALoadModel,
            MOVALoadTextEncoder,
            MOVALoadVideoVAE,
            MOVALoadAudioVAE,
            MOVALoadLora,
            MOVAEnhancePrompt,
            MOVAPromptFields,
            MOVAEncodeText,
            MOVAImageToVideoAudio,
            MOVADenoise,
            MOVAKeepStream,
            MOVADecodeVideo,
            MOVADecodeAudio,
            MOVAEncodeAudio,
            MOVASeeds,
            MOVACheckLipSync,
            MOVAFixLag,
            MOVAPickBestTake,
            MOVAEstimate,
            CATLoadEncoder,
            CATTagAudio,
            CATCheckSound,
            CATCompareAudio,
            CATSiftDataset,
        ]


async def comfy_entrypoint() -> MOVAStudio:
    return MOVAStudio()
