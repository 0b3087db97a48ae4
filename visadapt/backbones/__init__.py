"""visadapt.backbones."""
