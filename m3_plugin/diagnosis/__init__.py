"""What stands between this environment and MiniMax-M3 served by the plugin: `m3-plugin doctor`.

Everything that imports a host, touches a device or runs a kernel happens in a child process, so
that a broken installation is reported instead of ending the report.
"""

from m3_plugin.diagnosis.findings import Finding, Report, Status

__all__ = ["Finding", "Report", "Status"]
