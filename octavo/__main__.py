"""`python -m octavo` is the same as the `octavo` command."""

from octavo.cli.main import run

if __name__ == "__main__":
    run()
