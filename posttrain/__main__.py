"""`python -m posttrain` is the `posttrain` command."""

from posttrain.cli import main

if __name__ == "__main__":
    main()
