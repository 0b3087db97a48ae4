"""visadapt.core."""
