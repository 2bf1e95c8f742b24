"""Weights of a host's layers in their stored bytes: parameters, and expert tensors into them.

What both adapters need around `m3_plugin.quantization.packing`; a host's own loaders fill the
parameters of projections, for rows and columns are where its plain weights have them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from m3_kernels.quantised_experts import quantised_experts
from m3_kernels.quantised_linear import quantised_linear
from m3_kernels.stored_matrix import StoredMatrix
from m3_plugin.checkpoint.names import TEXT_PREFIX
from m3_plugin.quantization.dialects import PLAIN, Quantization
from m3_plugin.quantization.formats import WeightFormat
from m3_plugin.quantization.packing import PART_NAMES, Layout, PartName, layout_of


def format_of_layer(
    quantization: Quantization, prefix: str, *, fused: Mapping[str, tuple[str, Any]]
) -> WeightFormat:
    """How the weights of a host's layer are stored; the plan has checked that fused ones are alike.

    Parameters
    ----------
    quantization : what the checkpoint says
    prefix : of the host's layer, or "model.layers.3.block_sparse_moe.experts.0.w1" for experts
    fused : projection -> the host's fused layer, by their last names, and its place in there
    """
    return quantization.format_of(_first_module(prefix, fused))


def stored_layout(
    quantization: Quantization, prefix: str, *, fused: Mapping[str, tuple[str, Any]]
) -> Layout | None:
    """How a host's layer holds its weights; None if they are plain. Parameters as above.

    Raises
    ------
    ValueError : no layout for the format.
    """
    weight = format_of_layer(quantization, prefix, fused=fused)
    if weight == PLAIN:
        return None
    layout = layout_of(weight)
    if layout is None:
        raise ValueError(
            f"m3-plugin: {_first_module(prefix, fused)} is stored as {weight.name} with reordered "
            "columns (desc_act) or groups that are no multiple of 16 columns, which cannot be "
            "multiplied as stored on a CPU; set M3_PLUGIN_DEQUANTIZE=1 if memory suffices"
        )
    return layout


def _first_module(prefix: str, fused: Mapping[str, tuple[str, Any]]) -> str:
    """The checkpoint's name for a layer's weight, or for the first of those that it fuses."""
    parent, _, name = prefix.removeprefix(TEXT_PREFIX).rpartition(".")
    parts = [part for part, (layer, _) in fused.items() if layer == name] or [name]
    return f"{parent}.{parts[0]}".removeprefix(".")


def stored_parameters(
    layout: Layout, rows: tuple[int, ...], columns: int
) -> dict[str, nn.Parameter]:
    """Uninitialised parts of a weight [*rows, columns] as parameters, by their names.

    Those of a matrix without experts say where a host's loaders find rows (`output_dim`) and
    columns (`input_dim`).

    Raises
    ------
    ValueError : columns that are no whole number of groups.
    """
    found = {}
    for name, tensor in layout.empty(rows, columns).items():
        parameter = nn.Parameter(tensor, requires_grad=False)
        if len(rows) == 1:
            dims = {"output_dim": 0, "input_dim": layout.column_dim(name)}
            for attribute, dim in dims.items():
                if dim is not None:
                    setattr(parameter, attribute, dim)
        found[name] = parameter
    return found


class StoredWeight:
    """The weight that some parameters of a layer hold, for whoever multiplies with it.

    Parameters
    ----------
    layout : of the weight
    prefix : of the parameters' names, "w13_" for experts
    """

    def __init__(self, layout: Layout, *, prefix: str = "") -> None:
        self.layout = layout
        self.prefix = prefix
        self._made: StoredMatrix | None = None

    def of(self, layer: nn.Module) -> StoredMatrix:
        """The matrix; made again if a host has put other memory in the parameters' place."""
        codes = layer.get_parameter(f"{self.prefix}codes")
        if self._made is None or self._made.codes.data_ptr() != codes.data_ptr():
            own = dict(layer.named_parameters(recurse=False))
            parts: dict[PartName, Tensor] = {
                part: own[f"{self.prefix}{part}"].data
                for part in PART_NAMES
                if f"{self.prefix}{part}" in own
            }
            self._made = self.layout.matrix(parts)
        return self._made

    def create(
        self,
        layer: nn.Module,
        rows: tuple[int, ...],
        columns: int,
        attributes: Mapping[str, Any],
    ) -> None:
        """Give a layer the parameters of a weight [*rows, columns], uninitialised.

        Parameters
        ----------
        attributes : that a host's loaders look for on each of them
        """
        for name, parameter in stored_parameters(self.layout, rows, columns).items():
            for attribute, value in attributes.items():
                setattr(parameter, attribute, value)
            layer.register_parameter(f"{self.prefix}{name}", parameter)


