"""Its presence puts the repository on the import path: test folders share `tests.tiny`, `tests.training`."""
