"""``python -m experiments``: the list of them."""

import experiments


def main() -> None:
    print(experiments.__doc__)


if __name__ == "__main__":
    main()
