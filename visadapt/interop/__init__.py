"""visadapt.interop."""
