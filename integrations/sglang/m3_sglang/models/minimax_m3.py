"""MiniMax-M3 for SGLang: the classes its model registry finds, named like the architectures."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.distributed import tensor_model_parallel_all_gather
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.managers.mm_utils import (
    MultiModalityDataPaddingPatternMultimodalTokens,
    general_mm_embed_routine,
)
from sglang.srt.managers.schedule_batch import MultimodalDataItem, MultimodalInputs
from torch import Tensor, nn

from m3_plugin.model.vision import M3Vision, VisionConfig
from m3_plugin.model.vision_shares import VisionRanks, shared_features
from m3_sglang.compat import (
    pixel_scale,
    shares_out_pictures,
    tensor_parallel_rank,
    tensor_parallel_size,
)
from m3_sglang.model import M3CausalLM
from m3_sglang.updates import ServedWeights

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, PPProxyTensors


def vision_ranks() -> VisionRanks | None:
    """The ranks among which pictures are shared out; None where each encodes all of them."""
    size = tensor_parallel_size()
    if size == 1 or not shares_out_pictures():
        return None
    return VisionRanks(
        rank=tensor_parallel_rank(),
        size=size,
        gather=lambda features: tensor_model_parallel_all_gather(features, dim=0),
    )


class MiniMaxM3SparseForCausalLM(M3CausalLM):
    """Text model; of the released checkpoint it leaves the vision part unused."""


class MiniMaxM3SparseForConditionalGeneration(nn.Module):
    """The released model: vision tower and projector in front of the text model."""

    packed_modules_mapping = M3CausalLM.packed_modules_mapping

    def __init__(
        self, config: Any, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.config = config
        self.quant_config = quant_config
        dot = f"{prefix}." if prefix else ""
        self.vision_tower = M3Vision(VisionConfig.from_hf(config), scale=pixel_scale())
        self.vision_ranks = vision_ranks()
        self.language_model = M3CausalLM(
            config, quant_config, f"{dot}language_model", is_root=False
        )
        self.language_model.take_adapters(self, prefix="language_model.")
        self.served = ServedWeights(
            self,
            text=self.language_model.weight_loader,
            tower=self.vision_tower,
            after_first=self.language_model.end_first_load,
        )

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def precompile_kernels_after_loading(self) -> None:
        """Called by SGLang before it records graphs."""
        self.language_model.precompile_kernels_after_loading()

    def pad_input_ids(self, input_ids: array, mm_inputs: MultimodalInputs) -> array:
        """Put each item's hash in the place of its tokens, so that prefixes tell pictures apart."""
        return MultiModalityDataPaddingPatternMultimodalTokens().pad_input_tokens(
            input_ids, mm_inputs
        )

    def get_image_feature(self, items: list[MultimodalDataItem]) -> Tensor:
        return self._features(items, "image_grid_thw")

    def get_video_feature(self, items: list[MultimodalDataItem]) -> Tensor:
        return self._features(items, "video_grid_thw")

    def _features(self, items: list[MultimodalDataItem], grid: str) -> Tensor:
        """[tokens, hidden] of all items in order."""
        weight = next(self.vision_tower.parameters())
        pixels = [torch.as_tensor(item.feature).to(weight.device) for item in items]
        if len({patches.dtype for patches in pixels}) > 1:
            # together they would become numbers of one kind
            pixels = [self.vision_tower.normalised(patches) for patches in pixels]
        grids = [row for item in items for row in getattr(item, grid).tolist()]
        # of one video at the limit a copy is 0.9 GB
        patches = pixels[0] if len(pixels) == 1 else torch.cat(pixels)
        if self.vision_ranks is None:
            return self.vision_tower(patches, grids)
        return shared_features(self.vision_tower, patches, grids, ranks=self.vision_ranks)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        forward_batch: ForwardBatch,
        get_embedding: bool = False,
        input_embeds: Tensor | None = None,
        pp_proxy_tensors: PPProxyTensors | None = None,
    ) -> Any:
        if input_embeds is not None:
            return self.language_model(
                input_ids, positions, forward_batch, input_embeds, pp_proxy_tensors
            )
        given: Any = general_mm_embed_routine(
            input_ids=input_ids,
            forward_batch=forward_batch,
            language_model=self.language_model.model,
            multimodal_model=self,
            positions=positions,
            pp_proxy_tensors=pp_proxy_tensors,
        )
        return self.language_model.logits_of(given, input_ids, forward_batch)

    @property
    def start_layer(self) -> int:
        """First decoder layer of this pipeline stage."""
        return self.language_model.start_layer

    @property
    def end_layer(self) -> int:
        """One past the last."""
        return self.language_model.end_layer

    def get_embed_and_head(self) -> tuple[Tensor, Tensor]:
        """What a draft model shares with its target."""
        return self.language_model.get_embed_and_head()

    def set_eagle3_layers_to_capture(self, layer_ids: list[int] | None = None) -> None:
        """Choose the layers whose output streams an EAGLE3 head reads."""
        self.language_model.set_eagle3_layers_to_capture(layer_ids)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load every tensor of the checkpoint; any of them while serving.

        Raises
        ------
        ValueError : tensors missing or left over, or none of this model's.
        """
        return self.served.load(weights)


EntryClass = [MiniMaxM3SparseForCausalLM, MiniMaxM3SparseForConditionalGeneration]
