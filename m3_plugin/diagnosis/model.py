"""A checkpoint before anything is loaded: its config, its files, and what neither says aloud."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m3_plugin.checkpoint.headers import DSPARK_FOLDER, TensorHeader, read_checkpoint, read_draft
from m3_plugin.checkpoint.names import is_draft_tensor, is_mtp_tensor
from m3_plugin.checkpoint.plan import plan_weights
from m3_plugin.diagnosis.findings import Report
from m3_plugin.model.config import M3Config
from m3_plugin.model.released import ModelNotFound, ModelSource, find_model, released_config
from m3_plugin.quantization.dialects import is_index_projection
from m3_plugin.quantization.formats import FLOAT_DTYPES
from m3_plugin.settings import Settings

SECTION = "model"

# Keys of transformers' dialect, and generic ones every config may carry.
_TRANSFORMERS_KEYS = frozenset(
    {
        "layer_types",
        "mlp_layer_types",
        "index_n_heads",
        "index_head_dim",
        "index_block_size",
        "index_topk_blocks",
        "index_local_blocks",
        "rope_parameters",
        "rope_scaling",
        "quantization_config",
        "model_type",
        "dtype",
        "swiglu_beta",
        "text_config",
        "vision_config",
    }
)


def examine_model(report: Report, name: str) -> M3Config | None:
    """Add what can be known about a model without loading it; its config if it could be read."""
    try:
        source = find_model(name)
    except (ModelNotFound, ValueError) as error:
        report.add(
            SECTION,
            "found",
            str(error),
            status="failure",
            advice="give a checkpoint folder, its config.json, or a published id",
        )
        return None
    if source.folder is None:
        report.add(
            SECTION,
            "found",
            "not downloaded: what is published about it was looked at, and none of its files",
            status="warning",
            advice=f"hf download {name}, then ask again",
        )
    else:
        report.add(SECTION, "found", str(source.folder))
    _examine_keys(report, source.config)
    try:
        config = M3Config.from_hf(source.config)
        config.require_paged_host()
    except ValueError as error:
        report.add(
            SECTION,
            "config",
            str(error),
            status="failure",
            advice="the plugin refuses such a checkpoint: correct its config.json",
        )
        return None
    _report_config(report, config)
    if source.folder is not None:
        _examine_files(report, source, config)
    return config


def _report_config(report: Report, config: M3Config) -> None:
    report.add(SECTION, "dialect", config.dialect)
    dense = config.num_hidden_layers - config.num_sparse_layers
    report.add(SECTION, "layers", f"{config.num_sparse_layers} MSA, {dense} dense attention")
    report.add(
        SECTION,
        "heads",
        f"{config.num_attention_heads} query, {config.num_key_value_heads} KV, "
        f"{config.head_dim} channels, {config.rotary_dim} of them rotated",
    )
    report.add(SECTION, "positions", f"{config.max_position_embeddings:,}")
    report.add(
        SECTION,
        "experts",
        f"{config.num_experts}, {config.num_experts_per_token} per token, "
        f"{config.num_shared_experts} shared",
    )
    if config.msa is None:
        report.add(
            SECTION,
            "selection",
            "no layer is sparse",
            status="warning",
            advice="dense attention everywhere: not what MiniMax-M3 was trained with, unless "
            "this is meant as a comparison",
        )
        return
    msa = config.msa
    report.add(
        SECTION,
        "selection",
        f"{msa.topk_blocks} blocks of {msa.block_size}, {msa.num_init_blocks} first and "
        f"{msa.num_local_blocks} newest always; equal to dense up to {msa.dense_context:,} tokens",
    )


def _examine_keys(report: Report, config: Mapping[str, Any]) -> None:
    """Keys nobody reads: a misspelt one silently means the default."""
    text = config.get("text_config")
    text = text if isinstance(text, Mapping) else config
    sparse = text.get("sparse_attention_config")
    known_text = released_config()["text_config"]
    known = set(known_text) | set(released_config()) | _TRANSFORMERS_KEYS
    others = []
    for key in text:
        if key in known:
            continue
        close = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.85)
        # transformers adds keys of its own; only one that looks like ours is taken for a mistake
        if close:
            _unknown_key(report, key, f"did you mean {close[0]!r}?", harmless=close[0] in text)
        else:
            others.append(key)
    if others:
        report.add(SECTION, "other keys", f"not read: {', '.join(sorted(others))}", status="note")
    if isinstance(sparse, Mapping):
        known_sparse = known_text["sparse_attention_config"]
        for key in sorted(sparse.keys() - known_sparse.keys()):
            close = difflib.get_close_matches(key, known_sparse, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "it may change which blocks count"
            _unknown_key(report, f"sparse_attention_config.{key}", hint)


def _unknown_key(report: Report, key: str, hint: str, *, harmless: bool = False) -> None:
    report.add(
        SECTION,
        "unknown key",
        f"{key}: {hint}",
        status="warning" if harmless else "failure",
        advice="no host reads this key, so the model would be served without it: correct or "
        "remove it in config.json",
    )


def _examine_files(report: Report, source: ModelSource, config: M3Config) -> None:
    assert source.folder is not None
    try:
        headers = read_checkpoint(source.folder)
    except (OSError, ValueError) as error:
        report.add(
            SECTION,
            "files",
            str(error),
            status="failure",
            advice="the checkpoint was not written or downloaded completely: fetch it again",
        )
        return
    total = sum(header.num_bytes for header in headers)
    shards = len({header.file for header in headers})
    report.add(SECTION, "files", f"{shards} shards, {len(headers):,} tensors, {total:,} bytes")
    _examine_names(report, headers, config)
    _examine_mtp(report, headers, config)
    _examine_draft(report, source.folder)
    _examine_quantisation(report, headers, config)


def _examine_names(report: Report, headers: list[TensorHeader], config: M3Config) -> None:
    """What loading would find: every tensor there, in the shape and format the config says."""
    try:
        plan = plan_weights(headers, config, fused={}, dequantise=_settings().dequantize)
    except ValueError as error:
        report.add(
            SECTION,
            "tensors",
            str(error),
            status="failure",
            advice="loading would end with this message: fetch the checkpoint again, or take "
            "the config.json that belongs to it",
        )
    else:
        report.add(SECTION, "tensors", f"all that the config promises: {plan.describe()}")


def _settings() -> Settings:
    """The plugin's variables; a misspelt one is a finding of its own."""
    try:
        return Settings.from_environment()
    except ValueError:
        return Settings()


