"""`python -m ddkmix`, and so `accelerate launch -m ddkmix`."""

from ddkmix.cli import main

if __name__ == "__main__":
    main()
