"""Many adapters on one base, mixed within a batch: each row of a batch is routed to an adapter of its own, or to none.

bank.py        the bank: adapters come and go, rows are routed
held.py        an adapter as a bank holds it: nothing but its factors
route.py       the rows of one batch, in groups that are multiplied together
products.py    the branches of such a group at one layer
"""

from headstart.lora.bank.bank import Bank

__all__ = ["Bank"]
