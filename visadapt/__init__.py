"""visadapt."""
