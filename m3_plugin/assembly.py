"""From a model's config and the user's settings to a session: the same steps in both hosts."""

from __future__ import annotations

from m3_plugin.backends import choose_kernels
from m3_plugin.config import M3Config
from m3_plugin.metrics import ExportedStatistics, export_presence
from m3_plugin.selection.recorder import SelectionRecorder
from m3_plugin.session import MSASession
from m3_plugin.settings import Settings


def make_session(config: M3Config, *, device_type: str) -> MSASession | None:
    """The MSA session of one worker, None for a model without sparse layers.

    Parameters
    ----------
    config : the model
    device_type : `torch.device.type` of the worker

    Raises
    ------
    NoKernelError : no kernel family can serve this device.
    """
    if config.msa is None:
        return None
    settings = Settings.from_environment()
    kernels = choose_kernels(device_type, settings.kernels)
    export_presence(kernels, device_type=device_type)
    session = MSASession(config.msa, kernels=kernels, scale=config.head_dim**-0.5)
    if settings.statistics:
        session.statistics = ExportedStatistics()
    if settings.record_blocks is not None:
        session.recorder = SelectionRecorder(settings.record_blocks, config.msa)
    return session
