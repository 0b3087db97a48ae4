"""`python -m visadapt`, for machines where the script is not on the path."""

from visadapt.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
