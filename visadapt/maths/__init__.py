"""visadapt.maths."""
