"""Quantised checkpoints: what their configs say, how weights are stored, and back to numbers.

`dialects` reads a config, `formats` describes stored weights, `codecs` turns them into numbers,
`chips` says who runs what. What a host loads is `m3_plugin.checkpoint`.
"""
