"""`python -m bitnest` is the console script."""

from bitnest.cli import main

if __name__ == "__main__":
    main()
