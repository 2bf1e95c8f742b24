"""vLLM adapter of m3-plugin: registration through the `vllm.general_plugins` entry point."""


def register() -> None:
    """Entry point called by vLLM in the API server, the engine core and every worker.

    vLLM swallows an exception raised while *importing* an entry point and lets one raised here end
    the process, so this module imports nothing and all work happens inside the call.
    """
    from m3_plugin.host.presence import stands_aside

    # before anything of ours is imported that could fail: it must keep a broken plugin out
    if stands_aside(logger="vllm.m3_plugin"):
        return
    from m3_vllm.registration import register_with_vllm

    register_with_vllm()
