"""`python -m routesae` and `torchrun -m routesae` are the console script."""

from routesae.cli import main

if __name__ == "__main__":
    main(prog_name="routesae")
