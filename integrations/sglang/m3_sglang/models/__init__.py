"""Model classes under SGLang's architecture names; SGLang imports every module of this package."""
