"""visadapt.callbacks."""