class StoredLinear:
    """A linear layer whose parameters are the parts of a `StoredMatrix`.

    The half of a host's linear method that knows nothing of the host.
    """

    def __init__(self, layout: Layout) -> None:
        self.weight = StoredWeight(layout)

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Parameters of this rank's share; both hosts call it with these names."""
        rows = (sum(output_partition_sizes),)
        self.weight.create(layer, rows, input_size_per_partition, extra_weight_attrs)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., columns] to [..., rows]."""
        out = self.multiply(x.reshape(-1, x.shape[-1]), self.weight.of(layer))
        out = out.view(*x.shape[:-1], -1)
        return out if bias is None else out + bias

    @staticmethod
    def multiply(x: Tensor, weight: StoredMatrix) -> Tensor:
        """[tokens, columns] to [tokens, rows]."""
        return quantised_linear(x, weight)


class StoredExperts:
    """Routed experts whose parameters are the parts of two `StoredMatrix`, w13 and w2.

    Parameters
    ----------
    place_of : layer and number of an expert -> its number on this rank (negative or too large if
        another has it) and the rank among those that share each expert
    """

    def __init__(
        self, layout: Layout, *, place_of: Callable[[nn.Module, int], tuple[int, int]]
    ) -> None:
        self.w13 = StoredWeight(layout, prefix="w13_")
        self.w2 = StoredWeight(layout, prefix="w2_")
        self._place_of = place_of

    def create(
        self,
        layer: nn.Module,
        *,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        attributes: Mapping[str, Any],
    ) -> None:
        """Give a layer the parameters of this rank's experts, with a loader of their own.

        Parameters
        ----------
        num_experts, intermediate_size : of this rank
        attributes : that the host's loaders look for on each of them
        """

        def load(
            parameter: nn.Parameter, tensor: Tensor, name: str, *, shard_id: str, expert_id: int
        ) -> None:
            expert, rank = self._place_of(layer, expert_id)
            if 0 <= expert < num_experts:
                write_expert(parameter, tensor, matrix=shard_id, expert=expert, rank=rank)

        found = {**attributes, "weight_loader": load}
        self.w13.create(layer, (num_experts, 2 * intermediate_size), hidden_size, found)
        self.w2.create(layer, (num_experts, hidden_size), intermediate_size, found)

    def apply(
        self,
        layer: nn.Module,
        x: Tensor,
        *,
        expert_ids: Tensor,
        expert_weights: Tensor,
        alpha: float,
        limit: float,
        beta: float,
    ) -> Tensor:
        """The weighted sum of each token's experts; see `quantised_experts`."""
        return quantised_experts(
            x,
            self.w13.of(layer),
            self.w2.of(layer),
            expert_ids=expert_ids.int(),
            expert_weights=expert_weights.float(),
            alpha=alpha,
            limit=limit,
            beta=beta,
        )


def write_expert(
    parameter: nn.Parameter, tensor: Tensor, *, matrix: str, expert: int, rank: int
) -> None:
    """Write a part of one expert's w1, w2 or w3, of which this rank keeps its channels.

    Parameters
    ----------
    parameter : [experts, ...] of this rank, gate rows before up rows
    tensor : the whole part
    matrix, expert : whose it is; the expert's number on this rank
    rank : of those that share each expert
    """
    target = parameter.data[expert]
    if matrix != "w2":
        half = target.shape[0] // 2
        target = target[half:] if matrix == "w3" else target[:half]
    for dim, own in enumerate(target.shape):
        if tensor.shape[dim] != own:
            tensor = tensor.narrow(dim, rank * own, own)
    target.copy_(tensor)


def holds_stored_bytes(names: Iterable[str]) -> bool:
    """Whether a model with parameters of these names keeps weights in their stored bytes."""
    return any(name.endswith("codes") for name in names)