def _examine_mtp(report: Report, headers: list[TensorHeader], config: M3Config) -> None:
    present = sum(is_mtp_tensor(header.name) for header in headers)
    drafts = sum(is_draft_tensor(header.name) for header in headers) - present
    if drafts:
        found = f"{drafts} tensors of a DSpark model, which is not served and not read"
        report.add(SECTION, "draft weights", found, status="note")
    if present:
        report.add(SECTION, "MTP weights", f"{present} tensors", status="note")
    elif config.num_mtp_modules:
        report.add(
            SECTION,
            "MTP weights",
            f"none, although the config counts {config.num_mtp_modules} modules",
            status="note",
            advice="as in every public checkpoint: speculative decoding with method mtp cannot "
            "work; an EAGLE3 drafter can",
        )


def _examine_draft(report: Report, folder: Path) -> None:
    """The draft model that M3.1 is published with."""
    try:
        headers = read_draft(folder)
    except (OSError, ValueError) as error:
        found = f"{DSPARK_FOLDER}/ cannot be read and is not served anyway: {error}"
    else:
        if not headers:
            return
        total = sum(header.num_bytes for header in headers)
        found = (
            f"{len(headers)} tensors, {total:,} bytes in {DSPARK_FOLDER}/: a DSpark model, which "
            "is not served and not read"
        )
    report.add(SECTION, "draft model", found, status="note")


def _examine_quantisation(report: Report, headers: list[TensorHeader], config: M3Config) -> None:
    """What the config says, and what the index projections really are."""
    report.add(SECTION, "quantisation", str(config.quantization or "none"))
    index = {
        header.dtype
        for header in headers
        if is_index_projection(header.name.rpartition(".")[0])
        and "scale" not in header.name.rpartition(".")[2]
    }
    if index:
        kind = "as they are" if index <= set(FLOAT_DTYPES) else "quantised"
        report.add(SECTION, "index projections", f"{kind} ({', '.join(sorted(index))})")
