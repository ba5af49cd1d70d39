"""`python -m loralab.cli`."""

from loralab.cli import main

if __name__ == "__main__":
    main()
