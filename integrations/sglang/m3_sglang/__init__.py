"""SGLang adapter of m3-plugin: registration through the `sglang.srt.plugins` entry point."""


def register() -> None:
    """Entry point called by SGLang in the launcher, every scheduler and the detokenizer.

    SGLang logs and swallows whatever an entry point raises, at import and when called, except
    `SystemExit`. So this module imports nothing, and a plugin that must be there but cannot be
    ends the process here.

    Raises
    ------
    SystemExit : `M3_PLUGIN_REQUIRED=1` and the registration failed or is disabled.
    """
    from m3_sglang.exits import ending_the_process

    with ending_the_process():
        from m3_plugin.host.presence import stands_aside

        # before anything of ours is imported that could fail: it must keep a broken plugin out
        if stands_aside(logger="m3_sglang.registration"):
            return
        from m3_sglang.registration import register_with_sglang

        register_with_sglang()
