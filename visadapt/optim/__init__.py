"""visadapt.optim."""
