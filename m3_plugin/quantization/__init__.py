"""Quantised checkpoints: what their configs say, what their files hold, and back to numbers.

`dialects` reads a config, `formats` describes stored weights, `codecs` turns them into numbers,
`stream` does so while a host loads, `plan` compares config and files before memory is spent.
"""
