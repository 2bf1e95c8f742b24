"""`python -P -m m3_plugin.cli`, for environments whose scripts are not on the path."""

from m3_plugin.cli import app

app(prog_name="m3-plugin")
