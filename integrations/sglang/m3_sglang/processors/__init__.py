"""Multimodal processors; SGLang imports every module of this package in the tokenizer process."""
