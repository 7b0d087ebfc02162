"""`python -m pyrosome` is the command."""

from pyrosome.cli import main

if __name__ == "__main__":
    main()
