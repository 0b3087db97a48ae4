"""visadapt.tasks."""
