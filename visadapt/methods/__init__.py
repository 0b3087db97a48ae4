"""visadapt.methods."""
