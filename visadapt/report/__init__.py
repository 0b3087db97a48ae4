"""What a run leaves behind: pictures, tables, the model card."""
