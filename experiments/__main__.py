"""``python -m experiments``: the list of them."""

import experiments

print(experiments.__doc__)
