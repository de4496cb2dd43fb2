"""`python -m megalite`, which torchrun needs: the same as the `megalite` command."""

from megalite.cli import command

if __name__ == "__main__":
    command()
