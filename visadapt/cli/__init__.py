"""visadapt.cli."""
