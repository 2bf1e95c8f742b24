"""The MTP module in plain torch, its decoder layer by transformers: the oracle for both hosts.

transformers knows M3's decoder layer but no MTP module. So module i is written as a checkpoint of
one layer whose final norm is the module's, which transformers loads as any M3; what goes in front
of it is computed here, in a few lines that share no code with `m3_plugin.model.mtp`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_TEXT = "language_model.model."
_LISTS = ("sparse_attention_freq", "sparse_disable_index_value")


@dataclass(frozen=True)
class Drafted:
    """Draft tokens of one position, and the log probabilities [drafts, vocab] of each."""

    token_ids: list[int]
    logprobs: Tensor


class MTPReference:
    """Target and MTP module of a checkpoint in fp32 on CPU, without any cache.

    Parameters
    ----------
    checkpoint : folder in the published layout, holding MTP module `module`
    scratch : empty folder for the one-layer checkpoint
    target : the checkpoint as transformers loaded it, if it is loaded already
    """

    def __init__(
        self, checkpoint: Path, *, scratch: Path, module: int = 0, target: Any = None
    ) -> None:
        import torch
        from transformers import MiniMaxM3SparseForConditionalGeneration as Model

        load = Model.from_pretrained
        own = _write_one_layer(checkpoint, scratch, module=module)
        self.target = load(checkpoint, dtype=torch.float32) if target is None else target
        self.layer: Any = load(scratch, dtype=torch.float32)
        self.eps = self.layer.config.text_config.rms_norm_eps
        self.enorm, self.hnorm, self.eh_proj = (
            own[f"{name}.weight"].float() for name in ("enorm", "hnorm", "eh_proj")
        )

    def draft(
        self, token_ids: Sequence[int], *, num_drafts: int, text_only: bool = True, **inputs: Tensor
    ) -> Drafted:
        """What the module drafts after `token_ids`, whose last token the target has just chosen.

        Parameters
        ----------
        text_only : feed the module placeholder embeddings where the target has image embeddings
        inputs : pictures, as transformers' processor gives them
        """
        import torch

        with torch.inference_mode():
            ids = torch.tensor([token_ids])
            states, embeddings = self._target_states(ids[:, :-1], **inputs)
            shifted = self.target.get_input_embeddings()(ids)[:, 1:]
            if not text_only:
                shifted = torch.cat([embeddings[:, 1:], shifted[:, -1:]], dim=1)
            rows = self._rows(shifted, states, first_position=0)
            drafted: list[int] = []
            logprobs = []
            for index in range(num_drafts):
                output, logits = self._run_layer(rows)
                logprobs.append(logits.log_softmax(-1))
                drafted.append(int(logits.argmax()))
                if index + 1 < num_drafts:
                    again = self.target.get_input_embeddings()(torch.tensor([drafted[-1:]]))
                    row = self._rows(again, output[:, -1:], first_position=rows.shape[1])
                    rows = torch.cat([rows, row], dim=1)
        return Drafted(token_ids=drafted, logprobs=torch.stack(logprobs))

    def _target_states(self, ids: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The target's states after its final norm, and the embeddings it began with."""
        seen = []
        text = self.target.model.language_model
        hook = text.layers[0].register_forward_pre_hook(
            lambda _module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        try:
            output = self.target.model(input_ids=ids, use_cache=False, **inputs)
        finally:
            hook.remove()
        return output.last_hidden_state, seen[0]

    def _rows(self, embeddings: Tensor, states: Tensor, *, first_position: int) -> Tensor:
        if first_position == 0:
            embeddings = embeddings.clone()
            embeddings[:, 0] = 0.0
        of_embedding, of_state = self.eh_proj.chunk(2, dim=1)
        return (
            self._norm(embeddings, self.enorm) @ of_embedding.T
            + self._norm(states, self.hnorm) @ of_state.T
        )

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * (1.0 + weight)

    def _run_layer(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Stream behind the layer [1, rows, hidden], and the last row's logits [vocab]."""
        seen = []
        hook = self.layer.model.language_model.norm.register_forward_pre_hook(
            lambda _module, args: seen.append(args[0])
        )
        try:
            logits = self.layer(inputs_embeds=rows, use_cache=False, logits_to_keep=1).logits
        finally:
            hook.remove()
        return seen[0], logits[0, -1]


def _write_one_layer(checkpoint: Path, folder: Path, *, module: int) -> dict[str, Tensor]:
    """Write the module's layer as an M3 of one layer; returns the module's other tensors."""
    from safetensors.torch import load_file, save_file

    tensors: dict[str, Tensor] = {}
    for shard in sorted(checkpoint.glob("*.safetensors")):
        tensors |= load_file(shard)
    prefix = f"{_TEXT}mtp.layers.{module}."
    own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    if not own:
        raise ValueError(f"{checkpoint} holds no MTP module {module}")
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith((f"{_TEXT}layers.", f"{_TEXT}mtp.", f"{_TEXT}norm."))
    }
    kept[f"{_TEXT}norm.weight"] = own["final_layernorm.weight"]
    for name, tensor in own.items():
        if name.startswith("transformer_layer."):
            kept[f"{_TEXT}layers.0.{name.removeprefix('transformer_layer.')}"] = tensor
    config = json.loads((checkpoint / "config.json").read_text())
    text = config["text_config"]
    text |= {"num_hidden_layers": 1, "moe_layer_freq": [1]}
    text["sparse_attention_config"] |= {name: [1] for name in _LISTS}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(checkpoint / "tokenizer.json", folder)
    return own
