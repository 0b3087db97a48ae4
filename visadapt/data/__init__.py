"""visadapt.data."""
