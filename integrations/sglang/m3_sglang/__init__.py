"""SGLang adapter of m3-plugin. It holds no code yet and registers nothing with SGLang."""
